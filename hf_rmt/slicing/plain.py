"""The plain form of a sliced model: an ordinary, narrower one of its class, which loads without this library.

A fused norm divides by the root mean square over the original width D, an ordinary one over its own width n. What
writes to the stream is multiplied by ``sqrt(n / D)``, which makes both the same and leaves eps as it is, and what reads
it is divided by that. The gains of norms could do the latter, but in a 16-bit type they would all be rounded alike.

A LayerNorm takes the mean out first. It leaves vectors orthogonal to the ones vector alone: the stream is laid there.
The ones direction is then free, and serves readers that need a bias where the architecture has none: the norm before
them adds 1 along it, and they have their bias there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_rmt.models.residual_stream import Family, NormSlot, Reader, Stream, StreamTensor, stream_of
from hf_rmt.models.stream_modules import StreamNorm, has_shortcuts
from hf_rmt.slicing.basis import width_at

if TYPE_CHECKING:
    import transformers

#: Grouped products of stacked experts need rows of a multiple of 16 bytes, which are 8 numbers of a 16-bit type.
_EXPERT_MULTIPLE = 8


def can_be_plain(config: Any, model_class: Any = None, family: Family | None = None) -> str | None:
    """Whether a sliced model of this kind has a plain form: one basis for the whole model, ``hidden_size`` smaller.

    Seen, not known: the architecture is laid out narrower on the meta device, and every shape and factor compared.

    Args:
        config: of the model before it is sliced.
        model_class: of the model; else that of ``config.architectures``, or the one with a language model's or an
            image classifier's head that transformers has for it.
        family: the declaration of its stream, where the library has none.

    Returns:
        None if it has, else a sentence that says why not.
    """
    try:
        _plain_architecture(config, model_class, family)
    except ValueError as error:
        return str(error)
    return None


def plain_width(config: Any, width: int, model_class: Any = None, family: Family | None = None) -> int:
    """The largest ``hidden_size`` up to a given one that a plain form can have.

    It is the number of columns of the basis in a family with RMS norms. With LayerNorms a plain form of width n holds
    n - 1 columns orthogonal to the ones vector, as are all eigenvectors of the second moment of a centred stream but
    the last; the ones vector itself, along which that stream is zero, may be a further one.

    Args:
        config: of the model before it is sliced.
        width: wanted.
        model_class, family: as of ``can_be_plain``.

    Raises:
        ValueError: the model has no plain form, or none that narrow.
    """
    return _plain_architecture(config, model_class, family).taken(width)


def _plain_architecture(config: Any, model_class: Any, family: Family | None) -> _Architecture:
    """One that can be plain; raises what ``can_be_plain`` says of others."""
    try:
        found = _Architecture.of(config, model_class, family)
        found.taken(config.hidden_size - 1)
    except ValueError as error:
        raise ValueError(f"{error}. The registered form can hold such a slice") from error
    return found


def plain_form(stream: Stream) -> transformers.PreTrainedModel:
    """A sliced model as an ordinary one of its class, with a smaller ``hidden_size`` and nothing of this library in it.

    It puts out what the sliced model does, to rounding; in 16-bit types its weights are rounded once more. Its
    ``config.head_dim`` is that of the original model, and its head is untied. A Gemma in bfloat16 makes up for how
    ``sqrt(hidden_size)`` is rounded there: run it in the dtype it was made in.

    Args:
        stream: of the model, after ``fuse_norms_`` and ``change_basis_`` with one basis; it stays as it is.

    Raises:
        ValueError: the architecture cannot express it, the model is headless, not fused or has shortcuts, or no
            configuration of it takes this width; with what to do instead.
    """
    model: Any = stream.model
    architecture = _Architecture(model.config, type(model), stream.family)
    try:
        architecture.taken(stream.width - 1)
    except ValueError as error:
        raise ValueError(f"{error}. Use the registered form") from error
    _check_sliced(stream)
    frame = _Frame.of(stream)
    nearest = architecture.taken(frame.width)
    if nearest != frame.width:
        raise ValueError(
            f"{type(model).__name__} takes no hidden_size of {frame.width}, which the {width_at(stream.sites[0])} "
            f"columns of this slice need; the next below is {nearest}: cut {frame.width - nearest} more of them, or "
            "use the registered form"
        )
    with torch.no_grad():
        weights = _Weights(stream, frame, architecture.laid_out(frame.width)).make()
        return _loaded(model, architecture.config_of(frame.width), weights)


# What an architecture takes


@dataclass(frozen=True, eq=False)
class _Architecture:
    """A class of models, its configuration and the declaration of its stream, None for the registered one."""

    config: Any
    cls: Any
    family: Family | None = None

    @classmethod
    def of(cls, config: Any, model_class: Any, family: Family | None) -> _Architecture:
        """That of ``can_be_plain``."""
        return cls(config, model_class or _class_for(config), family)

    @cached_property
    def reference(self) -> Stream:
        """The stream at its full width."""
        return stream_of(self.laid_out(self.config.hidden_size), self.family)

    def taken(self, width: int) -> int:
        """The largest width up to a given one with which the class can be built; raises where it then does not fit."""
        self._check_family()
        step = _EXPERT_MULTIPLE if any(_is_experts(tensor) for tensor in _tensors(self.reference)) else 1
        refusal = ""
        for candidate in range(width - width % step, 0, -step):
            try:
                narrower = self.laid_out(candidate)
            except Exception as error:  # whatever the configuration or the code of the architecture raises
                refusal = refusal or f": {' '.join(str(error.__cause__ or error).split())}"
                continue
            _compare(self.reference, narrower, candidate)
            return candidate
        multiple = f" and divisible by {step}, as its experts need" if step > 1 else ""
        raise ValueError(f"{self.cls.__name__} takes no hidden_size up to {width}{multiple}{refusal}")

    def config_of(self, width: int) -> Any:
        """The configuration of a narrower model, made as one that is read from a file."""
        values = self.config.to_dict()
        values.pop("quantization_config", None)  # where a registered slice is described
        heads = self.config.num_attention_heads
        values[self.config.attribute_map.get("hidden_size", "hidden_size")] = width
        values["head_dim"] = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        values["tie_word_embeddings"] = False
        return type(self.config).from_dict(values)

    def laid_out(self, width: int) -> Any:
        """A model on the meta device."""
        config = self.config_of(width)
        with torch.device("meta"):
            return self.cls(config)

    def _check_family(self) -> None:
        """Raise if the declaration already rules it out."""
        name = self.cls.__name__
        if self.reference.family.post_norm:
            raise ValueError(f"{name} has norms on the residual connection, whose gains become matrices there")
        if any(site.outputs for site in self.reference.sites):
            raise ValueError(f"{name} has norms on the outputs of sublayers, whose gains become matrices behind them")


def _class_for(config: Any) -> Any:
    """The class of models with a configuration, with a head where there is one."""
    import transformers

    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    tables = (
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    found = (table.get(type(config), None) for table in tables)
    cls = next((cls for cls in (*named, *found) if cls is not None), None)
    if cls is None:
        raise ValueError(f"transformers has no model with a head for {type(config).__name__}: give its class")
    return cls


def _compare(reference: Stream, narrower: Any, width: int) -> None:
    """Raise if something changes with the width that does not lie on the stream, or does not where it does."""
    name = type(narrower).__name__
    axes = {id(tensor.value): tensor.axis for tensor in _tensors(reference)}
    shapes = {key: list(tensor.shape) for key, tensor in _named(narrower)}
    wrong = []
    for key, tensor in _named(reference.model):
        expected = list(tensor.shape)
        if id(tensor) in axes:
            expected[axes[id(tensor)]] = width
        if shapes.get(key) != expected:
            wrong.append(f"{key} is {shapes.get(key)} and not {expected}")
    if wrong:
        raise ValueError(f"{name} has other sizes than a slice at a hidden_size of {width}: {', '.join(wrong[:2])}")
    factors = _factors(narrower)
    for key, value in _factors(reference.model).items():
        if factors.get(key, value) != value:
            raise ValueError(
                f"{name} has another {key} at a hidden_size of {width}: {factors[key]:.4g}, not {value:.4g}"
            )


def _named(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _factors(model: Any) -> dict[str, float]:
    """Numbers that modules compute with, but for that of Gemma's embeddings, which is known here."""
    numbers = ((f"{path}.{key}", x) for path, module in model.named_modules() for key, x in vars(module).items())
    return {name: x for name, x in numbers if isinstance(x, float) and not name.endswith(".scalar_embed_scale")}


