"""Subspaces of activations: which directions to keep, and what the kept ones tell of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_rmt.theory.linalg import eigh

#: Ridge of ``prediction``, as a share of the mean variance of what is kept.
_RIDGE = 1e-3
#: Weight of the variance itself beside what readers do with it, in ``reading_basis``.
_VARIANCE = 16.0


def principal_basis(covariances: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``(D,)``, descending, and eigenvectors ``(D, D)`` in columns, of a sum of covariances."""
    total = sum(covariances[1:], covariances[0])
    return _eigenvectors(total)


def reading_basis(
    covariances: Sequence[torch.Tensor], readers: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, where a direction counts by its variance and by what those who read it do with it.

    With covariance C and ``M = sum W^T W`` over the readers of a site, leaving out a direction q costs them
    ``q^T M C q`` to first order in what correlates with the rest. The symmetric part of ``M C / tr M``, summed over the
    sites, is mixed with the variance itself: measured on held-out calibration rows, either alone is worse. Directions
    in which nothing varies come last, whoever reads them.

    Args:
        covariances: ``(D, D)`` of each site.
        readers: ``(D, D)``, M of each site.
    """
    total = torch.zeros_like(covariances[0])
    for covariance, weights in zip(covariances, readers, strict=True):
        product = weights @ covariance
        total += (product + product.mT) / weights.trace() + _VARIANCE * covariance / len(covariance)
    variance, vectors = principal_basis(covariances)
    varying = variance > len(variance) * torch.finfo(variance.dtype).eps * variance[0]
    here, empty = vectors[:, varying], vectors[:, ~varying]
    values, turned = _eigenvectors(here.mT @ total @ here)
    return torch.cat([values, torch.zeros_like(variance[~varying])]), torch.cat([here @ turned, empty], dim=1)


def prediction(covariance: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What the kept part of a vector tells of all of it: ``A``, for which ``A Q^T x`` is the best guess of x.

    By least squares, ``A = C Q (Q^T C Q)^-1``, with a small ridge towards Q. Where Q holds eigenvectors of C this is Q
    itself: what was left out is then uncorrelated with what was kept.

    Args:
        covariance: ``(D, D)``, C.
        basis: ``(D, d)`` orthonormal columns, Q.

    Returns:
        ``(D, d)``.
    """
    crossed = covariance @ basis
    kept = basis.mT @ crossed
    ridge = _RIDGE * kept.trace() / len(kept)
    shifted = kept + ridge * torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    return torch.linalg.solve(shifted, (crossed + ridge * basis).mT).mT


def _eigenvectors(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pair = eigh(symmetric)
    if pair is None:
        raise RuntimeError("the eigensolver did not converge on the covariance of a residual stream")
    return pair[0].flip(0), pair[1].flip(1)
