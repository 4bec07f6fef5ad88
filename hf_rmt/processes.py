"""Several processes of one launch: who is who, and sums over all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")
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
    return distributed.is_initialized() and distributed.get_world_size() > 1


def rank_and_count() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if _joined() else (0, 1)


def local_count() -> int:
    """How many processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _joined() else 1


def gather(value: Any) -> list[Any]:
    """What every process gives, in the order of their numbers; all must call."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """What the first process gives; all must call."""
    return gather(value)[0]


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
