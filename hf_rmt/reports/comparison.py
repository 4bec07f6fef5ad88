"""``ModelComparison``: the frozen result of comparing a model before and after training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_rmt.config import AnalysisConfig
from hf_rmt.reports import store
from hf_rmt.reports.columns import COLUMNS, COMPARISON_COLUMNS, CONTROL_COLUMNS, LABELS, OVERLAP_COLUMNS
from hf_rmt.reports.grouping import by_role
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.result import MatrixResult
from hf_rmt.theory.comparison import DECILES, DecileEnergy, Match

if TYPE_CHECKING:
    import pandas as pd

Shape = tuple[int, int]
_LABELS = ("name", "role", "stack", "block", "expert", "part", "rows", "cols")
_INTEGERS = ("block", "expert", "rows", "cols")
_NUMBERS = [c for c in (*COLUMNS, *CONTROL_COLUMNS, *OVERLAP_COLUMNS) if c not in (*LABELS, *_LABELS)]
_PARTS: dict[str, Any] = {
    "right_energy": DecileEnergy,
    "left_energy": DecileEnergy,
    "right_match": Match,
    "left_match": Match,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class MatrixComparison:
    """One matrix before and after training.

    Attributes:
        row: the matrix's row of the comparison's table.
        right_energy, left_energy: where the change lies in the singular basis before it; None where weights
            were not at hand, vectors not asked for, or a matrix could not be analysed.
        right_match, left_match: what the singular vectors became; None in the same cases.
    """

    row: dict[str, Any]
    right_energy: DecileEnergy | None = None
    left_energy: DecileEnergy | None = None
    right_match: Match | None = None
    left_match: Match | None = None

    @classmethod
    def of(cls, before: MatrixResult, after: MatrixResult) -> MatrixComparison:
        """What two analyses of a matrix tell: every number after minus before."""
        row = {key: before.row[key] for key in _LABELS}
        for column in _NUMBERS:
            old, new = before.row.get(column), after.row.get(column)
            row[f"{column}_change"] = None if old is None or new is None else new - old
        empty = [f"{side}: {r.row['note']}" for side, r in (("before", before), ("after", after)) if not len(r.s)]
        return cls(row=row | {"note": "; ".join(empty)})

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.row["name"]

    @property
    def located(self) -> bool:
        """Whether there is a change, and it is known where in the singular basis it lies."""
        return self.right_energy is not None and not bool(self.right_energy.shares.isnan().any())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to be written, under names that ``restore`` understands."""
        return {
            f"{part}.{field.name}": getattr(getattr(self, part), field.name)
            for part, kind in _PARTS.items()
            if getattr(self, part) is not None
            for field in fields(kind)
        }

    def description(self) -> str:
        """Everything else, as JSON."""
        return json.dumps(self.row)

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> MatrixComparison:
        """Inverse of ``tensors`` and ``description``."""
        parts = {
            part: kind(**{field.name: tensors[f"{part}.{field.name}"] for field in fields(kind)})
            for part, kind in _PARTS.items()
            if f"{part}.{fields(kind)[0].name}" in tensors
        }
        return cls(row=json.loads(description), **parts)


