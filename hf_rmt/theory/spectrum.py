"""Scalars of one spectrum: ranks, spacings, power law (WeightWatcher's metrics among them).

Every function takes the singular values ``s`` of one matrix, ``(p,)``, descending, any float dtype,
and returns a Python float: NaN where the quantity does not exist (all zeros, too few values).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

#: Eigenvalues ``s^2`` at or below this are left out of the power law, as WeightWatcher does.
POWER_LAW_FLOOR = 1e-5


def stable_rank(s: torch.Tensor) -> float:
    """``sum s^2 / s_1^2``, in [1, p]: how many directions share the energy."""
    return float((s.double() ** 2).sum() / s[0].double() ** 2) if s[0] > 0 else math.nan


def effective_rank(s: torch.Tensor) -> float:
    """``exp(-sum p ln p)`` with ``p = s / sum s``, in [1, p] (Roy & Vetterli 2007)."""
    if s[0] <= 0:
        return math.nan
    share = s.double() / s.double().sum()
    return float(torch.special.entr(share).sum().exp())


def participation_ratio(vectors: torch.Tensor) -> torch.Tensor:
    """``1 / sum v^4`` of each unit row of ``(count, n)``: how many entries carry a vector.

    Between 1 and n; ``(n + 2) / 3`` is expected of a random vector.
    """
    return 1 / (vectors.double() ** 4).sum(dim=1)


def mp_soft_rank(s: torch.Tensor, upper_edge: float) -> float:
    """``upper_edge^2 / s_1^2``: near 1 for a random matrix, small for strong spikes."""
    return float(upper_edge**2 / s[0].double() ** 2) if s[0] > 0 else math.nan


def spacing_ratio(s: torch.Tensor) -> float:
    """Mean ratio of neighbouring spacings of the bulk, in [0, 1]; 10 % are dropped at each end.

    0.5307 for a random matrix (GOE), 0.386 for uncorrelated levels (Atas et al. 2013); the
    standard deviation is about ``.29 / sqrt(count)``.
    """
    cut = len(s) // 10
    gaps = -s.double()[cut : len(s) - cut].diff()
    low, high = torch.minimum(gaps[1:], gaps[:-1]), torch.maximum(gaps[1:], gaps[:-1])
    ratios = (low / high)[high > 0]
    return float(ratios.mean()) if len(ratios) else math.nan


class PowerLaw(NamedTuple):
    """Fit of ``density(x) ~ x^-alpha`` to the eigenvalues ``x = s^2`` above ``x_min``.

    ``distance`` is the one-sided KS distance that chose ``x_min``; ``size`` the number of values from it on.
    """

    alpha: float
    x_min: float
    distance: float
    size: int


def power_law(s: torch.Tensor) -> PowerLaw:
    """Maximum-likelihood power-law exponent of the spectrum's tail (Clauset et al. 2009).

    As WeightWatcher 0.7 computes it: eigenvalues ``s^2`` not divided by n, those at or below
    ``POWER_LAW_FLOOR`` dropped, ``alpha = 1 + k / sum ln(x / x_min)`` for every ``x_min`` but the
    last, and the ``x_min`` with the smallest one-sided distance. WeightWatcher uses another
    estimator below 20 eigenvalues; here the definition is the same for any number from 2 on.
    """
    x = (s.double() ** 2).sort().values
    x = x[x > POWER_LAW_FLOOR]
    total = len(x)
    if total < 2 or x[0] == x[-1]:
        return PowerLaw(math.nan, math.nan, math.nan, 0)
    log_x = x.log()
    counts = torch.arange(total, 0, -1, dtype=torch.float64)
    tail_sums = log_x.flip(0).cumsum(0).flip(0) - counts * log_x
    alphas = (1 + counts / tail_sums)[:-1]
    distances = _one_sided_distances(log_x, alphas)
    distances[~alphas.isfinite()] = math.inf
    best = int(distances.argmin())
    return PowerLaw(float(alphas[best]), float(x[best]), float(distances[best]), total - best)


def _one_sided_distances(log_x: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """``max_j |1 - (x_j / x_min)^(1 - alpha) - j / k|`` for every candidate x_min."""
    total = len(log_x)
    index = torch.arange(total, dtype=torch.float64)
    distances = torch.empty_like(alphas)
    rows = max(1, (1 << 20) // total)  # candidates at a time: the whole table is p x p
    for start in range(0, len(alphas), rows):
        stop = min(start + rows, len(alphas))
        first = index[start:stop, None]
        fitted = -torch.expm1((1 - alphas[start:stop, None]) * (log_x[start:] - log_x[start:stop, None]))
        gap = (fitted - (index[start:] - first) / (total - first)).abs_()
        distances[start:stop] = gap.masked_fill_(index[start:] < first, 0.0).amax(dim=1)
    return distances


def log_norm(s: torch.Tensor) -> float:
    """``log10 ||W||_F^2``."""
    return _log10(float((s.double() ** 2).sum()))


def alpha_hat(s: torch.Tensor, alpha: float) -> float:
    """``alpha log10 s_1^2``, WeightWatcher's weighted alpha (Martin et al. 2021)."""
    return alpha * 2 * _log10(float(s[0]))


def log_alpha_norm(s: torch.Tensor, alpha: float) -> float:
    """``log10 sum s^(2 alpha)``."""
    if math.isnan(alpha) or s[0] <= 0:
        return math.nan
    log_s = s.double()[s > 0].log()
    return float(torch.logsumexp(2 * alpha * log_s, 0)) / math.log(10)


def _log10(x: float) -> float:
    return math.log10(x) if x > 0 else math.nan
