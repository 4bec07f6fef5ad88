"""SST-2, WiC and BoolQ from files made here, in the shapes of their editions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import transformers

from hf_rmt.tasks import TASKS, rows_of, split_training_rows


class _Words:
    """A tokenizer: a number for each word, 0 between two texts, cut as asked."""

    model_max_length = 1000

    def __init__(self) -> None:
        self.words = ["<sep>"]

    def __call__(self, *texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        rows = [" <sep> ".join(parts).split()[:max_length] for parts in zip(*texts, strict=True)]
        self.words += sorted({word for row in rows for word in row} - set(self.words))
        return {"input_ids": [[self.words.index(word) for word in row] for row in rows]}

    def text(self, row: dict[str, Any]) -> str:
        return " ".join(self.words[token] for token in row["input_ids"])


@pytest.fixture
def tokenizer() -> _Words:
    return _Words()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    """Tab-separated; the text's column has another name in each file, as published."""
    train = [f"{i % 2}\tphrase number {i % 50}\n" for i in range(60)]  # ten come twice
    (tmp_path / "train.tsv").write_text("label\tsentence\n" + "".join(train))
    (tmp_path / "dev.tsv").write_text("label\tcontent\n0\t\"an open quote\n1\tnull\n1\tit 's good\n")
    return tmp_path


@pytest.fixture
def wic(tmp_path: Path) -> Path:
    """Sentences are used several times: row i has the sentences i and i + 1 of a circle of 40."""
    rows = [
        {"word": f"w{i}", "sentence1": f"s{i % 40}", "sentence2": f"s{(i + 1) % 40}", "label": i % 3 == 0, "idx": i}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "val.jsonl", rows[:2])
    return tmp_path


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    """Two questions a passage; dev passages begin with a title, and its label has another name."""
    rows = [{"question": f"q{i}", "passage": f"passage {i // 2}", "answer": i % 2 == 0} for i in range(40)]
    write_jsonl(tmp_path / "train_subset.jsonl", rows)
    write_jsonl(
        tmp_path / "val.jsonl", [{"question": "is it", "passage": "A title -- it is -- so", "label": True, "idx": 0}]
    )
    return tmp_path


def test_sst2(sst2: Path, tokenizer: _Words) -> None:
    rows = rows_of("sst2", sst2, "dev", tokenizer)
    assert [tokenizer.text(row) for row in rows] == ['"an open quote', "null", "it 's good"]
    assert [row["labels"] for row in rows] == [0, 1, 1] and type(rows[0]["labels"]) is int
    assert len(rows_of("sst2", str(sst2), "train", tokenizer)) == 60


def test_wic(wic: Path, tokenizer: _Words) -> None:
    rows = rows_of("wic", wic, "dev", tokenizer)
    assert [tokenizer.text(row) for row in rows] == ["w0: s0 <sep> s1", "w1: s1 <sep> s2"]
    assert [row["labels"] for row in rows] == [1, 0]


def test_boolq(boolq: Path, tokenizer: _Words) -> None:
    assert [tokenizer.text(row) for row in rows_of("boolq", boolq, "dev", tokenizer)] == ["is it <sep> it is -- so"]
    train = rows_of("boolq", boolq, "train", tokenizer)
    assert tokenizer.text(train[0]) == "q0 <sep> passage 0" and [row["labels"] for row in train[:2]] == [1, 0]


def test_drawn_rows_and_their_length(sst2: Path, tokenizer: _Words) -> None:
    every = [tokenizer.text(row) for row in rows_of("sst2", sst2, "train", tokenizer)]
    drawn = [tokenizer.text(row) for row in rows_of("sst2", sst2, "train", tokenizer, count=20)]
    assert len(drawn) == 20 and set(drawn) <= set(every) and drawn != every[:20]
    again = rows_of("sst2", sst2, "train", tokenizer, count=20)
    assert [tokenizer.text(row) for row in again] == drawn
    other = rows_of("sst2", sst2, "train", tokenizer, count=20, seed=1)
    assert [tokenizer.text(row) for row in other] != drawn
    assert len(rows_of("sst2", sst2, "train", tokenizer, count=100)) == 60
    assert {len(row["input_ids"]) for row in rows_of("sst2", sst2, "train", tokenizer, max_length=2)} == {2}
    tokenizer.model_max_length = 1
    assert {len(row["input_ids"]) for row in rows_of("sst2", sst2, "train", tokenizer)} == {1}


def texts_apart(task: str, text: str) -> set[str]:
    """Texts of a row that must not be on both sides of a split."""
    parts = text.split(" <sep> ")
    return {parts[0].partition(": ")[2], parts[1]} if task == "wic" else {parts[-1]}


