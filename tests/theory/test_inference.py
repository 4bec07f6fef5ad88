from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from hf_rmt.theory import inference
from hf_rmt.theory.inference import (
    Change,
    Rows,
    bootstrap_scores,
    change_of_seeds,
    joined_change,
    paired_change,
    rank_correlation,
)


def _rows(n: int, seed: int, exponential: bool = False, weighted: bool = True) -> Rows:
    """Rows of other values for each seed, of the same weights."""
    weights = np.random.default_rng(99).integers(1, 20, n) if weighted else np.ones(n)
    values = np.random.default_rng(seed).gamma(2.0, size=n)
    return Rows(torch.from_numpy(values), torch.from_numpy(weights), exponential)


def test_score_is_the_weighted_mean() -> None:
    rows = _rows(50, 0)
    assert rows.score() == pytest.approx(np.average(rows.values.numpy(), weights=rows.weights.numpy()), rel=1e-14)
    assert dataclasses.replace(rows, exponential=True).score() == pytest.approx(math.exp(rows.score()), rel=1e-14)
    assert Rows(torch.tensor([True, False, True]), torch.ones(3)).score() == pytest.approx(2 / 3)


def test_a_row_of_no_weight_counts_for_nothing() -> None:
    rows = Rows(torch.tensor([1.0, math.nan, 4.0]), torch.tensor([2.0, 0.0, 1.0]))
    assert rows.score() == 2.0
    assert float(rows.influence()[1]) == 0.0


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        (torch.ones(3), torch.ones(4), r"values \(3,\) and weights \(4,\)"),
        (torch.ones(3, 1), torch.ones(3, 1), "must both be"),
        (torch.ones(0), torch.ones(0), "n at least 1"),
        (torch.ones(2), torch.zeros(2), "not all of them 0"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), "0 or more"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), "not all of them 0"),
    ],
)
def test_bad_rows_are_refused(values: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(values, weights)


@pytest.mark.parametrize("exponential", [False, True])
def test_influence_is_the_derivative_by_the_share_of_a_row(exponential: bool) -> None:
    rows, step = _rows(12, 3, exponential), 1e-6
    influence = rows.influence()
    assert float(influence.sum()) == pytest.approx(0, abs=1e-10)
    for row in range(12):
        times = torch.ones(12, dtype=torch.float64)
        moved = []
        for side in (1, -1):
            times[row] = 1 + side * step
            moved.append(Rows(rows.values, rows.weights * times, exponential).score())
        assert float(influence[row]) / 12 == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-6)


def test_change_of_a_mean_is_that_of_the_paired_test() -> None:
    a, b = _rows(200, 1, weighted=False), _rows(200, 2, weighted=False)
    a = Rows(0.7 * b.values + 0.3 * a.values, a.weights)
    change = paired_change([a], [b])
    expected = scipy.stats.ttest_rel(a.values.numpy(), b.values.numpy())
    assert change.mean == pytest.approx(float((a.values - b.values).mean()), rel=1e-12)
    assert change.mean / change.error == pytest.approx(expected.statistic, rel=1e-12)
    assert change.seeds == 1 and math.isnan(change.spread)


@pytest.mark.parametrize("exponential", [False, True])
def test_resampled_scores_are_those_of_the_rows_drawn(exponential: bool) -> None:
    rows = [_rows(30, seed, exponential) for seed in range(3)]
    drawn = torch.randint(30, (40, 30), generator=torch.Generator().manual_seed(7))
    expected = [[Rows(r.values[i], r.weights[i], exponential).score() for r in rows] for i in drawn]
    np.testing.assert_allclose(bootstrap_scores(rows, 40, seed=7).numpy(), expected, rtol=1e-12)


def test_the_bound_on_memory_does_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_rows(30, seed) for seed in range(3)]
    whole = bootstrap_scores(rows, 100)
    monkeypatch.setattr(inference, "_CHUNK", 7 * 30)
    np.testing.assert_allclose(bootstrap_scores(rows, 100).numpy(), whole.numpy(), rtol=1e-13)


