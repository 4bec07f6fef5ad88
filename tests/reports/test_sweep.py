from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from rich.console import Console

from hf_rmt.reports import store
from hf_rmt.reports.sweep import Cell, SweepTable
from hf_rmt.tables import sweep_table
from hf_rmt.theory.inference import Rows, change_of_seeds, paired_change

N = 120
FIRST = ["selection", "role", "block", "seed", "metric", "score", "baseline", "change", "order", "control"]


def _accuracy(seed: int, level: float) -> Rows:
    """Right and wrong answers of which about this share is right; what is hard is so for all."""
    hard = np.random.default_rng(0).random(N)
    own = np.random.default_rng([seed, int(1000 * level)]).random(N)
    return Rows(torch.from_numpy((0.8 * hard + 0.2 * own < level).astype(float)), torch.ones(N))


def cell(selection: str, level: float, **labels: Any) -> Cell:
    rows = _accuracy(labels.get("seed", 0), level)
    return Cell(selection=selection, scores={"accuracy": rows.score()}, rows={"accuracy": rows}, **labels)


def cells_of(seed: int, roles: tuple[str, ...] = ("query", "intermediate")) -> list[Cell]:
    """A baseline, four deciles of each role and their controls. P-values fall where much is lost."""
    levels = {1: 0.5, 2: 0.8, 9: 0.78, 10: 0.65}
    found = [cell("none", 0.8, seed=seed, chance={"accuracy": 0.6})]
    for role in roles:
        for decile, level in levels.items():
            size = {"components": 10.0 * decile}  # no two of a size, so that each has its own control
            removed = size | {"of": 640.0, "matrices": 2.0, "mass": 0.2 / decile, "p_right": level - 0.3}
            found.append(cell(f"decile:{decile}", level, role=role, seed=seed, removed=removed))
            name = f"random:0(decile:{decile})"
            found.append(cell(name, 0.79, role=role, seed=seed, control=f"decile:{decile}", removed=size))
    return found


def table_of(*seeds: int) -> SweepTable:
    profiles = {"query": torch.linspace(0, 1, 8, dtype=torch.float64) + seeds[0]}
    cells = [cell for seed in seeds for cell in cells_of(seed)]
    return SweepTable(cells, {"model": "bert", "data": ["boolq", 120], "fine-tuned": seeds[0]}, profiles)


def _row(summary: pd.DataFrame, **wanted: Any) -> pd.Series:
    for column, value in wanted.items():
        summary = summary[summary[column] == value]
    assert len(summary) == 1
    return summary.iloc[0]


def _assert_same(one: SweepTable, other: SweepTable) -> None:
    pd.testing.assert_frame_equal(one.to_pandas(), other.to_pandas())
    assert all(a.same_as(b) for a, b in zip(one, other, strict=True))
    assert one.profiles.keys() == other.profiles.keys()
    assert all(torch.equal(one.profiles[role], other.profiles[role]) for role in one.profiles)


def test_changes_are_score_minus_baseline_of_the_same_seed() -> None:
    table = table_of(0, 1).to_pandas()
    assert list(table)[: len(FIRST)] == FIRST
    assert len(table) == 2 * 17
    own = {seed: table[(table["seed"] == seed) & (table["selection"] == "none")]["score"].item() for seed in (0, 1)}
    assert own[0] != own[1]
    np.testing.assert_array_equal(table["baseline"], table["seed"].map(own))
    np.testing.assert_array_equal(table["change"], table["score"] - table["seed"].map(own))
    assert (table[table["selection"] == "none"]["change"] == 0).all()
    assert table["block"].dtype == "Int64" and table["block"].isna().all()
    assert table["p_left"].isna().all() and table["components"].notna().sum() == 32
    assert table["chance"].notna().sum() == 2


def test_the_order_of_fine_tuning_shares_the_baseline() -> None:
    before, after = (cell("decile:10", level, order=order) for order, level in (("before", 0.75), ("after", 0.5)))
    table = SweepTable([cell("none", 0.8), before, after], {}).to_pandas()
    assert table["baseline"].nunique() == 1
    assert list(table["order"]) == ["", "before", "after"]
    assert table["change"].iloc[2] < table["change"].iloc[1] < 0


