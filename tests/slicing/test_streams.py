"""Every declaration is right: with its norms fused and its stream rotated, a model puts out what it did."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt.models import families
from hf_rmt.models.families import family_of, known_families, register_family
from hf_rmt.models.residual_stream import Branch, Stream, stream_of
from hf_rmt.models.stream_modules import StreamNorm, has_shortcuts
from hf_rmt.slicing.basis import change_basis_, rotate_, slice_
from hf_rmt.slicing.norms import fuse_norms_
from hf_rmt.slicing.verify import output_of, relative_error, sample_batch, verify_stream

from .conftest import EXACT, MODELS, SIZES, StreamModel


def rotations(count: int, width: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0] for _ in range(count)
    ]


def test_every_declared_family_is_tested() -> None:
    kinds = {getattr(transformers, config).model_type for _, config, _ in MODELS.values()}
    assert set(known_families()) == kinds


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_stream_changes_nothing(name: str, headless: bool, stream_model: StreamModel) -> None:
    model = stream_model(name)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    check = verify_stream(model.base_model if headless else model)
    limit = 1e-12 if name in EXACT else 1e-5
    assert max(dataclasses.astuple(check)) < limit, check
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert type(model.get_submodule(next(iter(dict(model.named_modules()))))) is type(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "phi", "mixtral"])
def test_generation_with_a_cache_agrees(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name)
    batch = sample_batch(model)
    batch = {key: value.flip(1) for key, value in batch.items()}  # padding comes first
    options: Any = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(**batch, **options)
    stream = fuse_norms_(model)
    change_basis_(stream, rotations(len(stream.sites)))
    assert all(has_shortcuts(block) for block in stream.blocks)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), expected)


def test_a_batch_of_ones_own_is_taken(stream_model: StreamModel) -> None:
    model = stream_model("vit")
    images = {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert verify_stream(model, batch=images).rotated < 1e-12


def test_fusing_is_said_in_the_modules(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stream = fuse_norms_(model)
    assert all(isinstance(slot.module, StreamNorm) for site in stream.sites for slot in site.norms)
    assert [site.key for site in stream.sites][:3] == ["layers.0 step 0", "layers.0 step 1", "layers.1 step 0"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="the norms of this LlamaForCausalLM were fused before"):
        fuse_norms_(model)


def test_copies_and_pickles_of_a_model_with_shortcuts(stream_model: StreamModel) -> None:
    model = stream_model("gpt2")
    stream = fuse_norms_(model)
    change_basis_(stream, rotations(len(stream.sites)))
    batch = sample_batch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(other, batch), output_of(model, batch))
        assert isinstance(other.transformer.h[0], type(stream_model("gpt2").transformer.h[0]))
    assert all(shortcut.weight.requires_grad for block in stream.blocks for shortcut in block.shortcuts)


def test_dropout_is_where_it_was(stream_model: StreamModel) -> None:
    for name, change in (("opt", {"dropout": 0.5}), ("gpt_neox", {"hidden_dropout": 0.5}), ("bert", {})):
        model = stream_model(name, **change).train()
        stream = fuse_norms_(model)
        change_basis_(stream, rotations(len(stream.sites)))
        batch = sample_batch(model)
        first, second = (model(**batch).logits for _ in range(2))
        assert not torch.allclose(first, second), name


def test_frozen_stays_frozen(stream_model: StreamModel) -> None:
    model = stream_model("llama").requires_grad_(False)
    stream = fuse_norms_(model)
    change_basis_(stream, rotations(len(stream.sites)))
    assert not any(parameter.requires_grad for parameter in model.parameters())


TIED = ("llama", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("name", TIED)
def test_frozen_stays_frozen_where_matrices_come_behind_norms(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name).requires_grad_(False)
    change_basis_(fuse_norms_(model, keep_tied=True), rotations(1)[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", TIED)
def test_a_head_stays_tied_behind_a_matrix(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name, torch.float64)
    batch = sample_batch(model)
    expected = output_of(model, batch)
    stream = fuse_norms_(model, keep_tied=True)
    for change in (lambda: None, lambda: change_basis_(stream, rotations(1)[0]), lambda: per_site(stream)):
        change()
        assert relative_error(output_of(model, batch), expected) < 1e-5
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert sum("change" in name for name, _ in model.named_parameters()) >= 1


def per_site(stream: Stream) -> None:
    change_basis_(stream, rotations(len(stream.sites)))


@pytest.mark.parametrize("vocabulary", [80, 20])
def test_a_tied_head_is_the_nearest_that_cut_embeddings_can_be(vocabulary: int, stream_model: StreamModel) -> None:
    """By least squares; also where there are fewer tokens than dimensions."""
    model = stream_model("llama", torch.float64, vocab_size=vocabulary)
    table, gain = model.lm_head.weight.detach().clone(), model.model.norm.weight.detach().clone()
    first, last = (rotation[:, :width] for rotation, width in zip(rotations(2), (30, 20), strict=True))
    stream = fuse_norms_(model, keep_tied=True)
    change_basis_(stream, [first, *[last] * (len(stream.sites) - 1)])
    wanted = (table * gain) @ last
    best = torch.linalg.lstsq(table @ first, wanted, driver="gelsd").solution
    found = model.lm_head.weight @ model.model.norm.change.weight
    assert torch.allclose(model.lm_head.weight, table @ first)
    assert torch.allclose(found, table @ first @ best, atol=1e-9)
    assert (model.lm_head.in_features, model.model.norm.change.weight.shape) == (30, (30, 20))


@pytest.mark.parametrize("name", ["gpt2", "opt", "cohere", "mistral"])
def test_heads_that_cannot_stay_tied_or_never_were(name: str, stream_model: StreamModel) -> None:
    """A LayerNorm takes the mean out of the embeddings, which the head would miss."""
    stream = fuse_norms_(stream_model(name), keep_tied=True)
    assert stream.tied is None and not stream.model.config.tie_word_embeddings


# Wrong declarations


def llama_without(**changes: Any) -> Any:
    """A declaration of llama's stream in which the attention differs."""
    right = families._FAMILIES["llama"](None)
    ((attention,), mlp) = right.steps
    return dataclasses.replace(right, steps=((dataclasses.replace(attention, **changes),), mlp))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"readers": ("self_attn.q_proj", "self_attn.k_proj")},
            r"after fusing its norms .* not declared: model.layers.0.self_attn.q_proj.weight|v_proj.weight",
        ),
        ({"writers": ()}, r"after rotating it what it puts out has changed .* not declared: .*o_proj.weight"),
    ],
)
def test_a_declaration_that_forgets_something(changes: dict[str, Any], message: str, stream_model: StreamModel) -> None:
    with pytest.raises(ValueError, match=message):
        verify_stream(stream_model("llama"), llama_without(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "no_norm"}, "LlamaForCausalLM has no norm at 'no_norm', as is declared"),
        ({"readers": ("self_attn.query",)}, "LlamaForCausalLM has no 'self_attn.query', as is declared"),
        (
            {"writers": ("self_attn.k_proj",)},
            r"Linear.weight at layers.0 step 1 has the shape \(24, 48\), and no",
        ),
    ],
)
def test_a_declaration_of_what_is_not_there(changes: dict[str, Any], message: str, stream_model: StreamModel) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(stream_model("llama"), llama_without(**changes))


