"""What a model scores: accuracy of a classifier, perplexity of a causal model, row by row.

Rows are tokenised once. At each call they are sorted by length and cut into batches of so many tokens, so
that short rows come in large batches and next to nothing is padding: a pass over sentences of 5 to 60 tokens
takes a third of the time of batches of 64 rows in their order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from hf_rmt.models.batches import Batches
from hf_rmt.models.live import callable_of, evaluating, is_sharded, unwrap
from hf_rmt.processes import failing_together, gather, rank_and_count
from hf_rmt.theory.inference import Rows
from hf_rmt.workers import run_in_order

#: Tokens in a batch, padding counted, and logits that a batch may have: on a CPU, where each core has a batch,
#: and on an accelerator.
_TOKENS = {"cpu": 1 << 10, "accelerator": 1 << 14}
_LOGITS = {"cpu": 1 << 25, "accelerator": 1 << 28}
#: Logits that are brought to full precision at a time.
_LOGITS_AT_A_TIME = 1 << 22
#: The label of a token that has none, as transformers has it.
_NO_LABEL = -100

#: Columns of tokenised rows that are read.
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")

#: Columns of one row, or of a batch of rows.
_Row = dict[str, torch.Tensor]
#: Reads the figures of a batch off its logits: one value for each of its slots, in the order of its rows.
_Read = Callable[[torch.Tensor, list[int]], torch.Tensor]


class Scores(dict[str, float]):
    """Scores by the names of their metrics: a dict, and what the rows contributed to it.

    Attributes:
        rows: by metric, what each row contributed, in the order in which the rows were given.
        chance: by metric, what guessing scores, where there is such a thing: for accuracy the share of the
            most frequent label.
    """

    def __init__(
        self,
        scores: Mapping[str, float] | Iterable[tuple[str, float]] = (),
        *,
        rows: Mapping[str, Rows] | None = None,
        chance: Mapping[str, float] | None = None,
    ):
        super().__init__(scores)
        self.rows = dict(rows or {})
        self.chance = dict(chance or {})


class Accuracy:
    """Share of right answers of a classifier; call it with a model.

    In several processes of one launch all must call; each takes its share of the rows and gets the same scores.

    Args:
        rows: dicts of token ids (``input_ids``, perhaps ``attention_mask`` and ``token_type_ids``) with
            ``labels`` or ``label``, as a list, a ``datasets.Dataset``, a DataFrame or the output of a
            tokenizer; or texts, or rows with texts, and a tokenizer. The label of a row is a number, or one
            for each token, of which -100 does not count.
        tokenizer: for texts.
        labels: one for each row, where they are not in the rows.
        columns: of texts, one or two for pairs; None takes the usual ones.
        max_length: texts are cut to so many tokens; None for the tokenizer's limit, at most 512.
        batch_tokens: tokens in a batch, padding counted; None for 1024, on an accelerator 16384.
        workers: batches at a time on a CPU, a core each; None for as many as torch has threads, where the model
            is one of transformers without hooks.

    Raises:
        ValueError: no rows, a row without label or tokens, or a label that is no whole number.
    """

    def __init__(  # noqa: PLR0913
        self,
        rows: Any,
        tokenizer: Any = None,
        *,
        labels: Sequence[int] | None = None,
        columns: str | Sequence[str] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        workers: int | None = None,
    ):
        read = _read_rows(rows, tokenizer, columns, max_length)
        own = [row.pop("labels", None) for row in read]
        self._parts, self._of_tokens = _classes(own if labels is None else list(labels), read)
        self._rows = _TokenRows(read, batch_tokens, workers)
        flat = torch.cat(self._parts)
        self._references = flat[flat != _NO_LABEL]
        self._counts = [int((part != _NO_LABEL).sum()) for part in self._parts]
        if not len(self._references):
            raise ValueError(f"every label is {_NO_LABEL}: nothing is left to be right about")

    def __repr__(self) -> str:
        return f"Accuracy({len(self._rows)} rows)"

    def identity(self) -> dict[str, Any]:
        """What decides the score of a model: the metric and a digest of rows and labels; fit for JSON."""
        return {"metric": "accuracy"} | self._rows.identity(self._parts)

    def __call__(self, model: nn.Module) -> Scores:
        """The accuracy of a model; it is left as it was.

        Raises:
            ValueError: the model gives no logits of classes, fewer classes than there are labels, or NaN.
        """
        self._refuse_regression(model)
        values = _fill(model, self._rows, self._counts, self._read, vocabulary=False)
        metric = accuracy_metric().compute(predictions=values, references=self._references)
        right = (values == self._references).double().split(self._counts)
        rows = Rows(torch.stack([part.mean() for part in right]), torch.tensor(self._counts))
        most = int(self._references.bincount().max())
        return Scores(metric, rows={"accuracy": rows}, chance={"accuracy": most / len(self._references)})

    def _refuse_regression(self, model: nn.Module) -> None:
        problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
        if problem in ("regression", "multi_label_classification"):
            raise ValueError(f"{type(unwrap(model)).__name__} is trained for {problem}: it has no accuracy")

    def _read(self, logits: torch.Tensor, batch: list[int]) -> torch.Tensor:
        wanted = 3 if self._of_tokens else 2
        if logits.ndim != wanted:
            what = "each token" if self._of_tokens else "each row"
            raise ValueError(f"the labels are of {what}, but the logits have shape {tuple(logits.shape)}")
        if (classes := logits.shape[-1]) == 1:
            raise ValueError("the model has a single output, as for regression: it has no accuracy")
        labels = pad_sequence([self._parts[i] for i in batch], batch_first=True, padding_value=_NO_LABEL)
        for row, column in (labels >= classes).nonzero().tolist():
            raise ValueError(
                f"row {batch[row]} has the label {labels[row, column]}, but the model knows 0 to {classes - 1}"
            )
        kept = labels != _NO_LABEL
        chosen = (logits if self._of_tokens else logits[:, None])[kept.to(logits.device)]
        _refuse_nan(chosen.isnan().any(-1), [batch[row] for row in kept.nonzero()[:, 0].tolist()])
        return chosen.argmax(-1).cpu()


class Perplexity:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood of a predicted token.

    Every token but the first of its row is predicted from those before it. In several processes of one launch
    all must call; each takes its share of the rows and gets the same score.

    Args:
        rows: token ids, as lists, dicts (``input_ids``, perhaps ``attention_mask``, and ``labels`` where some
            tokens are not to count: -100), a tensor ``(rows, length)``, batches of these, a
            ``datasets.Dataset`` or a DataFrame; or texts (see ``text_batches``) and a tokenizer.
        tokenizer: for texts.
        columns: of texts; None takes the usual one.
        max_length: texts are cut to so many tokens; None for the tokenizer's limit, at most 512.
        batch_tokens: tokens in a batch, padding counted; None for 1024, on an accelerator 16384, and less
            where the vocabulary is large.
        workers: see ``Accuracy``.

    Raises:
        ValueError: no rows, no tokens, or nothing to predict.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Any = None,
        *,
        columns: str | Sequence[str] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        workers: int | None = None,
    ):
        read = _read_rows(rows, tokenizer, columns, max_length)
        self._targets = [_targets(row, index) for index, row in enumerate(read)]
        self._rows = _TokenRows(read, batch_tokens, workers)
        self._counts = torch.tensor([int((target != _NO_LABEL).sum()) for target in self._targets])
        if not int(self._counts.sum()):
            raise ValueError("no row has a token to predict: give rows of two tokens or more")

    def __repr__(self) -> str:
        return f"Perplexity({len(self._rows)} rows, {int(self._counts.sum())} predicted tokens)"

    def identity(self) -> dict[str, Any]:
        """What decides the score of a model: the metric and a digest of rows and targets; fit for JSON."""
        return {"metric": "perplexity"} | self._rows.identity(self._targets)

    def __call__(self, model: nn.Module) -> Scores:
        """The perplexity of a model; it is left as it was.

        Raises:
            ValueError: the model is no causal language model, or its likelihoods are NaN.
        """
        _refuse_other_than_causal(unwrap(model))
        totals = _fill(model, self._rows, [1] * len(self._rows), self._read, vocabulary=True)
        metric = perplexity_metric().compute(predictions=totals, references=self._counts)
        return Scores(metric, rows={"perplexity": Rows(totals / self._counts, self._counts, exponential=True)})

    def _read(self, logits: torch.Tensor, batch: list[int]) -> torch.Tensor:
        targets = pad_sequence([self._targets[i] for i in batch], batch_first=True, padding_value=_NO_LABEL)
        if logits.ndim != 3 or logits.shape[1] != targets.shape[1] + 1:
            raise ValueError(f"logits of shape {tuple(logits.shape)} are not those of every token of a causal model")
        totals = row_likelihoods(logits[:, :-1], targets)
        _refuse_nan(totals.isnan(), batch)
        return totals


def _targets(row: _Row, index: int) -> torch.Tensor:
    """What is to be predicted at each token but the last of a row; the row loses its labels."""
    labels = row.pop("labels", row["input_ids"])
    if not labels.ndim:
        raise ValueError(f"row {index} has one label, and a perplexity needs one a token, or none: leave labels out")
    return labels[1:].long()


def row_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the targets, summed over each row, in nats.

    Float32 at least for a token and float64 for the sums; a copy of a few logits at a time is made.

    Args:
        logits: ``(rows, length, vocabulary)``, of any floating dtype.
        targets: ``(rows, length)``, -100 where nothing is predicted; on the CPU.

    Returns:
        ``(rows,)`` float64, on the CPU.
    """
    totals = torch.zeros(len(targets), dtype=torch.float64)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    places = (targets != _NO_LABEL).nonzero()
    for chunk in places.split(max(1, _LOGITS_AT_A_TIME // logits.shape[-1])):
        row, position = chunk.unbind(1)
        wanted = targets[row, position].to(logits.device)
        losses = F.cross_entropy(logits[row, position].to(dtype), wanted, reduction="none")
        totals.index_add_(0, row, losses.cpu().double())  # some devices have no float64
    return totals


@functools.cache
def _metric_classes() -> tuple[type, type]:
    """Metrics of the evaluate library, which takes seconds to import."""
    import datasets
    import evaluate

    class AccuracyMetric(evaluate.Metric):
        """Share of predictions that equal their references."""

        def _info(self) -> Any:
            features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="Share of predictions that equal their references.",
                citation="",
                inputs_description="Classes, as whole numbers.",
                features=datasets.Features(features),
            )

        def _compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float]:
            right = torch.as_tensor(predictions) == torch.as_tensor(references)
            return {"accuracy": float(right.double().mean())}

        def __call__(self, prediction: Any) -> dict[str, float]:
            """For ``Trainer(compute_metrics=...)``: logits and labels, of which -100 does not count."""
            logits, labels = _logits_and_labels(prediction)
            kept = labels != _NO_LABEL
            return self.compute(predictions=logits.argmax(-1)[kept], references=labels[kept])

    class PerplexityMetric(evaluate.Metric):
        """Exp of the mean negative log-likelihood of a token."""

        def _info(self) -> Any:
            features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="Exp of the mean negative log-likelihood of a token.",
                citation="",
                inputs_description="Predictions: the negative log-likelihood of each row in nats, summed over its "
                "tokens. References: how many tokens these are.",
                features=datasets.Features(features),
            )

        def _compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float]:
            total = torch.as_tensor(predictions, dtype=torch.float64).sum()
            return {"perplexity": float((total / torch.as_tensor(references).sum()).exp())}

        def __call__(self, prediction: Any) -> dict[str, float]:
            """For ``Trainer(compute_metrics=...)``: logits of every token, and labels, of which -100 does not count."""
            logits, labels = _logits_and_labels(prediction)
            targets = labels[:, 1:]
            totals = row_likelihoods(logits[:, :-1], targets)
            return self.compute(predictions=totals, references=(targets != _NO_LABEL).sum(1))

    return AccuracyMetric, PerplexityMetric


