"""Pictures of an ``AnalysisReport`` that hold singular vectors against the activations (paper Fig. 5, 6, 13)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from hf_rmt.reports.drawing import (
    MEAN_P,
    OVERLAP,
    PAGE,
    SINGULAR_VALUE,
    TITLE_SIZE,
    block_colours,
    draw_eigenvalues,
    draw_law,
    draw_mean_overlaps,
    draw_null_overlap,
    draw_overlaps,
    draw_p_values,
    draw_red_edges,
    draw_spectrum,
    label_pairs,
    label_panels,
    legend_under,
    new_figure,
    note_below,
    pair_grid,
    panel_grid,
    set_labels,
)
from hf_rmt.reports.plots import (
    SIDES,
    Group,
    NothingToDrawError,
    Side,
    groups_of,
    has_law,
    law_of,
    test_of,
    title_of,
    why_empty,
)
from hf_rmt.theory.covariance import NULL_LEVEL, Overlap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.result import MatrixResult


def overlap_of_matrix(report: AnalysisReport, name: str, side: Side = "right") -> Figure:
    """Spectrum, p-values and overlaps of one matrix side by side (paper Fig. 5).

    All three over the singular value, between the same dashed red edges of the law: (a) the spectrum
    and the law; (b) local means of the p-values; (c) the largest overlap of each vector with an
    eigenvector of the activation covariance, and the level that random vectors stay below.

    Raises:
        NothingToDrawError: (a ValueError) the matrix has no law, or no overlaps on this side.
    """
    result = report[name]
    match = _overlap_of(result, side)
    if match is None or not has_law(result):
        why = "no covariance of these activations was given" if has_law(result) else why_empty(result)
        raise NothingToDrawError(f"{result.name} has no overlaps of {side} singular vectors to show: {why}")
    law = law_of([result])
    figure = new_figure(PAGE, 3.4)
    figure.suptitle(f"{title_of(result)}, {side} singular vectors,\n{_covariance_of([match])}", fontsize=TITLE_SIZE)
    panels = spectrum, p_values, overlaps = figure.subplots(1, 3, sharex=True).tolist()
    draw_spectrum(spectrum, law, {"singular values": result.s})
    draw_law(spectrum, law, "MP law")
    set_labels(spectrum, "(a) spectrum", SINGULAR_VALUE, r"density $P(\nu)$")
    draw_p_values(p_values, result.s, test_of(result, side))
    set_labels(p_values, "(b) p-values", SINGULAR_VALUE, MEAN_P)
    draw_overlaps(overlaps, result.s, match.values)
    draw_null_overlap(overlaps, match.null_quantile())
    overlaps.set_ylim(bottom=0)
    set_labels(overlaps, "(c) overlap", SINGULAR_VALUE, OVERLAP)
    for axes in panels:
        draw_red_edges(axes, law)
        legend_under(axes, 1)
    return figure


def overlaps_by_role(report: AnalysisReport, side: Side = "right") -> Figure:
    """Spectra averaged over all blocks, above the averaged overlaps of their vectors (paper Fig. 6).

    One column a role. Dots are the vectors of all blocks; the line is their mean, over blocks and over
    neighbours in the spectrum. The levels of random vectors and the sigma of the law are means over
    the blocks. What a matrix W puts out has the covariance ``W F W^T``, so left vectors overlap with it
    also where W is random.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has a law and overlaps on this side.
    """
    groups = groups_of(report, lambda result: has_law(result) and _overlap_of(result, side) is not None)
    figure, pairs = pair_grid(len(groups))
    everything = []
    for (above, below), group in zip(pairs, groups, strict=True):
        law, matches = law_of(group.results), _overlaps_of(group, side)
        everything += matches
        s, values = torch.stack([r.s for r in group.results]), torch.stack([match.values for match in matches])
        draw_spectrum(above, law, {"singular values of all blocks": s.flatten()})
        draw_law(above, law, r"MP law for the mean $\sigma$")
        set_labels(above, f"{group.title}, {group.blocks_in_words}")
        draw_mean_overlaps(below, s, values)
        draw_null_overlap(below, *(_mean_quantile(matches, level) for level in (NULL_LEVEL, 0.5)))
        for axes in (above, below):
            draw_red_edges(axes, law)
    figure.suptitle(f"{side} singular vectors, {_covariance_of(everything)}", fontsize=TITLE_SIZE)
    pairs[0][1].set_ylim(bottom=0)
    label_pairs(figure, pairs, SINGULAR_VALUE, (r"density $P(\nu)$", OVERLAP))
    return figure


def activation_spectra(report: AnalysisReport, side: Side = "right") -> Figure:
    """Eigenvalues of the activation covariances, one panel a role and one line a block (paper Fig. 13).

    Roles that read the same activations share a panel. Rings mark the largest eigenvalues, and a
    note says which share of the sum they are. Eigenvalues beyond the rank are left out.

    Args:
        report: of an analysis with covariances.
        side: ``"right"`` for what enters the matrices, ``"left"`` for what they put out.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has covariances on this side.
    """
    groups = _joined(groups_of(report, lambda result: _overlap_of(result, side) is not None), side)
    figure, panels = panel_grid(len(groups))
    blocks = sorted({result.row["block"] for group in groups for result in group.results})
    colours = block_colours(figure, panels, blocks)
    everything = []
    for axes, group in zip(panels, groups, strict=True):
        if axes is not panels[0]:
            axes.sharey(panels[0])
        matches = _overlaps_of(group, side)
        everything += matches
        spectra = [match.eigenvalues[: match.compared] for match in matches]
        draw_eigenvalues(axes, spectra, [colours[result.row["block"]] for result in group.results])
        note_below(axes, f"largest: {_top_shares(matches)}\nof the sum")
        set_labels(axes, group.title)
    activations = {"right": "inputs", "left": "outputs"}[side]
    figure.suptitle(f"{activations} of the matrices, {_covariance_of(everything)}", fontsize=TITLE_SIZE)
    label_panels(figure, panels, "number of the eigenvalue", r"eigenvalue $\lambda$")
    return figure


def overlapping_side(results: Iterable[MatrixResult]) -> Side | None:
    """The side whose overlaps are drawn: the right one, if any of these results has some."""
    results = list(results)
    return next((side for side in SIDES if any(_overlap_of(result, side) for result in results)), None)


def _overlap_of(result: MatrixResult, side: Side) -> Overlap | None:
    """The overlaps of one side, if the covariance had any data."""
    if side not in SIDES:
        raise ValueError(f"side is {side!r}: give one of {', '.join(SIDES)}")
    match: Overlap | None = getattr(result, f"{side}_overlap")
    return match if match is not None and match.compared else None


def _overlaps_of(group: Group, side: Side) -> list[Overlap]:
    """Those of a group of which all have some."""
    return [match for result in group.results if (match := _overlap_of(result, side)) is not None]


def _mean_quantile(matches: list[Overlap], level: float) -> float:
    return math.fsum(match.null_quantile(level) for match in matches) / len(matches)


def _covariance_of(matches: list[Overlap]) -> str:
    """Which covariance, of how many tokens."""
    tokens = sorted({match.tokens for match in matches})
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{'centred' if matches[0].centred else 'uncentred'} activation covariance of {counted} tokens"


def _joined(groups: list[Group], side: Side) -> list[Group]:
    """Roles with the same covariances as one group."""
    same: dict[tuple[bytes, ...], list[Group]] = {}
    for group in groups:
        key = tuple(match.eigenvalues.numpy().tobytes() for match in _overlaps_of(group, side))
        same.setdefault(key, []).append(group)
    return [Group(_joined_title(members, side), members[0].results) for members in same.values()]


def _joined_title(members: list[Group], side: Side) -> str:
    names = ", ".join(dict.fromkeys(group.title.partition("\n")[0] for group in members))
    entries = _overlaps_of(members[0], side)[0].entries
    return f"{names if len(names) <= 34 else names[:33] + '…'}\n{entries} features"


def _top_shares(matches: list[Overlap]) -> str:
    """Which share of the sum the largest eigenvalues are, over the blocks."""
    shares = [100 * float(match.eigenvalues[0] / match.eigenvalues.sum()) for match in matches]
    low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
    return f"{low if low == high else f'{low} to {high}'} %"
