"""A model over data: passes, batches, processes, and the covariances that come out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rmt.config import CollectConfig
from hf_rmt.models.activations import ActivationError, Collector, SharingChangedError, Site, sites_of
from hf_rmt.models.batches import Batch, Batches, one_sequence
from hf_rmt.models.digests import fingerprint_of
from hf_rmt.models.live import adapters_off, callable_of, is_sharded, unwrap
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.processes import (
    add_up,
    assemble,
    broadcast,
    by_the_first,
    failing_together,
    gather,
    local_count,
    raise_together,
    rank_and_count,
)
from hf_rmt.progress import progress_bar
from hf_rmt.reports import store
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.unfinished import Collected, UnfinishedBlocks, UnfinishedCovariances, chained
from hf_rmt.sequential import collected_by_block
from hf_rmt.theory.covariance import Moments
from hf_rmt.workers import free_memory

#: Share of the free memory that sums may take if nothing is said.
_SHARE_OF_MEMORY = 0.5


class CollectionRun:
    """One collection: a model, the places where its activations are wanted, and how it is done.

    Args:
        model: to be run.
        matrices: its weights, by which the result is known to be of it; all, or those of interest.
        config: how it is done.
        sites: where activations are seen; None for the inputs, and perhaps the outputs, of the matrices.
    """

    def __init__(
        self, model: nn.Module, matrices: list[WeightMatrix], config: CollectConfig, sites: list[Site] | None = None
    ):
        self.model = callable_of(model)
        self.matrices = matrices
        self.config = config
        if sites is None:
            encoder_decoder = bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
            sites = sites_of(matrices, encoder_decoder, config.outputs)
            self.names = [matrix.name for matrix in matrices]
        else:
            self.names = [name for site in sites for name in site.names]
        self.sites = {site.key: site for site in sites}
        #: What of the residual stream is summed, where it is seen.
        self.stream: str | None = None
        self.memory = config.memory or _free_memory(self.model) * _SHARE_OF_MEMORY
        self.dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self.as_base = any(not getattr(matrix.load, "adapters", True) for matrix in matrices)
        self.rank, self.processes = rank_and_count()
        # A model spread over processes runs in all of them at once, or waits for ever.
        self.in_step = self.processes > 1 and is_sharded(self.model)
        self.dropout = self.model.training
        self.count = 0
        self.unfit: set[str] = set()

    def over(self, batches: Batches, origin: dict[str, Any], folder: Path | None = None) -> ActivationCovariances:
        """The covariances over a data set; ``origin`` says where the model came from.

        Raises:
            ValueError: no batches or no tokens, activations that are not finite, too little memory for one sum,
                a folder of another collection.
            RuntimeError: another process failed.
        """
        if not self.sites:
            raise ValueError(
                "none of these matrices reads activations token by token: embeddings read the numbers of tokens, "
                "convolutions and recurrent layers several at once"
            )
        assemble("collect")
        identity = self._identity()
        kept = None
        if folder is not None:
            kind = UnfinishedBlocks if self.config.sequential else UnfinishedCovariances
            kept = kind(folder, identity, self.rank)
        if folder is not None and store.is_saved(folder, "covariances"):
            result = self._finished(folder, identity, batches)
        else:
            with failing_together():
                done = self._collected(batches, kept)
            result = self.joined(done, origin, identity["fingerprints"])
            if folder is not None:
                by_the_first(functools.partial(result.save, folder))
        if kept is not None:
            kept.remove()
        return result

    def _identity(self) -> dict[str, Any]:
        """What a folder must have been made for."""
        return self._conditions() | {
            "sequential": self.config.sequential,
            "matrices": {matrix.name: list(matrix.shape) for matrix in self.matrices},
            "fingerprints": {matrix.name: fingerprint_of(matrix.read()) for matrix in self.matrices},
        }

    def _conditions(self) -> dict[str, Any]:
        """What the covariances say about how they came about."""
        common = {"outputs": self.config.outputs, "dropout": self.dropout, "processes": self.processes}
        return common | {"stream": self.stream}

    def _finished(self, folder: Path, identity: dict[str, Any], batches: Batches) -> ActivationCovariances:
        """Covariances that an earlier collection left, if they are of this model and data."""
        found = ActivationCovariances.load(folder)
        chain = ""
        with failing_together():
            for batch, _ in batches.of_process(self.rank, self.processes):
                chain = chained(chain, batch)
        store.refuse_other(folder, {"fingerprints": found.fingerprints}, {"fingerprints": identity["fingerprints"]})
        wanted = self._conditions() | {"data": gather(chain)}
        store.refuse_other(folder, found.settings, wanted)
        by_the_first(lambda: store.settle(folder, "covariances"))
        return found

    # In one process

    def _collected(self, batches: Batches, kept: UnfinishedCovariances | None) -> Collected:
        """As many passes over the data as the memory asks for, or one block by block."""
        if self.config.sequential:
            assert kept is None or isinstance(kept, UnfinishedBlocks)
            return collected_by_block(self, batches, kept)
        done = (kept.read() if kept is not None else None) or Collected([])
        if self.in_step and len(set(gather(str((done.passes, done.done, done.batches))))) > 1:
            done = Collected([])  # killed while they wrote
        while done.done < max(len(done.passes), 1):
            try:
                done = self._one_pass(batches, done, kept)
            except SharingChangedError as changed:  # begin again, with a sum of its own for that site
                done = Collected([], [*done.apart, changed.site])
        return done

    def _planned(self, batch: dict[str, Any], apart: list[str]) -> list[list[str]]:
        """Which sites to sum in which pass; one sequence of a batch shows which of them share a sum."""
        probe = self.probe(apart)
        # In train mode a BatchNorm takes no single sequence.
        sample = batch if self.model.training else one_sequence(batch)
        with torch.random.fork_rng(), probe.attached(), self.running():
            self.model(**sample)
        passes = self.passes_for(self.sharing(probe))
        return broadcast(passes) if self.in_step else passes

    def probe(self, apart: Collection[str] = ()) -> Collector:
        """Sees which sites share a sum, and sums nothing."""
        return Collector(self.model, list(self.sites.values()), apart, summing=False)

    def sharing(self, probe: Collector) -> list[list[str]]:
        """The sites in groups that share a sum; those that the probe has not seen each by itself."""
        owners = probe.owners()
        groups: dict[str, list[str]] = {}
        for key in self.sites:
            groups.setdefault(owners.get(key, key), []).append(key)
        return list(groups.values())

    def passes_for(self, groups: list[list[str]]) -> list[list[str]]:
        """Groups of sites, in as many passes as the memory asks for.

        Raises:
            ValueError: there is too little for one sum.
        """
        passes: list[list[str]] = []
        room = 0.0
        for group in groups:
            site = self.sites[group[0]]
            needed = MomentSum.bytes_for(site.width, self.dtype)
            if needed > self.memory:
                raise ValueError(
                    f"the sum of what is at {site.names[0]} takes {needed:,} bytes, and there are {self.memory:,.0f}: "
                    "give more with memory="
                )
            if not passes or needed > room:
                passes.append([])
                room = self.memory
            passes[-1] += group
            room -= needed
        return passes

    def _one_pass(self, batches: Batches, done: Collected, kept: UnfinishedCovariances | None) -> Collected:
        """The next pass over the data, or the rest of it."""
        rounds = self._rounds(batches)
        first = next(rounds, None)
        if first is None:
            return replace(done, done=done.done + 1)
        if not done.passes:
            done = replace(done, passes=self._planned(first[0], done.apart))
        sites = [self.sites[key] for key in done.passes[done.done]]
        collector = Collector(self.model, sites, done.apart, guest=self.in_step)
        collector.earlier, collector.resumed = done.batches, dict(done.running)
        words = f"pass {done.done + 1} of {len(done.passes)}"
        shown = self.config.progress if self.rank == 0 else False
        number, chain = 0, ""
        total = None if shown is False else batches.count(self.processes)  # of texts it takes a pass to know
        with progress_bar(shown, total) as advance, collector.attached(), self.running():
            for batch, keep in itertools.chain([first], rounds):
                number += 1
                chain = chained(chain, batch) if kept is not None else ""
                if number > done.batches:
                    collector.keep_rows = keep
                    self.model(**batch)
                    self._raise_kept(collector)
                elif number == done.batches and chain != done.chain:
                    raise ValueError(
                        "the first batches are not those of the run that is to go on: "
                        "give data in the same order, unshuffled or with a seed, or another folder"
                    )
                advance(words, 1)
                if kept is not None and number > done.batches and self._is_due(kept):
                    kept.write(self._with_sums(done, collector, batches=number, chain=chain))
        if number < done.batches:
            raise ValueError(f"the data has {number} batches, the run that is to go on had {done.batches} of it")
        self.unfit |= collector.unfit
        self.count = number
        return self._with_sums(done, collector, batches=0, chain=chain, done=done.done + 1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients; not in inference mode either, in which it cannot be seen whether a tensor was changed
        in place. As the base, where its matrices are those of the base."""
        base = adapters_off(self.model) if self.as_base else contextlib.nullcontext()
        with base, torch.inference_mode(False), torch.no_grad():
            yield

    def _with_sums(self, earlier: Collected, collector: Collector, **progress: Any) -> Collected:
        """With what a collector has summed, which is whole once the pass is ``done``.

        In a pass that goes on after a kill, other sites may share.
        """
        owners = collector.owners()
        if earlier.batches:
            moved = [site for site, owner in owners.items() if earlier.owners.get(site, site) != owner]
            anywhere = list(itertools.chain(*gather(moved))) if self.in_step else moved
            if anywhere:
                raise SharingChangedError(anywhere[0])
        if "done" not in progress:
            return earlier.with_sums({}, owners, running=collector.sums(), **progress)
        return earlier.with_sums(collector.result(final=True)[0], owners, running={}, **progress)

    def _is_due(self, kept: UnfinishedCovariances) -> bool:
        return any(gather(kept.due())) if self.in_step else kept.due()

    def _raise_kept(self, collector: Collector) -> None:
        """Where processes run in step, all raise after the batch what one of them met in it."""
        if self.in_step:
            changed = [site for site in gather(getattr(collector.error, "site", None)) if site]
            if changed:
                raise SharingChangedError(changed[0])
            raise_together(collector.error)

    def _rounds(self, batches: Batches) -> Iterator[Batch]:
        """The batches of this process. Where the model itself is spread over processes, each runs as often as
        the others, if need be over a batch that does not count."""
        own = batches.of_process(self.rank, self.processes)
        if not self.in_step:
            yield from own
            return
        last: Batch | None = None
        while True:
            with failing_together():
                following = next(own, None)
            present = gather(following is not None)
            if not any(present):
                return
            if last is None and not all(present):
                empty = present.index(False)
                raise ValueError(f"process {empty} has no batch: give each process one, or use fewer processes")
            last = following or (last[0], 0)  # type: ignore[index]
            yield last

    # Over all processes

    def joined(self, done: Collected, origin: dict[str, Any], fingerprints: dict[str, str]) -> ActivationCovariances:
        """The sums of all processes, by matrix; all must call."""
        groups = _common_owners(gather(done.owners))
        counts = gather({key: (moments.tokens, moments.eps) for key, moments in done.sums.items()})
        sums = {}
        for name, (members, of_process) in groups.items():
            known = [own[key] for own, key in zip(counts, of_process, strict=True) if key in own]
            if any(tokens for tokens, _ in known):
                own = done.sums.get(of_process[self.rank] or "")
                sums[name] = _total(own, self.sites[members[0]].width, known)
        keys = {member: name for name, (members, _) in groups.items() for member in members if name in sums}
        sides: dict[bool, dict[str, str]] = {False: {}, True: {}}
        for key, site in self.sites.items():
            if key in keys:
                sides[site.output] |= dict.fromkeys(site.names, keys[key])
        silent = [name for site in self.sites.values() if site.key not in keys for name in site.names]
        self._report_silence(sorted(set(silent) - set(sides[False])), sides[False])
        inputs, outputs = (
            {name: sides[side][name] for name in self.names if name in sides[side]} for side in (False, True)
        )
        settings = origin | {
            "tokens": max(moments.tokens for moments in sums.values()),
            "batches": sum(gather(self.count)),
            "silent": [name for name in self.names if name not in inputs],
            "data": gather(done.chain),
            **self._conditions(),
        }
        return ActivationCovariances(sums, inputs, outputs, settings, fingerprints)

    def _report_silence(self, silent: list[str], heard: Mapping[str, str]) -> None:
        if not heard:
            if not any(gather(self.count)):
                raise ValueError("the data has no batches")
            raise ActivationError(f"the model called none of the modules of {', '.join(silent[:5])}")
        if silent:
            warnings.warn(
                f"no token reached {len(silent)} matrices, which have no covariance: {', '.join(silent[:5])}",
                stacklevel=5,
            )
        unfit = sorted(set().union(*gather(self.unfit)))
        if unfit:
            warnings.warn(
                f"the attention mask does not fit what enters {', '.join(unfit[:5])}: padding counted there",
                stacklevel=5,
            )


def _free_memory(model: nn.Module) -> float:
    """Bytes for one process where the activations are: on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() / local_count()


def _common_owners(owners: list[dict[str, str]]) -> dict[str, tuple[list[str], list[str | None]]]:
    """Sites that share a sum in every process: by the first of them, all of them, and whose sum each process has."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for site in dict.fromkeys(key for own in owners for key in own):
        groups.setdefault(tuple(own.get(site) for own in owners), []).append(site)
    return {members[0]: (members, list(own)) for own, members in groups.items()}


def _total(own: Moments | None, width: int, counts: list[tuple[int, float]]) -> Moments:
    """The sum over all processes, of their tokens and precisions; one that saw nothing adds zeros."""
    if own is None:
        own = Moments(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), 0, 0.0)
    return Moments(add_up(own.outer), add_up(own.total), sum(t for t, _ in counts), max(eps for _, eps in counts))
