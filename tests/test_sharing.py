"""Work on matrices that is shared out: all processes get what one alone finds, whatever happens to one of them."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from hf_rmt import AnalysisConfig, CheckpointPruner, Decile, RMTAnalyzer, processes, sharing
from hf_rmt.eigenbases import memory_for
from hf_rmt.processes import gather, rank_and_count, shares, strangers
from hf_rmt.reports import store
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.run import AnalysisRun
from hf_rmt.sharing import bundles_of, staggered
from hf_rmt.workers import seconds_estimate, working_bytes

Maker = Callable[..., Any]


# Shares


def test_shares_are_whole_and_the_longest_comes_first() -> None:
    costs = [1.0, 9.0, 3.0, 3.0, 7.0, 2.0]
    assert shares(costs, 1) == [[1, 4, 2, 3, 5, 0]]
    assert shares(costs, 2) == [[1, 3, 0], [4, 2, 5]]
    assert shares([2.0], 3) == [[0], [], []] and shares([], 2) == [[], []]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares_keep_to_their_bound(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(50):
        costs = torch.rand(20, generator=generator).pow(4).tolist()
        found = shares(costs, count)
        assert sorted(index for own in found for index in own) == list(range(20))
        longest = max(sum(costs[index] for index in own) for own in found)
        assert longest <= sum(costs) / count + max(costs)
        # Whoever got the last piece of the longest share had the least before it.
        worst = max(found, key=lambda own: sum(costs[index] for index in own))
        before = sum(costs[index] for index in worst[:-1])
        assert all(sum(costs[index] for index in own) >= before - 1e-12 for own in found)


def llama_70b_costs() -> list[float]:
    block = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    return [seconds_estimate(*shape) for shape in block * 80]


@pytest.mark.parametrize("count", [2, 8, 16, 64])
def test_shares_of_a_large_llama_are_even(count: int) -> None:
    costs = llama_70b_costs()
    loads = [sum(costs[index] for index in own) for own in shares(costs, count)]
    assert max(loads) / (sum(loads) / count) < 1.1


# Strangers


@pytest.mark.parametrize(
    ("environment", "meant"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no", "SLURM_STEP_NUM_TASKS": "2"}, ""),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch was asked for several"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4"),
        ({"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": ""}, ""),
    ],
)
def test_a_launch_of_strangers_is_seen(environment: dict[str, str], meant: str) -> None:
    assert strangers(environment).startswith(meant) and bool(strangers(environment)) == bool(meant)


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PMI_SIZE", "3")
    processes._warn_of_strangers.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            RMTAnalyzer(nn.Linear(4, 4)).analyze(progress=False)
    assert [record.message.partition(",")[0] for record in caplog.records] == ["PMI_SIZE is 3"]
    processes._warn_of_strangers.cache_clear()


# Analyses


def _analyse(folder: Path, model: nn.Module, expected: AnalysisReport) -> None:
    rank, _ = rank_and_count()
    calls = _counting()
    assert_same(RMTAnalyzer(model).analyze(progress=False), expected)
    done = gather(calls.copy())
    assert sorted(done[0] + done[1]) == sorted(expected) and all(done), "each matrix by one process"
    assert_same(RMTAnalyzer(model).analyze(progress=False, folder=folder / "a"), expected)
    assert sorted(path.name for path in (folder / "a").iterdir()) == [
        "arrays.safetensors",
        "report.json",
        "table.parquet",
    ]
    calls.clear()
    assert_same(RMTAnalyzer(model).analyze(progress=False, folder=folder / "a"), expected)
    assert not calls
    _fail_in_one(folder, model, rank, calls)
    calls.clear()
    assert_same(RMTAnalyzer(model).analyze(progress=False, folder=folder / "b"), expected)
    assert 0 < len([name for own in gather(calls) for name in own]) < len(expected)
    _compare(folder, model, rank)


def _counting() -> list[str]:
    from hf_rmt import run

    calls: list[str] = []
    original = run.analyse_matrix

    def counting(matrix: Any, *rest: Any) -> Any:
        calls.append(matrix.name)
        return original(matrix, *rest)

    run.analyse_matrix = counting  # this process ends with the test
    return calls


def _fail_in_one(folder: Path, model: nn.Module, rank: int, calls: list[str]) -> None:
    """The other stops too, and what was finished is kept."""
    from hf_rmt import run

    counting = run.analyse_matrix

    def failing(matrix: Any, *rest: Any) -> Any:
        if rank == 1 and len(calls) > 1:
            raise MemoryError("no more")
        return counting(matrix, *rest)

    run.analyse_matrix = failing
    calls.clear()
    message = "no more" if rank == 1 else "process 1 failed: .*no more"
    with pytest.raises(RuntimeError, match=message):
        RMTAnalyzer(model).analyze(progress=False, folder=folder / "b", workers=1)
    run.analyse_matrix = counting
    gather(None)
    kept, begun = len(list((folder / "b" / "partial").glob("*.safetensors"))), sum(map(len, gather(calls)))
    assert 2 <= kept <= begun < len(RMTAnalyzer(model).matrices), "what had begun when the other failed"
    assert not store.is_saved(folder / "b", "report")


def _compare(folder: Path, model: nn.Module, rank: int) -> None:
    other = nn.ModuleList([nn.Linear(9, 7)])
    first = nn.ModuleList([nn.Linear(9, 7)])
    with torch.no_grad():
        for number, net in enumerate((first, other)):
            net[0].weight.copy_(torch.randn(7, 9, generator=torch.Generator().manual_seed(number)))
    compared = RMTAnalyzer.compare(first, other, folder=folder / "c", progress=False)
    again = RMTAnalyzer.compare(first, other, folder=folder / "c", progress=False)
    pd.testing.assert_frame_equal(compared.to_pandas(), again.to_pandas())
    if rank == 0:
        with pytest.raises(ValueError, match=r"weights of 0 after differ|process 1 failed"):
            RMTAnalyzer.compare(first, first_with(other, 2.0), folder=folder / "c", progress=False)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            RMTAnalyzer.compare(first, first_with(other, 2.0), folder=folder / "c", progress=False)


def first_with(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def assert_same(found: AnalysisReport, expected: AnalysisReport) -> None:
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas())
    for name in expected:
        for key, tensor in expected[name].tensors().items():
            torch.testing.assert_close(found[name].tensors()[key], tensor, rtol=0, atol=0, equal_nan=True)


def test_each_analyses_its_share_and_all_have_the_report(
    make_model: Maker, one_thread: None, tmp_path: Path, launch: Callable[..., None]
) -> None:
    model = make_model("mixtral")
    launch(_analyse, tmp_path, model, RMTAnalyzer(model).analyze(progress=False, workers=1))


def _analyse_sharded(folder: Path, model: nn.Module, expected: AnalysisReport) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
    for layer in model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    rank, _ = rank_and_count()
    calls = _counting()
    assert_same(RMTAnalyzer(model).analyze(progress=False), expected)
    done = gather(calls.copy())
    assert sorted(done[0] + done[1]) == sorted(expected) and abs(len(done[0]) - len(done[1])) <= 1
    calls.clear()
    _fail_in_one(folder, model, rank, calls)
    assert_same(RMTAnalyzer(model).analyze(progress=False, folder=folder / "b"), expected)
    calls.clear()
    assert_same(RMTAnalyzer(model).analyze(progress=False, folder=folder / "b"), expected)
    assert not calls


def test_sharded_weights_are_read_by_all_and_analysed_by_one(
    make_model: Maker, one_thread: None, tmp_path: Path, launch: Callable[..., None]
) -> None:
    model = make_model("bert")
    launch(_analyse_sharded, tmp_path, model, RMTAnalyzer(model).analyze(progress=False, workers=1))


_ABSENT = """
import datetime, sys
import torch
from torch import nn
from hf_rmt import RMTAnalyzer, processes
processes._LATE = datetime.timedelta(seconds=2)
rank, _ = processes.rank_and_count()
try:
    if rank == 0:
        RMTAnalyzer(nn.Linear(4, 4)).analyze(folder=sys.argv[1], progress=False)
