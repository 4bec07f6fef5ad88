from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer

from hf_rmt.reports import sweep_plots
from hf_rmt.reports.plots import NothingToDrawError
from hf_rmt.reports.sweep import Cell, SweepTable
from hf_rmt.theory.inference import Rows
from hf_rmt.theory.singular_vectors import local_mean

matplotlib.use("agg")
PROFILE = torch.cat([torch.full((10,), 0.1), torch.full((50,), 0.6)]).double()


def cell(selection: str, level: float, **labels: Any) -> Cell:
    """An evaluation with about this share of right answers; for a perplexity, of this one."""
    generator = torch.Generator().manual_seed(labels.get("seed", 0))
    values = (torch.rand(100, generator=generator) < level).double()
    metric = "accuracy"
    if level > 1:
        values, metric = torch.rand(100, generator=generator) - 0.5 + float(np.log(level)), "perplexity"
    rows = Rows(values, torch.ones(100), metric == "perplexity")
    return Cell(
        selection=selection, scores={metric: rows.score()}, rows={metric: rows}, chance={"accuracy": 0.3}, **labels
    )


def by_decile(levels: dict[int, float], base: float = 0.8, seeds: int = 2, **labels: Any) -> list[Cell]:
    """Deciles of a role and their controls, over seeds, without the baseline."""
    cells = []
    for seed in range(seeds):
        for decile, level in levels.items():
            cells.append(cell(f"decile:{decile}", level, seed=seed, **labels))
            name = f"random:0(decile:{decile})"
            cells.append(cell(name, 0.97 * base, seed=seed, control=f"decile:{decile}", **labels))
    return cells


def baselines(level: float = 0.8, seeds: int = 2) -> list[Cell]:
    return [cell("none", level, seed=seed) for seed in range(seeds)]


LEVELS = {1: 0.4, 2: 0.7, 3: 0.78, 4: 0.8, 5: 0.8, 6: 0.8, 7: 0.79, 8: 0.78, 9: 0.75, 10: 0.6}


@pytest.fixture(scope="module")
def sweep() -> SweepTable:
    cells = [*baselines(), *by_decile(LEVELS, role="query"), *by_decile(LEVELS, role="attention.output")]
    return SweepTable(cells, {}, {"query": PROFILE})


