"""``SweepTable``: the frozen result of removing groups of singular values from a model, one after the other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from hf_rmt.reports import store
from hf_rmt.theory.inference import (
    Change,
    Rows,
    bootstrap_scores,
    change_of_seeds,
    joined_change,
    rank_correlation,
    refuse_other_rows,
)

if TYPE_CHECKING:
    import pandas as pd

#: The selection of a baseline: nothing is removed.
NONE = "none"
#: What is known of the components removed: their number and share, and means over them.
REMOVED = (
    "components",
    "of",
    "matrices",
    "mass",
    "p_right",
    "p_left",
    "overlap_right",
    "overlap_left",
)
#: What the drop of a score is held against.
QUANTITIES = REMOVED[-4:]
#: Selections whose numbers of components differ by no more than this share have one random control.
SAME_SIZE = 0.05
_COLUMNS = ("selection", "role", "block", "seed", "metric", "score", "baseline", "change", "order", "control")
#: Words in the names of scores that rise when a model gets worse.
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|ppl|nll|entropy|bits|error|[wcmt]er|mae|r?mse|s?mape|brier|distance")

Key = tuple[str, str, int | None, str, int]
Place = tuple[str, str, int | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """One evaluation of a sweep.

    Attributes:
        selection: what was removed, as ``str(selection)``; ``"none"`` for the baseline of a seed.
        role: from the matrices of which role, ``"all"`` for all of them.
        block: from which block, None for all.
        seed: which of several fine-tuned models.
        order: ``"before"`` or ``"after"`` fine-tuning, where a sweep asks for both; empty for a baseline.
        control: for a random control, the selection that it was drawn for; it is one for all of about that size
            (``SAME_SIZE``) too. Else empty.
        scores: metric to score.
        rows: metric to what each evaluation row contributed, where that is known.
        chance: metric to the score of a model that knows nothing, where there is one.
        removed: of the components removed, what ``REMOVED`` lists; keys may lack.
    """

    selection: str
    role: str = "all"
    block: int | None = None
    seed: int = 0
    order: str = ""
    control: str = ""
    scores: dict[str, float]
    rows: dict[str, Rows] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    removed: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What tells it from the other cells of a table."""
        return (*self.place, self.selection, self.seed)

    @property
    def place(self) -> Place:
        """Where, and in which order, something was removed."""
        return (self.order, self.role, self.block)

    @property
    def empty(self) -> bool:
        """Whether the selection chose nothing, so that nothing was removed."""
        return self.removed.get("components") == 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to be written, under names that ``restore`` understands."""
        # Cells may share their weights in memory, which safetensors refuses.
        values = {f"values.{metric}": rows.values.clone() for metric, rows in self.rows.items()}
        return values | {f"weights.{metric}": rows.weights.clone() for metric, rows in self.rows.items()}

    def description(self) -> str:
        """Everything else, as JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "rows"}
        return json.dumps(plain | {"exponential": {metric: rows.exponential for metric, rows in self.rows.items()}})

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> Cell:
        """Inverse of ``tensors`` and ``description``."""
        plain = json.loads(description)
        rows = {
            metric: Rows(tensors[f"values.{metric}"], tensors[f"weights.{metric}"], exponential)
            for metric, exponential in plain.pop("exponential").items()
        }
        return cls(rows=rows, **plain)

    def same_as(self, other: Cell) -> bool:
        """Whether another cell says the same, to the bit."""
        mine, others = self.tensors(), other.tensors()
        alike = self.description() == other.description()
        return alike and all(_same(mine[key], others[key]) for key in mine)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


