"""Which singular components of a matrix: value objects that give a mask, and have a name that reads back.

Components are numbered from the largest singular value. ``str(selection)`` is the name that tables, model
cards and the command line use, and ``parse_selection`` turns it into the selection again::

    >>> str(Decile(10) | Outliers("above"))
    'decile:10 or outliers:above'
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal, Protocol, get_args

import torch

from hf_rmt.theory.controls import seed_for
from hf_rmt.theory.covariance import NULL_LEVEL, Overlap
from hf_rmt.theory.marchenko_pastur import SIGMA_RULES, SigmaRule, check_sigma
from hf_rmt.theory.singular_vectors import VectorTest
from hf_rmt.theory.statistics import Law
from hf_rmt.theory.tracy_widom import check_rate

Side = Literal["right", "left"]


class Components(Protocol):
    """What a selection may look at: the singular components of one matrix.

    Attributes:
        name: of the matrix.
        shape: ``(m, n)``.
        s: ``(p,)`` singular values, float64, descending.
        entry_std: standard deviation of the entries of the matrix.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def s(self) -> torch.Tensor: ...  # noqa: D102

    @property
    def entry_std(self) -> float: ...  # noqa: D102

    def test(self, side: Side) -> VectorTest:
        """The test of the singular vectors of one side."""

    def overlap(self, side: Side) -> Overlap:
        """Their overlap with the activations; a ValueError where none were collected."""


class Selection(ABC):
    """A choice of singular components; combine with ``|``, ``&`` and ``~``."""

    #: First word of the name.
    word: ClassVar[str]
    #: Fields that the name gives without their own names.
    bare: ClassVar[int] = 1

    @abstractmethod
    def mask(self, components: Components) -> torch.Tensor:
        """Boolean mask ``(p,)`` of the components chosen, on the CPU.

        Raises:
            ValueError: the matrix has not what the selection asks for; the message names the matrix.
        """

    @property
    def needs_activations(self) -> bool:
        """Whether it looks at the overlap with them."""
        return any(isinstance(part, Selection) and part.needs_activations for part in vars(self).values())

    def __or__(self, other: Selection) -> Selection:
        return AnyOf(self, _checked(other))

    def __and__(self, other: Selection) -> Selection:
        return AllOf(self, _checked(other))

    def __invert__(self) -> Selection:
        return Not(self)

    def __str__(self) -> str:
        arguments = []
        for position, field in enumerate(fields(self)):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if position < self.bare:
                arguments.append(_text(value))
            elif field.default is MISSING or value != field.default:
                arguments.append(f"{field.name}={_text(value)}")
        return self.word + (":" + ",".join(arguments) if arguments else "")


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def _checked(other: object) -> Selection:
    if not isinstance(other, Selection):
        raise TypeError(f"{other!r} is no selection, as Decile(10) is one")
    return other


def _first(count: int, components: Components) -> torch.Tensor:
    return torch.arange(len(components.s)) < count


def _last(count: int, components: Components) -> torch.Tensor:
    return torch.arange(len(components.s)) >= len(components.s) - count


@dataclass(frozen=True)
class Group(Selection):
    """Group ``k`` of ``of`` equally sized ones in descending order; 1 holds the largest (paper section 6).

    Where they do not come out even the first groups have one more, as in ``numpy.array_split``; of fewer
    components than groups the last groups are empty.
    """

    k: int
    of: int
    word = "group"

    def __post_init__(self) -> None:
        for name in ("k", "of"):
            object.__setattr__(self, name, _whole(self, name))
        if self.of < 1 or not 1 <= self.k <= self.of:
            raise ValueError(f"{self}: groups are numbered from 1 (the largest singular values) to {self.of}")

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        size, larger = divmod(len(components.s), self.of)
        start = (self.k - 1) * size + min(self.k - 1, larger)
        index = torch.arange(len(components.s))
        return (index >= start) & (index < start + size + (self.k <= larger))

    def __str__(self) -> str:
        return f"decile:{self.k}" if self.of == 10 else super().__str__()

    def __repr__(self) -> str:
        return f"Decile({self.k})" if self.of == 10 else f"Group({self.k}, of={self.of})"


def Decile(k: int) -> Group:  # noqa: N802 (it stands where classes stand)
    """Tenth ``k`` of the singular values; 1 holds the largest, 10 the smallest (paper Fig. 7, 8)."""
    return Group(k, of=10)


