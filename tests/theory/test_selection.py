"""Selections against brute force, as set algebra, and through their names."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from hf_rmt.theory import selection as module
from hf_rmt.theory.covariance import Eigenbasis, Overlap, overlap
from hf_rmt.theory.decomposition import svd
from hf_rmt.theory.selection import (
    AllOf,
    AnyOf,
    Bottom,
    Bulk,
    Decile,
    Group,
    Mass,
    Not,
    Outliers,
    Overlapping,
    Random,
    Rank,
    Selection,
    Side,
    Significant,
    Top,
)
from hf_rmt.theory.selection_names import parse_selection
from hf_rmt.theory.singular_vectors import VectorTest, test_vectors


@dataclass
class Matrix:
    """What a selection looks at, made by hand."""

    s: torch.Tensor
    shape: tuple[int, int]
    name: str = "layer.0.dense"
    entry_std: float = 1.0
    p_values: dict[str, torch.Tensor] = field(default_factory=dict)
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    def test(self, side: Side) -> VectorTest:
        p = self.p_values[side]
        return VectorTest(p, p, p, 64, -1, torch.empty(0))

    def overlap(self, side: Side) -> Overlap:
        return self.overlaps[side]


def matrix(p: int, **changes: object) -> Matrix:
    """``p`` singular values of noise, for selections that look at nothing else."""
    s = torch.rand(p, dtype=torch.float64, generator=torch.Generator().manual_seed(p)).sort(descending=True).values
    return Matrix(s, (2 * p, p), **changes)  # type: ignore[arg-type]


def of_weight(weight: np.ndarray, name: str = "layer.0.dense") -> Matrix:
    """The components of a weight, with all that there is to ask for."""
    factors = svd(torch.from_numpy(weight))
    sides = {"right": factors.vh, "left": factors.u.mT}
    rng = np.random.default_rng(5)
    bases = {
        side: Eigenbasis(
            torch.linspace(2, 1, vectors.shape[1], dtype=torch.float64),
            torch.from_numpy(np.linalg.qr(rng.standard_normal((vectors.shape[1],) * 2))[0]),
            rank=vectors.shape[1],
            tokens=10**6,
            centred=False,
        )
        for side, vectors in sides.items()
    }
    return Matrix(
        factors.s,
        weight.shape,  # type: ignore[arg-type]
        name,
        float(weight.std()),
        {side: test_vectors(vectors, factors.testable()).p_values for side, vectors in sides.items()},
        {side: overlap(vectors, bases[side]) for side, vectors in sides.items()},
    )


def noise_with_spikes(rows: int, cols: int, spikes: int, seed: int = 0) -> np.ndarray:
    """Unit noise, and as many components of twice the norm of noise."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, spikes)))[0] for size in (rows, cols))
    return rng.standard_normal((rows, cols)) + 2 * (math.sqrt(rows) + math.sqrt(cols)) * left @ right.T


def indices(selection: Selection, components: Matrix) -> list[int]:
    mask = selection.mask(components)
    assert mask.dtype == torch.bool and mask.shape == (len(components.s),) and mask.device.type == "cpu"
    return mask.nonzero()[:, 0].tolist()


# By position


def test_groups_are_those_of_numpy() -> None:
    for p in (1, 2, 9, 10, 11, 23, 64):
        for of in (1, 2, 3, 7, 10, 12, 70):
            for k, expected in enumerate(np.array_split(np.arange(p), of), start=1):
                assert indices(Group(k, of), matrix(p)) == expected.tolist(), (p, of, k)


def test_the_first_decile_holds_the_largest_and_ten_hold_all() -> None:
    assert indices(Decile(1), matrix(23)) == [0, 1, 2]
    assert indices(Decile(10), matrix(23)) == [21, 22]
    assert [index for k in range(1, 11) for index in indices(Decile(k), matrix(23))] == list(range(23))
    assert [indices(Decile(k), matrix(4)) for k in range(1, 11)] == [[0], [1], [2], [3], *[[]] * 6]