class SweepTable:
    """What removing groups of singular values did to the scores of a model; frozen.

    Two tables of other seeds, roles or orders are joined by ``+``.

    Attributes:
        cells: the evaluations, baselines among them.
        settings: what decided the numbers: model, data, versions, ...; of joined tables, what they share, and
            under ``"differing"`` what they do not.
        profiles: for each role, the ``(p,)`` mean p-values of the right singular vectors by index, over the
            matrices of the role; may be empty.
        metrics: the names of the scores, the main one first.
    """

    def __init__(
        self, cells: Iterable[Cell], settings: dict[str, Any], profiles: Mapping[str, torch.Tensor] | None = None
    ):
        """Take the cells of a sweep.

        Raises:
            ValueError: there are none; two are of the same removal; a seed has no baseline, or two; or the
                evaluations are not of the same rows.
        """
        self.cells = tuple(cells)
        self.settings = settings
        self.profiles = dict(profiles or {})
        self.metrics = tuple(dict.fromkeys(metric for cell in self.cells for metric in cell.scores))
        self._baselines = _baselines_of(self.cells)
        if len({cell.key for cell in self.cells}) < len(self.cells):
            keys = [cell.key for cell in self.cells]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"two cells of this sweep are of {_in_words(twice)}: give one of them")
        for metric in self.metrics:
            refuse_other_rows([cell.rows[metric] for cell in self.cells if metric in cell.rows])

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __repr__(self) -> str:
        removals, seeds = len(self) - len(self._baselines), len(self._baselines)
        counts = f"{removals} removals" + f" over {seeds} seeds" * (seeds > 1)
        empty = sum(cell.empty for cell in self.cells)
        note = f", {empty} of them empty" if empty else ""
        return (
            f"SweepTable({self.settings.get('model', 'several models')!r}, {counts}{note}, {', '.join(self.metrics)})"
        )

    def baseline(self, cell: Cell) -> Cell:
        """The evaluation of the same fine-tuned model with nothing removed."""
        return self._baselines[cell.seed]

    def to_pandas(self) -> pd.DataFrame:
        """One row an evaluation and metric, baselines among them.

        ``change`` is score minus baseline of the same seed. ``order`` and ``control`` are those of ``Cell``;
        after them come, of the components removed, their number ``components`` out of ``of``, in how many
        ``matrices``, their ``mass`` (share of the sum of the singular values of a matrix, mean over the matrices),
        and the means over them of the p-values and overlaps of their vectors; last the score of ``chance``.
        """
        import pandas as pd

        rows = [self._row(cell, metric) for cell in self.cells for metric in cell.scores]
        others = dict.fromkeys(key for cell in self.cells for key in cell.removed if key not in REMOVED)
        table = pd.DataFrame(rows, columns=[*_COLUMNS, *REMOVED, *others, "chance"])
        numbers = ["score", "baseline", "change", *REMOVED, *others, "chance"]
        return table.astype({"block": "Int64", **dict.fromkeys(numbers, "float64")})

    def _row(self, cell: Cell, metric: str) -> dict[str, Any]:
        score, baseline = cell.scores[metric], self.baseline(cell).scores.get(metric, math.nan)
        labels = {key: getattr(cell, key) for key in ("selection", "role", "block", "seed", "order", "control")}
        numbers = {"score": score, "baseline": baseline, "change": score - baseline}
        return labels | {"metric": metric} | numbers | cell.removed | {"chance": cell.chance.get(metric)}

    def summary(self, metric: str | None = None) -> pd.DataFrame:
        """One row an order, role, block and selection: the mean change over seeds, and how sure it is.

        ``change`` is the mean over ``seeds`` of score minus baseline, ``spread`` its standard deviation
        over them, ``error`` its standard error and ``low`` to ``high`` a 95 % interval: over evaluation rows
        and seeds where the rows are known (``theory.inference.joined_change``), over the seeds alone
        where they are not. The ``verdict`` is ``undecided`` where the change is below two standard errors,
        else ``drop`` where the model got worse and ``gain`` where it got better (a loss or a
        perplexity is worse when it rises), and ``empty`` where the selection chose nothing.

        A random control has a row of its own; ``control`` names the selection that it was drawn for. That selection,
        and every other in the same place that has as many components to 5 %, has its change minus the mean
        change of the controls in ``over_control``, with the error of that difference in ``over_control_error``.

        Args:
            metric: which score; by default the first of ``metrics``.

        Raises:
            ValueError: no such metric.
        """
        import pandas as pd

        metric = self.main_metric(metric)
        evidence = _Evidence(self, metric)
        removed = (cell for cell in evidence.cells if cell.selection != NONE)
        seeds = _grouped(removed, lambda cell: (cell.place, cell.selection)).values()
        rows = [self._summary_row(metric, evidence, cells) for cells in seeds]
        texts = ["order", "role", "block", "selection", "control", "metric"]
        change = ["score", "baseline", "change", "spread", "seeds", "low", "high", "error"]
        numbers = ["over_control", "over_control_error", *REMOVED]
        table = pd.DataFrame(rows, columns=[*texts, *change, "verdict", *numbers])
        return table.astype({**dict.fromkeys([*change, *numbers], "float64"), "block": "Int64", "seeds": "int64"})

    def _summary_row(self, metric: str, evidence: _Evidence, cells: list[Cell]) -> dict[str, Any]:
        """The row of one removal, whose cells are those of its seeds."""
        change, over = evidence.change(cells), evidence.over_controls(cells)
        verdict = "empty" if all(cell.empty for cell in cells) else _verdict(change, self.lower_is_better(metric))
        labels = {key: getattr(cells[0], key) for key in ("order", "role", "block", "selection", "control")}
        return {
            **labels,
            "metric": metric,
            "score": fmean(cell.scores[metric] for cell in cells),
            "baseline": fmean(self.baseline(cell).scores[metric] for cell in cells),
            "change": change.mean,
            **{key: getattr(change, key) for key in ("spread", "seeds", "low", "high", "error")},
            "verdict": verdict,
            "over_control": over and over.mean,
            "over_control_error": over and over.error,
            **_means([cell.removed for cell in cells]),
        }

    def correlation(self, metric: str | None = None) -> pd.DataFrame:
        """Is more lost where singular vectors are less random? The paper's claim as a number.

        Spearman's rank correlation, over the deciles, of the drop (how much worse the model got, mean over seeds)
        with the mean p-values and overlaps of the vectors removed. The claim is a negative one with
        ``p_right`` and ``p_left``, a positive one with the overlaps.

        One row an order, role, quantity, and whether the first decile takes part: it holds the largest
        singular values, whose removal hurts whatever the vectors. The role ``"pooled"`` is all roles together, with
        ranks taken within each, as roles differ in how much they matter. Columns ``rho``, ``p_value``
        (two-sided, by permutation, which takes the deciles for exchangeable: where both go steadily up or down with
        the index, any two such curves correlate) and ``count`` (deciles); NaN where there are fewer than three or
        the sweep lacks the quantity.

        Args:
            metric: which score; by default the first of ``metrics``.

        Raises:
            ValueError: no such metric.
        """
        import pandas as pd

        metric = self.main_metric(metric)
        table = self.to_pandas()
        deciles = table["selection"].map(decile_of)
        table = table[(table["metric"] == metric) & deciles.notna()]
        table = table.assign(decile=deciles, drop=table["change"] * (1 if self.lower_is_better(metric) else -1))
        keys = ["order", "role", "block", "decile"]
        means = table.groupby(keys, sort=False, dropna=False)[["drop", *QUANTITIES]].mean().reset_index()
        means["drop"] = means["drop"].round(12)  # equal counts of right answers stay equal
        rows = []
        for order, ordered in means.groupby("order", sort=False):
            roles = {str(role): part for role, part in ordered.groupby("role", sort=False)}
            matrices = ordered[ordered["role"] != "all"]
            for role, part in (roles | ({"pooled": matrices} if matrices["role"].nunique() > 1 else {})).items():
                for first in (True, False):
                    rows += [
                        {"order": order, "role": role, "first_decile": first, "quantity": quantity, **numbers}
                        for quantity, numbers in _correlations(part if first else part[part["decile"] > 1])
                    ]
        names = ["order", "role", "first_decile", "quantity", "rho", "p_value", "count"]
        return pd.DataFrame(rows, columns=names)

    def main_metric(self, metric: str | None = None) -> str:
        """The metric asked for, or the first.

        Raises:
            ValueError: no such metric.
        """
        metric = metric or self.metrics[0]
        if metric not in self.metrics:
            raise ValueError(f"this sweep has no metric {metric!r}: give one of {', '.join(self.metrics)}")
        return metric

    def lower_is_better(self, metric: str) -> bool:
        """Whether a score rises when the model gets worse: a loss, an error, a perplexity, going by a word of its
        name, or what the sweep was told (``SweepConfig.lower_is_better``)."""
        exponential = any(cell.rows[metric].exponential for cell in self.cells if metric in cell.rows)
        told = _values(self.settings).get("lower_is_better", [])
        named = any(map(_LOWER_IS_BETTER.fullmatch, re.findall("[a-z]+", metric.lower())))
        return exponential or named or any(metric in names for names in told)

    def __add__(self, other: SweepTable) -> SweepTable:
        """Both sweeps in one table, of other seeds, roles, selections or orders.

        A cell of both is kept once. Settings that differ are listed under ``"differing"``. Profiles of both are
        averaged, each with the number of its seeds.

        Raises:
            ValueError: the two have different values of the same cell, were not evaluated on the same
                rows, or have profiles of different lengths.
        """
        if not isinstance(other, SweepTable):
            return NotImplemented
        cells = {cell.key: cell for cell in self.cells}
        for cell in other.cells:
            if not cells.setdefault(cell.key, cell).same_as(cell):
                raise ValueError(
                    f"the two sweeps have different values of {_in_words(cell.key)}: "
                    "give the models other seeds, or join tables that do not overlap"
                )
        settings = _joined_settings(self.settings, other.settings)
        return SweepTable(cells.values(), settings, _joined_profiles(self, other))

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.csv``, ``sweep.safetensors``, ``sweep_profiles.safetensors``, ``sweep.json``, all or nothing.

        A sweep that lies there already is replaced; other files stay.

        Raises:
            OSError: the folder cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with store.staged(folder, "sweep") as stage:
            self.to_pandas().to_csv(stage / "sweep.csv", index=False)
            store.save_results(stage / "sweep.safetensors", self.cells)
            # A file with neither tensors nor metadata cannot be read again.
            store.save_tensors(stage / "sweep_profiles.safetensors", self.profiles, {"format": "pt"})
            store.write_manifest(stage, "sweep", {"settings": self.settings, "cells": len(self)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SweepTable:
        """Read a sweep that ``save`` wrote.

        Raises:
            ValueError: there is none, or it is damaged; the message names the file.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder, "sweep")
        cells = store.load_results(store.current(folder, "sweep", "sweep.safetensors"), manifest["cells"], Cell)
        profiles, _ = store.load_tensors(store.current(folder, "sweep", "sweep_profiles.safetensors"))
        return cls(cells, manifest["settings"], profiles)

    def plot(self, folder: str | Path, metric: str | None = None) -> list[Path]:
        """Draw what the sweep has the numbers for: the change by decile (paper Fig. 7 and 11), before and after
        fine-tuning (Fig. 8), by block.

        Args:
            folder: made if it does not exist.
            metric: which score; by default the first of ``metrics``.

        Returns:
            The files written.
        """
        from hf_rmt.reports import sweep_plots

        return sweep_plots.draw_all(self, Path(folder), metric)


def of_same_size(components: float, control: float) -> bool:
    """Whether a random control of so many components is one for a selection of so many."""
    return abs(components - control) <= SAME_SIZE * control


def decile_of(selection: str) -> int | None:
    """Which decile a selection is, by its name; None if it is another."""
    found = re.fullmatch(r"decile:(\d+)", selection)
    return int(found[1]) if found else None


class _Evidence:
    """What the evaluations of a sweep tell of one metric."""

    def __init__(self, table: SweepTable, metric: str):
        """Resample all evaluations together, as all are of the same rows."""
        self.cells = [c for c in table if metric in c.scores and metric in table.baseline(c).scores]
        self._position = {cell.key: index for index, cell in enumerate(self.cells)}
        self._baseline = {cell.key: self._position[table.baseline(cell).key] for cell in self.cells}
        self._controls = _grouped((cell for cell in self.cells if cell.control), lambda cell: (cell.place, cell.seed))
        self._scores = torch.tensor([cell.scores[metric] for cell in self.cells], dtype=torch.float64)
        rows = [cell.rows[metric] for cell in self.cells if metric in cell.rows]
        self._has_rows = 0 < len(rows) == len(self.cells)
        if self._has_rows:
            self._influences = torch.stack([one.influence() for one in rows])
            self._replicates = bootstrap_scores(rows).T.contiguous()

    def change(self, cells: Sequence[Cell]) -> Change:
        """The change of these cells, one a seed, from the baselines."""
        return self._compare([(self._position[cell.key], [self._baseline[cell.key]]) for cell in cells])

    def over_controls(self, cells: Sequence[Cell]) -> Change | None:
        """The same from the mean of their controls, over the seeds that have any; None if none has."""
        pairs = [(self._position[cell.key], self._controls_of(cell)) for cell in cells if not cell.control]
        pairs = [(one, controls) for one, controls in pairs if controls]
        return self._compare(pairs) if pairs else None

    def _controls_of(self, cell: Cell) -> list[int]:
        """Positions of the controls of a cell, in its place and of its seed: drawn for it, or of its size."""
        size = cell.removed.get("components", math.nan)
        return [
            self._position[control.key]
            for control in self._controls.get((cell.place, cell.seed), [])
            if control.control == cell.selection or of_same_size(size, control.removed.get("components", math.nan))
        ]

    def _compare(self, pairs: list[tuple[int, list[int]]]) -> Change:
        """One evaluation a seed against the mean of others of that seed, all by their positions."""

        def differences(of: torch.Tensor) -> torch.Tensor:
            return torch.stack([of[one] - sum(of[other] for other in others) / len(others) for one, others in pairs])

        changes = differences(self._scores)
        if not self._has_rows:
            return change_of_seeds(changes.tolist())
        return joined_change(changes, differences(self._influences), differences(self._replicates).T)


def _verdict(change: Change, lower_is_better: bool) -> str:
    if change.undecided:
        return "undecided"
    return "gain" if (change.mean > 0) != lower_is_better else "drop"


def _correlations(means: pd.DataFrame) -> Iterator[tuple[str, dict[str, float]]]:
    """The correlation of the drop with each quantity, within roles and blocks."""
    strata = means.groupby(["role", "block"], dropna=False).ngroup().tolist()
    for quantity in QUANTITIES:
        yield quantity, asdict(rank_correlation(means["drop"].tolist(), means[quantity].tolist(), strata))


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells by what they share."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


def _means(removed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    known = {key: [one[key] for one in removed if not math.isnan(one.get(key, math.nan))] for key in REMOVED}
    return {key: fmean(values) for key, values in known.items() if values}


def _baselines_of(cells: Sequence[Cell]) -> dict[int, Cell]:
    """The baseline of each seed."""
    baselines = [cell for cell in cells if cell.selection == NONE]
    found = {cell.seed: cell for cell in baselines}
    if len(found) < len(baselines):
        raise ValueError("a seed of this sweep has two baselines: give one evaluation with nothing removed a seed")
    missing = sorted({cell.seed for cell in cells} - set(found))
    if missing or not found:
        raise ValueError(
            f"no baseline in this sweep{f' for seed {missing[0]}' if missing else ''}: "
            f"give one evaluation with nothing removed (selection {NONE!r}) a seed"
        )
    return found


def _in_words(key: Key) -> str:
    order, role, block, selection, seed = key
    where = f" of {role}" + ("" if block is None else f" in block {block}")
    return f"{selection}{where}, seed {seed}" + (f", {order} fine-tuning" if order else "")


def _joined_settings(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What both share, and all values of the rest."""
    sides = _values(one), _values(other)
    shared: dict[str, Any] = {}
    differing: dict[str, list[Any]] = {}
    for key in sides[0] | sides[1]:
        values: list[Any] = []
        for value in (value for side in sides for value in side.get(key, [None])):
            values += [] if value in values else [value]
        if len(values) == 1:
            shared[key] = values[0]
        else:
            differing[key] = values
    return shared | ({"differing": differing} if differing else {})


def _values(settings: dict[str, Any]) -> dict[str, list[Any]]:
    """All values of each setting, as they are once saved."""
    plain = json.loads(json.dumps(settings))
    differing = plain.pop("differing", {})
    return {key: [value] for key, value in plain.items()} | differing


def _joined_profiles(one: SweepTable, other: SweepTable) -> dict[str, torch.Tensor]:
    """Means of both, each with the number of its seeds."""
    seeds = [len({cell.seed for cell in table}) for table in (one, other)]
    joined = one.profiles | other.profiles
    for role in one.profiles.keys() & other.profiles.keys():
        a, b = one.profiles[role], other.profiles[role]
        if a.shape != b.shape:
            raise ValueError(
                f"the sweeps have {len(a)} and {len(b)} singular values of {role}: join sweeps of models of one shape"
            )
        joined[role] = (seeds[0] * a + seeds[1] * b) / sum(seeds)
    return joined
