from __future__ import annotations

import functools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import optimize

from hf_rmt.theory import ks_null
from hf_rmt.theory.ks_null import KSNull, MonteCarloNull, draw_statistics, shipped_null
from hf_rmt.theory.singular_vectors import ks_statistic

DRAWS = 200_000
LEVELS = (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9)
both_sides = pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])


def excess_in_standard_errors(
    null: KSNull | MonteCarloNull, statistics: np.ndarray, n: int, centred: bool, levels: tuple[float, ...]
) -> list[float]:
    """How far the share of p-values at or below each level is from the level."""
    p_values = null.p_value(torch.from_numpy(statistics), n, centred).numpy()
    count = len(statistics)
    return [
        (int((p_values <= level).sum()) - count * level) / math.sqrt(count * level * (1 - level)) for level in levels
    ]


@functools.lru_cache(maxsize=2)
def scipy_statistics(n: int, draws: int, centred: bool) -> np.ndarray:
    """KS statistics of normalised Gaussian vectors, one scipy call each."""
    rng = np.random.default_rng(11)
    out = np.empty(draws)
    for i in range(draws):
        v = rng.standard_normal(n)
        v = v - v.mean() if centred else v
        scaled = v * math.sqrt(n) / np.linalg.norm(v)
        out[i] = scipy.stats.kstest(scaled, "norm", method="asymp").statistic
    return out


def test_table_meets_fresh_draws() -> None:
    """Lengths the table was fitted to, and lengths between them."""
    lengths = (4096, 3072, 1000, 768, 600, 384, 200, 100, 64, 50, 33)
    null = shipped_null()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        samples = list(pool.map(lambda n: draw_statistics(n, DRAWS, 7), lengths))
    wrong = {
        (n, side): excess
        for n, sample in zip(lengths, samples, strict=True)
        for side, statistics in enumerate(sample)
        if max(map(abs, excess := excess_in_standard_errors(null, statistics, n, bool(side), LEVELS))) > 3
    }
    assert not wrong


def test_table_holds_beyond_its_longest_vectors() -> None:
    n = 14_336
    for side, statistics in enumerate(draw_statistics(n, 6000, 1)):
        excess = excess_in_standard_errors(shipped_null(), statistics, n, bool(side), LEVELS[1:])
        assert max(map(abs, excess)) < 3


def test_table_holds_in_its_tail() -> None:
    for side, statistics in enumerate(draw_statistics(32, 2_000_000, 3)):
        p_values = shipped_null().p_value(torch.from_numpy(statistics), 32, bool(side)).numpy()
        for level in (1e-5, 3e-5):
            low, high = scipy.stats.poisson.ppf((0.0005, 0.9995), level * len(statistics))
            assert low <= (p_values <= level).sum() <= high


@both_sides
def test_draws_are_those_of_a_plain_simulation(centred: bool) -> None:
    ours = draw_statistics(40, 50_000, 0)[int(centred)]
    assert scipy.stats.ks_2samp(ours, scipy_statistics(40, 3000, centred)).pvalue > 0.01


@both_sides
def test_table_meets_a_plain_simulation(centred: bool) -> None:
    excess = excess_in_standard_errors(shipped_null(), scipy_statistics(40, 3000, centred), 40, centred, LEVELS[2:])
    assert max(map(abs, excess)) < 3


@pytest.mark.parametrize("n", [32, 50, 64])
def test_centred_null_is_the_lilliefors_one(n: int) -> None:
    """The p-value formula of Dallal & Wilkinson (1986), for mean and variance both taken from the sample."""

    def published(d: float) -> float:
        m = n + 2.78019
        return math.exp(-7.01256 * d * d * m + 2.99587 * d * math.sqrt(m) - 0.122119 + 0.974598 / n**0.5 + 1.67997 / n)

    for p in (0.1, 0.05, 0.02, 0.01):
        statistic = optimize.brentq(lambda d, p=p: published(d) - p, 0.5 / math.sqrt(n), 3 / math.sqrt(n))
        assert float(shipped_null().p_value(torch.tensor([statistic]), n, centred=True)) == pytest.approx(p, rel=0.05)


