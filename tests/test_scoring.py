"""Whatever can score a model does so in a sweep, and what cannot is refused with the remedy."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_rmt import Decile, SVDPruner
from hf_rmt.evaluation import Accuracy, Scores, accuracy_metric
from hf_rmt.scoring import Scorer
from hf_rmt.theory.inference import Rows

WORDS = ("[PAD]", "[UNK]", "a", "b", "c", "d")
TEXTS = ["a b c", "b", "d d a", "c a", "b b d c", "a", "d c", "c c a b"]


@pytest.fixture
def classifier(make_model) -> BertForSequenceClassification:
    return make_model("bert_classifier", hidden_size=32, intermediate_size=48, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16)


def rows_of(tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of which the last is of another class than the others."""
    return [dict(tokenizer(text)) | {"labels": int(i == len(TEXTS) - 1)} for i, text in enumerate(TEXTS)]


# Functions


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (0.25, {"score": 0.25}),
        (3, {"score": 3.0}),
        (np.float32(0.5), {"score": 0.5}),
        (np.array(0.5), {"score": 0.5}),
        (torch.tensor(0.5), {"score": 0.5}),
        (torch.tensor(2, dtype=torch.int64), {"score": 2.0}),
        (nn.Parameter(torch.tensor(0.5)), {"score": 0.5}),
        ({"f1": 0.5, "accuracy": torch.tensor(0.25), "n": np.int64(3)}, {"f1": 0.5, "accuracy": 0.25, "n": 3.0}),
        ({"f1": 0.5, "labels": ["a"], "text": "b", "done": True, "more": None}, {"f1": 0.5}),
        (Scores({"f1": np.float32(0.5)}), {"f1": 0.5}),
    ],
)
def test_numbers_and_dicts_of_numbers(found: Any, expected: dict[str, float]) -> None:
    scores = Scorer(lambda model: found, nn.Linear(2, 2))()
    assert scores == expected and list(scores) == list(expected)
    assert all(type(score) is float for score in scores.values())
    assert not scores.rows and not scores.chance


def test_rows_and_chance_are_kept() -> None:
    rows = {"f1": Rows(torch.ones(3), torch.ones(3))}
    found = Scorer(lambda model: Scores({"f1": 1.0}, rows=rows, chance={"f1": 0.4}), nn.Linear(2, 2))()
    assert found.rows == rows and found.chance == {"f1": 0.4}


@pytest.mark.parametrize("found", [None, "0.5", True, [0.5], torch.ones(1), {}, {"text": "a"}, {"eval_runtime": 2.0}])
def test_what_is_no_number_is_refused(found: Any) -> None:
    def evaluate(model: nn.Module) -> Any:
        return found

    with pytest.raises(TypeError, match=rf"evaluate.*gave {re.escape(repr(found))}, which is no number"):
        Scorer(evaluate, nn.Linear(2, 2))()


def test_time_and_memory_are_no_scores() -> None:
    costs = (
        "eval_runtime eval_samples_per_second eval_steps_per_second epoch eval_model_preparation_time "
        "eval_jit_compilation_time eval_mem_cpu_alloc_delta init_mem_gpu_peaked_delta before_init_mem_cpu "
        "total_time_in_seconds samples_per_second latency_in_seconds runtime eval_dev_runtime"
    )
    scores = {"eval_loss": 0.5, "epochs_needed": 2.0, "lifetime": 1.0, "second": 3.0, "member_cpus": 1.0}
    assert Scorer(lambda model: dict.fromkeys(costs.split(), 1.0) | scores, nn.Linear(2, 2))() == scores


def test_the_function_gets_the_model_itself() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model)
    for one in (model, compiled):
        given: list[Any] = []
        Scorer(lambda model, given=given: float(len(given.append(model) or given)), one)()
        assert given[0] is one
    assert not Scorer(lambda model: 1.0, model).in_step


# What scores nothing


@pytest.mark.parametrize("evaluate", [None, "accuracy", 0.5, {"accuracy": 1.0}, object()])
def test_what_scores_no_model_is_refused(evaluate: Any, classifier) -> None:
    with pytest.raises(TypeError, match="scores no model: give a function of the model, or a Trainer"):
        SVDPruner(classifier).sweep(evaluate)


# Trainer


