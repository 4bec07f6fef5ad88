"""The linear algebra under ``decomposition``: numpy on the CPU, torch elsewhere, with fallbacks.

numpy's OpenBLAS takes half the time of torch's MKL for ``W^T W`` (it sees the symmetry) and two
thirds for eigenvalues, on an AMD processor; both release the interpreter lock.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch


def _by_numpy(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


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
