"""The residual stream of a model: what writes to it, what reads from it, which norms sit on it.

A family of models is a declaration, ``Family``, not a class with a forward pass of its own. ``stream_of`` finds in a
model what its family declares.

Every tensor that touches the stream has exactly one axis of the stream's width D, so a rotation of the stream is the
contraction of that axis, the same for embeddings, readers, writers and heads (Ashkboos et al. 2024, SliceGPT).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_rmt.models.live import unwrap

#: What a norm does: divide by the root mean square and multiply by ``weight``, or by ``1 + weight`` as in Gemma; or
#: take the mean out first, and add a bias.
Norm = Literal["rms", "rms_plus_one", "layernorm"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A sublayer: what it reads from the stream, and what it adds to it. Paths begin at the block.

    Attributes:
        norm: on the stream before the sublayer; of a post-norm family after it, on the sum of both. None where the
            sublayer reads the stream as it is.
        mixer: modules that are called one after the other; the first gets what the block was called with.
        readers: modules and parameters that multiply what was normed.
        writers: those whose product is added to the stream.
        output_norm: on what the sublayer puts out, before it is added.
        dropout: attribute of the block, a module or a rate, that works on what the sublayer puts out.
    """

    norm: str | None
    mixer: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    output_norm: str | None = None
    dropout: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the residual stream runs through a model.

    Paths begin at the headless model, those of ``steps`` at a block, and those of ``heads`` at the whole model.

    Attributes:
        norm: kind of all norms on the stream.
        blocks: the ``ModuleList``.
        entry: modules and parameters that write to the stream before the first block; those that a model has not are
            left out.
        entry_norm: norm between them and the first block, of a post-norm family.
        steps: sublayers of a block, one step after the other; those of one step read the same stream (parallel
            attention).
        final_norm: norm after the last block; None of a post-norm family.
        heads: what reads the stream at its end; the first group of which a model has any holds.
        post_norm: whether norms sit on the residual connection, as in BERT.
        scale: attribute of a block by which a sublayer's output is multiplied.
    """

    norm: Norm
    blocks: str
    entry: tuple[str, ...]
    steps: tuple[tuple[Branch, ...], ...]
    entry_norm: str | None = None
    final_norm: str | None = None
    heads: tuple[tuple[str, ...], ...] = (("lm_head",), ("score",), ("classifier",), ("qa_outputs",))
    post_norm: bool = False
    scale: str | None = None


@dataclass(frozen=True, eq=False)
class StreamTensor:
    """A parameter with an axis of the stream.

    Attributes:
        module: that has it.
        name: of the parameter in the module; of a bias that there is not yet, the name it would have.
        axis: of the stream.
    """

    module: nn.Module
    name: str
    axis: int

    @property
    def value(self) -> torch.Tensor | None:
        """The parameter, None where the module has none."""
        return getattr(self.module, self.name, None)

    @property
    def stored(self) -> torch.Tensor:
        """The parameter, of a module that has it."""
        value = self.value
        assert value is not None
        return value

    def along(self) -> torch.Tensor:
        """``(..., D)`` in float64, its axis of the stream the last."""
        return self.stored.detach().double().movedim(self.axis, -1)

    def replace(self, value: torch.Tensor) -> None:
        """Give the module another parameter, of the same dtype and device, as trainable as the one before."""
        old = self.value
        like = old if old is not None else next(self.module.parameters())
        trained = like.requires_grad
        new = nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=trained)
        setattr(self.module, self.name, new)


@dataclass(frozen=True, eq=False)
class Reader:
    """What multiplies the normed stream; ``bias`` is where a shift of the stream goes, None where it cannot go."""

    weight: StreamTensor
    bias: StreamTensor | None


@dataclass(frozen=True, eq=False)
class Slot:
    """A place where a norm sits: attribute ``name`` of ``owner``."""

    owner: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The norm that is there."""
        return getattr(self.owner, self.name)

    def put(self, module: nn.Module) -> None:
        """Place another one there."""
        setattr(self.owner, self.name, module)


@dataclass(frozen=True, eq=False)
class NormSlot(Slot):
    """That of a norm on the stream: its path, and who reads what it puts out."""

    path: str
    readers: tuple[Reader, ...]


