"""A model block by block: its list of blocks, what each is called with, and what stands in for them meanwhile."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

#: Arguments that a block would write into each time it runs.
_CACHES = ("past_key_values", "layer_past")

#: Arguments beside tensors that cannot carry anything from one block to the next.
_CONSTANTS = (bool, int, float, complex, str, bytes, range, enum.Enum, torch.dtype, torch.device, torch.Size)


class NotInSequenceError(ValueError):
    """Blocks that are not called one after the other, each with what the one before puts out; the message says why."""


class BlockCall(NamedTuple):
    """What a block is called with beside the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, BlockCall]:
        """The hidden states among the arguments of a block, and the rest without caches.

        Raises:
            NotInSequenceError: hidden states do not come first, or there is an object that blocks may change.
        """
        rest = {key: value for key, value in kwargs.items() if key not in _CACHES}
        hidden = args[0] if args else rest.pop("hidden_states", None)
        if not isinstance(hidden, torch.Tensor):
            raise NotInSequenceError("its blocks do not take hidden states as their first argument")
        for leaf in tree_leaves((args[1:], rest)):
            if not _is_constant(leaf):
                raise NotInSequenceError(f"its blocks are given a {type(leaf).__name__}, which they may change")
        return hidden, cls(args[1:], rest)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states behind a block.

        Raises:
            NotInSequenceError: it writes into what it is given beside these, which other blocks may read.
        """
        versions = self.versions()
        found = block(hidden, *self.args, **self.kwargs)
        if self.versions() != versions:
            raise NotInSequenceError("a block writes into what it is given beside the hidden states")
        return found[0] if isinstance(found, tuple) else found

    def versions(self) -> list[int]:
        """How often each of the tensors was written to."""
        tensors = (leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor))
        return [_version(tensor) for tensor in tensors]


@dataclass(frozen=True)
class _Parked:
    """A tensor in main memory, and where it came from."""

    value: torch.Tensor
    device: torch.device


def parked(tree: Any) -> Any:
    """Arguments with their tensors in main memory, each once however often it is among them."""
    known: dict[int, _Parked] = {}

    def park(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known.setdefault(id(leaf), _Parked(leaf.cpu(), leaf.device))

    return tree_map(park, tree)


def taken_back(tree: Any) -> Any:
    """``parked`` arguments where they were before."""
    return tree_map(lambda leaf: leaf.value.to(leaf.device) if isinstance(leaf, _Parked) else leaf, tree)


class StandIns:
    """Stand in for the blocks of a model: they write down what they are called with, and compute nothing.

    A forward pass with them costs what is before the blocks and behind them. Forward hooks of the blocks do not run.

    Attributes:
        blocks: in the order in which they are called.
        result: what the last one gives; None for what entered the first, as all others give.
    """

    def __init__(
        self, blocks: list[nn.Module], extras: list[int | None] | None = None, modules: Collection[nn.Module] = ()
    ):
        """Nothing stands in yet.

        Args:
            blocks: in the order in which they are called.
            extras: values that each puts out behind the hidden states, in a tuple; None for a bare tensor.
            modules: those that may be called by the blocks they are in alone.
        """
        self.blocks = blocks
        self.modules = modules
        self.extras = extras or [None] * len(blocks)
        self.result: torch.Tensor | None = None
        self._calls: list[BlockCall] = []
        self._versions: list[list[int]] = []
        self._entered: torch.Tensor
        self._given: tuple[torch.Tensor, int]

    def calls_of(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, list[BlockCall]]:
        """What enters the first block in a forward pass, and what each is called with beside.

        Raises:
            NotInSequenceError: blocks are not called once each in their order, or with other hidden states than the
                one before gave, or with what is written to later; modules of blocks are called from elsewhere.
        """
        self._calls, self._versions = [], []
        with self._standing_in(), _called_within(self.blocks, self.modules, running=()):
            model(**batch)
        if len(self._calls) < len(self.blocks):
            raise NotInSequenceError(f"of its {len(self.blocks)} blocks it calls {len(self._calls)}")
        _refuse_written(self._calls, self._versions)
        return self._entered, self._calls

    @contextlib.contextmanager
    def _standing_in(self) -> Iterator[None]:
        """As torch.compile does, what is called is put in the place of the module's call, not of its ``forward``, which
        may be a hook of accelerate's."""
        before: list[Any] = [block._compiled_call_impl for block in self.blocks]
        try:
            for number, block in enumerate(self.blocks):
                block._compiled_call_impl = partial(self._stand_in, number)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                block._compiled_call_impl = own

    def _stand_in(self, number: int, *args: Any, **kwargs: Any) -> Any:
        hidden, call = BlockCall.of(args, kwargs)
        if number != len(self._calls):
            raise NotInSequenceError(f"it calls block {number} where block {len(self._calls)} would be next")
        if number == 0:
            self._entered = hidden.clone()  # what is behind the blocks may write into it
        elif not _same(hidden, self._given[0]) or _version(self._given[0]) != self._given[1]:
            raise NotInSequenceError(f"it changes the hidden states between blocks {number - 1} and {number}")
        self._calls.append(call)
        self._versions.append(call.versions())
        last = number == len(self.blocks) - 1
        given = self.result if last and self.result is not None else hidden
        self._given = given, _version(given)
        extra = self.extras[number]
        return given if extra is None else (given, *[None] * extra)


