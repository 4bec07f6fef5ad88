"""Weights that ZeRO-3 of deepspeed shards: read by all processes together, never written."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_rmt import RMTAnalyzer, SVDPruner
from hf_rmt.models.live import is_sharded

SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100
)


def model() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not there")
def test_two_processes_read_what_zero3_shards() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, __file__], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2


class Sharded(torch.nn.Parameter):
    """What deepspeed leaves in the place of a parameter that is not gathered."""


def _shard(net: torch.nn.Module) -> dict[int, torch.Tensor]:
    values = {}
    for number, parameter in enumerate(net.parameters()):
        values[number] = parameter.data
        parameter.ds_id, parameter.ds_shape = number, parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    return values


def test_a_parameter_that_is_not_gathered_keeps_its_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for deepspeed's own gathering."""
    from hf_rmt.models import live

    expected = RMTAnalyzer(model()).analyze(progress=False).to_pandas()
    net = model()
    values = _shard(net)
    monkeypatch.setattr(live, "_gathered", lambda weight: values[weight.ds_id].clone())
    analyzer = RMTAnalyzer(net)
    assert is_sharded(net) and all(matrix.load.collective for matrix in analyzer.matrices)  # type: ignore[attr-defined]
    assert analyzer.analyze(progress=False).to_pandas().equals(expected)
    message = "sharded by ZeRO-3, which is read and not written: save the model, and take parts out of the checkpoint"
    with pytest.raises(ValueError, match=message):
        analyzer.matrices[0].write(torch.zeros(analyzer.matrices[0].shape))
    with pytest.raises(ValueError, match="BertModel is sharded by ZeRO-3: save it with the Trainer or Accelerator"):
        SVDPruner(net).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _in_process() -> None:
    import deepspeed
    import pandas as pd

    expected = RMTAnalyzer(model()).analyze(progress=False, workers=1).to_pandas()
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model(), config=settings)
    weight = engine.module.encoder.layer[0].output.dense.weight
    assert weight.numel() == 0 and tuple(weight.ds_shape) == (64, 128)
    found = RMTAnalyzer(engine.module).analyze(progress=False, workers=1).to_pandas()
    pd.testing.assert_frame_equal(found, expected)
    assert weight.numel() == 0
    batches = [{"input_ids": torch.arange(8)[None] + number} for number in range(4)]
    sums = RMTAnalyzer(engine.module).collect(batches, progress=False)
    alone = _alone(batches)
    for name in alone:
        torch.testing.assert_close(sums[name].outer, alone[name].outer, rtol=1e-4, atol=1e-4)
    print("the same")


def _alone(batches: list[dict[str, torch.Tensor]]) -> Any:
    from hf_rmt.processes import alone

    with alone():
        return RMTAnalyzer(model()).collect(batches, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _in_process()
