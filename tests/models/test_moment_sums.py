from __future__ import annotations

import pytest
import torch

from hf_rmt.models import moment_sums
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.theory.covariance import Moments

PARTS = (1, 7, 30, 2, 60)


def summed(rows: torch.Tensor, parts: tuple[int, ...] = PARTS) -> Moments:
    total = MomentSum(rows.shape[1])
    for part in rows.split(list(parts)):
        total.add(part)
    return total.moments()


def error(found: Moments, rows: torch.Tensor) -> float:
    """Relative, of both moments; the exact ones are taken in float64."""
    expected = Moments.of(rows)
    assert found.tokens == len(rows)
    pairs = ((found.outer, expected.outer), (found.total, expected.total))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)],
)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_sums_are_those_of_all_rows(dtype: torch.dtype, tolerance: float, mean: float) -> None:
    rows = (torch.randn(100, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean).to(dtype)
    found = summed(rows)
    assert error(found, rows) < tolerance
    assert found.outer.dtype == found.total.dtype == torch.float64
    assert torch.equal(found.outer, found.outer.mT)
    assert found.eps == torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def test_a_large_mean_costs_no_digits_of_what_varies() -> None:
    """Plain float32 products would leave nothing of a spread of 1e-3 about 1000."""
    rows = (1000 + 1e-3 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    found, exact = summed(rows, (100,) * 40), rows.double()
    centred = found.outer / 4000 - torch.outer(found.mean, found.mean)
    expected = torch.cov(exact.mT, correction=0)
    assert float((centred - expected).abs().max()) < 1e-2 * float(expected.diagonal().max())


def test_many_tokens_are_as_precise_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    often = error(summed(rows, (100,) * 200), rows)
    monkeypatch.setattr(moment_sums, "_FLUSH_TOKENS", 10**9)
    never = error(summed(rows, (100,) * 200), rows)
    assert often < 1e-6 and often <= never


def test_the_order_and_size_of_parts_do_not_matter() -> None:
    rows = torch.randn(100, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    for parts in ((100,), (1,) * 100, (0, 99, 0, 1)):
        assert error(summed(rows, parts), rows) < 1e-14
    assert error(summed(rows.flip(0)), rows) < 1e-14


def test_moments_can_be_taken_on_the_way() -> None:
    rows = torch.randn(100, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = MomentSum(12)
    total.add(rows[:40])
    first = total.moments()
    total.add(rows[40:])
    assert error(first, rows[:40]) < 1e-14 and error(total.moments(), rows) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_goes_on_from_its_state_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before products have gone into the float64 sum and after; a state that is taken changes nothing."""
    monkeypatch.setattr(moment_sums, "_FLUSH_TOKENS", 25)
    rows = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)).to(dtype) + 3
    whole, total = summed(rows, (10,) * 10), MomentSum(12)
    for part in rows.split(10):
        tensors, counts = total.state()
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        total = MomentSum.resumed(copied, counts) if copied else total
        total.add(part)
    found = total.moments()
    assert torch.equal(found.outer, whole.outer) and torch.equal(found.total, whole.total)
    assert (found.tokens, found.eps) == (whole.tokens, whole.eps)


def test_nothing_summed() -> None:
    total = MomentSum(5)
    total.add(torch.zeros(0, 5))
    found = total.moments()
    assert found.tokens == 0 and not found.outer.any() and found.total.shape == (5,)
    grown = found + Moments.of(torch.ones(2, 5))
    assert grown.tokens == 2


def test_rows_may_be_any_view() -> None:
    base = torch.randn(12, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert error(summed(base.mT), base.mT) < 1e-14
    wide = torch.randn(100, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = wide.clone()
    assert error(summed(wide[:, ::2]), wide[:, ::2]) < 1e-14
    assert torch.equal(wide, before)


def test_rows_of_another_dtype_join_the_first() -> None:
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    total = MomentSum(4)
    for part in (rows[:5], rows[5:].double()):
        total.add(part)
    assert error(total.moments(), rows) < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_is_refused(bad: float, first: bool) -> None:
    """As are values whose squares are not."""
    total = MomentSum(4)
    if not first:
        total.add(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    rows = torch.zeros(2, 4)
    rows[1, 2] = bad
    with pytest.raises(FloatingPointError):
        total.add(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_that_is_promised_holds_the_sums(dtype: torch.dtype) -> None:
    total = MomentSum(50)
    for tokens in (1, 5000, 5000):
        total.add(torch.ones(tokens, 50, dtype=dtype))
        held = sum(x.nbytes for x in vars(total).values() if isinstance(x, torch.Tensor) and x.ndim == 2)
        assert held <= MomentSum.bytes_for(50, dtype)
    assert held == MomentSum.bytes_for(50, dtype)  # once products have been added up in float64
