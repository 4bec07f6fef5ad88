"""Hiding directions of the residual stream from its norms, and how that is what slicing them away does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rmt import Bottom, Group, Mass, Outliers, Random, Significant, SVDPruner, Top
from hf_rmt.models.residual_stream import stream_of
from hf_rmt.slicing.basis import change_basis_
from hf_rmt.slicing.calibration import collect_stream
from hf_rmt.slicing.masked import project_
from hf_rmt.slicing.norms import fuse_norms_
from hf_rmt.slicing.verify import output_of, relative_error, sample_batch

from .conftest import StreamModel


def batches(model: Any, count: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)} for _ in range(count)]
    found = []
    for _ in range(count):
        ids = torch.randint(3, 80, (3, 10), generator=generator)
        mask = (torch.arange(10) < torch.tensor([10, 6, 8])[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def streams(model: Any, **options: Any) -> Any:
    return collect_stream(model, batches(model), progress=False, **options)


# What is collected


def normed_inputs(model: Any, centred: bool) -> dict[str, torch.Tensor]:
    """Second moments of what enters each norm, one token after the other, in a loop."""
    stream = stream_of(model)
    sums = {site.key: torch.zeros(stream.width, stream.width, dtype=torch.float64) for site in stream.sites}
    seen: dict[str, torch.Tensor] = {}
    handles = [
        site.norms[0].module.register_forward_pre_hook(lambda _, args, key=site.key: seen.update({key: args[0]}))
        for site in stream.sites
    ]
    for batch in batches(model):
        with torch.no_grad():
            model(**batch)
        for key, value in seen.items():
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(value.shape[:2]).bool()
            for row in value[mask].double():
                token = row - row.mean() if centred else row
                sums[key] += torch.outer(token, token) / token.square().mean()
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize(("name", "centred"), [("llama", False), ("bert", True), ("gpt2", True), ("vit", True)])
def test_moments_are_those_of_every_token(name: str, centred: bool, stream_model: StreamModel) -> None:
    model = stream_model(name, torch.float64)
    covariances = streams(model)
    assert covariances.settings["stream"] == "normed"
    for key, expected in normed_inputs(model, centred).items():
        torch.testing.assert_close(covariances[key].outer, expected, rtol=1e-11, atol=1e-10)
        assert covariances[key].tokens == (12 * 24 if name != "vit" else 12 * 2 * 17)


def test_raw_tokens_count_by_their_length(stream_model: StreamModel) -> None:
    model = stream_model("llama", torch.float64)
    raw, seen = streams(model, normed=False), []
    handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches(model):
        with torch.no_grad():
            model(**batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
    handle.remove()
    tokens = torch.cat(seen)
    torch.testing.assert_close(raw["layers.0 step 0"].outer, tokens.mT @ tokens, rtol=1e-11, atol=1e-11)
    assert raw.settings["stream"] == "raw"


def test_a_sublayer_without_a_norm_is_watched_itself(stream_model: StreamModel) -> None:
    for name in ("olmo2", "electra"):
        covariances = streams(stream_model(name, torch.float64))
        assert len(covariances) == 5 and not covariances.settings["silent"]


def test_covariances_are_saved_and_collected_again(stream_model: StreamModel, tmp_path) -> None:
    model = stream_model("llama")
    first = collect_stream(model, batches(model), folder=tmp_path, progress=False)
    again = collect_stream(model, batches(model), folder=tmp_path, progress=False)
    assert list(first) == list(again) and not first.settings["dropout"]
    with pytest.raises(ValueError, match="stream"):
        collect_stream(model, batches(model), folder=tmp_path, normed=False, progress=False)
    assert all(torch.equal(first[key].outer, again[key].outer) for key in first)


# What is hidden


@pytest.mark.parametrize("name", ["bert", "bert_classifier", "distilbert", "roberta", "electra_wide"])
def test_masked_is_truly_removed_on_a_post_norm_model(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name, torch.float64)
    covariances = streams(model)
    batch, stream = sample_batch(model), stream_of(model)
    whole = output_of(model, batch)
    projection = project_(stream, Group(2, of=4), covariances)
    masked = output_of(model, batch)
    projection.undo()
    assert torch.equal(output_of(model, batch), whole) and relative_error(masked, whole) > 1e-2
    bases = [covariances[site.key].eigenbasis().vectors[~projection.masks[site.key]].mT for site in stream.sites]
    change_basis_(fuse_norms_(model), bases)
    assert relative_error(output_of(model, batch), masked) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "gpt_neox", "vit", "llama", "gemma2", "mixtral"])
def test_masked_is_truly_removed_with_one_basis_on_a_pre_norm_model(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name, torch.float32 if name == "mixtral" else torch.float64)
    covariances = streams(model)
    batch, stream = sample_batch(model), stream_of(model)
    # The same at all sites: the sum of all of them.
    total = sum((covariances[site.key].outer for site in stream.sites[1:]), covariances[stream.sites[0].key].outer)
    for site in stream.sites:
        covariances[site.key].outer.copy_(total)
    with SVDPruner(model).projected(Bottom(16), streams=covariances):
        masked = output_of(model, batch)
    basis = covariances[stream.sites[0].key].eigenbasis().vectors[:32].mT
    change_basis_(fuse_norms_(model), basis)
    assert relative_error(output_of(model, batch), masked) < (1e-12 if name in ("gpt2", "opt", "phi", "vit") else 1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_the_ones_direction_is_free(name: str, stream_model: StreamModel) -> None:
    model = stream_model(name, torch.float64)
    covariances = streams(model)
    batch = sample_batch(model)
    whole = output_of(model, batch)
    basis = covariances[next(iter(covariances))].eigenbasis()
    assert abs(float(basis.vectors[-1].sum())) == pytest.approx(48**0.5)
    with SVDPruner(model).projected(Bottom(1), streams=covariances) as projection:
        assert relative_error(output_of(model, batch), whole) < 1e-12
        assert max(projection.energy.values()) < 1e-12
    with SVDPruner(model).projected(Bottom(2), streams=covariances):
        assert relative_error(output_of(model, batch), whole) > 1e-6


def test_all_parts_hidden_together_are_everything(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    covariances = streams(model)
    pruner = SVDPruner(model)
    energies = []
    for group in range(1, 5):
        with pruner.projected(Group(group, of=4), streams=covariances) as projection:
            energies.append(torch.tensor(list(projection.energy.values())))
    torch.testing.assert_close(sum(energies), torch.ones(5), rtol=0, atol=1e-6)
    assert bool((energies[0] > energies[1]).all() and (energies[1] > energies[3]).all())
    with pruner.projected(Top(48), streams=covariances):
        logits = output_of(model, sample_batch(model))
    torch.testing.assert_close(logits, torch.zeros_like(logits), rtol=0, atol=1e-3)


def test_random_directions_are_the_control(stream_model: StreamModel) -> None:
    model = stream_model("bert")
    covariances = streams(model)
    pruner, batch = SVDPruner(model), sample_batch(model)
    outputs = []
    for seed in (0, 0, 1):
        with pruner.projected(Random(Top(6), seed), streams=covariances) as projection:
            outputs.append(output_of(model, batch))
        assert str(projection) == f"random:{seed}(top:6) of the residual stream"
        # As many random directions hold about their share of the energy.
        assert all(0.02 < energy < 0.4 for energy in projection.energy.values())
        assert all(int(mask.sum()) == 6 for mask in projection.masks.values())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    counts = []
    for selection in (Mass(0.1), Random(Mass(0.1))):
        with pruner.projected(selection, streams=covariances) as projection:
            counts.append([int(mask.sum()) for mask in projection.masks.values()])
    assert counts[0] == counts[1] and len(set(counts[0])) > 1


def test_a_compiled_model_is_refused(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    covariances = streams(model)
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="is compiled, and compiled code does not see what is hidden"):
        SVDPruner(wrapped).project(Top(3), streams=covariances)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is compiled.* as it was before torch.compile"):
        SVDPruner(model).project(Top(3), streams=covariances)


# Through the pruner


def test_projections_compose_and_are_undone_in_any_order(stream_model: StreamModel) -> None:
    model = stream_model("bert")
    covariances = streams(model)
    pruner, batch = SVDPruner(model), sample_batch(model)
    whole = output_of(model, batch)
    first = pruner.project(Top(3), streams=covariances)
    only_first = output_of(model, batch)
    second = pruner.project(Mass(0.1), streams=covariances)
    edit = pruner.remove(Bottom(0.2), roles="query")
    assert repr(pruner).endswith(
        "removed: bottom:0.2 of query; top:3 of the residual stream; mass:0.1 of the residual stream)"
    )
    pruner.undo(second)
    pruner.undo(edit)
    assert torch.equal(output_of(model, batch), only_first)
    pruner.project(Mass(0.1), streams=covariances)
    pruner.restore()
    assert torch.equal(output_of(model, batch), whole) and pruner.projections == ()
    with pytest.raises(ValueError, match="is not in place"):
        pruner.undo(first)


def test_undone_inside_and_after_an_exception(stream_model: StreamModel) -> None:
    model = stream_model("llama")
    covariances = streams(model)
    pruner, batch = SVDPruner(model), sample_batch(model)
    whole = output_of(model, batch)
    with pruner.projected(Top(3), streams=covariances) as projection:
        pruner.undo(projection)
        assert torch.equal(output_of(model, batch), whole)
    with pytest.raises(ZeroDivisionError), pruner.projected(Top(3), streams=covariances):
        1 / 0  # noqa: B018
    assert torch.equal(output_of(model, batch), whole)


def test_gradients_flow_through_what_is_left(stream_model: StreamModel) -> None:
    model = stream_model("bert_classifier").train()
    covariances = streams(model)
    assert model.training
    with SVDPruner(model).projected(Top(24), streams=covariances):
        model(**sample_batch(model)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.bert.encoder.parameters())


def test_a_projected_model_is_not_saved_as_if_it_were_whole(stream_model: StreamModel, tmp_path) -> None:
    model = stream_model("llama")
    pruner = SVDPruner(model)
    pruner.project(Top(3), streams=streams(model))
    with pytest.raises(ValueError, match="projections of the residual stream are no weights: restore"):
        pruner.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=r"the model is edited .* restore"):
        pruner.slice(0.9, batches(model))


@pytest.mark.parametrize("selection", [Outliers("above"), Significant(0.01)])
def test_what_eigenvectors_have_not(selection: Any, stream_model: StreamModel) -> None:
    model = stream_model("llama")
    covariances = streams(model)
    with pytest.raises(
        ValueError, match=r"layers.0 step 0: eigenvectors of the residual stream are selected by number"
    ):
        SVDPruner(model).project(selection, streams=covariances)


def test_covariances_of_something_else(stream_model: StreamModel) -> None:
    from hf_rmt import RMTAnalyzer

    model = stream_model("llama")
    inputs = RMTAnalyzer(model).collect(batches(model), progress=False)
    with pytest.raises(ValueError, match="not those of this model's residual stream: make them by collect_stream"):
        SVDPruner(model).project(Top(1), streams=inputs)
    narrow = stream_model("llama", hidden_size=32, head_dim=8)
    with pytest.raises(ValueError, match="covariances of a stream 32 wide, and this one is 48"):
        project_(stream_of(model), Top(1), streams(narrow))
    other = stream_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"from other weights, as those of layers.0.mlp.up_proj show: make them by"):
        SVDPruner(other).project(Top(1), streams=streams(model))
    few = collect_stream(model, batches(model, 1), progress=False)
    with pytest.raises(ValueError, match="24 tokens do not tell 48 directions of the stream apart: calibrate on more"):
        SVDPruner(model).project(Top(1), streams=few)


# Sweeps


def test_a_sweep_over_the_stream(stream_model: StreamModel, tmp_path) -> None:
    model = stream_model("bert")
    covariances = streams(model)
    pruner, batch = SVDPruner(model), sample_batch(model)

    def evaluate(model: Any) -> float:
        return float(output_of(model, batch).square().mean())

    options: dict[str, Any] = dict(streams=covariances, selections=[Top(6), Bottom(6)], controls=1, progress=False)
    table = pruner.sweep(evaluate, folder=tmp_path, **options)
    found = {cell.selection: cell for cell in table}
    assert list(found) == ["none", "top:6", "random:0(top:6)", "bottom:6"]
    for name, selection in (("top:6", Top(6)), ("random:0(top:6)", Random(Top(6))), ("bottom:6", Bottom(6))):
        with pruner.projected(selection, streams=covariances):
            assert found[name].scores["score"] == evaluate(model)
        assert (found[name].role, found[name].removed["components"], found[name].removed["of"]) == ("stream", 30, 240)
    assert found["top:6"].removed["mass"] > found["random:0(top:6)"].removed["mass"] > found["bottom:6"].removed["mass"]
    assert pruner.projections == () and table.profiles == {}
    with pytest.raises(ValueError, match="was made by another run"):
        pruner.sweep(evaluate, folder=tmp_path, **{**options, "streams": streams(model, normed=False)})
    with pruner.projected(Top(2), streams=covariances), pytest.raises(ValueError, match="was made by another run"):
        pruner.sweep(evaluate, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="roles='query' and blocks='together' are of weights, and the residual stream"):
        pruner.sweep(evaluate, roles="query", **options)


def test_an_evaluation_that_raises_takes_the_projection_back(stream_model: StreamModel) -> None:
    model = stream_model("bert")
    pruner, calls = SVDPruner(model), []

    def evaluate(model: Any) -> float:
        calls.append(len(pruner.projections))
        if len(calls) == 2:
            raise OSError("the disk is full")
        return 0.0

    with pytest.raises(OSError, match="the disk is full"):
        pruner.sweep(evaluate, streams=streams(model), progress=False)
    assert calls == [0, 1] and pruner.projections == ()
