"""How sure is a change of a score? Paired over the rows of an evaluation, joined over seeds.

A sweep asks how much a score changes when something is removed from a model. The model with and
without it sees the same evaluation rows, so the change is a matter of differences row by row: what the
two have in common, easy and hard rows, drops out of its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

#: A change below so many of its standard errors is undecided.
DECIDED = 2.0
#: Resamples of a bootstrap: its ends then vary by a twentieth of a standard error.
RESAMPLES = 2000
_LEVEL = 0.95
#: Resampled rows at a time, to bound the memory.
_CHUNK = 1 << 23


@dataclass(frozen=True, eq=False)
class Rows:
    """What each row of an evaluation contributed to a metric.

    Attributes:
        values: ``(n,)`` float64, the metric of each row: 0 or 1 for an accuracy, for a perplexity the mean
            negative log-likelihood of a token of the row.
        weights: ``(n,)`` float64, how much each counts: 1, or its tokens. A row of weight 0 may have any value.
        exponential: whether the score is the exponential of the mean, as a perplexity is.

    Raises:
        ValueError: no rows, values and weights of different shapes, or weights that are negative or all 0.
    """

    values: torch.Tensor
    weights: torch.Tensor
    exponential: bool = False

    def __post_init__(self) -> None:
        for name in ("values", "weights"):
            own = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, own)
        shapes = tuple(self.values.shape), tuple(self.weights.shape)
        if shapes[0] != shapes[1] or self.values.ndim != 1 or not len(self.values):
            raise ValueError(f"values {shapes[0]} and weights {shapes[1]} of rows must both be (n,), n at least 1")
        if bool((self.weights < 0).any()) or not float(self.weights.sum()) > 0:
            raise ValueError("weights of rows must be 0 or more, and not all of them 0")
        # The mean of a row without tokens is 0 / 0; it counts for nothing.
        object.__setattr__(self, "values", self.values.where(self.weights > 0, 0.0))

    def __len__(self) -> int:
        return len(self.values)

    def score(self) -> float:
        """The weighted mean of the values; its exponential where ``exponential``."""
        return float(_scores(self._mean(), self.exponential))

    def influence(self) -> torch.Tensor:
        """How much each row moves the score, ``(n,)``, of mean 0: their variance over n is that of the score.

        The score is a ratio, ``sum w x / sum w``, perhaps within an exponential; this is its derivative
        by the share of each row (the delta method).
        """
        mean = self._mean()
        slope = mean.exp() if self.exponential else 1.0
        return slope * self.weights * (self.values - mean) / self.weights.mean()

    def error(self) -> float:
        """Standard error of the score over the rows; 0 for a single row."""
        return float(self.influence().square().mean().sqrt()) / max(len(self) - 1, 1) ** 0.5

    def _mean(self) -> torch.Tensor:
        return (self.weights * self.values).sum() / self.weights.sum()


def _scores(means: torch.Tensor, exponential: bool) -> torch.Tensor:
    return means.exp() if exponential else means


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a score, the mean over seeds, and how sure it is.

    Attributes:
        mean: score minus baseline.
        error: its standard error, NaN where nothing tells it (one seed and no rows).
        low, high: a 95 % interval, NaN in the same case.
        spread: standard deviation of the change over the seeds, NaN with one.
        seeds: how many there are.
    """

    mean: float
    error: float
    low: float
    high: float
    spread: float
    seeds: int

    @property
    def undecided(self) -> bool:
        """Whether the change is 0, less than two standard errors away from it, or has no error; or 0 is in the
        interval, which of few seeds without rows is the wider of the two."""
        return not (self.mean and abs(self.mean) >= DECIDED * self.error) or self.low <= 0 <= self.high


def paired_change(scores: Sequence[Rows], baselines: Sequence[Rows], seed: int = 0) -> Change:
    """The change between two evaluations of the same rows, over one or more seeds.

    Args:
        scores: a ``Rows`` a seed.
        baselines: what each of them is compared with, in the same order.
        seed: of the bootstrap.

    Returns:
        The mean change. Its error and interval are those of ``joined_change``.

    Raises:
        ValueError: as many scores as baselines are needed, all of the same rows.
    """
    if len(scores) != len(baselines) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(baselines)} baselines: give a baseline for each score")
    changes = torch.tensor([a.score() - b.score() for a, b in zip(scores, baselines, strict=True)], dtype=torch.float64)
    replicates = bootstrap_scores([*scores, *baselines], seed=seed)
    influences = torch.stack([a.influence() - b.influence() for a, b in zip(scores, baselines, strict=True)])
    return joined_change(changes, influences, replicates[:, : len(scores)] - replicates[:, len(scores) :], seed)


