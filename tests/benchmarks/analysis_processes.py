"""``analyze()`` in two gloo processes against one, a thread each; and how even the shares of many would be."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.processes import gather, rank_and_count, shares
from hf_rmt.workers import seconds_estimate, threads

_SHAPE = {"num_hidden_layers": 4, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_QUICK_SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
#: Rows and columns of the matrices of a block of Llama-70B, and how many blocks there are.
_LARGE = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
_BLOCKS = 80
_COUNTS = (2, 4, 8, 16, 32, 64)


def main(quick: bool) -> harness.Section:
    """One process and two, in turn."""
    rounds = 1 if quick else harness.ROUNDS
    runs: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for processes, seconds in runs.items():
            harness.say(f"{processes} processes: round {number + 1} of {rounds}")
            seconds.append(_launched(processes, quick))
    return _section(runs, _SHAPE if not quick else _QUICK_SHAPE)


def _launched(processes: int, quick: bool) -> float:
    """Runs this file in so many processes; seconds of the slowest."""
    with tempfile.TemporaryDirectory() as folder:
        harness.launch(__file__, processes, {"folder": folder, "quick": quick})
        return max(float((Path(folder) / str(rank)).read_text()) for rank in range(processes))


def _in_process(job: dict[str, Any]) -> None:
    own = sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]
    os.sched_setaffinity(0, {own})  # or one process alone would take every core for its one matrix
    with threads(1):
        RMTAnalyzer(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))).analyze(progress=False)  # one a process
        analyzer = RMTAnalyzer(_model(job["quick"]))
        gather(None)
        start = time.perf_counter()
        analyzer.analyze(progress=False, workers=1)
        seconds = time.perf_counter() - start
    (Path(job["folder"]) / str(rank_and_count()[0])).write_text(str(seconds))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _model(quick: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=100, **(_QUICK_SHAPE if quick else _SHAPE))).eval()


def _section(runs: dict[int, list[float]], shape: dict[str, int]) -> harness.Section:
    faster = harness.Ratio.of(runs[1], runs[2])
    costs = [seconds_estimate(*matrix) for matrix in _LARGE * _BLOCKS]
    balance = {count: _balance(costs, count) for count in _COUNTS}
    times = [[str(count), harness.number(statistics.median(runs[count])), str(len(runs[count]))] for count in runs]
    return harness.Section(
        title="Analysing in several processes",
        what=(
            "`RMTAnalyzer(model).analyze()` in two gloo processes with a core and a thread each, against one process "
            f"with one: a random BERT of {shape['num_hidden_layers']} blocks, hidden {shape['hidden_size']}, "
            f"intermediate {shape['intermediate_size']}; seconds of the slower process, results gathered. "
            "A launch each, after a warm-up. The second table is computed: "
            f"the {len(costs)} matrices of a Llama of 70 billion parameters, shared out by predicted cost, and the "
            "longest share over the mean."
        ),
        tables=[
            harness.Table(["processes", "seconds", "rounds"], times),
            harness.Table(
                ["processes", "longest share over the mean"],
                [[str(count), harness.number(value)] for count, value in balance.items()],
            ),
        ],
        targets=[harness.Target("two processes, in times of one", 1 / 1.8, 1 / faster.median)],
        floor="Half of the time of one process; a longest share of 1.",
        distance=f"Two processes are {faster} times as fast as one; the longest of 64 shares is "
        f"{harness.number(balance[64])} of the mean.",
        raw={"runs": runs, "balance": balance},
        packages=("accelerate",),
    )


def _balance(costs: list[float], count: int) -> float:
    loads = [sum(costs[index] for index in own) for own in shares(costs, count)]
    return max(loads) * count / sum(loads)


if __name__ == "__main__":
    _in_process(json.loads(sys.argv[1]))
