"""Data as a model takes it: batches from texts or from a loader, each process its share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_rmt.models.live import unwrap

#: A batch as keyword arguments of the model, and how many of its first sequences count (None for all).
Batch = tuple[dict[str, Any], int | None]


class Batches:
    """Batches of one data set for one model, to be gone through once or several times."""

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        tokenizer: Any = None,
        text: Mapping[str, Any] | None = None,
        every_logit: bool = False,
    ):
        """See ``RMTAnalyzer.collect``; ``text`` are options of ``text_batches``, for texts alone. Where nobody
        looks at the head, models that can put out logits for the last token alone, unless ``every_logit``."""
        self.every_logit = every_logit
        self.inner = unwrap(model)
        self.source: Iterable[Any] = data
        if _is_text(data):
            self.source = self._of_text(data, tokenizer, dict(text or {}))
        self.once = isinstance(self.source, Iterator)
        self._spent = False

    def _of_text(self, data: Any, tokenizer: Any, options: dict[str, Any]) -> Iterable[Any]:
        from hf_rmt.models.text import text_batches, tokenizer_of

        pairs = bool(getattr(getattr(self.inner, "config", None), "is_encoder_decoder", False))
        return text_batches(data, tokenizer or tokenizer_of(self.inner), encoder_decoder=pairs, **options)

    def count(self, processes: int = 1) -> int | None:
        """Number of batches for one process; None if it is not known."""
        try:
            total = len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None
        return total if _is_shared_out(self.source) else -(-total // processes)

    def of_process(self, rank: int, processes: int) -> Iterator[Batch]:
        """The batches of one process, ready for the model.

        Data that was not shared out before (by accelerate or a ``DistributedSampler``) is shared out batch by
        batch. Samples that a loader repeated to fill the last batch do not count.

        Raises:
            ValueError: a batch holds nothing that the model takes, or the data can be read only once and was.
        """
        if self.once and self._spent:
            raise ValueError(
                "one pass over the data is not enough, as the sums do not fit into memory or modules that shared "
                "their input do so no longer, and this data can be read only once: give a list, data set or "
                "DataLoader, or more memory"
            )
        self._spent = True
        for number, (batch, keep) in enumerate(_share(self.source, rank, processes)):
            yield self._inputs(batch, number), keep

    def _inputs(self, batch: Any, number: int) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise ValueError(f"batch {number} is a {type(batch).__name__}: give dicts of the model's arguments")
        parameters = inspect.signature(self.inner.forward).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        main = getattr(self.inner, "main_input_name", None)
        passed_on = anything and main not in parameters  # to a model inside, which knows what it takes
        chosen = {key: value for key, value in batch.items() if key in parameters or passed_on}
        takes = [key for key in chosen if key == main or key.endswith(("embeds", "inputs", "outputs"))]
        if not takes and not (main is None and chosen):
            raise ValueError(
                f"batch {number} has none of the inputs of {type(self.inner).__name__}: "
                f"it holds {', '.join(map(str, batch)) or 'nothing'}, the model takes {main or ', '.join(parameters)}"
            )
        self._refuse_unknown_tokens(chosen.get("input_ids"), number)
        device = _input_device(self.inner)
        chosen = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in chosen.items()}
        return self._economies(parameters, chosen) | chosen

    def _refuse_unknown_tokens(self, ids: Any, number: int) -> None:
        """Raise where a token is none of the model's: on a GPU that would end the process."""
        inner: Any = self.inner
        if ids is None or not hasattr(inner, "get_input_embeddings"):
            return
        try:
            table = inner.get_input_embeddings()
            # A table that is sharded by ZeRO-3, or packed, has another number of rows.
            count = getattr(table, "num_embeddings", None) or len(table.weight)
        except (NotImplementedError, AttributeError, TypeError):  # of two towers, or not a table
            return
        if isinstance(ids, torch.Tensor) and ids.numel() and int(ids.max()) >= count:
            raise ValueError(
                f"batch {number} holds the token {int(ids.max())}, and {type(self.inner).__name__} knows {count}: give "
                "it what its own tokenizer makes"
            )

    def _economies(self, parameters: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that spare work of which nothing is seen: a cache, and logits of every token."""
        spared: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        some = "labels" not in chosen and not self.every_logit and not _drops_tokens(self.inner)
        if some and "logits_to_keep" in parameters:
            spared["logits_to_keep"] = 1
        return spared


def _drops_tokens(model: Any) -> bool:
    """Whether a model whose last layers share keys and values runs these for the tokens of the logits alone."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "num_kv_shared_layers", 0))


def _is_text(data: Any) -> bool:
    """Whether data are texts or rows of a data set, and not batches of tensors."""
    if isinstance(data, (str, os.PathLike)) or hasattr(data, "column_names") or hasattr(data, "columns"):
        return True
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        return True
    if not isinstance(data, Sequence) or not len(data):
        return False
    first = data[0]
    if isinstance(first, Mapping) and getattr(first.get("input_ids"), "ndim", 0) == 1:  # of one text, no batch
        return True
    values = first.values() if isinstance(first, Mapping) else first if isinstance(first, (tuple, list)) else [first]
    return not any(isinstance(value, torch.Tensor) for value in values)


def _input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; an offloaded one moves them itself."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.device.type == "meta" else first.device


def _is_shared_out(source: Iterable[Any]) -> bool:
    """Whether a loader gives every process another part already."""
    return hasattr(source, "end_of_dataloader") or _distributed_sampler(source) is not None


def _distributed_sampler(source: Iterable[Any]) -> Any:
    from torch.utils.data.distributed import DistributedSampler

    samplers = (getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None))
    return next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)


def _share(source: Iterable[Any], rank: int, processes: int) -> Iterator[tuple[Any, int | None]]:
    """Batches of one process, and how many of their samples count."""
    if hasattr(source, "end_of_dataloader"):
        for batch in source:
            yield batch, rows_to_keep(source, _size(batch), rank)
    elif (sampler := _distributed_sampler(source)) is not None:
        left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        for batch in source:
            yield batch, min(left, _size(batch))
            left = max(0, left - _size(batch))
    else:
        if processes > 1:
            _refuse_shuffled(source)
        for number, batch in enumerate(source):
            if number % processes == rank:
                yield batch, None


def _refuse_shuffled(source: Iterable[Any]) -> None:
    """Every process draws an order of its own, so that some samples would come twice and some never."""
    from torch.utils.data import RandomSampler

    sampler = getattr(source, "sampler", None)
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        raise ValueError(
            "the DataLoader is shuffled, in another order in every process: give shuffle=False, a generator with "
            "the same seed, or the loader as accelerator.prepare makes it"
        )


def rows_to_keep(loader: Any, size: int, rank: int) -> int | None:
    """Samples, of the ``size`` in the batch that an accelerate loader gave last, that are no repeats; None for all.

    At its end the loader fills the batches of all processes with samples from the beginning; as
    ``gather_for_metrics`` has it, the first ``remainder`` of them together are real.
    """
    even = getattr(getattr(loader, "batch_sampler", None), "even_batches", True)
    if not (loader.end_of_dataloader and loader.remainder > 0 and even):
        return None
    return min(max(loader.remainder - rank * size, 0), size)


def _size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 0)


def one_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    """The first sequence of a batch, where all its tensors have one entry a sequence; else the batch."""
    sizes = {len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim}
    if len(sizes) != 1:
        return batch
    return {key: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for key, v in batch.items()}
