"""``collect()`` in two gloo processes against one, a thread each: the same sums, in how much less time.

Every collection has a launch of its own, as ``torchrun`` makes them. Importing and a warm-up on two
batches come first; then the processes begin together and each measures what it spends.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from collect_cost import token_batches
from torch import nn

from hf_rmt import RMTAnalyzer, collecting
from hf_rmt.processes import gather, rank_and_count
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.workers import threads

_SHAPE = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
_QUICK_SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
_VOCABULARY = 1000
#: Batches, sequences a batch, positions a sequence, and the shortest sequence.
_DATA, _QUICK_DATA = (16, 8, 128, 16), (4, 4, 32, 4)
#: Largest relative difference of the sums that is aimed at, by the dtype of the model, and the rounds.
_LIMITS = {"float32": (1e-5, harness.ROUNDS), "float64": (1e-10, 1)}
#: What ``collect()`` calls over processes: sums and counts, and the wait for the slowest.
_REDUCTION, _WAIT = ("add_up", "gather"), ("raise_together",)
Run = dict[str, Any]


def main(quick: bool) -> harness.Section:
    """Both dtypes with one and two processes, in turn."""
    results = {dtype: _compared(dtype, 1 if quick else rounds, quick) for dtype, (_, rounds) in _LIMITS.items()}
    return _section(results, quick)


def _compared(dtype: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Runs of one process and of two, a pair a round, and the differences of the first pair."""
    runs: dict[int, list[Run]] = {1: [], 2: []}
    differences = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folders = {processes: Path(name, str(processes)) for processes in runs}
            for processes, folder in folders.items():
                harness.say(f"{dtype}, {processes} processes: round {number + 1} of {rounds}")
                runs[processes].append(_launched(processes, folder, dtype, quick))
            if not differences:
                differences = _differences(*(ActivationCovariances.load(folder) for folder in folders.values()))
    return {"one": runs[1], "two": runs[2], "differences": differences}


def _differences(one: ActivationCovariances, two: ActivationCovariances) -> dict[str, float]:
    """Largest over the matrices: of an entry of a sum, by the largest entry of it; and of the token counts."""
    largest = {"outer": 0.0, "total": 0.0, "tokens": 0.0}
    for name in one:
        a, b = one[name], two[name]
        for key in ("outer", "total"):
            expected, difference = getattr(a, key), getattr(a, key) - getattr(b, key)
            largest[key] = max(largest[key], float(difference.abs().max() / expected.abs().max()))
        largest["tokens"] = max(largest["tokens"], abs(a.tokens - b.tokens))
    return largest


# --- in the processes ----------------------------------------------------------------------------


def _launched(processes: int, folder: Path, dtype: str, quick: bool) -> Run:
    """Runs this file in so many processes, which leave their covariances in ``folder``; the slowest's times."""
    folder.mkdir()
    harness.launch(__file__, processes, {"folder": str(folder), "dtype": dtype, "quick": quick})
    each = [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(processes)]
    return {key: max(times[key] for times in each) for key in each[0]}


def _in_process(job: dict[str, Any]) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # gloo, also where there is an accelerator
    with threads(1):
        analyzer = RMTAnalyzer(_model(job["dtype"], job["quick"]))
        batches = token_batches(_VOCABULARY, *(_QUICK_DATA if job["quick"] else _DATA))
        analyzer.collect(batches[:2], progress=False)
        gather(None)
        with _spent(_REDUCTION) as reducing, _spent(_WAIT) as waiting:
            start = time.perf_counter()
            covariances = analyzer.collect(batches, progress=False)
            seconds = time.perf_counter() - start
        times = {"seconds": seconds, "reduction": sum(reducing), "wait": sum(waiting)}
        times |= {"bare": _bare_reduction(covariances), "bytes": sum(each.nbytes for each in _outers(covariances))}
    folder, (rank, _) = Path(job["folder"]), rank_and_count()
    if rank == 0:
        covariances.save(folder)
    (folder / f"process-{rank}.json").write_text(json.dumps(times))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _model(dtype: str, quick: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=_VOCABULARY, **(_QUICK_SHAPE if quick else _SHAPE))
    return BertModel(config).to(getattr(torch, dtype)).eval()