def test_summary_is_the_paired_change() -> None:
    sweep = table_of(0, 1, 2)
    summary = sweep.summary()
    assert len(summary) == 16 and "none" not in set(summary["selection"])
    named = {(c.seed, c.role, c.selection): c for c in sweep}
    row = _row(summary, role="query", selection="decile:10")
    scores = [named[seed, "query", "decile:10"].rows["accuracy"] for seed in range(3)]
    baselines = [named[seed, "all", "none"].rows["accuracy"] for seed in range(3)]
    expected = paired_change(scores, baselines)
    for column in ("spread", "error", "low", "high"):
        assert row[column] == pytest.approx(getattr(expected, column), rel=1e-9), column
    assert (row["change"], row["seeds"]) == (pytest.approx(expected.mean), 3)
    assert row["score"] == pytest.approx(np.mean([r.score() for r in scores]))
    assert row["baseline"] == pytest.approx(np.mean([r.score() for r in baselines]))
    assert row["verdict"] == "drop" and row["p_right"] == pytest.approx(0.35)
    pd.testing.assert_frame_equal(summary, sweep.summary("accuracy"))


def test_controls_have_rows_and_a_difference() -> None:
    sweep = table_of(0, 1, 2)
    extra = [cell("random:1(decile:1)", 0.7, role="query", seed=s, control="decile:1") for s in range(3)]
    summary = (sweep + SweepTable([*(c for c in sweep if c.selection == "none"), *extra], sweep.settings)).summary()
    own = _row(summary, role="query", selection="decile:1")
    controls = summary[(summary["role"] == "query") & (summary["control"] == "decile:1")]
    assert list(controls["selection"]) == ["random:0(decile:1)", "random:1(decile:1)"]
    assert own["over_control"] == pytest.approx(own["change"] - controls["change"].mean(), rel=1e-12)
    assert controls["over_control"].isna().all()
    alone = _row(sweep.summary(), role="query", selection="decile:10")
    pairs = [
        [c.rows["accuracy"] for c in sweep if c.role == "query" and c.selection == name]
        for name in ("decile:10", "random:0(decile:10)")
    ]
    assert alone["over_control_error"] == pytest.approx(paired_change(*pairs).error, rel=1e-12)


def _in_place(name: str, level: float, components: float, **labels: Any) -> Cell:
    return cell(name, level, removed={"components": components}, **{"role": "key", "order": "after", **labels})


def test_a_control_is_one_for_all_of_its_size_in_its_place() -> None:
    """Deciles of 384 have 39 components or 38; the bounds are those by which a sweep draws its controls."""
    like = {"control": "decile:1"}
    cells = [
        cell("none", 0.8),
        _in_place("decile:1", 0.4, 100),
        _in_place("random:0(decile:1)", 0.78, 100, **like),
        _in_place("random:1(decile:1)", 0.74, 100, **like),
        *(_in_place(f"bottom:{size}", 0.6, size) for size in (94, 95, 105, 106)),
        _in_place("decile:1", 0.45, 100, order="before"),
        _in_place("decile:1", 0.45, 100, role="query"),
        _in_place("decile:1", 0.45, 100, block=2),
        _in_place("rank:9", 0.5, 100, block=3),
        _in_place("random:0(rank:9)", 0.79, 100, block=3, control="rank:9"),
    ]
    named = {(c.block, c.selection): c for c in cells if c.order == "after" and c.role == "key"}
    controls = [named[None, f"random:{draw}(decile:1)"].scores["accuracy"] for draw in (0, 1)]
    table = SweepTable(cells, {})
    summary = table.summary()
    alone = {"order": "after", "role": "key"}
    for name in ("decile:1", "bottom:95", "bottom:105"):
        row = _row(summary[summary["block"].isna()], selection=name, **alone)
        expected = named[None, name].scores["accuracy"] - np.mean(controls)
        assert row["over_control"] == pytest.approx(expected, rel=1e-12), name
        assert row["over_control_error"] > 0
    with_controls = {*zip([pd.NA] * 3, ("decile:1", "bottom:95", "bottom:105"), strict=True), (3, "rank:9")}
    found = summary[summary["over_control"].notna()]
    assert set(zip(found["block"], found["selection"], strict=True)) == with_controls
    assert len(summary[summary["over_control"].isna()]) == len(cells) - 1 - len(with_controls)
    in_block = _row(summary[summary["block"] == 3], selection="rank:9")
    expected = named[3, "rank:9"].scores["accuracy"] - named[3, "random:0(rank:9)"].scores["accuracy"]
    assert in_block["over_control"] == pytest.approx(expected, rel=1e-12)


