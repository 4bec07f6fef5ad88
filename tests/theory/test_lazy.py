from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import nn

from hf_rmt.theory.decomposition import svd
from hf_rmt.theory.lazy import ScaledSoftmaxLoss, decay_factor
from hf_rmt.theory.marchenko_pastur import MarchenkoPastur, sigma_of

ALPHAS = [0.3, 1.0, 15.0]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, count: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


# Eq. 10


@every_alpha
def test_loss_is_equation_10(alpha: float) -> None:
    z, labels = draws(7, 5), classes(7)
    y = np.eye(5)[labels.numpy()]
    scaled = alpha * z.numpy()
    ln_softmax = scaled - logsumexp(scaled, axis=1, keepdims=True)
    expected = -np.sum(y * ln_softmax) / (7 * alpha**2)
    assert float(ScaledSoftmaxLoss(alpha)(z, labels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("ignored", [0, 1], ids=["all count", "one ignored"])
def test_alpha_1_is_cross_entropy(shape: tuple[int, ...], ignored: int) -> None:
    z, labels = draws(*shape, 5), classes(*shape)
    labels.view(-1)[:ignored] = -100
    torch.testing.assert_close(ScaledSoftmaxLoss()(z, labels), F.cross_entropy(z.flatten(0, -2), labels.flatten()))


@every_alpha
def test_gradient_is_its_closed_form_and_that_of_finite_differences(alpha: float) -> None:
    loss = ScaledSoftmaxLoss(alpha)
    z, labels = draws(4, 5).requires_grad_(), classes(4)
    (gradient,) = torch.autograd.grad(loss(z, labels), z)
    torch.testing.assert_close(gradient, ((alpha * z).softmax(1) - F.one_hot(labels, 5)) / (4 * alpha))
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), z)


@every_alpha
def test_curvature_has_no_factor_of_alpha(alpha: float) -> None:
    """Why the learning rate can stay what it was: ``(diag(p) - p p^T) / N`` with ``p = softmax(alpha z)``."""
    z = draws(1, 5)
    hessian = torch.autograd.functional.hessian(lambda x: ScaledSoftmaxLoss(alpha)(x, torch.tensor([2])), z)
    p = (alpha * z[0]).softmax(0)
    torch.testing.assert_close(hessian[0, :, 0], p.diag() - torch.outer(p, p))


def test_a_large_alpha_leaves_the_margin() -> None:
    """``alpha l`` tends to the mean of ``max z - z_y``, from above by at most ``ln(classes) / alpha``."""
    z, labels = draws(50, 5), classes(50)
    margin = float((z.amax(1) - z.gather(1, labels[:, None])[:, 0]).mean())
    for alpha in (10.0, 1e3, 1e5):
        excess = alpha * float(ScaledSoftmaxLoss(alpha)(z, labels)) - margin
        assert -1e-12 < excess <= math.log(5) / alpha
    assert ScaledSoftmaxLoss(1e30)(z, labels).isfinite()


def test_a_small_alpha_leaves_the_chance_level() -> None:
    """``alpha^2 l = ln K + alpha (mean z - z_y) + alpha^2 var(z) / 2 + O(alpha^3)``."""
    z, labels = draws(50, 5), classes(50)
    tilt = float((z.mean(1) - z.gather(1, labels[:, None])[:, 0]).mean())
    curve = float(z.var(1, correction=0).mean()) / 2
    for alpha in (1e-1, 1e-2):
        found = alpha**2 * float(ScaledSoftmaxLoss(alpha)(z, labels))
        assert found == pytest.approx(math.log(5) + alpha * tilt + alpha**2 * curve, abs=alpha**3)


def test_a_linear_model_learns_the_same_on_another_scale() -> None:
    """From ``W_0 / alpha``, gradient descent on Eq. 10 goes through ``W_t / alpha`` of alpha = 1, exactly."""
    x, labels, start = draws(20, 6), classes(20), draws(5, 6, seed=2)

    def trained(alpha: float) -> torch.Tensor:
        weight = (start / alpha).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.3, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            ScaledSoftmaxLoss(alpha)(x @ weight.T, labels).backward()
            optimizer.step()
        return alpha * weight.detach()

    torch.testing.assert_close(trained(15.0), trained(1.0))