def accuracy_metric() -> Any:
    """An ``evaluate.Metric`` of classes, for an ``Evaluator``; also ``compute_metrics`` of a ``Trainer``."""
    return _metric_classes()[0](keep_in_memory=True)


def perplexity_metric() -> Any:
    """An ``evaluate.Metric`` of likelihoods of rows, also ``compute_metrics`` of a ``Trainer``."""
    return _metric_classes()[1](keep_in_memory=True)


def _logits_and_labels(prediction: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = prediction.predictions, prediction.label_ids
    return torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits), torch.as_tensor(labels)


# Rows of tokens


class _TokenRows:
    """Tokens of rows, without padding, and their batches."""

    def __init__(self, rows: list[_Row], batch_tokens: int | None, workers: int | None):
        for name, value in {"batch_tokens": batch_tokens, "workers": workers}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}: give at least 1, or None")
        self.rows = rows
        self.batch_tokens = batch_tokens
        self.workers = workers
        self._longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self, answers: Iterable[torch.Tensor]) -> dict[str, Any]:
        """Number of rows and tokens, and a digest of these and of what is expected of a model."""
        digest = hashlib.sha256()
        for row, answer in zip(self.rows, answers, strict=True):
            for key, values in (*sorted(row.items()), ("answer", answer)):
                digest.update(f"{key} {len(values)} ".encode() + values.to(torch.int64).numpy().tobytes())
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        return {"rows": len(self.rows), "tokens": tokens, "digest": digest.hexdigest()}

    def batches(self, limit: int) -> list[list[int]]:
        """Numbers of the rows of each batch of so many tokens, or of one row; the longest rows first."""
        batches: list[list[int]] = []
        width = 0
        for i in self._longest_first:
            if not batches or width * (len(batches[-1]) + 1) > limit:
                width = len(self.rows[i]["input_ids"])
                batches.append([])
            batches[-1].append(i)
        return batches

    def padded(self, batch: list[int], pad: int) -> _Row:
        """The tensors of a batch, padded on the right."""
        rows = [self.rows[i] for i in batch]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        inputs = {
            key: pad_sequence(
                [row[key] for row in rows], batch_first=True, padding_value=pad if key == "input_ids" else 0
            )
            for key in rows[0]
        }
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return inputs


