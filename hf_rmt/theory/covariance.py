"""Moments of activations, and whether singular vectors point where the data is (paper section 5, Eq. 7-8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincc, betainccinv

from hf_rmt.theory.linalg import eigh

#: Level of the null quantile that tables and figures give beside an overlap.
NULL_LEVEL = 0.99


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens from which a covariance is made; those of several data sets add up.

    Attributes:
        outer: ``(n, n)`` float64, the sum of ``x x^T``.
        total: ``(n,)`` float64, the sum of ``x``.
        tokens: how many tokens were summed.
        eps: relative precision of the products that were summed.
    """

    outer: torch.Tensor
    total: torch.Tensor
    tokens: int
    eps: float = torch.finfo(torch.float64).eps

    @classmethod
    def of(cls, activations: torch.Tensor) -> Moments:
        """Moments of ``(tokens, n)`` activations, in float64."""
        exact = activations.double()
        return cls(exact.mT @ exact, exact.sum(0), len(exact))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.outer + other.outer, self.total + other.total, self.tokens + other.tokens, max(self.eps, other.eps)
        )

    @property
    def mean(self) -> torch.Tensor:
        """``(n,)`` mean activation."""
        return self.total / self.tokens

    def covariance(self, centred: bool = False) -> torch.Tensor:
        """``(n, n)`` covariance F (paper Eq. 7): the mean of ``x x^T``; ``centred`` takes the mean out first."""
        covariance = self.outer / self.tokens
        if centred:
            covariance -= torch.outer(self.mean, self.mean)
        return covariance

    def eigenbasis(self, centred: bool = False) -> Eigenbasis:
        """Eigenvalues and eigenvectors of the covariance.

        Raises:
            ValueError: no tokens.
        """
        if self.tokens == 0:
            raise ValueError("no tokens were summed, so there is no covariance")
        pair = eigh(self.covariance(centred))
        if pair is None:
            raise RuntimeError("the eigensolver did not converge on an activation covariance")
        values, vectors = pair[0].flip(0).clamp_min(0), pair[1].flip(1).mT.contiguous()
        # Products are made about a point near the mean (``MomentSum``), so their rounding does not see the mean.
        varying = values[0] if centred else _largest_eigenvalue(self.covariance(centred=True))
        # The mean that centring takes out leaves the rounding of its own size behind.
        largest = values[0] + centred * (self.mean @ self.mean)
        noise = torch.maximum(self.eps * varying, len(values) * torch.finfo(torch.float64).eps * largest)
        rank = min(int((values > noise).sum()), self.tokens - centred)
        return Eigenbasis(values, vectors, max(rank, 0), self.tokens, centred)


def _largest_eigenvalue(symmetric: torch.Tensor, rounds: int = 30) -> torch.Tensor:
    """Of a positive matrix, by power iteration, to a few per cent."""
    vector = symmetric[symmetric.diagonal().argmax()]
    for _ in range(rounds):
        vector = symmetric @ (vector / vector.norm().clamp_min(torch.finfo(symmetric.dtype).tiny))
    return vector.norm()


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvalues and eigenvectors of an activation covariance.

    Attributes:
        values: ``(n,)`` eigenvalues, float64, descending.
        vectors: ``(n, n)`` eigenvectors in rows.
        rank: number of eigenvectors that the data determines; the rest span directions without data.
        tokens: number of tokens behind it.
        centred: whether the mean was taken out.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rank: int
    tokens: int
    centred: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Overlap:
    """How well each singular vector of one side matches an eigenvector of the covariance (paper Eq. 8).

    Attributes:
        values: ``(p,)`` overlaps ``O_k = max_j |v_k . f_j|``, 0 to 1, in the order of the singular
            values; NaN where a vector is arbitrary.
        best: ``(p,)`` index of the eigenvector that matches best.
        eigenvalues: ``(n,)`` spectrum of the covariance, descending.
        compared: number of eigenvectors compared with: the rank of the covariance.
        tokens: number of tokens behind the covariance.
        centred: whether the mean was taken out of it.
    """

    values: torch.Tensor
    best: torch.Tensor
    eigenvalues: torch.Tensor
    compared: int
    tokens: int
    centred: bool

    @property
    def entries(self) -> int:
        """Length n of the vectors."""
        return len(self.eigenvalues)

    def null_quantile(self, level: float = NULL_LEVEL) -> float:
        """The overlap that a random vector stays below with probability ``level``."""
        return null_quantile(self.entries, self.compared, level)

    @property
    def p_values(self) -> torch.Tensor:
        """``(p,)`` chance that a random vector overlaps as much."""
        return null_p_value(self.values, self.entries, self.compared)


