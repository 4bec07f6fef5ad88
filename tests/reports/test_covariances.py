from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rmt.reports import store
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments

INPUTS = {"query": "query", "key": "query", "value": "query", "up": "up"}
OUTPUTS = {"up": "up.out"}
WIDTHS = {"query": 6, "up": 9, "up.out": 4}


def activations(tokens: int, seed: int = 0, **widths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tokens, n, generator=generator, dtype=torch.float64) + 1
        for key, n in (WIDTHS | widths).items()
    }


def covariances_of(data: dict[str, torch.Tensor], **changes: Any) -> ActivationCovariances:
    tokens = len(next(iter(data.values())))
    own: dict[str, Any] = {
        "sums": {key: Moments.of(x) for key, x in data.items()},
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "settings": {"model": "tiny", "batches": 2, "tokens": tokens, "dropout": False},
        "fingerprints": {"query": "ab", "up": "cd"},
    }
    return ActivationCovariances(**(own | changes))


@pytest.fixture
def covariances() -> ActivationCovariances:
    return covariances_of(activations(50))


def assert_same(a: ActivationCovariances, b: ActivationCovariances, rtol: float = 0.0) -> None:
    assert list(a) == list(b)
    for name in a:
        pairs = [(a[name], b[name])]
        assert (a.output(name) is None) == (b.output(name) is None)
        if (mine := a.output(name)) is not None and (theirs := b.output(name)) is not None:
            pairs.append((mine, theirs))
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.outer, theirs.outer, rtol=rtol, atol=0)
            torch.testing.assert_close(mine.total, theirs.total, rtol=rtol, atol=1e-12 if rtol else 0)
            assert (mine.tokens, mine.eps) == (theirs.tokens, theirs.eps)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "covariances.json").read_text())


# Reading


def test_matrices_that_read_the_same_share_their_moments(covariances: ActivationCovariances) -> None:
    assert list(covariances) == ["query", "key", "value", "up"] and len(covariances) == 4
    assert covariances["query"] is covariances["key"] is covariances["value"]
    assert covariances["up"] is not covariances["query"]
    assert covariances.shared("key") == ["query", "key", "value"] and covariances.shared("up") == ["up"]
    assert covariances.key("value") == "query" and covariances.key("up", output=True) == "up.out"
    assert covariances.key("value", output=True) is None and covariances.key("nothing") is None


def test_moments_are_those_of_the_activations(covariances: ActivationCovariances) -> None:
    data = activations(50)
    torch.testing.assert_close(covariances["key"].outer, data["query"].mT @ data["query"])
    output = covariances.output("up")
    assert output is not None
    torch.testing.assert_close(output.total, data["up.out"].sum(0))
    assert covariances.output("query") is None


def test_an_unknown_matrix_is_named_with_the_nearest(covariances: ActivationCovariances) -> None:
    with pytest.raises(KeyError, match=r"'down' were collected; the nearest are none"):
        covariances["down"]
    assert "down" not in covariances and covariances.get("down") is None and covariances.output("down") is None
    names = [f"layer.{block}.query" for block in range(9)]
    many = covariances_of(activations(5), inputs=dict.fromkeys(names, "query"))
    with pytest.raises(KeyError, match=r"the nearest are layer\.8\.query, layer\.\d\.query, layer\.\d\.query\""):
        many["layer.88.query"]


def test_a_path_in_a_headed_model_finds_its_matrix(covariances: ActivationCovariances) -> None:
    assert covariances["bert.query"] is covariances["query"] is covariances.get("bert.query.weight")
    assert covariances.output("bert.up") is covariances.output("up")
    assert covariances.shared("bert.key") == ["query", "key", "value"]
    assert "bert.query" not in covariances  # of a composite model that could be another matrix
    covariances = covariances_of(activations(5), inputs={"0.query": "query", "query": "query"})
    assert covariances.get("model.0.query") is None  # either could be meant


def test_the_table_has_a_row_for_each_distinct_covariance(covariances: ActivationCovariances) -> None:
    table = covariances.to_pandas()
    assert table.to_dict("list") == {
        "key": ["query", "up", "up.out"],
        "side": ["input", "input", "output"],
        "width": [6, 9, 4],
        "tokens": [50, 50, 50],
        "matrices": ["query, key, value", "up", "up"],
    }


def test_it_says_what_it_is(covariances: ActivationCovariances) -> None:
    assert repr(covariances) == "ActivationCovariances('tiny', 4 matrices, 3 distinct, 50 tokens, uncentred)"
    assert repr(covariances.with_centring()).endswith("50 tokens, centred)")


