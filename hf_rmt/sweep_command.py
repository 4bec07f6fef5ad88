"""What ``hf-rmt sweep`` does: a model and data by their names in, a ``SweepTable`` out and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from hf_rmt.config import AnalysisConfig, SweepConfig
from hf_rmt.evaluation import Accuracy, Perplexity
from hf_rmt.models.loading import load_model
from hf_rmt.models.text import text_batches, tokenizer_of
from hf_rmt.pruner import SVDPruner
from hf_rmt.reports.sweep import SweepTable
from hf_rmt.tables import sweep_table
from hf_rmt.tasks import rows_of
from hf_rmt.theory.selection_names import parse_selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(model: str, out: Path, options: dict[str, Any]) -> SweepTable:
    """Sweep a checkpoint with the options of the command, in a folder where it goes on if it was stopped.

    Raises:
        ValueError, OSError: as ``SVDPruner.sweep``, and whatever is wrong with the checkpoint, the data, a selection.
    """
    grid = _grid(options)
    how = AnalysisConfig(device=options["device"], workers=options["workers"])
    loaded: Any = load_model(model, options["revision"])
    evaluate = _evaluation(loaded, options)
    if how.device is not None:
        loaded.to(how.device)
    return SVDPruner(loaded, config=how).sweep(evaluate, folder=out, config=grid)


def show(table: SweepTable) -> None:
    """Print the changes, and how they go with p-values."""
    Console().print(sweep_table(table))
    correlation = table.correlation().dropna(subset="rho").drop(columns="order")
    if len(correlation):
        click.echo("\nrank correlation of the drop with the p-values of the vectors removed, over the deciles:")
        click.echo(correlation.round(4).to_string(index=False))


def _grid(options: dict[str, Any]) -> SweepConfig:
    return SweepConfig(
        selections=[parse_selection(name) for name in options["removals"]] or None,
        deciles=options["deciles"] or None,
        roles="all" if options["together"] else list(options["roles"]) or "each",
        blocks=options["blocks"] or "together",
        **{key: options[key] for key in ("controls", "seed", "margin")},
    )


def _evaluation(model: PreTrainedModel, options: dict[str, Any]) -> Accuracy | Perplexity:
    """Accuracy on the dev rows of a task, or perplexity on texts."""
    tokenizer = tokenizer_of(model, options["revision"])
    length = {} if options["max_length"] is None else {"max_length": options["max_length"]}
    if options["task"] is not None:
        return Accuracy(rows_of(options["task"], options["data"], "dev", tokenizer, count=options["rows"], **length))
    columns, tokens = options["columns"] or None, options["max_tokens"]
    return Perplexity(text_batches(options["text"], tokenizer, columns=columns, max_tokens=tokens, **length))