def test_an_unknown_family_says_how_to_add_it(stream_model: StreamModel, monkeypatch) -> None:
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )
    with pytest.raises(ValueError, match=r"no declaration .* of falcon; there are bert, .*, vit. .*register_family"):
        stream_of(model)
    assert stream_model("llama").config.model_type == "llama"
    declared = llama_without()
    monkeypatch.delitem(families._FAMILIES, "llama")
    with pytest.raises(ValueError, match="no declaration of the residual stream of llama"):
        family_of(stream_model("llama"))
    register_family("llama", family=declared)
    assert verify_stream(stream_model("llama")).rotated < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "its norms sit behind the sums"),
        ("opt", {"word_embed_proj_dim": 24}, "its embeddings are projected"),
        ("gpt2", {"add_cross_attention": True}, "it has cross-attention"),
        ("bert", {"is_decoder": True}, "it is a decoder"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "some of its blocks have experts and others have none"),
    ],
)
def test_what_cannot_be_worked_on(name: str, changes: dict[str, Any], message: str, stream_model: StreamModel) -> None:
    kind = getattr(transformers, MODELS[name][1]).model_type
    with pytest.raises(ValueError, match=f"the residual stream of this {kind} cannot be worked on: {message}"):
        stream_of(stream_model(name, **changes))


def test_a_sliced_model_has_another_width(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    stream = fuse_norms_(model)
    change_basis_(stream, rotations(1)[0][:, :40])
    with pytest.raises(ValueError, match="no axis -1 of the stream's width 48: the declaration does not fit"):
        stream_of(model)


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        (torch.eye(40), r"a basis of shape \(40, 40\) at layers.0 step 0, where it is 48 wide"),
        ([torch.eye(48)] * 2, "2 bases for 5 sites of the stream: give one, or one for each"),
        (torch.ones(48), r"a basis of shape \(48,\)"),
    ],
)
def test_bases_that_do_not_fit(bases: Any, message: str, stream_model: StreamModel) -> None:
    model = stream_model("llama")
    stream = fuse_norms_(model)
    before = output_of(model, sample_batch(model))
    with pytest.raises(ValueError, match=message):
        change_basis_(stream, bases)
    assert relative_error(output_of(model, sample_batch(model)), before) == 0


