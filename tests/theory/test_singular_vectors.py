from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from hf_rmt.theory import singular_vectors
from hf_rmt.theory.ks_null import MonteCarloNull, shipped_null
from hf_rmt.theory.singular_vectors import (
    HALF_WINDOW,
    MIN_ENTRIES,
    VectorTest,
    benjamini_hochberg,
    dropout_threshold,
    ks_statistic,
    local_mean,
)


def unit_rows(count: int, n: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def assorted_unit_rows(n: int) -> torch.Tensor:
    """Random, skewed, two-valued, offset, heavy-tailed and sparse rows."""
    rng = np.random.default_rng(n)
    sparse = np.zeros((2, n))
    sparse[0, 3] = 1
    sparse[1, :5] = (1, -2, 3, 0.5, -1)
    rows = np.vstack(
        [
            rng.standard_normal((10, n)),
            rng.exponential(size=(3, n)),
            rng.choice([-1.0, 1.0], (3, n)),
            rng.standard_normal((3, n)) + 3,
            rng.standard_t(2, (3, n)),
            sparse,
        ]
    )
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def uniform_p_values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector_test_of(p_values: torch.Tensor) -> VectorTest:
    return VectorTest(p_values, p_values, p_values, 64, 0, torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [32, 33, 100, 768])
def test_statistic_is_scipys(n: int, dtype: torch.dtype) -> None:
    vectors = assorted_unit_rows(n)
    plain, centred = ks_statistic(vectors.to(dtype))
    for i, v in enumerate(vectors.numpy()):
        shifted = v - v.mean()
        for ours, scaled in ((plain, v), (centred, shifted / np.linalg.norm(shifted))):
            expected = scipy.stats.kstest(scaled * math.sqrt(n), "norm", method="asymp").statistic
            assert float(ours[i]) == pytest.approx(expected, abs=1e-6)


def test_statistic_of_half_precision_is_that_of_its_values() -> None:
    vectors = unit_rows(6, 64).bfloat16()
    for half, single in zip(ks_statistic(vectors), ks_statistic(vectors.float()), strict=True):
        assert torch.equal(half, single)


def test_statistic_takes_both_one_sided_gaps() -> None:
    n = 50
    low, high = torch.zeros(2, n, dtype=torch.float64).unbind()
    low[:], high[:] = -1, 1
    statistic = ks_statistic(torch.stack([low, high]) / math.sqrt(n))[0]
    assert statistic.tolist() == pytest.approx([scipy.stats.norm.cdf(1)] * 2, abs=1e-6)


def test_statistic_knows_neither_order_nor_sign_nor_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = assorted_unit_rows(80)
    expected = ks_statistic(vectors)
    shuffled = -vectors[:, torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    monkeypatch.setattr(singular_vectors, "_CHUNK", 250)
    before = vectors.clone()
    for one, other, third in zip(expected, ks_statistic(vectors), ks_statistic(shuffled), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        torch.testing.assert_close(one, third, rtol=0, atol=1e-6)
    assert torch.equal(before, vectors)


def test_centred_statistic_is_blind_to_an_offset() -> None:
    vectors = unit_rows(5, 200)
    offset = vectors + 0.3
    offset /= torch.linalg.vector_norm(offset, dim=1, keepdim=True)
    (plain, centred), (plain_offset, centred_offset) = ks_statistic(vectors), ks_statistic(offset)
    torch.testing.assert_close(centred, centred_offset, rtol=0, atol=1e-5)
    assert bool((plain_offset > plain + 0.3).all())


def test_constant_vector_has_nothing_left_after_centring() -> None:
    statistics = [float(ks_statistic(torch.full((1, n), n**-0.5))[1]) for n in range(32, 1000)]
    assert statistics == pytest.approx([0.5] * len(statistics))


@pytest.mark.parametrize("half_window", [0, 1, 3, HALF_WINDOW, 100])
@pytest.mark.parametrize("missing", [[], [0], [5, 6, 7], list(range(10, 40))], ids=str)
def test_local_mean_is_that_of_a_loop(half_window: int, missing: list[int]) -> None:
    p = uniform_p_values(60)
    p[missing] = math.nan
    means, windows = local_mean(p, half_window)
    for i in range(60):
        near = [float(x) for x in p[max(0, i - half_window) : i + half_window + 1] if not math.isnan(x)]
        assert int(windows[i]) == len(near)
        assert float(means[i]) == pytest.approx(np.mean(near) if near else math.nan, nan_ok=True)


def test_local_mean_shrinks_its_window_at_the_ends() -> None:
    windows = local_mean(uniform_p_values(40))[1].tolist()
    assert windows == [*range(8, 15), *[15] * 26, *range(14, 7, -1)]


def test_local_mean_has_the_stated_deviation() -> None:
    means = torch.stack([local_mean(p)[0] for p in uniform_p_values(20_000 * 30).reshape(20_000, 30)])
    stated = (1 / (12 * local_mean(torch.ones(30))[1])).sqrt().double()
    torch.testing.assert_close(means.std(dim=0), stated, rtol=0.03, atol=0)
    assert float(stated[15]) == pytest.approx(0.075, abs=5e-4)
    assert float(stated[0]) == pytest.approx(0.102, abs=5e-4)


@pytest.mark.parametrize("level", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("planted", [0, 3, 40, 100])
def test_benjamini_hochberg_is_scipys(planted: int, level: float) -> None:
    p = uniform_p_values(100, seed=planted)
    p[:planted] **= 6
    expected = scipy.stats.false_discovery_control(p.numpy()) <= level
    assert benjamini_hochberg(p, level).tolist() == expected.tolist()
    gaps = torch.full((300,), math.nan, dtype=torch.float64)
    gaps[::3] = p
    mask = benjamini_hochberg(gaps, level)
    assert mask[::3].tolist() == expected.tolist()
    assert int(mask.sum()) == expected.sum()


def test_benjamini_hochberg_without_tests_or_discoveries() -> None:
    assert benjamini_hochberg(torch.full((3,), math.nan)).tolist() == [False] * 3
    assert benjamini_hochberg(torch.ones(4)).tolist() == [False] * 4
    assert benjamini_hochberg(torch.tensor([])).tolist() == []


@pytest.mark.parametrize(("count", "measured"), [(256, 3.4), (768, 3.7), (3072, 3.95)])
def test_dropout_threshold_gives_one_false_alarm_in_twenty_matrices(count: int, measured: float) -> None:
    threshold = dropout_threshold(count)
    assert threshold == pytest.approx(measured, abs=0.35)
    matrices = 1000
    alarms = 0
    for p in uniform_p_values(matrices * count, seed=7).reshape(matrices, count):
        mean, window = local_mean(p)
        alarms += bool(((p.median() - mean) * (12 * window).sqrt() > threshold).any())
    low, high = scipy.stats.binom.ppf((0.0005, 0.9995), matrices, (0.03, 0.07))
    assert low <= alarms <= high


def test_dropout_threshold_rises_with_confidence() -> None:
    assert dropout_threshold(256, 0.2) < dropout_threshold(256, 0.05) < dropout_threshold(256, 0.01)
    assert dropout_threshold(256) == dropout_threshold(256)


@pytest.mark.parametrize("span", [(0, 25), (100, 130), (280, 300)], ids=str)
def test_dropouts_are_the_planted_range(span: tuple[int, int]) -> None:
    p = uniform_p_values(300, seed=1)
    p[slice(*span)] *= 0.02
    (found,) = vector_test_of(p).dropouts()
    assert abs(found[0] - span[0]) <= HALF_WINDOW
    assert abs(found[1] - span[1]) <= HALF_WINDOW


def test_dropouts_are_judged_against_the_plateau() -> None:
    lifted = 0.5 + uniform_p_values(300, seed=1) / 2
    lifted[100:130] = 0.4
    assert len(vector_test_of(lifted).dropouts()) == 1
    assert vector_test_of(lifted).plateau == pytest.approx(0.72, abs=0.05)
    lowered = uniform_p_values(300, seed=1) * 0.4
    assert vector_test_of(lowered).dropouts() == []


def test_two_dropouts_and_none() -> None:
    p = uniform_p_values(400, seed=2)
    assert vector_test_of(p).dropouts() == []
    p[50:80] *= 0.02
    p[300:330] *= 0.02
    first, second = vector_test_of(p).dropouts()
    assert first[1] < 100
    assert second[0] > 280
    assert vector_test_of(torch.full((20,), math.nan)).dropouts() == []
    assert vector_test_of(torch.empty(0)).dropouts() == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_offset_pushes_the_other_vectors_up_and_centring_undoes_it(side: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 256, generator=generator, dtype=torch.float64) + 0.2
    u, _, vh = torch.linalg.svd(weight)
    result = singular_vectors.test_vectors(u.mT if side == "left" else vh)
    assert float(result.p_values[0]) == shipped_null().smallest_p
    assert float(result.p_values[1:].mean()) == pytest.approx(0.69, abs=0.04)
    assert float(result.centred_p_values[1:].mean()) == pytest.approx(0.5, abs=0.06)
    assert result.plateau > 0.65


@pytest.mark.parametrize("shape", [(300, 300), (400, 200)], ids=str)
def test_vectors_of_noise_pass(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    for vectors in (u.mT, vh):
        result = singular_vectors.test_vectors(vectors)
        for p_values in (result.p_values, result.centred_p_values):
            assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3
        assert result.significant < 0.035
        assert not bool(result.discoveries(1e-3).any())
        assert result.dropouts(1e-3) == []
        assert result.entries == vectors.shape[1]


def test_noise_holds_a_discovery_at_the_chosen_rate() -> None:
    matrices, level = 400, 0.05
    p_values = singular_vectors.test_vectors(unit_rows(matrices * 200, 64, seed=6)).p_values
    found = sum(bool(benjamini_hochberg(p, level).any()) for p in p_values.reshape(matrices, 200))
    low, high = scipy.stats.binom.ppf((0.0005, 0.9995), matrices, level)
    assert low <= found <= high


def test_planted_vectors_are_found() -> None:
    vectors = unit_rows(200, 400, seed=5)
    rng = np.random.default_rng(5)
    planted = [0, 1, 2, 77, 199]
    laplace = torch.from_numpy(rng.laplace(size=(5, 400)) ** 3)
    vectors[planted] = laplace / torch.linalg.vector_norm(laplace, dim=1, keepdim=True)
    result = singular_vectors.test_vectors(vectors)
    assert set(result.discoveries(0.01).nonzero().flatten().tolist()) == set(planted)
    assert result.extreme_index in planted
    assert result.extreme_index == int(result.statistic.argmax())
    assert torch.equal(result.extreme_vector, vectors[result.extreme_index].float())
    assert 5 / 200 <= result.significant < 0.06
    torch.testing.assert_close(result.local_mean, local_mean(result.p_values)[0])


def test_what_is_not_testable_is_nan() -> None:
    vectors = unit_rows(40, 64)
    vectors[7] = 64**-0.5
    testable = torch.ones(40, dtype=torch.bool)
    testable[[3, 7]] = False
    result = singular_vectors.test_vectors(vectors, testable)
    for values in (result.statistic, result.p_values, result.centred_p_values):
        assert values.isnan().nonzero().flatten().tolist() == [3, 7]
    assert result.extreme_index != 7
    assert not result.discoveries(1.0)[[3, 7]].any()
    full = singular_vectors.test_vectors(vectors)
    assert torch.equal(full.p_values[testable], result.p_values[testable])
    assert full.extreme_index == 7


@pytest.mark.parametrize("n", [MIN_ENTRIES - 1, MIN_ENTRIES])
def test_short_vectors_get_no_p_value(n: int) -> None:
    result = singular_vectors.test_vectors(unit_rows(4, n))
    if n >= MIN_ENTRIES:
        assert not result.p_values.isnan().any()
        return
    assert result.p_values.isnan().all()
    assert result.statistic.isnan().all()
    assert result.extreme_index == -1
    assert result.extreme_vector.numel() == 0
    assert math.isnan(result.significant)
    assert math.isnan(result.plateau)
    assert result.dropouts() == []
    assert not result.discoveries().any()


def test_the_null_can_be_chosen() -> None:
    vectors = unit_rows(30, 90)
    null = MonteCarloNull(draws=5000, seed=1)
    result = singular_vectors.test_vectors(vectors, null=null)
    plain, centred = ks_statistic(vectors)
    assert torch.equal(result.p_values, null.p_value(plain, 90))
    assert torch.equal(result.centred_p_values, null.p_value(centred, 90, centred=True))
    shipped = singular_vectors.test_vectors(vectors)
    torch.testing.assert_close(result.p_values, shipped.p_values, rtol=0, atol=0.03)
    assert not torch.equal(result.p_values, shipped.p_values)
