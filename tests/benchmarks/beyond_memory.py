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
from memory import write_checkpoint

_SHAPE = {"hidden_size": 2048, "vocab_size": 4096, "intermediate_size": 5632, "num_attention_heads": 16}
_QUICK_SHAPE = {"hidden_size": 256, "vocab_size": 896, "intermediate_size": 64, "num_attention_heads": 4}
_LAYERS = 14
#: Of the address space, and what ``--max-memory`` is told.
_LIMIT, _BUDGET = 2_000_000_000, "1200MB"


def main(quick: bool) -> harness.Section:
    """Both commands, once each."""
    shape, layers = (_QUICK_SHAPE, 2) if quick else (_SHAPE, _LAYERS)
    with tempfile.TemporaryDirectory() as name:
        base, runs = Path(name, "base"), {}
        base.mkdir()
        size = write_checkpoint(base, shape, layers)
        for command, options in (("analyze", ["--no-plots"]), ("prune", ["--remove", "decile:10"])):
            harness.say(command)
            words = [command, str(base), "--out", str(Path(name, command)), *options, "--max-memory", _BUDGET]
            runs[command] = _run("import runpy; runpy.run_module('hf_rmt', run_name='__main__', alter_sys=True)", words)
        runs["load the model"] = _run(f"import transformers; transformers.AutoModel.from_pretrained({str(base)!r})", [])
    return _section(shape, layers, size, runs)


#: Says at its end what it has used at most, the largest resident set in kilobytes.
_TELLING = """
import atexit, sys
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
atexit.register(lambda: print(status()["VmHWM"].split()[0], file=sys.stderr))
"""


def _run(code: str, arguments: list[str]) -> dict[str, Any]:
    """Exit status, seconds, the largest resident set in bytes, and the last words of one that failed."""
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))  # noqa: E731
    start = time.perf_counter()
    command = [sys.executable, "-c", _TELLING + code, *arguments]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    *words, peak = done.stderr.strip().splitlines()
    return {
        "status": done.returncode,
        "seconds": time.perf_counter() - start,
        "peak": 1024 * int(peak),
        "error": words[-1][:200] if done.returncode else "",
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
            f"{shape['intermediate_size']}, {size / 1e9:.2f} GB in one file, under an address "
            f"space of {_LIMIT / 1e9:.1f} GB (`ulimit -v`): `hf-rmt analyze` with both sides, and `hf-rmt prune "
            f"--remove decile:10`, each with `--max-memory {_BUDGET}`; and transformers, which loads the model whole."
        ),
        tables=[harness.Table(["", "", "peak MB", "seconds"], rows)],
        targets=[harness.Target("commands that fail under the limit", 0, failed)],
        floor="The largest matrix with its factors, and what the imports take: see peak memory over a checkpoint.",
        distance=f"The checkpoint is {size / _LIMIT:.2f} times the address space. "
        + " ".join(f"`{name}` fails with: `{run['error']}`" for name, run in runs.items() if run["error"]),
        raw=runs,
        packages=("safetensors",),
    )
