"""Slice a causal language model, and let it recover with LoRA: perplexity whole, sliced and recovered.

    python examples/recover.py path/to/model calib.safetensors eval.safetensors     # input_ids (rows, length)
    python examples/recover.py HuggingFaceTB/SmolLM2-135M train.txt test.txt --keep 0.8 --epochs 2

The first data is what the slice is calibrated on and what the adapter learns from, the second is only scored. The
adapter sits on every matrix of the blocks, and is merged at the end: what is saved is an ordinary, narrower model where
the architecture allows one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from perplexity import token_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from hf_rmt import SVDPruner
from hf_rmt.evaluation import Perplexity


def rows_of(path: str, options: argparse.Namespace) -> list[list[int]]:
    """Rows of token ids."""
    return token_rows(argparse.Namespace(**{**vars(options), "data": path}))


def batches_of(rows: list[list[int]], size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows of one length together, as batches."""
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        {"input_ids": torch.tensor(same[start : start + size])}
        for same in by_length.values()
        for start in range(0, len(same), size)
    ]


def recovered(model: Any, rows: list[list[int]], options: argparse.Namespace) -> Any:
    """The model after a LoRA adapter has learned from the rows, merged into it."""
    import peft

    config = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        str(Path(options.out) / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.rate,
        warmup_steps=0.05,  # of the steps
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    longest = max(map(len, rows))
    examples = [{"input_ids": row, "labels": row} for row in rows if len(row) == longest]
    Trainer(adapted, arguments, train_dataset=examples).train()  # type: ignore[arg-type]
    return adapted.merge_and_unload()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Slice, train, score, print, save; returns the perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id of a causal model")
    parser.add_argument("data", help="text file, or safetensors with input_ids: to calibrate on and learn from")
    parser.add_argument("test", help="the same, to score")
    parser.add_argument("--keep", type=float, default=0.75, help="share of the parameters")
    parser.add_argument("--per-block", action="store_true", help="a basis for each site of the stream")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row of text")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--separator", help="between the texts of a file; each is a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="recovered")
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    rows, evaluate = rows_of(options.data, options), Perplexity(rows_of(options.test, options))
    found = {"whole": evaluate(model)["perplexity"]}
    small = SVDPruner(model).slice(options.keep, batches_of(rows), per_block=options.per_block)
    record = small.sliced
    found["sliced"] = evaluate(small)["perplexity"]
    small = recovered(small, rows, options)
    found["recovered"] = evaluate(small.eval())["perplexity"]
    small.save_pretrained(options.out)
    print(record)
    table = Table("", "perplexity", "parameters")
    for name, perplexity in found.items():
        parameters = record.original_parameters if name == "whole" else record.parameters
        table.add_row(name, f"{perplexity:.2f}", f"{parameters:,}")
    Console().print(table)
    print(f"saved: {options.out}")
    return found


if __name__ == "__main__":
    main()
