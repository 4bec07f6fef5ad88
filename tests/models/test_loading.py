"""Models by their names, in memory or from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rmt.models.loading import Offload, load_model


@pytest.mark.parametrize("memory", [0, 20_000, 10**9])
def test_offloaded_models_compute_the_same(memory: int, make_model, tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(1, 9)[None]
    found = load_model(tmp_path / "model", offload=Offload(memory, tmp_path / "rest"))
    assert type(found) is type(model) and not found.training
    on_disk = [parameter.device.type == "meta" for parameter in found.parameters()]
    assert any(on_disk) == (memory < 10**9)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_what_an_older_accelerate_cannot_do_has_a_remedy(make_model, tmp_path: Path, monkeypatch) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(message)

    monkeypatch.setattr(type(model), "from_pretrained", refuse)
    message = "You are trying to offload the whole model to the disk. Please use the `disk_offload` function instead."
    with pytest.raises(ValueError, match=r"2 MB hold no part of .*give a larger max_memory, or install accelerate>=1"):
        load_model(tmp_path, offload=Offload(2_000_000, tmp_path / "rest"))
    with pytest.raises(ValueError, match="You are trying"):
        load_model(tmp_path)
    message = "something else"
    with pytest.raises(ValueError, match="something else"):
        load_model(tmp_path, offload=Offload(2_000_000, tmp_path / "rest"))
