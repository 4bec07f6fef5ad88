"""What edited matrices held before: kept in memory, or memory-mapped from a folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import torch


class Originals:
    """Weights by the position of their matrix, bit for bit.

    Args:
        folder: keep them in files there, which are gone with this object, also if the process is killed; None for
            memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.kept: dict[int, torch.Tensor] = {}

    def __contains__(self, index: int) -> bool:
        return index in self.kept

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.kept[index]

    def keep(self, index: int, weight: torch.Tensor) -> None:
        """Keep a copy of a weight, which may be a view of the model's own."""
        weight = weight.detach()
        self.kept[index] = weight.clone() if self.folder is None else _mapped(weight, self.folder)

    def drop(self, index: int) -> None:
        """Let one go."""
        del self.kept[index]


def _mapped(weight: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same values in a file that has no name any more: it lives as long as it is mapped."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="original-", suffix=".safetensors", dir=folder)
    os.close(handle)
    try:
        save_file({"weight": weight.cpu().contiguous()}, path)
        return load_file(path)["weight"]
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove what is mapped
            os.unlink(path)
