"""What is known of one matrix, and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from hf_rmt.theory.singular_vectors import VectorTest

_EMPTY = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum:
    """Singular values of a matrix and the tests of its singular vectors.

    Attributes:
        s: ``(p,)`` singular values, float64, descending; empty where the matrix could not be analysed.
        right, left: tests of the right and left singular vectors, in the order of ``s``; None where
            that side was not asked for.
    """

    s: torch.Tensor = _EMPTY
    right: VectorTest | None = None
    left: VectorTest | None = None

    def arrays(self) -> dict[str, torch.Tensor]:
        """The tensors to be written, under names that ``from_arrays`` understands."""
        tensors = {"s": self.s}
        for side, test in (("right", self.right), ("left", self.left)):
            if test is not None:
                values = {field.name: getattr(test, field.name) for field in fields(test)}
                tensors |= {f"{side}.{key}": torch.as_tensor(value) for key, value in values.items()}
        return tensors

    @classmethod
    def from_arrays(cls, arrays: dict[str, torch.Tensor]) -> Spectrum:
        """Inverse of ``arrays``."""
        sides = {side: _test_from_arrays(arrays, side) for side in ("right", "left")}
        return cls(s=arrays["s"], **sides)


def _test_from_arrays(arrays: dict[str, torch.Tensor], side: str) -> VectorTest | None:
    if f"{side}.p_values" not in arrays:
        return None
    values: dict[str, Any] = {field.name: arrays[f"{side}.{field.name}"] for field in fields(VectorTest)}
    for whole in ("entries", "extreme_index"):
        values[whole] = int(values[whole])
    return VectorTest(**values)


@dataclass(frozen=True, eq=False, kw_only=True)
class MatrixResult(Spectrum):
    """The analysis of one matrix: a ``Spectrum`` with its numbers and, if asked for, its control.

    Attributes:
        row: the matrix's row of the report's table.
        control: the same analysis of a random matrix, or None.
        digest: hash of the weights, by which a resumed run knows them; empty if not taken.
    """

    row: dict[str, Any]
    control: Spectrum | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.row["name"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors to be written, those of the control under ``control.``"""
        own = self.arrays()
        control = self.control.arrays() if self.control else {}
        return own | {f"control.{key}": value for key, value in control.items()}

    def description(self) -> str:
        """Everything else, as JSON."""
        return json.dumps({"row": self.row, "digest": self.digest})

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> MatrixResult:
        """Inverse of ``tensors`` and ``description``."""
        own = Spectrum.from_arrays(tensors)
        under = "control."
        control = {key.removeprefix(under): value for key, value in tensors.items() if key.startswith(under)}
        random = Spectrum.from_arrays(control) if control else None
        return cls(s=own.s, right=own.right, left=own.left, control=random, **json.loads(description))
