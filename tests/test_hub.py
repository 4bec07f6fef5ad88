"""A checkpoint by its Hub id, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Serves ``/<user>/<name>/resolve/<revision>/<file>`` from a folder."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        path = self.folder / rest.partition("/")[2]
        if repo != "me/model":
            self._refuse("RepoNotFound")
        elif not path.is_file():
            self._refuse("EntryNotFound")
        else:
            data = path.read_bytes()
            if body:
                self.asked.append(path.name)
            self.send_response(200)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def hub(make_model, tmp_path):
    """A server with one sharded model, and the way to run the command against it."""
    make_model("llama").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"never to be fetched")
    handler = type("Hub", (_Hub,), {"folder": tmp_path / "model", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    environment["HF_HUB_OFFLINE"] = "0"

    def analyze(repo: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_rmt", "analyze", repo, "--out", str(tmp_path / out), "--no-plots"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    yield analyze, handler.asked
    server.shutdown()
    server.server_close()


def test_a_hub_id(hub, tmp_path) -> None:
    from hf_rmt import AnalysisReport, RMTAnalyzer

    analyze, asked = hub
    result = analyze("me/model", "out")
    assert result.returncode == 0, result.stderr
    report = AnalysisReport.load(tmp_path / "out")
    assert report.settings["model"] == "me/model" and report.settings["revision"] == COMMIT
    local = RMTAnalyzer.from_checkpoint(tmp_path / "model").analyze()
    assert list(report) == list(local)
    shards = [path.name for path in (tmp_path / "model").glob("model-*.safetensors")]
    assert sorted(asked) == sorted(["config.json", "model.safetensors.index.json", *shards])


def test_an_id_that_is_not_there(hub) -> None:
    analyze, _ = hub
    result = analyze("me/other", "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("hf-rmt: 'me/other' is not a folder, and")


def test_a_repository_without_safetensors(hub, tmp_path) -> None:
    for path in (tmp_path / "model").glob("model*"):
        path.unlink()
    analyze, asked = hub
    result = analyze("me/model", "out")
    assert result.returncode == 2 and "gives no model.safetensors" in result.stderr
    assert "pytorch_model.bin" not in asked
