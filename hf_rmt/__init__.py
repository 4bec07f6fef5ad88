"""Random matrix theory for Hugging Face models: find what was learned, and work on exactly that."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_rmt.slicing.registering import register_when_loaded

__version__ = "0.1.0"

#: Every public name, and the module that has it; imported when it is first used.
_PUBLIC = {
    "ActivationCovariances": "hf_rmt.reports.covariances",
    "AnalysisConfig": "hf_rmt.config",
    "AnalysisReport": "hf_rmt.reports.report",
    "Bottom": "hf_rmt.theory.selection",
    "Branch": "hf_rmt.models.residual_stream",
    "Bulk": "hf_rmt.theory.selection",
    "CheckpointPruner": "hf_rmt.checkpoint_pruner",
    "CollectConfig": "hf_rmt.config",
    "Decile": "hf_rmt.theory.selection",
    "Energy": "hf_rmt.slicing.keep",
    "Family": "hf_rmt.models.residual_stream",
    "Group": "hf_rmt.theory.selection",
    "MarchenkoPastur": "hf_rmt.theory.marchenko_pastur",
    "Mass": "hf_rmt.theory.selection",
    "ModelComparison": "hf_rmt.reports.comparison",
    "Outliers": "hf_rmt.theory.selection",
    "Overlapping": "hf_rmt.theory.selection",
    "PruningCallback": "hf_rmt.pruning_callback",
    "RMTAnalyzer": "hf_rmt.analyzer",
    "RMTCallback": "hf_rmt.callbacks",
    "Random": "hf_rmt.theory.selection",
    "Rank": "hf_rmt.theory.selection",
    "SVDPruner": "hf_rmt.pruner",
    "ScaledSoftmaxLoss": "hf_rmt.theory.lazy",
    "Significant": "hf_rmt.theory.selection",
    "SliceConfig": "hf_rmt.config",
    "SweepConfig": "hf_rmt.config",
    "SweepTable": "hf_rmt.reports.sweep",
    "Top": "hf_rmt.theory.selection",
    "Width": "hf_rmt.slicing.keep",
    "before_and_after": "hf_rmt.protocol",
    "collect_stream": "hf_rmt.slicing.calibration",
    "fuse_norms_": "hf_rmt.slicing.norms",
    "parse_selection": "hf_rmt.theory.selection_names",
    "project_": "hf_rmt.slicing.masked",
    "push_sliced": "hf_rmt.slicing.publishing",
    "read_slice": "hf_rmt.slicing.publishing",
    "register_family": "hf_rmt.models.families",
    "rotate_": "hf_rmt.slicing.basis",
    "save_sliced": "hf_rmt.slicing.publishing",
    "slice_": "hf_rmt.slicing.basis",
    "stream_of": "hf_rmt.models.residual_stream",
    "text_batches": "hf_rmt.models.text",
    "verify_stream": "hf_rmt.slicing.verify",
}

__all__ = [
    "ActivationCovariances",
    "AnalysisConfig",
    "AnalysisReport",
    "Bottom",
    "Branch",
    "Bulk",
    "CheckpointPruner",
    "CollectConfig",
    "Decile",
    "Energy",
    "Family",
    "Group",
    "MarchenkoPastur",
    "Mass",
    "ModelComparison",
    "Outliers",
    "Overlapping",
    "PruningCallback",
    "RMTAnalyzer",
    "RMTCallback",
    "Random",
    "Rank",
    "SVDPruner",
    "ScaledSoftmaxLoss",
    "Significant",
    "SliceConfig",
    "SweepConfig",
    "SweepTable",
    "Top",
    "Width",
    "__version__",
    "before_and_after",
    "collect_stream",
    "fuse_norms_",
    "parse_selection",
    "project_",
    "push_sliced",
    "read_slice",
    "register_family",
    "rotate_",
    "save_sliced",
    "slice_",
    "stream_of",
    "text_batches",
    "verify_stream",
]

if TYPE_CHECKING:
    from hf_rmt.analyzer import RMTAnalyzer
    from hf_rmt.callbacks import RMTCallback
    from hf_rmt.checkpoint_pruner import CheckpointPruner
    from hf_rmt.config import AnalysisConfig, CollectConfig, SliceConfig, SweepConfig
    from hf_rmt.models.families import register_family
    from hf_rmt.models.residual_stream import Branch, Family, stream_of
    from hf_rmt.models.text import text_batches
    from hf_rmt.protocol import before_and_after
    from hf_rmt.pruner import SVDPruner
    from hf_rmt.pruning_callback import PruningCallback
    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.covariances import ActivationCovariances
    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.reports.sweep import SweepTable
    from hf_rmt.slicing.basis import rotate_, slice_
    from hf_rmt.slicing.calibration import collect_stream
    from hf_rmt.slicing.keep import Energy, Width
    from hf_rmt.slicing.masked import project_
    from hf_rmt.slicing.norms import fuse_norms_
    from hf_rmt.slicing.publishing import push_sliced, read_slice, save_sliced
    from hf_rmt.slicing.verify import verify_stream
    from hf_rmt.theory.lazy import ScaledSoftmaxLoss
    from hf_rmt.theory.marchenko_pastur import MarchenkoPastur
    from hf_rmt.theory.selection import (
        Bottom,
        Bulk,
        Decile,
        Group,
        Mass,
        Outliers,
        Overlapping,
        Random,
        Rank,
        Significant,
        Top,
    )
    from hf_rmt.theory.selection_names import parse_selection


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hf_rmt' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()