@dataclass(frozen=True)
class Rank(Selection):
    """The ``r`` largest; ``keep=Rank(r)`` leaves the best approximation of rank r."""

    r: int
    word = "rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", _whole(self, "r"))
        if self.r < 1:
            raise ValueError(f"{self}: a rank is at least 1")

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return _first(_at_most_all(self, self.r, components), components)


@dataclass(frozen=True, eq=False)
class _Amount(Selection):
    """A number of components (int), or a share of their number (float): 1 and 1.0 are not the same."""

    amount: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", _count_or_share(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Amount) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True, eq=False)
class Top(_Amount):
    """The largest components: a number of them (int), or a share of their number (float)."""

    word = "top"

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return _first(_count(self, self.amount, components), components)


@dataclass(frozen=True, eq=False)
class Bottom(_Amount):
    """The smallest components: a number of them (int), or a share of their number (float)."""

    word = "bottom"

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return _last(_count(self, self.amount, components), components)


@dataclass(frozen=True)
class Mass(Selection):
    """As many as it takes, from one end, to reach a share of the sum of all singular values (paper App. A)."""

    share: float
    end: Literal["bottom", "top"] = "bottom"
    word = "mass"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _real(self, "share"))
        if not 0 < self.share <= 1:
            raise ValueError(f"{self}: a share of the singular mass lies above 0 and is at most 1")
        _check_one_of(self, "end", ("bottom", "top"))

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        ordered = components.s if self.end == "top" else components.s.flip(0)
        reached = ordered.cumsum(0)
        # What is reached before a component is added decides whether it is needed; sums are good to rounding.
        needed = reached - ordered < self.share * reached[-1] * (1 - 1e-12)
        return needed if self.end == "top" else needed.flip(0)


@dataclass(frozen=True)
class Outliers(Selection):
    """What lies outside the Marchenko-Pastur law: above it, below it, or both.

    ``sigma`` is the rule for the law (see ``AnalysisConfig``) and ``rate`` the false-positive rate of the
    Tracy-Widom threshold at each edge; None takes the asymptotic edges, as the paper does.
    """

    side: Literal["both", "above", "below"] = "both"
    sigma: SigmaRule | float = "bulk"
    rate: float | None = 0.01
    word = "outliers"

    def __post_init__(self) -> None:
        _check_one_of(self, "side", ("both", "above", "below"))
        _check_law(self, self.sigma, self.rate)

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        lower, upper = _edges(components, self.sigma, self.rate)
        above, below = components.s > upper, components.s < lower
        return {"both": above | below, "above": above, "below": below}[self.side]


@dataclass(frozen=True)
class Bulk(Selection):
    """What lies inside the Marchenko-Pastur law; the complement of ``Outliers`` of the same settings."""

    sigma: SigmaRule | float = "bulk"
    rate: float | None = 0.01
    word = "bulk"
    bare = 0

    def __post_init__(self) -> None:
        _check_law(self, self.sigma, self.rate)

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        lower, upper = _edges(components, self.sigma, self.rate)
        return (components.s <= upper) & (components.s >= lower)


@dataclass(frozen=True)
class Significant(Selection):
    """Singular vectors whose p-value lies below ``p``: not random (paper section 4).

    Those with a large p-value, and those too degenerate to test, are ``~Significant(p)``.
    """

    p: float = 0.01
    side: Side = "right"
    word = "significant"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _real(self, "p"))
        if not 0 < self.p <= 1:
            raise ValueError(f"{self}: a p-value lies between 0 and 1")
        _check_one_of(self, "side", get_args(Side))

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return components.test(self.side).p_values < self.p


@dataclass(frozen=True)
class Overlapping(Selection):
    """Singular vectors that overlap with the activations more than a share ``level`` of random ones (Eq. 8)."""

    level: float = NULL_LEVEL
    side: Side = "right"
    word = "overlapping"

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", _real(self, "level"))
        if not 0 < self.level < 1:
            raise ValueError(f"{self}: a level lies between 0 and 1")
        _check_one_of(self, "side", get_args(Side))

    @property
    def needs_activations(self) -> bool:
        """See ``Selection.needs_activations``."""
        return True

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        overlap = components.overlap(self.side)
        return overlap.values > overlap.null_quantile(self.level)