@dataclass(frozen=True, eq=False)
class StreamSite:
    """A place of the stream with a basis of its own.

    Attributes:
        key: path of the norm, or of the block and step.
        writers: what is added to the stream here, of the sublayers before it; of the first one the embeddings.
        outputs: norms on the output of sublayers, which are added here instead of their writers.
        norms: the norms that look at it here, with their readers; several where sublayers run in parallel.
        bare: readers without a norm.
        block, step: the sublayers that read here; ``block`` is None for the last site.
    """

    key: str
    writers: tuple[StreamTensor, ...]
    outputs: tuple[Slot, ...]
    norms: tuple[NormSlot, ...]
    bare: tuple[Reader, ...]
    block: int | None
    step: int = 0

    @property
    def readers(self) -> list[Reader]:
        """All that reads the stream here, through a norm or bare."""
        return [*self.bare, *(reader for slot in self.norms for reader in slot.readers)]

    @property
    def slots(self) -> list[Slot]:
        """All norms here, on the stream and on what is added to it."""
        return [*self.norms, *self.outputs]


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of one model.

    Attributes:
        model: headed or headless.
        family: its declaration.
        width: D.
        sites: from the embeddings to the last norm.
        blocks: the transformer blocks.
        headless: the last norm's output is that of the model, and no head reads it.
        tied: the weight of a head in the basis of the first site, to which a matrix behind the last norm leads, as it
            is that of the embeddings; None where the head reads the stream itself.
    """

    model: nn.Module
    family: Family
    width: int
    sites: tuple[StreamSite, ...]
    blocks: nn.ModuleList
    headless: bool
    tied: StreamTensor | None = None

    @property
    def embeddings(self) -> StreamTensor:
        """Where the table of tokens is."""
        return self.sites[0].writers[0]

    @property
    def table(self) -> torch.Tensor:
        """``(V, D)``, the table of tokens."""
        return self.embeddings.stored


def stream_of(model: Any, family: Family | None = None) -> Stream:
    """The residual stream of a model.

    Args:
        model: headed or headless.
        family: its declaration, where the library has none.

    Raises:
        ValueError: there is no declaration for this type of model, or the model has not what it declares.
    """
    from hf_rmt.models.families import family_of

    model = unwrap(model)
    return _Binding(model, family or family_of(model)).stream()


class _Binding:
    """Finds in a model what a family declares."""

    def __init__(self, model: Any, family: Family):
        self.model = model
        self.base = model.base_model
        self.family = family
        self.blocks: nn.ModuleList = _at(self.base, family.blocks)
        if not isinstance(self.blocks, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no list of blocks at {family.blocks!r}, as is declared for it"
            )

    def stream(self) -> Stream:
        sites = list(self._sites())
        heads, headless = self._heads()
        last = sites[-1]
        tied = None
        if heads and any(getattr(slot.module, "change", None) is not None for slot in last.norms):
            tied, heads = heads[0].weight, ()
        norms = tuple(NormSlot(slot.owner, slot.name, slot.path, heads) for slot in last.norms)
        sites[-1] = StreamSite(last.key, last.writers, last.outputs, norms, last.bare, None)
        width = self.model.config.get_text_config().hidden_size
        stream = Stream(self.model, self.family, width, tuple(sites), self.blocks, headless, tied)
        _check_widths(stream)
        return stream

    def _sites(self) -> Iterator[StreamSite]:
        """Before the first step, between two, and after the last one; the writers of a step belong to the site
        behind it."""
        writers = tuple(self._writers(self.base, self.family.entry))
        outputs: tuple[Slot, ...] = ()
        norms: tuple[NormSlot, ...] = ()
        if self.family.entry_norm is not None:
            norms = self._slot(self.base, self.family.entry_norm, ())
        for number, block in enumerate(self.blocks):
            for index, step in enumerate(self.family.steps):
                key = f"{self.family.blocks}.{number} step {index}"
                readers = tuple(r for branch in step for r in self._readers(block, branch.readers))
                if self.family.post_norm:
                    after = tuple(NormSlot(slot.owner, slot.name, slot.path, readers) for slot in norms)
                    yield StreamSite(key, writers, outputs, after, () if after else readers, number, index)
                    norms = tuple(
                        slot for branch in step if branch.norm for slot in self._slot(block, branch.norm, (), number)
                    )
                else:
                    slots, bare = self._looking(block, step, number)
                    yield StreamSite(key, writers, outputs, slots, bare, number, index)
                writers = tuple(
                    tensor
                    for branch in step
                    if branch.output_norm is None
                    for tensor in self._writers(block, branch.writers)
                )
                outputs = tuple(self._output(block, branch.output_norm) for branch in step if branch.output_norm)
        if not self.family.post_norm:
            norms = self._slot(self.base, self.family.final_norm, ()) if self.family.final_norm else ()
        yield StreamSite("the end", writers, outputs, norms, (), None)

    def _looking(
        self, block: nn.Module, step: Sequence[Branch], number: int
    ) -> tuple[tuple[NormSlot, ...], tuple[Reader, ...]]:
        """The norms of a step with their readers, each norm once, and the readers without any."""
        by_norm: dict[str | None, list[Reader]] = {}
        for branch in step:
            by_norm.setdefault(branch.norm, []).extend(self._readers(block, branch.readers))
        bare = tuple(by_norm.pop(None, ()))
        slots = (slot for norm, found in by_norm.items() if norm for slot in self._slot(block, norm, found, number))
        return tuple(slots), bare

    def _slot(
        self, root: nn.Module, path: str, readers: Sequence[Reader], block: int | None = None
    ) -> tuple[NormSlot, ...]:
        owner, name = _owner(root, path)
        if owner is None or not isinstance(getattr(owner, name, None), nn.Module):
            raise ValueError(f"{type(self.model).__name__} has no norm at {path!r}, as is declared for its family")
        prefix = "" if block is None else f"{self.family.blocks}.{block}."
        return (NormSlot(owner, name, prefix + path, tuple(readers)),)

    def _output(self, block: nn.Module, path: str) -> Slot:
        (slot,) = self._slot(block, path, ())
        return Slot(slot.owner, slot.name)

    def _readers(self, root: nn.Module, paths: Sequence[str]) -> Iterator[Reader]:
        for path in paths:
            owner, name = _owner(root, path)
            found = getattr(owner, name, None) if owner is not None else None
            if isinstance(found, nn.Module):
                axis = 0 if hasattr(found, "nf") else -1  # Conv1D
                bias = StreamTensor(found, "bias", -1) if hasattr(found, "bias") or hasattr(found, "nf") else None
                yield Reader(StreamTensor(found, "weight", axis), bias)
            elif isinstance(found, torch.Tensor):  # stacked experts
                yield Reader(StreamTensor(owner, name, -1), None)  # type: ignore[arg-type]
            else:
                raise ValueError(f"{type(self.model).__name__} has no {path!r}, as is declared for its family")

    def _writers(self, root: nn.Module, paths: Sequence[str]) -> Iterator[StreamTensor]:
        for path in paths:
            owner, name = _owner(root, path)
            found = getattr(owner, name, None) if owner is not None else None
            if isinstance(found, nn.Embedding):
                yield StreamTensor(found, "weight", -1)
            elif isinstance(found, nn.Module):
                yield StreamTensor(found, "weight", -1 if hasattr(found, "nf") else 0)
                if getattr(found, "bias", None) is not None:
                    yield StreamTensor(found, "bias", 0)
            elif isinstance(found, torch.Tensor):  # stacked experts; class tokens and positions
                stacked = found.ndim == 3 and len(found) > 1
                yield StreamTensor(owner, name, 1 if stacked else -1)  # type: ignore[arg-type]

    def _heads(self) -> tuple[tuple[Reader, ...], bool]:
        """What reads the stream at its end, and whether nothing does."""
        if self.base is self.model:
            return (), True
        for group in self.family.heads:
            there = [path for path in group if isinstance(_at(self.model, path), nn.Linear)]
            if there:
                return tuple(self._readers(self.model, there)), False
        raise ValueError(
            f"{type(self.model).__name__}: none of {', '.join(path for group in self.family.heads for path in group)} "
            "reads the end of the residual stream: declare its head, or give the headless model"
        )


def _owner(root: Any, path: str) -> tuple[nn.Module | None, str]:
    """The module that has what lies at a path, None where the way there ends."""
    way, _, name = path.rpartition(".")
    owner = _at(root, way) if way else root
    return (owner if isinstance(owner, nn.Module) else None), name


def _at(root: Any, path: str) -> Any:
    for piece in path.split("."):
        root = getattr(root, piece, None)
    return root


def _check_widths(stream: Stream) -> None:
    """Raise where a declared tensor has no axis of the stream."""
    for site in stream.sites:
        for tensor in (*site.writers, *(reader.weight for reader in site.readers)):
            value = tensor.value
            if value is None or value.shape[tensor.axis] != stream.width:
                shape = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"{type(tensor.module).__name__}.{tensor.name} at {site.key} has the shape {shape}, and no axis "
                    f"{tensor.axis} of the stream's width {stream.width}: the declaration does not fit this model, or "
                    "it is sliced already"
                )
