"""The sweeps over model types, on a few of them; ``make coverage`` does all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent / "coverage"))

import report
import shrinking
import sweeps


@pytest.mark.parametrize("kind", ["bert", "xlnet", "mamba"])
def test_a_small_model_goes_through_all_of_it(kind: str, tmp_path: Path) -> None:
    found = sweeps.discovered(kind, tmp_path)
    assert report.share_found(found) >= report.WHOLE and not found["unplaced"]
    cycled = sweeps.cycle(kind, tmp_path)
    assert cycled["matrices"] > 1 and cycled["parameters"] < min(shrinking.LARGEST, found["total"])


@pytest.mark.parametrize("kind", ["encodec", "recurrent_gemma", "deepseek_v4", "clip"])
def test_elements_add_up(kind: str, tmp_path: Path) -> None:
    found = sweeps.discovered(kind, tmp_path)
    assert sum(found["elements"].values()) == found["total"]
    assert report.share_found(found) >= report.WHOLE


def test_a_small_configuration_is_of_the_same_architecture() -> None:
    small, full = shrinking.small_config(transformers.Gemma3Config), transformers.Gemma3Config()
    assert small.text_config.num_hidden_layers == 2 < full.text_config.num_hidden_layers
    assert small.text_config.hidden_size * 16 == full.text_config.hidden_size
    assert small.text_config.num_attention_heads == full.text_config.num_attention_heads
    assert len(small.text_config.layer_types) == 2
    assert small.vision_config.image_size == full.vision_config.image_size


def test_what_goes_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sweeps.Unbuilt, match="nonsense"):
        sweeps.discovered("nonsense", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.SVDPruner, "restore", lambda self: None)
        with pytest.raises(AssertionError, match="restoring did not give the bits back"):
            sweeps.cycle("bert", tmp_path)
    load = transformers.AutoModel.from_pretrained

    def load_wrong(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.encoder.layer[1].attention.self.key.weight[3, 4] += 0.1
        return model

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModel, "from_pretrained", load_wrong)
        with pytest.raises(AssertionError, match="loaded the report differs"):
            sweeps.cycle("bert", tmp_path)


def test_the_document_counts() -> None:
    good = {"elements": {"block": 99, "embedding": 50, "left out": 1, "vectors": 2}, "flat_left_out": 1, "unplaced": []}
    good |= {"left_out": [["a.b", [1, 1], "vectors"]]}
    bad = good | {"flat_left_out": 2}
    found = {"one": good, "two": bad, "three": {"unbuilt": "KeyError: 3"}, "four": {"error": "AssertionError: 4"}}
    cycled = {"one": {"matrices": 3}, "two": {"error": "AssertionError: no"}, "three": {"unbuilt": "x"}, "four": {}}
    text = report.document(found, cycled)
    for row in (
        "known | 4",
        "default configuration | 3",
        "outside embeddings | 1",
        "built small | 3",
        "small cycle | 2",
    ):
        assert f"{row} |" in text, row
    assert "| matrices | 198 |" in text and "| vectors | 2 | 2 |" in text
    for line in ("| two | 98.02%; `a.b` (vectors) |", "| four | AssertionError: 4 |", "| three | KeyError: 3 |"):
        assert line in text, line
    assert not report.goals_are_met({"discovered": found, "cycle": cycled})
    assert report.goals_are_met({"discovered": {"one": good}, "cycle": {"one": {}}})
