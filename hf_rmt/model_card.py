"""What is told of a pruned model: its card, and the same as data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_rmt import __version__
from hf_rmt.models.digests import digest_of
from hf_rmt.models.live import unwrap
from hf_rmt.reports.sweep import NONE, SweepTable
from hf_rmt.surgery.editor import Edit, Editor

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from hf_rmt.pruner import SVDPruner

log = logging.getLogger(__name__)

#: The record as data, and its row for each matrix.
MANIFEST, TABLE = "hf_rmt.json", "hf_rmt.csv"
TAGS = ("hf_rmt", "random-matrix-theory", "pruned")
#: What of the card of the original holds for the pruned model too.
_PASSED_ON = ("license", "license_name", "license_link", "language", "datasets")
_FORMAT = 1

#: Before and after the removal, metric to score.
_Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningRecord:
    """What was taken from a model, and what that did to its scores.

    Attributes:
        source: Hub id or folder that the model came from, or its class.
        hub_id: its id on the Hub; None if it came from elsewhere.
        revision: its commit there; None also where it may be one of several.
        architecture: its class.
        edits: the removals in place.
        options: of the ``SVDPruner`` that makes them again.
        matrices: ``SVDPruner.affected``, and in the column ``weights`` a hash of what each matrix was.
        parameters: of the whole model.
        trained_since: matrices were changed after the removal.
        scores: ``before`` and ``after`` the removal, metric to score.
        dataset: they were measured on; empty if that is not known.
        seeds: how many models they are the means of.
    """

    source: str
    hub_id: str | None
    revision: str | None
    architecture: str
    edits: tuple[Edit, ...]
    options: tuple[str, ...]
    matrices: pd.DataFrame
    parameters: int
    trained_since: bool
    scores: _Scores
    dataset: str = ""
    seeds: int = 1

    @classmethod
    def of(cls, pruner: SVDPruner, metrics: Any = None) -> PruningRecord:
        """The record of what a pruner has in place; with sharded weights all processes must call.

        Args:
            pruner: of the model.
            metrics: see ``hub.save``.

        Raises:
            ValueError, TypeError: metrics that cannot be read.
        """
        editor, table = pruner.editor, pruner.affected()
        indices = [editor.index[name] for name in table["name"]]
        model: Any = unwrap(pruner.model)
        source = pruner.origin["model"]
        known = _commits(source, pruner.origin["revision"])
        return cls(
            source=source,
            hub_id=source if known else None,
            revision=known[0] if len(known) == 1 else None,
            architecture=type(model).__name__.removeprefix("FSDP"),
            edits=pruner.edits,
            options=_options(editor, indices),
            matrices=table.assign(weights=[editor.store[index].digest for index in indices]),
            parameters=model.num_parameters(),
            trained_since=_trained_since(editor),
            **_read_metrics(metrics, pruner),
        )

    @property
    def base(self) -> str:
        """What to call the original; of a folder the last part of its path, as the rest concerns nobody."""
        return self.hub_id or Path(self.source).name or self.source

    def local_file(self, name: str) -> Path | None:
        """A file of the original, if it is on this machine: in its folder, or in the cache of the Hub."""
        from huggingface_hub import try_to_load_from_cache

        if self.hub_id is not None:
            found = try_to_load_from_cache(self.hub_id, name, revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        path = Path(self.source) / name
        return path if path.is_file() else None

    def by_role(self) -> pd.DataFrame:
        """A row a role: number of matrices, components removed and of how many, mean shares of mass and energy."""
        return by_role(self.matrices)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "format": _FORMAT,
            "hf_rmt": __version__,
            "base": {"model": self.base, "revision": self.revision},
            "architecture": self.architecture,
            "edits": [
                {"selection": str(edit.selection), "roles": edit.roles, "blocks": edit.blocks, "matrices": edit.names}
                for edit in self.edits
            ],
            "parameters": self.parameters,
            "matrices": self.matrices.astype(object).where(self.matrices.notna(), None).to_dict("records"),
            "trained_since": self.trained_since,
            "metrics": {
                when: {metric: score if math.isfinite(score) else None for metric, score in scores.items()}
                for when, scores in self.scores.items()
            },
            "dataset": self.dataset or None,
            "seeds": self.seeds,
        }

    def same_original(self, other: Any) -> bool:
        """Whether what ``as_json`` gave is of the same original, as far as the matrices of both tell."""
        mine = dict(zip(self.matrices["name"], self.matrices["weights"], strict=True))
        try:
            theirs = {row["name"]: row["weights"] for row in other["matrices"]}
            same = other["base"] == {"model": self.base, "revision": self.revision} and other["format"] == _FORMAT
        except (KeyError, TypeError):
            return False
        return same and all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())


def by_role(affected: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``SVDPruner.affected`` by role: sums over its matrices, and the mean shares of mass and energy."""
    grouped = affected.groupby("role", sort=False)
    shown = grouped[["removed", "of", "parameters"]].sum().join(grouped[["mass", "energy"]].mean())
    shown.insert(0, "matrices", grouped.size())
    return shown.reset_index()