def test_ranks_and_numbers() -> None:
    for p in (1, 5, 40):
        for count in range(1, p + 1):
            assert indices(Rank(count), matrix(p)) == list(range(count)) == indices(Top(count), matrix(p))
            assert indices(Bottom(count), matrix(p)) == list(range(p - count, p))


def test_shares_of_the_number() -> None:
    for p in (1, 4, 5, 40, 99):
        for percent in range(1, 101):
            top, bottom = (indices(cls(percent / 100), matrix(p)) for cls in (Top, Bottom))
            assert top == list(range(len(top))) and bottom == list(range(p - len(bottom), p))
            assert len(top) == len(bottom) and abs(len(top) - p * percent / 100) <= 0.5 + 1e-9
    assert [len(indices(Top(share), matrix(5))) for share in (0.09, 0.1, 0.5, 1.0)] == [0, 1, 3, 5]
    assert indices(Top(1), matrix(5)) == [0]


@pytest.mark.parametrize("selection", [Rank(9), Top(9), Bottom(9)])
def test_more_than_there_are(selection: Selection) -> None:
    with pytest.raises(
        ValueError, match=rf"^{selection}: layer\.0\.dense of shape \(16, 8\) has 8 singular values; ask for fewer"
    ):
        selection.mask(matrix(8))
    assert len(indices(type(selection)(8), matrix(8))) == 8


# By mass


def _mass_by_loop(s: list[float], share: float) -> int:
    """How many of the first values it takes."""
    for count in range(len(s) + 1):
        if math.fsum(s[:count]) >= share * math.fsum(s) * (1 - 1e-12):
            return count
    raise AssertionError


def test_mass_is_the_fewest_that_reach_the_share() -> None:
    rng = np.random.default_rng(0)
    for p in (1, 2, 9, 50):
        for decay in (0, 0.1, 2):
            components = matrix(p)
            components.s = torch.from_numpy(np.sort(rng.random(p) * np.exp(-decay * np.arange(p)))[::-1].copy())
            s = components.s.tolist()
            for share in (1e-9, 0.1, 0.5, 0.8, 0.999, 1.0):
                assert indices(Mass(share, "top"), components) == list(range(_mass_by_loop(s, share)))
                count = _mass_by_loop(s[::-1], share)
                assert indices(Mass(share), components) == list(range(p - count, p))


def test_mass_at_a_share_that_is_met_to_the_bit() -> None:
    components = Matrix(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64), (4, 4))
    assert indices(Mass(0.3), components) == [2, 3]  # 1 + 2 of 10
    assert indices(Mass(0.1), components) == [3]
    assert indices(Mass(0.7, "top"), components) == [0, 1]
    assert indices(Mass(0.7000001, "top"), components) == [0, 1, 2]
    tenths = Matrix(torch.full((10,), 0.1, dtype=torch.float64), (10, 10))
    assert [len(indices(Mass(k / 10), tenths)) for k in range(1, 11)] == list(range(1, 11))


def test_mass_where_values_are_zero() -> None:
    components = Matrix(torch.tensor([2.0, 1, 0, 0], dtype=torch.float64), (4, 4))
    assert indices(Mass(1.0, "top"), components) == [0, 1]
    assert indices(Mass(1.0), components) == [0, 1, 2, 3]
    assert indices(Mass(0.1), components) == [1, 2, 3]
    assert indices(Mass(0.5), Matrix(torch.zeros(4, dtype=torch.float64), (4, 4))) == []


