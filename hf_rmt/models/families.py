"""One declaration a family: where its residual stream is written, read and normed (see ``residual_stream.Family``).

Another family is added by ``register_family`` in a script of one's own; ``verify_stream(model)`` tells whether it is
right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_rmt.models.residual_stream import Branch, Family

#: Declarations by ``config.model_type``, as functions of the config.
_FAMILIES: dict[str, Callable[[Any], Family]] = {}


def register_family(*types: str, family: Family | Callable[[Any], Family]) -> None:
    """Declare the residual stream of some types of models, or replace a declaration.

    Args:
        *types: values of ``config.model_type``.
        family: the declaration, or a function that gives it for a config and raises a ValueError where a model of
            the type cannot be worked on.
    """
    declared = family if callable(family) else lambda config: family
    _FAMILIES.update(dict.fromkeys(types, declared))


def known_families() -> list[str]:
    """The model types that there are declarations for."""
    return sorted(_FAMILIES)


def is_own(kind: str) -> bool:
    """Whether the declaration for a model type is that of the library, and no user's."""
    return kind in _OWN and _FAMILIES.get(kind) is _OWN[kind]


def family_of(model: Any) -> Family:
    """The declaration for a model.

    Raises:
        ValueError: there is none, and the message names those that there are and how to add one; or this model of a
            known family differs from the others in what matters.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _FAMILIES:
        raise ValueError(
            f"there is no declaration of the residual stream of {kind or type(model).__name__}; there are "
            f"{', '.join(known_families())}. Describe it by a Family and give that to register_family; "
            "verify_stream(model) tells whether it is right"
        )
    return _FAMILIES[kind](model.config)


def _refuse(config: Any, reasons: dict[str, bool]) -> None:
    """Raise if one of the reasons holds."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"the residual stream of this {config.model_type} cannot be worked on: {' and '.join(found)}")


_QKV = ("q_proj", "k_proj", "v_proj")
_GATED = (("gate_proj", "up_proj"), "down_proj")
_DECODER: dict[str, Any] = {"blocks": "layers", "entry": ("embed_tokens",), "final_norm": "norm"}


def _sublayer(
    module: str, norm: str | None, readers: tuple[str, ...], writer: str, *, output_norm: str = "", dropout: str = ""
) -> Branch:
    """A sublayer that is one module, which has its readers and its writer."""
    return Branch(
        norm=norm,
        mixer=(module,),
        readers=tuple(f"{module}.{reader}" for reader in readers),
        writers=(f"{module}.{writer}",),
        output_norm=output_norm or None,
        dropout=dropout or None,
    )


# Decoders: RMS norms


_LLAMA = (
    (_sublayer("self_attn", "input_layernorm", _QKV, "o_proj"),),
    (_sublayer("mlp", "post_attention_layernorm", *_GATED),),
)
register_family("llama", "mistral", "qwen2", "qwen3", family=Family(norm="rms", steps=_LLAMA, **_DECODER))
register_family("granite", family=Family(norm="rms", steps=_LLAMA, scale="residual_multiplier", **_DECODER))
register_family("gemma", family=Family(norm="rms_plus_one", steps=_LLAMA, **_DECODER))

_GEMMA2 = (
    (_sublayer("self_attn", "input_layernorm", _QKV, "o_proj", output_norm="post_attention_layernorm"),),
    (_sublayer("mlp", "pre_feedforward_layernorm", *_GATED, output_norm="post_feedforward_layernorm"),),
)
register_family("gemma2", "gemma3_text", family=Family(norm="rms_plus_one", steps=_GEMMA2, **_DECODER))

_OLMO2 = (
    (_sublayer("self_attn", None, _QKV, "o_proj", output_norm="post_attention_layernorm"),),
    (_sublayer("mlp", None, *_GATED, output_norm="post_feedforward_layernorm"),),
)
register_family("olmo2", family=Family(norm="rms", steps=_OLMO2, **_DECODER))

_PHI3 = (
    (_sublayer("self_attn", "input_layernorm", ("qkv_proj",), "o_proj", dropout="resid_attn_dropout"),),
    (_sublayer("mlp", "post_attention_layernorm", ("gate_up_proj",), "down_proj", dropout="resid_mlp_dropout"),),
)
register_family("phi3", family=Family(norm="rms", steps=_PHI3, **_DECODER))


def _mixture(config: Any) -> Family:
    some = bool(getattr(config, "mlp_only_layers", None)) or getattr(config, "decoder_sparse_step", 1) != 1
    _refuse(config, {"some of its blocks have experts and others have none": some})
    experts = _sublayer("mlp", "post_attention_layernorm", ("gate", "experts.gate_up_proj"), "experts.down_proj")
    return Family(norm="rms", steps=(_LLAMA[0], (experts,)), **_DECODER)


register_family("mixtral", "qwen3_moe", "olmoe", family=_mixture)


# Decoders: LayerNorms


_STARCODER2 = (_LLAMA[0], (_sublayer("mlp", "post_attention_layernorm", ("c_fc",), "c_proj"),))
register_family("starcoder2", family=Family(norm="layernorm", steps=_STARCODER2, **_DECODER))

_COHERE = ((*_LLAMA[0], _sublayer("mlp", "input_layernorm", *_GATED)),)
register_family("cohere", family=Family(norm="layernorm", steps=_COHERE, **_DECODER))

_PHI = (
    (
        _sublayer("self_attn", "input_layernorm", _QKV, "dense", dropout="resid_dropout"),
        _sublayer("mlp", "input_layernorm", ("fc1",), "fc2", dropout="resid_dropout"),
    ),
)
register_family("phi", family=Family(norm="layernorm", steps=_PHI, **{**_DECODER, "final_norm": "final_layernorm"}))


