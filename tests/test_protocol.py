"""Removal before fine-tuning and after it: the same numbers as by hand, and nothing trained twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_rmt import (
    ActivationCovariances,
    Decile,
    SVDPruner,
    SweepTable,
    before_and_after,
    collect_stream,
    parse_selection,
)
from hf_rmt.evaluation import Accuracy, Scores, accuracy_metric
from hf_rmt.processes import gather, rank_and_count
from hf_rmt.protocol import fine_tuned

_SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
_GRID: dict[str, Any] = {"deciles": [1], "progress": False}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Six tokens each; the first of them, 3 or 4, is what a row is of."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 30, (count, 6), generator=generator)
    labels = torch.arange(count) % 2
    tokens[:, 0] = 3 + labels
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(tokens, labels, strict=True)]


class Counting(Trainer):
    """A Trainer that writes down for which seed it trains."""

    trained: list[int]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.trained.append(self.args.seed)
        return super().train(*args, **kwargs)


class Maker:
    """Makes the Trainers of seeds: the same encoder for all, a head for each."""

    def __init__(self, folder: Path, encoder: int = 0):
        self.folder = folder
        self.encoder = encoder
        self.trained: list[int] = []

    def model(self, seed: int) -> BertForSequenceClassification:
        set_seed(self.encoder)
        model = BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **_SIZES))
        set_seed(seed)
        nn.init.normal_(model.classifier.weight, std=0.1)
        return model

    def __call__(self, seed: int, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            str(self.folder / "trainer"),
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=4e-3,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
            seed=seed,
            average_tokens_across_devices=False,  # which multiplies the loss by the number of processes
        )
        how: dict[str, Any] = {"model": self.model(seed), "train_dataset": rows(64, 0), "eval_dataset": rows(30, 1)}
        trainer = Counting(args=arguments, compute_metrics=accuracy_metric(), **{**how, **options})
        trainer.trained = self.trained
        return trainer


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trainer_of(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="module")
def accuracy() -> Accuracy:
    return Accuracy(rows(30, 1))


class Failing:
    """An evaluation that fails once."""

    def __init__(self, evaluate: Accuracy, at: int = -1):
        self.evaluate, self.at, self.calls = evaluate, at, 0

    def identity(self) -> dict[str, Any]:
        return self.evaluate.identity()

    def __call__(self, model: nn.Module) -> Scores:
        self.calls += 1
        assert not model.training
        if self.calls == self.at:
            raise OSError("the disk is full")
        return self.evaluate(model)


def assert_same(found: SweepTable, expected: SweepTable) -> None:
    assert {cell.key for cell in found} == {cell.key for cell in expected}
    other = {cell.key: cell for cell in expected}
    assert all(cell.same_as(other[cell.key]) for cell in found)


def test_scores_are_those_by_hand(trainer_of: Maker, accuracy: Accuracy) -> None:
    table = before_and_after(trainer_of, accuracy, seeds=[0, 3], controls=1, **_GRID)
    named = {(cell.order, cell.selection, cell.seed): cell for cell in table}
    removals = ["decile:1", "random:0(decile:1)"]
    assert {(order, name) for order, name, _ in named} == {
        ("", "none"), *((order, name) for order in ("before", "after") for name in removals)
    }  # fmt: skip
    assert len(table) == 2 * (1 + 2 * 2) and {cell.role for cell in table} == {"all"}
    assert trainer_of.trained == [0] * 3 + [3] * 3
    for seed in (0, 3):
        model = fine_tuned(trainer_of, seed)
        baseline = named["", "none", seed]
        assert baseline.scores == accuracy(model) and baseline.scores["accuracy"] > 0.9
        pruner = SVDPruner(model, progress=False)
        for name in removals:
            with pruner.removed(parse_selection(name)):
                after = accuracy(model)
            trainer = trainer_of(seed)
            assert trainer.model is not None
            edit = SVDPruner(trainer.model, progress=False).remove(parse_selection(name))
            trainer.train()
            before = accuracy(trainer.model)
            assert named["after", name, seed].scores == after
            assert named["before", name, seed].scores == before
            assert torch.equal(named["before", name, seed].rows["accuracy"].values, before.rows["accuracy"].values)
            assert named["before", name, seed].removed["components"] == sum(int(m.sum()) for m in edit.masks.values())
    frame = table.to_pandas()
    assert (frame["change"] == frame["score"] - frame["baseline"]).all()
    assert frame.groupby("seed")["baseline"].nunique().eq(1).all()
    assert (frame[frame["order"] == "after"]["change"] < 0).any(), "something was lost"
    assert table.summary().groupby(["order", "selection"]).size().eq(1).all()


def test_directions_of_the_stream_by_hand(trainer_of: Maker, accuracy: Accuracy, tmp_path: Path) -> None:
    def streams(model: nn.Module) -> ActivationCovariances:
        return collect_stream(model, [{"input_ids": torch.stack([row["input_ids"] for row in rows(64, 0)])}])

    options: dict[str, Any] = dict(seeds=[0], controls=1, streams=streams, folder=tmp_path / "run", **_GRID)
    table = before_and_after(trainer_of, accuracy, **options)
    named = {(cell.order, cell.selection): cell for cell in table}
    assert {cell.role for cell in table if cell.selection != "none"} == {"stream"} and len(table) == 5
    trained = len(trainer_of.trained)
    assert_same(before_and_after(trainer_of, accuracy, **options), table)
    assert len(trainer_of.trained) == trained == 3
    for name in ("decile:1", "random:0(decile:1)"):
        after = fine_tuned(trainer_of, 0)
        SVDPruner(after).project(parse_selection(name), streams=streams(after))
        assert named["after", name].scores == accuracy(after)
        trainer = trainer_of(0)
        assert trainer.model is not None
        projection = SVDPruner(trainer.model).project(parse_selection(name), streams=streams(trainer.model))
        trainer.train()
        assert named["before", name].scores == accuracy(trainer.model)
        assert named["before", name].removed["components"] == 3 * 4 and named["before", name].removed["of"] == 3 * 32
        assert named["before", name].removed["mass"] == pytest.approx(sum(projection.energy.values()) / 3)


def test_p_values_over_the_index_are_of_the_fine_tuned_model(trainer_of: Maker, accuracy: Accuracy) -> None:
    table = before_and_after(trainer_of, accuracy, seeds=[0], **_GRID)
    expected = SVDPruner(fine_tuned(trainer_of, 0), progress=False).sweep(accuracy, roles="all", **_GRID)
    assert table.profiles.keys() == expected.profiles.keys()
    for role, profile in expected.profiles.items():
        torch.testing.assert_close(table.profiles[role], profile, rtol=0, atol=0, equal_nan=True)


def test_the_trainer_evaluates_where_nothing_else_does(trainer_of: Maker) -> None:
    table = before_and_after(trainer_of, seeds=[1], deciles=[1], roles=["query"], progress=False)
    assert table.metrics == ("accuracy", "loss") and not any(cell.rows for cell in table)
    trainer = trainer_of(1)
    trainer.train()
    found = trainer.evaluate()
    assert table.cells[0].scores == {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}
    assert trainer.model is not None
    SVDPruner(trainer.model, progress=False).remove(Decile(1), roles="query")
    (after,) = [cell for cell in table if cell.order == "after"]
    assert after.scores["loss"] == trainer.evaluate()["eval_loss"] != table.cells[0].scores["loss"]
    assert after.role == "query"


# Resuming


def test_nothing_is_trained_twice(trainer_of: Maker, accuracy: Accuracy, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def run(evaluate: Any, **options: Any) -> SweepTable:
        trainer_of.trained.clear()
        return before_and_after(trainer_of, evaluate, folder=folder, **{"seeds": [0, 1], **_GRID, **options})

    with pytest.raises(OSError, match="full"):
        run(Failing(accuracy, at=3))  # the baseline, one after, and the one before
    assert trainer_of.trained == [0] * 2
    with pytest.raises(OSError, match="full"):
        run(Failing(accuracy, at=2))  # the one that is left of the first seed, and the baseline of the second
    assert trainer_of.trained == [0, 1]
    last = Failing(accuracy)
    table = run(last)
    assert trainer_of.trained == [1] and last.calls == 3
    assert_same(table, before_and_after(Maker(tmp_path), accuracy, seeds=[0, 1], **_GRID))
    assert_same(SweepTable.load(folder), table)
    again = Failing(accuracy)
    assert_same(run(again), table)
    assert not trainer_of.trained and not again.calls
    more = run(again, seeds=[0, 1, 2])
    assert trainer_of.trained == [2] * 2 and {cell.seed for cell in more} == {0, 1, 2}
    assert_same(SweepTable.load(folder), more)


def test_one_order_and_then_the_other(trainer_of: Maker, accuracy: Accuracy, tmp_path: Path) -> None:
    before = before_and_after(trainer_of, accuracy, seeds=[0], orders=["before"], folder=tmp_path / "x", **_GRID)
    assert [cell.order for cell in before] == ["", "before"] and len(trainer_of.trained) == 2
    both = before_and_after(trainer_of, accuracy, seeds=[0], folder=tmp_path / "x", **_GRID)
    assert len(trainer_of.trained) == 2, "the model is there, and so is what was removed before"
    after = before_and_after(trainer_of, accuracy, seeds=[0], orders=["after"], **_GRID)
    assert len(trainer_of.trained) == 3
    assert_same(both, before + after)


def test_fine_tuned_models_are_kept(trainer_of: Maker, tmp_path: Path) -> None:
    first = fine_tuned(trainer_of, 4, tmp_path / "run")
    second = fine_tuned(trainer_of, 4, str(tmp_path / "run"))
    assert trainer_of.trained == [4] and second is not first
    assert not first.training and not second.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    untrained = trainer_of.model(4).state_dict()
    assert not torch.equal(untrained["classifier.weight"], second.state_dict()["classifier.weight"])
    fine_tuned(trainer_of, 5, tmp_path / "run")
    assert trainer_of.trained == [4, 5]


def other_data(trainer_of: Maker, seed: int) -> Trainer:
    return trainer_of(seed, train_dataset=rows(64, 9))


def test_other_starts_are_refused(trainer_of: Maker, accuracy: Accuracy, tmp_path: Path) -> None:
    before_and_after(trainer_of, accuracy, seeds=[0], folder=tmp_path / "run", **_GRID)
    other = Maker(tmp_path, encoder=7)
    refused: list[Callable[[], Any]] = [
        lambda: before_and_after(other, accuracy, seeds=[0], folder=tmp_path / "run", **_GRID),
        lambda: fine_tuned(other, 0, tmp_path / "run"),
        lambda: fine_tuned(lambda seed: other_data(trainer_of, seed), 0, tmp_path / "run"),
    ]
    trainer_of.trained.clear()
    for run in refused:
        with pytest.raises(
            ValueError, match=r"seed-0.weights.safetensors was fine-tuned from other weights, on other da"
        ):
            run()
    with pytest.raises(ValueError, match=r"selections was .* and is"):
        before_and_after(trainer_of, accuracy, seeds=[0], folder=tmp_path / "run", deciles=[2], progress=False)
    assert not other.trained and not trainer_of.trained
    (tmp_path / "run" / "models" / "seed-0" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="missing or damaged"):
        fine_tuned(trainer_of, 0, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": []}, "orders is .*: give 'before', 'after', or both"),
        ({"orders": ["during"]}, r"orders is \('during',\)"),
        ({"seeds": []}, "there are no seeds: give at least one"),
        ({"selections": []}, "nothing to remove"),
        ({"roles": ["gate"], "seeds": [0]}, "no role or name matches 'gate'"),
    ],
)
def test_bad_questions_are_refused(options: dict[str, Any], message: str, tmp_path: Path, accuracy: Accuracy) -> None:
    trainer_of = Maker(tmp_path)
    with pytest.raises(ValueError, match=message):
        before_and_after(trainer_of, accuracy, folder=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "before").exists()


def test_a_trainer_that_makes_its_model_is_refused(trainer_of: Maker, accuracy: Accuracy) -> None:
    """It would train a new one, from which nothing is removed."""

    def lazy(seed: int) -> Trainer:
        return trainer_of(seed, model=None, model_init=lambda: trainer_of.model(seed))

    with pytest.raises(ValueError, match=r"give it model=, not model_init="):
        before_and_after(lazy, accuracy, seeds=[0], **_GRID)
    assert not trainer_of.trained


def test_a_model_that_learned_nothing_is_refused_before_the_rest_is_trained(trainer_of: Maker) -> None:
    shuffled = [row | {"labels": index // 2 % 2} for index, row in enumerate(rows(30, 1))]
    with pytest.raises(ValueError, match="a sweep of a model that has not learned the task"):
        before_and_after(trainer_of, Accuracy(shuffled), seeds=[0, 1], **_GRID)
    assert trainer_of.trained == [0]


# Two processes


def _both_orders_in_step(folder: Path, accuracy: Accuracy) -> None:
    assert rank_and_count()[1] == 2
    trainer_of = Maker(folder)
    for evaluate, place in ((accuracy, folder / "function"), (None, folder / "trainer's own")):
        trainer_of.trained.clear()
        table = before_and_after(trainer_of, evaluate, seeds=[0], folder=place, **_GRID)
        assert trainer_of.trained == [0] * 2 and len(table) == 3
        first, second = gather(table.to_pandas())
        pd.testing.assert_frame_equal(first, second, check_exact=True)
        assert_same(SweepTable.load(place), table)
        again = before_and_after(trainer_of, evaluate, seeds=[0], folder=place, **_GRID)
        assert trainer_of.trained == [0] * 2
        assert_same(again, table)
        gather(None)
        assert not list(place.rglob("partial")) and not list(place.rglob("*.part"))


def test_two_processes_train_and_evaluate_together(
    accuracy: Accuracy, tmp_path: Path, launch: Callable[..., None]
) -> None:
    launch(_both_orders_in_step, tmp_path, accuracy)


def _sweep_by_trainer(folder: Path, expected: pd.DataFrame) -> None:
    assert rank_and_count()[1] == 2
    trainer = Maker(folder)(0)
    model = trainer.model
    assert model is not None
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = SVDPruner(model, progress=False).sweep(trainer, folder=folder / "sweep", roles="all", **_GRID)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    found = table.to_pandas()
    assert found["selection"].tolist() == expected["selection"].tolist()
    pd.testing.assert_frame_equal(*gather(found), check_exact=True)
    pd.testing.assert_series_equal(found["score"], expected["score"], rtol=1e-5)


def test_a_trainer_evaluates_in_step(trainer_of: Maker, tmp_path: Path, launch: Callable[..., None]) -> None:
    trainer = trainer_of(0)
    assert trainer.model is not None
    expected = SVDPruner(trainer.model, progress=False).sweep(trainer, roles="all", **_GRID).to_pandas()
    launch(_sweep_by_trainer, tmp_path, expected)