def test_the_size_of_a_selection_may_differ_between_seeds() -> None:
    """What lies outside of the law is another number in each model, and has another control there."""
    sizes = {0: 100, 1: 80}
    cells = [cell("none", 0.8, seed=seed) for seed in sizes]
    for seed, size in sizes.items():
        cells.append(_in_place("outliers:both", 0.5, size, seed=seed))
        for like, level in ((100, 0.78), (80, 0.7)):
            name = f"random:0(bottom:{like})"
            cells.append(_in_place(name, level, like, control=f"bottom:{like}", seed=seed))
    scores = {(c.seed, c.selection): c.scores["accuracy"] for c in cells}
    own = [scores[seed, "outliers:both"] - scores[seed, f"random:0(bottom:{size})"] for seed, size in sizes.items()]
    row = _row(SweepTable(cells, {}).summary(), selection="outliers:both")
    assert row["over_control"] == pytest.approx(np.mean(own), rel=1e-12)


def test_a_control_is_known_by_its_name_where_sizes_are_not() -> None:
    cells = [cell("none", 0.8), cell("decile:1", 0.5), cell("decile:2", 0.6)]
    cells.append(cell("random:0(decile:1)", 0.7, control="decile:1"))
    summary = SweepTable(cells, {}).summary()
    found = summary.set_index("selection")["over_control"]
    assert found["decile:1"] == pytest.approx(cells[1].scores["accuracy"] - cells[3].scores["accuracy"], rel=1e-12)
    assert found.drop("decile:1").isna().all()


def test_controls_of_some_seeds_are_held_against_these() -> None:
    cells = [c for c in table_of(0, 1) if not (c.control and c.seed == 1)]
    row = _row(SweepTable(cells, {}).summary(), role="query", selection="decile:1")
    first = _row(SweepTable(cells_of(0), {}).summary(), role="query", selection="decile:1")
    assert row["over_control"] == pytest.approx(first["over_control"], rel=1e-12)
    assert (row["seeds"], first["seeds"]) == (2, 1)


def test_without_rows_the_seeds_decide() -> None:
    cells = [replace(c, rows={}) for seed in range(3) for c in cells_of(seed)]
    row = _row(SweepTable(cells, {}).summary(), role="query", selection="decile:1")
    changes = [c.scores["accuracy"] for c in cells if c.role == "query" and c.selection == "decile:1"]
    expected = change_of_seeds([x - c.scores["accuracy"] for x, c in zip(changes, cells[::17], strict=True)])
    assert (row["change"], row["error"], row["low"]) == pytest.approx((expected.mean, expected.error, expected.low))
    assert row["verdict"] == "drop"
    one = SweepTable([c for c in cells if c.seed == 0], {}).summary()
    assert set(one["verdict"]) == {"undecided"} and one["error"].isna().all()


_SURPRISE = (("none", 0.1), ("decile:1", 0.7))


def _of_seed(seed: int, cells: list[Cell]) -> list[Cell]:
    return [replace(one, seed=seed) for one in cells if one.seed == 0]


@pytest.mark.parametrize(
    ("metric", "exponential", "verdict"),
    [
        ("perplexity", True, "drop"),
        ("score", True, "drop"),
        ("eval_loss", False, "drop"),
        ("eval_wer", False, "drop"),
        ("error-rate", False, "drop"),
        ("f1", False, "gain"),
        ("answer", False, "gain"),  # no word of it says wer
    ],
)
def test_a_perplexity_that_rises_is_a_drop(metric: str, exponential: bool, verdict: str) -> None:
    def one(selection: str, shift: float) -> Cell:
        values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
        rows = Rows(values + shift * (1 + 0.1 * values), torch.ones(50), exponential)
        return Cell(selection=selection, scores={metric: rows.score()}, rows={metric: rows})

    cells = [one("none", 0.0), *(replace(one(f"decile:{d}", 1 / d), removed={"p_right": 0.1 * d}) for d in (1, 2, 3))]
    table = SweepTable(cells, {})
    assert set(table.summary()["verdict"]) == {verdict} and (table.summary()["change"] > 0).all()
    rho = _row(table.correlation(), quantity="p_right", first_decile=True)["rho"]
    assert rho == pytest.approx(-1 if verdict == "drop" else 1)


