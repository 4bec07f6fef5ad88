"""A model with a narrower residual stream: calibrated, cut, brought into a form that saves and loads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rmt.config import CollectConfig, Form, SliceConfig
from hf_rmt.models.batches import Batches
from hf_rmt.models.families import family_of
from hf_rmt.models.live import unwrap
from hf_rmt.models.origins import Original
from hf_rmt.models.residual_stream import Family, Stream, StreamSite, stream_of
from hf_rmt.models.stream_modules import has_shortcuts
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.slicing.basis import change_basis_, give_shortcuts_, gram
from hf_rmt.slicing.calibration import collect_stream, moments_of_sites, refuse_few, refuse_other_weights
from hf_rmt.slicing.keep import Energy, Keep, Width, check_keep, widest
from hf_rmt.slicing.norms import fuse_norms_, refuse
from hf_rmt.slicing.per_block import slice_in_sequence_
from hf_rmt.slicing.sizes import parameters_of, plain_size, registered_size
from hf_rmt.slicing.verify import output_of, relative_error, sample_batch
from hf_rmt.theory.covariance import Moments
from hf_rmt.theory.projection import prediction, principal_basis, reading_basis

log = logging.getLogger(__name__)

#: A stream at least this wide is cut to a multiple of eight, which matrix products of accelerators want.
_WIDE, _MULTIPLE = 512, 8
#: Largest relative change of the output when norms are fused: of single precision, and of half.
_SINGLE, _HALF = 1e-3, 0.2
#: How much the rows of a tied table of tokens count beside the stream at all sites together.
_TABLE = 0.5


@dataclass(frozen=True, kw_only=True)
class SliceRecord:
    """What a slice has made of a model.

    Attributes:
        model: Hub id or folder that it was, or its class.
        revision: its commit on the Hub, as far as that is known.
        on_hub: whether it came from there.
        form: ``"plain"`` or ``"registered"``.
        per_block: whether each site of the stream has a basis of its own.
        keep: what was asked for.
        original_width, width: of the stream, before and after; of a plain model with LayerNorms ``hidden_size`` is one
            more than the eigenvectors that it holds.
        rounded_from: the width that was asked for, where the architecture or the hardware wants another.
        original_parameters: of the model as it was, a tied head counted once.
        parameters: of the sliced one.
        energy: share of the sum of the eigenvalues of the stream's covariance that was kept, mean over sites.
        tokens: that it was calibrated on.
        weigh_readers, predict, multiple_of: of ``SliceConfig``, what None stands for made out.
        tied: whether the head is still the embeddings.
    """

    model: str
    revision: str | None
    on_hub: bool
    form: Form
    per_block: bool
    keep: str
    original_width: int
    width: int
    rounded_from: int
    original_parameters: int
    parameters: int
    energy: float
    tokens: int
    weigh_readers: bool
    predict: bool
    multiple_of: int
    tied: bool

    @property
    def share(self) -> float:
        """Parameters after over parameters before."""
        return self.parameters / self.original_parameters

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON; of a folder that the model came from its name, as the path concerns nobody."""
        return asdict(self) | {"model": Path(self.model).name if Path(self.model).is_dir() else self.model}

    def __str__(self) -> str:
        rounded = f" (rounded from {self.rounded_from})" if self.rounded_from != self.width else ""
        basis = "a basis for each site" if self.per_block else "one basis"
        return (
            f"{self.form} slice: width {self.width} of {self.original_width}{rounded}, {basis}; {self.parameters:,} of "
            f"{self.original_parameters:,} parameters ({self.share:.1%}); {self.energy:.2%} of the stream's energy on "
            f"{self.tokens:,} tokens"
        )


def slice_model(
    model: Any,
    keep: Keep,
    calibration: Any,
    *,
    family: Family | None = None,
    config: SliceConfig | None = None,
    **options: Any,
) -> Any:
    """A smaller copy of a model: its residual stream is cut to the directions that matter (SliceGPT; paper App. F).

    Args:
        model: of transformers, with its weights in memory; it stays as it is.
        keep: a share of the parameters as a float, ``Width(share)``, or ``Energy(share)``.
        calibration: texts or batches, as for ``RMTAnalyzer.collect``; or what ``collect_stream`` made of them.
        family: the declaration of its stream, where the library has none.
        config, **options: see ``SliceConfig``.

    Returns:
        The sliced model, with a ``SliceRecord`` as its attribute ``sliced``.

    Raises:
        ValueError: no declaration, or a wrong one; a model that is sliced, quantised, sharded, offloaded or has
            adapters; no tokens, or fewer than the stream is wide; a slice that would be larger than the model, or have
            no width; a form that the architecture cannot express.
        TypeError: ``keep`` is no share, or an unknown setting.
    """
    settings = SliceConfig.of(config, options)
    if calibration is None:
        raise TypeError("calibration is None: give texts, batches, or what collect_stream made of them")
    return _Slicer(unwrap(model), check_keep(keep), settings, family).slice(calibration)


