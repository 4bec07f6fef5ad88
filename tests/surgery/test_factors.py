"""Factors of a model's matrices: computed once, kept in a folder, and what selections see of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_rmt.analyzer import RMTAnalyzer
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.digests import digest_of
from hf_rmt.models.live import matrices_of
from hf_rmt.pruner import SVDPruner
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.surgery import factors as module
from hf_rmt.surgery.factors import FactoredMatrix, FactorStore
from hf_rmt.theory.decomposition import svd
from hf_rmt.theory.ks_null import MonteCarloNull
from hf_rmt.theory.selection import Bulk, Outliers, Overlapping, Side, Significant
from hf_rmt.theory.singular_vectors import test_vectors

SIDES: tuple[Side, Side] = ("right", "left")


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def layers(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Tall, wide and square, two of them with singular values beyond the law."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 90), nn.Linear(90, 90))
    with torch.no_grad():
        model[0].weight[:, 3] *= 15
        model[2].weight[5] *= 20
    return model.to(dtype)


def store_of(model: nn.Module, folder: Path | None = None, **options: Any) -> FactorStore:
    return FactorStore(matrices_of(model), AnalysisConfig(workers=1, progress=False, **options), folder, None)


def prepared(model: nn.Module, folder: Path | None = None, **options: Any) -> FactorStore:
    store = store_of(model, folder, **options)
    store.prepare(range(len(store.matrices)))
    return store


def assert_same_factors(found: FactoredMatrix, expected: FactoredMatrix) -> None:
    assert found.factors.u.dtype == expected.factors.u.dtype and found.s.dtype == torch.float64
    for one, other in zip(_arrays(found), _arrays(expected), strict=True):
        assert torch.equal(one, other)
    assert (found.entry_std, found.digest, found.factors.route) == (
        expected.entry_std,
        expected.digest,
        expected.factors.route,
    )


def _arrays(factored: FactoredMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return factored.factors.u, factored.factors.s, factored.factors.vh


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that are factored."""
    shapes: list[tuple[int, ...]] = []

    def counting(weight: torch.Tensor, dtype: torch.dtype) -> Any:
        shapes.append(tuple(weight.shape))
        return svd(weight, dtype)

    monkeypatch.setattr(module, "svd", counting)
    return shapes


# In memory


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_computed(dtype: torch.dtype, kept: bool, tmp_path: Path) -> None:
    model = layers(dtype)
    store = prepared(model, tmp_path if kept else None)
    for index, layer in enumerate(model):
        weight = layer.weight.detach()
        expected = svd(weight.double())
        factored, (u, s, vh) = store[index], _arrays(store[index])
        assert u.dtype == vh.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(s, expected.s) and s.dtype == torch.float64
        assert torch.equal(u, expected.u.to(u.dtype)) and torch.equal(vh, expected.vh.to(u.dtype))
        assert factored.entry_std == pytest.approx(float(weight.double().std(correction=0)), rel=1e-9)
        assert (factored.name, factored.shape) == (store.matrices[index].name, tuple(weight.shape))
        assert factored.digest == digest_of(weight)
        assert torch.equal(factored.vectors("right"), vh) and torch.equal(factored.vectors("left"), u.mT)


def test_each_is_factored_once_and_when_it_is_asked_for(counted: list[tuple[int, ...]]) -> None:
    store = store_of(layers())
    store.prepare([1])
    assert counted == [(90, 48)]
    store.prepare([])
    store.prepare([1, 2])
    store.prepare([2, 1])
    assert counted == [(90, 48), (90, 90)] and sorted(store.known) == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kept", [False, True])
def test_a_matrix_that_is_not_finite(value: float, kept: bool, tmp_path: Path) -> None:
    model = layers()
    with torch.no_grad():
        model[1].weight[3, 4] = value
    store = store_of(model, tmp_path if kept else None)
    with pytest.raises(
        ValueError, match=r"^1\.weight|^1: the matrix has NaN or Inf entries; repair the weights, or le"
    ):
        store.prepare([0, 1, 2])
    assert 1 not in store.known
    store.prepare([0, 2])
    assert _names(tmp_path) == (["0.safetensors", "2.safetensors"] if kept else [])


# In a folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "factors").glob("*"))


