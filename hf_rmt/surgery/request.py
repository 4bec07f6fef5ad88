"""What a user asks to be removed, and from which matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Self

from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.theory.selection import Selection


@dataclass(frozen=True)
class Request:
    """One removal, as it is asked for.

    Attributes:
        selection: what is removed; of a call with ``keep=``, the complement.
        roles: of the matrices, or their names, as fnmatch patterns; None for all.
        blocks: their numbers; None for all.
    """

    selection: Selection
    roles: tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        selection: Selection | None,
        keep: Selection | None,
        roles: str | Collection[str] | None,
        blocks: int | Collection[int] | None,
    ) -> Self:
        """From what users give; see ``SVDPruner.remove``.

        Raises:
            TypeError: not exactly one selection, or no numbers of blocks.
        """
        return cls(_one_of(selection, keep), _roles(roles), _blocks(blocks))

    def matrices(self, matrices: list[WeightMatrix]) -> list[WeightMatrix]:
        """Those of these that are meant.

        Raises:
            ValueError: none is.
        """
        return select(matrices, self.roles, self.blocks)

    def __str__(self) -> str:
        where = ", ".join(self.roles) if self.roles else "all matrices"
        blocks = f" in blocks {', '.join(map(str, self.blocks))}" if self.blocks is not None else ""
        return f"{self.selection} of {where}{blocks}"


def _one_of(selection: Selection | None, keep: Selection | None) -> Selection:
    if (selection is None) == (keep is None):
        raise TypeError("give one of a selection to remove and keep=, a selection to keep")
    chosen = keep if selection is None else selection
    if not isinstance(chosen, Selection):
        raise TypeError(f"{chosen!r} is no selection, as Decile(10) is one; parse_selection reads its name")
    return ~chosen if selection is None else chosen


def _roles(roles: str | Collection[str] | None) -> tuple[str, ...] | None:
    names = () if roles is None else (roles,) if isinstance(roles, str) else tuple(roles)
    return None if roles is None or "all" in names else names


def _blocks(blocks: int | Collection[int] | None) -> tuple[int, ...] | None:
    if blocks is None:
        return None
    if isinstance(blocks, str):
        raise TypeError(f"blocks is {blocks!r}: give numbers, as blocks=[0, 1]")
    return tuple(map(int, blocks)) if isinstance(blocks, Iterable) else (int(blocks),)
