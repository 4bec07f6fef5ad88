"""``hf-rmt sweep``: a checkpoint and data by their names in, a table out; stopped, it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_rmt import Decile, Rank, SVDPruner, SweepTable, text_batches
from hf_rmt.cli import cli
from hf_rmt.evaluation import Accuracy, Perplexity
from hf_rmt.reports import store
from hf_rmt.tasks import rows_of

WORDS = tuple("abcdefghij")
ROWS = 40
QUICK = ["--no-plots", "--workers", "1"]


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    known = ("[PAD]", "[UNK]", *WORDS)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16)


def _sentences() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 7, (ROWS,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(10, (n,), generator=generator)) for n in lengths]


@pytest.fixture(scope="module")
def classifier(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a folder of data on which it is always right."""
    folder, data = tmp_path_factory.mktemp("classifier"), tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    model = BertForSequenceClassification(BertConfig(vocab_size=12, max_position_embeddings=16, **sizes)).eval()
    with torch.no_grad():
        batch = tokenizer(_sentences(), return_tensors="pt", padding=True)
        margins = model(**batch).logits.diff(dim=-1)[:, 0]
        model.classifier.bias[1] -= margins.median()
    labels = (margins > margins.median()).long().tolist()
    lines = [f"{sentence}\t{label}" for sentence, label in zip(_sentences(), labels, strict=True)]
    (data / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, data


@pytest.fixture(scope="module")
def causal(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a causal language model, and a file of text."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=16, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "texts.txt").write_text("\n".join(_sentences()))
    return folder, folder / "texts.txt"


def _command(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["sweep", *map(str, arguments)])


def _task(classifier: tuple[Path, Path], out: Path, *options: Any) -> list[Any]:
    model, data = classifier
    return [model, "--task", "sst2", "--data", data, "--out", out, *options]


def _cells(table: SweepTable) -> list[tuple[str, str, int | None]]:
    return [(cell.selection, cell.role, cell.block) for cell in table]


def _assert_same(found: SweepTable, expected: SweepTable) -> None:
    assert all(a.same_as(b) for a, b in zip(found, expected, strict=True))


def test_a_classifier(classifier: tuple[Path, Path], tokenizer: Any, tmp_path: Path) -> None:
    roles = ["query", "output", "pooler.dense"]
    result = _command(*_task(classifier, tmp_path / "o", "--workers", 1, *(f"--role={role}" for role in roles)))
    assert result.exit_code == 0, result.output
    table = SweepTable.load(tmp_path / "o")
    model = BertForSequenceClassification.from_pretrained(classifier[0]).eval()
    accuracy = Accuracy(rows_of("sst2", classifier[1], "dev", tokenizer))
    _assert_same(table, SVDPruner(model, progress=False).sweep(accuracy, roles=roles, controls=1, progress=False))
    assert table.cells[0].scores == {"accuracy": 1.0} and table.settings["model"] == str(classifier[0])
    summary = table.summary().set_index(["role", "selection"])
    lines = [line.split() for line in result.output.splitlines()]
    for role, selection in (("query", "decile:1"), ("pooler.dense", "decile:10")):
        (shown,) = [line for line in lines if line[:2] == [role, selection]]
        assert shown[2] == f"{summary.loc[(role, selection), 'change']:+.3f}"
        assert shown[-1] == f"{summary.loc[(role, selection), 'over_control']:+.3f}"
    assert "random:0" not in result.output
    correlation = table.correlation()
    pooled = correlation[(correlation["role"] == "pooled") & (correlation["quantity"] == "p_right")]["rho"]
    assert [float(line[3]) for line in lines if line[:1] == ["pooled"] and "p_right" in line] == pytest.approx(
        pooled.round(4).tolist()
    )
    assert "nan" not in result.output.lower()
    assert f"sweep and pictures of {len(table)} evaluations: {tmp_path / 'o'}" in " ".join(result.output.split())
    assert (tmp_path / "o" / "fig07_changes.png").is_file()


def test_options_reach_the_sweep(classifier: tuple[Path, Path], tokenizer: Any, tmp_path: Path) -> None:
    options = "--decile 1 --decile 10 --remove rank:3 --role query --role *output --blocks 0-1 --controls 0 --seed 4"
    shorter = "--rows 30 --max-length 3 --margin -1 --device cpu"
    result = _command(*_task(classifier, tmp_path / "o", *options.split(), *shorter.split(), *QUICK))
    assert result.exit_code == 0, result.output
    table = SweepTable.load(tmp_path / "o")
    names = ["decile:1", "decile:10", "rank:3"]
    assert _cells(table)[1:] == [(n, role, b) for role in ("query", "*output") for b in (0, 1) for n in names]
    assert {cell.seed for cell in table} == {4} and not list((tmp_path / "o").glob("*.png"))
    model = BertForSequenceClassification.from_pretrained(classifier[0]).eval()
    accuracy = Accuracy(rows_of("sst2", classifier[1], "dev", tokenizer, count=30, max_length=3))
    assert table.cells[0].scores == accuracy(model) and len(table.cells[0].rows["accuracy"]) == 30
    with SVDPruner(model, progress=False).removed(Rank(3), roles="*output", blocks=1):
        assert table.cells[-1].scores == accuracy(model)


def test_all_matrices_together_and_each_block(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    result = _command(*_task(classifier, tmp_path / "o", "--together", "--remove", "bottom:0.5", *QUICK))
    assert result.exit_code == 0, result.output
    names = ["none", "bottom:0.5", "random:0(bottom:0.5)"]
    assert _cells(SweepTable.load(tmp_path / "o")) == [(name, "all", None) for name in names]
    blocks = ["--together", "--blocks", "each", "--decile", 2, "--controls", 0, *QUICK]
    assert _command(*_task(classifier, tmp_path / "b", *blocks)).exit_code == 0
    assert _cells(SweepTable.load(tmp_path / "b"))[1:] == [("decile:2", "all", 0), ("decile:2", "all", 1)]


def test_the_perplexity_of_a_causal_model(causal: tuple[Path, Path], tokenizer: Any, tmp_path: Path) -> None:
    model, texts = causal
    arguments = [model, "--text", texts, "--out", tmp_path / "o", "--decile", 1, "--role", "value", *QUICK]
    result = _command(*arguments, "--max-tokens", 90, "--max-length", 5)
    assert result.exit_code == 0, result.output
    table = SweepTable.load(tmp_path / "o")
    assert _cells(table) == [("none", "all", None), ("decile:1", "value", None), ("random:0(decile:1)", "value", None)]
    own = GPT2LMHeadModel.from_pretrained(model).eval()
    perplexity = Perplexity(text_batches(str(texts), tokenizer, max_tokens=90, max_length=5))
    assert table.cells[0].scores == perplexity(own)
    with SVDPruner(own, progress=False).removed(Decile(1), roles="value"):
        assert table.cells[1].scores == perplexity(own)
    assert 80 < table.cells[0].rows["perplexity"].weights.sum() + len(table.cells[0].rows["perplexity"]) < 100
    assert "Change of perplexity" in result.output and "rank correlation" not in result.output


def test_the_same_command_goes_on(classifier: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from hf_rmt import cli as module

    calls: list[int] = []
    score = Accuracy.__call__

    def interrupted(self: Accuracy, model: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, model)

    arguments = [str(one) for one in _task(classifier, tmp_path / "o", "--role", "query", "--controls", 0, *QUICK)]
    monkeypatch.setattr(Accuracy, "__call__", interrupted)
    monkeypatch.setattr(sys, "argv", ["hf-rmt", "sweep", *arguments])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert "interrupted; the same command goes on with what --out holds" in capsys.readouterr().err
    assert len(list((tmp_path / "o" / "partial").glob("*.safetensors"))) == 3
    result = _command(*arguments)
    assert result.exit_code == 0, result.output
    assert len(calls) == 4 + (11 - 3) and store.is_saved(tmp_path / "o", "sweep")
    again = _command(*arguments)
    assert again.exit_code == 0 and len(calls) == 12 and again.stdout == result.stdout
    other = _command(*arguments, "--rows", 20)
    assert isinstance(other.exception, ValueError) and "was made by another run: evaluation was" in str(other.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--out", "OUT"], "give --task with --data for a classifier, or --text for a causal model"),
        (["MODEL", "--task", "sst2", "--data", "DATA", "--text", "x", "--out", "OUT"], "give --task with --data"),
        (["MODEL", "--task", "sst2", "--out", "OUT"], "--task needs --data"),
        (["MODEL", "--text", "x", "--data", "DATA", "--out", "OUT"], "--data is of no use with --text"),
        (["MODEL", "--text", "x", "--rows", "3", "--out", "OUT"], "--rows is of no use with --text"),
        (["TASK", "--column", "x"], "--column is of no use with --task"),
        (["TASK", "--max-tokens", "5"], "--max-tokens is of no use with --task"),
        (["TASK", "--together", "--role", "key"], "--together is all matrices at once"),
        (["TASK", "--decile", "11"], "11 is not in the range 1<=x<=10"),
        (["TASK", "--blocks", "every"], "no list of blocks"),
        (["TASK", "--remove", "decil:3"], "cannot read the selection 'decil:3'"),
        (["TASK", "--role", "qery"], "no role or name matches 'qery'"),
        (["TASK", "--task", "sst3"], "task is 'sst3': give one of sst2, wic, boolq"),
        (["TASK", "--data", "NOWHERE"], "neither a folder nor a data set of the Hub"),
        (["TASK", "--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
        (["MODEL", "--text", "DATA/dev.tsv", "--out", "OUT"], "logits"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, classifier: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = classifier
    every = [part for one in arguments for part in (_task(classifier, tmp_path / "out") if one == "TASK" else [one])]
    places = {"MODEL": model, "DATA": data, "DATA/dev.tsv": data / "dev.tsv", "OUT": tmp_path / "out"}
    places["NOWHERE"] = tmp_path / "nowhere"
    result = _command(*(places.get(part, part) for part in every), *QUICK)
    found = result.output if isinstance(result.exception, SystemExit) else str(result.exception)
    assert result.exit_code and message in " ".join(found.split())
    assert not store.is_saved(tmp_path / "out", "sweep")


def test_as_a_process_of_its_own_an_error_is_one_line(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    """A headless checkpoint puts out no logits."""
    model = BertForSequenceClassification.from_pretrained(classifier[0])
    model.bert.save_pretrained(tmp_path / "headless")
    PreTrainedTokenizerFast.from_pretrained(classifier[0]).save_pretrained(tmp_path / "headless")
    arguments = _task((tmp_path / "headless", classifier[1]), tmp_path / "o", "--together")
    command = [sys.executable, "-m", "hf_rmt", "sweep", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]  # after the progress of loading
    assert last.startswith("hf-rmt: BertModel puts out no logits: load the model with its head")
