"""Which positions count, for the masks that models take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.models.live import matrices_of
from hf_rmt.models.token_masks import CROSS, DECODER, MAIN, UNMASKED, TokenMasks, mask_for
from hf_rmt.reports.covariances import ActivationCovariances

SEQUENCES, LENGTH = 3, 5
LENGTHS = (3, 5, 1)


pytestmark = pytest.mark.usefixtures("seeded")


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 99, (SEQUENCES, length))


def mask(left: bool = False) -> torch.Tensor:
    found = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    return found.flip(1) if left else found


def collect(model: nn.Module, *batches: dict[str, Any], **options: Any) -> ActivationCovariances:
    return RMTAnalyzer(model).collect(list(batches), progress=False, **options)


def assert_same(a: ActivationCovariances, b: ActivationCovariances, only: str = "") -> None:
    assert list(a) == list(b)
    for name in (name for name in a if only in name):
        assert a[name].tokens == b[name].tokens, name
        torch.testing.assert_close(a[name].outer, b[name].outer, rtol=1e-9, atol=1e-9)


# With models


def one_by_one(model: nn.Module) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Sequences of several lengths, together for a mask, and one a batch without any."""
    rows = ids()
    return rows, [{"input_ids": row[None, :length]} for row, length in zip(rows, LENGTHS, strict=True)]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_padding_makes_no_difference(family: str, left: bool, make_model) -> None:
    """Whatever is in it."""
    model = make_model(family).double()
    rows, alone = one_by_one(model)
    padded = torch.full_like(rows, 7)
    for row, full, length in zip(padded, rows, LENGTHS, strict=True):
        (row[LENGTH - length :] if left else row[:length]).copy_(full[:length])
    places = (mask(left).cumsum(1) - 1).clamp_min(0)
    together = {"input_ids": padded, "attention_mask": mask(left), "position_ids": places}
    assert_same(collect(model, together), collect(model, *alone))


