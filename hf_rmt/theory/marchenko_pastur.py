"""Marchenko-Pastur law of singular values (paper Eq. 2-3) and the choice of its sigma.

Throughout, ``p = min(m, n)``, ``q = max(m, n)`` and ``r = p / q``. The paper prints the law for
m <= n; it is symmetric under transposition, so p and q make it hold for every shape.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

SigmaRule = Literal["bulk", "empirical", "init"]
SIGMA_RULES: tuple[SigmaRule, ...] = get_args(SigmaRule)


@dataclass(frozen=True)
class MarchenkoPastur:
    """Limiting law of the singular values of an m x n matrix of i.i.d. entries.

    Attributes:
        rows, cols: shape of the matrix; the law does not change when they are swapped.
        sigma: standard deviation of the entries.
    """

    rows: int
    cols: int
    sigma: float = 1.0

    @property
    def ratio(self) -> float:
        """Aspect ratio ``r = p / q``, in (0, 1]."""
        return min(self.rows, self.cols) / max(self.rows, self.cols)

    @property
    def scale(self) -> float:
        """``sigma sqrt(q)``, the paper's sigma with a tilde (Eq. 3)."""
        return self.sigma * math.sqrt(max(self.rows, self.cols))

    @property
    def lower_edge(self) -> float:
        """Smallest singular value of the law, 0 for a square matrix (Eq. 3)."""
        return self.scale * (1 - math.sqrt(self.ratio))

    @property
    def upper_edge(self) -> float:
        """Largest singular value of the law (Eq. 3)."""
        return self.scale * (1 + math.sqrt(self.ratio))

    def density(self, s: torch.Tensor) -> torch.Tensor:
        """Probability density at singular values ``s`` of any shape, per unit of s (Eq. 2).

        0 outside the edges. The density of a square matrix is finite at s = 0.
        """
        s = s.double()
        inside = (s >= self.lower_edge) & (s <= self.upper_edge)
        if self.ratio == 1:  # sqrt(s^2) / s cancels, which leaves the value at s = 0 finite
            root = (self.upper_edge**2 - s**2).clamp_min(0).sqrt()
        else:
            root = ((self.upper_edge**2 - s**2) * (s**2 - self.lower_edge**2)).clamp_min(0).sqrt()
            root = root / torch.where(inside, s, 1.0)
        return torch.where(inside, root / (math.pi * self.ratio * self.scale**2), 0.0)

    def cdf(self, s: torch.Tensor) -> torch.Tensor:
        """Probability of a singular value below ``s``, closed form; any shape."""
        return _cdf(s.double() / self.scale, self.ratio)

    def quantile(self, probability: torch.Tensor) -> torch.Tensor:
        """Singular value below which a share ``probability`` lies; inverse of ``cdf`` to 1e-12."""
        u = probability.double()
        root = math.sqrt(self.ratio)
        low, high = torch.full_like(u, 1 - root), torch.full_like(u, 1 + root)
        for _ in range(55):
            middle = (low + high) / 2
            below = _cdf(middle, self.ratio) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self.scale * (low + high) / 2

    def distance(self, s: torch.Tensor) -> float:
        """Kolmogorov-Smirnov distance of observed singular values ``(p,)`` from the law, in [0, 1]."""
        cdf = self.cdf(s.sort().values)
        steps = torch.arange(len(s) + 1, dtype=torch.float64) / len(s)
        return float(torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()))


def _cdf(v: torch.Tensor, r: float) -> torch.Tensor:
    """CDF of singular values in units of the scale, by integrating Eq. 2 in closed form."""
    root = math.sqrt(r)
    x = v.clamp(1 - root, 1 + root) ** 2
    a, b = (1 - root) ** 2, (1 + root) ** 2
    radius = ((b - x) * (x - a)).clamp_min(0).sqrt()
    total = math.pi * r + radius - (1 + r) * torch.atan2(1 + r - x, radius)
    if r < 1:
        total = total + (1 - r) * torch.atan2((1 - r) ** 2 - (1 + r) * x, (1 - r) * radius)
    return (total / (2 * math.pi * r)).clamp(0, 1)


@functools.lru_cache(maxsize=4096)
def median_of_law(rows: int, cols: int) -> float:
    """Median singular value of the law for sigma = 1."""
    return float(MarchenkoPastur(rows, cols).quantile(torch.tensor(0.5)))


def sigma_of(rule: SigmaRule | float, s: torch.Tensor, shape: tuple[int, int], entry_std: float) -> float:
    """Standard deviation of the entries under one of the rules (paper section 3, App. B).

    Args:
        rule: ``"init"``: ``1/sqrt(min(m, n))``, what the paper calls 1/sqrt(m) for BERT;
            ``"empirical"``: the standard deviation of the entries (App. B, for Llama);
            ``"bulk"``: the sigma at which the median of the singular values equals the median of
            the law (Gavish & Donoho 2014), robust against spikes; or a number, taken as it is.
        s: ``(p,)`` singular values.
        shape: ``(m, n)``.
        entry_std: standard deviation of the entries.

    Raises:
        ValueError: an unknown rule or a number that is not positive.
    """
    if rule == "init":
        return 1 / math.sqrt(min(shape))
    if rule == "empirical":
        return entry_std
    if rule == "bulk":
        return float(s.double().quantile(0.5)) / median_of_law(*shape)
    return check_sigma(rule)


def check_sigma(rule: str | float) -> float:
    """A sigma given as a number, or an error that lists the rules."""
    if isinstance(rule, str) or not math.isfinite(rule) or rule <= 0:
        raise ValueError(f"sigma is {rule!r}: give one of {', '.join(SIGMA_RULES)}, or a positive number")
    return float(rule)