except RuntimeError as error:
    print(str(error)[:120])
with processes.alone():
    print(len(RMTAnalyzer(nn.Linear(4, 4)).analyze(progress=False)))
"""


def test_a_process_that_does_not_come_is_missed(tmp_path: Path) -> None:
    """By torchrun: where some stay away there is an error that says so, and one alone can work."""
    script = tmp_path / "absent.py"
    script.write_text(_ABSENT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "out")], capture_output=True, text=True, check=False, timeout=120
    )
    lines = done.stdout.splitlines()
    assert any(
        line.startswith("all processes of a launch have to analyze together, and 1 did not come") for line in lines
    ), done.stderr
    assert lines.count("1") == 2


def test_results_are_fit_for_json(tmp_path: Path) -> None:
    """Of a report over one process nothing in the folder tells of processes."""
    RMTAnalyzer(nn.Linear(6, 4)).analyze(folder=tmp_path, progress=False)
    assert "processes" not in json.loads((tmp_path / "report.json").read_text())["settings"]


# A budget


def test_a_matrix_that_no_budget_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "resident_memory", lambda: 300_000_000)
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(1000, 2000)])
    message = r"1 of shape \(2000, 1000\) takes up to 128 MB to factor, and of max_memory 10 MB are left: give 500MB"
    with pytest.raises(ValueError, match=message):
        RMTAnalyzer(model).analyze(max_memory="310MB", progress=False)
    report = RMTAnalyzer(model).analyze(max_memory="0.5GB", progress=False)
    pd.testing.assert_frame_equal(report.to_pandas(), RMTAnalyzer(model).analyze(progress=False).to_pandas())
    assert "max_memory" not in report.settings


@pytest.mark.parametrize("size", ["much", "-1GB", 0, "8 gigs"])
def test_budgets_are_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match=r"max_memory is .*: give a"):
        RMTAnalyzer(nn.Linear(4, 4)).analyze(max_memory=size)


# In which order


def test_what_belongs_together_is_done_by_one_process() -> None:
    costs = [5, 9, 1, 9, 5, 2]
    assert bundles_of(range(6), costs.__getitem__, None) == [[1], [3], [0], [4], [5], [2]]
    owners = ["a", "b", "a", None, "b", None]
    found = bundles_of(range(6), costs.__getitem__, owners.__getitem__)
    assert found == [[1, 4], [3], [0, 2], [5]]
    assert bundles_of(range(6), costs.__getitem__, lambda index: "one", 14) == [[1], [3, 0], [4, 5, 2]]


@pytest.mark.parametrize("count", [2, 8, 16, 64])
def test_what_all_share_does_not_leave_processes_idle(count: int) -> None:
    """As the keys and values of all cross-attentions do what comes from the encoder."""
    costs = [1.0] * 48 + [0.5] * 400
    bundles = bundles_of(range(448), costs.__getitem__, lambda index: "all" if index < 48 else index // 2, 248 / count)
    assert sorted(index for bundle in bundles for index in bundle) == list(range(448))
    sizes = [sum(costs[index] for index in bundle) for bundle in bundles]
    loads = [sum(sizes[position] for position in own) for own in shares(sizes, count)]
    assert max(loads) <= 1.1 * 248 / count


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_what_others_wait_for_is_begun_well_before(workers: int) -> None:
    bundles = [[8, 1, 2], [7], [6, 3], [5, 4, 0]]
    order = staggered(bundles, workers)
    assert sorted(order) == list(range(9))
    places = {index: place for place, index in enumerate(order)}
    for number, bundle in enumerate(bundles):
        before = bundles[number + 1 : number + workers]
        assert all(places[head] < places[index] for index in bundle[1:] for head, *_ in [bundle, *before])
    assert workers > 1 or order == [8, 1, 2, 7, 6, 3, 5, 4, 0]
    assert staggered([], workers) == []


def test_eigenbases_are_computed_once(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many workers, and of several processes in one that has all matrices that share them."""
    from hf_rmt.theory.covariance import Moments

    model = make_model("llama")
    data = [{"input_ids": torch.randint(1, 90, (4, 9), generator=torch.Generator().manual_seed(0))}]
    covariances = RMTAnalyzer(model).collect(data, outputs=True, progress=False)
    computed: list[int] = []
    original = Moments.eigenbasis
    monkeypatch.setattr(Moments, "eigenbasis", lambda self, c: computed.append(id(self)) or original(self, c))
    expected = RMTAnalyzer(model).analyze(covariances=covariances, workers=3, progress=False)
    assert len(computed) == len(set(computed)) > len(expected)
    for count in (2, 3):
        shared: list[str] = []
        for rank in range(count):
            monkeypatch.setattr(sharing, "rank_and_count", lambda own=rank, count=count: (own, count))
            run = AnalysisRun(RMTAnalyzer(model).matrices, AnalysisConfig(workers=1, progress=False), {}, covariances)
            own = [index for index, _ in run.tasks(False)._own(list(range(len(expected))))]
            shared += {covariances.key(run.matrices[index].name) for index in own}
        assert len(shared) == len(set(shared))