@pytest.mark.parametrize("exponential", [False, True])
def test_interval_agrees_with_scipy(exponential: bool) -> None:
    a, b = _rows(80, 1, exponential), _rows(80, 2, exponential)
    a = dataclasses.replace(a, values=0.5 * a.values + 0.5 * b.values)

    def statistic(x: np.ndarray, y: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        means = [(w * v).sum(axis) / w.sum(axis) for v in (x, y)]
        return np.exp(means[0]) - np.exp(means[1]) if exponential else means[0] - means[1]

    data = a.values.numpy(), b.values.numpy(), a.weights.numpy()
    expected = scipy.stats.bootstrap(
        data, statistic, paired=True, method="percentile", rng=np.random.default_rng(0), n_resamples=20_000
    )
    change = paired_change([a], [b])
    # The error is linear, the bootstrap is not. Each end of 2,000 resamples varies by a twentieth of a standard error.
    assert change.error == pytest.approx(expected.standard_error, rel=0.1)
    assert change.low == pytest.approx(expected.confidence_interval.low, abs=0.25 * change.error)
    assert change.high == pytest.approx(expected.confidence_interval.high, abs=0.25 * change.error)


def test_the_seed_decides_the_interval() -> None:
    pairs = [[_rows(50, s) for s in (1, 2)], [_rows(50, s) for s in (3, 4)]]
    assert paired_change(*pairs, seed=5) == paired_change(*pairs, seed=5)
    assert paired_change(*pairs, seed=5).low != paired_change(*pairs, seed=6).low


def test_error_over_seeds_is_that_of_the_formula() -> None:
    scores, baselines = [_rows(40, s, weighted=False) for s in range(4)], [_rows(40, 9, weighted=False)] * 4
    differences = np.stack([(a.values - b.values).numpy() for a, b in zip(scores, baselines, strict=True)])
    change = paired_change(scores, baselines)
    between_rows = differences.mean(axis=0).var(ddof=1) / 40
    between_seeds = differences.mean(axis=1).var(ddof=1) / 4
    assert change.error == pytest.approx(math.sqrt(between_rows + between_seeds), rel=1e-12)
    assert change.spread == pytest.approx(differences.mean(axis=1).std(ddof=1), rel=1e-12)
    assert (change.mean, change.seeds) == (pytest.approx(differences.mean(), rel=1e-12), 4)


def test_seeds_that_agree_add_nothing() -> None:
    one, base = _rows(60, 1), _rows(60, 2)
    alone, fivefold = paired_change([one], [base]), paired_change([one] * 5, [base] * 5)
    assert (fivefold.error, fivefold.spread) == (pytest.approx(alone.error, rel=1e-12), pytest.approx(0, abs=1e-15))
    # The same rows five times are no more evidence than once.
    assert (fivefold.low, fivefold.high) == (pytest.approx(alone.low), pytest.approx(alone.high))


def _crossed(rng: np.random.Generator, rows: int, seeds: int) -> torch.Tensor:
    """Differences with effects of rows, of seeds and of both: true mean 0, ``(seeds, rows)``."""
    effects = rng.normal(size=rows) + 0.15 * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(seeds, rows))
    return torch.from_numpy(effects)


def test_the_error_is_that_of_new_rows_and_new_seeds() -> None:
    rng, rows, seeds = np.random.default_rng(1), 60, 5
    covered, decided, pooled, errors, means = 0, 0, 0, [], []
    for _ in range(600):
        effects = _crossed(rng, rows, seeds)
        weights = torch.ones(rows)
        own = [Rows(effect, weights) for effect in effects]
        centred = effects - effects.mean(dim=1, keepdim=True)
        change = joined_change(effects.mean(dim=1), centred, bootstrap_scores(own, 500))
        covered += change.low <= 0 <= change.high
        decided += not change.undecided
        pooled += abs(change.mean) >= 2 * float(effects.std()) / math.sqrt(rows * seeds)
        errors.append(change.error)
        means.append(change.mean)
    assert float(np.std(means)) == pytest.approx(math.sqrt(1 / 60 + 0.15**2 / 5 + 0.25 / 300), rel=0.1)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(means)), rel=0.1)
    assert 0.92 < covered / 600 < 0.98
    assert 0.02 < decided / 600 < 0.08
    assert pooled / 600 > 0.3  # as if each row of each seed were another one


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_the_interval_is_as_wide_as_the_error(noise: float) -> None:
    rng, changes = np.random.default_rng(0), torch.tensor([-0.6, -0.2, 0.1, 0.7], dtype=torch.float64)
    replicates = changes + noise * torch.from_numpy(rng.normal(size=(40_000, 1)))
    influences = torch.from_numpy(rng.normal(size=100))
    influences = (influences * noise * 10 / influences.std()).expand(4, 100)
    change = joined_change(changes, influences, replicates)
    assert change.error == pytest.approx(math.hypot(noise, float(changes.std()) / 2), rel=1e-9)
    # Drawn from four, the mean of four is not quite Gaussian.
    assert change.high - change.low == pytest.approx(2 * 1.96 * change.error, rel=0.04)


def test_coverage_of_the_rows_of_one_seed() -> None:
    rng, truth = np.random.default_rng(2), math.exp(1.2) - math.exp(1.0)
    covered = 0
    for _ in range(300):
        tokens, shared = rng.integers(5, 40, 150), rng.normal(size=150)
        weights = torch.from_numpy(tokens)
        noise = rng.normal(size=(2, 150)) / np.sqrt(tokens)
        a, b = (
            Rows(torch.from_numpy(mean + 0.3 * shared + x), weights, True)
            for mean, x in zip((1.2, 1.0), noise, strict=True)
        )
        change = paired_change([a], [b])
        covered += change.low <= truth <= change.high
    assert 0.90 < covered / 300 < 0.985


