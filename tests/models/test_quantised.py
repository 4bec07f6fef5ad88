"""Quantised weights are read as their library dequantises them, and never changed; unknown codes are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt import Decile, RMTAnalyzer, SVDPruner
from hf_rmt.models.checkpoints import Checkpoint
from hf_rmt.models.live import matrices_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.models.shards import CheckpointError
from hf_rmt.slicing.norms import refuse
from tests.conftest import FAMILIES

TOKENS = torch.tensor([[5, 17, 42, 7, 61, 3]])
QUERY = "layers.0.self_attn.q_proj"


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block."""
    path = tmp_path_factory.mktemp("llama")
    _, _, sizes = FAMILIES["llama"]
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, "num_hidden_layers": 1})).save_pretrained(path)
    return path


def _loaded(folder: Path, config: Any = None) -> nn.Module:
    options = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def _replaced(folder: Path, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with other linear layers in its blocks, as libraries put them there."""
    model = _loaded(folder)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, make(module))
    return model


def _bitsandbytes(folder: Path, **options: Any) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    return _loaded(folder, transformers.BitsAndBytesConfig(**options))


def _torchao(folder: Path, config: str, **options: Any) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    if "group" in options:
        options["granularity"] = torchao.PerGroup(options.pop("group"))
    return _loaded(folder, transformers.TorchAoConfig(getattr(torchao, config)(**options)))


def _quantize_(folder: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = _loaded(folder)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def _quanto(folder: Path, weights: str) -> nn.Module:
    pytest.importorskip("optimum.quanto")
    return _loaded(folder, transformers.QuantoConfig(weights=weights))


def _hqq(folder: Path, nbits: int, **options: Any) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=nbits, group_size=32, **options)
    return _replaced(folder, lambda old: hqq.HQQLinear(old, config, compute_dtype=torch.float32, device="cpu"))


def _dynamic(folder: Path) -> nn.Module:
    pytest.importorskip("torch.ao.quantization")
    return torch.ao.quantization.quantize_dynamic(_loaded(folder), {nn.Linear}, dtype=torch.qint8)


def _gemma(folder: Path, bits: int) -> nn.Module:
    gemma = pytest.importorskip("transformers.integrations.gemma_quant")

    def layer(old: nn.Linear) -> nn.Module:
        new = gemma.QuantizedLinear(old.in_features, old.out_features, num_bits=bits)
        per_byte, top = 8 // bits, 2 ** (bits - 1) - 1
        scale = old.weight.detach().abs().amax(1, keepdim=True) / top
        codes = (old.weight.detach() / scale).round().to(torch.int16)
        if per_byte > 1:
            codes = (codes + 2 ** (bits - 1)).view(len(codes), -1, per_byte)
            codes = sum(codes[..., i] << (bits * i) for i in range(per_byte))
        new.weight.data, new.weight_scale.data = codes.to(new.weight.dtype), scale
        return new

    return _replaced(folder, layer)


#: How to quantise a model, the name in messages, how far forward passes round, and how far quantisation does.
LIBRARIES: dict[str, tuple[Callable[[Path], nn.Module], str, float, float]] = {
    "nf4": (
        lambda f: _bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes 4-bit",
        1e-2,
        0.1,
    ),
    "fp4_twice": (
        lambda f: _bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
        "bitsandbytes 4-bit",
        1e-2,
        0.15,
    ),
    "fp4_in_float32": (
        lambda f: _bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_storage=torch.float32),
        "bitsandbytes 4-bit",
        1e-2,
        0.15,
    ),
    "int8": (lambda f: _bitsandbytes(f, load_in_8bit=True), "bitsandbytes 8-bit", 1e-3, 0.01),
    "torchao_int8": (lambda f: _torchao(f, "Int8WeightOnlyConfig"), "torchao", 1e-5, 0.01),
    "torchao_int4": (
        lambda f: _torchao(f, "IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32),
        "torchao",
        1e-5,
        0.15,
    ),
    "torchao_float8": (lambda f: _torchao(f, "Float8WeightOnlyConfig"), "torchao", 1e-5, 0.04),
    "torchao_quantize_": (_quantize_, "torchao", 1e-5, 0.01),
    "quanto_int8": (lambda f: _quanto(f, "int8"), "optimum-quanto", 1e-5, 0.01),
    "quanto_int4": (lambda f: _quanto(f, "int4"), "optimum-quanto", 1e-5, 0.15),
    "quanto_float8": (lambda f: _quanto(f, "float8"), "optimum-quanto", 1e-5, 0.04),
    "hqq_4": (lambda f: _hqq(f, 4), "HQQ", 1e-5, 0.15),
    "hqq_3": (lambda f: _hqq(f, 3, axis=0), "HQQ", 1e-5, 0.25),
    "hqq_in_float": (lambda f: _hqq(f, 8, view_as_float=True), "HQQ", 1e-5, 0.01),
    "torch_ao": (_dynamic, "torch.ao", 1e-5, 0.01),
    "gemma_8": (lambda f: _gemma(f, 8), "packed Gemma", 1e-5, 0.01),
    "gemma_4": (lambda f: _gemma(f, 4), "packed Gemma", 1e-5, 0.2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_quantised_model(kind: str, folder: Path) -> None:
    quantise, name, rounding, error = LIBRARIES[kind]
    plain, model = _loaded(folder), quantise(folder)
    with torch.no_grad():
        before = model(TOKENS).logits
    matrices, originals = matrices_of(model), matrices_of(plain)
    assert [m.name for m in matrices] == [m.name for m in originals]
    assert [(m.shape, m.kind, m.role) for m in matrices] == [(m.shape, m.kind, m.role) for m in originals]
    for matrix, original in zip(matrices[1:-1], originals[1:-1], strict=True):
        weight = matrix.read()
        assert weight.dtype.is_floating_point and type(weight) is torch.Tensor
        assert 0 < (weight - original.read()).norm() / original.read().norm() < error
        layer: Any = matrix.load.module  # type: ignore[attr-defined]
        with torch.no_grad():
            computed = layer(torch.eye(matrix.shape[1])).T.float()
        torch.testing.assert_close(weight.float(), computed, atol=rounding * weight.abs().max().item(), rtol=0)
    analyzer = RMTAnalyzer(model)
    covariances = analyzer.collect([{"input_ids": TOKENS}], outputs=True, progress=False)
    report = analyzer.analyze(roles="query", covariances=covariances, workers=1, progress=False)
    assert list(report) == [QUERY]
    _assert_unchanging(model, rf"q_proj\.weight is stored as {name} values.*(load|dequantise) the model")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before), "reading must leave the model as it was"


def _assert_unchanging(model: nn.Module, message: str) -> None:
    matrix = _named(model)
    before = matrix.read().clone()
    for call in (matrix.check_writable, lambda: matrix.write(torch.zeros(matrix.shape))):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        SVDPruner(model, workers=1, progress=False).remove(Decile(1), roles="query")
    with pytest.raises(ValueError, match="quantised"):
        refuse(model)
    assert torch.equal(_named(model).read(), before)


def _named(model: nn.Module, name: str = QUERY) -> WeightMatrix:
    return next(matrix for matrix in matrices_of(model) if matrix.name == name)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_dequantised_for_good(bits: int, folder: Path) -> None:
    model: Any = _bitsandbytes(folder, **{f"load_in_{bits}bit": True})
    weight = _named(model).read()
    model.dequantize()
    torch.testing.assert_close(_named(model).read().float(), weight.float(), atol=1e-3, rtol=0)
    _named(model).write(torch.ones(64, 64))
    assert torch.equal(_named(model).read().float(), torch.ones(64, 64))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_that_packs_anew_for_a_cpu(nested: bool, storage: torch.dtype) -> None:
    """As forward passes on CPUs with AVX512-BF16 do."""
    bnb = pytest.importorskip("bitsandbytes")
    if not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes never does")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compress_statistics=nested, quant_storage=storage)
    layer.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    matrix = matrices_of(nn.Sequential(layer.to("cpu")))[0]
    expected = matrix.read()
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    for _ in range(2):
        torch.testing.assert_close(matrix.read(), expected, atol=0, rtol=2**-8)
        assert weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("kind", ["Embedding4bit", "EmbeddingNF4", "Embedding8bit"])
def test_embeddings_of_bitsandbytes(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = getattr(bnb.nn, kind)(100, 64)
    layer.load_state_dict(nn.Embedding(100, 64).state_dict())
    matrix = matrices_of(nn.Sequential(layer.to("cpu")))[0]
    assert (matrix.shape, matrix.kind) == ((64, 100), "embedding")
    torch.testing.assert_close(matrix.read(), layer(torch.arange(100)).T, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"0\.weight is stored as bitsandbytes"):
        matrix.check_writable()


def test_experts_of_bitsandbytes(make_model) -> None:
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = make_model("mixtral", num_hidden_layers=1)
    names = [matrix.name for matrix in matrices_of(model)]
    experts = model.model.layers[0].mlp.experts
    bnb.replace_parameter_4bit(experts, "down_proj")
    assert sorted(matrix.name for matrix in matrices_of(model)) == sorted(names)
    matrix = _named(model, "layers.0.mlp.experts.down_proj[expert=1]")
    assert torch.equal(matrix.read(), experts.down_proj[1])
    with pytest.raises(ValueError, match=r"experts\.down_proj is stored as bitsandbytes 4-bit"):
        matrix.check_writable()


def test_bitsandbytes_that_has_not_packed_yet() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for layer in (bnb.nn.Linear4bit(64, 64, bias=False), bnb.nn.Linear8bitLt(64, 64, False, has_fp16_weights=False)):
        assert torch.equal(matrices_of(nn.Sequential(layer))[0].read(), layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_torchao_beyond_linear_layers(make_model) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model("mixtral", num_hidden_layers=1).to(torch.bfloat16)
    names = [matrix.name for matrix in matrices_of(model)]
    config = torchao.IntxWeightOnlyConfig(granularity=torchao.PerGroup(32))
    torchao.quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Embedding))
    parameter = "model.layers.0.mlp.experts.down_proj"
    torchao.quantize_(model, torchao.FqnToConfig({parameter: torchao.Float8WeightOnlyConfig()}), filter_fn=None)
    assert [matrix.name for matrix in matrices_of(model)] == names
    table = model.model.embed_tokens(torch.arange(100))
    assert torch.equal(_named(model, "embed_tokens").read(), table.T)
    matrix = _named(model, "layers.0.mlp.experts.down_proj[expert=1]")
    assert torch.equal(matrix.read(), model.get_parameter(parameter).dequantize()[1])
    with pytest.raises(ValueError, match=r"experts\.down_proj is stored as torchao"):
        matrix.check_writable()


@pytest.mark.filterwarnings("ignore")
def test_torchao_that_scales_what_enters() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model[0].weight.act_pre_scale = torch.linspace(0.5, 2, 64)
    expected = model[0].weight.dequantize() * torch.linspace(0.5, 2, 64)
    assert torch.equal(matrices_of(model)[0].read(), expected)


# compressed-tensors

_SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}


def _calibrated(folder: Path, form: str) -> nn.Module:
    """A model that compressed-tensors is about to compress."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization as ct
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = ct.QuantizationArgs(**_SCHEMES[form])
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    config = ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen")
    model = _loaded(folder).to(torch.bfloat16)  # which decompressed float4 always is
    ct.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight: Any = module.weight.detach()
            groups = weight.view(len(weight), -1, arguments.group_size or weight.shape[1])
            scale = 2688 / weight.abs().max().view(1) if hasattr(module, "weight_global_scale") else None
            if scale is not None:
                module.weight_global_scale.data.copy_(scale)
            scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale=scale)
            module.weight_scale.data.copy_(scales)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zeros)
    return model


