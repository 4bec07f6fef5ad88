"""``ActivationCovariances``: what flowed through the matrices of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rmt.reports import store
from hf_rmt.reports.report import known_name, nearest
from hf_rmt.reports.unfinished import tensors_of
from hf_rmt.theory.covariance import Moments

if TYPE_CHECKING:
    import pandas as pd

#: Keys of the sums of a matrix in two covariances; None where it has none.
_Pair = tuple[str | None, str | None]


class ActivationCovariances(Mapping[str, Moments]):
    """Moments of the activations that enter each matrix of a model, by the name of the matrix.

    Matrices that read the same activations (query, key and value; gate and up) share one ``Moments``.
    Those of several data sets add up: ``a + b``.

    Attributes:
        settings: model, number of batches, whether dropout was on, ``silent``: the matrices that no token
            reached, and ``centred``: which of the two covariances an analysis takes.
        fingerprints: hash of the weights of each matrix, by which an analysis knows that they belong
            together; empty if they were collected while the weights moved.
    """

    def __init__(
        self,
        sums: dict[str, Moments],
        inputs: dict[str, str],
        outputs: dict[str, str],
        settings: dict[str, Any],
        fingerprints: dict[str, str],
    ):
        """``inputs`` and ``outputs`` say for each matrix which of the ``sums`` are its own."""
        self._sums = sums
        self._inputs = inputs
        self._outputs = outputs
        self.settings = {"centred": False} | settings
        self.fingerprints = fingerprints

    def __getitem__(self, name: str) -> Moments:
        """Moments of what enters one matrix, by its name, or by its path in a headed model.

        Raises:
            KeyError: no activations of it were collected; the message names the nearest ones.
        """
        known = known_name(name, self._inputs)
        if known is None:
            raise KeyError(f"no activations of {name!r} were collected; {nearest(name, self._inputs)}")
        return self._sums[self._inputs[known]]

    def __contains__(self, name: object) -> bool:
        """Whether there are moments of the matrix of exactly this name: an analysis asks for its own matrices."""
        return name in self._inputs

    def get(self, name: str, default: Any = None) -> Any:
        """Moments of what enters one matrix; ``default`` where none were collected."""
        known = known_name(name, self._inputs)
        return default if known is None else self._sums[self._inputs[known]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def output(self, name: str) -> Moments | None:
        """Moments of what one matrix puts out, bias included; None where outputs were not collected."""
        known = known_name(name, self._outputs)
        return None if known is None else self._sums[self._outputs[known]]

    def shared(self, name: str) -> list[str]:
        """All matrices that read the same activations as this one."""
        own = self._inputs.get(known_name(name, self._inputs) or "")
        return [other for other, key in self._inputs.items() if key == own]

    def key(self, name: str, output: bool = False) -> str | None:
        """What the sums of a matrix are called: the same for matrices that share them."""
        return (self._outputs if output else self._inputs).get(name)

    def identity(self) -> dict[str, Any]:
        """What tells these covariances from others: their settings, and a hash of the means."""
        hashed = hashlib.blake2b(digest_size=16)
        for moments in self._sums.values():
            hashed.update(moments.total.numpy().tobytes())
        return self.settings | {"hash": hashed.hexdigest()}

    @property
    def centred(self) -> bool:
        """Whether an analysis takes the mean out."""
        return bool(self.settings["centred"])

    def with_centring(self, centred: bool = True) -> ActivationCovariances:
        """The same sums, of which an analysis takes the covariance about the mean."""
        return self._like(settings=self.settings | {"centred": centred})

    def for_any_weights(self) -> ActivationCovariances:
        """The same sums, to hold against other weights of the same shapes, as those of a fine-tuned model."""
        return self._like(fingerprints={})

    def _like(self, **changes: Any) -> ActivationCovariances:
        own = dict(sums=self._sums, inputs=self._inputs, outputs=self._outputs)
        return ActivationCovariances(**{**own, "settings": self.settings, "fingerprints": self.fingerprints, **changes})

    def __add__(self, other: ActivationCovariances) -> ActivationCovariances:
        """The covariances of both data sets together.

        A matrix that no token reached in one of them (``settings["silent"]``) has what the other has. Matrices
        share a sum where they do in both.

        Raises:
            ValueError: they are of different matrices, weights or centring.
        """
        if not isinstance(other, ActivationCovariances):
            return NotImplemented
        self._check_addable(other)
        inputs, outputs = (self._pairs(other, side) for side in ("_inputs", "_outputs"))
        keys = _keys_of({**dict.fromkeys(inputs.values()), **dict.fromkeys(outputs.values())})
        sums = {key: self._sum_of(other, pair) for pair, key in keys.items()}
        counts = {key: self.settings.get(key, 0) + other.settings.get(key, 0) for key in ("batches", "tokens")}
        counts["data"] = [*self.settings.get("data", []), *other.settings.get("data", [])]
        dropout = bool(self.settings.get("dropout") or other.settings.get("dropout"))
        silent = self._in_order((*self._silent(), *other._silent()))
        return self._like(
            sums=sums,
            inputs={name: keys[pair] for name, pair in inputs.items()},
            outputs={name: keys[pair] for name, pair in outputs.items()},
            settings=self.settings
            | counts
            | {"dropout": dropout, "silent": [name for name in silent if name not in inputs]},
        )

    def _silent(self) -> list[str]:
        """Matrices that no token reached."""
        return self.settings.get("silent", [])

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """The names once each, in the order of the model where that is known."""
        wanted = dict.fromkeys(names)
        if wanted.keys() <= self.fingerprints.keys():
            return [name for name in self.fingerprints if name in wanted]
        return list(wanted)

    def _pairs(self, other: ActivationCovariances, side: str) -> dict[str, _Pair]:
        """For each matrix of either, the keys of its sums in both."""
        mine, theirs = getattr(self, side), getattr(other, side)
        return {name: (mine.get(name), theirs.get(name)) for name in self._in_order((*mine, *theirs))}

    def _sum_of(self, other: ActivationCovariances, pair: _Pair) -> Moments:
        found = [own._sums[key] for own, key in zip((self, other), pair, strict=True) if key is not None]
        if len({len(moments.total) for moments in found}) > 1:
            raise ValueError(f"covariances of different models cannot be added; the widths of {pair[0]} differ")
        return found[0] + found[1] if len(found) > 1 else found[0]

    def _check_addable(self, other: ActivationCovariances) -> None:
        for mine, theirs in ((self._inputs, other._inputs), (self._outputs, other._outputs)):
            lacking = {*mine} - {*theirs, *other._silent()} | {*theirs} - {*mine, *self._silent()}
            if lacking:
                names = ", ".join(sorted(lacking)[:5])
                raise ValueError(f"covariances of different matrices cannot be added; they differ in {names}")
        if self.fingerprints != other.fingerprints:
            raise ValueError("covariances of different weights cannot be added; see for_any_weights()")
        if self.centred != other.centred:
            raise ValueError("of these covariances one is centred and one is not; see with_centring()")

    def __repr__(self) -> str:
        model, tokens = self.settings.get("model"), self.settings.get("tokens")
        kind = "centred" if self.centred else "uncentred"
        of = f"{len(self)} matrices, {len(self._sums)} distinct, {tokens} tokens"
        return f"ActivationCovariances({model!r}, {of}, {kind})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a distinct covariance: its key, side, width, tokens, and the matrices that share it."""
        import pandas as pd

        rows = []
        for side, names in (("input", self._inputs), ("output", self._outputs)):
            for key in dict.fromkeys(names.values()):
                own = [name for name, its in names.items() if its == key]
                moments = self._sums[key]
                rows.append([key, side, len(moments.total), moments.tokens, ", ".join(own)])
        return pd.DataFrame(rows, columns=["key", "side", "width", "tokens", "matrices"])

    def save(self, folder: str | Path) -> Path:
        """Write ``covariances.safetensors`` and ``covariances.json``, all or nothing.

        Raises:
            OSError: the folder cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with store.staged(folder, "covariances") as stage:
            store.save_tensors(stage / "covariances.safetensors", tensors_of(self._sums), {})
            manifest = {
                "settings": self.settings,
                "inputs": self._inputs,
                "outputs": self._outputs,
                "sums": {key: [moments.tokens, moments.eps] for key, moments in self._sums.items()},
                "fingerprints": self.fingerprints,
            }
            store.write_manifest(stage, "covariances", manifest)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ActivationCovariances:
        """Read covariances that ``save`` wrote.

        Raises:
            ValueError: there are none, or they are damaged; the message names the file.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder, "covariances")
        path = store.current(folder, "covariances", "covariances.safetensors")
        tensors, _ = store.load_tensors(path)
        if lacking := [key for key in manifest["sums"] if not {f"{key}/outer", f"{key}/total"} <= tensors.keys()]:
            raise ValueError(f"{path} lacks the sums of {', '.join(lacking[:5])}: it is not of the same collection")
        sums = {
            key: Moments(tensors[f"{key}/outer"], tensors[f"{key}/total"], tokens, eps)
            for key, (tokens, eps) in manifest["sums"].items()
        }
        return cls(sums, manifest["inputs"], manifest["outputs"], manifest["settings"], manifest["fingerprints"])


def _keys_of(pairs: Iterable[_Pair]) -> dict[_Pair, str]:
    """A key for each sum of two: that of either where it is free, as it is unless the two share otherwise."""
    keys: dict[_Pair, str] = {}
    taken: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: pair[0] != pair[1]):  # alike in both: first choice
        names = [*(key for key in pair if key is not None), " and ".join(key or "nothing" for key in pair)]
        keys[pair] = next(name for name in names if name not in taken)
        taken.add(keys[pair])
    return keys
