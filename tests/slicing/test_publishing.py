"""A sliced model is saved with a card and its record: all of it or nothing, and never over another model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from hf_rmt import Decile, Energy, SVDPruner, Width
from hf_rmt.models import families
from hf_rmt.slicing.keep import Keep
from hf_rmt.slicing.publishing import push_sliced, read_slice, refuse_another_model, save_sliced

from .conftest import StreamModel

TOKENS = torch.tensor([[5, 17, 42, 7, 3]])
WORDS = [f"w{number}" for number in range(76)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Name -> what to keep and the options; its architecture has both forms.
SLICES: dict[str, tuple[Keep, dict[str, Any]]] = {
    "plain": (0.8, {"form": "plain"}),
    "registered": (Energy(0.9), {"form": "registered"}),
    "per block": (Width(0.5), {"per_block": True}),
}

Maker = Callable[[str], Any]


def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [" ".join(WORDS[i] for i in torch.randint(76, (20,), generator=generator)) for _ in range(20)]


@pytest.fixture
def base(stream_model: StreamModel, tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer and a card, in a folder whose path concerns nobody."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "b", *WORDS])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    folder = tmp_path / "secret" / "base"
    stream_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    return folder


@pytest.fixture
def make(base: Path) -> Maker:
    """One of ``SLICES``."""

    def make(name: str) -> Any:
        keep, options = SLICES[name]
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return SVDPruner(model).slice(keep, texts(), progress=False, **options)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def code_under(card: ModelCard, heading: str) -> str:
    return card.text.split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]


# What is written


@pytest.mark.parametrize("name", SLICES)
def test_it_loads_as_it_was(name: str, make: Maker, tmp_path: Path) -> None:
    small = make(name)
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight[3, 4] += 1  # as it is now, not as it was sliced
    folder = save_sliced(small, tmp_path / "out")
    assert folder == tmp_path / "out"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(small))
    assert ("hf_rmt" in (folder / "config.json").read_text()) == (name != "plain")
    assert transformers.AutoTokenizer.from_pretrained(folder)("a b")["input_ids"] == [2, 3]
    assert set(contents(folder)) == set(json.loads((folder / "hf_rmt.json").read_text())["files"])
    assert not any(b"secret" in data for data in contents(folder).values())


@pytest.mark.parametrize("name", SLICES)
def test_the_record_is_read_again(name: str, make: Maker, base: Path, tmp_path: Path) -> None:
    small = make(name)
    assert (small.sliced.model, small.sliced.revision) == (str(base), None)
    folder = save_sliced(small, tmp_path / "out", metrics={"before": {"perplexity": 3}, "after": {"perplexity": 4.5}})
    assert read_slice(folder) == dataclasses.replace(small.sliced, model="base")
    described = json.loads((folder / "hf_rmt.json").read_text())
    assert described["base"] == {"model": "base", "revision": None}
    assert described["architecture"] == "LlamaForCausalLM"
    assert described["metrics"] == {"before": {"perplexity": 3.0}, "after": {"perplexity": 4.5}}


def test_what_was_loaded_is_saved_again_with_its_record(make: Maker, tmp_path: Path) -> None:
    first = save_sliced(make("plain"), tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(first)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no record of a slice.*read_slice\(folder\) gives it"):
        save_sliced(loaded, tmp_path / "second")
    loaded.sliced = read_slice(first)
    second = contents(save_sliced(loaded, tmp_path / "second"))
    assert second.keys() == contents(first).keys()
    assert second["hf_rmt.json"] == (first / "hf_rmt.json").read_bytes()
    assert second["model.safetensors"] == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize("described", [None, "", "[]", '{"base": {}}', '{"slice": {"width": 3}}'])
def test_no_record_to_read(described: str | None, tmp_path: Path) -> None:
    if described is not None:
        (tmp_path / "hf_rmt.json").write_text(described)
    with pytest.raises(ValueError, match=r"holds no hf_rmt\.json of a sliced model"):
        read_slice(tmp_path)


# The card


@pytest.mark.parametrize("name", SLICES)
def test_the_card_says_what_was_kept(name: str, make: Maker, tmp_path: Path) -> None:
    small = make(name)
    made = small.sliced
    card = ModelCard.load(save_sliced(small, tmp_path / "out") / "README.md")
    text = " ".join(card.text.split())
    assert "`base` with a narrower residual stream" in text and f"Asked for: {made.keep}." in text
    assert re.search(rf"\| width of .*\| 48 \| {made.width} \| {made.width / 48:.1%}".replace("%", " %"), card.text)
    parameters = [sum(p.numel() for p in small.parameters()), made.original_parameters]
    row = f"| {parameters[1]:,} | {parameters[0]:,} | {100 * parameters[0] / parameters[1]:.1f} % |"
    assert f"a tied head counted once {row}" in text
    assert f"On {made.tokens:,} tokens" in text and f"hold {100 * made.energy:.2f} % of the energy" in text
    assert ("One basis serves the whole model" in text, "has a basis of its own" in text) == (
        (False, True) if name == "per block" else (True, False)
    )
    assert f"rounded down from {made.rounded_from}" in text or made.rounded_from == made.width
    for identifier in ("2410.17770", "2401.15024", "ashkboos2024slicegpt"):
        assert identifier in text
    assert "{{ " not in card.text and "{%" not in card.text and "\n\n\n" not in card.text


def test_a_width_that_was_rounded_is_told(make: Maker, tmp_path: Path) -> None:
    small = make("plain")
    small.sliced = dataclasses.replace(small.sliced, rounded_from=small.sliced.width + 3)
    assert "was rounded down from" in (save_sliced(small, tmp_path / "out") / "README.md").read_text()
    small.sliced = dataclasses.replace(small.sliced, rounded_from=small.sliced.width)
    assert "rounded" not in (save_sliced(small, tmp_path / "out2") / "README.md").read_text()


def test_the_metadata_are_those_of_the_form(make: Maker, tmp_path: Path) -> None:
    for name, library in (("plain", "transformers"), ("registered", "hf_rmt"), ("per block", "hf_rmt")):
        data = ModelCard.load(save_sliced(make(name), tmp_path / name) / "README.md").data
        assert data.to_dict() == {
            "library_name": library,
            "pipeline_tag": "text-generation",
            "license": "mit",
            "language": "en",
            "tags": ["hf_rmt", "random-matrix-theory", "sliced"],
        }


def test_the_card_says_how_each_form_loads_and_why_one_does_not(make: Maker, tmp_path: Path) -> None:
    plain = ModelCard.load(save_sliced(make("plain"), tmp_path / "plain") / "README.md").text
    assert "an ordinary `LlamaForCausalLM`, which loads with transformers alone" in plain
    assert "import hf_rmt" not in plain and "pip install" not in plain
    registered = ModelCard.load(save_sliced(make("per block"), tmp_path / "registered") / "README.md").text
    for needed in ("pip install hf_rmt\n", "import hf_rmt\n", "Without it loading stops with a mismatch of sizes"):
        assert needed in registered
    assert "transformers alone" not in registered


@pytest.mark.parametrize("name", SLICES)
def test_the_code_on_the_card_runs(name: str, make: Maker, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Once the original and the texts are where it looks for them."""
    small = make(name)
    card = ModelCard.load(save_sliced(small, tmp_path / "out") / "README.md")
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(code_under(card, "How it was made"), made)
    again = made["sliced"].state_dict()
    assert all(torch.equal(again[key], value) for key, value in small.state_dict().items())
    exec(code_under(card, "Use"), made)
    assert torch.equal(logits(made["model"]), logits(small))
    assert made["tokenizer"]("a")["input_ids"] == [2]


def test_scores_before_and_after(make: Maker, tmp_path: Path) -> None:
    metrics = {"before": {"perplexity": 44.2}, "after": {"perplexity": 45.346}, "dataset": "Salesforce/wikitext"}
    card = ModelCard.load(save_sliced(make("plain"), tmp_path / "out", metrics=metrics) / "README.md")
    assert "| perplexity | 44.2 | 45.35 |" in card.text
    assert "Before and after slicing, on Salesforce/wikitext." in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "Salesforce/wikitext",
        "perplexity",
        45.346,
    )


# Folders


def test_another_model_is_not_overwritten_unasked(make: Maker, base: Path, tmp_path: Path) -> None:
    small = make("plain")
    for there in (base, save_sliced(make("registered"), tmp_path / "earlier")):  # which nothing tells apart
        before = contents(there)
        with pytest.raises(ValueError, match=r"not made from these weights of base.*overwrite=True"):
            save_sliced(small, there)
        with pytest.raises(ValueError, match=r"not made from these weights of base.*overwrite=True"):
            refuse_another_model(transformers.AutoModelForCausalLM.from_pretrained(base), there)
        assert contents(there) == before
    refuse_another_model(small, tmp_path / "earlier", overwrite=True)
    folder = save_sliced(small, tmp_path / "earlier", overwrite=True)
    assert set(contents(folder)) == set(json.loads((folder / "hf_rmt.json").read_text())["files"])
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), logits(small))


