"""A model before and after training: which models, and the run over their matrices."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_rmt.analysis import analyse_weight
from hf_rmt.config import AnalysisConfig
from hf_rmt.models.adapters import is_adapter, load_adapter
from hf_rmt.models.digests import digest_of
from hf_rmt.models.live import callable_of, unwrap
from hf_rmt.models.matrices import WeightMatrix, select
from hf_rmt.reports import store
from hf_rmt.reports.comparison import MatrixComparison, ModelComparison, common_names, one_sided, refuse_other_shapes
from hf_rmt.reports.result import MatrixResult
from hf_rmt.run import AnalysisRun
from hf_rmt.sharing import MatrixRun, MatrixTasks, factoring_bytes
from hf_rmt.theory.comparison import DECILES, change_stable_rank, energy_by_decile, frobenius_norm, match
from hf_rmt.theory.decomposition import SVDFactors, as_float
from hf_rmt.workers import where_it_fits

if TYPE_CHECKING:
    from torch import nn

    from hf_rmt.analyzer import RMTAnalyzer


@dataclass(frozen=True, eq=False)
class ComparedMatrix:
    """All that a run finds out about one matrix: both analyses and their comparison."""

    before: MatrixResult
    after: MatrixResult
    comparison: MatrixComparison

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors to be written; those after are left out where they are those before."""
        after = {} if self.after is self.before else self.after.tensors()
        parts = {"before": self.before.tensors(), "after": after, "comparison": self.comparison.tensors()}
        return {f"{part}/{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}

    def description(self) -> str:
        """Everything else, as JSON."""
        parts = ("before", "after", "comparison")
        return json.dumps({part: getattr(self, part).description() for part in parts})

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> ComparedMatrix:
        """Inverse of ``tensors`` and ``description``."""
        words = json.loads(description)
        parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in words}
        for key, tensor in tensors.items():
            part, _, rest = key.partition("/")
            parts[part][rest] = tensor
        before = MatrixResult.restore(parts["before"], words["before"])
        after = MatrixResult.restore(parts["after"], words["after"]) if parts["after"] else before
        return cls(before, after, MatrixComparison.restore(parts["comparison"], words["comparison"]))


def compare_matrix(before: WeightMatrix, after: WeightMatrix, config: AnalysisConfig) -> ComparedMatrix:
    """Analyse a matrix before and after training, and hold the two against each other.

    Raises:
        ValueError: a weight cannot be read, or, if ``config.strict``, is not finite.
    """
    new = after.read()
    return where_it_fits(
        before.read(), config.device, lambda old: _compared(before, after, (old, new.to(old.device)), config)
    )


def _compared(
    before: WeightMatrix, after: WeightMatrix, weights: tuple[torch.Tensor, torch.Tensor], config: AnalysisConfig
) -> ComparedMatrix:
    old, new = weights
    first, old_factors = analyse_weight(before, old, config)
    first = replace(first, digest=digest_of(old))
    if old.dtype == new.dtype and torch.equal(old, new):
        second, new_factors = first, old_factors
    else:
        second, new_factors = analyse_weight(after, new, config)
        second = replace(second, digest=digest_of(new))
    comparison = MatrixComparison.of(first, second)
    if len(first.s) and len(second.s):
        comparison = _with_weights(comparison, as_float(old), as_float(new), (old_factors, new_factors))
    return ComparedMatrix(first, second, comparison)


def _with_weights(
    comparison: MatrixComparison,
    old: torch.Tensor,
    new: torch.Tensor,
    factors: tuple[SVDFactors | None, SVDFactors | None],
) -> MatrixComparison:
    """The comparison with what only the weights tell."""
    change = new - old
    norm = frobenius_norm(old)
    row = comparison.row | {
        "relative_change": frobenius_norm(change) / norm if norm else None,
        "change_stable_rank": change_stable_rank(change),
    }
    notes = [] if change.any() else ["the weights did not change"]
    before, after = factors
    if before is None or after is None:
        return replace(comparison, row=row | {"note": "; ".join(notes)})
    if arbitrary := int((~before.testable()).sum()):
        notes.append(f"{arbitrary} vectors before are arbitrary: how the change lies over them means nothing")
    right, left = energy_by_decile(change, before.u, before.vh)
    known = after.testable()
    parts: dict[str, Any] = {
        "right_energy": right,
        "left_energy": left,
        "right_match": match(before.vh, after.vh, known),
        "left_match": match(before.u.mT, after.u.mT, known),
    }
    row |= _vector_columns(parts) | {"note": "; ".join(notes)}
    return replace(comparison, row=row, **parts)


