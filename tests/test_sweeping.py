"""Sweeps: their grid, their numbers, and what becomes of them when something goes wrong.

Run as a program, this file is a sweep in processes of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_rmt import Bottom, Decile, Outliers, Random, Rank, RMTAnalyzer, SVDPruner, SweepTable
from hf_rmt.evaluation import Scores
from hf_rmt.processes import rank_and_count
from hf_rmt.reports import store
from hf_rmt.theory.inference import Rows

ROWS = 64
FIRST_COLUMNS = ["selection", "role", "block", "seed", "metric", "score", "baseline", "change"]


class Block(nn.Module):
    """Two matrices, of 24 singular values each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(40, 24), nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value(torch.tanh(2 * self.query(x)))


class Net(nn.Module):
    """A classifier of two blocks and one small matrix after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.pooler = nn.Linear(40, 8)
        self.register_buffer("classes", torch.randn(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.pooler(x) @ self.classes


class Task:
    """Of random rows, half are to be told from the other half; the model as it was made is always right."""

    def __init__(self, fails_at: int | None = None, dies_at: int | None = None):
        self.rows = torch.randn(ROWS, 40, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            margin = Net()(self.rows).diff(dim=-1)[:, 0]
        self.shift = torch.stack([margin.median(), torch.zeros(())])
        self.labels = (margin > margin.median()).long()
        self.calls = 0
        self.processes: set[int] = set()  # among which an evaluation would be shared
        self.fails_at, self.dies_at = fails_at, dies_at

    def __call__(self, model: nn.Module) -> Scores:
        self.calls += 1
        self.processes.add(rank_and_count()[1])
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.fails_at:
            raise OSError("the disk is full")
        with torch.no_grad():
            logits = (model(self.rows) + self.shift).double()
        right, loss = (
            (logits.argmax(-1) == self.labels).double(),
            F.cross_entropy(logits, self.labels, reduction="none"),
        )
        rows = {"accuracy": Rows(right, torch.ones(ROWS)), "loss": Rows(loss, torch.ones(ROWS))}
        return Scores({name: one.score() for name, one in rows.items()}, rows=rows, chance={"accuracy": 0.5})


def sweep(model: nn.Module, evaluate: Any, **options: Any) -> SweepTable:
    return SVDPruner(model, progress=False).sweep(evaluate, **{"progress": False, **options})


def cells_of(table: SweepTable) -> list[tuple[str, str, int | None]]:
    return [(cell.selection, cell.role, cell.block) for cell in table]


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, bits: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == bits.keys() and all(torch.equal(now[name], bits[name]) for name in bits)


def assert_same(found: SweepTable, expected: SweepTable) -> None:
    """To the bit, rows and all."""
    assert len(found) == len(expected)
    assert all(a.same_as(b) for a, b in zip(found, expected, strict=True))
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas(), check_exact=True)
    assert found.profiles.keys() == expected.profiles.keys()
    for role in found.profiles:
        torch.testing.assert_close(found.profiles[role], expected.profiles[role], rtol=0, atol=0, equal_nan=True)


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def task() -> Task:
    return Task()


# The grid

_BY_ROLE = [("query", None), ("value", None), ("pooler", None)]
_BY_BLOCK = [("query", 0), ("query", 1), ("value", 0), ("value", 1)]


@pytest.mark.parametrize(
    ("options", "selections", "places"),
    [
        ({}, 10, _BY_ROLE),
        ({"roles": "all"}, 10, [("all", None)]),
        ({"roles": ["value", "query"], "deciles": (1, 10)}, 2, [("value", None), ("query", None)]),
        ({"roles": "*e*", "deciles": [5]}, 1, [("*e*", None)]),
        ({"selections": [Rank(1), Bottom(0.5)]}, 2, _BY_ROLE),
        ({"selections": [Rank(1), Decile(3)], "deciles": [3]}, 2, _BY_ROLE),
        ({"deciles": [1], "blocks": "each"}, 1, _BY_BLOCK),
        ({"deciles": [1], "blocks": [1]}, 1, [("query", 1), ("value", 1)]),
        ({"deciles": [1, 2], "blocks": [1, 0], "roles": "all"}, 2, [("all", 1), ("all", 0)]),
        ({"deciles": [1], "blocks": "each", "roles": "value"}, 1, [("value", 0), ("value", 1)]),
        ({"deciles": [1, 1], "blocks": [1, 1], "roles": ["query", "query", "all"]}, 1, [("query", 1), ("all", 1)]),
    ],
)
def test_the_grid(options: dict[str, Any], selections: int, places: list[tuple[str, int | None]], net: Net) -> None:
    calls: list[nn.Module] = []
    table = sweep(net, lambda model: float(len(calls.append(model) or calls)), **options)
    found = cells_of(table)
    assert found[0] == ("none", "all", None) and len(found) == len(set(found)) == len(calls)
    assert len(found) == 1 + selections * len(places)
    assert list(dict.fromkeys((role, block) for _, role, block in found[1:])) == places
    assert len({selection for selection, *_ in found[1:]}) == selections
    assert all(model is net for model in calls)
    assert [cell.scores["score"] for cell in table] == list(range(1, len(calls) + 1)), "in the order of the table"


def test_random_controls_are_drawn_once_for_a_size(net: Net, task: Task) -> None:
    """Of 24 singular values four deciles have three, the others two; of 8, the last two have none."""
    table = sweep(net, task, controls=2, selections=[Random(Decile(1), 0)], deciles=range(1, 11))
    sizes = {cell.selection: cell.removed["components"] for cell in table if cell.role == "query"}
    assert [sizes[f"decile:{k}"] for k in range(1, 11)] == [6] * 4 + [4] * 6
    assert [cell.selection for cell in table if cell.role == "query" and cell.control] == [
        "random:0(decile:1)", "random:1(decile:1)", "random:0(decile:5)", "random:1(decile:5)"
    ]  # fmt: skip
    assert {cell.control for cell in table} == {"", "decile:1", "decile:5"}
    assert all(sizes[str(Random(Decile(like), 0))] == sizes[f"decile:{like}"] for like in (1, 5))
    summary = table.summary()
    own = summary[(summary["control"] == "") & (summary["components"] > 0)]
    assert own["over_control"].notna().all() and len(own) == 10 + 10 + 8
    scores = {(cell.role, cell.selection): cell.scores["accuracy"] for cell in table}
    for name, like in {"decile:2": 1, "decile:4": 1, "decile:10": 5}.items():
        controls = [scores["value", f"random:{draw}(decile:{like})"] for draw in (0, 1)]
        found = own[(own["role"] == "value") & (own["selection"] == name)]["over_control"].item()
        assert found == pytest.approx(scores["value", name] - np.mean(controls), abs=1e-12)
    assert len({scores["value", f"random:{draw}(decile:1)"] for draw in (0, 1)}) == 2, "two draws"
    assert not any(cell.control for cell in sweep(net, task, deciles=[1], roles="all"))


def test_what_selects_nothing_is_reported(net: Net, task: Task) -> None:
    """Eight singular values make eight deciles of one and two of none."""
    table = sweep(net, task, roles=["pooler"], controls=1)
    summary = table.summary().set_index("selection")
    empty = [f"decile:{k}" for k in (9, 10)]
    assert list(summary.index[summary["verdict"] == "empty"]) == empty
    assert (summary.loc[empty, ["change", "components"]] == 0).all(axis=None)
    assert summary.loc[empty, "over_control"].isna().all()
    assert "2 of them empty" in repr(table)
    nothing = sweep(net, task, selections=[Outliers("above", sigma=100.0)], controls=1)
    assert all(cell.empty or cell.selection == "none" for cell in nothing) and len(nothing) == 4


# The numbers


def _by_hand(model: Net, task: Task, names: list[str], group: int) -> Scores:
    """Every matrix without a tenth of its singular values, from the formula, in numpy."""
    bits = bits_of(model)
    for name in names:
        weight = model.get_submodule(name).weight
        u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
        s[np.array_split(np.arange(len(s)), 10)[group - 1]] = 0
        weight.data = torch.from_numpy(u @ np.diag(s) @ vt).float()
    scores = task(model)
    model.load_state_dict(bits)
    return scores


@pytest.mark.parametrize("blocks", ["together", "each"])
@pytest.mark.parametrize("roles", [["query", "value"], "all"])
def test_scores_are_those_of_removal_by_hand(roles: Any, blocks: Any, net: Net, task: Task) -> None:
    bits = bits_of(net)
    table = sweep(net, task, roles=roles, blocks=blocks)
    assert_same_bits(net, bits)
    changed = 0
    for cell in list(table)[1:]:
        names = [
            *(f"layers.{block}.{role}" for role in ("query", "value") for block in (0, 1)
              if cell.role in ("all", role) and cell.block in (None, block)),
            *(["pooler"] if cell.role == "all" and cell.block is None else []),
        ]  # fmt: skip
        expected = _by_hand(net, task, names, int(cell.selection.removeprefix("decile:")))
        assert cell.scores["accuracy"] == expected["accuracy"], (cell.selection, names)
        assert cell.scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        torch.testing.assert_close(cell.rows["loss"].values, expected.rows["loss"].values, rtol=1e-4, atol=1e-5)
        changed += cell.scores["loss"] != task(net)["loss"]
    assert changed == len(table) - 1


def test_columns_and_changes(net: Net, task: Task, tmp_path: Path) -> None:
    table = sweep(net, task, deciles=[1, 10], blocks="each", seed=3).to_pandas()
    assert list(table)[: len(FIRST_COLUMNS)] == FIRST_COLUMNS
    baseline = task(net)
    assert table["selection"].iloc[0] == "none" and (table["seed"] == 3).all()
    for metric in ("accuracy", "loss"):
        own = table[table["metric"] == metric]
        assert (own["baseline"] == baseline[metric]).all() and own["change"].iloc[0] == 0
        np.testing.assert_array_equal(own["change"], own["score"] - baseline[metric])
        assert len(own) == 1 + 2 * 4 and (own["change"] != 0).any()
    assert table["p_right"].iloc[2:].notna().any() and baseline["accuracy"] == 1.0


def test_removed_is_what_the_pruner_says(net: Net, task: Task) -> None:
    table = sweep(net, task, deciles=[2], roles=["value"])
    pruner = SVDPruner(net, progress=False)
    with pruner.removed(Decile(2), roles="value"):
        affected = pruner.affected()
    report = RMTAnalyzer(net).analyze(roles="value", progress=False)
    removed = table.cells[1].removed
    assert removed["mass"] == pytest.approx(affected["mass"].mean())
    assert (removed["components"], removed["of"]) == (affected["removed"].sum(), affected["of"].sum())
    p_left = torch.cat([torch.as_tensor(one.left.p_values[3:6]) for one in report.values()])
    assert removed["p_left"] == pytest.approx(float(p_left.mean()))
    assert "p_right" not in removed, "vectors of 24 entries are not tested"
    assert list(table.profiles) == ["value"] and len(table.profiles["value"]) == 24


def test_edits_in_place_are_part_of_the_baseline(net: Net, task: Task) -> None:
    pruner = SVDPruner(net, progress=False)
    edit = pruner.remove(Decile(1), roles="query")
    bits = bits_of(net)
    table = pruner.sweep(task, deciles=[2], roles=["query"], progress=False)
    assert_same_bits(net, bits)
    assert pruner.edits == (edit,)
    assert table.cells[0].scores == task(net)
    pruner.restore()
    with pruner.removed(Decile(1) | Decile(2), roles="query"):
        assert table.cells[1].scores == task(net)
    assert table.cells[1].removed["components"] == 6


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"roles": ["query", "key"]}, ValueError, "no role or name matches 'key'; the roles are pooler, query, value"),
        ({"blocks": [0, 7]}, ValueError, r"no block \[7\]; the blocks are 0 to 1"),
        ({"roles": "query", "blocks": [7]}, ValueError, r"no block \[7\]"),
        ({"roles": ["pooler"], "blocks": [0]}, ValueError, "no matrix has both a role in 'pooler'"),
        ({"roles": ["pooler"], "blocks": "each"}, ValueError, "name no matrices"),
        ({"roles": []}, ValueError, r"roles=\(\) and blocks='together' name no matrices"),
        ({"blocks": ()}, ValueError, "name no matrices"),
        ({"selections": [Rank(20)], "roles": "all"}, ValueError, "pooler of shape .8, 40. has 8 singular values"),
        ({"selections": ["decile:1"]}, TypeError, "parse_selection reads its name"),
        ({"selections": []}, ValueError, "nothing to remove"),
        ({"blocks": "apart"}, ValueError, "blocks is 'apart'"),
        ({"controls": -1}, ValueError, "controls is -1"),
        ({"decile": 1}, TypeError, "no option decile; there are"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_measured(
    options: dict[str, Any], error: type[Exception], message: str, net: Net, tmp_path: Path
) -> None:
    task = Task()
    with pytest.raises(error, match=message):
        sweep(net, task, folder=tmp_path / "sweep", **options)
    assert not task.calls and not (tmp_path / "sweep").exists()


def test_a_model_that_has_learned_nothing_is_refused(net: Net) -> None:
    task = Task()
    task.labels[:31] = 1 - task.labels[:31]
    accuracy = task(net)["accuracy"]
    error = (accuracy * (1 - accuracy) / (ROWS - 1)) ** 0.5  # of a binomial share
    assert accuracy - 0.5 < 3 * error
    task.calls = 0
    with pytest.raises(
        ValueError, match=rf"scores {accuracy:.4f} in accuracy.*largest class alone gives 0.5000.*margin"
    ):
        sweep(net, task, deciles=[1])
    assert task.calls == 1, "the baseline alone"
    exactly = (accuracy - 0.5) / error
    assert len(sweep(net, task, deciles=[1], roles="all", margin=exactly - 1e-9)) == 2
    with pytest.raises(ValueError, match="has not learned"):
        sweep(net, task, deciles=[1], margin=exactly + 1e-9)
    loss = sweep(net, lambda model: dict(task(model)), deciles=[1], roles="all")
    assert len(loss) == 2, "nobody knows what chance is"


def test_a_model_in_training_mode_is_scored_in_evaluation_mode(task: Task) -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.Dropout(0.5), nn.Linear(24, 2)).train()
    tables = [
        SVDPruner(model, progress=False).sweep(
            lambda net: float(net(task.rows).double().sum()), deciles=[1], roles="all", progress=False
        )
        for _ in range(2)
    ]
    assert_same(*tables)
    assert model.training and model[1].training


def test_a_folder_knows_buffers_and_the_analysis(net: Net, tmp_path: Path) -> None:
    sweep(net, Task(), folder=tmp_path, deciles=[1])
    pruner = SVDPruner(net, progress=False, null_draws=200)
    with pytest.raises(ValueError, match="made by another run: analysis was"):
        pruner.sweep(Task(), folder=tmp_path, deciles=[1], progress=False)
    net.classes[0] += 1e-3
    with pytest.raises(ValueError, match="made by another run: weights was"):
        sweep(net, Task(), folder=tmp_path, deciles=[1])


def test_a_finished_sweep_is_read_without_factoring(
    net: Net, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(net, task, folder=tmp_path, deciles=[1], controls=1)
    monkeypatch.setattr("hf_rmt.surgery.factors.svd", None)
    assert_same(sweep(net, task, folder=tmp_path, deciles=[1], controls=1), first)


def test_a_refused_sweep_goes_on_with_another_margin(net: Net, tmp_path: Path) -> None:
    task = Task()
    task.labels[:20] = 1 - task.labels[:20]  # or there is no error
    with pytest.raises(ValueError, match=r"margin=99\.0"):
        sweep(net, task, deciles=[1], folder=tmp_path, margin=99.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"margin=99\.0"):
            sweep(net, task, deciles=[1], folder=tmp_path, margin=99.0)
    assert task.calls == 1, "the baseline is kept, and nothing else is measured"
    assert len(sweep(net, task, deciles=[1], folder=tmp_path, margin=0.0)) == 4 and task.calls == 4


# What goes wrong


def test_an_evaluation_that_raises_undoes_its_removal(net: Net, task: Task) -> None:
    bits = bits_of(net)
    pruner = SVDPruner(net, progress=False)
    with pytest.raises(OSError, match="the disk is full"):
        pruner.sweep(Task(fails_at=4), progress=False)
    assert_same_bits(net, bits)
    assert not pruner.edits
    assert_same(pruner.sweep(task, progress=False), sweep(Net(), task))


def test_what_was_measured_before_a_failure_is_kept(net: Net, task: Task, tmp_path: Path) -> None:
    bits = bits_of(net)
    options: dict[str, Any] = {"controls": 1, "folder": tmp_path / "sweep", "roles": ["query", "value"]}
    with pytest.raises(OSError, match="the disk is full"):
        sweep(net, Task(fails_at=8), **options)
    assert_same_bits(net, bits)
    assert len(list((tmp_path / "sweep" / "partial").glob("*.safetensors"))) == 7
    going_on = Task()
    resumed = sweep(net, going_on, **options)
    assert len(resumed) == 25 and going_on.calls == 25 - 7
    assert_same(resumed, sweep(net, task, controls=1, roles=["query", "value"]))
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert names == {"sweep.csv", "sweep.json", "sweep.safetensors", "sweep_profiles.safetensors"}
    again = Task()
    assert_same(sweep(net, again, **options), resumed)
    assert not again.calls
    assert_same(SweepTable.load(tmp_path / "sweep"), resumed)


def test_a_damaged_cell_is_measured_again(net: Net, task: Task, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"):
        sweep(net, Task(fails_at=4), folder=tmp_path)
    (tmp_path / "partial" / "00001.safetensors").write_bytes(b"half of it")
    going_on = Task()
    assert_same(sweep(net, going_on, folder=tmp_path), sweep(net, task))
    assert going_on.calls == 31 - 2


@pytest.mark.parametrize("finished", [False, True])
def test_folders_of_other_sweeps_are_refused(finished: bool, net: Net, tmp_path: Path) -> None:
    if finished:
        sweep(net, Task(), folder=tmp_path, deciles=[1, 2])
    else:
        with pytest.raises(OSError, match="full"):
            sweep(net, Task(fails_at=3), folder=tmp_path, deciles=[1, 2])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def refused(what: str, evaluate: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=f"was made by another run: {what} was .*; give another folder"):
            sweep(net, evaluate, folder=tmp_path, **{"deciles": [1, 2], **options})

    refused("selections", Task(), deciles=[1, 3])
    refused("places", Task(), roles="all")
    refused("controls", Task(), controls=1)
    refused("evaluation", lambda model: 0.5)
    refused("seed", Task(), seed=1)
    net.pooler.bias.data[0] += 1e-6  # no matrix that is swept
    refused("weights", Task())
    net.load_state_dict(Net().state_dict())
    pruner = SVDPruner(net, progress=False)
    pruner.remove(Decile(3), roles="pooler")
    with pytest.raises(ValueError, match="weights was"):
        pruner.sweep(Task(), folder=tmp_path, deciles=[1, 2], progress=False)
    pruner.restore()
    pruner.remove(Outliers("above", sigma=100.0))  # nothing; and yet it is said to be in place
    with pytest.raises(ValueError, match="edits was"):
        pruner.sweep(Task(), folder=tmp_path, deciles=[1, 2], progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert len(sweep(net, Task(), folder=tmp_path, deciles=[1, 2])) == 7


def test_evaluations_tell_by_their_identity_what_they_are(net: Net, tmp_path: Path) -> None:
    class Named(Task):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def identity(self) -> dict[str, str]:
            return {"rows": self.name}

    sweep(net, Named("dev"), folder=tmp_path, deciles=[1])
    sweep(net, Named("dev"), folder=tmp_path, deciles=[1])
    with pytest.raises(ValueError, match="evaluation was"):
        sweep(net, Named("test"), folder=tmp_path, deciles=[1])


def test_a_table_that_was_saved_by_hand_is_not_taken_for_the_run(net: Net, tmp_path: Path) -> None:
    sweep(net, Task(), deciles=[1]).save(tmp_path)
    with pytest.raises(ValueError, match=r"weights was null and is .*; give another folder"):
        sweep(net, Task(), deciles=[1], folder=tmp_path)


def test_a_folder_is_of_one_sweep_at_a_time(net: Net, tmp_path: Path) -> None:
    tried = []

    def evaluate(model: nn.Module) -> float:
        if not tried:
            tried.append(model)
            with pytest.raises(ValueError, match="in use by another"):
                sweep(Net(), evaluate, deciles=[1], folder=tmp_path)
        return 1.0

    assert len(sweep(net, evaluate, deciles=[1], folder=tmp_path)) == 4 and tried


# Processes of their own

_GRID: dict[str, Any] = {"deciles": [1, 4, 10], "controls": 1}


def _program(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run this file."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def test_a_killed_sweep_goes_on(net: Net, task: Task, tmp_path: Path) -> None:
    killed = _program("die", str(tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "partial").glob("*.safetensors"))) == 5 and not store.is_saved(tmp_path, "sweep")
    going_on = Task()
    resumed = sweep(net, going_on, folder=tmp_path, **_GRID)
    assert going_on.calls == len(resumed) - 5
    assert_same(resumed, sweep(Net(), task, **_GRID))
    assert_same(SweepTable.load(tmp_path), resumed)


def test_two_processes_give_the_table_of_one(net: Net, task: Task, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finished = _program("share", str(tmp_path), launcher=launcher)
    assert finished.returncode == 0, finished.stderr
    expected = sweep(net, task, **_GRID)
    for rank in (0, 1):
        calls = dict(line.split() for line in (tmp_path / f"calls-{rank}").read_text().splitlines())
        for name in calls:
            assert_same(SweepTable.load(tmp_path / f"{name}-{rank}"), expected)
        first = int(rank == 0)  # which measures the baseline, and one more of an odd number
        assert calls == {
            "alone": str(7 + first),
            "in-folder": str(7 + first),
            "again": "0",
            "resumed": str(5 + first),  # four are kept
            "factors": str(7 + first),
            "replicated": "15",
            "sharded": "15",
        }
    assert len(expected) == 15
    assert_same(SweepTable.load(tmp_path / "shared"), expected)
    assert not (tmp_path / "shared" / "partial").exists()


def _die(folder: Path) -> None:
    sweep(Net(), Task(dies_at=6), folder=folder, **_GRID)


def _share(folder: Path) -> None:
    """What two processes do; each writes down its tables, and how often it has evaluated for them."""
    rank, processes = rank_and_count()
    assert processes == 2
    calls = []

    def measured(name: str, model: nn.Module, factors: Path | None = None, **options: Any) -> None:
        task = Task()
        pruner = SVDPruner(model, folder=factors, progress=False)
        pruner.sweep(task, progress=False, **_GRID, **options).save(folder / f"{name}-{rank}")
        calls.append(f"{name} {task.calls}")
        assert not task.calls or task.processes == {2 if name in ("replicated", "sharded") else 1}

    measured("alone", Net())
    measured("in-folder", Net(), folder=folder / "shared")
    measured("again", Net(), folder=folder / "shared")
    _fail_in_the_second(rank, folder)
    measured("resumed", Net(), folder=folder / "failed")
    measured("factors", Net(), factors=folder)
    # A forward pass of these takes both processes: in DDP it begins with the buffers of the first.
    measured("replicated", nn.parallel.DistributedDataParallel(Net()), folder=folder / "replicated")
    sharded = _sharded()
    bits = {name: tensor.full_tensor() for name, tensor in sharded.named_parameters()}
    measured("sharded", sharded, folder=folder / "sharded")
    sharded.reshard()
    assert all(torch.equal(tensor.full_tensor(), bits[name]) for name, tensor in sharded.named_parameters())
    _refuse_different_models(rank, folder)
    (folder / f"calls-{rank}").write_text("\n".join(calls))


def _fail_in_the_second(rank: int, folder: Path) -> None:
    net, failing = Net(), Task(fails_at=2 if rank == 1 else None)
    bits = bits_of(net)
    with pytest.raises(OSError if rank == 1 else RuntimeError, match="the disk is full"):
        sweep(net, failing, folder=folder / "failed", **_GRID)
    assert_same_bits(net, bits)
    assert failing.calls == (3 if rank == 0 else 2), "the first has heard of it before its next cell"


def _sharded() -> Any:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    for layer in net.layers:
        fully_shard(layer)
    return fully_shard(net)


def _refuse_different_models(rank: int, folder: Path) -> None:
    net = Net()
    net.pooler.bias.data += rank
    with pytest.raises(ValueError, match=f"process {1 - rank} differs from process {rank} in weights: give every"):
        sweep(net, Task(), folder=folder / "different", **_GRID)
    assert not (folder / "different").exists()
    with pytest.raises(ValueError, match=f"process {1 - rank} differs from process {rank} in weights: give every"):
        sweep(net, Task(), **_GRID)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"die": _die, "share": _share}[sys.argv[1]](Path(sys.argv[2]))
