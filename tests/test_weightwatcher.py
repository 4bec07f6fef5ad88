"""WeightWatcher's metrics agree where its definitions and ours coincide; docs/weightwatcher.md says where not."""

from __future__ import annotations

import logging
import warnings

import pytest
import transformers

from hf_rmt import RMTAnalyzer

#: our column -> theirs
SAME = {
    "alpha": "alpha",
    "alpha_hat": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
    "log_norm": "log_norm",
    "stable_rank": "stable_rank",
}


@pytest.fixture(scope="module")
def theirs(minilm):
    weightwatcher = pytest.importorskip("weightwatcher")
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    model = transformers.AutoModel.from_pretrained(minilm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        details = weightwatcher.WeightWatcher(model=model).analyze()
    return details.set_index("longname")


@pytest.mark.parametrize("column", SAME)
def test_every_matrix_of_the_real_encoder(column: str, theirs, minilm) -> None:
    model = transformers.AutoModel.from_pretrained(minilm)
    ours = RMTAnalyzer(model).analyze(sides="none").to_pandas().set_index("name")
    assert len(ours) == 37 and set(ours.index) <= set(theirs.index)
    for name, row in ours.iterrows():
        assert row[column] == pytest.approx(theirs.loc[name, SAME[column]], rel=2e-4), name
