"""A checkpoint that is larger than the memory there is: analysed, and pruned from folder to folder.

Each command runs as a user's would, under a limit of its address space (``ulimit -v``), which counts every page that is
mapped, also those that are not resident.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from memory import _write_checkpoint

_SHAPE = {"hidden_size": 2048, "vocab_size": 4096, "intermediate_size": 5632, "num_attention_heads": 16}
_QUICK_SHAPE = {"hidden_size": 256, "vocab_size": 896, "intermediate_size": 64, "num_attention_heads": 4}
_LAYERS, _SHARD = 14, 150_000_000
#: Of the address space, and what ``--max-memory`` is told.
_LIMIT, _BUDGET = 2_000_000_000, "1200MB"


def main(quick: bool) -> harness.Section:
    """Both commands, once each."""
    shape, layers, shard = (_QUICK_SHAPE, 2, 1_000_000) if quick else (_SHAPE, _LAYERS, _SHARD)
    with tempfile.TemporaryDirectory() as name:
        base, runs = Path(name, "base"), {}
        base.mkdir()
        size = _write_checkpoint(base, shape, layers, shard=shard)
        for command, options in (("analyze", ["--no-plots"]), ("prune", ["--remove", "decile:10"])):
            harness.say(command)
            runs[command] = _limited(command, str(base), "--out", str(Path(name, command)), *options)
        code = f"import transformers; transformers.AutoModel.from_pretrained({str(base)!r})"
        runs["load the model"] = _run([sys.executable, "-c", code])
    return _section(shape, layers, size, runs)


def _limited(*arguments: str) -> dict[str, Any]:
    return _run([sys.executable, "-m", "hf_rmt", *arguments, "--max-memory", _BUDGET])


def _run(command: list[str]) -> dict[str, Any]:
    """Exit status, seconds, and the largest resident set in bytes."""
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))  # noqa: E731
    start = time.perf_counter()
    # The children of this process have been smaller so far, or this one says nothing.
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    error = done.stderr.strip().splitlines()[-1][:200] if done.returncode else ""
    return {
        "status": done.returncode,
        "seconds": time.perf_counter() - start,
        "peak": 1024 * peak if peak > before else float("nan"),
        "error": error,
    }


def _section(shape: dict[str, int], layers: int, size: int, runs: dict[str, dict[str, Any]]) -> harness.Section:
    rows = [
        [
            name,
            "done" if run["status"] == 0 else "fails",
            harness.number(run["peak"] / 1e6),
            harness.number(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    failed = sum(runs[name]["status"] != 0 for name in ("analyze", "prune"))
    return harness.Section(
        title="A checkpoint larger than the memory",
        what=(
            f"A random float32 Llama of {layers} blocks, hidden {shape['hidden_size']}, intermediate "
            f"{shape['intermediate_size']}, {size / 1e9:.2f} GB in shards of {_SHARD / 1e6:.0f} MB, under an address "
            f"space of {_LIMIT / 1e9:.1f} GB (`ulimit -v`): `hf-rmt analyze` with both sides, and `hf-rmt prune "
            f"--remove decile:10`, each with `--max-memory {_BUDGET}`; and transformers, which loads the model whole. "
            "The largest resident set is given where it exceeds that of the runs before."
        ),
        tables=[harness.Table(["", "", "peak MB", "seconds"], rows)],
        targets=[harness.Target("commands that fail under the limit", 0, failed)],
        floor="The largest matrix with its factors, and what the imports take: see peak memory over a checkpoint.",
        distance=f"The checkpoint is {size / _LIMIT:.2f} times the address space. Loading it fails with: "
        f"`{runs['load the model']['error'] or 'nothing'}`",
        raw=runs,
        packages=("safetensors",),
    )