# By the law


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("rule", ["empirical", "init", 0.9])
def test_outliers_are_outside_the_edges_of_the_law(shape: tuple[int, int], rule: str | float) -> None:
    components = of_weight(noise_with_spikes(*shape, spikes=3))
    sigma = {"empirical": components.entry_std, "init": 1 / math.sqrt(min(shape))}.get(str(rule), rule)
    root = [math.sqrt(size) for size in sorted(shape)]
    lower, upper = sigma * (root[1] - root[0]), sigma * (root[1] + root[0])
    s = components.s.numpy()
    for side, expected in (("above", s > upper), ("below", s < lower), ("both", (s > upper) | (s < lower))):
        assert indices(Outliers(side, rule, None), components) == expected.nonzero()[0].tolist()  # type: ignore[arg-type]
    assert len(indices(Outliers("above", rule, None), components)) >= 3  # type: ignore[arg-type]


def test_thresholds_of_finite_noise_find_the_spikes_and_nothing_else() -> None:
    for shape in ((64, 64), (64, 128), (200, 50)):
        for spikes in (0, 4):
            components = of_weight(noise_with_spikes(*shape, spikes))
            assert indices(Outliers(), components) == list(range(spikes))
            assert indices(Outliers("below"), components) == []
            assert indices(Bulk(), components) == list(range(spikes, min(shape)))


def test_a_lower_rate_selects_less() -> None:
    components = of_weight(noise_with_spikes(40, 80, 2) * 1.0)
    found = [len(indices(Outliers("both", 0.95, rate), components)) for rate in (None, 0.5, 0.01, 1e-6)]
    assert found[0] > found[-1] >= 2 and found == sorted(found, reverse=True)


@pytest.mark.parametrize("shape", [(48, 96), (40, 40)])
@pytest.mark.parametrize("rule", ["bulk", "empirical", "init", 0.8])
@pytest.mark.parametrize("rate", [None, 0.01, 0.3])
def test_the_bulk_is_what_outliers_leave(shape: tuple[int, int], rule: float, rate: float | None) -> None:
    components = of_weight(noise_with_spikes(*shape, spikes=2))
    above, below, both = (Outliers(side, rule, rate).mask(components) for side in ("above", "below", "both"))  # type: ignore[arg-type]
    assert torch.equal(Bulk(rule, rate).mask(components), ~both)
    assert torch.equal(above | below, both) and not (above & below).any()


def test_matrices_without_a_law() -> None:
    """Of a zero matrix, and of one whose rank is below a half, the bulk has no width."""
    zero = of_weight(np.zeros((40, 30)))
    assert indices(Outliers(), zero) == [] and indices(Mass(0.5), zero) == [] == indices(Significant(), zero)
    assert indices(Bulk(), zero) == list(range(30))
    rng = np.random.default_rng(0)
    low = of_weight(rng.standard_normal((40, 10)) @ rng.standard_normal((10, 30)))
    assert indices(Outliers(rate=None), low) == list(range(10))


# By vectors


def test_significant_vectors() -> None:
    components = matrix(5)
    nan = math.nan
    components.p_values = {
        "right": torch.tensor([0.001, nan, 0.01, 0.5, 1e-6], dtype=torch.float64),
        "left": torch.tensor([nan, 0.009, 0.2, 1.0, 0.3], dtype=torch.float64),
    }
    assert indices(Significant(), components) == [0, 4]
    assert indices(Significant(0.02), components) == [0, 2, 4]
    assert indices(Significant(side="left"), components) == [1]
    assert indices(~Significant(), components) == [1, 2, 3]
    assert indices(Significant(1), components) == [0, 2, 3, 4]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_overlapping_vectors_are_those_of_small_p_values(side: Side, level: float) -> None:
    components = of_weight(np.random.default_rng(0).standard_normal((50, 90)))
    found = components.overlaps[side]
    found.values[3] = math.nan
    expected = (found.p_values < 1 - level).nonzero()[:, 0].tolist()
    assert indices(Overlapping(level, side), components) == expected
    assert level == 0.99 or 0 < len(expected) < 50


def test_overlaps_with_nothing() -> None:
    """A covariance of rank 0 has no eigenvector to overlap with."""
    components = matrix(3)
    values = torch.full((3,), math.nan, dtype=torch.float64)
    components.overlaps["right"] = Overlap(
        values=values, best=torch.zeros(3).long(), eigenvalues=torch.zeros(3), compared=0, tokens=9, centred=False
    )
    assert indices(Overlapping(), components) == []


