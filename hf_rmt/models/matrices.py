"""``WeightMatrix``: one 2-D matrix wherever it lives; which of many are meant."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from hf_rmt.models import fused

#: Reads one parameter, or one expert of a stacked one, as it is stored.
Load = Callable[[int | None], torch.Tensor]
#: Changes a parameter or one expert, as it is stored, in place.
Change = Callable[[torch.Tensor], None]
Kind = Literal["block", "embedding", "head", "convolution"]


@runtime_checkable
class Store(Protocol):
    """What a ``Load`` also is where the parameter can be changed: that of a live model, or of a checkpoint's copy."""

    def check_writable(self) -> None:
        """Raises ValueError, with the reason and the remedy, where a change would be impossible or lost."""

    def update(self, change: Change, expert: int | None = None) -> None:
        """Hands the parameter, or one expert of a stacked one, with all its rows to ``change``, and keeps what comes
        of it."""


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One 2-D matrix of a model or checkpoint: what it is called, and how to read it.

    Attributes:
        name: path in the headless model without ``.weight``; ``[query]``, ``[expert=3]``,
            ``[expert=3][gate]`` follow where one parameter holds several matrices.
        parameter: full name of the parameter in the model it came from.
        role: ``query``, ``key``, ``value``, ``attention.output``, ``intermediate``, ``output``,
            ``gate``, with ``cross.`` in cross-attention; else the path below the block.
        shape: ``(out_features, in_features)``.
        dtype, device: as the model declares them; a matrix on disk may have another dtype, and arrives on the CPU.
        stack, block, expert, part: where in the model; None where there is no such thing.
        kind: ``"block"`` for everything but embeddings, heads and convolutions.
        transposed, rows, folded: the parameter is stored ``(in, out)``; these rows of it; with axes that are one here.
    """

    name: str
    parameter: str
    role: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    load: Load
    stack: str | None = None
    block: int | None = None
    expert: int | None = None
    part: str | None = None
    kind: Kind = "block"
    transposed: bool = False
    rows: fused.Rows | None = None
    folded: bool = False

    def read(self) -> torch.Tensor:
        """The ``(out, in)`` matrix in its own dtype, on its own device; a view where it can be.

        Raises:
            ValueError: the weight is on meta, packed, or not floating point, named with a remedy.
            OSError: the file behind it cannot be read.
        """
        return self._own_rows(self._turned(self.load(self.expert)))

    def write(self, values: torch.Tensor) -> None:
        """Put other values into the model, in place: the inverse of ``read``.

        They are cast to the dtype of the parameter, so that ``read`` then gives ``values.to(dtype)`` to the bit.
        The parameter stays the same object with the same ``requires_grad``; the rest of it, where it holds other
        matrices too, keeps its bits. Tied parameters change together. What is offloaded changes where accelerate
        keeps it: in memory, never on disk, so a written matrix takes memory from then on. Of several processes, each
        has to write: its own copy (DDP), or all together their shares (FSDP2), of the values of the first.

        What ``read`` gave before may be a view, which changes along: to keep it, clone it first.

        Args:
            values: the ``(out, in)`` matrix, of any dtype, on any device.

        Raises:
            ValueError: the values have another shape, or the matrix cannot be written, as ``check_writable`` says;
                nothing has changed then.
            TypeError: the values are no tensor.
        """
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"{self.name} takes a torch.Tensor, not {type(values).__name__}: use torch.as_tensor")
        if tuple(values.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {self.shape}, and cannot take values of {tuple(values.shape)}")
        self._store().update(lambda stored: self._put(stored, values), self.expert)

    def check_writable(self) -> None:
        """Make sure that ``write`` can work, without changing anything.

        Raises:
            ValueError: it cannot: the matrix is in a file, quantised, on meta, computed from other parameters, or
                read together with adapters. The message says which, and the remedy.
        """
        self._store()

    def _store(self) -> Store:
        if not isinstance(self.load, Store):
            raise ValueError(
                f"{self.name} is read from a file, and files are never written: load the model and change that, or "
                "take parts out of a copy with CheckpointPruner"
            )
        self.load.check_writable()
        return self.load

    def _put(self, stored: torch.Tensor, values: torch.Tensor) -> None:
        """The way of ``read`` backwards: values into the parameter as it is stored."""
        if self.folded:  # which may be no view
            stored.copy_((values.mT if self.transposed else values).detach().reshape(stored.shape))
            return
        whole = self._turned(stored)
        self._own_rows(whole)
        new = values.detach().to(whole.device, whole.dtype)
        if new.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            new = new.clone()  # a transposed view of the matrix, say, would be overwritten while it is read
        whole[... if self.rows is None else self.rows] = new

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.flatten(1) if self.folded else weight
        return weight.mT if self.transposed else weight

    def _own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        weight = whole if self.rows is None else whole[self.rows]
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"{self.name}: expected shape {self.shape}, found {tuple(weight.shape)}; "
                "the weight was packed or replaced since the model was discovered"
            )
        return weight


def select(
    matrices: list[WeightMatrix],
    roles: str | Collection[str] | None = None,
    blocks: int | Collection[int] | None = None,
) -> list[WeightMatrix]:
    """The matrices of these roles and blocks.

    Args:
        matrices: what to choose from.
        roles: roles or matrix names, as they are or as fnmatch patterns (``"*.output"``,
            ``"encoder.layer.0.*"``); None for all.
        blocks: block numbers; None for all. Matrices outside any block are then left out.

    Raises:
        ValueError: nothing matches; the message lists the roles or blocks there are.
    """
    chosen = matrices
    if roles is not None:
        patterns = [roles] if isinstance(roles, str) else list(roles)
        for pattern in patterns:
            if not any(_matches(matrix, pattern) for matrix in matrices):
                there = ", ".join(sorted({matrix.role for matrix in matrices}))
                raise ValueError(f"no role or name matches {pattern!r}; the roles are {there}")
        chosen = [m for m in chosen if any(_matches(m, pattern) for pattern in patterns)]
    if blocks is not None:
        wanted = {int(block) for block in (blocks if isinstance(blocks, Iterable) else [blocks])}
        known = sorted({m.block for m in matrices if m.block is not None})
        if unknown := wanted - set(known):
            raise ValueError(f"no block {sorted(unknown)}; the blocks are {_ranges(known)}")
        chosen = [m for m in chosen if m.block in wanted]
    if not chosen:
        raise ValueError(f"no matrix has both a role in {roles!r} and a block in {blocks!r}")
    return chosen


def _matches(matrix: WeightMatrix, pattern: str) -> bool:
    """Brackets are part of names as ``c_attn[query]``, so they stand for themselves."""
    literal = pattern.replace("[", "[[]")
    return any(fnmatch.fnmatchcase(text, literal) for text in (matrix.role, matrix.name))


def _ranges(blocks: list[int]) -> str:
    if blocks and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}"
    return ", ".join(map(str, blocks)) or "none"
