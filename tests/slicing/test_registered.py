"""Sliced models are saved and loaded as any others, and never by a transformers that does not know them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_rmt.models import families
from hf_rmt.models.families import family_of, register_family
from hf_rmt.models.residual_stream import Stream
from hf_rmt.models.stream_modules import StreamNorm
from hf_rmt.slicing import registering
from hf_rmt.slicing.basis import change_basis_
from hf_rmt.slicing.norms import fuse_norms_
from hf_rmt.slicing.registered import SlicedConfig, give_structure_, mark_

_SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60
)
_BERT = {**_SIZES, "max_position_embeddings": 32}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT2: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
_OPT = dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
_VIT = {**_SIZES, "image_size": 16, "patch_size": 8}
_VIT.pop("vocab_size")

#: kind -> class, its configuration, sizes, the auto class that loads it, a basis for every site of its own
KINDS: dict[str, tuple[str, str, dict[str, Any], str, bool]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, "CausalLM", False),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, "CausalLM", False),
    "llama per site": ("LlamaForCausalLM", "LlamaConfig", _GROUPED, "CausalLM", True),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8}, "CausalLM", True),
    "gemma2 tied": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8}, "CausalLM", True),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED, "CausalLM", True),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 3}, "CausalLM", True),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, "CausalLM", False),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES, "CausalLM", True),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_GROUPED, **_OPT}, "CausalLM", True),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT, "MaskedLM", True),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", _BERT, "SequenceClassification", False),
    "bert headless": ("BertModel", "BertConfig", _BERT, "", True),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT, "ImageClassification", True),
    "vit headless": ("ViTModel", "ViTConfig", _VIT, "", False),
}
TOKENS = torch.arange(3, 27).reshape(2, 12)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

#: Prints the kinds whose logits are, to the bit, those that were saved with them.
_LOAD = """
def load_all(root):
    import torch, transformers
    torch.set_num_threads(1)
    for folder in sorted(root.iterdir()):
        known = torch.load(folder / "known.pt")
        model = getattr(transformers, "AutoModel" + known["auto"]).from_pretrained(folder)
        with torch.no_grad():
            if torch.equal(model(**known["inputs"])[0], known["output"]):
                print(folder.name)
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(kind: str) -> Any:
    """Of norms and biases that are not ones and zeros."""
    cls, config, sizes, _, _ = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0][:, :columns]


def sliced(model: Any, per_site: bool = False, tied: bool = False) -> Stream:
    """Of widths that differ, but for experts, whose products need multiples of 8."""
    torch.manual_seed(1)
    stream = fuse_norms_(model, keep_tied=tied)
    widths = [24 if model.config.model_type == "mixtral" else 28 - 2 * (i % 3) for i in range(len(stream.sites))]
    change_basis_(stream, [orthonormal(32, width) for width in widths] if per_site else orthonormal(32, 24))
    return stream


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": IMAGES} if kind.startswith("vit") else {"input_ids": TOKENS}


def output_of(model: Any, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(kind))[0]


