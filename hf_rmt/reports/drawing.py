"""How a figure of the report is drawn: histograms, laws, tests, panels, labels, files.

Figures are made without ``pyplot``: nothing is shown, kept open or changed for the caller, and
threads may draw at the same time. Colours are those of Okabe & Ito, which the colour-blind can tell
apart; fills, widths and dashes tell them apart in grey print.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_rmt.theory.covariance import NULL_LEVEL
from hf_rmt.theory.ks_null import KSNull, MonteCarloNull
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur
from hf_rmt.theory.singular_vectors import VectorTest, local_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Style = dict[str, Any]

BLUE, _SKY, _VERMILLION, ORANGE, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#777777"
SINGULAR_VALUE = r"singular value $\nu$"
OVERLAP = r"overlap $O_k$"
MEAN_P = r"local mean $p_\mathrm{avg}$"
_DASHES = (0, (4, 1))
_SMALL, TITLE_SIZE = 8, 9
#: Full width of a page of text, in inches: what is drawn is not scaled down in print.
PAGE = 7.2
_COLUMNS = 3
#: Singular values are shown up to this many widths of the bulk beyond its edges.
_REACH = 5
_MOST_BINS = 500
#: More dots than this are a bitmap in a PDF, which would be slow to open.
_MANY = 20_000
#: Neighbours on each side in a mean of overlaps: more would flatten the few outliers of a spectrum.
_HALF_RUN = 2
#: Entries of a vector are shown up to this many standard deviations.
_MAX_DEVIATIONS = 6
#: The null distribution of ``sqrt(n) D`` is drawn up to here; p is about 1e-5 there.
_NULL_END = 2.5


def draw_spectrum(axes: Axes, law: MarchenkoPastur, samples: dict[str, torch.Tensor]) -> None:
    """Histograms of singular values: the first sample filled, one to compare it with as an outline."""
    left, right = shown = _shown_range(law, torch.cat(list(samples.values())))
    filled: _Style = {"fill": True, "color": BLUE, "alpha": 0.5}
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


def draw_law(axes: Axes, law: MarchenkoPastur, label: str) -> None:
    """The density of the law, dashed."""
    nu = torch.linspace(law.lower_edge, law.upper_edge, 500, dtype=torch.float64)
    axes.plot(nu.numpy(), law.density(nu).numpy(), color="black", linestyle="--", linewidth=1.3, label=label)


def draw_edges(axes: Axes, law: MarchenkoPastur, s: torch.Tensor) -> None:
    """The edges of the law, and a tick for each value beyond them: a bin of one is hardly to be seen."""
    for edge, label in ((law.lower_edge, "_"), (law.upper_edge, "edges of the law")):
        axes.axvline(edge, color=_GREY, linestyle=":", linewidth=1.2, label=label)
    outside = s[(s < law.lower_edge) | (s > law.upper_edge)]
    if len(outside):
        low = np.full(len(outside), 0.03)  # of the height of the axes
        mark: _Style = {"color": BLUE, "marker": "|", "markersize": 7, "linestyle": "none"}
        axes.plot(outside.numpy(), low, transform=axes.get_xaxis_transform(), label="values beyond the edges", **mark)


def draw_entries(axes: Axes, test: VectorTest) -> None:
    """The distribution of the entries of the least random vector, and its density in an inset."""
    entries, n = np.sort(test.extreme_vector.double().numpy()), test.entries
    reach = min(max(float(np.abs(entries).max()) * math.sqrt(n), 3.5), _MAX_DEVIATIONS) / math.sqrt(n)
    x = torch.linspace(-reach, reach, 301, dtype=torch.float64)
    cdf, pdf = 0.5 + 0.5 * torch.erf(math.sqrt(n / 2) * x), math.sqrt(n / math.tau) * (-n * x**2 / 2).exp()
    gaussian: _Style = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    ends = min(-reach, entries[0]), max(reach, entries[-1])  # the cdf is 0 and 1 up to the borders
    steps = np.concatenate([[0.0], np.arange(1, n + 1) / n, [1.0]])
    padded = np.concatenate([ends[:1], entries, ends[1:]])
    axes.step(padded, steps, where="post", color=BLUE, linewidth=1.5, label="entries")
    axes.plot(x.numpy(), cdf.numpy(), label="Gaussian, variance $1/n$", **gaussian)
    axes.set_xlim(-reach, reach)
    # The corner that the curve leaves free: it can pass only one of the two.
    right = bool((entries < -0.1 * reach).mean() > 0.45)
    inset = axes.inset_axes((0.6, 0.08, 0.36, 0.4) if right else (0.04, 0.5, 0.36, 0.4))
    counts, edges = np.histogram(entries, np.linspace(-reach, reach, 31))
    inset.stairs(counts / n / np.diff(edges), edges, fill=True, color=BLUE, alpha=0.5)
    inset.plot(x.numpy(), pdf.numpy(), **gaussian)
    inset.set(xlim=(-reach, reach), xticks=[], yticks=[])
    inset.set_title("pdf", fontsize=_SMALL, pad=3)
    beyond = int((np.abs(entries) > reach).sum())
    note = f" (not shown: {beyond})" if beyond else ""
    set_labels(axes, f"(a) entries of vector {test.extreme_index}{note}", "entry $v_i$", "cdf $C(v_i)$")
    legend_under(axes, 2)


def draw_null(axes: Axes, test: VectorTest, null: KSNull | MonteCarloNull) -> None:
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
    set_labels(
        axes, f"(b) $D$ = {observed:.3g}, $p {relation} {_power_of_ten(p)}$", "KS statistic $D$", "density $P(D_c)$"
    )
    legend_under(axes, 2)


def draw_local_means(axes: Axes, test: VectorTest, control: VectorTest | None) -> None:
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
    axes.plot(mean.numpy(), color=BLUE, linewidth=1.5, label="vectors")
    axes.axhline(test.plateau, color="black", linestyle="--", linewidth=1.0, label="plateau (median)")
    axes.set(xlim=(0, max(len(mean) - 1, 1)), ylim=(0, 1))
    set_labels(axes, "(c) local means of the p-values", "index $j$", MEAN_P)
    legend_under(axes, 4)


def draw_red_edges(axes: Axes, law: MarchenkoPastur) -> None:
    """The edges of the law in the panels of overlaps: dashed red, as in the paper."""
    for edge, label in ((law.lower_edge, "_"), (law.upper_edge, "edges of the law")):
        axes.axvline(edge, color=_VERMILLION, linestyle=_DASHES, linewidth=1.2, label=label)


def draw_p_values(axes: Axes, s: torch.Tensor, test: VectorTest | None) -> None:
    """Local means of the p-values over the singular value, or a note that there are none."""
    axes.set_ylim(0, 1)
    if test is None:
        axes.text(0.5, 0.5, "not tested", transform=axes.transAxes, ha="center", fontsize=_SMALL)
        return
    _dots(axes, s, test.local_mean, label="local mean of 15 vectors", markersize=3.5)
    axes.axhline(test.plateau, color="black", linestyle="--", linewidth=1.0, label="plateau (median)")


def draw_overlaps(axes: Axes, s: torch.Tensor, values: torch.Tensor) -> None:
    """A dot for each vector of one matrix: its overlap over its singular value."""
    _dots(axes, s, values, label="one vector", markersize=4.5)


def draw_mean_overlaps(axes: Axes, s: torch.Tensor, values: torch.Tensor) -> None:
    """Overlaps of the vectors of several matrices over their singular values, and their local mean.

    Args:
        axes: where.
        s, values: ``(matrices, p)``. The mean is that of each position over the matrices, and of its
            neighbours.
    """
    _dots(axes, s.flatten(), values.flatten(), label="one vector", markersize=3, alpha=0.4)
    mean = local_mean(values.nanmean(dim=0), _HALF_RUN)[0]
    axes.plot(s.mean(dim=0).numpy(), mean.numpy(), color="black", linewidth=1.3, label="local mean of all blocks")


def _dots(axes: Axes, x: torch.Tensor, y: torch.Tensor, **style: Any) -> None:
    own: _Style = {"color": BLUE, "marker": ".", "markeredgewidth": 0, "linestyle": "none"}
    axes.plot(x.numpy(), y.numpy(), rasterized=len(x) > _MANY, **own, **style)


def draw_null_overlap(axes: Axes, quantile: float, median: float | None = None) -> None:
    """The overlap that random vectors stay below, and the one that half of them do."""
    label = f"{100 * NULL_LEVEL:g} % of random vectors below"
    axes.axhline(quantile, color=ORANGE, linestyle="-", linewidth=1.4, label=label)
    if median is not None:
        axes.axhline(median, color=ORANGE, linestyle=":", linewidth=1.4, label="median of random vectors")


def draw_eigenvalues(axes: Axes, spectra: list[torch.Tensor], colours: list[Any]) -> None:
    """Eigenvalues in descending order, both axes on a log scale, with rings around the largest."""
    for values, colour in zip(spectra, colours, strict=True):
        axes.loglog(np.arange(1, len(values) + 1), values.numpy(), color=colour, linewidth=1.1)
    largest = [float(values[0]) for values in spectra]
    rings: _Style = {"s": 22, "facecolors": "none", "edgecolors": colours, "zorder": 3}
    axes.scatter(np.ones(len(largest)), largest, label="largest eigenvalue of a block", **rings)


def block_colours(figure: Figure, panels: list[Axes], blocks: list[int]) -> dict[int, Any]:
    """A colour for each block, dark to light, with a bar that explains them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = colormaps["viridis"](np.linspace(0, 0.88, len(blocks)))  # the last shades vanish on white paper
    middle = np.arange(len(blocks))
    mappable = ScalarMappable(BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, len(blocks)), ListedColormap(shades))
    bar = figure.colorbar(mappable, ax=panels, ticks=middle[:: math.ceil(len(blocks) / 12)], aspect=40, pad=0.02)
    bar.ax.set_yticklabels([str(blocks[i]) for i in middle[:: math.ceil(len(blocks) / 12)]])
    bar.ax.tick_params(labelsize=_SMALL)
    bar.set_label("block", fontsize=TITLE_SIZE)
    return dict(zip(blocks, shades, strict=True))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; says what to install where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "hf_rmt[plots]"') from error
    return Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.08))


def panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows of three."""
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(max(PAGE * columns / _COLUMNS, 4.8), 2.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def pair_grid(count: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure of pairs of panels in rows of three: one above the other with the same x axis; the lower
    ones have one y axis."""
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(max(PAGE * columns / _COLUMNS, 4.8), 3.4 * rows + 0.8)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    pairs = [(grid[2 * row, column], grid[2 * row + 1, column]) for row in range(rows) for column in range(columns)]
    for upper, lower in pairs[:count]:
        lower.sharex(upper)
        if lower is not pairs[0][1]:
            lower.sharey(pairs[0][1])
        upper.tick_params(labelbottom=False)
    for upper, lower in pairs[count:]:
        upper.remove()
        lower.remove()
    return figure, pairs[:count]


def label_pairs(figure: Figure, pairs: list[tuple[Axes, Axes]], x: str, y: tuple[str, str]) -> None:
    """Axis labels at the left and under each pair, and one legend for all."""
    for i, pair in enumerate(pairs):
        for axes, label in zip(pair, y, strict=True):
            axes.set_ylabel(label if i % _COLUMNS == 0 else "", fontsize=TITLE_SIZE)
            axes.tick_params(labelsize=_SMALL)
        pair[1].set_xlabel(x if i + _COLUMNS >= len(pairs) else "", fontsize=TITLE_SIZE)
    found = {
        label: handle for axes in pairs[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found, loc="outside lower center", ncols=3, fontsize=_SMALL, frameon=False)


def label_panels(figure: Figure, panels: list[Axes], x: str, y: str) -> None:
    """Axis labels at the left and at the bottom of the panels only, and one legend for all."""
    for i, axes in enumerate(panels):
        axes.set_ylabel(y if i % _COLUMNS == 0 else "", fontsize=TITLE_SIZE)
        axes.set_xlabel(x if i + _COLUMNS >= len(panels) else "", fontsize=TITLE_SIZE)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=_SMALL, frameon=False)


def set_labels(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title and axis labels in the sizes of all figures."""
    axes.set_title(title, fontsize=TITLE_SIZE)
    axes.set_xlabel(x, fontsize=TITLE_SIZE)
    axes.set_ylabel(y, fontsize=TITLE_SIZE)
    axes.tick_params(labelsize=_SMALL)


def _power_of_ten(x: float) -> str:
    """A small number for a formula."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{x:.2g}" if x >= 1e-3 else rf"{mantissa} \times 10^{{{int(exponent)}}}"


def legend_under(axes: Axes, columns: int) -> None:
    """A legend below the label of the x axis, where it cannot cover anything."""
    from matplotlib.transforms import ScaledTranslation

    assert axes.figure is not None
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)
    place: _Style = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    axes.legend(**place, ncols=columns, fontsize=_SMALL, frameon=False, columnspacing=1.2, handlelength=1.8)


def note_below(axes: Axes, text: str) -> None:
    """A remark in the corner that falling curves leave free."""
    axes.text(0.04, 0.05, text, transform=axes.transAxes, ha="left", va="bottom", fontsize=_SMALL)


def _note(axes: Axes, text: str) -> None:
    """A remark on what lies beyond the right border, in the corner that densities leave free."""
    axes.text(0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", fontsize=_SMALL)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF and return the files."""
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    figure.savefig(png, dpi=150)
    figure.set_layout_engine("none")  # it stays as it is now, which saves half the time
    figure.savefig(pdf, metadata={"CreationDate": None})  # the same report gives the same file
    return [png, pdf]