def _commits(source: str, revision: str | None) -> list[str]:
    """The commits of the Hub that a model of this name can be: what it says itself, or those in the cache."""
    from huggingface_hub import constants

    if Path(source).is_dir():
        return []
    if revision is not None:  # not said by every version of transformers
        return [revision]
    cached = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots"
    return [path.parent.name for path in cached.glob("*/config.json")]


def _options(editor: Editor, indices: list[int]) -> tuple[str, ...]:
    kinds, config = {editor.matrices[index].kind for index in indices}, editor.store.config
    options = {
        "embeddings=True": "embedding" in kinds,
        "head=True": "head" in kinds,
        "covariances=covariances": any("overlapping" in str(edit.selection) for edit in editor.edits),
        f"null_draws={config.null_draws}, seed={config.seed}": config.null_draws is not None,
    }
    return tuple(option for option, needed in options.items() if needed)


def _trained_since(editor: Editor) -> bool:
    found = [digest_of(editor.matrices[index].read()) != written for index, written in editor.written.items()]
    return any(found)  # all are read, as reading may take all processes


# Scores


def _read_metrics(metrics: Any, pruner: SVDPruner) -> dict[str, Any]:
    if metrics is None:
        return {"scores": {}}
    if isinstance(metrics, SweepTable):
        return _of_sweep(metrics, pruner)
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics is {metrics!r}: give a SweepTable, or {{'before': {{...}}, 'after': {{...}}}}")
    known = {"before", "after", "dataset"}
    if set(metrics) - known or not set(metrics) & {"before", "after"}:
        raise ValueError(
            f"metrics has {', '.join(map(repr, metrics)) or 'nothing'}: give the scores of the original as 'before', "
            "those of the pruned model as 'after', and perhaps the 'dataset'"
        )
    scores = {when: _numbers(when, metrics[when]) for when in ("before", "after") if metrics.get(when) is not None}
    return {"scores": scores, "dataset": str(metrics.get("dataset") or "")}


def _numbers(when: str, scores: Any) -> dict[str, float]:
    try:
        return {str(metric): float(score) for metric, score in scores.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"metrics[{when!r}] is {scores!r}: give a number for each metric, as {{'accuracy': 0.9}}"
        ) from error


