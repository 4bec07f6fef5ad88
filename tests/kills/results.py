"""What a job has left in its folder, so that two results can be compared to the bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_rmt import ActivationCovariances, AnalysisReport, SweepTable
from hf_rmt.reports import store

#: How results other than models are called in their folder, and read.
_RESULTS: dict[str, tuple[store.Kind, Any]] = {
    "analyze": ("report", AnalysisReport),
    "collect": ("covariances", ActivationCovariances),
    "blocks": ("covariances", ActivationCovariances),
    "sweep": ("sweep", SweepTable),
}

#: By the name of a file, all that it says.
Contents = dict[str, Any]


def contents(folder: Path) -> Contents:
    """Everything in the files of a folder."""
    return {path.relative_to(folder).as_posix(): _read(path) for path in folder.rglob("*") if path.is_file()}


def whole(kind: str, folder: Path) -> Contents | None:
    """The result that a folder holds for those who read it, whatever else is there; None if it holds none.

    Raises:
        Exception: there is one, and it cannot be read.
    """
    if kind in ("slice", "prune"):
        files = contents(folder) if (folder / "config.json").is_file() else None
        return files and {name: value for name, value in files.items() if not name.startswith(".")}
    name, result = _RESULTS[kind]
    if not store.is_saved(folder, name):
        return None
    with tempfile.TemporaryDirectory() as place:
        return contents(result.load(folder).save(Path(place)))


def kept(folder: Path) -> bool:
    """Whether a run that goes on in a folder finds something of an earlier one."""
    patterns = ("partial/*.safetensors", "unfinished-*.safetensors", ".unfinished-pruning/partial/*.safetensors")
    return any(path for pattern in patterns for path in folder.glob(pattern))


def differences(found: Contents, expected: Contents) -> list[str]:
    """The names of files that are not the same in both, or in one of them alone."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if name not in found or name not in expected or found[name] != expected[name]]


def _read(path: Path) -> Any:
    """A file as plain values: of safetensors the order of what is in them is by chance."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, metadata = store.load_tensors(path)
    bits = {
        name: (str(t.dtype), tuple(t.shape), t.view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }
    return bits, {name: json.loads(text) if text[:1] in "[{" else text for name, text in metadata.items()}
