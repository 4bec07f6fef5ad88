"""Jobs to be killed: a few seconds of work each, whose result is the same to the bit however often they start.

A job works in a place: its result is the folder ``out`` there, and the names of empty files beside it tell how far its
processes have come: ``began-RANK-PID``, ``ended-RANK-PID``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_rmt import CheckpointPruner, Decile, RMTAnalyzer, SVDPruner, save_sliced
from hf_rmt.evaluation import Perplexity
from hf_rmt.processes import gather, rank_and_count
from hf_rmt.reports import unfinished
from hf_rmt.workers import cores, threads

_VOCABULARY = 1000
_SIZES: dict[str, Any] = dict(vocab_size=_VOCABULARY, num_attention_heads=4, num_hidden_layers=3)

#: Does a job in a folder, or what is left of it.
Work = Callable[[Path], object]


def _llama(width: int, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, **{**_SIZES, **sizes})
    return LlamaForCausalLM(config).eval()


def _batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(_VOCABULARY, (4, 32), generator=generator)} for _ in range(count)]


def _analysis(place: Path) -> Work:
    analyzer = RMTAnalyzer(_llama(96, num_hidden_layers=10))
    return lambda folder: analyzer.analyze(folder=folder, workers=cores(), progress=False)


def _collection(place: Path) -> Work:
    unfinished.KEEP_EVERY = 0.1
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_size=128, intermediate_size=256, **_SIZES)).eval()
    analyzer, batches = RMTAnalyzer(model), _batches(40)
    # Sums of 128 features and one of 256 at a time: two passes over the data.
    memory = 2_000_000
    return lambda folder: analyzer.collect(batches, outputs=True, memory=memory, folder=folder, progress=False)


def _blocks(place: Path) -> Work:
    analyzer, batches = RMTAnalyzer(_llama(128, num_hidden_layers=6), head=True), _batches(40)
    return lambda folder: analyzer.collect(batches, sequential=True, folder=folder, progress=False)


def _sweep(place: Path) -> Work:
    pruner, evaluate = SVDPruner(_llama(64), progress=False), Perplexity(_batches(1))
    return lambda folder: pruner.sweep(evaluate, deciles=[1, 4, 7, 10], controls=1, folder=folder, progress=False)


def _slice(place: Path) -> Work:
    pruner, batches = SVDPruner(_llama(256), progress=False), _batches(40)

    def work(folder: Path) -> None:
        if not (folder / "config.json").is_file():  # else it was killed after its last step
            save_sliced(pruner.slice(0.8, batches, progress=False), folder)

    return work


def _pruning(place: Path) -> Work:
    base = place / "base"
    if rank_and_count()[0] == 0 and not base.is_dir():
        _llama(128).save_pretrained(base, max_shard_size="1MB")
    gather(None)
    pruner = CheckpointPruner(base, progress=False)
    pruner.remove(Decile(10))

    return pruner.save_pretrained


#: By its name: makes the model and the data of a job, and gives what is to be done with them.
JOBS: dict[str, Callable[[Path], Work]] = {
    "analyze": _analysis,
    "collect": _collection,
    "blocks": _blocks,
    "sweep": _sweep,
    "slice": _slice,
    "prune": _pruning,
}


def run(kind: str, place: Path) -> None:
    """Do a job, in one process or in each of several."""
    work = JOBS[kind](place)
    rank, _ = rank_and_count()
    gather(None)  # work begins where all are ready
    (place / f"began-{rank}-{os.getpid()}").touch()
    with threads(1):  # their number decides the order of sums
        work(place / "out")
    (place / f"ended-{rank}-{os.getpid()}").touch()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