@every_alpha
def test_parts_of_a_batch_add_up_to_it(alpha: float) -> None:
    """Gradient accumulation over unequal parts is the mean over all that counts."""
    loss = ScaledSoftmaxLoss(alpha)
    z, labels = draws(9, 5), classes(9)
    labels[[0, 1, 7]] = -100
    for count in (6, torch.tensor(6)):
        parts = [loss(z[part], labels[part], num_items_in_batch=count) for part in (slice(2), slice(2, 5), slice(5, 9))]
        torch.testing.assert_close(torch.stack(parts).sum(), loss(z, labels))


def test_next_token_is_the_loss_of_causal_models() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    z, labels = draws(2, 6, 5), classes(2, 6)
    labels[0, 2] = labels[1, 0] = -100
    for count in (None, torch.tensor(11)):
        expected = ForCausalLMLoss(z, labels, vocab_size=5, num_items_in_batch=count)
        found = ScaledSoftmaxLoss(next_token=True)(z, labels, num_items_in_batch=count)
        torch.testing.assert_close(found.float(), expected)


def test_sixteen_bits_are_no_loss_of_digits() -> None:
    z, labels = draws(40, 5).bfloat16(), classes(40)
    found = ScaledSoftmaxLoss(15)(z, labels)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(ScaledSoftmaxLoss(15)(z.double(), labels)), rel=1e-6)


def test_outputs_of_a_model_are_looked_into() -> None:
    from transformers.modeling_outputs import SequenceClassifierOutput

    z, labels = draws(4, 5), classes(4)
    expected = ScaledSoftmaxLoss(3)(z, labels)
    for outputs in (SequenceClassifierOutput(logits=z), {"logits": z}, (z, "hidden"), [z]):
        assert torch.equal(ScaledSoftmaxLoss(3)(outputs, labels), expected)


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan])
def test_alpha_has_to_be_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match="give a positive number, 1 for cross entropy"):
        ScaledSoftmaxLoss(alpha)


def test_labels_have_to_be_classes() -> None:
    loss = ScaledSoftmaxLoss(2)
    with pytest.raises(TypeError, match="labels are None"):
        loss(draws(4, 5), None)
    with pytest.raises(TypeError, match=r"labels are torch\.float64"):
        loss(draws(4, 5), draws(4, 5))
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) do not fit logits of shape \(4, 5\)"):
        loss(draws(4, 5), classes(3))


# A Trainer


def train_a_little(folder: Path, alpha: float, accumulate: int = 1) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What a few steps change in each parameter of a small BERT, and the losses logged."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, num_labels=2, hidden_dropout_prob=0.0))
    model.config.attention_probs_dropout_prob = 0.0
    tokens = classes(48, 8, count=50)
    data = [{"input_ids": row, "labels": int(row[0] % 2)} for row in tokens]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=12 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=ScaledSoftmaxLoss(alpha))
    trainer.train()
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return change, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@every_alpha
def test_a_trainer_takes_it_and_accumulates_right(alpha: float, tmp_path: Path) -> None:
    at_once, losses = train_a_little(tmp_path, alpha)
    in_parts, accumulated = train_a_little(tmp_path, alpha, accumulate=3)
    assert max(float(change.abs().max()) for change in at_once.values()) > 1e-3
    for name, change in at_once.items():
        torch.testing.assert_close(in_parts[name], change, rtol=1e-3, atol=2e-6)
    assert accumulated == pytest.approx(losses, rel=1e-3)
    if alpha == 1:
        assert losses[0] == pytest.approx(math.log(2), abs=0.15)


def test_a_larger_alpha_moves_the_weights_less(tmp_path: Path) -> None:
    def moved(alpha: float) -> float:
        return math.sqrt(sum(float(change.square().sum()) for change in train_a_little(tmp_path, alpha)[0].values()))

    assert moved(15.0) < moved(1.0) / 5


