"""Edits of a model's matrices: composed as masks, made from the originals, undone in any order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_rmt.models.digests import digest_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.surgery.factors import FactorStore
from hf_rmt.surgery.originals import Originals
from hf_rmt.surgery.request import Request
from hf_rmt.theory.removal import without
from hf_rmt.theory.selection import Selection


@dataclass(frozen=True, eq=False)
class Edit:
    """One removal from some matrices of a model.

    Attributes:
        request: what was asked for.
        masks: by name of the matrix, ``(p,)`` booleans of the components removed.
    """

    request: Request
    masks: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def selection(self) -> Selection:
        """What is removed; of a call with ``keep=``, the complement."""
        return self.request.selection

    @property
    def roles(self) -> tuple[str, ...] | None:
        """Roles or names that were asked for; None for all."""
        return self.request.roles

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Blocks that were asked for; None for all."""
        return self.request.blocks

    @property
    def names(self) -> list[str]:
        """Names of the matrices."""
        return list(self.masks)

    @property
    def empty(self) -> list[str]:
        """Matrices in which nothing was selected."""
        return [name for name, mask in self.masks.items() if not mask.any()]

    @property
    def whole(self) -> list[str]:
        """Matrices of which everything was selected, so that they are zero."""
        return [name for name, mask in self.masks.items() if mask.all()]

    def __str__(self) -> str:
        return str(self.request)


class Editor:
    """The edits of one model.

    A weight is always computed from its original and the union of all masks on it. Before anything is touched
    every matrix is checked: that it can be written, and that it holds what was last seen in it.
    """

    def __init__(self, matrices: list[WeightMatrix], store: FactorStore, originals: Originals):
        self.matrices = matrices
        self.index = {matrix.name: index for index, matrix in enumerate(matrices)}
        self.store = store
        self.originals = originals
        self.edits: tuple[Edit, ...] = ()
        #: Digest of what an edited matrix holds now.
        self.written: dict[int, str] = {}

    def add(self, request: Request) -> Edit:
        """Remove what is asked for.

        Raises:
            ValueError: there is no such matrix; one cannot be written, was changed since it was factored or edited,
                is not finite, or has not what is selected. The model is then as it was.
        """
        indices = [self.index[matrix.name] for matrix in request.matrices(self.matrices)]
        for index in indices:
            self.matrices[index].check_writable()
        self.store.prepare(indices)  # only an unedited matrix can be missing there
        self._refuse_changed(indices)
        masks = {self.matrices[index].name: request.selection.mask(self.store[index]) for index in indices}
        edit = Edit(request, masks)
        self._change_to((*self.edits, edit), indices)
        return edit

    def drop(self, edits: Sequence[Edit], discard_changes: bool = False) -> None:
        """Undo some edits; the others stay.

        Raises:
            ValueError: not an edit in place, or weights were changed since, unless these are to be discarded.
        """
        if strange := [edit for edit in edits if not any(edit is known for known in self.edits)]:
            raise ValueError(f"{strange[0]} is not in place: it was undone, or made by another pruner")
        left = tuple(edit for edit in self.edits if not any(edit is gone for gone in edits))
        touched = {self.index[name] for edit in edits for name in edit.names} & set(self.originals.kept)
        # With nothing left every original goes back, also one that is there because undoing was interrupted.
        indices = sorted(touched if left else self.originals.kept)
        if not discard_changes:
            self._refuse_changed(indices)
        self._change_to(left, indices)

    def mask(self, index: int, edits: Sequence[Edit] | None = None) -> torch.Tensor:
        """Components of a matrix, ``(p,)``, that some edits remove together (None: those in place)."""
        found = torch.zeros(min(self.matrices[index].shape), dtype=torch.bool)
        for edit in self.edits if edits is None else edits:
            mask = edit.masks.get(self.matrices[index].name)
            found = found if mask is None else found | mask
        return found

    def _refuse_changed(self, indices: Collection[int]) -> None:
        """Raise if a matrix does not hold what was last seen in it."""
        changed = []
        for index in indices:  # all are read, as reading may take all processes
            expected = self.written.get(index, self.store[index].digest)
            if digest_of(self.matrices[index].read()) != expected:
                changed.append(index)
        if not changed:
            return
        names = ", ".join(self.matrices[index].name for index in changed[:3]) + (", ..." if len(changed) > 3 else "")
        if any(index in self.originals for index in changed):
            raise ValueError(
                f"{names} changed since they were edited, by training or another edit: "
                "restore(discard_changes=True) puts the originals back and drops what was learned since"
            )
        raise ValueError(f"{names} changed since they were factored: make a new SVDPruner of the model as it is now")

    def _change_to(self, edits: tuple[Edit, ...], indices: Collection[int]) -> None:
        """Write some matrices as these edits want them; on a failure, put back what they were."""
        before, begun = self.edits, []
        try:
            for index in indices:
                begun.append(index)
                self._write(index, self.mask(index, edits))
            self.edits = edits
        except BaseException:
            self.edits = before
            for index in begun:
                self._write(index, self.mask(index))
            raise

    def _write(self, index: int, mask: torch.Tensor) -> None:
        """Make one matrix the original without some components."""
        matrix = self.matrices[index]
        if not mask.any():
            if index in self.originals:
                matrix.write(self.originals[index])
                self.originals.drop(index)
                self.written.pop(index, None)
            return
        if index not in self.originals:
            self.originals.keep(index, matrix.read())
        matrix.write(without(self.originals[index], self.store[index].factors, mask))
        self.written[index] = digest_of(matrix.read())  # of sharded weights it is the first process's result
