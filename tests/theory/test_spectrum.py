from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hf_rmt.theory import spectrum
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur
from hf_rmt.theory.spectrum import POWER_LAW_FLOOR, power_law


def gaussian_spectrum(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.linalg.svd(np.random.default_rng(seed).standard_normal((rows, cols)))[1])


def pareto_singular_values(count: int, alpha: float, seed: int = 0) -> torch.Tensor:
    """Square roots of draws from ``density(x) ~ x^-alpha``, x >= 1."""
    x = (1 - np.random.default_rng(seed).random(count)) ** (-1 / (alpha - 1))
    return torch.from_numpy(np.sort(np.sqrt(x))[::-1].copy())


SPECTRA = {
    "given": torch.tensor([5.0, 3.0, 1.5, 0.5, 0.25], dtype=torch.float64),
    "gaussian": gaussian_spectrum(80, 50),
    "pareto": pareto_singular_values(60, 2.5),
    "float32": gaussian_spectrum(40, 90).float(),
}
every_spectrum = pytest.mark.parametrize("s", SPECTRA.values(), ids=SPECTRA)


@every_spectrum
def test_ranks_and_norms_are_their_formulas(s: torch.Tensor) -> None:
    values = [float(x) for x in s]
    total = sum(values)
    assert spectrum.stable_rank(s) == pytest.approx(sum(x**2 for x in values) / values[0] ** 2)
    entropy = -sum(x / total * math.log(x / total) for x in values)
    assert spectrum.effective_rank(s) == pytest.approx(math.exp(entropy))
    assert spectrum.mp_soft_rank(s, 2.0) == pytest.approx(4 / values[0] ** 2)
    assert spectrum.log_norm(s) == pytest.approx(math.log10(sum(x**2 for x in values)))
    for alpha in (1.7, 3.2):
        assert spectrum.alpha_hat(s, alpha) == pytest.approx(alpha * math.log10(values[0] ** 2))
        expected = math.log10(sum((x**2) ** alpha for x in values))
        assert spectrum.log_alpha_norm(s, alpha) == pytest.approx(expected)


def test_log_alpha_norm_does_not_overflow() -> None:
    s = torch.tensor([1e3, 1e2], dtype=torch.float64)
    assert spectrum.log_alpha_norm(s, 200.0) == pytest.approx(1200)


@pytest.mark.parametrize("count", [1, 7, 100])
def test_ranks_of_a_flat_spectrum_are_its_length(count: int) -> None:
    flat = torch.full((count,), 0.3)
    assert spectrum.stable_rank(flat) == pytest.approx(count)
    assert spectrum.effective_rank(flat) == pytest.approx(count)


def test_ranks_of_rank_one_are_one() -> None:
    s = torch.tensor([4.0, 0.0, 0.0])
    assert spectrum.stable_rank(s) == spectrum.effective_rank(s) == 1


def test_soft_rank_of_noise_is_about_one() -> None:
    s = gaussian_spectrum(300, 200)
    edge = MarchenkoPastur(300, 200).upper_edge
    assert spectrum.mp_soft_rank(s, edge) == pytest.approx(1, abs=0.05)
    s[0] *= 3
    assert spectrum.mp_soft_rank(s, edge) < 0.15


@pytest.mark.parametrize("n", [32, 768])
def test_participation_ratio(n: int) -> None:
    vectors = torch.randn(4000, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    ratios = spectrum.participation_ratio(vectors)
    assert float(1 / (1 / ratios).mean()) == pytest.approx((n + 2) / 3, rel=0.01)
    carried = torch.zeros(3, n)
    carried[0, 5] = 1
    carried[1, :4] = 0.5
    carried[2] = n**-0.5
    assert spectrum.participation_ratio(carried).tolist() == pytest.approx([1, 4, n], rel=1e-5)


def test_spacing_ratio_of_noise_is_that_of_random_matrices() -> None:
    ratios = [spectrum.spacing_ratio(gaussian_spectrum(400, 400, seed)) for seed in range(6)]
    error = 0.29 / math.sqrt(6 * 318)
    assert np.mean(ratios) == pytest.approx(0.5307, abs=3 * error)


def test_spacing_ratio_of_uncorrelated_levels_is_poissons() -> None:
    rng = np.random.default_rng(2)
    levels = [torch.from_numpy(np.sort(rng.random(400))[::-1].copy()) for _ in range(6)]
    error = 0.29 / math.sqrt(6 * 318)
    assert np.mean([spectrum.spacing_ratio(s) for s in levels]) == pytest.approx(2 * math.log(2) - 1, abs=3 * error)


def test_spacing_ratio_is_that_of_a_loop_over_the_bulk() -> None:
    s = gaussian_spectrum(57, 80)
    bulk = [float(x) for x in s][5:-5]
    gaps = [a - b for a, b in itertools.pairwise(bulk)]
    expected = np.mean([min(a, b) / max(a, b) for a, b in itertools.pairwise(gaps)])
    assert spectrum.spacing_ratio(s) == pytest.approx(expected)


def power_law_by_loops(s: torch.Tensor) -> tuple[float, float, float, int]:
    x = sorted(float(v) ** 2 for v in s)
    x = [v for v in x if v > POWER_LAW_FLOOR]
    best = (math.nan, math.nan, math.inf, 0)
    for i in range(len(x) - 1):
        tail = x[i:]
        k = len(tail)
        logs = sum(math.log(v / tail[0]) for v in tail)
        if logs == 0:
            continue
        alpha = 1 + k / logs
        distance = max(abs(1 - (v / tail[0]) ** (1 - alpha) - j / k) for j, v in enumerate(tail))
        if distance < best[2]:
            best = (alpha, tail[0], distance, k)
    return best


@pytest.mark.parametrize(
    "s",
    [
        *SPECTRA.values(),
        pareto_singular_values(150, 4.0, 1),
        pareto_singular_values(2, 2.0, 2),
        gaussian_spectrum(30, 30, 3),
        torch.cat([gaussian_spectrum(40, 60, 4), torch.tensor([1e-3, 1e-8, 0.0])]),
        torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0, 0.5]),
    ],
    ids=lambda s: str(len(s)),
)
def test_power_law_is_that_of_a_double_loop(s: torch.Tensor) -> None:
    assert tuple(power_law(s)) == pytest.approx(power_law_by_loops(s), rel=1e-9)


