"""Has transformers know sliced checkpoints from the moment it can load any, and costs nothing before.

``import hf_rmt`` loads neither torch nor transformers, and transformers has no entry points for loaders: so the import
of its table of loaders is watched.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Register the loader of sliced models now if transformers' table of loaders is loaded, or else right after it is.

    ``from_pretrained`` then works in whichever order ``hf_rmt`` and ``transformers`` are imported. Called again it
    does nothing.
    """
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    """A guest does not raise: what fails here must not fail the import of transformers."""
    try:
        importlib.import_module("hf_rmt.slicing.registered")
    except Exception:
        logging.getLogger(__name__).warning("sliced models cannot be loaded by this transformers", exc_info=True)


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and has its loader register after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _followed_by_registration(spec.loader)  # type: ignore[method-assign]
        return spec


def _followed_by_registration(loader: Any) -> Any:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    return exec_module