def test_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="of 30 and 20 rows cannot be paired"):
        paired_change([_rows(30, 1)], [_rows(20, 1)])
    with pytest.raises(ValueError, match="other weights cannot be paired"):
        paired_change([_rows(30, 1)], [_rows(30, 1, weighted=False)])
    with pytest.raises(ValueError, match="2 scores and 1 baselines"):
        paired_change([_rows(30, 1)] * 2, [_rows(30, 1)])


@pytest.mark.parametrize(
    ("mean", "error", "undecided"),
    [
        (0.2, 0.1, False),
        (-0.2, 0.1, False),
        (0.19, 0.1, True),
        (0.0, 0.0, True),
        (0.1, 0.0, False),
        (0.5, math.nan, True),
    ],
)
def test_undecided_is_below_two_standard_errors(mean: float, error: float, undecided: bool) -> None:
    change = Change(mean=mean, error=error, low=mean - 1.9 * error, high=mean + 1.9 * error, spread=0, seeds=1)
    assert change.undecided is undecided


def test_undecided_where_two_standard_errors_of_few_seeds_are_too_little() -> None:
    few = change_of_seeds([0.1, 0.3])
    assert few.mean == pytest.approx(2 * few.error) and few.low < 0 and few.undecided
    many = change_of_seeds([0.1, 0.3] * 4)
    assert many.low > 0 and not many.undecided


def test_seeds_alone_give_students_interval() -> None:
    values = [0.1, 0.4, -0.1, 0.2]
    change, expected = change_of_seeds(values), scipy.stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert change.mean / change.error == pytest.approx(expected.statistic, rel=1e-12)
    assert (change.low, change.high) == (
        pytest.approx(interval.low, rel=1e-12),
        pytest.approx(interval.high, rel=1e-12),
    )
    assert change.spread == pytest.approx(np.std(values, ddof=1))


def test_one_score_has_no_error() -> None:
    change = change_of_seeds([0.3])
    assert change.mean == 0.3 and change.undecided
    assert all(math.isnan(x) for x in (change.error, change.low, change.high, change.spread))


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, 10).astype(float), rng.normal(size=10)
        found = rank_correlation(x, y)
        assert found.rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
        assert found.count == 10


def test_permutation_p_value_agrees_with_all_permutations() -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        x, y = rng.normal(size=(2, 6))
        exact = scipy.stats.permutation_test(
            (x,), lambda x, y=y: scipy.stats.spearmanr(x, y).statistic, permutation_type="pairings", n_resamples=10_000
        )
        assert rank_correlation(x, y).p_value == pytest.approx(exact.pvalue, abs=0.02)


def test_p_values_are_never_zero() -> None:
    x = list(range(10))
    assert rank_correlation(x, x, draws=99).p_value == 0.01
    assert rank_correlation(x, x[::-1], draws=99).rho == pytest.approx(-1)


def test_strata_are_ranked_and_permuted_apart() -> None:
    x, y = [1.0, 2, 3, 14, 11, 19, 12], [2.0, 1, 3, -14, -17, -11, -18]
    strata = [0, 0, 0, 1, 1, 1, 1]
    ranks = [(scipy.stats.rankdata(side[:3]) - 2, scipy.stats.rankdata(side[3:]) - 2.5) for side in (x, y)]
    norm = 2 + 5.0
    observed = sum(float(a @ b) for a, b in zip(*ranks, strict=True)) / norm
    every = [
        (np.array(a) @ ranks[0][0] + np.array(b) @ ranks[0][1]) / norm
        for a in itertools.permutations(ranks[1][0])
        for b in itertools.permutations(ranks[1][1])
    ]
    found = rank_correlation(x, y, strata)
    assert found.rho == pytest.approx(observed, rel=1e-12) and found.count == 7
    assert found.p_value == pytest.approx(np.mean(np.abs(every) >= abs(observed) - 1e-9), abs=0.02)
    assert rank_correlation(x, y).rho < 0 < found.rho  # between the strata it goes the other way


def test_unknown_pairs_are_left_out_and_constants_have_none() -> None:
    x, y = [1.0, 2.0, math.nan, 4.0, 5.0], [2.0, 3.0, 1.0, math.nan, 9.0]
    found = rank_correlation(x, y)
    assert (found.rho, found.count) == (pytest.approx(1.0), 3)
    for nothing in (rank_correlation([1.0, 2.0], [1.0, 2.0]), rank_correlation([1.0] * 4, [1.0, 2.0, 3.0, 4.0])):
        assert math.isnan(nothing.rho) and math.isnan(nothing.p_value)


def test_p_values_of_unrelated_pairs_are_uniform() -> None:
    rng = np.random.default_rng(4)
    p = [rank_correlation(*rng.normal(size=(2, 10)), draws=199).p_value for _ in range(300)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
