from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_rmt.models.live import matrices_of

QUERY = "encoder.layer.0.attention.self.query"


def _matrix(model, name=QUERY, **options):
    return next(m for m in matrices_of(model, **options) if m.name == name)


def _peft(model, config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "hada_" in name or "oft_" in name or "ia3_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return adapted.eval()


def _configs():
    from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig

    return {
        "lora": LoraConfig(r=4, target_modules=["query", "value"]),
        "dora": LoraConfig(r=4, target_modules=["query"], use_dora=True),
        "loha": LoHaConfig(r=4, target_modules=["query"]),
        "oft": OFTConfig(r=0, oft_block_size=16, target_modules=["query"]),
        "ia3": IA3Config(target_modules=["query"], feedforward_modules=[]),
    }


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "oft", "ia3"])
def test_an_adapter_is_read_as_it_computes(kind: str, make_model) -> None:
    base = make_model("bert")
    before = base.encoder.layer[0].attention.self.query.weight.detach().clone()
    adapted = _peft(base, _configs()[kind])
    layer = adapted.base_model.model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        bias = layer(torch.zeros(1, 64))
        computed = (layer(torch.eye(64)) - bias).T
    weight = _matrix(adapted).read()
    torch.testing.assert_close(weight, computed, atol=1e-6, rtol=1e-5)
    assert (weight - before).abs().max() > 1e-3
    assert torch.equal(_matrix(adapted, adapters=False).read(), before)
    assert torch.equal(layer.get_base_layer().weight, before), "reading must not merge the user's layer"
    assert not layer.merged


def test_names_do_not_know_of_adapters(make_model) -> None:
    plain = [m.name for m in matrices_of(make_model("bert_classifier"))]
    from peft import LoraConfig, TaskType

    adapted = _peft(
        make_model("bert_classifier"), LoraConfig(r=2, target_modules=["query"], task_type=TaskType.SEQ_CLS)
    )
    assert [m.name for m in matrices_of(adapted)] == plain
    assert [m.name for m in matrices_of(adapted, adapters=False)] == plain
    wrapper = adapted.base_model.model.classifier
    wrapper.modules_to_save["default"].weight.data.zero_()
    assert not _matrix(adapted, "classifier").read().any()
    assert _matrix(adapted, "classifier", adapters=False).read().any()
    with adapted.disable_adapter():
        assert _matrix(adapted, "classifier").read().any()


def test_merged_and_disabled_adapters(make_model) -> None:
    from peft import LoraConfig

    adapted = _peft(make_model("bert"), LoraConfig(r=4, target_modules=["query"]))
    base = _matrix(adapted, adapters=False).read().clone()
    whole = _matrix(adapted).read().clone()
    with adapted.disable_adapter():
        assert torch.equal(_matrix(adapted).read(), base)
    adapted.merge_adapter()
    torch.testing.assert_close(_matrix(adapted).read(), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(_matrix(adapted, adapters=False).read(), base, atol=1e-6, rtol=0)


def test_an_adapter_on_half_precision_is_not_rounded(make_model) -> None:
    from peft import LoraConfig

    adapted = _peft(make_model("bert").to(torch.bfloat16), LoraConfig(r=4, target_modules=["query"]))
    weight = _matrix(adapted).read()
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_meta_weights_are_refused(make_model) -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"encoder\.layer\.0.* meta device .*from_checkpoint"):
        _matrix(model).read()


def test_offloaded_weights_are_brought_in(make_model, tmp_path) -> None:
    from accelerate import cpu_offload, disk_offload

    expected = _matrix(make_model("bert")).read()
    model = cpu_offload(make_model("bert"), execution_device=torch.device("cpu"))
    assert model.encoder.layer[0].attention.self.query.weight.device.type == "meta"
    assert torch.equal(_matrix(model).read(), expected)
    on_disk = disk_offload(make_model("bert"), str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(_matrix(on_disk).read(), expected)


def test_plain_float8_is_read_exactly() -> None:
    model = nn.Sequential(nn.Linear(8, 8).to(torch.float8_e4m3fn))
    weight = matrices_of(model)[0].read()
    assert torch.equal(weight.float(), model[0].weight.float())


def test_adapters_on_the_parameters_of_experts(make_model) -> None:
    """peft nests one wrapper a parameter; each matrix must get its own."""
    from peft import LoraConfig, get_peft_model

    base = make_model("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=2, target_parameters=targets, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    assert [m.name for m in matrices_of(adapted)] == [m.name for m in matrices_of(make_model("mixtral"))]
    read = {m.name: m.read().clone() for m in matrices_of(adapted)}
    plain = {m.name: m.read().clone() for m in matrices_of(adapted, adapters=False)}
    original = {m.name: m.read() for m in matrices_of(make_model("mixtral"))}
    merged = {m.name: m.read() for m in matrices_of(adapted.merge_and_unload())}
    assert read.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(read[name], weight, atol=1e-6, rtol=1e-5)
        assert torch.equal(plain[name], original[name]), name


def test_offloaded_weights_are_read_from_many_threads(make_model) -> None:
    import sys
    from concurrent.futures import ThreadPoolExecutor

    from accelerate import cpu_offload

    expected = {m.name: m.read() for m in matrices_of(make_model("gpt2"))}
    expected["lm_head"] = expected["wte"].mT  # offloading unties it
    model = cpu_offload(make_model("gpt2"), execution_device=torch.device("cpu"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(10):
                matrices = matrices_of(model)
                for matrix, weight in zip(matrices, pool.map(lambda m: m.read(), matrices), strict=True):
                    assert torch.equal(weight, expected[matrix.name])
    finally:
        sys.setswitchinterval(interval)
