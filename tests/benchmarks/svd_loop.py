"""``analyze()`` against the loop that one would write: ``torch.linalg.svd`` over the same weights.

The loop is float32 and keeps nothing; ``analyze()`` factors in float64 and tests the vectors of both
sides besides. Time is compared with the faster of the loop on one thread and on all of them, and
errors with a float64 SVD by LAPACK.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np
import torch

from hf_rmt import RMTAnalyzer
from hf_rmt.theory.decomposition import svd
from hf_rmt.workers import cores

#: A singular value is well separated if both neighbours are this share of the largest one away.
_SEPARATED = 1e-3

_OURS, _FLOOR = "analyze(), both sides", "bare float64 linear algebra"
_ONE, _ALL = "float32 SVD loop, one thread", "float32 SVD loop, all threads"
Factors = tuple[np.ndarray, np.ndarray, np.ndarray]


def main(quick: bool) -> harness.Section:
    """Times and errors of both."""
    analyzer = RMTAnalyzer(harness.bert(quick))
    weights = [matrix.read() for matrix in analyzer.matrices]
    alternatives = {
        _OURS: lambda: analyzer.analyze(progress=False),
        _ONE: lambda: _loop(weights, 1),
        _ALL: lambda: _loop(weights, cores()),
        _FLOOR: lambda: harness.one_matrix_a_core(harness.bare_factors, weights),
    }
    times = harness.in_turn(alternatives, rounds=1 if quick else harness.ROUNDS, warm_up=not quick)
    errors = _errors(weights)
    base = min((_ONE, _ALL), key=lambda name: times[name].median_wall)
    return _section(len(weights), times, base, errors)


def _loop(weights: Sequence[torch.Tensor], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for weight in weights:
            torch.linalg.svd(weight, full_matrices=False)
    finally:
        torch.set_num_threads(before)


def _errors(weights: Sequence[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Largest error of each kind over all matrices, for each way to factor them."""
    ways: dict[str, Callable[[torch.Tensor], Factors]] = {
        "hf_rmt, float64 vectors": lambda weight: _ours(weight, torch.float64),
        "hf_rmt, float32 vectors (as analyze() tests them)": lambda weight: _ours(weight, torch.float32),
        "float32 SVD loop": _float32,
    }
    worst: dict[str, dict[str, float]] = {name: {} for name in ways}
    for index, weight in enumerate(weights):
        harness.say(f"errors: matrix {index + 1} of {len(weights)}")
        reference = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        for name, way in ways.items():
            for kind, error in _errors_of(way(weight), reference).items():
                worst[name][kind] = max(worst[name].get(kind, 0.0), error)
    return worst


def _ours(weight: torch.Tensor, dtype: torch.dtype) -> Factors:
    factors = svd(weight, dtype)
    return factors.u.double().numpy(), factors.s.numpy(), factors.vh.double().numpy()


def _float32(weight: torch.Tensor) -> Factors:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u.double().numpy(), s.double().numpy(), vh.double().numpy()


def _errors_of(factors: Factors, reference: Any) -> dict[str, float]:
    (u, s, vh), (u_ref, s_ref, vh_ref) = factors, reference
    apart = -np.diff(s_ref) > _SEPARATED * s_ref[0]
    separated = np.append(apart, True) & np.insert(apart, 0, True)
    identity = np.eye(len(s))
    overlaps = np.concatenate([(vh * vh_ref).sum(1)[separated], (u * u_ref).sum(0)[separated]])
    return {
        "values": float((np.abs(s - s_ref) / s_ref).max()),
        "vectors": float(np.abs(1 - np.abs(overlaps)).max()) if len(overlaps) else 0.0,
        "left": float(np.abs(u.T @ u - identity).max()),
        "right": float(np.abs(vh @ vh.T - identity).max()),
    }


def _section(
    count: int, times: dict[str, harness.Times], base: str, errors: dict[str, dict[str, float]]
) -> harness.Section:
    ratios = {name: harness.Ratio.of(times[name].wall, times[base].wall) for name in times}
    to_floor = harness.Ratio.of(times[_OURS].wall, times[_FLOOR].wall)
    rows = [
        [name, harness.number(each.median_wall), harness.number(each.median_cpu), str(ratios[name])]
        for name, each in times.items()
    ]
    error_rows = [[name, *(f"{error:.1e}" for error in kinds.values())] for name, kinds in errors.items()]
    ours_error = max(kinds["values"] for name, kinds in errors.items() if name.startswith("hf_rmt"))
    return harness.Section(
        title="Time and accuracy against a float32 SVD loop",
        what=(
            f"`RMTAnalyzer(model).analyze()` with both sides over the {count} matrices of a random model of "
            "BERT-base's shape, against `torch.linalg.svd(w, full_matrices=False)` in float32 over the same "
            f"weights. The ratio is to the faster loop: {base}. Errors are the largest over all matrices, against "
            "a float64 SVD of the same weights; vectors are compared where both neighbouring singular values are "
            f"at least {_SEPARATED:g} of the largest away." + _first(times[_OURS].first)
        ),
        tables=[
            harness.Table(["", "wall s", "CPU s", "ratio of wall time"], rows),
            harness.Table(
                ["largest error", "singular value, relative", "vector, 1 - overlap", "UᵀU - I", "VVᵀ - I"], error_rows
            ),
        ],
        targets=[
            harness.Target("wall time, ratio to the loop", 0.85, ratios[_OURS].median),
            harness.Target("relative error of a singular value", 1e-6, ours_error),
        ],
        floor=(
            "Gram matrix, its eigenvectors and one product in float64, by the fastest routines at hand and one "
            f"matrix a core: {harness.number(times[_FLOOR].median_wall)} s."
        ),
        distance=f"`analyze()` takes {to_floor} times the floor; the rest is tests, statistics and checks.",
        raw={"times": {name: each.raw() for name, each in times.items()}, "errors": errors},
    )


def _first(seconds: float) -> str:
    return "" if math.isnan(seconds) else f" The first `analyze()`, the warm-up, took {harness.number(seconds)} s."
