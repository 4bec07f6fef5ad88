"""The matrices of a Llama of 8 billion parameters: two of its blocks on the CPU, all of it where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import harness
import torch
from torch import nn

from hf_rmt import RMTAnalyzer

_SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
_BLOCKS = 32
#: Blocks on the CPU.
_SOME = 2
#: Matrices at a time on a GPU, each in a stream of its own.
_WORKERS = (1, 2, 4)


def main(quick: bool) -> harness.Section:
    """Some blocks in a process of their own; on an accelerator all, and a loop of ``torch.linalg.svd``."""
    harness.say("CPU")
    shrink = 32 if quick else 1
    runs = {"imports": _child(0, shrink, "cpu"), "cpu": _child(_SOME, shrink, "cpu")}
    runs["cpu loop"] = _child(1, shrink, "cpu", loop=True)
    name = ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        harness.say(name)
        for workers in _WORKERS:
            runs[f"gpu {workers}"] = _child(_BLOCKS, shrink, "cuda", workers=workers)
        runs["gpu loop"] = _child(_BLOCKS, shrink, "cuda", loop=True)
    return _section(runs, name)


def model(blocks: int, shrink: int, device: str) -> nn.Module:
    """Linear layers of these shapes in bfloat16, under the names of a Llama."""
    torch.manual_seed(0)
    root = nn.Module()
    root.layers = nn.ModuleList()
    for _ in range(blocks):
        block = nn.Module()
        for path, (rows, cols) in _SHAPES.items():
            parent, _, leaf = path.partition(".")
            if not hasattr(block, parent):
                block.add_module(parent, nn.Module())
            layer = nn.Linear(cols // shrink, rows // shrink, bias=False, device=device, dtype=torch.bfloat16)
            nn.init.normal_(layer.weight, std=0.02)
            block.get_submodule(parent).add_module(leaf, layer)
        root.layers.append(block)
    return root


def _child(blocks: int, shrink: int, device: str, *, workers: int | None = None, loop: bool = False) -> dict[str, Any]:
    """Runs this file in a process of its own; what it printed."""
    job = json.dumps({"blocks": blocks, "shrink": shrink, "device": device, "workers": workers, "loop": loop})
    done = subprocess.run([sys.executable, __file__, job], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    device = job["device"]
    if device == "cuda":
        torch.linalg.svd(torch.randn(64, 64, device=device))  # its libraries are loaded
    net = model(job["blocks"], job["shrink"], device)
    start = time.perf_counter()
    if job["loop"]:
        for parameter in net.parameters():
            u, s, vh = torch.linalg.svd(parameter.detach().float(), full_matrices=False)
            s.cpu(), u[0, 0].cpu(), vh[0, 0].cpu()
    elif job["blocks"]:
        RMTAnalyzer(net).analyze(progress=False, workers=job["workers"])
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else harness.high_water_mark()
    return {"seconds": seconds, "memory": memory, "weights": sum(p.nbytes for p in net.parameters())}


def _section(runs: dict[str, dict[str, Any]], name: str) -> harness.Section:
    cpu = runs["cpu"]
    each, beside = cpu["seconds"] / _SOME, cpu["memory"] - runs["imports"]["memory"] - cpu["weights"]
    rows = [
        [f"CPU, {_SOME} blocks", harness.number(cpu["seconds"]), harness.number(each), harness.number(beside / 1e9)],
        [f"CPU, {_BLOCKS} blocks, extrapolated", harness.number(each * _BLOCKS), harness.number(each), "the same"],
    ]
    bare = runs["cpu loop"]
    more = bare["memory"] - runs["imports"]["memory"] - bare["weights"]
    rows.append(["CPU, 1 block, loop of torch.linalg.svd", *map(harness.number, [bare["seconds"]] * 2 + [more / 1e9])])
    distance = (
        f"A block takes {each / bare['seconds']:.2f} times the loop of bare SVDs. All {_BLOCKS} blocks would take "
        f"{each * _BLOCKS / 60:.0f} minutes (extrapolated, not measured)."
    )
    if "gpu loop" in runs:
        loop = runs["gpu loop"]
        gpus = {f"{name}, {workers} at a time": runs[f"gpu {workers}"] for workers in _WORKERS}
        for label, run in (gpus | {f"{name}, loop of torch.linalg.svd": loop}).items():
            more = (run["memory"] - run["weights"]) / 1e9
            row = [label, *map(harness.number, (run["seconds"], run["seconds"] / _BLOCKS, more))]
            rows.append(row)
        best = min(run["seconds"] for run in gpus.values())
        distance += f" On the {name} all take {best / loop['seconds']:.2f} times the loop of bare SVDs."
    return harness.Section(
        title="A Llama of 8 billion parameters",
        what=(
            "`analyze()` with both sides of bfloat16 matrices of the shapes of Llama-8B, random: per block two of 4096 "
            "x 4096, two of 1024 x 4096, three of 14336 x 4096. Memory is the largest resident set (on a GPU what was "
            "allocated there) less the weights and what imports take. One run each, in a process of its own."
        ),
        tables=[harness.Table(["", "seconds", "seconds a block", "GB beside the weights"], rows)],
        floor="The decompositions themselves: `torch.linalg.svd(weight.float(), full_matrices=False)` of one matrix "
        "after the other, which is less exact (see time and accuracy against a float32 SVD loop).",
        distance=distance,
        raw=runs,
    )


if __name__ == "__main__":
    print(json.dumps(_in_child(json.loads(sys.argv[1]))))
