"""The matrices of a model as they were at one moment, on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports.store import save_tensors


def take_snapshot(matrices: list[WeightMatrix], path: Path, write: bool = True) -> None:
    """Write the values of matrices to a safetensors file, all or nothing.

    Args:
        matrices: what to write, as they compute (adapters included).
        path: the file; one that is there is replaced.
        write: False reads alone, for processes that hold sharded weights with the one that writes.
    """
    tensors = {matrix.name: matrix.read() for matrix in matrices}
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, {})


def snapshot_of(matrices: list[WeightMatrix], path: Path) -> list[WeightMatrix]:
    """The same matrices with the values of a snapshot.

    Raises:
        ValueError: the file is missing or damaged, or of other matrices.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if there != {matrix.name: matrix.shape for matrix in matrices}:
        raise ValueError(f"{path} was taken of other matrices: give another folder, or start anew without it")
    cpu = torch.device("cpu")
    return [
        replace(matrix, load=_Stored(path, matrix.name), transposed=False, rows=None, device=cpu) for matrix in matrices
    ]


@dataclass(frozen=True)
class _Stored:
    """Reads one matrix of a snapshot."""

    path: Path
    name: str

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)
