from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_rmt import AnalysisReport, ModelComparison, RMTAnalyzer
from hf_rmt.reports import comparison_plots
from hf_rmt.reports.columns import COLUMNS, COMPARISON_COLUMNS, LABELS
from hf_rmt.reports.plots import NothingToDrawError

QUERY = "encoder.layer.0.attention.self.query"


def _trained(model):
    """The same model with some of its matrices moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "output.dense.weight")) and "encoder" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def comparison(make_model) -> ModelComparison:
    return RMTAnalyzer.compare(make_model("bert"), _trained(make_model("bert")))


def _assert_same(one: ModelComparison, other: ModelComparison) -> None:
    pd.testing.assert_frame_equal(one.to_pandas(), other.to_pandas())
    assert one.settings == other.settings and list(one) == list(other)
    for name in one:
        mine, theirs = one[name].tensors(), other[name].tensors()
        assert mine.keys() == theirs.keys() and one[name].row.keys() == other[name].row.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key].numpy(), theirs[key].numpy())
    for mine_report, its_report in ((one.before, other.before), (one.after, other.after)):
        pd.testing.assert_frame_equal(mine_report.to_pandas(), its_report.to_pandas())


def test_differences_are_after_minus_before(make_model) -> None:
    before = RMTAnalyzer(make_model("bert")).analyze()
    after = RMTAnalyzer(_trained(make_model("bert"))).analyze()
    table = before.compare(after).to_pandas().set_index("name")
    old, new = (report.to_pandas().set_index("name") for report in (before, after))
    numbers = [c for c in COLUMNS if c not in LABELS and c not in ("rows", "cols")]
    assert [c for c in table if c.endswith("_change")] == [f"{column}_change" for column in numbers]
    for column in numbers:
        expected = (new[column] - old[column]).rename(f"{column}_change")
        pd.testing.assert_series_equal(table[f"{column}_change"], expected)
    assert (table["s_max_change"].abs() > 0).sum() == 6
    assert "relative_change" not in table and before.compare(after).settings["weights"] is False
    back = after.compare(before).to_pandas().set_index("name")
    np.testing.assert_allclose(back["log_norm_change"], -table["log_norm_change"])


def test_columns_and_labels(comparison: ModelComparison) -> None:
    table = comparison.to_pandas()
    assert list(table)[:8] == ["name", "role", "stack", "block", "expert", "part", "rows", "cols"]
    assert list(table)[-len(COMPARISON_COLUMNS) :] == list(COMPARISON_COLUMNS)
    assert str(table["n_above_change"].dtype) == str(table["right_intruders"].dtype) == "Int64"
    for side in ("right", "left"):
        shares = table.filter(regex=f"^{side}_energy_")
        changed = table["relative_change"] > 0
        np.testing.assert_allclose(shares[changed].sum(axis=1), 1)
        assert shares[~changed].isna().all(axis=None)
        assert set(table["note"][~changed]) == {"the weights did not change"}


def test_by_role(comparison: ModelComparison) -> None:
    table, roles = comparison.to_pandas(), comparison.by_role()
    assert list(roles.index) == list(dict.fromkeys(table["role"]))
    assert roles.loc["query", ("blocks", "count")] == 2
    query = table[table["role"] == "query"]["relative_change"]
    assert roles.loc["query", ("relative_change", "mean")] == pytest.approx(query.mean())
    assert roles.loc["query", ("relative_change", "std")] == pytest.approx(query.std())


def test_energy_over_expectation(comparison: ModelComparison) -> None:
    right, left = comparison.energy_over_expectation("right"), comparison.energy_over_expectation("left")
    assert list(right) == [*map(str, range(1, 11)), "outside"]
    found = [comparison[n].right_energy for n in comparison if comparison[n].row["role"] == "output"]
    expected = torch.stack([energy.shares / energy.expected for energy in found]).mean(dim=0)
    np.testing.assert_allclose(right.loc["output"], expected)
    assert right.loc["key"].isna().all() and np.isnan(left.loc["output", "outside"])


def test_save_and_load_are_inverse(comparison: ModelComparison, tmp_path) -> None:
    folder = comparison.save(tmp_path / "c")
    names = ["after", "before", "comparison.json", "comparison.parquet", "comparison.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    _assert_same(ModelComparison.load(folder), comparison)
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "comparison.parquet"), comparison.to_pandas(), check_dtype=False
    )
    assert len(AnalysisReport.load(folder / "after")) == 13
    of_reports = comparison.before.compare(comparison.after)
    _assert_same(ModelComparison.load(of_reports.save(tmp_path / "r")), of_reports)


def test_saving_replaces_and_keeps_what_else_lies_there(comparison: ModelComparison, tmp_path) -> None:
    """``before`` and ``after`` may well be the checkpoints themselves."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "model.safetensors").write_text("weights")
    comparison.save(tmp_path)
    comparison.before.compare(comparison.after).save(tmp_path)
    assert ModelComparison.load(tmp_path).settings["weights"] is False
    assert (tmp_path / "before" / "model.safetensors").read_text() == "weights"
    assert not list(tmp_path.rglob(".incoming*"))


