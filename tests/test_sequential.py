"""A collection block by block: it is the ordinary one, fetches each block once, and goes on where it was killed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.reports import store, unfinished
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.slicing.calibration import collect_stream

Batch = dict[str, torch.Tensor]
BATCHES = 3
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def batches() -> list[Batch]:
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    return [{"input_ids": torch.randint(1, 99, (2, 6)), "attention_mask": mask} for _ in range(BATCHES)]


@pytest.fixture
def llama(make_model) -> nn.Module:
    return make_model("llama", num_hidden_layers=3)


def gemma3() -> nn.Module:
    """Two types of layers, with masks and rotations of their own."""
    sizes: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    kinds = ["sliding_attention", "full_attention"] * 2
    other: dict[str, Any] = dict(num_key_value_heads=2, head_dim=16, vocab_size=100, sliding_window=3)
    config = transformers.Gemma3TextConfig(**sizes, **other, layer_types=kinds)
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


def collect(model: nn.Module, data: Any, sequential: bool = True, **options: Any) -> ActivationCovariances:
    return RMTAnalyzer(model, head=True).collect(data, sequential=sequential, progress=False, **options)


def assert_equal(found: ActivationCovariances, expected: ActivationCovariances) -> None:
    """To the bit: every batch goes through the same products in the same order."""
    assert list(found) == list(expected) and found.settings | {"data": [""]} == expected.settings
    for name in expected:
        assert found.shared(name) == expected.shared(name)
        assert (found.output(name) is None) == (expected.output(name) is None)
        for mine, theirs in ((found[name], expected[name]), (found.output(name), expected.output(name))):
            if mine is not None and theirs is not None:
                assert (mine.tokens, mine.eps) == (theirs.tokens, theirs.eps), name
                assert torch.equal(mine.outer, theirs.outer) and torch.equal(mine.total, theirs.total), name


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + (m._compiled_call_impl is not None) for m in model.modules()
    )


# It is the ordinary collection


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "bert_mlm", "gpt2", "mixtral", "gpt_oss", "modernbert", "gemma3"])
def test_it_is_the_ordinary_collection(
    family: str, outputs: bool, make_model, batches: list[Batch], tmp_path: Path
) -> None:
    model = gemma3() if family == "gemma3" else make_model(family)
    expected = collect(model, batches, sequential=False, outputs=outputs)
    assert_equal(collect(model, iter(batches), outputs=outputs), expected)
    assert_equal(collect(model, batches, outputs=outputs, folder=tmp_path), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["covariances.json", "covariances.safetensors"]
    assert hooks_of(model) == 0


@pytest.mark.parametrize("family", ["vit", "swin_stage"])
def test_pictures(family: str, make_model) -> None:
    data = [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(BATCHES)]
    model = make_model("vit") if family == "vit" else make_model("swin", depths=[2], num_heads=[2], window_size=4)
    assert_equal(collect(model, data, outputs=True), collect(model, data, sequential=False, outputs=True))


def test_half_precision_in_files(llama: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    expected = collect(llama.bfloat16(), batches, sequential=False)
    assert_equal(collect(llama, batches, folder=tmp_path), expected)


@pytest.mark.parametrize("choice", [{"roles": ["query", "*up_proj"]}, {"blocks": 1}, {"roles": "lm_head"}])
def test_a_choice_of_matrices(choice: dict[str, Any], llama: nn.Module, batches: list[Batch]) -> None:
    """Blocks behind the last one of interest do not run."""
    expected = collect(llama, batches, sequential=False, **choice)
    ran: list[int] = []
    for number, block in enumerate(llama.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert_equal(collect(llama, batches, **choice), expected)
    assert Counter(ran) == {n: 1 + BATCHES * (n < 2 or choice != {"blocks": 1}) for n in range(3)}


def test_little_memory_takes_several_rounds_through_a_block(llama: nn.Module, batches: list[Batch]) -> None:
    largest = MomentSum.bytes_for(128)
    ran: list[int] = []
    llama.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    found = collect(llama, batches, memory=largest)
    assert len(ran) == 1 + 2 * BATCHES  # three sums of 64 features, and then that of 128
    assert_equal(found, collect(llama, batches, sequential=False))
    with pytest.raises(ValueError, match=r"down_proj takes .* bytes, and there are .*: give more with memory="):
        collect(llama, batches, memory=largest - 1)


def test_adapters_and_their_base(make_model, batches: list[Batch]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    for adapters in (True, False):
        analyzer = RMTAnalyzer(model, adapters=adapters)
        found, expected = (analyzer.collect(batches, progress=False, sequential=way) for way in (True, False))
        assert_equal(found, expected)


def test_rows_that_do_not_count(make_model) -> None:
    """Of a loader that repeats samples to fill its last batch, as accelerate's."""
    model, ids = make_model("vit"), torch.randn(5, 3, 32, 32)

    class Loader(list):
        end_of_dataloader, remainder, batch_sampler = True, 1, None

    data = Loader([{"pixel_values": ids[:2]}, {"pixel_values": ids[2:4]}])
    found = collect(model, data)
    assert_equal(found, collect(model, data, sequential=False))
    assert found.settings["tokens"] == 2 * 17


def test_the_residual_stream(llama: nn.Module, batches: list[Batch]) -> None:
    found, expected = (collect_stream(llama, batches, progress=False, sequential=way) for way in (True, False))
    assert len(found) == 7
    assert_equal(found, expected)


def test_what_the_user_has_hooked_runs_once(llama: nn.Module, batches: list[Batch]) -> None:
    for block in llama.model.layers:
        block.register_forward_hook(lambda module, args, output: output * 1.5)
    assert_equal(collect(llama, batches), collect(llama, batches, sequential=False))


def test_compiled_models(llama: nn.Module, batches: list[Batch]) -> None:
    expected = collect(llama, batches, sequential=False)
    for block in llama.model.layers:
        block.compile(backend="eager")
    own = [block._compiled_call_impl for block in llama.model.layers]
    assert_equal(collect(torch.compile(llama, backend="eager"), batches), expected)
    assert [block._compiled_call_impl for block in llama.model.layers] == own


class Writing(nn.Module):
    """A block that writes into what it is given, and whose second layer shares its input in some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden.mul_(0.5)
        fewer = hidden.clone() if len(hidden) == 3 else hidden
        return hidden.add_(self.first(hidden).tanh() + self.second(fewer).tanh())


class Plain(nn.Module):
    """Blocks one after the other, if nothing else is said."""

    def __init__(self, block: Callable[[], nn.Module] = Writing, count: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mul_(2))


@pytest.mark.parametrize("folder", [False, True])
def test_sharing_that_changes_begins_the_block_again(folder: bool, tmp_path: Path) -> None:
    model, data = Plain().eval(), [{"x": torch.randn(size, 4)} for size in (2, 3, 2)]
    found = collect(model, data, folder=tmp_path if folder else None)
    expected = collect(model, data, sequential=False)
    assert_equal(found, expected)
    assert found.shared("blocks.1.first") == ["blocks.1.first"]


# Offloaded models


def offloaded(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    import accelerate

    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if kind == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=CPU)
    places = {f"model.layers.{n}": "disk" if n else "cpu" for n in range(3)}
    around = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "disk")
    return accelerate.dispatch_model(model, places | around, main_device=CPU, offload_dir=str(folder))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """How often accelerate brought in the weights of each module, from wherever they are offloaded."""
    from accelerate.hooks import AlignDevicesHook

    calls: Counter[nn.Module] = Counter()
    pre_forward = AlignDevicesHook.pre_forward

    def counted(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[module] += bool(self.offload and module._parameters)
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    return calls


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatch"])
def test_offloaded_weights_are_fetched_once(
    kind: str, tied: bool, make_model, batches: list[Batch], fetched: Counter[nn.Module], tmp_path: Path
) -> None:
    """Once for the fingerprint, once for the look at one sequence, and once for all batches."""
    llama = make_model("llama", num_hidden_layers=3, tie_word_embeddings=tied)
    expected = collect(llama, batches, sequential=False)
    offloaded(kind, llama, tmp_path / "weights")
    block = llama.model.layers[2]
    for sequential in (True, False):
        fetched.clear()
        assert_equal(collect(llama, batches, sequential), expected)
        often = 1 if sequential else BATCHES
        assert fetched[block.mlp.up_proj] == 2 + often and fetched[block.input_layernorm] == 1 + often
    assert all(parameter.device.type == "meta" for parameter in block.parameters())


def test_an_error_leaves_weights_where_they_are_offloaded(
    llama: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    expected = collect(llama, batches, sequential=False)
    offloaded("disk", llama, tmp_path)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")

    hook = llama.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(llama, batches)
    hook.remove()
    assert all(parameter.device.type == "meta" for parameter in llama.model.layers.parameters())
    assert hooks_of(llama) == 0
    assert_equal(collect(llama, batches), expected)


# Restart


class Ran:
    """Counts how often each block of a llama ran over whole batches, and kills the run before one of these."""

    def __init__(self, model: nn.Module, at: tuple[int, int]):
        self.counts: Counter[int] = Counter()
        self.at: tuple[int, int] | None = at
        for number, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(lambda m, args, number=number: self.see(number, args[0]))

    def see(self, number: int, hidden: torch.Tensor) -> None:
        if len(hidden) > 1:
            if self.at == (number, self.counts[number]):
                self.at = None
                raise KeyboardInterrupt
            self.counts[number] += 1


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 0), (2, 2)])
def test_a_killed_run_goes_on_with_the_block_where_it_stopped(
    at: tuple[int, int], llama: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    expected = collect(llama, batches, sequential=False)
    ran = Ran(llama, at)
    with pytest.raises(KeyboardInterrupt):
        collect(llama, batches, folder=tmp_path)
    assert any(tmp_path.iterdir()) == (at[0] > 0), "without a block there is nothing to go on with"
    assert_equal(collect(llama, batches, folder=tmp_path), expected)
    assert ran.counts == {n: BATCHES + (at[1] if n == at[0] else 0) for n in range(3)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["covariances.json", "covariances.safetensors"]
    assert_equal(collect(llama, batches, folder=tmp_path), expected)
    assert sum(ran.counts.values()) == 3 * BATCHES + at[1], "a finished folder is read again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("file", ["hidden-0-1", "hidden-2-1", "sums-1", "unfinished-covariances-0"])
def test_a_process_may_die_while_it_writes(
    file: str,
    llama: nn.Module,
    batches: list[Batch],
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a chance to tidy up; what it was writing is half there."""
    expected = collect(llama, batches, sequential=False)
    if (child := os.fork()) == 0:

        def dying(path: Path, tensors: Any, metadata: Any) -> None:
            if path.stem == file:
                beside = path.with_name(f"{path.name}.{os.getpid()}.part")
                beside.mkdir()
                (beside / path.name).write_bytes(b"half")
                os._exit(9)
            save(path, tensors, metadata)

        save = store.save_tensors
        monkeypatch.setattr(store, "save_tensors", dying)
        collect(llama, batches, folder=tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_equal(collect(llama, batches, folder=tmp_path), expected)
    assert not (tmp_path / "unfinished-blocks-0").exists()


def test_only_the_hidden_states_of_one_block_are_kept(llama: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    Ran(llama, (2, 1))
    with pytest.raises(KeyboardInterrupt):
        collect(llama, batches, folder=tmp_path)
    names = {path.name for path in (tmp_path / "unfinished-blocks-0").iterdir()}
    entering = {f"hidden-2-{batch}.safetensors" for batch in range(BATCHES)}
    assert names == entering | {"lock", "hidden-3-0.safetensors", "sums-0.safetensors", "sums-1.safetensors"}


def killed(model: nn.Module, batches: list[Batch], folder: Path) -> None:
    ran = Ran(model, (2, 1))
    with pytest.raises(KeyboardInterrupt):
        collect(model, batches, folder=folder)
    assert ran.at is None


def test_other_data_and_other_collections_are_refused(llama: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    killed(llama, batches, tmp_path)
    with pytest.raises(ValueError, match="the data is not that of the run that is to go on"):
        collect(llama, batches[::-1], folder=tmp_path)
    with pytest.raises(ValueError, match=r"made by another run: sequential was true and is false; give another folder"):
        collect(llama, batches, sequential=False, folder=tmp_path)
    with pytest.raises(ValueError, match=r"made by another run: outputs was false and is true; give another folder"):
        collect(llama, batches, folder=tmp_path, outputs=True)
    assert_equal(collect(llama, batches, folder=tmp_path), collect(llama, batches, sequential=False))


def test_an_ordinary_run_does_not_go_on_block_by_block(
    llama: nn.Module, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "KEEP_EVERY", -1.0)
    ran = Ran(llama, (1, 2))
    with pytest.raises(KeyboardInterrupt):
        collect(llama, batches, sequential=False, folder=tmp_path)
    assert ran.at is None
    with pytest.raises(ValueError, match=r"made by another run: sequential was false and is true; give another folder"):
        collect(llama, batches, folder=tmp_path)


@pytest.mark.parametrize("name", ["hidden-2-1", "sums-1"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_file_is_named(
    name: str, missing: bool, llama: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    killed(llama, batches, tmp_path)
    path = tmp_path / "unfinished-blocks-0" / f"{name}.safetensors"
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=rf"{name}\.safetensors is missing or damaged.*; delete .*/unfinished-\* to beg"
    ):
        collect(llama, batches, folder=tmp_path)


@pytest.mark.parametrize("after", [0, 1])
def test_a_second_run_in_the_folder_is_refused(
    after: int, llama: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    """Also before the first has a block done; it goes on undisturbed."""
    expected = collect(llama, batches, sequential=False)
    refused: list[int] = []

    def again(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 1 and not refused:  # over whole batches
            refused.append(1)
            with pytest.raises(ValueError, match="is in use by another run: wait for it, or give another folder"):
                collect(llama, batches, folder=tmp_path)

    llama.model.layers[after].register_forward_pre_hook(again)
    assert_equal(collect(llama, batches, folder=tmp_path), expected)
    assert refused


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    first, second = (unfinished.UnfinishedBlocks(tmp_path, {}, 0) for _ in range(2))
    assert first.read() is None and second.read() is None
    first.put(0, 0, torch.ones(2))
    with pytest.raises(ValueError, match="is in use by another run"):
        second.put(0, 0, torch.zeros(2))
    second.tidy()
    assert torch.equal(first.get(0, 0), torch.ones(2))
    first.tidy()
    assert not any(tmp_path.iterdir())


# Bad input


def test_no_batches(llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data has no batches"):
        collect(llama, [], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_activations_are_named(llama: nn.Module, batches: list[Batch]) -> None:
    calls: list[int] = []

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return output * torch.nan if len(calls) == 3 else None

    hook = llama.model.layers[1].mlp.act_fn.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"batch 1: there is NaN or Inf in what enters layers\.1\.mlp\.down_proj"):
        collect(llama, batches)
    hook.remove()
    batches[2]["attention_mask"] = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="batch 2: the attention mask leaves no token"):
        collect(llama, batches)
    with torch.no_grad():
        llama.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"batch 0: there is NaN or Inf in what enters layers\.0\.self_attn\.q_proj"):
        collect(llama, batches)
    assert hooks_of(llama) == 0


def test_a_model_in_train_mode_is_refused(llama: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in train mode.*: call model\.eval\(\) first, or leave"):
        collect(llama.train(), batches)


def test_a_sharded_model_is_refused(llama: nn.Module, batches: list[Batch]) -> None:
    llama.model.reshard = llama.model.unshard = lambda: None  # FSDP2's mark
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is sharded over processes.*: leave sequential out"):
        collect(llama, batches)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("t5", r"it has several lists of blocks, encoder\.block, decoder\.block"),
        ("clip", r"it has several lists of blocks, text_model\.encoder\.layers, vision_model\.encoder\.layers"),
        ("albert", r"it does not call each of the 1 blocks of encoder\.albert_layer_groups once, in their order"),
        ("swin", r"its hidden states leave the blocks in another shape than they enter"),
    ],
)
def test_models_that_are_no_list_of_blocks(family: str, why: str, make_model, batches: list[Batch]) -> None:
    model = make_model(family, **({"window_size": 4} if family == "swin" else {}))
    batch = batches[0] | ({"decoder_input_ids": batches[0]["input_ids"]} if family == "t5" else {})
    if family in ("clip", "swin"):
        batch["pixel_values"] = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be run block by block: {why}; leave seq"):
        collect(model, [batch])
    assert hooks_of(model) == 0


class Residual(nn.Module):
    """A block with arguments that it has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, hidden: torch.Tensor, other: Any = None) -> torch.Tensor:
        return hidden + self.layer(hidden).tanh()


def shifted(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        hidden = block(hidden) + 1
    return hidden


def shifted_in_place(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        hidden = block(hidden).add_(1)
    return hidden


def remembering(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    other = hidden
    for block in model.blocks:
        hidden, other = block(hidden, other), hidden
    return hidden


def averaging(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    every = [hidden := block(hidden) for block in model.blocks]
    return torch.stack(every).mean(0)


def backwards(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    for block in model.blocks[::-1]:
        hidden = block(hidden)
    return hidden


def stopping(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return model.blocks[1](model.blocks[0](hidden))


def needing(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        before, hidden = hidden, block(hidden)
        assert not torch.equal(before, hidden)
    return hidden


def calling_inside(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    hidden = model.blocks[0].layer(hidden)
    for block in model.blocks:
        hidden = block(hidden)
    return hidden


def counting(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    steps = torch.zeros(5)
    for block in model.blocks:
        hidden = block(hidden, steps)
        steps += 1
    return hidden


class Carried:
    """Something that goes from block to block."""


def carrying(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    state = Carried()
    for block in model.blocks:
        hidden = block(hidden, state)
    return hidden


@pytest.mark.parametrize(
    ("through", "why"),
    [
        (calling_inside, "it calls layer of a block outside of that block"),
        (counting, "what block 0 is given beside the hidden states is written to later"),
        (carrying, "its blocks are given a Carried, which they may change"),
        (shifted, "it changes the hidden states between blocks 0 and 1"),
        (shifted_in_place, "it changes the hidden states between blocks 0 and 1"),
        (remembering, "block 2 is given more of the blocks before than their hidden states"),
        (averaging, "what is behind its blocks reads more of them than the hidden states of the last"),
        (backwards, "it does not call each of the 3 blocks of blocks once, in their order"),
        (stopping, "it does not call each of the 3 blocks of blocks once, in their order"),
        (needing, "it needs more of its blocks than hidden states: AssertionError"),
    ],
)
def test_blocks_that_are_not_one_after_the_other(through: Callable[..., torch.Tensor], why: str) -> None:
    class Strange(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(through(self, self.embed(x)))

    model = Strange(Residual).eval()
    with pytest.raises(ValueError, match=f"Strange cannot be run block by block: {why}"):
        collect(model, [{"x": torch.randn(4, 4)}])
    assert hooks_of(model) == 0


def test_a_later_batch_that_changes_the_hidden_states_is_refused() -> None:
    class Later(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.blocks[0](self.embed(x))
            return self.head(self.blocks[1](hidden if float(x.max()) < 9 else hidden + 1))

    with pytest.raises(ValueError, match="Later cannot be run block by block: it changes the hidden states between"):
        collect(Later(Residual, 2).eval(), [{"x": torch.zeros(4, 4)}, {"x": torch.full((4, 4), 9.0)}])


def test_a_later_batch_that_calls_into_a_block_is_refused() -> None:
    class Later(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(x)
            return super().forward(x) + (self.head(self.blocks[0].layer(hidden)) if float(x.max()) > 8 else 0)

    with pytest.raises(ValueError, match="Later cannot be run block by block: it calls layer of a block outside of"):
        collect(Later(Residual, 2).eval(), [{"x": torch.zeros(4, 4)}, {"x": torch.full((4, 4), 9.0)}])


def test_a_block_that_calls_into_another_is_refused() -> None:
    model = Plain(Residual).eval()
    hooked = model.blocks[1].register_forward_pre_hook(lambda block, args: (model.blocks[0].layer(args[0]),))
    with pytest.raises(ValueError, match="Plain cannot be run block by block: it calls layer of a block outside of"):
        collect(model, [{"x": torch.randn(4, 4)}])
    hooked.remove()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("later", [False, True])
def test_a_block_that_writes_into_its_arguments_is_refused(later: bool) -> None:
    class Marking(Residual):
        def forward(self, hidden: torch.Tensor, other: Any = None) -> torch.Tensor:
            if not later or float(other.max()) > 8:
                other.add_(1)
            return super().forward(hidden)

    class Given(Plain):
        def forward(self, x: torch.Tensor, mark: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(x)
            for block in self.blocks:
                hidden = block(hidden, mark)
            return self.head(hidden)

    data = [{"x": torch.randn(4, 4), "mark": torch.full((4, 1), value)} for value in (0.0, 9.0)]
    why = "a block writes into" if later else "what block 0 is given beside the hidden states is written to later"
    with pytest.raises(ValueError, match=f"Given cannot be run block by block: {why}"):
        collect(Given(Marking).eval(), data)


def test_gemma4_that_shares_keys_and_values(batches: list[Batch]) -> None:
    """In a mapping that its blocks fill; one whose blocks share none passes it empty."""
    sizes: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    other: dict[str, Any] = dict(num_key_value_heads=2, head_dim=16, vocab_size=100, sliding_window=3)
    other |= dict(layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=0)
    for shared in (0, 2):
        config = transformers.Gemma4TextConfig(**sizes, **other, num_kv_shared_layers=shared)
        model = transformers.Gemma4ForCausalLM(config).eval()
        if shared:
            with pytest.raises(
                ValueError, match="Gemma4ForCausalLM cannot be run block by block: its blocks are given"
            ):
                collect(model, batches)
        else:
            assert_equal(collect(model, batches), collect(model, batches, sequential=False))


def test_blocks_that_share_modules() -> None:
    shared = nn.Linear(5, 5)

    def block() -> nn.Module:
        made = Residual()
        made.layer = shared
        return made

    with pytest.raises(ValueError, match="Plain cannot be run block by block: blocks of blocks share modules"):
        collect(Plain(block).eval(), [{"x": torch.randn(4, 4)}])


def test_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="Linear cannot be run block by block: it has no list of blocks that it calls"):
        collect(nn.Linear(4, 4).eval(), [{"input": torch.randn(4, 4)}])