class ModelComparison(Mapping[str, MatrixComparison]):
    """A model before and after training, matrix by matrix; frozen. Every difference is after minus before.

    Attributes:
        before, after: the two reports.
        settings: those of both analyses; ``only_before`` and ``only_after``, the matrices left out as one side
            lacks them; and ``weights``, whether the weights were compared or only the reports.
    """

    def __init__(
        self,
        comparisons: Iterable[MatrixComparison],
        before: AnalysisReport,
        after: AnalysisReport,
        settings: dict[str, Any],
    ):
        self._comparisons = {comparison.name: comparison for comparison in comparisons}
        self.before = before
        self.after = after
        self.settings = settings

    @classmethod
    def of_reports(cls, before: AnalysisReport, after: AnalysisReport) -> ModelComparison:
        """What two reports tell: their numbers, and no vectors.

        Raises:
            ValueError: the reports were made under different settings, or of matrices of different shapes,
                or have no matrix in common; the message says which.
        """
        _refuse_other_settings(before, after)
        names = common_names(list(before), list(after))
        shapes = [{name: (r.row["rows"], r.row["cols"]) for name, r in side.items()} for side in (before, after)]
        refuse_other_shapes({name: (shapes[0][name], shapes[1][name]) for name in names})
        settings: dict[str, Any] = {key: before.settings.get(key) for key in AnalysisConfig().identity()}
        for side, report in (("before", before), ("after", after)):
            settings[side] = {key: report.settings.get(key) for key in ("model", "revision")}
        settings |= {"weights": False, **one_sided(list(before), list(after))}
        return cls((MatrixComparison.of(before[name], after[name]) for name in names), before, after, settings)

    def __getitem__(self, name: str) -> MatrixComparison:
        """Comparison of one matrix, by its name, or by its path in a headed model.

        Raises:
            KeyError: no such matrix; the message names the nearest ones.
        """
        known = self.before[name].name
        if known not in self._comparisons:
            raise KeyError(f"{known} is not compared: the model after has no such matrix")
        return self._comparisons[known]

    def __iter__(self) -> Iterator[str]:
        return iter(self._comparisons)

    def __len__(self) -> int:
        return len(self._comparisons)

    def __repr__(self) -> str:
        before, after = (self.settings[side]["model"] for side in ("before", "after"))
        return f"ModelComparison({before!r} -> {after!r}, {len(self)} matrices)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a matrix; the columns are explained in docs/columns.md."""
        import pandas as pd

        types = self.before.to_pandas().dtypes
        reported = [c for c in _NUMBERS if c in types and c in self.after.to_pandas()]
        columns = [*_LABELS, *(f"{column}_change" for column in reported)]
        columns += list(COMPARISON_COLUMNS) if self.settings["weights"] else ["note"]
        table = pd.DataFrame([comparison.row for comparison in self._comparisons.values()], columns=columns)
        for column in columns:
            if column.endswith("intruders") or column in _INTEGERS:
                table[column] = table[column].astype("Int64")
            elif column not in (*_LABELS, "note"):
                table[column] = table[column].astype(types.get(column.removesuffix("_change"), "float64"))
        return table

    def by_role(self) -> pd.DataFrame:
        """Mean and spread over blocks, one row a role, in the order of the model.

        The experts of a block are averaged first. Columns are pairs as those of ``AnalysisReport.by_role``.
        """
        table = self.to_pandas()
        return by_role(table, [c for c in table.columns if c not in (*_LABELS, "note")])

    def energy_over_expectation(self, side: Literal["right", "left"] = "right") -> pd.DataFrame:
        """Energy of the change in each decile over that of a change without direction.

        One row a role, the mean over blocks; columns 1 (the largest singular values) to 10 and ``outside``,
        empty where there is nothing to expect. Above 1 is where training acted.
        """
        columns = [str(decile) for decile in range(1, DECILES + 1)] + ["outside"]
        table = self.to_pandas()[list(_LABELS)]
        energies = [getattr(comparison, f"{side}_energy") for comparison in self._comparisons.values()]
        ratios = [[None] * len(columns) if e is None else (e.shares / e.expected).tolist() for e in energies]
        table[columns] = ratios
        means = by_role(table, columns).xs("mean", axis=1, level=1)
        return means[columns]

    def save(self, folder: str | Path) -> Path:
        """Write ``comparison.parquet``, ``comparison.safetensors``, ``comparison.json``, and the two reports in
        ``before/`` and ``after/``, all or nothing.

        A comparison that lies there already is replaced; other files stay.

        Raises:
            OSError: the folder cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with store.staged(folder, "comparison") as stage:
            self.to_pandas().to_parquet(stage / "comparison.parquet", index=False)
            store.save_results(stage / "comparison.safetensors", self._comparisons.values())
            self.before.save(stage / "before")
            self.after.save(stage / "after")
            store.write_manifest(stage, "comparison", {"settings": self.settings, "matrices": list(self)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ModelComparison:
        """Read a comparison that ``save`` wrote.

        Raises:
            ValueError: there is none, or it is damaged; the message names the file.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder, "comparison")
        path = store.current(folder, "comparison", "comparison.safetensors")
        comparisons = store.load_results(path, len(manifest["matrices"]), MatrixComparison)
        before, after = (AnalysisReport.load(store.current(folder, "comparison", side)) for side in ("before", "after"))
        return cls(comparisons, before, after, manifest["settings"])

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw spectra and p-values before and after (paper Fig. 12), and where the change lies, into a folder.

        Returns:
            The files written.
        """
        from hf_rmt.reports import comparison_plots

        return comparison_plots.draw_all(self, Path(folder))


def common_names(before: list[str], after: list[str]) -> list[str]:
    """The matrices of both sides, in the order before.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in before if name in set(after)]
    if not names:
        raise ValueError(
            f"the two models have no matrix in common: before has {_some(before)}; after has {_some(after)}"
        )
    return names


def one_sided(before: list[str], after: list[str]) -> dict[str, list[str]]:
    """The matrices that one side alone has, as settings say it."""
    return {
        "only_before": [name for name in before if name not in set(after)],
        "only_after": [name for name in after if name not in set(before)],
    }


def refuse_other_shapes(shapes: dict[str, tuple[Shape, Shape]]) -> None:
    """Raise if a matrix has another shape after than before; list those that have."""
    differing = [
        f"{name} is {old[0]} x {old[1]} before and {new[0]} x {new[1]} after"
        for name, (old, new) in shapes.items()
        if old != new
    ]
    if differing:
        raise ValueError(f"these matrices cannot be compared: {_some(differing, 10)}; compare models of one shape")


def _some(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _refuse_other_settings(before: AnalysisReport, after: AnalysisReport) -> None:
    old, new = (_decisive(report) for report in (before, after))
    if old["covariances"] is None or new["covariances"] is None:
        del old["covariances"]  # overlaps that one side alone has are left out
    differing = [f"{key} was {old[key]!r} before and {new[key]!r} after" for key in old if old[key] != new[key]]
    if differing:
        raise ValueError(f"the reports were made under different settings: {', '.join(differing)}; analyse both alike")


def _decisive(report: AnalysisReport) -> dict[str, Any]:
    """The settings that two reports must share. The activations themselves may differ."""
    settings = {key: report.settings.get(key) for key in AnalysisConfig().identity()}
    covariances = report.settings.get("covariances")
    return settings | {"covariances": covariances and {"centred": covariances["centred"]}}
