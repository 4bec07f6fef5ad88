"""A sliced model in a folder or on the Hub: with its tokenizer, a card, and the record of the slice as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt import hub
from hf_rmt.config import SliceConfig
from hf_rmt.model_card import MANIFEST, ModelRecord, architecture_of, original_in_code, read_scores
from hf_rmt.models.families import is_own
from hf_rmt.models.live import unwrap
from hf_rmt.models.origins import Original
from hf_rmt.slicing.slicer import SliceRecord

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import nn

_SLICEGPT = """\
@inproceedings{ashkboos2024slicegpt,
  title = {SliceGPT: Compress Large Language Models by Deleting Rows and Columns},
  author = {Ashkboos, Saleh and Croci, Maximilian L. and Gennari do Nascimento, Marcelo and Hoefler, Torsten and
            Hensman, James},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year = {2024},
  eprint = {2401.15024},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2401.15024}
}"""
_UNDECLARED = """\
hf_rmt has no declaration of the residual stream of `{architecture}`, or another one: give the one that this model was
sliced by to `hf_rmt.register_family` before it is loaded."""
_REGISTERED = """\
This is the registered form, which loads where hf_rmt was imported, before or after transformers:

```
pip install hf_rmt
```

Without it loading stops with a mismatch of sizes: `config.json` holds those of the original `{architecture}`, and the
loader of hf_rmt is what makes its modules as narrow as these weights. Do not pass `ignore_mismatched_sizes=True`, which
fills in random weights."""


def save_sliced(
    model: nn.Module, folder: str | Path, *, tokenizer: Any = None, metrics: Any = None, overwrite: bool = False
) -> Path:
    """Write a sliced model as it is now, its tokenizer, a model card and the record of the slice.

    All is written or nothing. Over several processes all must call, and the first writes.

    Args:
        model: from ``slice_model``, trained further perhaps. One that was loaded from a folder of ``save_sliced`` has
            lost its record: ``model.sliced = read_slice(folder)`` gives it back.
        folder: made if it does not exist. An earlier slice of the same commit of a model of the Hub is replaced; other
            files stay.
        tokenizer: or processor; None takes what the original came with.
        metrics: scores for the card: a dict of ``before`` and ``after``, each a dict of numbers, and perhaps the Hub
            id of the ``dataset``.
        overwrite: replace the model that the folder holds, whatever it is.

    Returns:
        The folder; ``read_slice`` reads the record in its ``hf_rmt.json``.

    Raises:
        ValueError: no sliced model, or one with adapters; the folder holds another model.
        TypeError: metrics that are no numbers, or no tokenizer.
        OSError: the folder cannot be written.
    """
    inner = hub.savable(model)
    return hub.write(inner, SlicingRecord.of(inner, metrics), folder, tokenizer=tokenizer, overwrite=overwrite)


def push_sliced(  # noqa: PLR0913
    model: nn.Module,
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
        model, tokenizer, metrics: as for ``save_sliced``.
        repo_id: ``user/name``; made if it does not exist, and taken away again if the commit fails.
        private: whether a new repository is; None for what is usual there.
        revision: branch, made if it does not exist; None for the main one.
        token: of the account; None for the one that is logged in.
        commit_message: None for one that says what was kept.
        create_pr: open a pull request instead.

    Raises:
        PermissionError: the account may not write there; nothing was pushed.
        OSError: the Hub, or the way to it, failed; the message says what is left there.
        ValueError, TypeError: as ``save_sliced``; also no name of a repository, or one that is to be private and is
            public.
    """
    how = hub.Push(private=private, revision=revision, token=token, commit_message=commit_message, create_pr=create_pr)
    inner = hub.savable(model)
    return hub.upload(inner, SlicingRecord.of(inner, metrics), repo_id, tokenizer=tokenizer, how=how)


