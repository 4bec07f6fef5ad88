"""The factors of a model's matrices, computed once: in memory, or memory-mapped from a folder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from hf_rmt.config import AnalysisConfig
from hf_rmt.eigenbases import EigenbasisPool, memory_for
from hf_rmt.models.digests import digest_of, text_digest
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.reports.store import save_tensors
from hf_rmt.sharing import bundles_of, matrix_by_matrix, staggered, tasks_at_a_time
from hf_rmt.theory.covariance import Overlap, overlap
from hf_rmt.theory.decomposition import SVDFactors, as_float, svd
from hf_rmt.theory.ks_null import MonteCarloNull
from hf_rmt.theory.selection import Side
from hf_rmt.theory.singular_vectors import VectorTest, test_vectors
from hf_rmt.theory.statistics import entry_std_of
from hf_rmt.workers import seconds_estimate, where_it_fits

log = logging.getLogger(__name__)


class FactoredMatrix:
    """One matrix with its factors: the ``Components`` that selections look at.

    Attributes:
        factors: in float32, or float64 for a float64 weight.
        digest: of the weight that was factored.
    """

    def __init__(
        self,
        matrix: WeightMatrix,
        factors: SVDFactors,
        entry_std: float,
        digest: str,
        null: MonteCarloNull | None = None,
    ):
        self.name = matrix.name
        self.shape = matrix.shape
        self.factors = factors
        self.entry_std = entry_std
        self.digest = digest
        self.null = null
        self.overlaps: dict[Side, Overlap] | None = None
        self._tests: dict[Side, VectorTest] = {}

    @property
    def s(self) -> torch.Tensor:
        """``(p,)`` singular values, float64, on the CPU."""
        return self.factors.s

    def vectors(self, side: Side) -> torch.Tensor:
        """Singular vectors of one side, one a row."""
        return self.factors.vh if side == "right" else self.factors.u.mT

    def test(self, side: Side) -> VectorTest:
        """The test of the vectors of one side, made when it is first asked for."""
        if side not in self._tests:
            self._tests[side] = test_vectors(self.vectors(side), self.factors.testable(), self.null)
        return self._tests[side]

    def overlap(self, side: Side) -> Overlap:
        """Overlap of the vectors of one side with the activations.

        Raises:
            ValueError: there are no covariances, or none of this matrix and side.
        """
        if self.overlaps is None:
            raise ValueError(
                f"{self.name}: overlaps need the activations: "
                "SVDPruner(model, covariances=RMTAnalyzer(model).collect(data))"
            )
        if side not in self.overlaps:
            what = "inputs" if side == "right" else "outputs (collect with outputs=True)"
            raise ValueError(f"{self.name}: the covariances have none of its {what}")
        return self.overlaps[side]


class FactorStore:
    """Factors each matrix when it is first asked for, and never again.

    Args:
        matrices: all that may be asked for.
        config: where and how many at a time; the null of the p-values.
        folder: keep the factors there, one file a matrix, memory-mapped; None for memory.
        bases: eigenbases of the activations around the matrices; None where none were collected.
    """

    def __init__(
        self, matrices: list[WeightMatrix], config: AnalysisConfig, folder: Path | None, bases: EigenbasisPool | None
    ):
        self.matrices = matrices
        self.config = config
        self.folder = folder
        self.bases = bases
        self.known: dict[int, FactoredMatrix] = {}
        self._lent: dict[str, FactoredMatrix] = {}

    def adopt(self, other: FactorStore) -> None:
        """Take what another store has factored, of a model that began with the same weights, where these are equal."""
        self._lent = {factored.name: factored for factored in other.known.values()}

    def __getitem__(self, index: int) -> FactoredMatrix:
        return self.known[index]

    def prepare(self, indices: Collection[int]) -> None:
        """Factor those of these matrices that are not factored yet; their weights must be the originals.

        Raises:
            ValueError: NaN or Inf entries, or a weight that cannot be read; the message names the matrix.
        """
        missing = [index for index in indices if index not in self.known]
        if not missing:
            return
        covariances = None if self.bases is None else self.bases.covariances
        together = None if covariances is None else lambda index: covariances.key(self.matrices[index].name)
        bundles = bundles_of(missing, lambda index: seconds_estimate(*self.matrices[index].shape), together)
        chosen = [self.matrices[index] for index in missing]
        needs = [memory_for(matrix, covariances) for matrix in chosen]
        workers = tasks_at_a_time([(matrix,) for matrix in chosen], self.config, needs)
        work = lambda index: self._factored(self.matrices[index])  # noqa: E731
        order = staggered(bundles, workers)
        for index, factored in matrix_by_matrix(self.matrices, order, work, workers, self.config.progress):
            self.known[index] = factored

    def _factored(self, matrix: WeightMatrix) -> FactoredMatrix:
        weight = matrix.read()
        digest = digest_of(weight)
        lent = self._lent.get(matrix.name)
        if lent is not None and (lent.digest, lent.shape) == (digest, matrix.shape):
            return lent
        found = self._loaded(matrix, weight, digest) or self._computed(matrix, weight, digest)
        if self.bases is not None:
            bases = self.bases.of(matrix, weight)
            known = found.factors.testable()
            sides: dict[Side, object] = {"right": bases.right, "left": bases.left}
            found.overlaps = {
                side: overlap(found.vectors(side), basis, known)  # type: ignore[arg-type]
                for side, basis in sides.items()
                if basis is not None
            }
        return found

    def _computed(self, matrix: WeightMatrix, weight: torch.Tensor, digest: str) -> FactoredMatrix:
        found = factored(matrix, weight, digest, self.config)
        if self.folder is None:
            return found
        self._save(matrix, weight, found)
        # What was computed is let go, and the file takes its place in memory only as it is used.
        return self._loaded(matrix, weight, digest) or found

    def _path(self, matrix: WeightMatrix) -> Path:
        assert self.folder is not None
        return self.folder / "factors" / f"{matrix.name}.safetensors"

    def _save(self, matrix: WeightMatrix, weight: torch.Tensor, found: FactoredMatrix) -> None:
        path = self._path(matrix)
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = found.factors
        tensors = {"ut": factors.u.mT.cpu(), "s": factors.s, "vh": factors.vh.cpu()}
        described = {
            "weight": _made_of(weight, found.digest),
            "entry_std": repr(found.entry_std),
            "route": factors.route,
        }
        described["content"] = _content(tensors, described)
        save_tensors(path, tensors, described)

    def _loaded(self, matrix: WeightMatrix, weight: torch.Tensor, digest: str) -> FactoredMatrix | None:
        """The factors that a file has, if they are those of this weight."""
        if self.folder is None or not self._path(matrix).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(matrix), framework="pt") as file:
                described = file.metadata() or {}
                if described.get("weight") != _made_of(weight, digest):
                    log.info("%s was made of other weights; they are factored anew", self._path(matrix))
                    return None
                tensors = {key: file.get_tensor(key) for key in ("ut", "s", "vh")}
            if described.pop("content") != _content(tensors, described):
                raise ValueError("it is not what was written")
            factors = SVDFactors(tensors["ut"].mT, tensors["s"], tensors["vh"], described["route"])
            entry_std = float(described["entry_std"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s is damaged (%s); the matrix is factored anew", self._path(matrix), error)
            return None
        return FactoredMatrix(matrix, factors, entry_std, digest, null_of(self.config))


def factored(matrix: WeightMatrix, weight: torch.Tensor, digest: str, config: AnalysisConfig) -> FactoredMatrix:
    """A matrix with the factors of its weight.

    Raises:
        ValueError: NaN or Inf entries; the message names the matrix.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    try:
        factors = where_it_fits(weight, config.device, lambda placed: svd(placed, dtype))
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}; repair the weights, or leave it out by its role") from error
    factors = SVDFactors(factors.u, factors.s.cpu(), factors.vh, factors.route)
    return FactoredMatrix(matrix, factors, entry_std_of(as_float(weight), factors.s), digest, null_of(config))


def null_of(config: AnalysisConfig) -> MonteCarloNull | None:
    """The null of p-values that is asked for; None for the shipped table."""
    return MonteCarloNull(config.null_draws, config.seed) if config.null_draws else None


def _made_of(weight: torch.Tensor, digest: str) -> str:
    """What a weight is known by in a file: zeros have the same bits in any shape and dtype."""
    return f"{digest} {weight.dtype} {tuple(weight.shape)}"


def _content(tensors: Mapping[str, torch.Tensor], described: Mapping[str, str]) -> str:
    """Hash of all that a file holds: the smallest vectors could be lost, and the product would hardly show it."""
    shapes = {key: [*tensor.shape, str(tensor.dtype)] for key, tensor in tensors.items()}
    return text_digest([{key: digest_of(tensor) for key, tensor in tensors.items()}, shapes, described])
