"""Several processes of one launch: who is who, who does what, and sums over all of them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import heapq
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

log = logging.getLogger(__name__)

Result = TypeVar("Result")
#: Who is done waits for the others as long as they work; one that dies is noticed at once.
_WORK = timedelta(days=30)
#: How long to wait where all should come at about the same time.
_LATE = timedelta(minutes=30)
#: Numbers of what all do together, the same in all processes.
_MEETINGS = [0]
#: Set while this process works by itself, see ``alone``.
_ALONE = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While it lasts this process takes itself for the only one: work that others do not share is not shared."""
    global _ALONE  # noqa: PLW0603
    before, _ALONE = _ALONE, True
    try:
        yield
    finally:
        _ALONE = before


def _joined() -> bool:
    """Whether this process is one of several; joins those that a launcher has started with it."""
    if _ALONE or not distributed.is_available():
        return False
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())  # chooses the backend
        atexit.register(_leave, True)
    return distributed.is_initialized() and distributed.get_world_size() > 1


@functools.cache
def _warn_of_strangers() -> None:
    """Say where a launch was meant as several processes that work together, and this one works by itself."""
    if distributed.is_available() and distributed.is_initialized():
        return
    if meant := strangers(os.environ):
        log.warning(
            "%s, and this process knows of no others, so it does all of the work: launch with torchrun "
            "--nproc_per_node N, or accelerate launch --multi_gpu",
            meant,
        )


def strangers(environment: Mapping[str, str]) -> str:
    """Why a process that knows of no others seems to have been started with some; empty if it does not."""
    if "WORLD_SIZE" in environment:
        return ""
    if "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        return "accelerate launch was asked for several processes and started one (as it does with --cpu)"
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(environment.get(name) or 1) > 1:
            return f"{name} is {environment[name]}"
    return ""


def rank_and_count() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if _joined() else (0, 1)


def local_count() -> int:
    """How many processes share this machine's cores and memory, also while each works by itself."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Positions of pieces of work by the process that does them: the longest first, each to who has the least so far.

    The longest share is at most 4/3 of the best one there is (Graham, SIAM J. Appl. Math. 17, 416 (1969)).
    """
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, process) for process in range(count)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, process = heapq.heappop(loads)
        found[process].append(index)
        heapq.heappush(loads, (load + costs[index], process))
    return found


def _group() -> Any:
    """Those of the launch, over gloo: objects need no accelerator, and it waits as long as the work takes."""
    world = distributed.group.WORLD
    if _GROUPS.get("of") is not world:  # another launch, in a process that has left the one before
        _GROUPS.update(of=world, group=distributed.new_group(backend="gloo", timeout=_WORK))
        atexit.register(_leave, False)
    return _GROUPS["group"]


_GROUPS: dict[str, Any] = {}


def _leave(joined_here: bool) -> None:
    """Take down our group, or the launch's too, before the interpreter does: threads of gloo that outlive it may abort
    the process. Nothing may hold on to a group then."""
    known = _GROUPS.pop("of", None) is distributed.group.WORLD
    own = _GROUPS.pop("group", None)
    if distributed.is_initialized() and known and own is not None:
        distributed.destroy_process_group(own)
    if distributed.is_initialized() and joined_here:
        distributed.destroy_process_group()


def _store() -> Any:
    """The keys and values by which the launch has found together."""
    return distributed.distributed_c10d._get_default_store()


def _meeting() -> int:
    """The number of the next thing that all do together."""
    _MEETINGS[0] += 1
    return _MEETINGS[0]


def assemble(what: str) -> None:
    """Wait until all processes are here, before work of which each does a share.

    Raises:
        RuntimeError: some do not come.
    """
    if not _joined():
        _warn_of_strangers()
        return
    rank, count = rank_and_count()
    store, meeting = _store(), _meeting()
    keys = [f"hf_rmt/{meeting}/here/{process}" for process in range(count)]
    store.set(keys[rank], "")
    deadline = time.monotonic() + _LATE.total_seconds()
    while not store.check(keys):  # store.wait would not hear a signal
        if time.monotonic() > deadline:
            missing = ", ".join(str(process) for process, key in enumerate(keys) if not store.check([key]))
            store.delete_key(keys[rank])  # as if it had not come: the next call is the same meeting
            _MEETINGS[0] -= 1
            raise RuntimeError(
                f"all processes of a launch have to {what} together, and {missing} did not come within {_LATE}: call "
                "it in all, or in one alone under hf_rmt.processes.alone()"
            )
        time.sleep(0.01)


def gather(value: Any) -> list[Any]:
    """What every process gives, in the order of their numbers; all must call."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_group())
    return values


def broadcast(value: Any) -> Any:
    """What the first process gives; all must call."""
    if not _joined():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in its own dtype; all must call."""
    if not _joined():
        return tensor
    on_device = distributed.get_backend() != "gloo"
    total = tensor.to(torch.accelerator.current_accelerator()) if on_device else tensor.clone()
    distributed.all_reduce(total)
    return total.to(tensor.device)


def by_the_first(work: Callable[[], Result]) -> Result:
    """What the first process does alone; all go on with its result, or its error; all must call.

    Raises:
        RuntimeError: as ``raise_together``.
    """
    result = None
    with failing_together():
        if rank_and_count()[0] == 0:
            result = work()
    return broadcast(result)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Where one process fails in it, all raise at its end; all must enter.

    Raises:
        RuntimeError: as ``raise_together``.
    """
    error = None
    try:
        yield
    except BaseException as caught:
        error = caught
    raise_together(error)


class _StoppedError(Exception):
    """Another process has failed."""


@contextlib.contextmanager
def stopping_together() -> Iterator[Callable[[], None]]:
    """``failing_together`` for long work: gives a function that ends it where another process has failed meanwhile.

    Raises:
        RuntimeError: as ``raise_together``.
    """
    if not _joined():
        yield lambda: None
        return
    store, key = _store(), f"hf_rmt/{_meeting()}/failed"

    def check() -> None:
        if store.check([key]):
            raise _StoppedError

    with failing_together(), contextlib.suppress(_StoppedError):
        try:
            yield check
        except _StoppedError:
            raise
        except BaseException:
            store.set(key, "")
            raise


def raise_together(error: BaseException | None) -> None:
    """Raise where any process failed, so that the others do not wait for it; all must call.

    Raises:
        RuntimeError: another process failed; the message is its error. A process's own error is raised as it is.
    """
    failed = [(rank, text) for rank, text in enumerate(gather(None if error is None else repr(error))) if text]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"process {failed[0][0]} failed: {failed[0][1]}")
