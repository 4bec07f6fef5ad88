"""Null distribution of the KS statistic of a random unit vector (paper section 4).

The statistic D of n entries tied by the norm has no closed-form law, but ``sqrt(n) D`` settles
quickly as n grows. The shipped table holds its quantiles as polynomials in ``1/sqrt(n)``, so that
every n has a null without sampling. ``python -m hf_rmt.theory.ks_null`` makes the table again.
"""

from __future__ import annotations

import argparse
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch

_TABLE = "ks_null.npz"
#: Vector lengths that the table is fitted to.
_LENGTHS = (32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096)
_DEGREE = 3
_SMALLEST_P = 1e-6


@dataclass(frozen=True, eq=False)
class KSNull:
    """Turns KS statistics into p-values.

    Attributes:
        logits: ``(levels,)`` ascending logits of p at which the quantiles are known.
        plain: ``(levels, degree + 1)`` coefficients of the quantile of ``sqrt(n) D`` as a
            polynomial in ``n ** -0.5``, for vectors as they are.
        centred: the same for vectors whose mean was taken out.
        draws: number of Monte Carlo draws behind each quantile. Smaller p-values than the table's
            smallest do not exist: they are reported as that smallest one, never as 0.
    """

    logits: np.ndarray
    plain: np.ndarray
    centred: np.ndarray
    draws: int

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that this null can give."""
        return float(1 / (1 + math.exp(-self.logits[0])))

    def p_value(self, statistic: torch.Tensor, n: int, centred: bool = False) -> torch.Tensor:
        """``p = 1 - C_Dc(D)`` of statistics ``(count,)`` of vectors with n entries."""
        coefficients = self.centred if centred else self.plain
        quantiles = np.polynomial.polynomial.polyval(n**-0.5, coefficients.T)
        # Levels ascend in p, so quantiles descend; np.interp wants ascending abscissae.
        z = statistic.double().numpy() * math.sqrt(n)
        logit = np.interp(z, quantiles[::-1], self.logits[::-1])
        return torch.from_numpy(1 / (1 + np.exp(-logit)))


@dataclass(frozen=True)
class MonteCarloNull:
    """Plain Monte Carlo, as the paper does it: ``p = (1 + #{D_c >= D}) / (draws + 1)``.

    Slower than the table and no better above the table's smallest p-value; here to check it.
    """

    draws: int = 100_000
    seed: int = 0

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that this many draws can give."""
        return 1 / (self.draws + 1)

    def p_value(self, statistic: torch.Tensor, n: int, centred: bool = False) -> torch.Tensor:
        """As ``KSNull.p_value``."""
        reference = _cached_draws(n, self.draws, self.seed)[int(centred)]
        at_least = self.draws - np.searchsorted(reference, statistic.double().numpy(), side="left")
        return torch.from_numpy((1 + at_least) / (self.draws + 1))


@functools.lru_cache(maxsize=1)
def shipped_null() -> KSNull:
    """The null that is part of the package."""
    with resources.files("hf_rmt.theory").joinpath(_TABLE).open("rb") as file, np.load(file) as table:
        return KSNull(table["logits"], table["plain"], table["centred"], int(table["draws"]))


def draw_statistics(n: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted KS statistics, plain and centred, of ``draws`` random unit vectors of length n."""
    from hf_rmt.theory.singular_vectors import ks_statistic

    generator = np.random.Generator(np.random.SFC64([seed, n]))
    plain, centred = np.empty(draws), np.empty(draws)
    rows = max(1, (1 << 18) // n)
    for start in range(0, draws, rows):
        stop = min(draws, start + rows)
        sample = torch.from_numpy(generator.standard_normal((stop - start, n), dtype=np.float32))
        sample /= torch.linalg.vector_norm(sample, dim=1, keepdim=True)
        one, two = ks_statistic(sample)
        plain[start:stop], centred[start:stop] = one.numpy(), two.numpy()
    plain.sort()
    centred.sort()
    return plain, centred


_LOCK = threading.Lock()
_drawn = functools.lru_cache(maxsize=32)(draw_statistics)


def _cached_draws(n: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    with _LOCK:  # several workers ask at once, and the cache alone would let each draw its own
        return _drawn(n, draws, seed)


def fit_table(draws: int, seed: int, workers: int) -> KSNull:
    """Sample every length of the table and fit its quantiles as polynomials in ``1/sqrt(n)``."""
    torch.set_num_threads(1)
    edge = math.log(_SMALLEST_P / (1 - _SMALLEST_P))
    logits = np.linspace(edge, 10.0, 600)
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        jobs = [pool.submit(draw_statistics, n, draws, seed) for n in reversed(_LENGTHS)]
        samples = [job.result() for job in jobs][::-1]
    fits = [_fit_quantiles(logits, [sample[side] for sample in samples]) for side in (0, 1)]
    return KSNull(logits, fits[0], fits[1], draws)


def _fit_quantiles(logits: np.ndarray, samples: list[np.ndarray]) -> np.ndarray:
    p = 1 / (1 + np.exp(-logits))
    scaled = [np.quantile(d, 1 - p) * math.sqrt(n) for d, n in zip(samples, _LENGTHS, strict=True)]
    powers = np.vander(np.array(_LENGTHS) ** -0.5, _DEGREE + 1, increasing=True)
    coefficients = np.linalg.lstsq(powers, np.array(scaled), rcond=None)[0]
    return _smooth_tail(coefficients, p).T


def _smooth_tail(coefficients: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Replace the noisy end below p = 1e-3 by a quadratic in sqrt(-ln p), blended in over a decade.

    The supremum of a Gaussian process has tails ``exp(-c z^2)``, so z is almost linear there.
    """
    t = np.sqrt(-np.log(p))
    tail = (p < 3e-3) & (p > 2e-6)
    powers = np.vander(t, 3)
    smooth = powers @ np.linalg.lstsq(powers[tail], coefficients.T[tail], rcond=None)[0]
    weight = np.clip((np.log10(p) + 4) / 1.0, 0, 1)[:, None]  # 1 above 1e-3, 0 below 1e-4
    return (weight * coefficients.T + (1 - weight) * smooth).T


def main() -> None:
    """Make the shipped table; about half an hour on two cores with the default number of draws."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=20241017)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default=str(resources.files("hf_rmt.theory").joinpath(_TABLE)))
    options = parser.parse_args()
    table = fit_table(options.draws, options.seed, options.workers)
    np.savez_compressed(options.out, logits=table.logits, plain=table.plain, centred=table.centred, draws=table.draws)


if __name__ == "__main__":
    main()