def test_a_budget_counts_the_eigenbases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "resident_memory", lambda: 300_000_000)
    model = nn.Linear(2000, 10)
    covariances = RMTAnalyzer(model).collect([{"input": torch.randn(1, 30, 2000)}], progress=False)
    RMTAnalyzer(model).analyze(max_memory="310MB", progress=False)
    needed = 5 * 8 * 2000**2 + 2 * 8 * 2000**2
    assert memory_for(RMTAnalyzer(model).matrices[0], covariances) == needed
    with pytest.raises(ValueError, match=rf"takes up to {needed / 1e6:.0f} MB to factor.*give 600MB"):
        RMTAnalyzer(model).analyze(covariances=covariances, max_memory="310MB", progress=False)
    report = RMTAnalyzer(model).analyze(covariances=covariances, max_memory="0.6GB", progress=False)
    assert all(result.right_overlap is not None for result in report.values())


def test_what_each_kind_of_work_takes(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix, two beside each other, or those of a parameter one after the other."""
    needs: list[list[int]] = []
    original = sharing.workers_for
    monkeypatch.setattr(
        sharing, "workers_for", lambda own, *memory: needs.append(sorted(own)) or original(own, *memory)
    )
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    analyzer = RMTAnalyzer(model)
    analyzer.analyze(progress=False)
    RMTAnalyzer.compare(analyzer, RMTAnalyzer(copy.deepcopy(model)), progress=False)
    one = sorted(working_bytes(*matrix.shape) for matrix in analyzer.matrices)
    assert needs == [one, [2 * need for need in one]]
    pruner = CheckpointPruner(tmp_path / "model", progress=False)
    pruner.remove(Decile(1), roles="*")
    pruner.save_pretrained(tmp_path / "pruned")
    assert needs[-1][-1] == one[-1] and set(needs[-1]) <= set(one)