def test_a_sweep_can_be_told_which_scores_should_fall(tmp_path) -> None:
    cells = [Cell(selection=name, seed=s, scores={"surprise": v + s / 100}) for s in (0, 1) for name, v in _SURPRISE]
    table = SweepTable(cells, {"lower_is_better": ["surprise"]})
    for one in (table, SweepTable.load(table.save(tmp_path)), table + SweepTable(_of_seed(2, cells), {})):
        assert one.lower_is_better("surprise") and set(one.summary()["verdict"]) == {"drop"}
    assert set(SweepTable(cells, {}).summary()["verdict"]) == {"gain"}


def test_an_empty_selection_is_reported() -> None:
    nothing = cell("outliers:below", 0.8, removed={"components": 0.0, "of": 64.0})
    table = SweepTable([cell("none", 0.8), nothing, cell("decile:9", 0.8, removed={"components": 6.0})], {"model": "m"})
    summary = table.summary()
    assert _row(summary, selection="outliers:below")[["verdict", "change", "components"]].to_list() == ["empty", 0, 0]
    assert _row(summary, selection="decile:9")["verdict"] == "undecided"  # the same score, but something was removed
    assert repr(table) == "SweepTable('m', 2 removals, 1 of them empty, accuracy)"


def test_metrics_are_summed_up_one_at_a_time() -> None:
    cells = [replace(c, scores=c.scores | {"f1": 0.5}) for c in cells_of(0)]
    table = SweepTable(cells, {})
    assert table.metrics == ("accuracy", "f1")
    assert set(table.summary("f1")["metric"]) == {"f1"} and set(table.summary()["metric"]) == {"accuracy"}
    assert len(table.to_pandas()) == 2 * len(cells)
    with pytest.raises(ValueError, match="no metric 'bleu': give one of accuracy, f1"):
        table.summary("bleu")


def _graded(changes: dict[str, list[float]], p_right: dict[str, list[float]], **labels: Any) -> list[Cell]:
    """Deciles from 1 of each role, with scores that fall by so much."""
    return [
        Cell(selection=f"decile:{d}", role=role, scores={"accuracy": 0.8 - drop}, removed={"p_right": p}, **labels)
        for role in changes
        for d, (drop, p) in enumerate(zip(changes[role], p_right[role], strict=True), start=1)
    ]


def test_correlation_is_spearmans_within_and_over_roles() -> None:
    rng = np.random.default_rng(0)
    drops = {role: list(rng.random(10)) for role in ("query", "key")}
    # The roles differ far more than their deciles: ranks over both would be those of the roles.
    p = {"query": list(rng.random(10)), "key": list(10 + rng.random(10))}
    table = SweepTable([Cell(selection="none", scores={"accuracy": 0.8}), *_graded(drops, p)], {}).correlation()
    for first in (True, False):
        kept = slice(0 if first else 1, 10)
        for role in ("query", "key"):
            row = _row(table, role=role, quantity="p_right", first_decile=first)
            expected = scipy.stats.spearmanr(drops[role][kept], p[role][kept])
            assert (row["rho"], row["count"]) == (pytest.approx(expected.statistic), 10 - (not first))
            assert row["p_value"] == pytest.approx(expected.pvalue, abs=0.03)
        ranks = [np.concatenate([scipy.stats.rankdata(x[r][kept]) for r in ("query", "key")]) for x in (drops, p)]
        pooled = _row(table, role="pooled", quantity="p_right", first_decile=first)
        assert pooled["rho"] == pytest.approx(scipy.stats.pearsonr(*ranks).statistic)
        assert pooled["count"] == 2 * (10 - (not first))
    lacking = table[table["quantity"] != "p_right"]
    assert lacking["rho"].isna().all() and lacking["p_value"].isna().all() and (lacking["count"] == 0).all()


def test_correlation_takes_the_mean_over_seeds_and_leaves_the_rest_out() -> None:
    base = [Cell(selection="none", seed=seed, scores={"accuracy": 0.8}) for seed in (0, 1)]
    p = {"query": [0.1, 0.2, 0.3, 0.4]}
    mixed = [_graded({"query": d}, p, seed=s) for s, d in enumerate(([0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.2, 0.1]))]
    other = Cell(selection="bulk", role="query", scores={"accuracy": 0.1}, removed={"p_right": 0.9})
    control = replace(mixed[0][0], selection="random:0(decile:1)", control="decile:1", scores={"accuracy": 0.1})
    table = SweepTable([*base, *mixed[0], *mixed[1], other, control], {}).correlation()
    row = _row(table, quantity="p_right", first_decile=True)
    assert (row["rho"], row["count"]) == (pytest.approx(scipy.stats.spearmanr([0.4, 0.2, 0.2, 0.1], p["query"])[0]), 4)
    assert set(table["role"]) == {"query"}  # nothing to pool


def test_all_matrices_are_not_pooled_with_their_roles() -> None:
    drops = {role: [0.3, 0.2, 0.1] for role in ("query", "key", "all")}
    p = {role: [0.1, 0.2, 0.3] for role in drops}
    table = SweepTable([Cell(selection="none", scores={"accuracy": 0.8}), *_graded(drops, p)], {}).correlation()
    assert _row(table, role="pooled", quantity="p_right", first_decile=True)["count"] == 6
    assert _row(table, role="all", quantity="p_right", first_decile=True)["rho"] == pytest.approx(-1)


def test_tables_of_other_seeds_are_joined() -> None:
    joined = table_of(0) + table_of(1) + table_of(2)
    assert len(joined) == 3 * 17
    pd.testing.assert_frame_equal(joined.summary(), table_of(0, 1, 2).summary())
    assert joined.settings == {"model": "bert", "data": ["boolq", 120], "differing": {"fine-tuned": [0, 1, 2]}}
    np.testing.assert_allclose(joined.profiles["query"], np.linspace(0, 1, 8) + 1)
    assert repr(joined) == "SweepTable('bert', 48 removals over 3 seeds, accuracy)"
    assert len(joined + table_of(1)) == len(joined)


def test_other_values_of_a_cell_are_refused() -> None:
    other = [replace(c, scores={"accuracy": 0.1}) if c.selection == "decile:9" else c for c in cells_of(0)]
    with pytest.raises(ValueError, match="different values of decile:9 of query, seed 0"):
        table_of(0) + SweepTable(other, {})
    with pytest.raises(ValueError, match="8 and 9 singular values of query"):
        table_of(0) + SweepTable(cells_of(1), {}, {"query": torch.zeros(9)})
    with pytest.raises(TypeError):
        table_of(0) + cells_of(1)  # type: ignore[operator]


