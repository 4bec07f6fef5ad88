"""What a sweep takes parts out of: the spectrum of weights, or the residual stream."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from hf_rmt.models.live import is_sharded, unwrap
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.processes import failing_together, rank_and_count, shares
from hf_rmt.surgery.description import p_value_profiles, removed_by
from hf_rmt.theory.selection import Selection
from hf_rmt.workers import seconds_estimate

if TYPE_CHECKING:
    from hf_rmt.config import SweepConfig
    from hf_rmt.pruner import SVDPruner
    from hf_rmt.reports.covariances import ActivationCovariances

#: A role and a block, None for all blocks.
Place = tuple[str, int | None]
#: Gives the covariances of a model's residual stream.
Streams = Callable[[nn.Module], "ActivationCovariances"]


class Subject(Protocol):
    """Something with components, of which a sweep removes some at some places.

    Attributes:
        pruner: of the model.
    """

    pruner: SVDPruner

    def places(self, config: SweepConfig) -> list[Place]:
        """Where the grid removes; raises where that is not there."""

    def prepare(self, places: Sequence[Place]) -> None:
        """Compute what selections at these places need."""

    def size(self, selection: Selection, place: Place) -> int:
        """How many components a selection has at a place."""

    def remove(self, selection: Selection, place: Place) -> Any:
        """Take them out, and return what ``undo`` of the pruner takes."""

    def description(self, edit: Any) -> dict[str, float]:
        """What was taken: see ``reports.sweep.REMOVED``."""

    def identity(self) -> dict[str, Any]:
        """What selections depend on beside the weights; fit for JSON."""

    def profiles(self) -> dict[str, torch.Tensor]:
        """P-values over the index, by role."""

    def again(self, pruner: SVDPruner) -> Subject:
        """The same of another model that begins with the same weights."""


@contextlib.contextmanager
def removed(subject: Subject, selection: Selection, place: Place) -> Iterator[dict[str, float]]:
    """Take something out for a while; gives its description."""
    edit = subject.remove(selection, place)
    try:
        yield subject.description(edit)
    finally:
        subject.pruner.undo(edit)


class Spectrum:
    """Singular components of the weight matrices."""

    def __init__(self, pruner: SVDPruner):
        self.pruner = pruner
        self.editor = pruner.editor

    def places(self, config: SweepConfig) -> list[Place]:
        """Roles and blocks, those pairs of them that have matrices.

        Raises:
            ValueError: there are no such roles or blocks.
        """
        roles, blocks, matrices = config.roles, config.blocks, self.pruner.matrices
        if roles == "each":
            chosen = list(dict.fromkeys(matrix.role for matrix in matrices))
        else:
            chosen = [roles] if isinstance(roles, str) else list(roles)
        numbers: Sequence[int | None] = [None]
        if blocks != "together":
            known = sorted({matrix.block for matrix in matrices if matrix.block is not None})
            numbers = known if blocks == "each" else [int(block) for block in blocks]
        for block in numbers:
            self._of("all", block)
        every = "each" not in (roles, blocks)  # of what was asked for by name each pair has to be there
        places = []
        for role in chosen:
            there = {None, *(matrix.block for matrix in self._of(role))}
            places += [(role, block) for block in numbers if every or block in there]
        if not places:
            raise ValueError(f"roles={roles!r} and blocks={blocks!r} name no matrices: give some of each")
        return places

    def _of(self, role: str, block: int | None = None) -> list[WeightMatrix]:
        return select(self.pruner.matrices, None if role == "all" else role, block)

    def _indices(self, place: Place) -> list[int]:
        return [self.editor.index[matrix.name] for matrix in self._of(*place)]

    def prepare(self, places: Sequence[Place]) -> None:
        """Factor what is not factored yet; of several processes that keep factors in a folder, each does its share."""
        indices = sorted({index for place in places for index in self._indices(place)})
        factors = self.editor.store
        rank, count = rank_and_count()
        if count > 1 and factors.folder is not None and not is_sharded(unwrap(self.pruner.model)):
            costs = [seconds_estimate(*factors.matrices[index].shape) for index in indices]
            with failing_together():
                factors.prepare([indices[position] for position in shares(costs, count)[rank]])
        factors.prepare(indices)

    def size(self, selection: Selection, place: Place) -> int:
        """See ``Subject``."""
        return sum(int(selection.mask(self.editor.store[index]).sum()) for index in self._indices(place))

    def remove(self, selection: Selection, place: Place) -> Any:
        """See ``Subject``."""
        role, block = place
        return self.pruner.remove(selection, roles=role, blocks=block)

    def description(self, edit: Any) -> dict[str, float]:
        """See ``Subject``."""
        return removed_by(edit, self.editor)

    def identity(self) -> dict[str, Any]:
        """See ``Subject``."""
        return {"analysis": self.pruner.analysis_identity()}

    def profiles(self) -> dict[str, torch.Tensor]:
        """See ``Subject``."""
        return p_value_profiles(self.editor.store)

    def again(self, pruner: SVDPruner) -> Spectrum:
        """See ``Subject``; what is factored already is not factored again."""
        pruner.editor.store.adopt(self.editor.store)
        return Spectrum(pruner)


class StreamDirections:
    """Eigenvectors of the residual stream's covariance, hidden from all norms at once (paper App. F, Fig. 14).

    Args:
        pruner: of the model.
        streams: the covariances, or a function that collects them from a model.

    Raises:
        ValueError: they are of another model.
    """

    def __init__(self, pruner: SVDPruner, streams: ActivationCovariances | Streams):
        from hf_rmt.models.residual_stream import stream_of
        from hf_rmt.slicing.calibration import refuse_other_weights
        from hf_rmt.slicing.masked import components_of

        self.pruner = pruner
        self.covariances = streams(pruner.model) if callable(streams) else streams
        refuse_other_weights(pruner.model, self.covariances)
        self.components = components_of(stream_of(pruner.model), self.covariances)

    def places(self, config: SweepConfig) -> list[Place]:
        """One: the stream.

        Raises:
            ValueError: some roles or blocks were asked for.
        """
        if config.roles not in ("each", "all") or config.blocks != "together":
            raise ValueError(
                f"roles={config.roles!r} and blocks={config.blocks!r} are of weights, and the residual stream runs "
                "through all of them: leave both out"
            )
        return [("stream", None)]

    def prepare(self, places: Sequence[Place]) -> None:
        """Nothing: the eigenvectors are known."""

    def size(self, selection: Selection, place: Place) -> int:
        """See ``Subject``."""
        return sum(int(selection.mask(one).sum()) for one in self.components)

    def remove(self, selection: Selection, place: Place) -> Any:
        """See ``Subject``."""
        return self.pruner.hide(self.components, selection)

    def description(self, edit: Any) -> dict[str, float]:
        """See ``Subject``; the mass is a share of the stream's variance, mean over its sites."""
        return {
            "components": float(sum(int(mask.sum()) for mask in edit.masks.values())),
            "of": float(sum(len(mask) for mask in edit.masks.values())),
            "matrices": float(len(edit.masks)),
            "mass": sum(edit.energy.values()) / len(edit.energy),
        }

    def identity(self) -> dict[str, Any]:
        """See ``Subject``."""
        return {"streams": self.covariances.identity()}

    def profiles(self) -> dict[str, torch.Tensor]:
        """None: eigenvectors are not tested."""
        return {}

    def again(self, pruner: SVDPruner) -> StreamDirections:
        """See ``Subject``; the eigenvectors are those of the same weights."""
        other = copy.copy(self)
        other.pruner = pruner
        return other
