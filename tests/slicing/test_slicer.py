"""Slices are smaller by what they say, compute what the algebra says, and bad ones are refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt import Rank, SVDPruner, project_
from hf_rmt.models.residual_stream import stream_of
from hf_rmt.slicing import slicer
from hf_rmt.slicing.basis import change_basis_
from hf_rmt.slicing.calibration import collect_stream
from hf_rmt.slicing.keep import Energy, Width
from hf_rmt.slicing.norms import fuse_norms_
from hf_rmt.slicing.sizes import plain_size
from hf_rmt.slicing.slicer import SliceRecord, slice_model
from hf_rmt.slicing.verify import output_of, relative_error, sample_batch
from hf_rmt.theory.covariance import Moments
from hf_rmt.theory.projection import principal_basis

from .conftest import MODELS, StreamModel
from .test_masked import batches

_QUIET: dict[str, Any] = {"progress": False}
_BARE: dict[str, Any] = {"weigh_readers": False, "predict": False, **_QUIET}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


SLICED = ["llama", "gemma2", "gpt2", "phi", "bert", "bert_classifier", "vit", "olmo2"]


@pytest.mark.parametrize(("name", "per_block"), [*((n, b) for n in SLICED for b in (False, True)), ("mixtral", False)])
def test_a_slice_is_smaller_by_what_it_says(name: str, per_block: bool, stream_model: StreamModel) -> None:
    model = stream_model(name)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    small = slice_model(model, Width(0.5), batches(model), per_block=per_block, **_QUIET)
    record: SliceRecord = small.sliced
    assert type(small) is type(model) and small is not model
    assert (record.original_width, record.width, record.per_block) == (48, 24, per_block)
    assert record.parameters == parameters(small) < parameters(model) == record.original_parameters
    assert record.form == ("plain" if name in ("llama", "phi", "mixtral", "vit") and not per_block else "registered")
    assert 0.2 < record.energy <= 1 and record.tokens == (12 * 34 if name == "vit" else 12 * 24)
    output = output_of(small, sample_batch(model))
    assert output.shape == output_of(model, sample_batch(model)).shape and bool(output.isfinite().all())
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("keep", [0.7, Width(0.6), Energy(0.9)])
def test_a_registered_slice_keeps_its_head_tied(keep: Any, per_block: bool, stream_model: StreamModel) -> None:
    model = stream_model("llama", vocab_size=400)
    small = slice_model(model, keep, batches(model), form="registered", per_block=per_block, **_QUIET)
    record = small.sliced
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert record.parameters == parameters(small) < parameters(model) == record.original_parameters
    if keep == 0.7:
        assert record.share <= 0.7
        plain = slice_model(model, 0.7, batches(model), form="plain", **_QUIET)
        assert record.width > plain.sliced.width


def test_what_a_tied_head_needs_of_the_embeddings_is_kept(stream_model: StreamModel, monkeypatch) -> None:
    """Tokens that the calibration data has not are embedded along a direction that it does not fill."""
    model = stream_model("llama", vocab_size=400)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (12, 24), generator=generator)
    with torch.no_grad():
        along, direction = torch.randn(360, 1, generator=generator), torch.randn(1, 48, generator=generator)
        model.lm_head.weight[40:] += 3 * along * direction

    def kept() -> float:
        small = slice_model(model, Width(0.3), [{"input_ids": ids}], form="registered", **_QUIET)
        return float(small.lm_head.weight.detach().norm() / model.lm_head.weight.detach().norm())

    with_table = kept()
    monkeypatch.setattr(slicer, "_TABLE", 0)
    assert with_table > 0.95 and kept() < 0.9


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"electra_wide", "mistral", "qwen2"}))
def test_all_of_the_width_is_the_model_itself(name: str, stream_model: StreamModel) -> None:
    """Nothing is lost but rounding; as it is larger than the model that is refused, so the parts are put together."""
    model = stream_model(name)
    stream = fuse_norms_(copy.deepcopy(model))
    covariances = collect_stream(model, batches(model), progress=False)
    vectors = principal_basis([covariances[site.key].covariance() for site in stream.sites])[1]
    change_basis_(stream, vectors)
    expected = output_of(model, sample_batch(model))
    assert relative_error(output_of(stream.model, sample_batch(model)), expected) < 2e-5


def test_one_basis_is_that_of_all_sites_together(stream_model: StreamModel) -> None:
    model = stream_model("llama", torch.float64, tie_word_embeddings=False)
    covariances = collect_stream(model, batches(model), **_QUIET)
    small = slice_model(model, Width(0.5), covariances, form="registered", **_BARE)
    total = sum(covariances[site.key].outer for site in stream_of(model).sites)
    basis = torch.linalg.eigh(total)[1].flip(1)[:, :24]
    stream = fuse_norms_(copy.deepcopy(model))
    change_basis_(stream, basis)
    expected = output_of(stream.model, sample_batch(model))
    assert relative_error(output_of(small, sample_batch(model)), expected) < 1e-6
    plain = slice_model(model, Width(0.5), covariances, **_BARE)
    assert plain.config.hidden_size == 24 and relative_error(output_of(plain, sample_batch(model)), expected) < 1e-6


def test_directions_without_data_cost_nothing(stream_model: StreamModel) -> None:
    """A model whose stream lies in half of its dimensions is sliced to that half without loss."""
    model = stream_model("llama", torch.float64)
    generator = torch.Generator().manual_seed(5)
    half = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))[0][:, :24]
    with torch.no_grad():
        for site in stream_of(model).sites:
            for tensor in site.writers:
                value = tensor.value.movedim(tensor.axis, -1)
                tensor.value.copy_((value @ half @ half.mT).movedim(-1, tensor.axis))
        for norm in [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]:
            norm.weight.fill_(1.3)
    expected = output_of(model, sample_batch(model))
    for options in (_QUIET, _BARE, {"per_block": True, **_BARE}, {"per_block": True, **_QUIET}):
        small = slice_model(model, Width(0.5), batches(model), **options)
        assert relative_error(output_of(small, sample_batch(model)), expected) < 1e-5, options
    small = slice_model(model, Energy(1 - 1e-9), batches(model), **_BARE)
    assert small.sliced.width == 24 and small.sliced.energy == pytest.approx(1)


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "olmo2", "electra"])
def test_bases_in_sequence_are_those_of_what_is_sliced_already(name: str, stream_model: StreamModel) -> None:
    """Against the slow way: cut the first sites, run the whole model, look at the next."""
    model = stream_model(name, torch.float64, **{"tie_word_embeddings": False} if name == "llama" else {})
    small = slice_model(model, Width(0.5), batches(model), per_block=True, form="registered", **_BARE)
    slow = copy.deepcopy(model)
    stream = fuse_norms_(slow)
    bases = [torch.eye(48, dtype=torch.float64)] * len(stream.sites)
    for index in range(len(stream.sites)):
        partly = copy.deepcopy(stream)
        change_basis_(partly, bases)
        moments = seen(partly, index, model)
        bases[index] = principal_basis([moments.covariance()])[1][:, :24]
    change_basis_(stream, bases)
    error = relative_error(output_of(small, sample_batch(model)), output_of(slow, sample_batch(model)))
    assert error < 1e-4  # the eps of a norm that sits on the residual connection counts once more


def seen(stream: Any, index: int, model: Any) -> Moments:
    from hf_rmt.models.stream_taps import prepared, seen_at

    rows: list[torch.Tensor] = []
    site = stream.sites[index]
    handle = seen_at(stream, site)[0].register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    tokens = []
    for batch in batches(model):
        with torch.no_grad():
            stream.model(**batch)
        tokens.append(prepared(rows[-1][batch["attention_mask"].bool()], centred=False, normed=True))
    handle.remove()
    return Moments.of(torch.cat(tokens))


# How much is kept


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "gemma2", "bert", "bert_classifier"])
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_float_is_a_share_of_the_parameters(
    name: str, per_block: bool, share: float, stream_model: StreamModel
) -> None:
    model = stream_model(name)
    options: dict[str, Any] = {"per_block": per_block, "form": "registered", **_QUIET}
    small = slice_model(model, share, batches(model), **options)
    record = small.sliced
    assert parameters(small) == record.parameters <= share * parameters(model)
    wider = slice_model(model, Width((record.width + 1) / 48 + 1e-9), batches(model), **options)
    assert wider.sliced.width == record.width + 1 and wider.sliced.parameters > share * parameters(model)
    assert record.share == record.parameters / parameters(model)


def test_parameters_of_a_plain_slice_are_known_before(stream_model: StreamModel) -> None:
    for name in ("llama", "phi", "mixtral", "starcoder2", "cohere", "vit", "gemma"):
        model = stream_model(name)
        small = slice_model(model, 0.6, batches(model), **_QUIET)
        assert plain_size(stream_of(model), small.config.hidden_size) == parameters(small), name


def test_a_width_is_rounded_to_what_is_wanted(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    small = slice_model(model, Width(0.9), batches(model), **_QUIET)
    assert (small.sliced.rounded_from, small.sliced.width) == (43, 40)  # four heads, of an even number each
    assert "width 40 of 48 (rounded from 43)" in str(small.sliced)
    small = slice_model(model, Width(0.9), batches(model), multiple_of=16, form="registered", **_QUIET)
    assert (small.sliced.rounded_from, small.sliced.width) == (43, 32)


def test_energy_by_site_gives_widths_of_their_own(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    small = slice_model(model, Energy(0.9), batches(model), per_block=True, **_BARE)
    record = small.config.quantization_config
    assert len(set(record.widths)) > 1 and max(record.widths) == small.sliced.width
    assert small.sliced.energy > 0.9


# What readers make of it


def test_predicting_readers_lose_less(stream_model: StreamModel) -> None:
    model = stream_model("llama", tie_word_embeddings=False)
    covariances = collect_stream(model, batches(model), **_QUIET)
    stream = stream_of(model)
    errors = {}
    for predict in (False, True):
        small = slice_model(model, Width(0.5), covariances, form="registered", weigh_readers=False, predict=predict)
        reader = small.model.layers[1].mlp.up_proj.weight.detach().double()
        site = stream.sites[3]
        dense = (
            site.norms[0].readers[1].weight.value.detach().double()
            * model.model.layers[1].post_attention_layernorm.weight.detach().double()
        )
        basis = principal_basis([covariances[s.key].covariance() for s in stream.sites])[1][:, :24]
        left = dense - reader @ basis.mT
        errors[predict] = float((left @ covariances[site.key].covariance() @ left.mT).trace())
    assert errors[True] < 0.98 * errors[False]


# Bad input


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, "a share of the parameters is 0.0: it lies above 0"),
        (1.2, "a share of the parameters is 1.2"),
        (Width(0.01), "leaves a stream of width 0, of 48 in steps of 1: keep more"),
        (0.001, "keep=0.001 leaves a stream of width 0"),
        (1.0, r"has [0-9,]+ parameters and the model [0-9,]+, as a matrix leads to its head: keep less$"),
    ],
)
def test_shares_that_make_no_slice(keep: Any, message: str, stream_model: StreamModel) -> None:
    model = stream_model("llama")
    if keep == 1.0:
        keep = Width(1.0)
    with pytest.raises(ValueError, match=message):
        slice_model(model, keep, batches(model), form="registered", **_QUIET)


def test_blocks_that_cannot_run_by_themselves(stream_model: StreamModel) -> None:
    def write(block: Any, args: Any, kwargs: Any) -> None:
        kwargs["position_embeddings"][0].mul_(1)

    model = stream_model("llama")
    model.model.layers[1].register_forward_pre_hook(write, with_kwargs=True)
    why = "a block writes into what it is given beside the hidden states; give per_block=False"
    with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be sliced block by block: {why}"):
        slice_model(model, Width(0.5), batches(model), per_block=True, **_QUIET)


def test_shortcuts_that_make_it_larger(stream_model: StreamModel) -> None:
    model = stream_model("llama", intermediate_size=16, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"residual connections have matrices: keep less, or take one basis for the"):
        slice_model(model, Width(0.95), batches(model), per_block=True, **_QUIET)
    model = stream_model("gpt2", vocab_size=400)
    with pytest.raises(ValueError, match=r"as its head is no longer tied: keep less$"):
        slice_model(model, Width(0.95), batches(model), **_QUIET)
    model = stream_model("olmo2", intermediate_size=16)
    with pytest.raises(ValueError, match=r"as norms on the outputs of sublayers have matrices: keep less$"):
        slice_model(model, Width(0.95), batches(model), **_QUIET)


def test_calibration_that_says_nothing(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    for per_block in (False, True):
        with pytest.raises(ValueError, match="24 tokens do not tell 48 directions of the stream apart"):
            slice_model(model, 0.8, batches(model, 1), per_block=per_block, **_QUIET)
        with pytest.raises(ValueError, match=r"the (calibration )?data has no batches"):
            slice_model(model, 0.8, [], per_block=per_block, **_QUIET)
        with torch.no_grad():
            broken = copy.deepcopy(model)
            broken.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
        with pytest.raises((ValueError, FloatingPointError), match="NaN"):
            slice_model(broken, 0.8, batches(model), per_block=per_block, **_QUIET)
        wrong = [{"input_ids": torch.full((2, 40), 500)}]
        with pytest.raises(ValueError, match="batch 0 holds the token 500, and LlamaForCausalLM knows 80: give"):
            slice_model(model, 0.8, wrong, per_block=per_block, **_QUIET)


def test_forms_that_there_are_not(stream_model: StreamModel) -> None:
    with pytest.raises(ValueError, match=r"norms on the residual connection.* The registered form can hold"):
        slice_model(stream_model("bert"), 0.8, [], form="plain", **_QUIET)
    with pytest.raises(ValueError, match="a headless model puts out its stream"):
        slice_model(stream_model("llama").model, 0.8, [], form="plain", **_QUIET)
    with pytest.raises(ValueError, match="have no plain form: give per_block=False"):
        slice_model(stream_model("llama"), 0.8, [], form="plain", per_block=True, **_QUIET)
    with pytest.raises(ValueError, match="form is 'dense': give one of plain, registered"):
        slice_model(stream_model("llama"), 0.8, [], form="dense")
    with pytest.raises(TypeError, match="there is no option width; there are form, per_block"):
        slice_model(stream_model("llama"), 0.8, [], width=3)
    with pytest.raises(ValueError, match=r"put out as many numbers as they read.*: give per_block=False"):
        slice_model(stream_model("mixtral"), 0.8, [], per_block=True, **_QUIET)
    model = stream_model("gpt2").transformer
    with pytest.raises(ValueError, match=r"does not run with a narrower stream .*: slice it with its head"):
        slice_model(model, 0.8, batches(model), **_QUIET)


def test_models_that_cannot_be_sliced(stream_model: StreamModel) -> None:
    import peft

    model = stream_model("llama")
    small = slice_model(model, 0.8, batches(model), **_QUIET)
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised or sliced already: take the original model"):
        slice_model(small, 0.8, batches(model), **_QUIET)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="its weights are offloaded or were never loaded"):
        slice_model(empty, 0.8, batches(model), **_QUIET)
    adapted = peft.get_peft_model(stream_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it has adapters: merge them first"):
        slice_model(adapted, 0.8, batches(model), **_QUIET)
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        slice_model(nn.Linear(2, 2), 0.8, [], **_QUIET)
    covariances = collect_stream(model, batches(model), **_QUIET)
    with pytest.raises(ValueError, match="found on what was sliced before it: give the calibration data itself"):
        slice_model(model, 0.8, covariances, per_block=True, **_QUIET)
    projection = project_(stream_of(model), Rank(3), covariances)
    with pytest.raises(ValueError, match=r"directions of it are hidden by SVDPruner.project or project_: undo that"):
        slice_model(model, 0.8, covariances, **_QUIET)
    projection.undo()
    assert slice_model(model, 0.8, covariances, **_QUIET).sliced.width < 48


def test_a_wrong_declaration_is_noticed_before_anything_is_cut(stream_model: StreamModel, monkeypatch) -> None:
    from hf_rmt.models import families

    from .test_streams import llama_without

    model = stream_model("llama")
    wrong = llama_without(readers=("self_attn.q_proj", "self_attn.k_proj"))
    with pytest.raises(ValueError, match="another declaration than that which loads it again: give it to register"):
        slice_model(model, 0.8, batches(model), family=wrong, form="registered", **_QUIET)
    monkeypatch.setitem(families._FAMILIES, "llama", lambda config: wrong)
    with pytest.raises(ValueError, match=r"is not as declared: with its norms fused the output changes .* verify"):
        slice_model(model, 0.8, batches(model), form="registered", **_QUIET)


def test_a_declaration_without_its_scale_is_noticed_by_blocks(stream_model: StreamModel, monkeypatch) -> None:
    from hf_rmt.models import families

    model = stream_model("granite")
    wrong = dataclasses.replace(families.family_of(model), scale=None)
    monkeypatch.setitem(families._FAMILIES, "granite", lambda config: wrong)
    with pytest.raises(ValueError, match="is not as declared"):
        slice_model(model, 0.8, batches(model), per_block=True, **_QUIET)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "bert"])
def test_half_precision_is_rounded_once(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name)
    coarse = slice_model(copy.deepcopy(model).bfloat16(), Width(0.75), batches(model), **_QUIET)
    fine = slice_model(model, Width(0.75), batches(model), **_QUIET)
    assert coarse.dtype == torch.bfloat16 and coarse.sliced.form == fine.sliced.form
    assert relative_error(output_of(coarse, sample_batch(model)), output_of(fine, sample_batch(model))) < 0.1


@pytest.mark.parametrize(("name", "per_block"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_a_half_slice_computes_what_its_file_does(
    name: str, per_block: bool, stream_model: StreamModel, tmp_path: Path
) -> None:
    """Frequencies of rotations are kept in float32 beside weights in bfloat16."""
    stream_model(name).save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    small = slice_model(model, Width(0.5), batches(model), form="registered", per_block=per_block, **_QUIET)
    small.save_pretrained(tmp_path / "small")
    loaded = auto.from_pretrained(tmp_path / "small")
    kinds = [{key: value.dtype for key, value in one.named_buffers()} for one in (model, small, loaded)]
    assert any(kind == torch.float32 for kind in kinds[0].values())
    assert all(kinds[0][key] == kinds[1][key] for key in kinds[0]) and kinds[1] == kinds[2]
    assert torch.equal(output_of(small, sample_batch(model)), output_of(loaded, sample_batch(model)))


def test_the_pruner_slices_a_model_without_edits(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    pruner = SVDPruner(model)
    small = pruner.slice(Width(0.75), batches(model), **_QUIET)
    assert small.config.hidden_size == 36 or small.sliced.width < 36
    assert str(small.sliced).startswith("plain slice: width ")
