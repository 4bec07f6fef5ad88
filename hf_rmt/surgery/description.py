"""What edits have taken, in numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.surgery.editor import Edit, Editor
from hf_rmt.surgery.factors import FactorStore
from hf_rmt.theory.selection import Side

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the table of what was taken from each matrix.
AFFECTED = ["name", "role", "block", "removed", "of", "mass", "energy", "parameters"]
SIDES: tuple[Side, Side] = ("right", "left")


def affected(editor: Editor) -> pd.DataFrame:
    """A row for each matrix that the edits in place touch; see ``SVDPruner.affected``."""
    import pandas as pd

    rows = []
    for index in sorted({editor.index[name] for edit in editor.edits for name in edit.names}):
        rows.append(row_of(editor.matrices[index], editor.store[index].s, editor.mask(index)))
    return pd.DataFrame(rows, columns=AFFECTED).astype({"block": "Int64"})


def row_of(matrix: WeightMatrix, s: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """A row of ``affected``: of one matrix, with its singular values ``(p,)`` and the mask of what is removed."""
    return (
        {"name": matrix.name, "role": matrix.role, "block": matrix.block, "removed": int(mask.sum())}
        | {"of": len(s), "mass": _share(s, mask), "energy": _share(s**2, mask)}
        | {"parameters": matrix.shape[0] * matrix.shape[1]}
    )


def removed_by(edit: Edit, editor: Editor) -> dict[str, float]:
    """What one edit removes, over all its matrices: the columns that a sweep has of it.

    Number of ``components`` out of ``of`` in ``matrices``, their share of the singular ``mass`` (the mean over
    matrices), and the means over the components of the p-values and overlaps of their vectors, by side.
    """
    indices = [editor.index[name] for name in edit.names]
    store, masks = editor.store, [edit.masks[name] for name in edit.names]
    found: dict[str, float] = {
        "components": float(sum(int(mask.sum()) for mask in masks)),
        "of": float(sum(len(mask) for mask in masks)),
        "matrices": float(len(masks)),
        "mass": sum(_share(store[index].s, mask) for index, mask in zip(indices, masks, strict=True)) / len(masks),
    }
    for side in SIDES:
        p_values = [store[index].test(side).p_values[mask] for index, mask in zip(indices, masks, strict=True)]
        overlaps = [
            store[index].overlap(side).values[mask]
            for index, mask in zip(indices, masks, strict=True)
            if side in (store[index].overlaps or {})
        ]
        for name, values in (("p", p_values), ("overlap", overlaps)):
            mean = torch.cat(values).nanmean() if values else torch.tensor(torch.nan)
            if not mean.isnan():
                found[f"{name}_{side}"] = float(mean)
    return found


def p_value_profiles(store: FactorStore) -> dict[str, torch.Tensor]:
    """By role, the mean p-values of the right singular vectors by their index, over the matrices factored.

    Of a role whose matrices differ in size, those of the first one's size.
    """
    by_role: dict[str, list[torch.Tensor]] = defaultdict(list)
    for index, factored in sorted(store.known.items()):
        by_role[store.matrices[index].role].append(factored.test("right").p_values)
    return {
        role: torch.stack([one for one in found if len(one) == len(found[0])]).nanmean(0)
        for role, found in by_role.items()
    }


def _share(values: torch.Tensor, mask: torch.Tensor) -> float:
    total = float(values.sum())
    return float(values[mask].sum()) / total if total else 0.0
