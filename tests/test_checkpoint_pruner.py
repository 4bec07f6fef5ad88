"""From folder to folder: the same files as by way of a model in memory, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rmt import Bottom, CheckpointPruner, Decile, Outliers, Overlapping, Rank, Significant, SVDPruner
from hf_rmt.processes import gather

FAMILIES = ["bert", "llama", "gpt2", "mixtral", "gpt_oss", "vit", "t5", "phi3", "falcon_new"]
_STAGE = ".unfinished-pruning"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def assert_same_weights(found: Path, expected: Path) -> None:
    mine, theirs = weights_in(found), weights_in(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def by_way_of_memory(model: Any, folder: Path, *removals: Any, **where: Any) -> SVDPruner:
    pruner = SVDPruner(model, workers=1)
    for removal in removals:
        pruner.remove(removal, **where)
    pruner.save_pretrained(folder)
    return pruner


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_a_model_in_memory_would(family: str, make_model, tmp_path: Path) -> None:
    """Sharded, under the names of the files; tables, cards and edits are the same too."""
    model = make_model(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    loaded = type(model).from_pretrained(tmp_path / "base")
    live = by_way_of_memory(loaded, tmp_path / "live", Decile(10) | Bottom(3), Significant())
    pruner = CheckpointPruner(tmp_path / "base", workers=1)
    pruner.remove(Decile(10) | Bottom(3))
    pruner.remove(Significant())
    assert pruner.save_pretrained(tmp_path / "out") == tmp_path / "out"
    assert_same_weights(tmp_path / "out", tmp_path / "live")
    pd.testing.assert_frame_equal(pruner.affected(), live.affected())
    mine, theirs = (json.loads((tmp_path / place / "hf_rmt.json").read_text()) for place in ("out", "live"))
    assert mine | {"files": 0} == theirs | {"files": 0}
    again = type(model).from_pretrained(tmp_path / "out")
    for name, value in live.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_what_is_not_edited_keeps_every_byte(make_model, tmp_path: Path) -> None:
    make_model("llama").half().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    pruner = CheckpointPruner(tmp_path / "base", workers=1)
    pruner.remove(keep=Rank(3), roles="query", blocks=1)
    pruner.save_pretrained(tmp_path / "out")
    assert len(pruner.affected()) == 1 and pruner.affected()["removed"].item() == 61
    names = [path.name for path in (tmp_path / "base").glob("*.safetensors")]
    changed = [n for n in names if (tmp_path / "base" / n).read_bytes() != (tmp_path / "out" / n).read_bytes()]
    assert len(changed) == 1 < len(names)
    before, after = load_file(tmp_path / "base" / changed[0]), load_file(tmp_path / "out" / changed[0])
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    assert int(torch.linalg.matrix_rank(after["model.layers.1.self_attn.q_proj.weight"].double(), rtol=1e-2)) == 3


def test_tokenizer_generation_config_and_scores_come_along(make_model, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    make_model("llama").save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a"))
    ).save_pretrained(tmp_path / "base")
    pruner = CheckpointPruner(tmp_path / "base", workers=1)
    pruner.remove(Decile(10))
    pruner.save_pretrained(tmp_path / "out", metrics={"before": {"loss": 2.0}, "after": {"loss": 2.5}})
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "hf_rmt.csv"} <= there
    assert "2.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def base(make_model, tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


def _dying(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> list[str]:
    from hf_rmt import checkpoint_pruner

    original, begun = checkpoint_pruner.factored, []

    def factored(matrix: Any, *rest: Any) -> Any:
        begun.append(matrix.name)
        if len(begun) > after:
            raise error
        return original(matrix, *rest)

    monkeypatch.setattr(checkpoint_pruner, "factored", factored)
    return begun


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no more"), OSError("disk full")])
def test_it_goes_on_where_it_stopped(error: BaseException, base: Path, tmp_path: Path, monkeypatch) -> None:
    def pruner() -> CheckpointPruner:
        made = CheckpointPruner(base, workers=1)
        made.remove(Outliers() | Decile(10))
        return made

    pruner().save_pretrained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _dying(patch, 5, error)
        with pytest.raises((type(error), RuntimeError)):
            pruner().save_pretrained(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [_STAGE], "no model before it is whole"
    with monkeypatch.context() as patch:
        begun = _dying(patch, 100, error)
        pruner().save_pretrained(tmp_path / "out")
    assert len(begun) == 14 - 5
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / _STAGE).exists()


def test_a_copy_that_is_gone_is_made_again(base: Path, tmp_path: Path, monkeypatch) -> None:
    """What was done in it is not taken for done."""
    pruner = CheckpointPruner(base, workers=1)
    pruner.remove(Decile(1))
    pruner.save_pretrained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _dying(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pruner.save_pretrained(tmp_path / "out")
    next((tmp_path / "out" / _STAGE / "copy").glob("*-00002-*")).unlink()
    with monkeypatch.context() as patch:
        begun = _dying(patch, 100, KeyboardInterrupt())
        pruner.save_pretrained(tmp_path / "out")
    assert len(begun) == 14
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_another_request_or_model_does_not_go_on(base: Path, tmp_path: Path, monkeypatch) -> None:
    pruner = CheckpointPruner(base, workers=1)
    pruner.remove(Decile(1))
    with monkeypatch.context() as patch:
        _dying(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pruner.save_pretrained(tmp_path / "out")
    other = CheckpointPruner(base, workers=1)
    other.remove(Decile(2))
    with pytest.raises(ValueError, match="was made by another run: remove was"):
        other.save_pretrained(tmp_path / "out")
    for path in base.glob("*.safetensors"):
        save_file({key: 2 * value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    changed = CheckpointPruner(base, workers=1)
    changed.remove(Decile(1))
    with pytest.raises(ValueError, match="was made by another run: files was"):
        changed.save_pretrained(tmp_path / "out")
    assert list((tmp_path / "out" / _STAGE / "partial").glob("*.safetensors"))


def test_what_cannot_be_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    pruner = CheckpointPruner(base, workers=1)
    with pytest.raises(ValueError, match="overlaps need the activations: load the model"):
        pruner.remove(Overlapping(0.5))
    with pytest.raises(TypeError, match="one of a selection to remove and keep="):
        pruner.remove()
    with pytest.raises(ValueError, match="no role or name matches 'quary'"):
        pruner.remove(Decile(1), roles="quary")
    for asked in (pruner.affected, lambda: pruner.push_to_hub("a/b")):
        with pytest.raises(ValueError, match=r"to remove: nothing\) has written nothing yet: save_pretrained"):
            asked()
    pruner.remove(Rank(65))
    with pytest.raises(ValueError, match="65"):
        pruner.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / _STAGE).exists()
    fine = CheckpointPruner(base, workers=1)
    fine.remove(Decile(1))
    with pytest.raises(ValueError, match="holds a model that, for all that is known"):
        fine.save_pretrained(base)
    fine.save_pretrained(tmp_path / "out")
    fine.save_pretrained(tmp_path / "out")  # of the same original
    assert "removes" not in repr(fine) and "decile:1" in repr(fine)


def _prune_together(base: Path, folder: Path) -> None:
    pruner = CheckpointPruner(base)
    pruner.remove(Decile(10))
    pruner.save_pretrained(folder)
    assert len(pruner.affected()) == 14
    assert gather(folder.joinpath("config.json").is_file()) == [True, True]


def test_processes_share_the_work(base: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    pruner = CheckpointPruner(base, workers=1)
    pruner.remove(Decile(10))
    pruner.save_pretrained(tmp_path / "alone")
    launch(_prune_together, base, tmp_path / "out")
    assert_same_weights(tmp_path / "out", tmp_path / "alone")
    mine, theirs = (json.loads((tmp_path / place / "hf_rmt.json").read_text()) for place in ("out", "alone"))
    assert mine == theirs
