"""The linear algebra under ``decomposition``: numpy on the CPU, torch elsewhere, with fallbacks.

numpy's OpenBLAS takes half the time of torch's MKL for ``W^T W`` (it sees the symmetry) and two
thirds for eigenvalues, on an AMD processor; both release the interpreter lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import blas

#: Side of the blocks that the triangle of a symmetric matrix is cut into.
_BLOCK = 256


def _by_numpy(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in their own dtype for a while, also where the caller has autocast on or has allowed TF32."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings = torch.backends.cuda.matmul
        name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
        before = getattr(settings, name)
        setattr(settings, name, exact)
        try:
            yield
        finally:
            setattr(settings, name, before)


def exact_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product of two tensors on one device in their own dtype, whatever the caller has set, by torch's routines."""
    with full_precision(a.device):
        return a @ b


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of two tensors on one device."""
    if not _by_numpy(a):
        return a @ b
    return torch.from_numpy(a.numpy() @ b.numpy())


def eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues, ascending, and eigenvectors in columns; None where the solver does not converge."""
    try:
        if not _by_numpy(symmetric):
            return torch.linalg.eigh(symmetric)
        values, vectors = np.linalg.eigh(symmetric.numpy())
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
        return None
    return torch.from_numpy(values), torch.from_numpy(vectors)


def eigvalsh(symmetric: torch.Tensor) -> torch.Tensor | None:
    """Eigenvalues, ascending; None where the solver does not converge."""
    try:
        if not _by_numpy(symmetric):
            return torch.linalg.eigvalsh(symmetric)
        return torch.from_numpy(np.linalg.eigvalsh(symmetric.numpy()))
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
        return None


def svd_thin(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD; where divide and conquer does not converge, LAPACK's slower QR iteration does."""
    if not _by_numpy(matrix):
        return torch.linalg.svd(matrix, full_matrices=False)  # falls back to another driver itself
    try:
        factors: tuple[np.ndarray, ...] = np.linalg.svd(matrix.numpy(), full_matrices=False)
    except np.linalg.LinAlgError:
        factors = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
    u, s, vh = (torch.from_numpy(factor) for factor in factors)
    return u, s, vh


def svd_values(matrix: torch.Tensor) -> torch.Tensor:
    """Singular values, descending, with the same fallback."""
    if not _by_numpy(matrix):
        return torch.linalg.svdvals(matrix)
    try:
        return torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False))
    except np.linalg.LinAlgError:
        return torch.from_numpy(scipy.linalg.svd(matrix.numpy(), compute_uv=False, lapack_driver="gesvd"))


def triangle(n: int) -> Iterator[tuple[slice, slice]]:
    """The rows of each block of the lower triangle of a square matrix, and the columns up to it."""
    for start in range(0, n, _BLOCK):
        yield slice(start, start + _BLOCK), slice(0, start + _BLOCK)


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows^T rows`` to the lower triangle of ``gram`` in place; what the upper one holds is undefined.

    By torch, block by block of the triangle, at little more than half the price of the whole product: a
    library with threads of its own (BLAS of scipy has the very routine) would fight for the cores with the
    threads of the forward pass that it alternates with, which costs more than it saves.

    Args:
        gram: ``(n, n)``, float32 or float64.
        rows: ``(count, n)`` of the same dtype and device.
    """
    for block, up_to_it in triangle(len(gram)):
        gram[block, up_to_it].addmm_(rows[:, block].mT, rows[:, up_to_it])


def add_outer_both_ways(gram: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add ``x y^T + y x^T`` to the lower triangle of a float64 matrix in place; the upper one is undefined."""
    if not _by_numpy(gram):
        gram.addr_(x, y).addr_(y, x)
        return
    result = blas.dsyr2(1.0, x.numpy(), y.numpy(), a=gram.numpy().T, overwrite_a=1)
    assert np.shares_memory(result, gram.numpy())


def mirror_lower(gram: torch.Tensor) -> None:
    """Make a matrix on the CPU symmetric in place by its lower triangle.

    By blocks that stay in the cache, and by numpy: torch's copy of a transpose takes twenty times as long.
    """
    array = gram.numpy()
    for i in range(0, len(array), _BLOCK):
        rows = slice(i, i + _BLOCK)
        square = np.tril(array[rows, rows])
        array[rows, rows] = square + np.tril(square, -1).T
        for j in range(i + _BLOCK, len(array), _BLOCK):
            array[rows, j : j + _BLOCK] = array[j : j + _BLOCK, rows].T
