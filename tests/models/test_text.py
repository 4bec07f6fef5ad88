from __future__ import annotations

import json
import os
import random
from collections import Counter
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from hf_rmt.models.text import text_batches, tokenizer_of

_WORDS = [f"w{i}" for i in range(30)]


def _word_level(**special: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*special.values(), *_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] a [SEP] b [SEP], types 0 and 1; its padding is 3, and on the left."""
    special = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    backend = _word_level(**special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    """As GPT-2's: no token of its own, none for padding."""
    return PreTrainedTokenizerFast(tokenizer_object=_word_level(unk_token="[UNK]"), unk_token="[UNK]")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(1, 25))) for _ in range(150)]


def _rows(batches) -> list[tuple[int, ...]]:
    """The tokens of every row whose mask is 1."""
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(tuple(ids[mask.bool()].tolist()))
    return rows


def _one_by_one(tokenizer, texts, **options) -> Counter:
    return Counter(
        tuple(tokenizer(*text if isinstance(text, tuple) else (text,), **options).input_ids) for text in texts
    )


def _equal(first, second) -> bool:
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", ["tokenizer", "bare"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_every_token_comes_once(name: str, batch_size: int, texts, request) -> None:
    tokenizer = request.getfixturevalue(name)
    batches = text_batches(texts, tokenizer, batch_size=batch_size)
    assert Counter(_rows(batches)) == _one_by_one(tokenizer, texts)
    assert all(len(batch["input_ids"]) <= batch_size for batch in batches)


def test_iterations_are_equal_and_len_counts_them(texts, tokenizer) -> None:
    batches = text_batches(texts, tokenizer, batch_size=4)
    assert len(batches) == 38
    assert _equal(batches, batches)
    assert len(list(batches)) == 38
    assert "batch_size=4" in repr(batches)


def test_len_knows_of_what_leaves_no_token(bare) -> None:
    """Without a word for the unknown, WordLevel drops it."""
    mute = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w0": 0}, unk_token="w1")))
    batches = text_batches(["w0", "", "w0", "  \n"], mute, batch_size=1)
    assert len(batches) == len(list(batches)) == 2
    limited = text_batches(["w0 w1", "w2 w3", "w4"], bare, batch_size=1, max_tokens=3)
    assert len(limited) == len(list(limited)) == 2


def test_padding_is_on_the_right_and_masked(texts, tokenizer) -> None:
    seen = set()
    for batch in text_batches(texts, tokenizer, batch_size=16):
        assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
        mask = batch["attention_mask"]
        assert all(value.dtype == torch.int64 and value.shape == mask.shape for value in batch.values())
        assert bool((mask.diff(dim=1) <= 0).all()) and bool(mask[:, 0].all()) and bool(mask[:, -1].any())
        assert bool((batch["input_ids"][mask == 0] == tokenizer.pad_token_id).all())
        seen.update(mask.flatten().tolist())
    assert seen == {0, 1}


