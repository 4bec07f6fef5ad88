"""Jobs that are killed and started again, one kill of each kind; ``make kill-test`` does twenty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from hf_rmt.reports import store

sys.path.insert(0, str(Path(__file__).parent / "kills"))

import results
from jobs import JOBS


def test_jobs_of_two_processes_go_on_to_the_same_result() -> None:
    command = [sys.executable, str(Path(__file__).parent / "kills" / "run.py"), "--processes", "2", "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in JOBS:
        (row,) = (line for line in done.stdout.splitlines() if kind in line)
        assert row.rstrip(" │").endswith("yes"), done.stdout


def test_results_are_compared_to_the_bit(tmp_path: Path) -> None:
    first, second = ({"a": torch.zeros(2), "b": torch.full((3,), torch.nan)} for _ in range(2))
    for name, tensors in (("first", first), ("second", second), ("third", second | {"a": -torch.zeros(2)})):
        (tmp_path / name).mkdir()
        store.save_tensors(tmp_path / name / "x.safetensors", tensors, {"y": "[1]", "z": "words"})
    expected, same, other = (results.contents(tmp_path / name) for name in ("first", "second", "third"))
    assert expected and not results.differences(same, expected)
    assert results.differences(other, expected) == ["x.safetensors"]
    assert results.differences(same | {"left.part": b""}, expected) == ["left.part"]
    assert results.differences({}, expected) == ["x.safetensors"]


def test_half_a_result_is_none(tmp_path: Path) -> None:
    stage = tmp_path / ".incoming-report"
    stage.mkdir()
    (stage / "table.parquet").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert all(results.whole(kind, tmp_path) is None for kind in JOBS)
    assert not results.kept(tmp_path)
    (tmp_path / "partial").mkdir()
    store.save_tensors(tmp_path / "partial" / "00000.safetensors", {"a": torch.zeros(1)}, {})
    assert results.kept(tmp_path)
