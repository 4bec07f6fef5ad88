"""``RMTAnalyzer``: a model or checkpoint in, an ``AnalysisReport`` out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.comparing import ComparisonRun, analyzers_of
from hf_rmt.config import AnalysisConfig, CollectConfig
from hf_rmt.models.discovery import LeftOut
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.processes import assemble
from hf_rmt.reports.comparison import ModelComparison
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.reports.report import AnalysisReport
from hf_rmt.run import AnalysisRun

if TYPE_CHECKING:
    from torch import nn

    from hf_rmt.models.checkpoints import Checkpoint


class RMTAnalyzer:
    """Holds the weight matrices of a model against random matrix theory.

    Args:
        model: any ``PreTrainedModel``, ``PeftModel`` or ``nn.Module``; it is read, never changed.
        adapters: analyse matrices with peft adapters as they compute; False gives the base.
        embeddings, head: analyse these too; they are no matrices between activations. A head that is tied
            to the embeddings is one matrix with them, and comes with ``embeddings``.
        convolutions: analyse these too, as ``(out, in * kernel)`` matrices.

    Raises:
        TypeError: not a model.
        ValueError: the model has no matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapters: bool = True,
        embeddings: bool = False,
        head: bool = False,
        convolutions: bool = False,
    ):
        from hf_rmt.models.live import left_out_of, matrices_of, unwrap

        if not hasattr(model, "named_modules"):
            raise TypeError(f"RMTAnalyzer takes a model, not {model!r}; for a folder or Hub id use from_checkpoint")
        self.model: nn.Module | None = model
        self.checkpoint: Checkpoint | None = None
        config = getattr(unwrap(model), "config", None)
        self._open(
            matrices_of(model, adapters),
            getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__,
            getattr(config, "_commit_hash", None),
            {"embedding": embeddings, "head": head, "convolution": convolutions},
        )
        self._others = lambda: left_out_of(model)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        embeddings: bool = False,
        head: bool = False,
        convolutions: bool = False,
    ) -> RMTAnalyzer:
        """The same over a checkpoint folder or Hub id, shard by shard, without building the model.

        Args:
            source: folder with ``config.json`` and safetensors files, or a Hub id.
            revision: branch, tag or commit on the Hub.
            embeddings, head, convolutions: as for the class.

        Raises:
            CheckpointError: (a ValueError) naming the file or tensor that is wrong, and the remedy.
        """
        from hf_rmt.models.checkpoints import Checkpoint, locate

        folder, commit = locate(source, revision)
        analyzer = cls.__new__(cls)
        analyzer.model = None
        analyzer.checkpoint = checkpoint = Checkpoint(folder)
        wanted = {"embedding": embeddings, "head": head, "convolution": convolutions}
        analyzer._open(checkpoint.matrices(), str(source), commit, wanted)
        analyzer._others = checkpoint.left_out
        return analyzer

    def _open(self, matrices: list[WeightMatrix], model: str, revision: str | None, wanted: Mapping[str, bool]) -> None:
        self.matrices = [matrix for matrix in matrices if wanted.get(matrix.kind, True)]
        self._unwanted = [matrix for matrix in matrices if not wanted.get(matrix.kind, True)]
        self.model_id = model
        self.revision = revision
        if not self.matrices:
            left_out = ", ".join(matrix.name for matrix in matrices) or "none"
            raise ValueError(
                f"{model} has no weight matrix to analyse (embeddings, heads and convolutions left out: {left_out})"
            )

    @property
    def left_out(self) -> list[LeftOut]:
        """Every parameter of two axes or more that is not analysed, and why.

        With the matrices, and the vectors and scalars that have one axis or none, these are all parameters there are.
        """
        reasons = {
            "embedding": "embeddings: embeddings=True analyses it",
            "head": "a head: head=True analyses it",
            "convolution": "a convolution: convolutions=True analyses it",
        }
        unwanted = {one.parameter: LeftOut(one.parameter, one.shape, reasons[one.kind]) for one in self._unwanted}
        return [*unwanted.values(), *self._others()]

    @property
    def origin(self) -> dict[str, Any]:
        """Where the model came from."""
        return {"model": self.model_id, "revision": self.revision}

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

        Over several processes, which all have to call, each does its share, and all get the same report.

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
        assemble("analyze")
        run = AnalysisRun(matrices, settings, self.origin, covariances)
        if folder is None:
            return run.made()
        return run.in_folder(Path(folder))

    def collect(
        self,
        data: Any,
        *,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
        folder: str | Path | None = None,
        config: CollectConfig | None = None,
        **options: Any,
    ) -> ActivationCovariances:
        """Run the model over data and sum up what flows through its matrices (paper Eq. 7).

        The model runs as it is, in train or eval mode, without gradients. Padding does not count. Over several
        processes each takes its share of the data, and all get the same result.

        Args:
            data: texts (a list, a ``datasets.Dataset``, a file, a Hub id) or batches (a DataLoader or list of
                dicts of the model's arguments).
            roles, blocks: as for ``analyze``.
            folder: the result is written here; started again with the same folder and data, a run that was
                killed goes on where it stopped, to two minutes, or with ``sequential`` to one block.
            config: settings; see ``CollectConfig``.
            **options: single settings, as ``outputs=True`` or ``max_tokens=100_000``; they win over ``config``.

        Raises:
            ValueError: a checkpoint without a model; no batches, or batches without the model's inputs; an
                attention mask of zeros; NaN or Inf among the activations; too little memory for one sum; a folder
                of another model or other data; with ``sequential``, a model that is in train mode, sharded, or no list
                of blocks one after the other. The message names the module or the batch.
            TypeError: an unknown setting.
            RuntimeError: another process failed.
        """
        from hf_rmt.collecting import CollectionRun
        from hf_rmt.models.batches import Batches

        settings = CollectConfig.of(config, options)
        if self.model is None:
            raise ValueError(f"{self.model_id} was not loaded, so nothing can run: use RMTAnalyzer(model)")
        run = CollectionRun(self.model, select(self.matrices, roles, blocks), settings)
        heads = any(matrix.kind == "head" for matrix in run.matrices)
        batches = Batches(data, self.model, settings.tokenizer, settings.for_texts(), every_logit=heads)
        return run.over(batches, self.origin, None if folder is None else Path(folder))

    @staticmethod
    def compare(
        before: nn.Module | RMTAnalyzer | str | Path,
        after: nn.Module | RMTAnalyzer | str | Path | None = None,
        *,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
        folder: str | Path | None = None,
        config: AnalysisConfig | None = None,
        **options: Any,
    ) -> ModelComparison:
        """Compare a model before and after training (paper App. D): in which part of the spectrum did it act?

        Over several processes as ``analyze``.

        Args:
            before, after: models, analyzers, checkpoint folders, Hub ids, or folders of peft adapters. A model
                with adapters alone, without ``after``, is compared with its own base; so is one with the base
                that it was made from, as the two are one model in memory.
            roles, blocks: as for ``analyze``, among the matrices that both sides have.
            folder: as for ``analyze``; the comparison is written there, and the reports of both sides.
            config, **options: as for ``analyze``; ``sides="none"`` leaves out all that needs singular vectors.

        Raises:
            ValueError: as ``analyze``; matrices differ in shape (the message lists them), the models have
                none in common, or there is nothing to compare with.
            TypeError: a side is no model, or an unknown setting.
            OSError: the folder cannot be written.
            RuntimeError: a library failed, on a matrix that the message names.
        """
        settings = AnalysisConfig.of(config, options)
        run = ComparisonRun(*analyzers_of(before, after), settings, roles, blocks)
        assemble("compare")
        if folder is None:
            return run.made()
        return run.in_folder(Path(folder))
