"""``CheckpointPruner``: takes parts of the spectrum out of a checkpoint, from folder to folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_rmt import hub
from hf_rmt.analyzer import RMTAnalyzer
from hf_rmt.config import AnalysisConfig
from hf_rmt.model_card import PruningRecord, read_scores
from hf_rmt.models.checkpoints import Checkpoint
from hf_rmt.models.digests import digest_of
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.models.origins import Original
from hf_rmt.processes import assemble, by_the_first, failing_together
from hf_rmt.reports import store
from hf_rmt.sharing import MatrixTasks, opened
from hf_rmt.surgery.description import AFFECTED, row_of
from hf_rmt.surgery.editor import Edit
from hf_rmt.surgery.factors import factored
from hf_rmt.surgery.request import Request
from hf_rmt.theory.removal import without
from hf_rmt.theory.selection import Selection

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import CommitInfo

log = logging.getLogger(__name__)

#: In the folder of the result, while that is made.
_UNFINISHED = ".unfinished-pruning"


class CheckpointPruner:
    """Removes singular components of the weight matrices of a checkpoint, without building the model (paper Eq. 9).

    The checkpoint stays; what is written has its files to the byte, but for the matrices that are edited. One of these
    is in memory for each worker, however large the model. Over several processes, which all have to call, each does
    its share.

    Args:
        source: folder with ``config.json`` and safetensors files, or a Hub id.
        revision: branch, tag or commit on the Hub.
        embeddings, head, convolutions: work on these too, as for ``RMTAnalyzer``.
        config: where and how many matrices at a time are factored, and the null of p-values; see
            ``AnalysisConfig``.
        **options: single settings, as ``workers=2`` or ``max_memory="8GB"``; they win over ``config``.

    Raises:
        CheckpointError: (a ValueError) naming the file or tensor that is wrong, and the remedy.
        TypeError: an unknown setting.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        revision: str | None = None,
        embeddings: bool = False,
        head: bool = False,
        convolutions: bool = False,
        config: AnalysisConfig | None = None,
        **options: Any,
    ):
        which = {"embeddings": embeddings, "head": head, "convolutions": convolutions}
        analyzer = RMTAnalyzer.from_checkpoint(source, revision=revision, **which)
        assert analyzer.checkpoint is not None
        self.checkpoint: Checkpoint = analyzer.checkpoint
        self.origin = analyzer.origin
        self.matrices = analyzer.matrices
        self.config = AnalysisConfig.of(config, options)
        #: What is to be removed, and the names of the matrices that it is of.
        self._wanted: dict[Request, frozenset[str]] = {}
        self._made: PruningRecord | None = None
        self._folder: Path | None = None

    def __repr__(self) -> str:
        wanted = "; ".join(map(str, self._wanted)) or "nothing"
        return f"CheckpointPruner({self.origin['model']!r}, {len(self.matrices)} matrices, to remove: {wanted})"

    def remove(
        self,
        selection: Selection | None = None,
        *,
        keep: Selection | None = None,
        roles: str | Collection[str] | None = None,
        blocks: int | Collection[int] | None = None,
    ) -> None:
        """Say what ``save_pretrained`` shall leave out; what is said several times adds up.

        Args:
            selection, keep, roles, blocks: as for ``SVDPruner.remove``.

        Raises:
            ValueError: nothing matches roles and blocks; a selection by overlap, which needs a model that runs.
            TypeError: not exactly one selection.
        """
        request = Request.of(selection, keep, roles, blocks)
        if request.selection.needs_activations:
            raise ValueError(
                f"{request.selection}: overlaps need the activations: load the model, and use SVDPruner(covariances=)"
            )
        self._wanted[request] = frozenset(matrix.name for matrix in request.matrices(self.matrices))

    def save_pretrained(
        self, folder: str | Path, *, tokenizer: Any = None, metrics: Any = None, overwrite: bool = False
    ) -> Path:
        """Write the pruned checkpoint, its tokenizer, a model card and a report of what was removed.

        What is unfinished is kept in the folder: after a kill the same call goes on where it stopped. A model appears
        there at the end, all or nothing.

        Args:
            folder, tokenizer, overwrite: as for ``SVDPruner.save_pretrained``.
            metrics: scores for the card: a dict of ``before`` and ``after``, each a dict of numbers, and perhaps the
                Hub id of the ``dataset``.

        Returns:
            The folder.

        Raises:
            ValueError: the folder holds another model, or is used by another run; a weight is not finite, or has not
                what is selected.
            TypeError: metrics that are no numbers, or no tokenizer.
            OSError: the folder cannot be written, or the checkpoint not be read.
            RuntimeError: another process failed.
        """
        assemble("prune")
        place, scores = Path(folder).absolute(), read_scores(metrics)
        by_the_first(lambda: self._refuse(place, overwrite))
        stage = place / _UNFINISHED
        with opened(stage, self._identity(), PrunedMatrices) as unfinished:
            copy = stage / "copy"
            by_the_first(lambda: self._copy(copy, unfinished.folder))
            with failing_together():
                tasks = self._tasks(copy)
            try:
                made = tasks.kept(unfinished, lambda index, earlier: self._check(tasks.matrices[index], earlier, place))
            except BaseException:
                by_the_first(lambda: None if any(unfinished.folder.glob("*.safetensors")) else _clear(stage))
                raise
            self._made, self._folder = self._record(made, scores), place
            hub.put(self._source(copy), self._made, place, tokenizer)
        by_the_first(lambda: _clear(stage))
        return place

    def _refuse(self, place: Path, overwrite: bool) -> None:
        """Have no other model replaced unasked, and never the checkpoint itself."""
        original = Original.of(self.origin["model"], self.origin["revision"])
        hub.refuse_another(place, original.base, self._is_of_these_weights, overwrite)
        if place.exists() and place.samefile(self.checkpoint.folder):
            raise ValueError(f"{place} is the checkpoint itself, which stays as it is: give another folder")

    def _is_of_these_weights(self, earlier: Any) -> bool:
        """Whether what an earlier result says of itself is of the matrices that there are now."""
        by_name = {matrix.name: matrix for matrix in self.matrices}
        if not self._record([], {"scores": {}}).same_original(earlier):
            return False
        return all(
            digest_of(by_name[row["name"]].read()) == row["weights"]
            for row in earlier["matrices"]
            if row["name"] in by_name
        )

    def affected(self) -> pd.DataFrame:
        """What ``save_pretrained`` has taken from each matrix; see ``SVDPruner.affected``.

        Raises:
            ValueError: nothing was written yet.
        """
        return self._written()[0].matrices.drop(columns="weights")

    def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, **how: Any) -> CommitInfo:
        """Put what ``save_pretrained`` has written on the Hub, in one commit.

        Args:
            repo_id, tokenizer, **how: as for ``SVDPruner.push_to_hub``: ``private``, ``revision``, ``token``,
                ``commit_message``, ``create_pr``.

        Raises:
            ValueError: nothing was written yet; else as there.
        """
        record, folder = self._written()
        return hub.send(lambda: self._source(folder), record, repo_id, tokenizer=tokenizer, how=hub.Push(**how))

    def _written(self) -> tuple[PruningRecord, Path]:
        if self._made is None or self._folder is None:
            raise ValueError(f"{self!r} has written nothing yet: save_pretrained(folder) first")
        return self._made, self._folder

    # The work

    def _identity(self) -> dict[str, Any]:
        """What an unfinished run must have been begun for."""
        shapes = {matrix.name: [*matrix.shape, str(matrix.dtype)] for matrix in self.matrices}
        wanted = [[str(request.selection), request.roles, request.blocks] for request in self._wanted]
        null = {"null_draws": self.config.null_draws, "seed": self.config.seed}
        files = {name: (self.checkpoint.folder / name).stat() for name in self.checkpoint.file_names()}
        seen = {name: [file.st_size, file.st_mtime_ns] for name, file in files.items()}
        return {"matrices": shapes, "remove": wanted, "files": seen} | null

    def _copy(self, copy: Path, results: Path) -> None:
        """Weights and configuration; where some are missing, nothing of what was kept is in the others."""
        names = [name for name in self.checkpoint.file_names() if not (copy / name).is_file()]
        if names:
            for kept in results.glob("*.safetensors"):
                kept.unlink()
        for name in names:
            part = copy / f"{name}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.checkpoint.folder / name, part)
            store.sync(part)
            os.replace(part, copy / name)

    def _tasks(self, copy: Path) -> MatrixTasks[PrunedMatrices]:
        """One for what is written at once: the tensors that make up a parameter, or several, or one expert of it."""
        written = {matrix.name: matrix for matrix in Checkpoint(copy, writable=True).matrices()}
        touched = frozenset().union(*self._wanted.values())
        groups: dict[Any, list[WeightMatrix]] = defaultdict(list)
        for matrix in self.matrices:
            if matrix.name in touched:
                load: Any = matrix.load
                tensors = id(self.checkpoint.sources[matrix.parameter])
                groups[tensors, matrix.expert if load.alone(matrix.expert) else None].append(matrix)
        work: Callable[..., PrunedMatrices] = lambda *matrices: self._pruned(matrices, written)  # noqa: E731
        return MatrixTasks([tuple(own) for own in groups.values()], lambda indices: work, self.config)

    def _pruned(self, matrices: Sequence[WeightMatrix], written: dict[str, WeightMatrix]) -> PrunedMatrices:
        """Write some matrices without what is selected."""
        result = PrunedMatrices()
        for matrix in matrices:
            weight = matrix.read()
            digest = digest_of(weight)
            found = factored(matrix, weight, digest, self.config)
            whole = torch.zeros(min(matrix.shape), dtype=torch.bool)
            for number, (request, names) in enumerate(self._wanted.items()):
                if matrix.name in names:
                    result.masks[f"{number}/{matrix.name}"] = mask = request.selection.mask(found)
                    whole |= mask
            if whole.any():
                written[matrix.name].write(without(weight, found.factors, whole))
            result.rows.append(row_of(matrix, found.s, whole) | {"weights": digest})
        return result

    def _check(self, matrices: Sequence[WeightMatrix], earlier: PrunedMatrices, folder: Path) -> None:
        for matrix, row in zip(matrices, earlier.rows, strict=True):
            if row["weights"] != digest_of(matrix.read()):
                raise ValueError(
                    f"{folder} belongs to another model: the weights of {matrix.name} differ; give another folder"
                )

    # What is told of it

    def _record(self, made: Sequence[PrunedMatrices], scores: dict[str, Any]) -> PruningRecord:
        import pandas as pd

        order = {matrix.name: position for position, matrix in enumerate(self.matrices)}
        rows = sorted((row for one in made for row in one.rows), key=lambda row: order[row["name"]])
        table = pd.DataFrame(rows, columns=[*AFFECTED, "weights"]).astype({"block": "Int64"})
        touched = {row["name"] for row in rows}
        kinds = {matrix.kind for matrix in self.matrices if matrix.name in touched}
        return PruningRecord.made(
            self.checkpoint.skeleton, self.origin, self._edits(made), table, (kinds, self.config), scores
        )

    def _edits(self, made: Sequence[PrunedMatrices]) -> tuple[Edit, ...]:
        """What was removed, in the order in which it was asked for."""
        masks: list[dict[str, torch.Tensor]] = [{} for _ in self._wanted]
        for key, mask in (item for one in made for item in one.masks.items()):
            number, _, name = key.partition("/")
            masks[int(number)][name] = mask
        return tuple(map(Edit, self._wanted, masks))

    def _source(self, folder: Path) -> hub.Source:
        from hf_rmt.models.text import tokenizer_of

        original = Original.of(self.origin["model"], self.origin["revision"])

        def write(place: Path) -> None:
            for name in self.checkpoint.file_names():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / name, place / name)
            if (path := _generation_config(original)) is not None:
                shutil.copyfile(path, place / path.name)

        return hub.Source(write, original, lambda: tokenizer_of(self.origin["model"], self.origin["revision"]))


