"""Pictures of an ``AnalysisReport`` in the style of the paper.

Figures are made without ``pyplot``: nothing is shown, kept open or changed for the caller, and
threads may draw at the same time. Colours are those of Okabe & Ito, which the colour-blind can tell
apart; fills, widths and dashes tell them apart in grey print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hf_rmt.theory.controls import seed_for
from hf_rmt.theory.decomposition import singular_values
from hf_rmt.theory.ks_null import KSNull, MonteCarloNull, shipped_null
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur
from hf_rmt.theory.singular_vectors import VectorTest, local_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.result import MatrixResult, Spectrum

Side = Literal["right", "left"]
_Style = dict[str, Any]
_SIDES: tuple[Side, Side] = ("right", "left")

_BLUE, _SKY, _VERMILLION, _ORANGE, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#777777"
_MEAN_P = r"local mean $p_\mathrm{avg}$"
_DASHES = (0, (4, 1))
_SMALL, _NORMAL = 8, 9
#: Full width of a page of text, in inches: what is drawn is not scaled down in print.
_PAGE = 7.2
_COLUMNS = 3
#: Singular values are shown up to this many widths of the bulk beyond its edges.
_REACH = 5
_MOST_BINS = 500
#: Entries of a vector are shown up to this many standard deviations.
_MAX_DEVIATIONS = 6
#: The null distribution of ``sqrt(n) D`` is drawn up to here; p is about 1e-5 there.
_NULL_END = 2.5


class NothingToDrawError(ValueError):
    """The report lacks what a figure shows; the message says what."""


def spectrum(report: AnalysisReport, name: str) -> Figure:
    """Singular values of one matrix, of a control, and the Marchenko-Pastur law (paper Fig. 1).

    The control is the report's; where it has none, a Gaussian matrix with the sigma of the law,
    which is factored here. Dotted lines are the edges of the law, ticks at the bottom the single
    values beyond them. Values very far out are not shown but counted in a note.

    Raises:
        NothingToDrawError: (a ValueError) the matrix has no spectrum, or no law as its sigma is 0.
    """
    result = report[name]
    if not _has_law(result):
        raise NothingToDrawError(f"{result.name} has no spectrum to hold against a law: {_why_empty(result)}")
    law = _law_of([result])
    control, label = _control_spectrum(report, result, law)
    figure = _new_figure(5.4, 3.9)
    axes = figure.add_subplot()
    _draw_spectrum(axes, law, {"singular values": result.s, label: control})
    _draw_law(axes, law, f"MP law, $\\sigma$ = {law.sigma:.3g} ({result.row['sigma_rule']})")
    _draw_edges(axes, law, result.s)
    _label(axes, _title_of(result), r"singular value $\nu$", r"density $P(\nu)$")
    _legend_under(axes, 2)
    return figure


def spectra_by_role(report: AnalysisReport) -> Figure:
    """Spectra averaged over all blocks, one panel a role, with the law for the mean sigma (paper Fig. 2 and 10).

    A role whose matrices differ in shape between blocks has a panel for each shape.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has a spectrum and a law.
    """
    groups = _groups(report, _has_law)
    figure, panels = _panels(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        law = _law_of(group.results)
        pooled = torch.cat([result.s for result in group.results])
        _draw_spectrum(axes, law, {"singular values of all blocks": pooled})
        _draw_law(axes, law, r"MP law for the mean $\sigma$")
        _label(axes, f"{group.title}, {group.blocks_in_words}")
    _label_outside(figure, panels, r"singular value $\nu$", r"density $P(\nu)$")
    return figure


def vector_test(report: AnalysisReport, name: str, side: Side = "right") -> Figure:
    """The test of the singular vectors of one matrix (paper Fig. 3).

    (a) Entries of its least random vector against the Gaussian; entries beyond six standard
    deviations are counted in a note. (b) The null distribution of the statistic D, and the D of that
    vector. (c) Local means of the p-values of all vectors, against a control or, where the report has
    none, against the range that holds 95 % of the local means of random vectors.

    Raises:
        NothingToDrawError: (a ValueError) the report has no p-values of this side of the matrix.
    """
    result = report[name]
    test = _test_of(result, side)
    if test is None:
        why = f"sides was {report.settings.get('sides')!r}" if getattr(result, side) is None else result.row["note"]
        raise NothingToDrawError(f"{result.name} has no p-values of {side} singular vectors: {why}")
    figure = _new_figure(_PAGE, 5.8)
    axes = figure.subplot_mosaic([["entries", "null"], ["means", "means"]], height_ratios=(1.2, 1))
    figure.suptitle(f"{_title_of(result)}, {side} singular vectors", fontsize=_NORMAL + 1)
    _draw_entries(axes["entries"], test)
    _draw_null(axes["null"], test, _null_of(report))
    _draw_local_means(axes["means"], test, _test_of(result.control, side))
    return figure


def local_means_by_role(report: AnalysisReport, side: Side = "right") -> Figure:
    """Local means of the p-values, one panel a role: one block and the mean of all blocks (paper Fig. 4).

    The block is the middle one. The dashed line is the mean p-value of the controls, or one half where
    the report has none. Experts of a block are averaged like blocks; the block shown is its first.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has p-values of this side.
    """
    groups = _groups(report, lambda result: _test_of(result, side) is not None)
    figure, panels = _panels(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        middle = group.middle
        means = torch.stack([getattr(result, side).local_mean for result in group.results])
        axes.plot(means.nanmean(dim=0).numpy(), color=_ORANGE, linewidth=2.4, label="mean of all blocks")
        axes.plot(getattr(middle, side).local_mean.numpy(), color=_BLUE, linewidth=0.9, label="this block")
        level, label = _random_level(group.results, side)
        axes.axhline(level, color="black", linestyle="--", linewidth=1.0, label=label)
        axes.set(xlim=(0, max(len(middle.s) - 1, 1)), ylim=(0, 1))
        _label(axes, f"{group.title}, block {middle.row['block']}")
    _label_outside(figure, panels, f"index $j$ of {side} vectors", _MEAN_P)
    return figure


def draw_all(report: AnalysisReport, folder: Path, matrix: str | None = None) -> list[Path]:
    """Write all figures that the report has the numbers for, each as PNG and PDF.

    Vectors are right ones, left ones where only they were tested.

    Args:
        report: what to draw.
        folder: made if it does not exist.
        matrix: shown in Fig. 1 and 3; by default the first query, or else the first with a spectrum.

    Returns:
        The files written.

    Raises:
        KeyError: the report has no such matrix.
        NothingToDrawError: (a ValueError) the matrix asked for is empty.
    """
    drawings: dict[str, Callable[[], Figure]] = {"fig02_spectra_by_role": partial(spectra_by_role, report)}
    if (side := _tested_side(report.values())) is not None:
        drawings["fig04_local_means"] = partial(local_means_by_role, report, side)
    if (shown := _shown(report, matrix)) is not None:
        drawings["fig01_spectrum"] = partial(spectrum, report, shown.name)
        if (side := _tested_side([shown])) is not None:
            drawings["fig03_vector_test"] = partial(vector_test, report, shown.name, side)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem in sorted(drawings):
        try:
            figure = drawings[stem]()
        except NothingToDrawError:
            continue
        paths += _save(figure, folder / stem)
    return paths


# What to draw


@dataclass(frozen=True)
class _Group:
    """Matrices of one role and shape, in the order of their blocks."""

    title: str
    results: list[MatrixResult]

    @property
    def blocks(self) -> int:
        return len({result.row["block"] for result in self.results})

    @property
    def blocks_in_words(self) -> str:
        return "1 block" if self.blocks == 1 else f"{self.blocks} blocks"

    @property
    def middle(self) -> MatrixResult:
        """The first matrix of the middle block."""
        blocks = sorted({result.row["block"] for result in self.results})
        return next(result for result in self.results if result.row["block"] == blocks[len(blocks) // 2])


def _groups(report: AnalysisReport, wanted: Callable[[MatrixResult], bool]) -> list[_Group]:
    """The wanted matrices inside blocks by stack, role and shape."""
    found: dict[tuple[str, str, int, int], list[MatrixResult]] = {}
    for result in report.values():
        row = result.row
        if row["block"] is not None:
            # A role keeps its place in the model also where its first matrix is not wanted.
            results = found.setdefault((row["stack"] or "", row["role"], row["rows"], row["cols"]), [])
            results += [result] if wanted(result) else []
    groups = [_Group(_panel_title(*key), results) for key, results in found.items() if results]
    if not groups:
        raise NothingToDrawError("no matrix inside a block of this report has the numbers that this figure shows")
    return groups


def _panel_title(stack: str, role: str, rows: int, cols: int) -> str:
    name = f"{stack} {role}".strip()
    return f"{name if len(name) <= 34 else '…' + name[-33:]}\n{rows} $\\times$ {cols}"


def _title_of(result: MatrixResult) -> str:
    return f"{result.name} ({result.row['rows']} $\\times$ {result.row['cols']})"


def _has_law(result: MatrixResult) -> bool:
    """Whether there is a spectrum and a law: sigma is 0 where half of the singular values are."""
    return len(result.s) > 0 and result.row["sigma"] > 0


def _why_empty(result: MatrixResult) -> str:
    return result.row.get("note") or "its sigma is 0"


def _law_of(results: list[MatrixResult]) -> MarchenkoPastur:
    """The law of matrices of one shape, for the mean of their sigmas."""
    row = results[0].row
    return MarchenkoPastur(row["rows"], row["cols"], math.fsum(r.row["sigma"] for r in results) / len(results))


def _control_spectrum(report: AnalysisReport, result: MatrixResult, law: MarchenkoPastur) -> tuple[torch.Tensor, str]:
    """The stored control and what it is, or a Gaussian one."""
    if result.control is not None:
        return result.control.s, f"control ({report.settings.get('control') or 'random'})"
    generator = torch.Generator().manual_seed(seed_for(report.settings.get("seed", 0), result.name))
    return singular_values(torch.randn(law.rows, law.cols, generator=generator) * law.sigma), "control (gaussian)"


def _test_of(spectrum: Spectrum | None, side: Side) -> VectorTest | None:
    """The test of one side, if any vector was tested."""
    if side not in _SIDES:
        raise ValueError(f"side is {side!r}: give one of {', '.join(_SIDES)}")
    test: VectorTest | None = getattr(spectrum, side, None)
    return test if test is not None and test.extreme_index >= 0 else None


def _tested_side(results: Iterable[MatrixResult]) -> Side | None:
    results = list(results)
    return next((side for side in _SIDES if any(_test_of(result, side) for result in results)), None)


def _shown(report: AnalysisReport, matrix: str | None) -> MatrixResult | None:
    """The matrix of the figures that show one."""
    if matrix is not None:
        if not len(report[matrix].s):
            raise NothingToDrawError(f"{matrix} has no spectrum: {_why_empty(report[matrix])}")
        return report[matrix]
    full = [result for result in report.values() if _has_law(result)]
    return next((result for result in full if result.row["role"] == "query"), full[0] if full else None)


def _null_of(report: AnalysisReport) -> KSNull | MonteCarloNull:
    """The null that the p-values of the report come from."""
    draws = report.settings.get("null_draws")
    return MonteCarloNull(draws, report.settings["seed"]) if draws else shipped_null()


def _random_level(results: list[MatrixResult], side: Side) -> tuple[float, str]:
    """Where the p-values of random matrices lie on average, and what that is called."""
    controls = [test.p_values for result in results if (test := _test_of(result.control, side)) is not None]
    if controls:
        return float(torch.cat(controls).nanmean()), "mean of the control"
    return 0.5, "random matrices, 0.5"


# Drawing


def _draw_spectrum(axes: Axes, law: MarchenkoPastur, samples: dict[str, torch.Tensor]) -> None:
    """Histograms of singular values: the first sample filled, one to compare it with as an outline."""
    left, right = shown = _shown_range(law, torch.cat(list(samples.values())))
    filled: _Style = {"fill": True, "color": _BLUE, "alpha": 0.5}
    outline: _Style = {"color": _VERMILLION, "linewidth": 1.2}
    for (label, s), style in zip(samples.items(), (filled, outline), strict=False):
        edges = _bins(law, s, shown)
        density, _ = np.histogram(s.numpy(), edges, density=True)
        axes.stairs(density, edges, label=label, **style)
    s = next(iter(samples.values()))
    beyond = int(((s < left) | (s > right)).sum())
    if beyond:
        _note(axes, f"{beyond} not shown,\nup to {float(s.max()):.3g} →")
    # No margin where a wide bin begins: its sliver would look like a bin of its own.
    margin = 0.0 if beyond else 0.02 * (right - left)
    axes.set_xlim(max(left - margin, 0.0), right + margin)


def _shown_range(law: MarchenkoPastur, values: torch.Tensor) -> tuple[float, float]:
    """The law and all values near it: outliers far out would squeeze the bulk into a line."""
    reach = _REACH * (law.upper_edge - law.lower_edge)
    near = values[(values >= law.lower_edge - reach) & (values <= law.upper_edge + reach)]
    low, high = torch.cat([near, near.new_tensor([law.lower_edge, law.upper_edge])]).aminmax()
    return float(low), float(high)


def _bins(law: MarchenkoPastur, s: torch.Tensor, shown: tuple[float, float]) -> np.ndarray:
    """Edges of bins that hold all values. Those out of the range shown share one wide bin a side, so
    that the density is that of all values."""
    left, right = shown
    low, high = min(float(s.min()), left), max(float(s.max()), right)
    # The width follows nine tenths of the values, as sigma may be far from theirs; but not beyond the law.
    spread = min(law.upper_edge - law.lower_edge, float(np.quantile(s, 0.95) - np.quantile(s, 0.05)))
    width = (spread or right - left) / min(max(math.sqrt(len(s)), 8), 40)
    edges = np.linspace(left, right, min(math.ceil((right - left) / width), _MOST_BINS) + 1)
    return np.concatenate([[low] * (low < left), edges, [high] * (high > right)])


def _draw_law(axes: Axes, law: MarchenkoPastur, label: str) -> None:
    nu = torch.linspace(law.lower_edge, law.upper_edge, 500, dtype=torch.float64)
    axes.plot(nu.numpy(), law.density(nu).numpy(), color="black", linestyle="--", linewidth=1.3, label=label)


def _draw_edges(axes: Axes, law: MarchenkoPastur, s: torch.Tensor) -> None:
    """The edges of the law, and a tick for each value beyond them: a bin of one is hardly to be seen."""
    for edge, label in ((law.lower_edge, "_"), (law.upper_edge, "edges of the law")):
        axes.axvline(edge, color=_GREY, linestyle=":", linewidth=1.2, label=label)
    outside = s[(s < law.lower_edge) | (s > law.upper_edge)]
    if len(outside):
        low = np.full(len(outside), 0.03)  # of the height of the axes
        mark: _Style = {"color": _BLUE, "marker": "|", "markersize": 7, "linestyle": "none"}
        axes.plot(outside.numpy(), low, transform=axes.get_xaxis_transform(), label="values beyond the edges", **mark)


def _draw_entries(axes: Axes, test: VectorTest) -> None:
    """The distribution of the entries of the least random vector, and its density in an inset."""
    entries, n = np.sort(test.extreme_vector.double().numpy()), test.entries
    reach = min(max(float(np.abs(entries).max()) * math.sqrt(n), 3.5), _MAX_DEVIATIONS) / math.sqrt(n)
    x = torch.linspace(-reach, reach, 301, dtype=torch.float64)
    cdf, pdf = 0.5 + 0.5 * torch.erf(math.sqrt(n / 2) * x), math.sqrt(n / math.tau) * (-n * x**2 / 2).exp()
    gaussian: _Style = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    ends = min(-reach, entries[0]), max(reach, entries[-1])  # the cdf is 0 and 1 up to the borders
    steps = np.concatenate([[0.0], np.arange(1, n + 1) / n, [1.0]])
    padded = np.concatenate([ends[:1], entries, ends[1:]])
    axes.step(padded, steps, where="post", color=_BLUE, linewidth=1.5, label="entries")
    axes.plot(x.numpy(), cdf.numpy(), label="Gaussian, variance $1/n$", **gaussian)
    axes.set_xlim(-reach, reach)
    # The corner that the curve leaves free: it can pass only one of the two.
    right = bool((entries < -0.1 * reach).mean() > 0.45)
    inset = axes.inset_axes((0.6, 0.08, 0.36, 0.4) if right else (0.04, 0.5, 0.36, 0.4))
    counts, edges = np.histogram(entries, np.linspace(-reach, reach, 31))
    inset.stairs(counts / n / np.diff(edges), edges, fill=True, color=_BLUE, alpha=0.5)
    inset.plot(x.numpy(), pdf.numpy(), **gaussian)
    inset.set(xlim=(-reach, reach), xticks=[], yticks=[])
    inset.set_title("pdf", fontsize=_SMALL, pad=3)
    beyond = int((np.abs(entries) > reach).sum())
    note = f" (not shown: {beyond})" if beyond else ""
    _label(axes, f"(a) entries of vector {test.extreme_index}{note}", "entry $v_i$", "cdf $C(v_i)$")
    _legend_under(axes, 2)


def _draw_null(axes: Axes, test: VectorTest, null: KSNull | MonteCarloNull) -> None:
    """The density of D under the null that gave the p-values, and the largest D of the matrix."""
    n, index = test.entries, test.extreme_index
    edges = torch.linspace(0, _NULL_END, 101, dtype=torch.float64) / math.sqrt(n)
    density = -null.p_value(edges, n).diff() / edges.diff()
    axes.stairs(density.numpy(), edges.numpy(), fill=True, color=_GREY, alpha=0.6, label="random vectors")
    end, observed, p = float(edges[-1]), float(test.statistic[index]), float(test.p_values[index])
    axes.set_xlim(0, min(max(end, 1.1 * observed), 4 * end))
    axes.set_ylim(bottom=0)
    if observed <= axes.get_xlim()[1]:
        axes.axvline(observed, color=_VERMILLION, linestyle="-.", linewidth=1.5, label=f"vector {index}")
    else:
        _note(axes, f"vector {index}: $D$ = {observed:.3g} →")
    relation = r"\leq" if p <= 1.001 * null.smallest_p else "="
    _label(axes, f"(b) $D$ = {observed:.3g}, $p {relation} {_power_of_ten(p)}$", "KS statistic $D$", "density $P(D_c)$")
    _legend_under(axes, 2)


def _draw_local_means(axes: Axes, test: VectorTest, control: VectorTest | None) -> None:
    """Local means of the p-values over the index, plain and centred, and those of random vectors."""
    mean, window = local_mean(test.p_values)
    if control is not None:
        axes.plot(control.local_mean.numpy(), color=_VERMILLION, linestyle=_DASHES, linewidth=1.1, label="control")
    else:
        half = 1.96 / (12 * window).sqrt()
        low, high = (0.5 - half).numpy(), (0.5 + half).numpy()
        axes.fill_between(np.arange(len(mean)), low, high, color=_GREY, alpha=0.3, label="95 % of random vectors")
    centred = local_mean(test.centred_p_values)[0]
    axes.plot(centred.numpy(), color=_SKY, linewidth=0.8, label="centred vectors")
    axes.plot(mean.numpy(), color=_BLUE, linewidth=1.5, label="vectors")
    axes.axhline(test.plateau, color="black", linestyle="--", linewidth=1.0, label="plateau (median)")
    axes.set(xlim=(0, max(len(mean) - 1, 1)), ylim=(0, 1))
    _label(axes, "(c) local means of the p-values", "index $j$", _MEAN_P)
    _legend_under(axes, 4)


# Figures, labels, files


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "hf_rmt[plots]"') from error
    return Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.08))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows of three."""
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = _new_figure(max(_PAGE * columns / _COLUMNS, 4.8), 2.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _label_outside(figure: Figure, panels: list[Axes], x: str, y: str) -> None:
    """Axis labels at the left and at the bottom of the panels only, and one legend for all."""
    for i, axes in enumerate(panels):
        axes.set_ylabel(y if i % _COLUMNS == 0 else "", fontsize=_NORMAL)
        axes.set_xlabel(x if i + _COLUMNS >= len(panels) else "", fontsize=_NORMAL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=_SMALL, frameon=False)


def _label(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=_NORMAL)
    axes.set_xlabel(x, fontsize=_NORMAL)
    axes.set_ylabel(y, fontsize=_NORMAL)
    axes.tick_params(labelsize=_SMALL)


def _power_of_ten(x: float) -> str:
    """A small number for a formula."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{x:.2g}" if x >= 1e-3 else rf"{mantissa} \times 10^{{{int(exponent)}}}"


def _legend_under(axes: Axes, columns: int) -> None:
    """A legend below the label of the x axis, where it cannot cover anything."""
    from matplotlib.transforms import ScaledTranslation

    assert axes.figure is not None
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)
    place: _Style = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    axes.legend(**place, ncols=columns, fontsize=_SMALL, frameon=False, columnspacing=1.2, handlelength=1.8)


def _note(axes: Axes, text: str) -> None:
    """A remark on what lies beyond the right border, in the corner that densities leave free."""
    axes.text(0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", fontsize=_SMALL)


def _save(figure: Figure, stem: Path) -> list[Path]:
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    figure.savefig(png, dpi=150)
    figure.set_layout_engine("none")  # it stays as it is now, which saves half the time
    figure.savefig(pdf, metadata={"CreationDate": None})  # the same report gives the same file
    return [png, pdf]
