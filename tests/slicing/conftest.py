"""Small models of every declared family, with random gains and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

SIZES: dict[str, Any] = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=80,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GROUPED = {**SIZES, "num_key_value_heads": 2}
_THREE = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3}
_HEADS = {**_GROUPED, "head_dim": 16}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
_VIT = {key: value for key, value in SIZES.items() if key not in ("vocab_size",) and not key.endswith("_token_id")}
_GPT2: dict[str, Any] = dict(n_embd=48, n_layer=2, n_head=4, vocab_size=80, bos_token_id=1, eos_token_id=2)

#: model -> class, configuration class, its sizes
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_GROUPED, "residual_multiplier": 0.4}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEADS),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _EXPERTS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _THREE),
    "stablelm_parallel": ("StableLmForCausalLM", "StableLmConfig", {**_THREE, "use_parallel_residual": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "gpt_neox_steps": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, "use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 48}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", SIZES),
    "bert_tokens": ("BertForTokenClassification", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "roberta_classifier": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(dim=48, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=80),
    ),
    "distilbert_classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(dim=48, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=80),
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**SIZES, "embedding_size": 24}),
    "electra_wide": ("ElectraForPreTraining", "ElectraConfig", {**SIZES, "embedding_size": 48}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VIT, "image_size": 32, "patch_size": 8}),
}
#: Those whose norms and attention are torch's own, in the dtype of the model.
EXACT = ("phi", "starcoder2", "stablelm", "stablelm_parallel", "gpt2", "gpt_neox", "gpt_neox_steps", "opt", "vit")
EXACT += tuple(name for name in MODELS if name.partition("_")[0] in ("bert", "roberta", "distilbert", "electra"))

StreamModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models: threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stream_model() -> StreamModel:
    """``stream_model("llama", dtype=torch.float64, num_hidden_layers=3)``: a random model, the same every time."""

    def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        cls, config, sizes = MODELS[name]
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
        return model.to(dtype)

    return make
