"""How time grows: with the size of a matrix, and with the number of matrices.

Dense linear algebra is cubic and a list of matrices is linear; an exponent above that would be a
cost of ours.
"""

from __future__ import annotations

import harness
import torch
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.theory.decomposition import svd
from hf_rmt.theory.singular_vectors import test_vectors
from hf_rmt.workers import threads

_SIZES, _ONCE = [256, 384, 512, 768, 1024, 1536, 2048], [4096]
_COUNTS, _SIDE = [6, 12, 24, 48], 384
#: From this size on the exponent is given once more: below it, what is not cubic still shows.
_LARGE = 1024


def main(quick: bool) -> harness.Section:
    """Seconds by size and by number, with the slopes."""
    rounds = 1 if quick else harness.ROUNDS
    by_size = _by_size([64, 96] if quick else _SIZES, rounds, warm_up=True)
    by_size |= _by_size([128] if quick else _ONCE, rounds=1, warm_up=False)
    by_count = _by_count(_COUNTS[:2] if quick else _COUNTS, 64 if quick else _SIDE, rounds)
    return _section(by_size, by_count, large=96 if quick else _LARGE)


def _by_size(sizes: list[int], rounds: int, warm_up: bool) -> dict[int, harness.Times]:
    weights = {n: harness.gaussian(n, n) for n in sizes}
    with threads(1):
        times = harness.in_turn({f"{n} x {n}": lambda n=n: _one(weights[n]) for n in sizes}, rounds, warm_up)
    return dict(zip(sizes, times.values(), strict=True))


def _one(weight: torch.Tensor) -> None:
    factors = svd(weight, torch.float32)
    testable = factors.testable()
    test_vectors(factors.vh, testable)
    test_vectors(factors.u.mT, testable)


def _by_count(counts: list[int], side: int, rounds: int) -> dict[int, harness.Times]:
    torch.manual_seed(0)
    layers = [nn.Linear(side, side, bias=False) for _ in range(max(counts))]
    analyzers = {count: RMTAnalyzer(nn.Sequential(*layers[:count])) for count in counts}
    runs = {f"{count} matrices": lambda a=analyzer: a.analyze(progress=False) for count, analyzer in analyzers.items()}
    return dict(zip(counts, harness.in_turn(runs, rounds).values(), strict=True))


def _slope(times: dict[int, harness.Times], least: int = 0) -> float:
    kept = {size: each.median_wall for size, each in times.items() if size >= least}
    return harness.exponent(kept, kept.values())


def _section(by_size: dict[int, harness.Times], by_count: dict[int, harness.Times], large: int) -> harness.Section:
    whole, tail, linear = _slope(by_size), _slope(by_size, large), _slope(by_count)
    side = _SIDE
    return harness.Section(
        title="Growth with size and with number",
        what=(
            "Wall time of one decomposition with the tests of both sides, n x n, one thread (the largest n once), "
            f"and of `analyze()` with both sides over a model of matrices of {side} x {side}. Exponents are "
            "slopes of a straight line through the logarithms."
        ),
        tables=[
            harness.Table(["n", "wall s", "s by n³, 1e-9", "rounds"], [_size_row(n, t) for n, t in by_size.items()]),
            harness.Table(["matrices", "wall s", "s a matrix"], [_count_row(c, t) for c, t in by_count.items()]),
        ],
        floor="3 in n, as of every dense decomposition; 1 in the number of matrices.",
        distance=(
            f"{whole:.2f} in n over all sizes, {tail:.2f} from {large} on (small matrices run at a lower speed, "
            f"which flattens the slope); {linear:.2f} in the number of matrices (a fixed cost of each call "
            "flattens that one)."
        ),
        raw={
            "by_size": {str(n): each.raw() for n, each in by_size.items()},
            "by_count": {str(count): each.raw() for count, each in by_count.items()},
            "exponents": {"n": whole, "n_large": tail, "count": linear},
        },
    )


def _size_row(n: int, times: harness.Times) -> list[str]:
    seconds = times.median_wall
    return [str(n), harness.number(seconds), harness.number(1e9 * seconds / n**3), str(len(times.wall))]


def _count_row(count: int, times: harness.Times) -> list[str]:
    return [str(count), harness.number(times.median_wall), harness.number(times.median_wall / count)]
