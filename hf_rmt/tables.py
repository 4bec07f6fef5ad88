"""What the command line prints: tables by role, of a sweep with a row a removal, of a slice with its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.sweep import SweepTable
    from hf_rmt.slicing.slicer import SliceRecord

#: What a table by role begins with.
_BLOCKS = ("role", "blocks")
#: Heading -> column of ``by_role`` and whether it is a share.
_SHOWN = {
    "above\nbulk": ("n_above_bulk", False),
    "above\nempir.": ("n_above_empirical", False),
    "above\ninit": ("n_above_init", False),
    "above\nTW": ("n_above_tw", False),
    "below\nTW": ("n_below_tw", False),
    "right\np<.01": ("right_significant", True),
    "left\np<.01": ("left_significant", True),
}


def report_table(report: AnalysisReport) -> Table:
    """Outliers and significant vectors, with their spread over blocks."""
    settings = report.settings
    table = _new_table(
        "Deviations from random matrix theory by role: mean over blocks ± spread",
        "above: singular values beyond the upper Marchenko-Pastur edge, under three rules for sigma; "
        f"TW: beyond the Tracy-Widom thresholds at rate {settings['rate']:g}, sigma {settings['sigma']}; "
        "p<.01: share of singular vectors with so small a p-value, 1 % for a random matrix",
        (*_BLOCKS, *_SHOWN),
    )
    for role, row in report.by_role().iterrows():
        cells = [_count(row[(column, "mean")], row[(column, "std")], share) for column, share in _SHOWN.values()]
        table.add_row(*_first_cells(role, row), *cells)
    return table


#: Heading -> column of ``by_role``.
_OVERLAPS = {
    "above": "overlap_above",
    "bulk": "overlap_bulk",
    "below": "overlap_below",
    "99 % of\nrandom": "overlap_null",
    "with\n-log p": "overlap_rank_correlation",
    "largest\nshare": "activation_top_share",
}


def overlap_table(report: AnalysisReport) -> Table:
    """Overlaps of the right singular vectors with the activations that enter."""
    activations = report.settings["covariances"]
    about = "about the mean" if activations["centred"] else "uncentred"
    table = _new_table(
        "Overlap of right singular vectors with the activations, by role: mean over blocks",
        "above, bulk, below: mean overlap of the vectors whose singular values lie there, over "
        f"{activations['tokens']:,} tokens, {about}; 99 % of random: what so many random vectors stay below; "
        "with -log p: rank correlation; largest share: that of the largest eigenvalue of the covariance",
        (*_BLOCKS, *_OVERLAPS),
    )
    for role, row in report.by_role().iterrows():
        means = [row[(column, "mean")] for column in _OVERLAPS.values()]
        table.add_row(*_first_cells(role, row), *("" if math.isnan(mean) else f"{mean:.3f}" for mean in means))
    return table


#: Heading -> columns of ``by_role`` in one cell, and how their means are written.
_COMPARED = {
    "change": (("relative_change",), ".2g"),
    "above": (("n_above_change",), "+.1f"),
    "below": (("n_below_change",), "+.1f"),
    "intru-\nders": (("right_intruders", "left_intruders"), ".1f"),
}


def comparison_table(comparison: ModelComparison) -> Table:
    """How much changed, and where in the spectrum."""
    table = _new_table(
        "What training changed, by role: mean over blocks",
        "change: norm of the change over that of the matrix; above, below: change of the number of singular "
        f"values beyond the Marchenko-Pastur edges, sigma {comparison.settings['sigma']}; intruders: of the ten "
        "largest right and left singular vectors after, those unlike any before; deciles: where the change has most "
        "energy (1 holds the largest singular values, out: what is outside the span of the vectors), in multiples of "
        "what a change without direction has there, if above 1",
        (*_BLOCKS, *_COMPARED, "right\ndeciles", "left\ndeciles"),
    )
    table.padding = 0  # one space between columns is the box's own, and there are 80 in all
    ratios = [comparison.energy_over_expectation("right"), comparison.energy_over_expectation("left")]
    for role, row in comparison.by_role().iterrows():
        means = [([row[(column, "mean")] for column in columns], spec) for columns, spec in _COMPARED.values()]
        cells = ["/".join(format(x, spec) for x in values if not math.isnan(x)) for values, spec in means]
        table.add_row(*_first_cells(role, row), *cells, *(_leading(side.loc[role]) for side in ratios))
    return table


def sweep_table(sweep: SweepTable, metric: str | None = None) -> Table:
    """What each removal did to a score, and how sure that is; random controls are in the last column."""
    metric = sweep.main_metric(metric)
    summary = sweep.summary(metric)
    summary = summary[summary["control"] == ""].astype({"block": "string"}).fillna({"block": ""})
    where = [column for column in ("order", "role", "block") if (summary[column] != "").any()]
    shown = [*where, "selection", "change", "95 %", "seeds", "verdict", "over\nrandom"]
    table = _new_table(
        f"Change of {metric} when singular values are removed",
        "change: score minus baseline, mean over seeds ± standard error; 95 %: interval over evaluation rows "
        "and seeds; drop: the model got worse; undecided: below two standard errors; empty: nothing was selected; "
        "over random: minus the change by as many random components",
        shown,
        names=(*where, "selection"),
    )
    for _, row in summary.iterrows():
        interval = f"{_signed(row['low'])} {_signed(row['high'])}".strip()
        error = "" if math.isnan(row["error"]) else f" ±{_signed(row['error'])[1:]}"
        cells = [_signed(row["change"]) + error, interval, str(row["seeds"]), row["verdict"]]
        cells.append(_signed(row["over_control"]))
        table.add_row(*(row[column] for column in where), row["selection"], *cells)
    return table


def pruning_table(affected: pd.DataFrame) -> Table:
    """What was removed from a model, by role; of ``SVDPruner.affected``."""
    from hf_rmt.model_card import by_role

    table = _new_table(
        "Singular components removed, by role",
        "mass: share of the sum of singular values, energy: of the sum of their squares, mean over matrices",
        ("role", "matrices", "removed", "of", "mass", "energy", "parameters"),
    )
    for row in by_role(affected).to_dict("records"):
        numbers = [f"{row[column]:,}" for column in ("matrices", "removed", "of")]
        table.add_row(row["role"], *numbers, f"{row['mass']:.1%}", f"{row['energy']:.1%}", f"{row['parameters']:,}")
    return table


def slice_table(record: SliceRecord, scores: Mapping[str, Any] | None = None) -> Table:
    """What was kept of a model, and what that did to its scores: a dict of ``before`` and ``after``."""
    table = _new_table("What the slice keeps", "a tied head is counted once", ["", "before", "after", "share"])
    sizes = {
        "width of the stream": (record.original_width, record.width),
        "parameters": (record.original_parameters, record.parameters),
    }
    for name, (before, after) in sizes.items():
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
    scores = scores or {"before": {}}
    for metric, score in scores["before"].items():
        table.add_row(metric, f"{score:.4g}", f"{scores['after'][metric]:.4g}")
    return table


def _new_table(title: str, caption: str, headings: Sequence[str], names: Sequence[str] = ()) -> Table:
    """``names``: the headings of columns that hold no numbers; the first one if none are given."""
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in headings:
        name = heading in (names or headings[:1])  # where a terminal is narrow, names give way, not numbers
        table.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    return table


def _first_cells(role: Any, row: pd.Series) -> tuple[str, str]:
    return " ".join(role) if isinstance(role, tuple) else str(role), str(int(row[("blocks", "count")]))


def _count(mean: float, spread: float, share: bool) -> str:
    """NaN means that nothing was computed, or that there is one block and so no spread."""
    if math.isnan(mean):
        return ""
    if share:
        return f"{mean:.1%}"
    return f"{mean:.0f}" if math.isnan(spread) else f"{mean:.0f} ±{spread:.0f}"


def _signed(number: float) -> str:
    """NaN where nothing tells."""
    if math.isnan(number):
        return ""
    return f"{number:+.3f}" if abs(number) < 10 else f"{number:+.3g}"


def _leading(ratios: pd.Series) -> str:
    """The two deciles of the most energy among those above 1, as ``3x2.1 4x1.2``."""
    leading = ratios.rename({"outside": "out"}).dropna().nlargest(2)
    return " ".join(f"{decile}x{ratio:.1f}" for decile, ratio in leading[leading.round(1) > 1].items())
