"""The command line, as a process of its own where that matters."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from click.testing import CliRunner

from hf_rmt import AnalysisReport, ModelComparison, RMTAnalyzer, __version__
from hf_rmt.cli import cli


def _run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hf_rmt", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    started = time.monotonic()
    result = _run("--help")
    assert result.returncode == 0 and "analyze" in result.stdout and "demo" in result.stdout
    assert time.monotonic() - started < 5  # a second on an idle machine; the next line is the cause of it
    code = "import sys, hf_rmt, hf_rmt.cli; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_analyze_writes_a_report_with_pictures(checkpoint: Path, tmp_path) -> None:
    out = tmp_path / "out"
    result = _run(
        "analyze", str(checkpoint), "--out", str(out), "--role", "query", "--role", "*output", "--blocks", "0-1"
    )
    assert result.returncode == 0, result.stderr
    assert "attention.output" in result.stdout and str(out.name) in result.stdout
    report = AnalysisReport.load(out)
    assert {row for row in report.to_pandas()["role"]} == {"query", "attention.output", "output"}
    assert list(out.glob("*.png"))
    again = _run(
        "analyze", str(checkpoint), "--out", str(out), "--role", "query", "--role", "*output", "--blocks", "0-1"
    )
    assert again.returncode == 0


def test_options_reach_the_analysis(checkpoint: Path, tmp_path) -> None:
    options = "--sides none --sigma 0.02 --rate 0.05 --control shuffled --seed 5 --head --no-plots --workers 1"
    result = CliRunner().invoke(cli, ["analyze", str(checkpoint), "--out", str(tmp_path / "o"), *options.split()])
    assert result.exit_code == 0, result.output
    report = AnalysisReport.load(tmp_path / "o")
    wanted = {"sides": "none", "sigma": 0.02, "rate": 0.05, "control": "shuffled", "seed": 5}
    assert wanted.items() <= report.settings.items()
    assert "lm_head" in report and not list((tmp_path / "o").glob("*.png"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["analyze", "/no/such/model", "--out", "OUT"], "neither a folder nor the id"),
        (["analyze", "MODEL", "--out", "OUT", "--role", "qery"], "no role or name matches 'qery'"),
        (["analyze", "MODEL", "--out", "OUT", "--sigma", "bulky"], "sigma is 'bulky'"),
        (["analyze", "MODEL", "--out", "OUT", "--blocks", "a-b"], "no list of blocks"),
        (["analyze", "MODEL", "--out", "/proc/hf_rmt"], "/proc/hf_rmt"),
        (["analyze", "MODEL"], "Missing option '--out'"),
        (["analize"], "No such command"),
    ],
)
def test_errors_are_one_line_and_2(arguments, message: str, checkpoint: Path, tmp_path) -> None:
    places = {"MODEL": str(checkpoint), "OUT": str(tmp_path / "out")}
    result = _run(*[places.get(argument, argument) for argument in arguments])
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("hf-rmt: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    ["--max-tokens 5", "--column text", "--outputs", "--centred", "--batch-size 16", "--batch-size 3", "--sequential"],
)
def test_options_of_texts_need_texts(option: str, tmp_path) -> None:
    result = CliRunner().invoke(cli, ["analyze", "MODEL", "--out", str(tmp_path / "o"), *option.split()])
    assert result.exit_code == 2
    assert f"{option.partition(' ')[0]} is of no use without --text" in " ".join(result.output.split())


def _adapter_of_a_model_with_words(make_model, folder: Path) -> Path:
    """An adapter, on a base that has a tokenizer, and a file of text beside them."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder / "base"
    )
    make_model("bert").save_pretrained(folder / "base")
    base = transformers.AutoModel.from_pretrained(folder / "base")
    config = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    (folder / "texts.txt").write_text("a b a\nb b\n")
    return folder / "adapter"


