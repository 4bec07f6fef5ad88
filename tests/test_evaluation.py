"""Accuracy and perplexity against row-by-row loops without padding, sklearn and transformers' own loss."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score
from torch import nn

from hf_rmt import evaluation
from hf_rmt.evaluation import Accuracy, Perplexity, Scores, accuracy_metric, perplexity_metric, row_likelihoods
from hf_rmt.processes import gather, rank_and_count

Maker = Callable[..., Any]
CLASSIFIERS = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
    "llama": transformers.LlamaForSequenceClassification,
}
CAUSAL = ["gpt2", "llama"]
CLASSES = 3


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def token_rows(count: int = 37, seed: int = 0, longest: int = 23) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, 100, (length,), generator=generator).tolist() for length in lengths]


def labelled(count: int = 37) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": (7 * i) % 5 % CLASSES} for i, ids in enumerate(token_rows(count))]


@pytest.fixture
def classifier(make_model: Maker) -> Callable[[str], Any]:
    def make(family: str) -> Any:
        config = make_model(family).config
        config.num_labels, config.pad_token_id = CLASSES, 0
        torch.manual_seed(1)
        model = CLASSIFIERS[family](config).double().eval()
        for parameter in model.parameters():  # answers that differ from row to row
            parameter.data.mul_(3 if parameter.ndim == 2 else 1)
        return model

    return make


def answers(model: nn.Module, rows: list[dict[str, Any]]) -> list[int]:
    """One row at a time."""
    with torch.no_grad():
        return [int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in rows]


def likelihoods(model: nn.Module, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood and predicted tokens of each row: one row at a time, by the definition."""
    totals, counts = [], []
    for ids in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        totals.append(sum(-math.log(probabilities[i, ids[i + 1]]) for i in range(len(ids) - 1)))
        counts.append(len(ids) - 1)
    return np.array(totals), np.array(counts)


# Accuracy


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_accuracy_is_that_of_one_row_at_a_time(classifier: Maker, family: str) -> None:
    model, rows = classifier(family), labelled()
    truth = [row["labels"] for row in rows]
    found = answers(model, rows)
    assert len(set(found)) > 1 and 0 < accuracy_score(truth, found) < 1
    scores = Accuracy(rows)(model)
    assert scores == {"accuracy": pytest.approx(accuracy_score(truth, found), abs=1e-15)}
    assert scores.rows["accuracy"].values.tolist() == [float(a == b) for a, b in zip(truth, found, strict=True)]
    assert scores.rows["accuracy"].weights.tolist() == [1.0] * len(rows)
    assert scores.rows["accuracy"].score() == pytest.approx(scores["accuracy"], abs=1e-15)
    assert scores.chance == {"accuracy": max(truth.count(label) for label in truth) / len(truth)}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_padding_batches_and_threads_do_not_matter(classifier: Maker, family: str) -> None:
    model, rows = classifier(family), labelled()
    expected = Accuracy(rows)(model).rows["accuracy"].values
    width = max(len(row["input_ids"]) for row in rows)

    def padded(row: dict[str, Any], left: bool) -> dict[str, Any]:
        pad = [0] * (width - len(row["input_ids"]))
        ones = [1] * len(row["input_ids"])
        return {
            "input_ids": pad + row["input_ids"] if left else row["input_ids"] + pad,
            "attention_mask": pad + ones if left else ones + pad,
            "label": row["labels"],
        }

    for left in (True, False):
        assert torch.equal(Accuracy([padded(row, left) for row in rows])(model).rows["accuracy"].values, expected)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 64}, {"batch_tokens": 10**9}, {"workers": 1}, {"workers": 3}):
        assert torch.equal(Accuracy(rows, **options)(model).rows["accuracy"].values, expected), options


