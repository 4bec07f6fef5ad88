"""Checkpoints from the Hub and models to it, with a server on this machine that answers as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch

from hf_rmt.pruner import SVDPruner
from hf_rmt.slicing.keep import Width
from hf_rmt.slicing.publishing import push_sliced
from hf_rmt.theory.selection import Decile, Outliers

Files = dict[str, bytes]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = torch.tensor([[5, 17, 42, 7]])


class Hub:
    """What a Hub holds, and what was asked of it.

    Attributes:
        repositories: name -> branch -> file -> content.
        private: names of private repositories.
        asked: files whose content was fetched.
        commits: of each, the names of the files added and of those deleted.
        requests: method and path of all that came.
        tokens: what they were authorised by.
        refused: by the beginning of a path, the status with which requests that would change something are refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.commits: list[tuple[list[str], list[str]]] = []
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.refused: dict[str, int] = {}
        self.uploaded: Files = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, repository: str, folder: Path) -> None:
        """Have a repository with the files of a folder."""
        self.repositories[repository] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}

    def files(self, repository: str, revision: str) -> Files | None:
        branches = self.repositories.get(repository, {})
        return branches.get("main" if revision == COMMIT else revision)


class _Handler(BaseHTTPRequestHandler):
    """The routes of the Hub that a client takes to read, to make repositories and branches, and to commit."""

    hub: Hub

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user"})
        elif path.startswith("/api/models/"):
            self._about(path.removeprefix("/api/models/"))
        else:
            self._resolve()

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        status = next((s for start, s in self.hub.refused.items() if path.startswith(start)), None)
        if status is not None:
            self._refuse(status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._json({"objects": [self._upload_of(one) for one in json.loads(body)["objects"]]})
        elif path == "/verify":
            self._json({} if json.loads(body)["oid"] in self.hub.uploaded else None)
        elif "/preupload/" in path:
            files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            self._json({"files": [file | {"uploadMode": mode} for file, mode in zip(files, modes, strict=True)]})
        elif "/branch/" in path:
            repository, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            branches = self.hub.repositories[repository]
            self._refuse(409) if branch in branches else self._json({}, branches.update({branch: {**branches["main"]}}))
        elif "/commit/" in path:
            self._commit(path, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404)

    def do_PUT(self) -> None:
        name, body = self._path().removeprefix("/lfs/"), self._body()
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.uploaded[name] = body
        self._json({})

    def do_DELETE(self) -> None:
        path, body = self._path(), self._body()
        if any(path.startswith(start) for start in self.hub.refused):
            self._refuse(403)
        elif path == "/api/repos/delete":
            named = json.loads(body)
            self._json({}, self.hub.repositories.pop(f"{named['organization']}/{named['name']}"))
        else:
            repository, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self._json({}, self.hub.repositories[repository].pop(branch))

    # Reading

    def _resolve(self) -> None:
        repository, _, rest = self._path().lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        files = self.hub.files(repository, revision)
        if files is None:
            self._refuse(404, "RepoNotFound")
        elif name not in files:
            self._refuse(404, "EntryNotFound")
        else:
            if self.command == "GET":
                self.hub.asked.append(name)
            etag = hashlib.sha256(files[name]).hexdigest()
            self._send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _about(self, rest: str) -> None:
        repository, _, tree = rest.partition("/tree/")
        repository, _, revision = repository.partition("/revision/")
        files = self.hub.files(repository, revision or tree.partition("/")[0] or "main")
        if files is None:
            self._refuse(404, "RepoNotFound")
        elif tree:
            of = [{"type": "file", "path": name, "size": len(data), "oid": COMMIT} for name, data in files.items()]
            self._json(of)
        else:
            self._json({"id": repository, "sha": COMMIT, "private": repository in self.hub.private})

    # Writing

    def _create(self, asked: dict[str, Any]) -> None:
        repository = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repository in self.hub.repositories:
            self._json({"url": f"{self.hub.url}/{repository}"}, status=409)
            return
        self.hub.repositories[repository] = {"main": {".gitattributes": b""}}
        if asked.get("visibility") == "private":
            self.hub.private.add(repository)
        self._json({"url": f"{self.hub.url}/{repository}"})

    def _upload_of(self, file: dict[str, Any]) -> dict[str, Any]:
        actions = {
            "upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"},
            "verify": {"href": f"{self.hub.url}/verify"},
        }
        return {**file, "actions": actions}

    def _commit(self, path: str, lines: list[dict[str, Any]]) -> None:
        repository, _, revision = path.removeprefix("/api/models/").partition("/commit/")
        branches = self.hub.repositories[repository]
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            branches[revision := "refs/pr/1"] = {**branches["main"]}
        added, deleted = [], []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                branches[revision][value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif key == "lfsFile":
                branches[revision][value["path"]] = self.hub.uploaded[value["oid"]]
                added.append(value["path"])
            elif key == "deletedFile":
                del branches[revision][value["path"]]
                deleted.append(value["path"])
        self.hub.commits.append((added, deleted))
        url = f"{self.hub.url}/{repository}"
        self._json(
            {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": f"{url}/discussions/1"}
        )

    # The wire

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, _done: object = None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "") -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories."""
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def run(hub: Hub, tmp_path: Path):
    """Runs Python with this Hub, in a process of its own, as its address is read at import."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_me", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120, **options
        )

    return run


