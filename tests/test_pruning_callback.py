"""``PruningCallback`` and ``SweepCallback`` in runs of a real ``Trainer`` on a tiny model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_rmt import Bottom, Decile, Overlapping, Rank, RMTAnalyzer, SVDPruner
from hf_rmt.evaluation import Accuracy
from hf_rmt.pruning_callback import PruningCallback, SweepCallback

STEPS = 6


def rows(count: int = 4 * STEPS) -> list[dict[str, Any]]:
    """The first token tells the label."""
    ids = torch.randint(2, 50, (count, 8), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = torch.arange(count) % 2
    return [{"input_ids": row.tolist(), "labels": int(row[0])} for row in ids]


def model(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertForSequenceClassification(BertConfig(**{**sizes, **changes}))


def trainer(out: Path, callback: Any, net: Any = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    arguments = TrainingArguments(str(out), **{**settings, **changes})
    callbacks = callback if isinstance(callback, list) else [callback]
    return Trainer(net or model(), arguments, train_dataset=Dataset.from_list(rows()), callbacks=callbacks)


def weights(net: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


class Watch(TrainerCallback):
    """The weights when training begins, after each step and in each checkpoint."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *_: Any, **kw: Any) -> None:
        self.start = weights(kw["model"])

    def on_step_end(self, *_: Any, **kw: Any) -> None:
        self.steps.append(weights(kw["model"]))


def leak(first: torch.Tensor, now: torch.Tensor, chosen: slice) -> float:
    """``||U^T W V|| / ||W||`` with the vectors of the first weight, by numpy's SVD in float64."""
    u, _, vh = torch.linalg.svd(first.double(), full_matrices=False)
    return float((u[:, chosen].mT @ now.double() @ vh[chosen].mT).norm() / now.double().norm())