def trainer_of(model: Any, tokenizer: Any, **options: Any) -> Any:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    arguments = TrainingArguments("unused", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    return Trainer(
        model,
        arguments,
        eval_dataset=rows_of(tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy_metric(),
        **options,
    )


def test_a_trainer(classifier, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(classifier, tokenizer)
    scorer = Scorer(trainer, classifier)
    assert scorer.in_step
    fewer = trainer_of(classifier, tokenizer)
    assert Scorer(fewer, classifier).identity() == scorer.identity()
    fewer.eval_dataset = fewer.eval_dataset[:-1]
    assert Scorer(fewer, classifier).identity() != scorer.identity()
    for _ in range(2):  # the second time it says how long it took to prepare the model
        assert list(scorer()) == ["accuracy", "loss"]
    by_rows = Accuracy(rows_of(tokenizer))
    table = SVDPruner(classifier, progress=False).sweep(trainer, roles=["value", "all"], deciles=[1, 10])
    assert table.metrics == ("accuracy", "loss") and table.lower_is_better("loss")
    assert table.cells[0].scores["accuracy"] == by_rows(classifier)["accuracy"]
    pruner = SVDPruner(classifier, progress=False)
    for cell in table.cells[1:]:
        with pruner.removed(Decile(int(cell.selection[7:])), roles=cell.role):
            assert cell.scores == scorer() != table.cells[0].scores
            assert cell.scores["accuracy"] == by_rows(classifier)["accuracy"]
    compiled = torch.compile(classifier)
    assert Scorer(trainer, compiled).in_step, "the same model inside"


def test_a_trainer_of_another_model_is_refused(classifier, make_model, tokenizer) -> None:
    with pytest.raises(ValueError, match="the Trainer evaluates another model than the pruner edits: give both"):
        SVDPruner(make_model("bert_classifier")).sweep(trainer_of(classifier, tokenizer))


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_a_trainer_that_casts_the_model_is_refused(option: str, classifier, tokenizer) -> None:
    trainer = trainer_of(classifier, tokenizer)
    setattr(trainer.args, option, True)
    with pytest.raises(ValueError, match="have the Trainer cast the model itself to 16 bits: leave them out, or cast"):
        SVDPruner(classifier).sweep(trainer)


# Evaluator


def test_an_evaluator_with_its_data(classifier, tokenizer) -> None:
    import datasets
    from evaluate import evaluator

    classifier.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [row["labels"] for row in rows_of(tokenizer)]})
    own = evaluator("text-classification")
    bound = functools.partial(
        own.compute,
        data=data,
        metric=accuracy_metric(),
        tokenizer=tokenizer,
        label_mapping={"LABEL_0": 0, "LABEL_1": 1},
    )
    assert not Scorer(bound, classifier).in_step
    less = functools.partial(own.compute, **{**bound.keywords, "data": data.select(range(3))})
    assert Scorer(bound, classifier).identity() == Scorer(bound, classifier).identity()
    assert Scorer(bound, classifier).identity() != Scorer(less, classifier).identity()
    table = SVDPruner(classifier, progress=False).sweep(bound, roles="all", deciles=[1, 10])
    expected = SVDPruner(classifier, progress=False).sweep(
        Accuracy(rows_of(tokenizer)), roles="all", deciles=[1, 10], margin=-9.0
    )
    assert table.metrics == ("accuracy",), "and not how long it took"
    assert [cell.scores for cell in table] == [cell.scores for cell in expected]
    with pytest.raises(
        TypeError, match=r"an Evaluator needs its data: give functools.partial\(evaluator.compute, data="
    ):
        SVDPruner(classifier).sweep(own)


# What tells them apart


class Named:
    def __init__(self, rows: int):
        self.rows = rows

    def identity(self) -> dict[str, int]:
        return {"rows": self.rows}

    def __call__(self, model: nn.Module) -> float:
        return 1.0


class Plain:
    def __call__(self, model: nn.Module) -> float:
        return 1.0


def score(model: nn.Module, rows: int = 1) -> float:
    return float(rows)


def test_identities() -> None:
    def of(evaluate: Any) -> str:
        return Scorer(evaluate, nn.Linear(2, 2)).identity()

    assert of(Named(3)) == of(Named(3)) != of(Named(4))
    assert of(score) == "score"
    bound = [functools.partial(score, rows=rows) for rows in (2, 2, 3)]
    assert of(bound[0]) == of(bound[1]) != of(bound[2])
    assert of(Plain()) == "Plain"
