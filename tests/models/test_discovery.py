"""Every parameter is a matrix, or left out with a reason, or a vector; and the matrices are those that compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmt import Decile, RMTAnalyzer, SVDPruner
from hf_rmt.models.live import left_out_of, matrices_of
from hf_rmt.models.matrices import WeightMatrix

from ..conftest import FAMILIES


def by_name(model: nn.Module) -> dict[str, WeightMatrix]:
    return {matrix.name: matrix for matrix in matrices_of(model)}


def elements(model: nn.Module) -> tuple[int, int, int]:
    """Of matrices, of what is left out, of vectors and scalars."""
    vectors = sum(p.numel() for p in model.parameters() if p.numel() <= max(p.shape, default=1))
    matrices = sum(math.prod(matrix.shape) for matrix in matrices_of(model))
    return matrices, sum(math.prod(one.shape) for one in left_out_of(model)), vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost(family: str, make_model) -> None:
    model = make_model(family)
    assert sum(elements(model)) == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_left_out_says_why(make_model, tmp_path: Path) -> None:
    model = make_model("vit")
    model.save_pretrained(tmp_path)
    for analyzer in (RMTAnalyzer(model), RMTAnalyzer.from_checkpoint(tmp_path)):
        reasons = {one.parameter: one.reason for one in analyzer.left_out}
        projection = "embeddings.patch_embeddings.projection.weight"
        assert reasons[projection] == "a convolution: convolutions=True analyses it"
        assert reasons["embeddings.position_embeddings"] == "vectors, scales or biases, and no map"
        taken = type(analyzer)(model, convolutions=True) if analyzer.model else None
        taken = taken or RMTAnalyzer.from_checkpoint(tmp_path, convolutions=True)
        assert projection not in {one.parameter for one in taken.left_out}
        assert "embeddings.patch_embeddings.projection" in {matrix.name for matrix in taken.matrices}
    assert {one.reason for one in RMTAnalyzer(make_model("bert_mlm")).left_out} >= {
        "embeddings: embeddings=True analyses it"
    }


# Convolutions


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(5, 7, 3, bias=False), (2, 5, 11)),
        (nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 8, 12)),
        (nn.Conv3d(2, 6, 2, bias=False), (1, 2, 3, 4, 5)),
        (nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last), (2, 3, 6, 6)),
    ],
)
def test_a_convolution_is_the_matrix_over_its_patches(layer: Any, shape: tuple[int, ...]) -> None:
    (matrix,) = matrices_of(nn.Sequential(layer))
    assert matrix.kind == "convolution" and matrix.shape == tuple(matrix.read().shape)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator)
    patch = images[(slice(None), slice(None), *(slice(0, size) for size in layer.kernel_size))].flatten(1)
    output = layer(images)[(slice(None), slice(None), *(0 for _ in layer.kernel_size))]
    assert torch.allclose(patch @ matrix.read().mT, output, atol=1e-6)


def test_a_transposed_convolution_is_the_matrix_to_its_patches() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False)
    (matrix,) = matrices_of(nn.Sequential(layer))
    assert matrix.shape == (20, 3)
    points = torch.randn(4, 3, 1, 1)
    assert torch.allclose(layer(points).flatten(1), points.flatten(1) @ matrix.read().mT, atol=1e-6)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_written(memory: torch.memory_format) -> None:
    for layer in (nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(3, 8, 3)):
        model = nn.Sequential(layer).to(memory_format=memory)
        (matrix,) = matrices_of(model)
        stored, before = model[0].weight, matrix.read().clone()
        values = torch.randn(matrix.shape)
        matrix.write(values)
        assert torch.equal(matrix.read(), values) and model[0].weight is stored
        assert stored.is_contiguous(memory_format=memory)
        matrix.write(before)
        assert torch.equal(matrix.read(), before)


def test_convolutions_are_pruned_and_restored(make_model) -> None:
    model = make_model("vit")
    bits = model.embeddings.patch_embeddings.projection.weight.detach().clone()
    pruner = SVDPruner(model, convolutions=True, workers=1)
    assert len(pruner.matrices) == len(SVDPruner(model, workers=1).matrices) + 1
    pruner.remove(Decile(10), roles="embeddings.patch_embeddings.projection")
    weight = model.embeddings.patch_embeddings.projection.weight.detach()
    values = torch.linalg.svdvals(weight.flatten(1))
    assert not torch.equal(weight, bits) and values[-1] < 1e-5 * values[0]
    pruner.restore()
    assert torch.equal(model.embeddings.patch_embeddings.projection.weight, bits)


def test_groups_of_channels_are_no_one_matrix() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    assert matrices_of(model) == []
    assert [one.reason for one in left_out_of(model)] == ["a convolution of groups of channels, which is no one matrix"]


# Recurrent layers


@pytest.mark.parametrize(
    ("kind", "gates"), [("LSTM", "input forget cell output"), ("GRU", "reset update new"), ("RNN", "")]
)
def test_gates_of_recurrent_layers(kind: str, gates: str) -> None:
    layer = getattr(nn, kind)(5, 6, num_layers=2, bidirectional=True)
    matrices = by_name(nn.ModuleDict({"memory": layer}))
    expected = [f"[{gate}]" for gate in gates.split()] or [""]
    stems = [
        f"memory.weight_{way}_l{number}{end}" for number in (0, 1) for end in ("", "_reverse") for way in ("ih", "hh")
    ]
    assert list(matrices) == [f"{stem}{gate}" for stem in stems for gate in expected]
    assert all(matrix.shape == (6, 5) for name, matrix in matrices.items() if "ih_l0" in name)
    assert sum(elements(layer)) == sum(parameter.numel() for parameter in layer.parameters())


def test_the_gates_are_named_as_they_compute() -> None:
    layer, x = nn.LSTM(5, 6, bias=False), torch.randn(1, 1, 5)
    weight = {
        name.partition("[")[2][:-1]: m.read() for name, m in by_name(nn.ModuleList([layer])).items() if "ih" in name
    }
    entering, cell, out = (x[0] @ weight[name].mT for name in ("input", "cell", "output"))
    state = torch.sigmoid(entering) * torch.tanh(cell)  # there is nothing yet to forget
    assert torch.allclose(layer(x)[0][0], torch.sigmoid(out) * torch.tanh(state), atol=1e-6)


# Weights that are computed


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed_are_read_as_they_compute(kind: str, old: bool) -> None:
    layer = nn.Linear(6, 8, bias=False).eval()
    made = getattr(nn.utils if old else nn.utils.parametrizations, kind)(layer)
    model = nn.Sequential(made)
    source = {(True, "weight_norm"): "weight_g", (True, "spectral_norm"): "weight_orig"}.get((old, kind))
    with torch.no_grad():  # as loading does; what is computed of it is stale until the next pass
        (
            getattr(layer, source)
            if source
            else layer.parametrizations.weight.original0
            if kind == "weight_norm"
            else layer.parametrizations.weight.original
        ).mul_(3)
    (matrix,) = matrices_of(model)
    found = matrix.read().clone()
    x = torch.randn(4, 6)
    assert torch.allclose(model(x), x @ found.mT, atol=1e-6)
    with pytest.raises(ValueError, match="is computed from other parameters"):
        matrix.write(torch.zeros(8, 6))
    assert left_out_of(model) == []


def test_of_a_checkpoint_they_are_left_out(make_model, tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embedding_groups=1,
        num_conv_pos_embeddings=4,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(tmp_path)
    live = RMTAnalyzer(model, convolutions=True)
    assert "encoder.pos_conv_embed.conv" in {matrix.name for matrix in live.matrices}
    stored = RMTAnalyzer.from_checkpoint(tmp_path, convolutions=True)
    reasons = {one.parameter: one.reason for one in stored.left_out}
    assert reasons["encoder.pos_conv_embed.conv.weight"].startswith("computed from other parameters: load the model")
    common = {matrix.name: matrix.read() for matrix in stored.matrices}
    assert all(torch.equal(common[matrix.name], matrix.read()) for matrix in live.matrices if matrix.name in common)
    assert len(common) == len(live.matrices) - 1


# Layouts of their own


def test_attention_by_head_is_a_matrix(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=50)
    model = transformers.XLNetModel(config).eval()
    matrices = by_name(model)
    attention = model.layer[0].rel_attn
    h = torch.randn(3, 32)
    expected = torch.einsum("ih,hnd->ind", h, attention.q).flatten(1)
    assert matrices["layer.0.rel_attn.q"].role == "query"
    assert torch.allclose(h @ matrices["layer.0.rel_attn.q"].read().mT, expected, atol=1e-6)
    mixed = torch.randn(3, 4, 8)
    expected = torch.einsum("ind,hnd->ih", mixed, attention.o)
    assert torch.allclose(mixed.flatten(1) @ matrices["layer.0.rel_attn.o"].read().mT, expected, atol=1e-6)
    values = torch.randn(32, 32)
    matrices["layer.0.rel_attn.k"].write(values)
    assert torch.equal(matrices["layer.0.rel_attn.k"].read(), values) and attention.k.shape == (32, 4, 8)
    model.save_pretrained(tmp_path)
    stored = {matrix.name: matrix for matrix in RMTAnalyzer.from_checkpoint(tmp_path).matrices}
    assert torch.equal(stored["layer.0.rel_attn.k"].read(), values)


def test_maps_that_are_no_modules_weight() -> None:
    from transformers.models.gemma3 import modeling_gemma3

    config = transformers.Gemma3Config(
        text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, vocab_size=20),
        vision_config=dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
    )
    projector = modeling_gemma3.Gemma3MultiModalProjector(config).eval()
    nn.init.normal_(projector.mm_input_projection_weight)
    (matrix,) = matrices_of(projector)
    x = torch.randn(1, 4, 12)
    normed = projector.mm_soft_emb_norm(x)
    assert torch.allclose(projector(x), normed @ matrix.read().mT, atol=1e-5)


def test_one_matrix_a_head() -> None:
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma

    config = transformers.RecurrentGemmaConfig(hidden_size=16, lru_width=16, num_attention_heads=2, num_hidden_layers=1)
    layer = modeling_recurrent_gemma.RecurrentGemmaRglru(config)
    nn.init.normal_(layer.input_gate_weight)
    matrices = by_name(layer)
    assert {name for name in matrices if "input" in name} == {f"input_gate_weight[head={i}]" for i in (0, 1)}
    x = torch.randn(2, 5, 8)
    product = torch.baddbmm(torch.zeros(2, 1, 8), x, layer.input_gate_weight)
    for head in (0, 1):
        read = matrices[f"input_gate_weight[head={head}]"].read()
        assert torch.allclose(product[head], x[head] @ read.mT, atol=1e-6)


def test_layouts_that_see_several_tokens_have_no_activations(make_model) -> None:
    model = make_model("vit")
    images = [{"pixel_values": torch.randn(8, 3, 32, 32)} for _ in range(3)]
    analyzer = RMTAnalyzer(model, convolutions=True)
    covariances = analyzer.collect(images, progress=False)
    report = analyzer.analyze(covariances=covariances, progress=False, workers=1).to_pandas().set_index("name")
    overlaps = report["overlap_bulk"]
    assert math.isnan(overlaps["embeddings.patch_embeddings.projection"]) and overlaps.notna().sum() == 13
    with pytest.raises(ValueError, match="none of these matrices reads activations token by token"):
        analyzer.collect(images, roles="embeddings.patch_embeddings.projection", progress=False)
