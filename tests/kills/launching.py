"""A job in processes of its own, forked from this one: importing would take longer than the work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401  # these once, and not in the work of every job
import evaluate  # noqa: F401
import jobs
import pandas  # noqa: F401
import psutil
import pyarrow.parquet  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

#: Seconds that a job, or what is left of one, may take.
_PATIENCE = 60.0


class Job:
    """One job in a place of its own; it may be started again there."""

    def __init__(self, kind: str, processes: int, place: Path):
        self.kind = kind
        self.processes = processes
        self.place = place
        self.out = place / "out"
        place.mkdir(parents=True)

    def done(self) -> bool:
        """Run it to its end; whether it came there."""
        self._launch()
        _until(lambda: _has_ended(self._launcher))
        return self._kill_all() == 0

    def start(self) -> None:
        """Run it to where its work begins."""
        self._launch()
        _until(lambda: len(self._pids("began")) == self.processes or _has_ended(self._launcher))
        if len(self._pids("began")) < self.processes:
            self._kill_all()
            raise RuntimeError(f"{self.kind} does not begin:\n{self.log()}")

    def is_working(self) -> bool:
        """Whether any of its processes is not done."""
        return len(self._pids("ended")) < self.processes

    def kill(self, rank: int | None = None) -> bool:
        """Kill it, or one of its processes; whether the others end, as the launcher of torchrun sees to."""
        ended = rank is None or self._kill_rank(rank)
        self._kill_all()
        return ended

    def _kill_rank(self, rank: int) -> bool:
        if rank in self._pids("ended"):  # and sleeps on an event that the launcher could not set any more
            return True
        workers = self._launcher.children()
        for worker in workers:
            if worker.pid == self._pids("began")[rank]:
                worker.kill()
        return _until(lambda: all(map(_has_ended, (self._launcher, *workers))))

    def seconds(self) -> float:
        """How long it worked."""
        last = {word: max(mark.stat().st_mtime for mark in self.place.glob(f"{word}-*")) for word in ("began", "ended")}
        return last["ended"] - last["began"]

    def log(self) -> str:
        """The last that it said."""
        return (self.place / "log").read_text()[-2000:]

    def _launch(self) -> None:
        for mark in (*self.place.glob("began-*"), *self.place.glob("ended-*")):
            mark.unlink()
        arguments = (self.kind, self.processes, self.place)
        self._process = multiprocessing.get_context("fork").Process(target=_launched, args=arguments)
        self._process.start()
        self._launcher = psutil.Process(self._process.pid)

    def _pids(self, word: str) -> dict[int, int]:
        """Of the processes that have begun, or ended, by their rank."""
        marks = [path.name.split("-") for path in self.place.glob(f"{word}-*")]
        return {int(rank): int(pid) for _, rank, pid in marks}

    def _kill_all(self) -> int | None:
        """Leave nothing of it; its exit status, if it had ended before."""
        processes = [self._launcher, *self._launcher.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert _until(lambda: all(map(_has_ended, processes))), "processes outlive SIGKILL"
        self._process.join()
        return self._process.exitcode


def _launched(kind: str, processes: int, place: Path) -> None:
    """What the launcher does: the job itself, or as torchrun does."""
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes == 1:
        jobs.run(kind, place)
        return
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=place.name,
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, jobs.run)(kind, place)


def _until(condition: Callable[[], bool]) -> bool:
    """Wait for something; whether it came."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