class _Slicer:
    """One slice of one model."""

    def __init__(self, model: Any, keep: Keep, config: SliceConfig, family: Family | None):
        refuse(model)
        self.model = model
        self.keep = keep
        self.config = config
        self.dense = stream_of(model, family)
        self.family = self.dense.family
        self.form = self._form()
        self.before = parameters_of(model)

    def slice(self, calibration: Any) -> Any:
        """Calibrate, cut, bring into form."""
        covariances = self._covariances(calibration)
        small = copy.deepcopy(self.model)
        if _is_half(small):
            small.float()  # rounded at the end
        stream = self._fused(small)
        if self.config.per_block:
            record = self._cut_in_sequence(stream, calibration)
        else:
            record = self._cut_at_once(stream, moments_of_sites(self.dense, covariances))
        if record.parameters >= self.before:
            raise ValueError(_grows(record, self.before, self._costs(stream)))
        return self._in_form(stream, record)

    def _form(self) -> Form:
        """The form asked for, or the one that there is.

        Raises:
            ValueError: the architecture has no plain form, and that was asked for.
        """
        from hf_rmt.slicing.plain import can_be_plain

        if self.config.per_block and any(_is_stacked(site) for site in self.dense.sites):
            raise ValueError(
                f"the experts of {type(self.model).__name__} put out as many numbers as they read, so the stream is as "
                "wide on both sides of them: give per_block=False"
            )
        if self.config.per_block or self.config.form == "registered":
            return self._registered()
        reason = can_be_plain(self.model.config, type(self.model), self.family)
        if reason is None and self.dense.headless:
            reason = "a headless model puts out its stream, which a plain slice leaves in another basis"
        if reason is not None and self.config.form == "plain":
            raise ValueError(reason)
        return "plain" if reason is None else self._registered()

    def _registered(self) -> Form:
        """Raise if a loader would not find the declaration of the family."""
        if family_of(self.model) != self.family:
            raise ValueError(
                f"{type(self.model).__name__} is to be sliced by another declaration than that which loads it again: "
                "give it to register_family"
            )
        return "registered"

    def _covariances(self, calibration: Any) -> Any:
        if isinstance(calibration, ActivationCovariances):
            refuse_other_weights(self.model, calibration)
            if self.config.per_block:
                raise ValueError(
                    "a basis for each site is found on what was sliced before it: give the calibration data itself"
                )
            return calibration
        if self.config.per_block:
            return None
        return collect_stream(self.model, calibration, family=self.family, config=self._collect())

    def _collect(self) -> CollectConfig:
        return CollectConfig.of(self.config.collect, {"progress": self.config.progress})

    def _fused(self, small: nn.Module) -> Stream:
        """The copy with its norms fused, which must not change what it puts out."""
        batch = sample_batch(self.model)
        before = output_of(self.model, batch)
        if not bool(before.isfinite().all()):
            raise ValueError(f"{type(small).__name__} puts out NaN or Inf: repair its weights before it is sliced")
        stream = fuse_norms_(small, self.family, keep_tied=self.form == "registered")
        if self.config.per_block:
            give_shortcuts_(stream)
        error = relative_error(output_of(small, batch), before)
        if not error < (_SINGLE if before.dtype.itemsize >= 4 else _HALF):
            raise ValueError(
                f"the residual stream of {type(small).__name__} is not as declared: with its norms fused the output "
                f"changes by {error:.1g} of its largest value; verify_stream(model, family) says more"
            )
        return stream

    # Cutting

    def _cut_at_once(self, stream: Stream, moments: Sequence[Moments]) -> SliceRecord:
        """One basis for the whole model, from what flows through it uncut."""
        covariances = [one.covariance() for one in moments]
        vectors = self._basis(stream, covariances, stream.sites)
        shares = [(vectors * (one @ vectors)).sum(0) / one.trace() for one in covariances]
        energies = torch.stack(shares).mean(0)
        wanted, width = self._width(stream, energies)
        basis = vectors[:, : self._columns(width)]
        change_basis_(stream, basis, [prediction(one, basis) if self.config.predict else None for one in covariances])
        kept = float(energies[: basis.shape[1]].sum())
        return self._record(stream, wanted, width, kept, max(one.tokens for one in moments))

    def _cut_in_sequence(self, stream: Stream, calibration: Any) -> SliceRecord:
        """A basis for each site, from what reaches it through what was cut before it."""
        collect = self._collect()
        batches = Batches(calibration, stream.model, collect.tokenizer, collect.for_texts(), every_logit=False)
        whole = torch.ones(stream.width, dtype=torch.float64)
        fixed = None if isinstance(self.keep, Energy) else self._width(stream, whole)  # while it is
        sizes: list[tuple[int, int]] = []
        kept: list[float] = []

        def basis_of(index: int, moments: Moments) -> tuple[torch.Tensor, torch.Tensor | None]:
            refuse_few(moments.tokens, stream.width)
            covariance = moments.covariance()
            vectors = self._basis(stream, [covariance], [stream.sites[index]])
            energies = (vectors * (covariance @ vectors)).sum(0) / covariance.trace()
            sizes.append(fixed or self._width(stream, energies))
            basis = vectors[:, : sizes[-1][1]]
            kept.append(float(energies[: sizes[-1][1]].sum()))
            return basis, prediction(covariance, basis) if self.config.predict else None

        tokens = slice_in_sequence_(stream, batches, basis_of, self.config.progress)
        wanted, width = max(sizes)
        return self._record(stream, wanted, width, sum(kept) / len(kept), tokens)

    def _basis(self, stream: Stream, covariances: Sequence[torch.Tensor], sites: Sequence[StreamSite]) -> torch.Tensor:
        """``(D, D)`` orthonormal columns, the most important first."""
        # What is cut of a tied table, the head lacks too.
        seen, weigh = list(covariances), self.config.weighs_readers
        with_table = stream.tied is not None and sites[0] is stream.sites[0]
        table = gram(stream.table).cpu() if stream.tied is not None and (with_table or weigh) else None
        if with_table and table is not None:
            seen.append(_of_unit_mean(table) * _TABLE * len(sites))
        if not weigh:
            return principal_basis(seen)[1]
        bare = torch.eye(stream.width, dtype=torch.float64)
        readers = [*(_read(site, stream.width, table) for site in sites), *([bare] if with_table else [])]
        return reading_basis(seen, readers)[1]

    # How wide

    def _width(self, stream: Stream, energies: torch.Tensor) -> tuple[int, int]:
        """The width that ``keep`` asks for, and the one that it is rounded to.

        Raises:
            ValueError: nothing is left.
        """
        full = stream.width
        if isinstance(self.keep, Width):
            wanted = int(self.keep.share * full + 1e-9)
        elif isinstance(self.keep, Energy):
            wanted = min(self.keep.width(energies) + full - self._columns(full), full)
        else:
            budget = self.keep * self.before
            wanted = widest(full, lambda width: self._size(stream, width) <= budget)
        width = wanted - wanted % self._multiple()
        if width and self.form == "plain":
            from hf_rmt.slicing.plain import plain_width

            width = plain_width(self.model.config, width, type(self.model), self.family)
        if self._columns(width) < 1:
            steps = f"{full} in steps of {self._multiple()}"
            raise ValueError(f"keep={self.keep} leaves a stream of width {width}, of {steps}: keep more")
        return wanted, width

    def _multiple(self) -> int:
        return self.config.multiple_of or (_MULTIPLE if self.dense.width >= _WIDE else 1)

    def _columns(self, width: int) -> int:
        """Directions that a stream of some width holds: a plain LayerNorm takes one."""
        return width - 1 if self.form == "plain" and self.family.norm == "layernorm" else width

    def _size(self, stream: Stream, width: int) -> int:
        """Parameters of the slice."""
        if self.form == "plain":
            return plain_size(self.dense, width)
        return registered_size(stream, width, self.config.per_block)

    # Results

    def _record(self, stream: Stream, wanted: int, width: int, energy: float, tokens: int) -> SliceRecord:
        original = Original.of_model(self.model)
        return SliceRecord(
            model=original.source,
            revision=original.revision,
            on_hub=original.hub_id is not None,
            form=self.form,
            per_block=self.config.per_block,
            keep=str(self.keep) if isinstance(self.keep, (Width, Energy)) else f"{self.keep} of the parameters",
            original_width=stream.width,
            width=width,
            rounded_from=wanted,
            original_parameters=self.before,
            parameters=plain_size(self.dense, width) if self.form == "plain" else parameters_of(stream.model),
            energy=energy,
            tokens=tokens,
            weigh_readers=self.config.weighs_readers,
            predict=self.config.predict,
            multiple_of=self._multiple(),
            tied=stream.tied is not None,
        )

    def _costs(self, stream: Stream) -> list[str]:
        """What a slice has that the model has not."""
        ties = self.before < sum(value.numel() for _, value in self.model.named_parameters(remove_duplicate=False))
        costs = {
            "a matrix leads to its head": stream.tied is not None and self.form == "registered",
            "its head is no longer tied": ties and (stream.tied is None or self.form == "plain"),
            "residual connections have matrices": any(has_shortcuts(block) for block in stream.blocks),
            "norms on the outputs of sublayers have matrices": any(site.outputs for site in stream.sites),
        }
        return [cost for cost, holds in costs.items() if holds]

    def _in_form(self, stream: Stream, record: SliceRecord) -> Any:
        if _is_half(self.model):  # a plain Gemma makes up for what transformers rounds in this dtype
            _round(stream.model, self.model)
        if self.form == "plain":
            from hf_rmt.slicing.plain import plain_form

            small: Any = plain_form(stream)
            small.train(self.model.training)
            small.requires_grad_(any(parameter.requires_grad for parameter in self.model.parameters()))
        else:
            from hf_rmt.slicing.registered import mark_

            mark_(stream, record.to_dict())
            small = stream.model
        try:
            output_of(small, sample_batch(self.model))
        except RuntimeError as error:
            hint = "slice it with its head" if self.dense.headless else "verify_stream(model, family) says more"
            raise ValueError(f"{type(small).__name__} does not run with a narrower stream ({error}): {hint}") from error
        small.sliced = record
        log.info("%s", record)
        return small