def test_texts_run_through_the_folder_of_an_adapter(make_model, tmp_path) -> None:
    pytest.importorskip("peft")
    adapter = _adapter_of_a_model_with_words(make_model, tmp_path)
    arguments = ["analyze", str(adapter), "--out", str(tmp_path / "o"), "--no-plots", "--role", "query"]
    texts = ["--text", str(tmp_path / "texts.txt"), "--centred"]
    result = CliRunner().invoke(cli, [*arguments, *texts])
    assert result.exit_code == 0, result.output
    report = AnalysisReport.load(tmp_path / "o")
    assert report.settings["model"] == f"{adapter} on {tmp_path / 'base'}"
    assert report.settings["covariances"]["tokens"] == 5 and report.settings["covariances"]["centred"]
    base = RMTAnalyzer.from_checkpoint(tmp_path / "base").analyze(roles="query", sides="none")
    assert all(abs(report[name].row["s_max"] - base[name].row["s_max"]) > 1e-6 for name in base)
    again = [argument.replace(str(tmp_path / "o"), str(tmp_path / "again")) for argument in arguments]
    result = CliRunner().invoke(cli, [*again, *texts, "--sequential"])
    assert result.exit_code == 0, result.output
    pd.testing.assert_frame_equal(AnalysisReport.load(tmp_path / "again").to_pandas(), report.to_pandas())
    result = CliRunner().invoke(cli, [*arguments, *texts, "--revision", "main"])
    assert result.exit_code == 2 and "--revision is of a checkpoint" in result.output
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ValueError) and "adapter" in str(result.exception)


def test_a_model_that_a_budget_does_not_hold_runs_from_disk(make_model, tmp_path, monkeypatch) -> None:
    from hf_rmt import workers
    from hf_rmt.models import loading

    pytest.importorskip("peft")
    _adapter_of_a_model_with_words(make_model, tmp_path)
    loaded: list[transformers.PreTrainedModel] = []
    original = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *how: loaded.append(original(*how)) or loaded[-1])
    monkeypatch.setattr(workers, "resident_memory", lambda: 8_000_000_000 - 120_000)  # a quarter of it is 30 kB
    texts = ["--text", str(tmp_path / "texts.txt"), "--sequential", "--no-plots"]
    tables = []
    for out, budget in (("whole", []), ("parts", ["--max-memory", "8GB"])):
        arguments = ["analyze", str(tmp_path / "base"), *texts, "--out", str(tmp_path / out), *budget]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert not list((tmp_path / out).glob(".offloaded*"))
        tables.append(AnalysisReport.load(tmp_path / out).to_pandas())
    pd.testing.assert_frame_equal(*tables)
    assert not hasattr(loaded[0], "hf_device_map") and "disk" in loaded[1].hf_device_map.values()


def test_ctrl_c(checkpoint: Path, tmp_path, monkeypatch, capsys) -> None:
    import hf_rmt.run
    from hf_rmt import cli as module

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_rmt.run, "analyse_matrix", interrupt)
    monkeypatch.setattr(sys, "argv", ["hf-rmt", "analyze", str(checkpoint), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert "interrupted; the same command goes on with what --out holds" in capsys.readouterr().err


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.strip().endswith(__version__)


def test_demo(minilm, tmp_path) -> None:
    """The table by role shows the outlier counts under all three rules for sigma."""
    result = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "demo"), "--no-plots"])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("bulk", "empir.", "init", "query", "intermediate"))
    assert len(AnalysisReport.load(tmp_path / "demo")) == 37