# At random


def test_random_draws_are_of_the_size_and_repeat() -> None:
    components = matrix(40)
    for like in (Decile(1), Rank(7), Top(0.3), Mass(0.5), Decile(3) | Rank(2), ~Rank(40), Rank(40)):
        size = len(indices(like, components))
        for seed in range(4):
            found = indices(Random(like, seed), components)
            assert len(found) == size and found == indices(Random(like, seed), components)
    assert indices(Random(Rank(10)), components) == _FIRST_DRAW


#: Tables and model cards name a draw by its seed: it has to come out the same in a later version.
_FIRST_DRAW = [3, 7, 8, 15, 16, 19, 21, 27, 29, 30]


def test_draws_differ_by_seed_matrix_and_selection() -> None:
    components = matrix(64)
    draws = [
        indices(Random(Rank(10)), components),
        indices(Random(Rank(10), 1), components),
        indices(Random(Top(10)), components),
        indices(Random(Rank(10)), matrix(64, name="layer.1.dense")),
    ]
    assert len({tuple(draw) for draw in draws}) == 4


def test_draws_are_uniform() -> None:
    """Over seeds each component comes as often, and each pair together; numpy's draws are held to the same."""
    p, count, draws = 20, 6, 1500
    components = matrix(p)
    found = np.zeros((draws, p))
    for seed in range(draws):
        found[seed, indices(Random(Rank(count), seed), components)] = 1
    rng = np.random.default_rng(0)
    reference = np.array([rng.permutation(np.arange(p) < count) for _ in range(draws)], dtype=float)
    for sample in (found, reference):
        expected = draws * count / p
        # The counts of one draw add up to a constant, which makes their variance smaller by this factor.
        chi_square = ((sample.sum(0) - expected) ** 2).sum() / expected * (p - 1) / (p - count)
        assert 0.001 < stats.chi2.sf(chi_square, p - 1) < 0.999
        together = (sample.T @ sample)[np.triu_indices(p, 1)]
        expected = draws * count * (count - 1) / (p * (p - 1))
        assert abs(together - expected).max() < 5 * math.sqrt(expected)


# Set algebra


def _leaf(rng: random.Random) -> Selection:
    side: Side = rng.choice(["right", "left"])
    sigma = rng.choice(["bulk", "empirical", "init", rng.random() + 1e-3])
    rate = rng.choice([None, 0.01, 1e-6])
    made: list[Callable[[], Selection]] = [
        lambda: Decile(rng.randint(1, 10)),
        lambda: Group(rng.randint(1, 5), rng.randint(5, 64)),
        lambda: Rank(rng.randint(1, 40)),
        lambda: rng.choice([Top, Bottom])(rng.choice([1, 1.0, rng.randint(1, 40), rng.random(), 1e-7])),
        lambda: Mass(rng.random() + 1e-9, rng.choice(["bottom", "top"])),
        lambda: Outliers(rng.choice(["both", "above", "below"]), sigma, rate),
        lambda: Bulk(sigma, rate),
        lambda: Significant(rng.choice([0.01, 0.05, rng.random()]), side),
        lambda: Overlapping(rng.choice([0.99, 0.5, rng.random()]), side),
    ]
    return rng.choice(made)()


def _tree(rng: random.Random, depth: int) -> Selection:
    if depth == 0 or rng.random() < 0.15:
        return _leaf(rng)
    kind = rng.choice(["or", "or", "and", "and", "not", "random"])
    if kind == "not":
        return ~_tree(rng, depth - 1) if rng.random() < 0.7 else Not(_tree(rng, depth - 1))
    if kind == "random":
        return Random(_tree(rng, depth - 1), rng.choice([0, 1, rng.randint(-5, 10**9)]))
    first, second = _tree(rng, depth - 1), _tree(rng, depth - 1)
    return first | second if kind == "or" else first & second