def _tensors(stream: Stream) -> Iterator[StreamTensor]:
    """All that has an axis of the stream, norms with it."""
    for site in stream.sites:
        yield from site.writers
        yield from (reader.weight for reader in site.readers)
        for slot in site.norms:
            yield from (StreamTensor(slot.module, name, -1) for name, _ in slot.module.named_parameters())


def _is_experts(tensor: StreamTensor) -> bool:
    value = tensor.value
    return value is not None and value.ndim == 3 and len(value) > 1


# The weights


def _check_sliced(stream: Stream) -> None:
    name = type(stream.model).__name__
    if stream.headless:
        raise ValueError(
            f"{name} has no head: its output would be in the basis of the slice, since no ordinary model has a matrix "
            "behind its last norm. Slice it with a head, or use the registered form"
        )
    if stream.tied is not None:
        raise ValueError(
            f"the head of this {name} is tied to its embeddings behind a matrix, which no ordinary model has: fuse it "
            "with keep_tied=False, or use the registered form"
        )
    if any(has_shortcuts(block) for block in stream.blocks):
        raise ValueError(
            f"this {name} has matrices in its residual connections, as bases that differ from site to site need: "
            "slice it with one basis for the whole model, or use the registered form"
        )
    if not all(isinstance(slot.module, StreamNorm) for site in stream.sites for slot in site.norms):
        raise ValueError(f"the norms of this {name} are not fused: fuse_norms_ and change_basis_ come first")


