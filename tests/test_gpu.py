"""On an accelerator the numbers are those of the CPU. Skipped where there is none; ``make gpu-check`` runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_rmt import Decile, RMTAnalyzer, SVDPruner, Width
from hf_rmt.theory.decomposition import svd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
Maker = Callable[..., Any]
#: Columns that are numbers of vectors or come from single entries of them may differ by rounding.
COLUMNS = ["stable_rank", "upper_edge", "lower_edge", "sigma"]


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 90, (2, 7), generator=generator)} for _ in range(4)]


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (200, 300), (1024, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = svd(weight.cuda(), torch.float32), svd(weight, torch.float32)
    torch.testing.assert_close(found.s.cpu(), expected.s, rtol=1e-9, atol=1e-9)
    product = (found.u.double() * found.s.to(found.u.device)) @ found.vh.double()
    torch.testing.assert_close(product.cpu(), weight.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral"])
def test_analysis_collection_and_removal(family: str, make_model: Maker) -> None:
    model = make_model(family)
    there = copy.deepcopy(model).cuda()
    expected = RMTAnalyzer(model).analyze(progress=False).to_pandas()
    for found in (
        RMTAnalyzer(there).analyze(progress=False).to_pandas(),
        RMTAnalyzer(model).analyze(device="cuda", progress=False).to_pandas(),
    ):
        for column in COLUMNS:
            assert found[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-6), column
    ours = RMTAnalyzer(model).collect(batches(), progress=False)
    theirs = RMTAnalyzer(there).collect(batches(), progress=False)
    for name in ours:
        assert theirs[name].tokens == ours[name].tokens
        torch.testing.assert_close(theirs[name].outer.cpu(), ours[name].outer, rtol=1e-3, atol=1e-3)
    pruner, reference = SVDPruner(there, progress=False), SVDPruner(model, progress=False)
    before = [matrix.read().clone() for matrix in pruner.matrices]
    with pruner.removed(Decile(2)), reference.removed(Decile(2)):
        for here, other in zip(pruner.matrices, reference.matrices, strict=True):
            torch.testing.assert_close(here.read().cpu(), other.read(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(matrix.read(), kept) for matrix, kept in zip(pruner.matrices, before, strict=True))


@pytest.mark.parametrize("there", [True, False], ids=["on the device", "brought there"])
def test_workers_beside_each_other(there: bool, make_model: Maker) -> None:
    """Streams change nothing, to the bit."""
    model = make_model("llama", num_hidden_layers=6)
    source = copy.deepcopy(model).cuda() if there else model
    alone, beside = (RMTAnalyzer(source).analyze(device="cuda", workers=workers, progress=False) for workers in (1, 4))
    for name in alone:
        for key, value in alone[name].tensors().items():
            torch.testing.assert_close(beside[name].tensors()[key], value, rtol=0, atol=0, equal_nan=True)


def test_slices(make_model: Maker) -> None:
    model = make_model("llama")
    there = SVDPruner(copy.deepcopy(model).cuda()).slice(Width(0.75), batches(), form="registered")
    here = SVDPruner(model).slice(Width(0.75), batches(), form="registered")
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(there(ids.cuda()).logits.cpu(), here(ids).logits, rtol=1e-2, atol=1e-2)


def test_a_matrix_that_does_not_fit_goes_to_the_cpu() -> None:
    """The device is filled but for a little, which the factors do not fit into."""
    weight = torch.randn(2048, 2048)
    free = torch.cuda.mem_get_info()[0]
    filling = torch.empty(max(free - 40_000_000, 0), dtype=torch.uint8, device="cuda")
    report = RMTAnalyzer(_linear(weight)).analyze(device="cuda", progress=False)
    del filling
    torch.cuda.empty_cache()
    expected = RMTAnalyzer(_linear(weight)).analyze(progress=False)
    assert report.to_pandas()["n_above"].tolist() == expected.to_pandas()["n_above"].tolist()


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return layer
