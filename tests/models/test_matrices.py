from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_rmt.models.live import matrices_of
from hf_rmt.models.matrices import select


def _by_name(model, **options):
    return {m.name: m for m in matrices_of(model, **options)}


def test_bert_and_its_heads_share_names(make_model) -> None:
    headless = {name for name, m in _by_name(make_model("bert")).items() if m.kind == "block"}
    classifier = _by_name(make_model("bert_classifier"))
    assert headless == {name for name, m in classifier.items() if m.kind == "block"}
    assert classifier["classifier"].kind == "head"
    assert "encoder.layer.1.attention.self.query" in headless


def test_read_gives_out_by_in(make_model) -> None:
    gpt2 = make_model("gpt2")
    matrices = _by_name(gpt2)
    assert torch.equal(matrices["h.0.mlp.c_fc"].read(), gpt2.transformer.h[0].mlp.c_fc.weight.T)
    assert matrices["h.0.mlp.c_fc"].shape == (256, 64)
    llama = make_model("llama")
    assert torch.equal(_by_name(llama)["layers.0.mlp.up_proj"].read(), llama.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "mixtral", "t5", "clip", "swin", "falcon_new"])
def test_shape_and_dtype_are_what_is_read(family: str, make_model) -> None:
    for matrix in matrices_of(make_model(family)):
        weight = matrix.read()
        assert tuple(weight.shape) == matrix.shape and weight.dtype == matrix.dtype
        assert not weight.requires_grad


def test_tied_weights_are_found_once(make_model) -> None:
    tied = _by_name(make_model("llama", tie_word_embeddings=True))
    untied = _by_name(make_model("llama", tie_word_embeddings=False))
    assert set(untied) - set(tied) == {"lm_head"}
    assert tied["embed_tokens"].kind == "embedding" and untied["lm_head"].kind == "head"


def test_shared_blocks_are_found_once(make_model) -> None:
    names = [name for name in _by_name(make_model("albert")) if name.endswith("query")]
    assert len(names) == 1


def test_experts_are_matrices_of_their_own(make_model) -> None:
    model = make_model("mixtral")
    matrices = _by_name(model)
    down = matrices["layers.1.mlp.experts.down_proj[expert=2]"]
    assert (down.role, down.block, down.expert, down.part) == ("output", 1, 2, None)
    assert torch.equal(down.read(), model.model.layers[1].mlp.experts.down_proj[2])
    up = matrices["layers.0.mlp.experts.gate_up_proj[expert=1][up]"]
    assert (up.role, up.expert, up.part) == ("intermediate", 1, "up")
    assert torch.equal(up.read(), model.model.layers[0].mlp.experts.gate_up_proj[1, 128:])
    assert matrices["layers.0.mlp.gate"].shape == (3, 64)


def test_stacks_only_where_there_are_several(make_model) -> None:
    assert {m.stack for m in matrices_of(make_model("bert"))} == {None}
    t5 = _by_name(make_model("t5"))
    assert t5["encoder.block.0.layer.0.SelfAttention.q"].stack == "encoder"
    assert t5["decoder.block.1.layer.1.EncDecAttention.q"].role == "cross.query"
    assert t5["decoder.block.1.layer.1.EncDecAttention.q"].block == 1
    clip = _by_name(make_model("clip"))
    assert {m.stack for m in clip.values() if m.block is not None} == {"text", "vision"}


def test_blocks_of_several_stages_are_numbered_through(make_model) -> None:
    swin = _by_name(make_model("swin"))
    assert [swin[f"encoder.layers.{i}.blocks.{j}.mlp.fc1"].block for i, j in ((0, 0), (1, 0), (1, 1))] == [0, 1, 2]


def test_class_tokens_are_no_matrices(make_model) -> None:
    matrices = _by_name(make_model("vit"))
    assert not any("cls_token" in name for name in matrices)
    assert {name for name, m in matrices.items() if m.kind != "block"} == {"embeddings.patch_embeddings.projection"}


@pytest.mark.parametrize("wrap", ["compile", "DataParallel"])
def test_wrappers_change_nothing(wrap: str, make_model) -> None:
    model = make_model("bert_classifier")
    plain = _by_name(model)
    wrapped = torch.compile(model) if wrap == "compile" else nn.DataParallel(model)
    assert list(_by_name(wrapped)) == list(plain)
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])
    assert list(_by_name(model)) == list(plain)


def test_distributed_data_parallel(make_model, tmp_path) -> None:
    model = make_model("bert_classifier")
    plain = list(_by_name(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert list(_by_name(nn.parallel.DistributedDataParallel(model))) == plain
    finally:
        torch.distributed.destroy_process_group()


def test_a_plain_module() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    matrices = _by_name(model)
    assert [m.shape for m in matrices.values()] == [(4, 8), (2, 4)]


def test_select_by_role_name_and_pattern(make_model) -> None:
    matrices = matrices_of(make_model("bert"))
    assert {m.role for m in select(matrices, roles=["query", "attention.output"])} == {"query", "attention.output"}
    assert len(select(matrices, roles="encoder.layer.1.*")) == 6
    assert [m.block for m in select(matrices, roles="query", blocks=range(1, 2))] == [1]
    assert {m.role for m in select(matrices, roles="*output")} == {"attention.output", "output"}
    fused = matrices_of(make_model("gpt2"))
    assert len(select(fused, roles="h.0.attn.c_attn[query]")) == 1


def test_a_selection_of_nothing_says_what_there_is(make_model) -> None:
    matrices = matrices_of(make_model("bert"))
    with pytest.raises(ValueError, match=r"'qery'; the roles are attention\.output, .*query"):
        select(matrices, roles=["key", "qery"])
    with pytest.raises(ValueError, match=r"no block \[7\]; the blocks are 0 to 1"):
        select(matrices, blocks=[0, 7])
    with pytest.raises(ValueError, match=r"both a role in 'pooler\.dense' and a block in 1"):
        select(matrices, roles="pooler.dense", blocks=1)


def test_brackets_of_a_pattern_stand_for_themselves(make_model) -> None:
    matrices = matrices_of(make_model("gpt2"))
    assert {m.part for m in select(matrices, roles="*[query]")} == {"query"}
    assert len(select(matrices, roles="h.*.c_attn[key]")) == 2


def test_numbers_of_numpy_are_blocks(make_model) -> None:
    import numpy as np

    matrices = matrices_of(make_model("bert"))
    assert {m.block for m in select(matrices, blocks=np.int64(1))} == {1}
    assert {m.block for m in select(matrices, blocks=np.arange(2))} == {0, 1}


def test_numbered_modules_keep_their_number() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    roles = [m.role for m in matrices_of(nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}))]
    assert roles == ["mlp.0", "mlp.2"] * 2
    assert [m.role for m in matrices_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))] == ["0", "1"]
