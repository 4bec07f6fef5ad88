"""Pictures of a ``ModelComparison``: spectra and p-values before and after, and where the change lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_rmt.reports.drawing import (
    BLUE,
    MEAN_P,
    ORANGE,
    SINGULAR_VALUE,
    draw_law,
    draw_spectrum,
    label_panels,
    panel_grid,
    save,
    set_labels,
)
from hf_rmt.reports.plots import SIDES, Group, NothingToDrawError, Side, groups_of, has_law, law_of, test_of
from hf_rmt.theory.comparison import DECILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.result import MatrixResult


def spectra(comparison: ModelComparison) -> Figure:
    """Spectra of all blocks before and after, one panel a role, with the law for the mean sigma before (paper Fig. 12).

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has a spectrum and a law on both sides.
    """
    groups = _groups(comparison, has_law)
    figure, panels = panel_grid(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        pooled = [torch.cat([result.s for result in side]) for side in (group.results, _after(comparison, group))]
        law = law_of(group.results)
        draw_spectrum(axes, law, {"before": pooled[0], "after": pooled[1]})
        draw_law(axes, law, r"MP law for the mean $\sigma$ before")
        set_labels(axes, f"{group.title}, {group.blocks_in_words}")
    label_panels(figure, panels, SINGULAR_VALUE, r"density $P(\nu)$")
    return figure


def local_means(comparison: ModelComparison, side: Side) -> Figure:
    """Local means of the p-values before and after, means of all blocks, one panel a role (paper Fig. 12).

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has p-values of this side before and after.
    """
    groups = _groups(comparison, lambda result: test_of(result, side) is not None)
    figure, panels = panel_grid(len(groups))
    lines: tuple[dict[str, Any], ...] = (
        {"color": BLUE, "linewidth": 2.2, "label": "before"},
        {"color": ORANGE, "linewidth": 1.0, "label": "after"},
    )
    for axes, group in zip(panels, groups, strict=True):
        for results, style in zip((group.results, _after(comparison, group)), lines, strict=True):
            means = torch.stack([getattr(result, side).local_mean for result in results]).nanmean(dim=0)
            axes.plot(means.numpy(), **style)
        axes.axhline(0.5, color="black", linestyle="--", linewidth=1.0, label="random matrices, 0.5")
        axes.set(xlim=(0, max(len(means) - 1, 1)), ylim=(0, 1))
        set_labels(axes, f"{group.title}, {group.blocks_in_words}")
    label_panels(figure, panels, f"index $j$ of {side} vectors", MEAN_P)
    return figure


def energy(comparison: ModelComparison) -> Figure:
    """Where the change lies: its energy in each decile of the singular vectors before, on both sides, over that
    of a change without direction; decile 1 has the largest singular values.

    Bars are means over blocks, lines their spread; the last bars are for what lies outside all singular vectors.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block changed, or weights and vectors were not at hand.
    """
    groups = _groups(comparison, lambda result: comparison[result.name].located)
    figure, panels = panel_grid(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        for side, colour, offset in zip(SIDES, (BLUE, ORANGE), (-0.2, 0.2), strict=True):
            energies = [getattr(comparison[result.name], f"{side}_energy") for result in group.results]
            ratios = torch.stack([one.shares / one.expected for one in energies])
            _draw_bars(axes, ratios.numpy(), offset, colour, f"{side} vectors")
        axes.axhline(1, color="black", linestyle="--", linewidth=1.0, label="change without direction")
        set_labels(axes, f"{group.title}, {group.blocks_in_words}")
        row = group.results[0].row
        _label_deciles(axes, outside=row["rows"] != row["cols"])
    label_panels(figure, panels, "decile of singular vectors", "energy over expectation")
    return figure


def _label_deciles(axes: Axes, outside: bool) -> None:
    parts = [*map(str, range(1, DECILES + 1)), *(["out"] if outside else [])]
    axes.set(xlim=(0.4, len(parts) + 0.6), xticks=range(1, len(parts) + 1), xticklabels=parts)
    axes.tick_params(axis="x", labelsize=7, length=2)


def _draw_bars(axes: Axes, ratios: np.ndarray, offset: float, colour: str, label: str) -> None:
    """A bar for each part of the basis: the mean of the rows of ``(matrices, parts)`` and their spread."""
    shown = np.flatnonzero(np.isfinite(ratios).all(axis=0))  # a square matrix has nothing outside
    spread = ratios[:, shown].std(axis=0, ddof=1) if len(ratios) > 1 else None
    line: dict[str, Any] = {"elinewidth": 0.8, "ecolor": "#333333"}
    axes.bar(
        shown + 1 + offset, ratios[:, shown].mean(axis=0), 0.38, color=colour, label=label, yerr=spread, error_kw=line
    )


def draw_all(comparison: ModelComparison, folder: Path) -> list[Path]:
    """Write all figures that the comparison has the numbers for, each as PNG and PDF.

    Args:
        comparison: what to draw.
        folder: made if it does not exist.

    Returns:
        The files written.
    """
    drawings: dict[str, Callable[[ModelComparison], Figure]] = {
        "change_by_decile": energy,
        "fig12_spectra": spectra,
        **{f"fig12_local_means_{side}": partial(local_means, side=side) for side in SIDES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, draw in drawings.items():
        try:
            figure = draw(comparison)
        except NothingToDrawError:
            continue
        paths += save(figure, folder / stem)
    return paths


def _groups(comparison: ModelComparison, wanted: Callable[[MatrixResult], bool]) -> list[Group]:
    """Results before, by role and shape, of the matrices that are wanted on both sides."""
    return groups_of(
        comparison.before, lambda r: r.name in set(comparison) and wanted(r) and wanted(comparison.after[r.name])
    )


def _after(comparison: ModelComparison, group: Group) -> list[MatrixResult]:
    return [comparison.after[result.name] for result in group.results]
