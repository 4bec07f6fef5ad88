"""Several matrices in one parameter: which rows of ``(out, in)`` belong to which.

One function a layout, one line a family. A layout that is not known is left whole, under its own
name, rather than cut in the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

Rows = slice | torch.Tensor
Parts = dict[str, Rows]

QKV = ("query", "key", "value")


def contiguous(names: Iterable[str], sizes: Iterable[int]) -> Parts:
    """One matrix below the other."""
    parts: Parts = {}
    start = 0
    for name, size in zip(names, sizes, strict=True):
        parts[name] = slice(start, start + size)
        start += size
    return parts


def per_head(names: Iterable[str], counts: Iterable[int], groups: int, head_dim: int) -> Parts:
    """Groups of heads, each with its own rows of every matrix: ``(groups, sum(counts), head_dim)``."""
    counts = list(counts)
    rows = torch.arange(groups * sum(counts) * head_dim).view(groups, sum(counts), head_dim)
    pieces = rows.split(counts, dim=1)
    return {name: piece.flatten() for name, piece in zip(names, pieces, strict=True)}


def fused_parts(leaf: str, rows: int, config: Any) -> Parts | None:
    """The matrices in a fused parameter, or None where it is one matrix.

    Args:
        leaf: last piece of the module's path (``"c_attn"``), or of the parameter's.
        rows: number of rows of the whole, output features first.
        config: the configuration of the nearest transformers model above the module, or None.
    """
    if leaf in ("gate_up_proj", "Wi") and rows % 2 == 0:
        return contiguous(("gate", "up"), (rows // 2,) * 2)
    layout = _FAMILIES.get((getattr(config, "model_type", ""), leaf), _LAYOUTS.get(leaf))
    parts = layout(rows, config) if layout else None
    return parts if parts and _total(parts) == rows else None


def expert_parts(leaf: str, rows: int, interleaved: bool) -> Parts | None:
    """The matrices in one expert's slice of a stacked parameter (after turning it to (out, in))."""
    if leaf != "gate_up_proj":
        return None
    if interleaved:  # gate_0, up_0, gate_1, up_1, ...
        return {"gate": slice(0, rows, 2), "up": slice(1, rows, 2)}
    return contiguous(("gate", "up"), (rows // 2,) * 2)


_GATES = {"LSTM": ("input", "forget", "cell", "output"), "GRU": ("reset", "update", "new")}


def gates(mode: str, rows: int) -> Parts | None:
    """The matrices of the gates of one of torch's recurrent layers, in the order in which it stacks them."""
    found = _GATES.get(mode)
    return contiguous(found, (rows // len(found),) * len(found)) if found and rows % len(found) == 0 else None


def _total(parts: Parts) -> int:
    return sum(part.stop - part.start if isinstance(part, slice) else len(part) for part in parts.values())


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size, under the names that configurations use."""
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
    width = _first(config, "hidden_size", "n_embd", "d_model", "embed_dim") or 0
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    head_dim = _first(config, "head_dim") or (width // heads if heads else 0)
    return heads, kv_heads, head_dim


def _first(config: Any, *names: str) -> int | None:
    return next((v for name in names if isinstance(v := getattr(config, name, None), int)), None)


def _contiguous_attention(rows: int, config: Any) -> Parts | None:
    """q, k and v below each other; grouped queries where the sizes say so."""
    heads, kv_heads, head_dim = _heads(config)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if sum(sizes) == rows:
        return contiguous(QKV, sizes)
    # Thirds only where each is as wide as the queries, or where nothing is known of the heads.
    return contiguous(QKV, (rows // 3,) * 3) if rows % 3 == 0 and heads * head_dim in (0, rows // 3) else None


def _interleaved_heads(rows: int, config: Any) -> Parts | None:
    """GPT-NeoX, BLOOM, Persimmon: q, k and v of one head, then those of the next."""
    heads = _heads(config)[0]
    return per_head(QKV, (1, 1, 1), heads, rows // (3 * heads)) if heads else None


def _falcon(rows: int, config: Any) -> Parts | None:
    heads, kv_heads, head_dim = _heads(config)
    if config.new_decoder_architecture:
        return per_head(QKV, (heads // kv_heads, 1, 1), kv_heads, head_dim)
    if config.multi_query:
        return contiguous(QKV, (heads * head_dim, head_dim, head_dim))
    return _interleaved_heads(rows, config)


def _gpt2(rows: int, config: Any) -> Parts | None:
    """Self-attention holds q, k and v; cross-attention k and v, its queries being in ``q_attn``."""
    width = _first(config, "hidden_size", "n_embd") or 0
    if rows == 2 * width:
        return contiguous(("key", "value"), (width, width))
    return _contiguous_attention(rows, config)


def _gpt_bigcode(rows: int, config: Any) -> Parts | None:
    heads, _, head_dim = _heads(config)
    if config.multi_query:
        return contiguous(QKV, (heads * head_dim, head_dim, head_dim))
    return _interleaved_heads(rows, config)


def _codegen(rows: int, config: Any) -> Parts | None:
    """Query, value, key in each of four slices, a trace of the TPU cores it was trained on."""
    return per_head(("query", "value", "key"), (1, 1, 1), 4, rows // 12)


#: What a name means in most families ...
_LAYOUTS = dict.fromkeys(("c_attn", "qkv", "qkv_proj", "Wqkv", "qkv_linear", "in_proj_weight"), _contiguous_attention)

#: ... and in those that mean something else.
_FAMILIES = {
    ("gpt_neox", "query_key_value"): _interleaved_heads,
    ("gpt_neox_japanese", "query_key_value"): _interleaved_heads,
    ("bloom", "query_key_value"): _interleaved_heads,
    ("persimmon", "query_key_value"): _interleaved_heads,
    ("deberta", "in_proj"): _interleaved_heads,
    ("falcon", "query_key_value"): _falcon,
    ("gpt2", "c_attn"): _gpt2,
    ("decision_transformer", "c_attn"): _gpt2,
    ("imagegpt", "c_attn"): _gpt2,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("codegen", "qkv_proj"): _codegen,
}
