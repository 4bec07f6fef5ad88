"""CPU seconds of ``analyze()`` against those of WeightWatcher, over the same matrices.

Two comparisons: the full one, Marchenko-Pastur fits and a randomised matrix beside each one, and
values only, WeightWatcher's default. WeightWatcher is run on one thread, which costs it fewer CPU
seconds than several (24 against 86 for the full comparison of one block). It is confined to the
linear layers, which are the matrices that ``analyze()`` takes; left alone it takes the embeddings too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import harness
import torch

from hf_rmt import RMTAnalyzer
from hf_rmt.workers import threads

_FULL = {"mp_fit": True, "randomize": True}
_THEIRS = "WeightWatcher, one thread"
_FLOOR = "floor"
#: Rounds of the full comparison: WeightWatcher takes minutes for one of BERT-base.
_FULL_ROUNDS = {"BERT-base's shape, random": 1, "MiniLM encoder, trained": 2}
#: What ours is called, what it is given, its target, and how many times the floor's work it does.
_OURS_FULL = {
    "both sides": ({}, 0.1, 1),
    "both sides, `control='gaussian'`": ({"control": "gaussian"}, 0.1, 2),
}
_OURS_VALUES = {"values only": ({"sides": "none"}, 0.6, 1)}


def main(quick: bool) -> harness.Section:
    """Both comparisons on both models."""
    _warm_up()
    models = {"BERT-base's shape, random": harness.bert(quick)}
    if not quick:
        models["MiniLM encoder, trained"] = harness.minilm()
    results = [_compare(name, model, _FULL_ROUNDS[name], quick) for name, model in models.items()]
    return _section(results)


def _warm_up() -> None:
    """Imports, tables and plotting fonts, on a model of no size."""
    tiny = harness.bert(quick=True)
    for options in ({}, _FULL):
        _watch(tiny, _layers(tiny)[0], options)
        RMTAnalyzer(tiny).analyze(progress=False)


def _compare(name: str, model: torch.nn.Module, full_rounds: int, quick: bool) -> dict[str, Any]:
    analyzer = RMTAnalyzer(model)
    weights = [matrix.read() for matrix in analyzer.matrices]
    layers, embeddings = _layers(model)
    harness.say(f"{name}: {len(weights)} matrices, {len(layers)} layers of WeightWatcher's")
    counted: set[int] = set()

    def group(ours: dict[str, Any], options: dict[str, Any], floor: Any, rounds: int) -> dict[str, harness.Times]:
        alternatives: dict[str, Any] = {
            label: lambda given=given: analyzer.analyze(progress=False, **given) for label, (given, *_) in ours.items()
        }
        alternatives[_THEIRS] = lambda: counted.add(_watch(model, layers, options))
        alternatives[_FLOOR] = lambda: harness.one_matrix_a_core(floor, weights)
        return harness.in_turn(alternatives, rounds, warm_up=not quick and rounds == harness.ROUNDS)

    values = group(_OURS_VALUES, {}, harness.bare_values, 1 if quick else harness.ROUNDS)
    full = group(_OURS_FULL, _FULL, harness.bare_factors, full_rounds)
    return {
        "model": name,
        "matrices": len(weights),
        "watched": sorted(counted),
        "embeddings": embeddings,
        "full": full,
        "values": values,
    }


def _layers(model: torch.nn.Module) -> tuple[list[int], int]:
    """WeightWatcher's numbers of the linear layers, and how many embeddings it would take besides."""
    with _quiet():
        from weightwatcher import WeightWatcher

        described = WeightWatcher(model=model).describe(savefig=False)
    kinds = described.layer_type
    return described.layer_id[kinds == "dense"].tolist(), int((kinds == "embedding").sum())


def _watch(model: torch.nn.Module, layers: list[int], options: dict[str, Any]) -> int:
    """Runs WeightWatcher on one thread; the number of matrices that it analysed."""
    with _quiet():
        from weightwatcher import WeightWatcher

        with threads(1):
            details = WeightWatcher(model=model).analyze(layers=layers, plot=False, savefig=False, **options)
    return int(details.num_evals.notna().sum())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import matplotlib as mpl

    mpl.use("Agg")
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _section(results: list[dict[str, Any]]) -> harness.Section:
    rows, targets, distances = [], [], []
    for result in results:
        for kind, ours in (("full", _OURS_FULL), ("values", _OURS_VALUES)):
            times = result[kind]
            for label, (_, limit, work) in ours.items():
                ratio = harness.Ratio.of(times[label].cpu, times[_THEIRS].cpu)
                floor = work * times[_FLOOR].median_cpu
                seconds = [times[label].median_cpu, times[_THEIRS].median_cpu]
                rows.append(
                    [
                        f"{result['model']}: {label}",
                        *map(harness.number, seconds),
                        str(ratio),
                        str(len(times[label].cpu)),
                        harness.number(floor),
                    ]
                )
                targets.append(harness.Target(f"CPU time, {result['model']}, {label}", limit, ratio.median))
                distances.append(
                    f"{result['model']}, {label}: {harness.number(times[label].median_cpu / floor)} times the floor"
                )
    header = [
        "",
        "hf_rmt CPU s",
        "WeightWatcher CPU s",
        "ratio",
        "rounds",
        "floor s",
    ]
    return harness.Section(
        title="CPU time against WeightWatcher",
        what=(
            "CPU seconds of `RMTAnalyzer(model).analyze()` against `WeightWatcher(model=model).analyze(mp_fit=True, "
            "randomize=True)` (full), and of `sides='none'` against its default (values only), which besides the "
            "values fits a power law. WeightWatcher was given one thread, which costs it the fewest CPU seconds, "
            "without plots and with its output silenced. After a warm-up on a tiny model, the full comparison "
            "has fewer rounds than usual, for WeightWatcher takes minutes. " + " ".join(map(_counts, results))
        ),
        tables=[harness.Table(header, rows)],
        targets=targets,
        floor=(
            "The bare float64 linear algebra, one matrix a core: Gram matrix, eigenvectors and one product; "
            "twice that with a control; Gram matrix and eigenvalues for values only."
        ),
        distance="; ".join(distances) + ".",
        raw={result["model"]: _raw(result) for result in results},
        packages=("weightwatcher",),
    )


def _counts(result: dict[str, Any]) -> str:
    ours, theirs = result["matrices"], result["watched"]
    both = f"both analyse the same number of matrices, {ours}"
    differ = f"**the numbers of matrices differ: {ours} here, {' or '.join(map(str, theirs))} in WeightWatcher**"
    return (
        f"{result['model']}: {both if theirs == [ours] else differ}; WeightWatcher was confined to linear layers, "
        f"or it would have taken {result['embeddings']} embeddings too."
    )


def _raw(result: dict[str, Any]) -> dict[str, Any]:
    times = {kind: {name: each.raw() for name, each in result[kind].items()} for kind in ("full", "values")}
    return times | {key: result[key] for key in ("matrices", "watched", "embeddings")}