def _fill(model: nn.Module, rows: _TokenRows, counts: list[int], read: _Read, vocabulary: bool) -> torch.Tensor:
    """What ``read`` finds in the logits of all rows, ``counts`` values a row, in the order of the rows.

    Every process does its share of the batches and gets the values of all; of a model whose parameters the
    processes hold together each does every batch. A value has its place, so that it is there once.
    """
    rank, processes = rank_and_count()
    in_step = is_sharded(model)  # one that meets an error while the others go on would leave them waiting
    workers = 1 if in_step else rows.workers or (torch.get_num_threads() if _can_be_shared(model) else 1)
    batches = rows.batches(_batch_tokens(model, rows.batch_tokens, vocabulary))
    mine = batches if in_step else batches[rank::processes]
    places = torch.arange(sum(counts)).split(counts)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with failing_together(), evaluating(model):
        for batch, values in _each(mine, lambda batch: read(_logits(model, rows, batch), batch), workers):
            found.append((torch.cat([places[i] for i in batch]), values))
    mine_joined = [tuple(map(torch.cat, zip(*found, strict=True)))] if found else []
    everybody = list(itertools.chain(*gather(mine_joined)))
    result = torch.empty(sum(counts), dtype=everybody[0][1].dtype)
    for where, values in everybody:
        result[where] = values
    return result


