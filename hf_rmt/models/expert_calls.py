"""What is routed to each expert of a stack that lives in one parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from hf_rmt.models.activations import Site

#: Takes a site, the activations there, the positions in the batch that they come from, and the batch's size.
See = Callable[["Site", torch.Tensor, torch.Tensor | None, int], None]

_PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class ExpertCalls(TorchFunctionMode):
    """Watches the products of a module of stacked experts, which calls no module of its own.

    The module picks the tokens of an expert (``hidden[positions]``), its weight (``stack[expert]``), and
    multiplies them; what multiplies the weight of an expert is what enters that expert.
    """

    def __init__(self, module: nn.Module, sites: list[Site], see: See):
        super().__init__()
        self.module = module
        self.see = see
        self.inputs = {site.expert: site for site in sites if not site.output}
        self.outputs = [site for site in sites if site.output]
        self.names = {site.expert[0] for site in sites if site.expert is not None}
        self._active = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the module's forward pass."""
        self.hidden = args[0] if args else next(iter(kwargs.values()))
        self.positions: torch.Tensor | None = None
        self.weights: dict[int, tuple[str, int, torch.Tensor]] = {}
        self._active = True
        self.__enter__()

    def end(self, *_: Any) -> None:
        """Hook after it."""
        if self._active:
            self._active = False
            self.__exit__(None, None, None)
            self.hidden, self.positions, self.weights = None, None, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            self._picked(args[0], args[1], result)
        elif func in _PRODUCTS and len(args) > 1 and id(args[1]) in self.weights:
            name, expert, _ = self.weights[id(args[1])]
            self._multiplied((name, expert), args[0], result)
        return result

    def _picked(self, source: torch.Tensor, index: Any, result: torch.Tensor) -> None:
        if isinstance(index, torch.Tensor) and index.ndim == 1 and self._is_hidden(source):
            self.positions = index.nonzero().flatten() if index.dtype == torch.bool else index
        elif source.ndim == 3 and result.ndim == 2 and (name := self._stack_of(source)) is not None:
            expert = index[0] if isinstance(index, tuple) else index
            if isinstance(expert, int) or (isinstance(expert, torch.Tensor) and expert.numel() == 1):
                self.weights[id(result)] = (name, int(expert), result)  # kept, or its id may be another's

    def _is_hidden(self, source: torch.Tensor) -> bool:
        """Whether this is what entered the module, one position a row."""
        same = source is self.hidden or source.data_ptr() == self.hidden.data_ptr()
        return same and source.ndim == 2 and source.numel() == self.hidden.numel()

    def _stack_of(self, source: torch.Tensor) -> str | None:
        """Name of the parameter that this is. An adapted one is another tensor each time, known by its shape."""
        own = {name: getattr(self.module, name) for name in self.names}
        alike = [name for name, stack in own.items() if stack.shape == source.shape]
        same = [name for name in alike if own[name] is source]
        return next(iter(same or alike), None) if len(alike) == 1 or same else None

    def _multiplied(self, expert: tuple[str, int], entered: torch.Tensor, put_out: torch.Tensor) -> None:
        positions = self.positions if self.positions is not None and len(self.positions) == len(entered) else None
        total = self.hidden.numel() // self.hidden.shape[-1]
        if (site := self.inputs.get(expert)) is not None:
            self.see(site, entered, positions, total)
        parts = [site for site in self.outputs if site.expert == expert]
        if (bias := getattr(self.module, f"{expert[0]}_bias", None)) is not None and parts:
            put_out = put_out + bias[expert[1]]
        for part in parts:
            self.see(part, put_out if part.rows is None else put_out[..., part.rows], positions, total)
