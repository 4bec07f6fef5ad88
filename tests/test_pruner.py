"""``SVDPruner``: what is removed is what the decomposition says, and what is undone is back to the bit."""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn

from hf_rmt.config import AnalysisConfig
from hf_rmt.models.checkpoints import Checkpoint
from hf_rmt.models.matrices import WeightMatrix
from hf_rmt.pruner import SVDPruner
from hf_rmt.surgery.description import p_value_profiles, removed_by
from hf_rmt.surgery.editor import Edit, Editor
from hf_rmt.surgery.factors import FactorStore
from hf_rmt.surgery.originals import Originals
from hf_rmt.surgery.request import Request
from hf_rmt.theory.selection import (
    Bottom,
    Bulk,
    Decile,
    Group,
    Mass,
    Outliers,
    Random,
    Rank,
    Selection,
    Significant,
    Top,
)
from tests.conftest import FAMILIES

TOKENS = torch.tensor([[5, 17, 42, 7]])
QUERY = "encoder.layer.0.attention.self.query"
State = dict[str, torch.Tensor]


#: Small models and matrices: threads cost more than they bring.
pytestmark = pytest.mark.usefixtures("one_thread")


def pruner_of(model: nn.Module, **options: Any) -> SVDPruner:
    return SVDPruner(model, **{"workers": 1, "progress": False, **options})


