"""Work on many matrices: shared out over processes and cores, kept as it finishes, resumed."""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from hf_rmt.config import AnalysisConfig
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.processes import (
    by_the_first,
    failing_together,
    gather,
    rank_and_count,
    shares,
    stopping_together,
)
from hf_rmt.progress import progress_bar
from hf_rmt.reports import store
from hf_rmt.workers import resident_memory, run_in_order, seconds_estimate, workers_for, working_bytes

Result = TypeVar("Result", bound=store.Storable)
Whole = TypeVar("Whole", bound="Savable")
Made = TypeVar("Made")


def factoring_bytes(*matrices: WeightMatrix) -> int:
    """Memory that factoring some matrices one after the other takes."""
    return max(working_bytes(*matrix.shape) for matrix in matrices)


@dataclass
class MatrixTasks(Generic[Result]):
    """The same work on each of many matrices, or pairs of them.

    Over several processes, which have to ``assemble`` before, each does its share, the longest first, and all get all
    results. Where they hold the weights together (FSDP2, ZeRO-3) they read them in step, and each works on what its
    turn gives it.

    Attributes:
        matrices: those of each task; the first gives it its name.
        work_on: of the positions of the tasks that this process will do, what makes a result of one's matrices.
        config: where and how many at a time, and whether a bar is shown.
        memory_for: bytes that a task takes, by its matrices.
        together: what makes two tasks, by their first matrices, ones for the same process, as they share something
            costly; None where none do.
    """

    matrices: Sequence[tuple[WeightMatrix, ...]]
    work_on: Callable[[Sequence[int]], Callable[..., Result]]
    config: AnalysisConfig
    memory_for: Callable[..., int] = factoring_bytes
    together: Callable[[WeightMatrix], Hashable] | None = None

    def results(self) -> list[Result]:
        """Those of all tasks.

        Raises:
            RuntimeError: a library failed, on a matrix that the message names; or another process did.
            Exception: whatever the work raises.
        """
        return self._all({}, None)

    def kept(self, partial: store.PartialRun, check: Callable[[int, Result], None]) -> list[Result]:
        """The same, each kept as it finishes; those of an earlier run are taken, once ``check`` has nothing against
        them. It reads their weights, as all processes have to where they hold these together."""
        there = gather([index for index in range(len(self.matrices)) if partial.has(index)])
        rank = rank_and_count()[0]
        found: dict[int, Result] = {}
        with failing_together():
            for index in sorted(set().union(*there)):
                # Processes of several machines may each see files of their own.
                seeing = [process for process, own in enumerate(there) if index in own]
                mine = seeing[index % len(seeing)] == rank
                earlier = partial.read(index) if mine else None
                if self.in_step:  # all read the weight, whoever sees the file
                    earlier = next((one for one in gather(earlier) if one is not None), None)
                if earlier is not None:
                    check(index, earlier)
                    found |= {index: earlier} if mine else {}
        return self._all(found, partial)

    def check(self, results: Sequence[Result], check: Callable[[int, Result], None]) -> None:
        """Hold results of an earlier run against the weights, the processes each some of them or all together."""
        rank, count = rank_and_count()
        with failing_together():
            for index in range(len(results)) if self.in_step else range(rank, len(results), count):
                check(index, results[index])

    @functools.cached_property
    def in_step(self) -> bool:
        """Whether several processes read together."""
        return rank_and_count()[1] > 1 and any(_is_collective(matrix) for own in self.matrices for matrix in own)

    def _all(self, found: dict[int, Result], partial: store.PartialRun | None) -> list[Result]:
        """What is left to do is done."""
        done = {index for own in gather(list(found)) for index in own}
        left = [index for index in range(len(self.matrices)) if index not in done]

        def keep(index: int, result: Result) -> None:
            if partial is not None:
                partial.write(index, result)
            found[index] = result

        if self.in_step:
            self._do_in_rounds(left, keep)
        else:
            with stopping_together() as check_others:
                for index, result in self._own(left):
                    keep(index, result)
                    check_others()
        everything = {index: result for own in gather(found) for index, result in own.items()}
        return [everything[index] for index in range(len(self.matrices))]

    def _cost(self, index: int) -> float:
        return sum(seconds_estimate(*matrix.shape) for matrix in self.matrices[index])

    def _own(self, left: list[int]) -> Iterator[tuple[int, Result]]:
        """The share of this process, each result as it comes."""
        rank, count = rank_and_count()
        together = self.together
        key = None if together is None else lambda index: together(self.matrices[index][0])
        # What takes longer than a fair share would keep one process at work and the others waiting.
        largest = sum(map(self._cost, left)) / count if count > 1 else math.inf
        bundles = bundles_of(left, self._cost, key, largest)
        costs = [sum(map(self._cost, bundle)) for bundle in bundles]
        mine = [bundles[position] for position in sorted(shares(costs, count)[rank])]
        tasks = [self.matrices[index] for index in itertools.chain(*mine)]
        workers = tasks_at_a_time(tasks, self.config, [self.memory_for(*own) for own in tasks])
        order = staggered(mine, workers)
        work = self.work_on(order)
        finished = len(self.matrices) - len(left) if count == 1 else 0
        shown = self.config.progress if rank == 0 else False
        first = [own[0] for own in self.matrices]
        return matrix_by_matrix(first, order, lambda index: work(*self.matrices[index]), workers, shown, finished)

    def _do_in_rounds(self, left: list[int], keep: Callable[[int, Result], None]) -> None:
        """The same where all processes read each matrix together: one a process, then each works on its own."""
        rank, count = rank_and_count()
        order = sorted(left, key=self._cost, reverse=True)
        work = self.work_on(order[rank::count])
        with progress_bar(self.config.progress if rank == 0 else False, len(order)) as advance:
            for start in range(0, len(order), count):
                taken = order[start : start + count]
                advance(self.matrices[taken[0]][0].name, 0)
                with failing_together():
                    for turn, index in enumerate(taken):
                        held = [_held(matrix) for matrix in self.matrices[index]]
                        if turn == rank:
                            own, matrices = index, held
                    if rank < len(taken):
                        with _naming(matrices[0]):
                            result = work(*matrices)
                        keep(own, result)
                advance("", len(taken))


