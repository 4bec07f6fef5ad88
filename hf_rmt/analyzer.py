"""``RMTAnalyzer``: a model or checkpoint in, an ``AnalysisReport`` out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.analysis import analyse_matrix, digest_of
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.progress import progress_bar
from hf_rmt.reports import store
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.reports.result import MatrixResult
from hf_rmt.workers import run_longest_first, seconds_estimate, workers_for

if TYPE_CHECKING:
    from torch import nn


class RMTAnalyzer:
    """Holds the weight matrices of a model against random matrix theory.

    Args:
        model: any ``PreTrainedModel``, ``PeftModel`` or ``nn.Module``; it is read, never changed.
        adapters: analyse matrices with peft adapters as they compute; False gives the base.
        embeddings, head: analyse these too; they are no matrices between activations. A head that is tied
            to the embeddings is one matrix with them, and comes with ``embeddings``.

    Raises:
        TypeError: not a model.
        ValueError: the model has no matrix.
    """

    def __init__(self, model: nn.Module, *, adapters: bool = True, embeddings: bool = False, head: bool = False):
        from hf_rmt.models.live import matrices_of, unwrap

        if not hasattr(model, "named_modules"):
            raise TypeError(f"RMTAnalyzer takes a model, not {model!r}; for a folder or Hub id use from_checkpoint")
        config = getattr(unwrap(model), "config", None)
        self._open(
            matrices_of(model, adapters),
            getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__,
            getattr(config, "_commit_hash", None),
            embeddings,
            head,
        )

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, *, revision: str | None = None, embeddings: bool = False, head: bool = False
    ) -> RMTAnalyzer:
        """The same over a checkpoint folder or Hub id, shard by shard, without building the model.

        Args:
            source: folder with ``config.json`` and safetensors files, or a Hub id.
            revision: branch, tag or commit on the Hub.
            embeddings, head: as for the class.

        Raises:
            CheckpointError: (a ValueError) naming the file or tensor that is wrong, and the remedy.
        """
        from hf_rmt.models.checkpoints import Checkpoint, locate

        folder, commit = locate(source, revision)
        analyzer = cls.__new__(cls)
        analyzer._open(Checkpoint(folder).matrices(), str(source), commit, embeddings, head)
        return analyzer

    def _open(
        self, matrices: list[WeightMatrix], model: str, revision: str | None, embeddings: bool, head: bool
    ) -> None:
        wanted = {"block": True, "embedding": embeddings, "head": head}
        self.matrices = [matrix for matrix in matrices if wanted[matrix.kind]]
        self.model_id = model
        self.revision = revision
        if not self.matrices:
            left_out = ", ".join(matrix.name for matrix in matrices) or "none"
            raise ValueError(f"{model} has no weight matrix to analyse (embeddings and heads left out: {left_out})")

    def __repr__(self) -> str:
        return f"RMTAnalyzer({self.model_id!r}, {len(self.matrices)} matrices)"

    def analyze(
        self,
        *,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
        folder: str | Path | None = None,
        config: AnalysisConfig | None = None,
        **options: Any,
    ) -> AnalysisReport:
        """Analyse the matrices.

        Args:
            roles: roles or names, as they are or as fnmatch patterns; None for all.
            blocks: block numbers; None for all.
            folder: results are written here matrix by matrix, and the report at the end. Started
                again with the same folder, a run that was killed goes on where it stopped.
            config: settings; see ``AnalysisConfig``.
            **options: single settings, as ``sigma="init"`` or ``sides="none"``; they win over ``config``.

        Raises:
            ValueError: a setting is out of range, nothing matches, the folder belongs to another
                model or other settings, or (``strict``) a matrix is not finite.
            TypeError: an unknown setting.
            OSError: the folder cannot be written.
            RuntimeError: a library failed, on a matrix that the message names.
        """
        settings = AnalysisConfig.of(config, options)
        matrices = select(self.matrices, roles, blocks)
        run = _Run(self, matrices, settings)
        if folder is None:
            return run.report(dict(run.results(range(len(matrices)))))
        return run.in_folder(Path(folder))


class _Run:
    """One analysis: the matrices chosen, the settings, and what a folder must agree with."""

    def __init__(self, analyzer: RMTAnalyzer, matrices: list[WeightMatrix], config: AnalysisConfig):
        self.matrices = matrices
        self.config = config
        self.settings = config.identity() | {
            "model": analyzer.model_id,
            "revision": analyzer.revision,
            "versions": _versions(),
        }

    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for. Where the model was loaded from is no part of it."""
        shapes = {matrix.name: [*matrix.shape, str(matrix.dtype)] for matrix in self.matrices}
        return self.config.identity() | {"matrices": shapes}

    def report(self, results: dict[int, MatrixResult]) -> AnalysisReport:
        return AnalysisReport((results[index] for index in range(len(self.matrices))), self.settings)

    def in_folder(self, folder: Path) -> AnalysisReport:
        if store.is_report(folder):
            return self._finished(folder)
        partial = store.PartialRun(folder, self.identity())
        try:
            return self._resumed(partial, folder)
        finally:
            partial.close()

    def _resumed(self, partial: store.PartialRun, folder: Path) -> AnalysisReport:
        results = {}
        for index in range(len(self.matrices)):
            if (earlier := partial.read(index)) is not None:
                self._check_same_weights(index, earlier, folder)
                results[index] = earlier
        left = [index for index in range(len(self.matrices)) if index not in results]
        for index, result in self.results(left, digest=True, finished=len(results)):
            partial.write(index, result)
            results[index] = result
        report = self.report(results)
        report.save(folder)
        partial.remove()
        return report

    def _finished(self, folder: Path) -> AnalysisReport:
        """The report of an earlier run, if it is one of the same weights under the same settings."""
        report = AnalysisReport.load(folder)
        wanted = self.config.identity()
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
        config, matrices = self.config, self.matrices
        workers = config.workers or workers_for([matrices[index].shape for index in indices])
        if any(_on_accelerator(matrices[index], config) for index in indices):
            workers = 1  # one stream of work keeps an accelerator busy
        with progress_bar(config.progress, len(matrices), finished) as advance:

            def work(index: int) -> MatrixResult:
                matrix = matrices[index]
                advance(matrix.name, 0)
                try:
                    return analyse_matrix(matrix, config, digest)
                except (RuntimeError, MemoryError) as error:  # of a library, which does not know what it worked on
                    raise RuntimeError(f"{matrix.name}: {error}") from error

            cost: Callable[[int], float] = lambda index: seconds_estimate(*matrices[index].shape)  # noqa: E731
            for index, result in run_longest_first(list(indices), work, cost, workers):
                advance(matrices[index].name, 1)
                yield index, result


def _on_accelerator(matrix: WeightMatrix, config: AnalysisConfig) -> bool:
    kind = config.device.partition(":")[0] if config.device else matrix.device.type
    return kind not in ("cpu", "meta", "mps")  # mps has no float64: its matrices are factored on the CPU


def _versions() -> dict[str, str]:
    import importlib.metadata

    import hf_rmt

    packages = ("torch", "transformers", "numpy", "scipy")
    return {"hf_rmt": hf_rmt.__version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }
