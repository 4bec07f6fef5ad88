"""Folders for what is needed for a while only."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_rmt.reports.store import scratch


def test_scratch_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    with scratch(place, ".mine-") as folder:
        assert folder.parent == place and folder.name.startswith(".mine-")
        (folder / "file").write_text("x")
    assert not list(tmp_path.iterdir())
    place.mkdir(parents=True)
    with pytest.raises(KeyError), scratch(place, ".mine-"):
        raise KeyError
    assert not list(place.iterdir())
    with scratch(place / "in", ".mine-"):
        (place / "in" / "result").write_text("x")
    assert [path.name for path in (place / "in").iterdir()] == ["result"]


def test_scratch_of_runs_at_work_stays_and_that_of_killed_ones_goes(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / ".mine-killed").mkdir()
    (tmp_path / ".mine-killed" / "lock").touch()
    (tmp_path / ".mine-new").mkdir()  # as that of one that is about to lock it
    with scratch(tmp_path, ".mine-") as first:
        (first / "file").write_text("x")
        with scratch(tmp_path, ".mine-") as second:
            assert (first / "file").is_file() and second != first
            names = {path.name for path in tmp_path.iterdir()}
            assert names == {first.name, second.name, ".mine-new"}
        assert (first / "file").is_file()