def test_rows_in_every_form_are_the_same_rows(classifier: Maker) -> None:
    import datasets

    model, rows = classifier("bert"), labelled()
    expected = Accuracy(rows)(model)
    labels = [row["labels"] for row in rows]
    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": torch.zeros(2, 9).long(), "attention_mask": torch.ones(2, 9).long()}
    forms: list[Accuracy] = [
        Accuracy(datasets.Dataset.from_list(rows)),
        Accuracy(datasets.Dataset.from_list(rows).with_format("torch")),
        Accuracy(pd.DataFrame(rows)),
        Accuracy({"input_ids": ids}, labels=labels),
        Accuracy(
            [{"input_ids": torch.tensor(row), "labels": torch.tensor(y)} for row, y in zip(ids, labels, strict=True)]
        ),
        Accuracy([{**row, "idx": 5, "text": "not read"} for row in rows]),
    ]
    for form in forms:
        assert form.identity() == Accuracy(rows).identity()
        assert torch.equal(form(model).rows["accuracy"].values, expected.rows["accuracy"].values)
    assert len(Accuracy([batch | {"labels": torch.tensor([0, 1])}])(model).rows["accuracy"]) == 2


def test_token_types_are_passed_on(classifier: Maker) -> None:
    model, rows = classifier("bert"), labelled()
    model.bert.embeddings.token_type_embeddings.weight.data.mul_(50)
    typed = [row | {"token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]} for row in rows]
    with torch.no_grad():
        found = [
            int(model(**{k: torch.tensor([row[k]]) for k in ("input_ids", "token_type_ids")}).logits.argmax())
            for row in typed
        ]
    assert found != answers(model, rows)
    expected = [float(a == row["labels"]) for a, row in zip(found, rows, strict=True)]
    assert Accuracy(typed)(model).rows["accuracy"].values.tolist() == expected


def test_accuracy_of_tokens(make_model: Maker) -> None:
    config = make_model("bert").config
    config.num_labels = CLASSES
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config).double().eval()
    rows = [
        {"input_ids": ids, "labels": [-100 if (i + j) % 4 == 0 else (i * j) % CLASSES for j in range(len(ids))]}
        for i, ids in enumerate(token_rows())
    ]
    rows.append({"input_ids": [1, 2], "labels": [-100, -100]})
    truth, found, shares = [], [], []
    for row in rows:
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        kept = [(a, b) for a, b in zip(row["labels"], own, strict=True) if a != -100]
        truth += [a for a, _ in kept]
        found += [b for _, b in kept]
        shares.append(sum(a == b for a, b in kept) / len(kept) if kept else 0.0)
    scores = Accuracy(rows, batch_tokens=50)(model)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, found), abs=1e-15)
    assert scores.rows["accuracy"].values.tolist() == pytest.approx(shares)
    assert scores.rows["accuracy"].score() == pytest.approx(scores["accuracy"])
    assert scores.rows["accuracy"].weights[-1] == 0


# Perplexity


