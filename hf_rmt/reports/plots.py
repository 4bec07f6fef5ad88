"""Pictures of an ``AnalysisReport`` in the style of the paper: what each figure shows; ``drawing`` says how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from hf_rmt.reports.drawing import (
    BLUE,
    MEAN_P,
    ORANGE,
    PAGE,
    TITLE_SIZE,
    draw_edges,
    draw_entries,
    draw_law,
    draw_local_means,
    draw_null,
    draw_spectrum,
    label_panels,
    legend_under,
    new_figure,
    panel_grid,
    save,
    set_labels,
)
from hf_rmt.theory.controls import seed_for
from hf_rmt.theory.decomposition import singular_values
from hf_rmt.theory.ks_null import KSNull, MonteCarloNull, shipped_null
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur
from hf_rmt.theory.singular_vectors import VectorTest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.result import MatrixResult, Spectrum

Side = Literal["right", "left"]
SIDES: tuple[Side, Side] = ("right", "left")


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
    if not has_law(result):
        raise NothingToDrawError(f"{result.name} has no spectrum to hold against a law: {why_empty(result)}")
    law = law_of([result])
    control, label = _control_spectrum(report, result, law)
    figure = new_figure(5.4, 3.9)
    axes = figure.add_subplot()
    draw_spectrum(axes, law, {"singular values": result.s, label: control})
    draw_law(axes, law, f"MP law, $\\sigma$ = {law.sigma:.3g} ({result.row['sigma_rule']})")
    draw_edges(axes, law, result.s)
    set_labels(axes, title_of(result), r"singular value $\nu$", r"density $P(\nu)$")
    legend_under(axes, 2)
    return figure


def spectra_by_role(report: AnalysisReport) -> Figure:
    """Spectra averaged over all blocks, one panel a role, with the law for the mean sigma (paper Fig. 2 and 10).

    A role whose matrices differ in shape between blocks has a panel for each shape.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has a spectrum and a law.
    """
    groups = groups_of(report, has_law)
    figure, panels = panel_grid(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        law = law_of(group.results)
        pooled = torch.cat([result.s for result in group.results])
        draw_spectrum(axes, law, {"singular values of all blocks": pooled})
        draw_law(axes, law, r"MP law for the mean $\sigma$")
        set_labels(axes, f"{group.title}, {group.blocks_in_words}")
    label_panels(figure, panels, r"singular value $\nu$", r"density $P(\nu)$")
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
    test = test_of(result, side)
    if test is None:
        why = f"sides was {report.settings.get('sides')!r}" if getattr(result, side) is None else result.row["note"]
        raise NothingToDrawError(f"{result.name} has no p-values of {side} singular vectors: {why}")
    figure = new_figure(PAGE, 5.8)
    axes = figure.subplot_mosaic([["entries", "null"], ["means", "means"]], height_ratios=(1.2, 1))
    figure.suptitle(f"{title_of(result)}, {side} singular vectors", fontsize=TITLE_SIZE + 1)
    draw_entries(axes["entries"], test)
    draw_null(axes["null"], test, _null_of(report))
    draw_local_means(axes["means"], test, test_of(result.control, side))
    return figure


def local_means_by_role(report: AnalysisReport, side: Side = "right") -> Figure:
    """Local means of the p-values, one panel a role: one block and the mean of all blocks (paper Fig. 4).

    The block is the middle one. The dashed line is the mean p-value of the controls, or one half where
    the report has none. Experts of a block are averaged like blocks; the block shown is its first.

    Raises:
        NothingToDrawError: (a ValueError) no matrix in a block has p-values of this side.
    """
    groups = groups_of(report, lambda result: test_of(result, side) is not None)
    figure, panels = panel_grid(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        middle = group.middle
        means = torch.stack([getattr(result, side).local_mean for result in group.results])
        axes.plot(means.nanmean(dim=0).numpy(), color=ORANGE, linewidth=2.4, label="mean of all blocks")
        axes.plot(getattr(middle, side).local_mean.numpy(), color=BLUE, linewidth=0.9, label="this block")
        level, label = _random_level(group.results, side)
        axes.axhline(level, color="black", linestyle="--", linewidth=1.0, label=label)
        axes.set(xlim=(0, max(len(middle.s) - 1, 1)), ylim=(0, 1))
        set_labels(axes, f"{group.title}, block {middle.row['block']}")
    label_panels(figure, panels, f"index $j$ of {side} vectors", MEAN_P)
    return figure


def draw_all(report: AnalysisReport, folder: Path, matrix: str | None = None) -> list[Path]:
    """Write all figures that the report has the numbers for, each as PNG and PDF.

    Vectors are right ones, left ones where only they were tested or have overlaps.

    Args:
        report: what to draw.
        folder: made if it does not exist.
        matrix: shown in Fig. 1, 3 and 5; by default the first query, or else the first with a spectrum.

    Returns:
        The files written.

    Raises:
        KeyError: the report has no such matrix.
        NothingToDrawError: (a ValueError) the matrix asked for is empty.
    """
    # That file draws with what is below.
    from hf_rmt.reports.overlap_plots import activation_spectra, overlap_of_matrix, overlapping_side, overlaps_by_role

    drawings: dict[str, Callable[[], Figure]] = {"fig02_spectra_by_role": partial(spectra_by_role, report)}
    if (side := _tested_side(report.values())) is not None:
        drawings["fig04_local_means"] = partial(local_means_by_role, report, side)
    if (side := overlapping_side(report.values())) is not None:
        drawings["fig06_overlaps_by_role"] = partial(overlaps_by_role, report, side)
        drawings["fig13_activation_spectra"] = partial(activation_spectra, report, side)
    if (shown := _shown(report, matrix)) is not None:
        drawings["fig01_spectrum"] = partial(spectrum, report, shown.name)
        if (side := _tested_side([shown])) is not None:
            drawings["fig03_vector_test"] = partial(vector_test, report, shown.name, side)
        if (side := overlapping_side([shown])) is not None:
            drawings["fig05_overlap"] = partial(overlap_of_matrix, report, shown.name, side)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem in sorted(drawings):
        try:
            figure = drawings[stem]()
        except NothingToDrawError:
            continue
        paths += save(figure, folder / stem)
    return paths


# What to draw


@dataclass(frozen=True)
class Group:
    """Matrices of one role and shape, in the order of their blocks."""

    title: str
    results: list[MatrixResult]

    @property
    def blocks(self) -> int:
        """How many blocks they are in."""
        return len({result.row["block"] for result in self.results})

    @property
    def blocks_in_words(self) -> str:
        """That number for a title."""
        return "1 block" if self.blocks == 1 else f"{self.blocks} blocks"

    @property
    def middle(self) -> MatrixResult:
        """The first matrix of the middle block."""
        blocks = sorted({result.row["block"] for result in self.results})
        return next(result for result in self.results if result.row["block"] == blocks[len(blocks) // 2])


def groups_of(report: AnalysisReport, wanted: Callable[[MatrixResult], bool]) -> list[Group]:
    """The wanted matrices inside blocks by stack, role and shape."""
    found: dict[tuple[str, str, int, int], list[MatrixResult]] = {}
    for result in report.values():
        row = result.row
        if row["block"] is not None:
            # A role keeps its place in the model also where its first matrix is not wanted.
            results = found.setdefault((row["stack"] or "", row["role"], row["rows"], row["cols"]), [])
            results += [result] if wanted(result) else []
    groups = [Group(_panel_title(*key), results) for key, results in found.items() if results]
    if not groups:
        raise NothingToDrawError("no matrix inside a block of this report has the numbers that this figure shows")
    return groups


def _panel_title(stack: str, role: str, rows: int, cols: int) -> str:
    name = f"{stack} {role}".strip()
    return f"{name if len(name) <= 34 else '…' + name[-33:]}\n{rows} $\\times$ {cols}"


def title_of(result: MatrixResult) -> str:
    """Name and shape."""
    return f"{result.name} ({result.row['rows']} $\\times$ {result.row['cols']})"


def has_law(result: MatrixResult) -> bool:
    """Whether there is a spectrum and a law: sigma is 0 where half of the singular values are."""
    return len(result.s) > 0 and result.row["sigma"] > 0


def why_empty(result: MatrixResult) -> str:
    """Why there is no spectrum or no law."""
    return result.row.get("note") or "its sigma is 0"


def law_of(results: list[MatrixResult]) -> MarchenkoPastur:
    """The law of matrices of one shape, for the mean of their sigmas."""
    row = results[0].row
    return MarchenkoPastur(row["rows"], row["cols"], math.fsum(r.row["sigma"] for r in results) / len(results))


def _control_spectrum(report: AnalysisReport, result: MatrixResult, law: MarchenkoPastur) -> tuple[torch.Tensor, str]:
    """The stored control and what it is, or a Gaussian one."""
    if result.control is not None:
        return result.control.s, f"control ({report.settings.get('control') or 'random'})"
    generator = torch.Generator().manual_seed(seed_for(report.settings.get("seed", 0), result.name))
    return singular_values(torch.randn(law.rows, law.cols, generator=generator) * law.sigma), "control (gaussian)"


def test_of(spectrum: Spectrum | None, side: Side) -> VectorTest | None:
    """The test of one side, if any vector was tested."""
    if side not in SIDES:
        raise ValueError(f"side is {side!r}: give one of {', '.join(SIDES)}")
    test: VectorTest | None = getattr(spectrum, side, None)
    return test if test is not None and test.extreme_index >= 0 else None


def _tested_side(results: Iterable[MatrixResult]) -> Side | None:
    results = list(results)
    return next((side for side in SIDES if any(test_of(result, side) for result in results)), None)


def _shown(report: AnalysisReport, matrix: str | None) -> MatrixResult | None:
    """The matrix of the figures that show one."""
    if matrix is not None:
        if not len(report[matrix].s):
            raise NothingToDrawError(f"{matrix} has no spectrum: {why_empty(report[matrix])}")
        return report[matrix]
    full = [result for result in report.values() if has_law(result)]
    return next((result for result in full if result.row["role"] == "query"), full[0] if full else None)


def _null_of(report: AnalysisReport) -> KSNull | MonteCarloNull:
    """The null that the p-values of the report come from."""
    draws = report.settings.get("null_draws")
    return MonteCarloNull(draws, report.settings["seed"]) if draws else shipped_null()


def _random_level(results: list[MatrixResult], side: Side) -> tuple[float, str]:
    """Where the p-values of random matrices lie on average, and what that is called."""
    controls = [test.p_values for result in results if (test := test_of(result.control, side)) is not None]
    if controls:
        return float(torch.cat(controls).nanmean()), "mean of the control"
    return 0.5, "random matrices, 0.5"
