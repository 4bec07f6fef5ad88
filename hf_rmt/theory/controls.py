"""Matrices without information, to hold a weight matrix against."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch

Control = Literal["gaussian", "shuffled"]
CONTROLS: tuple[Control, ...] = get_args(Control)


def control_matrix(weight: torch.Tensor, kind: Control, seed: int, sigma: float | None = None) -> torch.Tensor:
    """A random matrix of the same shape as ``weight``, float32 on the CPU.

    Args:
        weight: ``(m, n)``.
        kind: ``"gaussian"``: i.i.d. normal entries of standard deviation ``sigma``;
            ``"shuffled"``: the weight's own entries in random order, which keeps a heavy-tailed
            distribution of entries and so exposes spikes that come from it alone.
        seed: makes the result repeatable.
        sigma: of the Gaussian entries, that of the law in question; None for the root mean square of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        if sigma is None:
            sigma = float(weight.detach().double().square().mean().sqrt())
        return torch.randn(weight.shape, generator=generator) * sigma
    if kind == "shuffled":
        order = torch.randperm(weight.numel(), generator=generator)
        return weight.detach().float().cpu().flatten()[order].reshape(weight.shape)
    raise ValueError(f"control is {kind!r}: give one of {', '.join(CONTROLS)}, or None")


def seed_for(seed: int, name: str) -> int:
    """A seed of its own for each matrix, so that no result depends on the order of the work."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest())
