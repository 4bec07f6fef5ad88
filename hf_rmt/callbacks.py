"""``RMTCallback``: a ``transformers.Trainer`` that watches the weights while it trains."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rmt.analyzer import RMTAnalyzer
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.live import is_sharded
from hf_rmt.models.matrices import select
from hf_rmt.processes import alone, broadcast, by_the_first, gather, rank_and_count
from hf_rmt.reports import store
from hf_rmt.reports.columns import COLUMNS as COLUMNS_OF_REPORTS
from hf_rmt.reports.columns import CONTROL_COLUMNS, LABELS, OVERLAP_COLUMNS
from hf_rmt.reports.comparison import ModelComparison
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.snapshot import snapshot_of, take_snapshot
from hf_rmt.training_window import TrainingWindow, length_of

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

#: When to analyse between the start and the end: after epochs, at every save, or every so many steps.
Every = Literal["epoch", "save"] | int | None
#: Columns that are logged if nothing is said.
COLUMNS = ("n_above_tw", "n_below_tw", "mp_distance", "stable_rank", "right_significant", "left_significant")


class RMTCallback(TrainerCallback):
    """Analyses the model at the start of training, meanwhile and at the end, and compares the end with the start.

    Logs ``rmt/<role>/<column>``, means over blocks, to the trackers of the Trainer; writes a report for each
    analysis and the comparison under ``folder``. If ``metric_for_best_model`` is such a name, every evaluation
    gets its value (add callbacks that read it, as ``EarlyStoppingCallback``, after this one). Steps at which
    nothing is due cost nothing. On several processes each analyses its share of the matrices; the first one alone
    writes, and compares replicated weights with the start, while the others wait.

    Args:
        trainer: by which numbers reach trackers: ``trainer.add_callback(RMTCallback(trainer))``. Without it
            they reach the files alone.
        every: ``"epoch"``, ``"save"``, a number of steps, or None for start and end alone.
        roles, blocks: as for ``RMTAnalyzer.analyze``.
        columns: of the report's table, to be logged.
        covariances: collect the activations of at most so many training steps before each analysis but the
            first, for the overlaps of right singular vectors, from the forward passes of the training itself;
            0 for none. Dropout is on then.
        folder: for the reports; None takes ``rmt`` in the output folder.
        keep_start: keep the first weights in ``folder`` (as large as the matrices), so that the comparison
            can say where in the spectrum training acted, also of a run that is resumed.
        **options: settings of the analysis; see ``AnalysisConfig``.

    Attributes:
        reports: by training step, the folder of each report; the first is ``start``.
        last: folder of the report of the model that training leaves: the last step's, or ``final`` where the
            Trainer has loaded the best model again.
        comparison: of the end with the start, once training is over; None on other processes than the first.
        seconds: time that the analyses have taken.

    Raises:
        ValueError: the model has no matrix, nothing matches, or a setting is out of range.
    """

    def __init__(  # noqa: PLR0913  # settings by name
        self,
        trainer: Trainer | None = None,
        *,
        every: Every = None,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
        columns: Collection[str] = COLUMNS,
        covariances: int = 0,
        folder: str | Path | None = None,
        keep_start: bool = True,
        **options: Any,
    ):
        steps = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if every not in ("epoch", "save", None) and not steps:
            raise ValueError(f"every is {every!r}: give 'epoch', 'save', a number of steps, or None")
        self.trainer = trainer
        self.every = every
        self.roles = roles
        self.blocks = blocks
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)
        self.covariances = covariances
        self.keep_start = keep_start
        self.config = AnalysisConfig.of(None, options)
        self.folder: Path | None = None
        self._given_folder = None if folder is None else Path(folder)
        self._check()
        self.analyzer = None if trainer is None else self._analyzer_of(trainer.model)
        self._reset()

    def _check(self) -> None:
        """Refuse now what would fail in the middle of a training run."""
        if not isinstance(self.covariances, int) or self.covariances < 0:
            raise ValueError(f"covariances is {self.covariances!r}: give a number of steps, 0 for none")
        if self.covariances and not self.config.right:
            raise ValueError(f"covariances need right singular vectors, and sides is {self.config.sides!r}")
        there = [*COLUMNS_OF_REPORTS, *(CONTROL_COLUMNS if self.config.control else ())]
        there += OVERLAP_COLUMNS if self.covariances else ()
        if unknown := [column for column in self.columns if column not in there or column in LABELS]:
            raise ValueError(f"no column {', '.join(unknown)} of numbers in these reports; see docs/columns.md")

    def _reset(self) -> None:
        if (window := getattr(self, "_window", None)) is not None:
            window.close()  # of a run that was broken off
        self.last: Path | None = None
        self.reports: dict[int, Path] = {}
        self.comparison: ModelComparison | None = None
        self.seconds = 0.0
        self._logged: dict[int, dict[str, float]] = {}
        self._window: TrainingWindow | None = None

    def _analyzer_of(self, model: Any) -> RMTAnalyzer:
        analyzer = RMTAnalyzer(model)
        analyzer.matrices = select(analyzer.matrices, self.roles, self.blocks)
        return analyzer

    # Events of the Trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Analyse the first weights; of a resumed run, take up what its first part left."""
        self._reset()
        self.folder = self._given_folder or Path(args.output_dir or ".") / "rmt"
        self.analyzer = self._analyzer_of(kw["model"])
        self._window = TrainingWindow(self.analyzer) if self.covariances else None
        if self.trainer is None:
            logger.warning("RMTCallback has no trainer, so its numbers reach no tracker: RMTCallback(trainer)")
        if state.global_step and broadcast(store.is_saved(self.folder / "start", "report")):
            self._check_start()
            return
        self._check_metric(args, self._analyse(state, "start"))
        if self.keep_start and self._works():
            take_snapshot(self.analyzer.matrices, self._start_weights, write=self._first)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Watch the coming step if an analysis is near."""
        if self._window is not None:
            loader = kw.get("train_dataloader")
            ahead = range(state.global_step + 1, state.global_step + 1 + self.covariances)
            if any(self._is_due(step, args, state, loader) for step in ahead):
                self._window.open(loader, args)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Go on to the next batch of a step."""
        if self._window is not None:
            self._window.next_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Analyse after every so many steps."""
        if self._window is not None:
            self._window.close()
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._analyse(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Analyse after an epoch."""
        if self.every == "epoch":
            self._analyse(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Analyse what was saved."""
        if self.every == "save":
            self._analyse(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Give the evaluation the number that decides which model is best."""
        if self.analyzer is not None and self.folder is not None and _metric_name(args):
            name = _metric_name(args)
            numbers = self._analyse(state)
            if name not in numbers:
                raise ValueError(f"metric_for_best_model is {name!r}, which this analysis lacks: {', '.join(numbers)}")
            kw["metrics"][f"eval_{name}"] = numbers[name]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Analyse the last weights, and compare what training leaves with the first."""
        if self._window is not None:
            self._window.close()
        self._analyse(state, weights_are="final" if args.load_best_model_at_end and state.best_model_checkpoint else "")
        self._compare()

    # What they do

    def _check_start(self) -> None:
        """Refuse to go on from a start that the end cannot be compared with."""
        assert self.analyzer is not None and self.folder is not None
        start = AnalysisReport.load(self.folder / "start")
        wanted = self.config.identity() | {"matrices": [matrix.name for matrix in self.analyzer.matrices]}
        store.refuse_other(self.folder, start.settings | {"matrices": list(start)}, wanted)

    def _check_metric(self, args: TrainingArguments, numbers: dict[str, float]) -> None:
        """Refuse a metric that no analysis will give; overlaps come with the second one."""
        name = _metric_name(args)
        later = self.covariances and name.rpartition("/")[2] in OVERLAP_COLUMNS
        if name and name not in numbers and not later:
            raise ValueError(f"metric_for_best_model is {name!r}, which is not logged; there are {', '.join(numbers)}")

    @property
    def _first(self) -> bool:
        return rank_and_count()[0] == 0

    @property
    def _start_weights(self) -> Path:
        assert self.folder is not None
        return self.folder / "start" / "weights.safetensors"

    def _works(self) -> bool:
        """Whether this process has to do with the first weights: sharded ones are read by all together."""
        return self._first or self._sharded

    @property
    def _sharded(self) -> bool:
        assert self.analyzer is not None and self.analyzer.model is not None
        return is_sharded(self.analyzer.model)

    def _is_due(self, step: int, args: TrainingArguments, state: TrainerState, loader: Any) -> bool:
        """Whether there will be an analysis after this step."""
        if step == state.max_steps or (isinstance(self.every, int) and step % self.every == 0):
            return True
        followed = [(args.save_strategy, state.save_steps)] if self.every == "save" else []
        followed += [("epoch", 0)] if self.every == "epoch" else []
        followed += [(args.eval_strategy, state.eval_steps)] if _metric_name(args) else []
        epoch = math.ceil(length_of(loader) / args.gradient_accumulation_steps)
        periods = {"steps": lambda steps: steps, "epoch": lambda _: epoch}
        for strategy, steps in followed:
            period = periods.get(str(getattr(strategy, "value", strategy)), lambda _: 0)(steps)
            if period and step % period == 0:
                return True
        return False

    def _analyse(self, state: TrainerState, name: str = "", weights_are: str = "") -> dict[str, float]:
        """Analyse, write and log, once a step; gives what was logged.

        ``weights_are``: name of the report of weights that are not those of the last step, of which nothing is
        logged beside what that step has logged.
        """
        step = state.global_step
        if step in self._logged and not weights_are:
            return self._logged[step]
        assert self.analyzer is not None and self.folder is not None
        began = time.perf_counter()
        covariances = self._window.covariances() if self._window is not None else None
        report = self.analyzer.analyze(config=self.config, covariances=covariances)  # each process its share
        numbers = self._numbers(report)
        place = self.folder / (weights_are or name or f"step-{step}")
        by_the_first(lambda: report.save(place))
        if self._first:
            self.last = place
        if step in self._logged:
            return numbers
        if self.last is not None:
            self.reports[step] = self.last
        numbers = broadcast(numbers)
        numbers["rmt/seconds"] = time.perf_counter() - began
        self.seconds += numbers["rmt/seconds"]
        self._logged[step] = numbers
        if self.trainer is not None:
            self.trainer.log(dict(numbers))
        logger.info("step %d: analysed in %.1f s", step, numbers["rmt/seconds"])
        return numbers

    def _numbers(self, report: AnalysisReport) -> dict[str, float]:
        """What is logged: ``rmt/<role>/<column>``."""
        table = report.by_role().xs("mean", axis=1, level=1)
        columns = [column for column in self.columns if column in table]  # a first report has no overlaps
        numbers: dict[str, float] = {}
        for role, row in table.iterrows():
            path = "/".join(filter(None, role)) if isinstance(role, tuple) else role
            numbers |= {f"rmt/{path}/{column}": float(row[column]) for column in columns}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def _compare(self) -> None:
        """Of the weights where the first ones were kept, else of the reports."""
        assert self.analyzer is not None and self.folder is not None
        began = time.perf_counter()
        kept = broadcast(self.keep_start and self._start_weights.is_file())
        comparison = None
        if kept and self._works():
            start = copy.copy(self.analyzer)
            start.model, start.model_id = None, f"{self.analyzer.model_id} before training"
            start.matrices = snapshot_of(self.analyzer.matrices, self._start_weights)
            with contextlib.nullcontext() if self._sharded else alone():  # others may not see the file
                comparison = RMTAnalyzer.compare(start, self.analyzer, config=self.config)
        elif not kept and self._first:
            start_report = AnalysisReport.load(self.folder / "start")
            assert self.last is not None
            comparison = start_report.compare(AnalysisReport.load(self.last))
        if comparison is not None and self._first:
            self.comparison = comparison
            comparison.save(self.folder / "comparison")
        gather(None)  # the others wait for the first, however long it takes
        self.seconds += time.perf_counter() - began
        logger.info("compared with the start in %.1f s: %s", time.perf_counter() - began, self.folder / "comparison")


def _metric_name(args: TrainingArguments) -> str:
    """The number of ours that decides which model is best; empty if it is none of ours."""
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    return name if name.startswith("rmt/") else ""