def layers(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ModuleList:
    """Three blocks of a linear layer: tall, wide and square."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(48, 32), nn.Linear(32, 50), nn.Linear(40, 40)])
    with torch.no_grad():
        model[0].weight[:, 3] *= 15
    return model.to(dtype)


def state_of(model: nn.Module) -> State:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype and found[key].shape == expected[key].shape
        pair = (tensor.flatten().contiguous().view(torch.uint8) for tensor in (found[key], expected[key]))
        assert torch.equal(*pair), key


def weights_of(pruner: SVDPruner) -> State:
    return {matrix.name: matrix.read().clone() for matrix in pruner.matrices}


def computed(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


class Reference:
    """A weight and its float64 decomposition by numpy."""

    def __init__(self, weight: torch.Tensor):
        self.dtype = weight.dtype
        self.weight = weight.double().numpy()
        self.u, self.s, self.vh = np.linalg.svd(self.weight, full_matrices=False)

    def without(self, mask: torch.Tensor) -> np.ndarray:
        return (self.u * np.where(mask.numpy(), 0, self.s)) @ self.vh

    def allowed(self, exact: np.ndarray) -> np.ndarray:
        """Half a unit in the last place, and what float32 or float64 makes of so large a singular value."""
        info = torch.finfo(self.dtype)
        work = 1e-12 if self.dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
        return info.eps / 2 * np.abs(exact) + info.smallest_normal * info.eps + work * self.s[0]

    def assert_is(self, found: torch.Tensor, mask: torch.Tensor) -> None:
        exact = self.without(mask)
        assert found.dtype == self.dtype and found.shape == exact.shape
        assert (np.abs(found.double().numpy() - exact) <= self.allowed(exact)).all()


# Every kind of module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, dtype: torch.dtype, make_model) -> None:
    model = make_model(family).to(dtype)
    parameters = {key: (parameter, parameter.requires_grad) for key, parameter in model.named_parameters()}
    before = state_of(model)
    pruner = pruner_of(model, embeddings=True, head=True)
    references = {name: Reference(weight) for name, weight in weights_of(pruner).items()}

    deciles = [Decile(k) for k in range(1, 11)]
    for selections in (deciles, [functools.reduce(operator.or_, deciles)]):
        for selection in selections:
            pruner.remove(selection)
        assert [edit.selection for edit in pruner.edits] == selections
        for name, weight in weights_of(pruner).items():
            assert float(weight.double().norm()) <= 1e-5 * references[name].s[0]
        pruner.restore()
        assert_same_bits(model.state_dict(), before)

    scattered = Decile(2) | Decile(5) | Bottom(1)
    for selection in (scattered, Decile(10), ~scattered):
        with pruner.removed(selection) as edit:
            for name, weight in weights_of(pruner).items():
                references[name].assert_is(weight, edit.masks[name])
        assert_same_bits(model.state_dict(), before)

    for key, (parameter, requires_grad) in parameters.items():
        assert model.get_parameter(key) is parameter and parameter.requires_grad == requires_grad
        assert parameter.grad_fn is None


@pytest.mark.parametrize("family", ["bert_classifier", "gpt2", "mixtral", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ten_removed_parts_add_up(family: str, dtype: torch.dtype, make_model) -> None:
    model = make_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}).to(dtype)
    pruner = pruner_of(model, head=True)
    originals = weights_of(pruner)
    total = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in originals.items()}
    for k in range(1, 11):
        with pruner.removed(Decile(k)):
            for name, weight in weights_of(pruner).items():
                total[name] += originals[name].double() - weight.double()
    for name, weight in originals.items():
        reference = Reference(weight)
        error = np.abs(total[name].numpy() - reference.weight)
        assert error.max() <= 10 * reference.allowed(np.abs(reference.weight).max())


def test_double_precision(make_model) -> None:
    model = make_model("llama", num_hidden_layers=1).double()
    pruner = pruner_of(model)
    references = {name: Reference(weight) for name, weight in weights_of(pruner).items()}
    for selection in (Decile(1), Decile(10), Bulk(), Random(Top(0.3)), ~Rank(5)):
        with pruner.removed(selection) as edit:
            for name, weight in weights_of(pruner).items():
                error = np.abs(weight.numpy() - references[name].without(edit.masks[name])).max()
                assert error <= 1e-12 * references[name].s[0]


def test_what_is_tied_stays_tied(make_model) -> None:
    model = make_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    before = state_of(model)
    pruner = pruner_of(model, embeddings=True, head=True)
    pruner.remove(Decile(1), roles="embed_tokens")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    pruner.restore()
    assert_same_bits(model.state_dict(), before)


def test_embeddings_and_heads_are_left_alone_unless_asked_for(make_model) -> None:
    model = make_model("llama", num_hidden_layers=1)
    before = state_of(model)
    pruner_of(model).remove(Decile(1))
    after = model.state_dict()
    untouched = [key for key in before if torch.equal(before[key], after[key])]
    assert [key for key in untouched if "norm" not in key] == ["model.embed_tokens.weight", "lm_head.weight"]
    edit = pruner_of(model, embeddings=True, head=True).remove(Decile(2), roles="all")
    assert {"embed_tokens", "lm_head"} < set(edit.names)


# Laws


def _all_ways(pruner: SVDPruner, *orders: tuple[Selection, ...]) -> list[State]:
    found = []
    for order in orders:
        for selection in order:
            pruner.remove(selection)
        found.append(weights_of(pruner))
        pruner.restore()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_compose_like_sets(dtype: torch.dtype) -> None:
    """To the bit: in any order, one by one or as a union, with overlaps, and taken twice."""
    pruner = pruner_of(layers(dtype))
    a, b, c = Decile(2) | Rank(7), Bottom(9), Random(Top(0.2), 3)
    ways = _all_ways(
        pruner,
        (a, b, c),
        (c, a, b),
        (b, c, a),
        (a | b | c,),
        (a, b | c),
        (a, a, b, c, b),
        (a & ~b, b, c),
        (~(~a & ~b & ~c),),
    )
    for way in ways[1:]:
        assert_same_bits(way, ways[0])
    keeps = [pruner.remove(keep=keep) for keep in (~a, ~b, ~c)]  # what several keep is their intersection
    assert_same_bits(weights_of(pruner), ways[0])
    assert [edit.selection for edit in keeps] == [a, b, c]
    pruner.restore()
    union = _all_ways(pruner, tuple(Decile(k) for k in range(1, 11)), (Top(1.0),), (Decile(1), ~Decile(1)))
    for way in union:
        assert all(not weight.any() for weight in way.values())


def test_edits_are_undone_in_any_order() -> None:
    model = layers(torch.bfloat16)
    before = state_of(model)
    pruner = pruner_of(model)
    selections = [Decile(1), Rank(6), Bottom(4), Random(Top(8))]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        edits = [pruner.remove(selection) for selection in selections]
        left = list(selections)
        for number in order:
            pruner.undo(edits[number])
            left.remove(selections[number])
            assert [edit.selection for edit in pruner.edits] == left
            now = weights_of(pruner)
            other = pruner_of(layers(torch.bfloat16))
            for selection in left:
                other.remove(selection)
            assert_same_bits(now, weights_of(other))
        assert_same_bits(model.state_dict(), before)


def test_removed_and_kept_add_up() -> None:
    pruner = pruner_of(layers(torch.float64))
    originals = weights_of(pruner)
    for selection in (Decile(3), Rank(11), Mass(0.5), Outliers(), Random(Bottom(0.4))):
        with pruner.removed(selection):
            left = weights_of(pruner)
        with pruner.removed(keep=selection):
            kept = weights_of(pruner)
        for name, weight in originals.items():
            torch.testing.assert_close(left[name] + kept[name], weight, rtol=0, atol=1e-14 * float(weight.norm()))


def test_a_kept_rank_is_the_best_approximation() -> None:
    pruner = pruner_of(layers(torch.float64))
    references = {name: Reference(weight) for name, weight in weights_of(pruner).items()}
    for rank in (1, 5, 20):
        with pruner.removed(keep=Rank(rank)) as edit:
            assert edit.selection == ~Rank(rank)
            for name, weight in weights_of(pruner).items():
                error = references[name].weight - weight.numpy()
                assert np.linalg.norm(error) == pytest.approx(math.hypot(*references[name].s[rank:]), rel=1e-11)
                assert np.linalg.norm(error, 2) == pytest.approx(references[name].s[rank], rel=1e-9)


def test_a_model_computes_with_what_is_left(make_model) -> None:
    model, reference = make_model("gpt2"), make_model("gpt2")
    before = computed(model)
    with pruner_of(model).removed(Decile(1), roles=["query", "output"]):
        changed = computed(model)
        for block in reference.transformer.h:
            for layer, columns in ((block.attn.c_attn, slice(0, 64)), (block.mlp.c_proj, slice(None))):
                u, s, vh = torch.linalg.svd(layer.weight.data[:, columns].double(), full_matrices=False)
                s[: -(-64 // 10)] = 0
                layer.weight.data[:, columns] = (u * s @ vh).float()
        torch.testing.assert_close(changed, computed(reference), rtol=1e-4, atol=1e-5)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(computed(model), before)


# For a while


def test_removed_nests() -> None:
    model = layers()
    before = state_of(model)
    pruner = pruner_of(model)
    with pruner.removed(Decile(1)) as outer:
        inside = state_of(model)
        with pruner.removed(Decile(10), blocks=1) as inner, pruner.removed(keep=Bulk(), blocks=0):
            assert pruner.edits[:2] == (outer, inner) and len(pruner.edits) == 3
        assert_same_bits(model.state_dict(), inside)
        assert pruner.edits == (outer,)
    assert_same_bits(model.state_dict(), before)
    assert pruner.edits == ()


def test_contexts_that_end_in_another_order() -> None:
    model = layers(torch.float16)
    before = state_of(model)
    pruner = pruner_of(model)
    first, second = ExitStack(), ExitStack()
    first.enter_context(pruner.removed(Decile(1)))
    second.enter_context(pruner.removed(Decile(2)))
    first.close()
    alone = weights_of(pruner)
    second.close()
    assert_same_bits(model.state_dict(), before)
    pruner.remove(Decile(2))
    assert_same_bits(weights_of(pruner), alone)


@pytest.mark.parametrize("error", [RuntimeError("evaluation failed"), KeyboardInterrupt()])
def test_an_exception_while_removed(error: BaseException) -> None:
    model = layers(torch.bfloat16)
    pruner = pruner_of(model)
    kept = pruner.remove(Decile(3))
    before = state_of(model)
    with pytest.raises(type(error)), pruner.removed(Decile(1)), pruner.removed(Decile(2)):
        raise error
    assert_same_bits(model.state_dict(), before)
    assert pruner.edits == (kept,)


def test_undone_by_the_body() -> None:
    model = layers()
    before = state_of(model)
    pruner = pruner_of(model)
    with pruner.removed(Decile(1)) as edit:
        pruner.undo(edit)
        assert_same_bits(model.state_dict(), before)
    with pruner.removed(Decile(1)):
        pruner.restore()
    with pruner.removed(Decile(1)):
        pruner.restore()
        kept = pruner.remove(Decile(1))
    assert pruner.edits == (kept,)


# Interrupted


def _fail_at(monkeypatch: pytest.MonkeyPatch, calls: set[int], moment: str, error: BaseException) -> list[int]:
    """Make some calls of ``WeightMatrix.write`` fail: before they write, half-way, or when they have."""
    write, made = WeightMatrix.write, [0]

    def failing(matrix: WeightMatrix, values: torch.Tensor) -> None:
        made[0] += 1
        if made[0] not in calls:
            write(matrix, values)
            return
        if moment == "half":
            values = torch.cat([values[: len(values) // 2], matrix.read()[len(values) // 2 :]])
        if moment != "before":
            write(matrix, values)
        raise error

    monkeypatch.setattr(WeightMatrix, "write", failing)
    return made


ACTIONS: dict[str, Callable[[SVDPruner], object]] = {
    "remove": lambda pruner: pruner.remove(Decile(4)),
    "removed": lambda pruner: pruner.removed(Decile(4)).__enter__(),
    "remove elsewhere too": lambda pruner: pruner.remove(keep=Decile(1)),
    "undo": lambda pruner: pruner.undo(pruner.edits[0]),
    "undo the other": lambda pruner: pruner.undo(pruner.edits[1]),
    "restore": lambda pruner: pruner.restore(),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_failure_while_weights_are_written(
    action: str, moment: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(torch.bfloat16)
    original = state_of(model)
    pruner = pruner_of(model, folder=tmp_path if kept else None)
    edits = (pruner.remove(Decile(1) | Decile(9)), pruner.remove(Decile(2), blocks=[0, 2]))
    before, table = state_of(model), pruner.affected()
    failures = 0
    for number in (1, 2, 3):
        with monkeypatch.context() as patch:
            made = _fail_at(patch, {number}, moment, KeyboardInterrupt())
            try:
                ACTIONS[action](pruner)
            except KeyboardInterrupt:
                failures += 1
        if made[0] < number:  # fewer matrices are touched
            break
        assert_same_bits(model.state_dict(), before)
        assert pruner.edits == edits
        pd.testing.assert_frame_equal(pruner.affected(), table)
        with pruner.removed(Bottom(3)):
            pass
        assert_same_bits(model.state_dict(), before)
    assert failures == (2 if action == "undo the other" else 3)
    pruner.restore()
    assert_same_bits(model.state_dict(), original)
    assert pruner.edits == () and not pruner.editor.originals.kept and not pruner.editor.written


def test_a_first_removal_that_fails() -> None:
    """Where nothing was edited before, nothing is kept afterwards."""
    model = layers()
    before = state_of(model)
    pruner = pruner_of(model)
    for number in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            _fail_at(patch, {number}, "half", RuntimeError("out of memory"))
            with pytest.raises(RuntimeError, match="out of memory"):
                pruner.remove(Decile(4))
        assert_same_bits(model.state_dict(), before)
        assert pruner.edits == () and not pruner.editor.originals.kept and not pruner.editor.written
    pruner.restore()
    pruner.remove(Decile(4))


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_failure_while_a_failure_is_made_good(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C twice: the weights are neither here nor there, and the originals are not lost."""
    for number in (2, 3):
        model = layers()
        before = state_of(model)
        pruner = pruner_of(model)
        with monkeypatch.context() as patch:
            _fail_at(patch, {number, number + 1}, moment, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pruner.remove(Decile(4))
        assert pruner.edits == ()
        if moment == "before":  # each weight is one or the other, and known
            pruner.restore()
        else:
            with pytest.raises(ValueError, match=r"restore\(discard_changes=True\)"):
                pruner.restore()
            pruner.restore(discard_changes=True)
        assert_same_bits(model.state_dict(), before)
        assert not pruner.editor.originals.kept
        pruner.remove(Decile(4))
        pruner.restore()
        assert_same_bits(model.state_dict(), before)


# Changed behind the pruner's back


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(parameter.float().square().sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()


def _set_data(model: Any) -> None:
    model[1].weight.data[0, 0] += 1


def _put_another(model: Any) -> None:
    model[1].weight = nn.Parameter(torch.randn_like(model[1].weight))


CHANGES: dict[str, Callable[[Any], object]] = {
    "optimizer step": _step,
    "data": _set_data,
    "another parameter": _put_another,
    "another pruner": lambda model: pruner_of(model).remove(Decile(5)),
    "load_state_dict": lambda model: model.load_state_dict(layers(seed=1).state_dict()),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_of_edited_weights_are_noticed(kind: str) -> None:
    model = layers()
    original = state_of(model)
    pruner = pruner_of(model)
    edit = pruner.remove(Decile(1))
    CHANGES[kind](model)
    changed = state_of(model)
    message = (
        r"[01](, 1, 2)? changed since they were edited, by training or another edit: restore\(discard_changes=True\)"
    )
    for refused in (
        lambda: pruner.remove(Decile(2)),
        lambda: pruner.remove(Decile(1)),
        lambda: pruner.undo(edit),
        pruner.restore,
        lambda: pruner.removed(Decile(3)).__enter__(),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
        assert_same_bits(model.state_dict(), changed)
        assert pruner.edits == (edit,)
    pruner.restore(discard_changes=True)
    weights = [key for key in original if key.endswith("weight")]
    assert_same_bits({key: model.state_dict()[key] for key in weights}, {key: original[key] for key in weights})
    assert pruner.edits == ()
    pruner.remove(Decile(2))


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_of_factored_weights_are_noticed(kind: str) -> None:
    """The factors are of other weights then."""
    model = layers()
    pruner = pruner_of(model)
    with pruner.removed(Decile(1)):
        pass
    CHANGES[kind](model)
    changed = state_of(model)
    with pytest.raises(
        ValueError, match=r"[01].* changed since they were factored: make a new SVDPruner of the model as"
    ):
        pruner.remove(Decile(1))
    assert_same_bits(model.state_dict(), changed)
    pruner_of(model).remove(Decile(1))


def test_what_changed_elsewhere_does_not_matter() -> None:
    model = layers()
    pruner = pruner_of(model)
    pruner.remove(Decile(1))
    with pytest.raises(ValueError, match=r"^1 changed"):
        _set_data(model)
        pruner.remove(Decile(2))
    edit = pruner.remove(Decile(2), blocks=[0, 2])
    pruner.undo(edit)
    model[0].bias.data += 1
    pruner.remove(Decile(3), blocks=0)


def test_an_exception_after_training_while_removed() -> None:
    """What was learned is not thrown away without a word."""
    model = layers()
    before = state_of(model)
    pruner = pruner_of(model)
    with pytest.raises(ValueError, match="changed since they were edited") as caught, pruner.removed(Decile(1)):
        _set_data(model)
        raise RuntimeError("in training")
    assert isinstance(caught.value.__context__, RuntimeError) and len(pruner.edits) == 1
    pruner.restore(discard_changes=True)
    assert_same_bits(model.state_dict(), before)


def test_two_pruners_one_after_the_other() -> None:
    model = layers()
    before = state_of(model)
    one, two = pruner_of(model), pruner_of(model)
    with one.removed(Decile(1)):
        inside = state_of(model)
        with two.removed(Decile(10)):
            pass
        assert_same_bits(model.state_dict(), inside)
    assert_same_bits(model.state_dict(), before)


# What cannot be done


def _refused(pruner: SVDPruner, message: str, **call: Any) -> None:
    before = weights_of(pruner)
    with pytest.raises(ValueError, match=message):
        pruner.remove(**{"selection": Decile(1), **call})
    assert_same_bits(weights_of(pruner), before)
    assert pruner.edits == () and not pruner.editor.originals.kept


def test_values_that_are_not_finite() -> None:
    for value, index in ((math.nan, 1), (math.inf, 2), (-math.inf, 0)):
        model = layers()
        with torch.no_grad():
            model[index].weight[3, 4] = value
        pruner = pruner_of(model)
        _refused(
            pruner, f"^{index}: the matrix has NaN or Inf entries; repair the weights, or leave it out by its role"
        )
        others = [block for block in range(3) if block != index]
        assert len(pruner.remove(Decile(1), blocks=others).names) == 2


def test_roles_and_blocks_that_there_are_not(make_model) -> None:
    pruner = pruner_of(make_model("bert"))
    _refused(pruner, "no role or name matches 'keys'; the roles are attention.output, intermediate, key,", roles="keys")
    _refused(pruner, "no role or name matches 'keys'", roles=["query", "keys"])
    _refused(pruner, r"no block \[7\]; the blocks are 0 to 1", blocks=[0, 7])
    _refused(
        pruner,
        r"no matrix has both a role in \('pooler.dense',\) and a block in \(1,\)",
        roles="pooler.dense",
        blocks=1,
    )
    _refused(pruner, "no matrix has both", roles=[])
    _refused(pruner, "no matrix has both", blocks=[])


def test_selections_that_are_none() -> None:
    pruner = pruner_of(layers())
    for arguments in ({}, {"selection": Decile(1), "keep": Decile(2)}):
        with pytest.raises(TypeError, match="give one of a selection to remove and keep="):
            pruner.remove(**arguments)
    for wrong in ("decile:1", 3, Decile):
        for name in ("selection", "keep"):
            with pytest.raises(
                TypeError, match=r"is no selection, as Decile\(10\) is one; parse_selection reads its name"
            ):
                pruner.remove(**{name: wrong})
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"decile:{k}: groups are numbered from 1"):
            pruner.remove(Decile(k))
    assert pruner.edits == ()


def test_more_components_than_a_matrix_has() -> None:
    pruner = pruner_of(layers())
    for selection in (Rank(33), Top(33), Bottom(33), Decile(1) | Rank(33)):
        _refused(pruner, r"33: 0 of shape \(32, 48\) has 32 singular values", selection=selection)
    assert pruner.remove(Rank(33), blocks=2).names == ["2"]


def test_edits_that_are_not_in_place() -> None:
    pruner, other = pruner_of(layers()), pruner_of(layers())
    edit = pruner.remove(Decile(1))
    with pytest.raises(ValueError, match="decile:1 of all matrices is not in place: it was undone, or made by another"):
        other.undo(edit)
    pruner.undo(edit)
    with pytest.raises(ValueError, match="is not in place"):
        pruner.undo(edit)
    pruner.restore()


def test_weights_that_are_not_in_memory(make_model, tmp_path: Path) -> None:
    make_model("bert", num_hidden_layers=1).save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    matrices = Checkpoint(tmp_path).matrices()
    editor = Editor(matrices, FactorStore(matrices, AnalysisConfig(workers=1), None, None), Originals(None))
    with pytest.raises(ValueError, match=r"is read from a file.* load the model and change that"):
        editor.add(Request(Decile(1)))
    assert not editor.store.known and not editor.edits
    with pytest.raises(TypeError, match="takes a model, not"):
        SVDPruner(str(tmp_path))  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    with torch.device("meta"):
        empty = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"weight is on the meta device and has no values to change: load the weights"):
        pruner_of(empty).remove(Decile(1))


def test_active_adapters(make_model) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model("bert", num_hidden_layers=1), LoraConfig(r=4, target_modules=["query"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    before = state_of(adapted)
    pruner = pruner_of(adapted)
    _refused(pruner, rf"{QUERY}\.base_layer\.weight is read together with its adapters.*merge_and_unload")
    pruner.remove(Decile(1), roles="key")
    pruner.restore()
    assert_same_bits(adapted.state_dict(), before)
    merged = adapted.merge_and_unload()
    pruner_of(merged).remove(Decile(1), roles="query")
    with pytest.raises(TypeError, match="there is no option adapters"):
        SVDPruner(adapted, adapters=False)


def test_a_model_without_matrices() -> None:
    with pytest.raises(ValueError, match="has no weight matrix"):
        SVDPruner(nn.LayerNorm(3))


# What is said


def test_edits(make_model) -> None:
    model = make_model("bert")
    pruner = pruner_of(model)
    edit = pruner.remove(Decile(10), roles="intermediate")
    assert (edit.roles, edit.blocks, str(edit)) == (("intermediate",), None, "decile:10 of intermediate")
    assert edit.names == [f"encoder.layer.{block}.intermediate.dense" for block in (0, 1)]
    assert [int(mask.sum()) for mask in edit.masks.values()] == [6, 6]
    assert str(pruner.remove(Decile(1), roles="all")) == "decile:1 of all matrices"
    other = pruner.remove(keep=Bulk(), roles=["query", "k*"], blocks=range(1, 2))
    assert str(other) == "not bulk of query, k* in blocks 1" and other.blocks == (1,)
    assert other.names == [f"encoder.layer.1.attention.self.{role}" for role in ("query", "key")]
    assert pruner.remove(Decile(3), roles=QUERY).names == [QUERY]
    for blocks in (1, np.int64(1), [1], {1}, np.array([1])):
        edit = pruner.remove(Decile(4), blocks=blocks)  # type: ignore[arg-type]
        assert edit.blocks == (1,) and type(edit.blocks[0]) is int and len(edit.names) == 6
    assert len(pruner.edits) == 9 and all(isinstance(edit, Edit) for edit in pruner.edits)
    assert repr(pruner).startswith(
        "SVDPruner('BertModel', 13 matrices, removed: decile:10 of intermediate; decile:1 of a"
    )
    pruner.restore()
    assert repr(pruner) == "SVDPruner('BertModel', 13 matrices, removed: nothing)"


def test_nothing_and_everything_are_allowed_and_said() -> None:
    model = layers()
    before = state_of(model)
    pruner = pruner_of(model)
    nothing = pruner.remove(Outliers("above", sigma=1e3))
    assert nothing.empty == ["0", "1", "2"] and nothing.whole == [] and nothing.names == ["0", "1", "2"]
    assert_same_bits(model.state_dict(), before)
    assert pruner.edits == (nothing,)
    everything = pruner.remove(Rank(32), blocks=[0, 1])
    assert everything.whole == ["0", "1"] and everything.empty == []
    assert not model[0].weight.any() and not model[1].weight.any()
    some = pruner.remove(Top(3), blocks=2)
    assert some.whole == some.empty == []
    pruner.undo(nothing)
    pruner.restore()
    assert_same_bits(model.state_dict(), before)


def test_fewer_components_than_groups() -> None:
    model = nn.ModuleList([nn.Linear(64, 2), nn.Linear(64, 1), nn.Linear(1, 1)])
    pruner = pruner_of(model)
    edits = [pruner.remove(Decile(k)) for k in range(1, 11)]
    assert edits[0].empty == [] and edits[0].whole == ["1", "2"]
    assert edits[1].empty == ["1", "2"]
    assert all(edit.empty == ["0", "1", "2"] for edit in edits[2:])
    assert all(not layer.weight.any() for layer in model)
    pruner.undo(edits[1])
    assert np.linalg.matrix_rank(model[0].weight.detach().numpy()) == 1
    assert pruner.remove(Group(3, 3), blocks=0).empty == ["0"]


def test_what_is_affected(make_model) -> None:
    model = make_model("bert")
    pruner = pruner_of(model)
    columns = ["name", "role", "block", "removed", "of", "mass", "energy", "parameters"]
    assert list(pruner.affected().columns) == columns and len(pruner.affected()) == 0
    references = {name: Reference(weight) for name, weight in weights_of(pruner).items()}
    pruner.remove(Decile(1), roles=["output", "pooler.dense"])
    pruner.remove(Rank(10), roles="output", blocks=1)
    pruner.remove(Outliers(sigma=1e3, rate=None, side="above"), roles="key", blocks=0)
    table = pruner.affected()
    assert list(table.columns) == columns
    assert list(table.name) == [
        "encoder.layer.0.attention.self.key",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.output.dense",
        "pooler.dense",
    ]
    assert list(table.role) == ["key", "output", "output", "pooler.dense"]
    assert table.block.tolist() == [0, 0, 1, pd.NA] and str(table.block.dtype) == "Int64"
    assert table.removed.tolist() == [0, 7, 10, 7] and table.of.tolist() == [64] * 4
    assert table.parameters.tolist() == [64 * 64, 64 * 128, 64 * 128, 64 * 64]
    for name, removed, mass, energy in zip(table.name, table.removed, table.mass, table.energy, strict=True):
        s = references[name].s
        assert mass == pytest.approx(s[:removed].sum() / s.sum(), rel=1e-9)
        assert energy == pytest.approx((s[:removed] ** 2).sum() / (s**2).sum(), rel=1e-9)
    pruner.restore()
    assert len(pruner.affected()) == 0


def test_what_one_edit_has_removed() -> None:
    pruner = pruner_of(layers())
    pruner.remove(Decile(2))
    edit = pruner.remove(Decile(1) | Decile(10), blocks=[0, 1])
    found = removed_by(edit, pruner.editor)
    store = pruner.editor.store
    masks = [edit.masks[name] for name in ("0", "1")]
    assert found["components"] == sum(int(mask.sum()) for mask in masks) and found["matrices"] == 2
    assert found["of"] == 64
    shares = [float(store[i].s[mask].sum() / store[i].s.sum()) for i, mask in enumerate(masks)]
    assert found["mass"] == pytest.approx(sum(shares) / 2)
    for side in ("right", "left"):
        p = torch.cat([store[i].test(side).p_values[mask] for i, mask in enumerate(masks)])
        assert found[f"p_{side}"] == pytest.approx(float(p.nanmean()))
    assert set(found) == {"components", "of", "matrices", "mass", "p_right", "p_left"}
    empty = removed_by(pruner.remove(Outliers("above", 1e3)), pruner.editor)
    assert empty == {"components": 0.0, "of": 104.0, "matrices": 3.0, "mass": 0.0}


def test_profiles_of_p_values(make_model) -> None:
    pruner = pruner_of(make_model("bert"))
    pruner.remove(Significant(), roles=["query", "output"])
    profiles = p_value_profiles(pruner.editor.store)
    assert set(profiles) == {"query", "output"}
    rows = [
        store.test("right").p_values for store in pruner.editor.store.known.values() if store.name.endswith("query")
    ]
    assert len(rows) == 2
    torch.testing.assert_close(profiles["query"], torch.stack(rows).nanmean(0), equal_nan=True)


# Where originals are


@pytest.mark.skipif(os.name == "nt", reason="Windows does not remove what is mapped")
def test_originals_in_a_folder(tmp_path: Path) -> None:
    """They take the disk and leave no file, so that nothing stays if the process is killed."""
    model = layers(torch.bfloat16)
    before = state_of(model)
    one, two = (pruner_of(model, folder=tmp_path) for _ in range(2))
    one.remove(Decile(1))
    one.remove(Decile(2), blocks=0)
    two.remove(Decile(3), blocks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["factors"]
    two.restore()
    one.undo(one.edits[0])
    one.restore()
    assert_same_bits(model.state_dict(), before)
    assert not one.editor.originals.kept and len(list((tmp_path / "factors").iterdir())) == 3


@pytest.mark.parametrize("kept", [False, True])
def test_originals_are_copies(kept: bool, tmp_path: Path) -> None:
    """Of what is read, which may be a view of the model."""
    model = layers()
    originals = Originals(tmp_path / "new" if kept else None)
    originals.keep(0, model[0].weight)
    originals.keep(1, model[1].weight.T)
    expected = [model[0].weight.detach().clone(), model[1].weight.detach().T.clone()]
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.zero_()
    assert all(torch.equal(originals[index], expected[index]) for index in (0, 1))
    originals.drop(0)
    assert 0 not in originals and 1 in originals


def test_a_folder_changes_no_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        found = []
        for folder in (None, tmp_path, tmp_path):
            pruner = pruner_of(layers(dtype), folder=folder)
            pruner.remove(Decile(2) | Outliers())
            found.append(weights_of(pruner))
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])


def test_settings(tmp_path: Path) -> None:
    config = AnalysisConfig(workers=1, progress=False, null_draws=200, seed=4)
    pruner = SVDPruner(layers(), config=config, seed=5, device="cpu")
    pruner.remove(Significant(0.1))
    p = pruner.editor.store[0].test("right").p_values
    torch.testing.assert_close(p * 201, (p * 201).round(), rtol=0, atol=1e-9, equal_nan=True)
    assert pruner.editor.store.config == AnalysisConfig(workers=1, progress=False, null_draws=200, seed=5, device="cpu")
    with pytest.raises(TypeError, match="there is no option worker; there are sides,"):
        SVDPruner(layers(), worker=2)
    assert_same_bits(
        weights_of(_after(pruner_of(layers(), workers=2), Decile(1))),
        weights_of(_after(pruner_of(layers()), Decile(1))),
    )


def _after(pruner: SVDPruner, selection: Selection) -> SVDPruner:
    pruner.remove(selection)
    return pruner


# Offloaded, wrapped, sharded


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_offloaded_models(kind: str, family: str, make_model, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    layer = {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}
    reference, model = make_model(family, **layer), make_model(family, **layer)
    if kind == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path / "offloaded"), execution_device="cpu")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pruner, expected = pruner_of(model, folder=tmp_path / "pruner"), pruner_of(reference)
    before, output = weights_of(pruner), computed(model)
    assert_same_bits(before, weights_of(expected))
    for one in (pruner, expected):
        one.remove(Decile(1) | Decile(8))
        one.remove(Outliers(), roles="output")
    assert_same_bits(weights_of(pruner), weights_of(expected))
    edited = computed(model)
    torch.testing.assert_close(edited, computed(reference))
    assert (edited - output).abs().max() > 1e-3
    pruner.restore()
    assert_same_bits(weights_of(pruner), before)
    assert torch.equal(computed(model), output)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models(wrap: Callable[[Any], Any], make_model) -> None:
    model = make_model("bert", num_hidden_layers=1)
    before = state_of(model)
    pruner = pruner_of(wrap(model))
    with pruner.removed(Decile(1)) as edit:
        assert QUERY in edit.names
        assert not torch.equal(model.encoder.layer[0].attention.self.query.weight, before[f"{QUERY}.weight"])
    assert_same_bits(model.state_dict(), before)


def _remove_sharded(model: Any, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    reference = copy.deepcopy(model)
    for block in model.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    expected, output = pruner_of(reference), computed(model)
    for kept in (None, folder):
        pruner = pruner_of(model, folder=kept)
        before = weights_of(pruner)
        assert_same_bits(before, weights_of(expected))
        edits = [one.remove(Decile(1) | Decile(8)) for one in (pruner, expected)]
        with pruner.removed(Outliers(), roles="query"), expected.removed(Outliers(), roles="query"):
            assert_same_bits(weights_of(pruner), weights_of(expected))
            torch.testing.assert_close(computed(model), computed(reference))
        pruner.undo(edits[0])
        expected.undo(edits[1])
        assert_same_bits(weights_of(pruner), before)
        assert torch.equal(computed(model), output)
    with torch.no_grad():
        model.reshard()
        pruner.remove(Decile(1))
        model.encoder.layer[0].attention.self.query.weight.mul_(2)  # every process its share
    with pytest.raises(ValueError, match="query changed since they were edited"):
        pruner.restore()
    pruner.restore(discard_changes=True)
    assert_same_bits(weights_of(pruner), before)


def test_sharded_models(make_model, tmp_path: Path, launch: Callable[..., None]) -> None:
    """FSDP2 over two processes, which factor each for itself and share the folder."""
    model = make_model("bert")
    launch(_remove_sharded, model, tmp_path)
    assert not list((tmp_path / "factors").glob("*.part"))


# Saved


@pytest.mark.parametrize("family", ["bert_classifier", "gpt2", "mixtral", "t5"])
def test_transformers_saves_and_loads_what_is_left(family: str, make_model, tmp_path: Path) -> None:
    model = make_model(family)
    pruner = pruner_of(model)
    pruner.remove(Decile(1) | Bottom(3))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = {"decoder_input_ids": TOKENS} if family == "t5" else {}
    with torch.no_grad():
        logits = [each(TOKENS, **inputs).logits for each in (model, loaded, make_model(family))]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])
    assert_same_bits(loaded.state_dict(), model.state_dict())


def test_gradients_flow_to_what_is_left(make_model) -> None:
    """Edits leave no trace in autograd, and a model prunes while gradients are on or off."""
    model = make_model("bert", num_hidden_layers=1)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            pruner = pruner_of(model)
            pruner.remove(Decile(1))
        model(TOKENS)[0].sum().backward()
        parameter = model.encoder.layer[0].output.dense.weight
        assert parameter.is_leaf and parameter.grad is not None and bool(parameter.grad.any())
        pruner.restore()