def test_a_death_while_files_move_loses_nothing(make_model, tmp_path) -> None:
    """Whatever the moment, a reader finds the old comparison whole or the new one whole, reports included."""
    model, trained = make_model("bert"), _trained(make_model("bert"))
    old = RMTAnalyzer.compare(model, trained, roles="query", sides="none")
    new = RMTAnalyzer.compare(model, trained, roles="output", sides="none")
    original = os.replace
    seen = set()
    for stop in range(12, 30):  # the first eleven files only get their names within the stage
        folder, calls = tmp_path / str(stop), []
        old.save(folder)

        def replace(a, b, stop=stop, calls=calls):
            calls.append(b)
            if len(calls) == stop:
                os._exit(1)
            original(a, b)

        child = os.fork()
        if child == 0:
            os.replace = replace
            new.save(folder)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        loaded = ModelComparison.load(folder)
        assert list(loaded) == list(loaded.before) == list(loaded.after)
        seen.add(list(loaded) == list(new))
        new.save(folder)
        assert not list(folder.rglob(".incoming*")), stop
        if finished:
            break
    assert seen == {True, False} and finished


@pytest.mark.parametrize("damage", ["comparison.json", "comparison.safetensors", "before/arrays.safetensors"])
def test_damaged_files_are_named(comparison: ModelComparison, tmp_path, damage: str) -> None:
    path = comparison.save(tmp_path / "c") / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=Path(damage).name):
        ModelComparison.load(tmp_path / "c")


def test_no_comparison_there(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no comparison: there is no comparison\.json"):
        ModelComparison.load(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sigma": "init"}, "sigma was 'bulk' before and 'init' after"),
        ({"sides": "right"}, "sides was 'none' before and 'right' after"),
        ({"rate": 0.05}, r"rate was 0\.01 before and 0\.05 after"),
    ],
)
def test_reports_under_other_settings_are_refused(options, message: str, make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    before = analyzer.analyze(sides="none")
    with pytest.raises(ValueError, match=f"different settings: .*{message}"):
        before.compare(analyzer.analyze(**{"sides": "none", **options}))


def test_reports_of_other_shapes_are_refused(make_model) -> None:
    before = RMTAnalyzer(make_model("bert")).analyze(sides="none")
    other = RMTAnalyzer(make_model("bert", intermediate_size=96)).analyze(sides="none")
    with pytest.raises(ValueError, match=r"0\.intermediate\.dense is 128 x 64 before and 96 x 64 after") as error:
        before.compare(other)
    assert "encoder.layer.1.output.dense is 64 x 128 before and 64 x 96 after" in str(error.value)
    assert "query" not in str(error.value)


def test_reports_with_nothing_in_common_are_refused(make_model) -> None:
    before = RMTAnalyzer(make_model("bert")).analyze(sides="none")
    with pytest.raises(ValueError, match=r"no matrix in common: before has encoder.*after has layers"):
        before.compare(RMTAnalyzer(make_model("llama")).analyze(sides="none"))


def test_matrices_of_one_side_are_left_out(make_model) -> None:
    before = RMTAnalyzer(make_model("bert"))
    after = RMTAnalyzer(make_model("bert_classifier"), head=True)
    comparison = before.analyze(sides="none").compare(after.analyze(sides="none"))
    assert comparison.settings["only_after"] == ["classifier"] and comparison.settings["only_before"] == []
    assert "classifier" not in comparison and len(comparison) == 13
    back = after.analyze(sides="none").compare(before.analyze(sides="none"))
    assert back.settings["only_before"] == ["classifier"]
    with pytest.raises(KeyError, match="classifier is not compared"):
        back["classifier"]


def test_names(comparison: ModelComparison) -> None:
    assert comparison[f"bert.{QUERY}.weight"] is comparison[QUERY]
    with pytest.raises(KeyError, match="nearest"):
        comparison["quary"]
    assert repr(comparison) == "ModelComparison('BertModel' -> 'BertModel', 13 matrices)"
    assert json.dumps(comparison.settings)


# Pictures


def test_all_figures_are_drawn(comparison: ModelComparison, tmp_path) -> None:
    stems = ["change_by_decile", "fig12_local_means_left", "fig12_local_means_right", "fig12_spectra"]
    paths = comparison.plot(tmp_path / "p")
    assert sorted(path.name for path in paths) == [f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png")]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_bars_are_the_means_of_the_ratios(comparison: ModelComparison) -> None:
    figure = comparison_plots.energy(comparison)
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes]
    assert titles == ["query", "attention.output", "output"], "roles that did not change have no panel"
    right, left = figure.axes[2].containers[1], figure.axes[2].containers[3]
    expected = comparison.energy_over_expectation("right").loc["output"]
    np.testing.assert_allclose([bar.get_height() for bar in right], expected)
    assert len(left) == 10 and figure.axes[2].get_xticklabels()[-1].get_text() == "out"


def test_a_comparison_of_reports_has_no_energies_to_draw(comparison: ModelComparison, tmp_path) -> None:
    bare = comparison.before.compare(comparison.after)
    with pytest.raises(NothingToDrawError):
        comparison_plots.energy(bare)
    assert "change_by_decile.png" not in [path.name for path in bare.plot(tmp_path)]
