"""How a model is taken apart into matrices: which parameters hold them, what each is called, and what is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_rmt.models import fused, names, quantised
from hf_rmt.models.matrices import Kind, Load, WeightMatrix


@dataclass(frozen=True)
class LeftOut:
    """A parameter of two axes or more that is not taken for matrices.

    Attributes:
        parameter: its full name.
        shape: as it is stored, or of the matrix that it would be.
        reason: why.
    """

    parameter: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class _Layout:
    """How a parameter holds matrices.

    Attributes:
        transposed: stored ``(in, out)``.
        stack: what its first axis counts, as ``"expert"``; None where it is one matrix.
        folded: all axes but the first are one.
    """

    transposed: bool = False
    stack: str | None = None
    folded: bool = False


@dataclass(frozen=True)
class _Parameter:
    """A parameter with its layout, or the reason for which it has none."""

    path: str  # of the module that owns it, relative to the model
    name: str  # of the parameter within the module
    module: nn.Module
    tensor: torch.Tensor
    layout: _Layout | str

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Discovery:
    """Takes a model apart.

    Args:
        model: its modules.
        loader: says how each parameter is read; see ``live`` and ``checkpoints``.
        computed: take weights that are computed from others (``torch.nn.utils.parametrize``) as they come out.
    """

    def __init__(self, model: nn.Module, loader: Callable[[nn.Module, str, str], Load], *, computed: bool = True):
        self.model = model
        self.loader = loader
        self.computed = computed
        prefix = getattr(model, "base_model_prefix", "")
        base = getattr(model, prefix, None) if prefix else None
        #: Set only for a model that holds a headless one; everything outside that is head.
        self.base_prefix = prefix if isinstance(base, nn.Module) and base is not model else ""
        self.blocks = _BlockNumbers(model)

    def matrices(self) -> list[WeightMatrix]:
        """Every matrix of the model in the order of its modules, embeddings, heads and convolutions included.

        A convolution is ``(out, in * kernel)``.
        """
        found = [matrix for parameter in _parameters(self.model, self.computed) for matrix in self._cut(parameter)]
        stacks = {matrix.stack for matrix in found if matrix.block is not None}
        if len(stacks) < 2:  # a model of one stack needs no word for it
            found = [replace(matrix, stack=None) for matrix in found]
        return found

    def left_out(self) -> list[LeftOut]:
        """Every other parameter that has two axes or more."""
        return [
            LeftOut(names.plain_path(one.full), tuple(one.tensor.shape), one.layout)
            for one in _parameters(self.model, self.computed)
            if isinstance(one.layout, str)
        ]

    def _cut(self, parameter: _Parameter) -> Iterator[WeightMatrix]:
        layout = parameter.layout
        if isinstance(layout, str):
            return
        whole = self._whole(parameter, layout)
        leaf = names.plain_path(parameter.path if parameter.name == "weight" else parameter.full).rpartition(".")[2]
        if layout.stack is None:
            yield from _split(whole, self._parts(parameter, leaf, whole.shape[0]))
            return
        one_by_one = type(parameter.module).__name__ == "GptOssExperts"
        interleaved = not getattr(parameter.module, "is_concatenated", not one_by_one)
        parts = fused.expert_parts(leaf, whole.shape[0], interleaved)
        for number in range(parameter.tensor.shape[0]):
            yield from _split(replace(whole, name=f"{whole.name}[{layout.stack}={number}]", expert=number), parts)

    def _parts(self, parameter: _Parameter, leaf: str, rows: int) -> fused.Parts | None:
        if isinstance(parameter.module, nn.RNNBase):
            return fused.gates(parameter.module.mode, rows)
        return fused.fused_parts(leaf, rows, self._config_of(parameter.path))

    def _whole(self, parameter: _Parameter, layout: _Layout) -> WeightMatrix:
        name = names.canonical_name(parameter.full, self.base_prefix)
        block = self.blocks.number(parameter.path)
        return WeightMatrix(
            name=name,
            parameter=names.plain_path(parameter.full),
            role=names.role_of(name),
            shape=_shape(parameter, layout),
            dtype=parameter.tensor.dtype,
            device=parameter.tensor.device,
            load=self.loader(parameter.module, parameter.name, parameter.full),
            stack=names.stack_of(name) if block is not None else None,
            block=block,
            kind=self._kind(parameter),
            transposed=layout.transposed,
            folded=layout.folded,
        )

    def _kind(self, parameter: _Parameter) -> Kind:
        if quantised.is_embedding(parameter.module):
            return "embedding"
        if isinstance(parameter.module, nn.modules.conv._ConvNd):
            return "convolution"
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


# Parameters


def _parameters(model: nn.Module, computed: bool) -> Iterator[_Parameter]:
    """Parameters of two axes or more, by the module that owns them, tied ones once."""
    seen: set[int] = set()
    tuners: list[str] = []
    for path, module in model.named_modules(remove_duplicate=True):
        tuners = [tuner for tuner in tuners if path.startswith(f"{tuner}.")]
        if any(not path.startswith(f"{tuner}.base_layer") for tuner in tuners):
            continue  # an adapter's own matrices are read as part of the matrix they adapt
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            tuners.append(path)
        quantised.refuse_unknown(path, module)
        for name, tensor in _weights(module):
            own = module._parameters.get(name)
            if id(own) not in seen and _may_be_matrix(module, name, tensor):
                if own is not None:  # what is computed is another tensor every time
                    seen.add(id(own))
                taken = computed or own is not None
                yield _Parameter(path, name, module, tensor, _layout(module, name, tensor) if taken else _COMPUTED)


def _may_be_matrix(module: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """Whether it has two axes; a linear layer has also where one of them is of length one."""
    if isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
        return tensor.numel() > 0
    return tensor.numel() > max(tensor.shape, default=1)


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a module itself; those that are computed from others as they are computed."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return  # what it holds makes up a weight of the module around it
    outline = quantised.outline(module)
    if outline is not None:
        yield "weight", outline  # and what else there is makes it up
        return
    computed = {*getattr(module, "parametrizations", ())}
    own = module._parameters
    for stem in {name.removesuffix(end) for name in own for end in ("_g", "_v", "_orig") if name.endswith(end)}:
        if isinstance(getattr(module, stem, None), torch.Tensor):  # weight_norm and spectral_norm of old
            computed.add(stem)
    for name in sorted(computed):
        yield name, getattr(module, name)
    parts = {f"{stem}{end}" for stem in computed for end in ("_g", "_v", "_orig")}
    yield from ((name, _whole(tensor)) for name, tensor in own.items() if tensor is not None and name not in parts)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter in its shape, of which ZeRO-3 leaves nothing in its place while it is not gathered."""
    if not hasattr(tensor, "ds_shape"):
        return tensor
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tuple(tensor.ds_shape))


