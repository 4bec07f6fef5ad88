"""Which singular values does a language model need? Deciles by role, and what lies outside the law against the bulk.

    python examples/perplexity.py path/to/model path/to/text.txt             # cut into rows of --length tokens
    python examples/perplexity.py path/to/model tokens.safetensors           # input_ids (rows, length)
    python examples/perplexity.py HuggingFaceTB/SmolLM2-135M stories.txt --separator "<|endoftext|>" --rows 32

First the rise of the perplexity when a decile is removed from all matrices of one role, beside a random control
(paper Fig. 7, of a causal model). Then the claim that a model needs what deviates from random matrix theory: what lies
outside of the Marchenko-Pastur law is removed, and against that as many components drawn from inside of it. As values
above the law are larger than any inside, there is a harder control for them: draws that take as much of the sum of
squares. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from fine_tuning import roles_in_blocks, show
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rmt import Bulk, Outliers, SVDPruner, SweepTable
from hf_rmt.evaluation import Perplexity
from hf_rmt.theory.controls import seed_for
from hf_rmt.theory.selection import Components, Selection

Equal = Literal["number", "energy"]
EQUAL: tuple[Equal, ...] = ("number", "energy")


@dataclass(frozen=True)
class FromBulk(Selection):
    """Components inside the law, drawn at random until they are as many as those outside, or weigh as much."""

    outside: Outliers
    equal: Equal
    draw: int = 0

    def mask(self, components: Components) -> torch.Tensor:
        """See ``Selection.mask``."""
        outside = self.outside.mask(components)
        inside = Bulk(self.outside.sigma, self.outside.rate).mask(components).nonzero()[:, 0]
        seed = seed_for(self.draw, f"{components.name}/{self}")
        order = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))]
        size = torch.ones_like(components.s) if self.equal == "number" else components.s**2
        before = size[order].cumsum(0) - size[order]
        mask = torch.zeros_like(outside)
        mask[order[before < size[outside].sum()]] = True
        return mask

    def __str__(self) -> str:
        return f"bulk, same {self.equal} as {self.outside}, draw {self.draw}"


def token_rows(options: argparse.Namespace) -> list[list[int]]:
    """Rows of token ids: those of a file, or the text of one."""
    if options.data.endswith(".safetensors"):
        return load_file(options.data)["input_ids"][: options.rows].tolist()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.data).read_text(encoding="utf-8")
    if options.separator:
        texts = [part.strip() for part in text.split(options.separator) if part.strip()][: options.rows]
        return tokenizer(texts, truncation=True, max_length=options.length)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return [ids[at : at + options.length] for at in range(0, len(ids) - 1, options.length)][: options.rows]


def outside_and_inside(pruner: SVDPruner, evaluate: Perplexity, roles: list[str], options: Any) -> SweepTable:
    """What lies above the law and below it, and the draws from inside, from all matrices and from each role."""
    selections: list[Selection] = []
    for outside in (Outliers("above", options.sigma), Outliers("below", options.sigma)):
        selections += [outside, *(FromBulk(outside, equal, draw) for equal in EQUAL for draw in range(options.draws))]
    return pruner.sweep(
        evaluate, selections=selections, roles=["all", *roles], folder=Path(options.out) / "outside-and-inside"
    )


def law_table(table: SweepTable) -> pd.DataFrame:
    """Rise of the log perplexity, in nats a token: of what lies outside of the law; mean and spread of the draws."""
    found = table.to_pandas()
    found["rise"] = np.log(found["score"] / found["baseline"])
    rows = []
    for (role, outside), own in found.groupby(["role", "selection"], sort=False):
        if not outside.startswith("outliers:") or not own["components"].iloc[0]:
            continue
        row = {"role": role, "removed": outside, "components": own["components"].iloc[0], "rise": own["rise"].iloc[0]}
        for equal in EQUAL:
            drawn = found["selection"].str.startswith(f"bulk, same {equal} as {outside}, ") & (found["role"] == role)
            draws = found[drawn]
            row |= {f"same {equal}": draws["rise"].mean(), f"± {equal}": draws["rise"].std()}
            row |= {f"drawn {equal}": draws["components"].mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> tuple[SweepTable, pd.DataFrame]:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id of a causal model")
    parser.add_argument("data", help="text file, or safetensors with input_ids")
    parser.add_argument("--separator", help="between the texts of the file; each is a row")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row of text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--roles", nargs="+", help="those of the blocks by default")
    parser.add_argument("--sigma", default="bulk", help="rule for the law: bulk, empirical or init")
    parser.add_argument("--draws", type=int, default=3, help="from inside of the law")
    parser.add_argument("--controls", type=int, default=1, help="random controls of each decile")
    parser.add_argument("--out", default="perplexity")
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    evaluate = Perplexity(token_rows(options))
    pruner = SVDPruner(model, folder=options.out)
    roles = options.roles or roles_in_blocks(pruner)
    deciles = pruner.sweep(evaluate, roles=roles, controls=options.controls, folder=Path(options.out) / "deciles")
    show(deciles, options.out)
    law = law_table(outside_and_inside(pruner, evaluate, roles, options))
    law.to_csv(Path(options.out) / "law.csv", index=False)
    print("rise of the log perplexity, in nats a token, when what lies outside of the law is removed, and when as many")
    print(f"are drawn from inside of it, or as much of the sum of squares: mean and spread of {options.draws} draws,")
    print("and how many were drawn (all that there are, where the inside has less)")
    print(law.round(4).to_string(index=False))
    return deciles, law


if __name__ == "__main__":
    main()
