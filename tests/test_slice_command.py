"""``hf-rmt slice``: a checkpoint and texts by their names in, a smaller checkpoint out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_rmt import CollectConfig, Energy, SVDPruner, Width
from hf_rmt.cli import cli
from hf_rmt.evaluation import Perplexity
from hf_rmt.slicing.publishing import read_slice

WORDS = tuple("abcdefghij")
SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40
)


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def _sentences(rows: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (rows,), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[i] for i in torch.randint(10, (n,), generator=generator)) for n in lengths)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with its tokenizer; beside it texts to calibrate on, and others."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=12, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts.txt").write_text(_sentences(60, seed=0))
    (folder / "others.txt").write_text(_sentences(20, seed=1))
    return folder / "model"


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path):
    """The command on this checkpoint and its texts, into ``out``."""

    def command(*options: Any) -> Result:
        where = ["slice", checkpoint, "--text", checkpoint.parent / "texts.txt", "--out", tmp_path / "out"]
        return CliRunner().invoke(cli, [str(one) for one in (*where, *options)])

    return command


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _assert_same_weights(folder: Path, expected: Any) -> None:
    loaded = _model(folder).state_dict()
    assert loaded.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("keep", "options", "expected"),
    [
        ("0.7", [], (0.7, {})),
        ("width:0.5", ["--per-block"], (Width(0.5), {"per_block": True})),
        ("energy:0.8", ["--form", "registered"], (Energy(0.8), {"form": "registered"})),
        ("width:0.5", ["--form", "plain"], (Width(0.5), {"form": "plain"})),
    ],
)
def test_what_comes_out_is_what_the_library_makes(
    keep: str, options: list[str], expected: Any, command, checkpoint: Path, tmp_path: Path
) -> None:
    result = command("--keep", keep, *options)
    assert result.exit_code == 0, result.output
    kept, settings = expected
    texts = str(checkpoint.parent / "texts.txt")
    small = SVDPruner(_model(checkpoint)).slice(kept, texts, progress=False, **settings)
    _assert_same_weights(tmp_path / "out", small)
    made = read_slice(tmp_path / "out")
    assert made.to_dict() == small.sliced.to_dict()
    rows = [line.split() for line in result.output.splitlines()]
    assert ["width", "of", "the", "stream", "32", str(made.width), f"{made.width / 32:.1%}"] in rows
    assert ["parameters", f"{made.original_parameters:,}", f"{made.parameters:,}", f"{made.share:.1%}"] in rows
    shown = " ".join(result.output.split())
    assert str(made) in shown and f"sliced model: {tmp_path / 'out'}" in shown
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()
    assert "perplexity" not in result.output


def test_options_of_texts_reach_the_calibration(command, checkpoint: Path, tmp_path: Path) -> None:
    texts = checkpoint.parent / "texts.jsonl"
    rows = [json.dumps({"one": line, "other": "a"}) for line in _sentences(60, seed=2).splitlines()]
    texts.write_text("\n".join(rows))
    options = ["--column", "one", "--length", 5, "--batch-size", 7, "--max-tokens", 200]
    assert command("--keep", "width:0.5", "--text", texts, *options).exit_code == 0
    collect = CollectConfig(columns="one", max_length=5, batch_size=7, max_tokens=200)
    small = SVDPruner(_model(checkpoint)).slice(Width(0.5), str(texts), collect=collect, progress=False)
    _assert_same_weights(tmp_path / "out", small)
    assert 200 <= read_slice(tmp_path / "out").tokens < 205


def test_perplexity_before_and_after(command, checkpoint: Path, tmp_path: Path) -> None:
    others = checkpoint.parent / "others.txt"
    result = command("--keep", "width:0.5", "--evaluate", others, "--length", 6)
    assert result.exit_code == 0, result.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    perplexity = Perplexity(others.read_text().splitlines(), tokenizer, max_length=6)
    before, after = (perplexity(_model(folder))["perplexity"] for folder in (checkpoint, tmp_path / "out"))
    assert before != after
    assert ["perplexity", f"{before:.4g}", f"{after:.4g}"] in [line.split() for line in result.output.splitlines()]
    described = json.loads((tmp_path / "out" / "hf_rmt.json").read_text())
    assert described["metrics"] == {
        "before": {"perplexity": pytest.approx(before)},
        "after": {"perplexity": pytest.approx(after)},
    }
    assert described["dataset"] is None  # a file of this machine
    assert f"| perplexity | {before:.4g} | {after:.4g} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("texts", "dataset"),
    [
        ("Salesforce/wikitext/wikitext-2-raw-v1:test", "Salesforce/wikitext"),
        ("imdb:test", "imdb"),
        ("glue/sst2", "glue"),  # a configuration
        ("owner/loaded", "owner/loaded"),
        (__file__, ""),
    ],
)
def test_the_data_set_on_the_card(texts: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_rmt.slice_command import _hub_id

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--owner--loaded").mkdir()
    assert _hub_id(texts) == dataset


def test_another_model_is_not_overwritten_unasked(command, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    _model(checkpoint).save_pretrained(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("hf_rmt.slice_command.slice_model", lambda *_, **__: pytest.fail("it is refused before that"))
        result = command("--keep", "0.7")
    assert isinstance(result.exception, ValueError) and "overwrite=True" in str(result.exception)
    assert not (tmp_path / "out" / "hf_rmt.json").exists()
    assert command("--keep", "0.7", "--overwrite").exit_code == 0
    assert read_slice(tmp_path / "out").keep == "0.7 of the parameters"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "much"], "cannot read 'much': give a share of the parameters as 0.75"),
        (["--keep", "width:1.5"], "a share of the width is 1.5: it lies above 0 and is at most 1"),
        (["--keep", "width:0.01"], "leaves a stream of width 0"),
        (["--keep", "1"], "a slice of width 32 has"),
        (["--keep", "0.5", "--form", "small"], "'small' is not one of 'plain', 'registered'"),
        (["--keep", "0.5", "--form", "plain", "--per-block"], "--per-block puts matrices into residual conn"),
        (["--keep", "0.5", "--private"], "--private is of no use without --push"),
        (["--keep", "0.5", "--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
        (["--keep", "0.5", "--max-tokens", "20"], "tokens do not tell 32 directions of the stream apart"),
        (["--keep", "0.5", "--text", "/no/such/texts.txt"], "/no/such/texts.txt does not exist"),
        (["--keep", "0.5", "--evaluate", "/no/such/texts.txt"], "/no/such/texts.txt does not exist"),
        ([], "Missing option '--keep'"),
    ],
)
def test_bad_commands(options: list[str], message: str, command, tmp_path: Path) -> None:
    result = command(*options)
    found = result.output if isinstance(result.exception, SystemExit) else str(result.exception)
    assert result.exit_code and message in " ".join(found.split())
    assert not (tmp_path / "out").exists()


def test_a_revision_is_that_of_the_tokenizer_too(
    checkpoint: Path, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main branch has a tokenizer that numbers words the other way round."""
    commits = {"main": "a" * 40, "v1": "b" * 40}
    repository = tmp_path / "cache" / "models--me--two"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(checkpoint, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    described = repository / "snapshots" / commits["main"] / "tokenizer.json"
    other = json.loads(described.read_text())
    other["model"]["vocab"] = {word: 11 - i for word, i in other["model"]["vocab"].items()}
    described.write_text(json.dumps(other))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))
    texts = str(checkpoint.parent / "texts.txt")
    arguments = ["slice", "me/two", "--revision", "v1", "--keep", "width:0.5", "--text", texts]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    small = SVDPruner(_model(checkpoint)).slice(Width(0.5), texts, progress=False)
    _assert_same_weights(tmp_path / "out", small)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()
    made = read_slice(tmp_path / "out")
    assert (made.model, made.revision, made.on_hub) == ("me/two", commits["v1"], True)


def test_as_a_process_of_its_own_an_error_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    texts = str(checkpoint.parent / "texts.txt")
    arguments = ["slice", str(checkpoint), "--text", texts, "--keep", "2", "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "hf_rmt", *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("hf-rmt: a share of the parameters is 2.0: it lies above 0 and is at most 1")
