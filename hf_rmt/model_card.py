"""What is told of a model that was made from another: its card, and the same as data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from hf_rmt import __version__
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.digests import digest_of
from hf_rmt.models.live import unwrap
from hf_rmt.models.matrices import Kind
from hf_rmt.models.origins import Original
from hf_rmt.reports.sweep import NONE, SweepTable
from hf_rmt.surgery.editor import Edit, Editor

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from hf_rmt.pruner import SVDPruner

#: The record as data, and its row for each matrix.
MANIFEST, TABLE = "hf_rmt.json", "hf_rmt.csv"
#: Those of every card; each kind of model has its own beside them.
TAGS = ("hf_rmt", "random-matrix-theory")
_FORMAT = 1

#: Before and after, metric to score.
_Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRecord(ABC):
    """What was made of a model, and what that did to its scores.

    Attributes:
        original: the model that it was made from.
        architecture: its class.
        scores: ``before`` and ``after``, metric to score.
        dataset: they were measured on; empty if that is not known.
        seeds: how many models they are the means of.
        kind: its tag, and the name of the template of its part of the card.
        done: how the text calls what was done.
        citation: in BibTeX, beside those of the paper and the library.
    """

    original: Original
    architecture: str
    scores: _Scores
    dataset: str = ""
    seeds: int = 1

    kind: ClassVar[str]
    done: ClassVar[str]
    citation: ClassVar[str] = ""

    @property
    @abstractmethod
    def message(self) -> str:
        """It in a line, as for a commit."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """What is peculiar to its kind, as JSON can hold it."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Fields of the template of its part of the card."""

    @abstractmethod
    def recipe(self) -> list[str]:
        """Code that makes it again; none if nothing was done."""

    @abstractmethod
    def same_original(self, other: Any) -> bool:
        """Whether what ``as_json`` gave is of the same kind and original, as far as both tell."""

    @property
    def loading(self) -> str:
        """How it is loaded, in words."""
        return "The weights are dense and load with transformers alone:"

    @property
    def library(self) -> str | None:
        """What has to be imported before it is loaded, if anything."""
        return None

    @property
    def final_scores(self) -> dict[str, float]:
        """The scores of the model as it is saved."""
        return self.scores.get("after", {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """Files beside it, by their names."""
        return {}

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "format": _FORMAT,
            "hf_rmt": __version__,
            "base": self.original.as_json(),
            "architecture": self.architecture,
            **self.details(),
            "metrics": {
                when: {metric: score if math.isfinite(score) else None for metric, score in scores.items()}
                for when, scores in self.scores.items()
            },
            "dataset": self.dataset or None,
            "seeds": self.seeds,
        }


def architecture_of(model: Any) -> str:
    """The class of a model, as it was before its weights were sharded."""
    return type(model).__name__.removeprefix("FSDP")


# Pruned models


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningRecord(ModelRecord):
    """What was taken from a model, and what that did to its scores.

    Attributes:
        edits: the removals in place.
        options: of the ``SVDPruner`` that makes them again.
        matrices: ``SVDPruner.affected``, and in the column ``weights`` a hash of what each matrix was.
        parameters: of the whole model.
        trained_since: matrices were changed after the removal.
    """

    edits: tuple[Edit, ...]
    options: tuple[str, ...]
    matrices: pd.DataFrame
    parameters: int
    trained_since: bool

    kind = "pruned"
    done = "the removal"

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
        kinds = {editor.matrices[index].kind for index in indices}
        scores = _of_sweep(metrics, pruner) if isinstance(metrics, SweepTable) else read_scores(metrics)
        table = table.assign(weights=[editor.store[index].digest for index in indices])
        how = kinds, editor.store.config
        made = cls.made(unwrap(pruner.model), pruner.origin, pruner.edits, table, how, scores)
        return replace(made, trained_since=_trained_since(editor))

    @classmethod
    def made(
        cls,
        model: Any,
        origin: Mapping[str, Any],
        edits: tuple[Edit, ...],
        matrices: pd.DataFrame,
        how: tuple[set[Kind], AnalysisConfig],
        scores: Mapping[str, Any],
    ) -> PruningRecord:
        """The record of removals from weights that were not trained since.

        Args:
            model: whose they are, perhaps without values.
            origin: of a pruner.
            edits, matrices: see the class.
            how: kinds of the matrices, and the settings.
            scores: from ``read_scores``.
        """
        return cls(
            original=Original.of(origin["model"], origin["revision"]),
            architecture=architecture_of(model),
            edits=edits,
            options=_options(edits, *how),
            matrices=matrices,
            parameters=model.num_parameters(),
            trained_since=False,
            **scores,
        )

    @property
    def message(self) -> str:
        """What was removed."""
        base = self.original.base
        return f"{base} without {'; '.join(map(str, self.edits))}" if self.edits else f"{base}, whole"

    @property
    def final_scores(self) -> dict[str, float]:
        """Those of the original where nothing was removed."""
        return super().final_scores if self.edits else self.scores.get("before", {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """A row a matrix."""
        return {TABLE: self.matrices}

    def by_role(self) -> pd.DataFrame:
        """A row a role: number of matrices, components removed and of how many, mean shares of mass and energy."""
        return by_role(self.matrices)

    def details(self) -> dict[str, Any]:
        """Edits and matrices."""
        return {
            "edits": [
                {"selection": str(edit.selection), "roles": edit.roles, "blocks": edit.blocks, "matrices": edit.names}
                for edit in self.edits
            ],
            "parameters": self.parameters,
            "matrices": self.matrices.astype(object).where(self.matrices.notna(), None).to_dict("records"),
            "trained_since": self.trained_since,
        }

    def same_original(self, other: Any) -> bool:
        """By the hashes of the matrices of both."""
        mine = dict(zip(self.matrices["name"], self.matrices["weights"], strict=True))
        try:
            theirs = {row["name"]: row["weights"] for row in other["matrices"]}
            same = other["base"] == self.original.as_json() and other["format"] == _FORMAT
        except (KeyError, TypeError):
            return False
        return same and all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())

    def about(self) -> dict[str, Any]:
        """Edits in words, and sums by role."""
        touched = self.matrices[self.matrices["removed"] > 0]
        return {
            "edits": [_in_words(edit) for edit in self.edits],
            "count": len(touched),
            "roles": self.by_role().to_dict("records"),
            "share": touched["parameters"].sum() / self.parameters,
            "parameters": self.parameters,
            "table": TABLE,
            "trained_since": self.trained_since,
        }

    def recipe(self) -> list[str]:
        """The edits, one after the other."""
        if not self.edits:
            return []
        lines = [
            "from hf_rmt import SVDPruner, parse_selection",
            *original_in_code(self),
            f"pruner = SVDPruner({', '.join(['model', *self.options])})",
        ]
        for edit in self.edits:
            places = (("roles", edit.roles), ("blocks", edit.blocks))
            arguments = [f"{key}={list(value)!r}" for key, value in places if value is not None]
            lines.append(f"pruner.remove({', '.join([f'parse_selection({str(edit.selection)!r})', *arguments])})")
        return lines


def by_role(affected: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``SVDPruner.affected`` by role: sums over its matrices, and the mean shares of mass and energy."""
    grouped = affected.groupby("role", sort=False)
    shown = grouped[["removed", "of", "parameters"]].sum().join(grouped[["mass", "energy"]].mean())
    shown.insert(0, "matrices", grouped.size())
    return shown.reset_index()


def _options(edits: tuple[Edit, ...], kinds: set[Kind], config: AnalysisConfig) -> tuple[str, ...]:
    options = {
        "embeddings=True": "embedding" in kinds,
        "head=True": "head" in kinds,
        "convolutions=True": "convolution" in kinds,
        "covariances=covariances": any(edit.selection.needs_activations for edit in edits),
        f"null_draws={config.null_draws}, seed={config.seed}": config.null_draws is not None,
    }
    return tuple(option for option, needed in options.items() if needed)


def _trained_since(editor: Editor) -> bool:
    found = [digest_of(editor.matrices[index].read()) != written for index, written in editor.written.items()]
    return any(found)  # all are read, as reading may take all processes


def _in_words(edit: Edit) -> str:
    """An edit, how many matrices it is of, and where it found nothing or everything."""
    roles = ", ".join(f"`{role}`" for role in edit.roles) if edit.roles else "all matrices but embeddings and heads"
    blocks = f" in blocks {', '.join(map(str, edit.blocks))}" if edit.blocks is not None else ""
    count = f"{len(edit.names)} {'matrix' if len(edit.names) == 1 else 'matrices'}"
    notes = [(len(edit.empty), "nothing"), (len(edit.whole), "everything")]
    special = "".join(f"; in {number} of them this is {what}" for number, what in notes if number)
    return f"`{edit.selection}` of {roles}{blocks}: {count}{special}"


# Scores


def read_scores(metrics: Any) -> dict[str, Any]:
    """Scores as they are given to be put on a card: ``scores``, ``dataset``.

    Raises:
        ValueError: neither ``before`` nor ``after``.
        TypeError: they are no numbers.
    """
    if metrics is None:
        return {"scores": {}}
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics is {metrics!r}: give a SweepTable of a pruned model, or {{'before': {{...}}, 'after': {{...}}}}"
        )
    known = {"before", "after", "dataset"}
    if set(metrics) - known or not set(metrics) & {"before", "after"}:
        raise ValueError(
            f"metrics has {', '.join(map(repr, metrics)) or 'nothing'}: give the scores of the original as 'before', "
            "those of what was made from it as 'after', and perhaps the 'dataset'"
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


def card_of(record: ModelRecord, name: str, model_tags: Any = None, note: str = "", auto: str = "") -> ModelCard:
    """The model card, with the metadata that the Hub reads.

    Args:
        record: of what was made.
        name: Hub id or folder that the card is for.
        model_tags: those that the model has.
        note: what a user has to know beside.
        auto: the class that loads what prepares inputs, as ``"AutoTokenizer"``; empty if there is none.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Template

    shared = {"base": record.original.link, "version": __version__, "manifest": MANIFEST}
    return ModelCard.from_template(
        _card_data(record, name, model_tags),
        template_str=_template("model_card"),
        name=name.rpartition("/")[2],
        about=Template(_template(record.kind)).render(shared | record.about()).strip(),
        version=__version__,
        scores=_score_rows(record.scores),
        done=record.done,
        conditions=_conditions(record),
        loading=record.loading,
        usage=_usage(record, name, auto),
        note=note,
        recipe="\n".join(record.recipe()).replace("'", '"'),
        citation=record.citation,
    )


def _template(name: str) -> str:
    return files("hf_rmt").joinpath(f"templates/{name}.md").read_text(encoding="utf-8")


def _card_data(record: ModelRecord, name: str, model_tags: Any) -> ModelCardData:
    from huggingface_hub import ModelCardData

    task = pipeline_tag(record.architecture)
    results = _eval_results(record, task)
    return ModelCardData(
        base_model=record.original.hub_id,
        library_name=record.library or "transformers",
        pipeline_tag=task,
        tags=[*TAGS, record.kind, *(model_tags or ())],
        metrics=list(record.final_scores) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **record.original.passed_on(),
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


def _eval_results(record: ModelRecord, task: str | None) -> list[EvalResult]:
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
        for metric, score in record.final_scores.items()
        if math.isfinite(score)
    ]


def _score_rows(scores: _Scores) -> list[dict[str, str]]:
    sides = [scores.get("before", {}), scores.get("after", {})]
    rows = [
        (metric, *(f"{side[metric]:.4g}" if metric in side else "" for side in sides)) for metric in sides[0] | sides[1]
    ]
    return [dict(zip(("metric", "before", "after"), row, strict=True)) for row in rows]


def _conditions(record: ModelRecord) -> str:
    over = f", mean over {record.seeds} models fine-tuned alike" if record.seeds > 1 else ""
    return (f", on {record.dataset}" if record.dataset else "") + over


def _usage(record: ModelRecord, name: str, auto: str) -> str:
    classes = sorted({_importable(record.architecture), *([auto] if auto else [])})
    lines = [] if record.library is None else [f"import {record.library}"]
    lines += [f"from transformers import {', '.join(classes)}", ""]
    lines.append(f'model = {_importable(record.architecture)}.from_pretrained("{name}")')
    if auto:
        lines.append(f'{_CALLED.get(auto, "processor")} = {auto}.from_pretrained("{name}")')
    return "\n".join(lines)


_CALLED = {"AutoTokenizer": "tokenizer"}


def original_in_code(record: ModelRecord) -> list[str]:
    """Code that loads the original as ``model``, after an import."""
    cls, original = _importable(record.architecture), record.original
    at = f', revision="{original.revision}"' if original.revision is not None else ""
    return [f"from transformers import {cls}", "", f'model = {cls}.from_pretrained("{original.base}"{at})']


def _importable(architecture: str) -> str:
    """The class that loads the model; one that transformers has not comes with the code of the model."""
    import transformers

    return architecture if hasattr(transformers, architecture) else "AutoModel"
