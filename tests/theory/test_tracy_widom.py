from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import integrate, special

from hf_rmt.theory.statistics import Law
from hf_rmt.theory.tracy_widom import (
    bulk_sigma_noise,
    hard_edge_p_value,
    lower_threshold,
    tw1_cdf,
    tw1_quantile,
    upper_threshold,
)


@pytest.mark.parametrize(("rate", "published"), [(0.10, 0.4501), (0.05, 0.9793), (0.01, 2.0234), (0.001, 3.2722)])
def test_quantiles_are_the_published_ones(rate: float, published: float) -> None:
    assert tw1_quantile(rate) == pytest.approx(published, abs=6e-5)
    assert float(tw1_cdf(tw1_quantile(rate))) == pytest.approx(1 - rate, abs=1e-9)


def test_moments_are_the_published_ones() -> None:
    def tail_integral(power: int) -> float:
        """``E[X^power]`` by parts: powers of x against the two tails."""
        kwargs = {"epsabs": 1e-11, "limit": 200}
        above, _ = integrate.quad(lambda x: power * x ** (power - 1) * (1 - float(tw1_cdf(x))), 0, 10, **kwargs)
        below, _ = integrate.quad(lambda x: power * x ** (power - 1) * float(tw1_cdf(x)), -10, 0, **kwargs)
        return above - below

    mean = tail_integral(1)
    assert mean == pytest.approx(-1.2065335745820, abs=1e-7)
    assert tail_integral(2) - mean**2 == pytest.approx(1.607781034581, abs=1e-7)


def test_cdf_is_the_painleve_one() -> None:
    """``F1(x) = exp(-1/2 int_x^inf q + (s - x) q^2)`` with ``q'' = s q + 2 q^3``, ``q ~ Ai`` (Tracy & Widom 1996)."""
    start = 8.0
    airy, slope = special.airy(start)[:2]
    tails = [integrate.quad(lambda s, f=f: f(s), start, 30, epsabs=0)[0] for f in _airy_tails(start)]
    points = np.linspace(4, -5, 37)
    solution = integrate.solve_ivp(
        lambda s, y: [y[1], s * y[0] + 2 * y[0] ** 3, -y[0], -(y[0] ** 2), -y[3]],
        (start, -5),
        [airy, slope, *tails],
        t_eval=points,
        method="DOP853",
        rtol=1e-12,
        atol=1e-30,
    )
    expected = np.exp(-(solution.y[2] + solution.y[4]) / 2)
    np.testing.assert_allclose(tw1_cdf(points), expected, rtol=0, atol=1e-7)


def _airy_tails(start: float) -> list:
    return [
        lambda s: special.airy(s)[0],
        lambda s: special.airy(s)[0] ** 2,
        lambda s: (s - start) * special.airy(s)[0] ** 2,
    ]


def test_cdf_is_a_distribution_function_of_any_shape() -> None:
    x = np.linspace(-12, 12, 4001)
    cdf = tw1_cdf(x)
    assert cdf[0] == 0
    assert cdf[-1] == 1
    assert np.diff(cdf).min() > -1e-12
    assert tw1_cdf(x[:4000].reshape(40, 100)).shape == (40, 100)
    assert tw1_cdf(0.0).shape == ()


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 2.5, 5.0])
def test_noisy_quantile_is_that_of_brute_force(noise: float) -> None:
    rng = np.random.default_rng(0)
    grid = np.linspace(-9.9, 9.9, 40_001)
    draws = np.interp(rng.random(1_000_000), tw1_cdf(grid), grid) + noise * rng.standard_normal(1_000_000)
    for rate in (0.5, 0.1, 0.05, 0.01, 0.001):
        seen = (draws > tw1_quantile(rate, noise)).mean()
        assert abs(seen - rate) < 4 * math.sqrt(rate * (1 - rate) / 1e6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-8, 0.999])
def test_extreme_quantiles_are_in_order(rate: float, noise: float) -> None:
    assert tw1_quantile(rate * 0.9, noise) > tw1_quantile(rate, noise)
    assert tw1_quantile(rate, noise + 1) > tw1_quantile(rate, noise) or rate > 0.5


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_bad_rate_raises(rate: float) -> None:
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        tw1_quantile(rate)


def test_every_rate_that_is_allowed_has_a_quantile() -> None:
    rates = [1e-9, 1e-6, 1e-3, 0.1, 0.9, 1 - 1e-6]
    quantiles = [tw1_quantile(rate) for rate in rates]
    assert quantiles == sorted(quantiles, reverse=True)
    with pytest.raises(ValueError, match="rate is 1e-12"):
        tw1_quantile(1e-12)


@pytest.mark.parametrize(
    ("shape", "five_percent", "one_percent"),
    [((300, 300), 1.30, 2.44), ((100, 100), 1.53, 2.76), ((300, 1200), 1.14, 2.23)],
    ids=str,
)
def test_corrected_quantiles_are_the_measured_ones(
    shape: tuple[int, int], five_percent: float, one_percent: float
) -> None:
    q, p = max(shape) - 0.5, min(shape) - 0.5
    centre = (math.sqrt(q) + math.sqrt(p)) ** 2
    width = (math.sqrt(q) + math.sqrt(p)) * (1 / math.sqrt(q) + 1 / math.sqrt(p)) ** (1 / 3)
    for rate, measured in ((0.05, five_percent), (0.01, one_percent)):
        threshold = upper_threshold(*shape, 1.0, rate, bulk_sigma_noise(*shape))
        assert (threshold**2 - centre) / width == pytest.approx(measured, abs=0.1)


