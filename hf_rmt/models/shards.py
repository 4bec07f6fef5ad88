"""The tensors of a folder of safetensors files, read and written one at a time where they lie.

Files are not mapped into memory, so a limit of the address space may be smaller than the largest of them.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")
#: As safetensors names those that a tensor of weights, or one that is no weight, may have.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or tensor and the remedy."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its bytes in a file, and what they are."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def part(self, index: int) -> _Place:
        """With one index of the first axis, which stays."""
        each = _bytes(self.dtype, self.shape) // self.shape[0]
        return _Place(self.path, self.start + index * each, self.dtype, (1, *self.shape[1:]))


class SafetensorsFolder:
    """The tensors of a folder of safetensors files, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = self._files_by_tensor()
        self.places = self._read_headers()

    def _files_by_tensor(self) -> dict[str, str]:
        if (self.folder / SINGLE).is_file():  # before the index, as transformers does
            return dict.fromkeys(_header(self.folder / SINGLE), SINGLE)
        if (self.folder / INDEX).is_file():
            return self._read_index(self.folder / INDEX)
        if (self.folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{self.folder} holds a peft adapter: load it on its base and use RMTAnalyzer(model), "
                "or analyse the checkpoint of the base"
            )
        pickled = [name for name in _PICKLED if (self.folder / name).exists()]
        if pickled:
            raise CheckpointError(
                f"{self.folder / pickled[0]} is pickled, and loading a pickle runs whatever code is in it; if you "
                "trust its source, load the model with transformers and write it again with save_pretrained"
            )
        raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _read_index(self, index: Path) -> dict[str, str]:
        files = weight_map(index)
        for name in sorted(set(files.values())):
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in name:
                raise CheckpointError(f"{index} points outside its folder, to {name!r}; refused")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name} is missing, and {index.name} lists it: copy it there")
        return files

    def _read_headers(self) -> dict[str, _Place]:
        """Every tensor of the index is in the file that it names, before any work is done."""
        by_file: dict[str, set[str]] = defaultdict(set)
        for tensor, name in self.files.items():
            by_file[name].add(tensor)
        places: dict[str, _Place] = {}
        for name, tensors in by_file.items():
            header = _header(self.folder / name)
            if missing := sorted(tensors - set(header)):
                raise CheckpointError(
                    f"{self.folder / name} does not hold {missing[0]} ({len(missing)} tensors in all), which the index "
                    "puts there: index and shards are of different checkpoints"
                )
            places |= {tensor: header[tensor] for tensor in tensors}
        return places

    def read(self, tensor: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or the part of it with one index of its first axis, which stays.

        Raises:
            CheckpointError: it has a dtype of another kind, or the file has changed.
        """
        place = self._place(tensor, index)
        values = torch.empty(place.shape, dtype=_DTYPES[place.dtype])
        with place.path.open("rb") as file:
            file.seek(place.start)
            if file.readinto(_as_bytes(values)) != values.nbytes:
                raise CheckpointError(f"{place.path} has become shorter since it was opened: fetch it again")
        return values

    def write(self, tensor: str, values: torch.Tensor, index: int | None = None) -> None:
        """Put other values in the place of what ``read`` gives; not a byte of the file moves.

        They are on disk when this returns.

        Raises:
            CheckpointError: they have not the dtype and shape of what is there.
        """
        place = self._place(tensor, index)
        if place.shape != tuple(values.shape) or _DTYPES[place.dtype] != values.dtype:
            raise CheckpointError(
                f"{place.path}: {tensor} is {place.dtype} of shape {list(place.shape)}, and cannot take "
                f"{values.dtype} of {list(values.shape)}"
            )
        with place.path.open("r+b") as file:
            file.seek(place.start)
            file.write(_as_bytes(values.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())

    def _place(self, tensor: str, index: int | None) -> _Place:
        place = self.places[tensor]
        if place.dtype not in _DTYPES:
            raise CheckpointError(f"{place.path}: {tensor} is {place.dtype}, which nothing here computes with")
        return place if index is None else place.part(index)


def _as_bytes(values: torch.Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU."""
    return values.flatten().view(torch.uint8).numpy()


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of known dtype."""
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _header(path: Path) -> dict[str, _Place]:
    """The tensors of one file.

    Raises:
        CheckpointError: it is no safetensors file, or not all of one.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"its header has {length} bytes, and the file {size}")
            described = json.loads(file.read(length))
        places = {}
        for name, one in described.items():
            if name == "__metadata__":
                continue
            (start, end), shape = one["data_offsets"], tuple(one["shape"])
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name} lies beyond its end")
            if one["dtype"] in _DTYPES and end - start != _bytes(one["dtype"], shape):
                raise ValueError(f"{name} has not the bytes of its shape")
            places[name] = _Place(path, 8 + length + start, one["dtype"], shape)
        return places
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says.

    Raises:
        CheckpointError: it says nothing of the kind.
    """
    try:
        files = json.loads(index.read_text())["weight_map"]
        if all(isinstance(name, str) for name in files.values()):
            return files
        raise TypeError("weight_map does not name files")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