def test_the_example_runs(checkpoint: Path, tmp_path) -> None:
    example = Path(__file__).parents[1] / "examples" / "locate_information.py"
    command = [sys.executable, str(example), str(checkpoint), "--out", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "control_n_above" in result.stdout and len(AnalysisReport.load(tmp_path / "o")) == 14


@pytest.fixture
def trained(make_model, tmp_path) -> Path:
    """The checkpoint with a little noise on every query."""
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_compare_writes_a_comparison_with_pictures(checkpoint: Path, trained: Path, tmp_path) -> None:
    out = tmp_path / "out"
    result = _run("compare", str(checkpoint), str(trained), "--out", str(out), "--role", "query", "--role", "key")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    comparison = ModelComparison.load(out)
    means = comparison.by_role()
    assert lines["query"][1:3] == ["2", format(means.loc["query", ("relative_change", "mean")], ".2g")]
    ratios = comparison.energy_over_expectation("right").loc["query"]
    assert lines["query"][6] == f"{ratios.idxmax()}x{ratios.max():.1f}"
    assert lines["key"][2] == "0" and len(lines["key"]) == 6
    assert f"comparison and pictures of 4 matrices: {out}" in " ".join(result.stdout.split())
    assert {path.stem for path in out.glob("*.png")} >= {"change_by_decile", "fig12_spectra"}


def test_the_comparison_fits_a_terminal(make_model) -> None:
    """No cell is cut, and no decile is named that shows no ratio above 1."""
    from peft import LoraConfig, get_peft_model
    from rich.console import Console

    from hf_rmt.tables import comparison_table

    adapted = make_model("bert", hidden_size=96, intermediate_size=400, max_position_embeddings=16)
    config = LoraConfig(r=1, target_modules=["query", "dense"], init_lora_weights=False)
    comparison = RMTAnalyzer.compare(get_peft_model(adapted, config))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert len(rows["key"]) == 6 and rows["key"][5] == "0.0/0.0"  # it did not change
    expected = [
        f"{decile}x{ratio:.1f}"
        for side in ("right", "left")
        for decile, ratio in comparison.energy_over_expectation(side).loc["query"].nlargest(2).items()
        if ratio > 1.05
    ]
    assert rows["query"][6:] == expected and "attention.output" in rows
    ratios = [float(ratio) for ratio in re.findall(r"\b(?:\d+|out)x(\S+)", text)]
    assert ratios and min(ratios) > 1


def test_a_change_outside_the_vectors_is_told(capsys) -> None:
    from rich.console import Console

    from hf_rmt.tables import comparison_table

    before, after = torch.nn.Linear(80, 40), torch.nn.Linear(80, 40)
    null = torch.linalg.svd(before.weight.data)[2][70]
    after.weight.data = before.weight.data + torch.outer(torch.ones(40), null)
    Console(width=80).print(comparison_table(RMTAnalyzer.compare(before, after)))
    assert " outx2.0 " in capsys.readouterr().out  # all of it in half of the directions


def test_options_reach_the_comparison(checkpoint: Path, trained: Path, tmp_path) -> None:
    options = "--sides none --sigma 0.02 --rate 0.05 --blocks 1 --no-plots --workers 1"
    arguments = ["compare", str(checkpoint), str(trained), "--out", str(tmp_path / "o"), *options.split()]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    comparison = ModelComparison.load(tmp_path / "o")
    assert {"sides": "none", "sigma": 0.02, "rate": 0.05}.items() <= comparison.settings.items()
    assert len(comparison) == 7 and not list((tmp_path / "o").glob("*.png"))


def test_compare_takes_the_folder_of_an_adapter(checkpoint: Path, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ["compare", str(checkpoint), str(tmp_path / "adapter"), "--out", str(tmp_path / "o"), "--no-plots"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    table = ModelComparison.load(tmp_path / "o").to_pandas()
    assert set(table["role"][table["relative_change"] > 0]) == {"query"}
    assert (table["change_stable_rank"].dropna() < 2.001).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compare", "MODEL", "OTHER", "--out", "OUT"], "64 x 128 before and 64 x 96 after"),
        (["compare", "MODEL", "/no/such/model", "--out", "OUT"], "neither a folder nor the id"),
        (["compare", "MODEL", "--out", "OUT"], "Missing argument 'AFTER'"),
    ],
)
def test_errors_of_compare_are_one_line_and_2(arguments, message: str, checkpoint: Path, make_model, tmp_path) -> None:
    make_model("llama", intermediate_size=96).save_pretrained(tmp_path / "other")
    places = {"MODEL": str(checkpoint), "OTHER": str(tmp_path / "other"), "OUT": str(tmp_path / "out")}
    result = _run(*[places.get(argument, argument) for argument in arguments])
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("hf-rmt: ")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_report_is_there_all_the_same(checkpoint: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hf_rmt.cli.find_spec", lambda _name: None)
    result = CliRunner().invoke(cli, ["analyze", str(checkpoint), "--out", str(tmp_path / "o"), "--sides", "none"])
    assert result.exit_code == 0 and 'pip install "hf_rmt[plots]"' in result.output
    assert len(AnalysisReport.load(tmp_path / "o")) == 14


def test_prune_writes_what_the_library_does(checkpoint: Path, tmp_path) -> None:
    from hf_rmt.pruner import SVDPruner
    from hf_rmt.theory.selection import Decile, Rank

    out = tmp_path / "out"
    options = "--remove decile:10 --remove decile:9 --role key --role *output --blocks 1 --workers 1"
    result = CliRunner().invoke(cli, ["prune", str(checkpoint), "--out", str(out), *options.split()])
    assert result.exit_code == 0, result.output
    pruner = SVDPruner(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), workers=1)
    pruner.remove(Decile(10) | Decile(9), roles=["key", "*output"], blocks=1)
    _assert_same_weights(out, pruner.model)
    table = pruner.affected().groupby("role").sum(numeric_only=True)
    rows = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    for role in ("key", "attention.output", "output"):
        assert rows[role][1:4] == ["1", str(table.loc[role, "removed"]), str(table.loc[role, "of"])]
        assert rows[role][4:6] == [f"{table.loc[role, column]:.1%}" for column in ("mass", "energy")]
        assert rows[role][6] == f"{table.loc[role, 'parameters']:,}"
    assert f"pruned model: {out}" in result.output and (out / "README.md").is_file()

    arguments = ["prune", str(checkpoint), "--out", str(out), "--keep", "rank:8", "--workers", "1"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    pruner.restore()
    pruner.remove(keep=Rank(8))
    _assert_same_weights(out, pruner.model)


def _assert_same_weights(folder: Path, model: torch.nn.Module) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_prune_by_overlap_with_texts(make_model, tmp_path) -> None:
    from hf_rmt.pruner import SVDPruner
    from hf_rmt.theory.selection import Overlapping

    _adapter_of_a_model_with_words(make_model, tmp_path)
    data = ["--text", str(tmp_path / "texts.txt"), "--centred"]
    where = ["prune", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--role", "query", "--workers", "1"]
    result = CliRunner().invoke(cli, [*where, *data, "--remove", "overlapping:0.5"])
    assert result.exit_code == 0, result.output
    model = transformers.AutoModel.from_pretrained(tmp_path / "base")
    covariances = RMTAnalyzer(model).collect(str(tmp_path / "texts.txt")).with_centring(True)
    pruner = SVDPruner(model, covariances=covariances, workers=1)
    pruner.remove(Overlapping(0.5), roles="query")
    assert 0 < pruner.affected()["removed"].sum() < 128
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(loaded.get_parameter(query), model.get_parameter(query))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "give --remove or --keep, one of them"),
        ("--remove decile:1 --keep rank:3", "give --remove or --keep, one of them"),
        ("--remove decile:11", "cannot read the selection 'decile:11'"),
        ("--remove overlapping", "overlaps need the activations"),
        ("--remove rank:999", "999"),
        ("--remove decile:1 --role qery", "no role or name matches 'qery'"),
        ("--remove decile:1 --private", "--private is of no use without --push"),
        ("--remove decile:1 --max-tokens 5", "--max-tokens is of no use without --text"),
    ],
)
def test_errors_of_prune(options: str, message: str, checkpoint: Path, tmp_path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["prune", str(checkpoint), "--out", str(out), "--workers", "1", *options.split()])
    assert result.exit_code != 0
    assert message in " ".join(f"{result.output} {result.exception}".split())
    assert not out.exists()


def test_prune_does_not_overwrite_another_model_unasked(checkpoint: Path, monkeypatch) -> None:
    arguments = ["prune", str(checkpoint), "--remove", "decile:10", "--out", str(checkpoint), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("hf_rmt.checkpoint_pruner.factored", lambda *_, **__: pytest.fail("it is refused before that"))
        result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ValueError) and "overwrite=True" in str(result.exception)
    assert not (checkpoint / "hf_rmt.json").exists()
    itself = CliRunner().invoke(cli, [*arguments, "--overwrite"])
    assert isinstance(itself.exception, ValueError) and "is the checkpoint itself" in str(itself.exception)
    assert not (checkpoint / "hf_rmt.json").exists()