@pytest.fixture
def connected(hub: Hub, tmp_path: Path, monkeypatch) -> Hub:
    """The same Hub for the client in this process."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in (values | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps the address of the first Hub
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    return hub


# From the Hub


@pytest.fixture
def analyze(hub: Hub, run, make_model, tmp_path: Path):
    """The command, and a sharded model on the Hub."""
    make_model("llama").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    hub.put("me/model", tmp_path / "model")
    hub.repositories["me/model"]["main"]["pytorch_model.bin"] = b"never to be fetched"
    return lambda repository: run("-m", "hf_rmt", "analyze", repository, "--out", str(tmp_path / "out"), "--no-plots")


def test_a_hub_id(hub: Hub, analyze, tmp_path: Path) -> None:
    from hf_rmt import AnalysisReport, RMTAnalyzer

    result = analyze("me/model")
    assert result.returncode == 0, result.stderr
    report = AnalysisReport.load(tmp_path / "out")
    assert report.settings["model"] == "me/model" and report.settings["revision"] == COMMIT
    local = RMTAnalyzer.from_checkpoint(tmp_path / "model").analyze()
    assert list(report) == list(local)
    shards = [path.name for path in (tmp_path / "model").glob("model-*.safetensors")]
    assert sorted(hub.asked) == sorted(["config.json", "model.safetensors.index.json", *shards])


def test_an_id_that_is_not_there(analyze) -> None:
    result = analyze("me/other")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("hf-rmt: 'me/other' is not a folder, and")


def test_a_repository_without_safetensors(hub: Hub, analyze) -> None:
    files = hub.repositories["me/model"]["main"]
    for name in [name for name in files if name.startswith("model")]:
        del files[name]
    result = analyze("me/model")
    assert result.returncode == 2 and "gives no model.safetensors" in result.stderr
    assert "pytorch_model.bin" not in hub.asked


# To the Hub

#: Loads a repository, without hf_rmt if that is possible, and writes its logits of some tokens to a file.
LOAD = """
import sys
sys.modules["hf_rmt"] = None  # an import of it fails
import torch, transformers
torch.set_num_threads(1)
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    model = load(sys.argv[1])
except RuntimeError as error:
    print("refused:", error)
    del sys.modules["hf_rmt"]
    import hf_rmt
    model = load(sys.argv[1])
