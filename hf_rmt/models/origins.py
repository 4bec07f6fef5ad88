"""The model that another was made from: what to call it, and its files on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rmt.models.live import unwrap

log = logging.getLogger(__name__)

#: What of the card of the original holds for what is made from it too.
_PASSED_ON = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class Original:
    """Where a model came from.

    Attributes:
        source: Hub id or folder, or its class.
        hub_id: its id on the Hub; None if it came from elsewhere.
        revision: its commit there; None also where it may be one of several.
    """

    source: str
    hub_id: str | None
    revision: str | None

    @classmethod
    def of(cls, source: str, revision: str | None) -> Original:
        """That of ``RMTAnalyzer.origin``."""
        known = _commits(source, revision)
        place = str(Path(source).absolute()) if Path(source).is_dir() else source
        return cls(place, source if known else None, known[0] if len(known) == 1 else None)

    @classmethod
    def of_model(cls, model: Any) -> Original:
        """That of a model in memory, as far as its configuration tells."""
        inner = unwrap(model)
        config = getattr(inner, "config", None)
        name = getattr(config, "_name_or_path", "") or type(inner).__name__
        return cls.of(name, getattr(config, "_commit_hash", None))

    @property
    def base(self) -> str:
        """What to call it; of a folder the last part of its path, as the rest concerns nobody."""
        return self.hub_id or Path(self.source).name or self.source

    @property
    def link(self) -> str:
        """The same for a card."""
        if self.hub_id is None:
            return f"`{self.base}`"
        revision = f" (revision `{self.revision}`)" if self.revision is not None else ""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id}){revision}"

    def as_json(self) -> dict[str, str | None]:
        """The same as data."""
        return {"model": self.base, "revision": self.revision}

    def local_file(self, name: str) -> Path | None:
        """A file of it, if it is on this machine: in its folder, or in the cache of the Hub."""
        from huggingface_hub import try_to_load_from_cache

        if self.hub_id is not None:
            found = try_to_load_from_cache(self.hub_id, name, revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        path = Path(self.source) / name  # of a folder that is not here any more there may be the name alone
        return path if path.is_absolute() and path.is_file() else None

    def passed_on(self) -> dict[str, Any]:
        """License, language and training data, as its card says, if that is on this machine."""
        from huggingface_hub import ModelCard

        path = self.local_file("README.md")
        if path is None:
            return {}
        try:
            data = ModelCard.load(path, ignore_metadata_errors=True).data
        except Exception as error:  # whatever its YAML leads to
            log.warning("the card of %s cannot be read, so its license is not passed on: %s", self.base, error)
            return {}
        said = {key: data.get(key) for key in _PASSED_ON if data.get(key)}
        if "://" not in str(said.get("license_link", "://")):  # a file beside that card
            said.pop("license_link")
        return said


def cached_commit(source: str, revision: str | None) -> str | None:
    """The commit that a revision of a model of the Hub, None for the main one, is in the cache; None if it is not."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return None
    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _commits(source: str, revision: str | None) -> list[str]:
    """The commits of the Hub that a model of this name can be: what it says itself, or those in the cache."""
    from huggingface_hub import constants

    if Path(source).is_dir():
        return []
    if revision is not None:  # not said by every version of transformers
        return [revision]
    cached = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots"
    return [path.parent.name for path in cached.glob("*/config.json")]
