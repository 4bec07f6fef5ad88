"""A collection block by block: all batches go through one block of the model before they go through the next.

Each block is fetched once, from wherever it is offloaded, and its sums are all that is in memory of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from hf_rmt.models.activations import Collector, SharingChangedError, eager
from hf_rmt.models.batches import Batches, one_sequence
from hf_rmt.models.block_walk import BlockCall, NotInSequenceError, parked, stand_ins_for, taken_back
from hf_rmt.models.live import brought_in, is_sharded, unwrap
from hf_rmt.models.token_masks import TokenMasks
from hf_rmt.progress import progress_bar
from hf_rmt.reports.unfinished import Collected, UnfinishedBlocks, chained
from hf_rmt.theory.covariance import Moments

if TYPE_CHECKING:
    from hf_rmt.collecting import CollectionRun


def collected_by_block(run: CollectionRun, batches: Batches, kept: UnfinishedBlocks | None) -> Collected:
    """What this process collects of its batches, block by block.

    Args:
        run: the collection.
        batches: gone through once.
        kept: where to keep the sums of each block and the hidden states; None for memory.

    Raises:
        ValueError: the model has no blocks that are called one after the other, is in train mode or sharded; the data
            is not that of the run that is to go on; too little memory for one sum.
    """
    model = unwrap(run.model)
    if any(module.training for module in run.model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in train mode, in which dropout would draw otherwise block by block: call "
            "model.eval() first, or leave sequential out"
        )
    if is_sharded(run.model):
        raise ValueError(
            f"{type(model).__name__} is sharded over processes, which gather it whole: leave sequential out"
        )
    with eager(run.model), run.running():
        try:
            return _Walk(run, kept).over(batches)
        except NotInSequenceError as error:
            name = type(model).__name__
            raise ValueError(f"{name} cannot be run block by block: {error}; leave sequential out") from error
        finally:
            if kept is not None:
                kept.tidy()


class _HiddenStates(Protocol):
    """The hidden states of each batch that enter a block."""

    def put(self, number: int, batch: int, hidden: torch.Tensor) -> None: ...

    def get(self, number: int, batch: int) -> torch.Tensor: ...

    def drop(self, number: int) -> None: ...


class _InMemory:
    """Hidden states by the number of the block and of the batch."""

    def __init__(self) -> None:
        self.states: dict[int, dict[int, torch.Tensor]] = {}

    def put(self, number: int, batch: int, hidden: torch.Tensor) -> None:
        self.states.setdefault(number, {})[batch] = hidden

    def get(self, number: int, batch: int) -> torch.Tensor:
        return self.states[number][batch]

    def drop(self, number: int) -> None:
        self.states.pop(number, None)


@dataclass
class _Rows:
    """One batch.

    Attributes:
        batch: arguments of the model, parked; None where nothing but the blocks is of interest.
        calls: what each block is called with beside the hidden states, parked.
        masks: which positions count.
        device: where hidden states enter the first block.
    """

    batch: Any
    calls: list[BlockCall]
    masks: TokenMasks
    device: torch.device


@dataclass
class _Stage:
    """A block, or what is before the blocks and behind them.

    Attributes:
        called: the module that is called.
        modules: all whose weights that takes.
        groups: keys of the sites there that share a sum.
    """

    called: nn.Module
    modules: list[nn.Module]
    groups: list[list[str]]

    def sharing(self, apart: list[str]) -> list[list[str]]:
        """The groups without sites that have a sum of their own, and these."""
        together = [[key for key in group if key not in apart] for group in self.groups]
        return [*filter(None, together), *([key] for group in self.groups for key in group if key in apart)]


class _Walk:
    """All batches of this process, from block to block, and then through what is around the blocks."""

    def __init__(self, run: CollectionRun, kept: UnfinishedBlocks | None):
        self.run = run
        self.kept = kept
        self.hidden: _HiddenStates = kept or _InMemory()
        self.rows: list[_Rows] = []
        self.stages: list[_Stage] = []
        self.apart: list[str] = []

    def over(self, batches: Batches) -> Collected:
        """The sums of all sites."""
        done = (self.kept.read() if self.kept is not None else None) or Collected([])
        chain = self._begin(batches, anew=not done.done)
        if done.done and chain != done.chain:
            raise ValueError(
                "the data is not that of the run that is to go on: give it in the same order, unshuffled or with a "
                "seed, or another folder"
            )
        done = replace(done, chain=chain)
        left = range(done.done, len(self.stages))
        shown = self.run.config.progress if self.run.rank == 0 else False
        with progress_bar(shown, len(left) * len(self.rows)) as advance:
            for number in left:
                done = self._with_stage(number, done, partial(advance, f"part {number + 1} of {len(self.stages)}", 1))
        self.run.count = len(self.rows)
        return done

    # Before the blocks

    def _begin(self, batches: Batches, anew: bool) -> str:
        """What the first block is given of each batch, kept where a run begins ``anew``; gives the data's hash."""
        own = batches.of_process(self.run.rank, self.run.processes)
        first = next(own, None)
        if first is None:
            return ""
        self._survey(first[0])
        chain = ""
        with brought_in(self._around()):
            for index, (batch, keep) in enumerate(itertools.chain([first], own)):
                chain = chained(chain, batch) if self.kept is not None else ""
                entering = self._recorded(batch, keep)
                if anew:
                    self.hidden.put(0, index, entering.cpu())
        return chain

    def _survey(self, batch: dict[str, Any]) -> None:
        """Find the blocks, and which sites are in which of them; what is behind the last with a site is left out."""
        groups = self._look_at(one_sequence(batch))
        self.blocks = self.stand_ins.blocks
        self.stages = [_Stage(block, list(block.modules()), []) for block in self.blocks]
        self.stages.append(_Stage(self.run.model, self._around(), []))
        number_of = {part: number for number, block in enumerate(self.blocks) for part in block.modules()}
        for group in groups:
            numbers = [number_of.get(self.run.sites[key].module, -1) for key in group]
            for number in set(numbers):
                own = [key for key, its in zip(group, numbers, strict=True) if its == number]
                self.stages[number].groups.append(own)
        for stage in self.stages:
            self.run.passes_for(stage.groups)  # raises before hours of work
        while not self.stages[-1].groups:
            self.stages.pop()

    def _look_at(self, sample: dict[str, Any]) -> list[list[str]]:
        """Run the model over one sequence: finds its blocks, and gives the keys of sites that share a sum."""
        modules = list({site.module: None for site in self.run.sites.values()})
        while True:
            probe = self.run.probe(self.apart)
            try:
                with torch.random.fork_rng(), probe.attached():
                    self.stand_ins = stand_ins_for(self.run.model, modules, sample)
                return self.run.sharing(probe)
            except SharingChangedError as changed:
                self.apart.append(changed.site)

    def _around(self) -> list[nn.Module]:
        """The modules that are in no block."""
        inside = {part for block in self.blocks for part in block.modules()}
        return [module for module in self.run.model.modules() if module not in inside]

    def _recorded(self, batch: dict[str, Any], keep: Any) -> torch.Tensor:
        """What enters the first block; keeps what all are called with beside that."""
        entering, calls = self.stand_ins.calls_of(self.run.model, batch)
        wanted = batch if len(self.stages) > len(self.blocks) else None
        wanted, calls = parked((wanted, calls[: len(self.stages)]))
        masks = TokenMasks.of_call(unwrap(self.run.model), (), batch, keep)
        self.rows.append(_Rows(wanted, calls, masks, entering.device))
        return entering

    # In one block

    def _with_stage(self, number: int, done: Collected, advance: Callable[[], None]) -> Collected:
        """One block more, whose sums are kept before the hidden states that entered it go."""
        with brought_in(self.stages[number].modules):
            sums, owners = self._sums_at(number, advance)
        done = replace(done, done=number + 1, owners=done.owners | owners)
        done = done.with_sums(sums, {}) if self.kept is None else self.kept.write_block(done, sums)
        self.hidden.drop(number)
        return done

    def _sums_at(self, number: int, advance: Callable[[], None]) -> tuple[dict[str, Moments], dict[str, str]]:
        """Sums by site and the sites' owners; anew, if a site that shared its input does so no longer."""
        while True:
            try:
                return self._sums_apart(number, advance)
            except SharingChangedError as changed:
                self.apart.append(changed.site)

    def _sums_apart(self, number: int, advance: Callable[[], None]) -> tuple[dict[str, Moments], dict[str, str]]:
        stage = self.stages[number]
        sums: dict[str, Moments] = {}
        owners: dict[str, str] = {}
        for keys in self.run.passes_for(stage.sharing(self.apart)) or [[]]:
            collector = Collector(stage.called, [self.run.sites[key] for key in keys], self.apart)
            with collector.attached():
                for index, rows in enumerate(self.rows):
                    collector.known_masks = rows.masks
                    self._run(number, index)
                    advance()
            found, of_site = collector.result(final=True)
            sums |= found
            owners |= of_site
            self.run.unfit |= collector.unfit
        return sums, owners

    def _run(self, number: int, index: int) -> None:
        """One batch through a block, or through what is around the blocks."""
        rows = self.rows[index]
        entering = self.hidden.get(number, index).to(rows.device, copy=True)  # a block may write into what it is given
        if number == len(self.blocks):
            self.stand_ins.result = entering
            self.stand_ins.calls_of(self.run.model, taken_back(rows.batch))
            return
        behind = taken_back(rows.calls[number]).run(self.blocks[number], entering)
        if number + 1 < len(self.stages):
            self.hidden.put(number + 1, index, behind.cpu())