def _round(small: nn.Module, like: Any) -> None:
    """Into the dtype of the model; what that keeps more exactly, as frequencies, stays so."""
    dtypes = {name: buffer.dtype for name, buffer in like.named_buffers()}
    for parameter in small.parameters():
        parameter.data = parameter.data.to(like.dtype)
    for name, buffer in small.named_buffers():
        buffer.data = buffer.data.to(dtypes.get(name, like.dtype))


def _is_half(model: Any) -> bool:
    return next(model.parameters()).dtype in (torch.float16, torch.bfloat16)


def _is_stacked(site: StreamSite) -> bool:
    """Whether some of what reads the stream at a site are stacked experts."""
    return any(reader.weight.value is not None and reader.weight.value.ndim > 2 for reader in site.readers)


def _read(site: StreamSite, width: int, table: torch.Tensor | None) -> torch.Tensor:
    """``(D, D)``, the sum of ``W^T W`` over the readers of a site; the identity where nothing reads it.

    ``table``: that of a head that is tied to the embeddings, which is read behind a matrix.
    """
    total = torch.zeros(width, width, dtype=torch.float64)
    for reader in site.readers:
        total += gram(reader.weight.stored.movedim(reader.weight.axis, -1).reshape(-1, width)).cpu()
    if site.block is None and table is not None:
        before_head: Any = site.norms[0].module
        gain = before_head.change.weight.detach().double().cpu()
        total += gain.mT @ table @ gain
    return total if bool(total.any()) else torch.eye(width, dtype=torch.float64)


def _of_unit_mean(moment: torch.Tensor) -> torch.Tensor:
    """A second moment as if the mean square of its rows were 1."""
    return moment * len(moment) / moment.trace()


def _grows(record: SliceRecord, before: int, costs: list[str]) -> str:
    why = f", as {' and '.join(costs)}" if costs else ""
    instead = ", or take one basis for the whole model" if record.per_block else ""
    return (
        f"a slice of width {record.width} has {record.parameters:,} parameters and the model {before:,}{why}: keep "
        f"less{instead}"
    )
