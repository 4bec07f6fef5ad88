"""From the name of a model to one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_rmt.models.origins import cached_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint, in the class that its configuration names, ready to run.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: there is no such checkpoint (of transformers).
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    name = next(iter(config.architectures or ()), "")
    cls = getattr(transformers, name, transformers.AutoModel)
    model = cls.from_pretrained(source, revision=revision, use_safetensors=True).eval()
    if (commit := cached_commit(str(source), revision)) is not None:
        model.config._commit_hash = commit  # which not every version of transformers says
    return model
