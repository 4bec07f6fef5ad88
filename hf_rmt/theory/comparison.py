"""What training did to a matrix: where in its spectrum the change lies, and what became of its singular vectors.

Paper App. D; intruder dimensions: Shuttleworth et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_rmt.theory.linalg import eigvalsh, matmul, svd_values

#: Groups of equally many singular directions, the largest singular values first.
DECILES = 10
#: After-vectors among which intruders are looked for, and the match below which a vector is one.
TOP, INTRUDER_BELOW = 10, 0.5
#: Vectors matched at a time, which bounds the memory of their products.
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class DecileEnergy:
    """How the energy of a change lies over one side of the singular basis before it.

    Attributes:
        shares: ``(11,)`` shares of ``||dW||_F^2``: in decile 1 (the largest singular values) to 10, and
            outside the thin basis. They add up to 1; NaN where nothing changed.
        expected: ``(11,)`` the same of a change without direction.
    """

    shares: torch.Tensor
    expected: torch.Tensor


@dataclass(frozen=True, eq=False)
class Match:
    """The vector before that each singular vector after resembles most.

    Attributes:
        values: ``(p,)`` largest absolute inner product with any vector before, 0 to 1, in the order of the
            singular values after; NaN where a vector is arbitrary.
        best: ``(p,)`` index of the vector before that gives it, -1 where a vector is arbitrary.
    """

    values: torch.Tensor
    best: torch.Tensor

    @property
    def angles(self) -> torch.Tensor:
        """``(p,)`` angles to the best match, 0 to pi/2."""
        return self.values.arccos()

    @property
    def intruders(self) -> int:
        """Intruder dimensions (Shuttleworth et al. 2024): top vectors that resemble none before."""
        return int((self.values[:TOP] < INTRUDER_BELOW).sum())

    @property
    def top(self) -> float:
        """Mean match of the top vectors."""
        return float(self.values[:TOP].nanmean())


def energy_by_decile(change: torch.Tensor, u: torch.Tensor, vh: torch.Tensor) -> tuple[DecileEnergy, DecileEnergy]:
    """Where in the singular basis of W its change lies: ``||dW V_d||^2`` and ``||U_d^T dW||^2`` over ``||dW||^2``.

    Deciles are those of ``numpy.array_split``: the first take one more where p is not divisible by 10.

    Args:
        change: ``(m, n)`` dW.
        u, vh: ``(m, p)`` and ``(p, n)`` singular vectors of W, descending; on one device with the change.

    Returns:
        The right side and the left side.

    Raises:
        ValueError: change and vectors differ in shape.
    """
    if change.shape != (len(u), vh.shape[1]):
        raise ValueError(f"a change of shape {tuple(change.shape)} in a basis of shape {(len(u), vh.shape[1])}")
    norm = frobenius_norm(change)
    direction = (change / norm if norm else change).to(vh.dtype)
    right = torch.linalg.vector_norm(matmul(direction, vh.mT), dim=0, dtype=torch.float64) ** 2
    left = torch.linalg.vector_norm(matmul(u.mT, direction), dim=1, dtype=torch.float64) ** 2
    rows, cols = change.shape
    return _by_decile(right, cols, norm), _by_decile(left, rows, norm)


def _by_decile(energy: torch.Tensor, length: int, norm: float) -> DecileEnergy:
    """Sums over deciles of the energies ``(p,)`` of single directions in a space of ``length`` dimensions."""
    outside = length - len(energy)
    counts = [len(part) for part in energy.tensor_split(DECILES)]
    expected = torch.tensor([*counts, outside], dtype=torch.float64) / length
    if not norm:
        return DecileEnergy(torch.full_like(expected, math.nan), expected)
    sums = torch.stack([part.sum() for part in energy.cpu().tensor_split(DECILES)])
    rest = (1 - sums.sum()).clamp_min(0.0) if outside else sums.new_zeros(())
    shares = torch.cat([sums, rest[None]])
    return DecileEnergy(shares / shares.sum(), expected)  # vectors in float32 leave 1e-7 to be spread


def match(before: torch.Tensor, after: torch.Tensor, known: torch.Tensor | None = None) -> Match:
    """The best match of each vector after among all vectors before.

    Args:
        before: ``(k, n)`` unit vectors in rows.
        after: ``(p, n)`` unit vectors in rows, of the same dtype and device.
        known: boolean mask ``(p,)``; the other vectors after are arbitrary and match nothing.

    Raises:
        ValueError: the vectors differ in length.
    """
    if before.shape[1] != after.shape[1]:
        raise ValueError(f"vectors of {before.shape[1]} entries before and of {after.shape[1]} after")
    values, best = [], []
    for rows in after.split(_ROWS):
        index = matmul(rows, before.mT).abs().argmax(dim=1)
        values.append(_cosines(rows, before[index]).cpu())
        best.append(index.cpu())
    keep = torch.ones(len(after), dtype=torch.bool) if known is None else known.cpu()
    return Match(torch.where(keep, torch.cat(values), math.nan), torch.where(keep, torch.cat(best), -1))


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute cosines between rows, by their distance: products would lose angles below 1e-3 to float32."""
    a, b = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (a, b))
    distance = torch.minimum((a - b).norm(dim=1), (a + b).norm(dim=1))
    return (1 - distance**2 / 2).clamp_min(0.0)


def frobenius_norm(matrix: torch.Tensor) -> float:
    """Root of the sum of squares, in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def change_stable_rank(change: torch.Tensor) -> float:
    """``||dW||_F^2 / ||dW||_2^2``, 1 to p: 1 for a change in one direction; NaN where nothing changed."""
    norm = frobenius_norm(change)
    if not norm:
        return math.nan
    direction = change.double() / norm
    thin = direction if len(direction) >= direction.shape[1] else direction.mT
    eigenvalues = eigvalsh(matmul(thin.mT, thin))
    return 1 / float(eigenvalues[-1] if eigenvalues is not None else svd_values(thin)[0] ** 2)
