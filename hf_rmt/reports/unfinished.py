"""How far a collection of covariances has come, and its file."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.reports import store
from hf_rmt.theory.covariance import Moments

#: Seconds of work that a killed collection may lose.
KEEP_EVERY = 120.0


@dataclass(frozen=True)
class Collected:
    """Sums so far, and what is left to do.

    Attributes:
        passes: keys of the sites summed in each pass over the data.
        apart: sites that may not share a sum.
        done: number of passes that are done.
        batches: batches done in the pass after them.
        chain: hash of those batches, in their order.
        sums: moments by the key of the site that summed, of the passes that are done.
        running: sums of the pass after them.
        owners: for each site seen, the key of its sum.
    """

    passes: list[list[str]]
    apart: list[str] = field(default_factory=list)
    done: int = 0
    batches: int = 0
    chain: str = ""
    sums: dict[str, Moments] = field(default_factory=dict)
    running: dict[str, MomentSum] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def with_sums(self, sums: Mapping[str, Moments], owners: Mapping[str, str], **progress: Any) -> Collected:
        """With further sums, and other progress."""
        return replace(self, sums=self.sums | dict(sums), owners=self.owners | dict(owners), **progress)


class UnfinishedCovariances:
    """The file in which one process keeps what it has collected."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int):
        self.folder = folder
        self.identity = dict(identity)
        self.path = folder / f"unfinished-covariances-{rank}.safetensors"
        self._written = time.monotonic()

    def read(self) -> Collected | None:
        """What an earlier run left; None if nothing.

        Raises:
            ValueError: it is of another collection, or damaged.
        """
        return self._read(self.path) if self.path.is_file() else None

    def _read(self, path: Path) -> Collected:
        tensors, metadata = self._load(path)
        described = json.loads(metadata["collected"])
        store.refuse_other(self.folder, described.pop("identity"), self.identity)
        sums = {
            key: Moments(tensors[f"{key}/outer"], tensors[f"{key}/total"], tokens, eps)
            for key, (tokens, eps) in described.pop("sums").items()
        }
        running = {}
        for key, counts in described.pop("running").items():
            names = [name for name in tensors if name.startswith(_running(key))]
            held = {name.removeprefix(_running(key)): tensors[name] for name in names}
            running[key] = MomentSum.resumed(held, counts)
        return Collected(sums=sums, running=running, **described)

    def _load(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        try:
            return store.load_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete {self.folder / 'unfinished-*'} to begin again") from error

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written > KEEP_EVERY

    def write(self, collected: Collected) -> None:
        """Keep this in the place of what was kept before."""
        self._write(self.path, collected)
        self._written = time.monotonic()

    def _write(self, path: Path, collected: Collected) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = tensors_of(collected.sums)
        described = vars(collected) | {"identity": self.identity, "running": {}}
        described["sums"] = {key: [moments.tokens, moments.eps] for key, moments in collected.sums.items()}
        for key, total in collected.running.items():
            held, counts = total.state()
            if held:
                tensors |= {_running(key) + part: tensor for part, tensor in held.items()}
                described["running"][key] = counts
        store.save_tensors(path, tensors, {"collected": json.dumps(described)})

    def remove(self) -> None:
        """Delete it, once the covariances are saved, and what is left of writing it where that was killed."""
        self.path.unlink(missing_ok=True)
        for beside in self.folder.glob(f"{self.path.name}.*.part"):
            shutil.rmtree(beside, ignore_errors=True)


class UnfinishedBlocks(UnfinishedCovariances):
    """The files in which one process keeps a collection that goes block by block.

    Beside the file that says how far it is, a folder holds the sums of each block that is done, memory-mapped, and the
    hidden states of every batch that enter the next one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int):
        super().__init__(folder, identity, rank)
        self.parts = folder / f"unfinished-blocks-{rank}"
        self._held = False
        self._lock: IO[str] | None = None

    def read(self) -> Collected | None:
        """As of the class above; of a run that was killed in its first block nothing is left.

        Raises:
            ValueError: also where another run is at work in the folder.
        """
        if self.parts.is_dir():
            self._hold()
            if not self.path.is_file():
                self._clear()
        done = super().read()
        if done is None:
            return None
        for number in range(done.done):
            done = done.with_sums(self._read(self._sums_of(number)).sums, {})
        return done

    def write_block(self, collected: Collected, sums: Mapping[str, Moments]) -> Collected:
        """Keep the sums of one more block, the last that ``collected`` counts as done, and add them memory-mapped.

        The file that says so comes last: until then the block before is the last one.
        """
        path = self._sums_of(collected.done - 1)
        self._write(path, replace(collected, sums=dict(sums)))
        self.write(replace(collected, sums={}))
        return collected.with_sums(self._read(path).sums, {})

    def _sums_of(self, number: int) -> Path:
        return self.parts / f"sums-{number}.safetensors"

    def put(self, number: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states of a batch that enter a block.

        Raises:
            ValueError: another run has begun in the folder in the meantime.
        """
        if not self._held:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._hold()
        store.save_tensors(self._hidden_of(number, batch), {"hidden": hidden}, {})

    def get(self, number: int, batch: int) -> torch.Tensor:
        """What ``put`` has kept."""
        return self._load(self._hidden_of(number, batch))[0]["hidden"]

    def drop(self, number: int) -> None:
        """Forget what enters a block that is done."""
        self._clear(f"hidden-{number}-*")

    def _hidden_of(self, number: int, batch: int) -> Path:
        return self.parts / f"hidden-{number}-{batch}.safetensors"

    def _hold(self) -> None:
        """Keep other runs out of these files until ``tidy``."""
        self._lock = store.hold(self.parts)
        self._held = True

    def _clear(self, pattern: str = "*") -> None:
        """Delete files that none goes on with."""
        for path in self.parts.glob(pattern):
            if path.is_dir():  # of a file that was half written when the run was killed
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()

    def tidy(self) -> None:
        """At the end, or after an error: delete what none goes on with, and let other runs work in the folder."""
        if self._held and not self.path.is_file():
            shutil.rmtree(self.parts, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self._held, self._lock = False, None

    def remove(self) -> None:
        """Delete all of it, once the covariances are saved."""
        super().remove()
        shutil.rmtree(self.parts, ignore_errors=True)


def _running(key: str) -> str:
    """What the names of the tensors of a sum that is not done begin with."""
    return f"{key}/running/"


def tensors_of(sums: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """Tensors of moments, under names to be written."""
    outers = {f"{key}/outer": moments.outer for key, moments in sums.items()}
    return outers | {f"{key}/total": moments.total for key, moments in sums.items()}


def chained(chain: str, batch: Mapping[str, Any]) -> str:
    """Hash of a batch and all before it."""
    hashed = hashlib.blake2b(chain.encode(), digest_size=16)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            hashed.update(repr((key, tuple(value.shape), value.dtype)).encode())
            hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