def stand_ins_for(model: nn.Module, modules: Collection[nn.Module], batch: Mapping[str, Any]) -> StandIns:
    """Find the blocks of a model, and see that it can be run block by block.

    It is run twice over a small batch, as it is and with stand-ins. Both times the blocks must be called alike, and the
    same must enter the modules of interest elsewhere.

    Args:
        model: in evaluation mode.
        modules: those of interest, in blocks and elsewhere.
        batch: arguments of the model.

    Raises:
        NotInSequenceError: they are not called alike, or there is not one list of blocks.
    """
    lists = _lists_of_blocks(model, modules)
    inside = {part for blocks in lists.values() for block in blocks for part in block.modules()}
    others = [module for module in modules if module not in inside]
    every = [block for blocks in lists.values() for block in blocks]
    with _watching(every, others) as whole, _called_within(every, modules, whole.running):
        model(**batch)
    blocks = _only_called(lists, whole)
    _refuse_written(whole.calls, whole.versions)
    stand_ins = StandIns(blocks, [whole.extras[block] for block in blocks], modules)
    stand_ins.result = whole.result
    with _watching([], others) as without:
        entering, calls = _calls_without_blocks(stand_ins, model, batch)
    if whole.result is None or whole.result.shape != entering.shape:
        raise NotInSequenceError("its hidden states leave the blocks in another shape than they enter")
    stand_ins.result = None
    for number, (own, other) in enumerate(zip(whole.calls, calls, strict=True)):
        if not _same((own.args, own.kwargs), (other.args, other.kwargs)):
            raise NotInSequenceError(f"block {number} is given more of the blocks before than their hidden states")
    if not _same(whole.elsewhere, without.elsewhere):
        raise NotInSequenceError("what is behind its blocks reads more of them than the hidden states of the last")
    return stand_ins


def _calls_without_blocks(
    stand_ins: StandIns, model: nn.Module, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, list[BlockCall]]:
    try:
        return stand_ins.calls_of(model, batch)
    except NotInSequenceError:
        raise
    except Exception as error:  # whatever a model does that misses something its blocks put out
        raise NotInSequenceError(f"it needs more of its blocks than hidden states: {error!r}") from error