def _of_sweep(sweep: SweepTable, pruner: SVDPruner) -> dict[str, Any]:
    """The baseline of a sweep, and the cells of what is in place; means over seeds."""
    remedy = "give the scores as metrics={'before': {...}, 'after': {...}}"
    made_of = sweep.settings.get("model", pruner.origin["model"])
    if Path(str(made_of)).name != Path(pruner.origin["model"]).name:
        raise ValueError(f"the sweep is of {made_of} and the model {pruner.origin['model']}: {remedy}")
    baselines = [cell for cell in sweep if cell.selection == NONE]
    if not pruner.edits:
        return {"scores": {"before": _means(baselines)}, "seeds": len(baselines)}
    places = [_place(edit) for edit in pruner.edits]
    cells = [cell for cell in sweep if [(cell.selection, cell.role, cell.block)] == places and cell.order != "before"]
    if not cells:
        raise ValueError(f"the sweep has no cell of {' and '.join(map(str, pruner.edits))}: {remedy}")
    seeds = {cell.seed for cell in cells}
    before = [cell for cell in baselines if cell.seed in seeds]
    return {"scores": {"before": _means(before), "after": _means(cells)}, "seeds": len(seeds)}


def _place(edit: Edit) -> tuple[str, str | None, int | None]:
    """How a sweep calls this edit; of several roles or blocks it has no cell."""
    role = "all" if edit.roles is None else edit.roles[0] if len(edit.roles) == 1 else None
    block = None if edit.blocks is None else edit.blocks[0] if len(edit.blocks) == 1 else -1
    return str(edit.selection), role, block


def _means(cells: Any) -> dict[str, float]:
    return {metric: fmean(cell.scores[metric] for cell in cells) for metric in cells[0].scores}


# The card


def card_of(record: PruningRecord, name: str, model_tags: Any = None, note: str = "", auto: str = "") -> ModelCard:
    """The model card, with the metadata that the Hub reads.

    Args:
        record: of the pruning.
        name: Hub id or folder that the card is for.
        model_tags: those that the model has.
        note: what a user has to know beside.
        auto: the class that loads what prepares inputs, as ``"AutoTokenizer"``; empty if there is none.
    """
    from huggingface_hub import ModelCard

    touched = record.matrices[record.matrices["removed"] > 0]
    template = files("hf_rmt").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        _card_data(record, name, model_tags),
        template_str=template,
        name=name.rpartition("/")[2],
        base=_link(record),
        edits=[_in_words(edit) for edit in record.edits],
        count=len(touched),
        version=__version__,
        roles=record.by_role().to_dict("records"),
        share=touched["parameters"].sum() / record.parameters,
        parameters=record.parameters,
        table=TABLE,
        manifest=MANIFEST,
        trained_since=record.trained_since,
        scores=_score_rows(record.scores),
        conditions=_conditions(record),
        usage=_usage(record, name, auto),
        note=note,
        recipe=_recipe(record),
    )


def _card_data(record: PruningRecord, name: str, model_tags: Any) -> ModelCardData:
    from huggingface_hub import ModelCardData

    task = pipeline_tag(record.architecture)
    results = _eval_results(record, task)
    return ModelCardData(
        base_model=record.hub_id,
        library_name="transformers",
        pipeline_tag=task,
        tags=[*TAGS, *(model_tags or ())],
        metrics=list(_after(record)) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **_passed_on(record),
    )


#: Tasks of the Hub, and how transformers calls its tables of the classes for them; one has no task of its own.
_TASKS: dict[str | None, str] = {
    "text-generation": "CAUSAL_LM",
    "fill-mask": "MASKED_LM",
    "text-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "automatic-speech-recognition": "CTC",
    None: "SEQ_TO_SEQ_CAUSAL_LM",
}


def pipeline_tag(architecture: str) -> str | None:
    """What a model of this class is for, where there is one answer."""
    from transformers.models.auto import modeling_auto

    found = []
    for task, table in _TASKS.items():
        classes = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values()
        if any(architecture in ((names,) if isinstance(names, str) else names) for names in classes):
            found.append(task)
    return found[0] if len(found) == 1 else None


def _passed_on(record: PruningRecord) -> dict[str, Any]:
    """License, language and training data, as the card of the original says, if that is on this machine."""
    from huggingface_hub import ModelCard

    path = record.local_file("README.md")
    if path is None:
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception as error:  # whatever its YAML leads to
        log.warning("the card of %s cannot be read, so its license is not passed on: %s", record.base, error)
        return {}
    said = {key: data.get(key) for key in _PASSED_ON if data.get(key)}
    if "://" not in str(said.get("license_link", "://")):  # a file beside that card
        said.pop("license_link")
    return said


