from __future__ import annotations

from typing import NoReturn

import numpy as np
import pytest
import torch

from hf_rmt.theory import linalg


def refuse(*_: object, **__: object) -> NoReturn:
    raise np.linalg.LinAlgError("did not converge")


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_torch(transposed: bool) -> None:
    a, b = gaussian(30, 20), gaussian(20, 40)
    a = a.mT.contiguous().mT if transposed else a
    torch.testing.assert_close(linalg.matmul(a, b), a @ b, rtol=1e-12, atol=1e-12)


def test_eigenvalues_ascend_and_vectors_belong_to_them() -> None:
    symmetric = gaussian(30, 30)
    symmetric = symmetric + symmetric.mT
    pair = linalg.eigh(symmetric)
    assert pair is not None
    values, vectors = pair
    assert bool((values.diff() > 0).all())
    torch.testing.assert_close(vectors * values @ vectors.mT, symmetric, rtol=0, atol=1e-12)
    torch.testing.assert_close(linalg.eigvalsh(symmetric), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (20, 20)], ids=str)
@pytest.mark.parametrize("converges", [True, False])
@pytest.mark.parametrize("column_major", [True, False])
def test_svd_with_and_without_its_fallback(
    shape: tuple[int, int], converges: bool, column_major: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = gaussian(*shape[::-1]).mT if column_major else gaussian(*shape)
    before = matrix.clone()
    expected = torch.linalg.svdvals(matrix)
    if not converges:
        monkeypatch.setattr(np.linalg, "svd", refuse)
    u, s, vh = linalg.svd_thin(matrix)
    torch.testing.assert_close(s, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(u * s @ vh, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(linalg.svd_values(matrix), expected, rtol=1e-12, atol=0)
    assert torch.equal(matrix, before)


def test_an_eigensolver_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.linalg, "eigh", refuse)
    monkeypatch.setattr(np.linalg, "eigvalsh", refuse)
    assert linalg.eigh(torch.eye(4, dtype=torch.float64)) is None
    assert linalg.eigvalsh(torch.eye(4, dtype=torch.float64)) is None