class Savable(Protocol):
    """What is written to a folder as a whole."""

    def save(self, folder: str | Path) -> Path:
        """Write it, all or nothing."""

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """What is there."""


class MatrixRun(abc.ABC, Generic[Result, Whole]):
    """Work on many matrices whose results make a whole: an analysis its report, a comparison its tables."""

    kind: store.Kind
    result_class: type[store.Storable]
    whole_class: type[Whole]

    @abc.abstractmethod
    def tasks(self, kept: bool) -> MatrixTasks[Result]:
        """What is done on each matrix; ``kept``: the results say what weights they are of."""

    @abc.abstractmethod
    def whole(self, results: Sequence[Result]) -> Whole:
        """What the results of all matrices make."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for."""

    @abc.abstractmethod
    def results_of(self, earlier: Whole, folder: Path) -> list[Result]:
        """The results in what an earlier run has saved.

        Raises:
            ValueError: it was of other matrices, or under other settings.
        """

    @abc.abstractmethod
    def check(self, folder: Path, index: int, earlier: Result) -> None:
        """Hold a result of an earlier run against the weights.

        Raises:
            ValueError: it is of others.
        """

    def made(self) -> Whole:
        """The whole, of all processes together."""
        return self.whole(self.tasks(kept=False).results())

    def in_folder(self, folder: Path) -> Whole:
        """The same, kept in a folder matrix by matrix; what an earlier run left there is used."""
        tasks, check = self.tasks(kept=True), functools.partial(self.check, folder)
        if by_the_first(lambda: store.is_saved(folder, self.kind)):
            earlier = by_the_first(lambda: self.whole_class.load(folder))
            tasks.check(self.results_of(earlier, folder), check)
            by_the_first(lambda: store.settle(folder, self.kind, self.identity()))
            return earlier
        with opened(folder, self.identity(), self.result_class) as unfinished:
            whole = self.whole(tasks.kept(unfinished, check))
            by_the_first(lambda: whole.save(folder))
            unfinished.remove()
        return whole


def bundles_of(
    indices: Collection[int],
    cost: Callable[[int], float],
    together: Callable[[int], Hashable] | None,
    largest: float = math.inf,
) -> list[list[int]]:
    """Pieces of work in bundles of those that ``together`` says the same of, each by itself where that is None.

    The costliest is first in its bundle, and the bundles come in the order of these. None of several pieces costs more
    than ``largest``: where more belong together there are several bundles of them.
    """
    bundles: list[list[int]] = []
    open_ones: dict[Hashable, tuple[list[int], float]] = {}
    for index in sorted(indices, key=cost, reverse=True):
        shared = None if together is None else together(index)
        bundle, so_far = open_ones.get(shared, ([], 0.0)) if shared is not None else ([], 0.0)
        if bundle and so_far + cost(index) > largest:
            bundle, so_far = [], 0.0
        if not bundle:
            bundles.append(bundle)
        bundle.append(index)
        open_ones[shared] = bundle, so_far + cost(index)
    return bundles


