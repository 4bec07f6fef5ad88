"""Time of the tests of both sides as a share of the decomposition they come after, on one thread.

The tests read every entry of both sides once; they should not be felt beside the factoring.
"""

from __future__ import annotations

import math

import harness
import numpy as np
import torch

from hf_rmt.theory.decomposition import SVDFactors, svd
from hf_rmt.theory.singular_vectors import test_vectors
from hf_rmt.workers import threads

_SHAPES = [(384, 384), (768, 768), (3072, 768), (768, 3072), (4096, 4096)]
_QUICK = [(64, 64), (96, 200)]
_SVD, _TESTS, _FLOOR = "svd", "tests", "floor"
#: Entries at a time in the floor, so that they stay in the processor's cache.
_CHUNK = 1 << 19


def main(quick: bool) -> harness.Section:
    """One row a shape."""
    times = {}
    with threads(1):
        for shape in _QUICK if quick else _SHAPES:
            big = max(shape) >= 4096
            times[shape] = _times(shape, rounds=1 if quick else 2 if big else harness.ROUNDS, warm_up=not big)
    return _section(times)


def _times(shape: tuple[int, int], rounds: int, warm_up: bool) -> dict[str, harness.Times]:
    weight = harness.gaussian(*shape)
    factors = svd(weight, torch.float32)
    name = f"{shape[0]} x {shape[1]}"
    alternatives = {
        f"{name} {_SVD}": lambda: svd(weight, torch.float32),
        f"{name} {_TESTS}": lambda: _tests(factors),
        f"{name} {_FLOOR}": lambda: (_bare(factors.vh), _bare(factors.u.mT)),
    }
    times = harness.in_turn(alternatives, rounds, warm_up)
    return {label.rpartition(" ")[2]: each for label, each in times.items()}


def _tests(factors: SVDFactors) -> None:
    """As ``analyze()`` runs them."""
    testable = factors.testable()
    test_vectors(factors.vh, testable)
    test_vectors(factors.u.mT, testable)


def _bare(vectors: torch.Tensor) -> None:
    """One sort of every vector, and the Gaussian of every entry as it is and centred."""
    count, n = vectors.shape
    rows = max(1, _CHUNK // n)
    for start in range(0, count, rows):
        ordered = torch.from_numpy(np.sort(vectors[start : start + rows].contiguous().numpy(), axis=1))
        for _ in range(2):
            (ordered * math.sqrt(n / 2)).erf_()


def _section(times: dict[tuple[int, int], dict[str, harness.Times]]) -> harness.Section:
    rows, targets, distances = [], [], []
    for (m, n), each in times.items():
        share = harness.Ratio.of(each[_TESTS].wall, each[_SVD].wall)
        seconds = [each[name].median_wall for name in (_SVD, _TESTS, _FLOOR)]
        rounds = len(each[_SVD].wall)
        rows.append([f"{m} x {n}", *map(harness.number, seconds), str(share), str(rounds)])
        targets.append(harness.Target(f"tests by svd, {m} x {n}", 0.1, share.median))
        to_floor = harness.Ratio.of(each[_TESTS].wall, each[_FLOOR].wall)
        distances.append(f"{m} x {n}: {harness.number(to_floor.median)} times the floor")
    header = ["", "svd s", "tests s", "floor of the tests s", "tests by svd", "rounds"]
    return harness.Section(
        title="Share of the vector tests",
        what=(
            "Wall time of the Kolmogorov-Smirnov tests of both sides, plain and centred, with their p-values, "
            "by that of the decomposition in front of them. One thread, random matrices."
        ),
        tables=[harness.Table(header, rows)],
        targets=targets,
        floor="One sort of every vector and two error functions of every entry, in float32, nothing else.",
        distance="; ".join(distances) + ".",
        raw={f"{m} x {n}": {name: t.raw() for name, t in each.items()} for (m, n), each in times.items()},
    )
