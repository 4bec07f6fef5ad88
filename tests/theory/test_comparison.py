from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_rmt.theory.comparison import change_stable_rank, energy_by_decile, match
from hf_rmt.theory.decomposition import svd

SHAPES = [(60, 60), (80, 37), (37, 80), (7, 5)]


def _random(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, cols)))


def _shares_by_loop(change: np.ndarray, vectors: np.ndarray) -> list[float]:
    """Energy of a change (vectors on its right) in tenths of the rows of ``vectors``, one by one."""
    total = sum(x**2 for x in change.flatten())
    shares = [sum(float(((change @ v) ** 2).sum()) for v in tenth) / total for tenth in np.array_split(vectors, 10)]
    return [*shares, 1 - sum(shares)]


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_those_of_a_loop(shape: tuple[int, int]) -> None:
    factors, change = svd(_random(*shape)), 1e-3 * _random(*shape, seed=1)
    right, left = energy_by_decile(change, factors.u, factors.vh)
    np.testing.assert_allclose(right.shares, _shares_by_loop(change.numpy(), factors.vh.numpy()), atol=1e-12)
    np.testing.assert_allclose(left.shares, _shares_by_loop(change.numpy().T, factors.u.numpy().T), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_and_expectations_add_up_to_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    factors = svd(_random(*shape), dtype)
    for side, length in zip(energy_by_decile(_random(*shape, seed=1), factors.u, factors.vh), shape[::-1], strict=True):
        assert float(side.shares.sum()) == pytest.approx(1, abs=1e-14) and (side.shares >= 0).all()
        counts = [len(part) for part in np.array_split(range(min(shape)), 10)]
        np.testing.assert_allclose(side.expected * length, [*counts, length - min(shape)], atol=1e-12)
        assert (float(side.shares[-1]) == 0) == (length == min(shape))


@pytest.mark.parametrize("index, decile", [(0, 0), (3, 0), (4, 1), (11, 2), (36, 9)])
def test_a_change_along_one_pair_of_vectors_is_all_in_its_decile(index: int, decile: int) -> None:
    """37 vectors: the first seven tenths have four."""
    factors = svd(_random(80, 37), torch.float32)
    change = 1e-20 * torch.outer(factors.u[:, index], factors.vh[index])
    for side in energy_by_decile(change, factors.u, factors.vh):
        assert float(side.shares[decile]) == pytest.approx(1, abs=1e-6)
    assert change_stable_rank(change) == pytest.approx(1)


def test_a_change_orthogonal_to_the_basis_is_outside() -> None:
    q, _ = torch.linalg.qr(_random(80, 80))
    u, vh = q[:, :20], svd(_random(20, 30, seed=2)).vh
    right, left = energy_by_decile(torch.outer(q[:, 50], vh[7]), u, vh)
    assert float(left.shares[-1]) == pytest.approx(1)
    assert float(right.shares[3]) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(300, 300), (400, 200), (200, 400)])
def test_a_change_without_direction_has_the_expected_shares(shape: tuple[int, int]) -> None:
    factors = svd(_random(*shape))
    for side in energy_by_decile(_random(*shape, seed=1), factors.u, factors.vh):
        # A share of k of n directions of N entries: a ratio of chi-squares, relative deviation sqrt(2 / (N k / n)).
        known = side.expected > 0
        deviation = side.expected * torch.sqrt(2 / (side.expected * shape[0] * shape[1]))
        assert ((side.shares - side.expected).abs()[known] < 4.5 * deviation[known]).all()
        assert (side.shares - side.expected).abs()[known].max() > 0


def test_shares_see_neither_sign_nor_scale() -> None:
    factors, change = svd(_random(50, 40)), _random(50, 40, seed=1)
    signs = torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0).double()
    one = energy_by_decile(change, factors.u, factors.vh)
    other = energy_by_decile(-1e-9 * change, factors.u * signs, signs[:, None] * factors.vh)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.shares, b.shares, atol=1e-14)


def test_shares_do_not_depend_on_the_basis_within_a_decile() -> None:
    """As for degenerate singular values: any rotation of them leaves the energy of their tenth."""
    factors, change = svd(_random(50, 40)), _random(50, 40, seed=1)
    turn = torch.linalg.qr(_random(4, 4, seed=2))[0]
    vh = factors.vh.clone()
    vh[8:12] = turn @ vh[8:12]
    one, other = (energy_by_decile(change, factors.u, v)[0].shares for v in (factors.vh, vh))
    np.testing.assert_allclose(one, other, atol=1e-14)


