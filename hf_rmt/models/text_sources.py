"""Where texts come from: lists, data sets, tables, files, folders, the Hub."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Source:
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
        """Whether the rows hold tokens."""
        return "input_ids" in self.columns

    @property
    def sized(self) -> bool:
        """Whether the data has an end."""
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


def source_of(texts: Any, columns: str | Sequence[str] | None) -> Source:
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
        return Source(name, data, chosen, len(chosen))
    if columns is not None:
        raise ValueError(f"{name} has no columns to choose {columns!r} from: leave columns out")
    pair = isinstance(first, (tuple, list)) and len(first) == 2
    if not (pair or isinstance(first, str)):
        raise ValueError(f"{name} begins with {first!r:.60}, which is no string, pair of strings or dict")
    return Source(name, data, (), 2 if pair else 1)


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
