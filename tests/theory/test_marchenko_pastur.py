from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import integrate, optimize

from hf_rmt.theory.decomposition import singular_values
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur, check_sigma, median_of_law, sigma_of
from hf_rmt.theory.tracy_widom import bulk_sigma_noise

SIGMA = 0.37
SHORT = [20, 40, 100, 200, 360, 400]  # of 400: r = 0.05, 0.1, 0.25, 0.5, 0.9, 1
SHAPES = [(p, 400) for p in SHORT] + [(400, p) for p in SHORT[:-1]]
either_way = pytest.mark.parametrize("shape", SHAPES, ids=str)


def printed_density(v: float, m: int, n: int) -> float:
    """Eq. 2 and 3 of the paper as they are printed, for m <= n."""
    scale = SIGMA * math.sqrt(n)
    low, high = scale * (1 - math.sqrt(m / n)), scale * (1 + math.sqrt(m / n))
    if not low <= v <= high or v == 0:
        return 0.0
    return n / m / (math.pi * scale**2 * v) * math.sqrt((high**2 - v**2) * (v**2 - low**2))


def integral(density: Callable[[float], float], low: float, high: float, upto: float) -> float:
    """Integral from the lower edge, over an angle that takes the square roots out of both edges."""
    middle, half = (low + high) / 2, (high - low) / 2
    angle = math.acos(min(1.0, max(-1.0, (middle - upto) / half)))
    value, _ = integrate.quad(
        lambda t: density(middle - half * math.cos(t)) * half * math.sin(t),
        0,
        angle,
        epsabs=1e-12,
        epsrel=1e-12,
        limit=400,
    )
    return value


def printed_cdf(law: MarchenkoPastur, v: float) -> float:
    m, n = sorted((law.rows, law.cols))
    return integral(lambda x: printed_density(x, m, n), law.lower_edge, law.upper_edge, v)


