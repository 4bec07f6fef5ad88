"""From the name of a model to one that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.models.origins import cached_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Offload:
    """Weights that are brought in from disk as they are used.

    Attributes:
        memory: bytes of weights that stay in memory.
        folder: for those that are not in the checkpoint as the model has them.
    """

    memory: int
    folder: Path

    def arguments(self) -> dict[str, Any]:
        """As ``from_pretrained`` takes them."""
        return {"device_map": "auto", "max_memory": {"cpu": self.memory}, "offload_folder": str(self.folder)}


def load_model(source: str | Path, revision: str | None = None, offload: Offload | None = None) -> PreTrainedModel:
    """The model of a checkpoint, in the class that its configuration names, ready to run.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        offload: for one that the memory does not hold; None keeps it in memory whole.

    Raises:
        OSError: there is no such checkpoint (of transformers).
        ValueError: an older accelerate has no part of the model fit in the memory given.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    name = next(iter(config.architectures or ()), "")
    cls = getattr(transformers, name, transformers.AutoModel)
    place = {} if offload is None else offload.arguments()
    try:
        model = cls.from_pretrained(source, revision=revision, use_safetensors=True, **place).eval()
    except ValueError as error:
        if offload is None or "disk_offload" not in str(error):  # what accelerate before 1.15 advises
            raise
        raise ValueError(
            f"{offload.memory / 1e6:,.0f} MB hold no part of {source}: give a larger max_memory, or install "
            "accelerate>=1.15, which can leave all of a model on disk"
        ) from error
    if (commit := cached_commit(str(source), revision)) is not None:
        model.config._commit_hash = commit  # which not every version of transformers says
    return model