TREES = [_tree(random.Random(seed), 4) for seed in range(300)]


def _by_hand(selection: Selection, components: Matrix) -> set[int]:
    every = set(range(len(components.s)))
    if isinstance(selection, (AnyOf, AllOf)):
        first, second = (_by_hand(one, components) for one in (selection.first, selection.second))
        return first | second if isinstance(selection, AnyOf) else first & second
    return (
        every - _by_hand(selection.selection, components)
        if isinstance(selection, Not)
        else {*indices(selection, components)}
    )


@pytest.fixture(scope="module")
def rich() -> Matrix:
    return of_weight(noise_with_spikes(64, 40, 3))


def test_combinations_are_set_algebra(rich: Matrix) -> None:
    for tree in TREES:
        assert set(indices(tree, rich)) == _by_hand(tree, rich), str(tree)


def test_the_laws_of_de_morgan(rich: Matrix) -> None:
    for a, b in pairwise(TREES[:60]):
        assert indices(~(a | b), rich) == indices(~a & ~b, rich)
        assert indices(~(a & b), rich) == indices(~a | ~b, rich)
        assert indices(a & ~a, rich) == [] and indices(a | ~a, rich) == list(range(40))
        assert ~~a == a


@pytest.mark.parametrize("combine", [lambda a, b: a | b, lambda a, b: a & b, lambda a, b: b | a, Random])
def test_only_selections_combine(combine: Callable[[object, object], object]) -> None:
    for other in (3, "decile:1", None, Decile):
        with pytest.raises(TypeError, match=r"is no selection, as Decile\(10\) is one|unsupported operand"):
            combine(other, Decile(1)) if combine is Random else combine(Decile(1), other)


# Names


NAMES = [
    (Decile(10), "decile:10"),
    (Group(3, 20), "group:3,of=20"),
    (Group(3, of=10), "decile:3"),
    (Rank(16), "rank:16"),
    (Top(5), "top:5"),
    (Top(0.25), "top:0.25"),
    (Top(1.0), "top:1.0"),
    (Bottom(np.int64(3)), "bottom:3"),  # type: ignore[arg-type]
    (Mass(0.8), "mass:0.8"),
    (Mass(1, "top"), "mass:1.0,end=top"),
    (Outliers(), "outliers:both"),
    (Outliers("above"), "outliers:above"),
    (Outliers("below", "empirical", None), "outliers:below,sigma=empirical,rate=none"),
    (Outliers(sigma=1), "outliers:both,sigma=1.0"),
    (Bulk(), "bulk"),
    (Bulk("init", 1e-6), "bulk:sigma=init,rate=1e-06"),
    (Significant(), "significant:0.01"),
    (Significant(0.05, "left"), "significant:0.05,side=left"),
    (Overlapping(), "overlapping:0.99"),
    (Overlapping(0.5, side="left"), "overlapping:0.5,side=left"),
    (Random(Decile(3)), "random:0(decile:3)"),
    (Random(~Bulk() | Rank(2), 7), "random:7(not bulk or rank:2)"),
    (~Bulk(), "not bulk"),
    (~(Decile(1) | Decile(2)), "not (decile:1 or decile:2)"),
    (~(Decile(1) & Bulk()), "not (decile:1 and bulk)"),
    (Decile(1) | Decile(10), "decile:1 or decile:10"),
    (Decile(1) | Decile(2) | Decile(3), "decile:1 or decile:2 or decile:3"),
    (Decile(1) | (Decile(2) | Decile(3)), "decile:1 or (decile:2 or decile:3)"),
    (Decile(1) & Decile(2) & Bulk(), "decile:1 and decile:2 and bulk"),
    (Decile(1) & (Decile(2) & Bulk()), "decile:1 and (decile:2 and bulk)"),
    (Decile(1) | Decile(2) & ~Bulk(), "decile:1 or decile:2 and not bulk"),
    ((Decile(1) | Decile(2)) & ~Bulk(), "(decile:1 or decile:2) and not bulk"),
    (~Decile(1) & Decile(2), "not decile:1 and decile:2"),
    (Not(Not(Bulk())), "not not bulk"),
]