@dataclass(frozen=True, eq=False)
class _Frame:
    """Where the d columns of the sliced stream lie among the n of the plain one.

    Attributes:
        width: n.
        mirror: of a model with LayerNorms ``(n,)`` the normal of the reflection that takes the unused direction to the
            ones vector.
        unused: ``(d,)`` the direction in which nothing is ever written, as the ones vector in the original basis; None
            where there is none, and one more column has to be made.
    """

    width: int
    mirror: torch.Tensor | None = None
    unused: torch.Tensor | None = None

    @classmethod
    def of(cls, stream: Stream) -> _Frame:
        """That of a sliced model."""
        width = width_at(stream.sites[0])
        if stream.family.norm != "layernorm":
            return cls(width)
        unused = _unused_direction(stream, width)
        width += unused is None
        start = torch.eye(width, dtype=torch.float64)[0] if unused is None else unused
        ones = torch.full_like(start, 1 / math.sqrt(width))
        mirror = torch.where(start @ ones > 0, -start, start) - ones
        return cls(width, mirror / mirror.norm(), unused)

    def place(self, value: torch.Tensor) -> torch.Tensor:
        """``(..., d)`` to ``(..., n)``, at right angles to the ones vector if there are LayerNorms."""
        if self.mirror is None:
            return value
        mirror = self.mirror.to(value.device)
        if self.unused is None:
            value = nn.functional.pad(value, (1, 0))
        else:
            unused = self.unused.to(value.device)
            value = value - (value @ unused)[..., None] * unused
        return value - 2 * (value @ mirror)[..., None] * mirror


def _unused_direction(stream: Stream, width: int) -> torch.Tensor | None:
    """The direction of the stream in which nothing is written, to rounding."""
    gram = torch.zeros(width, width, dtype=torch.float64)
    writers = [tensor for site in stream.sites for tensor in site.writers if bool(tensor.stored.any())]
    for tensor in writers:
        rows = tensor.along().reshape(-1, width)
        gram += (rows.mT @ rows / rows.square().sum()).cpu()
    direction = torch.linalg.eigh(gram)[1][:, 0]
    tolerance = 1e-12 + 2 * torch.finfo(writers[0].stored.dtype).eps
    for tensor in writers:
        rows = tensor.along()
        if (rows @ direction.to(rows.device)).norm() > tolerance * rows.norm() / math.sqrt(width):
            return None
    return direction


