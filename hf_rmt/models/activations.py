"""What flows through the weights of a model: hooks that sum the moments of activations (paper Eq. 7).

A *site* is a place where activations are seen: what enters a module, what it puts out, what is
routed to one expert. Sites that see the same tensor (query, key and value; gate and up) share one sum.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_rmt.models import quantised
from hf_rmt.models.expert_calls import ExpertCalls
from hf_rmt.models.live import unwrap
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.models.token_masks import TokenMasks, mask_for
from hf_rmt.theory.covariance import Moments


class ActivationError(ValueError):
    """Activations of which no moments can be taken; the message names the module and the batch."""


class SharingChangedError(RuntimeError):
    """A site that shared its input with another does so no longer, and needs a sum of its own."""

    def __init__(self, site: str):
        super().__init__(f"what enters {site} also entered another module in some batches and not in others")
        self.site = site


@dataclass(eq=False)
class Site:
    """One place where activations are seen.

    Attributes:
        key: name of the place, after the first matrix that is there.
        width: number of features n.
        mask: which mask of the batch says what counts, see ``token_masks``.
        module: the module that is hooked.
        output: whether what the module puts out is seen, or what enters.
        argument: position of the input among the module's arguments.
        rows: rows of a fused weight, whose outputs are seen; None for all.
        expert: name of the stacked parameter and number of the expert, or None.
        names: the matrices whose activations these are.
        prepare: what is done to the rows ``(tokens, n)`` before they are summed; None for nothing.
    """

    key: str
    width: int
    mask: str
    module: nn.Module
    output: bool = False
    argument: int = 0
    rows: Any = None
    expert: tuple[str, int] | None = None
    names: list[str] = field(default_factory=list)
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None


def sites_of(matrices: list[WeightMatrix], encoder_decoder: bool, outputs: bool = False) -> list[Site]:
    """Where the activations of matrices are to be seen.

    Args:
        matrices: live ones, from ``models.live.matrices_of``. Embeddings, which read no activations, have no site, nor
            have convolutions, recurrent layers and what else does not multiply each token with one matrix.
        encoder_decoder: whether the model is an encoder with a decoder.
        outputs: see what they put out too, but for routers and the fused weight of torch's
            MultiheadAttention, whose outputs are no product with one matrix.
    """
    sites: dict[str, Site] = {}
    for matrix in matrices:
        for site in _sites_of_matrix(matrix, mask_for(matrix, encoder_decoder), outputs):
            sites.setdefault(site.key, site).names.append(matrix.name)
    return list(sites.values())


def _sites_of_matrix(matrix: WeightMatrix, mask: str, outputs: bool) -> Iterator[Site]:
    load: Any = matrix.load
    module: nn.Module = load.module
    if matrix.kind == "embedding" or isinstance(module, nn.RNNBase) or matrix.folded or "[head=" in matrix.name:
        return
    linear = quantised.is_linear(module) or hasattr(module, "nf")  # Conv1D
    if linear and load.tuner is not None and load.adapters:
        module = load.tuner  # an adapter may scale what enters, and adds to what is put out
    expert = None if matrix.expert is None else (load.name, matrix.expert)
    if isinstance(module, nn.MultiheadAttention):  # takes query, key and value apart
        key, argument = matrix.name, ("query", "key", "value").index(matrix.part or "query")
    else:
        key, argument = matrix.name.removesuffix(f"[{matrix.part}]"), 0
    yield Site(key, matrix.shape[1], mask, module, argument=argument, expert=expert)
    if outputs and (linear or expert is not None):
        yield Site(f"{matrix.name} output", matrix.shape[0], mask, module, output=True, rows=matrix.rows, expert=expert)


class Collector:
    """Sums moments at sites while a model runs.

    Attributes:
        batches: number of forward passes summed.
        unfit: names of matrices whose activations did not fit the attention mask, of which every position counted.
        keep_rows: sequences of the next batch that count, the first ones, or a function that tells by its size;
            None for all.
        known_masks: masks of the next batch, where what is called is a block, whose arguments do not tell them.
        skipped: names of matrices for whose sums there was no memory.
        earlier: batches summed before, by a run that was killed; errors count them.
        resumed: its sums, by the key of their site, that nothing was added to yet.
        error: what ended the collection, of a ``guest``.
        training_only: count forward passes with gradients alone, not those of references and generations.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        apart: Collection[str] = (),
        *,
        summing: bool = True,
        guest: bool = False,
        memory: float = math.inf,
    ):
        """``model``: the module that is called; ``apart``: sites that never share a sum; without ``summing`` it
        is only seen which sites share one; a ``guest`` in somebody else's forward pass keeps its errors to
        itself, and sees no more after the first; ``memory``: bytes for the sums."""
        self.guest = guest
        self.memory = memory
        self.skipped: list[str] = []
        self.training_only = False
        self.error: Exception | None = None
        self.model = model
        self.sites = sites
        self.apart = apart
        self.summing = summing
        self.batches = 0
        self.earlier = 0
        self.resumed: dict[str, MomentSum] = {}
        self.unfit: set[str] = set()
        self.keep_rows: int | Callable[[int], int | None] | None = None
        self.known_masks: TokenMasks | None = None
        self._states: dict[str, _State] = {}
        self._masks: TokenMasks | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watches every forward pass of the model meanwhile; hooks come off whatever happens."""
        with contextlib.ExitStack() as stack:
            self._at_sites = stack.enter_context(contextlib.ExitStack())
            for module, sites in self._by_module().items():
                for handle in self._hook(module, sites, self._at_sites):
                    self._at_sites.callback(handle.remove)
            handles = (
                self.model.register_forward_pre_hook(self._guarded(self._begin_batch), with_kwargs=True, prepend=True),
                self.model.register_forward_hook(self._guarded(self._end_batch)),
                self.model.register_forward_hook(self._after_batch, always_call=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
            self._at_sites.enter_context(eager(self.model, self.guest))
            stack.callback(self._leave_batch)
            yield

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook that keeps its errors to itself where this is a guest."""
        if not self.guest:
            return hook

        def guarded(*arguments: Any) -> None:
            if self.error is None:
                try:
                    hook(*arguments)
                except Exception as error:  # whatever it is, the model is somebody else's
                    self.error = error
                    self._leave_batch()

        return guarded

    def _by_module(self) -> dict[nn.Module, list[Site]]:
        modules: dict[nn.Module, list[Site]] = {}
        for site in self.sites:
            modules.setdefault(site.module, []).append(site)
        return modules

    def _hook(self, module: nn.Module, sites: list[Site], stack: contextlib.ExitStack) -> Iterator[Any]:
        """Hooks for the sites of one module."""
        experts = [site for site in sites if site.expert is not None]
        inputs = [site for site in sites if not site.output and site.expert is None]
        outputs = [site for site in sites if site.output and site.expert is None]
        if experts:
            calls = ExpertCalls(module, experts, self._guarded(self._see_expert))
            yield module.register_forward_pre_hook(calls.begin, with_kwargs=True)
            yield module.register_forward_hook(calls.end, always_call=True)
            stack.callback(calls.end)
        if inputs:

            def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
                for site in inputs:
                    self._see(site, _argument(site, args, kwargs))

            yield module.register_forward_pre_hook(self._guarded(enter), with_kwargs=True)
        if outputs:

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                for site in outputs:
                    self._see(site, output if site.rows is None else output[..., site.rows])

            yield module.register_forward_hook(self._guarded(leave))

    def _begin_batch(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.training_only and not torch.is_grad_enabled():
            return
        self._masks = self.known_masks or TokenMasks.of_call(unwrap(model), args, kwargs, self.keep_rows)
        if self.summing and self._masks.empty():
            raise ActivationError(f"batch {self.earlier + self.batches}: the attention mask leaves no token")
        for state in self._states.values():
            state.begin_batch()

    def _end_batch(self, *_: Any) -> None:
        if self._masks is None:
            return
        for state in self._states.values():
            if state.leader is not None and state.calls != state.leader.calls:
                raise SharingChangedError(state.site.key)
        self.batches += 1
        self._leave_batch()

    def _after_batch(self, *_: Any) -> None:
        """Where the batch did not come to its end, what called the model may not come back to take the hooks off."""
        if self._masks is not None:
            self._leave_batch()
            self._at_sites.close()

    def _leave_batch(self, *_: Any) -> None:
        # A module that runs again in the backward pass (gradient checkpointing) finds no batch to count for.
        self._masks = None

    def _see(self, site: Site, activations: Any) -> None:
        """Add what is at a site to its sum, unless a site with the same tensor has."""
        if self._masks is None or not (isinstance(activations, torch.Tensor) and activations.is_floating_point()):
            return
        state = self._state(site, activations)
        state.calls += 1
        if state.leader is not None:
            if not state.leader.shows(activations):
                raise SharingChangedError(site.key)
            return
        state.show(activations)
        if state.sum is not None:
            self._add(site, state.sum, self._masks.tokens(activations.detach(), site.mask))

    def _see_expert(self, site: Site, activations: torch.Tensor, positions: torch.Tensor | None, total: int) -> None:
        """Add what is routed to an expert: rows that come from ``positions`` of a batch of ``total``."""
        if self._masks is None:
            return
        state = self._state(site, activations)
        if state.sum is None:
            return
        self._add(site, state.sum, self._masks.routed(activations.detach(), positions, total, site.mask))

    def _state(self, site: Site, activations: torch.Tensor) -> _State:
        if site.key not in self._states:
            if activations.shape[-1] != site.width:
                raise ActivationError(
                    f"{site.names[0]}: activations of {activations.shape[-1]} features for a weight of {site.width}"
                )
            leader = self._leader(site, activations)
            total = self._sum_of(site, activations) if self.summing and leader is None else None
            self._states[site.key] = _State(site, total, leader)
        return self._states[site.key]

    def _sum_of(self, site: Site, activations: torch.Tensor) -> MomentSum | None:
        """A sum for a site, or that of the run that was killed; None if there is no memory for it."""
        needed = MomentSum.bytes_for(site.width, activations.dtype)
        if needed > self.memory:
            self.skipped.append(site.names[0])
            return None
        self.memory -= needed
        return self.resumed.pop(site.key, None) or MomentSum(site.width)

    def _leader(self, site: Site, activations: torch.Tensor) -> _State | None:
        """A site of this batch with the same tensor. Once batches were summed it is too late to share."""
        if self.batches or site.output or site.expert is not None or site.key in self.apart:
            return None
        others = (state for state in self._states.values() if state.leader is None and not state.site.output)
        return next((s for s in others if s.site.mask == site.mask and s.shows(activations)), None)

    def _add(self, site: Site, total: MomentSum, tokens: torch.Tensor) -> None:
        assert self._masks is not None
        if self._masks.misfit:
            self.unfit.add(site.names[0])
        try:
            total.add(tokens if site.prepare is None else site.prepare(tokens))
        except FloatingPointError as error:
            where = "is put out by" if site.output else "enters"
            raise ActivationError(
                f"batch {self.earlier + self.batches}: there is NaN or Inf in what {where} {site.names[0]}; "
                "nothing of this batch was kept"
            ) from error

    def result(self, final: bool = False) -> tuple[dict[str, Moments], dict[str, str]]:
        """Moments by the key of the site that summed them, and the ``owners``; after a ``final`` one no more."""
        return {key: total.moments(final) for key, total in self.sums().items()}, self.owners()

    def sums(self) -> dict[str, MomentSum]:
        """The sums themselves, by the key of the site that sums."""
        return self.resumed | {key: state.sum for key, state in self._states.items() if state.sum is not None}

    def owners(self) -> dict[str, str]:
        """For every site that was seen, the key of the one whose sum is its own."""
        leaders = {key: state.leader or state for key, state in self._states.items()}
        return {key: state.site.key for key, state in leaders.items() if state.sum is not None or not self.summing}


class _State:
    """A site at work: its sum, or the site that sums for it."""

    def __init__(self, site: Site, total: MomentSum | None, leader: _State | None = None):
        self.site = site
        self.sum = total
        self.leader = leader
        self.begin_batch()

    def begin_batch(self) -> None:
        """Forget the tensor of the batch before."""
        self.calls = 0
        self._tensor: weakref.ref[torch.Tensor] | None = None
        self._signature: tuple[Any, ...] = ()

    def show(self, tensor: torch.Tensor) -> None:
        """Remember what the site sees now."""
        self._tensor, self._signature = weakref.ref(tensor), _signature(tensor)

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether this site saw the same values last. Its tensor must be alive, or the memory may be another's."""
        alive = self._tensor is not None and self._tensor() is not None
        return alive and _signature(tensor) == self._signature


def _signature(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same for two views of the same values, unless one was written to in between."""
    version = 0 if tensor.is_inference() else tensor._version
    # Two contiguous views that differ in shape before the features hold the same rows.
    layout = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return tensor.data_ptr(), layout, tensor.shape[-1], tensor.dtype, version


def _argument(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What enters a module, by position or by name."""
    if site.argument < len(args):
        return args[site.argument]
    named = ("query", "key", "value")[site.argument]
    if named in kwargs:
        return kwargs[named]
    return next((value for value in kwargs.values() if isinstance(value, torch.Tensor)), None)


@contextlib.contextmanager
def eager(model: nn.Module, guest: bool = False) -> Iterator[None]:
    """Lets a model run as it is written for a while: compiled code and fused experts call no hooks.

    A ``guest`` does not see whether what calls the model is compiled.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    fused = [(c, c._experts_implementation_internal) for c in configs.values() if _fuses_experts(c)]
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    compiled = compiled or (guest and "torch._dynamo" in sys.modules)
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        for config, _ in fused:
            config._experts_implementation_internal = "eager"
        with stance:
            yield
    finally:
        for config, implementation in fused:
            config._experts_implementation_internal = implementation


def _fuses_experts(config: Any) -> bool:
    return getattr(config, "_experts_implementation_internal", None) not in (None, "eager")
