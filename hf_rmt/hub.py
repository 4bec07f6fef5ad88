"""A model that was made from another, as any other: in a folder, or on the Hub."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.model_card import MANIFEST, ModelRecord, PruningRecord, card_of
from hf_rmt.models.live import is_sharded, unwrap
from hf_rmt.models.origins import Original
from hf_rmt.processes import by_the_first

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from torch import nn
    from transformers import PreTrainedModel

    from hf_rmt.pruner import SVDPruner

log = logging.getLogger(__name__)

#: Where new files come together, and where old ones wait until these have taken their place.
_INCOMING, _OUTGOING = ".incoming-model", ".outgoing-model"
#: Files that ``from_pretrained`` looks for; one left over would be loaded beside or instead of the new ones.
_LOADED = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
)
#: What image, audio and video models have in place of a tokenizer, or beside it.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class Push:
    """How a model goes to the Hub.

    Attributes:
        private: whether a new repository is; None for what is usual there.
        revision: branch to commit to, made from the main one if it does not exist; None for the main one.
        token: of the account; None for the one that is logged in.
        commit_message: None for one that says what was made.
        create_pr: open a pull request instead.
    """

    private: bool | None = None
    revision: str | None = None
    token: str | bool | None = None
    commit_message: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.revision is not None:
            raise ValueError(
                f"a pull request goes to the main branch, not to {self.revision!r}: give one of revision and create_pr"
            )


def save(
    pruner: SVDPruner, folder: str | Path, *, tokenizer: Any = None, metrics: Any = None, overwrite: bool = False
) -> Path:
    """Write a model as it is now to a folder; see ``SVDPruner.save_pretrained``."""
    model = savable(pruner.model)
    return write(model, PruningRecord.of(pruner, metrics), folder, tokenizer=tokenizer, overwrite=overwrite)


def push(
    pruner: SVDPruner, repo_id: str, *, tokenizer: Any = None, metrics: Any = None, how: Push | None = None
) -> CommitInfo:
    """Commit a model as it is now to a repository of the Hub; see ``SVDPruner.push_to_hub``."""
    model = savable(pruner.model)
    return upload(model, PruningRecord.of(pruner, metrics), repo_id, tokenizer=tokenizer, how=how or Push())


def write(
    model: PreTrainedModel, record: ModelRecord, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a model to a folder, with its tokenizer, card and record: all or nothing.

    Args:
        model: from ``savable``; over several processes all must call.
        record: of what was made.
        folder: made if it does not exist.
        tokenizer: or processor; None takes what the model came with.
        overwrite: replace the model that the folder holds, whatever it is.

    Raises:
        ValueError: the folder holds another model.
        TypeError: no tokenizer.
        OSError: the folder cannot be written.
    """
    place = Path(folder).absolute()
    by_the_first(lambda: refuse_another(place, record.original.base, record.same_original, overwrite))
    return put(Source.of_model(model), record, place, tokenizer)


def put(source: Source, record: ModelRecord, folder: Path, tokenizer: Any = None) -> Path:
    """The same of what is no model in memory, to a folder in which nothing has to be refused.

    Raises:
        TypeError, OSError: as ``write``.
    """
    files = _Files(source, record, tokenizer, folder.name)
    by_the_first(lambda: _into(folder, files.write))
    return folder


def upload(model: PreTrainedModel, record: ModelRecord, repo_id: str, *, tokenizer: Any, how: Push) -> CommitInfo:
    """Commit the same to a repository of the Hub: all or nothing.

    Raises:
        PermissionError: the account may not write there.
        OSError: the Hub, or the way to it, failed.
        ValueError, TypeError: no name of a repository, one that is to be private and is public, no tokenizer.
    """
    return send(functools.partial(Source.of_model, model), record, repo_id, tokenizer=tokenizer, how=how)


