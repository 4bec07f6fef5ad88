"""Whatever can score a model, as one kind of function."""

from __future__ import annotations

import functools
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_rmt.evaluation import Scores
from hf_rmt.models.digests import text_digest, value_digest
from hf_rmt.models.live import evaluating, unwrap

#: What a Trainer and an Evaluator say about the time and memory that they took; it is no score.
_COSTS = re.compile(
    r"(^|_)(epoch|runtime|\w+_per_second|\w+_in_seconds|(preparation|compilation)_time|mem_[cg]pu(_\w+)?)$"
)


class Scorer:
    """Scores a model by a function of it, a Trainer, or a bound ``compute`` of an ``evaluate`` Evaluator.

    Args:
        evaluate: the function returns a number or a dict of numbers; a Trainer holds the model itself; an Evaluator
            is bound to its data as in ``functools.partial(evaluator.compute, data=..., metric=...)``.
        model: what it is to score.

    Raises:
        TypeError: none of these.
        ValueError: a Trainer of another model.
    """

    def __init__(self, evaluate: Any, model: nn.Module):
        self.evaluate = evaluate
        self.model = model
        #: All processes evaluate together.
        self.in_step = False
        self._score = self._function()

    def __call__(self) -> Scores:
        """The scores of the model as it is now, in evaluation mode.

        Raises:
            TypeError: what came back is no number and no dict of numbers.
        """
        with evaluating(self.model):
            return _as_scores(self._score(), self.evaluate)

    def identity(self) -> str:
        """What tells one evaluation from another, as far as that can be known."""
        known = getattr(self.evaluate, "identity", None)
        if known is not None:
            return text_digest(known())
        if isinstance(self.evaluate, functools.partial):
            return value_digest([self.evaluate.func.__qualname__, list(self.evaluate.args), self.evaluate.keywords])
        if self.in_step:
            return value_digest(["Trainer", self.evaluate.eval_dataset])
        return getattr(self.evaluate, "__qualname__", type(self.evaluate).__name__)

    def _function(self) -> Callable[[], Any]:
        evaluate: Any = self.evaluate
        kinds = {cls.__name__ for cls in type(evaluate).__mro__}
        if "Trainer" in kinds:
            if unwrap(evaluate.model) is not unwrap(self.model):
                raise ValueError("the Trainer evaluates another model than the pruner edits: give both the same")
            if evaluate.args.bf16_full_eval or evaluate.args.fp16_full_eval:
                raise ValueError(
                    "bf16_full_eval and fp16_full_eval have the Trainer cast the model itself to 16 bits: leave them "
                    "out, or cast the model before it is given to the pruner"
                )
            self.in_step = True
            return lambda: _loss_last({key.removeprefix("eval_"): value for key, value in evaluate.evaluate().items()})
        if "Evaluator" in kinds:
            raise TypeError(
                "an Evaluator needs its data: give functools.partial(evaluator.compute, data=..., metric=...)"
            )
        owner = getattr(evaluate.func, "__self__", None) if isinstance(evaluate, functools.partial) else None
        if any(cls.__name__ == "Evaluator" for cls in type(owner).__mro__):
            return lambda: evaluate(model_or_pipeline=self.model)
        if not callable(evaluate):
            raise TypeError(f"{evaluate!r} scores no model: give a function of the model, or a Trainer")
        return lambda: evaluate(self.model)


def _loss_last(found: dict[str, Any]) -> dict[str, Any]:
    """The first metric is the main one, and a Trainer begins with its loss."""
    return dict(sorted(found.items(), key=lambda item: item[0] == "loss"))


def _as_scores(found: Any, evaluate: Any) -> Scores:
    if isinstance(found, Mapping):
        every = {str(key): _number(value) for key, value in found.items()}
        scores = {key: value for key, value in every.items() if value is not None and not _COSTS.search(key)}
        if scores and isinstance(found, Scores):
            return Scores(scores, rows=found.rows, chance=found.chance)
        if scores:
            return Scores(scores)
    elif (score := _number(found)) is not None:
        return Scores({"score": score})
    raise TypeError(f"{evaluate!r} gave {found!r}, which is no number and no dict of numbers")


def _number(value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of torch and numpy
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