def staggered(bundles: list[list[int]], workers: int) -> list[int]:
    """The pieces of bundles in an order in which the first of each is well ahead of the others.

    These need what it makes for all of them, and a worker that waits for that does nothing.
    """
    order: list[int] = []
    for number in range(len(bundles) + workers - 1):
        order += bundles[number][:1] if number < len(bundles) else []
        order += bundles[number - workers + 1][1:] if number >= workers - 1 else []
    return order


def _is_collective(matrix: WeightMatrix) -> bool:
    return bool(getattr(matrix.load, "collective", False))


def _held(matrix: WeightMatrix) -> WeightMatrix:
    """A matrix whose values are in the memory of this process."""
    stored = matrix.load(matrix.expert)
    return replace(matrix, load=lambda expert: stored)


@contextlib.contextmanager
def _naming(matrix: WeightMatrix) -> Iterator[None]:
    """Errors of libraries do not know what they worked on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise RuntimeError(f"{matrix.name}: {error}") from error


@contextlib.contextmanager
def opened(folder: Path, identity: dict[str, Any], result_class: type[store.Storable]) -> Iterator[store.PartialRun]:
    """The unfinished run of a folder, for all processes; the first makes and locks it.

    Raises:
        ValueError, OSError: as ``PartialRun``.
    """
    first: list[store.PartialRun] = []
    by_the_first(lambda: first.append(store.PartialRun(folder, identity, result_class)))
    with failing_together():
        partial = first[0] if first else store.PartialRun(folder, identity, result_class, lock=False)
    try:
        yield partial
    finally:
        partial.close()


def matrix_by_matrix(
    matrices: list[WeightMatrix],
    indices: Collection[int],
    work: Callable[[int], Made],
    workers: int,
    progress: bool | None,
    finished: int = 0,
) -> Iterator[tuple[int, Made]]:
    """What ``work`` makes of some of the matrices, taken in this order, each as it finishes.

    The bar has ``finished`` more of them behind it.

    Raises:
        RuntimeError: a library failed, on a matrix that the message names.
    """
    with progress_bar(progress, finished + len(indices), finished) as advance:

        def named(index: int) -> Made:
            advance(matrices[index].name, 0)
            with _naming(matrices[index]):
                return work(index)

        for index, result in run_in_order(list(indices), named, workers):
            advance(matrices[index].name, 1)
            yield index, result


def tasks_at_a_time(tasks: Sequence[tuple[WeightMatrix, ...]], config: AnalysisConfig, needs: Sequence[int]) -> int:
    """How many tasks to work on at a time, of which each takes so many bytes.

    One, where an accelerator does the work and no other number is asked for, and where weights are sharded, which all
    processes read in one order.

    Raises:
        ValueError: one alone takes more than ``config.max_memory`` leaves.
    """
    matrices = list(itertools.chain(*tasks))
    kinds = {config.device.partition(":")[0] if config.device else matrix.device.type for matrix in matrices}
    if any(map(_is_collective, matrices)):
        return 1
    if kinds - {"cpu", "meta", "mps"}:  # mps has no float64: its matrices are factored on the CPU
        return config.workers or 1
    if config.max_memory is None or not tasks:
        return config.workers or workers_for(needs)
    left = config.max_memory - resident_memory()  # type: ignore[operator]  # a number by now
    if max(needs) > left:
        _refuse(tasks[needs.index(max(needs))][0], max(needs), left, config.max_memory)  # type: ignore[arg-type]
    fitting = workers_for(needs, left)
    return min(config.workers or fitting, fitting)


def _refuse(matrix: WeightMatrix, needed: int, left: int, memory: int) -> NoReturn:
    least = math.ceil((needed + memory - left) / 1e8) * 100
    raise ValueError(
        f"{matrix.name} of shape {matrix.shape} takes up to {needed / 1e6:,.0f} MB to factor, and of max_memory "
        f"{max(left, 0) / 1e6:,.0f} MB are left: give {least}MB, or leave it out by its role or block"
    )