@pytest.mark.parametrize(("rate", "x"), [(0.05, 0.9793), (0.01, 2.0234)])
def test_thresholds_are_the_published_formulas(rate: float, x: float) -> None:
    """Johnstone 2001 and Ma 2012 for 61 x 60, where the correction of the lower edge is largest."""
    big, small = math.sqrt(60.5), math.sqrt(59.5)
    upper = (big + small) ** 2 + (big + small) * (1 / big + 1 / small) ** (1 / 3) * x
    assert upper_threshold(61, 60, 1.0, rate) == pytest.approx(math.sqrt(upper), rel=1e-5)
    centre = math.log((big - small) ** 2)
    tau = (1 / small - 1 / big) ** (1 / 3) / (big - small)
    lower = math.exp(centre + tau**2 / 8 - tau * x)
    assert lower_threshold(61, 60, 1.0, rate) == pytest.approx(math.sqrt(lower), rel=1e-4)


@pytest.mark.parametrize("shape", [(60, 60), (60, 120), (240, 60)], ids=str)
def test_stated_noise_of_the_bulk_sigma_is_that_of_simulation(shape: tuple[int, int]) -> None:
    medians = np.median(_gaussian_spectra(shape, 1500, 1), axis=1)
    assert medians.std() / medians.mean() == pytest.approx(bulk_sigma_noise(*shape), rel=0.1)
    assert bulk_sigma_noise(*shape) == bulk_sigma_noise(*shape[::-1])


@functools.lru_cache(maxsize=2)
def _gaussian_spectra(shape: tuple[int, int], count: int, seed: int) -> np.ndarray:
    p, q = sorted(shape)
    matrices = np.random.default_rng([seed, p, q]).standard_normal((count, p, q))
    squares = np.linalg.eigvalsh(matrices @ matrices.transpose(0, 2, 1))[:, ::-1]
    return np.sqrt(squares.clip(0))


@pytest.mark.parametrize("rule", ["known", "bulk"])
@pytest.mark.parametrize("shape", [(100, 100), (80, 320), (90, 100), (60, 61)], ids=str)
def test_thresholds_are_crossed_at_the_chosen_rate(shape: tuple[int, int], rule: str) -> None:
    spectra = torch.from_numpy(_gaussian_spectra(shape, 1000, 2).copy())
    laws = [Law.fit(1.0 if rule == "known" else "bulk", s, shape, 1.0, 0.05) for s in spectra]
    above = sum(bool(s[0] > law.upper_tw) for s, law in zip(spectra, laws, strict=True))
    below = sum(bool(s[-1] < law.lower_tw) for s, law in zip(spectra, laws, strict=True))
    fewest = scipy.stats.binom.ppf(0.0005, 1000, 0.03)
    most = scipy.stats.binom.ppf(0.9995, 1000, 0.07)
    assert fewest <= above <= most
    if shape[0] == shape[1]:
        assert below == 0
    else:
        assert fewest <= below <= most


def test_asymptotic_edges_are_crossed_more_often() -> None:
    spectra = torch.from_numpy(_gaussian_spectra((100, 100), 1000, 2).copy())
    edge = Law.fit(1.0, spectra[0], (100, 100), 1.0, 0.05).mp.upper_edge
    assert 0.10 < float((spectra[:, 0] > edge).double().mean()) < 0.19


@pytest.mark.parametrize("threshold", [upper_threshold, lower_threshold])
@pytest.mark.parametrize("shape", [(50, 200), (100, 101), (1, 9), (1, 1)], ids=str)
def test_thresholds_scale_with_sigma_and_not_with_orientation(threshold, shape: tuple[int, int]) -> None:
    noise = bulk_sigma_noise(*shape)
    one = threshold(*shape, 1.0, 0.01, noise)
    assert threshold(*shape, 0.02, 0.01, noise) == pytest.approx(0.02 * one)
    assert threshold(*shape[::-1], 1.0, 0.01, noise) == one


def test_thresholds_move_outwards_with_noise_and_confidence() -> None:
    upper = [upper_threshold(80, 200, 1.0, *how) for how in ((0.05,), (0.05, 0.02), (0.01, 0.02), (0.001, 0.02))]
    lower = [lower_threshold(80, 200, 1.0, *how) for how in ((0.05,), (0.05, 0.02), (0.01, 0.02), (0.001, 0.02))]
    assert np.diff(upper).min() > 0
    assert np.diff(lower).max() < 0
    assert 0 < lower[-1] < lower[0] < upper[0]
    assert lower_threshold(80, 80, 1.0, 0.05, 0.02) == 0


def test_hard_edge_p_values_are_uniform_on_noise() -> None:
    rng = np.random.default_rng(3)
    spectra = 0.2 * np.linalg.svd(rng.standard_normal((400, 60, 60)), compute_uv=False)
    p_values = [hard_edge_p_value(float(s[-1]), 60, 0.2) for s in spectra]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert hard_edge_p_value(0.0, 60, 0.2) == 0
    assert hard_edge_p_value(1e-9, 60, 0.2) < 1e-6
