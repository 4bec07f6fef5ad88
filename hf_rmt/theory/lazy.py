"""Lazy learning: a loss under which weights hardly move, and what weight decay alone does to them (paper App. A, B).

With the softmax of ``alpha z`` the logits ``z`` need move by ``1/alpha`` only, and so do the weights: a large alpha
keeps each matrix near its random initial one, with a spectrum that stays Marchenko-Pastur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

#: Labels that do not count, as everywhere in torch and transformers.
_IGNORED = -100


@dataclass(frozen=True)
class ScaledSoftmaxLoss:
    """Cross entropy of ``softmax(alpha z)``, divided by ``alpha^2`` (paper Eq. 10).

    ``l = -1 / (N alpha^2) sum_k y_k . ln softmax(alpha z_k)``; its gradient is ``(softmax(alpha z) - y) / (N alpha)``.
    ``alpha = 1`` is cross entropy. ``Trainer(..., compute_loss_func=ScaledSoftmaxLoss(15))`` trains lazily, given an
    optimiser whose steps are in proportion to the gradient (``optim="sgd"``): Adam divides the gradient by its own
    size, so the factor is lost on it.

    Attributes:
        alpha: factor of the logits; above 1 for the lazy regime, 15 in the paper.
        next_token: for causal language models, whose labels are their inputs: the logits at a position are held
            against the label of the next one.

    Raises:
        ValueError: alpha is not a positive number.
    """

    alpha: float = 1.0
    next_token: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha!r}: give a positive number, 1 for cross entropy")

    def __call__(
        self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss, a scalar in float32 (float64 for float64 logits).

        Args:
            outputs: logits ``(..., classes)``, or what a model returns: with ``logits``, or a tuple that begins
                with them.
            labels: classes ``(...)``; -100 does not count.
            num_items_in_batch: what to divide by, as the Trainer counts it over all batches of a step; None for the
                number of labels that count. Without any the mean is NaN, as that of torch.

        Raises:
            TypeError: no labels, or labels that are not integers.
            ValueError: shapes do not fit.
        """
        logits = _logits_of(outputs)
        labels = _checked(labels, logits).to(logits.device)
        if self.next_token:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        scores = self.alpha * (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, -2)
        total = F.cross_entropy(scores, labels.flatten(), ignore_index=_IGNORED, reduction="sum") / self.alpha**2
        count = labels.ne(_IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device)


def _logits_of(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, Mapping):
        outputs = outputs["logits"]
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _checked(labels: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if labels is None or labels.is_floating_point():
        found = "None" if labels is None else str(labels.dtype)
        raise TypeError(f"labels are {found}: the scaled softmax needs the number of a class for each row of logits")
    if labels.shape != logits.shape[:-1] or not labels.ndim:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: "
            "give one label for each row of logits"
        )
    return labels


def decay_factor(rates: Iterable[float], weight_decay: float, momentum: float = 0.0) -> float:
    """What weight decay alone leaves of a matrix: ``W_n = factor W_0`` (paper Eq. 11).

    ``prod (1 - rate weight_decay)``, near ``exp(-weight_decay sum rates)``. Singular values and sigma carry the
    factor, singular vectors and the law itself do not change.

    Args:
        rates: the learning rate of each step; ``[1e-3] * n`` for a constant one.
        weight_decay: as given to the optimiser. Decay is decoupled (``torch.optim.AdamW``) or part of the gradient
            (``torch.optim.SGD``); Adam with the latter does not rescale at all.
        momentum: of SGD, without dampening or Nesterov.

    Raises:
        ValueError: an argument is not a number that decays: rates or weight_decay below 0, momentum not in [0, 1).
    """
    if not (weight_decay >= 0 and 0 <= momentum < 1):
        raise ValueError(
            f"weight_decay is {weight_decay!r} and momentum {momentum!r}: give at least 0, and one in [0, 1)"
        )
    factor, velocity = 1.0, 0.0
    for rate in rates:
        if not rate >= 0:
            raise ValueError(f"a learning rate is {rate!r}: give rates of at least 0")
        velocity = momentum * velocity + weight_decay * factor
        factor -= rate * velocity
    return factor
