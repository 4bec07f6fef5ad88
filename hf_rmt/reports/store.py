"""Writing files so that nothing half-written is ever taken for whole.

A result of one *kind* (a report, covariances, a comparison, a sweep) is a few files and a manifest
``<kind>.json``; several kinds may share a folder. Whole reports may be part of a result, in subfolders.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, Protocol, Self

import torch

from hf_rmt.reports.result import MatrixResult

Kind = Literal["report", "covariances", "comparison", "sweep"]
_FORMAT = 1


def _stage(folder: Path, kind: Kind) -> Path:
    return folder / f".incoming-{kind}"


def _manifest(kind: Kind) -> str:
    return f"{kind}.json"


@contextlib.contextmanager
def staged(folder: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write a result's files to; they appear in ``folder`` together or not at all.

    The manifest moves last: once it is in the stage the result is whole, and a reader who comes
    before the rest has moved finds it with ``current``.
    """
    existed = folder.exists()
    stage = _stage(folder, kind)
    if (stage / _manifest(kind)).is_file():  # of a save that died while its files moved
        _move_into_place(stage, kind)
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        for path in stage.iterdir():
            if path.is_file():
                sync(path)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _move_into_place(stage, kind)  # from here on the stage is the result, and is never thrown away


def _move_into_place(stage: Path, kind: Kind) -> None:
    for name in sorted((path.name for path in stage.iterdir()), key=lambda name: name == _manifest(kind)):
        if (stage / name).is_dir():
            _adopt_report(stage / name, stage.parent / name)
        else:
            os.replace(stage / name, stage.parent / name)
    stage.rmdir()


def _adopt_report(source: Path, folder: Path) -> None:
    """Move a whole report to a folder, whose other files stay, by way of the folder's own stage."""
    stage = _stage(folder, "report")
    if (stage / _manifest("report")).is_file():
        _move_into_place(stage, "report")
    shutil.rmtree(stage, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    os.replace(source, stage)
    _move_into_place(stage, "report")


def current(folder: Path, kind: Kind, name: str) -> Path:
    """Where a result's file or subfolder is, also if the process died while they moved into place."""
    stage = _stage(folder, kind)
    whole = (stage / _manifest(kind)).is_file()
    return stage / name if whole and (stage / name).exists() else folder / name


def is_saved(folder: Path, kind: Kind) -> bool:
    """Whether a whole result of this kind lies in this folder."""
    return current(folder, kind, _manifest(kind)).is_file()


def settle(folder: Path, kind: Kind, identity: dict[str, Any] | None = None) -> None:
    """Do the rest for a run that was killed once its result was whole: its files in place, its partial results gone.

    ``identity``: of its partial results, if there may be some; those of another run stay. Nothing is done where
    another process is at work in the folder.
    """
    stage, partial = _stage(folder, kind), folder / "partial"
    try:
        lock = hold(partial) if partial.is_dir() else None
    except ValueError:
        return
    with lock or contextlib.nullcontext():
        if (stage / _manifest(kind)).is_file():
            _move_into_place(stage, kind)
        if identity is not None and _is_of(partial / "run.json", identity):
            shutil.rmtree(partial, ignore_errors=True)


def _is_of(run: Path, identity: dict[str, Any]) -> bool:
    """Whether partial results are of this run; without their ``run.json``, which says so, nobody goes on with them."""
    return not run.is_file() or json.loads(run.read_text()) == json.loads(json.dumps(identity))


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a file beside it, so that the file is never half there."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write one file
    beside.write_text(json.dumps(value, indent=2) + "\n")
    sync(beside)
    os.replace(beside, path)


def write_manifest(stage: Path, kind: Kind, value: dict[str, Any]) -> None:
    """The last file of a staged result."""
    write_json(stage / _manifest(kind), {"format": _FORMAT, **value})


def read_manifest(folder: Path, kind: Kind) -> dict[str, Any]:
    """The manifest of a result.

    Raises:
        ValueError: no result of this kind, or not one of this library.
    """
    path = current(folder, kind, _manifest(kind))
    if not path.is_file():
        raise ValueError(f"{folder} holds no {kind}: there is no {path.name} in it")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] == _FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no manifest ({kind}) of this version of hf_rmt")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Safetensors through a file beside it, in a folder: the library makes one of its own there, of any name."""
    from safetensors.torch import save_file

    beside = Path(tempfile.mkdtemp(".part", f"{path.name}.", path.parent))  # several may write one file
    whole = beside / path.name
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, whole, metadata=metadata)
        sync(whole)
        os.replace(whole, path)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: missing, truncated or another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def save_results(path: Path, results: Iterable[Storable]) -> None:
    """Several results, each with ``tensors()`` and a ``description()``, in one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    descriptions: dict[str, str] = {}
    for index, result in enumerate(results):
        tensors |= {f"{index}/{key}": tensor for key, tensor in result.tensors().items()}
        descriptions[str(index)] = result.description()
    save_tensors(path, tensors, descriptions)


def load_results(path: Path, count: int, kind: Any) -> list[Any]:
    """Inverse of ``save_results``, by the ``restore`` of their class.

    Raises:
        ValueError: missing, truncated or another format.
    """
    tensors, descriptions = load_tensors(path)
    grouped: dict[str, dict[str, torch.Tensor]] = {str(index): {} for index in range(count)}
    for key, tensor in tensors.items():
        index, _, rest = key.partition("/")
        grouped[index][rest] = tensor
    return [kind.restore(arrays, descriptions[index]) for index, arrays in grouped.items()]


def sync(path: Path) -> None:
    """Have a file on disk before anybody relies on it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def hold(folder: Path) -> IO[str] | None:
    """Keep other processes out of a folder for as long as the file returned is open, or this one lives."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{folder.parent} is in use by another run: wait for it, or give another folder") from error
    except OSError:  # a file system without locks
        pass
    return file


@contextlib.contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A folder of its own in another one, for a while; those that killed runs have left there go."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for lock_file in folder.glob(f"{prefix}*/lock"):
        with contextlib.suppress(ValueError):  # in use
            stale = hold(lock_file.parent)
            shutil.rmtree(lock_file.parent, ignore_errors=True)
            if stale is not None:
                stale.close()
    own = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    lock = hold(own)
    try:
        yield own
    finally:
        if lock is not None:
            lock.close()
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


class Storable(Protocol):
    """A result that can be kept in one file."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All its tensors."""

    def description(self) -> str:
        """Everything else, as JSON."""

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> Self:
        """Inverse of ``tensors`` and ``description``."""


