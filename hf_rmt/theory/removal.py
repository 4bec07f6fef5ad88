"""Taking singular components out of a matrix (paper Eq. 9)."""

from __future__ import annotations

import torch

from hf_rmt.theory.decomposition import SVDFactors, as_float
from hf_rmt.theory.linalg import exact_matmul


def part(factors: SVDFactors, mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``U_sel diag(s_sel) Vh_sel``, ``(m, n)``, in the dtype of the factors, on a device.

    Args:
        factors: of the whole matrix.
        mask: ``(p,)`` boolean, the components.
        device: where the product is made.
    """
    index = mask.cpu().nonzero()[:, 0]  # on the CPU, where it indexes tensors of any device
    neighbours = len(index) and int(index[-1] - index[0]) + 1 == len(index)
    chosen = slice(int(index[0]), int(index[-1]) + 1) if neighbours else index  # the slice is a view
    s = factors.s[chosen].to(factors.u.dtype).to(device)
    return exact_matmul(factors.u[:, chosen].to(device) * s, factors.vh[chosen].to(device))


def without(weight: torch.Tensor, factors: SVDFactors, mask: torch.Tensor) -> torch.Tensor:
    """The matrix with some singular values set to zero, ``W - U_sel diag(s_sel) Vh_sel`` (paper Eq. 9).

    Computed in the precision of the factors, from what is removed or from what is kept, whichever has fewer
    components, and rounded to the dtype of the weight once, at the end.

    Args:
        weight: ``(m, n)``, any floating dtype.
        factors: its own, float32 or float64.
        mask: ``(p,)`` boolean, the components to remove.

    Returns:
        A new tensor ``(m, n)`` in the dtype and on the device of the weight; zeros if all are removed.
    """
    exact = as_float(weight)
    if 2 * int(mask.sum()) > len(mask):
        return part(factors, ~mask, exact.device).to(weight.dtype).to(weight.device)
    removed = part(factors, mask, exact.device)
    return torch.sub(exact.to(removed.dtype), removed, out=removed).to(weight.dtype).to(weight.device)
