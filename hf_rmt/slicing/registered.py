"""A sliced model is saved by its own ``save_pretrained`` and loaded by a plain ``from_pretrained``.

The configuration keeps the sizes of the original model and says in ``quantization_config`` how the slice differs.
transformers gives a loader that is registered for such a record the model on the meta device, before its weights: there
the modules get the shapes of the slice. Without this library it fails closed: no norm of the checkpoint fits.

Importing this module registers the loader; ``import hf_rmt`` sees to that (``registering.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rmt.models.families import family_of
from hf_rmt.models.residual_stream import Reader, Stream, stream_of
from hf_rmt.models.stream_modules import StreamNorm, has_shortcuts
from hf_rmt.slicing.basis import change_basis_, give_shortcuts_, width_at
from hf_rmt.slicing.norms import fused_norm

#: What stands as ``quant_method`` in the configuration of a sliced model.
METHOD = "hf_rmt_sliced"
_VERSION = 1


@dataclass(kw_only=True)
class SlicedConfig(QuantizationConfigMixin):
    """How a sliced model differs from one built from its configuration; all plain JSON.

    Attributes:
        width: D, that of the original stream.
        widths: of the stream at each site, from the embeddings to the end.
        shortcuts: whether residual connections are multiplied by matrices.
        headless: whether the last norm is followed by a matrix that leads back to D, as in a model without a head.
        tied: whether it is followed by one that leads to the embeddings, which are the head too.
        biases: modules that have a bias although models of this type may have none there; those of the headless model
            by their names in it.
        origin: what whoever sliced the model wants to tell.
        version: of this format.
        quant_method: by which transformers finds the loader.
    """

    width: int
    widths: list[int]
    shortcuts: bool
    headless: bool
    tied: bool = False
    biases: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    version: int = _VERSION
    quant_method: str = METHOD  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The record that a ``config.json`` holds.

        Raises:
            ValueError: it was written by a later version of the library.
        """
        version = config_dict.get("version", _VERSION)
        if version > _VERSION:
            raise ValueError(
                f"this model was sliced by a later hf_rmt (format {version}, known up to {_VERSION}): upgrade hf_rmt"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


class SlicedQuantizer(HfQuantizer):
    """Loads sliced models. No weight is quantised, and what is loaded trains, moves and saves as any other model."""

    requires_calibration = True  # a slice is made from a model, not while one is loaded
    quantization_config: SlicedConfig
    stream: Stream

    def is_serializable(self) -> bool:
        """It saves as any other model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It trains as any other model."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.stream = give_structure_(model, self.quantization_config)
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """See that everything was there, and take off what marks quantised models, but not the record."""
        _check_loaded(model, self.stream)
        _check_head(model, self.stream)
        for module in model.modules():
            if isinstance(module, StreamNorm):
                module.weight.requires_grad_(False)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(model):
                delattr(model, name)
        model.config.quantization_config = self.quantization_config
        return model


def mark_(stream: Stream, origin: Mapping[str, Any] | None = None) -> SlicedConfig:
    """Write into the configuration of a sliced model how it differs, so that it can be saved and loaded; in place.

    ``config.hidden_size`` stays D, since other sizes derive from it.

    Args:
        stream: of the model, after ``fuse_norms_`` and ``change_basis_``.
        origin: what else to keep there, plain JSON: what it was sliced from, by what.

    Returns:
        The record, now ``config.quantization_config``.

    Raises:
        ValueError: norms are not fused, or the loader would not find the declaration of the family.
        TypeError: ``origin`` is not plain JSON.
    """
    model = stream.model
    if family_of(model) != stream.family:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise ValueError(
            f"the loader would take another declaration of the residual stream of {kind} than this model was sliced "
            "by: give it to register_family first, here and wherever the model is loaded"
        )
    for slot in (slot for site in stream.sites for slot in site.slots):
        if not isinstance(slot.module, StreamNorm):
            raise ValueError(f"{type(slot.module).__name__} at {slot.name} is not fused: fuse_norms_ comes first")
    record = SlicedConfig(
        width=stream.width,
        widths=[width_at(site) for site in stream.sites],
        shortcuts=any(has_shortcuts(block) for block in stream.blocks),
        headless=stream.headless,
        tied=stream.tied is not None,
        biases=sorted(name for name, reader in _biasable(stream) if _bias(reader) is not None),
        origin=dict(origin or {}),
    )
    json.dumps(record.to_dict())
    model.config.quantization_config = record  # type: ignore[union-attr]
    return record


def give_structure_(model: Any, record: SlicedConfig) -> Stream:
    """Give a model built from its configuration the modules and shapes of a slice, in place; values are still to come.

    Args:
        model: on the meta device.
        record: of the slice.

    Returns:
        Its stream.

    Raises:
        ValueError: the family is not declared (``register_family``), or the model is not one that the slice fits.
    """
    stream = _stream_for(model, record)
    with torch.no_grad():
        for site in stream.sites:
            for slot in site.norms:
                slot.put(fused_norm(stream, slot, mapped=site.block is None and (record.headless or record.tied)))
            for output in site.outputs:
                output.put(fused_norm(stream, output, mapped=True))
    stream = stream_of(stream.model, stream.family)  # a head behind a matrix reads the stream no more
    for name, reader in _biasable(stream):
        if name in record.biases and _bias(reader) is None:
            _give_bias(reader)
    if stream.family.post_norm:
        give_shortcuts_(stream)
    bases = [torch.empty(record.width, width, device="meta") for width in record.widths]
    change_basis_(stream, bases if record.shortcuts else bases[0])
    return stream


def _stream_for(model: Any, record: SlicedConfig) -> Stream:
    """The stream of a model that is to become a slice, if it can."""
    name = type(model).__name__
    if model.base_model is model and not record.headless:
        kept = ", ".join(model.config.architectures or ["its own class"])
        raise ValueError(
            f"{name} has no head, and this checkpoint was sliced with one: without it hidden states are "
            f"{record.widths[0 if record.tied else -1]} numbers in the basis of the slice. Load it as {kept} and take "
            ".base_model if that is wanted, or slice the headless model"
        )
    if getattr(model, "all_tied_weights_keys", None) and not record.tied:
        raise ValueError(
            f"{name} ties its head to its embeddings, which in a sliced model are in another basis: pass "
            "tie_word_embeddings=False to from_pretrained for a head of its own"
        )
    stream = stream_of(model.base_model if record.headless else model)
    if (stream.width, len(stream.sites)) != (record.width, len(record.widths)):
        raise ValueError(
            f"this checkpoint was sliced from a stream {record.width} wide with {len(record.widths)} sites, and {name} "
            f"has one {stream.width} wide with {len(stream.sites)}: load it with the configuration it was saved with, "
            "and the declaration of its family that it was sliced by"
        )
    return stream


def _biasable(stream: Stream) -> Iterator[tuple[str, Reader]]:
    """Readers that can have a bias, with names that do not depend on the head that a model has."""
    names = {id(module): name for name, module in stream.model.named_modules()}
    names |= {id(module): name for name, module in stream.model.base_model.named_modules()}  # type: ignore[union-attr]
    for reader in (reader for site in stream.sites for reader in site.readers):
        if reader.bias is not None:
            yield names[id(reader.weight.module)], reader


def _bias(reader: Reader) -> torch.Tensor | None:
    return None if reader.bias is None else reader.bias.value


def _give_bias(reader: Reader) -> None:
    weight = reader.weight.stored
    assert reader.bias is not None
    reader.bias.replace(torch.empty(weight.shape[0 if reader.weight.axis == -1 else -1], device=weight.device))


def _check_loaded(model: nn.Module, stream: Stream) -> None:
    """Raise if transformers made up what the checkpoint has not; a new head may be."""
    needed = {id(tensor) for tensor in _loaded_tensors(stream)}
    missing = [
        name
        for name, tensor in model.named_parameters()
        if id(tensor) in needed and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        raise ValueError(
            f"the checkpoint has no tensor that fits {', '.join(missing[:5])}{' ...' if missing[5:] else ''}: it is "
            "not the one that its config.json describes"
        )


def _check_head(model: Any, stream: Stream) -> None:
    """Raise if a tied head was asked for as one of its own, which the checkpoint has not."""
    head = None if stream.tied is None else stream.tied.value
    made_up = head is not None and not getattr(head, "_is_hf_initialized", False)
    if made_up and head is not stream.table and stream.tied.module is model.get_output_embeddings():  # type: ignore[union-attr]
        raise ValueError(
            f"this checkpoint has no head of its own for {type(model).__name__}, which is tied to its embeddings: load "
            "it without tie_word_embeddings=False"
        )


def _loaded_tensors(stream: Stream) -> Iterator[torch.Tensor | None]:
    """All tensors of the stream but those of heads."""
    for site in stream.sites:
        yield from (tensor.value for tensor in site.writers)
    for slot in (slot for site in stream.sites for slot in site.slots):
        yield from slot.module.parameters()
    for reader in (reader for site in stream.sites[:-1] for reader in site.readers):
        yield from (reader.weight.value, _bias(reader))
    for block in stream.blocks:
        if has_shortcuts(block):
            yield from _shortcuts(block)


def _shortcuts(block: Any) -> Iterator[torch.Tensor]:
    return block.shortcuts.parameters()


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(SlicedConfig)
if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantizer(METHOD)(SlicedQuantizer)
