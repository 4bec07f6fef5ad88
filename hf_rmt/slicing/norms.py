"""Norms of the residual stream give their gains away, so that the stream can be rotated (Ashkboos et al. 2024).

After ``fuse_norms_`` a norm only divides by a length, which no rotation of the stream changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_rmt.models import quantised
from hf_rmt.models.live import is_sharded, unwrap
from hf_rmt.models.residual_stream import (
    Family,
    Reader,
    Slot,
    Stream,
    StreamSite,
    stream_of,
)
from hf_rmt.models.stream_modules import StreamNorm, add_shortcuts


def fuse_norms_(model: Any, family: Family | None = None, *, keep_tied: bool = False) -> Stream:
    """Move the gains of all norms of the residual stream into what reads it, in place; the model computes the same.

    Readers take the gains into their columns, and what a LayerNorm adds into their biases, which are made where there
    are none. What writes to the stream of a model with LayerNorms loses its mean. A norm on the output of a sublayer
    keeps its gain in a matrix behind it. On a norm that sits on the residual connection (BERT) its gain stays there, in
    a matrix of the block. The head is untied from the embeddings, or read through a matrix.

    Args:
        model: of transformers, with its weights in memory; changed in place.
        family: its declaration, where the library has none.
        keep_tied: a head that is tied to the embeddings stays so where the norms have no mean to take out: the gain
            before it goes into a matrix behind the last norm.

    Returns:
        The stream, whose norms are ``StreamNorm``.

    Raises:
        ValueError: there is no declaration, or it does not fit; the model was fused before, or its weights cannot be
            changed (see ``refuse``). It is then as it was.
    """
    refuse(unwrap(model))
    stream = stream_of(model, family)
    _check(stream)
    with torch.no_grad():
        if keep_tied and _can_stay_tied(stream):
            stream = _without_head(stream)
        else:
            untie_(stream.model)
        if stream.family.norm == "layernorm":
            _centre(stream)
        if stream.family.post_norm:
            _add_shortcuts(stream)
        for site in stream.sites:
            _fuse_site(stream, site)
        for site in stream.sites:
            for output in site.outputs:
                output.put(fused_norm(stream, output, mapped=True))
    return stream


def refuse(model: Any) -> None:
    """Raise where the residual stream of a model cannot be worked on.

    Raises:
        ValueError: not of transformers; sliced or quantised; offloaded, dispatched or sharded; projected; with
            adapters; or with a module that stands at two places.
    """
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise ValueError(f"{name} is no model of transformers, whose residual stream could be known")
    if getattr(model, "sliced", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised or sliced already: take the original model")
    parameters, modules = dict(model.named_parameters()), list(model.named_modules(remove_duplicate=False))
    twice = [path for path, module in modules if sum(module is other for _, other in modules) > 1]
    reasons = {
        "its weights are offloaded or were never loaded": any(p.device.type == "meta" for p in parameters.values()),
        "it is dispatched over devices by accelerate: load it without a device_map": any(
            hasattr(module, "_hf_hook") for _, module in modules
        ),
        "its weights are sharded over processes": is_sharded(model),
        "directions of it are hidden by SVDPruner.project or project_: undo that first": any(
            hasattr(hook, "hides_stream") for _, module in modules for hook in module._forward_pre_hooks.values()
        ),
        "it has adapters: merge them first": any("lora_" in key or ".base_layer." in key for key in parameters),
        "its weights are quantised: load it unquantised": any(
            quantised.coding_of(module, key) is not None
            for _, module in modules
            for key in ("weight", *module._parameters)
        ),
        "its weights are not floating-point numbers": not all(p.is_floating_point() for p in parameters.values()),
        f"the modules {' and '.join(twice[:2])} are one, and what is tied so cannot be untied": bool(twice),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"the residual stream of {name} cannot be changed: {'; '.join(found)}")


def _check(stream: Stream) -> None:
    """Raise what would be raised in the middle."""
    name = type(stream.model).__name__
    for site in stream.sites:
        if any(isinstance(slot.module, StreamNorm) for slot in site.slots):
            raise ValueError(f"the norms of this {name} were fused before")
        biases = [gain_of(slot.module, stream.family, stream.width)[1] for slot in site.slots]
        if not any(bias is not None and bool(bias.any()) for bias in biases[: len(site.norms)]):
            continue
        placeless = [reader for slot in site.norms for reader in slot.readers if reader.bias is None]
        if placeless:
            kind = type(placeless[0].weight.module).__name__
            raise ValueError(f"{name}: {kind} at {site.key} has no place for a bias, and the norm before it adds one")
        if stream.family.post_norm and site.block is not None:
            following = stream.sites[stream.sites.index(site) + 1]
            if not any(tensor.name == "bias" for tensor in following.writers):
                raise ValueError(
                    f"{name}: nothing at {following.key} has a bias, to which the norm before it could give its own"
                )


def _can_stay_tied(stream: Stream) -> bool:
    """Whether the head is the embeddings, and these keep their mean."""
    last = stream.sites[-1]
    return (
        stream.family.norm != "layernorm"
        and len(last.norms) == len(last.readers) == 1
        and last.readers[0].weight.value is stream.embeddings.value
    )


def _without_head(stream: Any) -> Stream:
    """The same stream, with a matrix behind the last norm in mind that leads to the head."""
    for config in (stream.model.config, stream.model.config.get_text_config()):  # it may have been tied by hand
        config.tie_word_embeddings = True
    (slot,), (head,) = stream.sites[-1].norms, stream.sites[-1].readers
    last = replace(stream.sites[-1], norms=(replace(slot, readers=()),))
    return replace(stream, sites=(*stream.sites[:-1], last), tied=head.weight)


def untie_(model: Any) -> list[str]:
    """Give every module that shares a parameter with another one of its own, in place; returns their names."""
    seen: dict[int, str] = {}
    untied = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, nn.Parameter(parameter.clone(), parameter.requires_grad))
            untied.append(name)
        seen[id(parameter)] = name
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return untied


def gain_of(norm: nn.Module, family: Family, width: int) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Gain ``(D,)`` and bias ``(D,)`` of a norm in float64, and its eps."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    gain = torch.ones(width, dtype=torch.float64) if weight is None else weight.detach().double()
    gain = gain + 1 if family.norm == "rms_plus_one" and weight is not None else gain
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
    if eps is None:
        raise ValueError(f"{type(norm).__name__} has no eps, so it is no norm that can be fused")
    return gain, None if bias is None else bias.detach().double(), float(eps)


def _centre(stream: Stream) -> None:
    """Take the mean over the stream out of all that is written to it, where a LayerNorm looks at it."""
    for site in stream.sites:
        if stream.family.post_norm and not site.norms:
            continue
        for tensor in site.writers:
            value = tensor.stored.double()
            tensor.replace(value - value.mean(tensor.axis, keepdim=True))


def _add_shortcuts(stream: Stream) -> None:
    """The residual connections of a post-norm model, which are to carry gains."""
    for block in stream.blocks:
        add_shortcuts(block, stream.family, [(stream.width, stream.width)] * len(stream.family.steps))


def _fuse_site(stream: Stream, site: StreamSite) -> None:
    for slot in site.norms:
        gain, bias, _ = gain_of(slot.module, stream.family, stream.width)
        last = site.block is None
        norm = fused_norm(stream, slot, mapped=last and not slot.readers)
        for reader in slot.readers:
            _absorb(reader, gain, bias)
        if stream.family.post_norm and not last:
            _into_residual(stream, site, gain, bias)
        slot.put(norm)
    if stream.family.post_norm and not site.norms and site.block is not None:
        _into_residual(stream, site, torch.ones(stream.width, dtype=torch.float64), None)


def _absorb(reader: Reader, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
    """``W <- W diag(g)``, ``b <- b + W beta``."""
    along = reader.weight.along()
    if bias is not None and bool(bias.any()):
        shift = along @ bias
        assert reader.bias is not None
        known = reader.bias.value
        reader.bias.replace(shift if known is None else known.double() + shift)
    reader.weight.replace((along * gain).movedim(-1, reader.weight.axis))


def _into_residual(stream: Stream, site: StreamSite, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
    """The residual connection behind a norm that sits on it carries its gain, and the next writer adds its bias."""
    assert site.block is not None
    following = stream.sites[stream.sites.index(site) + 1]
    matrix, shift = torch.diag(gain), bias
    if stream.family.norm == "layernorm":
        matrix = matrix - matrix.mean(1, keepdim=True)
        shift = None if bias is None else bias - bias.mean()
    shortcut: Any = stream.blocks[site.block].shortcuts[site.step]  # type: ignore[index]
    shortcut.weight.copy_(matrix.mT)
    if shift is not None:
        target = next((tensor for tensor in following.writers if tensor.name == "bias"), None)
        if target is not None:  # else it is zero
            target.replace(target.stored.double() + shift)


def fused_norm(stream: Stream, slot: Slot, mapped: bool) -> StreamNorm:
    """What comes into the place of a norm; ``mapped``: with a matrix behind it, which holds the gain."""
    gain, bias, eps = gain_of(slot.module, stream.family, stream.width)
    like = next(slot.module.parameters(), next(stream.model.parameters()))
    norm = StreamNorm(stream.width, eps, (stream.width, stream.width) if mapped else None, bias is not None)
    norm.to(like.device, like.dtype).train(slot.module.training).requires_grad_(like.requires_grad)
    if norm.change is not None:
        norm.change.weight.copy_(torch.diag(gain))
        if bias is not None:
            norm.change.bias.copy_(bias)
    return norm
