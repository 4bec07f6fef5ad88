"""Rows of matrices summed up by role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def by_role(table: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """Mean and spread over blocks of columns of numbers, one row a role, in the order of the model.

    The experts of a block are averaged first. Columns are pairs: ``("n_above", "mean")``,
    ``("n_above", "std")``, and ``("blocks", "count")``; the standard deviation is that between
    blocks, empty where there is one. Rows are named by stack and role where there are several stacks.
    """
    import pandas as pd

    table = table.assign(stack=table["stack"].fillna(""))
    keys = ["stack", "role"] if table["stack"].any() else ["role"]
    table[list(numbers)] = table[list(numbers)].astype("float64")
    per_block = table.groupby([*keys, "block"], sort=False, dropna=False)[list(numbers)].mean()
    grouped = per_block.groupby(level=keys, sort=False)
    result = grouped.agg(["mean", "std"])
    result.insert(0, ("blocks", "count"), grouped.size())
    assert isinstance(result, pd.DataFrame)
    return result
