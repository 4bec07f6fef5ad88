"""Random matrix theory for Hugging Face models: find what was learned, and work on exactly that."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Every public name, and the module that has it; imported when it is first used.
_PUBLIC = {
    "AnalysisConfig": "hf_rmt.config",
    "AnalysisReport": "hf_rmt.reports.report",
    "MarchenkoPastur": "hf_rmt.theory.marchenko_pastur",
    "RMTAnalyzer": "hf_rmt.analyzer",
}

__all__ = ["AnalysisConfig", "AnalysisReport", "MarchenkoPastur", "RMTAnalyzer", "__version__"]

if TYPE_CHECKING:
    from hf_rmt.analyzer import RMTAnalyzer
    from hf_rmt.config import AnalysisConfig
    from hf_rmt.reports.report import AnalysisReport
    from hf_rmt.theory.marchenko_pastur import MarchenkoPastur


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hf_rmt' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