def test_centring_and_weights_are_changed_in_a_copy(covariances: ActivationCovariances) -> None:
    assert not covariances.centred
    centred, anyone = covariances.with_centring(), covariances.for_any_weights()
    assert centred.centred and not centred.with_centring(False).centred and not covariances.centred
    assert anyone.fingerprints == {} and covariances.fingerprints == {"query": "ab", "up": "cd"}
    assert_same(centred, covariances)
    assert_same(anyone, covariances)


def test_identity_tells_data_and_centring_apart(covariances: ActivationCovariances) -> None:
    assert covariances.identity() == covariances_of(activations(50)).identity()
    others = [covariances_of(activations(50, seed=1)), covariances.with_centring(), covariances + covariances]
    assert all(other.identity() != covariances.identity() for other in others)
    json.dumps(covariances.identity())  # a report keeps it


# Adding


def test_the_sum_of_two_data_sets_is_that_of_both_at_once() -> None:
    first, second = activations(50), activations(31, seed=1)
    both = {key: torch.cat([x, second[key]]) for key, x in first.items()}
    total = covariances_of(first) + covariances_of(second)
    assert_same(total, covariances_of(both), rtol=1e-12)
    counts = {"batches": 4, "tokens": 81}
    assert total.settings == {"centred": False, "model": "tiny", "dropout": False, "silent": [], "data": [], **counts}
    assert total.fingerprints == {"query": "ab", "up": "cd"} and total["query"] is total["key"]


def test_addition_leaves_its_terms_alone(covariances: ActivationCovariances) -> None:
    outer = covariances["query"].outer.clone()
    covariances + covariances
    assert torch.equal(covariances["query"].outer, outer) and covariances.settings["tokens"] == 50


def test_dropout_anywhere_is_dropout_in_the_sum(covariances: ActivationCovariances) -> None:
    trained = covariances_of(activations(50), settings=covariances.settings | {"dropout": True})
    assert (covariances + trained).settings["dropout"] is (trained + covariances).settings["dropout"] is True


def test_only_covariances_add_up(covariances: ActivationCovariances) -> None:
    with pytest.raises(TypeError):
        covariances + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": INPUTS | {"gate": "up"}}, "different matrices cannot be added; they differ in gate"),
        ({"inputs": {"query": "query", "up": "up"}}, "they differ in key, value"),
        ({"inputs": INPUTS | {"key": "up"}}, "different models cannot be added; the widths of (query|up) differ"),
        ({"outputs": {}}, "they differ in up"),
        ({"fingerprints": {"query": "ab", "up": "xx"}}, r"different weights.*for_any_weights\(\)"),
        ({"settings": {"centred": True}}, r"one is centred and one is not; see with_centring\(\)"),
    ],
)
def test_what_does_not_belong_together_is_not_added(
    covariances: ActivationCovariances, changes: dict[str, Any], message: str
) -> None:
    other = covariances_of(activations(50), **changes)
    for first, second in ((covariances, other), (other, covariances)):
        with pytest.raises(ValueError, match=message):
            first + second


def test_a_matrix_that_no_token_reached_counts_as_zero_tokens() -> None:
    """As one expert in a small part of the data; the order is that of the model."""
    first, second = activations(50), activations(31, seed=1)
    fingerprints = {name: "ab" for name in ("query", "key", "value", "up", "down")}
    settings = {"model": "tiny", "batches": 2, "tokens": 31, "silent": ["up", "down"]}
    part = covariances_of(
        {"query": second["query"]},
        inputs={"query": "query", "key": "query", "value": "query"},
        outputs={},
        settings=settings,
        fingerprints=fingerprints,
    )
    whole = covariances_of(first, settings=settings | {"silent": ["down"]}, fingerprints=fingerprints)
    both = covariances_of(first | {"query": torch.cat([first["query"], second["query"]])})
    for total in (whole + part, part + whole):
        assert_same(total, both, rtol=1e-12)
        assert total.settings["silent"] == ["down"] and total["up"].tokens == 50 and total["key"].tokens == 81
        assert total["query"] is total["key"]
    assert (part + part).settings["silent"] == ["up", "down"] and "up" not in part + part
    unaware = covariances_of(first, inputs={**INPUTS, "gate": "up"}, fingerprints=fingerprints)
    with pytest.raises(ValueError, match="they differ in gate"):  # which the part does not call silent
        part + unaware


def _sharing(data: dict[str, torch.Tensor], groups: dict[str, str], **changes: Any) -> ActivationCovariances:
    sums = {key: Moments.of(data[key]) for key in groups.values()}
    return covariances_of(data, **{"sums": sums, "inputs": groups, "outputs": {}, **changes})


