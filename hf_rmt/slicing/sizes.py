"""How many parameters a slice has, before it is made: exact, with shortcuts and the untied head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hf_rmt.models.residual_stream import Stream, StreamSite
from hf_rmt.models.stream_modules import StreamNorm, has_shortcuts


def parameters_of(model: nn.Module) -> int:
    """Number of parameters of a model, one that is tied counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def plain_size(dense: Stream, width: int) -> int:
    """Parameters of a plain slice of some width, from the stream of the model as it is: its head is untied."""
    whole = sum(parameter.numel() for _, parameter in dense.model.named_parameters(remove_duplicate=False))
    norms = [slot.module for site in dense.sites for slot in site.norms]
    on_norms = sum(parameter.numel() // dense.width for norm in norms for parameter in norm.parameters())
    on_stream = sum(value.numel() // dense.width for site in dense.sites for value in _along(site))
    return whole - (on_stream + on_norms) * (dense.width - width)


def registered_size(stream: Stream, width: int, shortcuts: bool) -> int:
    """Parameters of a registered slice of a stream that is fused and still whole.

    Args:
        stream: of the model.
        width: at all sites.
        shortcuts: whether residual connections get matrices; those of a post-norm model have them already.
    """
    whole = parameters_of(stream.model)
    blocks, steps = len(stream.blocks), len(stream.family.steps)
    if any(has_shortcuts(block) for block in stream.blocks):
        whole -= blocks * steps * stream.width**2
        shortcuts = True
    on_stream = sum(value.numel() // stream.width for site in stream.sites for value in _along(site))
    if stream.tied is not None:  # of the matrix before the head both axes are cut, the second one when the first is
        on_stream += width
    return whole - on_stream * (stream.width - width) + (blocks * steps * width**2 if shortcuts else 0)


def _along(site: StreamSite) -> Iterator[torch.Tensor]:
    """All tensors with an axis of the stream at a site whose norms are fused."""
    yield from (tensor.value for tensor in site.writers if tensor.value is not None)
    yield from (reader.weight.value for reader in site.readers if reader.weight.value is not None)
    norms = [slot.module for slot in site.slots]
    yield from (norm.change.weight for norm in norms if isinstance(norm, StreamNorm) and norm.change is not None)
