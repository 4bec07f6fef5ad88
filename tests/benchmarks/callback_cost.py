"""A training run with ``RMTCallback``, which acts at its start and end, against one with a callback that does nothing.

Two things are asked: whether the steps in between cost anything, and whether the run takes longer
than the analyses and the comparison do by themselves. Differences between whole runs drown in
their noise where a step costs next to nothing, so the time within the callback is measured as well.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn
from transformers import TrainerCallback

from hf_rmt import RMTAnalyzer, RMTCallback

_SHAPE = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
_QUICK_SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
_VOCABULARY = 1000
#: Steps, sequences a step, tokens a sequence.
_RUN, _QUICK_RUN = (60, 8, 64), (4, 2, 16)
#: What a Trainer calls in every step.
_STEP_EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_step_end")
#: What it costs at most, as a share of a step.
_LIMIT = 0.01

_NONE, _IDLE, _OURS = "no callback", "callback that does nothing", "RMTCallback"
_ANALYSES, _COMPARISON = "two analyses by themselves", "comparison by itself"


def main(quick: bool) -> harness.Section:
    """Runs with each callback, and the analyses alone."""
    training = _Training(quick)
    before = training.model()
    analyzer, after = RMTAnalyzer(before), RMTAnalyzer(_trained(before))
    alternatives: dict[str, Callable[[], object]] = {
        _NONE: lambda: training.run(_NONE, lambda trainer, folder: None),
        _IDLE: lambda: training.run(_IDLE, lambda trainer, folder: TrainerCallback()),
        _OURS: lambda: training.run(
            _OURS, lambda trainer, folder: RMTCallback(trainer, folder=folder / "rmt", progress=False)
        ),
        _ANALYSES: lambda: [_analyse(analyzer) for _ in range(2)],
        _COMPARISON: lambda: _compare(analyzer, after),
    }
    times = harness.in_turn(alternatives, rounds=1 if quick else harness.ROUNDS, warm_up=not quick)
    return _section(times, training, len(analyzer.matrices))


def _trained(model: nn.Module) -> nn.Module:
    """A copy of which every weight has moved a little."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return moved


def _analyse(analyzer: RMTAnalyzer) -> None:
    with tempfile.TemporaryDirectory() as name:
        analyzer.analyze(progress=False).save(name)


def _compare(before: RMTAnalyzer, after: RMTAnalyzer) -> None:
    with tempfile.TemporaryDirectory() as name:
        RMTAnalyzer.compare(before, after, progress=False).save(name)


# --- training ------------------------------------------------------------------------------------


class _Training:
    """The same run every time; keeps for each callback, a run an entry, how long steps and events took."""

    def __init__(self, quick: bool):
        self.shape = _QUICK_SHAPE if quick else _SHAPE
        self.steps, self.size, self.length = _QUICK_RUN if quick else _RUN
        self.periods: dict[str, list[float]] = {}
        self.events: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(_VOCABULARY, (self.steps * self.size, self.length), generator=generator)
        self.data = [{"input_ids": row, "labels": row[0] % 2} for row in ids]

    def model(self) -> nn.Module:
        """A random classifier."""
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=_VOCABULARY, **self.shape))

    def run(self, name: str, callback_of: Callable[[Any, Path], TrainerCallback | None]) -> None:
        """Train with a callback; the time of the first step, which warms up, is left out of the steps'."""
        from transformers import PrinterCallback, Trainer

        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(self.model(), self._arguments(folder), train_dataset=self.data)
            trainer.remove_callback(PrinterCallback)
            clock, inside = _Clock(), []
            trainer.add_callback(clock)
            if (callback := callback_of(trainer, Path(folder))) is not None:
                _time_events(callback, inside)
                trainer.add_callback(callback)
            trainer.train()
        periods = [after - before for before, after in itertools.pairwise(clock.begins)]
        self.periods.setdefault(name, []).append(statistics.median(periods[1:]))
        self.events.setdefault(name, []).append(sum(inside) / self.steps if inside else float("nan"))

    def _arguments(self, folder: str) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments(
            folder,
            max_steps=self.steps,
            per_device_train_batch_size=self.size,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )


