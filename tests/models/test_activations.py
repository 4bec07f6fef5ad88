"""Moments that the collector sums, against those of activations that a test records with hooks of its own."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.models.activations import ActivationError, Collector, SharingChangedError, eager, sites_of
from hf_rmt.models.live import matrices_of, unwrap
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments

Batch = dict[str, Any]
SEQUENCES, LENGTH = 6, 7
FAMILIES = ("bert", "llama", "gpt2", "t5", "vit", "mixtral", "gpt_oss", "phi3", "gpt2_cross")


@pytest.fixture
def make_model(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """T5 needs to know how to shift labels."""
    return lambda family, **changes: make_model(
        family, **({"decoder_start_token_id": 0} if family == "t5" else {}), **changes
    )


pytestmark = pytest.mark.usefixtures("seeded")


def token_mask(length: int = LENGTH) -> torch.Tensor:
    """Padding on the right, on the left, on both sides, and none."""
    mask = torch.ones(SEQUENCES, length, dtype=torch.long)
    mask[0, length - 2 :] = mask[1, :2] = mask[2, :1] = mask[2, length - 1 :] = mask[3, 1:] = 0
    return mask


def data_for(family: str, masked: bool = True, dtype: torch.dtype = torch.float64) -> Batch:
    """Sequences for a model of a family, in one batch."""
    if family == "vit":
        return {"pixel_values": torch.randn(SEQUENCES, 3, 32, 32, dtype=dtype)}
    ids = torch.randint(1, 99, (SEQUENCES, LENGTH))
    data: Batch = {"input_ids": ids} | ({"attention_mask": token_mask()} if masked else {})
    if family == "t5":
        labels = torch.randint(1, 99, (SEQUENCES, 5))
        data["labels"] = labels.masked_fill(token_mask(5).flip(0) == 0, -100) if masked else labels
    if family == "gpt2_cross":
        data["encoder_hidden_states"] = torch.randn(SEQUENCES, 4, 64, dtype=dtype)
        if masked:
            data["encoder_attention_mask"] = token_mask(4).flip(0)
    return data


def batches_of(data: Batch, size: int) -> list[Batch]:
    return [{key: value[i : i + size] for key, value in data.items()} for i in range(0, SEQUENCES, size)]


def mask_of(matrix: WeightMatrix, batch: Batch) -> torch.Tensor | None:
    """What counts, by the names of BERT, T5 and GPT-2; the pooler reads one vector a sequence."""
    name = matrix.parameter
    if "pooler" in name:
        return None
    if name.startswith("decoder") and "EncDecAttention.k" not in name and "EncDecAttention.v" not in name:
        labels = batch.get("labels")
        return None if labels is None else labels != -100
    mask = batch.get("encoder_attention_mask" if "crossattention.c_attn" in name else "attention_mask")
    return None if mask is None else mask.bool()


def rows_of(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = values.detach().flatten(0, -2).double()
    return rows if mask is None else rows[mask.flatten()]


@contextlib.contextmanager
def recording(modules: set[nn.Module]) -> Iterator[dict[nn.Module, list[list[torch.Tensor]]]]:
    """The arguments of every call of some modules."""
    calls: dict[nn.Module, list[list[torch.Tensor]]] = defaultdict(list)

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module].append([x.clone() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def product(x: torch.Tensor, matrix: WeightMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """What the matrix puts out for rows ``x``."""
    out = F.linear(x, matrix.read())
    return out if bias is None else out + (bias if matrix.rows is None else bias[matrix.rows])


def expert_activations(
    matrix: WeightMatrix, arguments: list[torch.Tensor], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and leaves one expert, from what enters the module of all experts."""
    module: Any = matrix.load.module  # type: ignore[attr-defined]
    hidden, chosen, _ = arguments
    routed = (chosen == matrix.expert).any(-1)
    x = hidden[routed if mask is None else routed & mask.flatten()]

    def multiply(name: str, entering: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(module, name)[matrix.expert], getattr(module, f"{name}_bias", None)
        out = entering @ (weight if module.is_transposed else weight.mT)
        return out if bias is None else out + bias[matrix.expert]

    both = multiply("gate_up_proj", x)
    if "gate_up_proj" in matrix.parameter:
        return x, both[..., matrix.rows]
    x = module._apply_gate(both)
    return x, multiply("down_proj", x)


def explicit(
    model: nn.Module, matrices: list[WeightMatrix], batches: list[Batch]
) -> dict[tuple[str, str], torch.Tensor]:
    """``(tokens, features)`` that enter and leave each matrix, recorded batch by batch."""
    rows: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    modules = {matrix.name: matrix.load.module for matrix in matrices}  # type: ignore[attr-defined]
    for batch in batches:
        with recording(set(modules.values())) as calls, torch.no_grad(), eager(model):
            model(**batch)
        for matrix in matrices:
            module = modules[matrix.name]
            mask = mask_of(matrix, batch)
            for arguments in calls[module]:
                if matrix.expert is not None:
                    x, out = expert_activations(matrix, arguments, mask)
                    mask_left = None
                else:
                    x, mask_left = arguments[0], mask
                    out = product(x, matrix, getattr(module, "bias", None))
                rows[matrix.name, "input"].append(rows_of(x, mask_left))
                rows[matrix.name, "output"].append(rows_of(out, mask_left))
    return {key: torch.cat(parts) for key, parts in rows.items()}


def assert_moments(found: Moments, rows: torch.Tensor, tolerance: float, name: str = "") -> None:
    expected = Moments.of(rows)
    assert found.tokens == expected.tokens, f"{name}: {found.tokens} tokens, not {expected.tokens}"
    for mine, theirs in ((found.outer, expected.outer), (found.total, expected.total)):
        scale = float(theirs.abs().max()) or 1.0
        # A total may cancel; its terms do not.
        scale = max(scale, float(rows.abs().sum(0).max()) if mine.ndim == 1 else 0.0)
        assert float((mine - theirs).abs().max()) <= tolerance * scale, name


def collect(model: nn.Module, data: Any, adapters: bool = True, **options: Any) -> ActivationCovariances:
    return RMTAnalyzer(model, adapters=adapters).collect(data, progress=False, **options)


def assert_explicit(model: nn.Module, batches: list[Batch], tolerance: float, **options: Any) -> ActivationCovariances:
    """Collect, and hold every matrix against its explicit moments."""
    analyzer = RMTAnalyzer(model)
    found = analyzer.collect(batches, progress=False, outputs=True, **options)
    rows = explicit(model, analyzer.matrices, batches)
    heard = [matrix.name for matrix in analyzer.matrices if len(rows[matrix.name, "input"])]
    assert list(found) == heard
    for matrix in analyzer.matrices:
        if matrix.name not in heard:
            continue
        assert_moments(found[matrix.name], rows[matrix.name, "input"], tolerance, matrix.name)
        output = found.output(matrix.name)
        if matrix.role != "router" and "router" not in matrix.parameter and ".gate." not in matrix.parameter:
            assert output is not None, matrix.name
            assert_moments(output, rows[matrix.name, "output"], tolerance, f"{matrix.name} output")
    return found


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


# Exactness


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_recorded_activations(family: str, masked: bool, size: int, make_model) -> None:
    model = make_model(family).double()
    found = assert_explicit(model, batches_of(data_for(family, masked), size), 1e-12)
    assert found.settings["batches"] == len(range(0, SEQUENCES, size))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_models(family: str, make_model) -> None:
    model = make_model(family)
    found = assert_explicit(model, batches_of(data_for(family, dtype=torch.float32), 4), 1e-5)
    assert all(moments.outer.dtype == torch.float64 for moments in found.values())


@pytest.mark.parametrize("family", ["bert", "t5", "mixtral"])
def test_the_result_does_not_depend_on_the_batch_size(family: str, make_model) -> None:
    model, data = make_model(family).double(), data_for(family)
    first, *others = (collect(model, batches_of(data, size)) for size in (6, 3, 1))
    for other in others:
        for name, moments in other.items():
            assert moments.tokens == first[name].tokens
            torch.testing.assert_close(moments.outer, first[name].outer, rtol=1e-11, atol=1e-12 * moments.tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, make_model) -> None:
    model = make_model("llama").to(dtype)
    analyzer = RMTAnalyzer(model)
    batches = batches_of(data_for("llama"), 2)
    found = analyzer.collect(batches, progress=False)
    rows = explicit(model, analyzer.matrices, batches)
    for name, moments in found.items():
        assert_moments(moments, rows[name, "input"], 1e-6, name)


def test_modules_that_run_several_times_in_one_pass(make_model) -> None:
    """ALBERT's layers are one layer."""
    model = make_model("albert", num_hidden_layers=3).double()
    found = assert_explicit(model, batches_of(data_for("albert"), 3), 1e-12)
    query = next(name for name in found if name.endswith("query"))
    assert found[query].tokens == 3 * int(token_mask().sum())
    assert len(found.shared(query)) == 3


def test_one_sequence_of_one_token(make_model) -> None:
    assert_explicit(make_model("bert").double(), [{"input_ids": torch.tensor([[5]])}], 1e-12)
    with pytest.warns(UserWarning, match=r"no token reached 6 matrices.*expert="):  # one of three experts a layer
        assert_explicit(make_model("mixtral").double(), [{"input_ids": torch.tensor([[5]])}], 1e-12)


# Sharing


def test_modules_that_read_one_tensor_share_a_sum(make_model) -> None:
    found = collect(make_model("llama"), [data_for("llama")])
    assert found.shared("layers.0.self_attn.q_proj") == [f"layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert found.shared("layers.1.mlp.gate_proj") == [f"layers.1.mlp.{x}_proj" for x in ("gate", "up")]
    assert len(found.to_pandas()) == 2 * 4


def test_cross_attention_of_all_blocks_shares_what_the_encoder_puts_out(make_model) -> None:
    found = collect(make_model("t5"), [data_for("t5")])
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in (0, 1) for x in "kv"]
    assert found.shared(cross[-1]) == cross


class Branches(nn.Module):
    """Two layers whose inputs are made by functions of the test."""

    def __init__(self, *inputs: Callable[[torch.Tensor, int], torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 4).double() for _ in inputs)
        self.inputs = inputs
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = [make(x, self.calls) for make in self.inputs]
        self.calls += 1
        return sum((layer(value) for layer, value in zip(self.layers, own, strict=True)), torch.zeros(()))


def branch_batches(count: int = 4) -> list[Batch]:
    return [{"x": torch.randn(2, 3, 5, dtype=torch.float64)} for _ in range(count)]


def same(x: torch.Tensor, call: int) -> torch.Tensor:
    return x


SOMETIMES = {
    "shared at first": lambda x, call: x if call < 3 else x * 2,  # the first call is that of the probe
    "apart at first": lambda x, call: x * 2 if call < 3 else x,
    "in the probe alone": lambda x, call: x if call == 0 else x * 2,
    "a copy": lambda x, call: x.clone(),
    "every other time": lambda x, call: x if call % 2 else x * 2,
}


@pytest.mark.parametrize("kind", SOMETIMES)
def test_sharing_that_comes_and_goes(kind: str) -> None:
    batches = branch_batches()
    model = Branches(same, SOMETIMES[kind])
    inputs: list[list[torch.Tensor]] = []
    make = SOMETIMES[kind]

    def remember(x: torch.Tensor, call: int) -> torch.Tensor:
        if x is batches[0]["x"]:
            inputs.clear()  # the data is gone through again
        inputs.append([x, make(x, call)])
        return inputs[-1][1]

    model.inputs = (same, remember)
    found = collect(model, batches)
    for index in (0, 1):
        rows = torch.cat([pair[index] for pair in inputs]).flatten(0, 1)
        assert_moments(found[f"layers.{index}"], rows, 1e-12)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        y = self.first(x)
        return y + self.second(x.mul_(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_tensor_changed_in_place_is_another(mode: Any) -> None:
    batches = branch_batches(2)
    with mode():
        found = collect(InPlace(), batches)
    rows = torch.cat([batch["x"] for batch in batches]).flatten(0, 1)
    assert_moments(found["first"], rows, 1e-12)
    assert_moments(found["second"], 3 * rows, 1e-12)


class Strided(nn.Module):
    """Two views that begin at the same place and have the same number of entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 2).double(), nn.Linear(5, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x * 2], -1)  # (tokens, 10)
        return self.first(wide[::2, :5]) + self.second(wide[: len(wide) // 2, :5])


def test_views_with_other_strides_are_not_shared() -> None:
    x = torch.randn(8, 5, dtype=torch.float64)
    found = collect(Strided(), [{"x": x}])
    assert_moments(found["first"], x[::2], 1e-12)
    assert_moments(found["second"], x[:4], 1e-12)


class Reused(nn.Module):
    """Two tensors that follow each other at the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 2).double(), nn.Linear(5, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x.numpy().copy()
        out = self.first(torch.from_numpy(memory))
        memory *= 3
        return out + self.second(torch.from_numpy(memory))


def test_memory_that_is_used_again_is_not_taken_for_the_same_tensor() -> None:
    batches = branch_batches()
    found = collect(Reused(), batches)
    rows = torch.cat([batch["x"] for batch in batches]).flatten(0, 1)
    assert_moments(found["first"], rows, 1e-12)
    assert_moments(found["second"], 3 * rows, 1e-12)


class Twice(nn.Module):
    """The second layer is called again with an input that the first never saw, or the first is."""

    def __init__(self, again: str):
        super().__init__()
        self.first, self.second, self.again = nn.Linear(5, 5).double(), nn.Linear(5, 5).double(), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.first(x) + self.second(x)
        return out + getattr(self, self.again)(x * 2)


@pytest.mark.parametrize("again", ["first", "second"])
def test_a_module_that_runs_again_on_its_own(again: str) -> None:
    batches = branch_batches(3)
    found = collect(Twice(again), batches)
    rows = torch.cat([batch["x"] for batch in batches]).flatten(0, 1)
    for name in ("first", "second"):
        assert_moments(found[name], torch.cat([rows, 2 * rows]) if name == again else rows, 1e-12)


def test_a_collector_alone_says_which_site_changed() -> None:
    model = Branches(same, lambda x, call: x if call == 0 else x + 1)
    collector = Collector(model, sites_of(matrices_of(model), False))
    first, second = branch_batches(2)
    with collector.attached(), torch.no_grad():
        model(**first)
        assert collector.owners() == {"layers.0": "layers.0", "layers.1": "layers.0"}
        with pytest.raises(SharingChangedError, match=r"layers\.1 also entered another") as caught:
            model(**second)
    assert caught.value.site == "layers.1"
    assert hooks_of(model) == 0


def test_sites_kept_apart_have_sums_of_their_own(make_model) -> None:
    model = make_model("bert")
    key = "encoder.layer.0.attention.self.key"
    collector = Collector(model, sites_of(RMTAnalyzer(model).matrices, False), [key])
    with collector.attached(), torch.no_grad():
        model(**data_for("bert"))
    sums, owners = collector.result()
    assert owners[key] == key and owners[key.replace("key", "value")] == key.replace("key", "query")
    torch.testing.assert_close(sums[key].outer, sums[key.replace("key", "query")].outer, rtol=0, atol=0)


# Training


def collected_while_training(model: nn.Module, data: Batch) -> Collector:
    collector = Collector(model, sites_of(RMTAnalyzer(model).matrices, False))
    with collector.attached():
        for batch in batches_of(data, 3):
            model(**batch).loss.backward()
    return collector


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradient_checkpointing_counts_every_token_once(family: str, reentrant: bool, make_model) -> None:
    model = make_model(family, attention_dropout=0.0).double().train()
    data = data_for(family)
    data["labels"] = data["input_ids"]
    plain = collected_while_training(model, data).result()[0]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    gate = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    before = hooks_of(model)
    again = collected_while_training(model, data).result()[0]
    gate.remove()
    assert len(runs) == 4, "the layer ran again in the backward pass"
    assert hooks_of(model) == before - 1
    assert again.keys() == plain.keys()
    for key, moments in again.items():
        assert moments.tokens == plain[key].tokens
        torch.testing.assert_close(moments.outer, plain[key].outer, rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "q_proj" in name)


def test_gradients_are_those_without_a_collector(make_model) -> None:
    model = make_model("mixtral", experts_implementation="eager").double()
    data = data_for("mixtral") | {"labels": torch.randint(1, 99, (SEQUENCES, LENGTH))}
    model(**data).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    collector = Collector(model, sites_of(RMTAnalyzer(model).matrices, False, outputs=True))
    with collector.attached():
        model(**data).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-9, atol=1e-12)


def test_a_guest_lets_the_forward_pass_go_on(make_model) -> None:
    model = make_model("bert")
    collector = Collector(model, sites_of(RMTAnalyzer(model).matrices, False), guest=True)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with collector.attached(), torch.no_grad():
        model(**data_for("bert"))
        model(**data_for("bert"))
    assert "batch 0: there is NaN or Inf in what enters encoder.layer.1.attention.self.query" in str(collector.error)
    assert hooks_of(model) == 0


def test_train_mode_is_kept_and_noted(make_model) -> None:
    model = make_model("bert").train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = collect(model, [data_for("bert")])
    assert found.settings["dropout"] is True
    assert [module.training for module in model.modules()] == modes
    torch.set_rng_state(random)
    assert_same_covariances(collect(model, [data_for_seeded("bert", random)]), found)
    assert collect(model.eval(), [data_for("bert")]).settings["dropout"] is False


def data_for_seeded(family: str, state: torch.Tensor) -> Batch:
    torch.set_rng_state(state)
    return data_for(family)


def assert_same_covariances(a: ActivationCovariances, b: ActivationCovariances, tolerance: float = 1e-10) -> None:
    assert list(a) == list(b)
    for name in a:
        sides = [(a[name], b[name])]
        if (mine := a.output(name)) is not None and (theirs := b.output(name)) is not None:
            sides.append((mine, theirs))
        for mine, theirs in sides:
            assert mine.tokens == theirs.tokens
            scale = float(theirs.outer.abs().max())
            assert float((mine.outer - theirs.outer).abs().max()) <= tolerance * scale, name


# How a model runs


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_autocast(family: str, make_model) -> None:
    model, batches = make_model(family), batches_of(data_for(family), 3)
    with torch.autocast("cpu", torch.bfloat16):
        analyzer = RMTAnalyzer(model)
        found = analyzer.collect(batches, progress=False)
        rows = explicit(model, analyzer.matrices, batches)
    for name, moments in found.items():
        tolerance = 1e-2 if "down_proj" in name else 1e-6  # recomputed by other roundings
        assert_moments(moments, rows[name, "input"], tolerance, name)


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize("way", ["wrapped", "in place", "a layer"])
def test_compiled_models(family: str, way: str, make_model) -> None:
    """Their hooks are not compiled in, and afterwards compiled code runs again."""
    model, data = make_model(family), data_for(family)
    expected = collect(model, [data])
    runs: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return module.forward(*args)

        return run

    compiled = model
    if way == "wrapped":
        compiled = torch.compile(model, backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    else:
        layers = unwrap(model).get_submodule("encoder.layer" if family == "bert" else "model.layers")
        layers[0] = torch.compile(layers[0], backend=backend)  # type: ignore[index, operator]
    with torch.no_grad():
        before = compiled(**data)[0]
    assert runs
    runs.clear()
    assert_same_covariances(collect(compiled, [data]), expected, 1e-6)
    assert not runs
    with torch.no_grad():
        torch.testing.assert_close(compiled(**data)[0], before)
    assert runs


def test_adapters(make_model) -> None:
    """Outputs are those of the base with its adapter; the input of a matrix is what enters both."""
    from peft import LoraConfig, get_peft_model

    model = make_model("bert").double()
    config = LoraConfig(target_modules=["query", "dense"], r=3, init_lora_weights=False)
    model = get_peft_model(model, config).double().eval()
    batches = batches_of(data_for("bert"), 2)
    found = assert_explicit(model, batches, 1e-12)
    assert found.shared("encoder.layer.1.attention.self.query") == [
        f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")
    ]
    base = collect(model, batches, adapters=False, outputs=True)
    analyzer = RMTAnalyzer(model, adapters=False)
    with model.disable_adapter():
        rows = explicit(model, analyzer.matrices, batches)
    for matrix in analyzer.matrices:
        output = base.output(matrix.name)
        assert output is not None
        assert_moments(base[matrix.name], rows[matrix.name, "input"], 1e-12)
        assert_moments(output, rows[matrix.name, "output"], 1e-12)  # by the base's weight alone
    assert base.fingerprints != found.fingerprints
    assert_same_covariances(collect(model, batches), found)  # the adapters are on again
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge them first"):
        collect(model, batches, adapters=False)


def test_adapters_of_experts(make_model) -> None:
    from peft import LoraConfig, get_peft_model

    model, data = make_model("mixtral").double(), data_for("mixtral")
    plain = collect(model, [data])
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    model = get_peft_model(model, config).double().eval()
    assert_same_covariances(collect(model, [data]), plain)  # adapters begin as zeros


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(where: str, make_model, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model, batches = make_model("mixtral").double(), batches_of(data_for("mixtral"), 2)
    expected = collect(model, batches, outputs=True)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert next(model.model.layers.parameters()).device.type == "meta"
    assert_same_covariances(collect(model, batches, outputs=True), expected, 1e-12)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_run_as_written_for_a_while(implementation: str, make_model) -> None:
    model = make_model("mixtral", experts_implementation=implementation).double()
    expected = assert_explicit(model, [data_for("mixtral")], 1e-12)
    assert model.config._experts_implementation == implementation
    with contextlib.suppress(KeyError), eager(model):
        assert model.config._experts_implementation == "eager"
        raise KeyError
    assert model.config._experts_implementation == implementation
    assert any("[expert=2][up]" in name for name in expected)


class OneExpertStack(nn.Module):
    """Experts whose stacks have one shape, and hidden states that are flattened inside."""

    def __init__(self, reshaped: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 6, 6, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 6, 6, dtype=torch.float64))
        self.reshaped = reshaped


class SquareExperts(OneExpertStack):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 6) if self.reshaped else hidden.flatten(0, 1) * 1
        out = torch.zeros_like(flat)
        chosen = (flat.sum(-1) > 0).long()  # nothing for expert 2
        for expert in range(2):
            positions = torch.where(chosen == expert)[0]
            inner = F.linear(flat[positions], self.first[expert])
            out[positions] = F.linear(inner, self.second[expert])
        return out.view(hidden.shape)


class WithExperts(nn.Module):
    def __init__(self, reshaped: bool):
        super().__init__()
        self.experts = SquareExperts(reshaped)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.experts(x)


def test_stacks_of_one_shape_are_told_apart() -> None:
    model, x, mask = WithExperts(True), torch.randn(SEQUENCES, LENGTH, 6).double(), token_mask()
    with pytest.warns(UserWarning, match=r"no token reached 2 matrices.*experts\.first\[expert=2\]"):
        found = collect(model, [{"x": x, "attention_mask": mask}])
    flat = x[mask.bool()]
    for expert in (0, 1):
        entering = flat[(flat.sum(-1) > 0).long() == expert]
        assert_moments(found[f"experts.first[expert={expert}]"], entering, 1e-12)
        inner = entering @ model.experts.first[expert].detach().mT
        assert_moments(found[f"experts.second[expert={expert}]"], inner, 1e-12)


def test_rows_of_experts_from_unknown_positions_are_all_counted_and_told() -> None:
    model, x, mask = WithExperts(False), torch.randn(SEQUENCES, LENGTH, 6).double(), token_mask()
    unfit = r"does not fit what enters experts\.first\[expert=0\].*padding counted"
    with pytest.warns(UserWarning, match="no token reached 2"), pytest.warns(UserWarning, match=unfit):
        found = collect(model, [{"x": x, "attention_mask": mask}])
    flat = x.flatten(0, 1)
    assert_moments(found["experts.first[expert=1]"], flat[flat.sum(-1) > 0], 1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attention(x, key=memory, value=memory * 2)[0]


def test_attention_of_torch_reads_query_key_and_value_apart() -> None:
    model, x, memory = Attention().double(), torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    with pytest.warns(UserWarning, match=r"no token reached 1 matrices.*out_proj"):
        found = collect(model, [{"x": x, "memory": memory}])
    for part, rows in {"query": x, "key": memory, "value": 2 * memory}.items():
        assert_moments(found[f"attention.in_proj_weight[{part}]"], rows.flatten(0, 1), 1e-12)


def test_encoder_of_torch(make_model) -> None:
    """Its fused fast path calls no module, and is not taken while hooks are on."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    src = torch.randn(2, 3, 8).double()
    with pytest.warns(UserWarning, match=r"no token reached 2 matrices"):
        found = collect(model, [{"src": src}])
    assert_moments(found["layers.0.self_attn.in_proj_weight[query]"], src.flatten(0, 1), 1e-12)
    assert found["layers.1.linear2"].tokens == 6


def test_a_model_that_is_one_layer() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    model = nn.Linear(5, 3).double()
    found = collect(model, [{"input": x}], outputs=True)
    (name,) = found
    output = found.output(name)
    assert output is not None
    assert_moments(found[name], x, 1e-12)
    assert_moments(output, model(x).detach(), 1e-12)


# Heads and embeddings


@pytest.mark.parametrize("labels", [True, False])
def test_a_head_sees_every_token(labels: bool, make_model) -> None:
    """Though nobody needs more logits than one otherwise."""
    model = make_model("llama", tie_word_embeddings=False).double()
    data = data_for("llama") | ({"labels": torch.randint(1, 99, (SEQUENCES, LENGTH))} if labels else {})
    found = RMTAnalyzer(model, head=True).collect([data], progress=False, outputs=True)
    rows = explicit(model, [m for m in matrices_of(model) if m.kind == "head"], [data])
    assert_moments(found["lm_head"], rows["lm_head", "input"], 1e-12)


def test_embeddings_read_no_activations(make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"), embeddings=True)
    data = data_for("bert")
    found = analyzer.collect([data], progress=False)
    assert not any("embeddings" in name for name in found)
    assert "embeddings.word_embeddings" in found.settings["silent"]
    report = analyzer.analyze(covariances=found, sides="right", roles=["query", "embeddings.word_embeddings"])
    assert report["embeddings.word_embeddings"].row["overlap_above"] is None
    with pytest.raises(ValueError, match="none of these matrices reads activations"):
        analyzer.collect([data], roles="embeddings.*")


# Errors


class Odd(nn.Module):
    """Owns a matrix and is called with something of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :5] @ self.weight.mT


def test_activations_of_another_width_are_refused() -> None:
    model = nn.Sequential(Odd())
    with pytest.raises(ActivationError, match=r"0: activations of 6 features for a weight of 5"):
        collect(model, [{"input": torch.randn(2, 6)}])
    assert hooks_of(model) == 0


def test_hooks_come_off_where_one_cannot_be_put_on(make_model, monkeypatch) -> None:
    model = make_model("bert")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model.encoder.layer[1].output.dense, "register_forward_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        collect(model, [data_for("bert")])
    assert hooks_of(model) == 0