def send(
    source: Callable[[], Source], record: ModelRecord, repo_id: str, *, tokenizer: Any = None, how: Push
) -> CommitInfo:
    """The same of what is no model in memory; ``source`` gives it, once the repository has a name.

    Raises:
        PermissionError, OSError, ValueError, TypeError: as ``upload``.
    """
    repo = by_the_first(lambda: _full_name(repo_id, how))
    files = _Files(source(), record, tokenizer, repo)

    def build_and_upload() -> CommitInfo:
        with tempfile.TemporaryDirectory(prefix="hf_rmt-") as place:
            files.write(Path(place))
            return _Upload(repo, how).commit(Path(place), how.commit_message or record.message)

    return by_the_first(build_and_upload)


# What is written


def savable(model: nn.Module) -> PreTrainedModel:
    """The model that transformers can save.

    Raises:
        ValueError: it cannot save this one whole; the message says what can be done.
    """
    from transformers import PreTrainedModel

    inner = unwrap(model)
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{name} is no model of transformers, so there is no telling how it would be loaded: write its weights "
            "with safetensors.torch.save_model, or as the library does that it comes from"
        )
    if any(hasattr(module, "base_layer") for module in inner.modules()):
        raise ValueError(
            f"{name} has adapters in it: make them part of the weights with merge_and_unload(), or take them away "
            "with unload(), and go on with what that returns"
        )
    if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise ValueError(
            f"{name} is sharded by ZeRO-3: save it with the Trainer or Accelerator that trained it, and take parts out "
            "of that checkpoint with CheckpointPruner"
        )
    if getattr(inner.config, "distributed_config", None) is not None:
        raise ValueError(f"{name} was sharded by transformers as it was loaded: load it without distributed_config")
    return inner


def _gathered(model: PreTrainedModel) -> dict[str, Any] | None:
    """All weights on the CPU of the first process, where they are not whole in memory; None where they are."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    offloaded = any(parameter.device.type == "meta" for parameter in model.parameters())
    if offloaded and not hasattr(model, "hf_device_map"):  # with one, transformers brings them in shard by shard
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model)
    return None


@dataclass(frozen=True)
class Source:
    """What there is of a model to be put somewhere.

    Attributes:
        write: puts its configuration and weights into a folder.
        origin: of itself, which may be made from the original by earlier steps.
        tokenizer: gives the one that it came with; raises a ValueError where there is none.
        tags: that it has already.
    """

    write: Callable[[Path], object]
    origin: Original
    tokenizer: Callable[[], Any]
    tags: list[str] | None = None

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Source:
        """That of one in memory, its weights gathered; over several processes all must call."""
        from hf_rmt.models.text import tokenizer_of

        write = functools.partial(model.save_pretrained, state_dict=_gathered(model))
        return cls(write, Original.of_model(model), lambda: tokenizer_of(model), model.model_tags)


@dataclass(frozen=True)
class _Files:
    """The files of a model that was made from another.

    Attributes:
        source: as it is now.
        record: of what was made.
        tokenizer: or processor, or None for what the model came with.
        name: folder or repository that they go to.
    """

    source: Source
    record: ModelRecord
    tokenizer: Any
    name: str

    def write(self, folder: Path) -> None:
        """Write all of them."""
        self.source.write(folder)
        auto, note = self._write_processor(folder)
        card_of(self.record, self.name, self.source.tags, note, auto).save(folder / "README.md")
        for table, rows in self.record.tables().items():
            rows.to_csv(folder / table, index=False)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        described = self.record.as_json() | {"files": [*names, MANIFEST]}
        (folder / MANIFEST).write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")

    def _write_processor(self, folder: Path) -> tuple[str, str]:
        """Write what prepares the model's inputs; the class that loads it, and a note where there is none."""
        if self.tokenizer is not None:
            if not hasattr(self.tokenizer, "save_pretrained"):
                raise TypeError(
                    f"tokenizer is {self.tokenizer!r}, which has no save_pretrained: give one of transformers"
                )
            self.tokenizer.save_pretrained(folder)
            return _loader_of(folder), ""
        own = self.source.origin
        for name in _PROCESSOR:
            if (path := own.local_file(name) or self.record.original.local_file(name)) is not None:
                shutil.copyfile(path, folder / name)
        try:
            self._own_tokenizer().save_pretrained(folder)
        except ValueError as error:
            if not _loader_of(folder):
                log.warning("saved without a tokenizer: %s", " ".join(str(error).split()))
                return "", "No tokenizer or processor is included: use those of the original."
        return _loader_of(folder), ""

    def _own_tokenizer(self) -> Any:
        """The tokenizer that the model came with: from this machine, else from the Hub if that is where it came from.

        Raises:
            ValueError: it came with none.
        """
        from hf_rmt.models.text import tokenizer_of

        try:
            return self.source.tokenizer()
        except ValueError:
            if self.record.original.hub_id is None:
                raise
        return tokenizer_of(self.record.original.hub_id, self.record.original.revision)