def test_rotate_and_slice_by_hand(stream_model: StreamModel) -> None:
    model = stream_model("gpt2", torch.float64)
    batch = sample_batch(model)
    before = output_of(model, batch)
    stream = fuse_norms_(model)
    rotate_(stream, rotations(1)[0])
    assert relative_error(output_of(model, batch), before) < 1e-12
    other = copy.deepcopy(stream)
    slice_(stream, 40)
    assert not any(has_shortcuts(block) for block in stream.blocks)
    assert model.transformer.wte.weight.shape == (80, 40)
    change_basis_(other, torch.eye(48)[:, :40])
    assert torch.equal(output_of(model, batch), output_of(other.model, batch))
    rotate_(stream, rotations(5, 40))
    assert relative_error(output_of(model, batch), output_of(other.model, batch)) < 1e-12
    slice_(stream, [32, 30, 28, 30, 32])
    assert [tuple(shortcut.weight.shape) for block in stream.blocks for shortcut in block.shortcuts] == [
        (30, 32),
        (28, 30),
        (30, 28),
        (32, 30),
    ]
    slice_(stream, 20)
    assert bool(output_of(model, batch).isfinite().all())


def test_rotations_and_widths_that_are_none(stream_model: StreamModel) -> None:
    stream = fuse_norms_(stream_model("llama"))
    for matrix in (torch.eye(48)[:, :40], 2 * torch.eye(48), torch.ones(48)):
        with pytest.raises(ValueError, match="is no rotation: its columns are not orthonormal"):
            rotate_(stream, matrix)
    for width in (0, 49):
        with pytest.raises(ValueError, match=f"a width of {width} at layers.0 step 0: the stream is 48 wide there"):
            slice_(stream, width)
    for widths in ([40] * 4, [40] * 6):
        with pytest.raises(ValueError, match="widths for 5 sites of the stream"):
            slice_(stream, widths)


def assert_untouched(model: Any, bits: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == bits.keys() and all(torch.equal(now[key], bits[key]) for key in bits)


def test_fusing_refuses_before_it_touches_anything(stream_model: StreamModel) -> None:
    import accelerate
    import peft

    model = stream_model("llama")
    shared = stream_model("llama")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    bare = stream_model("llama")
    bare.model.layers[1].input_layernorm = nn.Identity()
    adapted = peft.get_peft_model(stream_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    dispatched = accelerate.dispatch_model(stream_model("llama"), {"": "cpu"}, force_hooks=True)
    wrong: list[tuple[Any, str]] = [
        (adapted, "it has adapters: merge them first"),
        (dispatched, "it is dispatched over devices by accelerate: load it without a device_map"),
        (shared, r"the modules model.layers.0.mlp and model.layers.0.mlp.gate_proj are one|and .* are one, and what"),
        (bare, "Identity has no eps, so it is no norm that can be fused"),
        (nn.Linear(2, 2), "Linear is no model of transformers"),
    ]
    for other, message in wrong:
        bits = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            fuse_norms_(other)
        assert_untouched(other, bits)
    assert model.config.tie_word_embeddings


def test_a_basis_of_a_model_that_is_not_fused(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    stream = stream_of(model)
    for change in (lambda: rotate_(stream, rotations(1)[0]), lambda: slice_(stream, 40)):
        with pytest.raises(ValueError, match="norms of this LlamaForCausalLM are not fused: fuse_norms_ comes first"):
            change()
    assert_untouched(model, bits)


def test_readings_and_bases_that_do_not_fit(stream_model: StreamModel) -> None:
    stream = fuse_norms_(stream_model("llama"))
    bits = {key: value.clone() for key, value in stream.model.state_dict().items()}
    basis = rotations(1)[0][:, :40]
    for readings, message in (
        ([None] * 3, "3 readings for 5 sites"),
        ([basis.mT] * 5, r"a reading of shape \(40, 48\)"),
    ):
        with pytest.raises(ValueError, match=message):
            change_basis_(stream, basis, readings)
    with pytest.raises(ValueError, match=r"the basis at layers.0 step 0 holds NaN or Inf"):
        change_basis_(stream, torch.full((48, 40), torch.nan))
    assert_untouched(stream.model, bits)


@pytest.mark.parametrize("cls", ["BertForQuestionAnswering", "BertForPreTraining", "GPT2ForSequenceClassification"])
def test_other_heads(cls: str) -> None:
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=80) if "GPT2" in cls else None
    config = config or transformers.BertConfig(**{**SIZES, "num_hidden_layers": 1})
    torch.manual_seed(0)
    assert verify_stream(getattr(transformers, cls)(config)).rotated_apart < 1e-12


def test_a_head_of_its_own_is_not_tied_again(stream_model: StreamModel) -> None:
    model = stream_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    fuse_norms_(model)
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_head_that_nobody_declared() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="none of lm_head, score, classifier, qa_outputs reads the end of"):
        stream_of(model)


def test_a_branch_says_what_it_is() -> None:
    assert Branch(norm=None, mixer=("mlp",), readers=(), writers=()).output_norm is None
