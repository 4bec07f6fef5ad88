"""Text in: batches of token ids, made with the model's own tokenizer."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_rmt.models.origins import Original
from hf_rmt.models.text_sources import Source, source_of

#: Texts are sorted by length within so many batches.
_WINDOW = 16
#: Longest text in tokens where the caller sets no other.
_LONGEST = 512

#: The tokens of one text: ``input_ids``, and ``token_type_ids`` where there are any.
_Tokens = dict[str, list[int]]


def text_batches(  # noqa: PLR0913
    texts: Any,
    tokenizer: Any,
    *,
    columns: str | Sequence[str] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_tokens: int | None = None,
    encoder_decoder: bool = False,
) -> TextBatches:
    """Batches of token ids from texts, for ``RMTAnalyzer.collect`` or any forward pass.

    Args:
        texts: strings or pairs of strings; a ``datasets.Dataset``, DataFrame or sequence of dicts, also
            one that is tokenised already; a file (.jsonl, .json, .csv, .tsv, .parquet; any other has a text a
            line); a folder of ``save_to_disk``, or with one data file (of several, that with "train" in its
            name); a Hub data set as ``name``, ``name:split`` or ``name/config:split`` (split: train).
        tokenizer: of the model, see ``tokenizer_of``; it stays as it is. None will do for tokenised data.
        columns: the column that holds the text, or the two that hold a pair. None: ``input_ids`` if there
            are any, else the only column of strings, else one with a conventional name.
        batch_size: texts a batch.
        max_length: longer texts are truncated to so many tokens; None for the tokenizer's limit, at most 512.
        max_tokens: stop with the text that completes so many tokens; None for all texts.
        encoder_decoder: add ``labels``, so that the decoder reads the same text.

    Raises:
        ValueError: no text; a file, folder, column or setting that the message names.
        ImportError: a data set of the Hub or a folder of ``save_to_disk``, without the datasets library.
    """
    for setting, value in {"batch_size": batch_size, "max_length": max_length, "max_tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"{setting} must be at least 1, not {value}")
    source = source_of(texts, columns)
    encode = _encoder(source, tokenizer, max_length)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return TextBatches(
        source=source, encode=encode, batch_size=batch_size, max_tokens=max_tokens, pad=pad, labels=encoder_decoder
    )


def tokenizer_of(model: Any, revision: str | None = None) -> Any:
    """The tokenizer that a model was saved with.

    Args:
        model: a model, or the folder or Hub id of one. Nothing is fetched for a model that is not from the Hub.
        revision: branch, tag or commit of a Hub id; a model knows its own.

    Raises:
        ValueError: it names no tokenizer, or has none.
    """
    from transformers import AutoTokenizer

    from hf_rmt.models.live import unwrap

    if isinstance(model, (str, os.PathLike)):
        name, local = str(model), os.path.isdir(model)
    else:
        config: Any = getattr(unwrap(model), "config", None)
        name, original = getattr(config, "_name_or_path", ""), Original.of_model(model)
        revision, local = original.revision, original.hub_id is None
    if not name:
        raise ValueError(f"{type(unwrap(model)).__name__} was not loaded, so it has no tokenizer: pass tokenizer=")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=None if local else revision, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the missing file leads to
        raise ValueError(f"{name} has no tokenizer that can be loaded: pass tokenizer= ({error})") from error
    # transformers makes up an empty one where the files of a tokenizer are missing
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) <= 1:
        raise ValueError(f"{name} holds no vocabulary of a tokenizer: save the tokenizer there, or pass tokenizer=")
    return tokenizer


@dataclass(eq=False, kw_only=True, repr=False)
class TextBatches:
    """Batches of token ids; every iteration gives the same batches in the same order.

    A batch is a dict of int64 tensors ``(texts, tokens)``: ``input_ids``, ``attention_mask``, and
    ``token_type_ids`` and ``labels`` where there are any. Padding is on the right. Texts are
    tokenised a window of batches at a time and sorted by length within it, which saves padding. ``len``
    is the number of batches; the first time it costs a pass of the tokenizer. ``text_batches`` makes them.
    """

    source: Source
    encode: Callable[[list[tuple[Any, ...]]], Iterator[_Tokens]]
    batch_size: int
    max_tokens: int | None
    pad: int
    labels: bool
    _batches: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if next(self._windows(), None) is None:
            raise ValueError(f"{self.source.name} has no text with a token in it")

    def __repr__(self) -> str:
        return f"TextBatches({self.source.name}, batch_size={self.batch_size})"

    def __len__(self) -> int:
        if self._batches is None:
            if not self.source.sized:
                raise TypeError(f"{self.source.name} is a stream: its length is known after one iteration")
            self._batches = sum(math.ceil(len(window) / self.batch_size) for window in self._windows())
        return self._batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        count = 0
        for window in self._windows():
            window.sort(key=lambda tokens: len(tokens["input_ids"]))
            for start in range(0, len(window), self.batch_size):
                yield self._padded(window[start : start + self.batch_size])
                count += 1
        self._batches = count

    def _windows(self) -> Iterator[list[_Tokens]]:
        """The tokens of the texts in their order, a window at a time."""
        left = math.inf if self.max_tokens is None else self.max_tokens
        rows = self.source.rows()
        while chunk := list(itertools.islice(rows, _WINDOW * self.batch_size)):
            window = []
            for tokens in self.encode(chunk):
                if left > 0 and tokens["input_ids"]:
                    window.append(tokens)
                    left -= len(tokens["input_ids"])
            if window:
                yield window
            if left <= 0:
                return

    def _padded(self, texts: list[_Tokens]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(tokens["input_ids"]) for tokens in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        batch = {"input_ids": torch.full(mask.shape, self.pad), "attention_mask": mask.long()}
        if "token_type_ids" in texts[0]:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        for key in batch.keys() & texts[0].keys():
            batch[key][mask] = torch.tensor([token for tokens in texts for token in tokens[key]])
        if self.labels:
            batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
        return batch


def _encoder(
    source: Source, tokenizer: Any, max_length: int | None
) -> Callable[[list[tuple[Any, ...]]], Iterator[_Tokens]]:
    """What turns rows of the source into tokens."""
    limit = max_length or min(getattr(tokenizer, "model_max_length", _LONGEST), _LONGEST)
    if source.tokenised:
        return functools.partial(_read_tokens, source, limit)
    if tokenizer is None:
        raise ValueError(f"{source.name} holds texts that are not tokenised: pass tokenizer=")
    special = tokenizer.num_special_tokens_to_add(source.width == 2)
    if limit <= special:
        raise ValueError(f"max_length={limit} leaves no room for text: the tokenizer adds {special} tokens of its own")
    # a call changes the truncation and padding that a tokenizer is saved with
    return functools.partial(_tokenise, copy.deepcopy(tokenizer), limit)


def _tokenise(tokenizer: Any, limit: int, rows: list[tuple[str, ...]]) -> Iterator[_Tokens]:
    encoded = tokenizer(*map(list, zip(*rows, strict=True)), truncation=True, max_length=limit, padding=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return ({key: encoded[key][index] for key in keys} for index in range(len(rows)))


def _read_tokens(source: Source, limit: int, rows: list[tuple[Any, ...]]) -> Iterator[_Tokens]:
    """Tokens of rows that are tokenised, without their padding."""
    for row in rows:
        if any(value is None for value in row):
            raise ValueError(f"{source.name} has a row without {' or '.join(source.columns)}: leave it out")
        values = {key: torch.as_tensor(value) for key, value in zip(source.columns, row, strict=True)}
        ids = values["input_ids"]
        mask = values.pop("attention_mask", torch.ones_like(ids))
        if ids.ndim != 1 or any(value.shape != ids.shape for value in (mask, *values.values())):
            raise ValueError(
                f"{source.name} has a row with input_ids of shape {tuple(ids.shape)}, attention_mask "
                f"{tuple(mask.shape)}, where a row is the tokens of one text: batches need no text_batches"
            )
        yield {key: value[mask.bool()][:limit].tolist() for key, value in values.items()}