@pytest.mark.parametrize(("selection", "name"), NAMES)
def test_names(selection: Selection, name: str) -> None:
    """They are in tables and model cards, and stay."""
    assert str(selection) == name
    assert parse_selection(name) == selection


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  decile:3  ", Decile(3)),
        ("group:3,of=10", Decile(3)),
        ("group:of=7,k=3", Group(3, 7)),
        ("decile:k=2", Decile(2)),
        ("mass:share=0.5,end=top", Mass(0.5, "top")),
        ("((bulk))", Bulk()),
        ("not(bulk)", ~Bulk()),
        ("(bulk)or(decile:1)", Bulk() | Decile(1)),
        ("not not not bulk", Not(Not(Not(Bulk())))),
        ("outliers", Outliers()),
        ("significant", Significant()),
        ("random(decile:1)", Random(Decile(1))),
        ("random:seed=3(decile:1)", Random(Decile(1), 3)),
        ("random:3 (random:1(bulk))", Random(Random(Bulk(), 1), 3)),
        ("mass:1", Mass(1.0)),
        ("top:1e-1", Top(0.1)),
        ("not bulk and\n decile:1", ~Bulk() & Decile(1)),
    ],
)
def test_other_ways_to_write_them(text: str, expected: Selection) -> None:
    assert parse_selection(text) == expected


def test_names_read_back() -> None:
    for tree in TREES:
        read = parse_selection(str(tree))
        assert read == tree and hash(read) == hash(tree) and str(read) == str(tree)
        assert eval(repr(tree), vars(module)) == tree
        assert pickle.loads(pickle.dumps(tree)) == tree
    assert {type(tree).__name__ for tree in TREES} >= {"AnyOf", "AllOf", "Not", "Random", "Group", "Bulk"}
    assert len(set(TREES)) == len({str(tree) for tree in TREES}) > 250


