"""The plain form of a sliced model computes what that does, and needs nothing of this library."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt.models.families import family_of
from hf_rmt.models.residual_stream import Stream, stream_of
from hf_rmt.slicing.basis import change_basis_
from hf_rmt.slicing.norms import fuse_norms_
from hf_rmt.slicing.plain import can_be_plain, plain_form, plain_width

_SIZES: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    vocab_size=100,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
_VIT = {key: value for key, value in _SIZES.items() if not key.endswith(("_id", "vocab_size"))}

#: name -> class, configuration class, its sizes; of families whose slices have a plain form
PLAIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 24}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {**_GROUPED, "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "moe_intermediate_size": 32}),
    "phi": ("PhiForCausalLM", "PhiConfig", _SIZES),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "starcoder2 bare": ("Starcoder2ForCausalLM", "Starcoder2Config", {**_GROUPED, "use_bias": False}),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VIT, "image_size": 32, "patch_size": 8}),
    "llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_GROUPED, "num_labels": 3}),
    "phi classifier": ("PhiForSequenceClassification", "PhiConfig", {**_SIZES, "num_labels": 3}),
    "phi tokens": ("PhiForTokenClassification", "PhiConfig", {**_SIZES, "num_labels": 3}),
}
#: Those whose norms torch computes in the dtype of the model.
EXACT = ["phi", "starcoder2", "starcoder2 bare", "vit", "phi classifier", "phi tokens"]
LAYERNORM = [*EXACT, "cohere"]
GENERATING = [name for name, (cls, _, _) in PLAIN.items() if cls.endswith("CausalLM")]

#: name -> class, configuration class, its sizes, and why there is no plain form
NOT_PLAIN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 16}, "norms on the outputs of sublayers"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 16}, "norms on the outputs"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED, "norms on the outputs"),
    "bert": ("BertForMaskedLM", "BertConfig", _SIZES, "norms on the residual connection"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, eos_token_id=2, bos_token_id=1),
        r"h.0.attn.c_attn.weight is \[60, 180\] and not \[60, 192\]",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, vocab_size=100),
        r"self_attn.k_proj.weight is \[60, 60\] and not \[64, 60\]",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES, r"query_key_value.weight is \[180, 60\]"),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GROUPED, r"q_proj.weight is \[60, 60\] and not \[64, 60\]"),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _EXPERTS, r"q_norm.weight is \[56\] and not \[64\]"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small models: threads cost more than they bring; and sums come out the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_for(name: str) -> Any:
    _, config, sizes, *_ = PLAIN.get(name) or NOT_PLAIN[name]
    return getattr(transformers, config)(**sizes)


def model_for(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose gains, biases and weights are all random."""
    cls = (PLAIN.get(name) or NOT_PLAIN[name])[0]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config_for(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model.to(dtype)


def basis(columns: int, *, ones: bool | None = None, seed: int = 0) -> torch.Tensor:
    """``(64, columns)`` orthonormal, random; with the ones vector among them, or orthogonal to it, if told."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    vectors[:, 0] = 1 if ones is not None else vectors[:, 0]
    orthogonal = torch.linalg.qr(vectors)[0]
    first = orthogonal[:, 1 : columns + 1] if ones is False else orthogonal[:, :columns]
    rotation = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))[0]
    return first @ rotation


def sliced(name: str, columns: int | None = None, dtype: torch.dtype = torch.float32, **choice: Any) -> Stream:
    stream = fuse_norms_(model_for(name, dtype))
    if columns is None:
        columns = plain_width(stream.model.config, 57) - (name in LAYERNORM)
    change_basis_(stream, basis(columns, **choice))
    return stream


def inputs(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)}
    ids = torch.randint(3, 100, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 6, 8])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def difference(plain: Any, stream: Stream) -> float:
    """Of what both put out, in parts of the largest value."""
    expected = logits(stream.model)
    return float((logits(plain) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PLAIN)
def test_it_puts_out_what_the_sliced_model_does(name: str) -> None:
    stream = sliced(name)
    plain = plain_form(stream)
    assert type(plain) is getattr(transformers, PLAIN[name][0])
    assert plain.config.hidden_size == (56 if name.startswith(("llama", "mixtral", "qwen3_moe")) else 57)
    assert difference(plain, stream) < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_layer_norms_are_met_to_double_precision(name: str) -> None:
    stream = sliced(name, dtype=torch.float64)
    plain = plain_form(stream)
    assert plain.dtype == torch.float64
    assert difference(plain, stream) < 1e-13


def test_experts_in_double_precision() -> None:
    stream = sliced("mixtral", dtype=torch.float64)
    stream.model.set_experts_implementation("eager")  # type: ignore[operator]
    plain = plain_form(stream)
    assert plain.config._experts_implementation == "eager"
    assert difference(plain, stream) < 1e-6  # its norms compute in float32


@pytest.mark.parametrize("name", ["phi", "starcoder2 bare", "vit"])
@pytest.mark.parametrize(
    ("columns", "ones", "width"), [(40, False, 41), (40, True, 40), (40, None, 41), (64, None, 64)]
)
def test_a_zero_mode_of_the_stream_needs_no_column_more(name: str, columns: int, ones: bool | None, width: int) -> None:
    """Where the ones vector is kept nothing is written along one direction, and that becomes the free one."""
    stream = sliced(name, columns, torch.float64, ones=ones)
    plain = plain_form(stream)
    assert plain.config.hidden_size == width
    assert difference(plain, stream) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_mode_is_seen_in_spite_of_rounding(dtype: torch.dtype) -> None:
    stream = sliced("starcoder2", 40, dtype, ones=True)
    assert plain_form(stream).config.hidden_size == 40


def test_a_bias_that_the_architecture_has_not_is_in_the_free_direction() -> None:
    """Neither sublayer of this model has biases, and its norms add random vectors."""
    stream = sliced("starcoder2 bare", dtype=torch.float64)
    made = stream.sites[1].norms[0].readers[0].bias
    assert made is not None and made.value is not None and bool(made.value.any())
    plain = plain_form(stream)
    assert not [name for name, _ in plain.named_parameters() if name.endswith("bias") and "norm" not in name]
    norm = plain.get_submodule("model.layers.0.post_attention_layernorm")
    assert norm.bias.eq(1).all()
    assert torch.allclose(plain.get_submodule("model.layers.0.mlp.c_fc").weight.sum(-1), made.value)


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates_the_same_tokens(name: str) -> None:
    stream = sliced(name)
    plain = plain_form(stream)
    given = torch.arange(3, 11).reshape(2, 4)
    options: dict[str, Any] = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    expected = stream.model.generate(given, **options)  # type: ignore[operator]
    assert torch.equal(plain.generate(given, use_cache=True, **options), expected)
    assert torch.equal(plain.generate(given, use_cache=False, **options), expected)


_LOADING = """
import sys
sys.modules["hf_rmt"] = None
import torch, transformers
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = "ImageClassification" if config.model_type == "vit" else config.architectures[0].split("For")[1]
    auto = {"CausalLM": "AutoModelForCausalLM"}.get(kind, f"AutoModelFor{kind}")
    model, found = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits, f"{folder}/logits.pt")
