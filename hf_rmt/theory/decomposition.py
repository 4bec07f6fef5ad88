"""The one place that factors matrices.

Routes, chosen by shape and conditioning (the device only decides whose drivers run, see ``linalg``):

* **Gram.** Eigenvectors of the float64 Gram matrix on the shorter side, then ``B = W V`` for the
  other side. A singular value comes out with a relative error of ``eps cond^2``, so the small end,
  where that is no good, is refined: its columns of B, freed of the large ones, go through an SVD of
  their own, which leaves ``eps cond``, the error of a full float64 SVD. At 0.4 to 0.7 of its cost.
* **Full.** A float64 SVD, for small matrices, for those of which too much lies at the small end, and
  for one whose eigensolver does not converge.

Nothing is ever computed below float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_rmt.theory.linalg import eigh, eigvalsh, matmul, svd_thin, svd_values

#: Singular values below this share of the largest are refined on the Gram route: there ``eps cond^2``
#: would pass 1e-10.
_REFINE_BELOW = 1e-3
#: Values alone need no more than 1e-6, and no vector has to stay orthogonal: 1e-8 at this share.
_VALUES_REFINE_BELOW = 1e-4
#: Above this share of values to refine, a full SVD is cheaper.
_REFINE_AT_MOST = 0.25
#: Shorter sides up to this go through a full SVD: no time to gain.
_SMALL = 48
#: Rows of the longer side converted to float64 at a time, which bounds the memory of a tall matrix.
_ROWS = 2048


@dataclass(frozen=True, eq=False)
class SVDFactors:
    """Thin singular value decomposition ``W = U diag(s) Vh``, ``p = min(m, n)``.

    Attributes:
        u: ``(m, p)`` left singular vectors in columns.
        s: ``(p,)`` singular values, float64, descending.
        vh: ``(p, n)`` right singular vectors in rows.
        route: ``"gram"`` or ``"full"``.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor
    route: str

    def testable(self) -> torch.Tensor:
        """Mask ``(p,)`` of the vectors that the matrix determines; see ``determined``."""
        return determined(self.s, max(self.u.shape[0], self.vh.shape[1]))


def determined(s: torch.Tensor, longest: int) -> torch.Tensor:
    """Mask of singular values that are neither zero nor degenerate to working precision.

    Their vectors are arbitrary within a subspace, so no statistic of them means anything.
    """
    zero = _rank_tolerance(s, longest)
    # The Gram route tells two values apart no better than this, but for its refined end.
    blur = torch.where(s >= _REFINE_BELOW * s[0], 16 * torch.finfo(torch.float64).eps * s[0] ** 2 / s, 0.0)
    gaps = torch.nn.functional.pad(-s.diff(), (1, 1), value=float("inf"))
    return (s > zero) & (torch.minimum(gaps[1:], gaps[:-1]) > torch.maximum(zero, blur))


def svd(weight: torch.Tensor, dtype: torch.dtype = torch.float64) -> SVDFactors:
    """Singular values and vectors of one matrix.

    Args:
        weight: ``(m, n)``, finite, any floating dtype; the device decides where the work is done.
        dtype: of the vectors returned; the work is done in float64 whatever it is.

    Returns:
        ``SVDFactors`` on the weight's device. Singular values are right to 1e-9 relative plus
        ``eps cond``, left and right vectors orthonormal to 1e-9.

    Raises:
        ValueError: not a matrix, empty, on the meta device, or with NaN or Inf entries.
    """
    weight = _working_copy(weight)
    if weight.shape[0] < weight.shape[1]:
        tall = _svd_tall(weight.mT, dtype)
        return SVDFactors(tall.vh.mT, _exact_zeros(tall.s, weight), tall.u.mT, tall.route)
    tall = _svd_tall(weight, dtype)
    return replace(tall, s=_exact_zeros(tall.s, weight))


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    """Singular values of one matrix, ``(p,)``, float64, descending, right to 3e-7 relative.

    As ``svd`` without vectors, which are computed only where the small end has to be refined.
    """
    weight = _working_copy(weight)
    tall = weight.mT if weight.shape[0] < weight.shape[1] else weight
    return _exact_zeros(_values_tall(tall), weight)


def _values_tall(tall: torch.Tensor) -> torch.Tensor:
    if tall.shape[1] <= _SMALL:
        return svd_values(tall.double())
    gram = _gram(tall)
    eigenvalues = eigvalsh(gram)
    if eigenvalues is None:
        return svd_values(tall.double())
    s = eigenvalues.flip(0).clamp_min(0).sqrt()
    if s[0] > 0 and s[-1] >= _VALUES_REFINE_BELOW * s[0]:
        return s
    if int((s < _REFINE_BELOW * s[0]).sum()) > _REFINE_AT_MOST * len(s):
        return svd_values(tall.double())
    return _svd_tall(tall, torch.float32, gram).s


