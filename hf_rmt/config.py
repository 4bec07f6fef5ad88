"""The settings of an analysis, of a collection of activations, and of a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from hf_rmt.theory.controls import CONTROLS, Control
from hf_rmt.theory.marchenko_pastur import SIGMA_RULES, SigmaRule, check_sigma
from hf_rmt.theory.selection import Decile, Selection
from hf_rmt.theory.tracy_widom import check_rate

Config = TypeVar("Config", "AnalysisConfig", "CollectConfig", "SweepConfig", "SliceConfig")
Form = Literal["plain", "registered"]
Sides = Literal["both", "right", "left", "none"]
#: Settings that say how the work is done and not what comes out.
_EXECUTION = ("device", "workers", "max_memory", "progress", "strict")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """What to compute and how; each field is also a keyword of ``RMTAnalyzer.analyze``.

    Attributes:
        sides: whose singular vectors to test: ``"both"``, ``"right"``, ``"left"``, or ``"none"`` for
            singular values alone, which takes about half the time.
        sigma: rule for the standard deviation of the law: ``"bulk"``, ``"empirical"``, ``"init"`` (see
            ``theory.marchenko_pastur.sigma_of``), or a number.
        rate: false-positive rate per matrix and edge of the Tracy-Widom thresholds.
        control: ``"gaussian"`` or ``"shuffled"`` analyses a random matrix beside each one; None does not.
        null_draws: number of Monte Carlo draws for the null of the KS statistic, as in the paper, at
            least 100; a lone discovery among N vectors needs N / 0.05. None uses the shipped table.
        seed: of the control and the Monte Carlo draws.
        device: where matrices are factored; None for where they are.
        workers: matrices factored at a time; None for as many as there are cores and memory on the CPU, and for one on
            an accelerator, where each has a stream of its own.
        max_memory: bytes, or as ``"8GB"``, that the process may have in all while it factors on the CPU: so many
            fewer at a time. What is kept of them, as the factors of an ``SVDPruner`` without a folder, comes beside.
            None leaves half of what is free.
        progress: show a progress bar; None shows one on a terminal.
        strict: raise on a matrix with NaN or Inf entries, instead of giving it an empty row.
    """

    sides: Sides = "both"
    sigma: SigmaRule | float = "bulk"
    rate: float = 0.01
    control: Control | None = None
    null_draws: int | None = None
    seed: int = 0
    device: str | None = None
    workers: int | None = None
    max_memory: int | str | None = None
    progress: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.sides not in get_args(Sides):
            raise ValueError(f"sides is {self.sides!r}: give one of {', '.join(get_args(Sides))}")
        if self.sigma not in SIGMA_RULES:
            object.__setattr__(self, "sigma", check_sigma(self.sigma))  # numpy's numbers are no JSON
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "rate", float(self.rate))
        check_rate(self.rate)
        if self.control is not None and self.control not in CONTROLS:
            raise ValueError(f"control is {self.control!r}: give one of {', '.join(CONTROLS)}, or None")
        if self.null_draws is not None and self.null_draws < 100:
            raise ValueError(f"null_draws is {self.null_draws!r}: at least 100 draws make a null")
        if self.device is not None:
            object.__setattr__(self, "device", _usable_device(self.device))
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers!r}: give at least 1, or None")
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", _bytes(self.max_memory))

    @classmethod
    def of(cls, config: AnalysisConfig | None, options: dict[str, Any]) -> AnalysisConfig:
        """A configuration with some fields replaced; an unknown field raises a TypeError that lists them."""
        return _with_options(cls, config, options)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers; two runs that share them give the same report."""
        return {key: value for key, value in asdict(self).items() if key not in _EXECUTION}

    @property
    def right(self) -> bool:
        """Whether right singular vectors are tested."""
        return self.sides in ("both", "right")

    @property
    def left(self) -> bool:
        """Whether left singular vectors are tested."""
        return self.sides in ("both", "left")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """How activations are collected; each field is also a keyword of ``RMTAnalyzer.collect``.

    Attributes:
        outputs: sum up what the matrices put out too, for the overlaps of left singular vectors.
        memory: bytes for the sums, 12 n^2 for each distinct input of n features; where they do not fit, the
            data is gone through several times. None takes half of the free memory.
        sequential: run all batches through one block after the other, of a model in evaluation mode whose blocks are
            called so: offloaded weights are fetched once and not once a batch. With a folder, the sums and weights of
            one block and the hidden states of one batch are in memory; else all sums, and the hidden states of all
            batches, twice while a block runs.
        progress: show a progress bar; None shows one on a terminal.
        tokenizer: for texts; None takes the model's own.
        columns: of a data set, one column of texts or two for pairs; None takes the usual ones.
        batch_size: texts a batch.
        max_length: tokens a text; longer ones are cut. None takes the model's limit, at most 512.
        max_tokens: stop after so many tokens; None takes all.
    """

    outputs: bool = False
    memory: float | None = None
    sequential: bool = False
    progress: bool | None = None
    tokenizer: Any = None
    columns: str | Sequence[str] | None = None
    batch_size: int = 16
    max_length: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory is {self.memory!r}: give a number of bytes, or None")

    @classmethod
    def of(cls, config: CollectConfig | None, options: dict[str, Any]) -> CollectConfig:
        """A configuration with some fields replaced; an unknown field raises a TypeError that lists them."""
        return _with_options(cls, config, options)

    def for_texts(self) -> dict[str, Any]:
        """The keywords of ``text_batches``."""
        return {key: getattr(self, key) for key in ("columns", "batch_size", "max_length", "max_tokens")}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep removes, from where; each field is also a keyword of ``SVDPruner.sweep``.

    Attributes:
        selections: what to remove, one after the other; beside ``deciles``, if both are given.
        deciles: numbers of deciles, 1 for the largest singular values; None, without ``selections``, for all ten.
        roles: ``"each"`` role by itself (paper Fig. 7), ``"all"`` matrices together (Fig. 8), or roles to take
            each by itself.
        blocks: ``"together"``, ``"each"`` by itself, or blocks to take each by itself.
        controls: random draws, from the same matrices, of as many components as each selection has; selections
            of one size (to 5 %) share them.
        seed: number of the model, where several are swept that differ in the seed of their fine-tuning.
        lower_is_better: names of scores that fall when a model gets better and whose names do not say so, as those of
            losses, errors and perplexities do.
        margin: standard errors by which the model has to beat a guess of the largest class, where its evaluation
            knows that: a sweep of a model that has not learned the task says nothing.
        progress: show a progress bar; None shows one on a terminal.
    """

    selections: Sequence[Selection] | None = None
    deciles: Iterable[int] | None = None
    roles: str | Sequence[str] = "each"
    blocks: str | Sequence[int] = "together"
    controls: int = 0
    seed: int = 0
    lower_is_better: Sequence[str] = ()
    margin: float = 3.0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, single in (("deciles", int), ("selections", Selection), ("blocks", int)):
            value = getattr(self, name)
            if isinstance(value, single):
                object.__setattr__(self, name, (value,))
            elif value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.roles, str):
            object.__setattr__(self, "roles", tuple(self.roles))
        falling = [self.lower_is_better] if isinstance(self.lower_is_better, str) else self.lower_is_better
        object.__setattr__(self, "lower_is_better", tuple(falling))
        if isinstance(self.blocks, str) and self.blocks not in ("together", "each"):
            raise ValueError(f"blocks is {self.blocks!r}: give 'together', 'each', or block numbers")
        if self.controls < 0:
            raise ValueError(f"controls is {self.controls!r}: give a number of random draws, or 0")
        self.chosen()

    @classmethod
    def of(cls, config: SweepConfig | None, options: dict[str, Any]) -> SweepConfig:
        """A configuration with some fields replaced; an unknown field raises a TypeError that lists them."""
        return _with_options(cls, config, options)

    def chosen(self) -> list[Selection]:
        """The selections, deciles first."""
        deciles = range(1, 11) if self.deciles is None and self.selections is None else self.deciles or ()
        found = [*map(Decile, deciles), *(self.selections or ())]
        if strange := [one for one in found if not isinstance(one, Selection)]:
            raise TypeError(f"{strange[0]!r} is no selection, as Decile(10) is one; parse_selection reads its name")
        if not found:
            raise ValueError("there is nothing to remove: give selections or deciles")
        return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """How a model is sliced; each field is also a keyword of ``SVDPruner.slice``.

    Attributes:
        form: ``"plain"``, an ordinary model that transformers loads alone, or ``"registered"``, which it loads after
            ``import hf_rmt``; None for the plain one where the architecture can express the slice.
        per_block: a basis for each site of the stream, with matrices in the residual connections, as SliceGPT does;
            else one for the whole model.
        weigh_readers: which directions are kept depends on what the readers do with them too (``reading_basis``); else
            on the variance of the stream alone. None for True with one basis, and False per block.
        predict: readers make out what was cut from what was kept, by least squares (``prediction``); else they take it
            for zero.
        multiple_of: the width is rounded down to a multiple of this; None for 8 of a stream of 512 or more.
        collect: how the calibration data is read; see ``CollectConfig``.
        progress: show a progress bar; None shows one on a terminal.
    """

    form: Form | None = None
    per_block: bool = False
    weigh_readers: bool | None = None
    predict: bool = True
    multiple_of: int | None = None
    collect: CollectConfig | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}: give one of {', '.join(get_args(Form))}, or None")
        if self.form == "plain" and self.per_block:
            raise ValueError("matrices in the residual connections have no plain form: give per_block=False")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of!r}: give at least 1, or None")

    @property
    def weighs_readers(self) -> bool:
        """``weigh_readers``, or what None stands for."""
        return not self.per_block if self.weigh_readers is None else self.weigh_readers

    @classmethod
    def of(cls, config: SliceConfig | None, options: dict[str, Any]) -> SliceConfig:
        """A configuration with some fields replaced; an unknown field raises a TypeError that lists them."""
        return _with_options(cls, config, options)


def _with_options(cls: type[Config], config: Config | None, options: dict[str, Any]) -> Config:
    known = [field.name for field in fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"there is no option {', '.join(unknown)}; there are {', '.join(known)}")
    return cls(**{**(vars(config) if config else {}), **options})


def _bytes(size: int | str) -> int:
    """A size as a number of bytes."""
    from accelerate.utils import convert_file_size_to_int

    try:
        number = int(convert_file_size_to_int(size) if isinstance(size, str) else size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"max_memory is {size!r}: give a number of bytes, or a size as '8GB' or '8GiB'") from error
    if number <= 0:
        raise ValueError(f"max_memory is {size!r}: give a size above 0")
    return number


def _usable_device(device: object) -> str:
    """The name of a device that can hold a tensor here."""
    import torch

    if str(device) == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.device_count() > 1:
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # each process its own
    try:
        torch.empty(1, device=str(device)).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {str(device)!r}, which cannot be used here: {reason}") from error
    return str(device)