def _stablelm(config: Any) -> Family:
    norm = "input_layernorm" if config.use_parallel_residual else "post_attention_layernorm"
    return _in_steps(config, *_LLAMA[0], _sublayer("mlp", norm, *_GATED, dropout="dropout"), **_DECODER)


def _gpt_neox(config: Any) -> Family:
    return _in_steps(
        config,
        _sublayer("attention", "input_layernorm", ("query_key_value",), "dense", dropout="post_attention_dropout"),
        _sublayer("mlp", "post_attention_layernorm", ("dense_h_to_4h",), "dense_4h_to_h", dropout="post_mlp_dropout"),
        blocks="layers",
        entry=("embed_in",),
        final_norm="final_layer_norm",
        heads=(("lm_head",), ("embed_out",), ("score",), ("classifier",), ("qa_outputs",)),
    )


def _in_steps(config: Any, attention: Branch, mlp: Branch, **paths: Any) -> Family:
    """Both sublayers beside each other, or one after the other, as the config says."""
    steps = ((attention, mlp),) if config.use_parallel_residual else ((attention,), (mlp,))
    return Family(norm="layernorm", steps=steps, **paths)


def _gpt2(config: Any) -> Family:
    _refuse(config, {"it has cross-attention": config.add_cross_attention})
    steps = ((_sublayer("attn", "ln_1", ("c_attn",), "c_proj"),), (_sublayer("mlp", "ln_2", ("c_fc",), "c_proj"),))
    return Family(norm="layernorm", blocks="h", entry=("wte", "wpe"), steps=steps, final_norm="ln_f")


def _opt(config: Any) -> Family:
    reasons = {
        "its norms sit behind the sums (do_layer_norm_before=False)": not config.do_layer_norm_before,
        "its embeddings are projected (word_embed_proj_dim)": config.word_embed_proj_dim != config.hidden_size,
        "it has no last norm (_remove_final_layer_norm)": config._remove_final_layer_norm,
    }
    _refuse(config, reasons)
    mlp = Branch(
        norm="final_layer_norm",
        mixer=("fc1", "activation_fn", "fc2"),
        readers=("fc1",),
        writers=("fc2",),
        dropout="dropout",
    )
    attention = _sublayer("self_attn", "self_attn_layer_norm", _QKV, "out_proj", dropout="dropout")
    return Family(
        norm="layernorm",
        blocks="decoder.layers",
        entry=("decoder.embed_tokens", "decoder.embed_positions"),
        steps=((attention,), (mlp,)),
        final_norm="decoder.final_layer_norm",
    )


register_family("stablelm", family=_stablelm)
register_family("gpt_neox", family=_gpt_neox)
register_family("gpt2", family=_gpt2)
register_family("opt", family=_opt)


# Encoders: norms on the residual connection


_BERT_HEADS = (
    ("bert.pooler.dense", "cls.predictions.transform.dense"),
    ("lm_head.dense",),
    ("discriminator_predictions.dense",),
    ("generator_predictions.dense",),
    ("classifier.dense",),
    ("classifier",),
    ("qa_outputs",),
)


def _bert(config: Any) -> Family:
    _refuse(config, {"it is a decoder": config.is_decoder or config.add_cross_attention})
    own = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention = Branch(
        norm="attention.output.LayerNorm",
        mixer=("attention.self", "attention.output.dense", "attention.output.dropout"),
        readers=own,
        writers=("attention.output.dense",),
    )
    mlp = Branch(
        norm="output.LayerNorm",
        mixer=("intermediate", "output.dense", "output.dropout"),
        readers=("intermediate.dense",),
        writers=("output.dense",),
    )
    projected = getattr(config, "embedding_size", config.hidden_size) != config.hidden_size  # ELECTRA
    embeddings = tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))
    return Family(
        norm="layernorm",
        blocks="encoder.layer",
        entry=("embeddings_project",) if projected else embeddings,
        entry_norm=None if projected else "embeddings.LayerNorm",
        steps=((attention,), (mlp,)),
        heads=_BERT_HEADS,
        post_norm=True,
    )


register_family("bert", "roberta", "electra", family=_bert)

_DISTILBERT = (
    (_sublayer("attention", "sa_layer_norm", ("q_lin", "k_lin", "v_lin"), "out_lin"),),
    (_sublayer("ffn", "output_layer_norm", ("lin1",), "lin2"),),
)
register_family(
    "distilbert",
    family=Family(
        norm="layernorm",
        blocks="transformer.layer",
        entry=("embeddings.word_embeddings", "embeddings.position_embeddings"),
        entry_norm="embeddings.LayerNorm",
        steps=_DISTILBERT,
        heads=(("vocab_transform",), ("pre_classifier",), ("classifier",), ("qa_outputs",)),
        post_norm=True,
    ),
)


# Vision


_VIT = (
    (_sublayer("attention", "layernorm_before", _QKV, "o_proj", dropout="dropout"),),
    (_sublayer("mlp", "layernorm_after", ("fc1",), "fc2", dropout="dropout"),),
)
register_family(
    "vit",
    family=Family(
        norm="layernorm",
        blocks="layers",
        entry=tuple(
            f"embeddings.{name}"
            for name in ("cls_token", "mask_token", "position_embeddings", "patch_embeddings.projection")
        ),
        steps=_VIT,
        final_norm="layernorm",
    ),
)

_OWN = dict(_FAMILIES)
