"""Configurations of any model type made small: the same architecture, fewer and narrower layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch

#: A small model has no more parameters than this.
LARGEST = 64_000_000
#: Divisors of the widths, most wanted first, and whether layers are cut to two.
_ATTEMPTS = [(divisor, cut) for cut in (True, False) for divisor in (16, 8, 32, 64, 4, 2)]

_LAYERS = re.compile(r"^(num|n)_.*(layers?|blocks?)$|^(n_layers?|layers|depth|n_blocks)$|_layers$")
_WIDTHS = re.compile(
    r"hidden|d_model|d_ff|d_kv|d_head|d_inner|dim|width|embd|embed|inter|inner|channels|ffn|rank|filter|_size$|sizes$|mlp",
    re.IGNORECASE,
)
_NO_WIDTHS = re.compile(
    r"vocab|image|patch|kernel|stride|window|position|max_|num_|^n_(?!embd|inner)|token|_id$|sample|seq|length|crop|grid|"
    r"resol|chunk|frequency|bins|mels|type_|dilation|pool|context|codebook|rate",
    re.IGNORECASE,
)
_EXPERTS = re.compile(r"experts(?!_per)")
_PER_TOKEN = re.compile(r"per_tok|top_?k$|moe_k$")
_GROUPS = re.compile(r"^n_group$|^topk_group$|^num_expert_groups?$")
#: What a configuration makes out of its other fields.
_DERIVED = {"out_features", "out_indices", "stage_names", "layer_types", "per_layer_config", "mlp_layer_types"}

#: What no rule finds, by model type: fields of the small configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "longcat_flash": {"zero_expert_num": 2},
}


def small_config(config_class: Any) -> Any:
    """The smallest configuration of a type that its model can be built with.

    Raises:
        ValueError: there is none, with what went wrong first.
    """
    from transformers import AutoModel

    failures: list[Exception] = []
    for divisor, cut in _ATTEMPTS:
        try:
            config = _shrunk(config_class, divisor, cut)
            with torch.device("meta"):
                model = AutoModel.from_config(config)
        except Exception as error:  # whatever sizes that do not fit lead to
            failures.append(error)
            continue
        if sum(parameter.numel() for parameter in model.parameters()) <= LARGEST:
            return config
        failures.append(ValueError(f"its widths divided by {divisor}, it has more than {LARGEST:,} parameters"))
    raise ValueError(f"{type(failures[0]).__name__}: {failures[0]}")


def _shrunk(config_class: Any, divisor: int, cut: bool) -> Any:
    default = config_class()
    fields = {key: value for key, value in default.to_dict().items() if key not in ("architectures", "dtype")}
    small = dict(_fields(fields, divisor, cut)) | EXCEPTIONS.get(default.model_type, {})
    return config_class.from_dict(small)


def _fields(fields: dict[str, Any], divisor: int, cut: bool) -> Iterator[tuple[str, Any]]:
    """Every field, the widths divided, the layers cut; lists with one entry a layer are cut to as many."""
    counts = {value for key, value in fields.items() if _LAYERS.search(key) and type(value) is int and value > 2}
    heads = _heads(fields, divisor, cut)
    for key, value in fields.items():
        if key in _DERIVED and cut:
            continue
        if key in heads:
            yield key, heads[key]
        elif isinstance(value, dict):
            named = all(isinstance(one, str) for one in value)  # those of labels are numbered
            yield key, dict(_fields(value, divisor, cut)) if named else value
        elif isinstance(value, (list, tuple)):
            some = list(value)[:2] if cut and len(value) in counts else list(value)
            numbers = all(type(one) is int for one in some)
            yield key, [_number(key, one, divisor, cut) for one in some] if numbers else some
        else:
            yield key, _number(key, value, divisor, cut) if type(value) is int else value


def _heads(fields: dict[str, Any], divisor: int, cut: bool) -> dict[str, int]:
    """Numbers of heads that no longer divide the width, made smaller."""
    found: dict[str, int] = {}
    for width_key, heads_key in itertools.product(_WIDTH_OF_HEADS, _NUMBERS_OF_HEADS):
        width, heads = fields.get(width_key), fields.get(heads_key)
        if type(width) is int and type(heads) is int and "head_dim" not in fields and heads > 0:
            small = _number(width_key, width, divisor, cut)
            # Rotations of two axes take fours.
            fitting = [h for h in range(1, heads + 1) if heads % h == 0 and small % h == 0 and small // h % 4 == 0]
            if small % heads and fitting:
                found[heads_key] = fitting[-1]
    return found


_WIDTH_OF_HEADS = ("hidden_size", "d_model", "embed_dim", "embedding_dim", "dim")
_NUMBERS_OF_HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)


def _number(key: str, value: int, divisor: int, cut: bool) -> int:
    is_width = bool(_WIDTHS.search(key)) and not _NO_WIDTHS.search(key)
    rules = [
        (bool(_GROUPS.search(key)), 1),
        (bool(_EXPERTS.search(key)), min(value, 4)),
        (bool(_PER_TOKEN.search(key)), min(value, 2)),
        (key == "depths" and cut, 1),
        (bool(_LAYERS.search(key)) and cut, min(value, 2)),
        (key == "max_position_embeddings", min(value, 512)),
        (is_width and value >= 2 * divisor and value % divisor == 0, value // divisor),
    ]
    return next((made for holds, made in rules if holds), value)
