"""What the examples of removal share: a task, the Trainer of a seed, the evaluation, what is shown of a sweep."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fine_tune import demo_model
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_rmt import SVDPruner, SweepTable
from hf_rmt.evaluation import Accuracy, Scores
from hf_rmt.tables import sweep_table
from hf_rmt.tasks import TASKS, TokenRows, rows_of, split_training_rows
from hf_rmt.theory.inference import Rows

#: For each task: training rows, training rows held out to evaluate on, tokens that a row is cut to.
SIZES = {"sst2": (8000, 5000, 128), "wic": (2700, 1000, 128), "boolq": (1200, 200, 256)}


class TaskAccuracy:
    """Accuracy on the dev rows and the training rows held out together, and on the dev rows alone, in one pass."""

    def __init__(self, dev: TokenRows, held_out: TokenRows):
        self.every = Accuracy([*dev, *held_out])
        self.dev = len(dev)
        ones = sum(row["labels"] for row in dev) / len(dev)
        self.dev_chance = max(ones, 1 - ones)

    def identity(self) -> dict[str, Any]:
        """What decides the scores."""
        return self.every.identity() | {"dev": self.dev}

    def __call__(self, model: nn.Module) -> Scores:
        """``accuracy`` on all rows, ``accuracy_dev`` on the dev rows."""
        found = self.every(model)
        every = found.rows["accuracy"]
        dev = Rows(every.values[: self.dev], every.weights[: self.dev])
        return Scores(
            found | {"accuracy_dev": dev.score()},
            rows={"accuracy": every, "accuracy_dev": dev},
            chance=found.chance | {"accuracy_dev": self.dev_chance},
        )


@dataclass(frozen=True)
class FineTuning:
    """A pretrained model and a task: a Trainer for each seed, all of the same rows, and what they are judged by."""

    options: argparse.Namespace

    @property
    def model(self) -> str:
        """Folder or Hub id of the pretrained model."""
        return self.options.model or demo_model()

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model."""
        return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def training_rows(self) -> tuple[TokenRows, TokenRows]:
        """Rows for training, and rows held out."""
        train, held_out, length = SIZES[self.options.task]
        return split_training_rows(
            self.options.task,
            self.options.data,
            self.tokenizer,
            train=train if self.options.rows is None else self.options.rows,
            held_out=held_out if self.options.held_out is None else self.options.held_out,
            max_length=length,
        )

    def evaluation(self) -> TaskAccuracy:
        """What a model is judged by."""
        length = SIZES[self.options.task][-1]
        return TaskAccuracy(
            rows_of(self.options.task, self.options.data, "dev", self.tokenizer, max_length=length),
            self.training_rows[1],
        )

    def trainer_of(self, seed: int) -> Trainer:
        """A Trainer of a fresh model; the seed decides its head, the order of the rows and the dropout."""
        options, train = self.options, self.training_rows[0]
        logging.set_verbosity_error()  # a head that is new, and files that load, are no news at every training
        logging.disable_progress_bar()
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=2)
        arguments = TrainingArguments(
            str(Path(options.out) / "trainer"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.rate,
            warmup_steps=0.1,  # of the steps
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            data_seed=seed,
        )
        collator = DataCollatorWithPadding(self.tokenizer)
        return Trainer(model, arguments, train_dataset=train, data_collator=collator)


def parser_of(description: str | None, out: str) -> argparse.ArgumentParser:
    """The arguments that both scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", help="folder with train and dev files, or Hub id")
    parser.add_argument("--model", help="checkpoint folder or Hub id of an encoder; the demo's by default")
    parser.add_argument("--rows", type=int, help="training rows; 8000 of SST-2 by default")
    parser.add_argument("--held-out", type=int, help="training rows kept out to evaluate on; 5000 of SST-2 by default")
    parser.add_argument("--seeds", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument("--controls", type=int, default=1, help="random controls of each removal")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--out", default=out, help="folder; the same command goes on with what it holds")
    return parser


def roles_in_blocks(pruner: SVDPruner) -> list[str]:
    """The roles of a transformer block; what lies outside of the blocks, as a pooler does, is left out."""
    return list(dict.fromkeys(matrix.role for matrix in pruner.matrices if matrix.block is not None))


def show(table: SweepTable, folder: str) -> None:
    """Print a sweep, save it and draw it."""
    console = Console()
    for metric in table.metrics:
        console.print(sweep_table(table, metric))
    print("rank correlation of the drop with the p-values and overlaps of the vectors removed:")
    print(table.correlation().dropna(subset="rho").round(4).to_string(index=False))
    table.save(folder)
    for path in table.plot(folder):
        print(f"picture: {path}")
    print(f"all numbers: {Path(folder) / 'sweep.csv'}")
