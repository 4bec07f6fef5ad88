"""``RMTCallback`` in runs of a real ``Trainer`` on a tiny model."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_rmt import ActivationCovariances, AnalysisReport, ModelComparison, RMTAnalyzer, RMTCallback
from hf_rmt.models.live import matrices_of
from hf_rmt.theory.covariance import Moments

LENGTH = 12
ROWS = 22


def data(rows: int = ROWS) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(5, LENGTH + 1, (rows, 1), generator=generator)).long()
    labels = torch.randint(0, 2, (rows,), generator=generator)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def model(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100)
    return BertForSequenceClassification(BertConfig(**{**sizes, **changes}))


def trainer(out: Path, net: Any = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=100,
        seed=0,
    )
    arguments = TrainingArguments(str(out), **{**settings, **changes})
    return Trainer(net or model(), arguments, train_dataset=data(), eval_dataset=data(8))


def run(out: Path, net: Any = None, callback: dict[str, Any] | None = None, **changes: Any) -> tuple[Trainer, Any]:
    training = trainer(out, net, **changes)
    watching = RMTCallback(training, **(callback or {}))
    training.add_callback(watching)
    training.train()
    return training, watching


@pytest.mark.parametrize(
    ("every", "changes", "steps"),
    [
        (None, {}, [0, 12]),
        ("epoch", {}, [0, 6, 12]),
        (5, {}, [0, 5, 10, 12]),
        ("save", {"save_strategy": "steps", "save_steps": 8}, [0, 8, 12]),
        ("epoch", {"gradient_accumulation_steps": 4}, [0, 2, 4]),
    ],
)
def test_when_it_analyses(tmp_path: Path, every: Any, changes: dict[str, Any], steps: list[int]) -> None:
    training, callback = run(tmp_path, callback={"every": every}, **changes)
    assert list(callback.reports) == steps
    logged = [entry["step"] for entry in training.state.log_history if "rmt/query/n_above_tw" in entry]
    assert logged == steps
    for folder in callback.reports.values():
        assert len(AnalysisReport.load(folder)) == 7
    assert 0 < callback.seconds < math.inf


def test_the_last_report_and_the_comparison_are_of_the_trained_weights(tmp_path: Path) -> None:
    before = model()
    training, callback = run(tmp_path)
    now = RMTAnalyzer(training.model).analyze()
    last = AnalysisReport.load(callback.reports[12])
    table = now.to_pandas()
    assert last.to_pandas().drop(columns="note").equals(table.drop(columns="note"))
    entry = next(e for e in reversed(training.state.log_history) if "rmt/query/stable_rank" in e)
    assert entry["rmt/query/stable_rank"] == pytest.approx(table[table.role == "query"].stable_rank.mean())
    expected = RMTAnalyzer.compare(before, training.model).to_pandas()
    for found in (callback.comparison, ModelComparison.load(tmp_path / "rmt" / "comparison")):
        assert found.to_pandas().drop(columns="note").equals(expected.drop(columns="note"))
    assert (expected.relative_change > 1e-3).all()


def test_the_comparison_of_reports_alone(tmp_path: Path) -> None:
    _, callback = run(tmp_path, callback={"keep_start": False})
    table = callback.comparison.to_pandas()
    assert "relative_change" not in table and (table.stable_rank_change != 0).all()
    assert not (tmp_path / "rmt" / "start" / "weights.safetensors").exists()


def test_it_does_not_touch_the_training(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "a")
    alone.train()
    watched, _ = run(tmp_path / "b", callback={"every": 3, "covariances": 2})
    for (name, one), other in zip(alone.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}]
)
def test_covariances_of_training_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Those of the last steps before the analysis, each token once, and nothing of padding."""
    found: list[ActivationCovariances] = []
    original = RMTAnalyzer.analyze

    def analyze(self: RMTAnalyzer, **options: Any) -> AnalysisReport:
        found.append(options["covariances"])
        return original(self, **options)

    monkeypatch.setattr(RMTAnalyzer, "analyze", analyze)
    net = model()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            calls.append((args[0].detach().clone(), masks[-1]))

    masks: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"].bool()), with_kwargs=True)
    net.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(record, with_kwargs=True)
    run(tmp_path, net, {"covariances": 2, "sides": "right"}, **changes)
    assert found[0] is None
    steps = 2 * changes.get("gradient_accumulation_steps", 1)
    tokens = torch.cat([x[mask] for x, mask in calls[-steps:]])
    moments = found[-1]["encoder.layer.0.attention.self.query"]
    assert moments.tokens == len(tokens) and found[-1].settings["dropout"]
    expected = Moments.of(tokens.float())
    assert (moments.outer - expected.outer).abs().max() < 1e-5 * expected.outer.abs().max()


def test_what_cannot_be_collected_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    count = 0

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return output * math.nan if count == 12 else output

    net.bert.encoder.layer[0].attention.self.query.register_forward_hook(spoil)
    _, callback = run(tmp_path, net, {"covariances": 2, "sides": "right"}, max_grad_norm=0.0, learning_rate=0.0)
    assert "NaN" in caplog.text and callback.comparison is not None
    assert AnalysisReport.load(callback.reports[12]).settings["covariances"] is None


def test_resuming_compares_with_the_first_start(tmp_path: Path) -> None:
    first = model()
    options: dict[str, Any] = dict(save_strategy="epoch", num_train_epochs=1)
    run(tmp_path, **options)
    again = trainer(tmp_path, **(options | {"num_train_epochs": 2}))
    callback = RMTCallback(again)
    again.add_callback(callback)
    again.train(resume_from_checkpoint=True)
    assert list(callback.reports) == [12]
    expected = RMTAnalyzer.compare(first, again.model).to_pandas()
    assert callback.comparison is not None
    assert callback.comparison.to_pandas().drop(columns="note").equals(expected.drop(columns="note"))


def test_a_column_decides_which_model_is_best(tmp_path: Path) -> None:
    name = "rmt/query/stable_rank"
    best = dict(metric_for_best_model=name, greater_is_better=True, load_best_model_at_end=True)
    training, callback = run(tmp_path, callback={}, eval_strategy="epoch", save_strategy="epoch", **best)
    values = {e["step"]: e[name] for e in training.state.log_history if name in e}
    assert training.state.best_metric == max(values[6], values[12])
    evaluated = [e for e in training.state.log_history if "eval_loss" in e]
    assert len(evaluated) == 2 and callback.comparison is not None


def test_an_overlap_decides_and_evaluations_have_their_window(tmp_path: Path) -> None:
    name = "rmt/query/overlap_bulk"
    callback = {"covariances": 2, "columns": ["overlap_bulk", "stable_rank"]}
    training, watching = run(
        tmp_path, callback=callback, eval_strategy="steps", eval_steps=5, metric_for_best_model=name
    )
    batches = {step: AnalysisReport.load(path).settings["covariances"] for step, path in watching.reports.items()}
    assert {step: found and found["batches"] for step, found in batches.items()} == {0: None, 5: 2, 10: 2, 12: 2}
    assert [entry["step"] for entry in training.state.log_history if name in entry] == [5, 10, 12]
    assert training.state.best_metric is not None


def test_the_best_model_is_compared_and_kept_apart(tmp_path: Path) -> None:
    best = dict(metric_for_best_model="rmt/query/stable_rank", greater_is_better=True, load_best_model_at_end=True)
    for keep in (True, False):
        training, callback = run(
            tmp_path / str(keep),
            callback={"every": "epoch", "keep_start": keep},
            eval_strategy="epoch",
            save_strategy="epoch",
            **best,
        )
        assert callback.last.name == "final" and callback.reports[12].name == "step-12"
        now = RMTAnalyzer(training.model).analyze().to_pandas()
        assert callback.comparison.after.to_pandas().s_max.equals(now.s_max)


