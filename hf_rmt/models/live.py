"""Matrices of a model in memory: unwrapped, offloaded, adapted, quantised."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn

from hf_rmt.models.matrices import Discovery, Load, WeightMatrix


def matrices_of(model: nn.Module, adapters: bool = True) -> list[WeightMatrix]:
    """Every matrix of a live model, embeddings and heads included.

    Args:
        model: any ``PreTrainedModel``, ``PeftModel`` or ``nn.Module``, compiled or wrapped for
            data-parallel training or not.
        adapters: read a matrix with peft adapters as it computes, base and active adapters
            together; False gives the base.
    """

    def loader(module: nn.Module, name: str, full: str) -> Load:
        return LiveParameter(base, module, name, full, adapters)

    base = unwrap(model)
    return [m for m in Discovery(base, loader).matrices() if _is_in_use(base, m.load.full, adapters)]  # type: ignore[attr-defined]


def unwrap(model: Any) -> nn.Module:
    """The model inside torch.compile, DDP and peft wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


class LiveParameter:
    """Reads one parameter of a live module, whatever stands between it and its values."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, full: str, adapters: bool):
        self.module = module
        self.name = name
        self.full = full
        self.tuner = _tuner_around(model, full)
        self.adapters = adapters

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one expert of a stacked one, as it computes."""
        with _loaded(self.module, self.name), torch.no_grad():
            weight = self._adapted() if self.tuner is not None else self._plain(self.module)
            return weight if expert is None else weight[expert]

    def _plain(self, module: nn.Module) -> torch.Tensor:
        weight = getattr(module, self.name)
        if weight.device.type == "meta":
            raise ValueError(
                f"{self.full} is on the meta device and has no values: load the weights, "
                "or analyse the checkpoint with RMTAnalyzer.from_checkpoint"
            )
        if hasattr(weight, "full_tensor"):
            raise ValueError(f"{self.full} is sharded (DTensor): analyse the checkpoint with from_checkpoint")
        return _dequantised(module, weight, self.full).detach()

    def _adapted(self) -> torch.Tensor:
        """Merging a copy of the layer is peft's own definition of what it computes, for every method."""
        tuner: Any = self.tuner
        wanted = self.adapters and not tuner.disable_adapters and bool(tuner.active_adapters)
        if tuner.merged == wanted or not (wanted or tuner.merged):
            return self._plain(self.module)
        layer = copy.deepcopy(tuner)
        inner = layer.get_base_layer()
        if getattr(inner, self.name).dtype in (torch.float16, torch.bfloat16):
            layer.float()  # the forward pass adds the two outputs; it never rounds their sum to 16 bits
        elif not getattr(inner, self.name).is_floating_point():
            raise ValueError(f"{self.full} has adapters on a quantised base: pass adapters=False, or merge them first")
        if tuner.merged:
            layer.unmerge()
        else:
            layer.merge()
        return self._plain(inner)


def _is_in_use(model: nn.Module, full: str, adapters: bool) -> bool:
    """Of a module that peft trains whole, the copy that computes now, or the original."""
    for marker in (".original_module.", ".modules_to_save."):
        path, found, rest = full.rpartition(marker)
        if found:
            wrapper: Any = model.get_submodule(path)
            trained = adapters and not wrapper.disable_adapters and bool(wrapper.active_adapters)
            if marker == ".original_module.":
                return not trained
            return trained and rest.partition(".")[0] == wrapper.active_adapters[0]
    return True


def _tuner_around(model: nn.Module, full: str) -> nn.Module | None:
    """The peft layer that wraps the module of this parameter, if any."""
    path, marker, _ = full.rpartition(".base_layer.")
    return model.get_submodule(path) if marker else None


@contextlib.contextmanager
def _loaded(module: nn.Module, name: str):
    """Brings the weight of a module that accelerate has offloaded into memory for a while."""
    if getattr(module, name).device.type != "meta" or not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _dequantised(module: nn.Module, weight: torch.Tensor, full: str) -> torch.Tensor:
    """Real values of a weight that its library has packed; any other weight as it is."""
    scale = getattr(module, "weight_scale_inv", None)
    if weight.dtype.is_floating_point and weight.dtype.itemsize == 1 and scale is not None:
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        return _dequantize_fp8_weight(weight, scale, module.block_size, torch.float32)  # type: ignore[arg-type]
    packed = type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")
    if packed or hasattr(module, "W_q"):
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module)
    if not weight.dtype.is_floating_point:
        raise ValueError(
            f"{full} holds {weight.dtype} values that no known library has packed: "
            "dequantise the model first, for instance model.dequantize()"
        )
    if hasattr(module, "weight_scale"):  # compressed-tensors and others: the values mean nothing without it
        raise ValueError(f"{full} is scaled by {full}_scale, in a format unknown here: dequantise the model first")
    return weight
