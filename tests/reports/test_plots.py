"""The figures show the numbers of the report: everything is read back from the artists drawn."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from hf_rmt import MarchenkoPastur, RMTAnalyzer
from hf_rmt.reports import drawing, plots
from hf_rmt.theory.ks_null import shipped_null
from hf_rmt.theory.singular_vectors import local_mean

QUERY = "encoder.layer.0.attention.self.query"
INTERMEDIATE = "encoder.layer.1.intermediate.dense"
ALL = ["fig01_spectrum", "fig02_spectra_by_role", "fig03_vector_test", "fig04_local_means"]
ROLES = ["query", "key", "value", "attention.output", "intermediate", "output"]


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))


@pytest.fixture(scope="module")
def report():
    return RMTAnalyzer(bert()).analyze(progress=False)


@pytest.fixture(scope="module")
def controlled():
    return RMTAnalyzer(bert()).analyze(control="shuffled", seed=3, progress=False)


@pytest.fixture(scope="module")
def spiked():
    """A query with one entry far too large: a spike, and vectors with a single entry; and an intermediate
    matrix with a column far too small."""
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[3, 5] = 50.0
        model.encoder.layer[1].intermediate.dense.weight[:, 7] *= 0.01
    return RMTAnalyzer(model).analyze(progress=False)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that ``draw_all`` would have written, by name of the file."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, stem: figures.update({stem.name: figure}) or [stem])
    return figures


def line(axes, label):
    """Data of the one line whose legend begins with ``label``."""
    (found,) = [line for line in axes.get_lines() if line.get_label().startswith(label)]
    return tuple(np.asarray(data) for data in found.get_data())


def histogram(axes, label=None):
    """Densities and bin edges of a histogram, by the beginning of its legend or the only one."""
    patches = [p for p in axes.patches if isinstance(p, StepPatch)]
    (found,) = [p for p in patches if label is None or p.get_label().startswith(label)]
    return found.get_data().values, found.get_data().edges


def area(axes, label=None):
    density, edges = histogram(axes, label)
    return float((density * np.diff(edges)).sum())


def panels(figure):
    """Axes by the first line of their title."""
    return {axes.get_title().split("\n")[0]: axes for axes in figure.axes}


# Figure 1


def test_the_histograms_are_densities(report):
    (axes,) = plots.spectrum(report, QUERY).axes
    assert area(axes, "singular values") == pytest.approx(1)
    assert area(axes, "control") == pytest.approx(1)


def test_the_histogram_counts_the_singular_values_of_the_matrix(report):
    (axes,) = plots.spectrum(report, QUERY).axes
    density, edges = histogram(axes, "singular values")
    counted = np.histogram(report[QUERY].s.numpy(), edges)[0]
    np.testing.assert_allclose(density * np.diff(edges) * 64, counted, atol=1e-9)
    assert len(edges) > 8 and counted.sum() == 64


@pytest.mark.parametrize("name", [QUERY, INTERMEDIATE])
def test_the_law_is_that_of_the_row(report, name):
    row = report[name].row
    (axes,) = plots.spectrum(report, name).axes
    nu, density = line(axes, "MP law")
    law = MarchenkoPastur(row["rows"], row["cols"], row["sigma"])
    np.testing.assert_allclose(density, law.density(torch.from_numpy(nu)).numpy())
    assert nu[[0, -1]] == pytest.approx([row["lower_edge"], row["upper_edge"]])
    assert np.trapezoid(density, nu) == pytest.approx(1, abs=0.01)
    marked = [x[0] for x, _ in (line.get_data() for line in axes.get_lines() if line.get_linestyle() == ":")]
    assert marked == pytest.approx([row["lower_edge"], row["upper_edge"]])
    assert name in axes.get_title()


def test_the_law_lies_over_the_histogram_of_a_random_matrix():
    torch.manual_seed(1)
    layer = torch.nn.Sequential(torch.nn.Linear(700, 500, bias=False))
    torch.nn.init.normal_(layer[0].weight, std=0.3)
    report = RMTAnalyzer(layer).analyze(sides="none", progress=False)
    (axes,) = plots.spectrum(report, "0").axes
    for label in ("singular values", "control"):
        density, edges = histogram(axes, label)
        nu, law = line(axes, "MP law")
        middle = np.interp((edges[1:] + edges[:-1]) / 2, nu, law, left=0, right=0)
        assert np.abs(density - middle).max() < 0.15 * law.max()
        # A density of the wrong scale, by the width of a bin or by 2, would be far off.
        assert density.mean() == pytest.approx(middle.mean(), rel=0.03)


def test_the_control_is_the_stored_one(controlled):
    (axes,) = plots.spectrum(controlled, QUERY).axes
    density, edges = histogram(axes, "control (shuffled)")
    expected = np.histogram(controlled[QUERY].control.s.numpy(), edges, density=True)[0]
    np.testing.assert_allclose(density, expected)


def test_a_control_made_on_the_spot_is_repeatable_and_has_the_sigma_of_the_row(report):
    first, second = (plots.spectrum(report, INTERMEDIATE).axes[0] for _ in range(2))
    np.testing.assert_array_equal(histogram(first, "control (gaussian)")[0], histogram(second, "control")[0])
    density, edges = histogram(first, "control")
    energy = (density * np.diff(edges) * ((edges[1:] + edges[:-1]) / 2) ** 2).sum()  # E[nu^2] = sigma^2 q
    assert energy == pytest.approx(report[INTERMEDIATE].row["sigma"] ** 2 * 128, rel=0.1)
    other = type(report)(report.values(), report.settings | {"seed": 1})
    assert not np.array_equal(histogram(plots.spectrum(other, INTERMEDIATE).axes[0], "control")[0], density)


@pytest.mark.parametrize("name", [QUERY, INTERMEDIATE])
def test_values_beyond_the_edges_are_ticked(spiked, name):
    result = spiked[name]
    (axes,) = plots.spectrum(spiked, name).axes
    ticked, _ = line(axes, "values beyond")
    assert len(ticked) == result.row["n_above"] + result.row["n_below"]
    assert float(result.s[0 if name == QUERY else -1]) in ticked
    outside = (result.s > result.row["upper_edge"]) | (result.s < result.row["lower_edge"])
    np.testing.assert_array_equal(ticked, result.s[outside].numpy())


def test_an_outlier_far_out_leaves_the_bulk_wide_and_is_counted(spiked):
    (axes,) = plots.spectrum(spiked, QUERY).axes
    assert axes.get_xlim()[1] < 2 * spiked[QUERY].row["upper_edge"]
    assert [text.get_text() for text in axes.texts] == ["1 not shown,\nup to 50 →"]
    density, edges = histogram(axes, "singular values")
    assert (density * np.diff(edges))[:-1].sum() == pytest.approx(63 / 64)  # it is still one of the 64
    assert area(axes, "singular values") == pytest.approx(1)


# Figure 2


def test_every_role_has_a_panel_with_the_pooled_spectrum_and_the_law_of_the_mean_sigma(report):
    drawn = panels(plots.spectra_by_role(report))
    assert list(drawn) == ROLES  # and not the pooler, which is in no block
    for role, axes in drawn.items():
        results = [result for result in report.values() if result.row["role"] == role]
        density, edges = histogram(axes)
        pooled = np.concatenate([result.s.numpy() for result in results])
        np.testing.assert_allclose(density, np.histogram(pooled, edges, density=True)[0])
        assert area(axes) == pytest.approx(1)
        nu, law = line(axes, "MP law")
        sigma = np.mean([result.row["sigma"] for result in results])
        expected = MarchenkoPastur(results[0].row["rows"], results[0].row["cols"], sigma)
        np.testing.assert_allclose(law, expected.density(torch.from_numpy(nu)).numpy())
        assert "2 blocks" in axes.get_title()


def test_panels_lie_in_rows_of_three(report):
    figure = plots.spectra_by_role(report)
    figure.draw_without_rendering()
    tops = sorted(round(axes.get_position().y1, 3) for axes in figure.axes)
    assert len(set(tops)) == 2 and all(tops.count(top) == 3 for top in tops)


def test_what_differs_in_shape_is_not_pooled():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(48, n)}) for n in (64, 64, 96))
    report = RMTAnalyzer(torch.nn.ModuleDict({"layers": layers})).analyze(progress=False)
    titles = [axes.get_title().split("\n")[1] for axes in plots.spectra_by_role(report).axes]
    assert titles == ["64 $\\times$ 48, 2 blocks", "96 $\\times$ 48, 1 block"]


# Figure 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_cdf_and_the_pdf_are_those_of_the_stored_vector(report, side):
    test = getattr(report[INTERMEDIATE], side)
    entries, _, _ = plots.vector_test(report, INTERMEDIATE, side).axes
    x, cdf = line(entries, "entries")
    n = test.entries
    assert n == {"right": 64, "left": 128}[side]
    np.testing.assert_array_equal(x[1:-1], np.sort(test.extreme_vector.double().numpy()))
    np.testing.assert_allclose(cdf, [0, *(np.arange(1, n + 1) / n), 1])
    grid, gauss = line(entries, "Gaussian")
    np.testing.assert_allclose(gauss, [0.5 + 0.5 * math.erf(v * math.sqrt(n / 2)) for v in grid], atol=1e-12)
    (inset,) = entries.child_axes
    assert area(inset) == pytest.approx(1)
    assert f"vector {test.extreme_index}" in entries.get_title()


def test_the_gap_between_the_two_cdfs_is_the_statistic(report):
    test = report[QUERY].right
    entries, null, _ = plots.vector_test(report, QUERY).axes
    x, cdf = line(entries, "entries")
    gauss = np.array([0.5 + 0.5 * math.erf(v * math.sqrt(64 / 2)) for v in x[1:-1]])
    gap = max((cdf[1:-1] - gauss).max(), (gauss - cdf[:-2]).max())
    (marked, _), _ = line(null, "vector")
    assert marked == pytest.approx(gap, abs=1e-5)
    assert marked == float(test.statistic.nan_to_num().max())


def test_the_null_distribution_is_that_of_the_p_values(report):
    _, null, _ = plots.vector_test(report, QUERY).axes
    density, edges = histogram(null)
    assert area(null) == pytest.approx(1, abs=1e-3)
    tail = (density * np.diff(edges))[::-1].cumsum()[::-1]
    np.testing.assert_allclose(tail, shipped_null().p_value(torch.from_numpy(edges[:-1]), 64), atol=2e-5)


def test_a_statistic_far_out_is_named_instead_of_squeezing_the_null(spiked):
    test = spiked[QUERY].right
    entries, null, _ = plots.vector_test(spiked, QUERY).axes
    assert "(not shown: 1)" in entries.get_title()
    assert null.get_xlim()[1] <= 4 * 2.5 / 8 + 1e-9
    assert r"\leq" in null.get_title() and f"{float(test.statistic[test.extreme_index]):.3g}" in null.get_title()


def test_local_means_are_those_of_the_result(report):
    test = report[QUERY].right
    _, _, means = plots.vector_test(report, QUERY).axes
    index, values = line(means, "vectors")
    np.testing.assert_array_equal(index, np.arange(64))
    np.testing.assert_array_equal(values, test.local_mean.numpy())
    np.testing.assert_array_equal(line(means, "centred")[1], local_mean(test.centred_p_values)[0].numpy())
    assert set(line(means, "plateau")[1]) == {test.plateau}
    (band,) = means.collections
    inside = band.get_paths()[0].vertices
    inside = inside[np.abs(inside[:, 0] - 32) < 0.5][:, 1]
    assert sorted(set(inside.round(6))) == pytest.approx([0.5 - 1.96 / 180**0.5, 0.5 + 1.96 / 180**0.5], abs=1e-6)


def test_a_stored_control_takes_the_place_of_the_band(controlled):
    _, _, means = plots.vector_test(controlled, QUERY, "left").axes
    np.testing.assert_array_equal(line(means, "control")[1], controlled[QUERY].control.left.local_mean.numpy())
    assert not means.collections


# Figure 4


def test_local_means_by_role(report):
    figure = plots.local_means_by_role(report, "left")
    drawn = panels(figure)
    assert list(drawn) == ROLES
    for role, axes in drawn.items():
        first, second = [result.left.local_mean for result in report.values() if result.row["role"] == role]
        np.testing.assert_array_equal(line(axes, "this block")[1], second.numpy())
        np.testing.assert_allclose(line(axes, "mean of all")[1], ((first + second) / 2).numpy())
        assert set(line(axes, "random")[1]) == {0.5}
        assert "block 1" in axes.get_title()


def test_the_level_of_random_matrices_is_that_of_the_controls(controlled):
    axes = panels(plots.local_means_by_role(controlled))["value"]
    p_values = [r.control.right.p_values for r in controlled.values() if r.row["role"] == "value"]
    assert line(axes, "mean of the control")[1][0] == pytest.approx(float(torch.cat(p_values).mean()))


# Everything


def test_all_figures_are_written_as_png_and_pdf(report, tmp_path):
    paths = plots.draw_all(report, tmp_path / "a" / "b")
    assert sorted(path.name for path in paths) == sorted(stem + end for stem in ALL for end in (".png", ".pdf"))
    begin = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    for path in paths:
        assert path.read_bytes().startswith(begin[path.suffix]) and path.stat().st_size > 5000
    for path in drawing.save(plots.spectrum(report, QUERY), tmp_path / "again"):
        assert path.read_bytes() == (tmp_path / "a" / "b" / f"{ALL[0]}{path.suffix}").read_bytes()


def test_the_report_draws_itself_and_the_matrix_may_be_chosen(report, tmp_path, drawn):
    report.plot(str(tmp_path))
    assert sorted(drawn) == ALL
    assert QUERY in drawn[ALL[0]].axes[0].get_title() and QUERY in drawn[ALL[2]].get_suptitle()
    report.plot(tmp_path, matrix=f"bert.{INTERMEDIATE}.weight")  # as the report itself understands names
    assert INTERMEDIATE in drawn[ALL[0]].axes[0].get_title() and INTERMEDIATE in drawn[ALL[2]].get_suptitle()
    with pytest.raises(KeyError, match="nearest"):
        report.plot(tmp_path, "nothing.like.it")


def test_singular_values_alone_give_the_spectra(tmp_path, drawn):
    report = RMTAnalyzer(bert()).analyze(sides="none", progress=False)
    plots.draw_all(report, tmp_path)
    assert sorted(drawn) == ALL[:2]
    with pytest.raises(plots.NothingToDrawError, match="'none'"):
        plots.vector_test(report, QUERY)
    with pytest.raises(plots.NothingToDrawError):
        plots.local_means_by_role(report)


def test_left_vectors_are_drawn_where_only_they_were_tested(report, tmp_path, drawn):
    left = RMTAnalyzer(bert()).analyze(sides="left", progress=False)
    plots.draw_all(left, tmp_path, INTERMEDIATE)
    assert sorted(drawn) == ALL
    x, _ = line(drawn[ALL[2]].axes[0], "entries")
    np.testing.assert_array_equal(x[1:-1], np.sort(report[INTERMEDIATE].left.extreme_vector.double().numpy()))
    axes = panels(drawn[ALL[3]])["intermediate"]
    np.testing.assert_array_equal(line(axes, "this block")[1], report[INTERMEDIATE].left.local_mean.numpy())
    with pytest.raises(plots.NothingToDrawError, match="'left'"):
        plots.vector_test(left, INTERMEDIATE)


def test_matrices_that_are_not_finite_or_zero_are_skipped(tmp_path, drawn):
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] = math.nan
        for layer in model.encoder.layer:
            layer.attention.self.key.weight.zero_()
    report = RMTAnalyzer(model).analyze(progress=False)
    only = report["encoder.layer.1.attention.self.query"]
    plots.draw_all(report, tmp_path)
    assert sorted(drawn) == ALL
    assert only.name in drawn[ALL[0]].axes[0].get_title()  # the first query with a spectrum
    spectra, means = panels(drawn[ALL[1]]), panels(drawn[ALL[3]])
    assert list(spectra) == list(means) == [role for role in ROLES if role != "key"]
    assert "1 block" in spectra["query"].get_title() and "2 blocks" in spectra["value"].get_title()
    density, edges = histogram(spectra["query"])
    np.testing.assert_allclose(density, np.histogram(only.s.numpy(), edges, density=True)[0])
    np.testing.assert_array_equal(line(means["query"], "mean of all")[1], only.right.local_mean.numpy())
    for name, why in ((QUERY, "NaN"), ("encoder.layer.0.attention.self.key", "zero")):
        with pytest.raises(plots.NothingToDrawError, match=why):
            plots.spectrum(report, name)
    with pytest.raises(plots.NothingToDrawError, match="NaN"):
        plots.draw_all(report, tmp_path, QUERY)


def test_a_report_with_nothing_to_draw_gives_no_files(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with torch.no_grad():
        layer[0].weight.fill_(math.inf)
    report = RMTAnalyzer(layer).analyze(progress=False)
    assert plots.draw_all(report, tmp_path / "new") == []
    assert (tmp_path / "new").is_dir()


def test_short_vectors_have_no_figure(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    report = RMTAnalyzer(model).analyze(progress=False)
    keys = "layers.0.self_attn.k_proj"  # 16 x 64: the left vectors are too short to be tested
    with pytest.raises(plots.NothingToDrawError, match="fewer than 32"):
        plots.vector_test(report, keys, "left")
    assert "key" not in panels(plots.local_means_by_role(report, "left"))
    assert "key" in panels(plots.local_means_by_role(report, "right"))
    with pytest.raises(ValueError, match="right, left"):
        plots.vector_test(report, keys, "both")


def test_a_report_read_from_disk_gives_the_same_figures(controlled, tmp_path, drawn):
    def data():
        plots.draw_all(loaded if drawn else controlled, tmp_path)
        lines = [line for stem in sorted(drawn) for axes in drawn[stem].axes for line in axes.get_lines()]
        return [np.asarray(line.get_ydata()).tolist() for line in lines]

    controlled.save(tmp_path / "report")
    loaded = type(controlled).load(tmp_path / "report")
    first, second = data(), data()
    assert len(first) > 30 and first == second


def test_nothing_is_left_in_pyplot_and_no_setting_is_changed(report, tmp_path, drawn):
    import matplotlib.pyplot

    settings = dict(matplotlib.rcParams)
    plots.draw_all(report, tmp_path)
    drawn[ALL[2]].savefig(tmp_path / "figure.png")
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


def test_matplotlib_is_imported_only_to_draw_and_its_absence_explained():
    code = """
import sys
sys.modules["matplotlib"] = None
sys.modules["matplotlib.figure"] = None
from hf_rmt.reports import drawing, plots
try:
    drawing.new_figure(1, 1)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "hf_rmt[plots]"' in done.stdout
