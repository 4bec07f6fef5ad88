from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from hf_rmt.theory import spectrum
from hf_rmt.theory.marchenko_pastur import SIGMA_RULES, MarchenkoPastur, sigma_of
from hf_rmt.theory.statistics import Law, outliers, spectrum_statistics
from hf_rmt.theory.tracy_widom import bulk_sigma_noise, hard_edge_p_value, lower_threshold, upper_threshold

SIGMA = 0.02
RATE = 0.01
every_rule = pytest.mark.parametrize("rule", [*SIGMA_RULES, 0.02], ids=str)
every_shape = pytest.mark.parametrize("shape", [(120, 120), (60, 200), (200, 60)], ids=str)


def gaussian(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, float]:
    weight = SIGMA * np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(np.linalg.svd(weight, compute_uv=False)), float(weight.std())


@every_shape
@every_rule
def test_law_follows_its_rule(rule: str | float, shape: tuple[int, int]) -> None:
    s, entry_std = gaussian(shape)
    law = Law.fit(rule, s, shape, entry_std, RATE)  # type: ignore[arg-type]
    noise = {"bulk": bulk_sigma_noise(*shape), "empirical": 1 / math.sqrt(2 * shape[0] * shape[1])}.get(str(rule), 0.0)
    expected = sigma_of(rule, s, shape, entry_std)  # type: ignore[arg-type]
    assert law.mp == MarchenkoPastur(*shape, expected)
    assert law.sigma_rule == (rule if isinstance(rule, str) else "given")
    assert law.upper_tw == upper_threshold(*shape, expected, RATE, noise)
    assert law.lower_tw == lower_threshold(*shape, expected, RATE, noise)


def test_noise_of_the_empirical_sigma_is_that_of_simulation() -> None:
    deviations = np.random.default_rng(1).standard_normal((4000, 20 * 30)).std(axis=1)
    s, _ = gaussian((20, 30))
    law = Law.fit("empirical", s, (20, 30), 1.0, RATE)
    assert law.upper_tw == upper_threshold(20, 30, 1.0, RATE, 1 / math.sqrt(2 * 600))
    assert deviations.std() == pytest.approx(1 / math.sqrt(2 * 600), rel=0.05)


@every_shape
def test_columns_of_noise(shape: tuple[int, int]) -> None:
    s, entry_std = gaussian(shape, 2)
    law = Law.fit("bulk", s, shape, entry_std, RATE)
    row = spectrum_statistics(s, shape, entry_std, law)
    assert row["sigma"] == law.mp.sigma == pytest.approx(SIGMA, rel=0.05)
    assert row["sigma_rule"] == "bulk"
    assert (row["lower_edge"], row["upper_edge"]) == (law.mp.lower_edge, law.mp.upper_edge)
    assert (row["n_above"], row["n_below"]) == outliers(law.mp, s) == (row["n_above_bulk"], row["n_below_bulk"])
    assert row["n_above_tw"] == row["n_below_tw"] == 0
    assert row["n_above"] <= 2
    assert row["n_below"] <= 2
    assert row["mass_outside"] < 0.06
    assert row["mp_distance"] == law.mp.distance(s) < 0.06
    assert (row["s_max"], row["s_min"]) == (float(s[0]), float(s[-1]))
    assert row["mp_soft_rank"] == pytest.approx(1, abs=0.1)
    assert row["spacing_ratio"] == pytest.approx(0.53, abs=0.12)
    fit = spectrum.power_law(s)
    assert row["alpha"] == fit.alpha
    assert row["alpha_hat"] == spectrum.alpha_hat(s, fit.alpha)
    assert row["log_alpha_norm"] == spectrum.log_alpha_norm(s, fit.alpha)
    assert row["log_norm"] == spectrum.log_norm(s)
    assert row["stable_rank"] == spectrum.stable_rank(s)
    assert row["effective_rank"] == spectrum.effective_rank(s)
    if shape[0] == shape[1]:
        assert row["hard_edge_p"] == hard_edge_p_value(float(s[-1]), len(s), row["sigma"])
        assert 0 < row["hard_edge_p"] < 1
    else:
        assert math.isnan(row["hard_edge_p"])


@every_rule
def test_columns_name_the_counts_of_every_rule(rule: str | float) -> None:
    shape = (200, 60)
    s, entry_std = gaussian(shape, 3)
    law = Law.fit(rule, s, shape, entry_std, RATE)  # type: ignore[arg-type]
    row = spectrum_statistics(s, shape, entry_std, law)
    for other in SIGMA_RULES:
        counts = outliers(MarchenkoPastur(*shape, sigma_of(other, s, shape, entry_std)), s)
        assert (row[f"n_above_{other}"], row[f"n_below_{other}"]) == counts
    assert row["n_below_init"] == 60
    if rule == "init":
        assert (row["n_above"], row["n_below"]) == (0, 60)
        assert row["mass_outside"] == pytest.approx(1)


