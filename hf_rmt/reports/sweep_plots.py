"""Pictures of a ``SweepTable``: what became of a score, by decile, before and after fine-tuning, by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from hf_rmt.reports.drawing import (
    BLUE,
    MEAN_P,
    ORANGE,
    PAGE,
    label_panels,
    new_figure,
    panel_grid,
    save,
    set_labels,
)
from hf_rmt.reports.plots import NothingToDrawError
from hf_rmt.reports.sweep import decile_of, of_same_size
from hf_rmt.theory.singular_vectors import local_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from hf_rmt.reports.sweep import SweepTable

ORDERS = ("before", "after")
_GREY, _SMALL = "#777777", 7
#: Where the inset with the p-values is, as x, y, width and height in a panel whose scores fall.
_INSET = (0.34, 0.09, 0.44, 0.34)
#: The share of a panel's height that it takes.
_INSET_REACH = 0.55
#: A change so many times the median one leaves nothing to see of the others on a linear axis.
_FAR_OUT = 50
#: Blocks named under a panel.
_MOST_TICKS = 8
_CONTROL = "random components, as many"


def changes(table: SweepTable, metric: str | None = None) -> Figure:
    """The change of a score by what was removed, one panel a role (paper Fig. 7 and 11).

    Points are means over seeds, bars their standard errors; in grey what as many random components do. The
    inset shows the local means of the p-values of the right singular vectors over the index, and their median.

    Raises:
        NothingToDrawError: (a ValueError) nothing was removed from all blocks of a role at once.
        ValueError: no such metric.
    """
    summary = _over_all_blocks(table, metric)
    summary = summary[summary["order"] == ""]
    roles = list(dict.fromkeys(summary["role"]))
    if not roles:
        raise NothingToDrawError("this sweep removed nothing from all blocks of a role at once")
    figure, panels = panel_grid(len(roles))
    for axes, role in zip(panels, roles, strict=True):
        part = summary[summary["role"] == role]
        _draw_points(axes, part, "change")
        _fit_scale(axes, part["change"])
        axes.axhline(0, color="black", linestyle="--", linewidth=1.0, label="nothing removed")
        set_labels(axes, role)
        if role in table.profiles:
            _draw_profile(axes, table.profiles[role], part)
    label_panels(figure, panels, _removed_in_words(summary), f"change of {table.main_metric(metric)}")
    return figure


def before_and_after(table: SweepTable, metric: str | None = None) -> Figure:
    """The score where components were removed before fine-tuning and where they were removed after it, on the same
    axis; a row of panels a role (paper Fig. 8).

    Points are means over seeds, bars the standard errors of the change; the dashed line is the score with
    nothing removed.

    Raises:
        NothingToDrawError: (a ValueError) nothing was removed before, or nothing after fine-tuning.
        ValueError: no such metric.
    """
    summary = _over_all_blocks(table, metric)
    summary = summary[summary["order"].isin(ORDERS)]
    roles = list(dict.fromkeys(summary["role"]))
    if set(summary["order"]) != set(ORDERS):
        raise NothingToDrawError("this sweep did not remove both before and after fine-tuning")
    figure = new_figure(PAGE, 2.4 * len(roles) + 0.6)
    grid = figure.subplots(len(roles), 2, squeeze=False, sharey="row")
    for row, role in zip(grid, roles, strict=True):
        for axes, order in zip(row, ORDERS, strict=True):
            part = summary[(summary["order"] == order) & (summary["role"] == role)]
            _draw_levels(axes, table, part)
            _draw_points(axes, part, "score")
            where = "all matrices" if role == "all" else role
            set_labels(axes, f"{where}, removed {order} fine-tuning", _removed_in_words(summary))
        row[0].set_ylabel(table.main_metric(metric))
    handles, labels = grid[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=_SMALL + 1, frameon=False)
    return figure


def by_block(table: SweepTable, metric: str | None = None) -> Figure:
    """The change of a score for each role and block alone, one panel a selection; dots where it is decided.

    Raises:
        NothingToDrawError: (a ValueError) nothing was removed from single blocks.
        ValueError: no such metric.
    """
    summary = table.summary(metric)
    summary = summary[summary["block"].notna() & (summary["control"] == "")]
    panels_of = list(summary.groupby(["order", "selection"], sort=False))
    if not panels_of:
        raise NothingToDrawError("this sweep removed nothing from single blocks")
    figure, panels = panel_grid(len(panels_of))
    roles, blocks = list(dict.fromkeys(summary["role"])), sorted(set(summary["block"]))
    reach = float(np.nanmax(np.abs(summary["change"]), initial=0.0)) or 1.0
    for axes, ((order, selection), part) in zip(panels, panels_of, strict=True):
        image = _draw_map(axes, part, (roles, blocks), reach)
        place = axes.get_subplotspec()
        assert place is not None
        axes.set_yticks(range(len(roles)), roles if place.is_first_col() else [])
        set_labels(axes, " ".join(filter(None, (selection, order and f"{order} fine-tuning"))))
    label_panels(figure, panels, "block", "")
    bar = figure.colorbar(image, ax=panels, aspect=40, pad=0.02)
    bar.set_label(f"change of {table.main_metric(metric)}", fontsize=_SMALL + 1)
    bar.ax.tick_params(labelsize=_SMALL)
    return figure


def draw_all(table: SweepTable, folder: Path, metric: str | None = None) -> list[Path]:
    """Write all figures that the sweep has the numbers for, each as PNG and PDF.

    Args:
        table: what to draw.
        folder: made if it does not exist.
        metric: which score; by default the first.

    Returns:
        The files written.

    Raises:
        ValueError: no such metric.
    """
    table.main_metric(metric)
    streams = {cell.role for cell in table if cell.place != ("", "all", None)} == {"stream"}
    drawings: dict[str, Callable[[SweepTable], Figure]] = {
        "fig14_changes" if streams else "fig07_changes": partial(changes, metric=metric),
        "fig14_before_and_after" if streams else "fig08_before_and_after": partial(before_and_after, metric=metric),
        "changes_by_block": partial(by_block, metric=metric),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, draw in drawings.items():
        try:
            figure = draw(table)
        except NothingToDrawError:
            continue
        paths += save(figure, folder / stem)
    return paths


def _over_all_blocks(table: SweepTable, metric: str | None) -> pd.DataFrame:
    summary = table.summary(metric)
    return summary[summary["block"].isna()]


def _removed_in_words(summary: pd.DataFrame) -> str:
    selections = summary["selection"][summary["control"] == ""]
    return "decile removed" if selections.map(decile_of).notna().all() else "removed"


def _draw_points(axes: Axes, part: pd.DataFrame, column: str) -> None:
    """A point for each selection with its error, and those of their controls as a line in a band."""
    own = part[part["control"] == ""]
    place = {selection: x for x, selection in enumerate(own["selection"], start=1)}
    means = _controls(part, column)
    if means["error"].notna().any():
        y, error = means[column], means["error"]
        axes.fill_between(list(place.values()), y - error, y + error, color=_GREY, alpha=0.3, linewidth=0)
        axes.plot(list(place.values()), y, color=_GREY, linewidth=1.0, label=_CONTROL)
    label = "mean over seeds" if (own["seeds"] > 1).any() else "removed"
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.2, "elinewidth": 1.0}
    axes.errorbar(list(place.values()), own[column], own["error"].fillna(0.0), label=label, capsize=2, **style)
    deciles = [decile_of(selection) for selection in place]
    names = list(place) if None in deciles else [str(decile) for decile in deciles]
    axes.set_xticks(list(place.values()), names, rotation=30 if None in deciles else 0)
    axes.set_xlim(0.5, len(place) + 0.5)


def _fit_scale(axes: Axes, changes: pd.Series) -> None:
    """A scale logarithmic in the size of a change, linear up to the median, where one dwarfs the others: a perplexity
    without its first decile does."""
    sizes = changes.abs()
    middle = float(sizes[sizes > 0].median())
    if sizes.max() > _FAR_OUT * middle:
        axes.set_yscale("symlog", linthresh=middle)


def _controls(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """For each selection the mean of its controls, which are drawn once for all of about one size; NaN without any.

    Several draws are averaged; their errors are much the same.
    """
    controls = part[part["control"] != ""]
    means = []
    for name, size in part[part["control"] == ""][["selection", "components"]].itertuples(index=False):
        like = np.array([of_same_size(size, other) for other in controls["components"]], dtype=bool)
        means.append(controls[(controls["control"] == name) | like][[column, "error"]].fillna({"error": 0.0}).mean())
    return pd.DataFrame(means)


def _draw_levels(axes: Axes, table: SweepTable, part: pd.DataFrame) -> None:
    """The scores with nothing removed, and of a model that knows nothing."""
    metric = part["metric"].iloc[0]
    axes.axhline(part["baseline"].mean(), color="black", linestyle="--", linewidth=1.0, label="nothing removed")
    chance = [cell.chance[metric] for cell in table if metric in cell.chance]
    if chance:
        axes.axhline(float(np.mean(chance)), color=ORANGE, linestyle=":", linewidth=1.2, label="chance")


def _draw_profile(axes: Axes, p_values: torch.Tensor, part: pd.DataFrame) -> None:
    """The p-values in an inset, on the side to which the scores move; room is made where points are in its way."""
    # Heights as they are on the page, whatever the scale.
    scale = axes.yaxis.get_transform()
    low, high = (
        pd.Series(scale.transform(part["change"] + side * part["error"].fillna(0.0)), part.index) for side in (-1, 1)
    )
    bottom, top = scale.transform(axes.get_ylim())
    falls = -low.min() >= high.max()
    x, y, width, height = _INSET
    count = int((part["control"] == "").sum())
    place = np.arange(count) + 0.5
    near = list(
        part["selection"][part["control"] == ""][(place > x * count - 0.5) & (place < (x + width) * count + 0.5)]
    )
    in_the_way = part["selection"].isin(near) | (part["control"] != "")
    if falls:
        bottom = min(bottom, (low[in_the_way].min() - _INSET_REACH * top) / (1 - _INSET_REACH))
    else:
        top = max(top, (high[in_the_way].max() - _INSET_REACH * bottom) / (1 - _INSET_REACH))
    axes.set_ylim(*scale.inverted().transform(np.array([bottom, top])))
    inset = axes.inset_axes((x, y if falls else 1 - y - height - 0.04, width, height))
    inset.plot(local_mean(p_values)[0].numpy(), color=BLUE, linewidth=0.8)
    inset.axhline(float(p_values.nanmedian()), color="black", linestyle="--", linewidth=0.8)
    inset.set(xlim=(0, max(len(p_values) - 1, 1)), ylim=(0, 1), xticks=[], yticks=[0, 1])
    inset.set_title(MEAN_P, fontsize=_SMALL, pad=2)
    inset.tick_params(labelsize=_SMALL - 1, length=2, pad=1)


def _draw_map(axes: Axes, part: pd.DataFrame, labels: tuple[list[str], list[int]], reach: float) -> AxesImage:
    """A field for each role and block, coloured by its change, with a dot where that is decided."""
    roles, blocks = labels
    values = np.full((len(roles), len(blocks)), np.nan)
    dot: dict[str, Any] = {"color": "black", "marker": ".", "markersize": 4, "linestyle": "none"}
    axes.plot([], [], label="at least two standard errors", **dot)
    for role, block, change, verdict in zip(part["role"], part["block"], part["change"], part["verdict"], strict=True):
        row, column = roles.index(role), blocks.index(block)
        values[row, column] = change
        if verdict in ("drop", "gain"):
            axes.plot(column, row, **dot)
    # Purple and orange are told apart by the colour-blind; white is no change.
    image = axes.imshow(values, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    shown = range(0, len(blocks), math.ceil(len(blocks) / _MOST_TICKS))
    axes.set_xticks(shown, [str(blocks[column]) for column in shown])
    return image