def _file(folder: Path, name: str = "1") -> Path:
    return folder / "factors" / f"{name}.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_later_store_of_the_same_weights_computes_nothing(
    dtype: torch.dtype, tmp_path: Path, counted: list[tuple[int, ...]]
) -> None:
    first = prepared(layers(dtype), tmp_path)
    assert len(counted) == 3
    second = prepared(layers(dtype), tmp_path)
    assert len(counted) == 3
    assert _names(tmp_path) == ["0.safetensors", "1.safetensors", "2.safetensors"]
    for index in range(3):
        assert_same_factors(second[index], first[index])
        assert second[index].factors.vh.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for side in SIDES:
            one, other = (store[index].test(side).p_values for store in (first, second))
            assert torch.equal(one, other) and not one.isnan().all()


def test_factors_are_the_same_with_a_folder_and_without(tmp_path: Path) -> None:
    kept, plain = prepared(layers(), tmp_path), prepared(layers())
    for index in range(3):
        assert_same_factors(kept[index], plain[index])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the kernel's list of mapped files")
def test_factors_lie_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    """Both of a store that computed them and of one that found them."""
    for store in (prepared(layers(), tmp_path), prepared(layers(), tmp_path)):
        for index, matrix in enumerate(store.matrices):
            mapped = _mapped(_file(tmp_path, matrix.name))
            for tensor in (store[index].factors.u, store[index].factors.vh):
                assert any(start <= tensor.data_ptr() < stop for start, stop in mapped)


def _mapped(path: Path) -> list[tuple[int, int]]:
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path.resolve())]
    return [(int(start, 16), int(stop, 16)) for start, stop in ranges]


def test_the_mapped_file_is_never_written_to(tmp_path: Path) -> None:
    store = prepared(layers(), tmp_path)
    files = {name: (tmp_path / "factors" / name).read_bytes() for name in _names(tmp_path)}
    model = layers()
    pruner = SVDPruner(model, folder=tmp_path)
    pruner.remove(Outliers() | Significant())
    pruner.restore()
    for side in SIDES:
        store[0].test(side)
    assert {name: (tmp_path / "factors" / name).read_bytes() for name in _names(tmp_path)} == files


def test_another_models_weights_are_factored_anew(tmp_path: Path, counted: list[tuple[int, ...]]) -> None:
    first = prepared(layers(), tmp_path)
    kept = [[array.clone() for array in _arrays(first[index])] for index in range(3)]
    other = layers()
    with torch.no_grad():
        other[1].weight[7, 7] += 1e-3
    second = prepared(other, tmp_path)
    assert counted[3:] == [(90, 48)]
    assert_same_factors(second[1], prepared(other)[1])
    assert_same_factors(second[0], first[0])
    for index in range(3):  # the file that the first has mapped is another one now, and lives on
        assert all(map(torch.equal, _arrays(first[index]), kept[index]))


def test_weights_of_the_same_bits_in_another_shape_or_dtype(tmp_path: Path) -> None:
    """Zeros are the same in all of them."""
    for model in (nn.Linear(40, 60), nn.Linear(60, 40), nn.Linear(60, 40).double(), nn.Linear(60, 80).bfloat16()):
        nn.init.zeros_(model.weight)
        store = prepared(nn.Sequential(model), tmp_path)
        u, s, vh = _arrays(store[0])
        assert (u.shape[0], vh.shape[1]) == tuple(model.weight.shape) and not s.any()
        assert vh.dtype == (torch.float64 if model.weight.dtype == torch.float64 else torch.float32)