def joined_change(changes: torch.Tensor, influences: torch.Tensor, replicates: torch.Tensor, seed: int = 0) -> Change:
    """The mean change over seeds, with an error of both rows and seeds.

    All seeds are evaluated on the same rows, so rows are no more numerous for there being more seeds: a row
    that is easy to lose is lost by all of them. The influences are therefore averaged over seeds row by
    row, and the variance between rows is taken of these averages. Seeds are another sample, of
    fine-tuned models. The variance of the mean change is the sum of the two::

        var_rows(mean over seeds) / n_rows  +  var_seeds(change) / n_seeds

    Noise that is of one row in one seed is in both terms, so that the error is somewhat too large where it
    prevails. Where the seeds prevail and there are two or three, their spread is hardly known, and two
    standard errors are less sure than they sound. With one seed the error is that of the rows alone: it says
    nothing of other seeds.

    The interval is a percentile bootstrap in which rows are drawn for all seeds alike, and seeds as well.
    The deviations of the seeds drawn are widened by ``sqrt(S / (S - 1))``: S drawn from S vary less than that.

    Args:
        changes: ``(S,)`` float64, the change of each seed.
        influences: ``(S, n)``, what each row has to do with it (``Rows.influence``, score minus baseline).
        replicates: ``(B, S)``, the changes when rows are drawn again (``bootstrap_scores``, score minus baseline).
        seed: of the drawing of seeds.
    """
    count, rows = influences.shape
    variance = influences.mean(dim=0).var() / rows if rows > 1 else torch.tensor(math.nan)
    means = replicates.mean(dim=1)
    if count > 1:
        variance = variance + changes.var() / count
        drawn = torch.from_numpy(np.random.default_rng([seed, count]).integers(count, size=tuple(replicates.shape)))
        deviations = replicates.gather(1, drawn).mean(dim=1) - means
        means = means + math.sqrt(count / (count - 1)) * deviations
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means.numpy(), [tail, 1 - tail])
    return Change(
        mean=float(changes.mean()),
        error=float(variance.sqrt()),
        low=float(low),
        high=float(high),
        spread=float(changes.std()) if count > 1 else math.nan,
        seeds=count,
    )


def change_of_seeds(changes: Sequence[float]) -> Change:
    """The mean change where only the score of each seed is known: the seeds alone decide.

    The interval is Student's, as a bootstrap of a handful of seeds is too narrow. One seed has no error.
    """
    from scipy.stats import t

    known = np.asarray(changes, dtype=np.float64)
    count = len(known)
    spread = float(known.std(ddof=1)) if count > 1 else math.nan
    error = spread / math.sqrt(count)
    reach = float(t.ppf((1 + _LEVEL) / 2, count - 1)) * error if count > 1 else math.nan
    mean = float(known.mean())
    return Change(mean=mean, error=error, low=mean - reach, high=mean + reach, spread=spread, seeds=count)


def bootstrap_scores(rows: Sequence[Rows], resamples: int = RESAMPLES, seed: int = 0) -> torch.Tensor:
    """Scores when evaluation rows are drawn again with replacement, the same ones for all.

    Args:
        rows: k evaluations of the same n rows. The difference of two columns of the result is a paired one.
        resamples: how many times n rows are drawn.
        seed: of the drawing.

    Returns:
        ``(resamples, k)`` float64.

    Raises:
        ValueError: the evaluations are not of the same rows.
    """
    refuse_other_rows(rows)
    weights = rows[0].weights
    weighted = torch.stack([one.values for one in rows], dim=1) * weights[:, None]
    generator = torch.Generator().manual_seed(seed)
    n, means = len(weights), []
    for count in _chunks(resamples, n):
        drawn = torch.randint(n, (count, n), generator=generator)
        ones = torch.ones(count, n, dtype=torch.float64)
        times = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
        means.append((times @ weighted) / (times @ weights)[:, None])
    replicates = torch.cat(means)
    exponential = torch.tensor([one.exponential for one in rows])
    return torch.where(exponential, replicates.exp(), replicates)


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK // width)
    return [min(size, total - start) for start in range(0, total, size)]


def refuse_other_rows(rows: Sequence[Rows]) -> None:
    """Raise if evaluations are not of the same rows: they cannot be paired."""
    for one in rows:
        if len(one) != len(rows[0]):
            raise ValueError(f"evaluations of {len(rows[0])} and {len(one)} rows cannot be paired: use the same rows")
        if not torch.equal(one.weights, rows[0].weights):
            raise ValueError(
                "evaluations whose rows have other weights cannot be paired: use the same rows, in one order"
            )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, NaN where fewer than three pairs are known or one side is constant.

    Attributes:
        rho: from -1 to 1.
        p_value: two-sided, by permutation.
        count: pairs that were known.
    """

    rho: float
    p_value: float
    count: int


def rank_correlation(
    x: Sequence[float], y: Sequence[float], strata: Sequence[int] | None = None, draws: int = 9999, seed: int = 0
) -> Correlation:
    """Spearman's rank correlation with a permutation p-value.

    Args:
        x, y: the pairs; those with a NaN are left out.
        strata: which pairs belong together: ranks are taken and permuted within a stratum, so that
            differences between strata count for nothing. None: all together.
        draws: how many permutations.
        seed: of the permutations.
    """
    pairs = np.column_stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    groups = np.zeros(len(pairs), dtype=np.int64) if strata is None else np.asarray(strata)
    known = ~np.isnan(pairs).any(axis=1)
    pairs, groups = pairs[known], groups[known]
    ranks = [_centred_ranks(pairs[groups == group]) for group in np.unique(groups)]
    norm = math.sqrt(sum((r[:, 0] ** 2).sum() for r in ranks) * sum((r[:, 1] ** 2).sum() for r in ranks))
    if len(pairs) < 3 or norm == 0:
        return Correlation(math.nan, math.nan, len(pairs))
    observed = sum(r[:, 0] @ r[:, 1] for r in ranks) / norm
    generator = np.random.default_rng(seed)
    permuted = np.zeros(draws)
    for r in ranks:
        permuted += generator.permuted(np.tile(r[:, 1], (draws, 1)), axis=1) @ r[:, 0] / norm
    # A permutation as extreme as the data counts, also where rounding puts it just below.
    extreme = int((np.abs(permuted) >= abs(observed) - 1e-12).sum())
    return Correlation(float(observed), (extreme + 1) / (draws + 1), len(pairs))


def _centred_ranks(pairs: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(pairs, axis=0)
    return ranks - ranks.mean(axis=0)
