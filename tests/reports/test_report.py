from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_rmt import AnalysisReport, RMTAnalyzer
from hf_rmt.reports import columns, store


@pytest.fixture
def report(make_model) -> AnalysisReport:
    return RMTAnalyzer(make_model("mixtral")).analyze(control="gaussian")


def test_save_and_load_are_inverse(report: AnalysisReport, tmp_path) -> None:
    loaded = AnalysisReport.load(report.save(tmp_path / "r"))
    pd.testing.assert_frame_equal(loaded.to_pandas(), report.to_pandas())
    assert loaded.settings == report.settings and list(loaded) == list(report)
    for name in report:
        mine, theirs = report[name].tensors(), loaded[name].tensors()
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key].numpy(), theirs[key].numpy())
        assert loaded[name].right.extreme_index == report[name].right.extreme_index
        assert loaded[name].control.left.entries == report[name].control.left.entries


def test_the_files_are_what_they_say(report: AnalysisReport, tmp_path) -> None:
    folder = report.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["arrays.safetensors", "report.json", "table.parquet"]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "table.parquet"), report.to_pandas(), check_dtype=False)
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert {"model", "revision", "seed", "sigma", "versions"} <= settings.keys()


def test_saving_again_replaces_and_keeps_other_files(report: AnalysisReport, tmp_path) -> None:
    report.save(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    smaller = AnalysisReport([report[name] for name in list(report)[:2]], report.settings)
    smaller.save(tmp_path)
    assert len(AnalysisReport.load(tmp_path)) == 2 and (tmp_path / "mine.txt").read_text() == "keep"


def test_a_death_while_files_move_loses_nothing(report: AnalysisReport, tmp_path, monkeypatch) -> None:
    """Whatever the moment, a reader finds the old report whole or the new one whole."""
    smaller = AnalysisReport([report[name] for name in list(report)[:2]], report.settings)
    import os

    original = os.replace
    for stop in range(1, 6):
        folder = tmp_path / str(stop)
        report.save(folder)
        calls = []

        def replace(a, b, stop=stop, calls=calls):
            calls.append(b)
            if len(calls) == stop:
                os._exit(0)
            original(a, b)

        child = os.fork()
        if child == 0:
            os.replace = replace
            smaller.save(folder)
            os._exit(0)
        os.waitpid(child, 0)
        loaded = AnalysisReport.load(folder)
        expected = 2 if stop > 2 else len(report)
        assert len(loaded) == len(loaded.to_pandas()) == expected, stop
        report.save(folder)
        assert len(AnalysisReport.load(folder)) == len(report)


def test_a_move_that_fails_is_finished_by_the_next_save(report: AnalysisReport, tmp_path, monkeypatch) -> None:
    import os

    smaller = AnalysisReport([report[name] for name in list(report)[:2]], report.settings)
    report.save(tmp_path)
    original = os.replace

    def fail_for_the_table(source, target):
        if Path(target).name == "table.parquet":
            raise OSError("the disk went away")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_the_table)
        with pytest.raises(OSError, match="went away"):
            smaller.save(tmp_path)
    assert len(AnalysisReport.load(tmp_path)) == 2, "the new report is whole in its stage"
    report.save(tmp_path)
    assert len(AnalysisReport.load(tmp_path)) == len(report)
    assert len(pd.read_parquet(tmp_path / "table.parquet")) == len(report)


@pytest.mark.parametrize("damage", ["arrays.safetensors", "report.json"])
def test_damaged_files_are_named(report: AnalysisReport, tmp_path, damage: str) -> None:
    folder = report.save(tmp_path / "r")
    path = folder / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=damage):
        AnalysisReport.load(folder)


def test_no_report_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no report"):
        AnalysisReport.load(tmp_path)


def test_the_page_of_columns_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "columns.md"
    assert page.read_text() == columns.as_markdown()


def test_repr(report: AnalysisReport) -> None:
    assert repr(report) == "AnalysisReport('MixtralForCausalLM', 28 matrices, sigma='bulk')"


def test_tensors_of_a_result_are_independent_of_the_model(make_model) -> None:
    model = make_model("bert")
    result = RMTAnalyzer(model).analyze(roles="query")["encoder.layer.0.attention.self.query"]
    before = {key: value.clone() for key, value in result.tensors().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[key].nan_to_num(), value.nan_to_num()) for key, value in result.tensors().items())


def test_staging_is_cleaned_up_after_an_error(tmp_path) -> None:
    with pytest.raises(RuntimeError), store.staged(tmp_path / "new", "report") as stage:
        (stage / "x").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "new").exists()
