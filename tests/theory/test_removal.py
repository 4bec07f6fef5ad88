"""What is left of a matrix, against a float64 decomposition by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_rmt.theory.decomposition import SVDFactors, svd
from hf_rmt.theory.removal import part, without

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 64), (64, 40), (48, 48), (70, 100), (1, 30), (30, 1), (1, 1)]


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Entries of a size that layers have, a spike among them."""
    rng = np.random.default_rng([*shape, seed])
    spike = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])) * 0.02
    return torch.from_numpy(0.05 * rng.standard_normal(shape) + spike).to(dtype)


def factors_of(weight: torch.Tensor) -> SVDFactors:
    return svd(weight, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def masks_of(p: int) -> dict[str, torch.Tensor]:
    """Neighbours at either end and in the middle, scattered ones, few and many, none and all."""
    index = torch.arange(p)
    rng = torch.Generator().manual_seed(p)
    return {
        "none": index < 0,
        "all": index >= 0,
        "largest": index < (p + 9) // 10,
        "smallest": index >= p - p // 10,
        "middle": (index >= p // 3) & (index < p // 2),
        "most": index >= p // 4,
        "few scattered": torch.rand(p, generator=rng) < 0.2,
        "many scattered": torch.rand(p, generator=rng) < 0.7,
        "alternating": index % 2 == 0,
    }


def kept_by_numpy(weight: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, float]:
    """``U S~ V^T`` in float64, and the largest singular value."""
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return (u * np.where(mask.numpy(), 0, s)) @ vh, float(s[0])


def assert_rounds_to(found: torch.Tensor, exact: np.ndarray, largest: float) -> None:
    """Within half a unit in the last place, and the error of the precision in which it is computed.

    That error goes with the largest singular value; in float64 it is that of telling neighbouring vectors apart.
    """
    info = torch.finfo(found.dtype)
    work = 1e-12 if found.dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    allowed = info.eps / 2 * np.abs(exact) + info.smallest_normal * info.eps + work * largest
    assert (np.abs(found.double().numpy() - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    factors = factors_of(weight)
    before = weight.clone(), factors.u.clone(), factors.s.clone(), factors.vh.clone()
    for name, mask in masks_of(min(shape)).items():
        found = without(weight, factors, mask)
        exact, largest = kept_by_numpy(weight, mask)
        assert found.shape == shape and found.dtype == dtype, name
        assert_rounds_to(found, exact, largest)
        assert found.data_ptr() != weight.data_ptr()
    assert all(map(torch.equal, before, (weight, factors.u, factors.s, factors.vh)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_and_all(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    weight[0, 0] = -0.0
    factors, p = factors_of(weight), min(shape)
    nothing = without(weight, factors, torch.zeros(p, dtype=torch.bool))
    assert torch.equal(nothing.view(torch.uint8), weight.view(torch.uint8))
    assert not without(weight, factors, torch.ones(p, dtype=torch.bool)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    factors = factors_of(weight)
    for mask in masks_of(min(shape)).values():
        found = part(factors, mask, CPU)
        exact, largest = kept_by_numpy(weight, ~mask)
        assert found.dtype == dtype and found.shape == shape
        assert_rounds_to(found, exact, largest)
        assert_rounds_to(found + without(weight, factors, mask), weight.double().numpy(), largest)


def test_ten_parts_add_up() -> None:
    weight = weight_of((64, 96), torch.float64)
    factors = factors_of(weight)
    groups = np.array_split(np.arange(64), 10)
    parts = [part(factors, torch.isin(torch.arange(64), torch.from_numpy(group)), CPU) for group in groups]
    torch.testing.assert_close(torch.stack(parts).sum(0), weight, rtol=0, atol=1e-14)
    products = torch.stack(parts).flatten(1)
    gram = products @ products.T  # they are orthogonal, with the energy of their singular values
    energy = torch.tensor([float(np.square(factors.s.numpy()[group]).sum()) for group in groups])
    torch.testing.assert_close(gram, torch.diag(energy.double()), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 40), (50, 80)])
def test_the_best_approximation_of_a_rank(shape: tuple[int, int]) -> None:
    """Eckart and Young: its error is what the other singular values make, and no other matrix of that rank beats it."""
    weight = weight_of(shape, torch.float64)
    factors = factors_of(weight)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    rng = np.random.default_rng(0)
    for rank in (1, 2, 5, 20, 39):
        best = without(weight, factors, torch.arange(40 if shape[1] == 40 else 50) >= rank)
        error = (weight - best).numpy()
        assert np.linalg.norm(error) == pytest.approx(np.sqrt(np.square(s[rank:]).sum()), rel=1e-12)
        assert np.linalg.norm(error, 2) == pytest.approx(s[rank], rel=1e-10)
        assert np.linalg.matrix_rank(best.numpy()) == rank
        for size in (1e-3, 1.0):
            basis = np.linalg.qr(factors.vh.T[:, :rank].numpy() + size * rng.standard_normal((shape[1], rank)))[0]
            assert np.linalg.norm(weight.numpy() @ (np.eye(shape[1]) - basis @ basis.T)) > np.linalg.norm(error)


def test_singular_values_of_what_is_left() -> None:
    """The others stay, for vectors are orthogonal: it is no new decomposition."""
    weight = weight_of((40, 64), torch.float64)
    factors = factors_of(weight)
    for mask in masks_of(40).values():
        found = np.linalg.svd(without(weight, factors, mask).numpy(), compute_uv=False)
        expected = np.where(mask.numpy(), 0, factors.s.numpy())
        np.testing.assert_allclose(found, np.sort(expected)[::-1], atol=1e-14)


def test_weights_that_are_views() -> None:
    """As ``read`` gives them: transposed, and some rows of a whole."""
    whole = weight_of((96, 64), torch.float32)
    for weight in (whole.T, whole[32:64], whole[::2], whole[torch.arange(0, 96, 3)].T):
        factors = factors_of(weight)
        for mask in masks_of(min(weight.shape)).values():
            exact, largest = kept_by_numpy(weight, mask)
            assert_rounds_to(without(weight, factors, mask), exact, largest)


def test_a_weight_that_is_trained() -> None:
    weight = weight_of((32, 40), torch.float32).requires_grad_()
    found = without(weight, factors_of(weight), torch.arange(32) < 3)
    assert not found.requires_grad and found.grad_fn is None and found.is_leaf


def test_degenerate_matrices() -> None:
    mask = torch.arange(20) < 7
    for weight in (torch.zeros(20, 30), torch.eye(20), torch.ones(20, 30)):
        exact = without(weight, factors_of(weight), mask)
        assert np.linalg.matrix_rank(exact.numpy(), tol=1e-5) == {0.0: 0, 20.0: 13, 600.0: 0}[float(weight.sum())]


def test_low_precision_is_rounded_once() -> None:
    """The smallest decile moves most entries of a half-precision weight by less than one place."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = weight_of((128, 128), dtype)
        mask = torch.arange(128) >= 115
        exact, largest = kept_by_numpy(weight, mask)
        found = without(weight, factors_of(weight), mask)
        nearest = torch.from_numpy(exact).to(dtype)
        assert (found != nearest).double().mean() < 1e-3  # ties of the float32 result
        assert 0.05 < (found != weight).double().mean() < 1
        assert_rounds_to(found, exact, largest)


def test_autocast_of_the_caller_changes_nothing() -> None:
    weight = weight_of((70, 100), torch.float32)
    factors, mask = factors_of(weight), torch.arange(70) >= 63
    expected = without(weight, factors, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(without(weight, factors, mask), expected)
