from __future__ import annotations

import pytest
import torch

from hf_rmt.theory.projection import prediction, principal_basis, reading_basis


def covariance(seed: int, width: int = 12) -> torch.Tensor:
    rows = torch.randn(200, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mixed = rows @ torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 50))
    return mixed.mT @ mixed / len(mixed)


def test_principal_basis_is_that_of_the_sum() -> None:
    values, vectors = principal_basis([covariance(0), covariance(1)])
    total = covariance(0) + covariance(1)
    torch.testing.assert_close(vectors.mT @ total @ vectors, torch.diag(values), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-13)
    assert bool((values.diff() <= 0).all())


def test_prediction_is_the_least_squares_fit() -> None:
    rows = torch.randn(4000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = rows @ torch.linalg.cholesky(covariance(3)).mT
    basis = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    found = prediction(rows.mT @ rows / len(rows), basis)
    fitted = torch.linalg.lstsq(rows @ basis, rows).solution.mT
    torch.testing.assert_close(found, fitted, rtol=0, atol=5e-3)  # a ridge of a thousandth
    errors = [(rows - rows @ basis @ map_.mT).square().mean() for map_ in (fitted, found, basis)]
    assert errors[0] <= errors[1] < errors[2]


@pytest.mark.parametrize("columns", [1, 5, 12])
def test_eigenvectors_tell_nothing_of_the_others(columns: int) -> None:
    _, vectors = principal_basis([covariance(2)])
    basis = vectors[:, :columns]
    torch.testing.assert_close(prediction(covariance(2), basis), basis, rtol=0, atol=1e-10)


def test_a_whole_basis_predicts_itself() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))[0]
    torch.testing.assert_close(prediction(covariance(5), basis), basis, rtol=0, atol=1e-10)


def test_prediction_where_nothing_varies() -> None:
    flat = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    basis = torch.eye(4, dtype=torch.float64)[:, 1:]
    found = prediction(flat, basis)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, basis, rtol=0, atol=1e-10)


def test_readers_that_see_all_alike_change_nothing() -> None:
    alike = [3.0 * torch.eye(12, dtype=torch.float64)] * 2
    one, other = reading_basis([covariance(0), covariance(1)], alike), principal_basis([covariance(0), covariance(1)])
    torch.testing.assert_close(one[1].abs(), other[1].abs(), rtol=0, atol=1e-8)


def test_a_direction_that_is_read_is_kept_first() -> None:
    flat = torch.eye(6, dtype=torch.float64)
    weight = torch.zeros(3, 6, dtype=torch.float64)
    weight[:, 4] = 1.0
    _, vectors = reading_basis([flat], [weight.mT @ weight])
    assert abs(float(vectors[4, 0])) == pytest.approx(1.0)
    scaled = reading_basis([flat], [9.0 * weight.mT @ weight])[1]
    torch.testing.assert_close(scaled[:, 0].abs(), vectors[:, 0].abs())
