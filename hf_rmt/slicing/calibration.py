"""The covariance of the residual stream on data, and the basis that it gives (Ashkboos et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hf_rmt.analyzer import RMTAnalyzer
from hf_rmt.collecting import CollectionRun
from hf_rmt.config import CollectConfig
from hf_rmt.models.batches import Batches
from hf_rmt.models.digests import fingerprint_of
from hf_rmt.models.live import evaluating
from hf_rmt.models.residual_stream import Family, Stream, stream_of
from hf_rmt.models.stream_taps import taps_of
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments


def collect_stream(
    model: nn.Module,
    data: Any,
    *,
    family: Family | None = None,
    normed: bool = True,
    folder: str | Path | None = None,
    config: CollectConfig | None = None,
    **options: Any,
) -> ActivationCovariances:
    """Run a model over data and sum up its residual stream, as it enters each norm.

    Args:
        model: of transformers; it runs in evaluation mode.
        data, folder, config, **options: as for ``RMTAnalyzer.collect``.
        family: the declaration of its stream, where the library has none.
        normed: every token counts alike, as the norm behind makes it; else by its length. The mean is out in both cases
            where the norm is a LayerNorm, which takes it out.

    Returns:
        Moments ``(D, D)`` by the key of each site of the stream; ``settings["stream"]`` says which.

    Raises:
        ValueError: as ``RMTAnalyzer.collect`` and ``stream_of``.
    """
    analyzer = RMTAnalyzer(model)
    stream = stream_of(model, family)
    settings = CollectConfig.of(config, options)
    batches = Batches(data, model, settings.tokenizer, settings.for_texts(), every_logit=False)
    with evaluating(model):
        run = CollectionRun(model, analyzer.matrices, settings, taps_of(stream, normed))
        run.stream = "normed" if normed else "raw"
        return run.over(batches, analyzer.origin, None if folder is None else Path(folder))


def moments_of_sites(stream: Stream, covariances: ActivationCovariances) -> list[Moments]:
    """The moments at each site of a stream.

    Raises:
        ValueError: the covariances are not of this stream, or of fewer tokens than it is wide.
    """
    return [_of_site(stream, covariances, site.key) for site in stream.sites]


def refuse_other_weights(model: nn.Module, covariances: ActivationCovariances) -> None:
    """Raise where a model has other weights than that of which covariances were collected."""
    known = covariances.fingerprints
    changed = [m.name for m in RMTAnalyzer(model).matrices if known and known.get(m.name) != fingerprint_of(m.read())]
    if changed:
        raise ValueError(
            f"the covariances were collected from other weights, as those of {changed[0]} show: make them by "
            "collect_stream(model, data) of the model as it is now"
        )


def refuse_few(tokens: int, width: int) -> None:
    """Raise where there are fewer tokens than directions."""
    if tokens < width:
        raise ValueError(f"{tokens} tokens do not tell {width} directions of the stream apart: calibrate on more")


def _of_site(stream: Stream, covariances: ActivationCovariances, key: str) -> Moments:
    remedy = "make them by collect_stream(model, data)"
    if not covariances.settings.get("stream") or key not in covariances:
        raise ValueError(f"these covariances are not those of this model's residual stream: {remedy}")
    found = covariances[key]
    if len(found.total) != stream.width:
        raise ValueError(f"covariances of a stream {len(found.total)} wide, and this one is {stream.width}: {remedy}")
    refuse_few(found.tokens, stream.width)
    return found
