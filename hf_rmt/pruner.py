"""``SVDPruner``: takes parts of the spectrum out of a model, and puts them back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.analyzer import RMTAnalyzer
from hf_rmt.config import AnalysisConfig
from hf_rmt.eigenbases import EigenbasisPool
from hf_rmt.surgery import description
from hf_rmt.surgery.editor import Edit, Editor
from hf_rmt.surgery.factors import FactorStore
from hf_rmt.surgery.originals import Originals
from hf_rmt.surgery.request import Request
from hf_rmt.theory.selection import Selection

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import CommitInfo
    from torch import nn

    from hf_rmt.config import SliceConfig, SweepConfig
    from hf_rmt.reports.covariances import ActivationCovariances
    from hf_rmt.reports.sweep import SweepTable
    from hf_rmt.slicing.keep import Keep
    from hf_rmt.slicing.masked import Projection, StreamComponents


class SVDPruner:
    """Removes singular components of a model's weight matrices, in place and reversibly (paper Eq. 9).

    Each matrix is factored once, when it is first needed. Edits compose: an edited weight is always made from
    the original and the union of all that is removed. Shapes and dtypes stay, so the model saves and loads as
    any other.

    Args:
        model: any ``PreTrainedModel`` or ``nn.Module`` with its weights in memory, offloaded or sharded; it is
            changed in place.
        folder: keep the factors in memory-mapped files there, which a later pruner of the same weights uses, and
            the originals of what is edited; None keeps both in memory.
        covariances: of the activations, from ``RMTAnalyzer.collect``, for selections by overlap.
        embeddings, head, convolutions: work on these too, as for ``RMTAnalyzer``.
        config: where and how many matrices at a time are factored, and the null of p-values; see
            ``AnalysisConfig``.
        **options: single settings, as ``workers=2``; they win over ``config``.

    Raises:
        TypeError: not a model, or an unknown setting.
        ValueError: the model has no matrix, or the covariances are of another model.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        folder: str | Path | None = None,
        covariances: ActivationCovariances | None = None,
        embeddings: bool = False,
        head: bool = False,
        convolutions: bool = False,
        config: AnalysisConfig | None = None,
        **options: Any,
    ):
        analyzer = RMTAnalyzer(model, embeddings=embeddings, head=head, convolutions=convolutions)
        self.model = model
        self.origin = analyzer.origin
        self.matrices = analyzer.matrices
        settings = AnalysisConfig.of(config, options)
        place = None if folder is None else Path(folder)
        self._covariances = None if covariances is None else covariances.identity()
        bases = None if covariances is None else EigenbasisPool(covariances, self.matrices)
        store = FactorStore(self.matrices, settings, place, bases)
        self.editor = Editor(self.matrices, store, Originals(place))
        self._projections: list[Projection] = []

    def analysis_identity(self) -> dict[str, Any]:
        """What selections by p-value or overlap depend on, beside the weights; fit for JSON."""
        config = self.editor.store.config
        draws = {"null_draws": config.null_draws, "seed": config.seed if config.null_draws else None}
        return draws | {"covariances": self._covariances}

    def __repr__(self) -> str:
        edits = "; ".join(map(str, (*self.edits, *self.projections))) or "nothing"
        return f"SVDPruner({self.origin['model']!r}, {len(self.matrices)} matrices, removed: {edits})"

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The removals in place, in the order in which they were made."""
        return self.editor.edits

    def remove(
        self,
        selection: Selection | None = None,
        *,
        keep: Selection | None = None,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
    ) -> Edit:
        """Remove singular components from some matrices, in place.

        Args:
            selection: what to remove.
            keep: instead of ``selection``: remove all but this.
            roles: roles or names, as they are or as fnmatch patterns; None or ``"all"`` for every matrix,
                embeddings and heads only if the pruner works on these.
            blocks: block numbers; None for all.

        Returns:
            The edit, to be undone by ``undo``. Its ``empty`` and ``whole`` name matrices of which nothing or
            everything was selected, which is allowed.

        Raises:
            ValueError: nothing matches roles and blocks; a weight cannot be written or was changed behind the
                pruner's back; it holds NaN; it has fewer components than asked for. The model is then unchanged.
            TypeError: not exactly one selection.
        """
        return self.editor.add(Request.of(selection, keep, roles, blocks))

    @contextlib.contextmanager
    def removed(
        self,
        selection: Selection | None = None,
        *,
        keep: Selection | None = None,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
    ) -> Iterator[Edit]:
        """The same for a while: on leaving the weights are back to the bit, also after an exception.

        Arguments and errors as for ``remove``.
        """
        edit = self.remove(selection, keep=keep, roles=roles, blocks=blocks)
        try:
            yield edit
        finally:
            if any(edit is known for known in self.edits):  # the body may have undone it
                self.undo(edit)

    def project(self, selection: Selection, *, streams: ActivationCovariances) -> Projection:
        """Hide directions of the residual stream from all norms that look at it, reversibly (paper App. F, Fig. 14).

        Weights and shapes stay as they are. Each norm sees the stream projected onto the eigenvectors of its
        covariance there, without the selected ones.

        Args:
            selection: of these eigenvectors, by number or size: ``Group(10, of=10)`` is the tenth with the smallest
                eigenvalues. ``Random(like, seed)`` is as many random directions.
            streams: from ``collect_stream(model, data)``.

        Returns:
            The projection, to be undone by ``undo`` or ``restore``.

        Raises:
            ValueError: the residual stream of this kind of model is not declared; covariances of another stream or
                other weights; a selection that eigenvectors have not, as ``Outliers``; a compiled model.
        """
        from hf_rmt.models.residual_stream import stream_of
        from hf_rmt.slicing.calibration import refuse_other_weights
        from hf_rmt.slicing.masked import components_of

        refuse_other_weights(self.model, streams)
        return self.hide(components_of(stream_of(self.model), streams), selection)

    def hide(self, components: Sequence[StreamComponents], selection: Selection) -> Projection:
        """``project`` with eigenvectors that are known."""
        from hf_rmt.models.residual_stream import stream_of
        from hf_rmt.slicing.masked import hide_, refuse_compiled

        refuse_compiled(self.model)
        projection = hide_(stream_of(self.model), components, selection)
        self._projections.append(projection)
        return projection

    @contextlib.contextmanager
    def projected(self, selection: Selection, *, streams: ActivationCovariances) -> Iterator[Projection]:
        """The same for a while. Arguments and errors as for ``project``."""
        projection = self.project(selection, streams=streams)
        try:
            yield projection
        finally:
            projection.undo()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Projections of the residual stream in place, in the order in which they were made."""
        return tuple(projection for projection in self._projections if projection.active)

    def slice(self, keep: Keep, calibration: Any, *, config: SliceConfig | None = None, **options: Any) -> Any:
        """A smaller copy of the model, whose residual stream has fewer dimensions (SliceGPT); the model stays.

        Args:
            keep: a share of the parameters as a float, ``Width(share)`` or ``Energy(share)``.
            calibration: texts or batches, as for ``RMTAnalyzer.collect``, or what ``collect_stream`` made of them.
            config, **options: see ``SliceConfig``: ``per_block=True``, ``form="plain"``, ...

        Returns:
            A model of the same class; its attribute ``sliced`` says what was kept, and in which form it is.

        Raises:
            ValueError: the model has edits in place; else as ``slice_model``.
        """
        from hf_rmt.slicing.slicer import slice_model

        if self.edits or self.projections:
            raise ValueError(
                f"the model is edited ({self!r}): restore() it, or slice a copy that save_pretrained has written"
            )
        return slice_model(self.model, keep, calibration, config=config, **options)

    def undo(self, edit: Edit | Projection) -> None:
        """Undo one edit or projection; the others stay.

        Raises:
            ValueError: it is not in place, or its weights were changed since.
        """
        if any(edit is known for known in self.projections):
            edit.undo()  # type: ignore[union-attr]
        else:
            self.editor.drop([edit])  # type: ignore[list-item]

    def restore(self, *, discard_changes: bool = False) -> None:
        """Undo all edits and projections: every weight is back to the bit.

        Args:
            discard_changes: also where edited weights were changed since, as by training.

        Raises:
            ValueError: they were, and ``discard_changes`` is not given.
        """
        self.editor.drop(self.edits, discard_changes)
        for projection in self.projections:
            self.undo(projection)

    def affected(self) -> pd.DataFrame:
        """What the edits in place have taken from each matrix that they touch.

        Returns:
            A row a matrix: ``name role block removed of mass energy parameters``; ``removed`` of ``of``
            components, their share of the sum of singular values and of the sum of squares, and the number of
            entries of the matrix.
        """
        return description.affected(self.editor)

    def sweep(
        self,
        evaluate: Any,
        *,
        streams: ActivationCovariances | None = None,
        folder: str | Path | None = None,
        config: SweepConfig | None = None,
        **options: Any,
    ) -> SweepTable:
        """Remove one part of the spectrum after the other, score the model, put it back (paper Fig. 7, 8, 11).

        Edits in place stay, and are part of the baseline. Over several processes each takes its share of the cells
        and all get the same table.

        Args:
            evaluate: a function of the model that returns a number or a dict of numbers, as
                ``hf_rmt.evaluation.Accuracy(rows)``, which gives every row's part too; or a Trainer of the same
                model; or the ``compute`` of an Evaluator with its data, by ``functools.partial``.
            streams: from ``collect_stream``: what is removed are directions of the residual stream, as by ``project``
                (Fig. 14), instead of singular components.
            folder: cells are written here as they are measured, and the table at the end; started again with the
                same folder, a sweep that was killed goes on.
            config: the grid; see ``SweepConfig``.
            **options: single settings, as ``deciles=range(1, 11)``, ``roles="each"`` or ``controls=1``; they win.

        Raises:
            ValueError: as ``remove``; also a model that does not beat the largest class, and a folder of another
                sweep.
            TypeError: ``evaluate`` scores no model, or an unknown setting.
            Exception: whatever ``evaluate`` raises; the model is back to the bit then, and finished cells are kept.
        """
        from hf_rmt.config import SweepConfig
        from hf_rmt.subjects import Spectrum, StreamDirections
        from hf_rmt.sweeping import SweepRun

        subject = Spectrum(self) if streams is None else StreamDirections(self, streams)
        run = SweepRun(subject, evaluate, SweepConfig.of(config, options))
        return run.table() if folder is None else run.in_folder(Path(folder))

    def save_pretrained(
        self, folder: str | Path, *, tokenizer: Any = None, metrics: Any = None, overwrite: bool = False
    ) -> Path:
        """Write the model as it is now, its tokenizer, a model card and a report of what was removed.

        The weights are dense and load with transformers alone. All is written or nothing. Over several processes
        all must call, and the first writes. The model keeps the tags that it has; those of the card are its own.

        Args:
            folder: made if it does not exist. An earlier result from the same original is replaced; other files stay.
            tokenizer: or processor; None takes what the model came with.
            metrics: scores for the card: a ``SweepTable`` with the cells of what is in place, or a dict of
                ``before`` and ``after``, each a dict of numbers, and perhaps the Hub id of the ``dataset``.
            overwrite: replace the model that the folder holds, whatever it is.

        Returns:
            The folder; ``hf_rmt.json`` there has the edits, whose selections ``parse_selection`` reads, and the table
            of ``affected``, which is also in ``hf_rmt.csv``.

        Raises:
            ValueError: the folder holds another model; the model cannot be saved (not of transformers, with
                adapters); a sweep without the cells.
            TypeError: metrics that are no numbers, or no tokenizer.
            OSError: the folder cannot be written.
        """
        from hf_rmt import hub

        self._refuse_projected()
        return hub.save(self, folder, tokenizer=tokenizer, metrics=metrics, overwrite=overwrite)

    def push_to_hub(  # noqa: PLR0913
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        metrics: Any = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Put the same on the Hub, in one commit; files of an earlier model that would be loaded instead go.

        Args:
            repo_id: ``user/name``; made if it does not exist, and taken away again if the commit fails.
            tokenizer, metrics: as for ``save_pretrained``.
            private: whether a new repository is; None for what is usual there.
            revision: branch, made if it does not exist; None for the main one.
            token: of the account; None for the one that is logged in.
            commit_message: None for one that says what was removed.
            create_pr: open a pull request instead.

        Raises:
            PermissionError: the account may not write there; nothing was pushed.
            OSError: the Hub, or the way to it, failed; the message says what is left there.
            ValueError, TypeError: as ``save_pretrained``; also no name of a repository, or one that is to be
                private and is public.
        """
        from hf_rmt import hub

        how = hub.Push(
            private=private, revision=revision, token=token, commit_message=commit_message, create_pr=create_pr
        )
        self._refuse_projected()
        return hub.push(self, repo_id, tokenizer=tokenizer, metrics=metrics, how=how)

    def _refuse_projected(self) -> None:
        if self.projections:
            raise ValueError("projections of the residual stream are no weights: restore() the model, or slice() it")