def _compressed(folder: Path, form: str) -> Path:
    model: Any = _calibrated(folder, form)
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / form)
    compressor.update_config(folder / form)
    return folder / form


@pytest.mark.parametrize("form", _SCHEMES)
def test_compressed_tensors(form: str, folder: Path) -> None:
    compressed = _compressed(folder, form)
    plain = _loaded(compressed, transformers.CompressedTensorsConfig(dequantize=True))
    expected = {matrix.name: matrix.read() for matrix in matrices_of(plain)}
    assert not torch.equal(expected[QUERY], _named(_loaded(folder)).read())
    model = _loaded(compressed)
    analyzer = RMTAnalyzer(model)
    for _ in range(2):  # before and after the first forward pass, which decompresses
        found = {matrix.name: matrix.read() for matrix in matrices_of(model)}
        assert list(found) == list(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight)
        _assert_unchanging(model, r"q_proj\.weight is stored as compressed-tensors .*\(dequantize=True\)")
        assert list(analyzer.analyze(roles="query", workers=1, progress=False)) == [QUERY]
        analyzer.collect([{"input_ids": TOKENS}], roles="query", progress=False)
    _named(plain).check_writable()


def test_compressed_tensors_that_round_in_each_forward_pass(folder: Path) -> None:
    model = _calibrated(folder, "pack-quantized")
    layer: Any = model.get_submodule(f"model.{QUERY}")
    computed = layer(torch.eye(64, dtype=torch.bfloat16)).T
    assert (computed - layer.weight).abs().max() > 1e-3
    torch.testing.assert_close(_named(model).read(), computed)


