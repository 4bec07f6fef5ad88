"""A run that is killed, as a process of its own, goes on where it stopped."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from hf_rmt import AnalysisReport, RMTAnalyzer, SVDPruner
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


def _collected(model: nn.Module, folder: Path) -> None:
    RMTAnalyzer(model).collect([{"input_ids": torch.arange(6)[None]}], roles="query", folder=folder, progress=False)


#: By the kind of their result: runs in a folder that take no time.
_RUNS: dict[store.Kind, Callable[[nn.Module, Path], object]] = {
    "report": lambda model, folder: RMTAnalyzer(model).analyze(roles="query", sides="none", folder=folder),
    "comparison": lambda model, folder: RMTAnalyzer.compare(copy.deepcopy(model), model, roles="query", folder=folder),
    "covariances": _collected,
    "sweep": lambda model, folder: SVDPruner(model).sweep(lambda _: 1.0, deciles=[1], roles=["query"], folder=folder),
}


@pytest.mark.parametrize("kind", _RUNS)
@pytest.mark.parametrize("before_the_manifest", [True, False])
def test_killed_once_the_result_is_whole(
    kind: store.Kind,
    before_the_manifest: bool,
    make_model: Callable[..., nn.Module],
    one_thread: None,
    tmp_path: Path,
) -> None:
    """While its files move into place, or when they are there and the partial ones are not yet gone."""
    model, original = make_model("bert"), os.replace

    def replace(source: Path, target: Path) -> None:
        last = Path(target) == tmp_path / "killed" / f"{kind}.json"
        if not (last and before_the_manifest):
            original(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        os.replace = replace  # type: ignore[assignment]
        try:
            _RUNS[kind](model, tmp_path / "killed")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and store.is_saved(tmp_path / "killed", kind)
    names: list[list[Path]] = []
    for folder in (tmp_path / "killed", tmp_path / "undisturbed"):
        _RUNS[kind](model, folder)
        names.append(sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()))
    assert names[0] == names[1]


def test_what_another_run_has_begun_stays(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Several kinds of results may share a folder."""
    model = make_model("bert")
    _RUNS["report"](model, tmp_path)
    other = store.PartialRun(tmp_path, {"weights": "of a sweep"})
    _RUNS["report"](model, tmp_path)  # while it is at work
    other.close()
    _RUNS["report"](model, tmp_path)  # when it was killed
    assert (tmp_path / "partial" / "run.json").is_file()
