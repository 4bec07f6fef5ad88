"""Does the spectrum matter before fine-tuning, or after it? (paper section 7, Fig. 8)

``before``: remove, then fine-tune, then evaluate. ``after``: fine-tune, then remove, then evaluate. Both are held
against the same model fine-tuned whole, seed by seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_rmt.config import SweepConfig
from hf_rmt.models.digests import text_digest, value_digest
from hf_rmt.processes import broadcast, by_the_first, rank_and_count
from hf_rmt.pruner import SVDPruner
from hf_rmt.reports import store
from hf_rmt.reports.sweep import NONE, Cell, SweepTable
from hf_rmt.scoring import Scorer
from hf_rmt.subjects import Spectrum, StreamDirections, Streams, Subject
from hf_rmt.sweeping import Planned, SweepRun, cell_of, weights_digest

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

Order = Literal["before", "after"]
TrainerOf = Callable[[int], "Trainer"]


def fine_tuned(trainer_of: TrainerOf, seed: int, folder: str | Path | None = None) -> nn.Module:
    """The model that a trainer fine-tunes.

    Args:
        trainer_of: makes the trainer of a seed, with a fresh model.
        seed: which.
        folder: the model is kept in ``models/seed-<seed>`` there, and taken from there if an earlier run left it.

    Raises:
        ValueError: what is kept there was trained from other weights, on other data or with other settings.
    """
    return _model_of(_trained(trainer_of, seed, None if folder is None else Path(folder)))


def _trained(trainer_of: TrainerOf, seed: int, folder: Path | None) -> Trainer:
    trainer = trainer_of(seed)
    model = _model_of(trainer)
    kept = None if folder is None else folder / "models" / f"seed-{seed}" / "weights.safetensors"
    start = text_digest([weights_digest(model, []), training_digest(trainer)])
    if kept is not None and broadcast(kept.is_file()):
        _load_weights(model, kept, start)
    else:
        trainer.train()
        if kept is not None:
            by_the_first(lambda: _save_weights(model, kept, start))
    model.eval()
    return trainer


#: Settings of a Trainer that decide what it makes of a model.
_DECISIVE = [
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "label_smoothing_factor",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "lr_scheduler_kwargs",
    "optim_args",
    "dataloader_drop_last",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
]


def training_digest(trainer: Trainer) -> str:
    """Hash of how a trainer trains: the settings that matter, what it trains, and its data by length and some rows."""
    settings = {name: str(getattr(trainer.args, name, None)) for name in _DECISIVE}
    trained = [name for name, parameter in _model_of(trainer).named_parameters() if parameter.requires_grad]
    loss = getattr(trainer, "compute_loss_func", None)
    return value_digest([settings, trained, loss, trainer.train_dataset, rank_and_count()[1]])


def _model_of(trainer: Trainer) -> nn.Module:
    if trainer.model is None or trainer.model_init is not None:  # it would train another one than that which is edited
        raise ValueError("the trainer makes its model when it trains: give it model=, not model_init=")
    return trainer.model


def before_and_after(  # noqa: PLR0913
    trainer_of: TrainerOf,
    evaluate: Any = None,
    *,
    seeds: Iterable[int] = range(5),
    orders: Sequence[Order] = ("before", "after"),
    streams: Streams | None = None,
    folder: str | Path | None = None,
    config: SweepConfig | None = None,
    **options: Any,
) -> SweepTable:
    """Remove parts of the spectrum before fine-tuning, and after it; which hurts? (paper Fig. 8)

    Every removal before is a fine-tuning of its own; all removals after share one a seed, which is the baseline of
    both. What was removed before fine-tuning may grow back in it, as in the paper (``PruningCallback`` can keep it
    out).

    Args:
        trainer_of: makes the trainer of a seed: a fresh model, its head initialised by the seed, the same data.
        evaluate: as for ``SVDPruner.sweep``; None takes the trainer's own evaluation.
        seeds: one run of everything each.
        orders: both, or one of them.
        streams: a function of a model that collects its residual stream (``collect_stream``): what is removed are
            directions of that (Fig. 14), found on the model that they are removed from, instead of singular
            components. Removed before fine-tuning, they are missing in it too.
        folder: every cell and fine-tuned model is kept here; started again with the same folder, a run that was
            killed goes on, at most one fine-tuning behind. Weights, what is removed, the evaluation, the training's
            settings and some rows of its data are compared with those of the earlier run.
        config, **options: what is removed from where; see ``SweepConfig``. ``roles`` is ``"all"`` by default.

    Returns:
        A table with ``order`` ``"before"`` and ``"after"``.

    Raises:
        ValueError: as ``SVDPruner.sweep``, and orders that there are not.
    """
    if not orders or set(orders) - {"before", "after"}:
        raise ValueError(f"orders is {tuple(orders)!r}: give 'before', 'after', or both")
    settings = SweepConfig.of(config, {"roles": "all", **options} if config is None else options)
    place = None if folder is None else Path(folder)
    tables = [
        _OneSeed(trainer_of, evaluate, SweepConfig.of(settings, {"seed": seed}), place, streams).table(orders)
        for seed in seeds
    ]
    if not tables:
        raise ValueError("there are no seeds: give at least one, as seeds=[0]")
    table = tables[0]
    for other in tables[1:]:
        table = table + other
    if place is not None:
        by_the_first(lambda: table.save(place))
    return table


@dataclass(frozen=True)
class _OneSeed:
    """Both orders for one seed."""

    trainer_of: TrainerOf
    evaluate: Any
    config: SweepConfig
    folder: Path | None
    streams: Streams | None

    def subject(self, pruner: SVDPruner) -> Subject:
        """What is taken out of a model."""
        return Spectrum(pruner) if self.streams is None else StreamDirections(pruner, self.streams)

    def table(self, orders: Sequence[Order]) -> SweepTable:
        """The cells of this seed; the baseline is measured once for both orders."""
        trainer = _trained(self.trainer_of, self.config.seed, self.folder)
        subject = self.subject(SVDPruner(_model_of(trainer), progress=self.config.progress))
        scored_by = trainer if self.evaluate is None else self.evaluate
        table = self._run(_BaselineRun(subject, scored_by, self.config), "baseline")
        baseline = table.cells[0]
        if "after" in orders:
            after = SweepRun(subject, scored_by, self.config, baseline)
            table = table + _in_order(self._run(after, "after"), "after")
        if "before" in orders:
            table = table + _in_order(self._run(_FineTuningRun(self, baseline), "before"), "before")
        return table

    def _run(self, run: SweepRun, kind: str) -> SweepTable:
        return run.table() if self.folder is None else run.in_folder(self.folder / kind / f"seed-{self.config.seed}")


class _BaselineRun(SweepRun):
    """The model fine-tuned whole."""

    @functools.cached_property
    def cells(self) -> list[Planned]:
        """Nothing is removed."""
        return [Planned()]

    def identity(self) -> dict[str, Any]:
        """Whatever is removed afterwards."""
        return {key: value for key, value in super().identity().items() if key in ("weights", "evaluation", "seed")}


class _FineTuningRun(SweepRun):
    """A sweep in which each cell is a removal from a fresh model, which is then fine-tuned and scored."""

    def __init__(self, one: _OneSeed, baseline: Cell):
        self.one = one
        trainer = one.trainer_of(one.config.seed)
        self.training = training_digest(trainer)
        super().__init__(one.subject(self._pruner(trainer)), self._scored_by(trainer), one.config, baseline)
        self.in_step = self.processes > 1  # which train together

    def identity(self) -> dict[str, Any]:
        """Also how each model is trained."""
        return super().identity() | {"training": self.training}

    def _pruner(self, trainer: Trainer) -> SVDPruner:
        return SVDPruner(_model_of(trainer), folder=self.one.folder, progress=self.one.config.progress)

    def _scored_by(self, trainer: Trainer) -> Any:
        return trainer if self.one.evaluate is None else self.one.evaluate

    def _cell(self, planned: Planned) -> Cell:
        if planned.selection is None:
            return super()._cell(planned)
        trainer = self.one.trainer_of(self.config.seed)
        subject = self.subject.again(self._pruner(trainer))
        edit = subject.remove(planned.selection, planned.place)
        trainer.train()
        scores = Scorer(self._scored_by(trainer), _model_of(trainer))()
        return cell_of(planned, scores, self.config.seed, subject.description(edit), "before")


def _in_order(table: SweepTable, order: Order) -> SweepTable:
    """The same table with its order written into every cell but the baselines.

    The p-values over the index are those of the fine-tuned model alone: joined tables average them.
    """
    cells = [cell if cell.selection == NONE else Cell(**{**vars(cell), "order": order}) for cell in table]
    return SweepTable(cells, table.settings, table.profiles if order == "after" else None)


def _save_weights(model: nn.Module, path: Path, start: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    store.save_tensors(path, tensors, {"start": start})


def _load_weights(model: nn.Module, path: Path, start: str) -> None:
    tensors, described = store.load_tensors(path)
    if described.get("start") != start:
        raise ValueError(
            f"{path} was fine-tuned from other weights, on other data or with other settings: give another folder, or "
            "delete this file"
        )
    model.load_state_dict(tensors)
