"""Text in: batches of token ids, made with the model's own tokenizer."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Texts are sorted by length within so many batches.
_WINDOW = 16
#: Longest text in tokens where the caller sets no other.
_LONGEST = 512
#: Columns that hold the text by convention, in order of preference.
_CONVENTIONAL = (
    ("text",),
    ("sentence",),
    ("content",),
    ("question", "passage"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)
_TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
#: Rows that are looked at to find the columns that hold strings.
_SAMPLE = 100
_DATA_SUFFIXES = (".txt", ".tokens", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: name, owner/name, name/config or owner/name/config, and a split
_HUB_ID = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+){0,2})(?::(?P<split>[\w.:%+\[\]-]+))?")

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
    source = _source_of(texts, columns)
    encode = _encoder(source, tokenizer, max_length)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return TextBatches(
        source=source, encode=encode, batch_size=batch_size, max_tokens=max_tokens, pad=pad, labels=encoder_decoder
    )


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that a model was saved with.

    Args:
        model: a model, or the folder or Hub id of one. Nothing is fetched for a model from a local folder.

    Raises:
        ValueError: it names no tokenizer, or has none.
    """
    from transformers import AutoTokenizer

    from hf_rmt.models.live import unwrap

    if isinstance(model, (str, os.PathLike)):
        name, revision, local = str(model), None, os.path.isdir(model)
    else:
        config: Any = getattr(unwrap(model), "config", None)
        name, revision = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
        local = os.path.isdir(name) or revision is None  # what came from the Hub knows its commit
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

    source: _Source
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
    source: _Source, tokenizer: Any, max_length: int | None
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


def _read_tokens(source: _Source, limit: int, rows: list[tuple[Any, ...]]) -> Iterator[_Tokens]:
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


@dataclass(frozen=True)
class _Source:
    """Rows of text, or of tokens, that can be read again and again.

    Attributes:
        name: for messages.
        data: what holds the rows.
        columns: those to be read; none where the rows are strings or pairs.
        width: number of entries in a row.
    """

    name: str
    data: Any
    columns: tuple[str, ...]
    width: int

    @property
    def tokenised(self) -> bool:
        return "input_ids" in self.columns

    @property
    def sized(self) -> bool:
        return isinstance(self.data, _Lines) or hasattr(self.data, "__len__")

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Rows that are not empty."""
        if self.tokenised:
            return _columns(self.data, self.columns)
        if self.columns:
            return self._texts(_columns(self.data, self.columns))
        return self._texts(tuple(item) if isinstance(item, (tuple, list)) else (item,) for item in _items(self.data))

    def _texts(self, every: Iterator[tuple[Any, ...]]) -> Iterator[tuple[str, ...]]:
        for index, row in enumerate(every):
            parts = ["" if _is_missing(part) else part for part in row]
            wrong = next((part for part in parts if not isinstance(part, str)), None)
            if wrong is not None:
                where = f" in the columns {', '.join(self.columns)}" if self.columns else ""
                raise ValueError(f"row {index} of {self.name} holds {wrong!r:.60}{where}, which is not a string")
            if any(part.strip() for part in parts):
                if len(parts) != self.width:
                    raise ValueError(f"row {index} of {self.name} has {len(parts)} texts, the first {self.width}")
                yield tuple(parts)


def _source_of(texts: Any, columns: str | Sequence[str] | None) -> _Source:
    """Find the rows and the columns to be read."""
    if isinstance(texts, (str, os.PathLike)):
        name, data = str(texts), _load(str(texts))
    else:
        name, data = f"the {type(texts).__name__} of texts", texts
    if isinstance(data, Mapping):
        data = _only_split(name, data)
    if hasattr(data, "__next__") or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ValueError(f"{name} cannot be read several times: pass a list of strings, a data set or a file")
    empty = hasattr(data, "__len__") and len(data) == 0
    first = {} if _is_table(data) else next((item for item in _items(data) if not _is_missing(item)), None)
    if empty or first is None:
        raise ValueError(f"{name} has no text in it")
    if isinstance(first, Mapping):
        chosen = _choose(name, data, _column_names(data, first), columns)
        return _Source(name, data, chosen, len(chosen))
    if columns is not None:
        raise ValueError(f"{name} has no columns to choose {columns!r} from: leave columns out")
    pair = isinstance(first, (tuple, list)) and len(first) == 2
    if not (pair or isinstance(first, str)):
        raise ValueError(f"{name} begins with {first!r:.60}, which is no string, pair of strings or dict")
    return _Source(name, data, (), 2 if pair else 1)


def _choose(name: str, data: Any, names: list[str], columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns to be read."""
    if columns is not None:
        chosen = (columns,) if isinstance(columns, str) else tuple(columns)
        missing = [column for column in chosen if column not in names]
        if missing or len(chosen) not in (1, 2):
            wrong = f"no column {missing[0]!r}" if missing else f"columns={columns!r}, which is not one or two"
            raise ValueError(f"{name}: {wrong}; its columns are {', '.join(map(str, names))}")
        return chosen
    if "input_ids" in names:
        return tuple(column for column in _TOKEN_COLUMNS if column in names)
    strings = _string_columns(data, names)
    if len(strings) == 1:
        return (strings[0],)
    for convention in _CONVENTIONAL:
        if set(convention) <= set(strings):
            return convention
    raise ValueError(
        f"{name} has the columns {', '.join(map(str, names))}, of which {', '.join(strings) or 'none'} hold strings: "
        "choose with columns='name', or columns=('first', 'second') for pairs"
    )


def _string_columns(data: Any, names: list[str]) -> list[str]:
    if features := getattr(data, "features", None):
        return [column for column in names if "string" in str(getattr(features[column], "dtype", ""))]
    sample = list(itertools.islice(_columns(data, names), _SAMPLE))
    found = []
    for index, column in enumerate(names):
        known = [row[index] for row in sample if not _is_missing(row[index])]
        if known and all(isinstance(value, str) for value in known):
            found.append(column)
    return found


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_frame(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _is_dataset(data: Any) -> bool:
    """A Dataset or IterableDataset of the datasets library."""
    return hasattr(data, "column_names") and hasattr(data, "with_format")


def _is_table(data: Any) -> bool:
    return _is_frame(data) or _is_dataset(data)


def _items(data: Any) -> Iterator[Any]:
    """The items, also of a torch data set that only has ``__getitem__`` and ``__len__``."""
    return iter(data) if hasattr(data, "__iter__") else (data[index] for index in range(len(data)))


def _column_names(data: Any, first: Mapping[str, Any]) -> list[str]:
    if _is_frame(data):
        return list(data.columns)
    if _is_dataset(data):
        return data.column_names or list(next(iter(data), {}))  # a stream may not know them
    return list(first)


def _columns(data: Any, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of some columns."""
    if _is_frame(data):
        values = (data[column].astype(object).where(data[column].notna(), None) for column in columns)
        yield from zip(*values, strict=True)
    elif _is_dataset(data):
        for chunk in data.with_format(None).select_columns(list(columns)).iter(batch_size=1000):
            yield from zip(*(chunk[column] for column in columns), strict=True)
    else:
        for row in _items(data):
            if not _is_missing(row):
                yield tuple(row.get(column) for column in columns)


def _only_split(name: str, splits: Mapping[str, Any]) -> Any:
    """The split to read of a DatasetDict: train, or the only one."""
    if not all(_is_dataset(split) for split in splits.values()):
        raise ValueError(f"{name} is one {type(splits).__name__}: pass a list of texts, or of dicts, one for each text")
    if "train" in splits:
        return splits["train"]
    if len(splits) != 1:
        raise ValueError(f"{name} has the splits {', '.join(splits) or 'none'}: pass the one to be read")
    return next(iter(splits.values()))


class _Lines:
    """The lines of a file that are not empty, read anew in every iteration."""

    def __init__(self, path: Path, parse: Callable[[str], Any] = str):
        self.path = path
        self.parse = parse

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                yield from (self.parse(line.rstrip("\n")) for line in file if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not a file of UTF-8 text ({error})") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} does not hold one JSON value a line ({error.doc:.60}: {error.msg}); "
                "a .json file may also be one list"
            ) from error


def _load(texts: str) -> Any:
    """The data of a file, a folder or the Hub."""
    if os.path.isdir(texts):
        return _load_folder(Path(texts))
    if os.path.exists(texts):
        return _load_file(Path(texts))
    if texts.startswith((".", "~", os.sep)) or texts.endswith(_DATA_SUFFIXES):
        raise ValueError(f"{texts} does not exist")
    if (match := _HUB_ID.fullmatch(texts)) is None:
        raise ValueError(f"{texts[:100]!r} is no file, folder or Hub id; one text is passed as a list of one string")
    return _load_from_hub(texts, match["path"].split("/"), match["split"] or "train")


def _load_file(path: Path) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json" and (whole := path.read_text(encoding="utf-8-sig")).lstrip().startswith("["):
            return json.loads(whole)
        if suffix in (".csv", ".tsv", ".parquet"):
            return _load_frame(path, suffix)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as {suffix}: {error}") from error
    return _Lines(path, json.loads if suffix in (".json", ".jsonl") else str)


def _load_frame(path: Path, suffix: str) -> Any:
    import csv

    import pandas

    if suffix == ".parquet":
        return pandas.read_parquet(path)
    # "NA" and "null" are words here, and the type of a column is that of all its rows
    literal: dict[str, Any] = {"keep_default_na": False, "low_memory": False}
    if suffix == ".tsv":  # those of GLUE hold single quotation marks
        return pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, **literal)
    return pandas.read_csv(path, **literal)


def _load_folder(folder: Path) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _datasets(str(folder)).load_from_disk(str(folder))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _DATA_SUFFIXES)
    named = [path for path in files if "train" in path.name.lower()]
    found = named or files
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "no data file"
        raise ValueError(f"{folder} holds {what}: pass the path of the one file to be read")
    return _load_file(found[0])


def _load_from_hub(texts: str, parts: list[str], split: str) -> Any:
    """A data set of the Hub; ``a/b`` is taken as owner/name, then as name/config."""
    library = _datasets(texts)
    candidates = [(parts[0], parts[1])] if len(parts) == 2 else []
    whole = ("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)
    for name, config in (whole, *candidates):
        try:
            return library.load_dataset(name, config, split=split)
        except OSError as error:  # not found, or not to be reached
            reason: Exception = error
        except ValueError as error:  # found, but without this configuration or split
            raise ValueError(f"{texts} cannot be loaded from the Hub: {error}") from error
    raise ValueError(f"{texts} is neither an existing file or folder nor a data set of the Hub ({reason})") from reason


def _datasets(texts: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {texts} needs the datasets library: pip install datasets") from error
    return datasets
