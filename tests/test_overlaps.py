"""Overlaps in an analysis, recomputed from recorded activations by numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from hf_rmt import AnalysisReport, RMTAnalyzer
from hf_rmt.models.digests import fingerprint_of
from hf_rmt.reports import store
from hf_rmt.reports.columns import OVERLAP_COLUMNS
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments

QUERY = "encoder.layer.0.attention.self.query"
UP = "encoder.layer.1.intermediate.dense"
POOLER = "pooler.dense"
TOKENS = 6 * 40


@pytest.fixture
def model(make_model) -> nn.Module:
    """Some of its singular values lie beyond the edges. In float64, so that the directions that layer
    norms take out of the activations are empty to rounding."""
    model = make_model("bert").double()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight[:, 3] *= 20
            layer.intermediate.dense.weight[:, 5] *= 0.02
    return model


def record(model: nn.Module, tokens: int = 40) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What enters and leaves each linear layer on a few sequences, ``(tokens, features)`` in float64."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()

        return hook

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in linear.items()]
    ids = (17 * torch.arange(6)[:, None] + 7 * torch.arange(tokens)) % 100  # no token twice in one position
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return inputs, outputs


def collected(model: nn.Module, tokens: int = 40, **changes: Any) -> ActivationCovariances:
    inputs, outputs = record(model, tokens)
    key_of = {name: name.replace(".self.key", ".self.query").replace(".self.value", ".self.query") for name in inputs}
    own: dict[str, Any] = {
        "sums": {key: Moments.of(inputs[key]) for key in set(key_of.values())}
        | {f"{name}.out": Moments.of(x) for name, x in outputs.items()},
        "inputs": key_of,
        "outputs": {name: f"{name}.out" for name in outputs},
        "settings": {"model": "tiny", "batches": 1, "tokens": 6 * tokens, "dropout": False},
        "fingerprints": {matrix.name: fingerprint_of(matrix.read()) for matrix in RMTAnalyzer(model).matrices},
    }
    return ActivationCovariances(**(own | changes))


def analyse(model: nn.Module, covariances: ActivationCovariances, **options: Any) -> AnalysisReport:
    return RMTAnalyzer(model).analyze(covariances=covariances, workers=1, progress=False, **options)


def eigenvectors(x: np.ndarray, centred: bool = False) -> np.ndarray:
    """In rows, those of the covariance of recorded activations that the tokens determine."""
    x = x - x.mean(0) if centred else x
    _, s, vectors = np.linalg.svd(x, full_matrices=False)
    return vectors[s > 1e-9 * s[0]]


def overlaps(vectors: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return np.array([max(abs(float(v @ f)) for f in basis) for v in vectors])


def weight_of(model: nn.Module, name: str) -> np.ndarray:
    return model.get_submodule(name).weight.detach().double().numpy()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small matrices: threads cost more than they bring."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


# Values


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", [QUERY, "encoder.layer.0.attention.self.value", UP, "encoder.layer.1.output.dense"])
def test_overlaps_are_numpys(model: nn.Module, name: str, centred: bool) -> None:
    inputs, outputs = record(model)
    result = analyse(model, collected(model).with_centring(centred), roles=[name])[name]
    u, s, vh = np.linalg.svd(weight_of(model, name), full_matrices=False)
    np.testing.assert_allclose(result.s, s, rtol=1e-6)
    for match, vectors, x in (
        (result.right_overlap, vh, inputs[name].numpy()),
        (result.left_overlap, u.T, outputs[name].numpy()),
    ):
        assert match is not None and not match.values.isnan().any()
        basis = eigenvectors(x, centred)
        np.testing.assert_allclose(match.values, overlaps(vectors, basis), atol=2e-5)
        covariance = np.cov(x, rowvar=False, bias=True) if centred else x.T @ x / len(x)
        np.testing.assert_allclose(match.eigenvalues, np.linalg.eigvalsh(covariance)[::-1], atol=1e-9)
        assert (match.compared, match.tokens, match.centred) == (len(basis), TOKENS, centred)


def test_columns_are_those_of_the_values(model: nn.Module) -> None:
    inputs, outputs = record(model)
    report = analyse(model, collected(model))
    table = report.to_pandas().set_index("name")
    assert report[QUERY].row["n_above"] > 0 and report[UP].row["n_below"] > 0
    for name in (QUERY, UP):
        u, s, vh = np.linalg.svd(weight_of(model, name), full_matrices=False)
        row, result = table.loc[name], report[name]
        above, below = s > row["upper_edge"], s < row["lower_edge"]
        for prefix, vectors, x, test in (
            ("", vh, inputs[name].numpy(), result.right),
            ("left_", u.T, outputs[name].numpy(), result.left),
        ):
            values = overlaps(vectors, eigenvectors(x))
            for part, chosen in (("above", above), ("bulk", ~above & ~below), ("below", below)):
                expected = values[chosen].mean() if chosen.any() else math.nan
                assert row[f"{prefix}overlap_{part}"] == pytest.approx(expected, abs=1e-5, nan_ok=True)
            correlation = scipy.stats.spearmanr(values, -np.log(test.p_values.numpy())).statistic
            assert row[f"{prefix}overlap_rank_correlation"] == pytest.approx(correlation, abs=1e-3)
            energy = np.linalg.eigvalsh(x.T @ x)
            assert row[f"{prefix}activation_top_share"] == pytest.approx(energy[-1] / energy.sum())
            assert row[f"{prefix}activation_tokens"] == TOKENS
            assert row[f"{prefix}activation_rank"] == len(eigenvectors(x))


def test_the_table_has_the_columns_where_covariances_were_given(model: nn.Module) -> None:
    plain = RMTAnalyzer(model).analyze(workers=1, progress=False)
    with_overlaps = analyse(model, collected(model))
    assert set(OVERLAP_COLUMNS).isdisjoint(plain.to_pandas().columns) and plain[QUERY].right_overlap is None
    table = with_overlaps.to_pandas()
    assert set(OVERLAP_COLUMNS) <= set(table.columns)
    assert table["overlap_bulk"].between(0, 1).all() and (table["overlap_null"] > 0).all()
    pd.testing.assert_frame_equal(table[plain.to_pandas().columns], plain.to_pandas())
    assert ("overlap_above", "mean") in with_overlaps.by_role().columns


def test_without_outputs_the_left_columns_are_empty(model: nn.Module) -> None:
    report = analyse(model, collected(model, outputs={}))
    table = report.to_pandas()
    assert table["left_overlap_bulk"].isna().all() and table["left_activation_rank"].isna().all()
    assert table["overlap_bulk"].notna().all()
    assert report[QUERY].left_overlap is None and report[QUERY].right_overlap is not None


def test_overlaps_need_no_test_of_the_vectors(model: nn.Module) -> None:
    covariances = collected(model)
    both, right = (analyse(model, covariances, sides=sides)[UP] for sides in ("both", "right"))
    assert right.left is None and right.row["left_overlap_rank_correlation"] is None
    assert torch.equal(right.left_overlap.values, both.left_overlap.values)


def test_workers_change_nothing(model: nn.Module) -> None:
    one, three = (
        RMTAnalyzer(model).analyze(covariances=collected(model), workers=workers, progress=False) for workers in (1, 3)
    )
    for name in one:
        torch.testing.assert_close(one[name].right_overlap.values, three[name].right_overlap.values)
        torch.testing.assert_close(one[name].left_overlap.eigenvalues, three[name].left_overlap.eigenvalues)


def test_centring_changes_the_result_and_is_recorded(model: nn.Module) -> None:
    covariances = collected(model)
    plain, centred = analyse(model, covariances), analyse(model, covariances.with_centring())
    assert plain.settings["covariances"]["centred"] is False and centred.settings["covariances"]["centred"] is True
    assert plain.settings["covariances"]["tokens"] == TOKENS
    assert not torch.allclose(plain[UP].right_overlap.values, centred[UP].right_overlap.values)
    assert centred[UP].right_overlap.eigenvalues.sum() < plain[UP].right_overlap.eigenvalues.sum()


def test_fewer_tokens_than_dimensions(model: nn.Module) -> None:
    inputs, _ = record(model, tokens=3)
    covariances = collected(model, tokens=3)
    for centred, rank in ((False, 18), (True, 17)):
        report = analyse(model, covariances.with_centring(centred))
        match = report[QUERY].right_overlap
        assert report[QUERY].row["activation_rank"] == match.compared == rank
        vh = np.linalg.svd(weight_of(model, QUERY))[2]
        basis = eigenvectors(inputs[QUERY].numpy(), centred)
        np.testing.assert_allclose(match.values, overlaps(vh, basis), atol=2e-5)
        assert int(match.best.max()) < rank


def test_a_vector_the_data_uses_stands_out(model: nn.Module) -> None:
    """The query reads one feature strongly; data that varies along it is what its first vector shows."""
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 10
    covariances = collected(model)
    sums = {key: covariances[key] for key in set(covariances)} | {QUERY: Moments.of(x)}
    inputs = {name: name for name in covariances}
    row = analyse(model, collected(model, sums=sums, inputs=inputs, outputs={}), roles=[QUERY])[QUERY].row
    assert row["n_above"] >= 1 and row["overlap_above"] > 0.9 > row["overlap_null"] > row["overlap_bulk"]


def test_a_matrix_of_zeros_has_no_overlaps(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule(UP).weight.zero_()
    result = analyse(model, collected(model))[UP]
    assert result.right_overlap.values.isnan().all() and math.isnan(result.row["overlap_bulk"])
    assert result.row["activation_tokens"] == TOKENS


# Files


def assert_same_overlaps(a: AnalysisReport, b: AnalysisReport) -> None:
    pd.testing.assert_frame_equal(a.to_pandas(), b.to_pandas())
    for name in a:
        for mine, theirs in (
            (a[name].right_overlap, b[name].right_overlap),
            (a[name].left_overlap, b[name].left_overlap),
        ):
            assert mine is not None and theirs is not None
            for field in ("values", "best", "eigenvalues"):
                torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), equal_nan=True)
            assert (mine.compared, mine.tokens, mine.centred) == (theirs.compared, theirs.tokens, theirs.centred)


def test_a_saved_report_keeps_its_overlaps(model: nn.Module, tmp_path: Path) -> None:
    report = analyse(model, collected(model).with_centring())
    loaded = AnalysisReport.load(report.save(tmp_path))
    assert_same_overlaps(loaded, report)
    assert loaded[QUERY].right_overlap.centred is True and isinstance(loaded[QUERY].right_overlap.compared, int)
    assert loaded[QUERY].right_overlap.null_quantile() == report[QUERY].right_overlap.null_quantile()
    assert loaded.settings == report.settings


def test_a_run_that_stopped_goes_on_with_the_same_covariances(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covariances = collected(model)
    original = store.PartialRun.write

    def stop(run: store.PartialRun, index: int, result: Any) -> None:
        if len(list(run.folder.glob("*.safetensors"))) == 5:
            raise KeyboardInterrupt
        original(run, index, result)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.PartialRun, "write", stop)
        analyse(model, covariances, folder=tmp_path)
    assert len(list((tmp_path / "partial").glob("*.safetensors"))) == 5
    for other in (covariances.with_centring(), covariances + covariances):
        with pytest.raises(ValueError, match="was made by another run: covariances was"):
            analyse(model, other, folder=tmp_path)
    with pytest.raises(ValueError, match="was made by another run: covariances was"):
        RMTAnalyzer(model).analyze(folder=tmp_path, workers=1, progress=False)
    resumed = analyse(model, covariances, folder=tmp_path)
    assert_same_overlaps(resumed, analyse(model, covariances))
    assert_same_overlaps(AnalysisReport.load(tmp_path), resumed)
    assert_same_overlaps(analyse(model, covariances, folder=tmp_path), resumed)  # a finished one is read


# Covariances that do not belong to the model


def test_covariances_of_other_matrices_are_refused(model: nn.Module, make_model) -> None:
    other = collected(make_model("bert", num_hidden_layers=1).double())
    with pytest.raises(ValueError, match=r"of another model, or .*lack encoder\.layer\.1\..* and 1 more"):
        analyse(model, other)
    first = analyse(make_model("bert"), other.for_any_weights(), blocks=[0])  # there are all that it needs
    assert first.to_pandas()["overlap_bulk"].notna().all()


def test_covariances_of_other_widths_are_refused(model: nn.Module, make_model) -> None:
    narrow = collected(make_model("bert", intermediate_size=96)).for_any_weights()
    with pytest.raises(ValueError, match=r"another model: encoder\.layer\.0\.intermediate\.dense has 128 outputs"):
        analyse(model, narrow)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense has 128 inputs, they have 96"):
        analyse(model, narrow, roles="output")


def test_covariances_of_other_weights_are_refused_unless_asked_for(model: nn.Module) -> None:
    covariances = collected(model)
    before = analyse(model, covariances, roles=["*.query"])
    with torch.no_grad():
        model.get_submodule(QUERY).weight.mul_(2)
    with pytest.raises(ValueError, match=rf"{QUERY}: .*other weights than these.*for_any_weights\(\)"):
        analyse(model, covariances)
    after = analyse(model, covariances.for_any_weights(), roles=["*.query"])
    torch.testing.assert_close(after[QUERY].right_overlap.values, before[QUERY].right_overlap.values)


def test_a_matrix_that_was_never_called_has_no_overlaps(model: nn.Module) -> None:
    whole = collected(model)
    settings = whole.settings | {"silent": [POOLER]}
    inputs = {name: whole.key(name) for name in whole if name != POOLER}
    report = analyse(model, collected(model, inputs=inputs, outputs={}, settings=settings))
    assert report[POOLER].right_overlap is None and report[POOLER].row["overlap_bulk"] is None
    assert report.to_pandas().set_index("name")["overlap_bulk"].isna().sum() == 1


def test_singular_values_alone_have_no_overlaps(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"sides.*'none'.*covariances"):
        analyse(model, collected(model), sides="none")