"""


def test_transformers_alone_loads_it_to_the_bit(tmp_path: Path) -> None:
    expected = {}
    for name in [*PLAIN, "gemma in bfloat16"]:
        family, _, half = name.partition(" in ")
        plain = plain_form(sliced(family, dtype=torch.bfloat16 if half else torch.float32))
        plain.save_pretrained(tmp_path / name)
        torch.save(inputs(plain), tmp_path / name / "inputs.pt")
        expected[name] = logits(plain)
    folders = [str(tmp_path / name) for name in expected]
    done = subprocess.run([sys.executable, "-c", _LOADING, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), value), name


def test_the_file_shrinks_as_the_parameters_do(tmp_path: Path) -> None:
    dense, plain = model_for("llama"), plain_form(sliced("llama", 32))
    sizes, counts = [], []
    for name, model in (("dense", dense), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
        counts.append(model.num_parameters())
    assert sizes[0] - sizes[1] == pytest.approx(4 * (counts[0] - counts[1]), rel=0.01)
    assert counts[1] / counts[0] == pytest.approx(0.5, abs=0.01)


def test_what_it_keeps_of_the_model_it_was_made_from() -> None:
    stream = sliced("phi")
    model: Any = stream.model
    model.config.update({"id2label": {0: "a", 1: "b", 2: "c"}, "initializer_range": 0.5})
    model.config.name_or_path = model.name_or_path = "someone/phi"
    model.generation_config.max_new_tokens = 7
    model.train()
    before = model.config.to_dict()
    plain = plain_form(stream)
    after = plain.config.to_dict()
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed - {"transformers_version", "dtype"} == {"hidden_size", "head_dim"}
    assert (plain.config.hidden_size, plain.config.head_dim, plain.config.tie_word_embeddings) == (57, 16, False)
    assert plain.name_or_path == plain.config.name_or_path == "someone/phi"
    assert plain.generation_config.to_dict() == model.generation_config.to_dict()
    assert plain.generation_config is not model.generation_config
    assert plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not [module for module in plain.modules() if type(module).__module__.startswith("hf_rmt")]


def test_a_tied_model_becomes_untied() -> None:
    plain: Any = plain_form(sliced("llama tied"))
    assert not plain.config.tie_word_embeddings
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_the_sliced_model_stays_and_shares_nothing() -> None:
    stream = sliced("qwen3")
    before = {name: tensor.clone() for name, tensor in stream.model.state_dict().items()}
    config = copy.deepcopy(stream.model.config.to_dict())  # type: ignore[union-attr, operator]
    plain = plain_form(stream)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    after = stream.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert stream.model.config.to_dict() == config  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("columns", [48, 56])
def test_gemma_in_bfloat16_makes_up_for_a_rounded_factor(columns: int) -> None:
    """There sqrt(48) and sqrt(56) are off by 0.12 and 0.2 %, and embeddings must stay in proportion to all else."""
    stream = sliced("gemma", columns, torch.bfloat16)
    plain: Any = plain_form(stream)
    model: Any = stream.model

    def ratio(of: Callable[[Any], torch.Tensor]) -> float:
        new, old = of(plain).detach().double(), of(model).detach().double()
        return float((new * old).sum() / old.square().sum())

    embedded = ratio(lambda model: model.model.embed_tokens(torch.arange(100)))
    assert embedded == pytest.approx((columns / 64) ** 0.5, rel=3e-3)
    assert ratio(lambda model: model.model.layers[0].mlp.down_proj.weight) == pytest.approx(embedded, rel=3e-4)
    assert difference(plain, stream) < 0.05


# What an architecture takes


@pytest.mark.parametrize("name", PLAIN)
def test_these_can_be_plain(name: str) -> None:
    cls = getattr(transformers, PLAIN[name][0])
    assert can_be_plain(config_for(name), cls) is None
    assert can_be_plain(config_for(name)) is None


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_these_cannot_and_it_says_why(name: str) -> None:
    reason = can_be_plain(config_for(name))
    assert reason is not None
    assert reason.startswith(NOT_PLAIN[name][0])
    assert reason.endswith("The registered form can hold such a slice")
    with pytest.raises(ValueError, match=NOT_PLAIN[name][3]):
        plain_width(config_for(name), 64)


@pytest.mark.parametrize("name", ["gemma2", "bert", "gpt2", "olmoe"])
def test_no_plain_form_is_made_of_these(name: str) -> None:
    stream = fuse_norms_(model_for(name))
    change_basis_(stream, basis(32))
    with pytest.raises(ValueError, match=f"{NOT_PLAIN[name][3]}.*registered form"):
        plain_form(stream)


@pytest.mark.parametrize(
    ("name", "width", "taken"),
    [
        ("llama", 64, 64),
        ("llama", 63, 60),
        ("llama", 4, 4),
        ("mistral", 63, 63),
        ("phi", 41, 41),
        ("mixtral", 63, 56),
        ("mixtral", 56, 56),
        ("qwen3_moe", 15, 8),
    ],
)
def test_widths_that_are_taken(name: str, width: int, taken: int) -> None:
    assert plain_width(config_for(name), width) == taken


@pytest.mark.parametrize(
    ("name", "width", "why"),
    [
        ("llama", 3, "up to 3: The hidden size .* is not a multiple"),
        ("mixtral", 7, "divisible by 8"),
        ("phi", 0, "to 0"),
    ],
)
def test_no_width_that_small(name: str, width: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        plain_width(config_for(name), width)


def test_a_config_that_derives_its_rotary_size_is_refused() -> None:
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = transformers.Phi3Config(**_GROUPED, rope_parameters=rope, original_max_position_embeddings=64)
    assert "short_factor field must have length" in str(can_be_plain(config))


def test_norms_of_heads_that_are_derived_are_refused() -> None:
    config = transformers.PhiConfig(**_SIZES, qk_layernorm=True)
    assert "q_layernorm.weight is [15] and not [16]" in str(can_be_plain(config))


class Scaled(transformers.LlamaForCausalLM):
    """Computes with a factor that no shape shows."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.logits_scale = config.hidden_size**-0.5