def _loader_of(folder: Path) -> str:
    """The class that loads what prepares a model's inputs from a folder; empty if nothing there does."""
    tokenizer = (folder / "tokenizer_config.json").is_file()
    if any((folder / name).is_file() for name in _PROCESSOR):
        images = {path.name for path in folder.glob("*processor_config.json")} == {"preprocessor_config.json"}
        settings = json.loads((folder / "preprocessor_config.json").read_text()) if images else {}
        image_alone = not tokenizer and "image_processor_type" in settings
        return "AutoImageProcessor" if image_alone else "AutoProcessor"
    return "AutoTokenizer" if tokenizer else ""


# Folders


def refuse_another(folder: Path, base: str, is_same: Callable[[Any], bool], overwrite: bool) -> None:
    """Have no other model replaced unasked.

    Args:
        folder: to be written to.
        base: what to call the original.
        is_same: whether what an earlier ``write`` said of a model, or None, is of the same original.
        overwrite: it is asked for.

    Raises:
        ValueError: the folder holds a model that was not made from the same original, for all that is known.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give a folder")
    model, earlier = _loadable(path.name for path in folder.glob("*")), _earlier(folder)
    if model and not overwrite and not is_same(earlier) and not _is_half_moved(folder, model, earlier):
        raise ValueError(
            f"{folder} holds a model that, for all that is known, was not made from these weights of {base} by hf_rmt: "
            "give another folder, or overwrite=True to replace it"
        )


def _is_half_moved(folder: Path, model: list[str], earlier: dict[str, Any] | None) -> bool:
    """Whether these files are those of a ``write`` that was killed before ``config.json``, the last, was in place."""
    waits = "config.json" not in model and (folder / _INCOMING / "config.json").is_file()
    return waits and earlier is not None and {*model} <= {*earlier["files"]}


def _earlier(folder: Path) -> dict[str, Any] | None:
    """What an earlier ``write`` left in a folder says of itself."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return found if isinstance(found["files"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _loadable(names: Iterable[str]) -> list[str]:
    """Those files of a folder, not of folders in it, that ``from_pretrained`` would look for."""
    return [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in _LOADED)]


def _into(folder: Path, write: Callable[[Path], None]) -> None:
    """Have files written beside those of a folder, and let them take the place of an earlier model.

    Until all are written the folder is as it was. While they move it is no model: ``config.json`` goes first and
    comes last.
    """
    existed = folder.is_dir()
    stage, aside = folder / _INCOMING, folder / _OUTGOING
    try:
        shutil.rmtree(stage, ignore_errors=True)  # of a save that was killed
        stage.mkdir(parents=True)
        write(stage)
        shutil.rmtree(aside, ignore_errors=True)
        _swap(folder, stage, aside)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(stage, ignore_errors=True)


