"""Matrices of a checkpoint on disk, read lazily, without building the model.

The architecture is laid out on the meta device (no memory, no values), so a checkpoint has the same
matrices under the same names as the live model; transformers' own table of renamings and
conversions says which tensors on disk make up which parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rmt.models.discovery import Discovery, LeftOut
from hf_rmt.models.matrices import Change, Load, WeightMatrix
from hf_rmt.models.shards import INDEX, SINGLE, CheckpointError, SafetensorsFolder, weight_map


@dataclass(frozen=True)
class _Source:
    """What on disk makes up one parameter: tensors by the pattern that matched them, in order."""

    target: str  # the parameter; of several that are made of the same tensors the first
    tensors: dict[str, list[str]]
    converter: Any  # transformers' WeightConverter, None where the tensor is taken as it is


class Checkpoint:
    """A checkpoint folder: its configuration, its tensors, and how they map to parameters.

    Args:
        folder: where it is.
        writable: its matrices can be written; for a copy that nobody uses yet.
    """

    def __init__(self, folder: str | Path, *, writable: bool = False):
        self.folder = Path(folder)
        self.writable = writable
        self.tensors = SafetensorsFolder(self.folder)
        self.skeleton = _skeleton(self.folder)
        self.sources = self._sources()

    def matrices(self) -> list[WeightMatrix]:
        """Every matrix of the checkpoint that has values on disk.

        What lies outside the blocks (a head, a pooler) may have none: transformers initialises it.

        Raises:
            CheckpointError: a matrix of a block has none.
        """
        found = Discovery(self.skeleton, self._loader, computed=False).matrices()
        missing = [matrix for matrix in found if matrix.parameter not in self.sources]
        if lost := [matrix for matrix in missing if matrix.block is not None]:
            raise CheckpointError(
                f"{self.folder} has no tensor for {lost[0].parameter} ({len(lost)} matrices in all): a shard is "
                "missing, or config.json belongs to another model"
            )
        return [matrix for matrix in found if matrix.parameter in self.sources]

    def left_out(self) -> list[LeftOut]:
        """Every parameter of two axes or more that is not taken for matrices."""
        return Discovery(self.skeleton, self._loader, computed=False).left_out()

    def _loader(self, module: nn.Module, name: str, full: str) -> Load:
        kind = WritableParameter if self.writable else CheckpointParameter
        return kind(self, full, tuple(getattr(module, name).shape))

    def _sources(self) -> dict[str, _Source]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        conversions = get_model_conversion_mapping(self.skeleton)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state = self.skeleton.state_dict()
        prefix = self.skeleton.base_model_prefix
        sources: dict[str, _Source] = {}
        for key in sorted(self.tensors.files, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:  # as transformers does: not meant to be renamed
                target, pattern = rename_source_key(key, [], [], prefix, state)
            converter = by_pattern.get(pattern) if pattern else None
            source = sources.setdefault(target, _Source(target, {}, converter))
            source.tensors.setdefault(pattern or "", []).append(key)
            for other in _further_targets(target, converter):
                sources[other] = source
        return self._with_tied(sources)

    def file_names(self) -> list[str]:
        """Files without which it is no checkpoint: the configuration, the index if there is one, the weights."""
        index = [] if (self.folder / SINGLE).is_file() else [INDEX]
        return ["config.json", *index, *sorted(set(self.tensors.files.values()))]

    def keys_of(self, full: str) -> list[str]:
        """Names under which the tensor of a parameter is on disk: that of one that is tied to it may be too."""
        names = {full, *(one for pair in self._ties() if full in pair for one in pair)}
        sources = {id(self.sources[name]): self.sources[name] for name in names if name in self.sources}
        return [source.tensors[""][0] for source in sources.values() if source.converter is None]

    def _ties(self) -> list[tuple[str, str]]:
        """Pairs of parameters that are one tensor."""
        return list((getattr(self.skeleton, "all_tied_weights_keys", None) or {}).items())

    def _with_tied(self, sources: dict[str, _Source]) -> dict[str, _Source]:
        """A tied parameter is on disk once, under either of its names."""
        for one, other in self._ties():
            for target, known in ((one, other), (other, one)):
                if target not in sources and known in sources:
                    sources[target] = sources[known]
        return sources


def _further_targets(target: str, converter: Any) -> list[str]:
    """Where one tensor is cut into several parameters, the ones after the first."""
    if converter is None or len(converter.target_patterns) < 2:
        return []
    first, *others = converter.target_patterns
    return [target.replace(first, other, 1) for other in others]


class CheckpointParameter:
    """Reads one parameter of the model from the tensors that make it up."""

    def __init__(self, checkpoint: Checkpoint, full: str, shape: tuple[int, ...]):
        self.checkpoint = checkpoint
        self.full = full
        self.shape = shape

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one expert of a stacked one."""
        return self._one(self._made_of(self._tensors(expert), self._read(expert)), expert)

    def alone(self, expert: int | None) -> bool:
        """Whether one expert is read and written without the others."""
        source = self.checkpoint.sources[self.full]
        return expert is not None and (source.converter is None or _expert_by_expert(source, self.shape[0]))

    def _one(self, weight: torch.Tensor, expert: int | None) -> torch.Tensor:
        """An expert of what was read for it."""
        if expert is None:
            return weight
        return weight[0 if self.alone(expert) else expert]

    def _read(self, expert: int | None) -> Callable[[str], torch.Tensor]:
        index = expert if self.checkpoint.sources[self.full].converter is None else None
        return partial(self.checkpoint.tensors.read, index=index)

    def _tensors(self, expert: int | None) -> dict[str, list[str]]:
        """What is to be read, by pattern."""
        source = self.checkpoint.sources[self.full]
        if source.converter is None:
            return {"": source.tensors[""][:1]}
        if self.alone(expert):
            assert expert is not None
            return {pattern: [keys[expert]] for pattern, keys in source.tensors.items()}
        return source.tensors

    def _made_of(self, tensors: dict[str, list[str]], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The parameter, or one expert with the axis that counts them, of what is read."""
        converter = self.checkpoint.sources[self.full].converter
        first = next(iter(tensors.values()))
        weight = read(first[0]) if converter is None else self._converted(converter, tensors, read)
        found = tuple(weight.shape)
        if found != self.shape and found != (1, *self.shape[1:]):
            raise CheckpointError(
                f"{self.full} has shape {found} on disk and {self.shape} by config.json: "
                f"{self.checkpoint.folder} mixes files of two models"
            )
        return weight

    def _converted(
        self, converter: Any, tensors: dict[str, list[str]], read: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        """Runs transformers' conversion of these tensors alone."""
        collected: dict[str, Any] = {pattern: [read(key) for key in keys] for pattern, keys in tensors.items()}
        skeleton = self.checkpoint.skeleton
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.checkpoint.sources[self.full].target,
                model=skeleton,
                config=skeleton.config,
                missing_keys=None,
            )
        matching = [value for pattern, value in collected.items() if pattern.replace("*.", "") in self.full]
        result = matching[0] if matching else next(iter(collected.values()))
        return result[0] if isinstance(result, list) else result


