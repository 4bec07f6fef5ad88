"""``PruningCallback`` and ``SweepCallback``: removals before a ``transformers.Trainer`` trains, and after it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rmt.config import SweepConfig
from hf_rmt.models.digests import digest_of, text_digest
from hf_rmt.models.live import matrices_of, unwrap
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.processes import broadcast, by_the_first
from hf_rmt.pruner import SVDPruner
from hf_rmt.reports import store
from hf_rmt.reports.sweep import SweepTable
from hf_rmt.scoring import Scorer
from hf_rmt.surgery.editor import Edit
from hf_rmt.theory.decomposition import as_float
from hf_rmt.theory.linalg import exact_matmul
from hf_rmt.theory.selection import Overlapping, Selection

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):
    """Removes singular components before the first training step, as in the left half of the paper's Fig. 8.

    Training may then let the removed subspace grow back, as it does in the paper, or it is kept out: with U and V
    the singular vectors removed from W, ``U^T W V = 0`` after every optimizer step, so that no removed input
    direction ever leads to a removed output direction. That takes two thin products a matrix and step.

    Each callback removes once from a model. Where training begins again with the weights that it left, as in a
    second ``train()`` and where ``auto_find_batch_size`` tries a smaller batch, nothing more is removed, and what
    was learned in between stays, as the Trainer does not reset the model either. A model that holds its first
    weights again, and another one, as ``model_init`` makes it for each ``train()``, is removed from anew. To remove
    from a trained model what is smallest in it then, give its training a new callback.

    A resumed run goes on with the weights of its checkpoint, from which nothing is removed again. What is to be
    kept out is then read from a file in the output folder of the Trainer, as it is decided by the first weights.
    A model with adapters is refused where these change what is removed from, as the base alone would not be what
    computes.

    Args:
        selection: what to remove, as ``Decile(10)``; ``~selection`` keeps only this.
        roles, blocks: from where; as for ``SVDPruner.remove``.
        keep_out: do not let training put anything back.
        **options: as for ``SVDPruner``: ``covariances``, ``workers``, ...

    Attributes:
        affected: what was removed from each matrix, see ``SVDPruner.affected``; None before training, and in a run
            that was resumed. It is that of the removal also where training has begun again.

    Raises:
        TypeError: not a selection.
        ValueError: when training begins: as ``SVDPruner.remove``; or the run is resumed and what is to be kept out is
            not in the output folder.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
        keep_out: bool = False,
        **options: Any,
    ):
        if not isinstance(selection, Selection):
            raise TypeError(f"{selection!r} is no selection, as Decile(10) is one; parse_selection reads its name")
        self.selection = selection
        self.roles = roles if roles is None or isinstance(roles, str) else tuple(roles)
        self.blocks = blocks if blocks is None or isinstance(blocks, int) else tuple(blocks)
        self.keep_out = keep_out
        self.options = options
        self.affected: Any = None
        self._barred: list[_Barred] = []
        self._model: weakref.ref[nn.Module] | None = None  # weak, or it would outlive what model_init makes next
        #: Digests of the edited matrices as they were before.
        self._originals: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Remove, unless that was done; of a resumed run, find what is to be kept out."""
        model: nn.Module = kw["model"]
        if state.global_step == 0 and self._is_done(model):
            logger.info("nothing more is removed: training goes on with the weights that it left")
            return
        self.affected, self._barred, self._model, self._originals = None, [], None, {}
        if state.global_step == 0:
            self._remove(model, args)
        elif self.keep_out:
            self._barred = _load(self._path(args), model)
        self._model = weakref.ref(unwrap(model))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Take out what the step has put back."""
        for barred in self._barred:
            barred.clear()

    def _is_done(self, model: nn.Module) -> bool:
        """Whether this is the model last removed from, or resumed, and it has not been given its first weights back."""
        if self._model is None or self._model() is not unwrap(model):
            return False
        known = {matrix.name: matrix for matrix in matrices_of(model)} if self._originals else {}
        # All are read, as reading may take all processes; the first decides for all.
        as_before = [
            name in known and digest_of(known[name].read()) == digest for name, digest in self._originals.items()
        ]
        return not broadcast(bool(as_before) and all(as_before))

    def _remove(self, model: nn.Module, args: TrainingArguments) -> None:
        pruner = SVDPruner(model, **self.options)
        edit = pruner.remove(self.selection, roles=self.roles, blocks=self.blocks)
        if self.keep_out:
            try:
                self._bar(pruner, edit, self._path(args))
            except BaseException:
                pruner.undo(edit)
                raise
        self.affected = pruner.affected()
        store_of, index = pruner.editor.store, pruner.editor.index
        self._originals = {name: store_of[index[name]].digest for name, mask in edit.masks.items() if mask.any()}
        logger.info("removed before training: %s", edit)

    def _bar(self, pruner: SVDPruner, edit: Edit, path: Path) -> None:
        """Remember what is removed, here and for a run that is resumed."""
        barred = []
        for name, mask in edit.masks.items():
            index = pruner.editor.index[name]
            factors = pruner.editor.store[index].factors
            if mask.any():
                barred.append(_Barred.of(pruner.matrices[index], factors.u[:, mask], factors.vh[mask]))
        _save(path, barred)
        self._barred = barred

    def _path(self, args: TrainingArguments) -> Path:
        """A file for each removal, as a Trainer may have several of these callbacks."""
        removal = text_digest([str(self.selection), self.roles, self.blocks])[:8]
        return Path(args.output_dir or ".") / f"kept-out-{removal}.safetensors"


