"""What the tests of the mathematics share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small matrices: threads cost more than they bring."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def orthonormal() -> Callable[[np.random.Generator, int, int], np.ndarray]:
    """``orthonormal(rng, rows, cols)``: random orthonormal columns."""

    def make(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((rows, cols)))[0]

    return make