@contextlib.contextmanager
def _spent(names: tuple[str, ...]) -> Iterator[list[float]]:
    """Seconds of every call of these functions of ``processes`` that ``collecting`` makes meanwhile."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(collecting, name, timed(getattr(collecting, name))))
        yield seconds


def _bare_reduction(covariances: ActivationCovariances) -> float:
    """Seconds of summing tensors of the same shapes, and nothing else."""
    tensors = [torch.zeros_like(outer) for outer in _outers(covariances)]
    gather(None)
    start = time.perf_counter()
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
    return time.perf_counter() - start


def _outers(covariances: ActivationCovariances) -> list[torch.Tensor]:
    return list({covariances.key(name): covariances[name].outer for name in covariances}.values())


# --- what is said --------------------------------------------------------------------------------


def _section(results: dict[str, dict[str, Any]], quick: bool) -> harness.Section:
    ratios = {dtype: _ratio(result["two"], result["one"], "seconds", "seconds") for dtype, result in results.items()}
    errors = {dtype: max(each["differences"][key] for key in ("outer", "total")) for dtype, each in results.items()}
    single = results["float32"]
    to_bare = _ratio(single["two"], single["two"], "reduction", "bare")
    return harness.Section(
        title="Collecting in two processes",
        what=_what(single, quick),
        tables=[_time_table(results, ratios), _difference_table(results)],
        targets=[
            harness.Target(f"relative difference of the sums, {dtype} model", limit, errors[dtype])
            for dtype, (limit, _) in _LIMITS.items()
        ],
        floor=(
            "Half of the wall time, as each process has half of the batches; for the reduction, `all_reduce` of "
            f"tensors of the same shapes: {harness.number(_median(single['two'], 'bare'))} s."
        ),
        distance=(
            f"{harness.number(2 * ratios['float32'].median)} times half of one process's time (float32); the "
            f"reduction takes {to_bare} times the bare one. It does not grow with the data, so its share falls as "
            "one by the number of tokens."
        ),
        raw=results,
        packages=("accelerate",),
    )


def _what(result: dict[str, Any], quick: bool) -> str:
    shape, data = (_QUICK_SHAPE, _QUICK_DATA) if quick else (_SHAPE, _DATA)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in token_batches(_VOCABULARY, *data))
    megabytes = result["two"][0]["bytes"] / 1e6
    return (
        "`RMTAnalyzer(model).collect(batches)` in two gloo processes with one thread each, against one process with "
        f"one thread and the same batches: a random BERT of {shape['num_hidden_layers']} blocks, hidden "
        f"{shape['hidden_size']}, intermediate {shape['intermediate_size']}; {data[0]} batches of {data[1]} x "
        f"{data[2]} positions, of which {tokens} are tokens. The reduction is every sum and count over the processes, "
        f"{megabytes:.0f} MB of float64; the wait is that of the faster process for the slower one. Both are the "
        "larger ones of the two processes. A launch each, after a warm-up on two batches. A difference is that of "
        "an entry of a sum, by the largest entry of that sum."
    )


def _ratio(ours: list[Run], other: list[Run], key: str, of: str) -> harness.Ratio:
    return harness.Ratio.of([run[key] for run in ours], [run[of] for run in other])


def _median(runs: list[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _time_table(results: dict[str, dict[str, Any]], ratios: dict[str, harness.Ratio]) -> harness.Table:
    rows = []
    for dtype, result in results.items():
        one, two = result["one"], result["two"]
        seconds = [harness.number(_median(runs, "seconds")) for runs in (one, two)]
        shares = [str(_ratio(two, two, key, "seconds")) for key in ("reduction", "wait")]
        rows.append([dtype, *seconds, str(ratios[dtype]), *shares, str(len(one))])
    header = ["model", "one process s", "two processes s", "two by one", "share of the reduction", "of the wait"]
    return harness.Table([*header, "rounds"], rows)


def _difference_table(results: dict[str, dict[str, Any]]) -> harness.Table:
    rows = []
    for dtype, result in results.items():
        outer, total, tokens = (result["differences"][key] for key in ("outer", "total", "tokens"))
        rows.append([dtype, f"{outer:.1e}", f"{total:.1e}", f"{tokens:.0f}"])
    return harness.Table(["largest difference", "sum of x xᵀ", "sum of x", "tokens"], rows)


if __name__ == "__main__":
    _in_process(json.loads(sys.argv[1]))
