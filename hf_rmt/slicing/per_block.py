"""A basis for each site of the stream, found in sequence on what is sliced already (SliceGPT).

One block is run at a time, over the hidden states of all calibration rows, which stay where the model is: neither the
covariances nor the activations of the whole model are ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_rmt.models.activations import eager
from hf_rmt.models.batches import Batches
from hf_rmt.models.block_walk import BlockCall, NotInSequenceError, StandIns
from hf_rmt.models.live import evaluating
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.models.residual_stream import Stream
from hf_rmt.models.stream_taps import prepared
from hf_rmt.models.token_masks import MAIN, TokenMasks
from hf_rmt.processes import add_up, failing_together, gather, rank_and_count
from hf_rmt.progress import progress_bar
from hf_rmt.slicing.basis import change_site_, give_shortcuts_
from hf_rmt.theory.covariance import Moments

#: Of the number of a site and the moments of the stream there: the basis ``(D, d)`` that is taken, and how readers make
#: the whole out of it (see ``change_basis_``).
BasisOf = Callable[[int, Moments], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class _Rows:
    """One batch on its way through the blocks.

    Attributes:
        hidden: what enters the next block.
        calls: what each block is called with beside that.
        masks: which positions count.
    """

    hidden: torch.Tensor
    calls: list[BlockCall]
    masks: TokenMasks


def slice_in_sequence_(stream: Stream, batches: Batches, basis_of: BasisOf, progress: bool | None = None) -> int:
    """Give each site of a fused stream a basis of its own, from what reaches it through the sites before, in place.

    Args:
        stream: as ``fuse_norms_`` returns it.
        batches: calibration data; over several processes each takes its share.
        basis_of: chooses the basis of a site.
        progress: show a progress bar; None shows one on a terminal.

    Returns:
        The number of tokens, of all processes.

    Raises:
        ValueError: its blocks are not called one after the other, or change what they are given beside the stream.
    """
    give_shortcuts_(stream)
    walk = _Walk(stream, basis_of)
    with torch.no_grad(), evaluating(stream.model), eager(stream.model):
        try:
            walk.through(batches, progress)
        except NotInSequenceError as error:
            name = type(stream.model).__name__
            raise ValueError(f"{name} cannot be sliced block by block: {error}; give per_block=False") from error
    return walk.tokens


class _Walk:
    """All calibration rows of this process, from block to block."""

    def __init__(self, stream: Stream, basis_of: BasisOf):
        self.stream = stream
        self.basis_of = basis_of
        self.rows: list[_Rows] = []
        self.tokens = 0

    def through(self, batches: Batches, progress: bool | None) -> None:
        """Slice at all sites."""
        self.begin(batches)
        with progress_bar(progress, len(self.stream.blocks)) as advance:
            for number in range(len(self.stream.blocks)):
                advance(f"block {number}", 0)
                self.block(number)
                advance("", 1)
        self.border(len(self.stream.sites) - 1)

    def begin(self, batches: Batches) -> None:
        """What the embeddings give, and what each block is called with."""
        model: Any = self.stream.model
        stand_ins = StandIns(list(self.stream.blocks))
        with failing_together():
            for batch, keep in batches.of_process(*rank_and_count()):
                without_cache = {**batch, "use_cache": False} if "use_cache" in batch else batch
                hidden, calls = stand_ins.calls_of(model, without_cache)
                self.rows.append(_Rows(hidden, calls, TokenMasks.of_call(model, (), batch, keep)))
        if not any(gather(len(self.rows))):
            raise ValueError("the calibration data has no batches")

    def block(self, number: int) -> None:
        """Slice at the sites of a block, and go on behind it."""
        steps = len(self.stream.family.steps)
        self.border(number * steps)
        for step in range(1, steps):
            self._change(number * steps + step, self._summed_inside(number, step))
        with failing_together():
            for rows in self.rows:
                rows.hidden = self._run(number, rows)

    def border(self, index: int) -> None:
        """Slice where a block begins, or behind the last one."""
        total = MomentSum(self.stream.width)
        with failing_together():
            for rows in self.rows:
                self._add(total, rows, rows.hidden)
        basis = self._change(index, total)
        norms = self.stream.sites[index].norms if self.stream.family.post_norm else ()
        for rows in self.rows:
            rows.hidden = rows.hidden @ basis.to(rows.hidden)
            for slot in norms:  # one that sits on the residual connection gives what is left its length back
                rows.hidden = slot.module(rows.hidden)

    def _summed_inside(self, number: int, step: int) -> MomentSum:
        """What enters a later step of a block."""
        branch = self.stream.family.steps[step][0]
        bare = self.stream.family.post_norm or branch.norm is None
        module = self.stream.blocks[number].get_submodule(branch.mixer[0] if bare else branch.norm or "")
        seen: list[torch.Tensor] = []
        total = MomentSum(self.stream.width)
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            with failing_together():
                for rows in self.rows:
                    self._run(number, rows)
                    self._add(total, rows, seen.pop())
        finally:
            handle.remove()
        return total

    def _add(self, total: MomentSum, rows: _Rows, hidden: torch.Tensor) -> None:
        try:
            total.add(prepared(rows.masks.tokens(hidden, MAIN), centred=False, normed=True))
        except FloatingPointError as error:
            raise ValueError("NaN or Inf in the residual stream of the calibration data") from error

    def _run(self, number: int, rows: _Rows) -> torch.Tensor:
        return rows.calls[number].run(self.stream.blocks[number], rows.hidden)

    def _change(self, index: int, total: MomentSum) -> torch.Tensor:
        """Choose the basis of a site and take it."""
        own = total.moments(final=True)
        self.tokens = sum(gather(own.tokens))
        eps = max(gather(own.eps))
        moments = Moments(add_up(own.outer), add_up(own.total), self.tokens, eps)
        basis, reading = self.basis_of(index, moments)
        change_site_(self.stream, index, basis, reading)
        return basis
