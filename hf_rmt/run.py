"""The analysis of many matrices, and what a folder must agree with that one of them is kept in."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_rmt.analysis import analyse_matrix
from hf_rmt.config import AnalysisConfig
from hf_rmt.eigenbases import EigenbasisPool, check_covariances, memory_for
from hf_rmt.models.digests import digest_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports import store
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.result import MatrixResult
from hf_rmt.sharing import MatrixRun, MatrixTasks


class AnalysisRun(MatrixRun[MatrixResult, AnalysisReport]):
    """One analysis: the matrices chosen, the settings, and what a folder must agree with."""

    kind = "report"
    result_class = MatrixResult
    whole_class = AnalysisReport

    def __init__(
        self,
        matrices: list[WeightMatrix],
        config: AnalysisConfig,
        origin: dict[str, Any],
        covariances: ActivationCovariances | None = None,
    ):
        """``origin`` says where the model came from.

        Raises:
            ValueError: the covariances are not of these matrices, or nothing is to be held against them.
        """
        if covariances is not None and config.sides == "none":
            raise ValueError(
                "sides='none' computes no singular vectors, so the covariances would not be used: "
                "analyse with sides 'both', 'right' or 'left', or without covariances"
            )
        self.matrices = matrices
        self.config = config
        self.covariances = covariances
        if covariances is not None:
            check_covariances(covariances, matrices)
        self.decisive = config.identity() | {"covariances": None if covariances is None else covariances.identity()}
        self.settings = self.decisive | origin | {"versions": versions()}

    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for. Where the model was loaded from is no part of it."""
        shapes = {matrix.name: [*matrix.shape, str(matrix.dtype)] for matrix in self.matrices}
        return self.decisive | {"matrices": shapes}

    def whole(self, results: Iterable[MatrixResult]) -> AnalysisReport:
        """The report of the results of all matrices."""
        return AnalysisReport(results, self.settings)

    def results_of(self, earlier: AnalysisReport, folder: Path) -> list[MatrixResult]:
        """Its results, if it is one of the same matrices under the same settings."""
        wanted = self.decisive
        store.refuse_other(folder, {key: earlier.settings.get(key) for key in wanted}, wanted)
        store.refuse_other(folder, {"matrices": list(earlier)}, {"matrices": [matrix.name for matrix in self.matrices]})
        return list(earlier.values())

    def check(self, folder: Path, index: int, earlier: MatrixResult) -> None:
        """Raise unless a result is of the weights that there are."""
        matrix = self.matrices[index]
        if not earlier.digest:
            raise ValueError(f"{folder} holds a report that was saved without this run; give another folder")
        if earlier.name != matrix.name or earlier.digest != digest_of(matrix.read()):
            raise ValueError(
                f"{folder} belongs to another model: the weights of {matrix.name} differ; give another folder"
            )
        if self.config.strict and not len(earlier.s):
            raise ValueError(f"{matrix.name}: {earlier.row['note']}; repair the weights, or analyse without strict")

    def tasks(self, kept: bool) -> MatrixTasks[MatrixResult]:
        """The analysis of each."""

        def work_on(indices: Sequence[int]) -> Callable[[WeightMatrix], MatrixResult]:
            own = [self.matrices[index] for index in indices]
            bases = None if self.covariances is None else EigenbasisPool(self.covariances, own).of
            return lambda matrix: analyse_matrix(matrix, self.config, kept, bases)

        covariances = self.covariances
        return MatrixTasks(
            [(matrix,) for matrix in self.matrices],
            work_on,
            self.config,
            memory_for=lambda matrix: memory_for(matrix, covariances),
            together=None if covariances is None else lambda matrix: covariances.key(matrix.name),
        )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import importlib.metadata

    import hf_rmt

    packages = ("torch", "transformers", "numpy", "scipy")
    return {"hf_rmt": hf_rmt.__version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }
