"""Peak memory of removing and restoring: the model, its factors or their files, and what is edited.

Each case runs in a process of its own, whose high-water mark is read at the end. Pages of mapped files count while
they are resident, so that of a folder is given with and without them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness


def main(quick: bool) -> harness.Section:
    """Peaks of the model alone, of factors and originals in memory, and of both in a folder."""
    runs = {"the model alone": _child(quick, None, factor=False), "in memory": _child(quick, None)}
    with tempfile.TemporaryDirectory() as folder:
        runs["in a folder, factored now"] = _child(quick, folder)
        runs["in a folder, factored before"] = _child(quick, folder)
    return _section(runs)


def _child(quick: bool, folder: str | None, factor: bool = True) -> dict[str, Any]:
    job = {"quick": quick, "folder": folder, "factor": factor}
    harness.say(f"process: {job}")
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    from hf_rmt import Decile, SVDPruner

    model = harness.bert(job["quick"])
    pruner = SVDPruner(model, folder=job["folder"], progress=False, workers=1)
    roles = ["query", "key", "value", "attention.output", "intermediate", "output"]
    held = {"model": sum(p.numel() * p.element_size() for p in model.parameters()), "factors": 0, "originals": 0}
    if job["factor"]:
        for role in roles:
            with pruner.removed(Decile(10), roles=role):
                kept = sum(w.numel() * w.element_size() for w in pruner.editor.originals.kept.values())
                held["originals"] = max(held["originals"], kept)
        for one in pruner.editor.store.known.values():
            held["factors"] += sum(t.numel() * t.element_size() for t in (one.factors.u, one.factors.s, one.factors.vh))
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    marks = {key: 1024 * int(status[key].split()[0]) for key in ("VmHWM", "RssAnon", "RssFile")}
    return {"held": held} | marks


def _section(runs: dict[str, dict[str, Any]]) -> harness.Section:
    base = runs["the model alone"]
    rows = []
    for name, run in runs.items():
        expected = run["held"]["factors"] + run["held"]["originals"]
        rows.append(
            [
                name,
                *(f"{run['held'][key] / 1e6:.0f}" for key in ("model", "factors", "originals")),
                f"{(run['VmHWM'] - base['VmHWM']) / 1e6:.0f}",
                f"{(run['RssAnon'] - base['RssAnon']) / 1e6:.0f}",
                harness.number((run["VmHWM"] - base["VmHWM"]) / expected) if expected else "-",
            ]
        )
    memory = runs["in memory"]
    expected = memory["held"]["factors"] + memory["held"]["originals"]
    return harness.Section(
        title="Memory of a pruner",
        what=(
            "A process that makes `SVDPruner(model)` of BERT-base's shape and removes the last decile from each of six "
            "types in turn, one worker. `factors` and `originals` are the bytes of the tensors held, originals at "
            "their largest (one type at a time); the peak and what is left at the end are over those of a process that "
            "makes the model alone. In a folder both are files, whose mapped pages the system may take back: what is "
            "left anonymous is what they cost."
        ),
        tables=[
            harness.Table(
                ["", "model MB", "factors MB", "originals MB", "peak MB", "anonymous at the end MB", "peak, of held"],
                rows,
            )
        ],
        floor="The factors, and the originals of what is edited.",
        distance=(
            f"In memory the peak is {harness.number((memory['VmHWM'] - base['VmHWM']) / expected)} times what is held; "
            "the rest is the workspace of one factorisation and what the allocator keeps of it."
        ),
        raw=runs,
    )


if __name__ == "__main__":
    print(json.dumps(_in_child(json.loads(sys.argv[1]))))