@either_way
def test_density_integrates_to_one(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    total = integral(
        lambda v: float(law.density(torch.tensor(v, dtype=torch.float64))),
        law.lower_edge,
        law.upper_edge,
        law.upper_edge,
    )
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rows", SHORT)
def test_density_is_the_papers_where_the_paper_states_it(rows: int) -> None:
    law = MarchenkoPastur(rows, 400, SIGMA)
    v = np.linspace(law.lower_edge, law.upper_edge, 203)[1:-1]
    expected = [printed_density(float(x), rows, 400) for x in v]
    np.testing.assert_allclose(law.density(torch.from_numpy(v)).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("rows", SHORT)
def test_the_law_does_not_change_under_transposition(rows: int) -> None:
    wide, tall = MarchenkoPastur(rows, 400, SIGMA), MarchenkoPastur(400, rows, SIGMA)
    v = torch.linspace(0, 2 * wide.upper_edge, 101, dtype=torch.float64)
    assert (wide.lower_edge, wide.upper_edge, wide.ratio) == (tall.lower_edge, tall.upper_edge, tall.ratio)
    assert torch.equal(wide.density(v), tall.density(v))
    assert torch.equal(wide.cdf(v), tall.cdf(v))
    assert median_of_law(rows, 400) == median_of_law(400, rows)


@either_way
def test_nothing_lies_outside_the_edges(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    outside = torch.tensor([-1.0, 0.99 * law.lower_edge - 1e-3, 1.01 * law.upper_edge, 100 * law.upper_edge])
    assert law.density(outside).tolist() == [0, 0, 0, 0]
    assert law.cdf(outside).tolist() == pytest.approx([0, 0, 1, 1], abs=1e-12)


def test_square_density_is_finite_at_zero() -> None:
    law = MarchenkoPastur(400, 400, SIGMA)
    assert law.lower_edge == 0
    assert float(law.density(torch.tensor(0.0))) == pytest.approx(2 / (math.pi * law.scale))
    assert float(law.density(torch.tensor(1e-6))) == pytest.approx(printed_density(1e-6, 400, 400), rel=1e-6)


@either_way
def test_cdf_is_the_integral_of_the_density(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    v = np.linspace(law.lower_edge, law.upper_edge, 43)
    expected = [printed_cdf(law, float(x)) for x in v]
    np.testing.assert_allclose(law.cdf(torch.from_numpy(v)).numpy(), expected, rtol=0, atol=1e-8)


@either_way
def test_quantile_is_the_numerical_inverse(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    levels = [0.001, 0.1, 0.5, 0.9, 0.999]
    expected = [
        optimize.brentq(lambda v, u=u: printed_cdf(law, v) - u, law.lower_edge, law.upper_edge, xtol=1e-12)
        for u in levels
    ]
    np.testing.assert_allclose(law.quantile(torch.tensor(levels, dtype=torch.float64)).numpy(), expected, rtol=1e-8)
    assert median_of_law(*shape) * SIGMA == pytest.approx(expected[2], rel=1e-8)


@either_way
def test_quantile_undoes_cdf(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    v = torch.linspace(law.lower_edge, law.upper_edge, 52, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(law.quantile(law.cdf(v)), v, rtol=1e-10, atol=0)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.quantile(u)), u, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(1000, 1000), (1600, 400), (400, 1600)], ids=str)
def test_edges_are_those_of_a_large_gaussian_matrix(shape: tuple[int, int]) -> None:
    law = MarchenkoPastur(*shape, SIGMA)
    s = singular_values(SIGMA * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert float(s[0]) == pytest.approx(law.upper_edge, rel=0.02)
    assert float(s[-1]) == pytest.approx(law.lower_edge, rel=0.02, abs=0.01 * law.upper_edge)
    assert law.distance(s) < 6 / len(s)


@pytest.mark.parametrize("shape", [(60, 60), (50, 200)], ids=str)
def test_distance_is_scipys(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    law = MarchenkoPastur(*shape, SIGMA)
    for s in (rng.uniform(0, 2 * law.upper_edge, 50), SIGMA * np.linalg.svd(rng.standard_normal(shape))[1]):
        expected = scipy.stats.kstest(s, lambda v: law.cdf(torch.from_numpy(v)).numpy()).statistic
        assert law.distance(torch.from_numpy(s)) == pytest.approx(expected, abs=1e-12)


def test_sigma_rules() -> None:
    s = torch.tensor([9.0, 4.0, 1.0])
    assert sigma_of("init", s, (768, 3072), 0.3) == sigma_of("init", s, (3072, 768), 0.3) == 1 / math.sqrt(768)
    assert sigma_of("empirical", s, (3, 7), 0.3) == 0.3
    assert sigma_of("bulk", s, (3, 7), 0.3) == pytest.approx(4.0 / median_of_law(3, 7))
    assert sigma_of(0.25, s, (3, 7), 0.3) == 0.25
    assert isinstance(sigma_of(2, s, (3, 7), 0.3), float)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "median", "", "0.5"])
def test_bad_sigma_raises(bad: str | float) -> None:
    for call in (lambda: check_sigma(bad), lambda: sigma_of(bad, torch.ones(3), (3, 3), 1.0)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="give one of bulk, empirical, init, or a positive number"):
            call()


@pytest.mark.parametrize("shape", [(100, 100), (80, 160), (320, 80)], ids=str)
def test_bulk_recovers_the_sigma_of_noise_within_its_stated_error(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    s = np.linalg.svd(SIGMA * rng.standard_normal((150, *shape)), compute_uv=False)
    relative = np.array([sigma_of("bulk", torch.from_numpy(row), shape, math.nan) for row in s]) / SIGMA - 1
    noise = bulk_sigma_noise(*shape)
    assert abs(relative.mean()) < 4 * noise / math.sqrt(150)
    assert np.abs(relative).max() < 4.5 * noise


@pytest.mark.parametrize("shape", [(3072, 768), (768, 768)], ids=str)
def test_bulk_withstands_spikes_and_empirical_does_not(
    shape: tuple[int, int], orthonormal: Callable[[np.random.Generator, int, int], np.ndarray]
) -> None:
    rng = np.random.default_rng(4)
    edge = MarchenkoPastur(*shape).upper_edge
    spikes = edge * np.linspace(1.5, 6, 20)
    weight = rng.standard_normal(shape) + (orthonormal(rng, shape[0], 20) * spikes) @ orthonormal(rng, shape[1], 20).T
    s = singular_values(torch.from_numpy(weight))
    laws = {
        rule: MarchenkoPastur(*shape, sigma_of(rule, s, shape, float(weight.std()))) for rule in ("bulk", "empirical")
    }
    above = {rule: int((s > law.upper_edge).sum()) for rule, law in laws.items()}
    below = {rule: int((s < law.lower_edge).sum()) for rule, law in laws.items()}
    assert 1 < laws["bulk"].sigma < 1.02
    assert laws["empirical"].sigma > 1.25
    assert above["bulk"] in (20, 21)
    assert below["bulk"] <= 1
    if shape[0] > shape[1]:
        assert 80 <= below["empirical"] <= 150


@pytest.mark.parametrize("rule", ["bulk", "empirical"])
@pytest.mark.parametrize("factor", [1e-6, 0.5, 300.0])
def test_sigma_scales_with_the_matrix(rule: str, factor: float) -> None:
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one, other = (
        sigma_of(rule, torch.linalg.svdvals(w), (70, 90), float(w.std()))  # type: ignore[arg-type]
        for w in (weight, factor * weight)
    )
    assert other == pytest.approx(factor * one, rel=1e-10)