def _each(
    batches: list[list[int]], work: Callable[[list[int]], torch.Tensor], workers: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Each batch with what comes of it. Cores that have a batch each do not wait for each other at every product."""
    if (workers := min(workers, len(batches))) <= 1:
        return ((batch, work(batch)) for batch in batches)
    return run_in_order(batches, work, workers)  # the longest are first


def _logits(model: nn.Module, rows: _TokenRows, batch: list[int]) -> torch.Tensor:
    pad = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None) or 0
    ((inputs, _),) = Batches([rows.padded(batch, pad)], model, every_logit=True).of_process(0, 1)
    with torch.no_grad():  # what modules keep of inference_mode (rotary tables, say) could not be trained with later
        output = callable_of(model)(**inputs)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{type(unwrap(model)).__name__} puts out no logits: load the model with its head, for instance by "
            "AutoModelForSequenceClassification or AutoModelForCausalLM"
        )
    return logits


def _can_be_shared(model: nn.Module) -> bool:
    """Whether threads can run the model at a time: on the CPU, nothing watches it, and it keeps nothing of a pass."""
    return (
        any(cls.__name__ == "PreTrainedModel" for cls in type(unwrap(model)).__mro__)
        and _on_cpu(model)
        and not torch.is_autocast_enabled("cpu")  # which other threads do not know
        and not any(_watched(module) or _adapts(module) for module in model.modules())
    )


def _watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return bool(hooks) or module._compiled_call_impl is not None


def _adapts(module: nn.Module) -> bool:
    """Whether it is a rotary embedding whose table changes with the length of a batch."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))


def _on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def _batch_tokens(model: nn.Module, wanted: int | None, vocabulary: bool) -> int:
    """Tokens in a batch: as wanted, or what runs well and, if logits are those of a vocabulary, has room for them."""
    device = "cpu" if _on_cpu(model) else "accelerator"
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    logits = (getattr(text, "vocab_size", None) or 1) if vocabulary else 1
    return wanted or min(_TOKENS[device], _LOGITS[device] // logits)


def _refuse_nan(wrong: torch.Tensor, rows: Sequence[int]) -> None:
    if bool(wrong.any()):
        row = rows[int(wrong.nonzero()[0])]
        raise ValueError(f"the model puts out NaN for row {row}: look at its weights, and at its dtype")


def _refuse_other_than_causal(model: nn.Module) -> None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "MaskedLM" in name:
        raise ValueError(f"{name} does not predict each token from those before it, so it has no perplexity")


# Reading rows


def _records(rows: Any, columns: str | Sequence[str] | None) -> list[Any]:
    """The rows one by one, whatever holds them."""
    if isinstance(rows, (str, os.PathLike)):
        from hf_rmt.models.text_sources import source_of

        rows = source_of(rows, columns).data
    if hasattr(rows, "iloc"):
        rows = rows.to_dict("records")
    elif hasattr(rows, "with_format"):
        rows = rows.with_format(None)
    elif isinstance(rows, Mapping):  # the output of a tokenizer
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    records = list(rows)
    if not records:
        raise ValueError("there are no rows to evaluate on")
    return records


def _read_rows(rows: Any, tokenizer: Any, columns: str | Sequence[str] | None, max_length: int | None) -> list[_Row]:
    """Tokens of each row without padding, and ``labels`` where there are any: a scalar, or one a token."""
    records = _records(rows, columns)
    first = records[0]
    if isinstance(first, (str, tuple)) or (isinstance(first, Mapping) and "input_ids" not in first):
        return _tokenised(records, tokenizer, columns, max_length)
    batches = (_as_tensors(record, index) for index, record in enumerate(records))
    return [_stripped(row, index) for index, row in enumerate(itertools.chain.from_iterable(map(_single, batches)))]


def _tokenised(
    records: list[Any], tokenizer: Any, columns: str | Sequence[str] | None, max_length: int | None
) -> list[_Row]:
    from hf_rmt.models.text import text_batches

    texts = text_batches(records, tokenizer, columns=columns, max_length=max_length)
    encoded = [tokens for tokens in texts.encode(list(texts.source.rows())) if tokens["input_ids"]]
    rows = [{key: torch.tensor(value) for key, value in tokens.items()} for tokens in encoded]
    labels = [_label(record) for record in records if isinstance(record, Mapping)]
    if any(label is not None for label in labels):
        if len(rows) != len(records):
            raise ValueError(f"{len(records) - len(rows)} of {len(records)} rows hold no text: leave them out")
        for row, label in zip(rows, labels, strict=True):
            row.update({} if label is None else {"labels": torch.as_tensor(label)})
    return rows


def _label(record: Mapping[str, Any]) -> Any:
    return record.get("labels", record.get("label"))


def _as_tensors(record: Any, index: int) -> _Row:
    """The columns of a row, or of a batch, that are read."""
    if not isinstance(record, Mapping):
        record = {"input_ids": record}
    if isinstance(record.get("input_ids", ""), str):
        raise ValueError(f"row {index} has no input_ids, which the first row has")
    named = {**record, "labels": _label(record)}
    return {key: torch.as_tensor(named[key]) for key in _COLUMNS if named.get(key) is not None}


def _single(row: _Row) -> Iterator[_Row]:
    """The rows of a batch, or the one that this is."""
    if row["input_ids"].ndim != 2:
        return iter([row])
    return ({key: value[i] for key, value in row.items()} for i in range(len(row["input_ids"])))


def _stripped(row: _Row, index: int) -> _Row:
    """A row without its padding."""
    ids = row["input_ids"]
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"row {index} has input_ids of shape {tuple(ids.shape)} and {ids.dtype}: give token numbers")
    for key, value in row.items():
        if value.shape != ids.shape and not (key == "labels" and not value.ndim):
            raise ValueError(f"row {index} has {len(ids)} input_ids, but {key} of shape {tuple(value.shape)}")
    mask = row.get("attention_mask", torch.ones_like(ids)).bool()
    if not bool(mask.any()):
        raise ValueError(f"row {index} has no tokens: leave it out")
    row = {key: value if key == "labels" else value.long() for key, value in row.items() if key != "attention_mask"}
    return {key: value[mask] if value.ndim else value for key, value in row.items()}


def _classes(labels: Sequence[Any], rows: list[_Row]) -> tuple[list[torch.Tensor], bool]:
    """The labels of each row, and whether they are one for each of its tokens.

    Raises:
        ValueError: another number of labels than of rows, a row without, or a label that is no class.
    """
    if len(labels) != len(rows):
        raise ValueError(f"there are {len(labels)} labels for {len(rows)} rows that hold text")
    found = [torch.as_tensor(float("nan") if label is None else label) for label in labels]
    for index, (label, row) in enumerate(zip(found, rows, strict=True)):
        if labels[index] is None:
            raise ValueError(f"row {index} has no labels: give them in the rows, or as labels=")
        if label.is_floating_point() or bool(((label < 0) & (label != _NO_LABEL)).any()):
            raise ValueError(f"row {index} has the label {label.tolist()!s:.60}, which is no class: give 0, 1, 2, ...")
        if label.ndim != found[0].ndim or (label.ndim and len(label) != len(row["input_ids"])):
            raise ValueError(f"row {index} has labels of shape {tuple(label.shape)}: give one a row, or one a token")
    return [label.reshape(-1).long() for label in found], bool(found[0].ndim)
