"""``WeightMatrix.write`` is the inverse of ``read``, wherever the matrix lives, and touches nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt.models.checkpoints import Checkpoint
from hf_rmt.models.live import is_sharded, matrices_of
from hf_rmt.models.matrices import WeightMatrix
from tests.conftest import FAMILIES

QUERY = "encoder.layer.0.attention.self.query"
TOKENS = torch.tensor([[5, 17, 42, 7]])
CPU = "cpu"  # after each tensor that goes to a torch.device, accelerate collects garbage
State = dict[str, torch.Tensor]


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def named(model: nn.Module, name: str = QUERY, **options: Any) -> WeightMatrix:
    return next(matrix for matrix in matrices_of(model, **options) if matrix.name == name)


def other_values(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Float64 values that no initialised weight has, so that each counts as changed."""
    return 30 + torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state_of(model: nn.Module) -> State:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        pair = (tensor.flatten().contiguous().view(torch.uint8) for tensor in (found[key], expected[key]))
        assert torch.equal(*pair), key


def computed(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": TOKENS}))[0]


# Every family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_takes_values_and_gives_them_back(family: str, dtype: torch.dtype, make_model) -> None:
    model = make_model(family).to(dtype)
    parameters = dict(model.named_parameters())
    before = state_of(model)
    for number, matrix in enumerate(matrices_of(model)):
        original = matrix.read().clone()
        values = other_values(matrix.shape, number)
        matrix.check_writable()
        matrix.write(values)
        assert torch.equal(matrix.read(), values.to(dtype))
        after = model.state_dict()
        written = model.get_parameter(matrix.parameter).data_ptr()
        for key, tensor in after.items():
            changed = int((tensor != before[key]).sum())
            assert changed == (values.numel() if tensor.data_ptr() == written else 0), key
        matrix.write(original)
        assert_same_bits({matrix.parameter: after[matrix.parameter]}, {matrix.parameter: before[matrix.parameter]})
    assert_same_bits(model.state_dict(), before)
    assert all(parameters[key] is parameter for key, parameter in model.named_parameters())


def test_where_the_values_go(make_model) -> None:
    """By slices that are written down here, family by family."""
    width = 64
    own = torch.arange(16)
    neox_keys = torch.cat([48 * head + 16 + own for head in range(4)])  # q, k and v of a head, then of the next
    places: list[tuple[str, str, Callable[[Any], torch.Tensor]]] = [
        ("bert", QUERY, lambda m: m.encoder.layer[0].attention.self.query.weight),
        ("bert", "embeddings.word_embeddings", lambda m: m.embeddings.word_embeddings.weight.T),
        ("gpt2", "h.1.attn.c_attn[key]", lambda m: m.transformer.h[1].attn.c_attn.weight[:, width : 2 * width].T),
        ("gpt2", "h.1.mlp.c_proj", lambda m: m.transformer.h[1].mlp.c_proj.weight.T),
        (
            "gpt_neox",
            "layers.0.attention.query_key_value[key]",
            lambda m: m.layers[0].attention.query_key_value.weight[neox_keys],
        ),
        (
            "mixtral",
            "layers.1.mlp.experts.gate_up_proj[expert=2][up]",
            lambda m: m.model.layers[1].mlp.experts.gate_up_proj[2, 128:],
        ),
        (
            "gpt_oss",
            "layers.1.mlp.experts.gate_up_proj[expert=1][gate]",
            lambda m: m.model.layers[1].mlp.experts.gate_up_proj[1, :, ::2].T,
        ),
        ("bert_classifier", "classifier", lambda m: m.classifier.weight),
    ]
    for family, name, place in places:
        model = make_model(family)
        matrix = named(model, name)
        values = other_values(matrix.shape)
        matrix.write(values)
        assert torch.equal(place(model), values.float()), name


def test_the_forward_pass_computes_with_what_was_written(make_model) -> None:
    model = make_model("gpt2")
    before = computed(model)
    layer = model.transformer.h[0].attn.c_attn
    x, weight = torch.randn(5, 64), torch.randn(64, 64)
    original = layer(x).detach()
    matrix = named(model, "h.0.attn.c_attn[value]")
    kept = matrix.read().clone()
    matrix.write(weight)
    found = layer(x).detach()
    assert torch.equal(found[:, :128], original[:, :128])
    torch.testing.assert_close(found[:, 128:], x @ weight.T + layer.bias[128:])
    assert not torch.equal(computed(model), before)
    matrix.write(kept)
    assert torch.equal(computed(model), before)


# In place


def test_the_parameter_stays_the_same_object(make_model) -> None:
    model = make_model("bert")
    layer = model.encoder.layer[0].attention.self.query
    layer.weight.requires_grad_(False)
    other = model.encoder.layer[1].attention.self.query.weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    computed_loss = model(TOKENS).last_hidden_state.square().sum()
    computed_loss.backward()
    optimizer.step()
    moments, gradient = optimizer.state[other]["exp_avg"].clone(), other.grad.clone()
    parameter, address = layer.weight, layer.weight.data_ptr()
    for name in (QUERY, QUERY.replace("0", "1")):
        matrix = named(model, name)
        values = torch.randn(matrix.shape, requires_grad=True)
        matrix.write(values)
        assert torch.equal(matrix.read(), values)
    assert layer.weight is parameter and parameter.data_ptr() == address
    assert not parameter.requires_grad and other.requires_grad and other.grad_fn is None and other.is_leaf
    assert torch.equal(optimizer.state[other]["exp_avg"], moments) and torch.equal(other.grad, gradient)


def test_tied_weights_are_written_once_and_stay_tied(make_model) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    matrix = named(model, "embed_tokens")
    values = torch.randn(matrix.shape)
    matrix.write(values)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, values.T)