def test_power_law_does_not_depend_on_its_blocks() -> None:
    s = pareto_singular_values(1200, 3.0, 5)
    assert tuple(power_law(s)) == pytest.approx(power_law_by_loops(s), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_power_law_recovers_the_exponent(alpha: float) -> None:
    fit = power_law(pareto_singular_values(3000, alpha, 6))
    assert fit.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / math.sqrt(fit.size))
    assert fit.size > 100


def test_power_law_exponent_does_not_change_with_scale() -> None:
    s = pareto_singular_values(300, 2.5, 7)
    one, other = power_law(s), power_law(12 * s)
    assert other.alpha == pytest.approx(one.alpha)
    assert other.x_min == pytest.approx(144 * one.x_min)
    assert other[2:] == pytest.approx(one[2:])


@pytest.mark.parametrize(
    "s",
    [
        pareto_singular_values(20, 2.0, 8),
        pareto_singular_values(50, 1.5, 9),
        pareto_singular_values(400, 2.5, 10),
        pareto_singular_values(400, 6.0, 11) * 1e-2,
        gaussian_spectrum(20, 60, 12),
        gaussian_spectrum(200, 200, 13) * 0.02,
        gaussian_spectrum(300, 100, 14) * 0.05,
        torch.cat([gaussian_spectrum(100, 100, 15), torch.full((5,), 1e-4)]),
        torch.cat([torch.tensor([60.0, 45.0, 30.0]), gaussian_spectrum(150, 150, 16)]),
    ],
    ids=lambda s: str(len(s)),
)
def test_power_law_is_weightwatchers(s: torch.Tensor) -> None:
    pytest.importorskip("weightwatcher")
    from weightwatcher.constants import EVALS_THRESH
    from weightwatcher.WW_powerlaw import pl_fit

    evals = s.double().numpy() ** 2
    theirs = pl_fit(data=evals[evals > EVALS_THRESH], xmax=evals.max())
    ours = power_law(s)
    assert EVALS_THRESH == POWER_LAW_FLOOR
    assert (ours.alpha, ours.x_min, ours.distance) == pytest.approx((theirs.alpha, theirs.xmin, theirs.D), rel=1e-9)
    assert ours.size == len(theirs.data)


ALL_SCALARS = {
    "stable_rank": spectrum.stable_rank,
    "effective_rank": spectrum.effective_rank,
    "mp_soft_rank": lambda s: spectrum.mp_soft_rank(s, 1.0),
    "spacing_ratio": spectrum.spacing_ratio,
    "alpha": lambda s: power_law(s).alpha,
    "log_norm": spectrum.log_norm,
    "alpha_hat": lambda s: spectrum.alpha_hat(s, power_law(s).alpha),
    "log_alpha_norm": lambda s: spectrum.log_alpha_norm(s, power_law(s).alpha),
}
LEVELS_ALONE = {"spacing_ratio", "alpha", "alpha_hat", "log_alpha_norm"}


@pytest.mark.parametrize("name", ALL_SCALARS)
@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_zeros_give_nan(name: str, count: int) -> None:
    assert math.isnan(ALL_SCALARS[name](torch.zeros(count, dtype=torch.float64)))


@pytest.mark.parametrize("name", ALL_SCALARS)
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_equal_values_give_nan_where_spacings_are_needed(name: str, count: int) -> None:
    result = ALL_SCALARS[name](torch.full((count,), 0.7, dtype=torch.float64))
    assert isinstance(result, float)
    assert math.isnan(result) == (name in LEVELS_ALONE)


def test_power_law_of_nothing() -> None:
    for s in (torch.zeros(5), torch.tensor([2.0]), torch.tensor([2.0, 1e-4]), torch.full((9,), 3.0)):
        fit = power_law(s)
        assert [math.isnan(x) for x in fit] == [True, True, True, False]
        assert fit.size == 0


def test_power_law_leaves_out_the_floor() -> None:
    assert 0.00316**2 < POWER_LAW_FLOOR < 0.00317**2
    assert power_law(torch.tensor([0.5, 0.00317])).size == 2
    assert power_law(torch.tensor([0.5, 0.00316])).size == 0
    assert power_law(torch.tensor([3.0, 1.0, 0.00316])) == power_law(torch.tensor([3.0, 1.0]))
