"""Several processes, on gloo: their covariances are those of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hf_rmt import RMTAnalyzer
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.processes import add_up, broadcast, gather, local_count, raise_together, rank_and_count
from hf_rmt.reports.covariances import ActivationCovariances

PROCESSES = 2
ROWS = 13
Maker = Callable[..., Any]


class Rows(Dataset):
    """Texts of one to six tokens, padded to six; none is like another."""

    def __init__(self, count: int = ROWS):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = 1 + (5 * index) % 6
        mask = (torch.arange(6) < length).long()
        return {"input_ids": mask * (1 + (17 * index + 7 * torch.arange(6)) % 98), "attention_mask": mask}


TOKENS = sum(int(Rows()[index]["attention_mask"].sum()) for index in range(ROWS))


def batches_of(rows: Dataset, size: int = 2) -> list[dict[str, torch.Tensor]]:
    return list(DataLoader(rows, size))


def collect(model: nn.Module, data: Any, **options: Any) -> ActivationCovariances:
    return RMTAnalyzer(model).collect(data, progress=False, **options)


def assert_same(found: ActivationCovariances, expected: ActivationCovariances, tolerance: float) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found.shared(name) == expected.shared(name)
        sides = [(found[name], expected[name])]
        if (theirs := expected.output(name)) is not None and (mine := found.output(name)) is not None:
            sides.append((mine, theirs))
        for mine, theirs in sides:
            assert mine.tokens == theirs.tokens, f"{name}: {mine.tokens} tokens, not {theirs.tokens}"
            assert mine.eps == theirs.eps
            for a, b in ((mine.outer, theirs.outer), (mine.total, theirs.total)):
                assert float((a - b).abs().max()) <= tolerance * max(float(theirs.outer.abs().max()), 1.0), name
    assert found.settings["tokens"] == expected.settings["tokens"]


@pytest.fixture
def alone(make_model) -> Iterator[Callable[..., ActivationCovariances]]:
    """Covariances by one process."""
    from hf_rmt.workers import threads

    with threads(1):
        yield collect


# Loaders


def _collect_from_loaders(model: nn.Module, expected: ActivationCovariances, tolerance: float) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    rank, processes = rank_and_count()
    assert processes == PROCESSES
    plain = batches_of(Rows())
    assert len(plain) % 2
    found = collect(model, plain, outputs=True)
    assert_same(found, expected, tolerance)
    assert found.settings["batches"] == len(plain) and found.settings["processes"] == 2
    assert_same(collect(model, iter(plain), outputs=True), expected, tolerance)
    assert_same(
        collect(model, plain, outputs=True, memory=MomentSum.bytes_for(128, torch.float64)), expected, tolerance
    )
    assert_same(collect(model, iter(plain), outputs=True, sequential=True), expected, tolerance)
    for shuffle in (False, True):
        sampler = DistributedSampler(Rows(), PROCESSES, rank, shuffle=shuffle)
        assert len(sampler) * PROCESSES > ROWS, "a row is repeated"
        for sequential in (False, True):
            loader = DataLoader(Rows(), 2, sampler=sampler)
            assert_same(collect(model, loader, outputs=True, sequential=sequential), expected, tolerance)
    for options in ({}, {"split_batches": True}, {"even_batches": False}, {"dispatch_batches": True}):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        loader = accelerator.prepare(DataLoader(Rows(), 4))
        assert_same(collect(model, loader, outputs=True), expected, tolerance)
        assert_same(collect(model, loader, outputs=True, sequential=True), expected, tolerance)
    dropped = accelerator.prepare(DataLoader(Rows(), 4, drop_last=True))
    count = collect(model, dropped).settings["tokens"]
    kept = [sum(gather(count_here)) for count_here in _token_counts(dropped)]
    assert count == sum(kept) < TOKENS


def _token_counts(loader: Any) -> list[int]:
    return [int(batch["attention_mask"].sum()) for batch in loader]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loaders(
    dtype: torch.dtype, tolerance: float, make_model: Maker, alone: Maker, launch: Callable[..., None]
) -> None:
    """A list, a one-shot generator, samplers that repeat rows, and all ways of accelerate to share out."""
    model = make_model("bert").to(dtype)
    # What a pooler reads is one vector a row, so that its count tells whether a row was taken twice.
    expected = alone(model, batches_of(Rows()), outputs=True)
    assert expected["encoder.layer.0.attention.self.query"].tokens == TOKENS
    assert expected["pooler.dense"].tokens == ROWS
    launch(_collect_from_loaders, model, expected, tolerance)


# Other data and models


def _collect_the_rest(
    folder: Path, mixtral: nn.Module, texts: list[str], tokenizer: Any, expected: list[ActivationCovariances]
) -> None:
    rank, _ = rank_and_count()
    of_texts, of_mixtral, one = expected
    assert_same(collect(mixtral, texts, tokenizer=tokenizer, batch_size=2), of_texts, 1e-10)
    for sequential in (False, True):
        assert_same(collect(mixtral, batches_of(Rows()), sequential=sequential), of_mixtral, 1e-10)
        found = collect(mixtral, batches_of(Rows(1)), roles="*_proj", sequential=sequential)
        assert_same(found, one, 1e-10)  # nothing for the second process

    first = collect(mixtral, batches_of(Rows()), folder=folder / "kept")
    calls = []
    hook = mixtral.register_forward_hook(lambda *_: calls.append(1))
    again = collect(mixtral, batches_of(Rows()), folder=folder / "kept")
    hook.remove()
    assert not calls
    assert_same(again, first, 0.0)
    assert sorted(path.name for path in (folder / "kept").iterdir()) == ["covariances.json", "covariances.safetensors"]
    with pytest.raises(ValueError, match="data was"):
        collect(mixtral, batches_of(Rows(ROWS - 2)), folder=folder / "kept")
    _fail_in_one(mixtral, rank, folder)
    _share_in_one(rank)
    with pytest.raises(ValueError, match="the data has no batches"):
        collect(mixtral, [])


def _fail_in_one(model: nn.Module, rank: int, folder: Path) -> None:
    """One process fails: the other says so, and neither waits."""
    bad = batches_of(Rows())
    bad[3] = {"attention_mask": torch.ones(2, 6)}  # for the second process
    if rank == 1:
        with pytest.raises(ValueError, match="batch 1 has none of the inputs"):
            collect(model, bad)
    else:
        with pytest.raises(RuntimeError, match=r"process 1 failed: ValueError\(.batch 1 has none"):
            collect(model, bad)
    own = batches_of(Rows()) if rank == 0 else [{"x": torch.ones(1)}]
    with pytest.raises((ValueError, RuntimeError), match="batch 0 has none of the inputs"):
        collect(model, own * 2, folder=folder / "kept")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    """Two layers that share their input in the first process only."""

    def __init__(self, factor: float):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x if self.factor == 1 else x * self.factor)


def _share_in_one(rank: int) -> None:
    from hf_rmt.theory.covariance import Moments

    torch.manual_seed(2)
    data = [{"x": torch.randn(3, 5, dtype=torch.float64)} for _ in range(4)]
    found = collect(Branches(1 + rank), data)
    for name, factor in (("first", 1), ("second", 2)):
        rows = torch.cat([batch["x"] * (factor if number % 2 else 1) for number, batch in enumerate(data)])
        torch.testing.assert_close(found[name].outer, Moments.of(rows).outer)
        assert found[name].tokens == 12
    assert found.shared("first") == ["first"]


def test_texts_experts_folders_and_failures(
    make_model: Maker, alone: Maker, tmp_path: Path, launch: Callable[..., None]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    texts = ["a b c", "a", "c b", "b", "b a c a", "c c", "a a a"]
    model = make_model("mixtral").double()
    of_texts = alone(model, texts, tokenizer=tokenizer, batch_size=2)
    of_batches = alone(model, batches_of(Rows()))
    of_one = alone(model, batches_of(Rows(1)), roles="*_proj")
    launch(_collect_the_rest, tmp_path, model, texts, tokenizer, [of_texts, of_batches, of_one])


# Restart


def _die_and_go_on(folder: Path, model: nn.Module, expected: ActivationCovariances) -> None:
    from hf_rmt.reports import unfinished

    unfinished.KEEP_EVERY = -1.0
    rank, _ = rank_and_count()
    batches = batches_of(Rows())

    def dying() -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 4 - rank:  # one after two of its batches, the other after one
                raise OSError("killed")
            yield batch

    with pytest.raises(OSError, match="killed"):
        collect(model, dying(), folder=folder)
    assert (folder / f"unfinished-covariances-{rank}.safetensors").is_file()
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["input_ids"])), with_kwargs=True)
    found = collect(model, batches, folder=folder)
    hook.remove()
    assert_same(found, expected, 1e-10)
    assert calls == ([2, 1] if rank == 0 else [2, 2]), "rows of the batches that were left"
    gather(None)
    assert not list(folder.glob("unfinished*"))


def _die_in_a_block_and_go_on(folder: Path, model: Any, expected: ActivationCovariances) -> None:
    rank, _ = rank_and_count()
    calls: list[int] = []

    def die(module: nn.Module, args: Any) -> None:
        calls.append(len(args[0]))
        if rank == 0 and calls.count(2) == 2:  # in its second batch; the look at one row came before
            raise OSError("killed")

    hook = model.encoder.layer[0].register_forward_pre_hook(die)
    with pytest.raises((OSError, RuntimeError), match="killed"):
        collect(model, batches_of(Rows()), folder=folder, sequential=True)
    hook.remove()
    calls.clear()
    hook = model.encoder.layer[0].register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    assert_same(collect(model, batches_of(Rows()), folder=folder, sequential=True), expected, 1e-10)
    hook.remove()
    assert calls == ([1, 2, 2, 2, 1] if rank == 0 else [1]), "the second process had done this block"
    gather(None)
    assert not list(folder.glob("unfinished*"))


def test_each_process_goes_on_with_its_block(
    make_model: Maker, alone: Maker, tmp_path: Path, launch: Callable[..., None]
) -> None:
    model = make_model("bert").double()
    launch(_die_in_a_block_and_go_on, tmp_path, model, alone(model, batches_of(Rows())))


def test_each_process_goes_on_where_it_stopped(
    make_model: Maker, alone: Maker, tmp_path: Path, launch: Callable[..., None]
) -> None:
    model = make_model("bert").double()
    launch(_die_and_go_on, tmp_path, model, alone(model, batches_of(Rows())))


# A model that is spread over the processes


def _run_sharded(folder: Path, model: nn.Module, expected: ActivationCovariances, table: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    from hf_rmt.reports import unfinished

    rank, _ = rank_and_count()
    torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
    for layer in model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    batches = batches_of(Rows())
    found = collect(model, batches, outputs=True)
    assert_same(found, expected, 1e-10)
    assert found.fingerprints == expected.fingerprints
    assert_same(collect(model, batches, outputs=True, memory=MomentSum.bytes_for(128, torch.float64)), expected, 1e-10)
    analyzer = RMTAnalyzer(model)
    report = analyzer.analyze(progress=False, covariances=found).to_pandas()
    assert report["name"].tolist() == table["name"].tolist()
    for column in ["stable_rank", "upper_edge", "overlap_bulk", "activation_tokens"]:
        assert report[column].tolist() == pytest.approx(table[column].tolist(), rel=1e-6), column
    with pytest.raises(ValueError, match="process 1 has no batch: give each process one, or use fewer processes"):
        collect(model, batches[:1])
    with pytest.raises(ValueError, match="BertModel is sharded over processes"):
        collect(model, batches, sequential=True)
    _fail_sharded(model, batches, rank)

    unfinished.KEEP_EVERY = -1.0
    with pytest.raises((OSError, RuntimeError), match="killed"):
        collect(model, _dying(batches), folder=folder)
    if rank == 1:  # as if this process had been killed before it wrote
        (folder / "unfinished-covariances-1.safetensors").unlink()
    assert_same(collect(model, batches, outputs=False, folder=folder), expected, 1e-10)


def _dying(batches: list[Any]) -> Iterator[Any]:
    yield from batches[:4]
    raise OSError("killed")


def _fail_sharded(model: nn.Module, batches: list[Any], rank: int) -> None:
    """What one process meets is raised in both after the batch, for the forward passes wait for each other."""
    empty = [batch | {"attention_mask": torch.zeros(2, 6)} if n == 3 else batch for n, batch in enumerate(batches)]
    message = "batch 1: the attention mask leaves no token"
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match=message):
        collect(model, empty)
    unusable = [{"x": torch.ones(1)} if n == 3 else batch for n, batch in enumerate(batches)]
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="has none of the inputs"):
        collect(model, unusable)
    assert not any("Collector" in str(hook) for m in model.modules() for hook in m._forward_pre_hooks.values())


def test_sharded_models(make_model: Maker, alone: Maker, tmp_path: Path, launch: Callable[..., None]) -> None:
    model = make_model("bert").double()
    expected = alone(model, batches_of(Rows()), outputs=True)
    table = RMTAnalyzer(model).analyze(progress=False, covariances=expected).to_pandas()
    launch(_run_sharded, tmp_path, model, expected, table)


# The functions themselves


def _talk() -> None:
    rank, processes = rank_and_count()
    assert processes == PROCESSES and local_count() in (1, 2)
    assert gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert broadcast([rank, "x"]) == [0, "x"]
    own = torch.full((2, 3), rank + 0.1, dtype=torch.float64)
    total = add_up(own)
    assert torch.equal(total, torch.full((2, 3), 0.1 + 1.1, dtype=torch.float64))
    assert float(own[0, 0]) == rank + 0.1, "the term is left alone"
    raise_together(None)
    try:
        raise_together(KeyError("here") if rank == 0 else None)
    except KeyError:
        assert rank == 0
    except RuntimeError as error:
        assert rank == 1 and "process 0 failed: KeyError('here')" in str(error)
    else:
        raise AssertionError("nothing was raised")


def test_processes_talk(launch: Callable[..., None]) -> None:
    launch(_talk)


def test_one_process_talks_to_itself() -> None:
    assert rank_and_count() == (0, 1) and local_count() == 1
    assert gather(5) == [5] and broadcast("x") == "x"
    own = torch.ones(2)
    assert add_up(own) is own
    raise_together(None)
    with pytest.raises(KeyError, match="mine"):
        raise_together(KeyError("mine"))


def test_it_needs_no_accelerate_alone() -> None:
    import subprocess
    import sys

    code = "import sys; from hf_rmt.processes import gather; gather(1); assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
