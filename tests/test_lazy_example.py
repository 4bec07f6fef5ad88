from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_limits

from hf_rmt.theory.lazy import decay_factor

_SCRIPT = Path(__file__).parents[1] / "examples" / "lazy_regime.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks and matrices: threads cost more than they bring."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lazy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lazy_regime", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lazy_regime"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def blobs(lazy: ModuleType) -> Any:
    """Three classes whose means differ in a few of 20 directions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (700,), generator=generator)
    x = torch.randn(700, 20, generator=generator) + 2 * torch.randn(3, 20, generator=generator)[y]
    return lazy.Data("blobs", (x[:500], y[:500]), (x[500:], y[500:]))


@pytest.fixture(scope="module")
def recipe(lazy: ModuleType) -> Any:
    return lazy.Recipe(epochs=2, batch=32)


@pytest.fixture(scope="module")
def results(lazy: ModuleType, blobs: Any, recipe: Any) -> Any:
    return lazy.measure(blobs, lazy.networks_of(32, 0.05), recipe, seeds=2)


# data


def write_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The binary version in small: two training files and a test file; returns training classes and pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 240).astype(np.uint8)
    pixels = rng.integers(0, 100, (240, 3072)).astype(np.uint8) + 10 * labels[:, None]
    rows = np.concatenate([labels[:, None], pixels], axis=1)
    for name, part in (("data_batch_1", rows[:80]), ("data_batch_2", rows[80:160]), ("test_batch", rows[160:])):
        (folder / f"{name}.bin").write_bytes(part.tobytes())
    return labels[:160], pixels[:160]


def test_binary_images_are_read_and_standardised(lazy: ModuleType, tmp_path: Path) -> None:
    labels, pixels = write_cifar(tmp_path / "cifar-10-batches-bin")
    for source in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        data = lazy.load(str(source))
        assert data.name == "CIFAR-10" and data.classes == 10
        assert data.train[1].tolist() == labels.tolist()
        expected = (pixels - pixels.mean(0)) / pixels.std(0, ddof=1)
        np.testing.assert_allclose(data.train[0].numpy(), expected, atol=1e-4)
        assert data.test[0].shape == (80, 3072) and data.test[0].dtype == torch.float32
    few = lazy.load(str(tmp_path), rows=30)
    assert few.train[0].shape == (30, 3072) and len(few.test[1]) == 80
    assert torch.equal(few.train[1], lazy.load(str(tmp_path), rows=30).train[1])


def test_pickles_are_not_opened(lazy: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(SystemExit, match="take CIFAR-10's binary version"):
        lazy.load(str(tmp_path))


def test_images_of_a_data_set_are_read(lazy: ModuleType, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(1).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"img": list(pixels), "label": [i % 3 for i in range(12)]}, features=features)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "small")
    name, train, test = lazy.from_datasets(str(tmp_path / "small"))
    assert name == "small"
    np.testing.assert_array_equal(train[0], pixels.reshape(12, 48))
    assert test[1].tolist() == [i % 3 for i in range(12)]


def test_sentences_become_features(lazy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.tsv").write_text('label\tsentence\n0\ta "quote\n1\tgood\n1\tvery good indeed\n')
    (tmp_path / "dev.tsv").write_text("label\tcontent\n1\tfine\n0\tbad film\n")
    monkeypatch.setattr(lazy, "sentence_features", lambda texts: torch.tensor([[float(len(t)), 1.0] for t in texts]))
    data = lazy.load(str(tmp_path))
    assert data.name == "sentence features of SST-2"
    assert data.train[1].tolist() == [0, 1, 1] and data.test[1].tolist() == [1, 0]
    lengths = np.array([8, 4, 16])
    np.testing.assert_allclose(data.test[0][:, 0], (np.array([4, 8]) - lengths.mean()) / lengths.std(ddof=1), rtol=1e-6)


def test_sentence_features_are_means_over_tokens_without_padding(lazy: ModuleType, minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["a dull film", "good", "one of the best and most moving films of the year"]
    features = lazy.sentence_features(texts)
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    for text, found in zip(texts, features, strict=True):
        with torch.no_grad():
            alone = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_chance_is_the_most_frequent_class(lazy: ModuleType) -> None:
    some = torch.zeros(5, 2), torch.tensor([0, 1, 1, 2, 1])
    assert lazy.Data("x", some, some).chance == pytest.approx(0.6)


# networks


def test_sizes_are_those_of_the_paper(lazy: ModuleType) -> None:
    networks = {network.name: network for network in lazy.networks_of(512, 1e-3)}
    assert networks["lazy"].widths == networks["features"].widths == (512, 512, 512)
    assert networks["lazy"].alpha == 15 and networks["features"].alpha == 1
    assert networks["whole"].widths == networks["frozen"].widths == (512, 512, 256, 256)
    model = lazy.MLP(3072, networks["whole"].widths, 10, seed=0)
    shapes = [tuple(layer.weight.shape) for layer in (*model.layers, model.head)]
    assert shapes == [(512, 3072), (512, 512), (256, 512), (256, 256), (10, 256)]
    assert float(model.layers[0].weight.detach().std()) == pytest.approx((2 / 3072) ** 0.5, rel=0.01)


def test_training_learns_and_is_repeatable(lazy: ModuleType, blobs: Any, recipe: Any) -> None:
    network = lazy.Network("features", (32, 32, 32))
    model, again = (lazy.train(network, blobs, recipe, seed=3) for _ in range(2))
    assert lazy.accuracy(model, blobs) > blobs.chance + 0.3
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_frozen_layers_stay_and_the_others_do_not(lazy: ModuleType, blobs: Any, recipe: Any) -> None:
    network = lazy.Network("frozen", (32, 32, 16, 16), frozen=2)
    model, start = lazy.train(network, blobs, recipe, 0), lazy.MLP(20, network.widths, 3, 0)
    kept = [torch.equal(a.weight, b.weight) for a, b in zip(model.layers, start.layers, strict=True)]
    assert kept == [True, True, False, False]


def test_without_a_gradient_training_rescales(lazy: ModuleType, blobs: Any, recipe: Any) -> None:
    network = lazy.Network("decay alone", (32, 32, 32), decay=0.05, gradient=0.0)
    model, start = lazy.train(network, blobs, recipe, 0), lazy.MLP(20, network.widths, 3, 0)
    factor = decay_factor(recipe.rates(500), 0.05, recipe.momentum)
    assert 0.2 < factor < 0.9
    torch.testing.assert_close(model.layers[1].weight, factor * start.layers[1].weight, rtol=1e-4, atol=1e-7)


def test_each_epoch_is_a_new_order_of_all_rows(lazy: ModuleType) -> None:
    recipe = lazy.Recipe(epochs=2, batch=10)
    found = list(lazy.batches(35, recipe, 0))
    assert [len(batch) for batch in found] == [10] * 6 and len(recipe.rates(35)) == 6
    first, second = torch.cat(found[:3]), torch.cat(found[3:])
    assert len(first.unique()) == 30 and not torch.equal(first, second)


# measurements


def test_removal_leaves_the_network_as_it_was(lazy: ModuleType, blobs: Any) -> None:
    network = lazy.Network("whole", (32, 32, 16, 16), cut=2)
    model = lazy.MLP(20, network.widths, 3, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = lazy.removals(network, model, blobs)
    assert rows[0]["selection"] == "none" and rows[0]["drop"] == 0
    shares = [row["share"] for row in rows[1 : 1 + len(lazy.SHARES)]]
    assert shares == pytest.approx(lazy.SHARES, abs=0.03)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_removed_parts_are_those_of_a_plain_svd(lazy: ModuleType, blobs: Any) -> None:
    network = lazy.Network("whole", (32, 32, 16, 16), cut=2)
    model, other = lazy.MLP(20, network.widths, 3, 0), lazy.MLP(20, network.widths, 3, 0)
    found = next(row for row in lazy.removals(network, model, blobs) if row["selection"] == str(lazy.Bottom(0.5)))
    for layer in other.layers[:2]:
        u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        s[len(s) // 2 :] = 0
        layer.weight.data = ((u * s) @ vh).float()
    assert found["accuracy"] == pytest.approx(lazy.accuracy(other, blobs), abs=1e-9)
    assert found["share"] == pytest.approx(0.5)


def test_spectra_of_a_rescaled_network(lazy: ModuleType) -> None:
    network = lazy.Network("decay alone", (64, 64, 64))
    model, start = (lazy.MLP(40, network.widths, 3, 0) for _ in range(2))
    for layer in model.layers:
        layer.weight.data *= 0.25
    for row in lazy.spectra(network, model, start, 0.25):
        assert row["sigma_ratio"] == pytest.approx(1, rel=1e-6)
        assert row["change"] == pytest.approx(0, abs=1e-6)
        assert row["mp_distance"] == pytest.approx(row["mp_distance_before"], abs=1e-6)


def test_tables_hold_every_network_and_seed(lazy: ModuleType, results: Any) -> None:
    names = [network.name for network in lazy.networks_of(32, 0.05)]
    assert results.removal.groupby(["network", "seed"]).size().unique().tolist() == [len(lazy.SHARES) + 3]
    assert set(results.removal["network"]) == set(names) - {"decay alone"}
    assert results.spectra.groupby("network")["block"].nunique().to_dict() == {
        name: 4 if name in ("whole", "frozen") else 3 for name in names
    }
    assert not results.removal.isna().any(axis=None) and not results.spectra.isna().any(axis=None)
    drop = (results.removal["accuracy"] <= 1) & (results.removal["drop"] <= 1 / (1 - results.chance) + 1)
    assert drop.all()


def test_claims_are_the_numbers_of_the_tables(lazy: ModuleType, results: Any) -> None:
    claims = {claim.text: claim for claim in lazy.claims_of(results)}
    removal = results.removal.set_index(["network", "selection", "seed"])
    for seed in range(2):
        of = {name: removal.loc[(name, "none", seed), "accuracy"] for name in ("features", "lazy")}
        expected = of["features"] - of["lazy"]
        assert claims["features are more accurate than lazy"].values[seed] == pytest.approx(expected)
        mass = removal.loc[("frozen", str(lazy.MASS), seed), "drop"]
        assert claims["frozen: drop without 80 % of the mass"].values[seed] == pytest.approx(mass)
    assert claims["decay alone: change besides the factor"].verdict() == "holds"
    change = results.spectra.groupby("network")["change"].max()
    assert change["lazy"] < change["features"] / 2


@pytest.mark.parametrize(
    ("values", "above", "below"),
    [
        ([1.0, 1.1, 0.9], "holds", "does not hold"),
        ([-1.0, -1.1, -0.9], "does not hold", "holds"),
        ([1.0, -1.0, 0.1], "undecided", "undecided"),
        ([5.0], "undecided", "undecided"),
        ([0.0, 0.0], "undecided", "undecided"),
        ([0.5, 0.5], "holds", "does not hold"),
    ],
)
def test_a_claim_is_decided_by_its_whole_interval(
    lazy: ModuleType, values: list[float], above: str, below: str
) -> None:
    found = [lazy.Claim("x", "", np.array(values), 0.0, side).verdict() for side in (True, False)]
    assert found == [above, below]


def test_the_interval_is_students(lazy: ModuleType) -> None:
    import scipy.stats

    values = np.array([0.3, 0.5, 0.1, 0.25])
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert lazy.Claim("x", "", values, 0.0).interval() == pytest.approx(tuple(expected))


# the command


def test_the_command_writes_tables_and_picture(
    lazy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    out = tmp_path / "out"
    arguments = [str(tmp_path), "--out", str(out), "--seeds", "2", "--epochs", "1", "--width", "16", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lazy_regime.py", *arguments])
    lazy.main()
    assert {path.name for path in out.iterdir()} == {
        "removal.csv",
        "spectra.csv",
        "claims.csv",
        "lazy_regime.png",
        "lazy_regime.pdf",
    }
    for name in ("removal", "spectra", "claims"):
        assert pd.read_csv(out / f"{name}.csv")["data"].unique().tolist() == ["CIFAR-10"]
    printed = capsys.readouterr().out
    assert "claims, on CIFAR-10" in printed and "decay alone: change besides the factor" in printed