class _Clock(TrainerCallback):
    """When the steps began."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begins.append(time.perf_counter())


def _time_events(callback: TrainerCallback, seconds: list[float]) -> None:
    """Lets a callback note how long it took for each event of a step."""

    def timed(event: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return event(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    for name in _STEP_EVENTS:
        setattr(callback, name, timed(getattr(callback, name)))


# --- what is said --------------------------------------------------------------------------------


def _section(times: dict[str, harness.Times], training: _Training, matrices: int) -> harness.Section:
    rounds = len(times[_OURS].wall)
    periods, events = (
        {name: each[-rounds:] for name, each in kept.items()}  # without the warm-up
        for kept in (training.periods, training.events)
    )
    slower = harness.Ratio.of(periods[_OURS], periods[_IDLE])
    inside = harness.Ratio.of(events[_OURS], periods[_OURS])
    left = _overhead(times)
    shares = [seconds / (training.steps * period) for seconds, period in zip(left, periods[_IDLE], strict=True)]
    alone = times[_ANALYSES].median_wall + times[_COMPARISON].median_wall
    return harness.Section(
        title="Overhead of the callback",
        what=_what(training, matrices),
        tables=[_table(times, periods, events)],
        targets=[
            harness.Target("time in the callback a step, by the step", _LIMIT, inside.median),
            harness.Target(
                "what a step takes longer than with the idle callback, by the step", _LIMIT, slower.median - 1
            ),
            harness.Target(
                "what the run takes longer beyond the analyses and the comparison, by its steps",
                _LIMIT,
                statistics.median(shares),
            ),
        ],
        floor=(
            "The run with a callback that does nothing, then two analyses and their comparison, reports written: "
            f"{harness.number(times[_IDLE].median_wall + alone)} s."
        ),
        distance=(
            f"{harness.number(statistics.median(left))} s ({harness.number(min(left))} to {harness.number(max(left))}) "
            f"more than that. A step takes {slower} times that with the idle callback; the events of a step take "
            f"{1e6 * statistics.median(events[_OURS]):.1f} µs in `RMTCallback`, "
            f"{1e6 * statistics.median(events[_IDLE]):.1f} µs in the idle one."
        ),
        raw={
            "times": {name: each.raw() for name, each in times.items()},
            "step": periods,
            "events": events,
            "overhead": left,
        },
        packages=("accelerate",),
    )


def _overhead(times: dict[str, harness.Times]) -> list[float]:
    """Seconds of each round that neither the training nor the analyses explain."""
    walls = (times[name].wall for name in (_OURS, _IDLE, _ANALYSES, _COMPARISON))
    return [ours - idle - analyses - comparison for ours, idle, analyses, comparison in zip(*walls, strict=True)]


def _what(training: _Training, matrices: int) -> str:
    shape = training.shape
    millions = sum(parameter.numel() for parameter in training.model().parameters()) / 1e6
    return (
        f"`transformers.Trainer` on the CPU, {training.steps} steps of {training.size} x {training.length} random "
        f"tokens, a random BERT of {millions:.1f} million parameters ({shape['num_hidden_layers']} blocks, hidden "
        f"{shape['hidden_size']}, {matrices} matrices) with `RMTCallback(trainer)`, which analyses at the start and "
        "at the end and compares the two; with a callback that does nothing; and without. The analyses and the "
        "comparison by themselves read a model in memory and write what the callback writes. A step is the median "
        "time from the beginning of one to that of the next; its events are the calls into the callback."
    )


def _table(
    times: dict[str, harness.Times], periods: dict[str, list[float]], events: dict[str, list[float]]
) -> harness.Table:
    rows = []
    for name, each in times.items():
        step = statistics.median(periods[name]) if name in periods else float("nan")
        inside = statistics.median(events[name]) if name in events else float("nan")
        seconds = [harness.number(each.median_wall), harness.number(each.median_cpu)]
        rows.append([name, *seconds, harness.number(1e3 * step), harness.number(1e6 * inside)])
    return harness.Table(["", "wall s", "CPU s", "a step, ms", "its events, µs"], rows)
