"""Do small eigenvectors of the residual stream matter, before fine-tuning and after it? (paper App. F, Fig. 14)

    python examples/stream_deciles.py sst2 path/to/folder            # folder with train and dev files
    python examples/stream_deciles.py wic path/to/folder --epochs 3

What each norm sees of the residual stream is projected onto the eigenvectors of its covariance without a tenth of
them. Hidden after fine-tuning, they are missing in a model that learned to use them; hidden before, the model is
fine-tuned without them. Beside each decile a random control: as many random directions. The covariance is that of
training rows, in the model that is projected. Every seed is one fine-tuned model and as many trainings as projections.
Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from fine_tuning import FineTuning, parser_of, show
from torch import nn
from transformers import DataCollatorWithPadding

from hf_rmt import ActivationCovariances, SweepTable, before_and_after, collect_stream

#: Rows a batch, when the covariance is collected.
_BATCH = 32


def main(arguments: Sequence[str] | None = None) -> SweepTable:
    """Train, project, evaluate, print, draw."""
    parser = parser_of(__doc__, "stream-deciles")
    parser.add_argument("--calibration", type=int, default=1000, help="training rows for the covariance")
    options = parser.parse_args(arguments)
    task = FineTuning(options)
    rows = list(task.training_rows[0])[: options.calibration]
    collate = DataCollatorWithPadding(task.tokenizer)
    batches = [collate(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]

    def streams(model: nn.Module) -> ActivationCovariances:
        return collect_stream(model, batches, progress=False)

    table = before_and_after(
        task.trainer_of,
        task.evaluation(),
        seeds=range(options.seeds),
        streams=streams,
        folder=options.out,
        controls=options.controls,
    )
    show(table, options.out)
    return table


if __name__ == "__main__":
    main()
