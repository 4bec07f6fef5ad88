"""``AnalysisReport``: the frozen result of an analysis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.reports import store
from hf_rmt.reports.columns import COLUMNS, CONTROL_COLUMNS, LABELS, OVERLAP_COLUMNS
from hf_rmt.reports.grouping import by_role
from hf_rmt.reports.result import MatrixResult

if TYPE_CHECKING:
    import pandas as pd

    from hf_rmt.reports.comparison import ModelComparison

_INTEGERS = ("block", "expert", "rows", "cols")
_COUNTS = ("n_above", "n_below", "discoveries", "activation_rank", "activation_tokens")


class AnalysisReport(Mapping[str, MatrixResult]):
    """The analysis of the matrices of one model, by name; frozen.

    Attributes:
        settings: what decided the numbers: model, revision, versions, sigma rule, rate, seed, ...
    """

    def __init__(self, results: Iterable[MatrixResult], settings: dict[str, Any]):
        results = list(results)
        self._results = {result.name: result for result in results}
        self.settings = settings
        if len(self._results) < len(results):
            raise ValueError("two matrices of this report have the same name")

    def __getitem__(self, name: str) -> MatrixResult:
        """Result of one matrix, by its name, or by its path in a headed model.

        Raises:
            KeyError: no such matrix; the message names the nearest ones.
        """
        known = known_name(name, self._results)
        if known is None:
            raise KeyError(f"no matrix {name!r} in this report of {len(self)}; {nearest(name, self._results)}")
        return self._results[known]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        model, sigma = self.settings.get("model"), self.settings.get("sigma")
        return f"AnalysisReport({model!r}, {len(self)} matrices, sigma={sigma!r})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a matrix; the columns are those of ``reports.columns``, explained in docs/columns.md."""
        import pandas as pd

        columns = list(COLUMNS) + (list(CONTROL_COLUMNS) if self.settings.get("control") else [])
        columns += list(OVERLAP_COLUMNS) if self.settings.get("covariances") else []
        table = pd.DataFrame([result.row for result in self._results.values()], columns=columns)
        counts = [column for column in columns if any(word in column for word in _COUNTS)]
        for column in (*_INTEGERS, *counts):
            table[column] = table[column].astype("Int64")
        for column in table.columns.difference([*LABELS, *_INTEGERS, *counts]):
            table[column] = table[column].astype("float64")
        return table

    def by_role(self) -> pd.DataFrame:
        """Mean and spread over blocks, one row a role, in the order of the model.

        The experts of a block are averaged first. Columns are pairs: ``("n_above", "mean")``,
        ``("n_above", "std")``, and ``("blocks", "count")``; the standard deviation is that between
        blocks, empty where there is one.
        """
        table = self.to_pandas()
        return by_role(table, [c for c in table.columns if c not in LABELS and c not in _INTEGERS])

    def by_block(self, column: str) -> pd.DataFrame:
        """One column of the table with a row a block and a column a role, averaged over experts."""
        table = self.to_pandas()
        if column not in table or column in LABELS:
            raise ValueError(f"{column!r} is not a number of the table; see docs/columns.md")
        table = table[table["block"].notna()]
        table[column] = table[column].astype("float64")
        table["stack"] = table["stack"].fillna("")
        rows = ["stack", "block"] if table["stack"].any() else ["block"]
        order = list(dict.fromkeys(table["role"]))
        return table.pivot_table(index=rows, columns="role", values=column, aggfunc="mean")[order]

    def save(self, folder: str | Path) -> Path:
        """Write ``table.parquet``, ``arrays.safetensors`` and ``report.json``, all or nothing.

        A report that lies there already is replaced.

        Raises:
            OSError: the folder cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with store.staged(folder, "report") as stage:
            self.to_pandas().to_parquet(stage / "table.parquet", index=False)
            store.save_results(stage / "arrays.safetensors", self._results.values())
            store.write_manifest(stage, "report", {"settings": self.settings, "matrices": list(self)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> AnalysisReport:
        """Read a report that ``save`` wrote.

        Raises:
            ValueError: there is none, or it is damaged; the message names the file.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder, "report")
        path = store.current(folder, "report", "arrays.safetensors")
        results = store.load_results(path, len(manifest["matrices"]), MatrixResult)
        return cls(results, manifest["settings"])

    def compare(self, after: AnalysisReport) -> ModelComparison:
        """This report as that of a model before training, against the one after it; differences are after minus before.

        Reports hold no weights: where the change lies in the spectrum is told by ``RMTAnalyzer.compare``.

        Raises:
            ValueError: the reports were made under different settings, of matrices of different shapes
                (the message lists them), or have none in common.
        """
        from hf_rmt.reports.comparison import ModelComparison

        return ModelComparison.of_reports(self, after)

    def plot(self, folder: str | Path, matrix: str | None = None) -> list[Path]:
        """Draw the paper's figures into a folder and return the files.

        Args:
            folder: made if it does not exist.
            matrix: the one shown in the figures of a single matrix; by default the first query.
        """
        from hf_rmt.reports import plots

        return plots.draw_all(self, Path(folder), matrix)


def known_name(name: str, known: Collection[str]) -> str | None:
    """Which of the known names of matrices is meant by a name, or by its path in a headed model; None if none is."""
    name = name.removesuffix(".weight")
    if name in known:
        return name
    ends = [name[dot + 1 :] for dot, letter in enumerate(name) if letter == "."]
    meant = [end for end in ends if end in known]
    return meant[0] if len(meant) == 1 else None


def nearest(name: str, known: Collection[str]) -> str:
    """The known names most like one that is unknown, as an error says them."""
    import difflib

    near = difflib.get_close_matches(name, known, 3, 0.3)
    return f"the nearest are {', '.join(near) or 'none'}"