def points(axes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, values and errors of the points of a panel."""
    (drawn,) = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    x, y = drawn.lines[0].get_data()
    segments = drawn.lines[2][0].get_segments()
    return np.asarray(x, float), np.asarray(y, float), np.array([(s[1, 1] - s[0, 1]) / 2 for s in segments])


def line(axes: Any, label: str) -> np.ndarray:
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(found.get_ydata())


def names(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_points_are_the_changes_of_the_summary(sweep: SweepTable) -> None:
    figure = sweep_plots.changes(sweep)
    assert [axes.get_title() for axes in figure.axes] == ["query", "attention.output"]
    summary = sweep.summary()
    for axes in figure.axes:
        own = summary[(summary["role"] == axes.get_title()) & (summary["control"] == "")]
        controls = summary[(summary["role"] == axes.get_title()) & (summary["control"] != "")]
        x, y, error = points(axes)
        np.testing.assert_array_equal(x, range(1, 11))
        np.testing.assert_allclose(y, own["change"])
        np.testing.assert_allclose(error, own["error"], atol=1e-12)
        np.testing.assert_allclose(line(axes, "random components, as many"), controls["change"])
        assert line(axes, "nothing removed")[0] == 0
        assert [t.get_text() for t in axes.get_xticklabels()] == [str(d) for d in range(1, 11)]
    assert names(figure) == ["random components, as many", "nothing removed", "mean over seeds"]


def test_one_control_is_drawn_at_all_selections_of_its_size() -> None:
    sizes = {1: 39.0, 2: 39.0, 3: 38.0, 4: 100.0, 5: 38.0}
    cells = [cell("none", 0.8)]
    cells += [cell(f"decile:{k}", 0.7, role="key", removed={"components": size}) for k, size in sizes.items()]
    name = "random:0(decile:1)"
    cells.append(cell(name, 0.75, role="key", control="decile:1", removed={"components": 39.0}))
    table = SweepTable(cells, {})
    (axes,) = sweep_plots.changes(table).axes
    drawn = line(axes, "random components, as many")
    change = table.summary().set_index("selection").loc[name, "change"]
    np.testing.assert_allclose(drawn, [change, change, change, np.nan, change])
    assert len(points(axes)[1]) == 5


def test_the_inset_has_the_local_means_and_their_plateau(sweep: SweepTable) -> None:
    with_profile, without = sweep_plots.changes(sweep).axes
    assert not without.child_axes
    (inset,) = with_profile.child_axes
    curve, plateau = (np.asarray(line.get_ydata()) for line in inset.get_lines())
    np.testing.assert_allclose(curve, local_mean(PROFILE)[0].numpy())
    assert plateau[0] == pytest.approx(0.6)


def _box_and_points(axes: Any, figure: Any) -> tuple[Any, np.ndarray]:
    """The inset with its title, and the points with both ends of their errors, in pixels."""
    figure.canvas.draw()
    x, y, error = points(axes)
    both = np.concatenate([np.stack([x, y - error], 1), np.stack([x, y + error], 1)])
    return axes.child_axes[0].get_tightbbox(), axes.transData.transform(both)


@pytest.mark.parametrize("levels", [LEVELS, {d: 0.3 for d in range(1, 11)}, {d: 0.79 for d in range(1, 11)}])
@pytest.mark.parametrize("base", [0.8, 0.1])
def test_the_inset_covers_no_point(levels: dict[int, float], base: float) -> None:
    table = SweepTable([*baselines(base), *by_decile(levels, base, role="query")], {}, {"query": PROFILE})
    figure = sweep_plots.changes(table)
    box, pixels = _box_and_points(figure.axes[0], figure)
    assert not any(box.contains(*pixel) for pixel in pixels)
    low, high = figure.axes[0].transData.transform([(0, y) for y in figure.axes[0].get_ylim()])[:, 1]
    assert (low < pixels[:, 1]).all() and (pixels[:, 1] < high).all()


def test_a_perplexity_rises_away_from_its_inset() -> None:
    levels = {d: 10.0 + 30.0 / d for d in range(1, 11)}
    table = SweepTable([*baselines(10.0), *by_decile(levels, 10.0, role="query")], {}, {"query": PROFILE})
    figure = sweep_plots.changes(table)
    box, pixels = _box_and_points(figure.axes[0], figure)
    assert not any(box.contains(*pixel) for pixel in pixels)
    assert figure.axes[0].get_ylabel() == "change of perplexity"


def test_a_change_that_dwarfs_the_others_leaves_them_to_be_seen() -> None:
    levels = {1: 4000.0} | {d: 10.0 + 1.0 / d for d in range(2, 11)}
    table = SweepTable([*baselines(10.0), *by_decile(levels, 10.2, role="query")], {}, {"query": PROFILE})
    figure = sweep_plots.changes(table)
    box, pixels = _box_and_points(figure.axes[0], figure)
    assert figure.axes[0].get_yscale() == "symlog"
    assert not any(box.contains(*pixel) for pixel in pixels)
    low, high = figure.axes[0].transData.transform([(0, y) for y in figure.axes[0].get_ylim()])[:, 1]
    heights = (points(figure.axes[0])[1][[1, 9]], pixels[[1, 9], 1])
    assert heights[0][0] > heights[0][1] and heights[1][0] - heights[1][1] > 0.02 * (high - low)
    assert (low < pixels[:, 1]).all() and (pixels[:, 1] < high).all()


def test_other_selections_are_named_under_their_points() -> None:
    cells = [cell("none", 0.8), cell("bottom:0.1", 0.78, role="query"), cell("bottom:0.2", 0.7, role="query")]
    (axes,) = sweep_plots.changes(SweepTable(cells, {})).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["bottom:0.1", "bottom:0.2"]
    assert axes.get_xlabel() == "removed"


def test_before_and_after_share_the_axis_of_scores() -> None:
    before, after = by_decile(LEVELS, order="before"), by_decile({d: 0.5 for d in LEVELS}, order="after")
    table = SweepTable([*baselines(), *before, *after], {})
    figure = sweep_plots.before_and_after(table)
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    summary = table.summary()
    for axes, order in ((left, "before"), (right, "after")):
        assert axes.get_title() == f"all matrices, removed {order} fine-tuning"
        own = summary[(summary["order"] == order) & (summary["control"] == "")]
        np.testing.assert_allclose(points(axes)[1], own["score"])
        np.testing.assert_allclose(points(axes)[2], own["error"], atol=1e-12)
        assert line(axes, "nothing removed")[0] == pytest.approx(own["baseline"].iloc[0])
        assert line(axes, "chance")[0] == pytest.approx(0.3)


def test_a_map_has_a_field_for_each_role_and_block() -> None:
    cells = [cell("none", 0.8)]
    for role in ("query", "key"):
        cells += [cell("decile:1", 0.1 + 0.1 * block, role=role, block=block) for block in range(3)]
    cells.append(cell("decile:1", 0.8, role="value", block=2))
    table = SweepTable(cells, {})
    figure = sweep_plots.by_block(table)
    axes = figure.axes[0]
    (image,) = axes.get_images()
    summary = table.summary().set_index(["role", "block"])
    values = image.get_array().filled(np.nan)
    assert values.shape == (3, 3) and np.isnan(values[2, :2]).all()
    for row, role in enumerate(("query", "key")):
        np.testing.assert_allclose(values[row], [summary.loc[(role, block), "change"] for block in range(3)])
    assert image.get_clim() == pytest.approx((-summary["change"].abs().max(), summary["change"].abs().max()))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["query", "key", "value"]
    dots = {(int(x), int(y)) for dot in axes.get_lines() for x, y in zip(*dot.get_data(), strict=True)}
    decided = {(block, row) for row, role in enumerate(("query", "key")) for block in range(3)}
    assert dots == decided  # value in block 2 did not change


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (sweep_plots.before_and_after, "both before and after"),
        (sweep_plots.by_block, "from single blocks"),
    ],
)
def test_what_a_sweep_lacks_is_not_drawn(draw: Any, message: str, sweep: SweepTable) -> None:
    with pytest.raises(NothingToDrawError, match=message):
        draw(sweep)
    with pytest.raises(NothingToDrawError, match="all blocks of a role"):
        sweep_plots.changes(SweepTable([cell("none", 0.8), cell("decile:1", 0.5, role="key", block=0)], {}))


def test_plot_draws_what_there_is(sweep: SweepTable, tmp_path) -> None:
    blocks = SweepTable([*baselines(), cell("decile:1", 0.5, role="query", block=0)], {})
    assert [path.name for path in sweep.plot(tmp_path / "one")] == ["fig07_changes.png", "fig07_changes.pdf"]
    paths = (sweep + blocks).plot(tmp_path / "both")
    stems = ["fig07_changes", "changes_by_block"]
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")]
    assert all(path.stat().st_size > 1000 for path in paths)
    with pytest.raises(ValueError, match="no metric 'f1'"):
        sweep.plot(tmp_path / "none", "f1")
    assert not (tmp_path / "none").exists()


def test_the_same_sweep_gives_the_same_pictures(sweep: SweepTable, tmp_path) -> None:
    files = [sweep.plot(tmp_path / name) for name in ("one", "two")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
