"""How a model is taken apart into matrices: which parameters hold them, and what each is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_rmt.models import fused, names
from hf_rmt.models.matrices import Kind, Load, WeightMatrix


@dataclass(frozen=True)
class _Parameter:
    """A parameter that holds matrices, before it is cut into them."""

    path: str  # of the module that owns it, relative to the model
    name: str  # of the parameter within the module
    module: nn.Module
    tensor: torch.Tensor

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Discovery:
    """Takes a model apart. ``loader`` says how each parameter is read; see ``live`` and ``checkpoints``."""

    def __init__(self, model: nn.Module, loader: Callable[[nn.Module, str, str], Load]):
        self.model = model
        self.loader = loader
        prefix = getattr(model, "base_model_prefix", "")
        base = getattr(model, prefix, None) if prefix else None
        #: Set only for a model that holds a headless one; everything outside that is head.
        self.base_prefix = prefix if isinstance(base, nn.Module) and base is not model else ""
        self.blocks = _BlockNumbers(model)

    def matrices(self) -> list[WeightMatrix]:
        """Every matrix of the model in the order of its modules, embeddings and heads included."""
        found = [matrix for parameter in _parameters(self.model) for matrix in self._cut(parameter)]
        stacks = {matrix.stack for matrix in found if matrix.block is not None}
        if len(stacks) < 2:  # a model of one stack needs no word for it
            found = [replace(matrix, stack=None) for matrix in found]
        return found

    def _cut(self, parameter: _Parameter) -> Iterator[WeightMatrix]:
        transposed, stacked = _layout(parameter)
        whole_shape = _shape(parameter, transposed)
        leaf = names.plain_path(parameter.path if parameter.name == "weight" else parameter.full).rpartition(".")[2]
        config = self._config_of(parameter.path)
        whole = self._whole(parameter, whole_shape, transposed)
        if stacked:
            one_by_one = type(parameter.module).__name__ == "GptOssExperts"
            interleaved = not getattr(parameter.module, "is_concatenated", not one_by_one)
            parts = fused.expert_parts(leaf, whole_shape[0], interleaved)
            experts: Iterable[int | None] = range(parameter.tensor.shape[0])
        else:
            parts = fused.fused_parts(leaf, whole_shape[0], config)
            experts = (None,)
        for expert in experts:
            one = whole if expert is None else replace(whole, name=f"{whole.name}[expert={expert}]", expert=expert)
            yield from _split(one, parts)

    def _whole(self, parameter: _Parameter, shape: tuple[int, int], transposed: bool) -> WeightMatrix:
        name = names.canonical_name(parameter.full, self.base_prefix)
        block = self.blocks.number(parameter.path)
        return WeightMatrix(
            name=name,
            parameter=names.plain_path(parameter.full),
            role=names.role_of(name),
            shape=shape,
            dtype=parameter.tensor.dtype,
            device=parameter.tensor.device,
            load=self.loader(parameter.module, parameter.name, parameter.full),
            stack=names.stack_of(name) if block is not None else None,
            block=block,
            kind=self._kind(parameter),
            transposed=transposed,
        )

    def _kind(self, parameter: _Parameter) -> Kind:
        if isinstance(parameter.module, nn.Embedding):
            return "embedding"
        outside = bool(self.base_prefix) and not parameter.path.startswith(self.base_prefix + ".")
        getter = getattr(self.model, "get_output_embeddings", None)
        return "head" if outside or (getter and getter() is parameter.module) else "block"

    def _config_of(self, path: str) -> Any:
        """Configuration of the nearest module at or above ``path`` that has one."""
        while path:
            config = getattr(self.model.get_submodule(path), "config", None)
            if config is not None and not isinstance(config, dict):
                return config
            path = path.rpartition(".")[0]
        return getattr(self.model, "config", None)


def _split(matrix: WeightMatrix, parts: fused.Parts | None) -> Iterator[WeightMatrix]:
    if parts is None:
        yield matrix
        return
    for part, rows in parts.items():
        count = len(range(*rows.indices(matrix.shape[0]))) if isinstance(rows, slice) else len(rows)
        yield replace(
            matrix,
            name=f"{matrix.name}[{part}]",
            role=names.role_of(matrix.name.partition("[")[0], part),
            shape=(count, matrix.shape[1]),
            part=part,
            rows=rows,
        )


def _parameters(model: nn.Module) -> Iterator[_Parameter]:
    """Parameters that hold matrices, by the module that owns them, tied ones once.

    Never by number of dimensions alone: class tokens and convolutions are 3-D too.
    """
    seen: set[int] = set()
    tuners: list[str] = []
    for path, module in model.named_modules(remove_duplicate=True):
        tuners = [tuner for tuner in tuners if path.startswith(f"{tuner}.")]
        if any(not path.startswith(f"{tuner}.base_layer") for tuner in tuners):
            continue  # an adapter's own matrices are read as part of the matrix they adapt
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            tuners.append(path)
        _refuse_packed(path, module)
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen and _holds_matrices(module, name, tensor):
                seen.add(id(tensor))
                yield _Parameter(path, name, module, tensor)


def _refuse_packed(path: str, module: nn.Module) -> None:
    """Weights under names that quantisation libraries give them would be passed over without a word."""
    own = [*module._parameters, *module._buffers]
    packed = [name for name in own if name in ("qweight", "W_q", "weight_packed") or name.endswith("_blocks")]
    if packed:
        raise ValueError(
            f"{path} is packed (it holds {packed[0]}): dequantise the model first, for instance with "
            "model.dequantize(), or analyse the checkpoint that was quantised"
        )


def _holds_matrices(module: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    kind = type(module).__name__
    if isinstance(module, (nn.Linear, nn.Embedding)) or _is_conv1d(module):
        return name == "weight" and tensor.numel() > 0
    if "expert" in kind.lower() and name != "weight":
        if tensor.ndim == 2 and name in ("w1", "v1", "w2"):
            warnings.warn(f"{kind}.{name} stacks experts in a layout unknown here and is left out", stacklevel=2)
        return tensor.ndim == 3 and "bias" not in name and "scale" not in name
    if tensor.ndim == 3:
        return "expert" in kind.lower()
    if isinstance(module, nn.MultiheadAttention):
        return name == "in_proj_weight"
    # Routers and the like: a weight of their own that goes through torch's functional linear.
    return tensor.ndim == 2 and name == "weight" and "norm" not in kind.lower()


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, recognised by what it is so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


#: Experts stored (in, out), for versions of transformers in which they do not say so themselves.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts", "GptOssExperts")


def _layout(parameter: _Parameter) -> tuple[bool, bool]:
    """Whether the parameter is stored ``(in, out)``, and whether it is a stack of experts."""
    stacked = parameter.tensor.ndim == 3
    turned = _is_conv1d(parameter.module) or isinstance(parameter.module, nn.Embedding)
    if stacked:
        turned = getattr(parameter.module, "is_transposed", type(parameter.module).__name__ in _TRANSPOSED_EXPERTS)
    return turned, stacked


def _shape(parameter: _Parameter, transposed: bool) -> tuple[int, int]:
    """``(out, in)``; a linear layer knows it also where its weight is packed."""
    if isinstance(parameter.module, nn.Linear):
        return parameter.module.out_features, parameter.module.in_features
    first, second = parameter.tensor.shape[-2:]
    return (second, first) if transposed else (first, second)


class _BlockNumbers:
    """Which transformer block a path lies in.

    The first index of the path, except in models of several stages (Swin), whose blocks are
    numbered through.
    """

    _NESTED = ("blocks", "layers", "layer", "block")

    def __init__(self, model: nn.Module):
        self.offsets: dict[str, int] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(piece.isdigit() for piece in path.split(".")):
                self._number_stages(path, module)

    def _number_stages(self, path: str, stages: nn.ModuleList) -> None:
        blocks = 0
        offsets = {}
        for i, stage in enumerate(stages):
            nested = next(
                ((name, child) for name, child in stage.named_children() if self._is_list_of_blocks(name, child)), None
            )
            if nested is None:
                return
            offsets[f"{path}.{i}.{nested[0]}"] = blocks
            blocks += len(nested[1])  # type: ignore[arg-type]
        self.offsets.update(offsets)

    def _is_list_of_blocks(self, name: str, module: nn.Module) -> bool:
        """T5's ``layer`` lists the parts of one block, which are of different classes."""
        return name in self._NESTED and isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1

    def number(self, path: str) -> int | None:
        pieces = path.split(".")
        indices = [i for i, piece in enumerate(pieces) if piece.isdigit()]
        if not indices:
            return None
        if len(indices) > 1:
            offset = self.offsets.get(".".join(pieces[: indices[1]]))
            if offset is not None:
                return offset + int(pieces[indices[1]])
        return int(pieces[indices[0]])
