"""Matrices of a model in memory: unwrapped, offloaded, adapted, quantised."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
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
    model = callable_of(model)
    while hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = callable_of(model.get_base_model())
    return model


def callable_of(model: Any) -> nn.Module:
    """The module to call for one process's forward pass: outside of torch.compile and DDP, adapters included."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Lets a model with peft adapters run as its base for a while.

    Raises:
        ValueError: adapters are merged into the weights.
    """
    tuners: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "base_layer")]
    if any(tuner.merged for tuner in tuners):
        raise ValueError("adapters are merged into the weights, so the base cannot run: unmerge them first")
    wrappers: list[Any] = [
        m for m in model.modules() if hasattr(m, "modules_to_save") and hasattr(m, "enable_adapters")
    ]
    switched = [module for module in (*tuners, *wrappers) if not module.disable_adapters]
    try:
        for module in switched:
            module.enable_adapters(False)
        yield
    finally:
        for module in switched:
            module.enable_adapters(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold the parameters together (FSDP2), so that all have to read and run in step."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


class LiveParameter:
    """Reads one parameter of a live module, whatever stands between it and its values."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, full: str, adapters: bool):
        self.module = module
        self.name = name
        self.full = full
        self.tuner = _tuner_around(model, full, name)
        self.adapters = adapters

    @property
    def collective(self) -> bool:
        """Whether every process has to read it, in the same order."""
        return hasattr(getattr(self.module, self.name), "full_tensor")

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one expert of a stacked one, as it computes."""
        with _loaded(self.module, self.name), torch.no_grad():
            return self._plain(self.module, expert) if self.tuner is None else self._adapted(expert)

    def _plain(self, module: nn.Module, expert: int | None) -> torch.Tensor:
        weight = getattr(module, self.name)
        if weight.device.type == "meta":
            raise ValueError(
                f"{self.full} is on the meta device and has no values: load the weights, "
                "or analyse the checkpoint with RMTAnalyzer.from_checkpoint"
            )
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return self._dequantised(module, weight, expert).detach()

    def _dequantised(self, module: nn.Module, weight: torch.Tensor, expert: int | None) -> torch.Tensor:
        """Real values of a weight that its library has packed or scaled; any other weight as it is."""
        one = weight if expert is None else weight[expert]
        scale = getattr(module, f"{self.name}_scale_inv", None)
        if scale is not None and weight.dtype.is_floating_point and weight.dtype.itemsize == 1:
            try:
                from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
            except ImportError as error:
                raise ValueError(
                    f"{self.full} is block-scaled float8, which the transformers installed here cannot dequantise "
                    f"({error}): upgrade transformers, or analyse the unquantised checkpoint"
                ) from error
            block_size: Any = module.block_size
            return _dequantize_fp8_weight(one, scale if expert is None else scale[expert], block_size, torch.float32)
        packed = type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")
        if packed:
            from peft.utils.integrations import dequantize_module_weight

            return dequantize_module_weight(module)
        if not weight.dtype.is_floating_point:
            raise ValueError(
                f"{self.full} holds {weight.dtype} values that no known library has packed: "
                "dequantise the model first, for instance with model.dequantize()"
            )
        if scale is not None or hasattr(module, f"{self.name}_scale"):  # the values mean nothing without it
            raise ValueError(
                f"{self.full} is scaled by {self.name}_scale, in a format unknown here: dequantise the model first"
            )
        return one

    def _adapted(self, expert: int | None) -> torch.Tensor:
        """Merging a copy of the layer is peft's own definition of what it computes, for every method."""
        tuner: Any = self.tuner
        wanted = self.adapters and not tuner.disable_adapters and bool(tuner.active_adapters)
        if tuner.merged == wanted or not (wanted or tuner.merged):
            return self._plain(self.module, expert)
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
        return self._plain(inner, expert)


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


def _tuner_around(model: nn.Module, full: str, name: str) -> nn.Module | None:
    """The peft layer that adapts this parameter, if any.

    Where peft adapts parameters one by one, the wrappers of a module nest, one for each.
    """
    pieces = full.split(".")
    for depth in reversed([i for i, piece in enumerate(pieces) if piece == "base_layer"]):
        wrapper = model.get_submodule(".".join(pieces[:depth]))
        if getattr(wrapper, "parameter_name", name) == name:
            return wrapper
    return None


#: Bringing an offloaded module in changes the module, and several of its matrices are read at a time.
_OFFLOADED = threading.RLock()


@contextlib.contextmanager
def _loaded(module: nn.Module, name: str) -> Iterator[None]:
    """Brings the weight of a module that accelerate has offloaded into memory for a while."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with _OFFLOADED:
        if getattr(module, name).device.type != "meta":
            yield
            return
        with align_module_device(module, execution_device=torch.device("cpu")):
            yield