def test_mass_outside_is_the_energy_share_of_outliers() -> None:
    s = torch.tensor([30.0, 12.0, 11.0, 10.0, 1.0], dtype=torch.float64)
    law = Law.fit(1.0, s, (5, 90), 1.0, RATE)
    low, high = math.sqrt(90) - math.sqrt(5), math.sqrt(90) + math.sqrt(5)
    assert 1 < low < 10
    assert 11 < high < 12
    row = spectrum_statistics(s, (5, 90), 1.0, law)
    assert (row["n_above"], row["n_below"]) == (2, 1)
    assert row["mass_outside"] == pytest.approx((900 + 144 + 1) / (900 + 144 + 121 + 100 + 1))


def test_values_on_an_edge_are_inside() -> None:
    law = MarchenkoPastur(4, 9, 1.0)
    s = torch.tensor([law.upper_edge, law.lower_edge], dtype=torch.float64)
    assert outliers(law, s) == (0, 0)
    assert outliers(law, s * torch.tensor([1 + 1e-12, 1 - 1e-12], dtype=torch.float64)) == (1, 1)


@pytest.mark.parametrize("rule", SIGMA_RULES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (8, 8), (40, 50)], ids=str)
def test_zeros_have_a_row(shape: tuple[int, int], rule: str) -> None:
    s = torch.zeros(min(shape), dtype=torch.float64)
    row = spectrum_statistics(s, shape, 0.0, Law.fit(rule, s, shape, 0.0, RATE))  # type: ignore[arg-type]
    assert row["n_above"] == row["n_above_tw"] == 0
    assert row["s_max"] == row["s_min"] == 0
    for name in ("mass_outside", "stable_rank", "effective_rank", "alpha", "log_norm", "spacing_ratio"):
        assert math.isnan(row[name])
    if rule != "init":
        assert math.isnan(row["mp_distance"])
        assert math.isnan(row["hard_edge_p"])


@pytest.mark.parametrize("rule", [*SIGMA_RULES, 0.5], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (3, 2)], ids=str)
def test_small_matrices_have_a_row(shape: tuple[int, int], rule: str | float) -> None:
    s, entry_std = gaussian(shape, 4)
    row = spectrum_statistics(s, shape, entry_std, Law.fit(rule, s, shape, entry_std or 1.0, RATE))  # type: ignore[arg-type]
    assert row["s_max"] >= row["s_min"] > 0
    assert 0 <= row["mass_outside"] <= 1


@pytest.mark.parametrize("rule", [SIGMA, "bulk"], ids=str)
@pytest.mark.parametrize("shape", [(150, 150), (300, 100), (100, 300)], ids=str)
def test_planted_spikes_are_found(
    shape: tuple[int, int],
    rule: str | float,
    orthonormal: Callable[[np.random.Generator, int, int], np.ndarray],
) -> None:
    rng = np.random.default_rng(5)
    matrices, spikes, rate = 50, 5, 1e-3
    strength = 2 * SIGMA * (shape[0] * shape[1]) ** 0.25  # twice the point at which a spike leaves the bulk
    above, below = [], []
    for _ in range(matrices):
        weight = SIGMA * rng.standard_normal(shape)
        weight += strength * orthonormal(rng, shape[0], spikes) @ orthonormal(rng, shape[1], spikes).T
        s = torch.from_numpy(np.linalg.svd(weight, compute_uv=False))
        law = Law.fit(rule, s, shape, float(weight.std()), rate)  # type: ignore[arg-type]
        row = spectrum_statistics(s, shape, float(weight.std()), law)
        above.append(row["n_above_tw"])
        below.append(row["n_below_tw"])
    most = scipy.stats.binom.ppf(0.9995, matrices, 2 * rate)
    assert min(above) >= spikes
    assert sum(above) - matrices * spikes <= most
    assert sum(below) <= most


@every_shape
def test_counts_do_not_change_with_scale(shape: tuple[int, int]) -> None:
    s, entry_std = gaussian(shape, 6)
    s[:2] *= 2
    rows = [
        spectrum_statistics(c * s, shape, c * entry_std, Law.fit("bulk", c * s, shape, c * entry_std, RATE))
        for c in (1.0, 1e4)
    ]
    same = ("n_above", "n_below", "n_above_tw", "n_below_tw", "n_above_empirical", "n_below_empirical")
    assert [rows[0][name] for name in same] == [rows[1][name] for name in same]
    assert rows[0]["n_above_tw"] >= 2
    for name in ("mass_outside", "mp_distance", "mp_soft_rank", "stable_rank", "effective_rank", "spacing_ratio"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-9)
