from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hf_rmt import workers
from hf_rmt.workers import run_in_order, seconds_estimate, workers_for, working_bytes


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_task_comes_back_with_its_result(count: int) -> None:
    tasks = list(range(40))
    found = dict(run_in_order(tasks, lambda i: i * i, count))
    assert found == {i: i * i for i in tasks}
    assert list(run_in_order([], lambda i: i, count)) == []


def test_equal_tasks_come_back_each() -> None:
    assert sorted(run_in_order([2, 2, 2, 1], lambda i: -i, 2)) == [(1, -1), (2, -2), (2, -2), (2, -2)]


def test_one_worker_works_in_the_order_given() -> None:
    begun: list[int] = []
    list(run_in_order([9, 6, 5, 4, 3, 2, 1, 1], begun.append, 1))
    assert begun == [9, 6, 5, 4, 3, 2, 1, 1]


def test_results_come_as_they_finish() -> None:
    slow_may_end = threading.Event()

    def work(i: int) -> int:
        if i == 9:
            assert slow_may_end.wait(30)
        return i

    order = []
    for task, _ in run_in_order([9, 2, 1], work, 2):
        order.append(task)
        if len(order) == 2:
            slow_may_end.set()
    assert order[-1] == 9


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 6)
    for count, share in ((1, 6), (2, 3), (4, 1), (12, 1)):
        seen = dict(run_in_order([3, 2, 1], lambda _: torch.get_num_threads(), count))
        assert set(seen.values()) == {share}


@pytest.mark.usefixtures("three_threads")
def test_threads_are_put_back() -> None:
    list(run_in_order([2, 1], lambda i: i, 2))
    assert torch.get_num_threads() == 3
    with workers.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def fail_at_nine(i: int) -> int:
    if i == 9:
        raise ArithmeticError("nine")
    return i


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("count", [1, 3])
def test_an_exception_is_raised_and_threads_are_put_back(count: int) -> None:
    with pytest.raises(ArithmeticError, match="nine"):
        list(run_in_order([9, 2, 1], fail_at_nine, count))
    assert torch.get_num_threads() == 3


def test_an_exception_cancels_what_has_not_begun() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        fail_at_nine(i)
        time.sleep(0.5)
        ended.append(i)

    with pytest.raises(ArithmeticError):
        list(run_in_order([9, 5, 4, 3, 2, 1], work, 1))
    assert begun[0] == 9
    assert len(begun) <= 2
    assert ended == begun[1:]


@pytest.mark.usefixtures("three_threads")
def test_stopping_early_cancels_what_has_not_begun() -> None:
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        time.sleep(0.1)
        return i

    results = run_in_order(list(reversed(range(50))), work, 1)
    assert next(results) == (49, 49)
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 10
    assert torch.get_num_threads() == 3


def test_as_many_workers_as_cores_matrices_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 4)
    need = working_bytes(1000, 500)
    for available, shapes, expected in (
        (1e15, [(1000, 500)] * 9, 4),
        (1e15, [(1000, 500)] * 3, 3),
        (2 * 2.5 * need, [(1000, 500)] * 9, 2),
        (2 * 2.5 * need, [(10, 10)] * 8 + [(1000, 500)], 2),
        (0, [(1000, 500)] * 9, 1),
        (1e15, [], 1),
    ):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a))
        assert workers_for([working_bytes(*shape) for shape in shapes]) == expected


def test_costs_do_not_depend_on_orientation_and_grow_with_the_shape() -> None:
    for cost in (seconds_estimate, working_bytes):
        assert cost(300, 700) == cost(700, 300)
        assert cost(100, 100) < cost(100, 200) < cost(200, 200) < cost(200, 300)
    assert workers.cores() >= 1


# A budget


def test_a_budget_means_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 8)
    one = working_bytes(512, 512)
    assert [workers_for([one] * 9, memory=share * one) for share in (0.5, 1, 2.9, 100)] == [1, 1, 2, 8]
    assert workers_for([one, 2 * one, one], memory=4 * one) == 2


