"""What goes in wrong comes out as a clear error, or as a row that says why it is empty."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_rmt import AnalysisReport, RMTAnalyzer
from hf_rmt.reports import store


def _row(weight: torch.Tensor, **options):
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.weight.data = weight
    report = RMTAnalyzer(model).analyze(**options)
    return report.to_pandas().iloc[0], next(iter(report.values()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad: float, make_model, tmp_path) -> None:
    model = make_model("bert")
    model.encoder.layer[0].output.dense.weight.data[3, 5] = bad
    report = RMTAnalyzer(model).analyze(folder=tmp_path / "r")
    table = report.to_pandas().set_index("name")
    row = table.loc["encoder.layer.0.output.dense"]
    assert row["note"] == "1 of 8192 entries are NaN or Inf" and np.isnan(row["s_max"])
    others = table.drop("encoder.layer.0.output.dense")
    assert (others["note"] == "").all() and others["s_max"].notna().all()
    assert AnalysisReport.load(tmp_path / "r").to_pandas().set_index("name").loc[row.name, "note"] == row["note"]
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense: 1 of 8192 entries"):
        RMTAnalyzer(model).analyze(strict=True)


def test_large_but_finite_entries_are_no_infinity() -> None:
    row, _ = _row(torch.full((40, 40), 3e38) * torch.eye(40))
    assert row["s_max"] == pytest.approx(3e38, rel=1e-6)


def test_all_zeros() -> None:
    row, result = _row(torch.zeros(64, 64), control="gaussian")
    assert row["note"].startswith("all entries are zero")
    assert row["n_above"] == row["n_below"] == row["n_above_tw"] == 0
    assert np.isnan(row["stable_rank"]) and np.isnan(row["alpha"]) and np.isnan(row["mass_outside"])
    assert bool(result.right.p_values.isnan().all())


def test_rank_one() -> None:
    torch.manual_seed(0)
    row, result = _row(torch.outer(torch.randn(128).sign(), torch.randn(64).sign()))
    assert row["n_above"] == 1 and row["stable_rank"] == pytest.approx(1)
    assert "63 right vectors not tested: their singular values are zero or degenerate" in row["note"]
    assert int((~result.right.p_values.isnan()).sum()) == 1


def test_identity_has_no_vectors_of_its_own() -> None:
    row, result = _row(torch.eye(64))
    assert bool(result.right.p_values.isnan().all()) and row["n_above_tw"] == 0


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (2, 3)])
def test_vectors_as_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    _, result = _row(weight)
    np.testing.assert_allclose(result.s, torch.linalg.svdvals(weight.double()), rtol=1e-12)
    assert len(result.right.p_values) == len(result.left.p_values) == min(shape)


def test_small_sides_get_no_p_values_and_say_so() -> None:
    torch.manual_seed(0)
    row, result = _row(torch.randn(16, 768))
    assert row["note"] == "no left p-values: vectors of fewer than 32 entries"
    assert bool(result.left.p_values.isnan().all()) and np.isnan(row["left_significant"])
    assert bool(result.right.p_values.isfinite().all()) and row["right_significant"] <= 0.2
    assert row["s_max"] > 0


def test_a_model_without_matrices(make_model) -> None:
    with pytest.raises(ValueError, match="LayerNorm has no weight matrix to analyse"):
        RMTAnalyzer(nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"left out: weight"):
        RMTAnalyzer(nn.Embedding(8, 8))


def test_a_pattern_that_matches_nothing(make_model) -> None:
    with pytest.raises(ValueError, match=r"no role or name matches 'gate'; the roles are .*query"):
        RMTAnalyzer(make_model("bert")).analyze(roles="gate")


def test_meta_and_integer_weights_are_named(make_model) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        RMTAnalyzer(model).analyze()


class _StopError(Exception):
    pass


def _stop_after(monkeypatch, count: int, error: BaseException) -> list[str]:
    """Make the analysis of a model die after some matrices; returns what it analysed."""
    import hf_rmt.run as module

    done: list[str] = []
    original = module.analyse_matrix

    def analyse(matrix, *rest):
        if len(done) >= count:
            raise error
        done.append(matrix.name)
        return original(matrix, *rest)

    monkeypatch.setattr(module, "analyse_matrix", analyse)
    return done


def _leave_unfinished(analyzer: RMTAnalyzer, folder: Path, monkeypatch) -> None:
    """A folder with five matrices done, as a run that died leaves it."""
    with monkeypatch.context() as patch:
        _stop_after(patch, 5, _StopError())
        with pytest.raises(_StopError):
            analyzer.analyze(folder=folder, workers=1)


@pytest.mark.parametrize("error", [_StopError(), KeyboardInterrupt()])
def test_an_interrupted_run_goes_on_where_it_stopped(error, make_model, tmp_path, monkeypatch) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    undisturbed = analyzer.analyze(folder=tmp_path / "whole", seed=1, control="gaussian")
    with monkeypatch.context() as patch:
        done = _stop_after(patch, 5, error)
        with pytest.raises(type(error)):
            analyzer.analyze(folder=tmp_path / "r", seed=1, control="gaussian", workers=1)
        assert len(done) == 5 and not store.is_saved(tmp_path / "r", "report")
    with monkeypatch.context() as patch:
        done = _stop_after(patch, 100, _StopError())
        resumed = analyzer.analyze(folder=tmp_path / "r", seed=1, control="gaussian", workers=1)
        assert len(done) == 13 - 5
    for name in undisturbed:
        assert torch.equal(undisturbed[name].s, resumed[name].s)
        assert torch.equal(undisturbed[name].left.p_values, resumed[name].left.p_values)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["arrays.safetensors", "report.json", "table.parquet"]


def test_a_finished_run_is_read_again(make_model, tmp_path, monkeypatch) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    analyzer.analyze(folder=tmp_path / "r")
    done = _stop_after(monkeypatch, 0, _StopError())
    assert len(analyzer.analyze(folder=tmp_path / "r")) == 13 and not done


def test_a_damaged_partial_result_is_computed_again(make_model, tmp_path, monkeypatch) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    _leave_unfinished(analyzer, tmp_path / "r", monkeypatch)
    victim = next((tmp_path / "r" / "partial").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-50])
    assert len(analyzer.analyze(folder=tmp_path / "r")) == 13


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_settings_or_another_model_is_refused(finished, make_model, tmp_path, monkeypatch) -> None:
    model = make_model("bert")
    analyzer = RMTAnalyzer(model)
    with monkeypatch.context() as patch:
        _stop_after(patch, 1000 if finished else 5, _StopError())
        try:
            analyzer.analyze(folder=tmp_path / "r", workers=1)
        except _StopError:
            assert not finished
    with pytest.raises(ValueError, match='made by another run: sigma was "bulk" and is "init"'):
        analyzer.analyze(folder=tmp_path / "r", sigma="init")
    with pytest.raises(ValueError, match="made by another run: matrices"):
        RMTAnalyzer(make_model("llama")).analyze(folder=tmp_path / "r")
    for parameter in model.parameters():
        parameter.data += 0.1
    with pytest.raises(ValueError, match=r"another model: the weights of .* differ"):
        analyzer.analyze(folder=tmp_path / "r")


@pytest.mark.parametrize("where", ["file", "/proc"])
def test_a_folder_that_cannot_be_written(where: str, make_model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    report = RMTAnalyzer(make_model("bert")).analyze(roles="query", sides="none")
    with pytest.raises(OSError):
        report.save(tmp_path / where / "hf_rmt")
    with pytest.raises(OSError):
        RMTAnalyzer(make_model("bert")).analyze(folder=tmp_path / where / "hf_rmt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(make_model, tmp_path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        RMTAnalyzer(make_model("bert")).analyze(folder=folder / "r")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing_behind(make_model, tmp_path, monkeypatch) -> None:
    report = RMTAnalyzer(make_model("bert")).analyze(roles="query", sides="none")
    report.save(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path / "old")
    assert not (tmp_path / "new").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_a_disk_that_fills_up_during_the_run_keeps_what_is_done(make_model, tmp_path, monkeypatch) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    original, count = store.PartialRun.write, []

    def write(self, index, result):
        if len(count) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        count.append(index)
        original(self, index, result)

    with monkeypatch.context() as patch:
        patch.setattr(store.PartialRun, "write", write)
        with pytest.raises(OSError, match="No space left"):
            analyzer.analyze(folder=tmp_path / "r")
    assert len(list((tmp_path / "r" / "partial").glob("*.safetensors"))) == 4
    assert len(analyzer.analyze(folder=tmp_path / "r")) == 13


def test_strict_holds_for_what_was_analysed_before(make_model, tmp_path) -> None:
    model = make_model("bert")
    model.encoder.layer[0].output.dense.weight.data[3, 5] = float("nan")
    RMTAnalyzer(model).analyze(folder=tmp_path / "r", sides="none")
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense: 1 of 8192 entries"):
        RMTAnalyzer(model).analyze(folder=tmp_path / "r", sides="none", strict=True)


def test_a_folder_in_use_is_refused(make_model, tmp_path, monkeypatch) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    _leave_unfinished(analyzer, tmp_path / "r", monkeypatch)
    other = store.hold(tmp_path / "r" / "partial")
    assert other is not None
    with pytest.raises(ValueError, match="in use by another run"):
        analyzer.analyze(folder=tmp_path / "r")
    other.close()
    assert len(analyzer.analyze(folder=tmp_path / "r")) == 13


def test_float64_beyond_the_range_of_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).double()
    model.weight.data = torch.randn(64, 64).double() * 1e40
    row = RMTAnalyzer(model).analyze().to_pandas().iloc[0]
    assert row["note"] == "" and row["s_max"] > 1e40 and row["n_above_tw"] == 0
    row = RMTAnalyzer(model).analyze(sides="none", sigma="empirical").to_pandas().iloc[0]
    assert row["sigma"] == pytest.approx(float(model.weight.std(correction=0)), rel=1e-9)


def test_large_float32_entries_do_not_overflow_sigma() -> None:
    torch.manual_seed(0)
    row, _ = _row(torch.randn(64, 64) * 1e20, sigma="empirical")
    assert row["sigma"] == pytest.approx(1e20, rel=0.05) and row["mp_distance"] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_up_to_rounding_is_said(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    model.weight.data = (torch.randn(300, 20) @ torch.randn(20, 300)).to(dtype)
    row = RMTAnalyzer(model).analyze(sides="none").to_pandas().iloc[0]
    assert row["note"] == f"rank 20 to the precision of {dtype}: the bulk is rounding"
    _, result = _row(torch.randn(300, 300).to(dtype))
    assert result.row["note"] == ""


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device", "meta"])
def test_a_device_that_cannot_be_used(device: str, make_model) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}', which cannot be used here"):
        RMTAnalyzer(make_model("bert")).analyze(device=device)


def test_a_device_may_be_a_device(make_model) -> None:
    assert len(RMTAnalyzer(make_model("bert")).analyze(device=torch.device("cpu"), sides="none")) == 13


def test_numbers_of_numpy_are_settings(make_model, tmp_path) -> None:
    options = {"sigma": np.float32(0.02), "seed": np.int64(3), "rate": np.float64(0.05)}
    RMTAnalyzer(make_model("bert")).analyze(folder=tmp_path / "r", sides="none", **options)
    assert AnalysisReport.load(tmp_path / "r").settings["seed"] == 3


def test_an_error_of_a_library_names_the_matrix(make_model, monkeypatch) -> None:
    import hf_rmt.analysis

    def fail(*_args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hf_rmt.analysis, "svd", fail)
    with pytest.raises(RuntimeError, match=r"attention\.self\.query: out of memory"):
        RMTAnalyzer(make_model("bert")).analyze(roles="query", workers=1)


def test_a_report_saved_by_hand_is_no_run_to_resume(make_model, tmp_path) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    analyzer.analyze(sides="none").save(tmp_path / "r")
    with pytest.raises(ValueError, match="saved without this run; give another folder"):
        analyzer.analyze(sides="none", folder=tmp_path / "r")
