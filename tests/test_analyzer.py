"""The analyzer as a user meets it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn

from hf_rmt import AnalysisConfig, AnalysisReport, RMTAnalyzer
from hf_rmt.reports.columns import COLUMNS, CONTROL_COLUMNS

QUERY = "encoder.layer.0.attention.self.query"


def _same(one: AnalysisReport, other: AnalysisReport) -> None:
    pd.testing.assert_frame_equal(one.to_pandas(), other.to_pandas())
    assert list(one) == list(other)
    for name in one:
        mine, theirs = one[name].tensors(), other[name].tensors()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.nan_to_num(mine[k], -1), torch.nan_to_num(theirs[k], -1)) for k in mine), name


def test_columns_and_arrays(make_model) -> None:
    model = make_model("bert")
    report = RMTAnalyzer(model).analyze()
    table = report.to_pandas()
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == len(report) == 13
    result = report[QUERY]
    weight = model.encoder.layer[0].attention.self.query.weight.detach()
    np.testing.assert_allclose(result.s, np.linalg.svd(weight.double().numpy())[1], rtol=1e-9)
    assert result.right.p_values.shape == result.left.p_values.shape == (64,)
    row = table.set_index("name").loc[QUERY]
    assert row["sigma_rule"] == "bulk" and row["rows"] == row["cols"] == 64 and row["block"] == 0
    assert row["n_above"] == row["n_above_bulk"] == int((result.s > row["upper_edge"]).sum())
    assert row["stable_rank"] == pytest.approx(float((result.s**2).sum() / result.s[0] ** 2))
    assert row["right_significant"] == pytest.approx(float((result.right.p_values < 0.01).double().mean()))


def test_a_matrix_is_found_under_its_headed_path_too(make_model) -> None:
    report = RMTAnalyzer(make_model("bert_classifier")).analyze(roles="query", sides="none")
    assert report[f"bert.{QUERY}.weight"] is report[QUERY]
    with pytest.raises(KeyError, match=r"nearest are .*encoder\.layer\.0\.attention\.self\.query"):
        report["encoder.layer.0.attention.query"]


def test_embeddings_and_heads_only_when_asked_for(make_model) -> None:
    model = make_model("bert_classifier")
    assert {m.kind for m in RMTAnalyzer(model).matrices} == {"block"}
    assert {m.kind for m in RMTAnalyzer(model, embeddings=True, head=True).matrices} == {"block", "embedding", "head"}


def test_the_model_is_left_as_it_was(make_model) -> None:
    model = make_model("mixtral").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    RMTAnalyzer(model).analyze(control="gaussian")
    assert model.training and torch.get_num_threads() == threads
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_results_do_not_depend_on_workers_or_order(make_model) -> None:
    analyzer = RMTAnalyzer(make_model("llama"))
    one, two = analyzer.analyze(workers=1, control="shuffled"), analyzer.analyze(workers=2, control="shuffled")
    _same(one, two)
    alone = analyzer.analyze(roles="layers.1.mlp.up_proj", control="shuffled")["layers.1.mlp.up_proj"]
    assert torch.equal(alone.control.s, one["layers.1.mlp.up_proj"].control.s)


@pytest.mark.parametrize("sides, right, left", [("both", 1, 1), ("right", 1, 0), ("left", 0, 1), ("none", 0, 0)])
def test_sides(sides: str, right: int, left: int, make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    report = analyzer.analyze(roles="intermediate", sides=sides)
    result = next(iter(report.values()))
    assert (result.right is not None, result.left is not None) == (bool(right), bool(left))
    both = next(iter(analyzer.analyze(roles="intermediate").values()))
    np.testing.assert_allclose(result.s, both.s, rtol=1e-7)
    table = report.to_pandas()
    assert table["right_significant"].isna().all() != bool(right)
    assert table["left_significant"].isna().all() != bool(left)


def test_sigma_rules(make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    weight = analyzer.matrices[0]
    sigmas = {
        rule: analyzer.analyze(sigma=rule, sides="none").to_pandas().set_index("name") for rule in ("init", "empirical")
    }
    name = QUERY
    assert sigmas["init"].loc[name, "sigma"] == pytest.approx(1 / 8)
    matrix = next(m for m in analyzer.matrices if m.name == name)
    assert sigmas["empirical"].loc[name, "sigma"] == pytest.approx(float(matrix.read().std(correction=0)))
    given = analyzer.analyze(sigma=0.02, sides="none").to_pandas()
    assert (given["sigma"] == 0.02).all() and (given["sigma_rule"] == "given").all()
    assert weight.shape[0] > 0


def test_the_route_of_other_devices_gives_the_same(make_model, monkeypatch) -> None:
    """Off the CPU torch does what numpy does on it; here torch's CPU code stands in for the device."""
    from hf_rmt.theory import linalg

    analyzer = RMTAnalyzer(make_model("bert"))
    by_numpy = analyzer.analyze()
    monkeypatch.setattr(linalg, "_by_numpy", lambda _tensor: False)
    by_torch = analyzer.analyze()
    for name in by_numpy:
        np.testing.assert_allclose(by_numpy[name].s, by_torch[name].s, rtol=1e-8)
        np.testing.assert_allclose(by_numpy[name].left.statistic, by_torch[name].left.statistic, atol=1e-5)
    values = analyzer.analyze(sides="none")
    np.testing.assert_allclose(by_numpy[QUERY].s, values[QUERY].s, rtol=1e-7)