class WritableParameter(CheckpointParameter):
    """The same where it can be changed."""

    def check_writable(self) -> None:
        """It can."""

    def update(self, change: Change, expert: int | None = None) -> None:
        """See ``matrices.Store``.

        Raises:
            CheckpointError: the conversion to the parameter is more than a change of places.
        """
        tensors, read = self._tensors(expert), self._read(expert)
        values = {key: read(key) for keys in tensors.values() for key in keys}
        weight = self._made_of(tensors, values.__getitem__).clone()
        change(self._one(weight, expert))
        if self.checkpoint.sources[self.full].converter is None:
            (before,) = values.values()
            # What is said to be tied is not, where a checkpoint holds two different tensors.
            keys = [
                key for key in self.checkpoint.keys_of(self.full) if key in values or torch.equal(read(key), before)
            ]
            for key in keys:
                self.checkpoint.tensors.write(key, weight, expert)
        else:
            for key, part in self._taken_apart(tensors, values, weight).items():
                self.checkpoint.tensors.write(key, part)

    def _taken_apart(
        self, tensors: dict[str, list[str]], values: dict[str, torch.Tensor], weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What was made of some tensors as these tensors again.

        The numbers of all their entries go the same way, and tell where each entry has come from.
        """
        sizes = [value.numel() for value in values.values()]
        numbers = torch.arange(sum(sizes), dtype=torch.int32 if sum(sizes) < 2**31 else torch.int64)
        numbered = {
            key: part.view(value.shape) for (key, value), part in zip(values.items(), numbers.split(sizes), strict=True)
        }
        came_from = self._made_of(tensors, numbered.__getitem__).flatten()
        whole = torch.cat([value.flatten() for value in values.values()])
        known = torch.zeros(len(whole), dtype=torch.bool)
        known[came_from] = True
        if whole.dtype != weight.dtype or int(known.sum()) != len(came_from):
            raise CheckpointError(
                f"{self.full} is not made of the tensors on disk by a change of places alone, so it cannot be written "
                "back: load the model, change that, and save it"
            )
        whole[came_from] = weight.flatten()
        return {
            key: part.view(value.shape) for (key, value), part in zip(values.items(), whole.split(sizes), strict=True)
        }


def _expert_by_expert(source: _Source, experts: int) -> bool:
    """Whether the conversion stacks one tensor an expert and never mixes experts afterwards.

    Then one expert can be read alone, a hundredth of the bytes of the stack.
    """
    first, *rest = source.converter.operations
    return (
        type(first).__name__ == "MergeModulelist"
        and first.dim == 0
        and all(len(keys) == experts for keys in source.tensors.values())
        and all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in rest)
    )


def _skeleton(folder: Path) -> Any:
    """The checkpoint's model on the meta device: layout and names, no values."""
    import transformers

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which says what the tensors are: save the model with save_pretrained"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} names no model type that transformers knows; if it needs code of its own that "
            f"you trust, load it yourself and use RMTAnalyzer(model): {_one_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{folder} holds packed weights (quantization_config in its config.json), which are read in memory alone: "
            "load the model with from_pretrained and use RMTAnalyzer(model), which dequantises where its library can, "
            "or analyse the checkpoint that was quantised"
        )
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    cls = next((c for c in named if c is not None), None)
    try:
        with torch.device("meta"):
            if cls is not None:
                model = cls._from_config(config)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
            model.tie_weights()  # the first versions of transformers 5 leave that to loading
            return model
    except Exception as error:  # whatever the code of the architecture raises
        raise CheckpointError(
            f"{folder}: the architecture cannot be laid out without its weights ({_one_line(error)}): "
            "load it and use RMTAnalyzer(model)"
        ) from error


def locate(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint, fetched from the Hub if it is not a local one.

    Only JSON and safetensors files are fetched, and only those that the index lists.

    Returns:
        The folder and, for the Hub, the commit it was fetched at.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder, None
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it and its config.json")
    return _from_hub(str(source), revision)


def _from_hub(repo: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(repo, "config.json", revision=revision)
        commit = Path(config).parent.name  # the cache keeps each commit in a folder of its own
        try:
            hf_hub_download(repo, SINGLE, revision=commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            index = Path(hf_hub_download(repo, INDEX, revision=commit))
            for shard in sorted(set(weight_map(index).values())):
                hf_hub_download(repo, shard, revision=commit)
        return Path(config).parent, commit
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a folder nor the id of a repository on the Hub") from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} is not a folder, and the Hub gives no {SINGLE} or config.json for it; if its weights are "
            f"pickled and you trust them, load it with transformers and use RMTAnalyzer(model): {_one_line(error)}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} is not a folder, and cannot be had from the Hub: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
