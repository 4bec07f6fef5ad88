"""Weights that stand for their values in a code: how those of each library are known, and what it makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Coding:
    """How a library keeps a weight.

    Attributes:
        name: what messages call it.
        holds: whether a module keeps the weight of this name so; the tensor is its parameter or buffer of the name.
        values: the weight, or one expert of it, as a plain module would hold it; None where no library says.
        remedy: how to come by a model of plain weights.
        kept_in: where a layer that has no ``weight`` keeps its own.
    """

    name: str
    holds: Callable[[Any, str, Any], bool]
    values: Callable[[Any, str, int | None], torch.Tensor] | None = None
    remedy: str = "load the model unquantised"
    kept_in: str = "weight"


def coding_of(module: nn.Module, name: str) -> Coding | None:
    """How a weight is kept; None where it simply is its values."""
    tensor = module._parameters.get(name, module._buffers.get(name))  # a property might compute it
    return next((coding for coding in _CODINGS if coding.holds(module, name, tensor)), None)


def stored(module: nn.Module, name: str) -> Any:
    """The tensor that holds a weight, be it in a code."""
    coding = coding_of(module, name)
    own = name in module._parameters or name in module._buffers
    held = getattr(module, name if coding is None or own or name != "weight" else coding.kept_in)
    return held() if callable(held) else held  # torch's own quantised layers make it a method


def outline(module: nn.Module) -> torch.Tensor | None:
    """A tensor without values in the shape of a layer's weight that is in a code, whose own shape tells nothing.

    None where the weight is plain.
    """
    if coding_of(module, "weight") is None:
        return None
    held = stored(module, "weight")
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, rows):
            dtype = torch.int8 if held.is_quantized else held.dtype
            return torch.empty((), dtype=dtype, device=held.device).expand(
                getattr(module, rows), getattr(module, columns)
            )
    return held


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or stands for one with a weight in a code."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and coding_of(module, "weight") is not None)


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an embedding, or stands for one with a weight in a code."""
    return isinstance(module, nn.Embedding) or (
        hasattr(module, "embedding_dim") and coding_of(module, "weight") is not None
    )


def refuse_unknown(path: str, module: nn.Module) -> None:
    """Codes of unknown layers would be passed over without a word, or be taken for matrices of another shape.

    Raises:
        ValueError: the module holds some.
    """
    if coding_of(module, "weight") is not None:
        return
    # Integers in buffers may be masks and tables as well, and in modules that hold others are.
    tensors = {**module._parameters, **(module._buffers if _has_codes_in_buffers(module) else {})}
    codes = [name for name, tensor in tensors.items() if tensor is not None and _is_code(tensor)]
    codes += [name for name in _NO_TENSORS if hasattr(module, name)]
    if codes:
        raise ValueError(
            f"{path} is packed (it holds {codes[0]}) in a format that is not known here: load the model "
            "unquantised, or with dequantize=True in its quantization config where that has it"
        )


#: What codes are packed in; indices and positions have 64 bits.
_PACKED = {torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32}
_PACKED.add(getattr(torch, "float4_e2m1fn_x2", torch.uint8))  # torch 2.8
#: Codes that are no tensors: experts in MXFP4 for triton kernels, torch's own quantised recurrent layers.
_NO_TENSORS = ("gate_up_proj_precision_config", "_all_weight_values")


def _has_codes_in_buffers(module: nn.Module) -> bool:
    """Whether a module is a layer, or speaks of codes or of what belongs to them."""
    if module._modules:
        return False
    layer = any(hasattr(module, size) for size in ("in_features", "infeatures", "num_embeddings"))
    return layer or any(
        word in name.lower() for name in (*module._buffers, *module._parameters) for word in _CODE_WORDS
    )


_CODE_WORDS = ("scale", "zero", "absmax", "qweight", "w_q", "packed", "blocks", "codes", "codebook")


def _is_code(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _PACKED and tensor.numel() > max(tensor.shape, default=1)


# What each library says


def _one(weight: Any, expert: int | None) -> Any:
    return weight if expert is None else weight[expert]


def _made_by(thing: Any, library: str) -> bool:
    return type(thing).__module__.startswith(library)


def _is_parametrized_4_bit(module: Any, name: str) -> bool:
    """As bitsandbytes keeps experts, which have no module of their own."""
    chain = module.parametrizations[name] if name in getattr(module, "parametrizations", ()) else ()
    return any(type(step).__name__ == "Bnb4bitParametrization" for step in chain)


def _state_of_4_bit(module: Any, weight: Any) -> Any:
    """FSDP makes other tensors of the weights, and leaves the state with the module."""
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def _is_bitsandbytes_4_bit(module: Any, name: str, weight: Any) -> bool:
    if name == "weight" and weight is not None and _state_of_4_bit(module, weight) is not None:
        return True
    return _is_parametrized_4_bit(module, name)


def _bitsandbytes_4_bit(module: Any, name: str, expert: int | None) -> torch.Tensor:
    """A forward pass on a CPU with AVX512-BF16 packs the weight anew, and ``dequantize_4bit`` does not know that."""
    weight = getattr(module, name)
    if _is_parametrized_4_bit(module, name):
        return _one(weight, expert)
    from bitsandbytes.functional import dequantize_4bit

    codes, state = getattr(weight, "full_tensor", lambda: weight.data)(), _state_of_4_bit(module, weight)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scales = state.absmax.T.flatten().float()  # which the inverse leaves transposed, or rounds
        codes, state = _convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
        state.absmax, state.nested = scales, False
    return dequantize_4bit(codes, state)


def _bitsandbytes_8_bit(module: Any, name: str, expert: int | None) -> torch.Tensor:
    """A forward pass moves the scales from the weight to the state of the module."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = getattr(module, name)
    return int8_vectorwise_dequant(weight.data, module.state.SCB if weight.SCB is None else weight.SCB)


def _torchao(module: Any, name: str, expert: int | None) -> torch.Tensor:
    weight = _one(getattr(module, name), expert)
    scale = getattr(weight, "act_pre_scale", None)  # of what enters: the layer computes with both
    return weight.dequantize() if scale is None else weight.dequantize() * scale


def _is_quanto(module: Any, name: str, weight: Any) -> bool:
    """Layers that are not frozen round a plain weight in each forward pass."""
    rounding = name == "weight" and _made_by(module, "optimum.quanto.") and module.weight_qtype is not None
    return rounding or _made_by(weight, "optimum.quanto.")


def _quanto(module: Any, name: str, expert: int | None) -> torch.Tensor:
    weight = module.qweight if _made_by(module, "optimum.quanto.") else getattr(module, name)
    return _one(weight.dequantize(), expert)


def _is_compressed(module: Any, name: str, weight: Any) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    there = weight is not None or hasattr(module, "weight_packed")
    return name == "weight" and there and getattr(scheme, "weights", None) is not None


def _compressed_tensors(module: Any, name: str, expert: int | None) -> torch.Tensor:
    """What is compressed the first forward pass of the model makes plain; what never was, each pass rounds."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus, forward_quantize

    scheme, status = module.quantization_scheme, module.quantization_status
    disabled = "weight" in module._parameters and not getattr(module, "quantization_enabled", True)
    if disabled or status > QuantizationStatus.COMPRESSED:
        return module.weight
    if status < QuantizationStatus.COMPRESSED:
        return forward_quantize(module, module.weight, "weight", scheme.weights)
    tensors = {key: tensor for key, tensor in {**module._parameters, **module._buffers}.items() if tensor is not None}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]


