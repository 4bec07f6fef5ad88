"""Matrices of a model in memory: unwrapped, offloaded, adapted, sharded."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_rmt.models import names, quantised
from hf_rmt.models.discovery import Discovery, LeftOut
from hf_rmt.models.matrices import Change, Load, WeightMatrix


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
    found = []
    twins: set[str] = set()
    for matrix in Discovery(base, loader).matrices():
        parameter: Any = matrix.load
        if _is_in_use(base, parameter.full, adapters) and parameter.full not in twins:
            twins.update(twin.full for twin in parameter.twins())
            found.append(matrix)
    return found


def left_out_of(model: nn.Module) -> list[LeftOut]:
    """Every parameter of two axes or more of a live model that is not taken for matrices."""
    base = unwrap(model)
    return Discovery(base, lambda module, name, full: LiveParameter(base, module, name, full, True)).left_out()


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold the parameters together (FSDP2, ZeRO-3), so that all have to read and run in step."""
    return any(map(_shards, model.modules())) or any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _shards(module: nn.Module) -> bool:
    """FSDP2's mark on a module whose parameters it shards; they are plain tensors while they are gathered."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _recompute(module: nn.Module, name: str) -> None:
    """The weight norm and spectral norm of old write the weight before each forward pass: until then it is stale."""
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            spectral = "do_power_iteration" in inspect.signature(hook.compute_weight).parameters
            setattr(module, name, hook.compute_weight(module, **({"do_power_iteration": False} if spectral else {})))


class LiveParameter:
    """Reads and changes one parameter of a live module, whatever stands between it and its values."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, full: str, adapters: bool):
        self.model = model
        self.module = module
        self.name = name
        self.full = full
        self.owners = list(_owners(model, full))
        self.tuner = _tuner_around(model, full, name)
        self.adapters = adapters

    @property
    def collective(self) -> bool:
        """Whether every process has to read it, in the same order."""
        stored = self._stored()
        return hasattr(stored, "full_tensor") or hasattr(stored, "ds_id")

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one expert of a stacked one, as it computes."""
        with self._brought_in(), torch.no_grad():
            self._stored()
            return self._plain(self.module, expert) if self.tuner is None else self._adapted(expert)

    def _stored(self) -> Any:
        """The parameter as it is between two passes: FSDP2 leaves its outermost ones gathered after one, in the dtype
        that computes."""
        sharding: Any = next((owner for owner, _ in self.owners if _shards(owner)), None)
        if sharding is not None:
            sharding.reshard()
        _recompute(self.module, self.name)
        return quantised.stored(self.module, self.name)

    @contextlib.contextmanager
    def _brought_in(self) -> Iterator[None]:
        """Brings the values of a parameter that accelerate has offloaded into memory for a while."""
        offloaded = self._offloaded()
        if offloaded is None:
            yield
            return
        with _OFFLOADED:
            if quantised.stored(self.module, self.name).device.type != "meta":
                yield
                return
            with offloaded.brought_in():
                yield

    def _offloaded(self) -> _Offloaded | None:
        """Where accelerate keeps the parameter, if that is elsewhere: in the hook of its module or of one around it."""
        for owner, key in self.owners:
            hook = getattr(owner, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "offload", False) is True and (one.place_submodules or "." not in key):
                    return _Offloaded(self.full, owner, one, key)
        return None

    def check_writable(self) -> None:
        """Raises ValueError, with the reason and the remedy, where a change would be impossible or lost."""
        if coding := quantised.coding_of(self.module, self.name):
            raise ValueError(
                f"{self.full} is stored as {coding.name} values, which no other values can be put into: {coding.remedy}"
            )
        weight = self.module._parameters.get(self.name)
        if weight is None:
            raise ValueError(
                f"{self.full} is computed from other parameters: make it one again with "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm"
            )
        if hasattr(weight, "ds_id"):
            raise ValueError(
                f"{self.full} is sharded by ZeRO-3, which is read and not written: save the model, and take parts out "
                "of the checkpoint with CheckpointPruner"
            )
        self._check_adapters()
        offloaded = self._offloaded()
        if offloaded is not None:
            offloaded.place()
        elif weight.device.type == "meta":
            raise ValueError(f"{self.full} is on the meta device and has no values to change: load the weights")

    def _adapts(self) -> bool:
        """Whether adapters are part of what is read."""
        tuner: Any = self.tuner
        return self.adapters and not tuner.disable_adapters and bool(tuner.active_adapters)

    def _check_adapters(self) -> None:
        tuner: Any = self.tuner
        if tuner is not None and tuner.merged:
            raise ValueError(
                f"{self.full} has adapters merged into it, and unmerging them later would not give back what was "
                "written: unmerge them first with unmerge_adapter(), or make them part of it with merge_and_unload()"
            )
        if tuner is not None and self._adapts():
            raise ValueError(
                f"{self.full} is read together with its adapters, and cannot be written so: make them part of it with "
                "merge_and_unload(), take them away with unload(), or pass adapters=False to change the base alone"
            )

    def update(self, change: Change, expert: int | None = None) -> None:
        """Hands the parameter, or one expert of a stacked one, with all its rows to ``change``, and keeps what comes
        of it."""
        of_one: Change = change if expert is None else lambda whole: change(whole[expert])
        with _OFFLOADED:  # several matrices of one parameter, too
            for parameter in (self, *self.twins()):
                parameter._update(of_one)

    def _update(self, change: Change) -> None:
        weight = self._stored()
        offloaded = self._offloaded()
        if offloaded is not None:
            offloaded.update(weight.dtype, change)
        if hasattr(weight, "full_tensor"):
            _in_place(weight, lambda shards: _change_together(shards, change))
        elif weight.device.type != "meta":
            _in_place(weight, change)

    def twins(self) -> list[LiveParameter]:
        """What is tied to this parameter but kept elsewhere, for offloading takes ties apart.

        What transformers lists as tied is not where a checkpoint holds two different tensors, or the user has put
        another one there: only equals are twins.
        """
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        mine = names.plain_path(self.full)
        tied = {key for key in {*ties, *ties.values()} - {mine} if ties.get(key, key) == ties.get(mine, mine)}
        listed = [
            LiveParameter(self.model, module, name, f"{path}.{name}", self.adapters)
            for path, module in (self.model.named_modules() if tied else ())
            for name in module._parameters
            if names.plain_path(f"{path}.{name}") in tied
        ]
        apart = [twin for twin in listed if self._offloaded() or twin._offloaded()]
        return [twin for twin in apart if torch.equal(twin().to("cpu"), self().to("cpu"))]

    def _plain(self, module: nn.Module, expert: int | None) -> torch.Tensor:
        weight = quantised.stored(module, self.name)
        if weight.device.type == "meta":
            raise ValueError(
                f"{self.full} is on the meta device and has no values: load the weights, "
                "or analyse the checkpoint with RMTAnalyzer.from_checkpoint"
            )
        coding = quantised.coding_of(module, self.name)
        if coding is not None:
            return self._dequantised(coding, module, expert).detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        elif hasattr(weight, "ds_id"):
            weight = _gathered(weight)
        return (weight if expert is None else weight[expert]).detach()

    def _dequantised(self, coding: quantised.Coding, module: nn.Module, expert: int | None) -> torch.Tensor:
        """What the library that has coded the weight makes of it."""
        if coding.values is None:
            kind = quantised.stored(module, self.name).dtype
            raise ValueError(
                f"{self.full} holds {coding.name} values ({kind}) in a format that is not known here: {coding.remedy}"
            )
        try:
            return coding.values(module, self.name, expert)
        except Exception as error:  # whatever the library meets in what it has packed
            raise ValueError(
                f"{self.full} is stored as {coding.name} values, which the library installed here cannot dequantise "
                f"({error}): {coding.remedy}"
            ) from error

    def _adapted(self, expert: int | None) -> torch.Tensor:
        """Merging a copy of the layer is peft's own definition of what it computes, for every method."""
        tuner: Any = self.tuner
        wanted = self._adapts()
        if tuner.merged == wanted or not (wanted or tuner.merged):
            return self._plain(self.module, expert)
        if quantised.coding_of(self.module, self.name) is not None:
            raise ValueError(f"{self.full} has adapters on a quantised base: pass adapters=False, or merge them first")
        layer = copy.deepcopy(tuner)
        inner = layer.get_base_layer()
        if getattr(inner, self.name).dtype in (torch.float16, torch.bfloat16):
            layer.float()  # the forward pass adds the two outputs; it never rounds their sum to 16 bits
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