# Layers of gptqmodel


def _packed(linear: nn.Linear, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros by row and group of 32."""
    groups = linear.weight.detach().float().view(linear.out_features, -1, 32)
    scales = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    return scales.half(), torch.round(-groups.amin(-1) / scales)


@pytest.mark.parametrize("kind", ["torch.TorchLinear", "torch_awq.AwqTorchLinear"])
def test_gptq_and_awq(kind: str) -> None:
    file, _, name = kind.rpartition(".")
    pytest.importorskip("gptqmodel")
    cls = getattr(pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{file}"), name)
    linear = nn.Linear(64, 96).half()
    shape = {"in_features": 64, "out_features": 96, "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    layer = cls(**shape, bias=True, register_buffers=True)
    layer.pack(linear, *_packed(linear, 4), g_idx=torch.arange(64, dtype=torch.int32) // 32)
    layer.post_init()
    matrix = matrices_of(nn.Sequential(layer.eval()))[0]
    computed = (layer(torch.eye(64).half()) - layer.bias).T
    assert matrix.shape == (96, 64)
    torch.testing.assert_close(matrix.read(), computed, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match=r"0\.weight is stored as (GPTQ|AWQ) values.* load the model unquantised"):
        matrix.check_writable()


class TorchLinear(nn.Module):
    """GPTQ's documented layout: eight 4-bit rows in one int32, zeros by group and column."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scales, zeros = (each.T.float() for each in _packed(linear, 4))
        codes = torch.round(linear.weight.detach().T / scales.repeat_interleave(32, 0) + zeros.repeat_interleave(32, 0))
        shifts = 4 * torch.arange(8)
        eight = codes.clamp(0, 15).long().view(-1, 8, self.out_features) << shifts[None, :, None]
        self.register_buffer("qweight", eight.sum(1).to(torch.int32))
        self.register_buffer("qzeros", (zeros.long().view(len(zeros), -1, 8) << shifts).sum(2).to(torch.int32))
        self.register_buffer("scales", scales)

    def dequantize_weight(self) -> torch.Tensor:
        shifts = 4 * torch.arange(8)
        codes = ((self.qweight[:, None] >> shifts[None, :, None]) & 15).flatten(0, 1)
        zeros = ((self.qzeros[..., None] >> shifts) & 15).flatten(1)
        return self.scales.repeat_interleave(32, 0) * (codes - zeros.repeat_interleave(32, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantize_weight()


def test_a_model_of_layers_that_are_no_linear_ones(folder: Path) -> None:
    plain, model = _loaded(folder), _replaced(folder, TorchLinear)
    assert [(m.name, m.shape) for m in matrices_of(model)] == [(m.name, m.shape) for m in matrices_of(plain)]
    assert RMTAnalyzer(model, head=True, embeddings=True).left_out == []
    assert (_named(model).read() - _named(plain).read()).norm() / _named(plain).read().norm() < 0.15
    covariances = RMTAnalyzer(model).collect([{"input_ids": TOKENS}], outputs=True, progress=False)
    report = RMTAnalyzer(model).analyze(roles="query", covariances=covariances, workers=1, progress=False)
    assert report[QUERY].left is not None
    _assert_unchanging(model, r"q_proj\.weight is stored as GPTQ values")


def test_gptq_layers_that_pack_anew_are_refused() -> None:
    """They inherit the method, which knows nothing of what their kernels hold."""

    class TorchAtenLinear(TorchLinear):
        __module__ = "gptqmodel.nn_modules.qlinear.torch_aten_kernel"

    with pytest.raises(ValueError, match=r"0 is packed \(it holds qweight\).* unquantised"):
        matrices_of(nn.Sequential(TorchAtenLinear(nn.Linear(64, 64))))


# Layers of transformers


def test_block_scaled_float8() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(64, 64, block_size=(32, 32))
    layer.weight.data = torch.randn(64, 64).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = layer.weight.float() * layer.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
    matrix = matrices_of(nn.Sequential(layer))[0]
    torch.testing.assert_close(matrix.read().float(), expected)
    with pytest.raises(ValueError, match=r"block-scaled float8 values.*FineGrainedFP8Config\(dequantize=True\)"):
        matrix.check_writable()


def test_float8_of_one_scale() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(64, 32)
    layer.weight.data = torch.randn(32, 64).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.tensor(0.25)
    torch.testing.assert_close(matrices_of(nn.Sequential(layer))[0].read(), layer.weight.float() / 4)


def test_a_float8_embedding() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "FP8Embedding"):
        pytest.skip("this transformers has none")
    layer = fp8.FP8Embedding(100, 64)
    layer.weight.data = torch.randn(100, 64).to(torch.float8_e4m3fn)
    layer.weight_scale.data = torch.tensor([0.25])
    matrix = matrices_of(nn.Sequential(layer))[0]
    assert matrix.kind == "embedding"
    torch.testing.assert_close(matrix.read(), (layer.weight.float() / 4).T)


class Experts(nn.Module):
    """Parameters as transformers' FP8Experts has them."""

    def __init__(self, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        super().__init__()
        self.block_size = (32, 32)
        self.down_proj = nn.Parameter(torch.randn(2, 64, 64).to(dtype), requires_grad=False)
        self.down_proj_scale_inv = nn.Parameter(torch.rand(2, 2, 2) + 0.5)


def test_block_scaled_float8_experts() -> None:
    model = nn.Sequential(Experts())
    matrices = matrices_of(model)
    assert [m.expert for m in matrices] == [0, 1]
    scale = model[0].down_proj_scale_inv[1].repeat_interleave(32, 0).repeat_interleave(32, 1)
    torch.testing.assert_close(matrices[1].read().float(), model[0].down_proj[1].float() * scale)


def test_a_packed_gemma_embedding() -> None:
    gemma = pytest.importorskip("transformers.integrations.gemma_quant")
    layer = gemma.QuantizedEmbedding(100, 64, torch.float32, num_bits=4)
    layer.embedding_quantized.data.random_(0, 256)
    layer.embedding_scale.data.uniform_(0.5, 2)
    matrix = matrices_of(nn.Sequential(layer))[0]
    assert (matrix.name, matrix.shape, matrix.kind) == ("0", (64, 100), "embedding")
    assert torch.equal(matrix.read(), layer(torch.arange(100)).T)
    with pytest.raises(ValueError, match=r"0\.weight is stored as packed Gemma values"):
        matrix.check_writable()


def test_a_library_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.finegrained_fp8", None)
    with pytest.raises(
        ValueError, match=r"0\.down_proj is stored as block-scaled float8 .*cannot dequantise.*dequantize"
    ):
        matrices_of(nn.Sequential(Experts()))[0].read()


# What is refused


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "gate_up_proj_blocks", "codes"])
def test_packed_layers_are_not_passed_over(name: str) -> None:
    packed = nn.Module()
    packed.register_buffer(name, torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"1 is packed \(it holds {name}\).* load the model unquantised"):
        matrices_of(nn.Sequential(nn.Linear(8, 8), packed))


def test_masks_and_positions_are_no_codes() -> None:
    attention = nn.Module()
    attention.register_buffer("mask", torch.ones(8, 8, dtype=torch.uint8))
    attention.register_buffer("positions", torch.zeros(8, 8, dtype=torch.int64))
    attention.project = nn.Linear(8, 8)
    assert [matrix.name for matrix in matrices_of(nn.Sequential(attention))] == ["0.project"]


def test_float4_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 is packed \(it holds down_proj\).* dequantize=True"):
        matrices_of(nn.Sequential(Experts(torch.int8)))


def test_mxfp4_experts_are_refused(make_model) -> None:
    """As they are loaded, and as triton's kernels want them, which are no tensors of torch."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = make_model("gpt_oss", num_hidden_layers=1)
    experts = mxfp4.Mxfp4GptOssExperts(model.config)
    model.model.layers[0].mlp.experts = experts
    with pytest.raises(ValueError, match=r"mlp\.experts is packed \(it holds .*dequantize=True"):
        matrices_of(model)
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_blocks", "down_proj_blocks"):
        experts._parameters.pop(name, None)
    with pytest.raises(ValueError, match=r"mlp\.experts is packed \(it holds .*dequantize=True"):
        matrices_of(model)


def test_bitnet_is_refused() -> None:
    """Its packed weight is a buffer."""
    from transformers.integrations.bitnet import BitLinear

    matrix = matrices_of(nn.Sequential(BitLinear(64, 32, bias=False, dtype=torch.float32)))[0]
    assert matrix.shape == (32, 64)
    with pytest.raises(
        ValueError, match=r"0\.weight holds integer values \(torch\.uint8\).* load the model unquantised"
    ):
        matrix.read()


@pytest.mark.filterwarnings("ignore")
def test_recurrent_layers_of_torch_ao_are_refused() -> None:
    pytest.importorskip("torch.ao.quantization")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(32, 32)), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="0 is packed"):
        matrices_of(model)


def test_codes_of_no_library() -> None:
    integer = nn.Sequential(nn.Linear(8, 8))
    integer[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    scaled = nn.Sequential(nn.Linear(8, 8).to(torch.float8_e4m3fn))
    scaled[0].weight_scale = nn.Parameter(torch.ones(1))
    for model, kind in ((integer, "integer"), (scaled, "scaled")):
        matrix = matrices_of(model)[0]
        with pytest.raises(
            ValueError, match=rf"0\.weight holds {kind} values \(torch\..* not known here: load the model"
        ):
            matrix.read()
        for call in (matrix.check_writable, lambda matrix=matrix: matrix.write(torch.zeros(8, 8))):
            with pytest.raises(ValueError, match=rf"0\.weight is stored as {kind} values.* load the model unquantised"):
                call()


def test_adapters_on_a_quantised_base(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _bitsandbytes(folder, load_in_4bit=True)
    expected = _named(model).read()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.* has adapters on a quantised base: pass adapters=False"):
        _named(adapted).read()
    base = next(matrix for matrix in matrices_of(adapted, adapters=False) if matrix.name == QUERY)
    assert torch.equal(base.read(), expected)


def test_a_quantised_checkpoint(folder: Path, tmp_path: Path) -> None:
    model: Any = _bitsandbytes(folder, load_in_4bit=True)
    model.save_pretrained(tmp_path)
    message = r"packed weights \(quantization_config.*from_pretrained and use RMTAnalyzer\(model\).* was quantised"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)
    loaded = _loaded(tmp_path)
    assert torch.equal(_named(loaded).read(), _named(model).read())


# Layers of libraries that are not as they are found after loading


def test_packed_bytes_are_known_by_the_state_of_the_module() -> None:
    """FSDP puts other tensors in the place of bitsandbytes' own, and leaves the state with the module."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_storage=torch.bfloat16)
    layer.load_state_dict(nn.Linear(64, 32, bias=False).state_dict())
    layer = layer.to("cpu")
    expected = matrices_of(nn.Sequential(layer))[0].read()
    layer.quant_state = layer.weight.quant_state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    (matrix,) = matrices_of(nn.Sequential(layer))
    assert matrix.shape == (32, 64) and torch.equal(matrix.read(), expected)
    with pytest.raises(ValueError, match="stored as bitsandbytes 4-bit values"):
        matrix.write(torch.zeros(32, 64))


def test_layers_that_round_in_each_pass_are_read_rounded() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    net = nn.Sequential(nn.Linear(32, 16, bias=False))
    plain = net[0].weight.detach().clone()
    quanto.quantize(net, weights=quanto.qint4)
    (matrix,) = matrices_of(net)
    with torch.no_grad():
        torch.testing.assert_close(matrix.read(), net(torch.eye(32)).mT, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(matrix.read(), plain, atol=1e-4)
    with pytest.raises(ValueError, match="stored as optimum-quanto values"):
        matrix.check_writable()


class Table(nn.Module):
    """A plain layer with integers of its own."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("relative_position_index", torch.arange(16).view(4, 4).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_masks_and_tables_of_plain_layers_are_no_codes(dtype: torch.dtype) -> None:
    assert [matrix.name for matrix in matrices_of(nn.Sequential(Table(dtype), nn.Linear(4, 4)))] == ["0", "1"]


def test_a_learnt_scale_makes_no_code_of_a_weight() -> None:
    layer = nn.Linear(4, 4)
    layer.weight_scale = nn.Parameter(torch.ones(()))
    matrix = matrices_of(nn.Sequential(layer))[0]
    matrix.check_writable()
    assert torch.equal(matrix.read(), layer.weight)
