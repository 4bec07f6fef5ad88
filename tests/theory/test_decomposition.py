from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pytest
import torch

from hf_rmt.theory import decomposition
from hf_rmt.theory.decomposition import SVDFactors, determined, singular_values, svd

EPS = float(np.finfo(np.float64).eps)
#: What the Gram route leaves on values that are not refined, those above 1e-3 of the largest.
GRAM_ERROR = 5e-10
VALUES_ERROR = 2e-7

Orthonormal = Callable[[np.random.Generator, int, int], np.ndarray]
SHAPES = [
    (768, 768),
    (600, 150),
    (150, 600),
    (384, 384),
    (1, 7),
    (1000, 1),
    (40, 40),
    (48, 60),
    (49, 49),
    (2, 3),
    (1, 1),
]
#: Spectra by the share of small values: few go through the Gram route, many through a full SVD.
KINDS = ["few small", "many small"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def refuse(*_: object, **__: object) -> NoReturn:
    raise np.linalg.LinAlgError("did not converge")


def gaussian(shape: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def graded(kind: str, count: int, condition: float) -> np.ndarray:
    if kind == "many small":
        return np.logspace(0, -np.log10(condition), count)
    return np.concatenate([np.linspace(1, 0.5, count - 20), np.logspace(-1, -np.log10(condition), 20)])


def matrix_with(
    s: np.ndarray, shape: tuple[int, int], orthonormal: Orthonormal
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    u, v = orthonormal(rng, shape[0], len(s)), orthonormal(rng, shape[1], len(s))
    return torch.from_numpy((u * s) @ v.T), u, v


def assert_factors(factors: SVDFactors, weight: torch.Tensor) -> None:
    exact = weight.double()
    u, s, vh = factors.u.double(), factors.s, factors.vh.double()
    count = min(weight.shape)
    assert (u.shape, s.shape, vh.shape) == ((len(weight), count), (count,), (count, weight.shape[1]))
    tolerance = 1e-9 if factors.u.dtype == torch.float64 else 1e-5
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=tolerance)
    assert bool((s.diff() <= 0).all())
    assert float(s[-1]) >= 0
    reconstruction = 1e-13 if factors.u.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(u * s @ vh, exact, rtol=0, atol=reconstruction * max(float(s[0]), 1e-300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_lapacks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = gaussian(shape, dtype)
    before = weight.clone()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    factors = svd(weight)
    values = singular_values(weight)
    refined = EPS * expected[0] / expected
    assert (np.abs(factors.s.numpy() - expected) / expected <= GRAM_ERROR + 10 * refined).all()
    assert (np.abs(values.numpy() - expected) / expected <= VALUES_ERROR + 10 * refined).all()
    assert factors.s.dtype == values.dtype == torch.float64
    assert factors.u.dtype == factors.vh.dtype == torch.float64
    assert_factors(factors, weight)
    assert bool(factors.testable().all())
    assert factors.route == ("full" if min(shape) <= 48 else "gram")
    assert torch.equal(weight, before)
    assert weight.dtype == dtype


@every_kind
@pytest.mark.parametrize("condition", [1e4, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("shape", [(200, 200), (300, 100), (100, 300)], ids=str)
def test_the_small_end_is_as_good_as_lapacks(
    shape: tuple[int, int], condition: float, kind: str, orthonormal: Orthonormal
) -> None:
    exact = graded(kind, min(shape), condition)
    weight, _, _ = matrix_with(exact, shape, orthonormal)
    lapack = np.abs(np.linalg.svd(weight.numpy(), compute_uv=False) - exact) / exact
    small = exact < 1e-3
    factors = svd(weight)
    error = np.abs(factors.s.numpy() - exact) / exact
    assert (error[small] <= 10 * np.maximum(EPS * exact[0] / exact[small], lapack[small])).all()
    assert error[small].max() <= 10 * lapack[small].max()
    assert error[~small].max() <= GRAM_ERROR
    values = np.abs(singular_values(weight).numpy() - exact) / exact
    assert (values <= VALUES_ERROR + 10 * EPS * exact[0] / exact).all()
    assert_factors(factors, weight)
    assert bool(factors.testable().all())


def test_both_routes_meet_graded_spectra(orthonormal: Orthonormal) -> None:
    routes = [svd(matrix_with(graded(kind, 200, 1e6), (200, 200), orthonormal)[0]).route for kind in KINDS]
    assert routes == ["gram", "full"]


@every_kind
@pytest.mark.parametrize("condition", [1e4, 1e6, 1e9])
@pytest.mark.parametrize("shape", [(200, 200), (300, 100), (100, 300)], ids=str)
def test_vectors_of_the_small_end_are_the_planted_ones(
    shape: tuple[int, int], condition: float, kind: str, orthonormal: Orthonormal
) -> None:
    weight, u, v = matrix_with(graded(kind, min(shape), condition), shape, orthonormal)
    factors = svd(weight)
    assert float((factors.u.mT @ torch.from_numpy(u)).diagonal().abs().min()) > 1 - 1e-6
    assert float((factors.vh @ torch.from_numpy(v)).diagonal().abs().min()) > 1 - 1e-6


def test_values_above_the_refined_end_meet_the_documented_error(orthonormal: Orthonormal) -> None:
    exact = np.concatenate([np.linspace(1, 0.9, 150), np.linspace(1.3e-3, 1.01e-3, 50)])
    error = np.abs(svd(matrix_with(exact, (200, 200), orthonormal)[0]).s.numpy() - exact) / exact
    assert (error <= 1e-9 + 10 * EPS * exact[0] / exact).all()


@pytest.mark.parametrize("shape", [(120, 120), (150, 70), (70, 150), (30, 20)], ids=str)
@pytest.mark.parametrize("share", [0.95, 0.4])
def test_what_a_deficient_matrix_does_not_determine_is_masked(
    shape: tuple[int, int], share: float, orthonormal: Orthonormal
) -> None:
    rank = round(share * min(shape))
    exact = np.linspace(2, 1, rank)
    weight, _, _ = matrix_with(exact, shape, orthonormal)
    factors = svd(weight)
    for s in (factors.s, singular_values(weight)):
        np.testing.assert_allclose(s[:rank].numpy(), exact, rtol=1e-12)
        assert s[rank:].tolist() == [0] * (min(shape) - rank)
    assert factors.testable().tolist() == [True] * rank + [False] * (min(shape) - rank)
    assert_factors(factors, weight)


@pytest.mark.parametrize("shape", [(90, 90), (100, 60), (5, 9)], ids=str)
def test_rank_one(shape: tuple[int, int]) -> None:
    weight = torch.ones(shape)
    factors = svd(weight)
    assert factors.s.tolist() == pytest.approx([(shape[0] * shape[1]) ** 0.5] + [0] * (min(shape) - 1))
    assert singular_values(weight).tolist() == pytest.approx(factors.s.tolist())
    assert factors.testable().tolist() == [True] + [False] * (min(shape) - 1)
    assert_factors(factors, weight)


@pytest.mark.parametrize("shape", [(90, 90), (60, 100), (5, 9)], ids=str)
def test_zeros(shape: tuple[int, int]) -> None:
    factors = svd(torch.zeros(shape))
    assert not factors.s.any()
    assert not singular_values(torch.zeros(shape)).any()
    assert not factors.testable().any()
    assert_factors(factors, torch.zeros(shape))


@pytest.mark.parametrize("count", [8, 90])
def test_a_matrix_of_equal_values_determines_no_vector(count: int, orthonormal: Orthonormal) -> None:
    rotation = torch.from_numpy(orthonormal(np.random.default_rng(0), count, count))
    for weight in (torch.eye(count), rotation, 0.3 * rotation):
        factors = svd(weight)
        torch.testing.assert_close(factors.s, factors.s[:1].expand(count), rtol=1e-12, atol=0)
        assert not factors.testable().any()
        assert_factors(factors, weight)


def pairs_at(level: float) -> tuple[np.ndarray, list[bool]]:
    """160 separate values and 20 pairs of equal ones near ``level`` of the largest."""
    exact = np.concatenate([np.linspace(1, 0.5, 160), np.repeat(level * np.linspace(1, 0.9, 20), 2)])
    return exact, [True] * 160 + [False] * 40


@pytest.mark.parametrize(
    "level",
    [0.4, 0.1, 0.01, 2e-3, 1.12e-3, 0.9e-3, 1e-6],
)
def test_pairs_of_equal_values_are_masked(level: float, orthonormal: Orthonormal) -> None:
    exact, single = pairs_at(level)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weight = (orthonormal(rng, 200, 200) * exact) @ orthonormal(rng, 200, 200).T
        assert svd(torch.from_numpy(weight)).testable().tolist() == single


def test_determined_is_about_gaps_and_zeros() -> None:
    s = torch.tensor([4.0, 3.0, 3.0 - 1e-15, 2.0, 1.0, 1.0, 1.0, 1e-3, 1e-15, 0.0], dtype=torch.float64)
    expected = [True, False, False, True, False, False, False, True, False, False]
    assert determined(s, 10).tolist() == expected
    assert determined(torch.tensor([2.0], dtype=torch.float64), 7).tolist() == [True]
    assert determined(torch.tensor([0.0], dtype=torch.float64), 7).tolist() == [False]


@pytest.mark.parametrize("shape", [(120, 120), (200, 60), (20, 30)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_transposition_swaps_the_sides(shape: tuple[int, int], contiguous: bool) -> None:
    weight = gaussian(shape, torch.float32)
    other = weight.mT.contiguous() if contiguous else weight.mT
    one, two = svd(weight), svd(other)
    torch.testing.assert_close(two.s, one.s, rtol=1e-9, atol=0)
    torch.testing.assert_close(singular_values(other), singular_values(weight), rtol=1e-9, atol=0)
    assert_factors(two, other)
    torch.testing.assert_close((two.u.mT @ one.vh.mT).abs(), torch.eye(min(shape)).double(), rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("shape", [(200, 200), (300, 100), (100, 300), (30, 40)], ids=str)
def test_vectors_can_be_float32(shape: tuple[int, int], kind: str, orthonormal: Orthonormal) -> None:
    weight, _, _ = matrix_with(graded(kind, min(shape), 1e6), shape, orthonormal)
    single, double = svd(weight, torch.float32), svd(weight)
    assert single.u.dtype == single.vh.dtype == torch.float32
    assert single.s.dtype == torch.float64
    assert torch.equal(single.s, double.s)
    torch.testing.assert_close(single.u, double.u.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(single.vh, double.vh.float(), rtol=0, atol=1e-7)
    assert_factors(single, weight)


@pytest.mark.parametrize("rows", [7, 64, 199])
@pytest.mark.parametrize("shape", [(200, 200), (300, 100), (100, 300)], ids=str)
def test_blocks_of_rows_change_nothing(
    rows: int, shape: tuple[int, int], orthonormal: Orthonormal, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = graded("few small", min(shape), 1e5)
    weight, _, _ = matrix_with(exact, shape, orthonormal)
    whole, values = svd(weight), singular_values(weight)
    monkeypatch.setattr(decomposition, "_ROWS", rows)
    blocks = svd(weight)
    assert blocks.route == whole.route == "gram"
    torch.testing.assert_close(blocks.s, whole.s, rtol=2 * GRAM_ERROR, atol=0)
    torch.testing.assert_close(singular_values(weight), values, rtol=2 * GRAM_ERROR, atol=0)
    assert_factors(blocks, weight)
    overlap = (blocks.u.mT @ whole.u).diagonal().abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(20, 30), (120, 120), (200, 60)], ids=str)
@pytest.mark.parametrize("solver", ["svd", "eigh", "eigvalsh"])
def test_a_solver_that_does_not_converge_is_replaced(
    shape: tuple[int, int], solver: str, orthonormal: Orthonormal, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = np.linspace(2, 1e-2, min(shape))
    exact[-2:] = 2e-4, 1e-5
    weight, _, _ = matrix_with(exact, shape, orthonormal)
    monkeypatch.setattr(np.linalg, solver, refuse)
    factors = svd(weight)
    np.testing.assert_allclose(factors.s.numpy(), exact, rtol=GRAM_ERROR)
    np.testing.assert_allclose(singular_values(weight).numpy(), exact, rtol=VALUES_ERROR)
    assert_factors(factors, weight)
    assert factors.route == ("full" if min(shape) <= 48 or solver == "eigh" else "gram")


@pytest.mark.parametrize("factor", [1e-40, 1e-20, 1e20, 1e36])
def test_scale_changes_nothing(factor: float) -> None:
    weight = (factor * gaussian((60, 60))).float()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    for s in (svd(weight).s, singular_values(weight)):
        np.testing.assert_allclose(s.numpy(), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_float64_entries_whose_squares_leave_the_range(factor: float) -> None:
    weight = factor * gaussian((60, 60))
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)
    for s in (svd(weight).s, singular_values(weight)):
        np.testing.assert_allclose(s.numpy(), expected, rtol=1e-9)


def test_a_sum_beyond_float32_is_no_reason_to_refuse() -> None:
    weight = torch.full((60, 60), 3e38)
    assert float(svd(weight).s[0]) == pytest.approx(60 * float(weight[0, 0]))


def test_a_parameter_is_taken_without_its_graph() -> None:
    weight = torch.nn.Parameter(gaussian((60, 50), torch.float32))
    factors = svd(weight)
    assert not any(part.requires_grad for part in (factors.u, factors.s, factors.vh, singular_values(weight)))


def test_a_view_is_taken_by_its_entries() -> None:
    whole = gaussian((300, 200))
    view = whole[10:250:2, 5:105]
    assert torch.equal(svd(view).s, svd(view.contiguous()).s)
    torch.testing.assert_close(singular_values(view), singular_values(view.contiguous()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("call", [svd, singular_values])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(5), r"a matrix has two non-empty dimensions, this has shape \(5,\)"),
        (torch.ones(2, 3, 4), r"two non-empty dimensions, this has shape \(2, 3, 4\)"),
        (torch.tensor(1.0), r"two non-empty dimensions, this has shape \(\)"),
        (torch.ones(0, 3), r"two non-empty dimensions, this has shape \(0, 3\)"),
        (torch.ones(3, 0), r"two non-empty dimensions, this has shape \(3, 0\)"),
        (torch.ones(3, 4, device="meta"), "on the meta device and has no values"),
        (torch.ones(3, 4, dtype=torch.int8), r"entries are torch\.int8, not floating point: dequantise"),
        (torch.ones(3, 4, dtype=torch.bool), r"entries are torch\.bool, not floating point: dequantise"),
        (torch.ones(3, 4, dtype=torch.complex64), r"entries are torch\.complex64, not floating point"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or Inf entries"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or Inf entries"),
        (torch.tensor([[float("inf"), -float("inf")]]), "NaN or Inf entries"),
        (torch.tensor([[1.0, float("inf")]], dtype=torch.bfloat16), "NaN or Inf entries"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_what_is_no_matrix_of_numbers_raises(
    call: Callable[[torch.Tensor], object], weight: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(weight)