@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_is_that_of_one_row_at_a_time(make_model: Maker, family: str) -> None:
    model, rows = make_model(family).double(), token_rows()
    totals, counts = likelihoods(model, rows)
    scores = Perplexity(rows)(model)
    assert scores == {"perplexity": pytest.approx(math.exp(totals.sum() / counts.sum()), rel=1e-12)}
    own = scores.rows["perplexity"]
    assert own.exponential and own.weights.tolist() == counts.tolist()
    assert own.values.tolist() == pytest.approx((totals / counts).tolist(), rel=1e-12)
    assert own.score() == pytest.approx(scores["perplexity"], rel=1e-12)
    single = Perplexity(rows)(copy.deepcopy(model).float())
    assert single["perplexity"] == pytest.approx(scores["perplexity"], rel=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_of_equal_rows_is_the_loss_of_transformers(make_model: Maker, family: str) -> None:
    model, ids = make_model(family), torch.randint(1, 100, (6, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert Perplexity(ids)(model)["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    found = Perplexity([{"input_ids": ids, "labels": labels}])(model)
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found.rows["perplexity"].weights.tolist() == (labels[:, 1:] != -100).sum(1).tolist()


@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_whatever_the_batches(make_model: Maker, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(family).double(), token_rows()
    expected = Perplexity(rows)(model).rows["perplexity"].values
    width = max(map(len, rows))
    lefts = [
        {"input_ids": [9] * (width - len(ids)) + ids, "attention_mask": [0] * (width - len(ids)) + [1] * len(ids)}
        for ids in rows
    ]
    right = {
        "input_ids": torch.tensor([ids + [9] * (width - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]),
    }
    batches = [{key: value[start : start + 5] for key, value in right.items()} for start in range(0, len(rows), 5)]
    same: list[Perplexity] = [Perplexity(lefts), Perplexity([right]), Perplexity(batches), Perplexity(right)]
    same += [Perplexity(rows, batch_tokens=size) for size in (1, 40, 10**9)]
    same += [Perplexity(rows, workers=count) for count in (1, 3)]
    for one in same:
        assert torch.allclose(one(model).rows["perplexity"].values, expected, rtol=1e-12, atol=0)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_A_TIME", 700)  # seven tokens
    monkeypatch.setattr(evaluation, "_LOGITS", {"cpu": 1})
    assert torch.allclose(Perplexity(rows)(model).rows["perplexity"].values, expected, rtol=1e-12, atol=0)


def test_a_row_of_one_token_counts_for_nothing(make_model: Maker) -> None:
    model, rows = make_model("llama").double(), token_rows(5)
    scores = Perplexity([[4], *rows])(model)
    assert scores["perplexity"] == Perplexity(rows)(model)["perplexity"]
    assert scores.rows["perplexity"].weights[0] == 0 and len(scores.rows["perplexity"]) == 6


def test_likelihoods_in_low_precision_and_without_full_logits() -> None:
    logits = 30 * torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1, -100, 3, 4, 5], [-100] * 5])
    exact = -logits[0].log_softmax(-1)[torch.arange(5), targets[0].clamp(0)][targets[0] >= 0].sum()
    assert row_likelihoods(logits, targets).tolist() == pytest.approx([float(exact), 0.0], rel=1e-14)
    half = logits.bfloat16()
    assert row_likelihoods(half, targets)[0] == pytest.approx(
        float(row_likelihoods(half.double(), targets)[0]), rel=1e-6
    )
    logits[0, 0, 1] = -math.inf
    assert row_likelihoods(logits, targets)[0] == math.inf


# Texts


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film", "a", "very"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = ["a good film", "a very very bad film", "bad", "film film", "a good good good film"]


def test_texts_with_labels(classifier: Maker, tokenizer: Any) -> None:
    import datasets

    model = classifier("bert")
    labels = [1, 0, 0, 1, 2]
    table = {"sentence": TEXTS, "label": labels}
    tokenised = [
        {"input_ids": tokenizer(text)["input_ids"], "labels": y} for text, y in zip(TEXTS, labels, strict=True)
    ]
    expected = [float(a == b) for a, b in zip(answers(model, tokenised), labels, strict=True)]
    for form in (
        Accuracy(TEXTS, tokenizer, labels=labels),
        Accuracy(datasets.Dataset.from_dict(table), tokenizer),
        Accuracy(pd.DataFrame(table), tokenizer, columns="sentence"),
        Accuracy(tokenizer(TEXTS, padding=True), labels=labels),
    ):
        assert form(model).rows["accuracy"].values.tolist() == expected
    cut = Accuracy(TEXTS, tokenizer, labels=labels, max_length=1)
    assert cut.identity()["tokens"] == len(TEXTS)
    with pytest.raises(ValueError, match="5 labels for 4 rows"):
        Accuracy(["", *TEXTS[1:]], tokenizer, labels=labels)
    with pytest.raises(ValueError, match="1 of 5 rows hold no text"):
        Accuracy(pd.DataFrame(table | {"sentence": ["", *TEXTS[1:]]}), tokenizer)


def test_texts_of_a_causal_model(make_model: Maker, tokenizer: Any, tmp_path: Any) -> None:
    model = make_model("llama").double()
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    totals, counts = likelihoods(model, [tokenizer(text)["input_ids"] for text in TEXTS])
    for form in (
        Perplexity(TEXTS, tokenizer),
        Perplexity(["", *TEXTS], tokenizer),
        Perplexity(tmp_path / "texts.txt", tokenizer),
    ):
        scores = form(model)
        assert scores["perplexity"] == pytest.approx(math.exp(totals.sum() / counts.sum()), rel=1e-12)
        assert scores.rows["perplexity"].weights.tolist() == counts.tolist()  # in their order
    with pytest.raises(ValueError, match="pass tokenizer="):
        Perplexity(TEXTS)


# The model stays as it is


class _Fails(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")


def test_the_mode_of_every_module_comes_back(classifier: Maker) -> None:
    model = classifier("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = Accuracy(labelled())(model)
    assert Accuracy(labelled())(model) == first, "dropout is off"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    model.classifier = _Fails()
    with pytest.raises(RuntimeError, match="out of luck"):
        Accuracy(labelled())(model)
    assert [module.training for module in model.modules()][: len(modes) - 1] == modes[:-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_training_goes_on_after_an_evaluation(make_model: Maker, workers: int) -> None:
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).train()
    Perplexity(token_rows(), workers=workers)(model)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.is_grad_enabled() and torch.get_num_threads() >= 1


def test_threads_run_only_what_threads_can_run(make_model: Maker, classifier: Maker) -> None:
    assert evaluation._can_be_shared(classifier("bert"))
    assert not evaluation._can_be_shared(nn.Linear(2, 2))
    hooked = classifier("bert")
    hooked.classifier.register_forward_hook(lambda *_: None)
    assert not evaluation._can_be_shared(hooked)
    changing = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert not evaluation._can_be_shared(changing)
    with torch.autocast("cpu", torch.bfloat16):
        assert not evaluation._can_be_shared(classifier("bert"))


def test_wrapped_and_compiled_models(classifier: Maker) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    model, rows = classifier("bert"), labelled()
    expected = Accuracy(rows)(model)
    assert Accuracy(rows)(torch.compile(model)) == expected
    assert Accuracy(rows)(get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS))) == expected


class _Logits(nn.Module):
    """No model of transformers: logits as they are."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits[input_ids[:, 0]]


def test_any_module_that_puts_out_logits() -> None:
    model = _Logits(torch.eye(4))
    rows = [{"input_ids": [i] + [0] * i, "labels": label} for i, label in enumerate([0, 1, 3, 3])]
    assert Accuracy(rows)(model).rows["accuracy"].values.tolist() == [1, 1, 0, 1]


# What is said of the evaluation


def test_identity_tells_evaluations_apart() -> None:
    rows = labelled()
    first = Accuracy(rows).identity()
    assert json.loads(json.dumps(first)) == first
    assert first["rows"] == len(rows) and first["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert Accuracy(copy.deepcopy(rows), batch_tokens=7, workers=1).identity() == first
    other = copy.deepcopy(rows)
    other[5]["labels"] = (other[5]["labels"] + 1) % CLASSES
    ids = token_rows()
    moved = [{"input_ids": [*rows[0]["input_ids"], *rows[1]["input_ids"][:1]], "labels": 0}, *rows[1:]]
    labels = [[*row] for row in ids]
    labels[3][1] = -100
    identities = [
        first,
        Accuracy(rows[::-1]).identity(),
        Accuracy(other).identity(),
        Accuracy(moved).identity(),
        Perplexity(ids).identity(),
        Perplexity([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]).identity(),
    ]
    assert len({json.dumps(identity) for identity in identities}) == len(identities)


def test_scores_are_a_dict_and_more() -> None:
    scores = Accuracy(labelled())(_Logits(torch.eye(100)[:, :3]))
    assert dict(scores) == {"accuracy": scores["accuracy"]} and json.loads(json.dumps(scores)) == dict(scores)
    for twin in (pickle.loads(pickle.dumps(scores)), copy.deepcopy(scores)):
        assert twin == scores and twin.chance == scores.chance
        assert torch.equal(twin.rows["accuracy"].values, scores.rows["accuracy"].values)
    assert Scores({"f1": 0.5}).rows == {} == Scores().chance


# Metrics of the evaluate library


def test_metrics_of_the_evaluate_library(make_model: Maker) -> None:
    import evaluate

    assert isinstance(accuracy_metric(), evaluate.Metric) and isinstance(perplexity_metric(), evaluate.Metric)
    truth, found = [0, 1, 2, 2, 1], [0, 1, 1, 2, 2]
    assert accuracy_metric().compute(predictions=found, references=truth)["accuracy"] == accuracy_score(truth, found)
    logits = np.eye(3)[[0, 1, 1, 2, 2]]
    prediction = transformers.EvalPrediction(logits, np.array([*truth[:4], -100]))
    assert accuracy_metric()(prediction) == {"accuracy": 0.75}
    prediction = transformers.EvalPrediction((logits, np.zeros(1)), np.array(truth))
    assert accuracy_metric()(prediction) == {"accuracy": 0.6}
    model, ids = make_model("gpt2"), torch.randint(1, 100, (6, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    found = perplexity_metric()(transformers.EvalPrediction(logits.numpy(), ids.numpy()))
    assert found["perplexity"] == pytest.approx(Perplexity(ids)(model)["perplexity"], rel=1e-6)
    assert perplexity_metric().compute(predictions=[1e9], references=[1]) == {"perplexity": math.inf}


def test_metrics_in_a_trainer(classifier: Maker, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model, rows = classifier("bert").float(), labelled(9)
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([r["labels"] for r in batch]),
        }

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, data_collator=collate, eval_dataset=rows, compute_metrics=accuracy_metric())
    assert trainer.evaluate()["eval_accuracy"] == Accuracy(rows)(model)["accuracy"]


def test_metrics_in_an_evaluator(classifier: Maker, tokenizer: Any) -> None:
    import datasets
    import evaluate

    model = classifier("bert").float()
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 0, 1, 2]})
    scores = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=data,
        metric=accuracy_metric(),
        label_mapping={f"LABEL_{i}": i for i in range(CLASSES)},
    )
    assert scores["accuracy"] == Accuracy(data, tokenizer)(model)["accuracy"]


# Bad input


def test_bad_rows() -> None:
    row = {"input_ids": [1, 2], "labels": 1}
    for cls in (Accuracy, Perplexity):
        with pytest.raises(ValueError, match="no rows to evaluate on"):
            cls([])
        with pytest.raises(ValueError, match="batch_tokens is 0: give at least 1"):
            cls([row] if cls is Accuracy else [[1, 2]], batch_tokens=0)
        with pytest.raises(ValueError, match="row 1 has no input_ids"):
            cls([row, {"labels": 1}])
        with pytest.raises(ValueError, match="row 1 has no tokens"):
            cls([row, {"input_ids": [1], "attention_mask": [0], "labels": 1}])
        with pytest.raises(ValueError, match="row 0 has 2 input_ids, but attention_mask of shape"):
            cls([row | {"attention_mask": [1]}])
        with pytest.raises(ValueError, match=r"row 0 has input_ids of shape \(2,\) and torch.float32"):
            cls([row | {"input_ids": [1.0, 2.0]}])
    for label, message in {
        0.5: "row 1 has the label 0.5, which is no class",
        -1: "row 1 has the label -1",
        None: "row 1 has no labels",
    }.items():
        with pytest.raises(ValueError, match=message):
            Accuracy([row, row | {"labels": label}])
    with pytest.raises(ValueError, match=r"row 1 has labels of shape \(2,\): give one a row, or one a token"):
        Accuracy([row, row | {"labels": [1, 2]}])
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        Accuracy([[1], [2]], labels=[0])
    with pytest.raises(ValueError, match="every label is -100"):
        Accuracy([row | {"labels": -100}])
    with pytest.raises(ValueError, match="no row has a token to predict"):
        Perplexity([[1], [2]])
    with pytest.raises(ValueError, match="row 1 has one label, and a perplexity needs one a token"):
        Perplexity([[1, 2], row])


def test_models_that_cannot_be_scored(make_model: Maker, classifier: Maker) -> None:
    rows = labelled()
    with pytest.raises(ValueError, match="BertModel puts out no logits: load the model with its head"):
        Accuracy(rows)(make_model("bert"))
    with pytest.raises(ValueError, match=f"row {len(rows)} has the label 3, but the model knows 0 to 2"):
        Accuracy([*rows, {"input_ids": [1], "labels": 3}])(classifier("bert"))
    with pytest.raises(ValueError, match=r"labels are of each row, but the logits have shape \(\d+, \d+, 100\)"):
        Accuracy(rows)(make_model("gpt2"))
    with pytest.raises(ValueError, match="single output, as for regression"):
        Accuracy(rows)(_Logits(torch.ones(100, 1)))
    model = classifier("bert")
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="trained for regression"):
        Accuracy(rows)(model)
    with pytest.raises(ValueError, match="BertForMaskedLM does not predict"):
        Perplexity(token_rows())(make_model("bert_mlm"))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not predict"):
        Perplexity(token_rows())(make_model("t5"))
    with pytest.raises(ValueError, match=r"logits of shape \(\d+, 3\) are not those of every token"):
        Perplexity(token_rows())(classifier("bert"))


@pytest.mark.parametrize("workers", [1, 2])
def test_nan_names_the_row(make_model: Maker, classifier: Maker, workers: int) -> None:
    ids = [*token_rows(12), [1, 2, 99, 3], *token_rows(5, seed=1)]
    ids = [row if i == 12 else [1 + token % 98 for token in row] for i, row in enumerate(ids)]
    model = classifier("bert")
    model.bert.embeddings.word_embeddings.weight.data[99] = math.nan
    with pytest.raises(ValueError, match="NaN for row 12: look at its weights"):
        Accuracy(ids, labels=[0] * len(ids), workers=workers)(model)
    causal = make_model("llama")
    causal.model.embed_tokens.weight.data[99] = math.nan
    with pytest.raises(ValueError, match="NaN for row 12"):
        Perplexity(ids, workers=workers)(causal)


# Several processes


def _evaluate_together(model: nn.Module, causal: nn.Module, accuracy: Any, perplexity: Any) -> None:
    from hf_rmt.processes import alone

    rank, processes = rank_and_count()
    assert processes == 2
    calls: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["input_ids"])), with_kwargs=True)
    for size in (64, 10**9):  # of one batch, the second process has none
        found = Accuracy(labelled(), batch_tokens=size)(model)
        assert found == accuracy and torch.equal(found.rows["accuracy"].values, accuracy.rows["accuracy"].values)
        assert sum(map(sum, gather(calls))) == len(labelled()), "each row once"
        calls.clear()
    found = Perplexity(token_rows(), batch_tokens=64)(causal)
    assert found["perplexity"] == pytest.approx(perplexity["perplexity"], rel=1e-12)
    assert torch.allclose(found.rows["perplexity"].values, perplexity.rows["perplexity"].values, rtol=1e-12)
    if rank == 1:
        with alone():
            assert Accuracy(labelled())(model) == accuracy
        assert sum(calls) == len(labelled())
    bad = [*labelled()[:2], {"input_ids": [99] * 40, "labels": 0}]
    model.bert.embeddings.word_embeddings.weight.data[99] = math.nan
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="NaN for row 2"):
        Accuracy(bad, batch_tokens=40)(model)


def test_processes_share_the_rows(make_model: Maker, classifier: Maker, launch: Callable[..., None]) -> None:
    import evaluate  # noqa: F401  # once, and not in every process

    model, causal = classifier("bert"), make_model("llama").double()
    expected = Accuracy(labelled(), workers=1)(model), Perplexity(token_rows(), workers=1)(causal)
    launch(_evaluate_together, model, causal, *expected)


def _evaluate_sharded(model: nn.Module, expected: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    rank_and_count()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    assert Accuracy(labelled(), batch_tokens=64)(model) == expected
    with pytest.raises(ValueError, match="label 3"):
        Accuracy([*labelled(), {"input_ids": [1], "labels": 3}])(model)


def test_a_model_that_is_spread_over_the_processes(classifier: Maker, launch: Callable[..., None]) -> None:
    import evaluate  # noqa: F401

    model = classifier("bert")
    launch(_evaluate_sharded, model, Accuracy(labelled(), workers=1)(model))
