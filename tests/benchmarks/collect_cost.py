"""``collect()`` against the plain forward pass of the same batches, and against what the arithmetic implies.

Operations are counted from the shapes: a forward pass takes ``2 m n`` a token and matrix, and
``4 L h`` a token and block for the scores of attention over L positions and the sums that they
weigh; a symmetric sum of ``x x^T`` takes ``n (n + 1)`` a token. Normalisations, activation functions
and embeddings are not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import harness
import numpy as np
import torch
from scipy.linalg import blas
from torch import nn

from hf_rmt import RMTAnalyzer, collecting
from hf_rmt.models.activations import Collector, Site

#: Batches, sequences a batch, positions a sequence; the shortest sequence where there is padding.
_COUNT, _SIZE, _LENGTH, _SHORTEST = 8, 8, 128, 16
_QUICK = (2, 4, 32, 4)
#: Fewer than usual: a round takes minutes.
_ROUNDS = 3

_SHARED, _APART, _OUTPUTS = "shared", "apart", "outputs"
_FULL, _PADDED = "full length", "padded"
_ONE = "collect(), one sequence"
#: Name of a way to collect, its data, what it sums, and the largest ratio to the implied one aimed at.
_WAYS = {
    "collect()": (_FULL, _SHARED, 1.25),
    "collect(), padded": (_PADDED, _SHARED, 1.25),
    "collect(), nothing shared": (_FULL, _APART, None),
    "collect(outputs=True)": (_FULL, _OUTPUTS, None),
}
Batch = dict[str, torch.Tensor]


def main(quick: bool) -> harness.Section:
    """Times of every way to collect, beside forward passes and bare sums."""
    model = harness.bert(quick)
    count, size, length, shortest = _QUICK if quick else (_COUNT, _SIZE, _LENGTH, _SHORTEST)
    data = {
        _FULL: token_batches(model.config.vocab_size, count, size, length, length),
        _PADDED: token_batches(model.config.vocab_size, count, size, length, shortest),
    }
    made: dict[str, int] = {}
    rounds = 1 if quick else _ROUNDS
    times = harness.in_turn(_alternatives(model, data, made), rounds, warm_up=not quick)
    work = {name: _Work(model.config, data[kind], sums) for name, (kind, sums, _) in _WAYS.items()}
    return _section(times, work, made)


def token_batches(vocabulary: int, count: int, size: int, length: int, shortest: int) -> list[Batch]:
    """Batches of random tokens; the lengths of the sequences are uniform from ``shortest`` to ``length``."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (size, length), generator=generator)
        lengths = torch.randint(shortest, length + 1, (size, 1), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
    return batches


# --- what is counted -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a collection over batches has to compute, of a BERT's shape."""

    config: Any
    batches: Sequence[Batch]
    sums: str

    def widths(self, sums: str) -> tuple[list[int], list[int]]:
        """Features of each distinct tensor that is summed: those with a row a token, those with a row a sequence."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        inputs = [hidden] * (5 if sums == _APART else 3) + [inner]  # query, key and value share one
        outputs = [hidden] * 5 + [inner] if sums == _OUTPUTS else []
        return self.config.num_hidden_layers * (inputs + outputs), [hidden] * (2 if outputs else 1)

    def rows(self) -> list[tuple[int, int]]:
        """Tokens and sequences of each batch."""
        return [(int(batch["attention_mask"].sum()), len(batch["input_ids"])) for batch in self.batches]

    def forward(self) -> int:
        """Operations of the forward pass, padding included."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        total = 0
        for batch in self.batches:
            size, length = batch["input_ids"].shape
            a_position = 2 * (4 * hidden * hidden + 2 * hidden * inner) + 4 * length * hidden
            total += self.config.num_hidden_layers * size * length * a_position + 2 * size * hidden * hidden
        return total

    def summing(self, sums: str, full: bool = False) -> int:
        """Operations of the sums; with ``full`` products both triangles are computed."""
        a_row = [sum(2 * n * n if full else n * (n + 1) for n in widths) for widths in self.widths(sums)]
        return sum(tokens * a_row[0] + sequences * a_row[1] for tokens, sequences in self.rows())

    def ratio(self, sums: str = "", full: bool = False) -> float:
        """Operations of a collection by those of the forward pass."""
        return 1 + self.summing(sums or self.sums, full) / self.forward()


# --- what is run ---------------------------------------------------------------------------------


def _alternatives(
    model: nn.Module, data: dict[str, list[Batch]], made: dict[str, int]
) -> dict[str, Callable[[], object]]:
    analyzer = RMTAnalyzer(model)
    runs: dict[str, Callable[[], object]] = {
        _forward_of(kind): lambda batches=batches: _forward(model, batches) for kind, batches in data.items()
    }
    for name, (kind, sums, _) in _WAYS.items():
        runs[name] = lambda name=name, kind=kind, sums=sums: made.update({name: _collect(analyzer, data[kind], sums)})
        runs[_floor_of(name)] = _BareSums(_Work(model.config, data[kind], sums))
    one = {key: value[:1] for key, value in data[_FULL][0].items()}
    runs[_ONE] = lambda: _collect(analyzer, [one], _SHARED)
    return runs


def _forward_of(kind: str) -> str:
    return f"forward pass, {kind}"


def _floor_of(name: str) -> str:
    return f"bare sums of {name}"


def _forward(model: nn.Module, batches: Sequence[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _collect(analyzer: RMTAnalyzer, batches: Sequence[Batch], sums: str) -> int:
    """The number of sums that were made; they themselves take gigabytes."""

    def collector(model: nn.Module, sites: list[Site], _: object, **options: Any) -> Collector:
        return Collector(model, sites, [site.key for site in sites], **options)

    with contextlib.ExitStack() as stack:
        if sums == _APART:
            stack.enter_context(mock.patch.object(collecting, "Collector", collector))
        return len(analyzer.collect(batches, outputs=sums == _OUTPUTS, progress=False).to_pandas())


class _BareSums:
    """BLAS over rows that are at hand, one sum a distinct tensor, in float32: no masks, no float64, no checks."""

    def __init__(self, work: _Work):
        self.rows = work.rows()
        self.widths = work.widths(work.sums)

    def __call__(self) -> None:
        sums = [[np.zeros((n, n), np.float32, order="F") for n in widths] for widths in self.widths]
        for counts in self.rows:
            for count, grams in zip(counts, sums, strict=True):
                columns = {len(gram): np.ones((len(gram), count), np.float32, order="F") for gram in grams}
                for gram in grams:
                    blas.ssyrk(1.0, columns[len(gram)], beta=1.0, c=gram, overwrite_c=1)


# --- what is said --------------------------------------------------------------------------------


def _section(times: dict[str, harness.Times], work: dict[str, _Work], made: dict[str, int]) -> harness.Section:
    ratios = {name: _ratios(times, name, kind) for name, (kind, *_) in _WAYS.items()}
    rows = [[name, *_seconds(times[name]), "1", "1", "1", "-", "-"] for name in map(_forward_of, (_FULL, _PADDED))]
    for name, (to_forward, to_floor, floor) in ratios.items():
        implied = work[name].ratio()
        excess = _divided(to_forward, implied)
        numbers = [harness.number(implied), str(excess), harness.number(floor), str(to_floor)]
        rows.append([name, *_seconds(times[name]), str(to_forward), *numbers])
    header = ["", "wall s", "CPU s", "by forward", "implied", "by implied", "floor s", "by floor"]
    ours = next(iter(_WAYS))
    apart = harness.Ratio.of(times["collect(), nothing shared"].wall, times[ours].wall)
    return harness.Section(
        title="Collecting covariances against the forward pass",
        what=_what(times, work, made),
        tables=[harness.Table(header, rows), _implied_table(work)],
        targets=[
            harness.Target(f"{name}, ratio to the implied one", limit, ratios[name][0].median / work[name].ratio())
            for name, (_, _, limit) in _WAYS.items()
            if limit is not None
        ],
        floor=(
            "The bare forward pass, and one call of BLAS `ssyrk` a batch and distinct tensor, on rows that are at "
            f"hand: {harness.number(ratios[ours][2])} s for `collect()`."
        ),
        distance=(
            f"`collect()` takes {ratios[ours][1]} times the floor; the rest is means and checks of every row, float64 "
            "sums, and the start and end. Without sharing it takes "
            f"{apart} times as long, where the operations imply "
            f"{harness.number(work[ours].ratio(_APART) / work[ours].ratio())}."
        ),
        raw={"times": {name: each.raw() for name, each in times.items()}, "implied": _implied(work)},
    )


def _ratios(times: dict[str, harness.Times], name: str, kind: str) -> tuple[harness.Ratio, harness.Ratio, float]:
    """To the forward pass, to the floor, and the floor's seconds."""
    forward = times[_forward_of(kind)].wall
    floor = harness.Times([a + b for a, b in zip(forward, times[_floor_of(name)].wall, strict=True)])
    ours = times[name].wall
    return harness.Ratio.of(ours, forward), harness.Ratio.of(ours, floor.wall), floor.median_wall


def _divided(ratio: harness.Ratio, by: float) -> harness.Ratio:
    return harness.Ratio(ratio.median / by, ratio.low / by, ratio.high / by)


def _seconds(times: harness.Times) -> list[str]:
    return [harness.number(times.median_wall), harness.number(times.median_cpu)]


def _what(times: dict[str, harness.Times], work: dict[str, _Work], made: dict[str, int]) -> str:
    full, padded = work["collect()"], work["collect(), padded"]
    size, length = full.batches[0]["input_ids"].shape
    tokens = sum(count for count, _ in padded.rows())
    counts = "; ".join(f"{name}: {_sum_counts(made[name], work[name])}" for name in made)
    return (
        "`RMTAnalyzer(model).collect(batches)` against the forward pass of the same batches under `torch.no_grad`, "
        f"on a random float32 model of BERT-base's shape: {len(full.batches)} batches of {size} x {length} tokens; "
        f"where padded, {tokens} of the {len(padded.batches) * size * length} positions are tokens. {_ROUNDS} rounds. "
        "'Implied' is the ratio of the floating-point operations, of a forward pass and symmetric sums to a forward "
        f"pass, counted from the shapes. Sums made, and counted - {counts}. A collection over one sequence, which is "
        f"mostly start and end, takes {harness.number(times[_ONE].median_wall)} s."
    )


def _sum_counts(made: int, work: _Work) -> str:
    counted = sum(map(len, work.widths(work.sums)))
    return f"{made} of {counted}" if made == counted else f"**{made} and not the {counted} of the shapes**"


def _implied(work: dict[str, _Work]) -> dict[str, dict[str, float]]:
    """Ratios to the forward pass that the operations imply, for each way to sum."""
    ways = {
        "symmetric, shared": (_SHARED, False),
        "symmetric, nothing shared": (_APART, False),
        "full products, shared": (_SHARED, True),
        "full products, nothing shared": (_APART, True),
        "symmetric, outputs too": (_OUTPUTS, False),
    }
    data = {_FULL: work["collect()"], _PADDED: work["collect(), padded"]}
    return {name: {kind: each.ratio(*way) for kind, each in data.items()} for name, way in ways.items()}


def _implied_table(work: dict[str, _Work]) -> harness.Table:
    rows = [[name, *(f"{ratio:.3f}" for ratio in kinds.values())] for name, kinds in _implied(work).items()]
    return harness.Table(["implied ratio to the forward pass", _FULL, _PADDED], rows)
