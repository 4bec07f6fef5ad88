"""Fused parameters are cut where the model cuts them: shown by what each part does to the output."""

from __future__ import annotations

import pytest
import torch

from hf_rmt.models.fused import contiguous, fused_parts, per_head
from hf_rmt.models.live import matrices_of

FUSED_ATTENTION = [
    "gpt2", "gpt_neox", "phi3", "falcon", "falcon_mq", "falcon_new", "bloom", "mpt", "gpt_bigcode", "gpt_bigcode_mq",
    "codegen", "persimmon", "modernbert",
]  # fmt: skip


def _write(model, matrix, new: torch.Tensor) -> None:
    """Put a matrix into the parameter that it was cut from."""
    name = matrix.parameter
    owner = model if hasattr(model, "get_parameter") else None
    for full, parameter in owner.named_parameters():
        if full == name or full.endswith("." + name):
            target = parameter.data.mT if matrix.transposed else parameter.data
            target[matrix.rows] = new.to(target.dtype)
            return
    raise AssertionError(name)


def _hidden(model) -> torch.Tensor:
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("family", FUSED_ATTENTION)
def test_attention_parts_are_what_they_are_called(family: str, make_model) -> None:
    """With queries of zero every key scores the same, so keys cannot matter and values must."""
    model = make_model(family, **({"initializer_range": 0.2} if family not in ("mpt",) else {}))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data.zero_()
    parts = {(m.block, m.part): m for m in matrices_of(model) if m.part in ("query", "key", "value")}
    blocks = {block for block, _ in parts}
    assert len(parts) == 3 * len(blocks) == 6
    for block in blocks:
        _write(model, parts[block, "query"], torch.zeros(parts[block, "query"].shape))
    reference = _hidden(model)
    for block in blocks:
        key = parts[block, "key"]
        _write(model, key, torch.randn(key.shape))
    torch.testing.assert_close(_hidden(model), reference, atol=1e-5, rtol=1e-4)
    for block in blocks:
        value = parts[block, "value"]
        _write(model, value, torch.randn(value.shape))
    assert (_hidden(model) - reference).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["phi3", "modernbert", "mixtral", "gpt_oss"])
def test_gate_and_up(family: str, make_model) -> None:
    """A gated unit whose gate and up are both zero gives nothing; the parts are halves of the whole."""
    model = make_model(family)
    matrices = {m.name: m for m in matrices_of(model)}
    gates = [m for m in matrices.values() if m.part == "gate"]
    assert gates
    for gate in gates:
        up = matrices[gate.name.replace("[gate]", "[up]")]
        whole = up.load(up.expert)
        whole = whole.mT if up.transposed else whole
        joined = torch.empty_like(whole)
        joined[gate.rows], joined[up.rows] = gate.read(), up.read()
        assert torch.equal(joined, whole)


def test_gpt_oss_interleaves_gate_and_up(make_model) -> None:
    model = make_model("gpt_oss")
    stacked = model.model.layers[0].mlp.experts.gate_up_proj
    gate = next(m for m in matrices_of(model) if m.part == "gate" and m.expert == 1)
    assert torch.equal(gate.read(), stacked[1, :, 0::2].T)


def test_cross_attention_of_gpt2_holds_keys_and_values(make_model) -> None:
    model = make_model("gpt2_cross")
    names = {m.name: m.role for m in matrices_of(model)}
    assert names["h.0.crossattention.c_attn[key]"] == "cross.key"
    assert names["h.0.crossattention.c_attn[value]"] == "cross.value"
    assert names["h.0.crossattention.q_attn"] == "cross.query"
    assert names["h.0.attn.c_attn[query]"] == "query"


@pytest.mark.parametrize("family", [*FUSED_ATTENTION, "mixtral", "gpt_oss", "gpt2_cross"])
def test_parts_cover_their_parameter_once(family: str, make_model) -> None:
    model = make_model(family)
    sizes = {name.removesuffix(".weight"): p.numel() for name, p in model.named_parameters()}
    found: dict[str, int] = {}
    for matrix in matrices_of(model):
        found[matrix.parameter.removesuffix(".weight")] = (
            found.get(matrix.parameter.removesuffix(".weight"), 0) + matrix.read().numel()
        )
    for name, count in found.items():
        assert count == sizes[name], name


def test_unknown_layouts_are_left_whole() -> None:
    assert fused_parts("in_proj", 96, None) is None
    assert fused_parts("query_key_value", 96, None) is None
    assert fused_parts("c_attn", 97, None) is None


def test_layouts() -> None:
    assert contiguous("ab", (2, 3)) == {"a": slice(0, 2), "b": slice(2, 5)}
    parts = per_head(("q", "k"), (2, 1), groups=2, head_dim=2)
    assert parts["q"].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert parts["k"].tolist() == [4, 5, 10, 11]
