"""Is a declaration of a residual stream right? Fuse the norms, rotate the stream, and compare what comes out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_rmt.models.activations import eager
from hf_rmt.models.live import evaluating, unwrap
from hf_rmt.models.residual_stream import Family, Stream, stream_of
from hf_rmt.slicing.basis import change_basis_
from hf_rmt.slicing.norms import fuse_norms_

#: Largest relative error of what a model puts out; transformers computes norms and softmax in float32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class StreamCheck:
    """Largest errors of a model's output, relative to its largest value, in float64.

    Attributes:
        fused: after the norms gave their gains away.
        rotated: after one random rotation of the whole stream.
        rotated_apart: after a random rotation of its own for each site, with shortcuts between them.
    """

    fused: float
    rotated: float
    rotated_apart: float


def verify_stream(
    model: Any, family: Family | None = None, batch: Mapping[str, torch.Tensor] | None = None, seed: int = 0
) -> StreamCheck:
    """Check the declaration of a model's residual stream, on a float64 copy of it.

    Args:
        model: of transformers; it stays as it is.
        family: the declaration; None for the one that is registered.
        batch: arguments of the model; None for a small one of random tokens, or of a random image.
        seed: of the rotations.

    Returns:
        The errors, all below ``TOLERANCE``.

    Raises:
        ValueError: there is no declaration or it is wrong: the output changes. The message says at which step, and
            which parameters as wide as the stream are not declared.
    """
    model = copy.deepcopy(unwrap(model)).double()
    batch = sample_batch(model) if batch is None else _in_double(batch, next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    before = output_of(model, batch)
    stream = fuse_norms_(model, family)
    fused = _error(stream, batch, before, "fusing its norms")
    change_basis_(stream, _rotation(stream.width, generator))
    rotated = _error(stream, batch, before, "rotating it")
    change_basis_(stream, [_rotation(stream.width, generator) for _ in stream.sites])
    return StreamCheck(fused, rotated, _error(stream, batch, before, "rotating each site by itself"))


def output_of(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a model puts out in evaluation mode, of tokens that are no padding: its logits, or its last hidden states.

    Where it puts out several tensors, as the beginnings and ends of answers, one behind the other.
    """
    with torch.no_grad(), evaluating(model), eager(model):
        found = model(**batch)
    mask = batch.get("attention_mask")
    values = [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    seen = [value[mask.bool()] if mask is not None and value.shape[:2] == mask.shape else value for value in values]
    return seen[0] if len(seen) == 1 else torch.cat([value.flatten() for value in seen])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    size = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected.double()).abs().max() / size)


def sample_batch(model: Any, length: int = 8) -> dict[str, torch.Tensor]:
    """A batch of two rows, random but always the same: of tokens with padding in one of them, or of images. Of one row
    where the model has no padding token, as a classifier of sequences then takes no more."""
    generator = torch.Generator().manual_seed(0)
    like = next(p for p in model.parameters() if p.is_floating_point())
    config = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        images = torch.randn(2, config.num_channels, *size, generator=generator)
        return {"pixel_values": images.to(like)}
    ids = torch.randint(config.get_text_config().vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    rows = 1 if config.get_text_config().pad_token_id is None else 2
    return {"input_ids": ids[:rows].to(like.device), "attention_mask": mask[:rows].to(like.device)}


def undeclared(stream: Stream) -> list[str]:
    """Names of parameters with an axis as long as the stream is wide that its declaration does not name."""
    known: set[int] = set()
    for site in stream.sites:
        known |= {id(parameter) for slot in site.slots for parameter in slot.module.parameters()}
        tensors = [
            *site.writers,
            *(reader.weight for reader in site.readers),
            *(reader.bias for reader in site.readers),
        ]
        known |= {id(tensor.value) for tensor in tensors if tensor is not None}
    return [
        name
        for name, value in stream.model.named_parameters()
        if id(value) not in known and stream.width in value.shape
    ]


def _rotation(width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def _in_double(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    moved = {key: value.to(device) for key, value in batch.items()}
    return {key: value.double() if value.is_floating_point() else value for key, value in moved.items()}


def _error(stream: Stream, batch: Mapping[str, torch.Tensor], before: torch.Tensor, step: str) -> float:
    try:
        error = relative_error(output_of(stream.model, batch), before)
    except RuntimeError as failed:  # shapes that do not fit
        raise ValueError(_wrong(stream, f"after {step} it does not run ({failed})")) from failed
    if not error < TOLERANCE:
        raise ValueError(
            _wrong(stream, f"after {step} what it puts out has changed by {error:.1g} of its largest value")
        )
    return error


def _wrong(stream: Stream, what: str) -> str:
    names = undeclared(stream_of(stream.model, stream.family))
    hint = f"; as wide as the stream, but not declared: {', '.join(names[:6])}" if names else ""
    return f"the residual stream of {type(stream.model).__name__} is not as declared: {what}{hint}"
