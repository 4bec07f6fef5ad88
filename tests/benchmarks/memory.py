"""Peak memory of analysing a checkpoint shard by shard, and whether it grows with the checkpoint.

The checkpoint is a random Llama of float32 shards whose head is the one matrix of 14336 x 4096 that
is analysed (the token embedding, of the same shape, is on disk and left out, as by default). Each
analysis runs in a process of its own, whose high-water mark is read at the end; that of a process
which does the imports alone is taken off.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch

_WORKERS = 2
#: Bytes of a shard at which the next one is begun.
_SHARD = 400_000_000
_SHAPE = {"hidden_size": 4096, "vocab_size": 14336, "intermediate_size": 1024, "num_attention_heads": 32}
_QUICK_SHAPE = {"hidden_size": 256, "vocab_size": 896, "intermediate_size": 64, "num_attention_heads": 4}
_LAYERS = 9  # 2.17 GB


def main(quick: bool) -> harness.Section:
    """Peaks of four processes: imports, the largest matrix alone, the checkpoint, and one of twice its depth."""
    shape, layers = (_QUICK_SHAPE, 2) if quick else (_SHAPE, _LAYERS)
    runs = {"imports alone": _child()}
    for depth in (layers, 2 * layers):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = write_checkpoint(folder, shape, depth, shard=1_000_000 if quick else _SHARD)
            if depth == layers:
                runs["largest matrix alone, one worker"] = _child(folder, 1, "lm_head") | {"bytes": size}
            runs[f"{depth} blocks, {_WORKERS} workers"] = _child(folder, _WORKERS) | {"bytes": size}
    return _section(shape, runs)


def write_checkpoint(folder: Path, shape: dict[str, int], layers: int, shard: float = math.inf) -> int:
    """Configuration, shards of so many bytes and index, one shard in memory at a time; the bytes of the weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    harness.say(f"checkpoint of {layers} blocks: writing")
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, num_key_value_heads=1, tie_word_embeddings=False, dtype="float32"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        layout = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    groups = _shards(layout, shard)
    files = {}
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: _weight(layout[name]) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(4 * torch.Size(each).numel() for each in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(layout: dict[str, tuple[int, ...]], limit: float) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in layout.items():
        if size >= limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 4 * torch.Size(shape).numel()
    return groups


def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02


def _child(folder: Path | None = None, workers: int = 1, roles: str | None = None) -> dict[str, Any]:
    """Runs this file in a process of its own; what it printed."""
    job = {"folder": folder and str(folder), "workers": workers, "roles": roles}
    harness.say(f"process: {roles or 'all matrices'}, {workers} workers" if folder else "process: imports alone")
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    import transformers

    from hf_rmt.analyzer import RMTAnalyzer

    _ = transformers.AutoConfig, torch
    start = time.perf_counter()
    count = 0
    if job["folder"]:
        analyzer = RMTAnalyzer.from_checkpoint(job["folder"], head=True)
        count = len(analyzer.analyze(progress=False, workers=job["workers"], roles=job["roles"]))
    return {"peak": harness.high_water_mark(), "seconds": time.perf_counter() - start, "matrices": count}


def _section(shape: dict[str, int], runs: dict[str, dict[str, Any]]) -> harness.Section:
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    unit = 4 * hidden * vocabulary
    base = runs["imports alone"]["peak"]
    units = {name: (run["peak"] - base) / unit for name, run in runs.items()}
    rows = [
        [
            name,
            f"{run['bytes'] / 1e9:.2f}" if "bytes" in run else "-",
            str(run["matrices"]),
            f"{run['peak'] / 1e6:.0f}",
            f"{(run['peak'] - base) / 1e6:.0f}",
            harness.number(units[name]),
            harness.number(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    _, alone, once, twice = runs
    head, square = _floor_bytes(vocabulary, hidden), _floor_bytes(hidden, hidden)
    floor, floor_alone = (head + square) / unit, head / unit
    header = ["", "checkpoint GB", "matrices", "peak MB", "without imports MB", "in largest matrices", "seconds"]
    return harness.Section(
        title="Peak memory over a sharded checkpoint",
        what=(
            "Largest resident set of a process that runs `RMTAnalyzer.from_checkpoint(folder, head=True).analyze()` "
            f"with both sides and {_WORKERS} workers, less that of a process which does the imports alone, in units "
            f"of the largest matrix in float32 ({vocabulary} x {hidden}, {unit / 1e6:.0f} MB; it is the head). "
            f"Random float32 Llama: hidden {hidden}, intermediate {shape['intermediate_size']}, one key-value head, "
            f"so that two matrices a block are {hidden} x {hidden}. The embedding is on disk too and is not analysed. "
            "One run each. What is imported when needed counts."
        ),
        tables=[harness.Table(header, rows)],
        targets=[
            harness.Target("peak in largest matrices", 8, units[once]),
            harness.Target("peak in largest matrices, checkpoint of twice the depth", 8, units[twice]),
        ],
        floor=(
            "The weight and its vectors in float32, the Gram matrix and its eigenvectors in float64, for the largest "
            f"matrix and a square one beside it: {harness.number(floor)} largest matrices; for the largest alone "
            f"{harness.number(floor_alone)}."
        ),
        distance=(
            f"{harness.number(units[once] / floor)} times the floor, and {harness.number(units[alone] / floor_alone)} "
            "times for the largest alone, the eigensolver's workspace included. Twice the depth takes "
            f"{harness.number(units[twice] / units[once])} times the memory."
        ),
        raw=runs,
        packages=("safetensors",),
    )


def _floor_bytes(rows: int, cols: int) -> int:
    short = min(rows, cols)
    return 4 * rows * cols + 4 * short * (rows + cols) + 2 * 8 * short * short


if __name__ == "__main__":
    print(json.dumps(_in_child(json.loads(sys.argv[1]))))
