import pytest

from hf_rmt.models.names import canonical_name, plain_path, role_of, stack_of, without_indices


@pytest.mark.parametrize(
    "path, role",
    [
        ("encoder.layer.3.attention.self.query", "query"),
        ("encoder.layer.3.attention.output.dense", "attention.output"),
        ("encoder.layer.3.intermediate.dense", "intermediate"),
        ("encoder.layer.3.output.dense", "output"),
        ("encoder.layer.3.crossattention.self.key", "cross.key"),
        ("encoder.layer.3.crossattention.output.dense", "cross.attention.output"),
        ("pooler.dense", "pooler.dense"),
        ("layers.0.self_attn.q_proj", "query"),
        ("layers.0.self_attn.o_proj", "attention.output"),
        ("layers.0.mlp.up_proj", "intermediate"),
        ("layers.0.mlp.gate_proj", "gate"),
        ("layers.0.mlp.down_proj", "output"),
        ("layers.0.mlp.gate", "mlp.gate"),
        ("layers.0.attention.o_proj", "attention.output"),
        ("layers.0.mlp.fc1", "intermediate"),
        ("h.0.attn.c_proj", "attention.output"),
        ("h.0.mlp.c_proj", "output"),
        ("h.0.mlp.c_fc", "intermediate"),
        ("transformer.layer.0.attention.q_lin", "query"),
        ("transformer.layer.0.attention.out_lin", "attention.output"),
        ("transformer.layer.0.ffn.lin2", "output"),
        ("decoder.block.1.layer.0.SelfAttention.o", "attention.output"),
        ("decoder.block.1.layer.1.EncDecAttention.v", "cross.value"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_0", "gate"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_1", "intermediate"),
        ("decoder.block.1.layer.2.DenseReluDense.wo", "output"),
        ("decoder.layers.0.encoder_attn.out_proj", "cross.attention.output"),
        ("h.0.self_attention.dense", "attention.output"),
        ("h.0.mlp.dense_4h_to_h", "output"),
        ("encoder.layers.1.downsample.reduction", "downsample.reduction"),
    ],
)
def test_role(path: str, role: str) -> None:
    assert role_of(path) == role


def test_role_of_a_part() -> None:
    assert role_of("h.0.attn.c_attn", "query") == "query"
    assert role_of("h.0.crossattention.c_attn", "key") == "cross.key"
    assert role_of("layers.0.mlp.gate_up_proj", "up") == "intermediate"
    assert role_of("layers.0.mlp.gate_up_proj", "gate") == "gate"


def test_a_role_of_its_own_has_one_name_in_every_block() -> None:
    assert role_of("layers.0.mlp.router") == role_of("layers.17.mlp.router") == "mlp.router"


@pytest.mark.parametrize(
    "path, plain",
    [
        ("_orig_mod.layers.0.fc", "layers.0.fc"),
        ("layers.0.q_proj.base_layer", "layers.0.q_proj"),
        ("layers.0._orig_mod.q_proj", "layers.0.q_proj"),
        ("classifier.modules_to_save.default", "classifier"),
        ("layers.0.fc", "layers.0.fc"),
    ],
)
def test_wrappers_leave_no_trace(path: str, plain: str) -> None:
    assert plain_path(path) == plain


def test_headed_and_headless_have_the_same_name() -> None:
    assert canonical_name("bert.encoder.layer.0.output.dense.weight", "bert") == "encoder.layer.0.output.dense"
    assert canonical_name("encoder.layer.0.output.dense.weight", "") == "encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    "path, stack",
    [
        ("decoder.block.0.layer.0.SelfAttention.q", "decoder"),
        ("vision_model.encoder.layers.0.mlp.fc1", "vision"),
        ("model.language_model.layers.0.mlp.up_proj", "text"),
        ("layers.0.encoder.fc", None),
    ],
)
def test_stack(path: str, stack: str | None) -> None:
    assert stack_of(path) == stack


def test_without_indices() -> None:
    assert without_indices("h.0.mlp.experts.3.w1") == "h.mlp.experts.w1"