def test_without_a_padding_token_it_is_zero(bare) -> None:
    (batch,) = text_batches(["w1 w2", "w3"], bare)
    assert batch["input_ids"].tolist() == [[4, 0], [2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert "token_type_ids" not in batch and bare.pad_token is None


def test_the_tokenizer_stays_as_it_is(minilm, texts) -> None:
    """MiniLM's is saved with truncation to 128 tokens, which every call of it would take out."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.model_max_length
    list(text_batches(texts, tokenizer, max_length=8))
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.model_max_length) == before


def test_real_batches_run_through_the_real_model(minilm) -> None:
    """A text gives the same output in a padded batch as alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    sentences = ["A short one.", "Eigenvalues of a large random matrix repel each other.", ""]
    (batch,) = text_batches(sentences, tokenizer)
    assert batch["input_ids"].shape[0] == 2
    with torch.no_grad():
        padded = model(**batch).last_hidden_state
        alone = model(**tokenizer(sentences[0], return_tensors="pt")).last_hidden_state
    assert torch.allclose(padded[0, : alone.shape[1]], alone[0], atol=1e-5)


def test_sorting_saves_padding(texts, tokenizer) -> None:
    def padding(batches) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    lengths = [len(tokenizer(text).input_ids) for text in texts]
    unsorted = sum(max(lengths[i : i + 8]) * len(lengths[i : i + 8]) for i in range(0, len(texts), 8)) - sum(lengths)
    assert padding(text_batches(texts, tokenizer, batch_size=8)) < unsorted / 3


def test_windows_are_tokenised_when_they_are_needed(texts, tokenizer) -> None:
    class Watched(list):
        read = 0

        def __iter__(self):
            for item in super().__iter__():
                self.read += 1
                yield item

    watched = Watched(texts)
    batches = text_batches(watched, tokenizer, batch_size=2)
    watched.read = 0
    next(iter(batches))
    assert watched.read <= 33  # 16 batches of 2, and the look at the first


@pytest.mark.parametrize("limit", [3, 10])
def test_longer_texts_are_truncated(texts, tokenizer, limit: int) -> None:
    rows = _rows(text_batches(texts, tokenizer, max_length=limit))
    assert Counter(rows) == _one_by_one(tokenizer, texts, truncation=True, max_length=limit)
    assert max(map(len, rows)) == limit


@pytest.mark.parametrize(("own", "expected"), [(10**30, 512), (20, 20)])
def test_limit_of_the_tokenizer_and_512(own: int, expected: int, bare) -> None:
    limited = PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer, model_max_length=own)
    (row,) = _rows(text_batches(["w1 " * 1000], limited))
    assert len(row) == expected
    (row,) = _rows(text_batches([{"input_ids": [1] * 1000}], limited))
    assert len(row) == expected


@pytest.mark.parametrize("wanted", [1, 30, 400, 10**6])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_max_tokens_ends_with_a_whole_text(texts, tokenizer, wanted: int, batch_size: int) -> None:
    """The first texts, whatever the batch size."""
    expected, total = [], 0
    for text in texts:
        if total < wanted:
            expected.append(text)
            total += len(tokenizer(text).input_ids)
    rows = _rows(text_batches(texts, tokenizer, batch_size=batch_size, max_tokens=wanted))
    assert Counter(rows) == _one_by_one(tokenizer, expected)


def test_pairs(texts, tokenizer) -> None:
    pairs = list(zip(texts[:60], texts[60:120], strict=True))
    batches = text_batches(pairs, tokenizer, batch_size=7)
    assert Counter(_rows(batches)) == _one_by_one(tokenizer, pairs)
    types = sum(int((batch["token_type_ids"] * batch["attention_mask"]).sum()) for batch in batches)
    assert types == sum(len(second.split()) + 1 for _, second in pairs)
    frame = pandas.DataFrame(pairs, columns=["premise", "hypothesis"])
    assert _equal(text_batches(frame, tokenizer, batch_size=7), batches)
    assert _equal(text_batches([list(pair) for pair in pairs], tokenizer, batch_size=7), batches)


def test_a_pair_with_one_side_empty_is_kept(tokenizer) -> None:
    batches = text_batches([("w1", ""), ("", ""), ("", "w2"), (None, "w3")], tokenizer)
    expected = tokenizer(["w1", "", ""], ["", "w2", "w3"]).input_ids
    assert Counter(_rows(batches)) == Counter(map(tuple, expected))


def test_labels_make_a_decoder_read_the_same_text(make_model, texts, bare) -> None:
    model = make_model("t5", vocab_size=64, decoder_start_token_id=0)
    for batch in text_batches(texts[:20], bare, batch_size=6, encoder_decoder=True):
        masked = batch["attention_mask"] == 0
        assert bool((batch["labels"][masked] == -100).all())
        assert torch.equal(batch["labels"][~masked], batch["input_ids"][~masked])
        assert bool(model(**batch).loss.isfinite())


def _write_text(path, texts):
    path.write_text("\n\n".join(texts) + "\n \n")


def _write_json_lines(path, texts):
    path.write_text("\n".join(json.dumps({"idx": i, "text": text}) for i, text in enumerate(texts)))


def _write_json(path, texts):
    path.write_text(json.dumps([{"text": text, "label": True} for text in texts], indent=1))


def _write_strings(path, texts):
    path.write_text(json.dumps(texts))


def _write_csv(path, texts):
    pandas.DataFrame({"label": 1, "sentence": texts}).to_csv(path, index=False)


def _write_tsv(path, texts):
    path.write_bytes("".join(f"{i}\t{text}\r\n" for i, text in enumerate(["sentence", *texts])).encode())


def _write_parquet(path, texts):
    pandas.DataFrame({"content": texts, "id": [str(i) for i in range(len(texts))]}).to_parquet(path)


FILES = {
    "a.txt": _write_text,
    "wiki.tokens": _write_text,
    "noname": _write_text,
    "a.jsonl": _write_json_lines,
    "lines.json": _write_json_lines,
    "list.json": _write_json,
    "strings.json": _write_strings,
    "a.csv": _write_csv,
    "a.TSV": _write_tsv,
    "a.parquet": _write_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_batches_of_the_list(name: str, texts, tokenizer, tmp_path) -> None:
    texts = [*texts, 'a "quoted word', "NA", "null", "caf\u00e9, 'w1' \u2028 w2"]
    path = tmp_path / name
    FILES[name](path, texts)
    expected = text_batches(texts, tokenizer, batch_size=5)
    assert _equal(text_batches(path, tokenizer, batch_size=5), expected)
    assert _equal(text_batches(str(path), tokenizer, batch_size=5), expected)
    assert len(text_batches(path, tokenizer, batch_size=5)) == len(expected)


class _OnlyGetItem:
    """A torch data set."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"text": self.texts[min(index, len(self.texts) - 1)]}


TABLES = {
    "dataset": lambda texts: datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}),
    "torch format": lambda texts: datasets.Dataset.from_dict({"n": [1] * len(texts), "s": texts}).with_format("torch"),
    "stream": lambda texts: datasets.Dataset.from_dict({"s": texts, "n": [1] * len(texts)}).to_iterable_dataset(),
    "generated": lambda texts: datasets.IterableDataset.from_generator(lambda: ({"n": 1, "s": text} for text in texts)),
    "splits": lambda texts: datasets.DatasetDict(
        test=datasets.Dataset.from_dict({"a": ["x"]}), train=datasets.Dataset.from_dict({"a": texts})
    ),
    "one split": lambda texts: datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": texts})),
    "frame": lambda texts: pandas.DataFrame({"label": 0, "anything": texts}),
    "dicts": lambda texts: [{"label": 0, "anything": text} for text in texts],
    "torch": _OnlyGetItem,
    "series": pandas.Series,
    "tuple": tuple,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gives_the_batches_of_the_list(kind: str, texts, tokenizer) -> None:
    """Whatever is missing or blank is left out."""
    batches = text_batches(TABLES[kind]([None, *texts[:50], " ", None, *texts[50:], ""]), tokenizer, batch_size=6)
    assert _equal(batches, text_batches(texts, tokenizer, batch_size=6))
    assert _equal(batches, batches)


def test_the_length_of_a_stream_is_known_afterwards(texts, tokenizer) -> None:
    batches = text_batches(TABLES["stream"](texts), tokenizer, batch_size=10)
    with pytest.raises(TypeError, match="is a stream"):
        len(batches)
    assert len(list(batches)) == 15 == len(batches)


@pytest.mark.parametrize(
    ("names", "columns", "expected"),
    [
        (["z", "text", "sentence"], None, ["text"]),
        (["passage", "question", "title"], None, ["question", "passage"]),
        (["word", "sentence2", "sentence1"], None, ["sentence1", "sentence2"]),
        (["a", "b", "text"], "b", ["b"]),
        (["a", "b", "text"], ["b"], ["b"]),
        (["a", "b", "text"], ("b", "a"), ["b", "a"]),
    ],
)
@pytest.mark.parametrize("kind", [pandas.DataFrame, datasets.Dataset.from_dict])
def test_columns(*, kind, names, columns, expected, texts, tokenizer) -> None:
    table = {name: texts[10 * i : 10 * i + 10] for i, name in enumerate(names)} | {"label": list(range(10))}
    wanted = list(zip(*(table[name] for name in expected), strict=True))
    plain = [row[0] for row in wanted] if len(expected) == 1 else wanted
    assert _equal(text_batches(kind(table), tokenizer, columns=columns), text_batches(plain, tokenizer))


@pytest.mark.parametrize("format_", [None, "torch", "numpy"])
def test_data_that_is_tokenised(format_, texts, tokenizer) -> None:
    """Its padding, on whichever side, is not kept; the text beside it is not read."""
    encoded = dict(tokenizer(texts, padding=True))  # on the left
    data = datasets.Dataset.from_dict({"text": ["other"] * len(texts), **encoded}).with_format(format_)
    expected = list(text_batches(texts, tokenizer, batch_size=9))
    assert _equal(text_batches(data, tokenizer, batch_size=9), expected)
    assert _equal(
        text_batches([{"text": text, **tokenizer(text)} for text in texts], tokenizer, batch_size=9), expected
    )
    assert _rows(text_batches(data, None, batch_size=9)) == _rows(expected)


def test_folders(texts, tokenizer, tmp_path) -> None:
    data = datasets.Dataset.from_dict({"a": texts})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    (tmp_path / "glue").mkdir()
    _write_tsv(tmp_path / "glue" / "train.tsv", texts)
    _write_tsv(tmp_path / "glue" / "dev.tsv", ["w1"])
    (tmp_path / "single").mkdir()
    _write_text(tmp_path / "single" / "wiki.valid.tokens", texts)
    (tmp_path / "single" / "README.md").write_text("none of it")
    expected = list(text_batches(texts, tokenizer))
    for folder in ("one", "two", "glue", "single"):
        assert _equal(text_batches(tmp_path / folder, tokenizer), expected), folder


@pytest.mark.parametrize(
    ("name", "found", "split"),
    [
        ("imdb", ("imdb", None), "train"),
        ("imdb:test[:10%]", ("imdb", None), "test[:10%]"),
        ("owner/set:validation", ("owner/set", None), "validation"),
        ("glue/sst2", ("glue", "sst2"), "train"),
        ("owner/set/config:test", ("owner/set", "config"), "test"),
    ],
)
def test_hub_ids(*, name: str, found, split: str, texts, tokenizer, monkeypatch) -> None:
    def load_dataset(path, config, split):
        if (path, config) != found:
            raise datasets.exceptions.DatasetNotFoundError(path)
        splits.append(split)
        return datasets.Dataset.from_dict({"a": texts})

    splits: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert _equal(text_batches(name, tokenizer), text_batches(texts, tokenizer))
    assert splits == [split]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("offline"), "nowhere/set is neither an existing .* Hub .offline"),
        (ValueError("Unknown split"), "nowhere/set cannot be loaded from the Hub: Unknown split"),
    ],
)
def test_hub_errors(error: Exception, message: str, tokenizer, monkeypatch) -> None:
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=message):
        text_batches("nowhere/set", tokenizer)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "the list of texts has no text"),
        ([None, None], {}, "the list of texts has no text"),
        (["", " \n"], {}, "the list of texts has no text with a token"),
        (pandas.DataFrame({"text": []}), {}, "the DataFrame of texts has no text"),
        ([{"input_ids": []}], {}, "no text with a token"),
        ([3, 4], {}, "begins with 3, which is no string"),
        (["w1", 4], {}, "row 1 of the list of texts holds 4, which is not a string"),
        (["w1", ("w1", "w2")], {}, "row 1 of the list of texts has 2 texts, the first 1"),
        ([("w1", "w2", "w3")], {}, "begins with .*no string, pair"),
        ((text for text in ["w1"]), {}, "generator of texts cannot be read several times"),
        (7, {}, "the int of texts cannot be read"),
        ({"text": ["w1"]}, {}, "is one dict: pass a list"),
        (["w1"], {"columns": "text"}, "has no columns to choose 'text' from"),
        ([{"a": "w1", "b": "w2"}], {}, r"columns a, b, of which a, b hold strings: choose with columns='name'"),
        ([{"a": 1}], {}, "of which none hold strings"),
        ([{"a": "w1"}], {"columns": "b"}, "no column 'b'; its columns are a"),
        ([{"a": "w1"}], {"columns": ()}, "not one or two"),
        ([{"a": 1}], {"columns": "a"}, "row 0 .* holds 1 in the columns a, which is not a string"),
        ([{"input_ids": [[1, 2]]}], {}, r"input_ids of shape \(1, 2\).*batches need no text_batches"),
        ([{"input_ids": [1]}, {"x": 1}], {}, "has a row without input_ids"),
        (["w1"], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (["w1"], {"max_tokens": 0}, "max_tokens must be at least 1"),
        (["w1"], {"max_length": -1}, "max_length must be at least 1"),
        ([("w1", "w2")], {"max_length": 3}, "max_length=3 leaves no room for text: the tokenizer adds 3"),
        ("./nowhere.x", {}, "nowhere.x does not exist"),
        ("data/train.jsonl", {}, "train.jsonl does not exist"),
        ("One text, not a list.", {}, "one text is passed as a list of one string"),
    ],
)
def test_bad_input(data, options, message: str, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        text_batches(data, tokenizer, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", r"empty.txt has no text"),
        ("binary.bin", b"\x80\xff\x00", r"binary.bin is not a file of UTF-8 text"),
        ("a.jsonl", b'{"text": "w1"}\n{"text":\n', r'a.jsonl does not hold one JSON value a line \({"text"'),
        ("a.json", b"[1, ", r"a.json cannot be read as .json"),
        ("empty.csv", b"", r"empty.csv cannot be read as .csv"),
        ("ragged.tsv", b"a\tb\n1\t2\t3\n1\t2\t3\t4\n", r"ragged.tsv cannot be read as .tsv"),
        ("a.parquet", b"no parquet", r"a.parquet cannot be read as .parquet"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tokenizer, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(text_batches(tmp_path / name, tokenizer))


def test_folders_that_leave_a_choice(tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no data file: pass the path"):
        text_batches(tmp_path, tokenizer)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("w1")
    with pytest.raises(ValueError, match=r"holds a.txt, b.txt: pass the path"):
        text_batches(tmp_path, tokenizer)
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"a": ["w1"]}) for name in ("x", "y")})
    with pytest.raises(ValueError, match="has the splits x, y: pass the one"):
        text_batches(splits, tokenizer)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="not tokenised: pass tokenizer="):
        text_batches(["w1"], None)


def test_tokenizer_of_a_model_from_a_folder(make_model, tokenizer, tmp_path, monkeypatch) -> None:
    make_model("bert").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    for source in (model, torch.compile(model), tmp_path, str(tmp_path)):
        assert tokenizer_of(source).get_vocab() == tokenizer.get_vocab()
    calls: list[dict] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: calls.append(options) or tokenizer)
    tokenizer_of(model)
    model.config._name_or_path = "a/folder/that/is/gone"
    tokenizer_of(model)
    assert all(call["local_files_only"] and not call["trust_remote_code"] for call in calls) and len(calls) == 2


def test_tokenizer_of_a_model_from_the_hub_is_that_of_its_commit(make_model, tokenizer, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **options: calls.append((name, options)) or tokenizer
    )
    model = make_model("bert")
    model.config._name_or_path, model.config._commit_hash = "owner/name", "abc"
    tokenizer_of(model)
    tokenizer_of("owner/other")
    shared = {"local_files_only": False, "trust_remote_code": False}
    assert calls == [("owner/name", {"revision": "abc", **shared}), ("owner/other", {"revision": None, **shared})]


def test_a_model_that_does_not_say_its_commit_is_known_by_the_cache(
    make_model, tokenizer, monkeypatch, tmp_path
) -> None:
    calls = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **options: calls.append((name, options)) or tokenizer
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    model = make_model("bert")
    model.config._name_or_path = "owner/name"
    tokenizer_of(model)
    assert calls == [("owner/name", {"revision": "abc", "local_files_only": False, "trust_remote_code": False})]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_no_tokenizer(family: str, make_model, tmp_path) -> None:
    """For some families transformers makes up an empty tokenizer, which knows no word."""
    model = make_model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__} was not loaded, .*: pass tokenizer="):
        tokenizer_of(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*pass tokenizer="):
        tokenizer_of(type(model).from_pretrained(tmp_path))


def test_tokenizer_of_what_has_no_configuration() -> None:
    with pytest.raises(ValueError, match=r"Linear was not loaded"):
        tokenizer_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=os.path.join("nowhere", "x") + " has no tokenizer"):
        tokenizer_of(SimpleNamespace(config=SimpleNamespace(_name_or_path="nowhere/x")))