@dataclass(frozen=True)
class Random(Selection):
    """As many components as another selection has, drawn from all: the control that every claim needs.

    Each matrix and each ``like`` has its own draw; a seed repeats it.
    """

    like: Selection
    seed: int = 0
    word = "random"

    def __post_init__(self) -> None:
        _checked(self.like)
        object.__setattr__(self, "seed", _whole(self, "seed"))

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        count = int(self.like.mask(components).sum())
        seed = seed_for(self.seed, f"{components.name}/{self.like}")
        order = torch.randperm(len(components.s), generator=torch.Generator().manual_seed(seed))
        mask = torch.zeros(len(components.s), dtype=torch.bool)
        mask[order[:count]] = True
        return mask

    def __str__(self) -> str:
        return f"{self.word}:{self.seed}({self.like})"


@dataclass(frozen=True)
class AnyOf(Selection):
    """Components of either selection: ``first | second``."""

    first: Selection
    second: Selection

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return self.first.mask(components) | self.second.mask(components)

    def __str__(self) -> str:
        second = f"({self.second})" if isinstance(self.second, AnyOf) else str(self.second)
        return f"{self.first} or {second}"


@dataclass(frozen=True)
class AllOf(Selection):
    """Components of both selections: ``first & second``."""

    first: Selection
    second: Selection

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return self.first.mask(components) & self.second.mask(components)

    def __str__(self) -> str:
        first = f"({self.first})" if isinstance(self.first, AnyOf) else str(self.first)
        second = f"({self.second})" if isinstance(self.second, (AnyOf, AllOf)) else str(self.second)
        return f"{first} and {second}"


@dataclass(frozen=True)
class Not(Selection):
    """Components that a selection leaves out: ``~selection``."""

    selection: Selection

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        return ~self.selection.mask(components)

    def __invert__(self) -> Selection:
        return self.selection

    def __str__(self) -> str:
        inner = f"({self.selection})" if isinstance(self.selection, (AnyOf, AllOf)) else str(self.selection)
        return f"not {inner}"


def _whole(selection: Selection, name: str) -> int:
    value = getattr(selection, name)
    try:
        if isinstance(value, bool):  # an index to Python
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{type(selection).__name__}: {name} is {value!r}, which is no whole number") from None


def _real(selection: Selection, name: str) -> float:
    value = getattr(selection, name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{type(selection).__name__}: {name} is {value!r}, which is no number") from None


def _check_one_of(selection: Selection, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(selection, name)
    if value not in allowed:
        raise ValueError(f"{type(selection).__name__}: {name} is {value!r}: give one of {', '.join(allowed)}")


def _check_law(selection: Selection, sigma: SigmaRule | float, rate: float | None) -> None:
    if sigma not in SIGMA_RULES:
        given = sigma if isinstance(sigma, str) else _real(selection, "sigma")
        object.__setattr__(selection, "sigma", check_sigma(given))
    if rate is not None:
        object.__setattr__(selection, "rate", _real(selection, "rate"))
        check_rate(selection.rate)  # type: ignore[attr-defined]


def _count_or_share(selection: _Amount) -> int | float:
    """A whole number stays a number of components, also one of numpy's; anything else is a share."""
    word, amount = type(selection).__name__, selection.amount
    try:
        count = operator.index(amount)  # type: ignore[arg-type]
    except TypeError:
        share = _real(selection, "amount")
        if not 0 < share <= 1:
            raise ValueError(f"{word}: {amount!r} is no share, which lies above 0 and is at most 1") from None
        return share
    if count < 1:
        raise ValueError(f"{word}: {amount!r} components; give at least 1, or a share as a float")
    return count


def _count(selection: Selection, amount: int | float, components: Components) -> int:
    if isinstance(amount, float):
        return math.floor(amount * len(components.s) + 0.5)
    return _at_most_all(selection, amount, components)


def _at_most_all(selection: Selection, count: int, components: Components) -> int:
    if count > len(components.s):
        raise ValueError(
            f"{selection}: {components.name} of shape {tuple(components.shape)} has {len(components.s)} "
            "singular values; ask for fewer, or for a share of them"
        )
    return count


def _edges(components: Components, sigma: SigmaRule | float, rate: float | None) -> tuple[float, float]:
    law = Law.fit(sigma, components.s, components.shape, components.entry_std, 0.01 if rate is None else rate)
    return (law.mp.lower_edge, law.mp.upper_edge) if rate is None else (law.lower_tw, law.upper_tw)