def _after(record: PruningRecord) -> dict[str, float]:
    """The scores of the model as it is saved."""
    return record.scores.get("after", {}) if record.edits else record.scores.get("before", {})


def _eval_results(record: PruningRecord, task: str | None) -> list[EvalResult]:
    """The scores as the Hub shows them, which needs a task and a data set."""
    from huggingface_hub import EvalResult

    if task is None or not record.dataset:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=record.dataset,
            dataset_name=record.dataset.rpartition("/")[2],
            metric_type=metric,
            metric_value=score,
        )
        for metric, score in _after(record).items()
        if math.isfinite(score)
    ]


def _link(record: PruningRecord) -> str:
    if record.hub_id is None:
        return f"`{record.base}`"
    revision = f" (revision `{record.revision}`)" if record.revision is not None else ""
    return f"[{record.hub_id}](https://huggingface.co/{record.hub_id}){revision}"


def _in_words(edit: Edit) -> str:
    """An edit, how many matrices it is of, and where it found nothing or everything."""
    roles = ", ".join(f"`{role}`" for role in edit.roles) if edit.roles else "all matrices but embeddings and heads"
    blocks = f" in blocks {', '.join(map(str, edit.blocks))}" if edit.blocks is not None else ""
    count = f"{len(edit.names)} {'matrix' if len(edit.names) == 1 else 'matrices'}"
    notes = [(len(edit.empty), "nothing"), (len(edit.whole), "everything")]
    special = "".join(f"; in {number} of them this is {what}" for number, what in notes if number)
    return f"`{edit.selection}` of {roles}{blocks}: {count}{special}"


def _score_rows(scores: _Scores) -> list[dict[str, str]]:
    sides = [scores.get("before", {}), scores.get("after", {})]
    rows = [
        (metric, *(f"{side[metric]:.4g}" if metric in side else "" for side in sides)) for metric in sides[0] | sides[1]
    ]
    return [dict(zip(("metric", "before", "after"), row, strict=True)) for row in rows]


def _conditions(record: PruningRecord) -> str:
    over = f", mean over {record.seeds} models fine-tuned alike" if record.seeds > 1 else ""
    return (f", on {record.dataset}" if record.dataset else "") + over


def _usage(record: PruningRecord, name: str, auto: str) -> str:
    classes = sorted({_importable(record.architecture), *([auto] if auto else [])})
    lines = [f"from transformers import {', '.join(classes)}", ""]
    lines.append(f'model = {_importable(record.architecture)}.from_pretrained("{name}")')
    if auto:
        lines.append(f'{_CALLED.get(auto, "processor")} = {auto}.from_pretrained("{name}")')
    return "\n".join(lines)


_CALLED = {"AutoTokenizer": "tokenizer"}


def _importable(architecture: str) -> str:
    """The class that loads the model; one that transformers has not comes with the code of the model."""
    import transformers

    return architecture if hasattr(transformers, architecture) else "AutoModel"


def _recipe(record: PruningRecord) -> str:
    cls = _importable(record.architecture)
    at = f', revision="{record.revision}"' if record.revision is not None else ""
    lines = [
        "from hf_rmt import SVDPruner, parse_selection",
        f"from transformers import {cls}",
        "",
        f'model = {cls}.from_pretrained("{record.base}"{at})',
        f"pruner = SVDPruner({', '.join(['model', *record.options])})",
    ]
    for edit in record.edits:
        places = (("roles", edit.roles), ("blocks", edit.blocks))
        arguments = [f"{key}={list(value)!r}" for key, value in places if value is not None]
        lines.append(f"pruner.remove({', '.join([f'parse_selection({str(edit.selection)!r})', *arguments])})")
    return "\n".join(lines).replace("'", '"')
