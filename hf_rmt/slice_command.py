"""What ``hf-rmt slice`` does: a model and texts by their names in, a smaller model out, its record on the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hf_rmt.config import AnalysisConfig, CollectConfig, SliceConfig
from hf_rmt.evaluation import Perplexity
from hf_rmt.models.loading import load_model
from hf_rmt.models.text import text_batches, tokenizer_of
from hf_rmt.slicing.keep import parse_keep
from hf_rmt.slicing.publishing import push_sliced, refuse_another_model, save_sliced
from hf_rmt.slicing.slicer import slice_model
from hf_rmt.tables import slice_table


def run(model: str, out: Path, options: dict[str, Any]) -> None:
    """Slice a checkpoint with the options of the command, save the slice, show what it is, and push it if asked to.

    Raises:
        ValueError, OSError: as ``slice_model``, ``save_sliced`` and ``push_sliced``, and whatever is wrong with the
            checkpoint or the texts.
    """
    keep, device = parse_keep(options["keep"]), AnalysisConfig(device=options["device"]).device
    loaded: Any = load_model(model, options["revision"])
    refuse_another_model(loaded, out, options["overwrite"])  # before hours of work
    if device is not None:
        loaded.to(device)
    tokenizer = tokenizer_of(model, options["revision"])
    evaluate = _evaluation(tokenizer, options)
    small = slice_model(loaded, keep, options["text"], config=_config(tokenizer, options))
    scores: Any = None
    if evaluate is not None:
        scores = {"before": evaluate(loaded), "after": evaluate(small), "dataset": _hub_id(options["evaluate"])}
    save_sliced(small, out, tokenizer=tokenizer, metrics=scores, overwrite=options["overwrite"])
    Console().print(slice_table(small.sliced, scores))
    click.echo(str(small.sliced))
    click.echo(f"sliced model: {out}")
    if options["repository"]:
        private = options["private"] or None
        commit = push_sliced(small, options["repository"], tokenizer=tokenizer, metrics=scores, private=private)
        click.echo(f"on the Hub: {commit.commit_url}")


def _config(tokenizer: Any, options: dict[str, Any]) -> SliceConfig:
    collect = CollectConfig(
        tokenizer=tokenizer,
        columns=options["columns"] or None,
        batch_size=options["batch_size"],
        max_length=options["length"],
        max_tokens=options["max_tokens"],
    )
    return SliceConfig(form=options["form"], per_block=options["per_block"], collect=collect)


def _evaluation(tokenizer: Any, options: dict[str, Any]) -> Perplexity | None:
    """Perplexity on the texts to evaluate on, if there are any."""
    if options["evaluate"] is None:
        return None
    return Perplexity(text_batches(options["evaluate"], tokenizer, max_length=options["length"]))


def _hub_id(texts: str) -> str:
    """The data set of the Hub that texts are from, without its configuration and split; empty for others."""
    from huggingface_hub import constants

    if os.path.exists(texts):
        return ""
    parts = texts.partition(":")[0].split("/")
    # Two parts are owner and name if that has been loaded, else name and configuration.
    with_owner = len(parts) > 2 or Path(constants.HF_HUB_CACHE, f"datasets--{'--'.join(parts)}").is_dir()
    return "/".join(parts[:2]) if with_owner else parts[0]
