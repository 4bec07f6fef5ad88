"""Which singular values of which matrices does a fine-tuned model need? (paper Fig. 7 and 11)

    python examples/deciles_by_role.py sst2 path/to/folder            # folder with train and dev files
    python examples/deciles_by_role.py boolq path/to/folder --model google-bert/bert-base-uncased
    python examples/deciles_by_role.py sst2 path/to/folder --models before-and-after

Fine-tunes a model for each seed, or takes those that ``before_and_after.py`` left in the folder ``--models``. Then
removes each decile of the singular values from all matrices of one role, and beside it a random control, and
evaluates. Prints the change of the accuracy, its correlation with the p-values of the vectors removed, and draws
Fig. 7. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from fine_tuning import FineTuning, parser_of, roles_in_blocks, show

from hf_rmt import SVDPruner, SweepTable
from hf_rmt.protocol import fine_tuned


def main(arguments: Sequence[str] | None = None) -> SweepTable:
    """Train, remove, evaluate, print, draw."""
    parser = parser_of(__doc__, "deciles-by-role")
    parser.add_argument("--roles", nargs="+", help="roles to remove from; those of the blocks by default")
    parser.add_argument("--models", help="folder with fine-tuned models; --out by default")
    options = parser.parse_args(arguments)
    task = FineTuning(options)
    evaluate = task.evaluation()
    tables = []
    for seed in range(options.seeds):
        model = fine_tuned(task.trainer_of, seed, options.models or options.out)
        folder = Path(options.out) / f"seed-{seed}"
        pruner = SVDPruner(model, folder=folder)
        roles = options.roles or roles_in_blocks(pruner)
        controls = options.controls
        tables.append(
            pruner.sweep(evaluate, deciles=range(1, 11), roles=roles, controls=controls, folder=folder, seed=seed)
        )
    table = reduce(add, tables)
    show(table, options.out)
    return table


if __name__ == "__main__":
    main()
