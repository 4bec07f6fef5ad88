"""Running sums over tokens: as precise as float64, at the price of float32 products."""

from __future__ import annotations

import torch

from hf_rmt.theory.covariance import Moments
from hf_rmt.theory.linalg import add_gram, add_outer_both_ways, full_precision, mirror_lower, triangle

#: Products of so many tokens are added up in float32 before they go into the float64 sum.
_FLUSH_TOKENS = 4096


class MomentSum:
    """Sums ``x`` and ``x x^T`` over tokens.

    Products are made about the mean of the first tokens, so that a large mean does not cost the
    digits of what varies around it; ``moments`` puts it back in float64.
    """

    def __init__(self, width: int):
        self.width = width
        self.tokens = 0
        self._pending_tokens = 0
        self._eps = 0.0
        self._origin: torch.Tensor | None = None
        self._home: torch.device | None = None

    @classmethod
    def resumed(cls, tensors: dict[str, torch.Tensor], counts: list[int]) -> MomentSum:
        """One that goes on, to the bit, where another was when its ``state`` was taken."""
        found = cls(len(tensors["total"]))
        found.tokens, found._pending_tokens = counts
        found._origin, found._pending, found._total = (tensors[name] for name in ("origin", "pending", "total"))
        found._outer = tensors.get("outer")
        found._eps = torch.finfo(found._pending.dtype).eps
        return found

    def state(self) -> tuple[dict[str, torch.Tensor], list[int]]:
        """All that it holds, for ``resumed``: tensors on the CPU and counts; no tensors where it has no tokens.

        Taking it changes nothing: where products go into the float64 sum decides the last bits.
        """
        names = ("origin", "pending", "total", "outer") if self.tokens else ()
        held = {name: getattr(self, f"_{name}") for name in names}
        tensors = {name: tensor.cpu() for name, tensor in held.items() if tensor is not None}
        return tensors, [self.tokens, self._pending_tokens]

    @staticmethod
    def bytes_for(width: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory that one sum takes, of activations of this dtype: itself, and products to come."""
        return (8 + (8 if dtype == torch.float64 else 4)) * width * width

    def add(self, rows: torch.Tensor) -> None:
        """Add the rows of ``(tokens, width)``.

        Raises:
            FloatingPointError: an entry is NaN or Inf, or too large to be squared.
        """
        if not len(rows):
            return
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if self._origin is None:
            self._begin(rows)
        assert self._origin is not None
        if self._home is None:
            self._settle(rows.device)
        if rows.device != self._origin.device or rows.dtype != self._origin.dtype:
            rows = rows.to(self._origin)
        rows = rows - self._origin
        total = rows.sum(0)
        with full_precision(rows.device):
            add_gram(self._pending, rows)
        if not bool((total + self._pending.diagonal()).isfinite().all()):
            raise FloatingPointError("NaN or Inf among the activations")
        self._total += total.to(self._total)
        self.tokens += len(rows)
        self._pending_tokens += len(rows)
        if self._pending_tokens >= _FLUSH_TOKENS:
            self._flush()

    def _begin(self, rows: torch.Tensor) -> None:
        origin = rows.mean(0)
        if not bool(origin.isfinite().all()):
            raise FloatingPointError("NaN or Inf among the activations")
        self._origin = origin
        self._eps = torch.finfo(rows.dtype).eps
        self._pending = rows.new_zeros(self.width, self.width)
        self._outer: torch.Tensor | None = None
        self._total = torch.zeros(self.width, dtype=torch.float64)

    def _settle(self, device: torch.device) -> None:
        """Have the sums where the activations are."""
        assert self._origin is not None
        self._home = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        self._origin, self._pending = self._origin.to(device), self._pending.to(device)
        self._total = self._total.to(self._home)
        self._outer = None if self._outer is None else self._outer.to(self._home)

    def _flush(self) -> torch.Tensor:
        """The float64 sum with all products in it, of which the lower triangle counts."""
        if self._outer is None:
            self._outer = self._pending.to(self._total, copy=True)
            self._pending.zero_()
        elif self._pending_tokens:
            for rows, cols in triangle(self.width):
                self._outer[rows, cols] += self._pending[rows, cols].to(self._outer.device)
                self._pending[rows, cols] = 0
        self._pending_tokens = 0
        return self._outer

    def moments(self, final: bool = False) -> Moments:
        """The moments about zero of all tokens so far, on the CPU.

        ``final`` hands over the sum itself instead of a copy: nothing can be added after.
        """
        if self._origin is None:
            zeros = torch.zeros(self.width, self.width, dtype=torch.float64)
            return Moments(zeros, zeros[0].clone(), 0)
        outer, total, origin = self._flush().cpu(), self._total.cpu(), self._origin.double().cpu()
        if final:
            del self._outer, self._pending
        elif outer is self._outer:
            outer = outer.clone()
        # sum (x + o)(x + o)^T = sum x x^T + o u^T + u o^T, u = sum x + N o / 2
        add_outer_both_ways(outer, origin, total + self.tokens / 2 * origin)
        mirror_lower(outer)
        return Moments(outer, total + self.tokens * origin, self.tokens, self._eps)
