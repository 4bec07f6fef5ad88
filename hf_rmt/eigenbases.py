"""Eigenbases of the activations around matrices, each computed once for all that share it."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from hf_rmt.analysis import Bases
from hf_rmt.models.digests import fingerprint_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Eigenbasis
from hf_rmt.workers import eigenbasis_bytes, working_bytes


class EigenbasisPool:
    """Eigenbases of the activations around each matrix, computed once for all that share them.

    One is kept from the first matrix that asks for it to the last.
    """

    def __init__(self, covariances: ActivationCovariances, matrices: list[WeightMatrix]):
        check_covariances(covariances, matrices)
        self.covariances = covariances
        keys = (covariances.key(matrix.name, output) for matrix in matrices for output in (False, True))
        self.uses = Counter(key for key in keys if key is not None)
        self.locks = {key: threading.Lock() for key in self.uses}
        self.kept: dict[str, Eigenbasis] = {}

    def of(self, matrix: WeightMatrix, weight: torch.Tensor) -> Bases:
        """Both bases of one matrix with this weight; to be asked for once."""
        expected = self.covariances.fingerprints.get(matrix.name)
        if expected is not None and expected != fingerprint_of(weight):
            raise ValueError(
                f"{matrix.name}: the covariances were collected with other weights than these: collect them again, "
                "or pass covariances.for_any_weights() to hold them against these all the same"
            )
        return Bases(self._basis(matrix.name, False), self._basis(matrix.name, True))

    def _basis(self, name: str, output: bool) -> Eigenbasis | None:
        key = self.covariances.key(name, output)
        if key is None:
            return None
        with self.locks[key]:
            if key not in self.kept:
                moments = self.covariances.output(name) if output else self.covariances[name]
                assert moments is not None
                self.kept[key] = moments.eigenbasis(self.covariances.centred)
            self.uses[key] -= 1
            return self.kept[key] if self.uses[key] else self.kept.pop(key)


def check_covariances(covariances: ActivationCovariances, matrices: list[WeightMatrix]) -> None:
    """Raise a ValueError unless there are covariances, of the right width, of every matrix that was called."""
    silent = set(covariances.settings.get("silent", ()))
    missing = [m.name for m in matrices if m.name not in covariances and m.name not in silent]
    if missing:
        raise ValueError(
            f"the covariances are of another model, or of other roles and blocks: they lack {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    for matrix in matrices:
        for side, width, moments in (
            ("inputs", matrix.shape[1], covariances.get(matrix.name)),
            ("outputs", matrix.shape[0], covariances.output(matrix.name)),
        ):
            if moments is not None and len(moments.total) != width:
                raise ValueError(
                    f"the covariances are of another model: {matrix.name} has {width} {side}, "
                    f"they have {len(moments.total)}"
                )


def memory_for(matrix: WeightMatrix, covariances: ActivationCovariances | None) -> int:
    """Bytes that factoring a matrix takes, its eigenbases with it, of which each is computed before.

    Of these there are up to twice as many as workers, where several matrices share one.
    """
    factoring = working_bytes(*matrix.shape)
    if covariances is None:
        return factoring
    sides = ((False, matrix.shape[1]), (True, matrix.shape[0]))
    widths = [width for output, width in sides if covariances.key(matrix.name, output) is not None]
    held = 2 * sum(8 * width * width for width in widths)
    return held + max(factoring, *map(eigenbasis_bytes, widths)) if widths else factoring
