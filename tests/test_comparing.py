"""Models before and after training, as a user compares them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hf_rmt import ModelComparison, RMTAnalyzer
from hf_rmt.reports import store

QUERY = "encoder.layer.0.attention.self.query"


def _parameter(model, name: str = QUERY) -> torch.Tensor:
    return model.get_submodule(name).weight.data


def _moved(model, scale: float = 0.01):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def _adapted(model, **options):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": ["query", "value"], **options}))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def _close(one: ModelComparison, other: ModelComparison, atol: float = 1e-5) -> None:
    mine, theirs = one.to_pandas(), other.to_pandas()
    names = mine.select_dtypes("number").columns
    pd.testing.assert_frame_equal(mine[names].astype("float64"), theirs[names].astype("float64"), atol=atol, rtol=1e-4)


def test_a_planted_change_is_found_where_it_was_planted(make_model) -> None:
    before, after = make_model("bert"), make_model("bert")
    u, _, vh = torch.linalg.svd(_parameter(after))
    _parameter(after).add_(0.01 * torch.outer(u[:, 30], vh[50]))
    comparison = RMTAnalyzer.compare(before, after)
    row = comparison[QUERY].row
    assert row["right_energy_8"] == pytest.approx(1, abs=1e-4)  # of 64 vectors four tenths have seven
    assert row["left_energy_5"] == pytest.approx(1, abs=1e-4)
    assert row["change_stable_rank"] == pytest.approx(1, abs=1e-6)
    norm = float(_parameter(before).double().norm())
    assert row["relative_change"] == pytest.approx(0.01 / norm, rel=1e-4)
    others = comparison.to_pandas().set_index("name").drop(index=QUERY)
    assert (others["relative_change"] == 0).all() and (others["right_match"] == 1).all()


def test_every_change_of_the_reports_is_that_of_two_analyses(make_model) -> None:
    before, after = make_model("bert"), _moved(make_model("bert"))
    comparison = RMTAnalyzer.compare(before, after, sigma="empirical")
    reports = [RMTAnalyzer(model).analyze(sigma="empirical") for model in (before, after)]
    for mine, expected in zip((comparison.before, comparison.after), reports, strict=True):
        pd.testing.assert_frame_equal(mine.to_pandas(), expected.to_pandas())
    expected = reports[0].compare(reports[1]).to_pandas().drop(columns="note")
    pd.testing.assert_frame_equal(comparison.to_pandas()[list(expected)], expected)


def test_matches_are_those_of_the_vectors(make_model) -> None:
    before, after = make_model("bert"), _moved(make_model("bert"), 0.005)
    match = RMTAnalyzer.compare(before, after, roles="query")[QUERY].left_match
    old, new = (np.linalg.svd(_parameter(model).double().numpy())[0] for model in (before, after))
    products = np.abs(new.T @ old)
    np.testing.assert_allclose(match.values, products.max(axis=1), atol=1e-6)
    clear = np.sort(products, axis=1)[:, -1] > np.sort(products, axis=1)[:, -2] + 1e-4
    np.testing.assert_array_equal(match.best.numpy()[clear], products.argmax(axis=1)[clear])


def test_a_base_with_its_adapter_is_the_base_with_the_merged_model(make_model) -> None:
    before = make_model("bert")
    adapted = _adapted(make_model("bert"))
    alone = RMTAnalyzer.compare(adapted)
    assert alone.settings["after"]["model"] == "BertModel with adapters"
    _close(RMTAnalyzer.compare(before, adapted), alone)
    changed = alone.to_pandas().set_index("role")["change_stable_rank"].dropna()
    assert set(changed.index) == {"query", "value"} and (changed < 3.001).all()
    merged = adapted.merge_and_unload()
    _close(RMTAnalyzer.compare(before, merged), alone)


def test_the_base_that_holds_the_adapters_is_the_base(make_model) -> None:
    """peft puts its layers into the model that it is given."""
    base = make_model("bert")
    adapted = _adapted(base)
    comparison = RMTAnalyzer.compare(base, adapted)
    assert comparison[QUERY].row["relative_change"] > 0
    _close(comparison, RMTAnalyzer.compare(make_model("bert"), adapted))


def test_analyzers_of_one_model_are_its_base_and_the_adapted_one(make_model) -> None:
    base = make_model("bert")
    early = RMTAnalyzer(base)  # made before peft puts its layers in
    adapted = _adapted(base)
    expected = RMTAnalyzer.compare(make_model("bert"), adapted, sides="none")
    assert expected[QUERY].row["relative_change"] > 0
    off = RMTAnalyzer(adapted, adapters=False)
    for sides in (
        (early, adapted),
        (early, RMTAnalyzer(adapted)),
        (RMTAnalyzer(base), adapted),
        (base, RMTAnalyzer(adapted)),
        (off, adapted),
        (off, base),
        (RMTAnalyzer(adapted),),
    ):
        found = RMTAnalyzer.compare(*sides, sides="none")
        _close(found, expected, atol=0)
        assert [found.settings[side]["model"] for side in ("before", "after")] == [
            "BertModel",
            "BertModel with adapters",
        ]
    _close(RMTAnalyzer.compare(early, sides="none"), expected, atol=0)


def test_an_analyzer_keeps_its_choice_of_matrices(make_model) -> None:
    adapted = _adapted(make_model("bert"))
    few, many = RMTAnalyzer(adapted), RMTAnalyzer(adapted, embeddings=True)
    few.matrices = [matrix for matrix in few.matrices if matrix.role == "query"]
    assert list(RMTAnalyzer.compare(few, sides="none")) == [matrix.name for matrix in few.matrices]
    comparison = RMTAnalyzer.compare(adapted.get_base_model(), few, sides="none")
    assert len(comparison) == 2 and len(comparison.settings["only_before"]) == 11
    assert list(RMTAnalyzer.compare(many, sides="none")) == [matrix.name for matrix in many.matrices]
    assert "embeddings.word_embeddings" in RMTAnalyzer.compare(many, sides="none")


def test_after_minus_before_where_the_adapted_side_comes_first(make_model) -> None:
    base = make_model("bert")
    adapted = _adapted(base)
    there, back = RMTAnalyzer.compare(base, adapted), RMTAnalyzer.compare(adapted, base)
    _close(back, RMTAnalyzer.compare(adapted, make_model("bert")))
    change = there.to_pandas()["s_max_change"]
    assert (change.abs() > 0).any()
    np.testing.assert_allclose(back.to_pandas()["s_max_change"], -change, rtol=1e-6)
    assert back.settings["before"] == there.settings["after"] and back.settings["after"] == there.settings["before"]
    assert back.settings["before"]["model"] == "BertModel with adapters"
    off = RMTAnalyzer(adapted, adapters=False)
    _close(RMTAnalyzer.compare(adapted, off), back, atol=0)


def test_two_sides_that_are_the_same_are_refused(make_model) -> None:
    base = make_model("bert")
    adapted = _adapted(base)
    off = RMTAnalyzer(adapted, adapters=False)
    for sides in ((adapted, adapted), (base, RMTAnalyzer(base)), (RMTAnalyzer(adapted), adapted), (off, off)):
        with pytest.raises(ValueError, match=r"both sides are one .* in memory: give it alone .*adapters=False"):
            RMTAnalyzer.compare(*sides)


def test_checkpoints_analyzers_and_models_are_the_same(make_model, tmp_path) -> None:
    before, after = make_model("bert"), _moved(make_model("bert_classifier"))
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    expected = RMTAnalyzer.compare(before, after, sides="right", roles="*output")
    from_disk = RMTAnalyzer.compare(tmp_path / "before", str(tmp_path / "after"), sides="right", roles="*output")
    _close(from_disk, expected, atol=0)
    assert from_disk.settings["before"] == {"model": str(tmp_path / "before"), "revision": None}
    mixed = RMTAnalyzer.compare(RMTAnalyzer(before), tmp_path / "after", sides="right", roles="*output")
    _close(mixed, expected, atol=0)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_folders_of_adapters(task: str | None, make_model, tmp_path) -> None:
    base = make_model("bert_classifier" if task else "bert")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    adapted = _adapted(base, task_type=task)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = RMTAnalyzer.compare(adapted)
    _close(RMTAnalyzer.compare(tmp_path / "base", tmp_path / "adapter"), expected)
    comparison = RMTAnalyzer.compare(tmp_path / "adapter")
    _close(comparison, expected)
    assert comparison.settings["after"]["model"] == f"{tmp_path / 'adapter'} on {tmp_path / 'base'}"


def test_the_base_of_an_adapter_may_have_moved(make_model, tmp_path) -> None:
    make_model("bert").save_pretrained(tmp_path / "base")
    base = type(make_model("bert")).from_pretrained(tmp_path / "base")
    _adapted(base).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    comparison = RMTAnalyzer.compare(tmp_path / "moved", tmp_path / "adapter", sides="none")
    assert comparison[QUERY].row["relative_change"] > 0
    assert comparison.settings["after"]["model"].endswith(f"on {tmp_path / 'moved'}")
    with pytest.raises(ValueError, match=r"base of the adapter .*adapter cannot be loaded .*pass the model"):
        RMTAnalyzer.compare(tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(make_model, tmp_path) -> None:
    make_model("bert", hidden_size=32).save_pretrained(tmp_path / "base")
    _adapted(make_model("bert")).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide does not fit .*base: load it on its base"):
        RMTAnalyzer.compare(tmp_path / "base", tmp_path / "wide")
    make_model("bert").save_pretrained(tmp_path / "bert")
    _adapted(make_model("bert_classifier")).save_pretrained(tmp_path / "headed")  # its tensors lie below "bert."
    settings = tmp_path / "headed" / "adapter_config.json"
    settings.write_text(settings.read_text().replace("BertForSequenceClassification", "BertModel"))
    with pytest.raises(ValueError, match=r"headed lacks .*lora_A.* not trained on this class"):
        RMTAnalyzer.compare(tmp_path / "bert", tmp_path / "headed")


def test_bfloat16_against_float32(make_model) -> None:
    """The same weights in two dtypes did not change but for rounding."""
    before, after = make_model("bert"), make_model("bert").to(torch.bfloat16)
    row = RMTAnalyzer.compare(before, after, roles="query")[QUERY].row
    assert 1e-4 < row["relative_change"] < 4e-3 and row["right_match"] > 0.99
    widened = make_model("bert").to(torch.bfloat16).float()
    row = RMTAnalyzer.compare(after, widened, roles="query")[QUERY].row
    assert row["relative_change"] == 0 and row["note"] == "the weights did not change"


def test_equal_weights_are_factored_once(make_model, monkeypatch) -> None:
    import hf_rmt.analysis

    calls = []
    original = hf_rmt.analysis.svd
    monkeypatch.setattr(hf_rmt.analysis, "svd", lambda *args: calls.append(1) or original(*args))
    after = make_model("bert")
    _parameter(after).mul_(1.5)
    comparison = RMTAnalyzer.compare(make_model("bert"), after, workers=1)
    assert len(calls) == 14 and comparison.after["pooler.dense"] is comparison.before["pooler.dense"]
    row = comparison[QUERY].row
    assert row["relative_change"] == pytest.approx(0.5) and row["right_match"] == pytest.approx(1)
    s = comparison.before[QUERY].s.numpy() ** 2
    shares = [part.sum() / s.sum() for part in np.array_split(s, 10)]
    np.testing.assert_allclose(comparison[QUERY].right_energy.shares[:10], shares, atol=1e-6)


def test_without_vectors(make_model) -> None:
    comparison = RMTAnalyzer.compare(make_model("bert"), _moved(make_model("bert")), sides="none", roles="key")
    table = comparison.to_pandas()
    assert (table["relative_change"] > 0).all() and table["right_energy_1"].isna().all()
    assert comparison.energy_over_expectation("left").isna().all(axis=None)
    full = RMTAnalyzer.compare(make_model("bert"), _moved(make_model("bert")), roles="key").to_pandas()
    np.testing.assert_allclose(table["change_stable_rank"], full["change_stable_rank"])


def test_results_do_not_depend_on_workers(make_model) -> None:
    before, after = make_model("llama"), _moved(make_model("llama"))
    one, two = (RMTAnalyzer.compare(before, after, workers=workers) for workers in (1, 2))
    pd.testing.assert_frame_equal(one.to_pandas(), two.to_pandas())


def test_weights_that_are_not_finite(make_model) -> None:
    after = make_model("bert")
    _parameter(after)[0, 0] = math.nan
    row = RMTAnalyzer.compare(make_model("bert"), after, roles="query")[QUERY].row
    assert row["note"] == "after: 1 of 4096 entries are NaN or Inf"
    assert row.get("relative_change") is None and row["n_above_change"] is None
    with pytest.raises(ValueError, match=f"{QUERY}: 1 of 4096 entries"):
        RMTAnalyzer.compare(make_model("bert"), after, strict=True)


def test_an_arbitrary_basis_is_noted() -> None:
    before, after = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
    before.weight.data = torch.outer(torch.arange(1.0, 41), torch.arange(-10.0, 30))
    comparison = RMTAnalyzer.compare(before, after)
    (found,) = comparison.values()
    assert found.row["note"] == "39 vectors before are arbitrary: how the change lies over them means nothing"
    assert float(found.right_energy.shares.sum()) == pytest.approx(1)
    back = next(iter(RMTAnalyzer.compare(after, before).values()))
    assert back.right_match.values.isnan().sum() == 39 and back.row["right_match"] == back.right_match.values[0]


# Folders


def test_a_folder_holds_the_comparison(make_model, tmp_path) -> None:
    before, after = make_model("bert"), _moved(make_model("bert"))
    comparison = RMTAnalyzer.compare(before, after, folder=tmp_path / "c", roles="query")
    assert not (tmp_path / "c" / "partial").exists()
    pd.testing.assert_frame_equal(ModelComparison.load(tmp_path / "c").to_pandas(), comparison.to_pandas())
    again = RMTAnalyzer.compare(before, after, folder=tmp_path / "c", roles="query")
    pd.testing.assert_frame_equal(again.to_pandas(), comparison.to_pandas())
    for models, options, message in (
        ((before, after), {"sigma": "init"}, "sigma was"),
        ((before, after), {"roles": "key"}, "matrices was"),
        ((_moved(make_model("bert"), 0.02), after), {}, "weights of .*query before differ"),
        ((before, make_model("bert")), {}, "weights of .*query after differ"),
    ):
        with pytest.raises(ValueError, match=message):
            RMTAnalyzer.compare(*models, folder=tmp_path / "c", **{"roles": "query", **options})


def test_an_interrupted_run_goes_on_where_it_stopped(make_model, tmp_path, monkeypatch) -> None:
    import hf_rmt.comparing as module

    before, after = make_model("bert"), _moved(make_model("bert"))
    _parameter(after).copy_(_parameter(before))
    undisturbed = RMTAnalyzer.compare(before, after, workers=1)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments[0].name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(*arguments)

    original = module.compare_matrix
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "compare_matrix", interrupted)
        RMTAnalyzer.compare(before, after, folder=tmp_path / "c", workers=1)
    kept = len(list((tmp_path / "c" / "partial").glob("*.safetensors")))
    assert kept == 9 and not store.is_saved(tmp_path / "c", "comparison")
    with pytest.raises(ValueError, match="was made by another run"):
        RMTAnalyzer(before).analyze(folder=tmp_path / "c")
    with pytest.raises(ValueError, match=r"weights of .* after differ"):
        RMTAnalyzer.compare(before, _moved(make_model("bert"), 0.02), folder=tmp_path / "c")
    calls.clear()
    monkeypatch.setattr(module, "compare_matrix", lambda *a: calls.append(1) or original(*a))
    resumed = RMTAnalyzer.compare(before, after, folder=tmp_path / "c", workers=1)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.to_pandas(), undisturbed.to_pandas())
    assert torch.equal(resumed[QUERY].right_match.best, undisturbed[QUERY].right_match.best)


# Bad input


def test_nothing_to_compare_with(make_model, tmp_path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path / "model")
    analyzers = (RMTAnalyzer(model), RMTAnalyzer.from_checkpoint(tmp_path / "model"))
    for arguments in (
        (model,),
        (model, model),
        (tmp_path / "model",),
        *((a,) for a in analyzers),
        (analyzers[0], model),
    ):
        with pytest.raises(ValueError, match=r"nothing to compare .* with: give two models"):
            RMTAnalyzer.compare(*arguments)


def test_other_shapes_are_listed(make_model) -> None:
    other = make_model("bert", intermediate_size=96)
    with pytest.raises(ValueError, match=r"output\.dense is 64 x 128 before and 64 x 96 after.*one shape"):
        RMTAnalyzer.compare(make_model("bert"), other)
    assert len(RMTAnalyzer.compare(make_model("bert"), other, roles="query", sides="none")) == 2


def test_models_with_nothing_in_common(make_model) -> None:
    with pytest.raises(ValueError, match="no matrix in common"):
        RMTAnalyzer.compare(make_model("bert"), make_model("llama"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"roles": "qery"}, ValueError, "no role or name matches 'qery'"),
        ({"blocks": 7}, ValueError, r"no block \[7\]"),
        ({"sigma": "bulky"}, ValueError, "sigma is 'bulky'"),
        ({"sigmas": 1}, TypeError, "no option sigmas"),
    ],
)
def test_wrong_options(options, error, message: str, make_model) -> None:
    with pytest.raises(error, match=message):
        RMTAnalyzer.compare(make_model("bert"), _moved(make_model("bert")), **options)


def test_what_is_no_model(make_model) -> None:
    with pytest.raises(TypeError, match="takes a model, not 3"):
        RMTAnalyzer.compare(make_model("bert"), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither a folder nor the id"):
        RMTAnalyzer.compare(make_model("bert"), Path("/no/such/folder"))