class SweepCallback(TrainerCallback):
    """Sweeps the model that training leaves: removes one part of the spectrum after the other, and scores (Fig. 7).

    The model is in evaluation mode meanwhile; afterwards its weights are back to the bit, its modes too. What
    ``evaluate`` raises does not undo a training: it is logged, and comes when the table is asked for.

    Args:
        evaluate: a function of the model, or what else ``SVDPruner.sweep`` takes.
        folder: to keep the sweep in, so that it can go on; None keeps it in memory alone.
        pruner: options of the ``SVDPruner``, as ``dict(workers=2, folder="factors")``. ``covariances`` were collected
            before training, so they have to be ``covariances.for_any_weights()``.
        config, **options: what is removed from where; see ``SweepConfig``.

    Raises:
        TypeError: ``evaluate`` scores no model, or an unknown setting.
        ValueError: a setting is out of range, or, when training begins, not of this model; a selection by overlap
            without covariances, or with some that hold for the untrained weights alone.
    """

    def __init__(
        self,
        evaluate: Any,
        *,
        folder: str | Path | None = None,
        pruner: Mapping[str, Any] | None = None,
        config: SweepConfig | None = None,
        **options: Any,
    ):
        self.evaluate = evaluate
        self.folder = folder
        self.pruner = dict(pruner or {})
        self.config = SweepConfig.of(config, options)
        self._table: SweepTable | None = None
        self._error: Exception | None = None

    @property
    def table(self) -> SweepTable:
        """The sweep of the trained model.

        Raises:
            RuntimeError: there is none: no training has ended yet, or the sweep failed, for the reason that is
                the cause of the error.
        """
        if self._table is None:
            what = "training has not ended" if self._error is None else f"the sweep failed: {self._error}"
            raise RuntimeError(f"there is no sweep, because {what}") from self._error
        return self._table

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Refuse now what would fail in the end."""
        self._table, self._error = None, None
        Scorer(self.evaluate, kw["model"])
        self._check_covariances()
        roles, blocks = self.config.roles, self.config.blocks
        for matrix in select(
            SVDPruner(kw["model"], **self.pruner).matrices,
            None if roles in ("each", "all") else roles,
            None if isinstance(blocks, str) else blocks,
        ):
            matrix.check_writable()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Sweep."""
        try:
            pruner = SVDPruner(kw["model"], **self.pruner)
            self._table = pruner.sweep(self.evaluate, folder=self.folder, config=self.config)
        except Exception as error:
            self._error = error
            logger.exception("the sweep after training failed; the model is as training has left it")

    def _check_covariances(self) -> None:
        covariances = self.pruner.get("covariances")
        needing = [selection for selection in self.config.chosen() if Overlapping.word in str(selection)]
        if needing and covariances is None:
            raise ValueError(
                f"{needing[0]} needs the activations: give "
                "pruner=dict(covariances=RMTAnalyzer(model).collect(data).for_any_weights())"
            )
        if covariances is not None and covariances.fingerprints:
            raise ValueError(
                "the covariances hold for the weights with which they were collected, and training changes these: "
                "give covariances.for_any_weights(), or sweep the trained model with covariances of its own"
            )


@dataclass(frozen=True)
class _Barred:
    """Singular vectors of a matrix that are to have no part in it: ``u`` ``(m, k)`` and ``vh`` ``(k, n)``."""

    matrix: WeightMatrix
    u: torch.Tensor
    vh: torch.Tensor

    @classmethod
    def of(cls, matrix: WeightMatrix, u: torch.Tensor, vh: torch.Tensor) -> _Barred:
        """With the vectors where the weight is, as they are needed at every step."""
        device = matrix.read().device
        return cls(matrix, u.to(device), vh.to(device))

    def clear(self) -> None:
        """``W - U (U^T W V) V^T`` in place of W."""
        whole = as_float(self.matrix.read()).to(self.u.dtype)
        inner = exact_matmul(exact_matmul(self.u.mT, whole), self.vh.mT)
        self.matrix.write(whole - exact_matmul(exact_matmul(self.u, inner), self.vh))


def _save(path: Path, barred: list[_Barred]) -> None:
    """The first process writes; all fail together."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        u = {f"u/{one.matrix.name}": one.u for one in barred}
        vh = {f"vh/{one.matrix.name}": one.vh for one in barred}
        store.save_tensors(path, u | vh, {"format": "pt"})

    by_the_first(write)


def _load(path: Path, model: nn.Module) -> list[_Barred]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, and without it nobody knows what is to be kept out: resume with the selection, roles, "
            "blocks and output folder with which training began, or begin anew"
        )
    tensors, _ = store.load_tensors(path)
    known = {matrix.name: matrix for matrix in matrices_of(model)}
    barred = []
    for name in (key.removeprefix("u/") for key in tensors if key.startswith("u/")):
        u, vh = tensors[f"u/{name}"], tensors[f"vh/{name}"]
        if name not in known or known[name].shape != (len(u), vh.shape[1]):
            raise ValueError(f"{path} is of another model, as to {name}: give another output folder, or begin anew")
        barred.append(_Barred.of(known[name], u, vh))
    return barred
