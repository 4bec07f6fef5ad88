"""Runs the benchmarks and writes what they measured into a document.

    python tests/benchmarks/run.py [--only NAME ...] [--out docs/benchmarks.md] [--json] [--quick] [--force]

Exit status: 0 when all ran, 1 when one failed (the others are written), 2 when the machine is busy.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import harness

#: Names on the command line and their modules, in the order of the document.
BENCHMARKS = {
    "svd_loop": "svd_loop",
    "weightwatcher": "weightwatcher_cost",
    "ks_share": "ks_share",
    "memory": "memory",
    "beyond_memory": "beyond_memory",
    "llama_blocks": "llama_blocks",
    "analysis_processes": "analysis_processes",
    "growth": "growth",
    "collect_cost": "collect_cost",
    "collect_processes": "collect_processes",
    "callback_cost": "callback_cost",
    "sweep_cost": "sweep_cost",
    "sweep_memory": "sweep_memory",
    "slicing": "slicing",
}


def main() -> int:
    """See the module."""
    arguments = _arguments()
    busy = harness.what_keeps_it_busy()
    if busy and not arguments.force:
        print(f"the machine is not idle: {busy}; wait until it is, or pass --force", file=sys.stderr)
        return 2
    names = [name for name in BENCHMARKS if not arguments.only or name in arguments.only]
    failed = [name for name in names if not _run(name, arguments, busy)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write docs/benchmarks.md.")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="these, leaving the other sections as they are")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="the document")
    parser.add_argument("--json", action="store_true", help="write every single number to a JSON file next to it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round; prints and writes nothing")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, and say so")
    return parser.parse_args()


def _run(name: str, arguments: argparse.Namespace, busy: str) -> bool:
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        with harness.OthersAtWork() as others:
            section = importlib.import_module(BENCHMARKS[name]).main(arguments.quick)
    except Exception:
        traceback.print_exc()
        return False
    section.conditions = _conditions(section, others.share, busy)
    print(section.markdown(), end="\n\n", flush=True)
    if not arguments.quick:
        harness.update_document(arguments.out, name, section, list(BENCHMARKS))
        if arguments.json:
            harness.update_raw(arguments.out.with_suffix(".json"), name, section)
    return True


def _conditions(section: harness.Section, others: float, busy: str) -> str:
    text = f"Measured on {harness.machine(*section.packages)}. "
    text += f"Other processes used {100 * others:.1f} % of the machine meanwhile."
    return text + (f" **The machine was not idle at the start: {busy}; the times are rough.**" if busy else "")


if __name__ == "__main__":
    sys.exit(main())