def test_transposing_swaps_the_sides() -> None:
    factors, change = svd(_random(50, 30)), _random(50, 30, seed=1)
    right, left = energy_by_decile(change, factors.u, factors.vh)
    swapped = energy_by_decile(change.mT, factors.vh.mT, factors.u.mT)
    np.testing.assert_allclose(swapped[0].shares, left.shares, atol=1e-14)
    np.testing.assert_allclose(swapped[1].shares, right.shares, atol=1e-14)


def test_no_change_lies_nowhere() -> None:
    factors = svd(_random(20, 20))
    for side in energy_by_decile(torch.zeros(20, 20), factors.u, factors.vh):
        assert side.shares.isnan().all() and float(side.expected.sum()) == pytest.approx(1)
    assert math.isnan(change_stable_rank(torch.zeros(20, 20)))


def test_shapes_that_differ_are_refused() -> None:
    factors = svd(_random(20, 10))
    with pytest.raises(ValueError, match=r"a change of shape \(10, 20\) in a basis of shape \(20, 10\)"):
        energy_by_decile(_random(10, 20), factors.u, factors.vh)
    with pytest.raises(ValueError, match="vectors of 10 entries before and of 20 after"):
        match(factors.vh, factors.u.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_are_those_of_a_loop(dtype: torch.dtype) -> None:
    before, after = svd(_random(60, 45)).vh, svd(_random(60, 45) + _random(60, 45, seed=1)).vh
    found = match(before.to(dtype), after.to(dtype))
    for k, vector in enumerate(after.numpy()):
        products = [abs(float(vector @ other)) for other in before.numpy()]
        assert int(found.best[k]) == int(np.argmax(products))
        assert float(found.values[k]) == pytest.approx(max(products), abs=1e-6 if dtype == torch.float32 else 1e-13)
    assert found.intruders == int((found.values[:10] < 0.5).sum()) > 0


def test_small_angles_survive_float32() -> None:
    basis = torch.linalg.qr(_random(100, 100))[0].mT
    angle = 1e-5
    turned = math.cos(angle) * basis[:10] + math.sin(angle) * basis[10:20]
    found = match(basis.float(), -turned.float())
    np.testing.assert_allclose(found.angles, angle, rtol=0.02)
    assert found.best.tolist() == list(range(10))
    assert found.top == pytest.approx(1) and found.intruders == 0


def test_matches_see_no_signs_and_leave_out_arbitrary_vectors() -> None:
    vectors = torch.linalg.qr(_random(30, 30))[0]
    known = torch.arange(30) != 4
    found = match(vectors, -vectors.flip(0), known)
    assert found.values.isnan().nonzero().flatten().tolist() == [4] and int(found.best[4]) == -1
    np.testing.assert_allclose(found.values[known], 1.0)
    assert found.best[known].tolist() == [29 - i for i in range(30) if i != 4]
    assert found.top == pytest.approx(1) and math.isnan(match(vectors, vectors, known & False).top)


def test_many_vectors_are_matched_in_parts() -> None:
    eye = torch.eye(1100)
    found = match(eye, eye.flip(0))
    assert found.best.tolist() == list(range(1099, -1, -1)) and bool((found.values == 1).all())


def test_a_new_spike_is_an_intruder() -> None:
    """Shuttleworth et al.: a new direction that ends up on top and is spread over all old ones."""
    weight, spike = _random(200, 200), torch.outer(_random(200, 1, 5)[:, 0], _random(1, 200, 6)[0])
    before, after = svd(weight), svd(weight + spike / 5)
    assert match(before.u.mT, after.u.mT).intruders >= 1 and match(before.vh, after.vh).intruders >= 1
    assert float(match(before.u.mT, after.u.mT).values[0]) < 0.5
    assert match(before.u.mT, before.u.mT).intruders == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    change = 1e-30 * _random(*shape)
    s = np.linalg.svd(1e30 * change.numpy())[1]
    assert change_stable_rank(change) == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-12)


def test_a_solver_that_does_not_converge(monkeypatch) -> None:
    from hf_rmt.theory import comparison

    expected = change_stable_rank(_random(30, 20))
    monkeypatch.setattr(comparison, "eigvalsh", lambda _gram: None)
    assert change_stable_rank(_random(30, 20)) == pytest.approx(expected)
