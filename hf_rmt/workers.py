"""Many matrices over the cores of one machine, or the share of them that a process of several has.

Linear algebra on one matrix scales badly over threads, so each worker has one matrix and its share
of the threads, longest matrices first. The caller's thread settings are put back afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

from hf_rmt.processes import local_count

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
#: In a thread of several workers: ``number``, which of them it is.
_WORKER = threading.local()
_STREAMS: dict[tuple[int, torch.device], torch.Stream] = {}
_STREAMS_LOCK = threading.Lock()
#: Held by the one worker that tries again where an accelerator's memory did not suffice.
_SHORT_OF_MEMORY = threading.Lock()


def cores() -> int:
    """Processor cores that this process may use, a container's share counted, and those of its neighbours."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*_cgroup("cpu.max"), None, None][:2]
    own = min(own, math.ceil(quota / period)) if quota and period else own
    return max(1, own // local_count())


def free_memory() -> int:
    """Bytes that this process may still take, a container's limit counted."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(free, limit[0] - used[0]) if limit and limit[0] and used and used[0] else free


def _cgroup(name: str) -> list[int | None]:
    """Numbers in a file of the container's limits; None for no limit."""
    try:
        words = Path("/sys/fs/cgroup", name).read_text().split()
    except OSError:
        return []
    return [int(word) if word.isdigit() else None for word in words]


def workers_for(needs: Sequence[int], memory: float | None = None) -> int:
    """How many pieces of work to do at a time: one a core, if the memory holds them all.

    Args:
        needs: bytes that each takes.
        memory: bytes that there are; None for half of the free ones.
    """
    fits = int((free_memory() / local_count() / 2 if memory is None else memory) // max(needs, default=1))
    return max(1, min(cores(), len(needs), fits))


def resident_memory() -> int:
    """Bytes that this process has now, without pages of files, which the system takes back when it needs them."""
    import psutil

    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(1024 * int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))
    except (OSError, KeyError):  # not Linux
        return psutil.Process().memory_info().rss


def working_bytes(rows: int, cols: int) -> int:
    """Memory that factoring one matrix takes by the costlier route, a full SVD: itself in float32 and
    float64, its left vectors three times over with LAPACK's copy, and the square ones with their workspace."""
    short = min(rows, cols)
    return 40 * rows * cols + 6 * 8 * short * short


def eigenbasis_bytes(width: int) -> int:
    """Memory that computing the eigenvectors of a covariance takes: itself, LAPACK's copy and workspace, the result."""
    return 5 * 8 * width * width


def where_it_fits(weight: torch.Tensor, device: str | None, work: Callable[[torch.Tensor], Result]) -> Result:
    """What ``work`` makes of a weight on a device, None for its own.

    On an accelerator each of several workers has a stream of its own, so that the copies of one go on beside the work
    of another. One that the memory does not suffice for tries again after the others that this has happened to, then
    goes to the CPU.
    """
    place = weight.device if device is None else torch.device(device)
    if place.type == "cpu":
        return work(weight.to(place))
    short = ""
    for turn in (contextlib.nullcontext(), _SHORT_OF_MEMORY):
        with turn:
            if short:  # out of the handler, whose traceback holds on to what has filled the memory
                _let_go()
            try:
                with own_stream(place):
                    return work(weight.to(place))
            except torch.OutOfMemoryError as error:
                short = str(error).partition("\n")[0]
    log.warning("%s of shape %s goes to the CPU: %s", place, tuple(weight.shape), short)
    _let_go()
    return work(weight.cpu())


def _let_go() -> None:
    """Give back what torch keeps of an accelerator's memory for later."""
    if torch.accelerator.is_available():
        getattr(torch.accelerator, "empty_cache", torch.cuda.empty_cache)()  # since torch 2.9


@contextlib.contextmanager
def own_stream(place: torch.device) -> Iterator[None]:
    """What a worker beside others asks of an accelerator goes on beside what these ask, and is done at the end.

    A worker that is alone goes on in the stream that there is.
    """
    number = getattr(_WORKER, "number", None)
    if number is None or place.type == "mps":  # which has one stream
        yield
        return
    before, stream = torch.accelerator.current_stream(place), _stream_of(number, place)
    stream.wait_stream(before)  # which the weights may still be made in
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        stream.synchronize()
        torch.accelerator.set_stream(before)


def _stream_of(number: int, place: torch.device) -> torch.Stream:
    """That of the worker of a number: the same in every run, as torch keeps memory for each stream."""
    with _STREAMS_LOCK:
        if (number, place) not in _STREAMS:
            # Torch loads its library of linear algebra when it is first needed, and not by several threads at once.
            torch.linalg.svd(torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=place))[1])
            _STREAMS[number, place] = torch.Stream(place)
        return _STREAMS[number, place]


def seconds_estimate(rows: int, cols: int) -> float:
    """Cost of factoring a matrix relative to others: ``p^2 q`` with the constant of the eigensolver."""
    short, long = min(rows, cols), max(rows, cols)
    return short * short * (long + 4 * short)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Gives every linear-algebra library ``count`` threads for a while."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(count):
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def run_in_order(tasks: Sequence[Task], work: Callable[[Task], Result], workers: int) -> Iterator[tuple[Task, Result]]:
    """Begins with the tasks in this order, and yields each with its result as it finishes.

    An exception of ``work``, or Ctrl-C, drops the tasks that have not begun and is raised once those
    that have are done.
    """
    each = max(1, cores() // workers)
    numbers = itertools.count()

    def begin() -> None:
        torch.set_num_threads(each)
        _WORKER.number = next(numbers) if workers > 1 else None

    with threads(each), ThreadPoolExecutor(workers, initializer=begin) as pool:
        running: dict[Future[Result], Task] = {pool.submit(work, task): task for task in tasks}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                # What finished is handed over before what failed is raised, so that nothing done is lost.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
