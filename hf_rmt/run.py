"""The analysis of many matrices, and what a folder must agree with that one of them is kept in."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_rmt.analysis import Bases, analyse_matrix
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.digests import digest_of, fingerprint_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports import store
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.result import MatrixResult
from hf_rmt.sharing import MatrixRun, MatrixTasks
from hf_rmt.theory.covariance import Eigenbasis


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
            _check_covariances(covariances, matrices)
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

        return MatrixTasks([(matrix,) for matrix in self.matrices], work_on, self.config)


class EigenbasisPool:
    """Eigenbases of the activations around each matrix, computed once for all that share them.

    One is kept from the first matrix that asks for it to the last.
    """

    def __init__(self, covariances: ActivationCovariances, matrices: list[WeightMatrix]):
        _check_covariances(covariances, matrices)
        self.covariances = covariances
        keys = (covariances.key(matrix.name, output) for matrix in matrices for output in (False, True))
        self.uses = Counter(key for key in keys if key is not None)
        self.locks = {key: threading.Lock() for key in self.uses}
        self.kept: dict[str, Eigenbasis] = {}

    def of(self, matrix: WeightMatrix, weight: torch.Tensor) -> Bases:
        """Both bases of one matrix with this weight; to be asked for once."""
        expected = self.covariances.fingerprints.get(matrix.name)
        if expected is not None and expected != fingerprint_of(weight):
            raise ValueError(
                f"{matrix.name}: the covariances were collected with other weights than these: collect them again, "
                "or pass covariances.for_any_weights() to hold them against these all the same"
            )
        return Bases(self._basis(matrix.name, False), self._basis(matrix.name, True))

    def _basis(self, name: str, output: bool) -> Eigenbasis | None:
        key = self.covariances.key(name, output)
        if key is None:
            return None
        with self.locks[key]:
            if key not in self.kept:
                moments = self.covariances.output(name) if output else self.covariances[name]
                assert moments is not None
                self.kept[key] = moments.eigenbasis(self.covariances.centred)
            self.uses[key] -= 1
            return self.kept[key] if self.uses[key] else self.kept.pop(key)


def _check_covariances(covariances: ActivationCovariances, matrices: list[WeightMatrix]) -> None:
    """Raise unless there are covariances, of the right width, of every matrix that was called."""
    silent = set(covariances.settings.get("silent", ()))
    missing = [m.name for m in matrices if m.name not in covariances and m.name not in silent]
    if missing:
        raise ValueError(
            f"the covariances are of another model, or of other roles and blocks: they lack {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    for matrix in matrices:
        for side, width, moments in (
            ("inputs", matrix.shape[1], covariances.get(matrix.name)),
            ("outputs", matrix.shape[0], covariances.output(matrix.name)),
        ):
            if moments is not None and len(moments.total) != width:
                raise ValueError(
                    f"the covariances are of another model: {matrix.name} has {width} {side}, "
                    f"they have {len(moments.total)}"
                )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import importlib.metadata

    import hf_rmt

    packages = ("torch", "transformers", "numpy", "scipy")
    return {"hf_rmt": hf_rmt.__version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }
