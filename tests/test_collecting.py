"""A model over data: passes, restarts, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_rmt import RMTAnalyzer
from hf_rmt.models import moment_sums
from hf_rmt.models.moment_sums import MomentSum
from hf_rmt.reports import unfinished
from hf_rmt.reports.covariances import ActivationCovariances
from hf_rmt.theory.covariance import Moments

Batch = dict[str, torch.Tensor]
BATCHES = 5
#: Of the bert of the tests: sums of 64 features, and one of 128.
SMALL, LARGE = MomentSum.bytes_for(64, torch.float64), MomentSum.bytes_for(128, torch.float64)


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def model(make_model) -> nn.Module:
    return make_model("bert").double()


@pytest.fixture
def batches() -> list[Batch]:
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    return [{"input_ids": torch.randint(1, 99, (2, 6)), "attention_mask": mask} for _ in range(BATCHES)]


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is done after every batch."""
    monkeypatch.setattr(unfinished, "KEEP_EVERY", -1.0)


def collect(model: nn.Module, data: Any, **options: Any) -> ActivationCovariances:
    return RMTAnalyzer(model).collect(data, progress=False, **options)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


def assert_same(a: ActivationCovariances, b: ActivationCovariances, tolerance: float = 1e-12) -> None:
    assert list(a) == list(b)
    for name in a:
        sides = [(a[name], b[name])]
        if (mine := a.output(name)) is not None and (theirs := b.output(name)) is not None:
            sides.append((mine, theirs))
        for mine, theirs in sides:
            assert mine.tokens == theirs.tokens, name
            scale = float(theirs.outer.abs().max())
            assert float((mine.outer - theirs.outer).abs().max()) <= tolerance * scale, name
            torch.testing.assert_close(mine.total, theirs.total, rtol=1e-9, atol=1e-9)


def assert_same_bits(a: ActivationCovariances, b: ActivationCovariances) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].outer, b[name].outer) and torch.equal(a[name].total, b[name].total), name
        assert (a[name].tokens, a[name].eps) == (b[name].tokens, b[name].eps), name


class Counting:
    """Counts the forward passes of a model over whole batches; the probe has one sequence."""

    def __init__(self, model: nn.Module):
        self.calls = 0
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls += len(kwargs["input_ids"]) > 1


class Dying:
    """Batches that stop with an error before one of them, as often as told."""

    def __init__(self, batches: list[Batch], at: int, times: int = 1):
        self.batches, self.at, self.times = batches, at, times

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            if number == self.at and self.times:
                self.times -= 1
                raise KeyboardInterrupt
            yield batch


# What comes out


def test_settings_say_what_was_collected(model: nn.Module, batches: list[Batch]) -> None:
    found = collect(model, batches)
    assert found.settings == {
        "centred": False,
        "model": "BertModel",
        "revision": None,
        "tokens": BATCHES * 10,
        "batches": BATCHES,
        "silent": [],
        "data": [""],
        "outputs": False,
        "dropout": False,
        "processes": 1,
        "stream": None,
    }
    assert found.output("pooler.dense") is None
    assert len(found.to_pandas()) == 2 * 4 + 1


def test_roles_and_blocks_choose_what_is_collected(model: nn.Module, batches: list[Batch]) -> None:
    found = collect(model, batches, roles=["query", "intermediate"], blocks=1)
    assert list(found) == ["encoder.layer.1.attention.self.query", "encoder.layer.1.intermediate.dense"]
    assert_same(collect(model, batches, roles=["query", "intermediate"], blocks=1, memory=SMALL), found)


def test_covariances_of_two_data_sets_add_up(model: nn.Module, batches: list[Batch]) -> None:
    assert_same(collect(model, batches[:2]) + collect(model, batches[2:]), collect(model, batches))


def test_they_fit_the_analysis_of_the_same_model(model: nn.Module, batches: list[Batch], make_model) -> None:
    found = collect(model, batches, outputs=True)
    report = RMTAnalyzer(model).analyze(covariances=found, roles="query", progress=False)
    row = report["encoder.layer.0.attention.self.query"].row
    assert row["activation_tokens"] == BATCHES * 10 and row["overlap_bulk"] is not None
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.mul_(2)
    with pytest.raises(ValueError, match="collected with other weights"):
        RMTAnalyzer(model).analyze(covariances=found, roles="query", progress=False)
    with pytest.raises(ValueError, match="the covariances are of another model"):
        RMTAnalyzer(make_model("llama")).analyze(covariances=found, progress=False)


def test_fewer_tokens_than_dimensions(model: nn.Module, batches: list[Batch]) -> None:
    """The rank is reported, and directions without data have no part in the overlaps."""
    found = collect(model, batches[:1], roles="query", blocks=0)
    report = RMTAnalyzer(model).analyze(covariances=found, roles="query", blocks=0, progress=False)
    (result,) = report.values()
    assert result.row["activation_tokens"] == 10 and result.row["activation_rank"] == 10
    basis = found["encoder.layer.0.attention.self.query"].eigenbasis()
    weight = model.encoder.layer[0].attention.self.query.weight.detach()
    vectors = torch.linalg.svd(weight)[2]
    expected = (vectors @ basis.vectors[:10].mT).abs().amax(1)
    assert result.right_overlap is not None
    torch.testing.assert_close(result.right_overlap.values, expected, rtol=1e-6, atol=1e-6)


def test_texts_go_through_the_tokenizer(make_model) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    texts = ["a b c", "d", "e f", "g h a b c"]
    model = make_model("llama").double()
    found = collect(model, texts, tokenizer=tokenizer, batch_size=3)
    alone = [{"input_ids": torch.tensor([[words[word] for word in text.split()]])} for text in texts]
    assert_same(found, collect(model, alone))
    assert collect(model, texts, tokenizer=tokenizer, max_length=2).settings["tokens"] == 7
    t5 = make_model("t5", decoder_start_token_id=0).double()
    pairs = collect(t5, texts, tokenizer=tokenizer, batch_size=2)
    assert {moments.tokens for moments in pairs.values()} == {11}


# Passes


@pytest.mark.parametrize(
    ("memory", "passes"), [(10 * LARGE, 1), (LARGE + 4 * SMALL, 2), (LARGE + SMALL, 4), (LARGE, 5), (1.0 * LARGE, 5)]
)
@pytest.mark.parametrize("outputs", [False, True])
def test_less_memory_takes_more_passes(
    memory: float, passes: int, outputs: bool, model: nn.Module, batches: list[Batch]
) -> None:
    whole = collect(model, batches, outputs=outputs)
    counting = Counting(model)
    found = collect(model, batches, outputs=outputs, memory=memory)
    if not outputs:
        assert counting.calls == passes * BATCHES
    assert counting.calls % BATCHES == 0
    assert_same(found, whole)
    assert found.settings == whole.settings and hooks_of(model) == 1


def test_the_bar_says_which_pass(model: nn.Module, batches: list[Batch], monkeypatch) -> None:
    import contextlib

    from hf_rmt import collecting

    shown: list[str] = []

    @contextlib.contextmanager
    def bar(wanted: bool | None, total: int | None) -> Iterator[Callable[[str, int], None]]:
        assert (wanted, total) == (True, BATCHES)
        yield lambda words, steps: shown.append(words)

    monkeypatch.setattr(collecting, "progress_bar", bar)
    RMTAnalyzer(model).collect(batches, progress=True, memory=LARGE + 4 * SMALL)
    assert shown == ["pass 1 of 2"] * BATCHES + ["pass 2 of 2"] * BATCHES


def test_too_little_memory_for_one_sum(model: nn.Module, batches: list[Batch]) -> None:
    needed = f"{LARGE:,}"
    with pytest.raises(ValueError, match=rf"encoder\.layer\.0\.output\.dense takes {needed} bytes.*memory="):
        collect(model, batches, memory=LARGE - 1)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_no_memory_is_no_setting(memory: float, model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match=r"memory is .*: give a number of bytes, or None"):
        collect(model, batches, memory=memory)


def test_several_passes_need_data_that_can_be_read_again(model: nn.Module, batches: list[Batch]) -> None:
    assert_same(collect(model, iter(batches)), collect(model, batches))
    with pytest.raises(ValueError, match="this data can be read only once"):
        collect(model, iter(batches), memory=LARGE)


# Restart


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(("memory", "in_pass"), [(None, 1), (LARGE + 4 * SMALL, 1), (LARGE + 4 * SMALL, 2)])
def test_a_killed_run_goes_on_where_it_stopped(
    memory: float | None, at: int, in_pass: int, model: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    whole = collect(model, batches, outputs=memory is None, memory=memory)
    counting = Counting(model)

    class DyingLater(Dying):
        passes = 0

        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            return super().__iter__() if self.passes == in_pass else iter(self.batches)

    with pytest.raises(KeyboardInterrupt):
        collect(model, DyingLater(batches, at), outputs=memory is None, memory=memory, folder=tmp_path)
    assert counting.calls == at + (in_pass - 1) * BATCHES and hooks_of(model) == 1
    found = collect(model, batches, outputs=memory is None, memory=memory, folder=tmp_path)
    assert counting.calls == BATCHES * (1 if memory is None else 2), "no batch was run again"
    assert_same(found, whole)
    assert found.settings | {"data": [""]} == whole.settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["covariances.json", "covariances.safetensors"]


def test_a_run_may_be_killed_many_times(model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None) -> None:
    counting = Counting(model)
    for at in (0, 1, 2, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            collect(model, Dying(batches, at), folder=tmp_path)
    assert_same(collect(model, batches, folder=tmp_path), collect(model, batches))
    assert counting.calls == 2 * BATCHES


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_kills_do_not_show_in_the_last_bit(
    family: str, make_model: Callable[..., nn.Module], batches: list[Batch], tmp_path: Path, monkeypatch
) -> None:
    """In float32, whose products go into the float64 sum at times of their own; experts are silent at times."""
    monkeypatch.setattr(moment_sums, "_FLUSH_TOKENS", 25)
    model = make_model(family)
    for at in (1, 3, BATCHES):
        with pytest.raises(KeyboardInterrupt):
            collect(model, Dying([*batches, batches[0]], at), folder=tmp_path)
    assert_same_bits(collect(model, batches, folder=tmp_path), collect(model, batches))


def test_killed_after_its_result_was_saved(
    model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    """Nothing stays of what it kept, nor of a file that was half written."""
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(batches, 3), folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    half = kept.with_name(f"{kept.name}.123.part") / ".tmp4"
    half.parent.mkdir()
    half.write_bytes(b"half")
    collect(model, batches, folder=tmp_path / "other").save(tmp_path)
    assert kept.is_file() and half.is_file()
    collect(model, batches, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"covariances.json", "covariances.safetensors", "other"}


def test_killed_after_its_last_batch(model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None) -> None:
    counting = Counting(model)
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying([*batches, batches[0]], BATCHES), folder=tmp_path)
    assert_same(collect(model, batches, folder=tmp_path), collect(model, batches))
    assert counting.calls == 2 * BATCHES


def test_little_is_kept_of_a_short_run(model: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(batches, 3), folder=tmp_path)
    assert not list(tmp_path.iterdir())


OTHER_DATA: dict[str, Callable[[list[Batch]], list[Batch]]] = {
    "other": lambda batches: [batch | {"input_ids": batch["input_ids"].flip(1)} for batch in batches],
    "shuffled": lambda batches: batches[::-1],
    "another mask": lambda batches: [{"input_ids": batch["input_ids"]} for batch in batches],
    "another shape": lambda batches: [{key: x.view(3, 4) for key, x in batch.items()} for batch in batches],
}


@pytest.mark.parametrize("kind", OTHER_DATA)
@pytest.mark.parametrize("finished", [False, True])
def test_other_data_is_refused(
    kind: str, finished: bool, model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    if finished:
        collect(model, batches, folder=tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            collect(model, Dying(batches, 3), folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = "data was .* and is" if finished else "the first batches are not those of the run that is to go on"
    with pytest.raises(ValueError, match=message):
        collect(model, OTHER_DATA[kind](batches), folder=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and hooks_of(model) == 0
    assert_same(collect(model, batches, folder=tmp_path), collect(model, batches))


def test_data_that_has_become_shorter_is_refused(
    model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(batches, 4), folder=tmp_path)
    with pytest.raises(ValueError, match="the data has 2 batches, the run that is to go on had 4 of it"):
        collect(model, batches[:2], folder=tmp_path)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", ["weights", "outputs", "dropout", "roles"])
def test_another_collection_is_refused(
    change: str, finished: bool, model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    if finished:
        collect(model, batches, folder=tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            collect(model, Dying(batches, 3), folder=tmp_path)
    options: dict[str, Any] = {"outputs": change == "outputs"}
    if change == "weights":
        with torch.no_grad():
            model.encoder.layer[1].attention.self.query.weight.mul_(2)
    if change == "dropout":
        model.train()
    if change == "roles":
        options["roles"] = "query"
    with pytest.raises(ValueError, match=r"was made by another run: .* give another folder"):
        collect(model, batches, folder=tmp_path, **options)


def test_a_finished_folder_is_read_again(model: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    first = collect(model, batches, folder=tmp_path, memory=LARGE)
    counting = Counting(model)
    again = collect(model, batches, folder=tmp_path)
    assert counting.calls == 0
    assert_same(again, first, 0.0)
    assert_same(ActivationCovariances.load(tmp_path), first, 0.0)


def test_a_damaged_file_is_named(model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(batches, 3), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged"):
        collect(model, batches, folder=tmp_path)


class Switching(nn.Module):
    """Two layers that read one tensor in some calls and two in others."""

    def __init__(self, apart_from: int, silent_before: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
        self.apart_from, self.silent_before = apart_from, silent_before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = int(x[0, 0, 0])
        out = self.first(x)
        if number >= self.silent_before:
            out = out + self.second(x if number < self.apart_from else x * 2)
        return out


@pytest.mark.parametrize(("apart_from", "silent_before"), [(3, 0), (9, 3)])
def test_sharing_that_changes_where_a_run_goes_on(
    apart_from: int, silent_before: int, tmp_path: Path, keeping: None
) -> None:
    """Sums of the time before must not be taken for sums of both."""
    data = [{"x": torch.randn(2, 3, 5, dtype=torch.float64)} for _ in range(6)]
    for number, batch in enumerate(data):
        batch["x"][0, 0, 0] = number
    model = Switching(apart_from, silent_before)
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(data, 3), folder=tmp_path)  # type: ignore[arg-type]
    found = collect(model, data, folder=tmp_path)
    seen = [batch["x"] * (2 if n >= apart_from else 1) for n, batch in enumerate(data) if n >= silent_before]
    for name, rows in (("first", [batch["x"] for batch in data]), ("second", seen)):
        expected = Moments.of(torch.cat(rows).flatten(0, 1))
        assert found[name].tokens == expected.tokens
        torch.testing.assert_close(found[name].outer, expected.outer)


# Bad input


@pytest.mark.parametrize("data", [[], iter([]), torch.utils.data.DataLoader([])])
def test_no_batches(data: Any, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data has no batches"):
        collect(model, data, folder=tmp_path / "out")
    assert hooks_of(model) == 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"pixel_values": torch.ones(1, 3, 8, 8)}], "batch 0 has none of the inputs of BertModel: it holds pixel_val"),
        ([torch.ones(2, 3)], "batch 0 is a Tensor: give dicts of the model's arguments"),
        ([(torch.ones(2, 3), torch.ones(2))], "batch 0 is a tuple: give dicts of the model's arguments"),
    ],
)
def test_batches_that_are_none(data: Any, message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        collect(model, data)
    assert hooks_of(model) == 0


def test_a_mask_of_zeros(model: nn.Module, batches: list[Batch]) -> None:
    batches[3]["attention_mask"] = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="batch 3: the attention mask leaves no token"):
        collect(model, batches)
    assert hooks_of(model) == 0
    batches[3]["attention_mask"] = torch.tensor([[0.0] * 6, [1] * 6])  # of one sequence, it may be
    assert collect(model, batches).settings["tokens"] == 4 * 10 + 6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(
    bad: float, model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    """The module is named; what was collected before is kept, and nothing of that batch."""

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        spoil.calls += 1  # type: ignore[attr-defined]
        return output * bad if spoil.calls == 4 else None  # type: ignore[attr-defined]

    spoil.calls = -1  # type: ignore[attr-defined]  # but for the probe
    hook = model.encoder.layer[0].intermediate.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"batch 3: there is NaN or Inf in what enters encoder\.layer\.0\.output"):
        collect(model, batches, folder=tmp_path)
    hook.remove()
    assert hooks_of(model) == 0
    counting = Counting(model)
    assert_same(collect(model, batches, folder=tmp_path), collect(model, batches))
    assert counting.calls == 2 + BATCHES


def test_numbers_of_batches_go_on_with_the_run(
    model: nn.Module, batches: list[Batch], tmp_path: Path, keeping: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(model, Dying(batches, 2), folder=tmp_path)
    batches[3]["attention_mask"] = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="batch 3: the attention mask leaves no token"):
        collect(model, batches, folder=tmp_path)


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_modules_that_are_never_called_are_named() -> None:
    with pytest.warns(UserWarning, match="no token reached 1 matrices, which have no covariance: idle") as caught:
        found = collect(Partial(), [{"x": torch.randn(3, 5)}])
    assert caught[0].filename == __file__
    assert list(found) == ["used"] and found.settings["silent"] == ["idle"]
    report = RMTAnalyzer(Partial()).analyze(covariances=found.for_any_weights(), progress=False)
    assert report["idle"].row["overlap_bulk"] is None


def test_no_module_is_called() -> None:
    with pytest.raises(ValueError, match="the model called none of the modules of idle"):
        collect(Partial(), [{"x": torch.randn(3, 5)}], roles="idle")


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize("when", ["probe", "pass"])
def test_an_exception_leaves_the_model_as_it_was(family: str, when: str, make_model) -> None:
    model = make_model(family).train()
    model.compile(backend="eager")
    config = model.config._experts_implementation_internal
    modes = [module.training for module in model.modules()]
    blocks = model.encoder.layer if family == "bert" else model.model.layers
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > (0 if when == "probe" else 2):
            raise RuntimeError("out of memory")

    inner = next(module for name, module in blocks[1].named_modules() if name.endswith(("experts", "output.dense")))
    hook = inner.register_forward_hook(fail)
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long)}] * 3)
    assert hooks_of(model) == before == 1
    hook.remove()
    assert [module.training for module in model.modules()] == modes
    assert model.config._experts_implementation_internal == config
    assert torch.compiler.is_compiling() is False
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_probe_costs_no_random_numbers(model: nn.Module, batches: list[Batch]) -> None:
    model.train()
    torch.manual_seed(5)
    found = collect(model, batches)
    recorded: list[torch.Tensor] = []
    hook = model.encoder.layer[1].output.dense.register_forward_pre_hook(lambda m, args: recorded.append(args[0]))
    torch.manual_seed(5)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(recorded, batches, strict=True)])
    torch.testing.assert_close(found["encoder.layer.1.output.dense"].outer, Moments.of(rows).outer)


def test_a_checkpoint_does_not_run(model: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    model.float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was not loaded, so nothing can run: use RMTAnalyzer\(model\)"):
        RMTAnalyzer.from_checkpoint(tmp_path).collect(batches)


def test_options_that_there_are_not(model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(TypeError, match="there is no option output; there are outputs, memory"):
        collect(model, batches, output=True)


def test_gradients_are_not_kept(model: nn.Module, batches: list[Batch], monkeypatch) -> None:
    seen: list[bool] = []
    add = MomentSum.add
    monkeypatch.setattr(MomentSum, "add", lambda self, rows: (seen.append(rows.requires_grad), add(self, rows))[1])
    collect(model, batches)
    assert seen and not any(seen)
    assert all(parameter.grad is None for parameter in model.parameters())


class Normed(nn.Module):
    """A BatchNorm, which in train mode takes no single row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_the_look_at_one_sequence_breaks_no_model_in_train_mode() -> None:
    model = Normed().train()
    found = RMTAnalyzer(model).collect([{"x": torch.randn(8, 6)}], progress=False)
    assert found["first"].tokens == found["second"].tokens == 8 and model.training
