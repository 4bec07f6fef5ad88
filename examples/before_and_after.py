"""Do small singular values matter? Remove each decile before fine-tuning, and after it (paper Fig. 8).

    python examples/before_and_after.py sst2 path/to/folder            # folder with train and dev files
    python examples/before_and_after.py sst2 nyu-mll/glue --seeds 5    # the same data from the Hub
    python examples/before_and_after.py boolq path/to/folder --model google-bert/bert-base-uncased

A decile is removed from all matrices but the embeddings and the head. Removed after fine-tuning, it is gone from a
model that learned to use it; removed before, the model is fine-tuned without it. Beside each decile a random
control: as many components, drawn from all. Every seed is one fine-tuned model and as many trainings as removals.
Prints the change of the accuracy and draws Fig. 8. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from fine_tuning import FineTuning, parser_of, show

from hf_rmt import SweepTable, before_and_after


def main(arguments: Sequence[str] | None = None) -> SweepTable:
    """Train, remove, evaluate, print, draw."""
    options = parser_of(__doc__, "before-and-after").parse_args(arguments)
    task = FineTuning(options)
    table = before_and_after(
        task.trainer_of,
        task.evaluation(),
        seeds=range(options.seeds),
        folder=options.out,
        controls=options.controls,
    )
    show(table, options.out)
    return table


if __name__ == "__main__":
    main()
