"""Slicing: what it costs, how fast what it leaves is, and what it leaves, against the published implementation.

Cost and speed are measured on a random Llama, with one thread. Where the environment variable HF_RMT_SLICING_DATA names
a folder, perplexities are measured too: of two small trained Llamas in its folders ``docs-llama`` and ``docs-llama96``,
calibrated and scored on the token ids in ``docs-llama/calib.safetensors`` and ``docs-llama/eval.safetensors``, one row
a sequence. The published implementation is not run; what it made of the same models is quoted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from collect_cost import token_batches
from scipy.linalg import blas

from hf_rmt import SVDPruner, Width, collect_stream
from hf_rmt.workers import threads

_DATA = os.environ.get("HF_RMT_SLICING_DATA", "")
_SHAPE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 6, "vocab_size": 8000}
_QUICK_SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
#: Batches, sequences a batch, positions a sequence: to calibrate on, and that a forward pass is timed on.
_CALIBRATION, _FORWARD = (8, 2, 128), (1, 2, 128)
_QUICK_CALIBRATION, _QUICK_FORWARD = (2, 2, 64), (1, 1, 16)
#: Rows of the trained models' data that are calibrated on, and a batch of them, as the reference does by default.
_ROWS, _QUICK_ROWS, _BATCH = 128, 8, 16
_PROMPT, _GENERATED = 16, 24
_SHARES = (0.9, 0.75, 0.5)
#: Fewer than usual, on the random and on the trained models: a round takes half a minute.
_ROUNDS, _TRAINED_ROUNDS = 3, 2

_MODEL, _PASS, _HEADLESS = "the model alone", "forward pass", "forward pass without the head"
_ONE, _EACH = "one basis, plain", "a basis for each site"
_REGISTERED = "one basis, registered"
#: How each form is asked for.
_FORMS: dict[str, dict[str, Any]] = {
    _ONE: {"form": "plain"},
    _REGISTERED: {"form": "registered"},
    _EACH: {"per_block": True},
}


@dataclass(frozen=True)
class _Point:
    """What the reference made of a model: the sparsity asked for in percent, and CPU seconds to rotate and slice."""

    asked: int
    width: int
    parameters: int
    perplexity: float
    seconds: float


#: microsoft/TransformerCompression at 6b12cde (2024-05-17) with its defaults (widths rounded to a multiple of 8, random
#: orientation, whole head), under transformers 4.41.0 and torch 2.13.0 in float32, one thread, on 128 x 256 tokens in
#: batches of 16. On docs-llama96, 25 % is rounded to what 20 % is.
_REFERENCE = {
    "docs-llama96": (
        _Point(10, 80, 934_144, 45.25, 13.3),
        _Point(20, 72, 856_512, 51.37, 13.0),
        _Point(30, 64, 780_288, 60.99, 12.8),
        _Point(40, 56, 705_472, 78.21, 12.9),
        _Point(50, 48, 632_064, 111.96, 13.1),
    ),
    "docs-llama": (
        _Point(10, 224, 3_472_384, 44.32, 15.9),
        _Point(20, 200, 3_136_960, 44.42, 16.7),
        _Point(25, 192, 3_026_944, 44.47, 18.3),
        _Point(30, 176, 2_809_600, 44.56, 16.2),
        _Point(40, 152, 2_490_304, 44.86, 16.7),
        _Point(50, 128, 2_179_072, 45.39, 16.5),
    ),
}
#: Of the same: CPU seconds to rotate and slice by those of a forward pass over the calibration data in the same
#: process, median of all points; and at 30 % peak memory in MB over what a process has that has loaded the model.
_REFERENCE_COST = {"docs-llama96": (5.96, 245), "docs-llama": (3.58, 364)}


def main(quick: bool) -> harness.Section:
    """Time, memory and speed on a random model; perplexities, time and memory on trained ones, where there are any."""
    found: dict[str, Any] = {}
    trained = list(_REFERENCE) if _DATA else []
    with threads(1):
        found["times"] = {"random": _times(_random(quick), _calibration(quick), 1 if quick else _ROUNDS)}
        found["peaks"] = {"random": _peaks("random", quick)}
        found["speed"] = _speed(quick)
        for name in trained:
            model, batches = _trained(name), _rows("calib", _QUICK_ROWS if quick else _ROWS)
            found["times"][name] = _times(model, batches, 1 if quick else _TRAINED_ROUNDS)
            found["peaks"][name] = _peaks(name, quick)
    found["scores"] = {name: _scores(name, quick) for name in trained}
    return _section(found)


# --- models and data -----------------------------------------------------------------------------


def _random(quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(_QUICK_SHAPE if quick else _SHAPE), **_HEADS, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


def _calibration(quick: bool) -> list[dict[str, torch.Tensor]]:
    count, size, length = _QUICK_CALIBRATION if quick else _CALIBRATION
    return token_batches((_QUICK_SHAPE if quick else _SHAPE)["vocab_size"], count, size, length, length)


def _trained(name: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(Path(_DATA) / name, dtype=torch.float32).eval()


def _rows(kind: str, count: int | None) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    rows = load_file(Path(_DATA) / "docs-llama" / f"{kind}.safetensors")["input_ids"][:count].long()
    return [{"input_ids": batch} for batch in rows.split(_BATCH)]


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- time and memory of slicing ------------------------------------------------------------------


def _run(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _sliced(model: Any, batches: Any, form: str, keep: Any = 0.7) -> Any:
    return SVDPruner(model).slice(keep, batches, progress=False, **_FORMS[form])


def _times(model: Any, batches: list[dict[str, torch.Tensor]], rounds: int) -> dict[str, harness.Times]:
    sites = 2 * model.config.num_hidden_layers + 1
    runs: dict[str, Callable[[], object]] = {
        _PASS: partial(_run, model, batches),
        _HEADLESS: partial(_run, model.model, batches),
        _ONE: partial(_sliced, model, batches, _ONE),
        _EACH: partial(_sliced, model, batches, _EACH),
        _sums(_ONE): partial(_bare_sums, model.config.hidden_size, batches, sites, 1),
        _sums(_EACH): partial(_bare_sums, model.config.hidden_size, batches, sites, sites),
    }
    _run(model, batches[:1])
    return harness.in_turn(runs, rounds, warm_up=False)


def _sums(form: str) -> str:
    return f"bare sums and eigenvectors, {form}"


def _bare_sums(width: int, batches: Sequence[Mapping[str, torch.Tensor]], sites: int, bases: int) -> None:
    """BLAS over rows that are at hand, one sum a site in float32, and eigenvectors in float64."""
    generator = np.random.default_rng(0)
    total = np.zeros((width, width), np.float32, order="F")
    for batch in batches:
        rows = np.asfortranarray(generator.standard_normal((width, batch["input_ids"].numel()), np.float32))
        for _ in range(sites):
            blas.ssyrk(1.0, rows, beta=1.0, c=total, overwrite_c=1)
    for _ in range(bases):
        np.linalg.eigh(total.astype(np.float64), UPLO="U")


def _peaks(source: str, quick: bool) -> dict[str, int]:
    """Bytes of the model, and the high-water marks of processes that load it, run it, and slice it."""
    marks = {}
    for what in (_MODEL, _PASS, _ONE, _EACH):
        harness.say(f"process: {source}, {what}")
        command = [sys.executable, __file__, json.dumps({"source": source, "quick": quick, "what": what})]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        marks |= json.loads(done.stdout.splitlines()[-1])
    return marks


def _in_child(job: dict[str, Any]) -> dict[str, int]:
    with threads(1):
        random = job["source"] == "random"
        model = _random(job["quick"]) if random else _trained(job["source"])
        batches = _calibration(job["quick"]) if random else _rows("calib", _QUICK_ROWS if job["quick"] else _ROWS)
        if job["what"] == _PASS:
            _run(model, batches)
        elif job["what"] != _MODEL:
            _sliced(model, batches, job["what"])
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"bytes": 4 * _size(model), job["what"]: 1024 * int(status["VmHWM"].split()[0])}


# --- speed of what is left -----------------------------------------------------------------------


def _speed(quick: bool) -> dict[str, Any]:
    """Times of forward passes and of ``generate``, and the multiplications that linear layers do a token."""
    model, batches = _random(quick), _calibration(quick)[:4]
    covariances = collect_stream(model, batches, progress=False)
    models = {"dense": model}
    for share in _SHARES:
        for form in _FORMS:
            harness.say(f"slicing: {form}, {share:g} of the width")
            data = batches if form == _EACH else covariances
            models[_named(form, share)] = _sliced(model, data, form, Width(share))
    count, size, length = _QUICK_FORWARD if quick else _FORWARD
    inputs = token_batches(model.config.vocab_size, count, size, length, length)
    prompt = {key: value[:1, :_PROMPT] for key, value in inputs[0].items()}
    runs: dict[str, Callable[[], object]] = {}
    for name, each in models.items():
        runs[f"{name}: forward"] = partial(_run, each, inputs)
        runs[f"{name}: generate"] = partial(_generate, each, prompt)
    times = harness.in_turn(runs, 1 if quick else harness.ROUNDS)
    work = {name: _work(each) for name, each in models.items()}
    return {"times": times, "work": work, "parameters": {name: _size(each) for name, each in models.items()}}


def _named(form: str, share: float) -> str:
    return f"{form}, {share:g}"


def _generate(model: Any, prompt: Mapping[str, torch.Tensor]) -> None:
    model.generate(**prompt, max_new_tokens=_GENERATED, min_new_tokens=_GENERATED, do_sample=False, pad_token_id=0)


def _work(model: Any) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


# --- perplexity ----------------------------------------------------------------------------------

_PLAIN_SCORE, _PARAMETERS_SCORE = "one basis, plain, its parameters", "one basis, registered, its parameters"
_EACH_SCORE, _WIDTH_SCORE = "a basis for each site, its parameters", "a basis for each site, its width"
_KINDS = (_PLAIN_SCORE, _PARAMETERS_SCORE, _EACH_SCORE, _WIDTH_SCORE)


def _scores(name: str, quick: bool) -> dict[str, Any]:
    """Perplexity of the model, and at each point of the reference width, parameters and perplexity of the slices."""
    model = _trained(name)
    data, evaluation = _rows("calib", _QUICK_ROWS if quick else _ROWS), _rows("eval", _QUICK_ROWS if quick else None)
    covariances = collect_stream(model, data, progress=False)
    found: dict[str, Any] = {"parameters": _size(model), "perplexity": _perplexity(model, evaluation), "points": []}
    for point in _REFERENCE[name][: 1 if quick else None]:
        slices = {}
        for kind in _KINDS:
            harness.say(f"{name} at {point.asked} %: {kind}")
            form = next(form for form in _FORMS if kind.startswith(form))
            share = point.width / model.config.hidden_size
            # Half a parameter more, or rounding might make it one less; a slice is smaller than the model.
            budget = (min(point.parameters, found["parameters"] - 1) + 0.5) / found["parameters"]
            keep = Width(share) if kind == _WIDTH_SCORE else budget
            small = _sliced(model, data if form == _EACH else covariances, form, keep)
            slices[kind] = (small.sliced.width, small.sliced.parameters, _perplexity(small, evaluation))
        found["points"].append((point, slices))
    return found


def _perplexity(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """The exponential of the mean over sequences of their mean negative log-likelihood, as the reference has it."""
    losses: list[float] = []
    with torch.no_grad():
        for batch in batches:
            logits, following = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.mT, following, reduction="none")
            losses += loss.mean(1).tolist()
    return math.exp(sum(losses) / len(losses))


# --- what is said --------------------------------------------------------------------------------


def _section(found: dict[str, Any]) -> harness.Section:
    tables = [_cost_table(found), _speed_table(found["speed"])]
    if found["scores"]:
        tables.append(_score_table(found["scores"]))
    return harness.Section(
        title="Slicing",
        what=_what(bool(found["scores"])),
        tables=tables,
        targets=_targets(found),
        floor=(
            "Of the time: a forward pass without the head, one call of BLAS `ssyrk` a batch and site on rows that are "
            "at hand, and the eigenvectors in float64, once or for each site. Of the speed: the multiplications that "
            "linear layers do a token, by those of the dense model ('implied')."
        ),
        distance=_distance(found),
        raw=_raw(found),
        packages=("safetensors",) if found["scores"] else (),
    )


def _what(trained: bool) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in (_SHAPE | _HEADS).items())
    count, size, length = _CALIBRATION
    text = (
        f"`SVDPruner(model).slice(0.7, batches)` on a random float32 Llama ({shape}) with one thread, calibrated on "
        f"{count} batches of {size} x {length} tokens, by a forward pass of the same batches; {_ROUNDS} rounds without "
        "a warm-up. Calibration itself leaves the head out. Seconds, and what ratios are of, are CPU seconds: of one "
        "thread they are what it takes on an idle machine. The peak is that of a process which does this alone, over "
        "one that makes or loads the model; a forward pass has one too. Speed is of a forward pass of "
        f"{_FORWARD[1]} x {_FORWARD[2]} tokens and of `generate`, {_GENERATED} tokens after {_PROMPT} of one sequence, "
        "at shares of the width, by the dense model."
    )
    if not trained:
        return text + " Without the trained models nothing is said of quality."
    return text + (
        f" Two small trained Llamas are calibrated on {_ROWS} x 256 tokens, and compared with the implementation that "
        "Ashkboos et al. published (microsoft/TransformerCompression, 6b12cde), which ran under transformers 4.41 on a "
        "machine of the same kind: its figures are quoted, its ratio is to its own forward pass. It has a "
        "basis for each site, with matrices in the residual connections, and leaves the head whole. 'Its parameters' "
        "is the widest slice that has no more parameters than the reference's; a plain slice needs a width that its "
        "number of heads divides. Perplexity is the exponential of the mean over sequences of their mean loss on "
        "256 x 255 next tokens."
    )


def _cost_table(found: dict[str, Any]) -> harness.Table:
    rows = []
    for source, times in found["times"].items():
        peaks = found["peaks"][source]
        for name in (_PASS, _ONE, _EACH):
            over = peaks[name] - peaks[_MODEL]
            ratio = "1" if name == _PASS else str(harness.Ratio.of(times[name].cpu, times[_PASS].cpu))
            floor = "-" if name == _PASS else str(_to_floor(times, name))
            seconds = harness.number(times[name].median_cpu)
            of_model = harness.number(over / peaks["bytes"])
            rows.append([f"{source}: {name}", seconds, ratio, floor, f"{over / 1e6:.0f}", of_model])
        if source in _REFERENCE_COST:
            ratio, over = _REFERENCE_COST[source]
            seconds = harness.number(next(point.seconds for point in _REFERENCE[source] if point.asked == 30))
            of_model = harness.number(1e6 * over / peaks["bytes"])
            rows.append([f"{source}: reference, quoted", seconds, harness.number(ratio), "-", f"{over:.0f}", of_model])
    return harness.Table(["", "CPU s", "by forward pass", "by floor", "peak MB", "peak, in models"], rows)


def _to_floor(times: Mapping[str, harness.Times], form: str) -> harness.Ratio:
    floor = [a + b for a, b in zip(times[_HEADLESS].cpu, times[_sums(form)].cpu, strict=True)]
    return harness.Ratio.of(times[form].cpu, floor)


def _speed_table(speed: dict[str, Any]) -> harness.Table:
    times, rows = speed["times"], []
    for name, parameters in speed["parameters"].items():
        row = [name, f"{parameters / 1e6:.1f}", harness.number(speed["work"][name] / speed["work"]["dense"])]
        for task in ("forward", "generate"):
            own = times[f"{name}: {task}"]
            ratio = "1" if name == "dense" else str(harness.Ratio.of(own.cpu, times[f"dense: {task}"].cpu))
            row += [harness.number(own.median_cpu), ratio]
        rows.append(row)
    header = ["", "parameters, M", "implied", "forward, CPU s", "by dense", "generate, CPU s", "by dense"]
    return harness.Table(header, rows)


def _score_table(scores: dict[str, Any]) -> harness.Table:
    header = ["width, parameters in M: perplexity", "reference", *_KINDS]
    rows = []
    for name, found in scores.items():
        dense = f"{found['parameters'] / 1e6:.3f}: {found['perplexity']:.2f}"
        rows.append([f"{name}, dense", dense, *["-"] * len(_KINDS)])
        for point, slices in found["points"]:
            reference = (point.width, point.parameters, point.perplexity)
            rows.append([f"{name}, {point.asked} %", *map(_score, (reference, *slices.values()))])
    return harness.Table(header, rows)


def _score(slice_: tuple[int, int, float]) -> str:
    width, parameters, perplexity = slice_
    return f"{width}, {parameters / 1e6:.3f}: {perplexity:.2f}"


def _targets(found: dict[str, Any]) -> list[harness.Target]:
    targets = []
    for task in ("forward", "generate"):
        for form in (_ONE, _EACH):
            dense = found["speed"]["times"][f"dense: {task}"].cpu
            ratio = harness.Ratio.of(found["speed"]["times"][f"{_named(form, 0.75)}: {task}"].cpu, dense)
            targets.append(harness.Target(f"{task}, {form}, 0.75 of the width, by the dense model", 1, ratio.median))
    for name, (cost, _) in _REFERENCE_COST.items() if found["scores"] else ():
        times = found["times"][name]
        for form in (_ONE, _EACH):
            ratio = harness.Ratio.of(times[form].cpu, times[_PASS].cpu)
            what = f"{name}, {form}: slicing by a forward pass, half of the reference's"
            targets.append(harness.Target(what, cost / 2, ratio.median))
    for name, kind in ((name, kind) for name in found["scores"] for kind in _KINDS):
        what = f"{name}, {kind}: perplexity by the reference's, the worst point"
        targets.append(harness.Target(what, 1, max(_by_reference(found["scores"][name], kind))))
    return targets


def _by_reference(found: dict[str, Any], kind: str) -> list[float]:
    return [slices[kind][2] / point.perplexity for point, slices in found["points"]]


def _distance(found: dict[str, Any]) -> str:
    times, speed = found["times"]["random"], found["speed"]
    text = (
        f"One basis takes {_to_floor(times, _ONE)} times its floor, a basis for each site {_to_floor(times, _EACH)}, "
        "as it runs each block twice."
    )
    implied = {form: speed["work"][_named(form, 0.5)] / speed["work"]["dense"] for form in _FORMS}
    dense = speed["times"]["dense: forward"].cpu
    at_half = {
        form: harness.Ratio.of(speed["times"][f"{_named(form, 0.5)}: forward"].cpu, dense).median for form in _FORMS
    }
    each = "; ".join(f"{form} {harness.number(at_half[form] / implied[form])}" for form in _FORMS)
    return f"{text} A forward pass at half the width, by what is implied: {each}."


def _raw(found: dict[str, Any]) -> dict[str, Any]:
    times = {source: {name: t.raw() for name, t in each.items()} for source, each in found["times"].items()}
    speed = {name: t.raw() for name, t in found["speed"]["times"].items()}
    scores = {
        name: [{"asked": point.asked} | slices for point, slices in each["points"]]
        for name, each in found["scores"].items()
    }
    return {"times": times, "peaks": found["peaks"], "speed": speed, "scores": scores}


if __name__ == "__main__":
    print(json.dumps(_in_child(json.loads(sys.argv[1]))))