def _exact_zeros(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rounding noise below the numerical rank is written as the 0 that it stands for."""
    return torch.where(s > _rank_tolerance(s, max(weight.shape)), s, 0.0)


def _rank_tolerance(s: torch.Tensor, longest: int) -> torch.Tensor:
    return s[0] * longest * torch.finfo(torch.float64).eps


def count_not_finite(weight: torch.Tensor) -> int:
    """Number of NaN and Inf entries of a float32 or float64 tensor."""
    if bool(weight.sum().isfinite()):  # one pass in the usual case; a sum that overflows is looked into
        return 0
    return int((~weight.isfinite()).sum())


def as_float(weight: torch.Tensor) -> torch.Tensor:
    """The weight in float32 or float64, where the work on it is done; smaller dtypes are read exactly.

    Raises:
        ValueError: not a matrix, empty, on the meta device, or not floating point.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a matrix has two non-empty dimensions, this has shape {tuple(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError("the matrix is on the meta device and has no values")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"entries are {weight.dtype}, not floating point: dequantise the matrix first")
    weight = weight.detach()
    if weight.device.type == "mps":  # no float64 there
        weight = weight.cpu()
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _working_copy(weight: torch.Tensor) -> torch.Tensor:
    weight = as_float(weight)
    if count_not_finite(weight):
        raise ValueError("the matrix has NaN or Inf entries")
    return weight


def _svd_tall(weight: torch.Tensor, dtype: torch.dtype, gram: torch.Tensor | None = None) -> SVDFactors:
    cols = weight.shape[1]
    pair = eigh(_gram(weight) if gram is None else gram) if cols > _SMALL else None
    if pair is not None:
        s = pair[0].flip(0).clamp_min(0).sqrt()
        large = int((s >= _REFINE_BELOW * s[0]).sum())
        if s[0] > 0 and cols - large <= _REFINE_AT_MOST * cols:
            return _finish_gram(weight, pair[1].flip(1), s, large, dtype)
        del pair
    u, s, vh = svd_thin(weight.double())
    return SVDFactors(u.to(dtype), s, vh.to(dtype), "full")


def _gram(weight: torch.Tensor) -> torch.Tensor:
    """``W^T W`` in float64, by blocks of rows so that no float64 copy of W is ever whole."""
    gram: torch.Tensor | None = None
    for block in weight.split(_ROWS):
        exact = block.double()
        part = matmul(exact.mT, exact)
        gram = part if gram is None else gram.add_(part)
    assert gram is not None
    return gram


def _finish_gram(weight: torch.Tensor, v: torch.Tensor, s: torch.Tensor, large: int, dtype: torch.dtype) -> SVDFactors:
    """Left vectors from the right ones, and the small end refined. Both sides are stored by vectors,
    one after another in memory, as the tests of vectors read them."""
    ut = torch.empty((len(s), len(weight)), dtype=dtype, device=weight.device)
    v_large, v_small = v[:, :large], v[:, large:]
    small = torch.empty((len(weight), len(s) - large), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        block = slice(start, start + _ROWS)
        product = matmul(v.mT, weight[block].double().mT)
        small[block] = product[large:].mT
        ut[:large, block] = product[:large].div_(s[:large, None])
    if small.shape[1]:
        left = _orthogonal_to(small, weight, v_large, s[:large])
        u_small, s_small, turn = svd_thin(left)
        ut[large:] = u_small.mT
        v = torch.cat([v_large, matmul(v_small, turn.mT)], dim=1)
        s = torch.cat([s[:large], s_small])
    return SVDFactors(ut.mT, s, v.mT.to(dtype).contiguous(), "gram")


def _orthogonal_to(
    small: torch.Tensor, weight: torch.Tensor, v_large: torch.Tensor, s_large: torch.Tensor
) -> torch.Tensor:
    """Take out of the columns of ``small`` what they hold of the large left vectors.

    ``U_l^T small`` is ``S_l^-1 V_l^T W^T small``: two thin products, no float64 copy of U.
    """
    for _ in range(2):  # twice is enough
        pulled = torch.zeros_like(v_large[:, :1]).repeat(1, small.shape[1])
        for i in range(0, len(weight), _ROWS):
            pulled += matmul(weight[i : i + _ROWS].double().mT, small[i : i + _ROWS])
        weights = matmul(v_large.mT, pulled) / (s_large**2)[:, None]
        pushed = matmul(v_large, weights)
        small = torch.cat(
            [
                small[i : i + _ROWS] - matmul(weight[i : i + _ROWS].double(), pushed)
                for i in range(0, len(weight), _ROWS)
            ]
        )
    return small