# Layouts

#: Stored (in, out), for versions of transformers in which experts do not say so themselves.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts", "GptOssExperts")
#: Maps that are no module's ``weight``, and whether they are stored (in, out).
_MAPS = {
    **dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), False),
    **dict.fromkeys(("mm_input_projection_weight", "prompts_visual_projection"), True),
    **dict.fromkeys(("fn", "hc_fn"), False),
}
#: One matrix a head, and whether it is stored (in, out): Zamba, RecurrentGemma.
_HEADS = {
    **dict.fromkeys(("x_proj_weight", "dt_proj_weight"), False),
    **dict.fromkeys(("input_gate_weight", "recurrent_gate_weight"), True),
}
#: Maps whose two last axes are heads and what is in them: (width, heads, head size), and whether that is (in, out).
_BY_HEAD = {"XLNetRelativeAttention": {"q": True, "k": True, "v": True, "r": True, "o": False}}
_VECTORS = re.compile(r"bias|pos|scale|token|quer|latent|prompt|embed|mask|pad_|A_log|^D$|time_|alpha|^b\d")


def _layout(module: nn.Module, name: str, tensor: torch.Tensor) -> _Layout | str:
    """How a parameter holds matrices, or why it holds none.

    Never by number of axes alone: class tokens and convolutions have three too.
    """
    rules = (_layout_of_convolution, _layout_of_modules, _layout_of_declared, _layout_of_experts, _layout_of_own_weight)
    found = next((layout for rule in rules if (layout := rule(module, name, tensor)) is not None), None)
    if found is not None:
        return found
    return _NO_MAP if _VECTORS.search(name) or "norm" in type(module).__name__.lower() else _UNKNOWN


_NO_MAP = "vectors, scales or biases, and no map"
_UNKNOWN = "in a layout that is not known here"


_COMPUTED = "computed from other parameters: load the model to have it as it comes out"


def _layout_of_convolution(module: Any, name: str, tensor: torch.Tensor) -> _Layout | str | None:
    if not isinstance(module, nn.modules.conv._ConvNd) or name != "weight":
        return None
    grouped = "a convolution of groups of channels, which is no one matrix"
    return grouped if module.groups > 1 else _Layout(transposed=module.transposed, folded=True)


def _layout_of_modules(module: nn.Module, name: str, tensor: torch.Tensor) -> _Layout | None:
    """Of those whose class says it."""
    if name == "weight" and (quantised.is_embedding(module) or _is_conv1d(module)):
        return _Layout(transposed=True)
    linear = quantised.is_linear(module) and name == "weight"
    recurrent = isinstance(module, nn.RNNBase) and name.startswith("weight_")
    return _Layout() if linear or recurrent else None


def _layout_of_declared(module: nn.Module, name: str, tensor: torch.Tensor) -> _Layout | None:
    """Of those in the tables above."""
    by_head = _BY_HEAD.get(type(module).__name__, {})
    if name in by_head:
        return _Layout(transposed=by_head[name], folded=True)
    if tensor.ndim == 3 and name in _HEADS:
        return _Layout(transposed=_HEADS[name], stack="head")
    return _Layout(transposed=_MAPS[name]) if tensor.ndim == 2 and name in _MAPS else None


def _layout_of_experts(module: nn.Module, name: str, tensor: torch.Tensor) -> _Layout | str | None:
    if "expert" not in type(module).__name__.lower():
        return None
    if tensor.ndim == 3 and "bias" not in name and "scale" not in name:
        return _Layout(_experts_transposed(module), stack="expert")
    return "experts stacked in a layout that is not known here" if name in ("w1", "v1", "w2") else None


def _layout_of_own_weight(module: nn.Module, name: str, tensor: torch.Tensor) -> _Layout | None:
    """Of routers and the like: a weight of their own that goes through torch's functional linear."""
    norm = "norm" in type(module).__name__.lower()
    return _Layout() if tensor.ndim == 2 and name == "weight" and not norm else None


def _experts_transposed(module: nn.Module) -> bool:
    return getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, recognised by what it is so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _shape(parameter: _Parameter, layout: _Layout) -> tuple[int, int]:
    """``(out, in)``."""
    shape = parameter.tensor.shape
    first, second = (shape[0], math.prod(shape[1:])) if layout.folded else shape[-2:]
    return (second, first) if layout.transposed else (first, second)


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
