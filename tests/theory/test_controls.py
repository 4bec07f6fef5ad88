from __future__ import annotations

import warnings

import pytest
import scipy.stats
import torch

from hf_rmt.theory.controls import CONTROLS, control_matrix, seed_for
from hf_rmt.theory.decomposition import singular_values
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur


def heavy_tailed(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator) + 0.5) * 0.01


every_kind = pytest.mark.parametrize("kind", CONTROLS)


@every_kind
def test_same_seed_same_matrix(kind: str) -> None:
    weight = heavy_tailed(30, 50)
    one, again, other = (control_matrix(weight, kind, seed) for seed in (5, 5, 6))  # type: ignore[arg-type]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shape_and_precision(kind: str, dtype: torch.dtype) -> None:
    weight = heavy_tailed(12, 7).clamp(-1, 1).to(dtype)
    before = weight.clone()
    control = control_matrix(weight, kind, 0)  # type: ignore[arg-type]
    assert control.shape == (12, 7)
    assert control.dtype == torch.float32
    assert not control.requires_grad
    assert torch.equal(weight, before)


@every_kind
def test_a_parameter_is_taken_without_its_graph(kind: str) -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            control = control_matrix(torch.nn.Parameter(heavy_tailed(12, 7)), kind, 0)  # type: ignore[arg-type]
    finally:
        torch.set_warn_always(False)
    assert not control.requires_grad


def test_no_global_random_state_is_used() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for kind in CONTROLS:
        control_matrix(heavy_tailed(5, 5), kind, 0)
    assert torch.equal(torch.rand(3), expected)


def test_shuffled_keeps_the_entries_and_not_their_places() -> None:
    weight = heavy_tailed(40, 60)
    shuffled = control_matrix(weight, "shuffled", 1)
    assert torch.equal(shuffled.flatten().sort().values, weight.flatten().sort().values)
    assert float((shuffled == weight).float().mean()) < 0.01


def test_shuffled_takes_a_view_by_its_entries() -> None:
    weight = heavy_tailed(40, 60)
    assert torch.equal(control_matrix(weight.mT, "shuffled", 1), control_matrix(weight.mT.contiguous(), "shuffled", 1))


def test_gaussian_keeps_the_mean_square() -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(2)) * 0.03 + 0.05
    control = control_matrix(weight, "gaussian", 3)
    assert float(control.double().square().mean()) == pytest.approx(float(weight.double().square().mean()), rel=0.02)
    assert abs(float(control.double().mean())) < 1e-3
    assert scipy.stats.kstest((control / control.std()).flatten()[:5000].numpy(), "norm").pvalue > 1e-3


def test_gaussian_of_a_given_sigma() -> None:
    control = control_matrix(torch.ones(300, 400), "gaussian", 3, sigma=0.05)
    assert float(control.std()) == pytest.approx(0.05, rel=0.02)
    assert torch.equal(control, 0.05 * control_matrix(torch.ones(300, 400), "gaussian", 3, sigma=1.0))


def test_controls_tell_structure_from_heavy_tails() -> None:
    spike = torch.ones(200, 200) * 0.3
    structured = torch.randn(200, 200, generator=torch.Generator().manual_seed(4)) + spike
    edge = MarchenkoPastur(200, 200, float(structured.double().square().mean().sqrt())).upper_edge
    assert float(singular_values(structured)[0]) > 1.5 * edge
    assert float(singular_values(control_matrix(structured, "gaussian", 1))[0]) < 1.05 * edge
    tails = heavy_tailed(200, 200)
    edge = MarchenkoPastur(200, 200, float(tails.double().square().mean().sqrt())).upper_edge
    assert float(singular_values(control_matrix(tails, "shuffled", 1))[0]) > 1.5 * edge
    assert float(singular_values(control_matrix(tails, "gaussian", 1))[0]) < 1.05 * edge


def test_unknown_control_raises() -> None:
    with pytest.raises(ValueError, match=r"control is 'permuted': give one of gaussian, shuffled"):
        control_matrix(torch.ones(2, 2), "permuted", 0)  # type: ignore[arg-type]


def test_every_matrix_has_a_seed_of_its_own() -> None:
    names = [f"layers.{i}.{part}" for i in range(50) for part in ("query", "key")]
    seeds = {seed_for(seed, name) for seed in (0, 1) for name in names}
    assert len(seeds) == 200
    assert seed_for(0, "a") == seed_for(0, "a")
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