def test_a_path_is_no_model() -> None:
    with pytest.raises(TypeError, match="for a folder or Hub id use from_checkpoint"):
        RMTAnalyzer("bert-base-uncased")  # type: ignore[arg-type]


def test_control(make_model) -> None:
    report = RMTAnalyzer(make_model("bert")).analyze(control="gaussian", seed=3, roles="query")
    table = report.to_pandas()
    assert set(CONTROL_COLUMNS) <= set(table.columns) and table[list(CONTROL_COLUMNS)].notna().all().all()
    result = report[QUERY]
    assert result.control.s.shape == result.s.shape and not torch.equal(result.control.s, result.s)
    again = RMTAnalyzer(make_model("bert")).analyze(control="gaussian", seed=3, roles="query")
    other = RMTAnalyzer(make_model("bert")).analyze(control="gaussian", seed=4, roles="query")
    assert torch.equal(again[QUERY].control.s, result.control.s)
    assert not torch.equal(other[QUERY].control.s, result.control.s)


def test_the_shuffled_control_exposes_heavy_tails() -> None:
    """Independent entries with heavy tails make spikes, in the matrix and in its shuffled control alike."""
    rng = np.random.default_rng(0)
    model = nn.Linear(300, 300)
    model.weight.data = torch.from_numpy(rng.standard_t(3, (300, 300))).float()
    row = RMTAnalyzer(model).analyze(control="shuffled", sides="none").to_pandas().iloc[0]
    gaussian = RMTAnalyzer(model).analyze(control="gaussian", sides="none").to_pandas().iloc[0]
    assert row["n_above_tw"] >= 5 and row["control_n_above"] >= 5
    assert gaussian["control_n_above"] <= 2