def _in_place(weight: torch.Tensor, change: Change) -> None:
    """In the mode that the weight was made in: PyTorch lets nobody else change what inference mode has made."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        change(weight)


def _gathered(weight: Any) -> torch.Tensor:
    """All of a parameter that ZeRO-3 shards; every process has to ask for it."""
    from deepspeed import zero

    with zero.GatheredParameters([weight]):
        return weight.detach().clone()


def _change_together(shards: Any, change: Change) -> None:
    """Every process changes the whole, and keeps its share of what the first has made of it."""
    from torch.distributed.tensor import distribute_tensor

    whole = shards.full_tensor()
    change(whole)
    shards.copy_(distribute_tensor(whole, shards.device_mesh, shards.placements))


def _owners(model: nn.Module, full: str) -> Iterator[tuple[nn.Module, str]]:
    """The module of a parameter and those around it, inside out, each with the name of the parameter below it."""
    pieces = full.split(".")
    for depth in reversed(range(len(pieces))):
        yield model.get_submodule(".".join(pieces[:depth])), ".".join(pieces[depth:])


#: Bringing an offloaded module in changes the module, and several of its matrices are read at a time.
_OFFLOADED = threading.RLock()


@dataclass(frozen=True)
class _Offloaded:
    """A parameter that is on meta but for the forward pass, to which a hook of accelerate brings its values."""

    full: str
    owner: nn.Module  # of the hook
    hook: Any
    key: str  # of the parameter among those that the hook brings in

    @contextlib.contextmanager
    def brought_in(self) -> Iterator[None]:
        """As accelerate's align_module_device, for modules of several hooks, too."""
        device, self.hook.execution_device = self.hook.execution_device, "cpu"
        try:
            self.hook.pre_forward(self.owner)
            yield
        finally:
            self.hook.post_forward(self.owner, None)
            self.hook.execution_device = device

    def place(self) -> tuple[MutableMapping[str, torch.Tensor], str]:
        """Where values in memory are, or can be put to be taken in the place of those on disk."""
        weights, key = self.hook.weights_map, self.key
        while not isinstance(weights, MutableMapping):
            if hasattr(weights, "prefix"):  # PrefixedDataset
                weights, key = weights.dataset, weights.prefix + key
            elif hasattr(weights, "state_dict"):  # OffloadedWeightsLoader, which looks there before it looks on disk
                weights = weights.state_dict
            else:
                raise ValueError(
                    f"{self.full} is offloaded to a {type(weights).__name__}, which cannot be changed: load the model "
                    "without offloading"
                )
        return weights, key

    def update(self, dtype: torch.dtype, change: Change) -> None:
        """In place where the values are in memory, for they may be shared; never in the files."""
        weights, key = self.place()
        if key in weights and weights[key].dtype == dtype:
            _in_place(weights[key], change)
            return
        with torch.inference_mode(False), torch.no_grad():
            values = self.hook.weights_map[self.key].to("cpu", dtype, copy=True)
            change(values)
        weights[key] = values


@contextlib.contextmanager
def brought_in(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps what accelerate has offloaded of some modules where they compute, so that many calls fetch it once.

    Args:
        modules: each of them; those inside of them do not come by themselves.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "offload", False) is True:
                    stack.enter_context(_held(module, one))
        yield


@contextlib.contextmanager
def _held(module: nn.Module, hook: Any) -> Iterator[None]:
    """Between one pre_forward and one post_forward of its own, the hook of accelerate only moves inputs."""
    with _OFFLOADED:
        hook.pre_forward(module)
        hook.offload = False
    try:
        yield
    finally:
        with _OFFLOADED:
            hook.offload = True
            hook.post_forward(module, None)
