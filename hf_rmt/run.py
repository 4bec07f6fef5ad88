"""Many matrices through an analysis: shared out, kept as they finish, resumed after a kill."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_rmt.analysis import Bases, analyse_matrix
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.digests import digest_of, fingerprint_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.progress import progress_bar
from hf_rmt.reports import store
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.result import MatrixResult
from hf_rmt.theory.covariance import Eigenbasis
from hf_rmt.workers import run_longest_first, seconds_estimate, workers_for

Result = TypeVar("Result")


class AnalysisRun:
    """One analysis: the matrices chosen, the settings, and what a folder must agree with."""

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
        self.bases = None if covariances is None else EigenbasisPool(covariances, matrices)
        self.decisive = config.identity() | {"covariances": None if covariances is None else covariances.identity()}
        self.settings = self.decisive | origin | {"versions": versions()}

    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for. Where the model was loaded from is no part of it."""
        shapes = {matrix.name: [*matrix.shape, str(matrix.dtype)] for matrix in self.matrices}
        return self.decisive | {"matrices": shapes}

    def report(self, results: dict[int, MatrixResult]) -> AnalysisReport:
        """The report of all matrices, by their positions."""
        return AnalysisReport((results[index] for index in range(len(self.matrices))), self.settings)

    def in_folder(self, folder: Path) -> AnalysisReport:
        """The report, kept in a folder matrix by matrix; what an earlier run left there is used."""
        if store.is_saved(folder, "report"):
            return self._finished(folder)
        partial = store.PartialRun(folder, self.identity())
        try:
            return self._resumed(partial, folder)
        finally:
            partial.close()

    def _resumed(self, partial: store.PartialRun, folder: Path) -> AnalysisReport:
        results = partial.completed(
            len(self.matrices),
            lambda index, earlier: self._check_same_weights(index, earlier, folder),
            lambda left, finished: self.results(left, digest=True, finished=finished),
        )
        report = self.report(results)
        report.save(folder)
        partial.remove()
        return report

    def _finished(self, folder: Path) -> AnalysisReport:
        """The report of an earlier run, if it is one of the same weights under the same settings."""
        report = AnalysisReport.load(folder)
        wanted = self.decisive
        store.refuse_other(folder, {key: report.settings.get(key) for key in wanted}, wanted)
        store.refuse_other(folder, {"matrices": list(report)}, {"matrices": [matrix.name for matrix in self.matrices]})
        for index, result in enumerate(report.values()):
            self._check_same_weights(index, result, folder)
        return report

    def _check_same_weights(self, index: int, earlier: MatrixResult, folder: Path) -> None:
        matrix = self.matrices[index]
        if not earlier.digest:
            raise ValueError(f"{folder} holds a report that was saved without this run; give another folder")
        if earlier.name != matrix.name or earlier.digest != digest_of(matrix.read()):
            raise ValueError(
                f"{folder} belongs to another model: the weights of {matrix.name} differ; give another folder"
            )
        if self.config.strict and not len(earlier.s):
            raise ValueError(f"{matrix.name}: {earlier.row['note']}; repair the weights, or analyse without strict")

    def results(
        self, indices: Collection[int], digest: bool = False, finished: int = 0
    ) -> Iterator[tuple[int, MatrixResult]]:
        """Each matrix's result as it finishes."""
        chosen = [self.matrices[index] for index in indices]
        bases = None if self.bases is None else self.bases.of

        def work(index: int) -> MatrixResult:
            return analyse_matrix(self.matrices[index], self.config, digest, bases)

        workers = matrices_at_a_time(chosen, self.config)
        return matrix_by_matrix(self.matrices, indices, work, workers, self.config.progress, finished)


def matrix_by_matrix(
    matrices: list[WeightMatrix],
    indices: Collection[int],
    work: Callable[[int], Result],
    workers: int,
    progress: bool | None,
    finished: int = 0,
) -> Iterator[tuple[int, Result]]:
    """What ``work`` makes of some of the matrices, each as it finishes, under a bar that counts them all.

    Raises:
        RuntimeError: a library failed, on a matrix that the message names.
    """
    with progress_bar(progress, len(matrices), finished) as advance:

        def named(index: int) -> Result:
            advance(matrices[index].name, 0)
            try:
                return work(index)
            except (RuntimeError, MemoryError) as error:  # of a library, which does not know what it worked on
                raise RuntimeError(f"{matrices[index].name}: {error}") from error

        cost: Callable[[int], float] = lambda index: seconds_estimate(*matrices[index].shape)  # noqa: E731
        for index, result in run_longest_first(list(indices), named, cost, workers):
            advance(matrices[index].name, 1)
            yield index, result


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


def matrices_at_a_time(matrices: list[WeightMatrix], config: AnalysisConfig, copies: int = 1) -> int:
    """How many matrices to work on at a time, where each takes the memory of several.

    One, where an accelerator does the work, which one stream keeps busy, and where weights are sharded, which
    all processes read in one order.
    """
    kinds = {config.device.partition(":")[0] if config.device else matrix.device.type for matrix in matrices}
    # mps has no float64: its matrices are factored on the CPU
    if kinds - {"cpu", "meta", "mps"} or any(getattr(matrix.load, "collective", False) for matrix in matrices):
        return 1
    return config.workers or workers_for([matrix.shape for matrix in matrices], copies)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import importlib.metadata

    import hf_rmt

    packages = ("torch", "transformers", "numpy", "scipy")
    return {"hf_rmt": hf_rmt.__version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }
