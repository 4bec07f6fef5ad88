"""Three data sets for the fine-tuning and evaluation of classifiers: SST-2, WiC and BoolQ."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

Split = Literal["train", "dev"]
#: Rows of token ids, with ``labels``.
TokenRows = list[dict[str, Any]]

#: How the files and the Hub's splits of each split are named.
_FILES = {"train": ("train",), "dev": ("dev", "val")}
_SPLITS = {"train": "train", "dev": "validation"}
_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Task:
    """Where a data set has its texts and labels, under the names that its editions use.

    Attributes:
        texts: for each text of a row, the columns that may hold it.
        labels: the columns that may hold the label.
        apart: numbers of the texts that rows held out do not share with those trained on.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...] = ("label",)
    apart: tuple[int, ...] = (0,)


#: The data sets by name.
TASKS = {
    "sst2": Task((("sentence", "content"),)),
    "wic": Task((("word",), ("sentence1",), ("sentence2",)), apart=(1, 2)),
    "boolq": Task((("question",), ("passage",)), ("label", "answer"), apart=(1,)),
}


def rows_of(  # noqa: PLR0913
    task: str,
    source: str | Path,
    split: Split,
    tokenizer: Any,
    *,
    count: int | None = None,
    seed: int = 0,
    max_length: int = 256,
) -> TokenRows:
    """Rows of a split, tokenised, for a ``Trainer`` or ``Accuracy``.

    Args:
        task: a name in ``TASKS``.
        source: a folder with a file of the split, named train... or dev... (or val...), of .tsv, .csv,
            .jsonl or .parquet; or a Hub id, such as ``nyu-mll/glue``.
        split: ``"train"`` or ``"dev"``.
        tokenizer: of the model.
        count: so many rows, drawn at random; None for all.
        seed: of the draw.
        max_length: texts are cut to so many tokens.

    Returns:
        Dicts of token ids, with the label as ``labels``.

    Raises:
        ValueError: an unknown task or split, or a table without the columns, the labels or the rows.
        OSError: no such folder, file or Hub data set.
    """
    table = _table(task, source, split)
    if count is not None and count < len(table):
        table = table.sample(count, random_state=seed)
    return _tokenised(table, task, tokenizer, max_length)


def split_training_rows(  # noqa: PLR0913
    task: str,
    source: str | Path,
    tokenizer: Any,
    *,
    train: int | None,
    held_out: int,
    seed: int = 0,
    max_length: int = 256,
) -> tuple[TokenRows, TokenRows]:
    """Training rows, and others that are kept out of training, to evaluate on.

    No sentence of SST-2 and WiC and no passage of BoolQ is in both; rows that would share one are left out. (Most
    rows of SST-2 are phrases out of longer sentences, and parts of one sentence may be in both.) For a seed, the
    rows held out do not depend on ``train``.

    Args:
        task: a name in ``TASKS``.
        source: see ``rows_of``.
        tokenizer: of the model.
        train: number of rows for training; None for all that are left.
        held_out: number of rows kept out of training.
        seed: of the draw.
        max_length: texts are cut to so many tokens.

    Returns:
        The rows for training and those held out.

    Raises:
        ValueError: fewer rows than asked for; see ``rows_of``.
        OSError: no such folder, file or Hub data set.
    """
    table = _table(task, source, "train")
    if held_out < 1 or (train is not None and train < 1):
        raise ValueError(f"train is {train!r} and held_out {held_out!r}: give at least 1 of each")
    table = table.sample(frac=1, random_state=seed)
    out, left = table[:held_out], table[held_out:]
    apart = [str(index) for index in TASKS[task].apart]
    seen = set(out[apart].to_numpy().ravel())
    left = left[~left[apart].isin(seen).any(axis=1)][:train]
    if len(out) < held_out or len(left) < (train or 1):
        raise ValueError(
            f"{source} has {len(table)} training rows of {task}: with {held_out} of them held out {len(left)} are left "
            f"that share no text with these, of {train or 'any'} asked for"
        )
    return _tokenised(left, task, tokenizer, max_length), _tokenised(out, task, tokenizer, max_length)


def _tokenised(table: pd.DataFrame, task: str, tokenizer: Any, max_length: int) -> TokenRows:
    parts = [table[str(index)].tolist() for index in range(len(TASKS[task].texts))]
    if task == "wic":  # the word stands before its first sentence
        parts = [[f"{word}: {sentence}" for word, sentence in zip(*parts[:2], strict=True)], parts[2]]
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    encoded = tokenizer(*parts, truncation=True, max_length=limit)
    return [{key: encoded[key][i] for key in encoded} | {"labels": label} for i, label in enumerate(table["labels"])]


def _table(task: str, source: str | Path, split: str) -> pd.DataFrame:
    """The texts of a split as columns ``"0"``, ``"1"``, ..., and ``labels``."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: give one of {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}: give one of {', '.join(_SPLITS)}")
    name, table = _from_folder(Path(source), split) if Path(source).is_dir() else _from_hub(task, str(source), split)
    chosen = [_column(name, table, columns) for columns in (*TASKS[task].texts, TASKS[task].labels)]
    if not len(table):
        raise ValueError(f"{name} has no rows")
    *texts, labels = (table[column] for column in chosen)
    if not labels.isin([0, 1]).all():  # a test set has -1
        wrong = labels[~labels.isin([0, 1])].iloc[0]
        raise ValueError(f"{name} has a label {wrong!r}, which is neither 0 nor 1: give rows with their labels")
    found = pd.DataFrame({str(index): text.astype(str) for index, text in enumerate(texts)})
    if task == "boolq":  # the published dev set puts a title before the passage, the training set does not
        found["1"] = [passage.partition(" -- ")[2] or passage for passage in found["1"]]
    return found.assign(labels=labels.astype(int))


def _column(name: str, table: pd.DataFrame, columns: tuple[str, ...]) -> str:
    found = next((column for column in columns if column in table), None)
    if found is None:
        raise ValueError(f"{name} has no column {' or '.join(columns)}, only {', '.join(map(str, table.columns))}")
    return found


def _from_folder(folder: Path, split: str) -> tuple[str, pd.DataFrame]:
    """The one file of a split."""
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _SUFFIXES and path.name.lower().startswith(_FILES[split])
    ]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"no file of the {split} split"
        wanted = " or ".join(f"{name}..." for name in _FILES[split])
        raise FileNotFoundError(f"{folder} has {names}: it must hold one {wanted}, of {', '.join(_SUFFIXES)}")
    try:
        return str(found[0]), _read(found[0])
    except ValueError as error:  # what the parsers raise
        raise ValueError(f"{found[0]} cannot be read as {found[0].suffix}: {error}") from error


def _read(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.read_json(path, lines=True)
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    return pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)  # "null" is a word


def _from_hub(task: str, source: str, split: str) -> tuple[str, pd.DataFrame]:
    import datasets

    def load(config: str | None) -> pd.DataFrame:
        return datasets.load_dataset(source, config, split=_SPLITS[split]).to_pandas()

    name = f"{source} ({_SPLITS[split]})"
    try:
        try:
            return name, load(task)
        except ValueError:  # not one data set of several
            return name, load(None)
    except Exception as error:  # of datasets, the Hub's client or the network
        raise OSError(
            f"{source} is neither a folder nor a data set of the Hub that can be loaded ({error}): give a folder "
            f"with a train and a dev file of {task}"
        ) from error
