"""What is asked of each model type: is every parameter accounted for, and does a small model go through all of it?"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from shrinking import small_config

from hf_rmt import Decile, RMTAnalyzer, SVDPruner
from hf_rmt.models.discovery import Discovery
from hf_rmt.models.live import matrices_of
from hf_rmt.models.matrices import WeightMatrix


class Unbuilt(Exception):  # noqa: N818 - it says what the model is
    """A model that cannot be built, which says nothing of this library."""


def discovered(kind: str, folder: Path) -> dict[str, Any]:
    """The parameters of a model of the default configuration, on the meta device, by what they were taken for.

    Returns:
        ``elements`` by kind of matrix, of what was ``left out`` and of ``vectors``; ``total``, of the model;
        ``unplaced``, how many matrices of blocks have no role; ``left_out``, as ``[name, shape, reason]``.

    Raises:
        Unbuilt: the model is not built from its default configuration.
        AssertionError: they do not add up.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(CONFIG_MAPPING[kind]())
    except Exception as error:  # whatever it is
        raise Unbuilt(f"{type(error).__name__}: {error}") from error
    found = Discovery(model, lambda module, name, full: None)  # type: ignore[arg-type, return-value]
    matrices, left_out = found.matrices(), found.left_out()
    elements = {"left out": sum(math.prod(one.shape) for one in left_out)}
    for matrix in matrices:
        elements[matrix.kind] = elements.get(matrix.kind, 0) + math.prod(matrix.shape)
    total = sum(parameter.numel() for parameter in model.parameters())
    elements["vectors"] = _vectors(model)
    assert sum(elements.values()) == total, f"{sum(elements.values()):,} elements of {total:,}"
    return {
        "class": type(model).__name__,
        "total": total,
        "elements": elements,
        "matrices": len(matrices),
        "unplaced": [matrix.name for matrix in matrices if not matrix.role],
        "flat_left_out": sum(math.prod(one.shape) for one in left_out if len(one.shape) == 2),
        "left_out": [[one.parameter, list(one.shape), one.reason] for one in left_out],
    }


def _vectors(model: torch.nn.Module) -> int:
    """Elements of parameters with one axis, or several of which but one have one element; a linear layer or a table of
    one row is a matrix all the same."""
    tables = (torch.nn.Linear, torch.nn.Embedding)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, tables)}
    others = (parameter for parameter in model.parameters() if id(parameter) not in matrices)
    return sum(parameter.numel() for parameter in others if parameter.numel() <= max(parameter.shape, default=1))


def cycle(kind: str, folder: Path) -> dict[str, Any]:
    """Take a small model through all of it: analysed, pruned, restored, saved, loaded, and analysed as a folder too.

    Raises:
        Unbuilt: no small model can be built.
        AssertionError: something is not as it was.
        Exception: whatever goes wrong.
    """
    from transformers import AutoModel

    model = _small_model(kind)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"progress": False, "workers": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = _taken(model)
        before = RMTAnalyzer(model, **taken).analyze(**options).to_pandas()
        pruner = SVDPruner(model, **taken, **options)
        edit = pruner.remove(Decile(10))
        removed = [matrix for matrix in pruner.matrices if _changed(matrix, bits) or not matrix.read().any()]
        pruner.restore()
        model.save_pretrained(folder)
        loaded = AutoModel.from_pretrained(folder).eval()
        after = RMTAnalyzer(loaded, **taken).analyze(**options).to_pandas()
        stored = RMTAnalyzer.from_checkpoint(folder, **taken).analyze(**options).to_pandas()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in bits.items()), "restoring did not give the bits back"
    assert len(removed) + len(edit.empty) >= len(pruner.matrices), "a removal changed nothing"
    for found, where in ((after, "loaded"), (stored, "as a folder")):
        _assert_same(before, found, where)
    return {"class": type(model).__name__, "matrices": len(before), "parameters": model.num_parameters()}


def _taken(model: torch.nn.Module) -> dict[str, bool]:
    """Convolutions where there is nothing else."""
    return {"convolutions": not any(matrix.kind == "block" for matrix in matrices_of(model))}


def _small_model(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModel

    torch.manual_seed(0)
    try:
        return AutoModel.from_config(small_config(CONFIG_MAPPING[kind])).eval()
    except Exception as error:  # whatever it is
        raise Unbuilt(f"{type(error).__name__}: {error}") from error


def _changed(matrix: WeightMatrix, bits: dict[str, torch.Tensor]) -> bool:
    return matrix.parameter not in bits or not torch.equal(matrix.load(None), bits[matrix.parameter])


def _assert_same(before: pd.DataFrame, after: pd.DataFrame, where: str) -> None:
    try:
        pd.testing.assert_frame_equal(before, after)
    except AssertionError as error:
        raise AssertionError(f"{where} the report differs: {' '.join(str(error).split())[:200]}") from error
