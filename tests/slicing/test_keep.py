"""How much is kept: shares, the widths that they lead to, and how they are written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_rmt.slicing.keep import Energy, Keep, Width, check_keep, parse_keep, widest


def test_what_they_are_called() -> None:
    assert str(Width(0.75)) == "0.75 of the width"
    assert str(Energy(0.99)) == "0.99 of the energy"


OUT_OF_RANGE = [0, 0.0, -0.1, 1.001, 2, math.inf, math.nan]
NO_NUMBERS = [True, "0.5", None, [0.5], 1j]


@pytest.mark.parametrize("share", OUT_OF_RANGE)
def test_shares_out_of_range(share: float) -> None:
    for make, of in ((Width, "width"), (Energy, "energy"), (check_keep, "parameters")):
        with pytest.raises(ValueError, match=f"a share of the {of} is .*: it lies above 0 and is at most 1"):
            make(share)


@pytest.mark.parametrize("share", NO_NUMBERS)
def test_no_shares(share: Any) -> None:
    for make, of in ((Width, "width"), (Energy, "energy")):
        with pytest.raises(TypeError, match=rf"a share of the {of} is .*, which is no number"):
            make(share)
    with pytest.raises(TypeError, match=r"keep is .*: give a share of the parameters as 0.75, or Width\(0.75\)"):
        check_keep(share)


def test_check_keep_gives_back_what_makes_sense() -> None:
    for keep in (Width(0.5), Energy(1)):
        assert check_keep(keep) is keep
    whole = check_keep(1)
    assert whole == 1.0 and isinstance(whole, float)
    assert check_keep(np.float32(0.5)) == 0.5 and str(Width(np.float32(0.5))) == "0.5 of the width"
    assert str(Width(1 / 3)) == f"{1 / 3} of the width"  # enough to make it again


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.75", 0.75),
        ("1", 1.0),
        ("1e-1", 0.1),
        ("parameters:0.3", 0.3),
        ("width:0.75", Width(0.75)),
        ("width:1", Width(1.0)),
        ("energy:0.99", Energy(0.99)),
    ],
)
def test_parse_keep(text: str, keep: Keep) -> None:
    found = parse_keep(text)
    assert found == keep and type(found) is type(keep)


@pytest.mark.parametrize(
    "text", ["", "much", "75%", "width", "width:", ":0.75", "rank:0.5", "width:energy:0.5", "0,75"]
)
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"cannot read .*as 0\.75, of the width as width:0.75, or of the energy as ener"
    ):
        parse_keep(text)


@pytest.mark.parametrize(
    ("text", "of"), [("1.5", "parameters"), ("0", "parameters"), ("width:-1", "width"), ("energy:nan", "energy")]
)
def test_shares_that_are_read_are_in_range(text: str, of: str) -> None:
    with pytest.raises(ValueError, match=f"a share of the {of} is .*: it lies above 0"):
        parse_keep(text)


# Widths


@pytest.mark.parametrize("seed", range(5))
def test_energy_takes_the_fewest_eigenvalues_that_reach_the_share(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(40, generator=generator, dtype=torch.float64).exp().sub(1).sort(descending=True).values
    total = math.fsum(values.tolist())
    for share in torch.rand(50, generator=generator, dtype=torch.float64).clamp_min(1e-6).tolist():
        fewest = next(k for k in range(1, 41) if math.fsum(values[:k].tolist()) >= share * total)
        assert Energy(share).width(values) == fewest


def test_energy_is_not_misled_by_rounding() -> None:
    """Tenths do not add up to one in floating point; zeros bring nothing."""
    tenths = torch.full((10,), 0.1, dtype=torch.float64)
    assert [Energy(k / 10).width(tenths) for k in range(1, 11)] == list(range(1, 11))
    assert Energy(1).width(torch.cat([tenths, torch.zeros(3, dtype=torch.float64)])) == 10


@pytest.mark.parametrize("upper", [1, 2, 7, 64])
def test_widest_is_what_trying_all_would_find(upper: int) -> None:
    for limit in range(upper + 2):
        asked: list[int] = []

        def fits(width: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(width)
            return width <= limit

        assert widest(upper, fits) == min(limit, upper)
        assert all(1 <= width <= upper for width in asked) and len(asked) <= math.ceil(math.log2(upper + 1))