# Eq. 11

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DECAYING: dict[str, tuple[Optimizer, float]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3), 0.0),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.3), 0.0),
    "SGD with momentum": (lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.3, momentum=0.9), 0.9),
}


def decayed(weight: torch.Tensor, optimizer_of: Optimizer, steps: int, shrink: float = 1.0) -> torch.Tensor:
    """A matrix after steps of an optimiser whose gradients are zero; the rate is multiplied by shrink each step."""
    parameter = nn.Parameter(weight.clone())
    optimizer = optimizer_of([parameter])
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= shrink
    return parameter.detach()


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("shrink", [1.0, 0.99], ids=["constant rate", "falling rate"])
def test_decay_alone_rescales_a_matrix_and_its_law(name: str, shrink: float) -> None:
    optimizer_of, momentum = DECAYING[name]
    weight = draws(120, 80)
    after = decayed(weight, optimizer_of, 60, shrink)
    factor = decay_factor([0.01 * shrink**step for step in range(60)], 0.3, momentum)
    assert 0.01 < abs(factor) < 0.9
    torch.testing.assert_close(after, factor * weight, rtol=1e-9, atol=1e-12)
    one, other = svd(weight), svd(after)
    torch.testing.assert_close(other.s, abs(factor) * one.s, rtol=1e-9, atol=0)
    alignment = ((one.u * other.u).sum(0) * (one.vh * other.vh).sum(1)).abs()
    torch.testing.assert_close(alignment, torch.ones_like(alignment), rtol=1e-9, atol=0)
    laws = []
    for matrix, factors in ((weight, one), (after, other)):
        sigma = sigma_of("bulk", factors.s, (120, 80), float(matrix.std()))
        laws.append(MarchenkoPastur(120, 80, sigma))
    assert laws[1].sigma == pytest.approx(abs(factor) * laws[0].sigma, rel=1e-9)
    assert laws[1].distance(other.s) == pytest.approx(laws[0].distance(one.s), rel=1e-6)


def test_decay_of_the_gradient_in_adam_does_not_rescale() -> None:
    """Adam divides the decay by its own size, so that small entries shrink as fast as large ones."""
    weight = draws(120, 80)
    after = decayed(weight, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3), 20)
    ratio = svd(after).s / svd(weight).s
    assert float(ratio.std() / ratio.mean()) > 0.01


def test_decay_factor_is_its_closed_forms() -> None:
    assert decay_factor([], 0.1) == 1
    assert decay_factor([0.2] * 7, 0.0, momentum=0.9) == 1
    assert decay_factor([1e-3] * 1000, 0.1) == pytest.approx((1 - 1e-4) ** 1000, rel=1e-12)
    assert decay_factor([1e-5] * 100_000, 0.5) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert decay_factor([0.1, 0.2, 0.3], 0.5) == pytest.approx(0.95 * 0.9 * 0.85, rel=1e-12)


def test_decay_factor_with_momentum_is_a_power_of_its_matrix() -> None:
    rate, decay, momentum, steps = 0.01, 0.3, 0.9, 137
    step = np.array([[1 - rate * decay, -rate * momentum], [decay, momentum]])  # of (weight, velocity)
    expected = (np.linalg.matrix_power(step, steps) @ [1.0, 0.0])[0]
    assert decay_factor([rate] * steps, decay, momentum) == pytest.approx(expected, rel=1e-10)
    slow = decay_factor([1e-6] * 1_000_000, 0.05, momentum)
    assert slow == pytest.approx(math.exp(-0.05 / (1 - momentum)), rel=1e-4)


@pytest.mark.parametrize(
    ("rates", "decay", "momentum", "message"),
    [
        ([0.1], -1.0, 0.0, "weight_decay is -1.0"),
        ([0.1], math.nan, 0.0, "weight_decay is nan"),
        ([0.1], 0.1, 1.0, "momentum 1.0"),
        ([0.1, -0.2], 0.1, 0.0, "a learning rate is -0.2"),
    ],
)
def test_what_does_not_decay_is_refused(rates: list[float], decay: float, momentum: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decay_factor(rates, decay, momentum)