@pytest.mark.parametrize("task", ["sst2", "wic", "boolq"])
def test_no_text_is_on_both_sides(task: str, tokenizer: _Words, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(task)
    whole = [tokenizer.text(row) for row in rows_of(task, folder, "train", tokenizer)]
    for seed in range(3):
        train, held_out = split_training_rows(task, folder, tokenizer, train=None, held_out=8, seed=seed)
        assert len(held_out) == 8 and {row["labels"] for row in train} == {0, 1}
        apart = {text for row in held_out for text in texts_apart(task, tokenizer.text(row))}
        # all that shares no text is there, as often as in the file, and nothing else
        left = [text for text in whole if not texts_apart(task, text) & apart]
        assert sorted(tokenizer.text(row) for row in train) == sorted(left)


def test_a_split_is_drawn_by_its_seed(sst2: Path, tokenizer: _Words) -> None:
    def split(train: int | None, seed: int) -> tuple[list[str], list[str]]:
        sides = split_training_rows("sst2", sst2, tokenizer, train=train, held_out=10, seed=seed)
        return [tokenizer.text(row) for row in sides[0]], [tokenizer.text(row) for row in sides[1]]

    train, held_out = split(30, 0)
    assert len(train) == 30 and split(30, 0) == (train, held_out)
    assert split(5, 0) == (train[:5], held_out), "held out whatever the training takes"
    assert split(30, 1)[1] != held_out


def test_a_split_of_too_few_rows(boolq: Path, tokenizer: _Words) -> None:
    with pytest.raises(ValueError, match=r"has 40 training rows of boolq: with 10 of them held out .* of 39 asked for"):
        split_training_rows("boolq", boolq, tokenizer, train=39, held_out=10)
    with pytest.raises(ValueError, match="with 50 of them held out 0 are left"):
        split_training_rows("boolq", boolq, tokenizer, train=None, held_out=50)
    for sizes in ({"train": 0, "held_out": 1}, {"train": 1, "held_out": 0}):
        with pytest.raises(ValueError, match="give at least 1 of each"):
            split_training_rows("boolq", boolq, tokenizer, **sizes)


def test_other_kinds_of_files(tmp_path: Path, tokenizer: _Words) -> None:
    table = pd.DataFrame({"sentence": ["a, b", "null"], "label": [0, 1], "idx": [0, 1]})
    expected = [["a,", "b"], ["null"]]
    for suffix, write in ((".csv", table.to_csv), (".parquet", table.to_parquet)):
        path = tmp_path / f"validation-00000-of-00001{suffix}"
        write(path, index=False)
        rows = rows_of("sst2", tmp_path, "dev", tokenizer)
        assert [tokenizer.text(row).split() for row in rows] == expected
        path.unlink()


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: _Words) -> None:
    """One data set of several is asked for by its name, and where there is one alone without."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(source: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((source, config, split))
        if source == "owner/one" and config:
            raise ValueError("BuilderConfig 'sst2' not found. Available: ['default']")
        if source == "owner/none":
            raise datasets.exceptions.DatasetNotFoundError("does not exist")
        return datasets.Dataset.from_dict({"sentence": ["good"], "label": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("sst2", "owner/glue", "dev", tokenizer)[0]["labels"] == 1
    assert rows_of("sst2", "owner/one", "train", tokenizer)[0]["labels"] == 1
    assert asked == [
        ("owner/glue", "sst2", "validation"),
        ("owner/one", "sst2", "train"),
        ("owner/one", None, "train"),
    ]
    with pytest.raises(
        OSError, match=r"owner/none is neither a folder nor .*does not exist.*train and a dev file of sst2"
    ):
        rows_of("sst2", "owner/none", "dev", tokenizer)


def test_bad_sources(tmp_path: Path, sst2: Path, tokenizer: _Words) -> None:
    with pytest.raises(ValueError, match="task is 'cola': give one of sst2, wic, boolq"):
        rows_of("cola", sst2, "dev", tokenizer)
    with pytest.raises(ValueError, match="split is 'test': give one of train, dev"):
        rows_of("sst2", sst2, "test", tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dev\.tsv has no column word, only label, content"):
        rows_of("wic", sst2, "dev", tokenizer)
    (sst2 / "dev.tsv").write_text("label\tsentence\n-1\tof the test set\n")
    with pytest.raises(ValueError, match=r"dev\.tsv has a label .*-1.*, which is neither 0 nor 1"):
        rows_of("sst2", sst2, "dev", tokenizer)
    (sst2 / "dev.tsv").write_text("label\tsentence\n")
    with pytest.raises(ValueError, match=r"dev\.tsv has no rows"):
        rows_of("sst2", sst2, "dev", tokenizer)
    (sst2 / "dev.tsv").write_text("")
    with pytest.raises(ValueError, match=r"dev\.tsv cannot be read as \.tsv"):
        rows_of("sst2", sst2, "dev", tokenizer)
    (sst2 / "dev.csv").write_text("label,sentence\n1,x\n")
    with pytest.raises(FileNotFoundError, match=r"has dev\.csv, dev\.tsv: it must hold one dev\.\.\. or val\.\.\."):
        rows_of("sst2", sst2, "dev", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no file of the train split"):
        rows_of("sst2", tmp_path / "empty", "train", tokenizer)


def test_rows_train_and_evaluate_a_model(sst2: Path, make_model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from hf_rmt.evaluation import Accuracy

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "null": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    rows = rows_of("sst2", sst2, "dev", tokenizer)
    scores = Accuracy(rows)(make_model("bert_classifier"))
    assert len(scores.rows["accuracy"]) == 3 and scores.chance["accuracy"] == pytest.approx(2 / 3)
    assert list(TASKS) == ["sst2", "wic", "boolq"]