torch.save(model(torch.tensor(eval(sys.argv[2])))[0], sys.argv[3])
"""


@pytest.fixture
def pruner(make_model) -> SVDPruner:
    """A model with the last decile of two of its matrices removed."""
    pruner = SVDPruner(make_model("llama"), workers=1)
    pruner.remove(Decile(10), roles="intermediate")
    return pruner


def test_a_pruned_model_is_pushed_and_loads_without_hf_rmt(connected: Hub, run, make_model, tmp_path: Path) -> None:
    import transformers
    from huggingface_hub import ModelCard

    make_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    connected.put("you/base", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained("you/base")
    ModelCard.load("you/base")  # now it is on this machine
    pruner = SVDPruner(model, workers=1)
    pruner.remove(Decile(10) | Outliers("below"), roles="*output", blocks=1)
    commit = pruner.push_to_hub("me/pruned", private=True, token="hf_given")
    assert commit.commit_url == f"{connected.url}/me/pruned/commit/{COMMIT}"
    assert connected.private == {"me/pruned"} and "Bearer hf_given" in connected.tokens
    files = connected.repositories["me/pruned"]["main"]
    expected = {"model.safetensors", "config.json", "generation_config.json", "README.md", "hf_rmt.json", "hf_rmt.csv"}
    assert [(set(added), deleted) for added, deleted in connected.commits] == [(expected, [])]
    assert set(files) == {*expected, ".gitattributes"} and set(json.loads(files["hf_rmt.json"])["files"]) == expected

    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.language) == ("you/base", "mit", "en")
    assert card.data.pipeline_tag == "text-generation" and "hf_rmt" in card.data.tags
    assert f"(revision `{COMMIT}`)" in card.text and 'LlamaForCausalLM.from_pretrained("me/pruned")' in card.text
    assert json.loads(files["hf_rmt.json"])["base"] == {"model": "you/base", "revision": COMMIT}
    assert model.model_tags is None

    arguments = ["me/pruned", str(TOKENS.tolist()), str(tmp_path / "logits.pt")]
    result = run("-I", "-c", LOAD, *arguments, cwd=tmp_path)
    assert result.returncode == 0 and not result.stdout, result.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(TOKENS)[0])
        assert not torch.equal(model(TOKENS)[0], make_model("llama")(TOKENS)[0])


def _sliced(model: Any, **options: Any) -> Any:
    batches = [{"input_ids": torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))}]
    return SVDPruner(model).slice(Width(0.5), batches, progress=False, **options)


@pytest.mark.parametrize("form", ["plain", "registered"])
def test_a_sliced_model_is_pushed_and_loads(form: str, connected: Hub, run, make_model, tmp_path: Path) -> None:
    """Plain by transformers alone; registered with hf_rmt, and without it not at all."""
    import transformers
    from huggingface_hub import ModelCard

    from .test_card import words

    make_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    connected.put("you/base", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained("you/base")
    ModelCard.load("you/base")  # now it is on this machine
    small = _sliced(model, per_block=form == "registered")
    scores = {"after": {"perplexity": 3.0}}
    commit = push_sliced(small, "me/sliced", tokenizer=words(), metrics=scores, private=True, token="hf_given")
    assert commit.commit_url == f"{connected.url}/me/sliced/commit/{COMMIT}"
    assert connected.private == {"me/sliced"} and "Bearer hf_given" in connected.tokens
    expected = {"model.safetensors", "config.json", "generation_config.json", "README.md", "hf_rmt.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert [(set(added), deleted) for added, deleted in connected.commits] == [(expected, [])]

    files = connected.repositories["me/sliced"]["main"]
    described = json.loads(files["hf_rmt.json"])
    assert described["base"] == {"model": "you/base", "revision": COMMIT}
    assert described["slice"] == small.sliced.to_dict() | {"revision": COMMIT} and described["slice"]["form"] == form
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("you/base", "mit")
    assert f"(revision `{COMMIT}`)" in card.text and 'LlamaForCausalLM.from_pretrained("me/sliced")' in card.text

    arguments = ["me/sliced", str(TOKENS.tolist()), str(tmp_path / "logits.pt")]
    result = run("-c", LOAD, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused: You set `ignore_mismatched_sizes`") == (form == "registered")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), small(TOKENS)[0])


def test_a_slice_that_cannot_be_pushed_leaves_nothing(connected: Hub, make_model) -> None:
    from .test_card import words

    connected.refused["/api/models/me/sliced/commit"] = 403
    with pytest.raises(PermissionError, match=r"status 403.*nothing was left there"):
        push_sliced(_sliced(make_model("llama")), "me/sliced", tokenizer=words())
    assert not connected.repositories and not connected.commits
    connected.refused.clear()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no record of a slice"):
        push_sliced(make_model("llama"), "me/sliced")
    assert not connected.repositories


@pytest.mark.parametrize("status", [401, 403])
def test_no_right_to_make_a_repository(status: int, connected: Hub, pruner: SVDPruner) -> None:
    connected.refused["/api/repos/create"] = status
    with pytest.raises(
        PermissionError, match=f"write to me/pruned on the Hub .status {status}.: log in.*nothing was left"
    ):
        pruner.push_to_hub("me/pruned")
    assert not connected.repositories and not connected.uploaded


@pytest.mark.parametrize("route", ["/api/models/me/pruned/commit", "/api/models/me/pruned/preupload", "/me/pruned.git"])
def test_no_right_to_commit(route: str, connected: Hub, pruner: SVDPruner) -> None:
    """What the push has made goes away; what was there stays as it was."""
    connected.refused[route] = 403
    with pytest.raises(PermissionError, match=r"status 403.*nothing was left there"):
        pruner.push_to_hub("me/pruned")
    assert not connected.repositories and "DELETE /api/repos/delete" in connected.requests
    connected.repositories["me/pruned"] = {"main": {"config.json": b"theirs"}}
    for options in ({}, {"revision": "pruned"}, {"create_pr": True}):
        with pytest.raises(PermissionError, match=r"status 403.*nothing was left there"):
            pruner.push_to_hub("me/pruned", **options)
        assert connected.repositories == {"me/pruned": {"main": {"config.json": b"theirs"}}}
    assert not connected.commits


def test_what_cannot_be_taken_away_again_is_told(connected: Hub, pruner: SVDPruner) -> None:
    connected.refused |= {"/api/models/me/pruned/commit": 500, "/api/repos/delete": 403}
    with pytest.raises(OSError, match=r"me/pruned could not be pushed: .*500.*the new repository could not be deleted"):
        pruner.push_to_hub("me/pruned")
    assert connected.repositories == {"me/pruned": {"main": {".gitattributes": b""}}}


def test_a_repository_that_was_filled_meanwhile_is_left_alone(connected: Hub, pruner: SVDPruner, monkeypatch) -> None:
    def commit_without_an_answer(_self: _Handler, _path: str, _lines: object) -> None:
        connected.repositories["me/pruned"]["main"]["config.json"] = b"it came through"
        raise ConnectionError

    monkeypatch.setattr(_Handler, "_commit", commit_without_an_answer)
    monkeypatch.setattr(connected.server, "handle_error", lambda *_: None)
    with pytest.raises(OSError, match="has files in it: look whether the commit came through"):
        pruner.push_to_hub("me/pruned")
    assert "config.json" in connected.repositories["me/pruned"]["main"]


def test_nothing_is_asked_of_the_hub_before_all_is_built(connected: Hub, pruner: SVDPruner, monkeypatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_rmt.hub.card_of", fail)
    with pytest.raises(OSError, match="no space left"):
        pruner.push_to_hub("me/pruned")
    assert not connected.requests


def test_branches_pull_requests_and_weights_of_before(connected: Hub, pruner: SVDPruner) -> None:
    shards = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
    }
    before = {**shards, "README.md": b"old", "report.csv": b"kept", "model-old/1.safetensors": b"kept"}
    connected.repositories["me/pruned"] = {"main": {**before}}
    pruner.push_to_hub("me/pruned", revision="decile-10", commit_message="Without its last decile")
    branch = connected.repositories["me/pruned"]["decile-10"]
    assert not shards.keys() & branch.keys() and branch["README.md"] != b"old"
    assert branch["report.csv"] == branch["model-old/1.safetensors"] == b"kept"
    assert sorted(connected.commits[0][1]) == sorted(shards)
    commit = pruner.push_to_hub("me/pruned", create_pr=True)
    assert commit.pr_url == f"{connected.url}/me/pruned/discussions/1"
    assert connected.repositories["me/pruned"]["main"] == before and len(connected.commits) == 2
    pruner.push_to_hub("me/pruned", revision="decile-10")  # a branch that is there
    assert len(connected.commits) == 3


def test_a_public_repository_is_not_taken_for_a_private_one(connected: Hub, pruner: SVDPruner) -> None:
    connected.repositories["me/pruned"] = {"main": {}}
    with pytest.raises(ValueError, match="me/pruned is there already and public"):
        pruner.push_to_hub("me/pruned", private=True)
    assert connected.repositories == {"me/pruned": {"main": {}}}
    connected.private.add("me/pruned")
    pruner.push_to_hub("me/pruned", private=True)
    assert len(connected.commits) == 1


def test_a_name_without_its_owner(connected: Hub, pruner: SVDPruner, monkeypatch) -> None:
    pruner.push_to_hub("pruned")
    assert b'from_pretrained("me/pruned")' in connected.repositories["me/pruned"]["main"]["README.md"]
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PermissionError, match="whose is pruned"):
        pruner.push_to_hub("pruned")


@pytest.mark.parametrize(
    ("repository", "options", "message"),
    [
        ("a/b/c", {}, "a/b/c"),
        ("me/pruned", {"create_pr": True, "revision": "other"}, "give one of revision and create_pr"),
        ("me/pruned", {"metrics": {"accuracy": 0.9}}, "scores of the original as 'before'"),
    ],
)
def test_bad_pushes(repository: str, options: dict[str, Any], message: str, connected: Hub, pruner: SVDPruner) -> None:
    with pytest.raises(ValueError, match=message):
        pruner.push_to_hub(repository, **options)
    assert not connected.requests


def test_without_a_network(pruner: SVDPruner, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"me/pruned could not be pushed: .*offline mode"):
        pruner.push_to_hub("me/pruned")


def test_a_model_from_which_nothing_was_removed_is_pushed_as_such(connected: Hub, make_model) -> None:
    SVDPruner(make_model("bert")).push_to_hub("me/whole")
    card = connected.repositories["me/whole"]["main"]["README.md"].decode()
    assert "Nothing was removed" in card and "How it was made" not in card


def test_the_result_of_a_push_goes_to_other_processes(connected: Hub, pruner: SVDPruner) -> None:
    commit = pruner.push_to_hub("me/pruned")
    assert pickle.loads(pickle.dumps(commit)) == commit


def test_the_command_prunes_and_pushes(hub: Hub, run, make_model, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    hub.put("me/model", tmp_path / "model")
    out = tmp_path / "out"
    options = ["--remove", "decile:10", "--role", "key", "--out", str(out), "--push", "me/pruned", "--private"]
    result = run("-m", "hf_rmt", "prune", "me/model", *options)
    assert result.returncode == 0, result.stderr
    assert f"pruned model: {out}" in result.stdout and f"{hub.url}/me/pruned/commit/" in result.stdout
    files = hub.repositories["me/pruned"]["main"]
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert files["hf_rmt.csv"] == (out / "hf_rmt.csv").read_bytes() and hub.private == {"me/pruned"}
    hub.refused["/api/repos/create"] = 403
    del hub.repositories["me/pruned"]
    result = run("-m", "hf_rmt", "prune", "me/model", *options)
    assert result.returncode == 2 and "no right to write to me/pruned" in result.stderr


def test_the_command_slices_and_pushes(hub: Hub, run, make_model, tmp_path: Path) -> None:
    from .test_card import words

    make_model("llama").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    hub.put("me/model", tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a b b a b a a b\n" * 20)
    out = tmp_path / "out"
    options = ["--text", str(tmp_path / "texts.txt"), "--out", str(out), "--push", "me/sliced", "--private"]
    result = run("-m", "hf_rmt", "slice", "me/model", "--keep", "width:0.75", *options)
    assert result.returncode == 0, result.stderr
    assert f"sliced model: {out}" in result.stdout and f"{hub.url}/me/sliced/commit/" in result.stdout
    files = hub.repositories["me/sliced"]["main"]
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes() and hub.private == {"me/sliced"}
    assert json.loads(files["hf_rmt.json"])["base"] == {"model": "me/model", "revision": COMMIT}
    assert "tokenizer.json" in files
