"""Where the residual stream of a model is seen, and what of it is summed."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from hf_rmt.models.activations import Site
from hf_rmt.models.residual_stream import Stream, StreamSite
from hf_rmt.models.token_masks import MAIN, UNMASKED


def taps_of(stream: Stream, normed: bool = True) -> list[Site]:
    """A place to see the stream at each of its sites, which goes by the name of the site.

    It is seen as it enters a norm, and of a LayerNorm without its mean, which is gone behind it.

    Args:
        stream: of a model, fused or not.
        normed: every token counts alike, divided by its root mean square; else by its length.
    """
    mask = MAIN if getattr(stream.model, "main_input_name", "input_ids") == "input_ids" else UNMASKED
    taps = []
    for site in stream.sites:
        prepare = partial(prepared, centred=is_centred(stream, site), normed=normed)
        module = seen_at(stream, site)[0]
        taps.append(Site(site.key, stream.width, mask, module, names=[site.key], prepare=prepare))
    return taps


def seen_at(stream: Stream, site: StreamSite) -> list[nn.Module]:
    """The modules that the stream enters at a site: its norms, or the sublayers that read it bare."""
    if site.norms:
        return [slot.module for slot in site.norms]
    assert site.block is not None
    block, step = stream.blocks[site.block], stream.family.steps[site.step]
    return [block.get_submodule(branch.mixer[0]) for branch in step]


def is_centred(stream: Stream, site: StreamSite) -> bool:
    """Whether what looks at the stream at a site takes its mean out first."""
    return stream.family.norm == "layernorm" and bool(site.norms)


def prepared(rows: torch.Tensor, centred: bool, normed: bool) -> torch.Tensor:
    """``M y``, or ``RMS_D(M y)``, of rows ``(tokens, D)`` of the stream."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    if normed:
        size = rows.square().mean(-1, keepdim=True).sqrt()
        rows = rows / size.clamp_min(torch.finfo(rows.dtype).tiny)
    return rows
