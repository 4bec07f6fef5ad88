"""The laws of analysis, collection, removal and the stream, where a model is not whole in memory: on disk, or FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import nn

from hf_rmt import Bottom, Decile, Group, Outliers, RMTAnalyzer, SVDPruner, Top, collect_stream

Maker = Callable[..., Any]
FAMILIES = ["bert", "llama", "gpt2", "mixtral"]
OPTIONS: dict[str, Any] = {"progress": False, "workers": 1}


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (6, 2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return [{"input_ids": each, "attention_mask": mask} for each in ids]


def bits_of(pruner: SVDPruner) -> list[torch.Tensor]:
    return [matrix.read().clone() for matrix in pruner.matrices]


def hold(model: Any, plain: Any, folder: Path) -> None:
    """All laws; ``plain`` is the same model in memory. Sharded ones are held by all processes."""
    hold_analysis(model, plain, folder)
    hold_collection(model, plain)
    hold_removal(model, plain, folder)
    hold_stream(model, plain)


def hold_analysis(model: Any, plain: Any, folder: Path) -> None:
    expected = RMTAnalyzer(plain).analyze(**OPTIONS)
    for found in (
        RMTAnalyzer(model).analyze(**OPTIONS),
        RMTAnalyzer(model).analyze(folder=folder / "report", **OPTIONS),
        RMTAnalyzer(model).analyze(folder=folder / "report", **OPTIONS),
    ):
        pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas())
    name = next(iter(expected))
    weight = next(matrix for matrix in RMTAnalyzer(plain).matrices if matrix.name == name).read().double()
    torch.testing.assert_close(expected[name].s, torch.linalg.svdvals(weight), rtol=1e-9, atol=1e-9)
    same = RMTAnalyzer.compare(model, copy.deepcopy(plain), **OPTIONS).to_pandas()
    assert (same["relative_change"] == 0).all() and (same["note"] == "the weights did not change").all()
    _hold_scaling(model, expected)


def _hold_scaling(model: Any, expected: Any) -> None:
    """Twice a matrix has twice its singular values, and the same tests."""
    matrix = RMTAnalyzer(model).matrices[0]
    before = matrix.read().clone()
    matrix.write(2 * before)
    try:
        found = RMTAnalyzer(model).analyze(roles=matrix.name, **OPTIONS)[matrix.name]
    finally:
        matrix.write(before)
    torch.testing.assert_close(found.s, 2 * expected[matrix.name].s, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.right.p_values, expected[matrix.name].right.p_values, equal_nan=True)
    assert found.row["n_above"] == expected[matrix.name].row["n_above"]
    assert torch.equal(matrix.read(), before)


def hold_collection(model: Any, plain: Any) -> None:
    data = batches()
    with alone():
        expected = RMTAnalyzer(plain).collect(data, outputs=True, progress=False)
    found = RMTAnalyzer(model).collect(data, outputs=True, progress=False)
    assert list(found) == list(expected) and found.fingerprints == expected.fingerprints
    for name in expected:
        assert found[name].tokens == expected[name].tokens
        torch.testing.assert_close(found[name].outer, expected[name].outer, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].outer, found[name].outer.mT, rtol=1e-12, atol=1e-12)
    parts = [RMTAnalyzer(model).collect(half, progress=False) for half in (data[:2], data[2:])]
    both, whole = parts[0] + parts[1], RMTAnalyzer(model).collect(data, progress=False)
    for name in whole:
        torch.testing.assert_close(both[name].outer, whole[name].outer, rtol=1e-4, atol=1e-4)
    table = RMTAnalyzer(model).analyze(covariances=found, **OPTIONS).to_pandas()
    theirs = RMTAnalyzer(plain).analyze(covariances=expected, **OPTIONS).to_pandas()
    torch.testing.assert_close(
        torch.tensor(table["overlap_bulk"].to_numpy(float)),
        torch.tensor(theirs["overlap_bulk"].to_numpy(float)),
        rtol=1e-3,
        atol=1e-3,
        equal_nan=True,
    )


def hold_removal(model: Any, plain: Any, folder: Path) -> None:
    pruner, reference = SVDPruner(model, **OPTIONS), SVDPruner(plain, **OPTIONS)
    before = bits_of(pruner)
    for selection in (Decile(10), Outliers() | Bottom(3), ~Top(2)):
        edit, theirs = pruner.remove(selection), reference.remove(selection)
        assert all(map(torch.equal, bits_of(pruner), bits_of(reference)))
        pd.testing.assert_frame_equal(pruner.affected(), reference.affected())
        pruner.undo(edit)
        reference.undo(theirs)
        assert all(map(torch.equal, bits_of(pruner), before))
    _hold_parts(pruner, before)
    with pytest.raises(RuntimeError, match="inside"), pruner.removed(Decile(1)):
        raise RuntimeError("inside")
    assert all(map(torch.equal, bits_of(pruner), before))
    _hold_saving(pruner, reference, folder)


def _hold_parts(pruner: SVDPruner, before: list[torch.Tensor]) -> None:
    """What is removed and what is kept make up the matrix, in either order of two edits, and rank follows."""
    with pruner.removed(Decile(3)):
        without = bits_of(pruner)
    with pruner.removed(keep=Decile(3)):
        alone_ = bits_of(pruner)
    for one, other, whole in zip(without, alone_, before, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-5, atol=1e-6)
    with pruner.removed(Decile(1)), pruner.removed(Bottom(0.2)):
        one_way = bits_of(pruner)
    with pruner.removed(Bottom(0.2)), pruner.removed(Decile(1)):
        assert all(map(torch.equal, bits_of(pruner), one_way))
    with pruner.removed(Decile(1) | Bottom(0.2)):
        assert all(map(torch.equal, bits_of(pruner), one_way))
    with pruner.removed(~Top(2)):
        ranks = [int(torch.linalg.matrix_rank(one.double(), rtol=1e-4)) for one in bits_of(pruner)]
        assert ranks == [2] * len(ranks)
    scores = pruner.sweep(lambda net: float(pruner.matrices[0].read().double().sum()), deciles=[1, 10], roles="all")
    assert len(scores) == 3


def _hold_saving(pruner: SVDPruner, reference: SVDPruner, folder: Path) -> None:
    for one in (pruner, reference):
        one.remove(Decile(10))
    pruner.save_pretrained(folder / "pruned")
    loaded = type(reference.model).from_pretrained(folder / "pruned").state_dict()
    for name, value in reference.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded[name], value), name
    for one in (pruner, reference):
        one.restore()


def hold_stream(model: Any, plain: Any) -> None:
    """What the residual stream carries, and what is hidden of it; slicing takes a model that is whole."""
    data = batches()
    with alone():
        expected = collect_stream(plain, data, progress=False)
    streams = collect_stream(model, data, progress=False)
    for name in expected:
        torch.testing.assert_close(streams[name].outer, expected[name].outer, rtol=1e-3, atol=1e-3)
    whole = logits(model, data[0])
    torch.testing.assert_close(whole, logits(plain, data[0]), rtol=1e-4, atol=1e-4)
    with SVDPruner(model, **OPTIONS).projected(Group(1, of=4), streams=streams):
        hidden = logits(model, data[0])
    with SVDPruner(plain, **OPTIONS).projected(Group(1, of=4), streams=expected):
        torch.testing.assert_close(hidden, logits(plain, data[0]), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(hidden, whole, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(model, data[0]), whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"offload|sharded|dispatched"):
        SVDPruner(model, **OPTIONS).slice(0.75, data)


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found[0].clone()


def alone() -> Any:
    from hf_rmt.processes import alone as by_itself

    return by_itself()


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_on_disk(family: str, make_model: Maker, one_thread: None, tmp_path: Path) -> None:
    from accelerate import disk_offload

    plain = make_model(family)
    model = copy.deepcopy(plain)
    disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    hold(model, plain, tmp_path)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def _hold_sharded(folder: Path, plain: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
    model = copy.deepcopy(plain)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    hold(model, plain, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_on_two_processes_that_share_the_weights(
    family: str, make_model: Maker, launch: Callable[..., None], tmp_path: Path
) -> None:
    transformers.utils.logging.disable_progress_bar()
    launch(_hold_sharded, tmp_path, make_model(family))