class PartialRun:
    """Results of an unfinished run, one file a matrix, in ``folder/partial``."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], result_class: type[Storable] = MatrixResult, lock: bool = True
    ):
        """Open or begin a run whose results are of one class.

        ``lock`` keeps other processes out; of several that write to one run, the first alone locks it.

        Raises:
            ValueError: the folder belongs to another model or other settings, or is in use.
            OSError: it cannot be written.
        """
        self.folder = folder / "partial"
        self.result_class = result_class
        run = self.folder / "run.json"
        if run.is_file():
            refuse_other(folder, json.loads(run.read_text()), identity)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(run, identity)
        self.lock = hold(self.folder) if lock else None

    def path(self, index: int) -> Path:
        """File of the matrix with this position in the analysis."""
        return self.folder / f"{index:05d}.safetensors"

    def write(self, index: int, result: Storable) -> None:
        """Keep a finished matrix."""
        save_tensors(self.path(index), result.tensors(), {"description": result.description()})

    def has(self, index: int) -> bool:
        """Whether there is a file of a matrix."""
        return self.path(index).is_file()

    def read(self, index: int) -> Any:
        """A matrix finished earlier, of the run's class; None if it was not or its file is damaged."""
        if not self.has(index):
            return None
        try:
            tensors, metadata = load_tensors(self.path(index))
            return self.result_class.restore(tensors, metadata["description"])
        except (ValueError, KeyError, TypeError):  # TypeError: of another version, with other fields
            return None

    def remove(self) -> None:
        """Delete the partial results, once the whole is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self.lock is not None:
            self.lock.close()


def refuse_other(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise if what a folder was made for is not what is asked for now; say what differs."""
    here = json.loads(json.dumps(here))
    for key in here:
        if there.get(key) != here[key]:
            was, now = _short(there.get(key)), _short(here[key])
            raise ValueError(f"{folder} was made by another run: {key} was {was} and is {now}; give another folder")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."
