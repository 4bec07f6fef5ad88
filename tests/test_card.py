"""What ``save_pretrained`` of a pruner writes: a model as any other, a card, and a report as data."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn

from hf_rmt.model_card import pipeline_tag
from hf_rmt.pruner import SVDPruner
from hf_rmt.reports.sweep import Cell, SweepTable
from hf_rmt.theory.selection import Decile, Mass, Outliers, Random, Rank, Selection
from hf_rmt.theory.selection_names import parse_selection

TOKENS = torch.tensor([[5, 17, 42, 7]])


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hf_rmt.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def words() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def pruner(make_model) -> SVDPruner:
    """A model with the last decile of two of its matrices removed."""
    pruner = SVDPruner(make_model("llama"), workers=1)
    pruner.remove(Decile(10), roles="intermediate")
    return pruner


# The model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("bert_mlm", torch.float32),
        ("gpt2", torch.float16),
        ("mixtral", torch.bfloat16),
        ("t5", torch.float32),
        ("phi3", torch.bfloat16),
    ],
)
def test_the_model_loads_by_transformers_and_is_the_same(family: str, dtype: torch.dtype, make_model, tmp_path) -> None:
    """Fused, stacked, tied and turned matrices."""
    model = make_model(family).to(dtype)
    before = copy.deepcopy(model.state_dict())
    pruner = SVDPruner(model, workers=1)
    pruner.remove(Decile(9) | Decile(10))
    folder = pruner.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(folder)
    state = model.state_dict()
    assert loaded.dtype == dtype and set(loaded.state_dict()) == set(state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert any(not torch.equal(state[name], before[name]) for name in state)
    assert not list(folder.glob(".*")) and not list(folder.glob("*.bin"))


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "device_map"])
def test_an_offloaded_model(offload: str, make_model, pruner: SVDPruner, tmp_path) -> None:
    import accelerate

    model = make_model("llama")
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif offload == "disk_offload":
        accelerate.disk_offload(model, tmp_path / "offloaded", torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "base")
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "disk", "model.layers.1": "disk"}
        model = type(model).from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "offloaded")
    other = SVDPruner(model, workers=1)
    other.remove(Decile(10), roles="intermediate")
    loaded = type(model).from_pretrained(other.save_pretrained(tmp_path / "out"))
    for name, tensor in pruner.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def _save_sharded(model: Any, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    pruner = SVDPruner(model, workers=1)
    pruner.remove(Decile(10), roles="intermediate")
    with torch.no_grad():
        model(TOKENS)  # which leaves the outermost parameters gathered
    assert pruner.save_pretrained(folder) == folder
    (folder / "hf_rmt.json").write_text("{}")
    with pytest.raises((ValueError, RuntimeError), match="not made from these weights"):
        pruner.save_pretrained(folder)


def test_a_model_that_processes_share(make_model, launch, pruner: SVDPruner, tmp_path) -> None:
    launch(_save_sharded, make_model("llama"), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for name, tensor in pruner.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_models_that_cannot_be_saved_so(make_model, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"Sequential is no model of transformers.*save_model"):
        SVDPruner(nn.Sequential(nn.Linear(40, 40))).save_pretrained(tmp_path / "out")
    adapted = get_peft_model(make_model("bert"), LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    with pytest.raises(ValueError, match=r"BertModel has adapters in it.*merge_and_unload"):
        SVDPruner(adapted).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged: Any = adapted.merge_and_unload()
    folder = SVDPruner(merged).save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(
        loaded.encoder.layer[0].attention.self.query.weight, merged.encoder.layer[0].attention.self.query.weight
    )


# The report


SELECTIONS: list[tuple[Selection, dict[str, Any]]] = [
    (Decile(10) | Rank(1), {"roles": ["intermediate", "*output"], "blocks": [0]}),
    (Outliers("above", sigma="init"), {"roles": "query"}),
    (~Mass(0.8, "top"), {"blocks": 1}),
    (Random(Decile(3), seed=2), {}),
]


def test_the_report_says_what_was_removed_and_removes_it_again(make_model, tmp_path) -> None:
    pruner = SVDPruner(make_model("llama"), workers=1)
    for selection, where in SELECTIONS:
        pruner.remove(selection, **where)
    folder = pruner.save_pretrained(tmp_path / "out")
    report, table = read(folder), pruner.affected()
    assert report["hf_rmt"] and report["base"] == {"model": "LlamaForCausalLM", "revision": None}
    assert report["parameters"] == sum(p.numel() for p in pruner.model.parameters())
    pd.testing.assert_frame_equal(pd.DataFrame(report["matrices"])[list(table)].astype(table.dtypes), table)
    written = pd.read_csv(folder / "hf_rmt.csv").astype(table.dtypes)
    pd.testing.assert_frame_equal(written[list(table)], table)
    assert set(report["files"]) == set(contents(folder))

    again = SVDPruner(make_model("llama"), workers=1)
    for edit in report["edits"]:
        again.remove(parse_selection(edit["selection"]), roles=edit["roles"], blocks=edit["blocks"])
    for one, other, said in zip(pruner.edits, again.edits, report["edits"], strict=True):
        assert one.names == other.names == said["matrices"]
        assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.names)
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_the_recipe_of_the_card_makes_the_same_model(make_model, tmp_path, monkeypatch) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    pruner = SVDPruner(transformers.AutoModelForCausalLM.from_pretrained("base"), head=True, workers=1)
    pruner.remove(Decile(10), roles=["lm_head", "key"])
    pruner.remove(keep=Rank(40), roles="*output", blocks=[0, 1])
    card = ModelCard.load(pruner.save_pretrained(tmp_path / "out") / "README.md")
    recipe = card.text.split("## How it was made")[1].split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(recipe, made)
    for name, tensor in pruner.model.state_dict().items():
        assert torch.equal(made["model"].state_dict()[name], tensor), name
    usage = card.text.split("## Use")[1].split("```python\n")[1].split("```")[0]
    exec(usage, made)
    assert torch.equal(made["model"].lm_head.weight, pruner.model.lm_head.weight)


def test_a_removal_that_was_trained_over_is_called_that(pruner: SVDPruner, tmp_path) -> None:
    folder = pruner.save_pretrained(tmp_path / "out")
    assert not read(folder)["trained_since"] and "grown back" not in (folder / "README.md").read_text()
    with torch.no_grad():
        pruner.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    pruner.save_pretrained(folder)
    assert read(folder)["trained_since"] and "grown back" in (folder / "README.md").read_text()


# The card


def card_of(pruner: SVDPruner, folder: Path, **options: Any) -> ModelCard:
    return ModelCard.load(pruner.save_pretrained(folder, **options) / "README.md")


def test_the_card_tells_in_words(pruner: SVDPruner, tmp_path) -> None:
    pruner.remove(Mass(1.0), roles="key", blocks=0)
    pruner.remove(Outliers("above", rate=1e-9), roles="query")
    card = card_of(pruner, tmp_path / "pruned")
    empty = len(pruner.edits[2].empty)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["hf_rmt", "random-matrix-theory", "pruned"]
    assert card.data.base_model is None and card.data.license is None and card.data.eval_results is None
    assert "- `decile:10` of `intermediate`: 2 matrices\n" in card.text
    assert "- `mass:1.0` of `key` in blocks 0: 1 matrix; in 1 of them this is everything\n" in card.text
    assert empty and f"of `query`: 2 matrices; in {empty} of them this is nothing\n" in card.text
    table = pruner.affected()
    touched = table[table["removed"] > 0]
    total = sum(parameter.numel() for parameter in pruner.model.parameters())
    assert f"components of {len(touched)} of its weight matrices" in card.text
    assert f"{100 * touched['parameters'].sum() / total:.1f} % of the {total:,} parameters" in card.text
    rows = table[table["role"] == "intermediate"]
    shares = " | ".join(f"{100 * rows[column].mean():.1f} %" for column in ("mass", "energy"))
    assert f"| intermediate | 2 | {rows['removed'].sum()} | {rows['of'].sum()} | {shares} |" in card.text
    assert "2410.17770" in card.text and "author = {{The hf_rmt maintainers}}" in card.text
    assert "{{ " not in card.text and "{%" not in card.text and "\n\n\n" not in card.text


def test_a_model_of_which_nothing_was_removed(make_model, tmp_path) -> None:
    pruner = SVDPruner(make_model("bert"))
    card = card_of(pruner, tmp_path / "whole", metrics={"before": {"accuracy": 0.5}, "dataset": "glue"})
    assert "Nothing was removed" in card.text and card.data.metrics == ["accuracy"]
    assert read(tmp_path / "whole")["edits"] == [] and read(tmp_path / "whole")["matrices"] == []


def test_tags_of_the_model_are_on_the_card_and_those_of_the_card_not_on_the_model(pruner: SVDPruner, tmp_path) -> None:
    pruner.model.add_model_tags(["mine"])
    card = card_of(pruner, tmp_path / "out")
    assert card.data.tags == ["hf_rmt", "random-matrix-theory", "pruned", "mine"]
    assert pruner.model.model_tags == ["mine"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            "license: mit\nlanguage:\n- en\n- de\ndatasets: glue",
            {"license": "mit", "language": ["en", "de"], "datasets": "glue"},
        ),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", {"license": "other", "license_name": "own"}),
        ("license: other\nlicense_link: https://a.b/c", {"license": "other", "license_link": "https://a.b/c"}),
        ("base_model: someone/else\ntags: [theirs]", {}),
        ("license: [mit", {}),
    ],
)
def test_what_the_card_of_the_original_says_of_its_license(metadata: str, expected, make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path / "secret" / "base")
    (tmp_path / "secret" / "base" / "README.md").write_text(f"---\n{metadata}\n---\n# Base\n")
    pruner = SVDPruner(transformers.AutoModel.from_pretrained(tmp_path / "secret" / "base"))
    card = card_of(pruner, tmp_path / "out")
    found = card.data.to_dict()
    assert {key: value for key, value in found.items() if key not in ("library_name", "tags")} == expected
    assert "`base`, saved" in card.text and read(tmp_path / "out")["base"]["model"] == "base"
    assert not any(b"secret" in data for data in contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("BertModel", None),
        ("T5ForConditionalGeneration", None),
        ("BartForConditionalGeneration", None),
        ("NoSuchModel", None),
    ],
)
def test_pipeline_tag(architecture: str, expected: str | None) -> None:
    assert pipeline_tag(architecture) == expected


# Scores


def test_scores_before_and_after(pruner: SVDPruner, tmp_path) -> None:
    metrics = {"before": {"accuracy": 0.9134, "f1": float("nan")}, "after": {"accuracy": torch.tensor(0.75)}}
    card = card_of(pruner, tmp_path / "out", metrics=metrics | {"dataset": "stanfordnlp/sst2"})
    assert "| accuracy | 0.9134 | 0.75 |\n| f1 | nan |  |\n" in card.text and "on stanfordnlp/sst2" in card.text
    assert read(tmp_path / "out")["metrics"] == {
        "before": {"accuracy": 0.9134, "f1": None},
        "after": {"accuracy": 0.75},
    }
    assert card.data.metrics == ["accuracy"] and card.data.model_name == "out"
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "text-generation",
        "stanfordnlp/sst2",
        "accuracy",
    )
    assert result.metric_value == 0.75
    without = card_of(pruner, tmp_path / "out", metrics=metrics)
    assert without.data.eval_results is None and without.data.metrics == ["accuracy"]


def _sweep(**settings: Any) -> SweepTable:
    cells = [Cell(selection="none", seed=seed, scores={"accuracy": 0.9 + seed / 100}) for seed in (0, 1)]
    for seed in (0, 1):
        cells.append(Cell(selection="decile:10", role="intermediate", seed=seed, scores={"accuracy": 0.8 - seed / 100}))
        cells.append(Cell(selection="decile:10", role="key", seed=seed, scores={"accuracy": 0.1}))
        cells.append(Cell(selection="decile:10", role="key", block=0, seed=seed, scores={"accuracy": 0.2}))
        cells.append(Cell(selection="decile:10", role="query", order="before", seed=seed, scores={"accuracy": 0.3}))
    return SweepTable(cells, settings)


def test_scores_of_a_sweep(pruner: SVDPruner, tmp_path) -> None:
    card = card_of(pruner, tmp_path / "out", metrics=_sweep(model="LlamaForCausalLM"))
    report = read(tmp_path / "out")
    assert report["metrics"] == {
        "before": {"accuracy": pytest.approx(0.905)},
        "after": {"accuracy": pytest.approx(0.795)},
    }
    assert report["seeds"] == 2 and "mean over 2 models" in card.text and "| accuracy | 0.905 | 0.795 |" in card.text
    pruner.restore()
    pruner.remove(Decile(10), roles="key", blocks=0)
    pruner.save_pretrained(tmp_path / "out", metrics=_sweep())
    assert read(tmp_path / "out")["metrics"]["after"] == {"accuracy": pytest.approx(0.2)}
    pruner.restore()
    pruner.save_pretrained(tmp_path / "out", metrics=_sweep())
    assert read(tmp_path / "out")["metrics"] == {"before": {"accuracy": pytest.approx(0.905)}}


@pytest.mark.parametrize("where", [{"roles": "value"}, {"roles": "query"}, {}, {"roles": "key", "blocks": [0, 1]}])
def test_a_sweep_without_the_removal(where: dict[str, Any], make_model, tmp_path) -> None:
    pruner = SVDPruner(make_model("llama"), workers=1)
    pruner.remove(Decile(10), **where)
    with pytest.raises(ValueError, match=r"no cell of decile:10 of .*give the scores as metrics="):
        pruner.save_pretrained(tmp_path / "out", metrics=_sweep())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"accuracy": 0.9}, ValueError, "metrics has 'accuracy'"),
        ({"dataset": "glue"}, ValueError, "metrics has 'dataset'"),
        ({"before": 0.9}, TypeError, r"metrics\['before'\] is 0.9"),
        ({"after": {"accuracy": "good"}}, TypeError, r"metrics\['after'\] is"),
        (0.9, TypeError, "metrics is 0.9: give a SweepTable"),
        (_sweep(model="another"), ValueError, "the sweep is of another and the model LlamaForCausalLM"),
    ],
)
def test_bad_metrics(metrics: Any, error: type, message: str, pruner: SVDPruner, tmp_path) -> None:
    with pytest.raises(error, match=message):
        pruner.save_pretrained(tmp_path / "out", metrics=metrics)
    assert not (tmp_path / "out").exists()


# Tokenizers and processors


def test_the_tokenizer_that_the_model_came_with(make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    pruner = SVDPruner(transformers.AutoModel.from_pretrained(tmp_path / "base"))
    card = card_of(pruner, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [2, 3]
    assert "from transformers import AutoTokenizer, BertModel" in card.text and "is included" not in card.text


def test_a_tokenizer_of_the_caller(pruner: SVDPruner, tmp_path, caplog) -> None:
    pruner.save_pretrained(tmp_path / "out", tokenizer=words())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("b")["input_ids"] == [3]
    assert not caplog.records
    with pytest.raises(TypeError, match="tokenizer is 'bert', which has no save_pretrained"):
        pruner.save_pretrained(tmp_path / "other", tokenizer="bert")
    assert not (tmp_path / "other").exists()


def test_no_tokenizer_is_told(pruner: SVDPruner, tmp_path, caplog) -> None:
    card = card_of(pruner, tmp_path / "out")
    assert "No tokenizer or processor is included" in card.text and "AutoTokenizer" not in card.text
    assert "saved without a tokenizer" in caplog.text


def test_the_processor_of_a_vision_model(make_model, tmp_path, caplog) -> None:
    make_model("vit").save_pretrained(tmp_path / "base")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    pruner = SVDPruner(transformers.AutoModel.from_pretrained(tmp_path / "base"))
    card = card_of(pruner, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == settings
    assert 'processor = AutoImageProcessor.from_pretrained("out")' in card.text and not caplog.records


# Folders


def test_an_earlier_result_of_the_same_original_is_replaced(make_model, tmp_path) -> None:
    pruner = SVDPruner(make_model("llama"), workers=1)
    pruner.remove(Decile(10), roles="key")
    folder = pruner.save_pretrained(tmp_path / "out", tokenizer=words())
    (folder / "notes.txt").write_text("mine")
    pruner.remove(Decile(9), roles=["key", "query"])
    assert pruner.save_pretrained(folder) == folder
    assert [edit["selection"] for edit in read(folder)["edits"]] == ["decile:10", "decile:9"]
    assert set(contents(folder)) == {*read(folder)["files"], "notes.txt"}
    assert not list(folder.glob("tokenizer*"))


def test_another_model_is_not_overwritten_unasked(pruner: SVDPruner, make_model, tmp_path) -> None:
    make_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "out", max_shard_size="100KB")
    shard = min((tmp_path / "out").glob("model-*"))
    shard.replace(tmp_path / "blob")  # as in the cache of the Hub
    shard.symlink_to(tmp_path / "blob")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"not made from these weights of LlamaForCausalLM.*overwrite=True"):
        pruner.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before and len(before) > 4
    pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert set(contents(tmp_path / "out")) == set(read(tmp_path / "out")["files"]) and (tmp_path / "blob").is_file()

    other = SVDPruner(make_model("llama", initializer_range=0.1), workers=1)
    other.remove(Decile(10), roles="intermediate")
    with pytest.raises(ValueError, match="not made from these weights"):
        other.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="not made from these weights of BertModel"):
        SVDPruner(make_model("bert")).save_pretrained(tmp_path / "out")
    for damage in ("", "[]", '{"files": []}', '{"files": ["../base"], "base": 3, "matrices": 4}'):
        (tmp_path / "out" / "hf_rmt.json").write_text(damage)
        with pytest.raises(ValueError, match="not made from these weights"):
            pruner.save_pretrained(tmp_path / "out")


def test_files_that_a_manifest_names_elsewhere_stay(pruner: SVDPruner, tmp_path) -> None:
    folder = pruner.save_pretrained(tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    described = read(folder)
    (folder / "hf_rmt.json").write_text(
        json.dumps(described | {"files": ["../precious", str(tmp_path / "precious"), 3, []]})
    )
    pruner.save_pretrained(folder)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_folder_is_a_file(pruner: SVDPruner, tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        pruner.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_all_as_it_was(there: bool, pruner: SVDPruner, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    if there:
        pruner.save_pretrained(folder, tokenizer=words())
        (folder / "notes.txt").write_text("mine")
        pruner.remove(Decile(1), roles="key")
    before = contents(folder)

    def no_space(*_args: object, **_options: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("hf_rmt.hub.card_of", no_space)
        with pytest.raises(OSError, match="no space left"):
            pruner.save_pretrained(folder)
    assert folder.exists() == there and contents(folder) == before
    replace, new = os.replace, 6
    for moves in range(len(before) - there + new):
        done: list[Any] = []

        def fail_once(source: Any, target: Any, moves: int = moves, done: list[Any] = done) -> None:
            done.append(source)
            if len(done) == moves + 1:
                raise OSError("no permission")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("hf_rmt.hub.os.replace", fail_once)
            with pytest.raises(OSError, match="no permission"):
                pruner.save_pretrained(folder)
        assert folder.exists() == there and contents(folder) == before, moves
    pruner.save_pretrained(folder)
    assert not list(folder.glob(".*")) and len(read(folder)["files"]) == new


def test_a_save_that_was_killed_is_taken_up_by_the_next(pruner: SVDPruner, tmp_path, monkeypatch) -> None:
    """At no moment of the exchange does the folder hold a model of files of both, and the next save may replace it."""
    folder = pruner.save_pretrained(tmp_path / "out", tokenizer=words())
    old = contents(folder)
    pruner.remove(Decile(1), roles="key")
    replace, states = os.replace, []

    def watch(source: Any, target: Any) -> None:
        states.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("hf_rmt.hub.os.replace", watch)
        pruner.save_pretrained(folder)
    new = contents(folder)
    assert len(states) == len(old) + len(new) and states[0] == old
    for number, state in enumerate(states[1:]):
        assert "config.json" not in state
        killed = tmp_path / f"killed-{number}"
        killed.mkdir()
        (killed / ".incoming-model").mkdir()
        for name, data in state.items():
            (killed / name).write_bytes(data)
        pruner.save_pretrained(killed)
        assert {name: data for name, data in contents(killed).items() if name != "README.md"} == {
            name: data for name, data in new.items() if name != "README.md"
        }