def _lists_of_blocks(model: nn.Module, modules: Collection[nn.Module]) -> dict[str, list[nn.Module]]:
    """The outermost lists of modules that hold modules of interest, by name; all lists where none does."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{one}.") for one in found):
            found[name] = list(module)
    wanted = set(modules)
    holding = {name: blocks for name, blocks in found.items() if any(wanted & set(block.modules()) for block in blocks)}
    return holding or found


def _only_called(lists: Mapping[str, list[nn.Module]], seen: _Seen) -> list[nn.Module]:
    """The list whose blocks were called, each once in its order."""
    called = {name: blocks for name, blocks in lists.items() if not seen.extras.keys().isdisjoint(blocks)}
    if len(called) != 1:
        there = f"several lists of blocks, {', '.join(called)}" if called else "no list of blocks that it calls"
        raise NotInSequenceError(f"it has {there}")
    ((name, blocks),) = called.items()
    if seen.order != blocks:
        raise NotInSequenceError(f"it does not call each of the {len(blocks)} blocks of {name} once, in their order")
    parts = [part for block in blocks for part in block.modules()]
    if len(parts) != len(set(parts)):
        raise NotInSequenceError(f"blocks of {name} share modules")
    return blocks


@dataclass
class _Seen:
    """What was seen in a forward pass.

    Attributes:
        order: blocks as they were called.
        running: those that were called and are not done.
        calls: what each was called with.
        versions: of the tensors of each call, when it came.
        extras: number of values that each put out behind the hidden states; None for a bare tensor.
        result: the hidden states behind the last.
        elsewhere: what entered other modules, in its order.
    """

    order: list[nn.Module] = field(default_factory=list)
    running: list[nn.Module] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    extras: dict[nn.Module, int | None] = field(default_factory=dict)
    result: torch.Tensor | None = None
    elsewhere: list[Any] = field(default_factory=list)

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.order.append(block)
        self.running.append(block)
        self.calls.append(BlockCall.of(args, kwargs)[1])
        self.versions.append(self.calls[-1].versions())

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.running.remove(block)
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, torch.Tensor):
            raise NotInSequenceError(f"a block puts out a {type(hidden).__name__}, no hidden states")
        self.extras[block] = len(output) - 1 if isinstance(output, tuple) else None
        self.result = hidden.clone()

    def enter_other(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.elsewhere.append((args, kwargs))


@contextlib.contextmanager
def _watching(blocks: list[nn.Module], others: list[nn.Module]) -> Iterator[_Seen]:
    seen = _Seen()
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(seen.enter, with_kwargs=True, prepend=True).remove)
            stack.callback(block.register_forward_hook(seen.leave).remove)
        for module in others:
            stack.callback(module.register_forward_pre_hook(seen.enter_other, with_kwargs=True, prepend=True).remove)
        yield seen


@contextlib.contextmanager
def _called_within(
    blocks: list[nn.Module], modules: Collection[nn.Module], running: Collection[nn.Module]
) -> Iterator[None]:
    """Raises where one of the modules is called while no block that it is in is ``running``: block by block, that call
    would not be seen."""
    holders: dict[nn.Module, list[nn.Module]] = {}
    names: dict[nn.Module, str] = {}
    wanted = set(modules) - set(blocks)
    for block in blocks:
        for name, part in block.named_modules():
            if part in wanted:
                holders.setdefault(part, []).append(block)
                names[part] = name

    def look(module: nn.Module, args: Any) -> None:
        if not any(block in running for block in holders[module]):
            raise NotInSequenceError(f"it calls {names[module]} of a block outside of that block")

    with contextlib.ExitStack() as stack:
        for module in holders:
            stack.callback(module.register_forward_pre_hook(look, prepend=True).remove)
        yield


def _refuse_written(calls: list[BlockCall], versions: list[list[int]]) -> None:
    """Raise if the arguments of a call were written to after it came: what is kept is not what it was given."""
    for number, (call, before) in enumerate(zip(calls, versions, strict=True)):
        if call.versions() != before:
            raise NotInSequenceError(f"what block {number} is given beside the hidden states is written to later")


def _is_constant(leaf: Any) -> bool:
    """Whether an argument is the same for ever, but for tensors, which tell when they were written to.

    Of what a model shares among its blocks, a mapping that nothing was put into does no harm.
    """
    if leaf is None or isinstance(leaf, (torch.Tensor, *_CONSTANTS)):
        return True
    return isinstance(leaf, Mapping) and not leaf


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of arguments are alike; of objects that are no constants, the class."""
    (mine, form), (theirs, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(map(_same_leaf, mine, theirs))


def _same_leaf(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, torch.Tensor):
        same_form = (one.shape, one.dtype) == (other.shape, other.dtype)
        return same_form and bool(((one == other.to(one.device)) | (one.isnan() & other.to(one.device).isnan())).all())
    return one == other if isinstance(one, _CONSTANTS) else True
