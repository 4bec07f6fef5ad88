"""The analysis of one matrix: factor it, test its vectors, hold its spectrum against the law."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_rmt.config import AnalysisConfig
from hf_rmt.models.digests import digest_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports.result import MatrixResult, Spectrum
from hf_rmt.theory.controls import control_matrix, seed_for
from hf_rmt.theory.covariance import Eigenbasis, overlap, overlap_columns
from hf_rmt.theory.decomposition import SVDFactors, as_float, count_not_finite, singular_values, svd
from hf_rmt.theory.ks_null import MonteCarloNull
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur, sigma_of
from hf_rmt.theory.singular_vectors import MIN_ENTRIES, VectorTest, test_vectors
from hf_rmt.theory.statistics import Law, entry_std_of, outliers, spectrum_statistics
from hf_rmt.workers import where_it_fits


@dataclass(frozen=True)
class Bases:
    """Eigenbases of the activations around one matrix: of what enters, and of what it puts out."""

    right: Eigenbasis | None = None
    left: Eigenbasis | None = None


def analyse_matrix(
    matrix: WeightMatrix,
    config: AnalysisConfig,
    digest: bool = False,
    bases_of: Callable[[WeightMatrix, torch.Tensor], Bases] | None = None,
) -> MatrixResult:
    """Everything a report says about one matrix.

    Args:
        matrix: which one; it is read once.
        config: the settings.
        digest: take a hash of the weights, by which a resumed run knows them.
        bases_of: gives those of its activations, by the matrix and its weight, for the overlaps.

    Raises:
        ValueError: the weight cannot be read, or is not what the activations belong to, or, if
            ``config.strict``, is not finite.
    """
    weight = matrix.read()
    bases = None if bases_of is None else bases_of(matrix, weight)
    result = where_it_fits(weight, config.device, lambda placed: analyse_weight(matrix, placed, config, bases)[0])
    return replace(result, digest=digest_of(weight)) if digest else result


def analyse_weight(
    matrix: WeightMatrix, weight: torch.Tensor, config: AnalysisConfig, bases: Bases | None = None
) -> tuple[MatrixResult, SVDFactors | None]:
    """The same of a matrix that has been read, where its weight is, with its factors; None where vectors were not asked
    for."""
    precision = torch.finfo(weight.dtype)
    weight = as_float(weight)
    row = _labels(matrix)
    if bad := count_not_finite(weight):
        message = f"{bad} of {weight.numel()} entries are NaN or Inf"
        if config.strict:
            raise ValueError(f"{matrix.name}: {message}; repair the weights, or analyse without strict")
        return MatrixResult(row=row | {"note": message}), None
    spectrum, factors = _spectrum(weight, config)
    entry_std = entry_std_of(weight, spectrum.s)
    law = Law.fit(config.sigma, spectrum.s, matrix.shape, entry_std, config.rate)
    row |= spectrum_statistics(spectrum.s, matrix.shape, entry_std, law) | _vector_columns(spectrum)
    row["note"] = _note(spectrum, matrix.shape, precision)
    result = MatrixResult(s=spectrum.s, right=spectrum.right, left=spectrum.left, row=row)
    if config.control is not None:
        random = control_matrix(weight, config.control, seed_for(config.seed, matrix.name), law.mp.sigma)
        control = _spectrum(random.to(weight.device), config)[0]
        result = replace(result, control=control)
        row |= _control_columns(control, random, config)
    if factors is not None and bases is not None:
        result = _with_overlaps(result, factors, bases)
    return result, factors


def _labels(matrix: WeightMatrix) -> dict[str, Any]:
    labels = {key: getattr(matrix, key) for key in ("name", "role", "stack", "block", "expert", "part")}
    return labels | {"rows": matrix.shape[0], "cols": matrix.shape[1]}


def _spectrum(weight: torch.Tensor, config: AnalysisConfig) -> tuple[Spectrum, SVDFactors | None]:
    if config.sides == "none":
        return Spectrum(s=singular_values(weight).cpu()), None
    factors = svd(weight, torch.float32)
    null = MonteCarloNull(config.null_draws, config.seed) if config.null_draws else None
    testable = factors.testable()
    spectrum = Spectrum(
        s=factors.s.cpu(),
        right=test_vectors(factors.vh, testable, null) if config.right else None,
        left=test_vectors(factors.u.mT, testable, null) if config.left else None,
    )
    return spectrum, factors


def _with_overlaps(result: MatrixResult, factors: SVDFactors, bases: Bases) -> MatrixResult:
    """Overlaps of both sides with the activations, and the columns that sum them up."""
    known = factors.testable()
    right = overlap(factors.vh, bases.right, known) if bases.right is not None else None
    left = overlap(factors.u.mT, bases.left, known) if bases.left is not None else None
    edges = (result.row["lower_edge"], result.row["upper_edge"])
    columns: dict[str, Any] = {}
    for prefix, match, test in (("", right, result.right), ("left_", left, result.left)):
        p_values = None if test is None else test.p_values
        summary = overlap_columns(result.s, edges, match, p_values)
        columns |= {prefix + key: value for key, value in summary.items()}
    return replace(result, right_overlap=right, left_overlap=left, row=result.row | columns)


def _vector_columns(spectrum: Spectrum) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for side, test in (("right", spectrum.right), ("left", spectrum.left)):
        if test is not None:
            tested = not bool(test.p_values.isnan().all())
            columns[f"{side}_significant"] = test.significant if tested else None
            columns[f"{side}_discoveries"] = int(test.discoveries().sum()) if tested else None
            columns[f"{side}_plateau"] = test.plateau if tested else None
    return columns


def _note(spectrum: Spectrum, shape: tuple[int, int], precision: torch.finfo) -> str:
    notes = []
    if spectrum.s[0] == 0:
        notes.append("all entries are zero")
    elif (rank := _rank_to_rounding(spectrum.s, shape, precision)) < len(spectrum.s) // 2:
        notes.append(f"rank {rank} to the precision of torch.{precision.dtype}: the bulk is rounding")
    for side, test in (("right", spectrum.right), ("left", spectrum.left)):
        if test is not None:
            notes += _test_note(side, test)
    return "; ".join(notes)


def _rank_to_rounding(s: torch.Tensor, shape: tuple[int, int], precision: torch.finfo) -> int:
    """Singular values above the norm of the noise that rounding the entries to their dtype makes.

    An entry is rounded by its own precision, and by several times that where a sum made it.
    """
    rows, cols = shape
    rounding = 4 * precision.eps * math.sqrt(float(s @ s) / (rows * cols) / 12)
    return int((s > rounding * (math.sqrt(rows) + math.sqrt(cols))).sum())


def _test_note(side: str, test: VectorTest) -> list[str]:
    if test.entries < MIN_ENTRIES:
        return [f"no {side} p-values: vectors of fewer than {MIN_ENTRIES} entries"]
    untested = int(test.p_values.isnan().sum())
    if untested:
        return [f"{untested} {side} vectors not tested: their singular values are zero or degenerate"]
    return []


def _control_columns(control: Spectrum, random: torch.Tensor, config: AnalysisConfig) -> dict[str, Any]:
    shape = (random.shape[0], random.shape[1])
    sigma = sigma_of(config.sigma, control.s, shape, entry_std_of(random, control.s))
    law = MarchenkoPastur(*shape, sigma)
    above, below = outliers(law, control.s)
    columns = {
        f"control_{key}": value for key, value in _vector_columns(control).items() if key.endswith("significant")
    }
    distance = law.distance(control.s) if sigma > 0 else None
    return columns | {"control_n_above": above, "control_n_below": below, "control_mp_distance": distance}
