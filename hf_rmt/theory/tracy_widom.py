"""Where a finite random matrix ends: Tracy-Widom thresholds at the edges of the law (beta = 1).

A matrix of finite size fluctuates at the Marchenko-Pastur edges, so 12 to 17 % of pure-noise
matrices have a value beyond them. The thresholds here are crossed at a chosen rate instead.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from scipy import interpolate, optimize, special

from hf_rmt.theory.marchenko_pastur import MarchenkoPastur, median_of_law

_GRID = np.linspace(-10.0, 10.0, 401)
_LOCK = threading.Lock()


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[interpolate.CubicSpline, interpolate.CubicSpline]:
    """Splines of ``F1`` and of ``log(1 - F1)``, the second for the far upper tail.

    ``F1(x) = det(1 - Ai(s + t + x))`` on s, t > 0 (Ferrari & Spohn 2005), by Gauss-Legendre
    quadrature, which converges exponentially (Bornemann 2010). A third of a second.
    """
    nodes, weights = np.polynomial.legendre.leggauss(32)
    nodes, root = 8 * (nodes + 1), np.sqrt(8 * weights)  # on [0, 16]: Ai(16 - 10) is below 1e-5, its square below 1e-10
    upper = np.triu_indices(len(nodes))
    sums = (nodes[:, None] + nodes)[upper]
    kernel = np.empty((len(nodes), len(nodes)))
    cdf = np.empty(len(_GRID))
    for i, x in enumerate(_GRID):
        kernel[upper] = kernel.T[upper] = special.airy(sums + x)[0]
        cdf[i] = np.linalg.det(np.eye(len(nodes)) - root[:, None] * kernel * root)
    cdf = cdf.clip(1e-300, 1 - 1e-15)
    return interpolate.CubicSpline(_GRID, cdf), interpolate.CubicSpline(_GRID, np.log1p(-cdf))


def _splines() -> tuple[interpolate.CubicSpline, interpolate.CubicSpline]:
    with _LOCK:  # several workers ask at once, and the cache alone would let each make its own
        return _tables()


def tw1_cdf(x: float | np.ndarray) -> np.ndarray:
    """Distribution function of the Tracy-Widom law for beta = 1, to 1e-8; any shape."""
    x = np.asarray(x, dtype=np.float64)
    return np.where(x < -10, 0.0, np.where(x > 10, 1.0, _splines()[0](x.clip(-10, 10)).clip(0, 1)))


def _survival(x: float, noise: float) -> float:
    """``P(TW1 + N(0, noise^2) > x)``."""
    points, weights = np.polynomial.hermite_e.hermegauss(48)
    tail = np.exp(_splines()[1]((x - noise * points).clip(-10, 10)))
    return float(weights @ tail / math.sqrt(2 * math.pi))


def check_rate(rate: float) -> None:
    """Raise if this is no false-positive rate that the tables resolve."""
    if not 1e-9 <= rate < 1:
        raise ValueError(f"rate is {rate!r}: the false-positive rate of an edge lies between 0 and 1 (at least 1e-9)")


@functools.lru_cache(maxsize=4096)
def tw1_quantile(rate: float, noise: float = 0.0) -> float:
    """The x that ``TW1 + N(0, noise^2)`` exceeds with probability ``rate``.

    Args:
        rate: false-positive rate, from 1e-9 to below 1.
        noise: standard deviation of an independent Gaussian, in units of the Tracy-Widom scale;
            it stands for the error of an estimated sigma.
    """
    check_rate(rate)
    width = 12 + 12 * noise
    return float(optimize.brentq(lambda x: _survival(x, noise) - rate, -width, width, xtol=1e-10))


def bulk_sigma_noise(rows: int, cols: int) -> float:
    """Relative standard deviation of the ``bulk`` sigma of a pure-noise matrix.

    Its median is one eigenvalue among rigid neighbours: the number of eigenvalues below a point has
    variance ``(ln p + c) / pi^2``, and dividing by the density of the law at its median gives
    ``kappa / p``. ``c = 1.05 - 0.65 r`` was fitted to 1,500 to 4,000 simulated matrices a shape
    (p = 50 to 250, r = 0.05 to 1), which it meets within 4 %.
    """
    law = MarchenkoPastur(rows, cols)
    median = median_of_law(rows, cols)
    density = float(law.density(torch.tensor(median)))
    p = min(rows, cols)
    count_variance = (math.log(p) + 1.05 - 0.65 * law.ratio) / math.pi**2
    return math.sqrt(count_variance) / (p * density * median)


def upper_threshold(rows: int, cols: int, sigma: float, rate: float, sigma_noise: float = 0.0) -> float:
    """Singular value that the largest one of pure noise exceeds with probability ``rate``.

    Johnstone 2001 with the second-order centring of Ma 2012:
    ``mu = (Q + P)^2``, ``w = (Q + P)(1/Q + 1/P)^(1/3)``, ``Q = sqrt(q - 1/2)``, ``P = sqrt(p - 1/2)``.

    Args:
        rows, cols: shape of the matrix.
        sigma: standard deviation of the entries.
        rate: false-positive rate per matrix.
        sigma_noise: relative standard deviation of sigma; widens the threshold accordingly.
    """
    big, small = math.sqrt(max(rows, cols) - 0.5), math.sqrt(min(rows, cols) - 0.5)
    mu = (big + small) ** 2
    width = (big + small) * (1 / big + 1 / small) ** (1 / 3)
    x = tw1_quantile(rate, 2 * sigma_noise * mu / width)
    return sigma * math.sqrt(max(mu + width * x, 0.0))


def lower_threshold(rows: int, cols: int, sigma: float, rate: float, sigma_noise: float = 0.0) -> float:
    """Singular value that the smallest one of pure noise falls below with probability ``rate``.

    Ma 2012, on the logarithmic scale. 0 for a square matrix, whose hard edge at 0 has no outliers.
    Arguments as for ``upper_threshold``.
    """
    if rows == cols:
        return 0.0
    big, small = math.sqrt(max(rows, cols) - 0.5), math.sqrt(min(rows, cols) - 0.5)
    mu = (big - small) ** 2
    tau = (big - small) * (1 / small - 1 / big) ** (1 / 3) / mu
    x = tw1_quantile(rate, 2 * sigma_noise / tau)
    return sigma * math.exp((math.log(mu) + tau**2 / 8 - tau * x) / 2)


def hard_edge_p_value(s_min: float, size: int, sigma: float) -> float:
    """Chance of so small a smallest singular value in a square noise matrix (Edelman 1988).

    ``P(p s_min^2 / sigma^2 < t) = 1 - exp(-(t/2 + sqrt t))``.
    """
    t = size * (s_min / sigma) ** 2
    return -math.expm1(-(t / 2 + math.sqrt(t)))
