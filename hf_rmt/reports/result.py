"""What is known of one matrix, and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from hf_rmt.theory.covariance import Overlap
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
        return {"s": self.s} | _arrays_of("right", self.right) | _arrays_of("left", self.left)

    @classmethod
    def from_arrays(cls, arrays: dict[str, torch.Tensor]) -> Spectrum:
        """Inverse of ``arrays``."""
        sides = {side: _from_arrays(VectorTest, side, arrays) for side in ("right", "left")}
        return cls(s=arrays["s"], **sides)


def _arrays_of(prefix: str, value: VectorTest | Overlap | None) -> dict[str, torch.Tensor]:
    """Fields of a dataclass as tensors, under ``prefix.field``."""
    if value is None:
        return {}
    return {f"{prefix}.{field.name}": torch.as_tensor(getattr(value, field.name)) for field in fields(value)}


def _from_arrays(cls: Any, prefix: str, arrays: dict[str, torch.Tensor]) -> Any:
    """Inverse of ``_arrays_of``; None where there are none. Scalars become numbers again."""
    names = [field.name for field in fields(cls)]
    if f"{prefix}.{names[0]}" not in arrays:
        return None
    values = {name: arrays[f"{prefix}.{name}"] for name in names}
    return cls(**{name: value if value.ndim else value.item() for name, value in values.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class MatrixResult(Spectrum):
    """The analysis of one matrix: a ``Spectrum`` with its numbers and what else was asked for.

    Attributes:
        row: the matrix's row of the report's table.
        control: the same analysis of a random matrix, or None.
        right_overlap: of the right singular vectors with the covariance of the activations that enter, or None.
        left_overlap: of the left singular vectors with the covariance of the outputs, or None.
        digest: hash of the weights, by which a resumed run knows them; empty if not taken.
    """

    row: dict[str, Any]
    control: Spectrum | None = None
    right_overlap: Overlap | None = None
    left_overlap: Overlap | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.row["name"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors to be written, those of the control under ``control.``"""
        control = self.control.arrays() if self.control else {}
        overlaps = _arrays_of("right_overlap", self.right_overlap) | _arrays_of("left_overlap", self.left_overlap)
        return self.arrays() | overlaps | {f"control.{key}": value for key, value in control.items()}

    def description(self) -> str:
        """Everything else, as JSON."""
        return json.dumps({"row": self.row, "digest": self.digest})

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> MatrixResult:
        """Inverse of ``tensors`` and ``description``."""
        own = Spectrum.from_arrays(tensors)
        under = "control."
        control = {key.removeprefix(under): value for key, value in tensors.items() if key.startswith(under)}
        return cls(
            s=own.s,
            right=own.right,
            left=own.left,
            control=Spectrum.from_arrays(control) if control else None,
            right_overlap=_from_arrays(Overlap, "right_overlap", tensors),
            left_overlap=_from_arrays(Overlap, "left_overlap", tensors),
            **json.loads(description),
        )
