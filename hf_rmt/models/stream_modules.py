"""What stands in a model whose residual stream has another basis: norms without a gain, blocks with shortcuts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from hf_rmt.models.residual_stream import Branch, Family


class StreamNorm(nn.Module):
    """Divides by the root mean square over the original width of the stream, whatever is left of it.

    Readers have taken its gain. It does not centre: where a LayerNorm stood, all that writes to the stream has lost
    its mean.

    Args:
        width: D, by which the sum of squares is divided.
        eps: of the norm that stood here.
        change: input and output width of a linear map that follows, None for none. It holds a gain that no reader can
            take, as that of a norm on the output of a sublayer.
        bias: whether that map has one.
    """

    def __init__(self, width: int, eps: float, change: tuple[int, int] | None = None, bias: bool = False):
        super().__init__()
        self.width = width
        self.eps = eps
        # Of a length that no other norm's weight has: loaded by a model that knows nothing of this, it does not fit.
        self.register_buffer("weight", torch.ones(1))
        self.change = None if change is None else nn.Linear(*change, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., d)`` to ``(..., d)``, or to the output width of ``change``."""
        exact = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        squares = exact.square().sum(-1, keepdim=True) / self.width
        normed = (exact * torch.rsqrt(squares + self.eps)).to(hidden_states.dtype)
        return normed if self.change is None else self.change(normed)

    def extra_repr(self) -> str:
        """What ``repr`` says of it."""
        return f"width={self.width}, eps={self.eps}"


def add_shortcuts(block: nn.Module, family: Family, widths: list[tuple[int, int]]) -> None:
    """Have a block multiply its residual connections by matrices, whose values are still to be given; in place.

    The block keeps its modules and their names, and is still one of its class.

    Args:
        block: as the model was built with.
        family: of the model.
        widths: ``(in, out)`` of each step.
    """
    cls: Any = type(block)
    like = next(block.parameters())
    trained = any(parameter.requires_grad for parameter in block.parameters())
    shortcuts = [nn.Linear(*pair, bias=False, dtype=like.dtype, device=like.device) for pair in widths]
    block.__class__ = _class_with_shortcuts(cls)
    block.stream_family = family  # type: ignore[assignment]
    block.stream_arguments = {  # type: ignore[assignment]
        branch.mixer[0]: _takes(block.get_submodule(branch.mixer[0])) for step in family.steps for branch in step
    }
    block.shortcuts = nn.ModuleList(shortcuts).requires_grad_(trained)


def has_shortcuts(block: nn.Module) -> bool:
    """Whether its residual connections are multiplied by matrices."""
    return isinstance(block, _Shortcuts)


class _Shortcuts(nn.Module):
    """The forward pass of any block, from the declaration of its family."""

    stream_family: Family
    stream_arguments: dict[str, tuple[frozenset[str], bool]]
    shortcuts: nn.ModuleList

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made when it is needed, so a pickle says of which it is made.
        mro: Any = type(self).__mro__
        return _empty_block, (mro[mro.index(_Shortcuts) + 1],), self.__getstate__()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        arguments = {**dict(zip(self._argument_names(), args, strict=False)), **kwargs} if args else kwargs
        for step, shortcut in zip(self.stream_family.steps, self.shortcuts, strict=True):
            carried = shortcut(hidden_states)
            for output in self._outputs(step, hidden_states, arguments):
                carried = carried + output
            hidden_states = carried
            if self.stream_family.post_norm:
                hidden_states = self.get_submodule(step[0].norm or "")(hidden_states)
        return hidden_states

    def _argument_names(self) -> tuple[str, ...]:
        """Names of the arguments of the block behind the hidden states."""
        mro: Any = type(self).__mro__
        return tuple(inspect.signature(mro[mro.index(_Shortcuts) + 1].forward).parameters)[2:]

    def _outputs(
        self, step: tuple[Branch, ...], hidden_states: torch.Tensor, arguments: Mapping[str, Any]
    ) -> Iterator[torch.Tensor]:
        """What each sublayer of a step adds to the stream."""
        scale = getattr(self, self.stream_family.scale) if self.stream_family.scale else 1.0
        for branch in step:
            pre_norm = None if self.stream_family.post_norm else branch.norm
            output = hidden_states if pre_norm is None else self.get_submodule(pre_norm)(hidden_states)
            output = self._mixed(branch, output, arguments)
            if branch.output_norm is not None:
                output = self.get_submodule(branch.output_norm)(output)
            if branch.dropout is not None:
                output = self._dropped(branch.dropout, output)
            yield output if scale == 1.0 else output * scale

    def _mixed(self, branch: Branch, value: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        for number, path in enumerate(branch.mixer):
            module = self.get_submodule(path)
            found: Any = module(value, **(self._accepted(path, arguments) if number == 0 else {}))
            value = found[0] if isinstance(found, tuple) else found
        return value

    def _accepted(self, path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those arguments of the block that a module of it takes."""
        names, anything = self.stream_arguments[path]
        return {key: value for key, value in arguments.items() if key in names or (anything and value is not None)}

    def _dropped(self, name: str, output: torch.Tensor) -> torch.Tensor:
        dropout: Any = getattr(self, name)
        if isinstance(dropout, nn.Module):
            return dropout(output)
        return nn.functional.dropout(output, p=dropout, training=self.training)


@cache
def _class_with_shortcuts(cls: Any) -> Any:
    return cls if issubclass(cls, _Shortcuts) else type(cls.__name__, (_Shortcuts, cls), {"__module__": __name__})


def _empty_block(cls: Any) -> Any:
    made = _class_with_shortcuts(cls)
    return made.__new__(made)


def _takes(module: nn.Module) -> tuple[frozenset[str], bool]:
    """Names of the arguments of a module behind its input, and whether it takes any others."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return frozenset(list(parameters)[1:]), anything