@dataclass(frozen=True)
class PrunedMatrices:
    """What was taken from the matrices of one parameter.

    Attributes:
        rows: of ``affected``, and a hash of the weights that were there.
        masks: by number of the removal and name of the matrix, as ``0/encoder.layer.0.output.dense``.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The masks."""
        return self.masks

    def description(self) -> str:
        """The rows, as JSON."""
        return json.dumps(self.rows)

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], description: str) -> PrunedMatrices:
        """Inverse of ``tensors`` and ``description``."""
        return cls(json.loads(description), tensors)


def _clear(stage: Path) -> None:
    """Take away what is unfinished, at one stroke, and the folder around it if there is nothing else in it."""
    gone = stage.with_name(f"{stage.name}-gone")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    with contextlib.suppress(FileNotFoundError):
        os.replace(stage, gone)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        stage.parent.rmdir()


def _generation_config(original: Original) -> Path | None:
    """The file, if there is one; of a model of the Hub it may be there alone."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    name = "generation_config.json"
    found = original.local_file(name)
    if found is not None or original.hub_id is None:
        return found
    try:
        return Path(hf_hub_download(original.hub_id, name, revision=original.revision))
    except RemoteEntryNotFoundError:
        return None
    except (EntryNotFoundError, OSError) as error:  # the weights are here already
        log.warning("%s of %s cannot be had, and is left out: %s", name, original.hub_id, error)
        return None


def _link(source: Path, target: Path) -> None:
    """A second name for a file that nobody writes to any more, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
