"""All numbers about one spectrum that a report's table holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_rmt.theory import spectrum, tracy_widom
from hf_rmt.theory.marchenko_pastur import SIGMA_RULES, MarchenkoPastur, SigmaRule, sigma_of


@dataclass(frozen=True)
class Law:
    """The Marchenko-Pastur law that a matrix is held against, and where its finite-size noise ends."""

    mp: MarchenkoPastur
    sigma_rule: str
    lower_tw: float
    upper_tw: float

    @classmethod
    def fit(
        cls, rule: SigmaRule | float, s: torch.Tensor, shape: tuple[int, int], entry_std: float, rate: float
    ) -> Law:
        """The law under a sigma rule, with Tracy-Widom thresholds at a false-positive rate.

        The thresholds are widened by what is not known of an estimated sigma.
        """
        rows, cols = shape
        sigma = sigma_of(rule, s, shape, entry_std)
        noise = _sigma_noise(rule, rows, cols)
        return cls(
            MarchenkoPastur(rows, cols, sigma),
            rule if isinstance(rule, str) else "given",
            tracy_widom.lower_threshold(rows, cols, sigma, rate, noise),
            tracy_widom.upper_threshold(rows, cols, sigma, rate, noise),
        )


def _sigma_noise(rule: SigmaRule | float, rows: int, cols: int) -> float:
    """Relative standard deviation of sigma under a rule; 0 where it is known and not estimated."""
    if rule == "bulk":
        return tracy_widom.bulk_sigma_noise(rows, cols)
    return 1 / math.sqrt(2 * rows * cols) if rule == "empirical" else 0.0


def entry_std_of(weight: torch.Tensor, s: torch.Tensor) -> float:
    """Standard deviation of the entries, whose squares add up to those of the singular values.

    Args:
        weight: ``(m, n)``.
        s: ``(p,)`` its singular values, float64.
    """
    mean = float(weight.sum(dtype=torch.float64)) / weight.numel()
    return math.sqrt(max(float(s @ s) / weight.numel() - mean**2, 0.0))


def outliers(law: MarchenkoPastur, s: torch.Tensor) -> tuple[int, int]:
    """Number of singular values above and below the asymptotic edges of the law."""
    return int((s > law.upper_edge).sum()), int((s < law.lower_edge).sum())


def spectrum_statistics(s: torch.Tensor, shape: tuple[int, int], entry_std: float, law: Law) -> dict[str, Any]:
    """The columns of the table that singular values alone decide.

    Args:
        s: ``(p,)`` float64, descending.
        shape: ``(m, n)`` of the matrix.
        entry_std: standard deviation of its entries.
        law: what to hold it against.
    """
    mp = law.mp
    above, below = outliers(mp, s)
    energy = s.double() ** 2
    total = float(energy.sum())
    outside = float(energy[(s > mp.upper_edge) | (s < mp.lower_edge)].sum())
    fit = spectrum.power_law(s)
    result = {
        "sigma": mp.sigma,
        "sigma_rule": law.sigma_rule,
        "lower_edge": mp.lower_edge,
        "upper_edge": mp.upper_edge,
        "n_above": above,
        "n_below": below,
        "n_above_tw": int((s > law.upper_tw).sum()),
        "n_below_tw": int((s < law.lower_tw).sum()),
    }
    for rule in SIGMA_RULES:
        other = MarchenkoPastur(*shape, sigma_of(rule, s, shape, entry_std))
        result[f"n_above_{rule}"], result[f"n_below_{rule}"] = outliers(other, s)
    square = shape[0] == shape[1] and mp.sigma > 0
    return result | {
        "mass_outside": outside / total if total else math.nan,
        "mp_distance": mp.distance(s) if mp.sigma > 0 else math.nan,
        "hard_edge_p": tracy_widom.hard_edge_p_value(float(s[-1]), len(s), mp.sigma) if square else math.nan,
        "s_max": float(s[0]),
        "s_min": float(s[-1]),
        "stable_rank": spectrum.stable_rank(s),
        "effective_rank": spectrum.effective_rank(s),
        "alpha": fit.alpha,
        "alpha_hat": spectrum.alpha_hat(s, fit.alpha),
        "mp_soft_rank": spectrum.mp_soft_rank(s, mp.upper_edge),
        "spacing_ratio": spectrum.spacing_ratio(s),
        "log_norm": spectrum.log_norm(s),
        "log_alpha_norm": spectrum.log_alpha_norm(s, fit.alpha),
    }
