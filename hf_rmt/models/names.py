"""From the dotted path of a module to the words of the library: name, role, block, stack.

Pure functions on strings, the same for a live model and for a checkpoint on disk.
"""

from __future__ import annotations

import re

#: Pieces that wrappers put into a path: torch.compile, DDP, peft.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")

_STACKS = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "vision": ("vision_model", "vision_tower", "visual", "vision_encoder", "vision"),
    "text": ("text_model", "language_model", "text_encoder", "text"),
    "audio": ("audio_model", "audio_tower", "audio_encoder", "speech_encoder", "audio"),
}
_STACK_OF = {word: stack for stack, words in _STACKS.items() for word in words}

_CROSS = re.compile(r"cross_?att|crossattn|encoder_attn|encdecattention", re.IGNORECASE)
_ATTENTION = re.compile(r"att", re.IGNORECASE)

#: Last piece of a path -> role, whatever stands before it.
_LEAF_ROLES = {
    role: leaf
    for leaf, roles in {
        "query": "query q_proj q_lin q_attn query_proj to_q linear_q wq",
        "key": "key k_proj k_lin key_proj to_k linear_k wk",
        "value": "value v_proj v_lin value_proj to_v linear_v wv",
        "gate": "gate_proj wi_0",
        "intermediate": "up_proj fc1 c_fc lin1 wi wi_1 dense_h_to_4h fc_in linear1",
        "output": "down_proj fc2 lin2 dense_4h_to_h fc_out linear2",
    }.items()
    for role in roles.split()
}
#: The same inside an attention module.
_ATTENTION_ROLES = {
    "q": "query",
    "k": "key",
    "v": "value",
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "c_proj", "dense", "o", "wo", "proj"), "attention.output"),
}
#: And outside attention, where one name serves both.
_FEED_FORWARD_ROLES = {"c_proj": "output", "wo": "output", "w1": "gate", "w2": "output", "w3": "intermediate"}


def plain_path(path: str) -> str:
    """A module path without what torch.compile, DDP and peft put into it."""
    return _WRAPPERS.sub("", path).removeprefix(".")


def canonical_name(path: str, base_prefix: str) -> str:
    """The name of a matrix: its path in the headless model, without ``.weight``.

    A headed model holds the headless one under ``base_prefix``; leaving that out gives both, and
    the checkpoints of both, the same names.
    """
    path = plain_path(path).removesuffix(".weight")
    return path.removeprefix(f"{base_prefix}.") if base_prefix else path


def without_indices(path: str) -> str:
    """A path with every number left out: ``h.0.mlp`` becomes ``h.mlp``."""
    return ".".join(piece for piece in path.split(".") if not piece.isdigit())


def stack_of(path: str) -> str | None:
    """Which of several stacks of blocks a path lies in, by the words before its first index."""
    for piece in path.split("."):
        if piece.isdigit():
            return None
        if piece in _STACK_OF:
            return _STACK_OF[piece]
    return None


def role_of(path: str, part: str | None = None) -> str:
    """Role of the matrix at ``path``, a canonical name; ``part`` of a fused parameter.

    Where the model has names of its own, the role is the path with the indices left out.
    """
    role = part or _whole_role(path)
    if role == "up":
        role = "intermediate"
    attention = role in ("query", "key", "value", "attention.output")
    return f"cross.{role}" if attention and _CROSS.search(path) else role


def _whole_role(path: str) -> str:
    pieces = path.split(".")
    leaf, before = pieces[-1], [piece for piece in pieces[:-1] if not piece.isdigit()]
    parent = before[-1] if before else ""
    if leaf == "dense" and parent == "intermediate":
        return "intermediate"
    if leaf == "dense" and parent == "output":  # BERT: attention.output.dense and output.dense
        grandparent = before[-2] if len(before) > 1 else ""
        return "attention.output" if _ATTENTION.search(grandparent) else "output"
    if leaf in _LEAF_ROLES:
        return _LEAF_ROLES[leaf]
    if leaf.isdigit():  # of a Sequential: its number is all the name it has
        return f"{without_indices(_below_block(pieces[:-1]))}.{leaf}" if before else leaf
    roles = _ATTENTION_ROLES if _ATTENTION.search(parent) else _FEED_FORWARD_ROLES
    return roles.get(leaf) or without_indices(_below_block(pieces))


def _below_block(pieces: list[str]) -> str:
    """What follows the first index, so that a role has the same name in every block."""
    for i, piece in enumerate(pieces):
        if piece.isdigit() and i + 1 < len(pieces):
            return ".".join(pieces[i + 1 :])
    return ".".join(pieces)