def test_a_view_of_the_matrix_itself(make_model) -> None:
    """Values that lie where they go to are not overwritten while they are read."""
    for family, name in (("bert", QUERY), ("gpt2", "h.0.attn.c_attn[query]"), ("gpt_neox", "layers.0.attention.dense")):
        matrix = named(make_model(family), name)
        expected = matrix.read().T.clone()
        matrix.write(matrix.read().T)
        assert torch.equal(matrix.read(), expected)


def test_values_that_are_not_finite_or_too_large(make_model) -> None:
    matrix = named(make_model("bert").half())
    values = other_values(matrix.shape)
    values[0, :3] = torch.tensor([float("nan"), float("-inf"), 1e30])
    matrix.write(values)
    assert torch.equal(matrix.read().view(torch.uint8), values.half().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    values = torch.randn(4, 8, dtype=torch.float64)
    matrices_of(model)[0].write(values)
    assert torch.equal(matrices_of(model)[0].read().float(), values.to(dtype).float())


@pytest.mark.parametrize(("made_in", "kind"), [(False, ""), (True, ""), (False, "cpu"), (False, "disk")])
@pytest.mark.parametrize("written_in", [False, True])
def test_inference_mode(made_in: bool, written_in: bool, kind: str, make_model, tmp_path: Path) -> None:
    with torch.inference_mode(made_in):
        model = make_model("bert")
    if kind:
        _offloaded(kind, model, tmp_path)
    with torch.inference_mode(written_in):
        matrix = named(model)
        values = torch.randn(matrix.shape)
        matrix.write(values)
    assert torch.equal(matrix.read(), values)
    if not made_in:
        model(TOKENS).last_hidden_state.sum()  # with gradients, which weights of inference mode would refuse


def test_wrapped_models(make_model, tmp_path: Path) -> None:
    for wrap in (torch.compile, nn.DataParallel):
        model = make_model("bert_classifier")
        values = torch.randn(64, 64)
        named(wrap(model)).write(values)
        assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, values)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model("bert_classifier")
        named(nn.parallel.DistributedDataParallel(model)).write(values)
        assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, values)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_computes_with_it(make_model) -> None:
    model = make_model("bert")
    compiled = torch.compile(model, backend="eager")
    before = computed(compiled)
    named(compiled).write(torch.randn(64, 64))
    after = computed(compiled)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, computed(model))