def _vector_columns(parts: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table that sum up energies and matches."""
    columns: dict[str, Any] = {}
    for side in ("right", "left"):
        *deciles, outside = parts[f"{side}_energy"].shares.tolist()
        columns |= {f"{side}_energy_{d}": share for d, share in zip(range(1, DECILES + 1), deciles, strict=True)}
        columns[f"{side}_energy_outside"] = outside
        columns[f"{side}_intruders"] = parts[f"{side}_match"].intruders
        columns[f"{side}_match"] = parts[f"{side}_match"].top
    return columns


class ComparisonRun(MatrixRun[ComparedMatrix, ModelComparison]):
    """One comparison: the matrices of both sides, the settings, and what a folder must agree with."""

    kind = "comparison"
    result_class = ComparedMatrix
    whole_class = ModelComparison

    def __init__(
        self,
        before: RMTAnalyzer,
        after: RMTAnalyzer,
        config: AnalysisConfig,
        roles: str | Collection[str] | None,
        blocks: int | Collection[int] | None,
    ):
        """``roles`` and ``blocks`` choose among the matrices that both sides have.

        Raises:
            ValueError: nothing in common, nothing chosen, or other shapes after than before.
        """
        names = [[matrix.name for matrix in side.matrices] for side in (before, after)]
        common = set(common_names(*names))
        chosen = select([matrix for matrix in before.matrices if matrix.name in common], roles, blocks)
        by_name = {matrix.name: matrix for matrix in after.matrices}
        partners = [by_name[matrix.name] for matrix in chosen]
        refuse_other_shapes({old.name: (old.shape, new.shape) for old, new in zip(chosen, partners, strict=True)})
        origins = [side.origin for side in (before, after)]
        self.config = config
        self.before = AnalysisRun(chosen, config, origins[0])
        self.after = AnalysisRun(partners, config, origins[1])
        self.pairs = list(zip(chosen, partners, strict=True))
        self.decisive = config.identity() | {"weights": True}
        self.settings = self.decisive | {"before": origins[0], "after": origins[1]} | one_sided(*names)
        self.settings["versions"] = self.before.settings["versions"]

    def whole(self, results: Sequence[ComparedMatrix]) -> ModelComparison:
        """The comparison, from that of each pair."""
        return ModelComparison(
            (one.comparison for one in results),
            self.before.whole(one.before for one in results),
            self.after.whole(one.after for one in results),
            self.settings,
        )

    def identity(self) -> dict[str, Any]:
        """What a folder must have been made for."""
        return {"before": self.before.identity(), "after": self.after.identity()}

    def results_of(self, earlier: ModelComparison, folder: Path) -> list[ComparedMatrix]:
        """Its results, if it is one of the same matrices under the same settings."""
        wanted = self.decisive | {"matrices": [old.name for old, _ in self.pairs]}
        store.refuse_other(folder, earlier.settings | {"matrices": list(earlier)}, wanted)
        return [ComparedMatrix(earlier.before[name], earlier.after[name], earlier[name]) for name in earlier]

    def check(self, folder: Path, index: int, earlier: ComparedMatrix) -> None:
        """Raise unless a result is of the weights that there are."""
        for side, matrix, result in zip(
            ("before", "after"), self.pairs[index], (earlier.before, earlier.after), strict=True
        ):
            if result.name != matrix.name or result.digest != digest_of(matrix.read()):
                raise ValueError(
                    f"{folder} belongs to other models: the weights of {matrix.name} {side} differ; give another folder"
                )
            if self.config.strict and not len(result.s):
                raise ValueError(f"{matrix.name}: {result.row['note']}; repair the weights, or compare without strict")

    def tasks(self, kept: bool) -> MatrixTasks[ComparedMatrix]:
        """The comparison of each pair, which always says what weights it is of."""
        return MatrixTasks(
            self.pairs,
            lambda indices: lambda old, new: compare_matrix(old, new, self.config),
            self.config,
            memory_for=lambda old, new: factoring_bytes(old) + factoring_bytes(new),
        )


# Which models


def analyzers_of(before: Any, after: Any) -> tuple[RMTAnalyzer, RMTAnalyzer]:
    """Analyzers of both sides; see ``RMTAnalyzer.compare`` for what a side can be.

    Raises:
        TypeError: neither a model nor a path.
        ValueError: nothing to compare with, or a checkpoint or adapter that cannot be read.
    """
    if after is None:
        return _base_and_adapted(before)
    models = [_model_of(side) for side in (before, after)]
    if None not in models and unwrap(models[0]) is unwrap(models[1]):
        return _sides_of_one_model(before, after)
    return _analyzer_of(before, after), _analyzer_of(after, before)


def analyzer_of_adapter(folder: str | Path, base: Any = None, **which: bool) -> RMTAnalyzer:
    """Analyzer of a peft adapter on its base, for which see ``load_adapter``; ``which`` as for ``RMTAnalyzer``.

    Raises:
        ValueError: the adapter or its base cannot be loaded.
    """
    from hf_rmt.analyzer import RMTAnalyzer

    analyzer = RMTAnalyzer(load_adapter(Path(folder), base), **which)
    analyzer.model_id = f"{folder} on {analyzer.model_id}"
    return analyzer


def _base_and_adapted(source: Any) -> tuple[RMTAnalyzer, RMTAnalyzer]:
    side = analyzer_of_adapter(source) if is_adapter(source) else source
    model = _model_of(side)
    if model is None or not _has_adapters(model):
        raise _nothing_to_compare_with(source)
    if is_adapter(source):
        return _as_side(model, adapters=False), side
    return _as_side(source, adapters=False), _as_side(source, adapters=True)


def _sides_of_one_model(before: Any, after: Any) -> tuple[RMTAnalyzer, RMTAnalyzer]:
    """Peft puts adapters into the base itself: there is one model, of which one side is the base."""
    if not _has_adapters(_model_of(before)):
        raise _nothing_to_compare_with(before)
    old, new = _claim_to_adapters(before), _claim_to_adapters(after)
    if old == new:
        raise ValueError(
            f"both sides are one {_called(before)} in memory: give it alone to compare it with its base, or one side "
            "as RMTAnalyzer(model, adapters=False)"
        )
    return _as_side(before, adapters=old > new), _as_side(after, adapters=new > old)


def _claim_to_adapters(side: Any) -> int:
    """0 for an analyzer that leaves adapters out, 2 for a model in peft's wrapper, 1 for the model inside it.

    Of two sides of one model the one with the larger claim is the adapted one.
    """
    loaders = [matrix.load for matrix in side.matrices] if _is_analyzer(side) else []
    if not all(getattr(load, "adapters", True) for load in loaders):
        return 0
    model = _model_of(side)
    return 1 if callable_of(model) is unwrap(model) else 2


def _as_side(side: Any, adapters: bool) -> RMTAnalyzer:
    """A model in memory with or without its adapters; of an analyzer, the matrices that it has."""
    from hf_rmt.analyzer import RMTAnalyzer

    model: Any = _model_of(side)
    if _is_analyzer(side):
        analyzer = RMTAnalyzer(model, adapters=adapters, embeddings=True, head=True)
        chosen = {matrix.name for matrix in side.matrices}
        analyzer.matrices = [matrix for matrix in analyzer.matrices if matrix.name in chosen]
        analyzer.model_id = side.model_id
    else:
        analyzer = RMTAnalyzer(model, adapters=adapters)
    analyzer.model_id += " with adapters" if adapters else ""
    return analyzer


def _analyzer_of(side: Any, other: Any) -> RMTAnalyzer:
    from hf_rmt.analyzer import RMTAnalyzer

    if _is_analyzer(side):
        return side
    if is_adapter(side):
        return analyzer_of_adapter(side, other)
    if isinstance(side, (str, Path)):
        return RMTAnalyzer.from_checkpoint(side)
    return RMTAnalyzer(side)


def _is_analyzer(side: Any) -> bool:
    from hf_rmt.analyzer import RMTAnalyzer

    return isinstance(side, RMTAnalyzer)


def _model_of(side: Any) -> Any:
    """The model in memory that a side is or holds; None if there is none."""
    if _is_analyzer(side):
        return side.model
    return side if hasattr(side, "named_modules") else None


def _nothing_to_compare_with(source: Any) -> ValueError:
    return ValueError(
        f"there is nothing to compare {_called(source)} with: give two models, or one with peft adapters; of a "
        "model trained in place keep a copy or a checkpoint from before"
    )


def _called(source: Any) -> str:
    if _is_analyzer(source):
        return source.model_id
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(module, "base_layer") and hasattr(module, "active_adapters") for module in model.modules())
