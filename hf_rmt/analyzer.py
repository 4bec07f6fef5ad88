"""``RMTAnalyzer``: a model or checkpoint in, an ``AnalysisReport`` out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.config import AnalysisConfig
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.run import AnalysisRun

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
        covariances: ActivationCovariances | None = None,
        folder: str | Path | None = None,
        config: AnalysisConfig | None = None,
        **options: Any,
    ) -> AnalysisReport:
        """Analyse the matrices.

        Args:
            roles: roles or names, as they are or as fnmatch patterns; None for all.
            blocks: block numbers; None for all.
            covariances: of the activations, from ``collect``: adds the overlaps of the singular vectors with
                their eigenvectors (paper Eq. 8).
            folder: results are written here matrix by matrix, and the report at the end. Started
                again with the same folder, a run that was killed goes on where it stopped.
            config: settings; see ``AnalysisConfig``.
            **options: single settings, as ``sigma="init"`` or ``sides="none"``; they win over ``config``.

        Raises:
            ValueError: a setting is out of range, nothing matches, the folder belongs to another
                model or other settings, the covariances are of another model, or (``strict``) a matrix is not finite.
            TypeError: an unknown setting.
            OSError: the folder cannot be written.
            RuntimeError: a library failed, on a matrix that the message names.
        """
        settings = AnalysisConfig.of(config, options)
        matrices = select(self.matrices, roles, blocks)
        origin = {"model": self.model_id, "revision": self.revision}
        run = AnalysisRun(matrices, settings, origin, covariances)
        if folder is None:
            return run.report(dict(run.results(range(len(matrices)))))
        return run.in_folder(Path(folder))
