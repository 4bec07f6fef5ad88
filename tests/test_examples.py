"""The scripts in ``examples``, from end to end, on models that train in seconds."""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rmt import Bulk, Outliers, SVDPruner, SweepTable
from hf_rmt.evaluation import Accuracy, Perplexity
from hf_rmt.models.live import matrices_of
from hf_rmt.tasks import rows_of

EXAMPLES = Path(__file__).parents[1] / "examples"
#: A sentence is good or bad by one of its words.
WORDS = {0: ("dull", "poor"), 1: ("fine", "great")}
NEUTRAL = ("film", "plot", "actor", "scene", "sound", "story")
VOCABULARY = ("[PAD]", "[UNK]", "[BOS]", *NEUTRAL, *WORDS[0], *WORDS[1])


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder like that of SST-2, of an easy task."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    for split, rows in (("train", 260), ("dev", 40)):
        lines = ["sentence\tlabel"]
        for row in range(rows):
            label = row % 2 if split == "train" else int(row % 4 == 0)
            words = [NEUTRAL[draw(len(NEUTRAL))] for _ in range(3 + draw(5))]
            words.insert(draw(len(words)), WORDS[label][draw(2)])
            lines.append(f"{' '.join(words)}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines))
    return folder


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", model_max_length=32
    )
    made.save_pretrained(folder)
    return made


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random encoder that knows these words."""
    folder = tmp_path / "encoder"
    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(VOCABULARY), initializer_range=0.1, **sizes)).save_pretrained(folder)
    return folder


def arguments(reviews: Path, encoder: Path, out: Path) -> list[str]:
    options = dict(rows=128, seeds=1, epochs=8, rate=1e-2, controls=0, model=encoder, out=out)
    quick = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["sst2", str(reviews), "--held-out", "60", *quick]


def test_before_and_after_and_then_by_role(
    reviews: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, roles = tmp_path / "before-and-after", tmp_path / "roles"
    table = script("before_and_after").main(arguments(reviews, encoder, out))
    shown = capsys.readouterr().out
    removals = {(cell.order, cell.role, cell.selection) for cell in table}
    assert len(removals) == len(table) == 1 + 2 * 10
    assert {("before", "all", "decile:10"), ("after", "all", "decile:1")} < removals
    assert "Change of accuracy_dev" in shown and "rank correlation" in shown
    assert f"picture: {out / 'fig08_before_and_after.png'}" in shown
    assert (out / "fig08_before_and_after.png").is_file()

    kept = [out / "models" / f"seed-{seed}" / "weights.safetensors" for seed in (0, 1)]
    trained = kept[0].stat().st_mtime_ns
    again = [*arguments(reviews, encoder, roles), "--models", str(out), "--controls", "1", "--seeds", "2"]
    by_role = script("deciles_by_role").main([*again, "--roles", "query", "output"])
    assert kept[0].stat().st_mtime_ns == trained and kept[1].is_file() and not (roles / "models").exists()
    assert {(cell.role, cell.seed) for cell in by_role if cell.control} == {
        (role, seed) for role in ("query", "output") for seed in (0, 1)
    }
    baselines = [[cell.scores for cell in one if cell.selection == "none"] for one in (table, by_role)]
    assert baselines[0][0] == baselines[1][0] and len(baselines[1]) == 2
    assert len(SweepTable.load(roles)) == len(by_role) and (roles / "fig07_changes.png").is_file()


def test_directions_of_the_stream(reviews: Path, encoder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "streams"
    options = [*arguments(reviews, encoder, out), "--controls", "1", "--calibration", "64"]
    table = script("stream_deciles").main(options)
    found = {(cell.order, cell.selection) for cell in table if cell.selection != "none"}
    assert len(found) == len(table) - 1 and {order for order, _ in found} == {"before", "after"}
    assert {cell.role for cell in table if cell.selection != "none"} == {"stream"}
    assert len({cell.removed["mass"] for cell in table if cell.order == "before"}) == 12  # two sizes of groups
    assert f"picture: {out / 'fig14_before_and_after.png'}" in capsys.readouterr().out
    assert (out / "fig14_before_and_after.png").is_file() and not list(out.glob("fig0*"))


def test_the_accuracy_of_the_dev_rows_is_among_that_of_all(reviews: Path, encoder: Path, tmp_path: Path) -> None:
    fine_tuning = script("fine_tuning")
    options = fine_tuning.parser_of("", "out").parse_args(arguments(reviews, encoder, tmp_path / "out"))
    task = fine_tuning.FineTuning(options)
    net = task.trainer_of(3).model
    dev = rows_of("sst2", reviews, "dev", task.tokenizer)
    alone, held_out = Accuracy(dev)(net), Accuracy(task.training_rows[1])(net)
    found = task.evaluation()(net)
    assert found["accuracy_dev"] == alone["accuracy"] and found.chance["accuracy_dev"] == 0.75
    assert found["accuracy"] == pytest.approx((40 * alone["accuracy"] + 60 * held_out["accuracy"]) / 100)
    assert torch.equal(found.rows["accuracy_dev"].values, alone.rows["accuracy"].values)


def test_the_seed_decides_the_head_and_nothing_else_before_training(
    reviews: Path, encoder: Path, tmp_path: Path
) -> None:
    fine_tuning = script("fine_tuning")
    options = fine_tuning.parser_of("", "out").parse_args(arguments(reviews, encoder, tmp_path / "out"))
    task = fine_tuning.FineTuning(options)
    same, first, second = (task.trainer_of(seed).model.state_dict() for seed in (0, 0, 1))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {"classifier.weight"}
    assert all(torch.equal(same[name], first[name]) for name in first)


def test_roles_of_the_blocks() -> None:
    pruner = SVDPruner(BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)))
    of_blocks = ["query", "key", "value", "attention.output", "intermediate", "output"]
    assert script("fine_tuning").roles_in_blocks(pruner) == of_blocks
    assert {matrix.role for matrix in pruner.matrices} > set(of_blocks)  # there is a pooler


# Perplexity


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A random causal model, every matrix of which has two values above the law."""
    folder = tmp_path / "llama"
    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), **sizes))
    for matrix in matrices_of(net):
        m, n = matrix.shape
        spikes = torch.randn(m, 2) @ torch.randn(2, n)
        matrix.write(matrix.read() + 0.03 * spikes)
    net.save_pretrained(folder)
    return folder


def test_a_slice_recovers(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.randint(3, 6, (40, 12), generator=torch.Generator().manual_seed(1))
    for name, rows in (("train", ids[:32]), ("test", ids[32:])):
        save_file({"input_ids": rows}, tmp_path / f"{name}.safetensors")
    files = [str(llama), str(tmp_path / "train.safetensors"), str(tmp_path / "test.safetensors")]
    out = tmp_path / "recovered"
    found = script("recover").main([*files, "--keep", "0.7", "--epochs", "6", "--rate", "1e-2", "--out", str(out)])
    assert found["recovered"] < found["sliced"] and found["recovered"] < found["whole"]  # which had learned nothing
    saved = LlamaForCausalLM.from_pretrained(out)
    assert Perplexity(ids[32:].tolist())(saved)["perplexity"] == pytest.approx(found["recovered"], rel=1e-5)
    assert sum(p.numel() for p in saved.parameters()) <= 0.7 * sum(
        p.numel() for p in LlamaForCausalLM.from_pretrained(llama).parameters()
    )
    assert "plain slice: width" in capsys.readouterr().out


def test_perplexity(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity = script("perplexity")
    tokens, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    ids = torch.randint(3, len(VOCABULARY), (9, 8), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tokens)
    deciles, law = perplexity.main(
        [str(llama), str(tokens), "--rows", "6", "--draws", "2", "--roles", "query", "output", "--out", str(out)]
    )
    assert capsys.readouterr().out.count("outliers:above") == 3 == len(law)
    assert {cell.role for cell in deciles if cell.selection != "none"} == {"query", "output"}
    assert law.equals(pd.read_csv(out / "law.csv")) and (out / "fig07_changes.png").is_file()

    pruner = SVDPruner(LlamaForCausalLM.from_pretrained(llama).eval())
    score = Perplexity(ids[:6])
    whole = score(pruner.model)["perplexity"]
    rises = {}
    for selection in (Outliers("above"), *(perplexity.FromBulk(Outliers("above"), "number", i) for i in (0, 1))):
        with pruner.removed(selection, roles="query"):
            rises[str(selection)] = math.log(score(pruner.model)["perplexity"] / whole)
    outside, *draws = rises.values()
    row = law[law["role"] == "query"].iloc[0]
    assert row["components"] == row["drawn number"] == 2 < row["drawn energy"]
    assert row["rise"] == pytest.approx(outside, abs=1e-9)
    assert row["same number"] == pytest.approx(sum(draws) / 2, abs=1e-9) and draws[0] != draws[1]


def test_draws_from_inside_the_law(llama: Path) -> None:
    draw_from = script("perplexity").FromBulk
    pruner = SVDPruner(LlamaForCausalLM.from_pretrained(llama))
    indices = range(len(pruner.matrices))
    pruner.editor.store.prepare(indices)
    outside = Outliers("above")
    differing = 0
    for one in (pruner.editor.store[index] for index in indices):
        inside, above = Bulk().mask(one), outside.mask(one)
        number, other = (draw_from(outside, "number", draw).mask(one) for draw in (0, 1))
        assert int(number.sum()) == int(above.sum()) > 0 and not (number & ~inside).any()
        differing += not torch.equal(number, other)
        assert torch.equal(number, draw_from(outside, "number", 0).mask(one))
        energy = draw_from(outside, "energy").mask(one)
        drawn, wanted = ((one.s**2)[mask].sum() for mask in (energy, above))
        assert not (energy & ~inside).any()
        assert torch.equal(energy, inside) or wanted <= drawn < wanted + (one.s[inside] ** 2).max()
        nothing = Outliers("below", rate=1e-6)
        assert not nothing.mask(one).any() and not draw_from(nothing, "energy").mask(one).any()
    assert differing > len(indices) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [[2, 3, 4, 5], [6, 1, 3, 4]]),
        (dict(rows=1), [[2, 3, 4, 5]]),
        (dict(separator="|"), [[2, 3, 4, 5], [2, 3, 4]]),
    ],
)
def test_rows_of_a_text(llama: Path, tmp_path: Path, options: dict[str, Any], expected: list[list[int]]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("film plot\nactor scene | film plot |\n")
    given = dict(model=str(llama), data=str(text), length=4, rows=2, separator=None) | options
    assert script("perplexity").token_rows(argparse.Namespace(**given)) == expected
