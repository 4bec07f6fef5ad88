"""Kills jobs at random moments, starts them again in the same folder, and compares what comes out.

    python tests/kills/run.py [--only KIND ...] [--times 20] [--seed 0]

Each kind of job runs as one process and as two, and is killed as often as each: all of it, or one of two processes, of
which the other then has to end too. Exit status: 0 when every result is that of an undisturbed run, to the bit; 1 when
not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import results
from jobs import JOBS
from launching import Job
from rich.console import Console
from rich.table import Table


@dataclass
class Trial:
    """Kills of one kind of job, and what became of them.

    Attributes:
        seconds: that the undisturbed job worked.
        kills: how many there were.
        during_work: how many of them came before the job was done.
        kept: how many left something to go on from.
        restarts: how often a job was started again and came to its end.
        wrong: what was not as it should be, in words.
    """

    kind: str
    processes: int
    folder: Path
    random: random.Random
    seconds: float = 0.0
    kills: int = 0
    during_work: int = 0
    kept: int = 0
    restarts: int = 0
    wrong: list[str] = field(default_factory=list)

    def run(self, times: int) -> None:
        """An undisturbed run, and so many that are disturbed."""
        job = Job(self.kind, self.processes, self.folder / "undisturbed")
        if not job.done():
            raise RuntimeError(f"{self.kind} fails undisturbed:\n{job.log()}")
        self.seconds, expected = job.seconds(), results.contents(job.out)
        for number in range(times):
            self._disturb(Job(self.kind, self.processes, self.folder / str(number)), expected)

    def _disturb(self, job: Job, expected: results.Contents) -> None:
        """Kill a job and start it again."""
        moment = self.random.uniform(0, self.seconds)
        rank = self.random.choice([None, *range(self.processes)]) if self.processes > 1 else None
        words = f"{'all' if rank is None else f'rank {rank}'} of {self.processes} killed after {moment:.2f} s"
        job.start()
        time.sleep(moment)
        self.during_work += job.is_working()
        if not job.kill(rank):
            self.wrong.append(f"{words}: the other process does not end")
        self.kills += 1
        self.kept += results.kept(job.out)
        if (found := results.whole(self.kind, job.out)) is not None:
            self._compare(f"{words}: what is taken for whole", found, expected)
        if not job.done():
            self.wrong.append(f"{words}: does not go on: {job.log()}")
            return
        self.restarts += 1
        self._compare(f"{words}: the result", results.contents(job.out), expected)
        shutil.rmtree(job.place)

    def _compare(self, words: str, found: results.Contents, expected: results.Contents) -> None:
        if differing := results.differences(found, expected):
            self.wrong.append(f"{words} differs in {', '.join(differing)}")


def main() -> int:
    """See the module."""
    arguments = _arguments()
    trials = []
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        for kind in arguments.only:
            for processes in arguments.processes:
                chance = random.Random(f"{arguments.seed} {kind} {processes}")
                trials.append(Trial(kind, processes, Path(place, f"{kind}-{processes}"), chance))
                trials[-1].run(arguments.times)
                _show(trials[-1])
    Console().print(_table(trials))
    return 1 if any(trial.wrong for trial in trials) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill jobs at random moments, and see whether they go on.")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), metavar="KIND", help=", ".join(JOBS))
    parser.add_argument("--processes", nargs="+", type=int, default=(1, 2), help="processes of a job")
    parser.add_argument("--times", type=int, default=20, help="kills of each kind of job over so many processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def _show(trial: Trial) -> None:
    print(f"{trial.kind}, {trial.processes} processes: {len(trial.wrong) or 'nothing'} wrong", file=sys.stderr)
    for words in trial.wrong:
        print(f"  {words}", file=sys.stderr, flush=True)


def _table(trials: list[Trial]) -> Table:
    table = Table("kind", "of", "seconds", "kills", "at work", "kept", "restarts", "equal")
    for trial in trials:
        counts = (trial.kills, trial.during_work, trial.kept, trial.restarts)
        words = (trial.kind, trial.processes, f"{trial.seconds:.1f}", *counts, "no" if trial.wrong else "yes")
        table.add_row(*map(str, words))
    return table


if __name__ == "__main__":
    sys.exit(main())
