"""Sweeps over every model type of the installed transformers, and writes what they found into a document.

    python tests/coverage/run.py [--only TYPE ...] [--folder coverage] [--out docs/coverage.md] [--jobs 2]

What was found of a type is kept in the folder, and a run that was interrupted goes on; ``--again`` forgets what failed.
Exit status: 0 when the goals are met, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

#: Seconds that a type may take.
_PATIENCE = 600
_SWEEPS = ("discovered", "cycle")


def main() -> int:
    """See the module."""
    arguments = _arguments()
    from report import document, goals_are_met
    from transformers import CONFIG_MAPPING

    if unknown := set(arguments.only or ()) - set(CONFIG_MAPPING):
        sys.exit(f"transformers knows no model type {', '.join(sorted(unknown))}")
    kinds = arguments.only or sorted(CONFIG_MAPPING)
    results = {sweep: dict(_swept(sweep, kinds, arguments)) for sweep in arguments.sweeps}
    if arguments.only is None and len(results) == len(_SWEEPS):
        arguments.out.write_text(document(results["discovered"], results["cycle"]))
        print(f"written: {arguments.out}")
    else:
        print(json.dumps(results, indent=2))
    return 0 if goals_are_met(results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sweep over every model type of the installed transformers.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types; prints and writes no document")
    parser.add_argument("--sweeps", nargs="+", choices=_SWEEPS, default=_SWEEPS)
    parser.add_argument("--folder", type=Path, default=Path("coverage"), help="what was found, type by type")
    parser.add_argument("--again", action="store_true", help="do again what failed")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"), help="the document")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    return parser.parse_args()


def _swept(sweep: str, kinds: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results by type, in order; those of an earlier run are taken from the folder."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    one = partial(_kept, sweep, arguments.folder, arguments.again)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, _prepare) as pool:
        for kind, result in pool.imap(one, kinds):
            print(f"{sweep} {kind}: {result.get('error', 'ok')}", file=sys.stderr, flush=True)
            yield kind, result


def _prepare() -> None:
    """A process of the pool."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _give_up)


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"it took more than {_PATIENCE} seconds")


def _kept(sweep: str, folder: Path, again: bool, kind: str) -> tuple[str, dict[str, Any]]:
    path = folder / f"{sweep}-{kind}.json"
    known = json.loads(path.read_text()) if path.is_file() else None
    if known is not None and not (again and "error" in known):
        return kind, known
    signal.alarm(_PATIENCE)
    try:
        result = _of_type(sweep, kind)
    finally:
        signal.alarm(0)
    path.write_text(json.dumps(result))
    return kind, result


def _of_type(sweep: str, kind: str) -> dict[str, Any]:
    import sweeps

    function: Callable[..., dict[str, Any]] = getattr(sweeps, sweep)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return function(kind, Path(folder))
    except sweeps.Unbuilt as error:
        return {"unbuilt": str(error)}
    except Exception as error:  # it goes into the document
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


if __name__ == "__main__":
    sys.exit(main())