def test_monte_carlo_null_agrees_with_the_table(make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    table = analyzer.analyze(roles="query")[QUERY].right.p_values
    drawn = analyzer.analyze(roles="query", null_draws=20_000)[QUERY].right.p_values
    assert not torch.equal(table, drawn)
    assert (table - drawn).abs().max() < 5 * math.sqrt(0.25 / 20_000)
    with pytest.raises(ValueError, match="at least 100 draws"):
        analyzer.analyze(null_draws=5)


def test_by_role_is_the_mean_over_blocks(make_model) -> None:
    report = RMTAnalyzer(make_model("mixtral")).analyze(sides="none")
    table, by_role = report.to_pandas(), report.by_role()
    for role in ("query", "gate"):
        blocks = table[table.role == role].groupby("block")["s_max"].mean()
        assert by_role.loc[role, ("s_max", "mean")] == pytest.approx(blocks.mean())
        assert by_role.loc[role, ("s_max", "std")] == pytest.approx(blocks.std())
        assert by_role.loc[role, ("blocks", "count")] == 2
    assert report.by_block("s_max").loc[1, "gate"] == pytest.approx(
        table[(table.role == "gate") & (table.block == 1)]["s_max"].mean()
    )
    with pytest.raises(ValueError, match="not a number of the table"):
        report.by_block("role")


def test_by_role_keeps_stacks_apart(make_model) -> None:
    by_role = RMTAnalyzer(make_model("t5")).analyze(sides="none").by_role()
    assert ("encoder", "query") in by_role.index and ("decoder", "cross.query") in by_role.index


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mixtral"])
def test_live_model_and_checkpoint_give_the_same_report(family: str, make_model, tmp_path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    _same(RMTAnalyzer(model).analyze(), RMTAnalyzer.from_checkpoint(tmp_path).analyze())


def test_live_model_and_checkpoint_of_the_real_encoder(minilm) -> None:
    live = RMTAnalyzer(transformers.AutoModel.from_pretrained(minilm)).analyze(roles=["query", "intermediate"])
    disk = RMTAnalyzer.from_checkpoint(minilm).analyze(roles=["query", "intermediate"])
    _same(live, disk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copies_agree(dtype: torch.dtype, minilm) -> None:
    """Singular values move by at most the spectral norm of the rounding error (Weyl), counts by at most 2."""
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)
    full = RMTAnalyzer(model).analyze(sides="none", blocks=range(2))
    exact = {m.name: m.read().detach().clone() for m in RMTAnalyzer(model).matrices}
    half = RMTAnalyzer(model.to(dtype)).analyze(sides="none", blocks=range(2))
    counts = ["n_above", "n_below", "n_above_tw", "n_below_tw", "n_above_init", "n_above_empirical"]
    difference = full.to_pandas()[counts].astype(int) - half.to_pandas()[counts].astype(int)
    assert difference.abs().max().max() <= 2
    for name, result in full.items():
        error = (exact[name] - exact[name].to(dtype).float()).double()
        bound = float(torch.linalg.matrix_norm(error, 2))
        assert float((result.s - half[name].s).abs().max()) <= bound * (1 + 1e-9), name


def test_a_peft_model_is_analysed_as_it_computes(make_model) -> None:
    from peft import LoraConfig, get_peft_model

    base = RMTAnalyzer(make_model("bert")).analyze(sides="none")
    model = get_peft_model(make_model("bert"), LoraConfig(r=4, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    adapted = RMTAnalyzer(model).analyze(sides="none")
    assert list(adapted) == list(base)
    assert not torch.allclose(adapted[QUERY].s, base[QUERY].s)
    key = QUERY.replace("query", "key")
    assert torch.equal(adapted[key].s, base[key].s)
    plain = RMTAnalyzer(model, adapters=False).analyze(sides="none")
    assert torch.equal(plain[QUERY].s, base[QUERY].s)


def test_a_configuration_object_and_keywords(make_model) -> None:
    analyzer = RMTAnalyzer(make_model("bert"))
    report = analyzer.analyze(config=AnalysisConfig(sides="none", sigma="init"), sigma="empirical")
    assert report.settings["sigma"] == "empirical" and report.settings["sides"] == "none"
    with pytest.raises(TypeError, match="no option sgima; there are sides, sigma, rate"):
        analyzer.analyze(sgima="init")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sides": "up"}, "sides is 'up': give one of both, right, left, none"),
        ({"sigma": "bulky"}, "sigma is 'bulky': give one of bulk, empirical, init, or a positive number"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"rate": 0}, "rate is 0"),
        ({"control": "noise"}, "control is 'noise': give one of gaussian, shuffled"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_out_of_range(options, message: str, make_model) -> None:
    with pytest.raises(ValueError, match=message):
        RMTAnalyzer(make_model("bert")).analyze(**options)


def test_settings_and_versions_are_recorded(make_model) -> None:
    settings = RMTAnalyzer(make_model("bert")).analyze(sides="none", seed=7).settings
    assert settings["seed"] == 7 and settings["sigma"] == "bulk" and settings["model"] == "BertModel"
    assert settings["versions"]["torch"] == torch.__version__.split("+")[0] or settings["versions"]["torch"]
