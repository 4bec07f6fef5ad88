"""Slicing over two processes gives the slice of one. Run as a program, this file is what each process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rmt.processes import rank_and_count
from hf_rmt.slicing.keep import Width
from hf_rmt.slicing.slicer import slice_model
from hf_rmt.slicing.verify import output_of, relative_error, sample_batch

_SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def outputs(count: int) -> dict[str, torch.Tensor]:
    """What slices put out that were calibrated on so many batches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.2, **_SIZES)).double().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(50, (2, 9), generator=generator)} for _ in range(count)]
    found = {}
    for per_block in (False, True):
        small = slice_model(model, Width(0.75), batches, per_block=per_block, form="registered", progress=False)
        assert small.sliced.tokens == count * 18
        found[f"per block: {per_block}"] = output_of(small, sample_batch(model))
    return found


def test_two_processes_give_the_slice_of_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launcher, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = outputs(5)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, output in expected.items():
            assert relative_error(found[name], output) < 1e-9, name


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, processes = rank_and_count()
    assert processes == 2
    torch.save(outputs(5), folder / f"{rank}.pt")  # three batches for one, two for the other
    batches = [{"input_ids": torch.zeros(2, 40, dtype=torch.long)}] * 2
    with pytest.raises(RuntimeError, match="the disk is full"):  # of one of them; the other hears of it
        slice_model(_failing_in(1, rank), Width(0.75), batches, per_block=True, progress=False)
    torch.distributed.destroy_process_group()


def _failing_in(process: int, rank: int) -> Any:
    """A model whose second block fails in one process, in its third pass: the checks before the walk are two."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **_SIZES))
    passes: list[int] = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if rank == process and len(passes) == 3:
            raise RuntimeError("the disk is full")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    return model


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