def test_a_score_that_is_not_a_number_is_the_same_as_itself() -> None:
    rows = Rows(torch.tensor([math.nan, 1.0]), torch.ones(2))
    broken = Cell(selection="decile:1", scores={"accuracy": rows.score()}, rows={"accuracy": rows})
    base = cell("none", 0.8)
    base = replace(base, rows={"accuracy": Rows(torch.ones(2), torch.ones(2))}, scores={"accuracy": 1.0})
    table = SweepTable([base, broken], {})
    assert len(table + table) == 2
    row = table.summary().iloc[0]
    assert row["verdict"] == "undecided" and math.isnan(row["change"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "no baseline in this sweep: give"),
        ([cell("decile:1", 0.5, seed=3)], "no baseline in this sweep for seed 3"),
        ([cell("none", 0.8), cell("none", 0.7, role="query")], "two baselines"),
        (
            [cell("none", 0.8), *[cell("decile:1", 0.5, role="key", block=1, order="after")] * 2],
            "decile:1 of key in block 1, seed 0, after fine-tuning",
        ),
    ],
)
def test_bad_cells_are_refused(cells: list[Cell], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepTable(cells, {})


def test_evaluations_of_other_rows_are_refused() -> None:
    fewer = Rows(torch.ones(5), torch.ones(5))
    other = Cell(selection="decile:1", scores={"accuracy": 1.0}, rows={"accuracy": fewer})
    with pytest.raises(ValueError, match="of 120 and 5 rows cannot be paired"):
        SweepTable([cell("none", 0.8), other], {})


def test_save_and_load_are_inverse(tmp_path) -> None:
    table = table_of(0, 1) + SweepTable(
        [cell("none", 0.8, seed=7, chance={"accuracy": 0.6}), cell("decile:1", 0.4, seed=7, block=3, order="after")], {}
    )
    assert table.save(tmp_path / "sweep") == tmp_path / "sweep"
    loaded = SweepTable.load(tmp_path / "sweep")
    _assert_same(loaded, table)
    assert loaded.settings == json.loads(json.dumps(table.settings))
    pd.testing.assert_frame_equal(loaded.summary(), table.summary())
    written = pd.read_csv(tmp_path / "sweep" / "sweep.csv", keep_default_na=False)
    assert list(written) == list(table.to_pandas())
    np.testing.assert_array_equal(written["change"], table.to_pandas()["change"])
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == [
        "sweep.csv",
        "sweep.json",
        "sweep.safetensors",
        "sweep_profiles.safetensors",
    ]


def test_a_table_without_rows_and_profiles_is_saved_too(tmp_path) -> None:
    table = SweepTable([replace(c, rows={}) for c in cells_of(0)], {})
    table_of(0).save(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    table.save(tmp_path)
    _assert_same(SweepTable.load(tmp_path), table)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_cells_may_share_their_weights(tmp_path) -> None:
    weights = torch.arange(1.0, 4.0, dtype=torch.float64)
    rows = [Rows(torch.rand(3, dtype=torch.float64), weights) for _ in range(2)]
    cells = [
        Cell(selection=name, scores={"a": one.score(), "b": 0.0}, rows={"a": one, "b": one})
        for name, one in zip(("none", "decile:1"), rows, strict=True)
    ]
    table = SweepTable(cells, {})
    table.save(tmp_path)
    _assert_same(SweepTable.load(tmp_path), table)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    table_of(0).save(tmp_path / "old")
    monkeypatch.setattr(store, "write_manifest", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            table_of(1).save(tmp_path / folder)
    _assert_same(SweepTable.load(tmp_path / "old"), table_of(0))
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no sweep"):
        SweepTable.load(tmp_path)
    table_of(0).save(tmp_path)
    (tmp_path / "sweep.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"sweep\.safetensors is missing or damaged"):
        SweepTable.load(tmp_path)


def test_a_cell_is_kept_by_an_unfinished_run(tmp_path) -> None:
    run = store.PartialRun(tmp_path, {"model": "m"}, Cell)
    one = cell("decile:1", 0.5, role="key", block=1, seed=2, removed={"p_right": math.nan}, chance={"accuracy": 0.6})
    run.write(3, one)
    found = run.read(3)
    assert found.same_as(one) and found.key == ("", "key", 1, "decile:1", 2)
    assert found.rows["accuracy"].score() == one.scores["accuracy"]
    assert not found.same_as(cell("decile:1", 0.5, role="key", block=1, seed=2))
    run.remove()


def _printed(table: SweepTable, width: int = 80) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(sweep_table(table))
    return capture.get().splitlines()


def test_the_printed_table_has_a_row_a_removal() -> None:
    sweep = table_of(0, 1, 2)
    lines = _printed(sweep)
    assert max(map(len, lines)) <= 80
    row = _row(sweep.summary(), role="query", selection="decile:1")
    (found,) = [line.split() for line in lines if line.startswith("query") and "decile:1 " in line]
    numbers = [f"{row['change']:+.3f}", f"±{row['error']:.3f}", f"{row['low']:+.3f}", f"{row['high']:+.3f}"]
    assert found == ["query", "decile:1", *numbers, "3", "drop", f"{row['over_control']:+.3f}"]
    assert not any("random:0" in line for line in lines)
    assert sum("decile:" in line for line in lines) == 8


def test_the_printed_table_names_blocks_and_orders_where_there_are_any() -> None:
    cells = [cell("none", 0.8), cell("decile:1", 0.4, role="key", block=3), cell("decile:1", 0.4, order="after")]
    lines = _printed(SweepTable([replace(c, rows={}) for c in cells], {}))
    change = f"{cells[1].scores['accuracy'] - cells[0].scores['accuracy']:+.3f}"
    (in_block,) = [line.split() for line in lines if "key" in line]
    assert in_block == [
        "key",
        "3",
        "decile:1",
        change,
        "1",
        "undecided",
    ]  # one seed without rows: no error, no interval
    assert any(line.split()[:3] == ["after", "all", "decile:1"] for line in lines)