def test_an_earlier_slice_of_the_same_commit_is_replaced(make: Maker, tmp_path: Path) -> None:
    small = make("plain")
    small.sliced = dataclasses.replace(small.sliced, model="you/base", revision=COMMIT, on_hub=True)
    folder = save_sliced(small, tmp_path / "out", metrics={"before": {"perplexity": 3.0}})
    (folder / "notes.txt").write_text("mine")
    assert save_sliced(small, folder) == folder
    assert (folder / "notes.txt").is_file() and "## Scores" not in (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "you/base" and f"(revision `{COMMIT}`)" in card.text
    assert f'from_pretrained("you/base", revision="{COMMIT}")' in code_under(card, "How it was made")
    small.sliced = dataclasses.replace(small.sliced, revision=COMMIT[::-1])
    with pytest.raises(ValueError, match="not made from these weights of you/base"):
        save_sliced(small, folder)


def test_a_folder_is_no_model_of_the_hub_of_its_name(make: Maker, tmp_path: Path, monkeypatch: Any) -> None:
    """Nor for a folder of that name that happens to be here."""
    cache, here = tmp_path / "cache", tmp_path / "here" / "base"
    cached = cache / "models--base" / "snapshots" / COMMIT
    for folder in (cached, here):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Another\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(here.parent)
    first = save_sliced(make("plain"), tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(first)
    loaded.sliced = read_slice(first)
    data = ModelCard.load(save_sliced(loaded, tmp_path / "second") / "README.md").data
    assert (data.base_model, data.get("license")) == (None, None)
    assert json.loads((tmp_path / "second" / "hf_rmt.json").read_text())["base"]["revision"] is None


def test_what_prepares_images_is_kept_when_a_slice_is_saved_again(stream_model: StreamModel, tmp_path: Path) -> None:
    base = tmp_path / "base"
    stream_model("vit").save_pretrained(base)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(base)
    model = transformers.AutoModelForImageClassification.from_pretrained(base)
    images = [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(3)]
    first = save_sliced(SVDPruner(model).slice(0.8, images, progress=False), tmp_path / "first")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(first)
    loaded.sliced = read_slice(first)
    shutil.rmtree(base)
    second = save_sliced(loaded, tmp_path / "second")
    assert contents(second).keys() == contents(first).keys() and (second / "preprocessor_config.json").is_file()


def test_the_card_says_where_a_declaration_is_needed(make: Maker, tmp_path: Path, monkeypatch: Any) -> None:
    small, own = make("registered"), families._OWN["llama"]
    assert "register_family" not in (save_sliced(small, tmp_path / "own") / "README.md").read_text()
    monkeypatch.setitem(families._FAMILIES, "llama", functools.partial(own))
    text = " ".join((save_sliced(small, tmp_path / "other") / "README.md").read_text().split())
    assert "give the one that this model was sliced by to `hf_rmt.register_family` before it is loaded" in text


def test_slices_and_pruned_models_do_not_replace_each_other(make: Maker, base: Path, tmp_path: Path) -> None:
    small = make("plain")
    small.sliced = dataclasses.replace(small.sliced, model="you/base", revision=COMMIT, on_hub=True)
    pruner = SVDPruner(transformers.AutoModelForCausalLM.from_pretrained(base), workers=1)
    pruner.origin |= {"model": "you/base", "revision": COMMIT}
    pruner.remove(Decile(10), roles="key")
    pruned, sliced = pruner.save_pretrained(tmp_path / "pruned"), save_sliced(small, tmp_path / "sliced")
    with pytest.raises(ValueError, match="not made from these weights of you/base"):
        save_sliced(small, pruned)
    with pytest.raises(ValueError, match="not made from these weights of you/base"):
        pruner.save_pretrained(sliced)


@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_all_as_it_was(there: bool, make: Maker, tmp_path: Path, monkeypatch: Any) -> None:
    def no_space(*_args: object, **_options: object) -> None:
        raise OSError("no space left")

    folder = tmp_path / "out"
    if there:
        save_sliced(make("registered"), folder)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr("hf_rmt.hub.card_of", no_space)
        with pytest.raises(OSError, match="no space left"):
            save_sliced(make("plain"), folder, overwrite=True)
    assert folder.exists() == there and contents(folder) == before


def test_a_save_that_was_killed_is_done_again(make: Maker, tmp_path: Path) -> None:
    """What it left in the place of a model is nobody else's, unless another file is there."""
    small, folder = make("plain"), tmp_path / "out"
    expected = contents(save_sliced(small, folder))
    for moved in (["config.json"], ["config.json", "generation_config.json"], ["config.json", "model.safetensors"]):
        (folder / ".incoming-model").mkdir()
        for name in moved:  # which were still to come
            (folder / name).rename(folder / ".incoming-model" / name)
        refuse_another_model(small, folder)
        assert contents(save_sliced(small, folder)).keys() == expected.keys()
    (folder / ".incoming-model").mkdir()
    (folder / "config.json").rename(folder / ".incoming-model" / "config.json")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"another's")
    with pytest.raises(ValueError, match="not made from these weights of base"):
        save_sliced(small, folder)


# What cannot be saved


def test_models_without_a_slice(make: Maker, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    dense = transformers.AutoModelForCausalLM.from_pretrained(base)
    for act in (lambda model: save_sliced(model, tmp_path / "out"), lambda model: push_sliced(model, "me/out")):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no record of a slice: slice_model makes a model wi"):
            act(dense)
        with pytest.raises(ValueError, match="Linear is no model of transformers"):
            act(torch.nn.Linear(3, 3))
    adapted = get_peft_model(make("registered"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"has adapters in it.*merge_and_unload"):
        save_sliced(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged: Any = adapted.merge_and_unload()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(save_sliced(merged, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": {"perplexity": 3}}, ValueError, "metrics has 'perplexity'"),
        ({"metrics": 3}, TypeError, "metrics is 3: give"),
        ({"metrics": {"after": {"perplexity": "low"}}}, TypeError, r"metrics\['after'\] is"),
        ({"tokenizer": "llama"}, TypeError, "tokenizer is 'llama', which has no save_pretrained"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type, message: str, make: Maker, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        save_sliced(make("plain"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