def test_what_is_removed_at_the_start_is_what_the_pruner_removes(tmp_path: Path) -> None:
    watch, callback = Watch(), PruningCallback(Decile(1) | Decile(10), roles=["query", "output"], blocks=1)
    trainer(tmp_path, [callback, watch]).train()
    expected = model()
    pruner = SVDPruner(expected)
    pruner.remove(Decile(1) | Decile(10), roles=["query", "output"], blocks=1)
    assert not differing(watch.start, weights(expected))
    assert len(differing(watch.start, weights(model()))) == 2
    assert callback.affected.equals(pruner.affected())
    assert not list(tmp_path.glob("kept-out-*"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_kept_out_after_every_step(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    first = model().to(dtype)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = weights(first)[name]
    chosen = slice(16, 32)
    leaks = {}
    for keep_out in (True, False):
        watch = Watch()
        callback = PruningCallback(Bottom(16), roles="intermediate", keep_out=keep_out)
        trainer(tmp_path / str(keep_out), [callback, watch], copy.deepcopy(first), learning_rate=1e-2).train()
        assert len(watch.steps) == STEPS and leak(weight, watch.start[name], chosen) < tolerance
        leaks[keep_out] = [leak(weight, step[name], chosen) for step in watch.steps]
    assert max(leaks[True]) < tolerance
    assert min(leaks[False]) > 10 * tolerance


def test_the_rest_of_the_matrix_learns_and_so_do_the_others(tmp_path: Path) -> None:
    """One step of plain gradient descent: what is kept out is its part in the subspace, and nothing else."""
    steps = {}
    for keep_out in (True, False):
        watch = Watch()
        callback = PruningCallback(Bottom(16), roles="value", keep_out=keep_out)
        changes: dict[str, Any] = dict(optim="sgd", learning_rate=10.0, max_steps=1)
        trainer(tmp_path / str(keep_out), [callback, watch], **changes).train()
        steps[keep_out] = watch.steps[0]
    values = {f"bert.encoder.layer.{block}.attention.self.value.weight" for block in (0, 1)}
    assert differing(steps[True], steps[False]) == values
    for name in values:
        u, _, vh = torch.linalg.svd(weights(model())[name].double())
        free = steps[False][name].double()
        grown = u[:, -16:].mT @ free @ vh[-16:].mT
        torch.testing.assert_close(steps[True][name].double(), free - u[:, -16:] @ grown @ vh[-16:], atol=1e-6, rtol=0)
        assert grown.norm() > 1e-3


@pytest.mark.parametrize("keep_out", [True, False])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, keep_out: bool) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(Bottom(0.5), roles=("key", "output"), keep_out=keep_out)

    changes: dict[str, Any] = dict(save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path, callback(), **changes)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    second = callback()
    resumed = trainer(tmp_path, second, **changes)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert not differing(weights(whole.model), weights(resumed.model))
    assert second.affected is None


def test_resuming_without_what_was_kept_out(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(save_strategy="steps", save_steps=3)
    trainer(tmp_path, PruningCallback(Decile(10), keep_out=True), **changes).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other = trainer(tmp_path, PruningCallback(Decile(9), keep_out=True), **changes)
    with pytest.raises(ValueError, match=r"kept-out-\w+.safetensors is missing.*resume with the selection, roles"):
        other.train(resume_from_checkpoint=checkpoint)
    (kept,) = tmp_path.glob("kept-out-*.safetensors")
    narrow = trainer(tmp_path / "narrow", PruningCallback(Decile(10), keep_out=True), model(intermediate_size=40))
    narrow.train()
    (of_another,) = (tmp_path / "narrow").glob("kept-out-*.safetensors")
    of_another.replace(kept)
    again = trainer(tmp_path, PruningCallback(Decile(10), keep_out=True), **changes)
    with pytest.raises(ValueError, match=r"is of another model, as to encoder.layer.0.intermediate"):
        again.train(resume_from_checkpoint=checkpoint)


def test_a_file_that_cannot_be_written_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_rmt.reports.store.save_tensors", full)
    training = trainer(tmp_path, PruningCallback(Decile(10), keep_out=True))
    with pytest.raises(OSError, match="no space left"):
        training.train()
    assert not differing(weights(training.model), weights(model()))


class Stop(TrainerCallback):
    """Breaks a training off."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_training_that_was_broken_off_can_begin_anew(tmp_path: Path) -> None:
    """With a new callback: from the weights that it left, whose own components are then removed."""
    training = trainer(tmp_path, [PruningCallback(Rank(1), roles="query", keep_out=True), Stop()])
    with pytest.raises(KeyboardInterrupt):
        training.train()
    left = weights(training.model)
    watch = Watch()
    again = PruningCallback(Rank(1), roles="query", keep_out=True)
    second = trainer(tmp_path, [again, watch], training.model)
    second.train()
    for block in (0, 1):
        name = f"bert.encoder.layer.{block}.attention.self.query.weight"
        assert leak(left[name], watch.start[name], slice(0, 1)) < 1e-6
        assert leak(left[name], watch.steps[-1][name], slice(0, 1)) < 1e-6


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


class OutOfMemory(TrainerCallback):
    """Fails once, as a GPU does whose memory is full, after so many steps."""

    def __init__(self, at: int):
        self.at: int | None = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            self.at = None
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("at", [0, 2])
def test_a_smaller_batch_is_tried_without_removing_twice(tmp_path: Path, at: int) -> None:
    """The Trainer does not reset the model, so the weights go on as the first attempt left them."""

    class Begins(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, torch.Tensor]] = []

        def on_train_begin(self, *_: Any, **kw: Any) -> None:
            self.seen.append(weights(kw["model"]))

    before, after, watch = Begins(), Begins(), Watch()
    callback = PruningCallback(Decile(1), roles="query", keep_out=True)
    changes: dict[str, Any] = dict(auto_find_batch_size=True, learning_rate=1e-2)
    training = trainer(tmp_path, [before, callback, after, OutOfMemory(at), watch], **changes)
    training.train()
    assert len(after.seen) == 2 and training._train_batch_size == 3
    once = model()
    pruner = SVDPruner(once)
    pruner.remove(Decile(1), roles="query")
    assert not differing(after.seen[0], weights(once))
    assert not differing(after.seen[1], before.seen[1])
    assert bool(differing(after.seen[1], after.seen[0])) == (at > 0)
    if at == 0:
        assert int(torch.linalg.matrix_rank(after.seen[1][QUERY], rtol=1e-5)) == 32 - 4
    assert callback.affected.equals(pruner.affected())
    assert max(leak(before.seen[0][QUERY], step[QUERY], slice(0, 4)) for step in watch.steps) < 1e-6


def test_a_second_training_removes_nothing_more(tmp_path: Path) -> None:
    callback, watch = PruningCallback(Decile(1), roles="query", keep_out=True), Watch()
    training = trainer(tmp_path, [callback, watch])
    first = weights(training.model)
    training.train()
    left, affected = weights(training.model), callback.affected
    training.train()
    assert not differing(watch.start, left)
    assert callback.affected is affected and len(watch.steps) == 2 * STEPS
    assert max(leak(first[QUERY], step[QUERY], slice(0, 4)) for step in watch.steps) < 1e-6


def test_training_on_after_a_resumed_run_removes_nothing(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(save_strategy="steps", save_steps=3)
    trainer(tmp_path, PruningCallback(Decile(1), roles="query"), **changes).train()
    watch = Watch()
    training = trainer(tmp_path, [PruningCallback(Decile(1), roles="query"), watch], **changes)
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    left = weights(training.model)
    training.train()
    assert not differing(watch.start, left)


def test_a_model_with_its_first_weights_back_and_another_one_are_removed_from(tmp_path: Path) -> None:
    callback, watch = PruningCallback(Decile(1), roles="query"), Watch()
    training = trainer(tmp_path, [callback, watch])
    first = weights(training.model)
    training.train()
    edited = watch.start
    assert differing(edited, first)
    watch.start = {}
    training.model.load_state_dict(first)
    training.train()
    assert not differing(watch.start, edited)
    watch.start = {}
    fresh = Trainer(
        model_init=lambda: model(num_labels=2),
        args=training.args,
        train_dataset=training.train_dataset,
        callbacks=[callback, watch],
    )
    for _ in range(2):
        fresh.train()
        assert len(watch.start) == len(edited) and int(torch.linalg.matrix_rank(watch.start[QUERY], rtol=1e-5)) == 28
        watch.start = {}


def test_what_is_kept_out_is_kept_out_in_full_precision_under_autocast(tmp_path: Path) -> None:
    """What the callback takes out again has a relative error of float32, not of bfloat16 (4e-3)."""
    net = model()
    weight = net.bert.encoder.layer[0].attention.self.query.weight
    callback = PruningCallback(Bottom(16), roles="query", blocks=0, keep_out=True)
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_strategy="no")
    callback.on_train_begin(arguments, state, control, model=net)
    kept = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weight += noise
    with torch.autocast("cpu", torch.bfloat16):
        assert (noise @ noise).dtype == torch.bfloat16
        callback.on_optimizer_step(arguments, state, control, model=net)
    u, _, vh = torch.linalg.svd(weights(model())[QUERY].double())
    grown = u[:, -16:].mT @ noise.double() @ vh[-16:].mT
    expected = kept.double() + noise.double() - u[:, -16:] @ grown @ vh[-16:]
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-5, rtol=0)


def test_adapters_are_refused_where_they_change_what_is_removed(tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    adapted = get_peft_model(model(), lora)
    before = weights(adapted)
    training = trainer(tmp_path, PruningCallback(Decile(10)), adapted)
    with pytest.raises(ValueError, match=r"query.* is read together with its adapters.*merge_and_unload\(\)"):
        training.train()
    assert not differing(weights(adapted), before)
    trainer(tmp_path, PruningCallback(Decile(10), roles="value", keep_out=True), adapted).train()
    changed = {name for name in differing(weights(adapted), before) if name.endswith("value.weight")}
    assert len(changed) == 2


def test_what_is_no_selection() -> None:
    with pytest.raises(TypeError, match="'decile:10' is no selection"):
        PruningCallback("decile:10")  # type: ignore[arg-type]


# SweepCallback


def test_the_sweep_is_that_of_the_trained_model_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    accuracy = Accuracy(rows(40))
    callback = SweepCallback(accuracy, deciles=[1, 10], roles=["query", "value"], folder=tmp_path / "sweep", margin=-1)

    class Mode(TrainerCallback):
        """Sees what training leaves before the sweep, and after it."""

        def on_train_end(self, *_: Any, **kw: Any) -> None:
            self.weights = weights(kw["model"])
            self.modes = [module.training for module in kw["model"].modules()]

    before, after = Mode(), Mode()
    net = model()
    net.bert.embeddings.eval()
    training = trainer(tmp_path, [before, callback, after], net, learning_rate=1e-2, num_train_epochs=3)
    training.train()
    assert not differing(before.weights, after.weights)
    assert before.modes == after.modes and any(before.modes)
    expected = SVDPruner(training.model.eval()).sweep(accuracy, deciles=[1, 10], roles=["query", "value"], margin=-1)
    assert callback.table.to_pandas().equals(expected.to_pandas())
    assert len(callback.table) == 5 and (tmp_path / "sweep" / "sweep.csv").is_file()


def test_dropout_is_off_in_the_sweep(tmp_path: Path) -> None:
    """Also where the function does not see to it."""
    seen = []

    def score(net: torch.nn.Module) -> float:
        seen.append(net.training)
        return 1.0

    trainer(tmp_path, SweepCallback(score, deciles=[10], roles=["key"])).train()
    assert seen == [False, False]


def test_a_trainer_evaluates_too(tmp_path: Path) -> None:
    training = trainer(tmp_path, [])
    training.eval_dataset = Dataset.from_list(rows(8))
    callback = SweepCallback(training, deciles=[10], roles=["key"])
    training.add_callback(callback)
    training.train()
    assert callback.table.metrics == ("loss",)


def test_a_sweep_that_fails_does_not_undo_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fails_with_the_second(net: torch.nn.Module) -> float:
        calls.append(weights(net))
        if len(calls) == 2:
            raise OSError("the data are gone")
        return 1.0

    callback = SweepCallback(fails_with_the_second, deciles=[10], roles=["key"])
    training = trainer(tmp_path, callback)
    with pytest.raises(RuntimeError, match="training has not ended"):
        _ = callback.table
    with caplog.at_level(logging.ERROR):
        result = training.train()
    assert result.global_step == STEPS and "the sweep after training failed" in caplog.text
    assert differing(calls[0], calls[1]) and not differing(calls[0], weights(training.model))
    with pytest.raises(RuntimeError, match="the sweep failed: the data are gone") as caught:
        _ = callback.table
    assert isinstance(caught.value.__cause__, OSError)


def test_a_sweep_by_overlaps_with_options_of_the_pruner(tmp_path: Path) -> None:
    net = model()
    found = RMTAnalyzer(net).collect([{"input_ids": torch.tensor([row["input_ids"]])} for row in rows()])
    covariances = found.for_any_weights()
    accuracy = Accuracy(rows(8))
    factors = tmp_path / "factors"
    options: dict[str, Any] = dict(selections=[Overlapping(0.5)], roles=["key"], margin=-1)
    callback = SweepCallback(accuracy, pruner=dict(covariances=covariances, workers=1, folder=factors), **options)
    trainer(tmp_path, callback, net).train()
    assert len(callback.table) == 2 and len(list(factors.rglob("*.safetensors"))) == 2
    expected = SVDPruner(net, covariances=covariances).sweep(accuracy, **options)
    assert callback.table.to_pandas().equals(expected.to_pandas())
    early = SweepCallback(accuracy, pruner=dict(covariances=found), **options)
    with pytest.raises(ValueError, match=r"training changes these: give covariances.for_any_weights\(\)"):
        trainer(tmp_path, early, net).train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(selections=[~Overlapping()]), ValueError, "not overlapping.* needs the activations"),
        (dict(pruner=dict(worker=1)), TypeError, "there is no option worker"),
        (dict(roles=["quarry"]), ValueError, "no role or name matches 'quarry'"),
        (dict(blocks=[7]), ValueError, r"no block \[7\]"),
        (dict(evaluate=3), TypeError, "3 scores no model"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_training(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    steps = Watch()
    callback = SweepCallback(**{"evaluate": lambda _: 1.0, **options})
    with pytest.raises(error, match=message):
        trainer(tmp_path, [callback, steps]).train()
    assert not steps.steps