class _Weights:
    """All tensors of the plain model by their names."""

    def __init__(self, stream: Stream, frame: _Frame, laid_out: Any):
        self.stream = stream
        self.frame = frame
        self.laid_out = laid_out
        self.there = laid_out.state_dict()
        self.own: dict[str, torch.Tensor] = stream.model.state_dict()
        self.paths = {id(module): path for path, module in stream.model.named_modules()}
        self.made: dict[str, torch.Tensor] = {}

    def make(self) -> dict[str, torch.Tensor]:
        """Takes what it has put in its place, or nowhere, out of ``own``; the rest stays as it is."""
        scale = self._scale()
        for site in self.stream.sites:
            for tensor in site.writers:
                by_itself = hasattr(tensor.module, "scalar_embed_scale")
                self._put(tensor, self.frame.place(tensor.along()) * (1.0 if by_itself else scale))
            for reader in site.bare:
                self._read(reader)
            for slot in site.norms:
                self._norm(slot)
        self.made |= {name: tensor.detach().clone() for name, tensor in self.own.items()}
        self._check()
        return self.made

    def _scale(self) -> float:
        """Of the plain stream: ``sqrt(n / D)``, and of a Gemma what its embeddings make it.

        They multiply by ``sqrt(hidden_size)`` themselves, which 16-bit types round by up to 0.4 %, and weights rounded
        to such a type could not make up for so little. All other writers can; it changes eps alone by as much.
        """
        for tensor in self.stream.sites[0].writers:
            module: Any = tensor.module
            if hasattr(module, "scalar_embed_scale"):
                narrower: Any = self.laid_out.get_submodule(self.paths[id(module)])
                now = torch.tensor(narrower.scalar_embed_scale, dtype=module.weight.dtype)
                return float(now) / float(module.embed_scale.to(now.dtype))
        return math.sqrt(self.frame.width / self.stream.width)

    def _name(self, tensor: StreamTensor) -> str:
        path = self.paths[id(tensor.module)]
        return f"{path}.{tensor.name}" if path else tensor.name

    def _put(self, tensor: StreamTensor, value: torch.Tensor) -> None:
        name = self._name(tensor)
        del self.own[name]
        self.made[name] = value.movedim(-1, tensor.axis).to(tensor.stored.dtype).contiguous()

    def _norm(self, slot: NormSlot) -> None:
        """A norm of gain 1 and its readers; it adds the ones vector if one of them needs that."""
        path = self.paths[id(slot.module)]
        del self.own[f"{path}.weight"]
        needed = [self._read(reader, path) for reader in slot.readers]
        like = slot.readers[0].weight.stored
        gain = 0.0 if self.stream.family.norm == "rms_plus_one" else 1.0
        for name, value in (("weight", gain), ("bias", float(any(needed)))):
            if f"{path}.{name}" in self.there:
                self.made[f"{path}.{name}"] = like.new_full((self.frame.width,), value)

    def _read(self, reader: Reader, norm: str = "") -> bool:
        """Returns whether its norm has to add the ones vector, since the architecture has no bias there."""
        value = self.frame.place(reader.weight.along()) * math.sqrt(self.stream.width / self.frame.width)
        bias = "" if reader.bias is None else self._name(reader.bias)
        free = self.frame.mirror is not None and f"{norm}.bias" in self.there
        homeless = free and bias in self.own and bias not in self.there
        if homeless:
            value += self.own.pop(bias).double()[:, None] / self.frame.width
        self._put(reader.weight, value)
        return homeless

    def _check(self) -> None:
        """Raise where the sliced model has what its architecture has not."""
        different = sorted(set(self.made) ^ set(self.there))
        if different:
            raise ValueError(
                f"an ordinary {type(self.laid_out).__name__} and this one do not both have {', '.join(different[:5])}: "
                "what it has no place for can be in the registered form alone"
            )


# The model


def _loaded(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model from its configuration and weights, and as the given one in everything else."""
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    with _no_progress_bar():
        made = type(model).from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    made.config.name_or_path = model.config.name_or_path
    made.name_or_path = model.name_or_path
    if made.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Nothing is read here that takes time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
