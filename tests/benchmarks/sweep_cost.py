"""What a sweep costs beside its evaluations, against the loops that one would write.

Sixty cells, six types by ten deciles: ``sweep()`` factors each matrix once, and writes, checks and restores each
ten times. The loop of full SVDs factors each matrix once and does nothing else; the loop that factors again for
every cell is what the published scripts of layer-selective rank reduction (LASER) do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
import torch

from hf_rmt import Decile, SVDPruner
from hf_rmt.workers import cores

_OURS, _LOOP, _AGAIN = "sweep(), 60 cells", "one SVD a matrix", "one SVD a matrix and cell"
_ENTER = "removed(), enter and leave, all matrices, factored before"
_FLOOR = "bare float64 linear algebra, one product a cell"
#: Types of matrices in a block, which is the paper's grid.
_ROLES = ("query", "key", "value", "attention.output", "intermediate", "output")


def main(quick: bool) -> harness.Section:
    """Times of all four."""
    model = harness.bert(quick)
    matrices = [m for m in SVDPruner(model).matrices if m.block is not None]
    weights = [matrix.read().clone() for matrix in matrices]
    warm = SVDPruner(model, progress=False)
    with warm.removed(Decile(1), roles=list(_ROLES)):
        pass  # factored now

    def enter_and_leave() -> None:
        with warm.removed(Decile(10), roles=list(_ROLES)):
            pass

    alternatives = {_OURS: lambda: _sweep(model), _LOOP: lambda: _loop(weights), _FLOOR: lambda: _floor(weights)}
    times = harness.in_turn(alternatives, rounds=1 if quick else harness.ROUNDS, warm_up=not quick)
    # Ten times as long as the loop: two rounds, each beside a sweep.
    slow = harness.in_turn(
        {_OURS: lambda: _sweep(model), _AGAIN: lambda: _again(weights)}, rounds=1 if quick else 2, warm_up=False
    )
    entering = harness.in_turn({_ENTER: enter_and_leave, _LOOP: lambda: _loop(weights)}, rounds=1 if quick else 5)
    return _section(len(weights), times, slow, entering)


def _sweep(model: torch.nn.Module) -> None:
    SVDPruner(model, progress=False).sweep(lambda _: 0.0, roles=list(_ROLES), progress=False)


def _loop(weights: Sequence[torch.Tensor]) -> None:
    torch.set_num_threads(cores())
    for weight in weights:
        torch.linalg.svd(weight, full_matrices=False)


def _again(weights: Sequence[torch.Tensor]) -> None:
    """For each cell: factor, multiply back without a decile, restore."""
    torch.set_num_threads(cores())
    for weight in weights:
        original = weight.clone()
        for group in torch.arange(min(weight.shape)).tensor_split(10):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            s[group] = 0
            weight.copy_(u @ torch.diag(s) @ vh)
            weight.copy_(original)


def _floor(weights: Sequence[torch.Tensor]) -> None:
    harness.one_matrix_a_core(_bare, weights)


def _bare(weight: torch.Tensor) -> None:
    harness.bare_factors(weight)
    rows, cols = weight.shape
    count = min(rows, cols) // 10
    left, right = torch.ones(rows, count), torch.ones(count, cols)
    for _ in range(10):
        weight - left @ right


def _section(
    count: int, times: dict[str, harness.Times], slow: dict[str, harness.Times], entering: dict[str, harness.Times]
) -> harness.Section:
    loop = times[_LOOP].wall
    against_loop = harness.Ratio.of(times[_OURS].wall, loop)
    against_again = harness.Ratio.of(slow[_OURS].wall, slow[_AGAIN].wall)
    share = harness.Ratio.of(entering[_ENTER].wall, entering[_LOOP].wall)
    floor = harness.Ratio.of(times[_OURS].wall, times[_FLOOR].wall)
    rows = [
        [name, harness.number(t.median_wall), harness.number(t.median_cpu), str(harness.Ratio.of(t.wall, base))]
        for name, t, base in (
            *((name, t, loop) for name, t in times.items()),
            (_AGAIN, slow[_AGAIN], slow[_OURS].wall),
            (_ENTER, entering[_ENTER], entering[_LOOP].wall),
        )
    ]
    rows[-2][-1] += " to the sweep"
    return harness.Section(
        title="A sweep without its evaluations",
        what=(
            "`SVDPruner(model).sweep(evaluate, roles=[...])` of six types by ten deciles over the "
            f"{count} matrices of a random model of BERT-base's shape, with an `evaluate` that does nothing, against "
            "`torch.linalg.svd(w, full_matrices=False)` in float32 over the same weights: once, and once for every "
            "cell with the product and the copies that it takes. The sweep factors in float64, tests the vectors of "
            "both sides for its table, and checks before and after each of its 60 removals that nobody else changed a "
            "weight. The loop for every cell had two rounds. `removed()` is of all matrices at once."
        ),
        tables=[harness.Table(["", "wall s", "CPU s", "ratio to one SVD a matrix"], rows)],
        targets=[
            harness.Target("sweep, ratio to one SVD a matrix", 1.6, against_loop.median),
            harness.Target("sweep, ratio to one SVD a matrix and cell", 1 / 6, against_again.median),
        ],
        floor="Gram matrix, eigenvectors and a product in float64, then ten thin products and differences a matrix.",
        distance=(
            f"The sweep takes {floor} times the floor; entering and leaving `removed()` takes {share} "
            "of one SVD a matrix."
        ),
        raw=_raw(times, slow, entering),
    )


def _raw(*groups: dict[str, harness.Times]) -> dict[str, Any]:
    return {f"{number}: {name}": t.raw() for number, group in enumerate(groups) for name, t in group.items()}
