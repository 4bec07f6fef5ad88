"""Another basis for the residual stream: the contraction of one axis of every tensor that touches it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_rmt.models.residual_stream import Stream, StreamSite, StreamTensor
from hf_rmt.models.stream_modules import StreamNorm, add_shortcuts, has_shortcuts

#: Rows of a table of tokens that are summed at a time.
_ROWS = 16384
#: Attributes of modules that say how wide they are.
_IN, _OUT = ("in_features", "nx", "hidden_dim"), ("out_features", "nf", "embedding_dim", "out_channels")


def change_basis_(
    stream: Stream,
    bases: torch.Tensor | Sequence[torch.Tensor],
    readings: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """Express the residual stream in another basis, in place; its norms must be fused.

    With square orthogonal matrices the model computes the same; with fewer columns than rows it becomes smaller.

    Args:
        stream: of the model, as ``fuse_norms_`` returns it.
        bases: ``(D, d)`` orthonormal columns, one matrix for the whole model or one for each of ``stream.sites``,
            where D is the width at that site now. Matrices that differ put a product into every residual connection.
        readings: for each site ``(D, d)``, by which its readers make out the whole normed stream from what is kept of
            it; None for the basis itself, which takes what is lost for zero. See ``prediction``.

    Raises:
        ValueError: norms that are not fused; not as many matrices as sites, or not each of as many rows as the stream
            is wide there, or not finite. The model is then as it was.
    """
    if not all(isinstance(slot.module, StreamNorm) for site in stream.sites for slot in site.slots):
        raise ValueError(f"the norms of this {type(stream.model).__name__} are not fused: fuse_norms_ comes first")
    each = [bases] * len(stream.sites) if isinstance(bases, torch.Tensor) else list(bases)
    if len(each) != len(stream.sites):
        raise ValueError(f"{len(each)} bases for {len(stream.sites)} sites of the stream: give one, or one for each")
    maps = [None] * len(each) if readings is None else list(readings)
    if len(maps) != len(each):
        raise ValueError(f"{len(maps)} readings for {len(each)} sites of the stream: give one for each")
    for site, basis, reading in zip(stream.sites, each, maps, strict=True):
        if basis.ndim != 2 or len(basis) != width_at(site):
            raise ValueError(f"a basis of shape {tuple(basis.shape)} at {site.key}, where it is {width_at(site)} wide")
        if reading is not None and reading.shape != basis.shape:
            raise ValueError(f"a reading of shape {tuple(reading.shape)} for a basis of {tuple(basis.shape)}")
        real = [matrix for matrix in (basis, reading) if matrix is not None and not matrix.is_meta]
        if not all(bool(matrix.isfinite().all()) for matrix in real):
            raise ValueError(f"the basis at {site.key} holds NaN or Inf")
    if not isinstance(bases, torch.Tensor):
        give_shortcuts_(stream)
    for index, basis in enumerate(each):
        change_site_(stream, index, basis, maps[index])


def rotate_(stream: Stream, rotations: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Rotate the residual stream, in place; the model computes the same.

    Args:
        stream: of the model, as ``fuse_norms_`` returns it.
        rotations: orthogonal ``(D, D)``, one for the whole model or one for each of ``stream.sites``.

    Raises:
        ValueError: a matrix is not orthogonal; else as ``change_basis_``.
    """
    for rotation in [rotations] if isinstance(rotations, torch.Tensor) else rotations:
        exact = rotation.double()
        square = exact.ndim == 2 and exact.shape[0] == exact.shape[1]
        if not square or not torch.allclose(exact.mT @ exact, torch.eye(len(exact)).to(exact), atol=1e-6):
            raise ValueError(
                f"a matrix of shape {tuple(rotation.shape)} is no rotation: its columns are not orthonormal"
            )
    change_basis_(stream, rotations)


def slice_(stream: Stream, widths: int | Sequence[int]) -> None:
    """Cut the last dimensions of the residual stream off, in place.

    Args:
        stream: of the model, after ``rotate_`` into a basis whose last directions matter least.
        widths: to be left, one for the whole model or one for each of ``stream.sites``.

    Raises:
        ValueError: a width that the stream has not; else as ``change_basis_``.
    """
    each = [widths] * len(stream.sites) if isinstance(widths, int) else list(widths)
    if len(each) != len(stream.sites):
        raise ValueError(f"{len(each)} widths for {len(stream.sites)} sites of the stream: give one, or one for each")
    for site, width in zip(stream.sites, each, strict=True):
        if not 1 <= width <= width_at(site):
            raise ValueError(f"a width of {width} at {site.key}: the stream is {width_at(site)} wide there")
    bases = [
        torch.eye(width_at(site), dtype=torch.float64)[:, :width]
        for site, width in zip(stream.sites, each, strict=True)
    ]
    alike = isinstance(widths, int) and len({width_at(site) for site in stream.sites}) == 1
    change_basis_(stream, bases[0] if alike else bases)