def _swap(folder: Path, stage: Path, aside: Path) -> None:
    """Move the old files out and the new ones in; where that fails, back again."""
    arriving = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
    known = filter(lambda name: isinstance(name, str), (_earlier(folder) or {"files": []})["files"])
    there = {*arriving, *known, *_loadable(path.name for path in folder.glob("*"))}
    # The manifest stays longest and comes first, so that what a kill leaves here is known to be ours.
    leaving = sorted((name for name in there if _is_inside(folder, name)), key=_config_first)
    moves = [(folder / name, aside / name) for name in leaving]
    moves += [(stage / name, folder / name) for name in sorted(arriving, key=_config_first, reverse=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _config_first(name: str) -> int:
    return {"config.json": 0, MANIFEST: 2}.get(name, 1)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file of this name, which was read from a manifest, is there and lies in the folder."""
    path = folder / name
    return path.is_file() and path.parent.resolve().is_relative_to(folder.resolve())


# The Hub


def _full_name(repo_id: str, how: Push) -> str:
    """The repository with its owner.

    Raises:
        ValueError: it is no name of a repository.
        PermissionError: it has no owner, and nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    try:
        return f"{HfApi(token=how.token).whoami()['name']}/{repo_id}"
    except Exception as error:  # of the Hub's client or the network
        raise PermissionError(
            f"whose is {repo_id}? give it as user/{repo_id}, or log in by hf auth login ({error})"
        ) from error


class _Upload:
    """One commit to a repository of the Hub, or nothing."""

    def __init__(self, repo: str, how: Push):
        from huggingface_hub import HfApi

        self.repo = repo
        self.how = how
        self.api: HfApi = HfApi(token=how.token)
        #: What this upload has made, and takes away again if it fails.
        self.new_repo = self.new_branch = False

    def commit(self, folder: Path, message: str) -> CommitInfo:
        """Commit the files of a folder, all together.

        Raises:
            PermissionError: the account may not.
            OSError: the Hub or the way to it failed.
            ValueError: a repository that is to be private is public.
        """
        try:
            self._open()
            return self.api.create_commit(
                self.repo,
                self._operations(folder),
                commit_message=message,
                revision=self.how.revision,
                create_pr=self.how.create_pr,
            )
        except BaseException as error:
            left = self._undone()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            if _status(error) in (401, 403):
                raise PermissionError(
                    f"no right to write to {self.repo} on the Hub (status {_status(error)}): log in by hf auth login, "
                    f"pass the token= of an account that may, or push to a repository of your own; {left}"
                ) from error
            raise OSError(f"{self.repo} could not be pushed: {' '.join(str(error).split())}; {left}") from error

    def _open(self) -> None:
        """Have a repository and a branch to commit to."""
        create = functools.partial(self.api.create_repo, self.repo, private=self.how.private)
        self.new_repo = _makes(create)
        if self.how.private and not self.new_repo and not self.api.repo_info(self.repo).private:
            raise ValueError(
                f"{self.repo} is there already and public: make it private in its settings, or push elsewhere"
            )
        if self.how.revision is not None and not self.how.revision.startswith("refs/"):
            self.new_branch = _makes(functools.partial(self.api.create_branch, self.repo, branch=self.how.revision))

    def _operations(self, folder: Path) -> list[Any]:
        """Every file there, and the weights of an earlier model that would be loaded instead."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there: Collection[str] = (
            () if self.new_repo else self.api.list_repo_files(self.repo, revision=self.how.revision)
        )
        stale = [name for name in _loadable(there) if name not in files]
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        return [*added, *(CommitOperationDelete(path_in_repo=name) for name in stale)]

    def _undone(self) -> str:
        """Take away again what this upload has made; in words, what is left."""
        try:
            if self.new_repo:
                if set(self.api.list_repo_files(self.repo)) - {".gitattributes"}:
                    return "the repository was made and has files in it: look whether the commit came through"
                self.api.delete_repo(self.repo)
            elif self.new_branch:
                self.api.delete_branch(self.repo, branch=str(self.how.revision))
        except Exception as error:  # of the Hub's client or the network
            log.debug("%s could not be taken away again: %s", self.repo, error)
            what = "repository" if self.new_repo else f"branch {self.how.revision}"
            return f"the new {what} could not be deleted again: do so in its settings"
        return "nothing was left there"


def _makes(create: Callable[..., object]) -> bool:
    """Whether this made it; False where it was there already."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        create(exist_ok=False)
    except HfHubHTTPError:
        create(exist_ok=True)  # knows which answers mean that it is there, and raises the others
        return False
    return True


def _status(error: BaseException | None) -> int | None:
    """The status with which the Hub refused, in an error or its cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return None