def overlap(vectors: torch.Tensor, basis: Eigenbasis, known: torch.Tensor | None = None) -> Overlap:
    """Largest absolute inner product of each vector with an eigenvector of the covariance (paper Eq. 8).

    The paper prints it without the absolute value, but the sign of an eigenvector is arbitrary.
    Eigenvectors without data (beyond the rank) are left out.

    Args:
        vectors: ``(p, n)`` unit vectors in rows.
        basis: of the activations on the same side of the matrix.
        known: boolean mask ``(p,)``; the others are arbitrary and get NaN.

    Raises:
        ValueError: vectors and covariance differ in dimension.
    """
    if vectors.shape[1] != len(basis.values):
        raise ValueError(f"vectors of {vectors.shape[1]} entries against a covariance of {len(basis.values)}")
    count = len(vectors)
    values = torch.full((count,), math.nan, dtype=torch.float64)
    best = torch.full((count,), -1, dtype=torch.long)
    if basis.rank:
        products = vectors @ basis.vectors[: basis.rank].to(vectors).mT
        largest, index = products.abs_().max(dim=1)
        keep = torch.ones(count, dtype=torch.bool) if known is None else known.cpu()
        values = torch.where(keep, largest.double().clamp_max(1.0).cpu(), values)
        best = torch.where(keep, index.cpu(), best)
    return Overlap(
        values=values,
        best=best,
        eigenvalues=basis.values.cpu().clone(),
        compared=basis.rank,
        tokens=basis.tokens,
        centred=basis.centred,
    )


def null_quantile(entries: int, compared: int, level: float = NULL_LEVEL) -> float:
    """Quantile of the overlap of a uniformly random unit vector with the best of several directions.

    The square of one component of a random unit vector has a Beta(1/2, (n-1)/2) law; the largest of
    ``compared`` of them is treated as that of independent ones, which is good in the tail.

    Args:
        entries: length n of the vectors.
        compared: number of orthonormal directions, at most n.
        level: probability of staying below, between 0 and 1.
    """
    if compared == 0:
        return math.nan
    if entries == 1:
        return 1.0
    tail = -math.expm1(math.log(level) / compared)
    return math.sqrt(betainccinv(0.5, (entries - 1) / 2, tail))


def null_p_value(values: torch.Tensor, entries: int, compared: int) -> torch.Tensor:
    """Chance that the overlap of a random unit vector is at least ``values``; see ``null_quantile``."""
    if entries == 1 or compared == 0:
        return torch.where(values.isnan(), values, 1.0)
    one = torch.from_numpy(betaincc(0.5, (entries - 1) / 2, (values**2).clamp_max(1.0).numpy()))
    return -torch.expm1(compared * torch.log1p(-one))


def overlap_columns(
    s: torch.Tensor, edges: tuple[float, float], match: Overlap | None, p_values: torch.Tensor | None
) -> dict[str, float | None]:
    """The columns of the table that sum up the overlaps of one side.

    Args:
        s: ``(p,)`` singular values, descending.
        edges: lower and upper edge of the law; means are taken above, between and below them.
        match: the overlaps, or None.
        p_values: ``(p,)`` of the test of the same vectors, or None.
    """
    if match is None:
        return dict.fromkeys(OVERLAP_SUMMARY)
    lower, upper = edges
    above, below = s > upper, s < lower
    values = match.values
    means = {"above": values[above], "bulk": values[~above & ~below], "below": values[below]}
    energy = float(match.eigenvalues.sum())
    return {
        **{f"overlap_{part}": float(chosen.nanmean()) for part, chosen in means.items()},
        "overlap_null": match.null_quantile(),
        "overlap_rank_correlation": _rank_correlation(values, p_values) if p_values is not None else None,
        "activation_rank": match.compared,
        "activation_top_share": float(match.eigenvalues[0]) / energy if energy else None,
        "activation_tokens": match.tokens,
    }


#: What ``overlap_columns`` gives.
OVERLAP_SUMMARY = (
    "overlap_above",
    "overlap_bulk",
    "overlap_below",
    "overlap_null",
    "overlap_rank_correlation",
    "activation_rank",
    "activation_top_share",
    "activation_tokens",
)


def _rank_correlation(values: torch.Tensor, p_values: torch.Tensor) -> float:
    """Spearman's, between overlap and -log p: positive where vectors that are not random overlap more."""
    from scipy.stats import spearmanr

    known = ~(values.isnan() | p_values.isnan())
    values, p_values = values[known], p_values[known]
    if len(values) < 3 or bool((values == values[0]).all()) or bool((p_values == p_values[0]).all()):
        return math.nan
    return float(spearmanr(values.numpy(), -p_values.log().numpy()).statistic)
