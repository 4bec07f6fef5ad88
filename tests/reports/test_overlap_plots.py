"""The figures of overlaps show the numbers of the report: everything is read back from the artists drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch
from transformers import BertConfig, BertModel

from hf_rmt import AnalysisReport, MarchenkoPastur, RMTAnalyzer
from hf_rmt.reports import drawing, overlap_plots, plots
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments, null_quantile
from hf_rmt.theory.singular_vectors import local_mean

QUERY = "encoder.layer.0.attention.self.query"
INTERMEDIATE = "encoder.layer.1.intermediate.dense"
ROLES = ["query", "key", "value", "attention.output", "intermediate", "output"]
NEW = ["fig05_overlap", "fig06_overlaps_by_role", "fig13_activation_spectra"]
TOKENS = 1234


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight[:, 7] *= 20
            layer.intermediate.dense.weight[:, 7] *= 0.01
    return model


def activations(n: int, seed: int, tokens: int = TOKENS) -> torch.Tensor:
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 10
    return x + 1


def covariances_of(model: BertModel, tokens: int = TOKENS, outputs: bool = False) -> ActivationCovariances:
    """Activations that vary most along one feature; query, key and value share theirs."""
    sums, inputs, outs = {}, {}, {}
    for seed, matrix in enumerate(RMTAnalyzer(model).matrices):
        key = matrix.name.replace(".self.key", ".self.query").replace(".self.value", ".self.query")
        inputs[matrix.name] = key
        if key not in sums:
            sums[key] = Moments.of(activations(matrix.shape[1], seed, tokens))
        if outputs:
            outs[matrix.name] = f"{matrix.name}.out"
            sums[f"{matrix.name}.out"] = Moments.of(activations(matrix.shape[0], seed + 100, tokens))
    return ActivationCovariances(sums, inputs, outs, {"tokens": tokens}, {})


def analyse(covariances: ActivationCovariances, model: BertModel | None = None, **options: Any) -> AnalysisReport:
    model = bert() if model is None else model
    return RMTAnalyzer(model).analyze(covariances=covariances, workers=1, progress=False, **options)


@pytest.fixture(scope="module")
def report() -> AnalysisReport:
    return analyse(covariances_of(bert(), outputs=True))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures that ``draw_all`` would have written, by name of the file."""
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save", lambda figure, stem: figures.update({stem.name: figure}) or [stem])
    return figures