def _described(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _tampered(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    def tamper(path: Path) -> None:
        tensors, described = {key: tensor.clone() for key, tensor in load_file(path).items()}, _described(path)
        change(tensors, described)
        save_file(tensors, path, metadata=described)

    return tamper


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_text("{}"),
    "one bit": _flip_a_bit,
    "smallest vector lost": _tampered(lambda tensors, _: tensors["vh"][-1].zero_()),
    "smallest left vector lost": _tampered(lambda tensors, _: tensors["ut"][-1].zero_()),
    "last singular value": _tampered(lambda tensors, _: tensors["s"][-1].mul_(1 + 1e-9)),
    "two vectors swapped": _tampered(lambda tensors, _: tensors["vh"].copy_(tensors["vh"].roll(1, 0))),
    "other dtype": _tampered(lambda tensors, _: tensors.update(vh=tensors["vh"].double())),
    "other shape": _tampered(lambda tensors, _: tensors.update(vh=tensors["vh"].T.contiguous())),
    "tensor gone": _tampered(lambda tensors, _: tensors.pop("ut")),
    "entry_std": _tampered(lambda _, described: described.update(entry_std="1.0")),
    "no entry_std": _tampered(lambda _, described: described.pop("entry_std")),
    "no content hash": _tampered(lambda _, described: described.pop("content")),
    "no digest": _tampered(lambda _, described: described.pop("weight")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_noticed_and_made_again(
    kind: str, tmp_path: Path, counted: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    first = prepared(layers(), tmp_path)
    expected = [array.clone() for array in _arrays(first[1])]
    del first  # what is mapped goes wrong with its file
    DAMAGE[kind](_file(tmp_path))
    with caplog.at_level(logging.INFO):
        second = prepared(layers(), tmp_path)
    assert counted[3:] == [(90, 48)]
    assert all(map(torch.equal, _arrays(second[1]), expected))
    assert [record.getMessage() for record in caplog.records if "1.safetensors" in record.getMessage()]
    assert_same_factors(prepared(layers(), tmp_path)[1], second[1])
    assert len(counted) == 4 and len(_names(tmp_path)) == 3


def test_many_stores_fill_one_folder_at_a_time(tmp_path: Path) -> None:
    """As the processes of a launch do."""
    stores = [store_of(layers(), tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda store: [store._factored(matrix) for matrix in store.matrices * 3], stores))
    assert _names(tmp_path) == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert_same_factors(prepared(layers(), tmp_path)[1], prepared(layers())[1])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_half_written_stays(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        store = store_of(layers(), tmp_path)
        with pytest.raises(type(error)):
            store.prepare([0, 1])
    assert _names(tmp_path) == [] and not store.known
    store.prepare([0, 1])
    assert _names(tmp_path) == ["0.safetensors", "1.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prepared(layers(), tmp_path / "file")


def test_names_with_brackets(make_model, tmp_path: Path) -> None:
    model = make_model("mixtral", num_hidden_layers=1)
    first, second = prepared(model, tmp_path), prepared(model, tmp_path)
    assert "layers.0.mlp.experts.gate_up_proj[expert=1][up].safetensors" in _names(tmp_path)
    assert len(_names(tmp_path)) == len(first.matrices)
    for index in range(len(first.matrices)):
        assert_same_factors(second[index], first[index])


# What selections see of them


def test_p_values_are_those_of_a_report(tmp_path: Path) -> None:
    """By the table, and by draws of one's own."""
    for options in ({}, {"null_draws": 300, "seed": 3}):
        report = RMTAnalyzer(layers()).analyze(workers=1, progress=False, **options)
        for store in (prepared(layers(), **options), prepared(layers(), tmp_path, **options)):
            for index, (result, matrix) in enumerate(zip(report.values(), store.matrices, strict=True)):
                factored = store[index]
                assert factored.name == result.name == matrix.name
                assert torch.equal(factored.s, result.s)
                for side, test in zip(SIDES, (result.right, result.left), strict=True):
                    assert test is not None
                    torch.testing.assert_close(
                        factored.test(side).p_values, test.p_values, rtol=0, atol=0, equal_nan=True
                    )
                    for p in (0.01, 0.2):
                        assert torch.equal(Significant(p, side).mask(factored), test.p_values < p)
                    share = Significant(0.01, side).mask(factored).sum() / (~test.p_values.isnan()).sum()
                    assert float(share) == pytest.approx(result.row[f"{side}_significant"])


def test_the_null_of_draws(tmp_path: Path) -> None:
    store = prepared(layers(), tmp_path, null_draws=200)
    p = store[0].test("right").p_values
    assert float(p.min()) >= 1 / 201
    torch.testing.assert_close(p * 201, (p * 201).round(), rtol=0, atol=1e-9)
    expected = test_vectors(store[0].factors.vh, store[0].factors.testable(), MonteCarloNull(200, 0)).p_values
    assert torch.equal(p, expected)
    assert not torch.equal(prepared(layers(), null_draws=200, seed=1)[0].test("right").p_values, p)
    assert store[0].test("right") is store[0].test("right")


@pytest.mark.parametrize("rule", ["bulk", "empirical", "init", 0.07])
def test_outliers_are_those_of_a_report(rule: Any) -> None:
    """The columns above and below the law, of finite noise and asymptotic."""
    store = prepared(layers())
    for rate in (0.01, 0.2):
        report = RMTAnalyzer(layers()).analyze(sigma=rule, rate=rate, workers=1, progress=False)
        for index, result in enumerate(report.values()):
            row, p = result.row, len(result.s)
            for side in ("above", "below"):
                finite = int(Outliers(side, rule, rate).mask(store[index]).sum())  # type: ignore[arg-type]
                asymptotic = int(Outliers(side, rule, None).mask(store[index]).sum())  # type: ignore[arg-type]
                assert finite == row[f"n_{side}_tw"] and asymptotic == row[f"n_{side}"]
                if isinstance(rule, str):
                    assert asymptotic == row[f"n_{side}_{rule}"]
            assert int(Bulk(rule, rate).mask(store[index]).sum()) == p - row["n_above_tw"] - row["n_below_tw"]
            assert int(Bulk(rule, None).mask(store[index]).sum()) == p - row["n_above"] - row["n_below"]
    assert store[0].name == "0" and int(Outliers("above").mask(store[0]).sum()) > 0


# Overlaps with the activations


def collected(model: nn.Module, outputs: bool = True) -> ActivationCovariances:
    ids = (17 * torch.arange(24)[:, None] + 7 * torch.arange(12)) % 100
    batches = [{"input_ids": rows} for rows in ids.split(8)]
    return RMTAnalyzer(model).collect(batches, outputs=outputs, progress=False)


def test_overlaps_are_those_of_a_report(make_model, tmp_path: Path) -> None:
    model = make_model("bert", num_hidden_layers=1)
    covariances = collected(model)
    report = RMTAnalyzer(model).analyze(covariances=covariances, workers=1, progress=False)
    for folder in (None, tmp_path, tmp_path):
        pruner = SVDPruner(model, folder=folder, covariances=covariances, workers=1, progress=False)
        pruner.editor.store.prepare(range(len(pruner.matrices)))
        chosen = 0
        for index, result in enumerate(report.values()):
            factored = pruner.editor.store[index]
            assert factored.name == result.name
            for side, expected in zip(SIDES, (result.right_overlap, result.left_overlap), strict=True):
                assert expected is not None
                found = factored.overlap(side)
                torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-6, equal_nan=True)
                assert (found.compared, found.tokens) == (expected.compared, expected.tokens)
                for level in (0.5, 0.99):
                    mask = Overlapping(level, side).mask(factored)
                    assert torch.equal(mask, expected.values > expected.null_quantile(level))
                    chosen += int(mask.sum())
        assert 0 < chosen < 4 * sum(len(result.s) for result in report.values())
        edit = pruner.remove(Overlapping(0.9), roles="query")
        assert torch.equal(edit.masks[edit.names[0]], Overlapping(0.9).mask(pruner.editor.store[0]))
        pruner.restore()


def test_there_are_no_overlaps_to_select_by(make_model) -> None:
    model = make_model("bert", num_hidden_layers=1)
    before = model.encoder.layer[0].attention.self.query.weight.clone()
    plain = SVDPruner(model)
    with pytest.raises(ValueError, match=r"query: overlaps need the activations: SVDPruner\(model, covariances=RMTA"):
        plain.remove(Overlapping(), roles="query")
    one_side = SVDPruner(model, covariances=collected(model, outputs=False))
    with pytest.raises(ValueError, match=r"query: the covariances have none of its outputs \(collect with outputs=Tr"):
        one_side.remove(Overlapping(side="left"), roles="query")
    assert torch.equal(model.encoder.layer[0].attention.self.query.weight, before)
    assert not plain.edits and not one_side.edits
    one_side.remove(Overlapping(), roles="query")


def test_covariances_of_another_model(make_model) -> None:
    model = make_model("bert", num_hidden_layers=1)
    covariances = collected(model)
    with pytest.raises(ValueError, match="covariances are of another model, or of other roles and blocks: they lack"):
        SVDPruner(make_model("bert"), covariances=covariances)
    with pytest.raises(ValueError, match=r"another model: encoder.*intermediate.dense has 96 outputs, they have 128"):
        SVDPruner(make_model("bert", num_hidden_layers=1, intermediate_size=96), covariances=covariances)
    other = make_model("bert", num_hidden_layers=1)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2)
    before = other.encoder.layer[0].output.dense.weight.clone()
    pruner = SVDPruner(other, covariances=covariances)
    with pytest.raises(
        ValueError, match=r"output\.dense: the covariances were collected with other weights than these"
    ):
        pruner.remove(Outliers(), blocks=0)
    assert torch.equal(other.encoder.layer[0].output.dense.weight, before) and not pruner.edits
    SVDPruner(other, covariances=covariances.for_any_weights()).remove(Overlapping(), blocks=0)


def test_what_another_store_has_factored_is_adopted_where_weights_are_equal(counted: list[tuple[int, ...]]) -> None:
    first = prepared(layers())
    count, other = len(counted), layers()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    store = store_of(other)
    store.adopt(first)
    store.prepare(range(len(store.matrices)))
    assert len(counted) == count + 1, "the one that differs"
    assert [store[i] is first[i] for i in range(len(store.matrices))] == [False] + [True] * (len(store.matrices) - 1)