def test_a_factor_that_is_derived_is_refused() -> None:
    assert "another .logits_scale at a hidden_size of 60: 0.1291, not 0.125" in str(
        can_be_plain(config_for("llama"), Scaled)
    )


def test_the_class_is_that_which_the_configuration_names() -> None:
    config = config_for("llama")
    config.architectures = ["LlamaForSequenceClassification"]
    assert can_be_plain(config) is None
    assert "give its class" in str(can_be_plain(transformers.CLIPVisionConfig(**_VIT)))


def test_a_declaration_of_ones_own_is_asked() -> None:
    config = config_for("llama")
    own = dataclasses.replace(family_of(model_for("llama")), post_norm=True)
    assert "norms on the residual connection" in str(can_be_plain(config, family=own))
    with pytest.raises(ValueError, match="norms on the residual connection"):
        plain_width(config, 60, family=own)
    assert "no declaration of the residual stream of bloom" in str(can_be_plain(transformers.BloomConfig()))


# What cannot be told plainly


def test_a_headless_model_is_refused() -> None:
    stream = fuse_norms_(model_for("llama").base_model)
    change_basis_(stream, basis(32))
    with pytest.raises(ValueError, match=r"LlamaModel has no head.*Slice it with a head"):
        plain_form(stream)


def test_shortcuts_are_refused() -> None:
    stream = fuse_norms_(model_for("llama"))
    change_basis_(stream, [basis(32, seed=seed) for seed in range(5)])
    with pytest.raises(ValueError, match=r"matrices in its residual connections.*one basis for the whole model"):
        plain_form(stream)


def test_norms_that_are_not_fused_are_refused() -> None:
    with pytest.raises(ValueError, match="not fused: fuse_norms_"):
        plain_form(stream_of(model_for("llama")))


@pytest.mark.parametrize(
    ("name", "columns", "match"),
    [
        ("llama", 50, "no hidden_size of 50, .* 50 columns .* below is 48: cut 2 more"),
        ("mixtral", 60, "no hidden_size of 60.* below is 56: cut 4 more"),
    ],
)
def test_a_width_that_no_configuration_takes_is_refused(name: str, columns: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plain_form(sliced(name, columns))


def test_a_bias_that_has_no_place_is_refused() -> None:
    """Divided by a root mean square alone, a stream has no direction of its own for it."""
    stream = sliced("mistral")
    projection: Any = stream.model.get_submodule("model.layers.0.mlp.up_proj")
    projection.bias = nn.Parameter(torch.ones(96))
    with pytest.raises(ValueError, match=r"do not both have model.layers.0.mlp.up_proj.bias: .* registered form"):
        plain_form(stream)