def line(axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Data of the one line whose legend begins with ``label``."""
    (found,) = [line for line in axes.get_lines() if str(line.get_label()).startswith(label)]
    return tuple(np.asarray(data) for data in found.get_data())


def red_edges(axes) -> list[float]:
    """Where the dashed red lines are."""
    vertical = [line for line in axes.get_lines() if line.get_color() == "#D55E00"]
    assert all(line.is_dashed() for line in vertical)
    return [line.get_xdata()[0] for line in vertical]


def pairs_of(figure) -> dict[str, tuple[Any, Any]]:
    """Upper and lower axes by the first line of the title."""
    axes = figure.axes
    columns = {round(a.get_position().x0, 3) for a in axes}
    assert len(axes) == 12 and len(columns) == 3
    rows = [axes[i : i + 3] for i in range(0, 12, 3)]
    return {
        upper.get_title().split("\n")[0]: (upper, lower)
        for above, below in ((rows[0], rows[1]), (rows[2], rows[3]))
        for upper, lower in zip(above, below, strict=True)
    }


# Figure 5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [QUERY, INTERMEDIATE])
def test_three_panels_over_the_singular_value(report: AnalysisReport, name: str, side: plots.Side) -> None:
    result, row = report[name], report[name].row
    figure = overlap_plots.overlap_of_matrix(report, name, side)
    spectrum, p_values, overlaps = figure.axes
    (patch,) = spectrum.patches
    density, edges, _ = patch.get_data()
    np.testing.assert_allclose(density, np.histogram(result.s.numpy(), edges, density=True)[0])
    nu, law = line(spectrum, "MP law")
    expected = MarchenkoPastur(row["rows"], row["cols"], row["sigma"])
    np.testing.assert_allclose(law, expected.density(torch.from_numpy(nu)).numpy())
    for axes, label, values in (
        (p_values, "local mean", getattr(result, side).local_mean),
        (overlaps, "one vector", getattr(result, f"{side}_overlap").values),
    ):
        x, y = line(axes, label)
        np.testing.assert_array_equal(x, result.s.numpy())
        np.testing.assert_array_equal(y, values.numpy())
    n = {"right": 64, "left": row["rows"]}[side]
    assert line(overlaps, "99 % of random vectors")[1][0] == pytest.approx(null_quantile(n, n, 0.99))
    assert line(p_values, "plateau")[1][0] == getattr(result, side).plateau


def test_the_regions_of_the_three_panels_line_up(report: AnalysisReport) -> None:
    row = report[INTERMEDIATE].row
    figure = overlap_plots.overlap_of_matrix(report, INTERMEDIATE)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    figure.axes[0].set_xlim(0.25, 0.75)
    for axes in figure.axes:
        assert axes.get_xlim() == (0.25, 0.75)
        assert red_edges(axes) == [row["lower_edge"], row["upper_edge"]]


def test_the_title_says_of_what_the_covariance_is(report: AnalysisReport) -> None:
    title = overlap_plots.overlap_of_matrix(report, QUERY).get_suptitle()
    assert QUERY in title and "right singular vectors" in title
    assert title.endswith("uncentred activation covariance of 1,234 tokens")
    centred = analyse(covariances_of(bert()).with_centring())
    for figure in (
        overlap_plots.overlap_of_matrix(centred, QUERY),
        overlap_plots.overlaps_by_role(centred),
        overlap_plots.activation_spectra(centred),
    ):
        assert " centred activation covariance" in figure.get_suptitle().replace("\n", " ")


def test_the_vector_that_the_data_uses_lies_over_the_line(report: AnalysisReport) -> None:
    _, _, overlaps = overlap_plots.overlap_of_matrix(report, QUERY).axes
    s, values = line(overlaps, "one vector")
    level, edge = line(overlaps, "99 % of random vectors")[1][0], max(red_edges(overlaps))
    assert s[0] > edge and values[0] > 0.9 > level
    assert np.mean(values[s < edge] < level) > 0.9


def test_untested_vectors_leave_the_panel_of_p_values_empty() -> None:
    report = analyse(covariances_of(bert(), outputs=True), sides="right")
    _, p_values, overlaps = overlap_plots.overlap_of_matrix(report, QUERY, "left").axes
    assert [text.get_text() for text in p_values.texts] == ["not tested"]
    assert not any(str(found.get_label()).startswith("local mean") for found in p_values.get_lines())
    np.testing.assert_array_equal(line(overlaps, "one vector")[1], report[QUERY].left_overlap.values.numpy())


def test_what_cannot_be_shown_is_said() -> None:
    model = bert()
    with torch.no_grad():
        model.get_submodule(QUERY).weight.zero_()
    report = analyse(covariances_of(model), model)
    with pytest.raises(plots.NothingToDrawError, match=rf"{QUERY} has no overlaps of right.*all entries are zero"):
        overlap_plots.overlap_of_matrix(report, QUERY)
    with pytest.raises(plots.NothingToDrawError, match="left singular vectors to show: no covariance"):
        overlap_plots.overlap_of_matrix(report, INTERMEDIATE, "left")
    with pytest.raises(ValueError, match="right, left"):
        overlap_plots.overlap_of_matrix(report, INTERMEDIATE, "both")
    for draw in (overlap_plots.overlaps_by_role, overlap_plots.activation_spectra):
        with pytest.raises(plots.NothingToDrawError):
            draw(report, "left")


# Figure 6


def test_every_role_has_its_spectrum_above_its_overlaps(report: AnalysisReport) -> None:
    figure = overlap_plots.overlaps_by_role(report)
    figure.draw_without_rendering()
    pairs = pairs_of(figure)
    assert list(pairs) == ROLES
    for role, (above, below) in pairs.items():
        results = [result for result in report.values() if result.row["role"] == role]
        s = torch.stack([result.s for result in results]).numpy()
        values = torch.stack([result.right_overlap.values for result in results])
        (patch,) = [patch for patch in above.patches if isinstance(patch, StepPatch)]
        density, edges, _ = patch.get_data()
        np.testing.assert_allclose(density, np.histogram(s.ravel(), edges, density=True)[0])
        x, y = line(below, "one vector")
        np.testing.assert_array_equal(x, s.ravel())
        np.testing.assert_array_equal(y, values.numpy().ravel())
        x, y = line(below, "local mean")
        np.testing.assert_allclose(x, s.mean(0))
        np.testing.assert_allclose(y, local_mean(values.mean(0), 2)[0].numpy())
        row = results[0].row
        law = MarchenkoPastur(row["rows"], row["cols"], np.mean([result.row["sigma"] for result in results]))
        assert red_edges(above) == red_edges(below) == pytest.approx([law.lower_edge, law.upper_edge])
        assert above.get_xlim() == below.get_xlim() and below.get_position().y1 < above.get_position().y0
        for label, level in (("99 %", 0.99), ("median", 0.5)):
            drawn_at = line(below, label)[1][0]
            assert drawn_at == pytest.approx(null_quantile(row["cols"], row["cols"], level))
        assert "2 blocks" in above.get_title()


def test_overlaps_of_all_roles_have_one_scale(report: AnalysisReport) -> None:
    pairs = pairs_of(overlap_plots.overlaps_by_role(report, "left"))
    limits = {below.get_ylim() for _, below in pairs.values()}
    (limit,) = limits
    largest = max(float(result.left_overlap.values.max()) for result in report.values() if result.row["role"] in ROLES)
    assert limit[0] == 0 and limit[1] >= largest


def test_levels_of_random_vectors_are_means_over_blocks_of_different_rank() -> None:
    covariances = covariances_of(bert())
    few = Moments.of(activations(64, 5, tokens=10))
    sums = {covariances.key(name): covariances[name] for name in covariances} | {QUERY: few}
    inputs = {name: covariances.key(name) for name in covariances}
    report = analyse(ActivationCovariances(sums, inputs, {}, {}, {}))
    figure = overlap_plots.overlaps_by_role(report)
    _, below = pairs_of(figure)["key"]
    expected = (null_quantile(64, 10, 0.99) + null_quantile(64, 64, 0.99)) / 2
    assert line(below, "99 %")[1][0] == pytest.approx(expected)
    assert "covariance of 10 to 1,234 tokens" in figure.get_suptitle()


def test_arbitrary_vectors_are_left_out_of_the_mean() -> None:
    model = bert()
    with torch.no_grad():
        weight = model.get_submodule(QUERY).weight
        weight[:] = torch.cat([weight[:40], torch.zeros(24, 64)])
    report = analyse(covariances_of(model), model)
    first, second = (report[name].right_overlap.values for name in (QUERY, QUERY.replace("layer.0", "layer.1")))
    assert int(first.isnan().sum()) == 24
    _, mean = line(pairs_of(overlap_plots.overlaps_by_role(report))["query"][1], "local mean")
    np.testing.assert_allclose(mean[-1], second[-3:].mean())
    np.testing.assert_allclose(mean[0], (first[:3] + second[:3]).mean() / 2)


# Figure 13


def test_eigenvalues_by_role_with_a_line_for_each_block(report: AnalysisReport) -> None:
    *panels, bar = overlap_plots.activation_spectra(report).axes
    titles = [axes.get_title() for axes in panels]
    assert titles == [
        "query, key, value\n64 features",
        "attention.output\n64 features",
        "intermediate\n64 features",
        "output\n128 features",
    ]
    for axes, role in zip(panels, ["value", "attention.output", "intermediate", "output"], strict=True):
        results = [result for result in report.values() if result.row["role"] == role]
        spectra = [result.right_overlap.eigenvalues.numpy() for result in results]
        lines = axes.get_lines()
        assert len(lines) == 2 and not np.array_equal(lines[0].get_color(), lines[1].get_color())
        for found, values in zip(lines, spectra, strict=True):
            np.testing.assert_array_equal(found.get_xdata(), np.arange(1, len(values) + 1))
            np.testing.assert_array_equal(found.get_ydata(), values)
        (rings,) = axes.collections
        np.testing.assert_array_equal(rings.get_offsets(), [[1, values[0]] for values in spectra])
        assert axes.get_xscale() == axes.get_yscale() == "log"
        low, high = sorted(100 * values[0] / values.sum() for values in spectra)
        share = f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
        assert [text.get_text() for text in axes.texts] == [f"largest: {share} %\nof the sum"]
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert bar.get_ylabel() == "block" and [label.get_text() for label in bar.get_yticklabels()] == ["0", "1"]


def test_outputs_have_a_panel_each(report: AnalysisReport) -> None:
    figure = overlap_plots.activation_spectra(report, "left")
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:-1]] == ROLES
    assert figure.get_suptitle().startswith("outputs of the matrices, uncentred")


def test_eigenvalues_beyond_the_rank_are_left_out() -> None:
    report = analyse(covariances_of(bert(), tokens=20))
    for axes in overlap_plots.activation_spectra(report).axes[:-1]:
        assert [len(found.get_xdata()) for found in axes.get_lines()] == [20, 20]


# Everything


def test_a_report_with_overlaps_draws_them_too(report: AnalysisReport, tmp_path: Path, drawn: dict[str, Any]) -> None:
    plots.draw_all(report, tmp_path)
    assert [stem for stem in sorted(drawn) if stem in NEW] == NEW and len(drawn) == 7
    assert QUERY in drawn[NEW[0]].get_suptitle()
    plots.draw_all(report, tmp_path, INTERMEDIATE)
    assert INTERMEDIATE in drawn[NEW[0]].get_suptitle()
    assert all("right" in drawn[stem].get_suptitle() for stem in NEW[:2])


def test_a_report_without_overlaps_has_no_such_figures(tmp_path: Path, drawn: dict[str, Any]) -> None:
    plots.draw_all(RMTAnalyzer(bert()).analyze(workers=1, progress=False), tmp_path)
    assert len(drawn) == 4 and not drawn.keys() & set(NEW)


def test_left_overlaps_are_drawn_where_there_are_only_these(tmp_path: Path, drawn: dict[str, Any]) -> None:
    covariances = covariances_of(bert(), outputs=True)
    outputs = {name: covariances.key(name, output=True) for name in covariances}
    sums = {key: covariances.output(name) for name, key in outputs.items()}
    plots.draw_all(analyse(ActivationCovariances(sums, {}, outputs, {"silent": list(outputs)}, {})), tmp_path)
    assert set(NEW) <= drawn.keys() and all("left" in drawn[stem].get_suptitle() for stem in NEW[:2])


def test_activations_of_zeros_give_no_figure(tmp_path: Path, drawn: dict[str, Any]) -> None:
    covariances = covariances_of(bert())
    nothing = {name: Moments.of(torch.zeros(9, len(covariances[name].total))) for name in covariances}
    plots.draw_all(analyse(ActivationCovariances(nothing, {n: n for n in nothing}, {}, {}, {})), tmp_path)
    assert len(drawn) == 4 and not drawn.keys() & set(NEW)


def test_a_report_read_from_disk_gives_the_same_files(report: AnalysisReport, tmp_path: Path) -> None:
    loaded = AnalysisReport.load(report.save(tmp_path / "report"))
    draw = overlap_plots.activation_spectra
    first, second = (drawing.save(draw(r), tmp_path / name) for r, name in ((report, "a"), (loaded, "b")))
    for mine, theirs in zip(first, second, strict=True):
        assert mine.read_bytes() == theirs.read_bytes() and mine.stat().st_size > 5000

    def numbers(r: AnalysisReport) -> list[list[float]]:
        figures = (overlap_plots.overlap_of_matrix(r, QUERY), overlap_plots.overlaps_by_role(r, "left"))
        return [found.get_ydata() for figure in figures for axes in figure.axes for found in axes.get_lines()]

    assert len(numbers(report)) > 50
    for mine, theirs in zip(numbers(report), numbers(loaded), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_many_blocks_have_as_many_colours_and_few_labels() -> None:
    figure = drawing.new_figure(5, 3)
    colours = drawing.block_colours(figure, [figure.add_subplot()], list(range(3, 83)))
    assert list(colours) == list(range(3, 83)) and len({tuple(colour) for colour in colours.values()}) == 80
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in colours.values()]
    assert luminance == sorted(luminance) and luminance[-1] < 0.85  # told apart in grey, and seen on white
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels[:2] == ["3", "10"] and len(labels) <= 12
