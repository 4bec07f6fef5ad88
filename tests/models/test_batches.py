"""What becomes of the data that ``collect`` is given, and which part of it each process has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset
from transformers import BatchEncoding

from hf_rmt.models.batches import Batches, one_sequence, rows_to_keep


class Rows(Dataset):
    """Row i holds the tokens (i, i)."""

    def __init__(self, count: int, lists: bool = False):
        self.count = count
        self.lists = lists

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)
        return {"input_ids": [index + 1] * 2 if self.lists else torch.tensor([index + 1] * 2)}


class Model(nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: Any = None, labels: Any = None, inputs_embeds: Any = None) -> None:
        raise NotImplementedError


def kept_rows(batches: Batches, rank: int, processes: int) -> list[int]:
    """The rows that count, by the number in them."""
    rows = []
    for batch, keep in batches.of_process(rank, processes):
        numbers = batch["input_ids"][:, 0].tolist()
        rows += numbers if keep is None else numbers[:keep]
    return rows


def token_batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([[i + 1] * 2])} for i in range(count)]


# What a batch may be


@pytest.mark.parametrize(
    "data",
    [
        token_batches(3),
        tuple(token_batches(3)),
        DataLoader(Rows(3)),
        iter(token_batches(3)),
        (batch for batch in token_batches(3)),
        [BatchEncoding(batch) for batch in token_batches(3)],
    ],
)
def test_batches_pass_as_they_are(data: Any) -> None:
    assert kept_rows(Batches(data, Model()), 0, 1) == [1, 2, 3]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(token_batches(3))


def test_streams_of_batches() -> None:
    batches = Batches(Stream(), Model())
    assert batches.count() is None and not batches.once
    assert kept_rows(batches, 0, 1) == kept_rows(batches, 0, 1) == [1, 2, 3]


@pytest.mark.parametrize("data", [Rows(3), Rows(3, lists=True), [Rows(3)[i] for i in range(3)]])
def test_rows_of_tokens_are_put_together(data: Any) -> None:
    """A row is the tokens of one text, and no batch of texts."""
    batches = Batches(data, Model(), tokenizer=SimpleNamespace(pad_token_id=0), text={"batch_size": 2})
    assert [len(batch["input_ids"]) for batch, _ in batches.of_process(0, 1)] == [2, 1]
    assert sorted(kept_rows(batches, 0, 1)) == [1, 2, 3]


def test_what_the_model_does_not_take_is_left_out() -> None:
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2), "idx": torch.ones(2), "text": ["a", "b"]}
    ((found, keep),) = Batches([batch], Model()).of_process(0, 1)
    assert sorted(found) == ["input_ids", "labels"] and keep is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"pixel_values": torch.ones(1)},
            "batch 0 has none of the inputs of Model: it holds pixel_values, the model takes input_ids",
        ),
        ({"labels": torch.ones(1)}, "it holds labels, the model takes input_ids"),
        ({}, "it holds nothing, the model takes input_ids"),
        ([torch.ones(1), torch.ones(1)], "batch 0 is a list: give dicts of the model's arguments"),
        (torch.ones(1), "batch 0 is a Tensor: give dicts of the model's arguments"),
    ],
)
def test_batches_without_the_models_inputs_are_named(batch: Any, message: str) -> None:
    loader = DataLoader([0], collate_fn=lambda _: batch)
    with pytest.raises(ValueError, match=message):
        list(Batches(loader, Model()).of_process(0, 1))


def test_a_list_of_tensors_is_no_list_of_texts() -> None:
    with pytest.raises(ValueError, match="batch 0 is a Tensor: give dicts of the model's arguments"):
        list(Batches([torch.ones(2, 3)], Model()).of_process(0, 1))


def test_a_later_batch_is_named_by_its_number() -> None:
    data = [*token_batches(2), {"labels": torch.ones(1)}]
    with pytest.raises(ValueError, match="batch 2 has none"):
        list(Batches(data, Model()).of_process(0, 1))


def test_embeddings_will_do_for_tokens() -> None:
    ((found, _),) = Batches([{"inputs_embeds": torch.ones(1, 2, 3)}], Model()).of_process(0, 1)
    assert list(found) == ["inputs_embeds"]


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def test_a_model_that_passes_its_arguments_on_gets_all() -> None:
    batch = {"input_ids": torch.ones(1, 2), "anything": torch.ones(1)}
    ((found, _),) = Batches([batch], Passing()).of_process(0, 1)
    assert sorted(found) == ["anything", "input_ids"]


def test_models_that_say_nothing_of_their_main_input() -> None:
    ((found, _),) = Batches([{"input": torch.ones(1, 2)}], nn.Linear(2, 2)).of_process(0, 1)
    assert list(found) == ["input"]
    with pytest.raises(ValueError, match="none of the inputs of Linear: it holds x, the model takes input"):
        list(Batches([{"x": torch.ones(1, 2)}], nn.Linear(2, 2)).of_process(0, 1))


def test_what_nobody_looks_at_is_not_computed(make_model) -> None:
    model = make_model("llama")
    data = token_batches(1)
    ((spared, _),) = Batches(data, model).of_process(0, 1)
    assert spared["use_cache"] is False and spared["logits_to_keep"] == 1
    with torch.no_grad():
        assert model(**spared).logits.shape == (1, 1, 100)
    ((every, _),) = Batches(data, model, every_logit=True).of_process(0, 1)
    ((labelled, _),) = Batches([data[0] | {"labels": data[0]["input_ids"]}], model).of_process(0, 1)
    assert "logits_to_keep" not in every and "logits_to_keep" not in labelled
    ((own, _),) = Batches([data[0] | {"use_cache": True}], model).of_process(0, 1)
    assert own["use_cache"] is True


def test_the_data_is_left_alone() -> None:
    data = token_batches(1)
    list(Batches(data, Model()).of_process(0, 1))
    assert list(data[0]) == ["input_ids"]


def test_what_can_be_read_once_is_read_once() -> None:
    batches = Batches(iter(token_batches(2)), Model())
    assert batches.once and kept_rows(batches, 0, 1) == [1, 2]
    with pytest.raises(ValueError, match="can be read only once"):
        kept_rows(batches, 0, 1)


def test_one_sequence_of_a_batch() -> None:
    batch = {"a": torch.ones(3, 2), "b": torch.ones(3), "c": 5, "d": torch.tensor(1.0)}
    found = one_sequence(batch)
    assert found["a"].shape == (1, 2) and found["b"].shape == (1,) and found["c"] == 5 and found["d"].ndim == 0
    packed = {"a": torch.ones(1, 9), "cu_seqlens": torch.ones(4)}
    assert one_sequence(packed) is packed


# Shares


@pytest.mark.parametrize("count", [0, 1, 5, 6])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plain_batches_are_dealt_out(count: int, processes: int) -> None:
    batches = Batches(token_batches(count), Model())
    shares = [kept_rows(batches, rank, processes) for rank in range(processes)]
    assert sorted(itertools.chain(*shares)) == list(range(1, count + 1))
    longest = max(map(len, shares))
    assert batches.count(processes) == longest and longest - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [1, 2, 7, 8, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("in_batch_sampler", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_repeats_of_a_distributed_sampler_do_not_count(
    count: int, size: int, in_batch_sampler: bool, drop_last: bool
) -> None:
    shares = []
    for rank in range(3):
        sampler = DistributedSampler(Rows(count), 3, rank, shuffle=True, seed=3, drop_last=drop_last)
        if in_batch_sampler:
            loader = DataLoader(Rows(count), batch_sampler=BatchSampler(sampler, size, False))
        else:
            loader = DataLoader(Rows(count), size, sampler=sampler)
        batches = Batches(loader, Model())
        assert batches.count(3) == len(loader)
        shares.append(kept_rows(batches, rank, 3))
    everything = list(itertools.chain(*shares))
    assert len(set(everything)) == len(everything), "no row twice"
    assert len(everything) == (count if not drop_last else max(count // 3 * 3, 0))


@pytest.mark.parametrize("count", [1, 3, 7, 8, 12, 13])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_repeats_of_an_accelerate_loader_do_not_count(count: int, split: bool, even: bool, drop_last: bool) -> None:
    from accelerate.data_loader import prepare_data_loader

    shares = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(Rows(count), 4, drop_last=drop_last),
            num_processes=2,
            process_index=rank,
            split_batches=split,
            even_batches=even,
            put_on_device=False,
        )
        shares.append(kept_rows(Batches(loader, Model()), rank, 2))
    everything = list(itertools.chain(*shares))
    assert len(set(everything)) == len(everything), "no row twice"
    if not drop_last:
        assert sorted(everything) == list(range(1, count + 1))
    elif not everything:
        assert count < 8


@pytest.mark.parametrize(
    ("end", "remainder", "expected"),
    [
        (False, 5, [None, None]),
        (True, -1, [None, None]),
        (True, 0, [None, None]),
        (True, 5, [4, 1]),
        (True, 3, [3, 0]),
        (True, 8, [4, 4]),
    ],
)
def test_rows_to_keep(end: bool, remainder: int, expected: list[int | None]) -> None:
    loader = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    assert [rows_to_keep(loader, 4, rank) for rank in (0, 1)] == expected


def test_an_order_of_its_own_in_every_process_is_refused() -> None:
    rows = token_batches(6)
    shuffled = DataLoader(rows, batch_size=None, shuffle=True)
    assert len(list(Batches(shuffled, Model()).of_process(0, 1))) == 6
    with pytest.raises(ValueError, match="shuffled, in another order in every process"):
        list(Batches(shuffled, Model()).of_process(0, 2))
    seeded = [DataLoader(rows, shuffle=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    halves = [list(Batches(loader, Model()).of_process(rank, 2)) for rank, loader in enumerate(seeded)]
    assert sorted(len(half) for half in halves) == [3, 3]


def test_layers_that_would_run_for_the_last_token_alone_run_for_all(make_model) -> None:
    model = make_model("llama")
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    (plain, _), *_ = Batches([batch], model).of_process(0, 1)
    assert plain["logits_to_keep"] == 1
    model.config.num_kv_shared_layers = 1
    (shared, _), *_ = Batches([batch], model).of_process(0, 1)
    assert "logits_to_keep" not in shared
