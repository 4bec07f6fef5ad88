"""Are the entries of a singular vector those of a random unit vector? (paper section 4, Eq. 4-6)

A vector that carries no information is uniform on the unit sphere, so its entries look like
N(0, 1/n) but are tied together by the norm. The Kolmogorov-Smirnov distance to that Gaussian
therefore has a null distribution of its own, which depends on nothing but n; see ``ks_null``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from hf_rmt.theory.ks_null import KSNull, MonteCarloNull, shipped_null

#: Vectors with fewer entries get no p-value: the test has next to no power there.
MIN_ENTRIES = 32
#: Half width of the window of the local mean; 2 * 7 + 1 = 15 neighbours (paper Eq. 6).
HALF_WINDOW = 7
#: Entries processed at a time, so that the sorted copy stays in the processor's cache.
_CHUNK = 1 << 18


def ks_statistic(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kolmogorov-Smirnov distance of the entries of unit vectors from a Gaussian (paper Eq. 5).

    ``D = max_i max(i/n - C(v_(i)), C(v_(i)) - (i-1)/n)`` with C the CDF of N(0, 1/n): both
    one-sided gaps.

    Args:
        vectors: ``(count, n)``, one unit vector a row, any floating dtype and device.

    Returns:
        Two float64 tensors of shape ``(count,)`` on the CPU: the statistic of the vectors as they
        are, and that of the *centred* vectors (mean subtracted, renormalised). The second is blind
        to a common offset, which one vector with a large mean imposes on all the others.
    """
    count, n = vectors.shape
    plain, centred = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
    rows = max(1, _CHUNK // n)
    for start in range(0, count, rows):
        stop = start + rows
        ordered = _sorted_rows(vectors[start:stop])
        # Centring and scaling keep the order, so one sort serves both statistics.
        shifted = ordered - ordered.mean(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(shifted, dim=1, keepdim=True)
        # A constant vector has nothing but rounding left after centring: its statistic is that of zeros.
        shifted *= torch.where(norm > 1e-5, 1 / norm, 0.0)
        centred[start:stop] = _ks_of_sorted(shifted).double().cpu()
        plain[start:stop] = _ks_of_sorted(ordered).double().cpu()
    return plain, centred


def _sorted_rows(vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.float()
    if vectors.device.type != "cpu":
        return vectors.sort(dim=1).values
    # numpy sorts float32 with vector instructions, about ten times faster than torch on the CPU.
    return torch.from_numpy(np.sort(vectors.contiguous().numpy(), axis=1))


def _ks_of_sorted(ordered: torch.Tensor) -> torch.Tensor:
    """Statistic of each row of ``(count, n)``; the argument is overwritten.

    ``2 C - 1`` is an error function, and ``max_i (i/n - C_i)`` and ``max_i (C_i - (i-1)/n)`` are both
    extremes of ``C_i - (i-1)/n``: one pass fewer each. aminmax would take ten times as long.
    """
    n = ordered.shape[1]
    steps = torch.arange(n, dtype=torch.float64, device=ordered.device).mul_(2 / n).sub_(1).to(ordered.dtype)
    gap = ordered.mul_(math.sqrt(n / 2)).erf_().sub_(steps)
    return torch.maximum(gap.amax(dim=1), 2 / n - gap.amin(dim=1)) / 2


def local_mean(p_values: torch.Tensor, half_window: int = HALF_WINDOW) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each p-value with its neighbours (paper Eq. 6); the window shrinks at the two ends.

    Args:
        p_values: ``(count,)``; NaN marks vectors that were not tested and is left out.

    Returns:
        The local means and the number of p-values in each window, ``(count,)`` each. Under the
        null the standard deviation is ``sqrt(1 / (12 window))``, 0.075 inside (the paper prints
        0.05) and 0.102 at the ends.
    """
    known = ~p_values.isnan()
    sums = torch.nn.functional.pad(p_values.nan_to_num(0.0).double().cumsum(0), (1, 0))
    counts = torch.nn.functional.pad(known.long().cumsum(0), (1, 0))
    index = torch.arange(len(p_values))
    stop = (index + half_window + 1).clamp_max(len(p_values))
    start = (index - half_window).clamp_min(0)
    window = counts[stop] - counts[start]
    return (sums[stop] - sums[start]) / window, window


def benjamini_hochberg(p_values: torch.Tensor, level: float = 0.05) -> torch.Tensor:
    """Which p-values are discoveries at a false discovery rate (Benjamini & Hochberg 1995).

    Args:
        p_values: ``(count,)``; NaN is never a discovery and does not count as a test.
        level: expected share of false discoveries among the discoveries.

    Returns:
        Boolean mask of shape ``(count,)``.
    """
    known = ~p_values.isnan()
    ordered = p_values[known].sort().values
    total = len(ordered)
    below = (ordered <= level * torch.arange(1, total + 1, dtype=ordered.dtype) / max(total, 1)).nonzero()
    if len(below) == 0:
        return torch.zeros_like(known)
    return known & (p_values <= ordered[below[-1, 0]])


@functools.lru_cache(maxsize=256)
def dropout_threshold(count: int, level: float = 0.05) -> float:
    """How many standard deviations a local mean must fall below the median to be news.

    Neighbouring windows overlap and a matrix has many of them, so three standard deviations is
    not a test. The threshold is the ``level`` quantile of the largest drop over 1,000 simulated
    matrices of ``count`` uniform p-values (fixed seed): level 0.05 means one matrix in twenty.
    """
    generator = torch.Generator().manual_seed(20241017)
    drops = torch.empty(1000, dtype=torch.float64)
    for i in range(len(drops)):
        p = torch.rand(count, generator=generator, dtype=torch.float64)
        drops[i] = _drop_in_sd(p).max()
    return float(drops.quantile(1 - level))


def _drop_in_sd(p_values: torch.Tensor) -> torch.Tensor:
    mean, window = local_mean(p_values)
    return (p_values.nanmedian() - mean) * (12 * window).sqrt()


@dataclass(frozen=True, eq=False)
class VectorTest:
    """The test of all singular vectors of one side of one matrix.

    Attributes:
        statistic: ``(count,)`` KS distances D, NaN where a vector was not tested.
        p_values: ``(count,)`` in (0, 1]; small means: not a random vector. Never exactly 0.
        centred_p_values: the same after removing the vector's mean. Use them where the plain ones
            lie above one half: there, one vector with a large mean pushes all others (paper, end
            of section 4).
        entries: length n of the vectors.
        extreme_index: index of the tested vector with the largest D, -1 if none was tested.
        extreme_vector: its ``(n,)`` entries, for pictures; empty if none was tested.
    """

    statistic: torch.Tensor
    p_values: torch.Tensor
    centred_p_values: torch.Tensor
    entries: int
    extreme_index: int
    extreme_vector: torch.Tensor

    @property
    def local_mean(self) -> torch.Tensor:
        """``(count,)`` local means of the p-values (paper Eq. 6)."""
        return local_mean(self.p_values)[0]

    @property
    def plateau(self) -> float:
        """Median p-value: the level against which drops are judged; 0.5 for a random matrix."""
        return float(self.p_values.nanmedian())

    @property
    def significant(self) -> float:
        """Fraction of tested vectors with p below 0.01; 0.01 is expected of a random matrix."""
        known = self.p_values[~self.p_values.isnan()]
        return float((known < 0.01).double().mean()) if len(known) else math.nan

    def discoveries(self, level: float = 0.05) -> torch.Tensor:
        """Mask of the vectors that are discoveries at this false discovery rate."""
        return benjamini_hochberg(self.p_values, level)

    def dropouts(self, level: float = 0.05) -> list[tuple[int, int]]:
        """Index ranges ``[start, stop)`` in which the local mean drops out of the plateau.

        ``level`` is the chance that a random matrix shows any.
        """
        if len(self.p_values) == 0 or bool(self.p_values.isnan().all()):
            return []
        out = _drop_in_sd(self.p_values) > dropout_threshold(len(self.p_values), level)
        edges = torch.nn.functional.pad(out.long(), (1, 1)).diff().nonzero().flatten().tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


def test_vectors(
    vectors: torch.Tensor, testable: torch.Tensor | None = None, null: KSNull | MonteCarloNull | None = None
) -> VectorTest:
    """Test every row of ``vectors`` against the null of no information (paper section 4).

    Args:
        vectors: ``(count, n)``, unit vectors in the order of their singular values.
        testable: boolean mask ``(count,)``; vectors of zero or degenerate singular values are
            arbitrary within their subspace and should be left out.
        null: where p-values come from; the shipped table by default.

    Returns:
        A ``VectorTest``. Vectors shorter than ``MIN_ENTRIES`` are all left out.
    """
    count, n = vectors.shape
    keep = torch.ones(count, dtype=torch.bool) if testable is None else testable.cpu()
    if n < MIN_ENTRIES:
        keep = torch.zeros_like(keep)
    null = null or shipped_null()
    blank = torch.full((count,), math.nan, dtype=torch.float64)
    if not keep.any():
        return VectorTest(blank, blank.clone(), blank.clone(), n, -1, torch.empty(0))
    plain, centred = ks_statistic(vectors)
    extreme = int(torch.where(keep, plain, -1.0).argmax())
    return VectorTest(
        statistic=torch.where(keep, plain, blank),
        p_values=torch.where(keep, null.p_value(plain, n), blank),
        centred_p_values=torch.where(keep, null.p_value(centred, n, centred=True), blank),
        entries=n,
        extreme_index=extreme,
        extreme_vector=vectors[extreme].float().cpu().clone(),
    )


test_vectors.__test__ = False  # type: ignore[attr-defined]  # not a test for pytest to collect
