"""The steps of a training run of which activations are collected."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

from hf_rmt.collecting import CollectionRun
from hf_rmt.config import CollectConfig
from hf_rmt.models.activations import Collector, SharingChangedError
from hf_rmt.models.batches import rows_to_keep
from hf_rmt.processes import gather
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.unfinished import Collected

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_rmt.analyzer import RMTAnalyzer

logger = logging.getLogger(__name__)


class TrainingWindow:
    """Collects activations from the forward passes of a Trainer, step by step, without passes of its own.

    Passes without gradients (of a reference model, of a generation) do not count. What goes wrong here never
    stops the training: the covariances of the window are missing then. Sums for which there is no memory are
    left out.
    """

    def __init__(self, analyzer: RMTAnalyzer):
        assert analyzer.model is not None
        self.analyzer = analyzer
        self.run = CollectionRun(analyzer.model, analyzer.matrices, CollectConfig())
        self.apart: list[str] = []
        self._hooks = contextlib.ExitStack()
        self._loader: Any = None
        self._number = 0
        self._begin()

    def _begin(self) -> None:
        sites = list(self.run.sites.values())
        self._collector = Collector(self.run.model, sites, self.apart, guest=True, memory=self.run.memory)
        self._collector.training_only = True
        self.run.dropout = False

    def open(self, loader: Any, args: TrainingArguments) -> None:
        """Watch one step of the optimizer, that is about to take its batches from the loader."""
        self._loader, self._args, self._number = loader, args, 0
        self._hooks.enter_context(self._collector.attached())
        self._collector.keep_rows = self._keep_rows()

    def next_batch(self) -> None:
        """Go on to the next batch of the step."""
        self._number += 1
        self._collector.keep_rows = self._keep_rows()

    def _keep_rows(self) -> Any:
        """All but the repeats in the last batch of an epoch, of several that the loader gave in advance."""
        if self.run.processes == 1 or not hasattr(self._loader, "end_of_dataloader"):
            return None
        accumulated = self._args.gradient_accumulation_steps
        if accumulated > 1 and self._number != (length_of(self._loader) - 1) % accumulated:
            return None
        return functools.partial(rows_to_keep, self._loader, rank=self.run.rank)

    def close(self) -> None:
        """Stop watching until the next ``open``."""
        self._hooks.close()
        self._loader = None
        self.run.dropout = self.run.dropout or self.run.model.training

    def covariances(self) -> ActivationCovariances | None:
        """What was collected since the last call, over all processes; None if nothing."""
        collector = self._collector
        errors = [error for error in gather(None if collector.error is None else str(collector.error)) if error]
        if isinstance(collector.error, SharingChangedError):
            self.apart.append(collector.error.site)
        found = None
        if not errors and any(gather(collector.batches)):
            self.run.count, self.run.unfit = collector.batches, set(collector.unfit)
            try:
                sums = Collected([]).with_sums(*collector.result(final=True))
                found = self.run.joined(sums, self.analyzer.origin, {})
            except Exception as error:  # the same in every process
                errors.append(str(error))
        if errors:
            logger.warning("no covariances this time: %s", errors[0])
        if collector.skipped:
            logger.warning("no memory for the covariances of %s", ", ".join(collector.skipped))
        self._begin()
        return found


def length_of(loader: Any) -> int:
    """Number of batches; 0 of a stream, which has none to tell."""
    try:
        return len(loader)
    except TypeError:
        return 0