def test_resident_memory_is_the_systems() -> None:
    held = torch.ones(25_000_000)
    before = workers.resident_memory()
    assert before <= psutil.Process().memory_info().rss
    del held
    assert workers.resident_memory() < before - 90_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_memory_that_is_shared_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    before = workers.resident_memory()
    np.ones(10_000_000).tofile(tmp_path / "file")
    pages = np.memmap(tmp_path / "file", dtype=np.float64, mode="r")
    assert pages.sum() == 10_000_000 and abs(workers.resident_memory() - before) < 20_000_000
    shared = torch.ones(10_000_000, dtype=torch.float64).share_memory_()
    assert 70_000_000 < workers.resident_memory() - before < 100_000_000 and shared[0] == 1


# A device whose memory is short


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)

    def to(self, *_: object) -> torch.Tensor:  # type: ignore[override]
        return self


def _streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to streams, which there are none of here."""
    seen: list[str] = []

    @contextlib.contextmanager
    def stream(place: torch.device) -> Iterator[None]:
        seen.append("entered")
        try:
            yield
        finally:
            seen.append("left")

    monkeypatch.setattr(workers, "own_stream", stream)
    return seen


def test_what_a_device_has_no_memory_for_goes_to_the_cpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(3, 2).as_subclass(OnDevice)
    streams = _streams(monkeypatch)

    def work(placed: torch.Tensor) -> float:
        if placed.device.type == "cuda":
            assert streams[-1] == "entered"
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return float(placed.sum())

    assert workers.where_it_fits(weight, None, work) == 6
    assert caplog.messages == ["cuda of shape (3, 2) goes to the CPU: CUDA out of memory. Tried to allocate 9 GiB"]
    assert streams == ["entered", "left"] * 2
    with pytest.raises(torch.OutOfMemoryError):
        workers.where_it_fits(torch.ones(2), None, lambda placed: (_ for _ in ()).throw(torch.OutOfMemoryError("all")))


def test_what_lacks_memory_beside_others_waits_for_its_turn(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight, two fit at a time: six try again, one after the other, and none goes to the CPU."""
    streams = _streams(monkeypatch)
    room, all_there, at_once = threading.Semaphore(2), threading.Barrier(8), []
    first = threading.local()

    def work(placed: torch.Tensor) -> str:
        if not getattr(first, "done", False):
            first.done = True
            fits = room.acquire(blocking=False)
            all_there.wait(10)  # those that fit hold on to the memory until all have tried
            if not fits:
                raise torch.OutOfMemoryError("full")
            room.release()
            return "at first"
        at_once.append(1)
        assert len(at_once) == 1
        time.sleep(0.01)
        at_once.pop()
        return "again"

    weight = torch.ones(3, 2).as_subclass(OnDevice)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: workers.where_it_fits(weight, None, work), range(8)))
    assert sorted(found) == ["again"] * 6 + ["at first"] * 2
    assert streams.count("entered") == streams.count("left") == 14 and not caplog.messages


def test_workers_beside_each_other_have_a_stream_each_and_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is alone stays in the stream that there is: torch keeps memory for each."""
    events: list[Any] = []

    class Stream:
        def __init__(self, place: object):
            events.append("made")

        def wait_stream(self, other: object) -> None:
            events.append((self, "waits", other))

        def synchronize(self) -> None:
            events.append((self, "done"))

    place = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda place: "usual")
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: events.append((stream, "set")))
    monkeypatch.setattr(torch, "eye", lambda *_, **how: torch.ones(2, 2, dtype=how["dtype"]))
    monkeypatch.setattr(workers, "_STREAMS", {})
    here = threading.Barrier(2)

    def work(index: int) -> None:
        with workers.own_stream(place):
            here.wait(10)

    for _ in range(3):
        list(workers.run_in_order([0, 1], work, 2))
    assert events.count("made") == len(workers._STREAMS) == 2
    for stream in workers._STREAMS.values():
        own = [event[1:] for event in events if event[0] is stream]
        assert own == [("waits", "usual"), ("set",), ("done",)] * 3
    assert events.count(("usual", "set")) == 6
    events.clear()
    here = threading.Barrier(1)
    list(workers.run_in_order([0, 1], work, 1))
    assert not events