def give_shortcuts_(stream: Stream) -> None:
    """Put an identity into every residual connection that has no matrix yet, in place."""
    for number, block in enumerate(stream.blocks):
        if has_shortcuts(block):
            continue
        count = len(stream.family.steps)
        widths = [width_at(site) for site in stream.sites[number * count : (number + 1) * count + 1]]
        if len(set(widths)) > 1:
            raise ValueError(f"the stream has widths {widths} around block {number}, which has no shortcuts")
        add_shortcuts(block, stream.family, list(itertools.pairwise(widths)))
        with torch.no_grad():
            for shortcut in block.shortcuts:  # type: ignore[union-attr]
                nn.init.eye_(shortcut.weight)


def change_site_(stream: Stream, index: int, basis: torch.Tensor, reading: torch.Tensor | None = None) -> None:
    """Another basis at one site of the stream, in place. Where the model has no shortcuts, all sites need the same.

    Arguments as for ``change_basis_``.
    """
    with torch.no_grad():
        basis = basis.double()
        reading = basis if reading is None else reading.double()
        # Behind a norm that sits on the residual connection, that is a reader too.
        behind = reading if stream.family.post_norm and stream.sites[index].norms else basis
        if index > 0:
            _change_shortcut(stream, index - 1, lambda weight: basis.mT.to(weight.device) @ weight)
        if index < len(stream.sites) - 1:
            _change_shortcut(stream, index, lambda weight: weight @ behind.to(weight.device))
        if index == 0 and stream.tied is not None:
            _change_tied(stream, stream.tied, basis, reading)
        else:
            _change_site(stream.sites[index], basis, reading)


def _change_tied(stream: Stream, head: StreamTensor, basis: torch.Tensor, reading: torch.Tensor) -> None:
    """The first site, where a tied head has its basis too."""
    is_tied = head.value is stream.embeddings.value  # else it is another head on the body of a slice
    _lead_to_embeddings(stream, basis)
    _change_site(stream.sites[0], basis, reading)
    if is_tied:
        head.module.weight = stream.embeddings.value  # type: ignore[assignment]
        head.module.in_features = basis.shape[1]  # type: ignore[assignment]
    else:
        _contract(head, basis, _IN)


def _lead_to_embeddings(stream: Stream, basis: torch.Tensor) -> None:
    """The matrix before a tied head makes up for a basis that the embeddings E are about to get.

    Of all matrices X, ``(E Q) X`` is nearest to E for ``X = (Q^T E^T E Q)^-1 Q^T E^T E``.
    """
    (slot,) = stream.sites[-1].norms
    change: Any = slot.module.change
    table = stream.table
    basis = basis.to(table.device)
    if table.is_meta:
        leading = basis.mT
    else:
        crossed = basis.mT @ gram(table)
        leading = torch.linalg.pinv(crossed @ basis, hermitian=True) @ crossed
    change.weight = _parameter(change.weight, leading @ change.weight.double())
    change.out_features = basis.shape[1]


def gram(table: torch.Tensor) -> torch.Tensor:
    """``E^T E`` in float64, of rows that are never all in float64 at once."""
    total = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in table.detach().split(_ROWS):
        exact = rows.double()
        total += exact.mT @ exact
    return total


def _change_shortcut(stream: Stream, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The residual connection behind a site, if it has a matrix."""
    number, step = divmod(index, len(stream.family.steps))
    block: Any = stream.blocks[number]
    if has_shortcuts(block):
        shortcut = block.shortcuts[step]
        shortcut.weight = _parameter(shortcut.weight, change(shortcut.weight.double()))
        shortcut.out_features, shortcut.in_features = shortcut.weight.shape


def width_at(site: StreamSite) -> int:
    """How wide the stream is at a site now."""
    for tensor in (*(reader.weight for reader in site.readers), *site.writers):
        if tensor.value is not None:
            return tensor.value.shape[tensor.axis]
    change: Any = site.norms[0].module  # of a headless model, behind which nothing reads
    return change.change.in_features


def _change_site(site: StreamSite, basis: torch.Tensor, reading: torch.Tensor) -> None:
    for tensor in site.writers:
        _contract(tensor, basis, _OUT)
    for output in site.outputs:
        change: Any = output.module.change
        for name in ("weight", "bias"):
            if getattr(change, name) is not None:
                old = getattr(change, name)
                setattr(change, name, _parameter(old, basis.mT.to(old.device) @ old.double()))
        change.out_features = basis.shape[1]
    for slot in site.norms:
        change = slot.module.change
        if change is not None:
            change.weight = _parameter(change.weight, change.weight.double() @ reading.to(change.weight.device))
            change.in_features = basis.shape[1]
    for reader in site.readers:
        _contract(reader.weight, reading, _IN)


def _contract(tensor: StreamTensor, basis: torch.Tensor, attributes: tuple[str, ...]) -> None:
    along = tensor.along()
    tensor.replace((along @ basis.to(along.device)).movedim(-1, tensor.axis))
    if tensor.name != "bias":
        for name in attributes:
            if hasattr(tensor.module, name):
                setattr(tensor.module, name, basis.shape[1])


def _parameter(like: torch.Tensor, value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=like.requires_grad)
