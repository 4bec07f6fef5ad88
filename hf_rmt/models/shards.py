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
#: Bytes that safetensors allows.
_LONGEST_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or tensor and the remedy."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its bytes in a file, and what they are."""

    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    def part(self, index: int) -> _Place:
        """With one index of the first axis, which stays."""
        each = (self.end - self.start) // self.shape[0]
        start = self.start + index * each
        return _Place(start, start + each, self.dtype, (1, *self.shape[1:]))


class SafetensorsFolder:
    """The tensors of a folder of safetensors files, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        #: By file: what tells this version of it from others, and its tensors.
        self._headers: dict[str, tuple[object, dict[str, _Place]]] = {}
        self.files = self._files_by_tensor()
        self._check_headers()

    def _files_by_tensor(self) -> dict[str, str]:
        if (self.folder / SINGLE).is_file():  # before the index, as transformers does
            with (self.folder / SINGLE).open("rb") as file:
                return dict.fromkeys(self._header(SINGLE, file), SINGLE)
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

    def _check_headers(self) -> None:
        """Every tensor of the index is in the file that it names, before any work is done."""
        by_file: dict[str, set[str]] = defaultdict(set)
        for tensor, name in self.files.items():
            by_file[name].add(tensor)
        for name, tensors in by_file.items():
            with (self.folder / name).open("rb") as file:
                missing = sorted(tensors - set(self._header(name, file)))
            if missing:
                raise CheckpointError(
                    f"{self.folder / name} does not hold {missing[0]} ({len(missing)} tensors in all), which the index "
                    "puts there: index and shards are of different checkpoints"
                )

    def read(self, tensor: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or the part of it with one index of its first axis, which stays.

        Raises:
            CheckpointError: it has a dtype of another kind, or the file has changed and does not hold it any more.
        """
        with (self.folder / self.files[tensor]).open("rb") as file:
            place = self._place(tensor, index, file)
            values = torch.empty(place.shape, dtype=_DTYPES[place.dtype], device="cpu")
            file.seek(place.start)
            if file.readinto(_as_bytes(values)) != values.nbytes:
                raise CheckpointError(f"{file.name} became shorter while it was read: fetch it again")
        return values

    def write(self, tensor: str, values: torch.Tensor, index: int | None = None) -> None:
        """Put other values in the place of what ``read`` gives; not a byte of the file moves.

        They are on disk when this returns.

        Raises:
            CheckpointError: they have not the dtype and shape of what is there.
        """
        with (self.folder / self.files[tensor]).open("r+b") as file:
            place = self._place(tensor, index, file)
            if place.shape != tuple(values.shape) or _DTYPES[place.dtype] != values.dtype:
                raise CheckpointError(
                    f"{file.name}: {tensor} is {place.dtype} of shape {list(place.shape)}, and cannot take "
                    f"{values.dtype} of {list(values.shape)}"
                )
            file.seek(place.start)
            file.write(_as_bytes(values.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())

    def _place(self, tensor: str, index: int | None, file: Any) -> _Place:
        place = self._header(self.files[tensor], file).get(tensor)
        if place is None:
            raise CheckpointError(f"{file.name} has changed, and does not hold {tensor} any more")
        if place.dtype not in _DTYPES:
            raise CheckpointError(f"{file.name}: {tensor} is {place.dtype}, which nothing here computes with")
        return place if index is None else place.part(index)

    def _header(self, name: str, file: Any) -> dict[str, _Place]:
        """The tensors of an open file; what was read of it before holds unless it has changed since."""
        status = os.fstat(file.fileno())
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known, places = self._headers.get(name, (None, {}))
        if known != version:
            places = _places_in(file, status.st_size)
            self._headers[name] = version, places
        return places


def _as_bytes(values: torch.Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU."""
    return values.flatten().view(torch.uint8).numpy()


def _places_in(file: Any, size: int) -> dict[str, _Place]:
    """The tensors of an open file of so many bytes.

    Raises:
        CheckpointError: it is no safetensors file, or not all of one.
    """
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header would have {length} bytes, and the file has {size}")
        described = json.loads(file.read(length))
        first = 8 + length
        places = {name: _described(one, first) for name, one in described.items() if name != "__metadata__"}
        end = first
        for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
            if place.start != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            end = place.end
        if end != size:
            raise ValueError(f"its tensors end at {end} bytes, and the file has {size}")
        return places
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name} is truncated or not a safetensors file ({error}): fetch it again"
        ) from error


def _described(one: dict[str, Any], first: int) -> _Place:
    """What a header says of a tensor, where the tensors begin at a byte of the file."""
    (start, end), shape = one["data_offsets"], tuple(one["shape"])
    numbers = (start, end, *shape)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or start > end:
        raise ValueError(f"offsets and shape are {numbers}")
    dtype = _DTYPES.get(one["dtype"])
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes are not those of {one['dtype']} of shape {list(shape)}")
    return _Place(first + start, first + end, one["dtype"], shape)


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