def block_diagonal(lengths: tuple[int, ...]) -> torch.Tensor:
    """``(1, 1, T, T)``: every token sees those before it in its own text."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((text[:, None] == text) & torch.ones(len(text), len(text)).tril().bool())[None, None]


@pytest.mark.parametrize("kind", ["position_ids", "boolean", "additive"])
def test_packed_texts_count_like_texts_one_by_one(kind: str, make_model) -> None:
    model = make_model("llama", attn_implementation="eager" if kind == "additive" else "sdpa").double()
    rows, alone = one_by_one(model)
    packed = torch.cat([row[:length] for row, length in zip(rows, LENGTHS, strict=True)])[None]
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    batch = {"input_ids": packed, "position_ids": places}
    if kind == "boolean":
        batch["attention_mask"] = block_diagonal(LENGTHS)
    if kind == "additive":
        batch["attention_mask"] = torch.where(block_diagonal(LENGTHS), 0.0, -torch.inf).double()
    assert_same(collect(model, batch), collect(model, *alone))


def test_positions_that_see_nothing_of_a_packed_batch_are_padding(make_model) -> None:
    """The last text is taken to be padding, and masked from itself."""
    model = make_model("llama").double()
    allowed = block_diagonal(LENGTHS)
    allowed[..., -1, :] = False
    found = collect(model, {"input_ids": torch.randint(1, 99, (1, sum(LENGTHS))), "attention_mask": allowed})
    assert {moments.tokens for moments in found.values()} == {sum(LENGTHS) - 1}


def test_a_pooler_reads_one_vector_a_sequence(make_model) -> None:
    model = make_model("bert_classifier").double()
    found = collect(model, {"input_ids": ids(), "attention_mask": mask()})
    assert found["pooler.dense"].tokens == SEQUENCES
    assert found["encoder.layer.1.output.dense"].tokens == sum(LENGTHS)
    found = collect(model, {"input_ids": ids(1), "attention_mask": torch.ones(SEQUENCES, 1)})
    assert found["pooler.dense"].tokens == SEQUENCES


@pytest.fixture
def t5(make_model) -> nn.Module:
    return make_model("t5", decoder_start_token_id=0, pad_token_id=0).double()


def tokens_of(found: ActivationCovariances) -> tuple[int, int, int]:
    """Of the encoder, of the decoder, and of what the decoder reads of the encoder."""
    names = ("encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention")
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert found[f"{cross}.q"].tokens == found[f"{names[1]}.o"].tokens
    assert found[f"{cross}.k"].tokens == found[f"{cross}.v"].tokens
    return found[f"{names[0]}.q"].tokens, found[f"{names[1]}.q"].tokens, found[f"{cross}.k"].tokens


def labels(counts: tuple[int, ...] = (4, 2, 3)) -> torch.Tensor:
    return ids(4).masked_fill(torch.arange(4) >= torch.tensor(counts)[:, None], -100)


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        (lambda model: {"labels": labels()}, 9),
        (lambda model: {"decoder_input_ids": ids(4)}, 12),
        (lambda model: {"decoder_input_ids": ids(4), "decoder_attention_mask": (labels() != -100).long()}, 9),
        (
            lambda model: {  # as DataCollatorForSeq2Seq has it
                "labels": (own := labels()),
                "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=own),
            },
            9,
        ),
    ],
)
def test_encoder_and_decoder_have_masks_of_their_own(
    decoder: Callable[[nn.Module], dict[str, torch.Tensor]], tokens: int, t5: nn.Module
) -> None:
    batch = {"input_ids": ids(), "attention_mask": mask(), **decoder(t5)}
    assert tokens_of(collect(t5, batch)) == (sum(LENGTHS), tokens, sum(LENGTHS))


def test_an_encoder_taken_alone_obeys_the_attention_mask() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100)
    model = transformers.T5EncoderModel(config).double().eval()
    found = collect(model, {"input_ids": ids(), "attention_mask": mask()})
    assert {moments.tokens for moments in found.values()} == {sum(LENGTHS)}


def test_bart() -> None:
    sizes = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, vocab_size=100)
    config = transformers.BartConfig(
        **sizes,
        decoder_attention_heads=4,
        encoder_layers=1,
        decoder_layers=2,
        pad_token_id=1,
        max_position_embeddings=32,
    )
    model = transformers.BartForConditionalGeneration(config).double().eval()
    found = collect(model, {"input_ids": ids(), "attention_mask": mask(), "labels": labels()})
    tokens = {name: moments.tokens for name, moments in found.items()}
    assert {count for name, count in tokens.items() if name.startswith("encoder.")} == {sum(LENGTHS)}
    cross = [name for name in tokens if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name]
    assert len(cross) == 4 and {tokens[name] for name in cross} == {sum(LENGTHS)}
    assert {count for name, count in tokens.items() if name.startswith("decoder.") and name not in cross} == {9}


def test_two_towers(make_model) -> None:
    """The attention mask is that of the text; pictures have no padding."""
    model = make_model("clip").double()
    pictures = torch.randn(SEQUENCES, 3, 32, 32, dtype=torch.float64)
    found = collect(model, {"input_ids": ids(), "attention_mask": mask(), "pixel_values": pictures})
    tokens = {name: moments.tokens for name, moments in found.items()}
    assert {n for name, n in tokens.items() if name.startswith("text_model.encoder")} == {sum(LENGTHS)}
    assert {n for name, n in tokens.items() if name.startswith("vision_model.encoder")} == {SEQUENCES * 17}


def test_a_mask_that_does_not_fit_is_told() -> None:
    class Shortened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.thinned = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.thinned(self.whole(x)[:, ::2])

    batch = {"x": torch.randn(SEQUENCES, LENGTH, 4), "attention_mask": mask()}
    with pytest.warns(UserWarning, match="the attention mask does not fit what enters thinned: padding counted there"):
        found = collect(Shortened(), batch)
    assert found["whole"].tokens == sum(LENGTHS) and found["thinned"].tokens == SEQUENCES * 3


# Masks alone


@pytest.fixture
def model(make_model) -> nn.Module:
    return make_model("llama")


def main_mask(model: nn.Module, given: Any, keep_rows: int | None = None) -> torch.Tensor | None:
    batch = {"input_ids": ids(), "attention_mask": given}
    return TokenMasks.of_call(model, (), batch, keep_rows).masks[MAIN]


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "integers": lambda own: own,
    "floats": lambda own: own.float(),
    "booleans": lambda own: own.bool(),
    "pairs": lambda own: (own[:, :, None] * own[:, None, :]).bool(),
    "pairs, by head": lambda own: (own[:, :, None] * own[:, None, :])[:, None].expand(-1, 4, -1, -1),
    "added": lambda own: torch.where((own[:, None, :, None] * own[:, None, None, :]).bool(), 0.0, -3e38),
    "added in half": lambda own: torch.where(
        (own[:, None, :, None] * own[:, None, None, :]).bool(), 0.0, -65504.0
    ).half(),
    "minus infinity": lambda own: torch.where(
        (own[:, None, :, None] * own[:, None, None, :]).bool(), 0.0, -torch.inf
    ).half(),
    "for all queries": lambda own: own[:, None, None, :].bool(),
    "for all queries, added": lambda own: torch.where(own[:, None, None, :].bool(), 0.0, -3e38),
    "by kind": lambda own: {"full_attention": own, "sliding_attention": own},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask_is_read(form: str, model: nn.Module) -> None:
    found = main_mask(model, FORMS[form](mask()))
    assert found is not None and torch.equal(found, mask().bool())


def test_a_mask_that_leaves_all_is_none(model: nn.Module) -> None:
    assert main_mask(model, torch.ones(SEQUENCES, LENGTH)) is None
    assert main_mask(model, None) is None


def test_arguments_may_come_by_position(model: nn.Module) -> None:
    masks = TokenMasks.of_call(model, (ids(), mask()), {}, None)
    assert torch.equal(masks.masks[MAIN], mask().bool()) and masks.batch_size == SEQUENCES


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_repeated_sequences_do_not_count(keep: int, model: nn.Module) -> None:
    x = torch.randn(SEQUENCES, LENGTH, 4)
    given = mask()
    masked = TokenMasks.of_call(model, (), {"input_ids": ids(), "attention_mask": given}, keep)
    assert torch.equal(masked.tokens(x, MAIN), x[:keep][mask()[:keep].bool()])
    assert torch.equal(given, mask()), "the model's own mask is left alone"
    plain = TokenMasks.of_call(model, (), {"input_ids": ids()}, keep)
    assert torch.equal(plain.tokens(x, MAIN), x[:keep].flatten(0, 1))
    assert torch.equal(plain.tokens(x.flatten(0, 1), MAIN), x[:keep].flatten(0, 1))
    for masks in (masked, plain):
        assert torch.equal(masks.tokens(x[:, 0], MAIN), x[:keep, 0])  # as a pooler reads
        assert torch.equal(masks.tokens(x, UNMASKED), x[:keep].flatten(0, 1))
        assert not masks.misfit and not masks.empty()


def test_all_sequences_may_be_kept(model: nn.Module) -> None:
    assert TokenMasks.of_call(model, (), {"input_ids": ids()}, SEQUENCES).keep_rows is None


def test_flattened_rows_obey_the_mask(model: nn.Module) -> None:
    x = torch.randn(SEQUENCES, LENGTH, 4)
    masks = TokenMasks.of_call(model, (), {"input_ids": ids(), "attention_mask": mask()}, None)
    assert torch.equal(masks.tokens(x.flatten(0, 1), MAIN), x[mask().bool()])
    heads = torch.randn(SEQUENCES, LENGTH, 2, 4)
    assert torch.equal(masks.tokens(heads, MAIN), heads[mask().bool()].flatten(0, 1))


@pytest.mark.parametrize("keep", [None, 2])
def test_rows_routed_to_an_expert(keep: int | None, model: nn.Module) -> None:
    x, chosen = torch.randn(SEQUENCES * LENGTH, 4), torch.tensor([14, 0, 6, 4, 10])
    counts = mask().flatten().bool()
    real = torch.ones(15).bool() if keep is None else torch.arange(15) < keep * LENGTH
    masked = TokenMasks.of_call(model, (), {"input_ids": ids(), "attention_mask": mask()}, keep)
    plain = TokenMasks.of_call(model, (), {"input_ids": ids()}, keep)
    for masks, wanted in ((masked, counts & real), (plain, real)):
        expected = x[[i for i in chosen.tolist() if wanted[i]]]
        assert torch.equal(masks.routed(x[chosen], chosen, 15, MAIN), expected)
        assert torch.equal(masks.routed(x, None, 15, MAIN), x[wanted])  # all of them
        assert not masks.misfit
    rows = masked.routed(x[chosen], None, 15, MAIN)
    assert masked.misfit and torch.equal(rows, x[chosen])


def test_a_batch_is_empty_where_a_mask_is(t5: nn.Module) -> None:
    batch = {"input_ids": ids(), "attention_mask": torch.zeros(SEQUENCES, LENGTH), "labels": labels()}
    assert TokenMasks.of_call(t5, (), batch, None).empty()
    assert not TokenMasks.of_call(t5, (), batch, 0).empty()  # meant to count for nothing
    batch |= {"attention_mask": mask()}
    assert not TokenMasks.of_call(t5, (), batch, None).empty()
    assert TokenMasks.of_call(t5, (), batch | {"labels": labels((0, 0, 0))}, None).empty()


def test_masks_of_matrices(make_model) -> None:
    def kinds(family: str) -> dict[str, str]:
        model = make_model(family)
        pairs = bool(getattr(model.config, "is_encoder_decoder", False))
        return {m.name: mask_for(m, pairs) for m in matrices_of(model) if m.kind == "block"}

    assert set(kinds("llama").values()) == {MAIN}
    t5 = kinds("t5")
    cross = {name for name, kind in t5.items() if kind == CROSS}
    assert cross == {f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in (0, 1) for x in "kv"}
    assert {kind for name, kind in t5.items() if name.startswith("encoder")} == {MAIN}
    assert {kind for name, kind in t5.items() if name.startswith("decoder") and name not in cross} == {DECODER}
    gpt2 = kinds("gpt2_cross")
    assert {name.partition("crossattention.")[2] for name, kind in gpt2.items() if kind == CROSS} == {
        "c_attn[key]",
        "c_attn[value]",
    }
    clip = kinds("clip")
    assert {kind for name, kind in clip.items() if name.startswith("vision_model")} == {UNMASKED}
    assert {kind for name, kind in clip.items() if name.startswith("text_model")} == {MAIN}


def test_padding_behind_the_decoders_tokens_where_nothing_else_tells(t5: nn.Module) -> None:
    """As under label smoothing, where the Trainer keeps the labels; the first token is the padding token itself."""
    pad = t5.config.pad_token_id
    decoder = torch.tensor([[pad, 5, 6, pad], [pad, pad, 7, 8], [pad, pad, pad, pad]])
    masks = TokenMasks.of_call(t5, (), {"input_ids": ids(), "decoder_input_ids": decoder}, None)
    kept = masks.tokens(torch.arange(12.0).view(3, 4, 1), DECODER).flatten().tolist()
    assert kept == [0, 1, 2, 4, 5, 6, 7, 8]
    asked = {"input_ids": ids(), "decoder_input_ids": decoder, "decoder_attention_mask": torch.ones(3, 4)}
    assert len(TokenMasks.of_call(t5, (), asked, None).tokens(torch.zeros(3, 4, 1), DECODER)) == 12
