"""A run that is killed, as a process of its own, goes on where it stopped."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from hf_rmt import AnalysisReport, RMTAnalyzer
from hf_rmt.reports import store


def _stopped(minilm: Path, out: Path, how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run the command until five matrices are done, then send it a signal."""
    command = [
        sys.executable,
        "-m",
        "hf_rmt",
        "analyze",
        str(minilm),
        "--out",
        str(out),
        "--no-plots",
        "--workers",
        "1",
    ]
    # What was started in the background of a shell ignores interrupts, and so would its children.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listening) as process:  # noqa: PLW1509
        deadline = time.monotonic() + 120
        while len(list((out / "partial").glob("*.safetensors"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(how)
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(how: signal.Signals, minilm: Path, tmp_path: Path) -> None:
    stopped = _stopped(minilm, tmp_path / "r", how)
    done = len(list((tmp_path / "r" / "partial").glob("*.safetensors")))
    assert 5 <= done < 37 and not store.is_saved(tmp_path / "r", "report")
    if how == signal.SIGINT:
        assert stopped.returncode == 2
        assert stopped.stderr.strip().splitlines()[-1].startswith("hf-rmt: interrupted; the same command")
        assert "Traceback" not in stopped.stderr
    resumed = RMTAnalyzer.from_checkpoint(minilm).analyze(folder=tmp_path / "r", workers=1)
    undisturbed = RMTAnalyzer.from_checkpoint(minilm).analyze(workers=1)
    pd.testing.assert_frame_equal(resumed.to_pandas(), undisturbed.to_pandas())
    pd.testing.assert_frame_equal(AnalysisReport.load(tmp_path / "r").to_pandas(), undisturbed.to_pandas())