def test_parts_of_one_parameter_from_several_threads(make_model) -> None:
    model = make_model("mixtral")
    matrices = [m for m in matrices_of(model) if m.expert is not None]
    values = [other_values(m.shape, number) for number, m in enumerate(matrices)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda pair: pair[0].write(pair[1]), zip(matrices, values, strict=True)))
    assert all(torch.equal(m.read(), v.float()) for m, v in zip(matrices, values, strict=True))


# Offloaded by accelerate


def _offloaded(kind: str, model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    if kind == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if kind == "disk":
        return disk_offload(model, str(folder / "offloaded"), execution_device=CPU)
    if kind == "whole blocks":
        preload = [type(block).__name__ for block in (*model.modules(),) if "Attention" in type(block).__name__]
        return cpu_offload(model, execution_device=CPU, preload_module_classes=preload)
    if kind == "dispatched":
        places = {name: "disk" for name, _ in model.named_children()}
        return dispatch_model(model, places, offload_dir=str(folder / "offloaded"), main_device="cpu")
    model.save_pretrained(folder / "saved")
    model.save_pretrained(folder / "offloaded")
    places = {"": "disk"}
    if kind == "mixed":
        blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
        leaves = [name for name, module in model.named_modules() if not [*module.children()]]
        places = {name: "disk" for name in leaves if not name.startswith(blocks)} | {blocks: "cpu"}
    options = {"device_map": places, "offload_folder": str(folder / "offloaded"), "dtype": model.dtype}
    return type(model).from_pretrained(folder / "saved", **options).eval()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OFFLOADED = ["cpu", "disk", "whole blocks", "dispatched", "from_pretrained", "mixed"]


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "gpt_neox"])
def test_offloaded_weights(kind: str, family: str, make_model, tmp_path: Path) -> None:
    """A model in memory with the same edits is the reference, for what is read, computed and saved."""
    reference = make_model(family)
    model = _offloaded(kind, make_model(family), tmp_path)
    files = _files(tmp_path)
    before = computed(model)
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert offloaded
    torch.testing.assert_close(before, computed(reference))
    names = [m.name for m in matrices_of(reference)]
    matrices, expected = ({m.name: m for m in matrices_of(each)} for each in (model, reference))
    originals = {name: matrices[name].read().clone() for name in names}
    for name in names[:: max(1, len(names) // 9)]:  # of one parameter, some parts
        for seed in (1, 2):
            values = 0.1 * (other_values(matrices[name].shape, seed) - 30)
            matrices[name].write(values)
            expected[name].write(values)
        assert torch.equal(matrices[name].read(), values.float())
    for name in names:
        assert torch.equal(matrices[name].read(), expected[name].read()), name
    after = computed(model)
    torch.testing.assert_close(after, computed(reference))
    assert (after - before).abs().max() > 1e-3
    if kind in ("from_pretrained", "mixed"):  # transformers saves what it has offloaded itself
        model.save_pretrained(tmp_path / "edited")
        saved = type(model).from_pretrained(tmp_path / "edited")
        assert_same_bits(saved.state_dict(), reference.state_dict())
    for name in names:
        matrices[name].write(originals[name])
    assert torch.equal(computed(model), before)
    assert [name for name, p in model.named_parameters() if p.device.type == "meta"] == offloaded
    assert {name: data for name, data in _files(tmp_path).items() if not name.startswith("edited")} == files


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_root_and_its_own_parameter(kind: str, tmp_path: Path) -> None:
    """The root has two hooks, one after the other."""
    layer = nn.Linear(6, 4)
    expected = copy.deepcopy(layer)
    _offloaded(kind, layer, tmp_path)
    assert type(layer._hf_hook).__name__ == "SequentialHook"
    matrix = matrices_of(layer)[0]
    assert torch.equal(matrix.read(), expected.weight)
    values, x = torch.randn(4, 6), torch.randn(3, 6)
    matrix.write(values)
    assert torch.equal(matrix.read(), values)
    torch.testing.assert_close(layer(x), x @ values.T + expected.bias)


def test_a_module_that_is_not_offloaded_inside_one_that_is(tmp_path: Path) -> None:
    """The hook of a module is about its own parameters alone."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.full((4,), 2.0)), nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    model = _offloaded("disk", nn.Sequential(Scaled()), tmp_path)
    model[0].inner = nn.Sequential(nn.Linear(4, 4, bias=False))
    matrix, values, x = matrices_of(model)[0], torch.randn(4, 4), torch.randn(3, 4)
    matrix.write(values)
    assert torch.equal(matrix.read(), values)
    torch.testing.assert_close(model(x), 2 * x @ values.T)


@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatched", "from_pretrained"])
@pytest.mark.parametrize("passes", [0, 1])
def test_tied_weights_are_written_together_where_offloading_took_them_apart(
    kind: str, passes: int, make_model, tmp_path: Path
) -> None:
    """From_pretrained leaves that to the first pass. They are one matrix all the same, as they are in memory."""
    reference = make_model("gpt2")
    model = _offloaded(kind, make_model("gpt2"), tmp_path)
    for _ in range(passes):
        computed(model)
    matrices = matrices_of(model)
    assert [m.name for m in matrices] == [m.name for m in matrices_of(reference)]
    matrix = next(m for m in matrices if m.name == "wte")
    for seed in (1, 2):
        values = 0.1 * (other_values(matrix.shape, seed) - 30)
        matrix.write(values)
        named(reference, "wte").write(values)
        torch.testing.assert_close(computed(model), computed(reference))


def test_weights_that_are_not_tied_after_all(make_model, tmp_path: Path) -> None:
    """transformers lists them as tied, and they differ."""
    model = make_model("gpt2")
    model.lm_head.weight = nn.Parameter(torch.randn(100, 64))
    head = model.lm_head.weight.detach().clone()
    model = _offloaded("disk", model, tmp_path)
    named(model, "wte").write(torch.zeros(64, 100))
    assert torch.equal(named(model, "lm_head").read(), head)


def test_hooks_that_are_removed_give_back_what_was_written(make_model) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model = _offloaded("cpu", make_model("bert"), Path())
    values = torch.randn(64, 64)
    named(model).write(values)
    remove_hook_from_submodules(model)
    assert torch.equal(model.encoder.layer[0].attention.self.query.weight, values)


def test_offloaded_in_another_dtype_than_it_computes_in(make_model) -> None:
    """A copy in memory of fewer bits than the parameter could not hold the values."""
    from accelerate import cpu_offload

    model = make_model("bert")
    cpu_offload(model, execution_device=CPU, state_dict={k: v.half() for k, v in model.state_dict().items()})
    matrix = named(model)
    values = torch.randn(64, 64)
    for _ in range(2):
        matrix.write(values)
        assert torch.equal(matrix.read(), values)


def test_written_while_it_is_brought_in(make_model, tmp_path: Path) -> None:
    from accelerate.utils import align_module_device

    model = _offloaded("disk", make_model("bert"), tmp_path)
    layer = model.encoder.layer[0].attention.self.query
    values = torch.randn(64, 64)
    with align_module_device(layer, CPU):
        named(model).write(values)
        assert torch.equal(layer.weight, values)
    assert torch.equal(named(model).read(), values)


def test_offloaded_to_something_that_takes_no_values(make_model) -> None:
    from types import MappingProxyType

    from accelerate import cpu_offload

    model = make_model("bert")
    cpu_offload(model, execution_device=CPU, state_dict=MappingProxyType(model.state_dict()))
    matrix = named(model)
    kept = matrix.read().clone()
    for refused in (matrix.check_writable, lambda: matrix.write(torch.zeros(64, 64))):
        with pytest.raises(
            ValueError,
            match=r"query\.weight is offloaded to a mappingproxy, which cannot be changed: load the model wi",
        ):
            refused()
    assert torch.equal(matrix.read(), kept)


def test_offloaded_weights_are_written_and_read_from_many_threads(make_model, tmp_path: Path) -> None:
    model = _offloaded("disk", make_model("gpt_neox"), tmp_path)
    matrices = [m for m in matrices_of(model) if m.kind == "block"]
    values = [other_values(m.shape, number) for number, m in enumerate(matrices)]
    with ThreadPoolExecutor(6) as pool:
        written = pool.map(lambda pair: pair[0].write(pair[1]), zip(matrices, values, strict=True))
        read = pool.map(lambda m: m.read().isfinite().all(), matrices)
        assert len(list(written)) == len(matrices) and all(read)
    assert all(torch.equal(m.read(), v.float()) for m, v in zip(matrices, values, strict=True))


# peft


def _adapted(model: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["query"], **options}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return adapted.eval()


def _refused(matrix: WeightMatrix, model: nn.Module, message: str) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for call in (matrix.check_writable, lambda: matrix.write(torch.zeros(matrix.shape))):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same_bits({key: model.state_dict()[key] for key in before}, before)


def test_a_matrix_with_active_adapters_is_refused(make_model) -> None:
    adapted = _adapted(make_model("bert"))
    message = rf"{QUERY}\.base_layer\.weight is read together with its adapters.*merge_and_unload.*adapters=False"
    _refused(named(adapted), adapted, message)
    named(adapted, QUERY.replace("query", "key")).check_writable()


def test_the_base_below_adapters_is_written(make_model) -> None:
    adapted = _adapted(make_model("bert"))
    layer = adapted.base_model.model.encoder.layer[0].attention.self.query
    delta = layer.get_delta_weight("default").detach()
    values = torch.randn(64, 64)
    named(adapted, adapters=False).write(values)
    assert torch.equal(layer.base_layer.weight, values)
    torch.testing.assert_close(named(adapted).read(), values + delta)
    assert torch.equal(named(adapted, adapters=False).read(), values)
    with adapted.disable_adapter():
        matrix = named(adapted)
        matrix.write(values + 1)
        assert torch.equal(matrix.read(), values + 1)


def test_merged_adapters_are_refused(make_model) -> None:
    adapted = _adapted(make_model("bert"))
    adapted.merge_adapter()
    for options in ({}, {"adapters": False}):
        _refused(named(adapted, **options), adapted, r"adapters merged into it.*unmerge_adapter\(\).*merge_and_unload")
    adapted.unmerge_adapter()
    model = adapted.merge_and_unload()
    values = torch.randn(64, 64)
    named(model).write(values)
    assert torch.equal(model.encoder.layer[0].attention.self.query.weight, values)


def test_adapters_on_the_parameters_of_experts(make_model) -> None:
    adapted = _adapted(make_model("mixtral"), target_modules=[], target_parameters=["mlp.experts.down_proj"])
    name = "layers.0.mlp.experts.down_proj[expert=1]"
    _refused(named(adapted, name), adapted, "read together with its adapters")
    values = torch.randn(64, 128)
    named(adapted, name, adapters=False).write(values)
    assert torch.equal(named(adapted, name, adapters=False).read(), values)
    other = named(adapted, "layers.0.mlp.experts.gate_up_proj[expert=1][up]")
    other.write(torch.ones(other.shape))
    assert bool((other.read() == 1).all())


def test_modules_that_are_trained_whole(make_model) -> None:
    """What is read is the trained copy, and so is what is written."""
    adapted = _adapted(make_model("bert_classifier"), modules_to_save=["classifier"])
    wrapper = adapted.base_model.model.classifier
    named(adapted, "classifier").write(torch.ones(2, 64))
    assert bool((wrapper.modules_to_save["default"].weight == 1).all())
    assert not bool((wrapper.original_module.weight == 1).any())


def test_a_base_that_is_offloaded_below_adapters(make_model, tmp_path: Path) -> None:
    adapted = _adapted(_offloaded("disk", make_model("bert"), tmp_path))
    values = torch.randn(64, 64)
    named(adapted, adapters=False).write(values)
    assert torch.equal(named(adapted, adapters=False).read(), values)
    with adapted.disable_adapter():
        reference = make_model("bert")
        named(reference).write(values)
        torch.testing.assert_close(computed(adapted), computed(reference))


# What cannot be written


def test_another_shape_is_refused(make_model) -> None:
    model = make_model("gpt2")
    matrix = named(model, "h.0.attn.c_attn[key]")
    before = state_of(model)
    for shape in ((64, 65), (1, 64), (64,), (192, 64), (1, 64, 64)):
        message = rf"h\.0\.attn\.c_attn\[key\] has shape \(64, 64\), and cannot take values of \({shape[0]}"
        with pytest.raises(ValueError, match=message):
            matrix.write(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"c_attn\[key\] takes a torch\.Tensor, not ndarray: use torch\.as_tensor"):
        matrix.write(torch.zeros(64, 64).numpy())  # type: ignore[arg-type]
    assert_same_bits(model.state_dict(), before)


def test_a_weight_that_was_replaced_by_another_shape_is_refused(make_model) -> None:
    model = make_model("bert")
    matrix = named(model)
    layer = model.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(torch.ones(64, 32))
    with pytest.raises(ValueError, match=r"query: expected shape \(64, 64\), found \(64, 32\)"):
        matrix.write(torch.zeros(64, 64))
    assert bool((layer.weight == 1).all())


def test_a_checkpoint_is_refused(make_model, tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    files = _files(tmp_path)
    matrix = next(m for m in Checkpoint(tmp_path).matrices() if m.name == QUERY)
    for call in (matrix.check_writable, lambda: matrix.write(torch.zeros(64, 64))):
        with pytest.raises(ValueError, match=rf"{QUERY} is read from a file.* load the model"):
            call()
    assert _files(tmp_path) == files


def test_a_snapshot_is_refused(make_model, tmp_path: Path) -> None:
    from hf_rmt.reports.snapshot import snapshot_of, take_snapshot

    matrices = matrices_of(make_model("bert"))
    take_snapshot(matrices, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is read from a file"):
        snapshot_of(matrices, tmp_path / "weights.safetensors")[3].check_writable()


def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"query\.weight is on the meta device and has no values.*load the weights"):
        named(model).check_writable()


def test_weights_that_are_computed_are_refused() -> None:
    for made_by in (nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.weight_norm):
        model = nn.Sequential(nn.Linear(8, 8))
        matrix = matrices_of(model)[0]
        made_by(model[0])
        _refused(matrix, model, r"0\.weight is computed from other parameters.*remove_parametrizations")
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        values = torch.randn(8, 8)
        matrix.write(values)
        assert torch.equal(model[0].weight, values)


# Sharded


def _write_sharded(model: Any, blocks: int, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    reference = copy.deepcopy(model)
    # The outermost module keeps its parameters gathered after a pass, in the dtype that it computes in.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in next(module for module in model.modules() if isinstance(module, nn.ModuleList))[:blocks]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    parameters = dict(model.named_parameters())
    before = computed(model)
    assert is_sharded(model)
    for number, (matrix, expected) in enumerate(zip(matrices_of(model), matrices_of(reference), strict=True)):
        original = matrix.read()
        assert torch.equal(original, expected.read())
        values = other_values(matrix.shape, number)
        matrix.write(values + rank)  # the first process's count
        expected.write(values)
        assert torch.equal(matrix.read(), values.to(dtype))
        if number % 3 == 0:
            assert not torch.equal(computed(model), before)
            matrix.write(original)
            expected.write(original)
    model.reshard()
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key] and hasattr(parameter, "full_tensor")
        assert torch.equal(parameter.full_tensor(), reference.get_parameter(key)), key
    with pytest.raises(ValueError, match="cannot take values of"):
        matrix.write(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("family", "blocks", "dtype"),
    [("bert", 1, torch.float32), ("mixtral", 1, torch.float32), ("bert", 0, torch.bfloat16)],
)
def test_sharded_models(family: str, blocks: int, dtype: torch.dtype, make_model, launch: Callable[..., None]) -> None:
    """Some blocks are sharded alone, the rest with the outermost module."""
    launch(_write_sharded, make_model(family).to(dtype), blocks, dtype)
