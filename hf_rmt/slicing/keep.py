"""How much of a model a slice keeps: a share of its parameters, of its width, or of the energy of its stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch


@dataclass(frozen=True)
class Width:
    """Keep a share of the dimensions of the residual stream."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share, "width")

    def __str__(self) -> str:
        return f"{self.share} of the width"


@dataclass(frozen=True)
class Energy:
    """Keep as many eigenvectors of the stream's covariance as hold a share of the sum of its eigenvalues."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share, "energy")

    def __str__(self) -> str:
        return f"{self.share} of the energy"

    def width(self, eigenvalues: torch.Tensor) -> int:
        """How many of ``(D,)`` descending eigenvalues that takes; sums are good to rounding."""
        reached = eigenvalues.cumsum(0)
        needed = reached - eigenvalues < self.share * reached[-1] * (1 - 1e-12)
        return int(needed.sum())


#: A float is a share of the parameters of the model.
Keep = float | Width | Energy


def check_keep(keep: Keep) -> Keep:
    """The same, if it makes sense.

    Raises:
        TypeError: no share.
        ValueError: a share that is not above 0, or above 1.
    """
    if isinstance(keep, (Width, Energy)):
        return keep
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep is {keep!r}: give a share of the parameters as 0.75, or Width(0.75), or Energy(0.99)")
    _check_share(float(keep), "parameters")
    return float(keep)


def parse_keep(text: str) -> Keep:
    """What ``0.75``, ``width:0.75`` or ``energy:0.99`` asks for: a share of the parameters, the width or the energy.

    Raises:
        ValueError: it is none of these, or the share is not above 0, or above 1.
    """
    kinds: dict[str, Callable[[float], Keep]] = {"parameters": check_keep, "width": Width, "energy": Energy}
    kind, colon, share = text.rpartition(":")
    try:
        make, number = kinds[kind if colon else "parameters"], float(share)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"cannot read {text!r}: give a share of the parameters as 0.75, of the width as width:0.75, or of the "
            "energy as energy:0.99"
        ) from error
    return make(number)


def widest(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest width from 1 to ``upper`` that fits, where all below one that fits do too; 0 if none does."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _check_share(share: float, of: str) -> None:
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"a share of the {of} is {share!r}, which is no number")
    if not 0 < share <= 1:
        raise ValueError(f"a share of the {of} is {share!r}: it lies above 0 and is at most 1")
