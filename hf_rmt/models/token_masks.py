"""Which positions of a batch are tokens, and which are padding or repeats."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.models.names import stack_of

#: Which mask of a batch says what counts for a matrix.
MAIN, DECODER, CROSS, UNMASKED = "main", "decoder", "cross", "unmasked"


def mask_for(matrix: WeightMatrix, encoder_decoder: bool) -> str:
    """The mask that the inputs of a matrix obey.

    In cross-attention, queries come from the decoder, keys and values from the encoder.
    """
    if matrix.role in ("cross.key", "cross.value"):
        return CROSS
    stack = matrix.stack or stack_of(matrix.name)
    if stack in ("vision", "audio"):
        return UNMASKED
    return DECODER if encoder_decoder and stack != "encoder" else MAIN


class TokenMasks:
    """The masks of one batch.

    Attributes:
        misfit: whether the mask did not fit the activations that were asked for last, so that all were counted.
    """

    def __init__(self, masks: dict[str, torch.Tensor | None], batch_size: int, keep_rows: int | None):
        """``keep_rows``: sequences of the batch that count, the first ones; None for all."""
        self.batch_size = batch_size
        self.keep_rows = None if keep_rows is None or keep_rows >= batch_size else keep_rows
        self.masks = {name: self._kept(mask) for name, mask in masks.items()}
        self.misfit = False

    @classmethod
    def of_call(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep_rows: int | Callable[[int], int | None] | None,
    ) -> TokenMasks:
        """The masks in the arguments of a model's forward pass."""
        named = {**_named(model, args), **kwargs}
        attention = _token_mask(named.get("attention_mask"))
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            decoder = _token_mask(named.get("decoder_attention_mask"))
            if decoder is None:
                decoder = _mask_of_labels(named.get("labels"), named.get("decoder_input_ids"))
            if decoder is None:
                decoder = _without_padding(named.get("decoder_input_ids"), getattr(model.config, "pad_token_id", None))
            masks = {MAIN: attention, CROSS: attention, DECODER: decoder}
        else:
            masks = {MAIN: attention, CROSS: _token_mask(named.get("encoder_attention_mask"))}
        sizes = [len(value) for value in named.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
        size = sizes[0] if sizes else 0
        return cls(masks, size, keep_rows(size) if callable(keep_rows) else keep_rows)

    def _kept(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask without the rows that do not count; None where every position does."""
        if mask is None:
            return None
        if self.keep_rows is not None:
            mask = mask.clone()
            mask[self.keep_rows :] = False
        return None if bool(mask.all()) else mask

    def empty(self) -> bool:
        """Whether the batch was meant to count and a mask leaves nothing of it."""
        masks = [mask for mask in self.masks.values() if mask is not None]
        return self.keep_rows is None and any(not bool(mask.any()) for mask in masks)

    def tokens(self, activations: torch.Tensor, mask: str) -> torch.Tensor:
        """The activations ``(..., n)`` of the positions that count, as ``(tokens, n)``."""
        width = activations.shape[-1]
        chosen = self.masks.get(mask)
        self.misfit = False
        if chosen is None:
            return self._first_rows(activations).reshape(-1, width)
        chosen = chosen.to(activations.device)
        if activations.shape[:2] == chosen.shape and activations.ndim > 2:
            return activations[chosen].reshape(-1, width)
        if activations.ndim == 2 and len(activations) == chosen.numel():
            return activations[chosen.flatten()]
        # One vector a sequence, as a pooler reads, fits.
        self.misfit = activations.shape[0] != self.batch_size or activations.ndim > 2
        return self._first_rows(activations).reshape(-1, width)

    def routed(self, rows: torch.Tensor, positions: torch.Tensor | None, total: int, mask: str) -> torch.Tensor:
        """Those of some rows that count.

        Args:
            rows: ``(count, n)``.
            positions: where each comes from in the flattened batch; None if that is not known, or they are
                the whole batch.
            total: positions in the flattened batch.
            mask: which mask of the batch.
        """
        chosen = self.masks.get(mask)
        self.misfit = False
        if chosen is None and self.keep_rows is None:
            return rows
        if positions is None and len(rows) == total:
            positions = torch.arange(total)
        if positions is not None and chosen is not None and chosen.numel() == total:
            return rows[chosen.flatten().to(rows.device)[positions.to(rows.device)]]
        if positions is not None and chosen is None and total % self.batch_size == 0:
            return rows[positions.to(rows.device) < (self.keep_rows or 0) * (total // self.batch_size)]
        self.misfit = True
        return rows

    def _first_rows(self, activations: torch.Tensor) -> torch.Tensor:
        if self.keep_rows is None or not self.batch_size or len(activations) % self.batch_size:
            return activations
        return activations[: self.keep_rows * (len(activations) // self.batch_size)]


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by their names."""
    if not args:
        return {}
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False))


def _token_mask(mask: Any) -> torch.Tensor | None:
    """``(batch, length)``, True for tokens, from any mask that transformers takes.

    Of a mask of pairs of positions, boolean or added to the scores, a token is what may attend to itself;
    of one that is the same for all queries, what may be attended to.
    """
    if isinstance(mask, Mapping):  # one mask for each kind of attention, which agree on what is padding
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 2:
        return mask != 0
    if mask.ndim in (3, 4) and mask.shape[-2] in (1, mask.shape[-1]):
        own = mask[..., 0, :] if mask.shape[-2] == 1 else mask.diagonal(dim1=-2, dim2=-1)
        own = own if own.ndim == 2 else own[:, 0]
        return own > torch.finfo(own.dtype).min / 2 if own.dtype.is_floating_point else own != 0
    return None


def _mask_of_labels(labels: Any, inputs: Any) -> torch.Tensor | None:
    """The decoder's mask where it reads the labels, shifted by one: by itself, or as collators shift them."""
    if not isinstance(labels, torch.Tensor) or (inputs is not None and inputs.shape != labels.shape):
        return None
    return _token_mask(labels != -100)


def _without_padding(ids: Any, padding: int | None) -> torch.Tensor | None:
    """All but the padding at the end of each sequence; its first token may be the padding token and counts."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or padding is None:
        return None
    real = ids != padding
    real[:, 0] = True
    return real.flip(1).cummax(1).values.flip(1)
