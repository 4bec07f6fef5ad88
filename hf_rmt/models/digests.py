"""Hashes by which the values of weights are known again."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash


def digest_of(weight: torch.Tensor) -> str:
    """Hash of the values of a matrix; faster than reading it from memory."""
    values = weight.detach().cpu().contiguous()
    # Not by way of numpy: it would leave the storage unable to be resized, as FSDP2 does with what it gathers.
    data = (ctypes.c_char * values.nbytes).from_address(values.data_ptr()) if values.nbytes else b""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint_of(weight: torch.Tensor) -> str:
    """Hash of some rows of a matrix: tells one model from another at no cost."""
    return digest_of(weight[:: max(1, len(weight) // 16)])


def text_digest(value: Any) -> str:
    """Hash of anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def value_digest(value: Any) -> str:
    """Hash of what can be known of a value from one run to the next: numbers, texts, tensors, and what holds them; of
    long data its length and some rows; of anything else its type."""
    return text_digest(_plain(value))


#: Rows of data that are looked at, from its beginning to its end.
_ROWS_SEEN = 64


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _plain_array(torch.as_tensor(value)) if value.dtype != object else str(value.shape)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    kind = getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "with_format"):  # a data set, whose transforms may be random
        value = value.with_format(None)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        step = max(1, len(value) // _ROWS_SEEN)
        return [kind, len(value), [_plain(value[index]) for index in range(0, len(value), step)]]
    return kind


def _plain_array(values: torch.Tensor) -> list[Any]:
    return [str(values.dtype), list(values.shape), digest_of(values.reshape(-1))]