def test_selections_are_values() -> None:
    assert Decile(3) == Group(3, 10) == Decile(np.int64(3)) and len({Decile(3), Group(3, 10)}) == 1  # type: ignore[arg-type]
    assert Top(1) != Top(1.0) and Random(Top(1)) != Random(Top(1.0)) and len({Top(1), Top(1.0)}) == 2
    assert Top(2) != Bottom(2) and Bulk() != Outliers() and Rank(2) != Top(2) and Top(2) != "top:2"
    assert Mass(1) == Mass(1.0) and Top(np.float64(0.5)) == Top(0.5)
    assert Outliers(rate=np.float32(0.02)) == parse_selection(str(Outliers(rate=np.float32(0.02))))  # type: ignore[arg-type]
    assert Decile(1) | Decile(2) != Decile(2) | Decile(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Top(2).amount = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decile(0), r"decile:0: groups are numbered from 1 \(the largest singular values\) to 10"),
        (lambda: Decile(11), "decile:11: groups are numbered from 1"),
        (lambda: Decile(-1), "decile:-1: groups are numbered"),
        (lambda: Decile(True), r"Group: k is True, which is no whole number"),
        (lambda: Decile(1.5), r"Group: k is 1\.5, which is no whole number"),
        (lambda: Group(1, 0), "group:1,of=0: groups are numbered"),
        (lambda: Group(6, 5), r"group:6,of=5: .* to 5"),
        (lambda: Rank(0), "rank:0: a rank is at least 1"),
        (lambda: Rank("x"), "Rank: r is 'x', which is no whole number"),
        (lambda: Top(0), "Top: 0 components; give at least 1, or a share as a float"),
        (lambda: Top(-0.1), r"Top: -0\.1 is no share"),
        (lambda: Bottom(1.01), r"Bottom: 1\.01 is no share, which lies above 0 and is at most 1"),
        (lambda: Top(math.nan), "Top: nan is no share"),
        (lambda: Top(None), "Top: amount is None, which is no number"),
        (lambda: Mass(0), r"mass:0\.0: a share of the singular mass lies above 0"),
        (lambda: Mass(80), r"mass:80\.0: a share"),
        (lambda: Mass(math.nan), "mass:nan: a share"),
        (lambda: Mass([]), r"Mass: share is \[\], which is no number"),
        (lambda: Mass(0.5, "left"), "Mass: end is 'left': give one of bottom, top"),
        (lambda: Outliers("up"), "Outliers: side is 'up': give one of both, above, below"),
        (lambda: Outliers(sigma="mad"), "sigma is 'mad': give one of bulk, empirical, init, or a positive number"),
        (lambda: Outliers(sigma=0), r"sigma is 0\.0: give one of"),
        (lambda: Bulk(sigma=None), "Bulk: sigma is None, which is no number"),
        (lambda: Bulk(rate=0), r"rate is 0\.0: the false-positive rate"),
        (lambda: Bulk(rate="high"), "Bulk: rate is 'high', which is no number"),
        (lambda: Significant(0), r"significant:0\.0: a p-value lies between 0 and 1"),
        (lambda: Significant(side="both"), "Significant: side is 'both': give one of right, left"),
        (lambda: Overlapping(1), r"overlapping:1\.0: a level lies between 0 and 1"),
        (lambda: Overlapping(side="up"), "Overlapping: side is 'up'"),
        (lambda: Random(Bulk(), 0.5), r"Random: seed is 0\.5, which is no whole number"),
    ],
)
def test_values_that_make_no_sense(make: Callable[[], Selection], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a selection is missing"),
        ("decile", "decile takes k$"),
        ("decile:", "decile takes k$"),
        ("decile:10,", "decile takes k$"),
        ("decile:1,k=2", "decile takes k$"),
        ("group:1", r"group takes k, of; all but the first 1 by name, as of=\.\.\.$"),
        ("top:1e3", r"1000\.0 is no share"),
        ("decile:11", "decile:11: groups are numbered from 1"),
        ("decile:1,2", "decile takes k$"),
        ("decile:x", "k is 'x', which is no whole number"),
        ("decil:3", "there is no 'decil'; there are decile, group, rank, top, bottom, mass, outliers, bulk,"),
        ("Decile:3", "there is no 'Decile'"),
        ("decile:1 decile:2", "nothing is expected at 'decile:2'; join selections by or, and, not"),
        ("(decile:1", "a bracket is not closed"),
        ("decile:1)", r"nothing is expected at '\)'"),
        ("()", "a selection is missing"),
        ("not", "a selection is missing"),
        ("decile:1 or", "a selection is missing"),
        ("and decile:1", "a selection is missing"),
        ("decile:1 or or decile:2", "a selection is missing"),
        ("bulk:0.1", r"bulk takes sigma, rate; .* by name, as rate=\.\.\."),
        ("mass:0.8,top", r"mass takes share, end; all but the first 1 by name, as end=\.\.\."),
        ("mass:0.8,ends=top", "mass takes share, end"),
        ("mass:0.8,end=none", "end is None: give one of bottom, top"),
        ("outliers:rate=x", "rate is 'x', which is no number"),
        ("top:none", "amount is None, which is no number"),
        ("random:0", r"says in brackets what it is like, as random:0\(decile:3\)"),
        ("random:x(bulk)", "seed is 'x'"),
        ("random:size=3(bulk)", "random takes seed$"),
        ("rank:5(decile:1)", "'rank' takes no brackets"),
        ("decile:3(bulk)", "'decile' takes no brackets"),
    ],
)
def test_names_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^cannot read the selection '{text.replace('(', '[(]').replace(')', '[)]')}': .*{message}"
    ):
        parse_selection(text)