def error_of(model: Any, reference: torch.Tensor) -> float:
    """Relative."""
    return float((output_of(model).float() - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sliced models, each with what it puts out."""
    root = tmp_path_factory.mktemp("sliced")
    for kind, (_, _, _, auto, per_site) in KINDS.items():
        model = random_model(kind)
        mark_(sliced(model, per_site, tied=kind.endswith("tied")), {"from": kind})
        model.save_pretrained(root / kind)
        known = {"auto": f"For{auto}" if auto else "", "inputs": inputs_of(kind), "output": output_of(model, kind)}
        torch.save(known, root / kind / "known.pt")
    return root


def known_output(folder: Path) -> torch.Tensor:
    return torch.load(folder / "known.pt")["output"]


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_loads_what_was_saved_to_the_bit(saved: Path) -> None:
    script = f"""
import pathlib, sys
import hf_rmt
assert not {{"torch", "transformers"}} & set(sys.modules)
{_LOAD}
load_all(pathlib.Path(sys.argv[1]))
"""
    assert run(script, str(saved)).splitlines() == sorted(KINDS)


def test_without_the_library_nothing_loads_and_with_it_imported_last_all_does(saved: Path) -> None:
    script = f"""
import io, json, logging, pathlib, sys
sys.modules["hf_rmt"] = None
import transformers
root = pathlib.Path(sys.argv[1])
{_LOAD}
transformers.logging.set_verbosity_warning()
for folder in sorted(root.iterdir()):
    auto = json.loads((folder / "config.json").read_text())["architectures"][0]
    logging.getLogger("transformers").addHandler(logging.StreamHandler(report := io.StringIO()))
    try:
        getattr(transformers, auto).from_pretrained(folder)
    except RuntimeError as error:
        mismatch = "ignore_mismatched_sizes" in str(error) and "size mismatch" in report.getvalue()
        print("refused" if mismatch else error)
    else:
        print("loaded")
del sys.modules["hf_rmt"]
import hf_rmt
load_all(root)
"""
    lines = run(script, str(saved)).splitlines()
    assert lines == ["refused"] * len(KINDS) + sorted(KINDS)


def test_the_record_is_json_and_the_sizes_stay(saved: Path) -> None:
    config = json.loads((saved / "llama per site" / "config.json").read_text())
    assert config["hidden_size"] == 32
    assert config["quantization_config"] == {
        "width": 32,
        "widths": [28, 26, 24, 28, 26],
        "shortcuts": True,
        "headless": False,
        "tied": False,
        "biases": [],
        "origin": {"from": "llama per site"},
        "version": 1,
        "quant_method": "hf_rmt_sliced",
    }
    record = json.loads((saved / "gpt2" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in record["biases"]
    assert "h.0.attn.c_attn" in record["biases"]


@pytest.mark.parametrize("kind", ["llama per site", "gemma2 tied", "mixtral", "vit", "bert headless"])
def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path, kind: str) -> None:
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(saved / kind)
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (saved / kind, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved / kind, tmp_path)]
    assert configs[0] == configs[1]


def test_what_is_loaded_is_what_was_sliced(saved: Path) -> None:
    model = random_model("gemma2")
    mark_(sliced(model, per_site=True))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved / "gemma2")
    assert str(loaded) == str(model)
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, StreamNorm) for p in [m.weight])
    with torch.no_grad():
        states = loaded(TOKENS, output_hidden_states=True).hidden_states
    assert [len(state[0, 0]) for state in states] == [28, 24, 26]


def test_shards_device_map_and_dtype(saved: Path, tmp_path: Path) -> None:
    auto, folder = transformers.AutoModelForCausalLM, saved / "llama per site"
    expected = known_output(folder)
    auto.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output_of(auto.from_pretrained(tmp_path)), expected)
    for device_map in ("auto", {"": "cpu"}):
        assert torch.equal(output_of(auto.from_pretrained(folder, device_map=device_map)), expected)
    coarse = auto.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in coarse.parameters()} == {torch.bfloat16}
    assert 0 < error_of(coarse, expected) < 0.05
    assert 0 < error_of(auto.from_pretrained(folder).half(), expected) < 0.01
    assert torch.equal(output_of(auto.from_pretrained(folder).to(torch.float64).float()), expected)


@pytest.mark.parametrize("name", ["llama", "llama per site"])
def test_from_disk(name: str, saved: Path, tmp_path: Path) -> None:
    place: Any = {"device_map": "auto", "max_memory": {"cpu": 20_000}, "offload_folder": tmp_path}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(saved / name, **place)
    assert "disk" in offloaded.hf_device_map.values()
    assert torch.equal(output_of(offloaded), known_output(saved / name))


def test_generates_with_a_cache_what_it_did(saved: Path) -> None:
    model = random_model("llama per site")
    sliced(model, per_site=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama per site")
    options: Any = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    mask = torch.ones_like(TOKENS)
    texts = [
        model.generate(TOKENS, attention_mask=mask, **options),
        loaded.generate(TOKENS, attention_mask=mask, **options),
        loaded.generate(TOKENS, attention_mask=mask, use_cache=False, **options),
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert texts[0].shape[1] == 18


def test_trains_and_is_saved_by_a_trainer(saved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama per site")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows: Any = [{"input_ids": row, "labels": row} for row in TOKENS]
    options: Any = dict(max_steps=1, learning_rate=0.01, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = transformers.Trainer(model, transformers.TrainingArguments(tmp_path, **options), train_dataset=rows)
    trainer.train()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if name.endswith("norm.weight")}
    trainer.save_model()
    assert torch.equal(output_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), output_of(model.eval()))


def test_adapters_train_on_it(saved: Path, tmp_path: Path) -> None:
    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(saved / "llama per site")

    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(load(), wanted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval().save_pretrained(tmp_path)
    adapted = output_of(model)
    again = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(output_of(again), adapted)
    assert error_of(again.merge_and_unload(), adapted) < 1e-5  # type: ignore[operator]


def test_compiles(saved: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama per site")
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(output_of(compiled), known_output(saved / "llama per site"))


def test_a_new_head_on_the_body_of_another_model(saved: Path) -> None:
    """It is as wide as what it reads: the slice of a headed model, the D of a headless one."""
    classifier = transformers.AutoModelForSequenceClassification
    new: Any = classifier.from_pretrained(saved / "llama per site")
    assert new.score.in_features == 26
    old = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama per site")
    with torch.no_grad():
        states = [model.base_model(TOKENS)[0] for model in (new, old)]
    assert torch.equal(*states)
    new = classifier.from_pretrained(saved / "llama tied")
    assert new.score.in_features == new.model.norm.change.out_features == 24
    assert new.score(new.model(TOKENS)[0]).shape == (2, 12, 2)
    new = classifier.from_pretrained(saved / "bert headless")
    assert new.classifier.in_features == new.bert.pooler.dense.in_features == 32
    with torch.no_grad():
        assert torch.equal(new.bert(TOKENS)[0], known_output(saved / "bert headless"))


def test_a_headed_slice_is_not_loaded_without_its_head(saved: Path) -> None:
    with pytest.raises(
        ValueError, match=r"LlamaModel has no head.* 26 numbers .* as LlamaForCausalLM and take .base_m"
    ):
        transformers.AutoModel.from_pretrained(saved / "llama per site")


def test_a_head_of_its_own_is_not_tied(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"ties its head .* pass tie_word_embeddings=False"):
        transformers.AutoModelForCausalLM.from_pretrained(saved / "llama", tie_word_embeddings=True)


def test_a_tied_head_that_got_values_of_its_own_since(saved: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    model: Any = auto.from_pretrained(saved / "llama tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1 * torch.randn(60, 24))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(output_of(auto.from_pretrained(tmp_path)), output_of(model))


def test_a_head_that_was_tied_by_hand(tmp_path: Path) -> None:
    model = random_model("llama per site")
    model.lm_head.weight = model.model.embed_tokens.weight
    stream = sliced(model, tied=True)
    assert stream.tied is not None and model.config.tie_word_embeddings
    mark_(stream)
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), output_of(model))


@pytest.mark.parametrize("kind", ["llama tied", "gemma2 tied"])
def test_a_slice_whose_head_stays_tied(kind: str, saved: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(saved / kind)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(saved / kind / "model.safetensors")
    with pytest.raises(ValueError, match=r"no head of its own for \w+ForCausalLM.*without tie_word_embeddings=False"):
        auto.from_pretrained(saved / kind, tie_word_embeddings=False)


def test_a_checkpoint_that_lacks_tensors_is_refused(saved: Path, tmp_path: Path) -> None:
    auto, source = transformers.AutoModelForCausalLM, saved / "llama per site"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name in ("model.layers.1.shortcuts.0.weight", "model.layers.0.mlp.up_proj.weight"):
        save_file(
            {key: tensors[key] for key in tensors if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ValueError, match=f"no tensor that fits {name}: "):
            auto.from_pretrained(tmp_path)
    tensors["model.layers.1.shortcuts.0.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor that fits model.layers.1.shortcuts.0.weight: "):
        auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_record_that_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(ValueError, match="32 wide with 5 sites, and LlamaForCausalLM has one 32 wide with 3: load it"):
        auto.from_pretrained(saved / "llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"later hf_rmt .format 2, known up to 1"):
        SlicedConfig.from_dict({"version": 2, "colour": "red"})
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hf_rmt_sliced does require the model to be pre-quantized"):
        record = SlicedConfig(width=32, widths=[24] * 5, shortcuts=False, headless=False)
        auto.from_pretrained(tmp_path, quantization_config=record)


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.ArceeConfig(**_GROUPED)).eval()
    llama = family_of(random_model("llama"))
    mlp = llama.steps[1][0].__class__(
        norm="post_attention_layernorm", mixer=("mlp",), readers=("mlp.up_proj",), writers=("mlp.down_proj",)
    )
    own = llama.__class__(**{**vars(llama), "steps": (llama.steps[0], (mlp,))})
    stream = fuse_norms_(model, own)
    change_basis_(stream, [orthonormal(32, 24 + site) for site in range(5)])
    with pytest.raises(ValueError, match="no declaration of the residual stream of arcee"):
        mark_(stream)
    register_family("arcee", family=llama)
    with pytest.raises(ValueError, match="another declaration of the residual stream of arcee"):
        mark_(stream)
    register_family("arcee", family=own)
    mark_(stream)
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), output_of(model))
    del families._FAMILIES["arcee"]
    with pytest.raises(
        ValueError, match=r"no declaration of the residual stream of arcee.*give that to register_family"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_only_what_is_fused_and_plain_is_marked() -> None:
    from hf_rmt.models.residual_stream import stream_of

    model = random_model("llama")
    with pytest.raises(ValueError, match="LlamaRMSNorm at input_layernorm is not fused: fuse_norms_ comes first"):
        mark_(stream_of(model))
    stream = sliced(model)
    with pytest.raises(TypeError, match="not JSON serializable"):
        mark_(stream, {"basis": torch.ones(2)})
    assert not hasattr(model.config, "quantization_config")


def test_structure_is_given_to_any_model_on_meta() -> None:
    model = random_model("gpt2")
    record = mark_(sliced(model, per_site=True))
    with torch.device("meta"):
        empty = type(model)(model.config)
    give_structure_(empty, record)
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (model, empty)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_import_of_transformers_is_watched_once_and_never_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if not isinstance(one, registering._Watch)])
    monkeypatch.delitem(sys.modules, registering._TABLE)
    registering.register_when_loaded()
    registering.register_when_loaded()
    (watch,) = (one for one in sys.meta_path if isinstance(one, registering._Watch))
    assert watch.find_spec("transformers.quantizers.base", None) is None
    monkeypatch.setitem(sys.modules, "hf_rmt.slicing.registered", None)
    spec = importlib.util.find_spec(registering._TABLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "AUTO_QUANTIZER_MAPPING" in vars(module)
    assert "sliced models cannot be loaded by this transformers" in caplog.text
