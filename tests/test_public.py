from __future__ import annotations

import importlib
import pkgutil

import pytest

import hf_rmt


def test_every_public_name_is_there_and_documented() -> None:
    assert hf_rmt.__all__ == sorted(hf_rmt.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in hf_rmt.__all__:
        value = getattr(hf_rmt, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'RTMAnalyzer'; it has ActivationCovariances"):
        _ = hf_rmt.RTMAnalyzer


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(hf_rmt.__path__, "hf_rmt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_floors_import_only_from_below() -> None:
    """The rooms of docs/architecture.md: theory knows no models, models know no reports."""
    import ast
    from pathlib import Path

    forbidden = {
        "theory": ("models", "reports", "analy", "config"),
        "models": ("reports", "analy"),
        "reports": ("analy",),
    }
    root = Path(hf_rmt.__file__).parent
    for room, above in forbidden.items():
        for path in (root / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_rmt."):
                    assert not node.module.removeprefix("hf_rmt.").startswith(above), (path.name, node.module)