def test_draws_are_sorted_and_repeatable() -> None:
    one, again, other = (draw_statistics(48, 3000, seed) for seed in (1, 1, 2))
    for side in (0, 1):
        assert (np.diff(one[side]) >= 0).all()
        np.testing.assert_array_equal(one[side], again[side])
        assert not np.array_equal(one[side], other[side])


@both_sides
@pytest.mark.parametrize("n", [32, 47, 100, 768, 4096, 14_336, 128_256])
def test_p_value_falls_with_the_statistic_and_stays_in_its_range(n: int, centred: bool) -> None:
    null = shipped_null()
    statistic = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    p_values = null.p_value(statistic, n, centred)
    inside = (p_values > null.smallest_p) & (p_values < p_values[0])
    assert bool((p_values.diff() <= 0).all())
    assert bool((p_values[inside].diff() < 0).all())
    assert int(inside.sum()) > 50
    assert float(p_values.min()) == null.smallest_p > 0
    assert 0.999 < float(p_values.max()) <= 1


def test_table_says_how_it_was_made() -> None:
    null = shipped_null()
    assert null.smallest_p == pytest.approx(1e-6)
    assert null.draws * null.smallest_p >= 1
    assert null.plain.shape == null.centred.shape == (len(null.logits), 4)


@both_sides
@pytest.mark.parametrize("n", [32, 384, 1024])
def test_p_values_of_random_unit_vectors_are_uniform(n: int, centred: bool) -> None:
    vectors = torch.randn(4000, n, generator=torch.Generator().manual_seed(12))
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    p_values = shipped_null().p_value(ks_statistic(vectors)[int(centred)], n, centred)
    assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3


@both_sides
def test_monte_carlo_counts_draws_at_or_above(centred: bool) -> None:
    null = MonteCarloNull(draws=9, seed=4)
    reference = draw_statistics(36, 9, 4)[int(centred)]
    assert null.smallest_p == 0.1
    assert null.p_value(torch.from_numpy(reference), 36, centred).tolist() == pytest.approx(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    )
    between = torch.tensor([0.0, (reference[3] + reference[4]) / 2, 1.0])
    assert null.p_value(between, 36, centred).tolist() == pytest.approx([1.0, 0.6, 0.1])


@both_sides
def test_monte_carlo_and_table_agree(centred: bool) -> None:
    statistic = torch.linspace(0.02, 0.12, 50, dtype=torch.float64)
    table, sampled = (null.p_value(statistic, 200, centred) for null in (shipped_null(), MonteCarloNull(40_000)))
    error = (table * (1 - table) / 40_000).sqrt() + 1 / 40_000
    assert float(((table - sampled) / error).abs().max()) < 4


def test_not_tested_stays_not_tested() -> None:
    p_values = shipped_null().p_value(torch.tensor([math.nan, 0.1]), 64)
    assert p_values.isnan().tolist() == [True, False]


def test_the_table_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ks_null, "_LENGTHS", (32, 64, 128, 256, 512))
    out = tmp_path / "table.npz"
    monkeypatch.setattr(sys, "argv", ["ks_null", "--draws", "20000", "--seed", "1", "--out", str(out)])
    ks_null.main()
    with np.load(out) as table:
        made = KSNull(table["logits"], table["plain"], table["centred"], int(table["draws"]))
    assert made.draws == 20_000
    assert made.smallest_p == shipped_null().smallest_p
    for n in (40, 200):
        for side, statistics in enumerate(draw_statistics(n, 2000, 2)):
            ours, theirs = (
                null.p_value(torch.from_numpy(statistics), n, bool(side)) for null in (made, shipped_null())
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
