"""Sweeps: many removals, one after the other, each scored and undone; shared out, kept, resumed after a kill."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_rmt.config import SweepConfig
from hf_rmt.evaluation import Scores
from hf_rmt.models.digests import digest_of, text_digest, value_digest
from hf_rmt.models.live import is_sharded, unwrap
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.processes import alone, assemble, broadcast, by_the_first, failing_together, gather, rank_and_count
from hf_rmt.progress import progress_bar
from hf_rmt.reports import store
from hf_rmt.reports.sweep import NONE, Cell, SweepTable, of_same_size
from hf_rmt.run import versions
from hf_rmt.scoring import Scorer
from hf_rmt.sharing import opened
from hf_rmt.subjects import Place, Subject, removed
from hf_rmt.theory.selection import Random, Selection


@dataclass(frozen=True)
class Planned:
    """One cell that is to be measured; the baseline has no selection."""

    selection: Selection | None = None
    role: str = "all"
    block: int | None = None
    control: str = ""

    @property
    def place(self) -> Place:
        """Where it removes."""
        return self.role, self.block

    @property
    def name(self) -> str:
        """What a table calls it."""
        return NONE if self.selection is None else str(self.selection)


class SweepRun:
    """One sweep over a model.

    Args:
        subject: what it takes parts out of; edits in place stay and are part of the baseline.
        evaluate: see ``Scorer``.
        config: the grid.
        baseline: the cell in which nothing is removed, where it was measured before.

    Raises:
        ValueError: there are no such roles or blocks.
        TypeError: ``evaluate`` scores no model.
    """

    def __init__(self, subject: Subject, evaluate: Any, config: SweepConfig, baseline: Cell | None = None):
        self.subject = subject
        self.pruner = subject.pruner
        self.config = config
        self.scorer = Scorer(evaluate, self.pruner.model)
        self.rank, self.processes = rank_and_count()
        # Where all processes have to run a model or a Trainer together, all take every cell.
        self.in_step = self.processes > 1 and (self.scorer.in_step or _runs_together(self.pruner.model))
        self.baseline = baseline
        self.places = subject.places(config)

    # The grid

    @functools.cached_property
    def cells(self) -> list[Planned]:
        """The baseline and every cell, each once; for that, weights are factored, as some selections ask for it.

        Raises:
            ValueError: weights cannot be factored, or have not what is selected.
        """
        cells, places = [Planned()], self.places
        self.subject.prepare(places)
        for role, block in places:
            sizes: list[int] = []
            for selection in self.config.chosen():
                cells.append(Planned(selection, role, block))
                size = self.subject.size(selection, (role, block))
                if size and not any(of_same_size(size, other) for other in sizes):
                    sizes.append(size)
                    draws = [Random(selection, draw) for draw in range(self.config.controls)]
                    cells += [Planned(draw, role, block, str(selection)) for draw in draws]
        planned: dict[tuple[str, str, int | None], Planned] = {}
        for cell in cells:
            planned.setdefault((cell.name, cell.role, cell.block), cell)
        return list(planned.values())

    # Measuring

    def table(self) -> SweepTable:
        """Measure every cell.

        Raises:
            ValueError: the model does not beat the largest class by the margin.
        """
        assemble("sweep")
        if self.processes > 1:
            self._refuse_other_processes(self.identity())
        return self._table(self._measured({}, None))

    def in_folder(self, folder: Path) -> SweepTable:
        """The same, kept in a folder cell by cell; what an earlier run of the same sweep left there is used.

        Raises:
            ValueError: also where the folder belongs to another sweep.
            OSError: it cannot be written.
        """
        assemble("sweep")
        identity = self.identity()
        self._refuse_other_processes(identity)
        if broadcast(store.is_saved(folder, "sweep")):
            table = by_the_first(lambda: SweepTable.load(folder))
            store.refuse_other(folder, table.settings.get("identity") or {}, identity)
            by_the_first(lambda: store.settle(folder, "sweep", identity))
            return table
        count = len(self.cells)  # planned before the folder is touched, by all processes together
        with opened(folder, identity, Cell) as partial:
            earlier = by_the_first(lambda: [partial.read(index) for index in range(count)])
            found = {index: cell for index, cell in enumerate(earlier) if cell is not None}
            table = self._table(self._measured(found, partial), identity)
            by_the_first(lambda: table.save(folder))
            by_the_first(partial.remove)
            return table

    def _refuse_other_processes(self, identity: dict[str, Any]) -> None:
        for rank, other in enumerate(gather(identity)):
            if differing := [key for key, value in identity.items() if other[key] != value]:
                raise ValueError(
                    f"process {rank} differs from process {self.rank} in {', '.join(differing)}: give every process "
                    "the same model and evaluation"
                )

    def _measured(self, found: dict[int, Cell], partial: store.PartialRun | None) -> dict[int, Cell]:
        """All cells: the baseline first, the others shared out over the processes."""
        shown = self.config.progress if self.rank == 0 else False
        with progress_bar(shown, len(self.cells), len(found)) as advance:

            def measure(indices: list[int]) -> dict[int, Cell]:
                for index in indices:
                    advance(f"{self.cells[index].name} of {self.cells[index].role}", 0)
                measured = self._together(indices, partial)
                advance("", len(indices))
                return measured

            if 0 not in found:
                found = found | measure([0])
            self._refuse_ignorant(found[0])
            left = [index for index in range(len(self.cells)) if index not in found]
            at_a_time = 1 if self.in_step else self.processes
            for start in range(0, len(left), at_a_time):
                found = found | measure(left[start : start + at_a_time])
        return found

    def _together(self, indices: list[int], partial: store.PartialRun | None) -> dict[int, Cell]:
        """One cell a process, or one that all measure in step; afterwards all know these, and whether to go on."""
        own = {}
        with failing_together():
            for index in indices if self.in_step else indices[self.rank :][:1]:
                own[index] = self._cell(self.cells[index])
                if partial is not None and (self.rank == 0 or not self.in_step):
                    partial.write(index, own[index])
        return {index: cell for one in gather(own) for index, cell in one.items()}

    def _refuse_ignorant(self, baseline: Cell) -> None:
        """Raise if the model is no better at the main metric than a guess."""
        metric = next(iter(baseline.scores))
        score, chance = baseline.scores[metric], baseline.chance.get(metric)
        error = baseline.rows[metric].error() if metric in baseline.rows else 0.0
        if chance is not None and score - chance < self.config.margin * error:
            raise ValueError(
                f"the model scores {score:.4f} in {metric}, and the largest class alone gives {chance:.4f}: a sweep of "
                f"a model that has not learned the task says nothing (margin={self.config.margin} asks for so many "
                f"standard errors, of {error:.4f} each, more)"
            )

    def _cell(self, planned: Planned) -> Cell:
        """Measure one cell."""
        if planned.selection is None and self.baseline is not None:
            return self.baseline
        with contextlib.nullcontext() if self.in_step else alone():
            if planned.selection is None:
                return cell_of(planned, self.scorer(), self.config.seed, {})
            with removed(self.subject, planned.selection, planned.place) as description:
                return cell_of(planned, self.scorer(), self.config.seed, description)

    # Results

    def _table(self, cells: dict[int, Cell], identity: dict[str, Any] | None = None) -> SweepTable:
        settings = self.pruner.origin | {"versions": versions(), "identity": identity}
        settings["lower_is_better"] = list(self.config.lower_is_better)
        ordered = [cells[index] for index in range(len(self.cells))]
        return SweepTable(ordered, settings, self.subject.profiles())

    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for."""
        return {
            "weights": weights_digest(self.pruner.model, self.pruner.matrices),
            "selections": [str(selection) for selection in self.config.chosen()],
            "places": [[role, block] for role, block in self.places],
            "controls": self.config.controls,
            "seed": self.config.seed,
            "edits": [[str(edit), value_digest(edit.masks)] for edit in self.pruner.edits],
            "projections": [[str(one), one.digest] for one in self.pruner.projections],
            "evaluation": self.scorer.identity(),
            **self.subject.identity(),
        }


def _runs_together(model: nn.Module) -> bool:
    """Whether a forward pass of a model takes all processes: with its parameters sharded, or in DDP."""
    wrapped = any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())
    return wrapped or is_sharded(unwrap(model))


def cell_of(planned: Planned, scores: Scores, seed: int, removed: dict[str, float], order: str = "") -> Cell:
    """A cell of the table from what was planned and measured."""
    return Cell(
        selection=planned.name,
        role=planned.role,
        block=planned.block,
        seed=seed,
        order=order,
        control=planned.control,
        scores=dict(scores),
        rows=scores.rows,
        chance=scores.chance,
        removed=removed,
    )


def weights_digest(model: nn.Module, matrices: list[WeightMatrix]) -> str:
    """Hash of all values of a model: of its matrices wherever they are, and of what else it has in memory."""
    read = {matrix.name: digest_of(matrix.read()) for matrix in matrices}
    own = {matrix.parameter for matrix in matrices}
    inner = unwrap(model)
    for name, values in (*inner.named_parameters(), *inner.named_buffers()):
        if name not in own and values.device.type != "meta":
            whole: Any = values.full_tensor() if hasattr(values, "full_tensor") else values
            read[name] = digest_of(whole.detach().reshape(-1))
    return text_digest(read)
