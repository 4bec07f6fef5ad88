"""The zero of the instrument: models that have learned nothing deviate at the rates that were asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from hf_rmt import RMTAnalyzer

RATE = 0.05
_WIDE = dict(hidden_size=96, intermediate_size=384, num_attention_heads=4, num_hidden_layers=26)
MODELS = {
    "bert": _WIDE,
    "llama": {**_WIDE, "num_key_value_heads": 4},
    "vit": _WIDE,
    "gpt2": dict(n_embd=96, n_layer=26, n_head=4),
}


@pytest.fixture(scope="module", params=MODELS)
def untrained(request):
    """A model as it is initialised, and its analyses under a known and an estimated sigma."""
    import transformers

    from tests.conftest import FAMILIES

    cls, config, sizes = FAMILIES[request.param]
    torch.manual_seed(11)
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **MODELS[request.param]}))
    _gaussian_as_initialised(model)
    analyzer = RMTAnalyzer(model)
    return analyzer.analyze(sigma=0.02, rate=RATE), analyzer.analyze(sigma="bulk", rate=RATE)


def _gaussian_as_initialised(model: nn.Module) -> None:
    """GPT-2 scales its output projections down by depth; undo that, so that sigma is known to be 0.02."""
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            parameter.data *= 0.02 / parameter.data.std()


def _in_binomial_interval(hits: int, trials: int, rate: float) -> bool:
    low, high = stats.binom.interval(0.998, trials, rate)
    return low <= hits <= high


def test_outliers_come_at_the_chosen_rate(untrained) -> None:
    """Per shape, at least 50 matrices each, at either edge, with sigma known and estimated."""
    for report in untrained:
        table = report.to_pandas()
        table = table[table["block"].notna()]
        for shape, group in table.groupby(["rows", "cols"]):
            assert len(group) >= 50 or shape[0] != shape[1], shape
        for square, group in table.groupby(table["rows"] == table["cols"]):
            assert len(group) >= 50
            assert _in_binomial_interval(int((group["n_above_tw"] > 0).sum()), len(group), RATE)
            below = int((group["n_below_tw"] > 0).sum())
            assert below == 0 if square else _in_binomial_interval(below, len(group), RATE)


def test_p_values_are_uniform_on_both_sides(untrained) -> None:
    report = untrained[1]
    for side in ("right", "left"):
        for values in ("p_values", "centred_p_values"):
            p = torch.cat([getattr(getattr(result, side), values) for result in report.values()])
            p = p[~p.isnan()].numpy()
            assert len(p) > 10_000
            assert stats.kstest(p, "uniform").pvalue > 1e-3, (side, values)
            assert _in_binomial_interval(int((p < 0.01).sum()), len(p), 0.01)


def test_spacing_ratio_is_that_of_a_random_matrix(untrained) -> None:
    ratios = untrained[1].to_pandas()["spacing_ratio"]
    assert abs(ratios.mean() - 0.5307) < 3 * ratios.std() / math.sqrt(len(ratios))


def test_discoveries_are_rare(untrained) -> None:
    """Benjamini-Hochberg at 5 %: about one matrix in twenty shows any."""
    table = untrained[1].to_pandas()
    for side in ("right", "left"):
        found = int((table[f"{side}_discoveries"] > 0).sum())
        assert found <= stats.binom.ppf(0.999, len(table), 0.05)


@pytest.mark.parametrize("shape", [(150, 150), (400, 100), (100, 400)])
def test_planted_spikes_are_found_k_of_k(shape: tuple[int, int]) -> None:
    """Spikes of 2.2 times the detection threshold (mn)^(1/4) sigma; false findings at the chosen rate."""
    k, trials, rate = 4, 50, 0.01
    rng = np.random.default_rng(5)
    model = nn.ModuleList()
    strength = 2.2 * (shape[0] * shape[1]) ** 0.25
    for _ in range(trials):
        u = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
        v = np.linalg.qr(rng.standard_normal((shape[1], k)))[0]
        layer = nn.Linear(shape[1], shape[0])
        layer.weight.data = torch.from_numpy(rng.standard_normal(shape) + strength * u @ v.T).float()
        model.append(layer)
    for sigma in (1.0, "bulk"):
        table = RMTAnalyzer(model).analyze(sigma=sigma, rate=rate, sides="none").to_pandas()
        assert (table["n_above_tw"] >= k).all()
        assert int((table["n_above_tw"] > k).sum()) <= stats.binom.ppf(0.999, trials, rate)
        assert int((table["n_below_tw"] > 0).sum()) <= stats.binom.ppf(0.999, trials, rate)


def test_uncorrected_edges_fire_far_too_often(untrained) -> None:
    """Why the thresholds exist: the bare edge is crossed in one noise matrix in eight."""
    table = untrained[0].to_pandas()
    assert (table["n_above"] > 0).mean() > 0.08
