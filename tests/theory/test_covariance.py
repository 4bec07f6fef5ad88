from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from hf_rmt.theory.covariance import (
    OVERLAP_SUMMARY,
    Eigenbasis,
    Moments,
    Overlap,
    null_p_value,
    null_quantile,
    overlap,
    overlap_columns,
)


def activations(tokens: int, n: int, seed: int = 0, offset: float = 3.0) -> torch.Tensor:
    """Correlated, of different scales, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    mean = offset * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing.mT + mean


def random_rows(count: int, n: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def random_rotation(n: int, seed: int = 0) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q


def basis_of(vectors: torch.Tensor, rank: int | None = None) -> Eigenbasis:
    n = vectors.shape[1]
    return Eigenbasis(torch.arange(n, 0, -1).double(), vectors, n if rank is None else rank, 1000, False)


def assert_close(a: torch.Tensor, b: torch.Tensor | np.ndarray, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=1e-12, atol=atol, equal_nan=True)


# Moments


def test_covariance_is_that_of_a_loop_over_tokens() -> None:
    x = activations(30, 5)
    expected, mean = np.zeros((5, 5)), x.numpy().mean(0)
    centred = np.zeros((5, 5))
    for token in x.numpy():
        for i in range(5):
            for j in range(5):
                expected[i, j] += token[i] * token[j] / 30
                centred[i, j] += (token[i] - mean[i]) * (token[j] - mean[j]) / 30
    moments = Moments.of(x)
    assert_close(moments.covariance(), expected)
    assert_close(moments.covariance(centred=True), centred)
    assert_close(moments.mean, mean)
    assert moments.tokens == 30


def test_centred_covariance_is_numpys() -> None:
    x = activations(200, 12)
    assert_close(Moments.of(x).covariance(centred=True), np.cov(x.numpy(), rowvar=False, bias=True))


def test_the_covariance_is_left_as_it_is_by_centring() -> None:
    moments = Moments.of(activations(20, 4))
    before = moments.covariance()
    moments.covariance(centred=True)
    assert torch.equal(moments.covariance(), before)


@pytest.mark.parametrize("sizes", [(50, 50), (1, 99), (33, 33, 34), (100, 0), tuple([1] * 100)])
def test_moments_of_batches_add_up(sizes: tuple[int, ...]) -> None:
    x = activations(100, 8)
    whole = Moments.of(x)
    parts = [Moments.of(batch) for batch in x.split(list(sizes))]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert total.tokens == whole.tokens
    torch.testing.assert_close(total.outer, whole.outer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.total, whole.total, rtol=1e-12, atol=1e-12)


def test_the_sum_is_as_imprecise_as_its_worse_part() -> None:
    fine = Moments.of(activations(10, 3))
    coarse = Moments(fine.outer, fine.total, 10, eps=1e-7)
    assert (fine + coarse).eps == (coarse + fine).eps == 1e-7


def test_half_precision_is_summed_in_float64() -> None:
    x = activations(300, 4).bfloat16()
    moments = Moments.of(x)
    assert moments.outer.dtype == torch.float64
    assert_close(moments.outer, x.double().mT @ x.double())


# Eigenbasis


@pytest.mark.parametrize("centred", [False, True])
def test_eigenbasis_is_numpys(centred: bool) -> None:
    x = activations(200, 10).numpy()
    basis = Moments.of(torch.from_numpy(x)).eigenbasis(centred)
    covariance = np.cov(x, rowvar=False, bias=True) if centred else x.T @ x / 200
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(basis.values, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs(basis.vectors.numpy() @ vectors[:, ::-1]), np.eye(10), atol=1e-8)
    np.testing.assert_allclose(basis.vectors.mT @ torch.diag(basis.values) @ basis.vectors, covariance, atol=1e-10)
    assert (basis.rank, basis.tokens, basis.centred) == (10, 200, centred)


@pytest.mark.parametrize(("tokens", "rank", "centred_rank"), [(1, 1, 0), (5, 5, 4), (19, 19, 18), (20, 20, 19)])
def test_tokens_bound_the_rank_and_centring_takes_one(tokens: int, rank: int, centred_rank: int) -> None:
    moments = Moments.of(activations(tokens, 20))
    assert moments.eigenbasis().rank == rank
    assert moments.eigenbasis(centred=True).rank == centred_rank


def test_enough_tokens_leave_centring_its_rank() -> None:
    moments = Moments.of(activations(21, 20))
    assert moments.eigenbasis().rank == moments.eigenbasis(centred=True).rank == 20


def test_activations_in_a_subspace_have_its_rank() -> None:
    moments = Moments.of(activations(500, 6) @ random_rows(6, 30))
    assert moments.eigenbasis().rank == moments.eigenbasis(centred=True).rank == 6


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e3])
def test_a_large_mean_makes_no_rank_of_rounding(offset: float) -> None:
    x = activations(500, 6, offset=offset) @ random_rows(6, 30)
    assert Moments.of(x).eigenbasis(centred=True).rank == 6


def test_imprecise_products_hide_small_eigenvalues() -> None:
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.tensor([1.0, 1.0, 1e-2, 1e-5], dtype=torch.float64)
    exact = Moments.of(x)
    assert exact.eigenbasis().rank == 4
    assert Moments(exact.outer, exact.total, exact.tokens, eps=1e-7).eigenbasis().rank == 3


def test_activations_of_zeros_determine_nothing() -> None:
    basis = Moments.of(torch.zeros(50, 8)).eigenbasis()
    assert basis.rank == 0
    match = overlap(random_rows(3, 8), basis)
    assert match.values.isnan().all() and match.best.tolist() == [-1, -1, -1]
    assert math.isnan(match.null_quantile()) and match.p_values.isnan().all()


def test_no_tokens_have_no_covariance() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Moments.of(torch.empty(0, 4)).eigenbasis()


# Overlap


@pytest.mark.parametrize("rank", [20, 7, 1])
def test_overlap_is_that_of_a_double_loop(rank: int) -> None:
    vectors, eigenvectors = random_rows(12, 20), random_rotation(20)
    match = overlap(vectors, basis_of(eigenvectors, rank))
    for k, v in enumerate(vectors.tolist()):
        largest, index = -1.0, -1
        for j, f in enumerate(eigenvectors[:rank].tolist()):
            product = abs(sum(a * b for a, b in zip(v, f, strict=True)))
            if product > largest:
                largest, index = product, j
        assert float(match.values[k]) == pytest.approx(largest, abs=1e-12)
        assert int(match.best[k]) == index
    assert (match.entries, match.compared, match.tokens, match.centred) == (20, rank, 1000, False)


def test_overlap_knows_no_signs() -> None:
    vectors, eigenvectors = random_rows(12, 20), random_rotation(20)
    signs = torch.where(torch.arange(20) % 3 == 0, -1.0, 1.0).double()[:, None]
    plain = overlap(vectors, basis_of(eigenvectors))
    flipped = overlap(vectors * signs[:12], basis_of(eigenvectors * signs.flip(0)))
    assert_close(flipped.values, plain.values)
    assert torch.equal(flipped.best, plain.best)


def test_overlap_is_invariant_under_a_rotation_of_both() -> None:
    x, vectors, rotation = activations(100, 16), random_rows(9, 16), random_rotation(16, seed=5)
    plain = overlap(vectors, Moments.of(x).eigenbasis())
    rotated = overlap(vectors @ rotation.mT, Moments.of(x @ rotation.mT).eigenbasis())
    assert_close(rotated.values, plain.values, atol=1e-9)
    assert torch.equal(rotated.best, plain.best)


def test_a_planted_eigenvector_is_found() -> None:
    planted = random_rows(1, 64)[0]
    x = random_rows(3000, 64, seed=1)
    x = x + 20 * random_rows(3000, 1, seed=2) * planted
    vectors = torch.cat([random_rows(4, 64, seed=3), planted[None]])
    match = overlap(vectors, Moments.of(x).eigenbasis())
    assert float(match.values[4]) == pytest.approx(1, abs=1e-3) and int(match.best[4]) == 0
    assert (match.values[:4] < match.null_quantile(0.9999)).all()


def test_overlap_of_eigenvectors_is_one_and_never_more() -> None:
    basis = Moments.of(activations(500, 40)).eigenbasis()
    match = overlap(basis.vectors, basis)
    assert_close(match.values, torch.ones(40, dtype=torch.float64))
    assert (match.values <= 1).all() and match.best.tolist() == list(range(40))
    single = overlap(basis.vectors.float(), basis)
    assert (single.values <= 1).all() and single.values.dtype == torch.float64


def test_eigenvectors_without_data_are_left_out() -> None:
    basis = Moments.of(activations(5, 20)).eigenbasis()
    match = overlap(basis.vectors[5:], basis)  # of the null space: they may match none of the five
    assert match.compared == 5 and (match.values < 1e-7).all()


def test_arbitrary_vectors_get_nan() -> None:
    known = torch.tensor([True, False, True, False])
    basis = basis_of(random_rotation(10))
    match, whole = overlap(random_rows(4, 10), basis, known), overlap(random_rows(4, 10), basis)
    assert match.values.isnan().tolist() == [False, True, False, True]
    assert match.best[~known].tolist() == [-1, -1]
    assert torch.equal(match.values[known], whole.values[known]) and torch.equal(match.best[known], whole.best[known])
    assert match.p_values.isnan().tolist() == [False, True, False, True]


def test_dimensions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="10 entries against a covariance of 12"):
        overlap(random_rows(4, 10), basis_of(random_rotation(12)))


# The null


@pytest.mark.parametrize(("n", "compared"), [(8, 3), (64, 64), (64, 8), (384, 384), (768, 16)])
@pytest.mark.parametrize("tail", [0.1, 0.01, 0.001])
def test_random_vectors_pass_the_quantile_as_often_as_it_says(n: int, compared: int, tail: float) -> None:
    draws = 20_000
    x = torch.randn(draws, n, generator=torch.Generator().manual_seed(n + compared))
    x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    beyond = int((x[:, :compared].abs().amax(1) > null_quantile(n, compared, 1 - tail)).sum())
    # Components are not independent, which shows at 0.1 and is gone at 0.01.
    slack = 0.05 * draws * tail
    assert abs(beyond - draws * tail) < slack + 4 * math.sqrt(draws * tail * (1 - tail))


def test_p_values_of_random_vectors_are_uniform_in_the_tail() -> None:
    match = overlap(random_rows(40_000, 48), basis_of(random_rotation(48)))
    p_values = match.p_values
    for level in (0.05, 0.01, 0.001):
        assert abs(int((p_values < level).sum()) - 40_000 * level) < 4 * math.sqrt(40_000 * level)
    tail = p_values[p_values < 0.05] / 0.05
    assert scipy.stats.kstest(tail.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("level", [0.01, 0.5, 0.9, 0.99, 0.9999])
def test_one_direction_in_a_plane_has_the_angles_closed_form(level: float) -> None:
    assert null_quantile(2, 1, level) == pytest.approx(math.sin(math.pi * level / 2), rel=1e-9)
    value = torch.tensor([math.sin(math.pi * level / 2)], dtype=torch.float64)
    assert float(null_p_value(value, 2, 1)) == pytest.approx(1 - level, rel=1e-6)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.99])
def test_one_direction_in_space_is_uniform(level: float) -> None:
    assert null_quantile(3, 1, level) == pytest.approx(level, rel=1e-9)  # Archimedes


@pytest.mark.parametrize(("n", "compared"), [(5, 5), (384, 100), (3072, 3072)])
def test_quantile_and_p_value_are_inverse(n: int, compared: int) -> None:
    for level in (0.5, 0.9, 0.99, 0.999999):
        value = torch.tensor([null_quantile(n, compared, level)], dtype=torch.float64)
        assert float(null_p_value(value, n, compared)) == pytest.approx(1 - level, rel=1e-6)


def test_the_quantile_is_that_of_the_beta_law() -> None:
    beta = scipy.stats.beta(0.5, (384 - 1) / 2)
    assert null_quantile(384, 50, 0.99) == pytest.approx(math.sqrt(beta.ppf(0.99 ** (1 / 50))), rel=1e-9)


def test_the_quantile_grows_with_the_directions_and_falls_with_the_length() -> None:
    by_count = [null_quantile(100, k) for k in (1, 2, 10, 100)]
    by_length = [null_quantile(n, 10) for n in (10, 100, 1000)]
    assert by_count == sorted(by_count) and by_length == sorted(by_length, reverse=True)


def test_the_ends_of_the_null() -> None:
    ends = torch.tensor([0.0, 1.0, math.nan], dtype=torch.float64)
    p_values = null_p_value(ends, 20, 20).tolist()
    assert p_values[:2] == [1.0, 0.0] and math.isnan(p_values[2])
    assert null_quantile(1, 1) == 1.0  # a vector of one entry always points there
    assert null_p_value(torch.tensor([1.0], dtype=torch.float64), 1, 1).tolist() == [1.0]
    assert math.isnan(null_quantile(20, 0))


# Columns


def match_of(values: list[float], eigenvalues: list[float], compared: int | None = None) -> Overlap:
    return Overlap(
        values=torch.tensor(values, dtype=torch.float64),
        best=torch.zeros(len(values), dtype=torch.long),
        eigenvalues=torch.tensor(eigenvalues, dtype=torch.float64),
        compared=len(eigenvalues) if compared is None else compared,
        tokens=77,
        centred=False,
    )


def test_columns_by_hand() -> None:
    s = torch.tensor([9.0, 8.0, 3.0, 2.0, 1.5, 0.5], dtype=torch.float64)
    match = match_of([0.9, math.nan, 0.3, 0.1, 0.2, 0.6], [6.0, 3.0, 1.0, 0, 0, 0, 0, 0], compared=3)
    columns = overlap_columns(s, (1.0, 4.0), match, None)
    assert tuple(columns) == OVERLAP_SUMMARY
    assert columns == {
        "overlap_above": pytest.approx(0.9),
        "overlap_bulk": pytest.approx(0.2),
        "overlap_below": pytest.approx(0.6),
        "overlap_null": pytest.approx(null_quantile(8, 3, 0.99)),
        "overlap_rank_correlation": None,
        "activation_rank": 3,
        "activation_top_share": pytest.approx(0.6),
        "activation_tokens": 77,
    }


def test_a_value_on_the_edge_belongs_to_the_bulk() -> None:
    s = torch.tensor([4.0, 1.0], dtype=torch.float64)
    columns = overlap_columns(s, (1.0, 4.0), match_of([0.2, 0.4], [1.0, 1.0]), None)
    assert columns["overlap_bulk"] == pytest.approx(0.3)
    assert math.isnan(columns["overlap_above"]) and math.isnan(columns["overlap_below"])


def test_no_overlaps_give_empty_columns() -> None:
    assert overlap_columns(torch.ones(3), (0.0, 2.0), None, None) == dict.fromkeys(OVERLAP_SUMMARY)


def test_activations_of_zeros_have_no_top_share() -> None:
    match = match_of([math.nan] * 3, [0.0, 0.0, 0.0], compared=0)
    columns = overlap_columns(torch.ones(3), (0.0, 2.0), match, None)
    assert columns["activation_top_share"] is None and columns["activation_rank"] == 0


def test_rank_correlation_is_scipys_over_the_vectors_that_have_both() -> None:
    rng = np.random.default_rng(0)
    values, p_values = rng.random(60), rng.random(60).round(1).clip(1e-6)
    values[[3, 4]], p_values[[4, 9]] = np.nan, np.nan
    known = ~(np.isnan(values) | np.isnan(p_values))
    ranks = scipy.stats.rankdata(values[known]), scipy.stats.rankdata(-np.log(p_values[known]))
    expected = np.corrcoef(*ranks)[0, 1]
    columns = overlap_columns(torch.ones(60), (0, 2), match_of(values.tolist(), [1.0]), torch.from_numpy(p_values))
    assert columns["overlap_rank_correlation"] == pytest.approx(expected, abs=1e-12)


def test_small_p_values_of_large_overlaps_correlate_to_one() -> None:
    values = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
    p_values = 10 ** (-6 * values)
    columns = overlap_columns(torch.ones(20), (0, 2), match_of(values.tolist(), [1.0]), p_values)
    assert columns["overlap_rank_correlation"] == pytest.approx(1)
    reverse = overlap_columns(torch.ones(20), (0, 2), match_of(values.flip(0).tolist(), [1.0]), p_values)
    assert reverse["overlap_rank_correlation"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("values", "p_values"),
    [([0.1, 0.2], [0.1, 0.2]), ([0.3] * 4, [0.1, 0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.5] * 3)],
)
def test_there_is_no_rank_correlation_of_too_few_or_equal_numbers(values: list[float], p_values: list[float]) -> None:
    match = match_of(values, [1.0])
    columns = overlap_columns(torch.ones(len(values)), (0, 2), match, torch.tensor(p_values, dtype=torch.float64))
    assert math.isnan(columns["overlap_rank_correlation"])


@pytest.mark.parametrize("norm", [1e2, 1e3, 1e4])
def test_a_sink_makes_no_rank_of_rounding(norm: float) -> None:
    """One token in 128 is huge, as the first of a sequence often is: the products round at its size."""
    from hf_rmt.models.moment_sums import MomentSum

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 40, generator=generator) @ torch.randn(40, 128, generator=generator)
    x[::128] = norm * torch.randn(128, generator=generator)
    total = MomentSum(128)
    for part in x.split(500):
        total.add(part)
    assert total.moments().eigenbasis().rank <= 41
    assert Moments.of(x).eigenbasis().rank == 41 or norm == 1e4  # the entries themselves are rounded
