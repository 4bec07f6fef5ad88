"""Random matrix theory for Hugging Face models: find what was learned, and work on exactly that."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Every public name, and the module that has it; imported when it is first used.
_PUBLIC = {
    "ActivationCovariances": "hf_rmt.reports.covariances",
    "AnalysisConfig": "hf_rmt.config",
    "AnalysisReport": "hf_rmt.reports.report",
    "CollectConfig": "hf_rmt.config",
    "MarchenkoPastur": "hf_rmt.theory.marchenko_pastur",
    "ModelComparison": "hf_rmt.reports.comparison",
    "RMTAnalyzer": "hf_rmt.analyzer",
    "RMTCallback": "hf_rmt.callbacks",
    "text_batches": "hf_rmt.models.text",
}

__all__ = [
    "ActivationCovariances",
    "AnalysisConfig",
    "AnalysisReport",
    "CollectConfig",
    "MarchenkoPastur",
    "ModelComparison",
    "RMTAnalyzer",
    "RMTCallback",
    "__version__",
    "text_batches",
]

if TYPE_CHECKING:
    from hf_rmt.analyzer import RMTAnalyzer
    from hf_rmt.callbacks import RMTCallback
    from hf_rmt.config import AnalysisConfig, CollectConfig
    from hf_rmt.models.text import text_batches
    from hf_rmt.reports.comparison import ModelComparison
    from hf_rmt.reports.covariances import ActivationCovariances
    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.theory.marchenko_pastur import MarchenkoPastur


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hf_rmt' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