def _block_scaled(module: Any, name: str, expert: int | None) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight, scale = (_one(getattr(module, key), expert) for key in (name, f"{name}_scale_inv"))
    return _dequantize_fp8_weight(weight, scale, module.block_size, torch.float32)


def _is_float8(weight: torch.Tensor) -> bool:
    return weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def _gptq(module: Any, name: str, expert: int | None) -> torch.Tensor:
    return type(module).dequantize_weight(module).T  # that of the module itself is compiled, for one shape


def _awq(module: Any, name: str, expert: int | None) -> torch.Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).T


def _gemma(module: Any, name: str, expert: int | None) -> torch.Tensor:
    return module.weight if hasattr(module, "embedding_quantized") else module._dequantize_weights()


def _layer(kind: str, library: str = "") -> Callable[[Any, str, Any], bool]:
    """Whether a module is of a class of that name, from that library."""
    return lambda module, name, weight: name == "weight" and type(module).__name__ == kind and _made_by(module, library)


_LOAD = "load the model with quantization_config={}(dequantize=True)"
#: Of 4-bit weights that a forward pass has packed anew, model.dequantize() makes other values without a word.
_DEQUANTISE = "load the model unquantised, or dequantise it with model.dequantize() before its first forward pass"
_CODINGS = (
    Coding("bitsandbytes 4-bit", _is_bitsandbytes_4_bit, _bitsandbytes_4_bit, _DEQUANTISE),
    Coding(
        "bitsandbytes 8-bit",
        lambda module, name, weight: type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8,
        _bitsandbytes_8_bit,
        _DEQUANTISE,
    ),
    Coding("torchao", lambda module, name, weight: _made_by(weight, "torchao."), _torchao),
    Coding(
        "optimum-quanto",
        _is_quanto,
        _quanto,
    ),
    Coding("HQQ", _layer("HQQLinear"), lambda module, name, expert: module.dequantize(), kept_in="W_q"),
    Coding(
        "compressed-tensors",
        _is_compressed,
        _compressed_tensors,
        _LOAD.format("CompressedTensorsConfig"),
        kept_in="weight_packed",
    ),
    # Other layers of gptqmodel pack the weight anew for their kernels, and have the method all the same.
    Coding("GPTQ", _layer("TorchLinear", "gptqmodel."), _gptq, kept_in="qweight"),
    Coding("AWQ", _layer("AwqTorchLinear", "gptqmodel."), _awq, kept_in="qweight"),
    Coding(
        "torch.ao",
        lambda module, name, weight: (
            _made_by(module, "torch.ao.nn.quantized.") and callable(getattr(module, name, None))
        ),
        lambda module, name, expert: module.weight().dequantize(),
    ),
    Coding(
        "block-scaled float8",
        lambda module, name, weight: (
            weight is not None and _is_float8(weight) and getattr(module, f"{name}_scale_inv", None) is not None
        ),
        _block_scaled,
        _LOAD.format("FineGrainedFP8Config"),
    ),
    Coding(
        "scaled float8",
        _layer("FP8Embedding"),
        lambda module, name, expert: module.weight.to(module.weight_scale.dtype) * module.weight_scale,
        _LOAD.format("FineGrainedFP8Config"),
    ),
    Coding(
        "packed Gemma",
        lambda module, name, weight: name == "weight" and _made_by(module, "transformers.integrations.gemma_quant"),
        _gemma,
        kept_in="embedding_quantized",
    ),
    # Of no library that is known, and without the scale they mean nothing.
    Coding(
        "integer",
        lambda module, name, weight: (
            weight is not None
            and (weight.dtype in _PACKED or not (weight.dtype.is_floating_point or weight.dtype.is_complex))
        ),
    ),
    Coding(
        "scaled",
        lambda module, name, weight: (
            weight is not None
            and _is_float8(weight)
            and any(getattr(module, f"{name}_{end}", None) is not None for end in ("scale", "scale_inv"))
        ),
    ),
)