def read_slice(folder: str | Path) -> SliceRecord:
    """The record of the sliced model that a folder holds.

    Raises:
        ValueError: there is none.
    """
    try:
        return SliceRecord(**json.loads((Path(folder) / MANIFEST).read_text())["slice"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no {MANIFEST} of a sliced model, as save_sliced writes it") from error


def refuse_another_model(model: nn.Module, folder: Path, overwrite: bool = False) -> None:
    """Raise before anything is sliced where ``save_sliced`` would not write a slice of a model.

    Raises:
        ValueError, NotADirectoryError: as ``save_sliced``.
    """
    original = Original.of_model(model)
    hub.refuse_another(folder, original.base, partial(_is_slice_of, original), overwrite)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlicingRecord(ModelRecord):
    """What is told of a sliced model.

    Attributes:
        slice: what was kept of the original.
        declared: whether the library has the declaration of its stream, and needs no user's.
    """

    slice: SliceRecord
    declared: bool = True

    kind = "sliced"
    done = "slicing"
    citation = _SLICEGPT

    @classmethod
    def of(cls, model: Any, metrics: Any = None) -> SlicingRecord:
        """That of a model with its record.

        Raises:
            ValueError, TypeError: it has none, or metrics that cannot be read.
        """
        inner: Any = unwrap(model)
        found = getattr(inner, "sliced", None)
        if not isinstance(found, SliceRecord):
            raise ValueError(
                f"this {architecture_of(inner)} has no record of a slice: slice_model makes a model with one, and for "
                "one that was loaded from a folder model.sliced = read_slice(folder) gives it back"
            )
        return cls(
            original=Original(found.model, found.model if found.on_hub else None, found.revision),
            architecture=architecture_of(inner),
            slice=found,
            declared=is_own(inner.config.model_type),
            **read_scores(metrics),
        )

    @property
    def message(self) -> str:
        """The width."""
        made = self.slice
        return f"{self.original.base}, its residual stream cut from {made.original_width} to {made.width}"

    @property
    def library(self) -> str | None:
        """This one for the registered form."""
        return "hf_rmt" if self.slice.form == "registered" else None

    @property
    def loading(self) -> str:
        """Of a registered form also what happens without this library, and why."""
        if self.library is None:
            return f"This is the plain form, an ordinary `{self.architecture}`, which loads with transformers alone:"
        text = _REGISTERED.format(architecture=self.architecture)
        return text if self.declared else f"{text}\n\n{_UNDECLARED.format(architecture=self.architecture)}"

    def details(self) -> dict[str, Any]:
        """The record, with the name that the original has for others."""
        return {"slice": self.slice.to_dict() | self.original.as_json()}

    def about(self) -> dict[str, Any]:
        """The record."""
        return self.slice.to_dict() | {"share": self.slice.share}

    def recipe(self) -> list[str]:
        """Which texts it was calibrated on, nothing here knows."""
        made = self.slice
        share, _, of = made.keep.partition(" of the ")
        kind = {"width": "Width", "energy": "Energy"}.get(of)
        keep = share if kind is None else f"{kind}({share})"
        options: dict[str, Any] = {"per_block": True} if made.per_block else {"form": made.form}
        usual = SliceConfig(per_block=made.per_block)
        options |= {} if made.weigh_readers == usual.weighs_readers else {"weigh_readers": made.weigh_readers}
        options |= {} if made.predict == usual.predict else {"predict": made.predict}
        options["multiple_of"] = made.multiple_of
        arguments = ", ".join([keep, "texts", *(f"{key}={value!r}" for key, value in options.items())])
        return [
            f"from hf_rmt import {', '.join(filter(None, ('SVDPruner', kind)))}",
            *original_in_code(self),
            "",
            f"# {made.tokens:,} tokens of text were used, which are not recorded: a list of strings, a file, a Hub id.",
            'texts = "texts.txt"',
            f"sliced = SVDPruner(model).slice({arguments})",
        ]

    def same_original(self, other: Any) -> bool:
        """By commit, as the weights of the original cannot be told from a slice."""
        return _is_slice_of(self.original, other)


def _is_slice_of(original: Original, described: Any) -> bool:
    """Whether the record in a folder is of a slice of the same commit of a model of the Hub."""
    try:
        return original.revision is not None and "slice" in described and described["base"] == original.as_json()
    except (KeyError, TypeError):
        return False
