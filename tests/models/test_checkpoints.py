from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_rmt.models.checkpoints import Checkpoint, locate
from hf_rmt.models.live import matrices_of
from hf_rmt.models.shards import CheckpointError, SafetensorsFolder


def _facts(matrix):
    return (
        matrix.role,
        matrix.stack,
        matrix.block,
        matrix.expert,
        matrix.part,
        matrix.kind,
        matrix.shape,
        matrix.dtype,
    )


FAMILIES = [
    "bert", "bert_mlm", "bert_classifier", "llama", "gpt2", "vit", "mixtral", "gpt_oss", "t5", "phi3", "clip", "swin",
    "falcon_new",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_same_names_and_numbers_as_the_live_model(family: str, make_model, tmp_path) -> None:
    """Mixtral and ViT have other names on disk than in memory; Mixtral one tensor an expert."""
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    live = {m.name: m for m in matrices_of(model)}
    disk = {m.name: m for m in Checkpoint(tmp_path).matrices()}
    assert list(live) == list(disk)
    for name, matrix in live.items():
        assert _facts(matrix) == _facts(disk[name])
        assert torch.equal(matrix.read(), disk[name].read()), name


def test_names_on_disk_really_differ_for_mixtral(make_model, tmp_path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    assert any("experts.2.w1.weight" in key for key in load_file(tmp_path / "model.safetensors"))


def test_one_expert_is_read_without_the_others(make_model, tmp_path, monkeypatch) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    read = []
    original = SafetensorsFolder.read
    monkeypatch.setattr(SafetensorsFolder, "read", lambda self, key, index: read.append(key) or original(self, key))
    matrix = next(m for m in Checkpoint(tmp_path).matrices() if m.expert == 1 and m.part == "gate")
    matrix.read()
    assert len(read) == 2 and all(".experts.1." in key for key in read)


def test_a_headed_checkpoint_and_a_headless_model(make_model, tmp_path) -> None:
    make_model("bert_mlm").save_pretrained(tmp_path)
    headless = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    live = {m.name: m.read() for m in matrices_of(headless) if m.kind == "block"}
    disk = {m.name: m.read() for m in Checkpoint(tmp_path).matrices() if m.kind == "block"}
    assert list(live) == list(disk)
    assert all(torch.equal(live[name], disk[name]) for name in live)


def test_a_headless_checkpoint_of_a_headed_architecture(make_model, tmp_path) -> None:
    """The head has no values on disk and is left out; transformers would make it up."""
    make_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [m.name for m in Checkpoint(tmp_path).matrices() if m.kind != "embedding"]
    assert "classifier" not in names and "encoder.layer.0.output.dense" in names


def test_tied_weights_are_found_once(make_model, tmp_path) -> None:
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head" not in [m.name for m in Checkpoint(tmp_path).matrices()]


@pytest.fixture
def sharded(make_model, tmp_path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def _edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_what_the_library_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    there = {"b": torch.rand(7), "a": torch.randn(3, 5, 2) * 9, "c": torch.tensor(1.0), "empty": torch.rand(0, 4)}
    file = tmp_path / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in there.items()}, file, metadata={"format": "pt"})
    folder, expected = SafetensorsFolder(tmp_path), load_file(file)
    for key, value in expected.items():
        found = folder.read(key)
        assert found.dtype == dtype and found.shape == value.shape
        assert found.flatten().view(torch.uint8).tolist() == value.flatten().view(torch.uint8).tolist()
    for index in range(3):
        part = folder.read("a", index)
        assert part.shape == (1, 5, 2)
        assert part.flatten().view(torch.uint8).tolist() == expected["a"][index].flatten().view(torch.uint8).tolist()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps of a process as Linux shows them")
def test_files_are_not_mapped(sharded: Path) -> None:
    """A limit of the address space may be smaller than a file."""
    matrix = Checkpoint(sharded).matrices()[0]
    weight = matrix.read()
    assert str(sharded) not in Path("/proc/self/maps").read_text() and weight.numel() > 0


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "Expecting property name"),
        (b"[1]", "has no attribute"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}', r"9 bytes are not those of F32 .*\[2\]"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', r"8 bytes are not those of F32 .*\[3\]"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', r"end at \d+ bytes, and the file has"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"end at \d+ bytes, and the file has"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}', r"offsets and shape are \(8, 0, -2\)"),
        (b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', r"offsets and shape are \(0, 8, 2\.0\)"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "b does not begin where the tensor before it ends",
        ),
        (b"[" * 100_000, "recursion"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "data_offsets"),
    ],
)
def test_damaged_headers(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated or not .*{message}.*fetch it again"):
        SafetensorsFolder(tmp_path)


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        SafetensorsFolder(tmp_path)
    header = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(CheckpointError, match=r"a is F4, which nothing here computes with"):
        SafetensorsFolder(tmp_path).read("a")
    file.write_bytes((10**9).to_bytes(8, "little") + bytes(99))
    with pytest.raises(CheckpointError, match="its header would have 1000000000 bytes, and the file has 107"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_changes_is_read_as_it_is(tmp_path: Path) -> None:
    file, values = tmp_path / "model.safetensors", torch.rand(9)
    save_file({"a": values}, file)
    folder = SafetensorsFolder(tmp_path)
    save_file({"a": values + 1}, file, metadata={"format": "pt", "step": "1000"})  # begins elsewhere
    assert torch.equal(folder.read("a"), values + 1)
    with torch.device("meta"):  # the default of others is not ours
        assert torch.equal(folder.read("a"), values + 1)
    folder.write("a", values)
    assert torch.equal(load_file(file)["a"], values) and torch.equal(folder.read("a"), values)
    save_file({"b": values}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed, and does not hold a any more"):
        folder.read("a")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is truncated or not"):
        folder.read("a")


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is missing"):
        Checkpoint(sharded)


def test_truncated_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated"):
        Checkpoint(sharded)


def test_shards_of_different_checkpoints(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=f"{second.name} does not hold .*different checkpoints"):
        Checkpoint(sharded)


@pytest.mark.parametrize("where", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors"])
def test_an_index_that_points_outside_is_refused(sharded: Path, where: str) -> None:
    _edit_index(sharded, lambda files: files.update({next(iter(files)): where}))
    with pytest.raises(CheckpointError, match=r"points outside its folder, to .*refused"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not an index"):
        Checkpoint(sharded)


def test_a_tensor_of_another_shape_is_named(make_model, tmp_path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    matrix = next(m for m in Checkpoint(tmp_path).matrices() if m.name == "layers.0.mlp.up_proj")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight has shape \(3, 5\).*\(128, 64\)"):
        matrix.read()


def test_a_missing_tensor_is_named(make_model, tmp_path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.0\.mlp\.up_proj\.weight"):
        Checkpoint(tmp_path).matrices()


def test_a_pickled_checkpoint_is_refused(make_model, tmp_path) -> None:
    model = make_model("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled.*save_pretrained"):
        Checkpoint(tmp_path)


def test_a_packed_checkpoint_is_refused(make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed weights .*load the model"):
        Checkpoint(tmp_path)


def test_an_empty_folder_and_no_configuration(make_model, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    make_model("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_an_unknown_model_type(make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(CheckpointError, match="names no model type that transformers knows"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "no-such-user-here/no-such-model", "a b"])
def test_locate_says_what_is_wrong(source: str) -> None:
    with pytest.raises(CheckpointError, match="folder"):
        locate(source)


def test_locate_a_file(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the folder"):
        locate(tmp_path / "model.safetensors")


def test_code_that_comes_with_a_checkpoint_is_never_run(make_model, tmp_path, monkeypatch) -> None:
    make_model("bert").save_pretrained(tmp_path)
    (tmp_path / "configuration_evil.py").write_text("raise SystemExit('ran')")
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    monkeypatch.setattr("builtins.input", lambda *_args: "y")
    with pytest.raises(CheckpointError, match=r"code of its own .*RMTAnalyzer"):
        Checkpoint(tmp_path)


def test_the_single_file_goes_before_an_index_as_in_transformers(make_model, tmp_path) -> None:
    """What is left of an earlier, sharded save must not be what is analysed."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "old", max_shard_size="100KB")
    for parameter in model.parameters():
        parameter.data += 1
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "old")
    live = {m.name: m.read() for m in matrices_of(loaded)}
    disk = {m.name: m.read() for m in Checkpoint(tmp_path / "old").matrices()}
    assert all(torch.equal(live[name], disk[name]) for name in live)


def test_an_adapter_folder_says_what_it_is(make_model, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_model("bert"), LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a peft adapter: load it on its base"):
        Checkpoint(tmp_path)


def test_an_architecture_that_cannot_be_laid_out(make_model, tmp_path, monkeypatch) -> None:
    make_model("bert").save_pretrained(tmp_path)

    def fail(*_args, **_kwargs):
        raise RuntimeError("needs a kernel")

    monkeypatch.setattr(transformers.BertModel, "_from_config", fail)
    with pytest.raises(CheckpointError, match=r"cannot be laid out without its weights \(needs a kernel\)"):
        Checkpoint(tmp_path)


# Writing


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_to_files_is_what_a_live_model_would_save(family: str, make_model, tmp_path) -> None:
    """Every second matrix is written, so that what shares a tensor with it has to stay."""
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    before = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    matrices = Checkpoint(tmp_path, writable=True).matrices()
    generator = torch.Generator().manual_seed(1)
    for live, stored in list(zip(matrices_of(model), matrices, strict=True))[::2]:
        values = torch.randn(live.shape, generator=generator)
        live.write(values)
        stored.write(values)
        assert torch.equal(stored.read(), values), live.name
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert before == {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}


def test_one_expert_is_written_without_the_others(make_model, tmp_path, monkeypatch) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    written = []
    original = SafetensorsFolder.write
    monkeypatch.setattr(SafetensorsFolder, "write", lambda self, k, *v: written.append(k) or original(self, k, *v))
    matrix = next(m for m in Checkpoint(tmp_path, writable=True).matrices() if m.expert == 1 and m.part == "gate")
    matrix.write(torch.zeros(matrix.shape))
    assert len(written) == 2 and all(".experts.1." in key for key in written)


def test_one_of_a_stack_is_read_and_written_in_its_place(make_model, tmp_path, monkeypatch) -> None:
    """GPT-OSS has all experts in one tensor on disk, too."""
    make_model("gpt_oss").save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    matrix = next(m for m in Checkpoint(tmp_path, writable=True).matrices() if m.expert == 1 and m.part == "gate")
    numbers = []
    original = SafetensorsFolder.read
    monkeypatch.setattr(
        SafetensorsFolder, "read", lambda self, key, index=None: numbers.append(index) or original(self, key, index)
    )
    weight = matrix.read().clone()
    matrix.write(weight)
    assert numbers == [1, 1] and (tmp_path / "model.safetensors").read_bytes() == content
    matrix.write(weight + 1)
    assert torch.equal(matrix.read(), weight + 1)


def test_a_half_precision_file_keeps_its_dtype(make_model, tmp_path) -> None:
    make_model("llama").half().save_pretrained(tmp_path)
    matrix = Checkpoint(tmp_path, writable=True).matrices()[1]
    values = torch.randn(matrix.shape)
    matrix.write(values)
    assert torch.equal(matrix.read(), values.half())


def test_a_tied_weight_that_is_on_disk_twice_is_written_twice(make_model, tmp_path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    matrix = next(m for m in Checkpoint(tmp_path, writable=True).matrices() if m.kind == "embedding")
    matrix.write(torch.ones(matrix.shape))
    written = load_file(tmp_path / "model.safetensors")
    assert all(bool((written[name] == 1).all()) for name in ("lm_head.weight", "model.embed_tokens.weight"))


def test_files_are_written_only_on_request_and_in_their_shape(make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="read from a file, and files are never written"):
        Checkpoint(tmp_path).matrices()[3].write(torch.ones(64, 64))
    tensors = Checkpoint(tmp_path, writable=True).tensors
    name = next(name for name in tensors.files if name.endswith("query.weight"))
    content = (tmp_path / "model.safetensors").read_bytes()
    for wrong in (torch.ones(64, 63), torch.ones(64, 64).half()):
        with pytest.raises(CheckpointError, match=r"query.weight is F32 of shape \[64, 64\], and cannot take"):
            tensors.write(name, wrong)
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_a_conversion_that_computes_is_not_written_back(make_model, tmp_path, monkeypatch) -> None:
    from hf_rmt.models.checkpoints import CheckpointParameter

    make_model("mixtral").save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    original = CheckpointParameter._converted
    monkeypatch.setattr(CheckpointParameter, "_converted", lambda self, *rest: original(self, *rest) * 0)
    matrix = next(m for m in Checkpoint(tmp_path, writable=True).matrices() if m.expert == 1)
    with pytest.raises(CheckpointError, match="not made of the tensors on disk by a change of places alone"):
        matrix.write(torch.ones(matrix.shape))
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_one_tensor_on_disk_that_is_several_parameters_of_different_sizes(tmp_path) -> None:
    """Molmo 2 keeps query, key and value in one, of which key and value are narrower."""
    pytest.importorskip("transformers.models.molmo2")
    from transformers import Molmo2TextConfig, Molmo2TextModel

    config = Molmo2TextConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
        intermediate_size=96, vocab_size=50, additional_vocab_size=4,
    )  # fmt: skip
    model = Molmo2TextModel(config)
    model.save_pretrained(tmp_path)
    assert any("att_proj" in key for key in load_file(tmp_path / "model.safetensors"))
    matrices = Checkpoint(tmp_path, writable=True).matrices()
    for live, stored in zip(matrices_of(model), matrices, strict=True):
        assert torch.equal(live.read(), stored.read()), live.name
        live.write(2 * live.read())
        stored.write(2 * stored.read())
    loaded = Molmo2TextModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