def test_passes_without_gradients_do_not_count(tmp_path: Path) -> None:
    class WithReference(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                model(**inputs)
            return super().compute_loss(model, inputs, **kwargs)

    plain = trainer(tmp_path)
    training = WithReference(plain.model, plain.args, train_dataset=data())
    callback = RMTCallback(training, covariances=2)
    training.add_callback(callback)
    training.train()
    assert AnalysisReport.load(callback.last).settings["covariances"]["batches"] == 2


def test_streams(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_steps=4)
    training = Trainer(plain.model, plain.args, train_dataset=data().to_iterable_dataset())
    callback = RMTCallback(training, every="epoch", covariances=2)
    training.add_callback(callback)
    training.train()
    assert AnalysisReport.load(callback.last).settings["covariances"]["batches"] == 2


def test_without_the_first_weights_overlaps_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    _, callback = run(tmp_path, callback={"keep_start": False, "covariances": 2})
    assert "overlap_bulk_change" not in callback.comparison.to_pandas()


def test_what_fails_after_the_collection_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unused(BertForSequenceClassification):
        def forward(self, **inputs: Any) -> Any:
            loss = self.classifier(torch.zeros(len(inputs["labels"]), 48)).logsumexp(1).sum()
            return {"loss": loss, "logits": torch.zeros(len(inputs["labels"]), 2)}

    _, callback = run(tmp_path, Unused(model().config), {"covariances": 2}, remove_unused_columns=False)
    assert "called none of the modules" in caplog.text and callback.comparison is not None


def test_a_run_that_breaks_off_leaves_no_hooks(tmp_path: Path) -> None:
    net = model()
    net.bert.encoder.layer[0].output.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, net, {"covariances": 20})
    query = net.bert.encoder.layer[0].attention.self.query
    assert not query._forward_hooks and not query._forward_pre_hooks


def test_another_choice_on_resuming_is_refused_at_once(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(save_strategy="epoch", num_train_epochs=1)
    run(tmp_path, **options)
    again = trainer(tmp_path, **(options | {"num_train_epochs": 2}))
    again.add_callback(RMTCallback(again, roles="query"))
    with pytest.raises(ValueError, match="was made by another run: matrices"):
        again.train(resume_from_checkpoint=True)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, report_to="tensorboard")
    folder = next(path.parent for path in tmp_path.rglob("events.out*"))
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/rmt/query/mp_distance")] == [0, 12]


def test_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    net = get_peft_model(model(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]))
    _, callback = run(tmp_path, net, {"covariances": 1})
    table = callback.comparison.to_pandas().set_index("role")
    assert table.relative_change["query"] > 0 and table.relative_change["key"] == 0
    assert table.change_stable_rank["query"] < 2.001
    assert AnalysisReport.load(callback.reports[12]).to_pandas().overlap_bulk.notna().all()


def test_bad_settings_and_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="every is 'week'"):
        RMTCallback(every="week")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option sigmas"):
        RMTCallback(sigmas="bulk")
    training = trainer(tmp_path)
    with pytest.raises(ValueError, match="no role or name matches 'quarry'"):
        RMTCallback(training, roles="quarry")
    training.model = nn.Sequential(nn.Embedding(100, 8))
    with pytest.raises(ValueError, match="has no weight matrix to analyse"):
        RMTCallback(training)
    with pytest.raises(ValueError, match="no column stable_runk"):
        RMTCallback(columns=["stable_runk"])
    with pytest.raises(ValueError, match="no column overlap_above"):  # without covariances there are no overlaps
        RMTCallback(columns="overlap_above")
    with pytest.raises(ValueError, match="every is True"):
        RMTCallback(every=True)
    with pytest.raises(ValueError, match="covariances is -2"):
        RMTCallback(covariances=-2)
    with pytest.raises(ValueError, match="sides is 'left'"):
        RMTCallback(covariances=2, sides="left")
    with pytest.raises(ValueError, match="metric_for_best_model is 'rmt/query/alpha', which is not logged"):
        run(tmp_path, metric_for_best_model="rmt/query/alpha")
    alone = trainer(tmp_path, num_train_epochs=0.1)
    alone.add_callback(RMTCallback())
    alone.train()
    assert "reach no tracker" in caplog.text and (tmp_path / "rmt" / "comparison").is_dir()


def _two_processes(out: str) -> None:
    training, callback = run(Path(out), callback={"every": "epoch", "covariances": 3}, num_train_epochs=1)
    if training.args.process_index == 0:
        report = AnalysisReport.load(callback.reports[3])
        tokens = int(torch.tensor(data()["attention_mask"]).sum())
        assert report.settings["covariances"]["tokens"] == tokens  # the whole epoch, no repeat of 22 rows in 24
        assert callback.comparison is not None
    else:
        assert not callback.reports and callback.comparison is None
    assert len(matrices_of(training.model)) > 7


def test_two_processes(tmp_path: Path) -> None:
    """By torchrun: a process that has trained cannot be forked."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


if __name__ == "__main__":
    _two_processes(sys.argv[1])