@pytest.mark.parametrize(
    "mine, theirs, apart",
    [
        ("aaaa", "abaa", "acd b"),
        ("abab", "aabb", "a b c d"),
        ("aacc", "abcc", "a b cd"),
        ("aabb", "aabb", "ab cd"),
        ("aacc", "a-dd", "a b cd"),
        ("-bbb", "aabb", "a b cd"),
    ],
)
def test_where_sharing_differs_each_has_a_sum_of_its_own(mine: str, theirs: str, apart: str) -> None:
    """Two letters say whose sum each of four matrices has; a dash, that no token reached it."""
    parts, sums = [], dict.fromkeys("abcd", 0.0)
    for seed, letters in enumerate((mine, theirs)):
        data = activations(20, seed, **dict.fromkeys("abcd", 5))
        groups = {name: key for name, key in zip("abcd", letters, strict=True) if key != "-"}
        silent = {"model": "tiny", "tokens": 20, "silent": [name for name in "abcd" if name not in groups]}
        parts.append(_sharing(data, groups, settings=silent))
        for name, key in groups.items():
            sums[name] = sums[name] + data[key].mT @ data[key]
    total = parts[0] + parts[1]
    for name, expected in sums.items():
        torch.testing.assert_close(total[name].outer, expected)
        assert total[name].tokens == 20 * sum(name in part for part in parts)
    assert {"".join(total.shared(name)) for name in total} == set(apart.split())


def test_other_widths_are_not_added(covariances: ActivationCovariances) -> None:
    with pytest.raises(ValueError, match="different models cannot be added; the widths of up differ"):
        covariances + covariances_of(activations(50, up=8))


# Files


def test_save_and_load_are_inverse(covariances: ActivationCovariances, tmp_path: Path) -> None:
    coarse = Moments(covariances["up"].outer, covariances["up"].total, 50, eps=1e-7)
    sums = {"query": covariances["query"], "up": coarse, "up.out": Moments.of(activations(50)["up.out"])}
    saved = covariances_of(activations(50), sums=sums).with_centring()
    loaded = ActivationCovariances.load(saved.save(tmp_path / "a" / "b"))
    assert_same(loaded, saved)
    assert loaded["up"].eps == 1e-7 and loaded["query"] is loaded["value"]
    assert (loaded.settings, loaded.fingerprints) == (saved.settings, saved.fingerprints)
    assert loaded.identity() == saved.identity()
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "covariances.json",
        "covariances.safetensors",
    ]


def test_what_was_loaded_adds_up(covariances: ActivationCovariances, tmp_path: Path) -> None:
    loaded = ActivationCovariances.load(covariances.save(tmp_path))
    assert_same(loaded + covariances, covariances + covariances)


def test_saving_again_replaces_and_keeps_other_files(covariances: ActivationCovariances, tmp_path: Path) -> None:
    covariances.save(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    (covariances + covariances).save(tmp_path)
    assert ActivationCovariances.load(tmp_path)["query"].tokens == 100
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_folder_without_covariances_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no covariances: there is no covariances\.json"):
        ActivationCovariances.load(tmp_path)


def test_a_truncated_file_is_named(covariances: ActivationCovariances, tmp_path: Path) -> None:
    tensors = covariances.save(tmp_path) / "covariances.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"covariances\.safetensors is missing or damaged"):
        ActivationCovariances.load(tmp_path)
    tensors.unlink()
    with pytest.raises(ValueError, match=r"covariances\.safetensors is missing or damaged"):
        ActivationCovariances.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_manifest_is_named(covariances: ActivationCovariances, tmp_path: Path, text: str) -> None:
    (covariances.save(tmp_path) / "covariances.json").write_text(text)
    with pytest.raises(ValueError, match=r"covariances\.json is no manifest \(covariances\)"):
        ActivationCovariances.load(tmp_path)


def test_files_of_two_savings_are_not_taken_for_one(covariances: ActivationCovariances, tmp_path: Path) -> None:
    covariances.save(tmp_path / "whole")
    sums = {"query": covariances["query"]}
    covariances_of(activations(50), sums=sums, inputs={"query": "query"}, outputs={}).save(tmp_path / "part")
    (tmp_path / "part" / "covariances.safetensors").replace(tmp_path / "whole" / "covariances.safetensors")
    with pytest.raises(ValueError, match=r"covariances\.safetensors lacks .*up"):
        ActivationCovariances.load(tmp_path / "whole")


def test_nothing_is_left_behind_where_saving_fails(
    covariances: ActivationCovariances, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    covariances.save(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(store, "write_manifest", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="no space"):
            (covariances + covariances).save(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(covariances: ActivationCovariances, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        covariances.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_manifest_says_what_was_collected(covariances: ActivationCovariances, tmp_path: Path) -> None:
    manifest = manifest_of(covariances.save(tmp_path))
    assert manifest["settings"] == covariances.settings and manifest["inputs"] == INPUTS
    assert {key: tokens for key, (tokens, _) in manifest["sums"].items()} == dict.fromkeys(WIDTHS, 50)
