"""Norms that see only a part of the residual stream (paper App. F, Fig. 14): for studying which part matters.

Before each norm the stream is projected onto all eigenvectors of its covariance but some. Shapes stay, and hooks do it,
so that the weights are as they were and undoing takes the hooks off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_rmt.models.digests import digest_of, text_digest
from hf_rmt.models.residual_stream import Stream
from hf_rmt.models.stream_taps import is_centred, seen_at
from hf_rmt.slicing.calibration import moments_of_sites
from hf_rmt.theory.controls import seed_for
from hf_rmt.theory.linalg import exact_matmul
from hf_rmt.theory.selection import Random, Selection, Side

if TYPE_CHECKING:
    from hf_rmt.reports.covariances import ActivationCovariances

#: A hook before a module is called.
_Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class StreamComponents:
    """Eigenvectors of the stream's covariance at one site, as a ``Selection`` sees them.

    Attributes:
        name: of the site.
        s: ``(D,)`` eigenvalues, descending; their sum is the variance, so ``Mass`` is a share of it.
        vectors: ``(D, D)``, in columns.
    """

    name: str
    s: torch.Tensor
    vectors: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, D)``."""
        return len(self.s), len(self.s)

    @property
    def entry_std(self) -> float:
        """There is none."""
        raise ValueError(f"{self.name}: {_ONLY_BY_SIZE}")

    def test(self, side: Side) -> Any:
        """There is none."""
        raise ValueError(f"{self.name}: {_ONLY_BY_SIZE}")

    def overlap(self, side: Side) -> Any:
        """There is none."""
        raise ValueError(f"{self.name}: {_ONLY_BY_SIZE}")


_ONLY_BY_SIZE = (
    "eigenvectors of the residual stream are selected by number or size: by Group, Rank, Top, Bottom, Mass, Random"
)


@dataclass(frozen=True, eq=False)
class Projection:
    """Directions of the residual stream that norms do not see.

    Attributes:
        selection: of the eigenvectors at each site; ``Random`` stands for random directions.
        masks: by the key of the site, ``(D,)`` booleans of the directions removed.
        energy: by the key of the site, the share of the stream's variance that is removed.
        digest: hash of the directions.
    """

    selection: Selection
    masks: Mapping[str, torch.Tensor] = field(repr=False)
    energy: Mapping[str, float] = field(repr=False)
    digest: str = field(repr=False)
    handles: list[Any] = field(repr=False)

    @property
    def active(self) -> bool:
        """Whether it is in place."""
        return bool(self.handles)

    def undo(self) -> None:
        """Let the norms see everything again."""
        while self.handles:
            self.handles.pop().remove()

    def __str__(self) -> str:
        return f"{self.selection} of the residual stream"


def project_(stream: Stream, selection: Selection, covariances: ActivationCovariances) -> Projection:
    """Hide some directions of the residual stream from its norms, until ``Projection.undo``.

    A norm gets ``P P^T M y``, with P all eigenvectors of its covariance but the selected ones and M the centring of a
    LayerNorm; it divides by the root mean square of that over all D dimensions, as before. Where it sits on the
    residual connection (BERT), that loses the directions too.

    Args:
        stream: of a model whose norms are as they were.
        selection: of the eigenvectors of each site, 1 the largest; by number or size. ``Random(like, seed)`` hides as
            many random directions as ``like`` has eigenvectors: the control that the claim needs.
        covariances: from ``collect_stream``.

    Raises:
        ValueError: covariances of another stream, a selection that asks for what eigenvectors have not, or a compiled
            model.
    """
    return hide_(stream, components_of(stream, covariances), selection)


def components_of(stream: Stream, covariances: ActivationCovariances) -> list[StreamComponents]:
    """The eigenvectors at each site of a stream.

    Raises:
        ValueError: the covariances are of another stream.
    """
    bases = (moments.eigenbasis() for moments in moments_of_sites(stream, covariances))
    return [
        StreamComponents(site.key, basis.values, basis.vectors.mT)
        for site, basis in zip(stream.sites, bases, strict=True)
    ]


def hide_(stream: Stream, components: Sequence[StreamComponents], selection: Selection) -> Projection:
    """The same with eigenvectors that are known; see ``project_``."""
    refuse_compiled(stream.model)
    like = selection.like if isinstance(selection, Random) else selection
    masks = {one.name: like.mask(one) for one in components}  # before anything is touched
    if isinstance(selection, Random):
        components = [_rotated(one, int(masks[one.name].sum()), selection.seed) for one in components]
        masks = {one.name: torch.arange(len(one.s)) < int(masks[one.name].sum()) for one in components}
    handles: list[Any] = []
    for site, one in zip(stream.sites, components, strict=True):
        hide = _hiding(one.vectors[:, masks[one.name]], is_centred(stream, site))
        handles += [module.register_forward_pre_hook(hide, with_kwargs=True) for module in seen_at(stream, site)]
    energy = {one.name: float(one.s[masks[one.name]].sum() / one.s.sum()) for one in components}
    digest = text_digest([digest_of(one.vectors[:, masks[one.name]].contiguous()) for one in components])
    return Projection(selection, masks, energy, digest, handles)


def refuse_compiled(model: nn.Module) -> None:
    """Raise where code that was compiled before would not see a hook."""
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is compiled, and compiled code does not see what is hidden from a norm: give the "
            "model as it was before torch.compile"
        )


def _rotated(components: StreamComponents, count: int, seed: int) -> StreamComponents:
    """Random directions in the place of the first eigenvectors, and the variance along each of them."""
    generator = torch.Generator().manual_seed(seed_for(seed, f"{components.name}/{count}"))
    vectors = torch.linalg.qr(torch.randn(components.shape, generator=generator, dtype=torch.float64))[0]
    shares = (components.vectors.mT @ vectors).square()
    return StreamComponents(components.name, components.s @ shares, vectors)


def _hiding(directions: torch.Tensor, centred: bool) -> _Hook:
    """A hook that takes some orthonormal directions ``(D, k)`` out of what a module gets first."""

    def hide(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_without(args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: _without(kwargs[key])}

    def _without(value: torch.Tensor) -> torch.Tensor:
        exact = value if value.dtype == torch.float64 else value.float()
        removed = directions.to(exact.device, exact.dtype)
        seen = exact - exact.mean(-1, keepdim=True) if centred else exact
        return (seen - exact_matmul(exact_matmul(seen, removed), removed.mT)).to(value.dtype)

    hide.hides_stream = True  # type: ignore[attr-defined]  # for whoever is to leave such a model alone
    return hide
