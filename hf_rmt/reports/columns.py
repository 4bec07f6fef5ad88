"""The columns of a report's table, one sentence each. ``docs/columns.md`` is made from this file."""

from __future__ import annotations

COLUMNS: dict[str, str] = {
    "name": "Path of the matrix in the headless model, with `[query]`, `[expert=3]` where a parameter holds several.",
    "role": "What the matrix does in its block: `query`, `key`, `value`, `attention.output`, `intermediate`, `output`, "
    "`gate`, with `cross.` in cross-attention; else its path below the block.",
    "stack": "Which of several stacks of blocks it is in (`encoder`, `decoder`, `vision`, ...); empty where there is one.",
    "block": "Number of the transformer block, from 0; empty outside the blocks.",
    "expert": "Number of the expert in a mixture of experts, from 0; empty elsewhere.",
    "part": "Which part of a fused parameter (`query`, `gate`, `up`, ...); empty for a parameter of one matrix.",
    "rows": "Output features m, 1 or more.",
    "cols": "Input features n, 1 or more.",
    "sigma": "Standard deviation that the law uses, 0 or more; sets the scale of all edges.",
    "sigma_rule": "Where sigma comes from: `bulk`, `empirical`, `init`, or `given`.",
    "lower_edge": "Smallest singular value of the Marchenko-Pastur law, 0 for a square matrix; high for elongated ones.",
    "upper_edge": "Largest singular value of the law, above 0; grows with sigma.",
    "n_above": "Singular values above the upper edge, 0 to p; many mean that much was learned in large directions.",
    "n_below": "Singular values below the lower edge, 0 to p; many mean that much was learned in small directions.",
    "n_above_tw": "Singular values above the Tracy-Widom threshold at the chosen rate, corrected for the noise of "
    "sigma, 0 to p; any at all is evidence against pure noise.",
    "n_below_tw": "The same below the lower edge, 0 to p; always 0 for a square matrix, whose law begins at 0.",
    "n_above_bulk": "`n_above` under the `bulk` rule, 0 to p; as `n_above`.",
    "n_below_bulk": "`n_below` under the `bulk` rule, 0 to p; as `n_below`.",
    "n_above_empirical": "`n_above` under the `empirical` rule, 0 to p; spikes inflate this sigma, which hides some of them.",
    "n_below_empirical": "`n_below` under the `empirical` rule, 0 to p; too high where spikes inflate sigma.",
    "n_above_init": "`n_above` under the `init` rule, 0 to p; high also where the matrix merely grew as a whole.",
    "n_below_init": "`n_below` under the `init` rule, 0 to p; high also where weight decay shrank the matrix as a whole.",
    "mass_outside": "Share of the sum of s^2 beyond the edges, 0 to 1; high means that outliers dominate the matrix.",
    "mp_distance": "KS distance of the singular values from the law, 0 to 1; about 3 / p for noise, high for no agreement.",
    "hard_edge_p": "Chance of so small a smallest singular value in a square noise matrix (Edelman), 0 to 1; "
    "a high value means no collapse; empty for other shapes.",
    "s_max": "Largest singular value, the spectral norm, 0 or more; high means a strong amplification.",
    "s_min": "Smallest singular value, 0 or more; 0 means that the matrix does not have full rank (rounding of its entries makes up small values, see `note`).",
    "stable_rank": "Sum of s^2 over the largest s^2, 1 to p; high means that many directions share the energy.",
    "effective_rank": "Exponential of the entropy of s / sum s, 1 to p; high means a flat spectrum.",
    "alpha": "Exponent of the power law fitted to the tail of s^2, above 1; high means a light tail, noise-like (2 to 4 "
    "is typical of trained matrices).",
    "alpha_hat": "alpha times log10 of the largest s^2 (WeightWatcher's weighted alpha), any sign; high for a large norm "
    "or a light tail.",
    "mp_soft_rank": "Squared upper edge over the largest s^2, above 0; near 1 for noise, low for strong outliers.",
    "spacing_ratio": "Mean ratio of neighbouring spacings in the bulk, 0 to 1; 0.5307 for a random matrix, 0.386 for "
    "unrelated values.",
    "log_norm": "log10 of the squared Frobenius norm, any sign; high for a large matrix.",
    "log_alpha_norm": "log10 of the sum of s^(2 alpha), any sign; high for a heavy, large tail.",
    "right_significant": "Fraction of right singular vectors with p below 0.01, 0 to 1; 0.01 for noise, high means that "
    "many input directions were learned.",
    "left_significant": "The same of left singular vectors, 0 to 1; high means that many output directions were learned.",
    "right_discoveries": "Right singular vectors found by Benjamini-Hochberg at 5 %, 0 to p; high means much structure.",
    "left_discoveries": "Left singular vectors found by Benjamini-Hochberg at 5 %, 0 to p; high means much structure.",
    "right_plateau": "Median p-value of the right vectors, 0 to 1; 0.5 for noise, above it where one vector with a large "
    "mean pushes the others.",
    "left_plateau": "Median p-value of the left vectors, 0 to 1; as `right_plateau`.",
    "note": "Why a row is empty, its p-values are left out, or its bulk is rounding; empty otherwise.",
}

#: Added where a control was analysed.
CONTROL_COLUMNS: dict[str, str] = {
    "control_n_above": "`n_above` of the control under the same rule, 0 to p; high means heavy-tailed entries (shuffled).",
    "control_n_below": "`n_below` of the control under the same rule, 0 to p; as `n_below`.",
    "control_mp_distance": "`mp_distance` of the control, 0 to 1; what agreement looks like at this size.",
    "control_right_significant": "`right_significant` of the control, 0 to 1; about 0.01.",
    "control_left_significant": "`left_significant` of the control, 0 to 1; about 0.01.",
}

#: Added where covariances of activations were given.
OVERLAP_COLUMNS: dict[str, str] = {
    "overlap_above": "Mean overlap of right singular vectors above the upper edge with the eigenvectors of the covariance "
    "of what enters the matrix, 0 to 1; high means that these directions are the data's; empty where there are none.",
    "overlap_bulk": "The same between the edges, 0 to 1; near its null for directions that were not learned.",
    "overlap_below": "The same below the lower edge, 0 to 1; high means that small singular values hold features.",
    "overlap_null": "The overlap that 99 % of random vectors stay below, 0 to 1; high where vectors are short.",
    "overlap_rank_correlation": "Spearman correlation between overlap and -log p of the right vectors, -1 to 1; positive "
    "means that vectors that are not random are the data's.",
    "activation_rank": "Eigenvectors compared with: the rank of the covariance, 0 to n; below n where there were few "
    "tokens or unused directions.",
    "activation_top_share": "Share of the largest eigenvalue in the trace of the covariance, 0 to 1; high means that one "
    "direction, often the mean, dominates.",
    "activation_tokens": "Tokens behind the covariance, 1 or more.",
    "left_overlap_above": "`overlap_above` of left singular vectors with the covariance of the outputs, 0 to 1; empty "
    "where outputs were not collected. The outputs are made by the matrix itself, so that a random one overlaps too.",
    "left_overlap_bulk": "`overlap_bulk` of the left vectors, 0 to 1; as there.",
    "left_overlap_below": "`overlap_below` of the left vectors, 0 to 1; as there.",
    "left_overlap_null": "`overlap_null` of the left vectors, 0 to 1; as there.",
    "left_overlap_rank_correlation": "`overlap_rank_correlation` of the left vectors, -1 to 1; as there.",
    "left_activation_rank": "`activation_rank` of the outputs, 0 to m; at most n plus one, for the bias.",
    "left_activation_top_share": "`activation_top_share` of the outputs, 0 to 1; as there.",
    "left_activation_tokens": "Tokens behind the covariance of the outputs, 1 or more.",
}

_LATER = range(2, 11)

#: Of a comparison whose weights were at hand, after the change of every number of the report.
COMPARISON_COLUMNS: dict[str, str] = {
    "relative_change": "Frobenius norm of the change of W over that of W before, 0 or more; high means that training "
    "moved the matrix far.",
    "change_stable_rank": "Stable rank of the change, 1 to p; low means that training acted in few directions.",
    "right_energy_1": "Share of the energy of the change (of its squared Frobenius norm) in the first tenth of the right "
    "singular vectors before, that of the largest singular values, 0 to 1; above what a change without direction puts "
    "there, a tenth of p/n, training acted there.",
    **{f"right_energy_{d}": f"The same in tenth {d} of the right vectors, 0 to 1; as there." for d in _LATER},
    "right_energy_outside": "The same outside all right singular vectors before, 0 to 1; always 0 where m is at least "
    "n, else 1 - m/n is expected.",
    "left_energy_1": "The same in the first tenth of the left singular vectors before, 0 to 1; a tenth of p/m is expected.",
    **{f"left_energy_{d}": f"The same in tenth {d} of the left vectors, 0 to 1; as there." for d in _LATER},
    "left_energy_outside": "The same outside all left singular vectors before, 0 to 1; always 0 where n is at least m, "
    "else 1 - n/m is expected.",
    "right_intruders": "Intruder dimensions among the right vectors: of the ten largest after, those whose best match "
    "among all before is below 0.5, 0 to 10; high means new directions above the old ones.",
    "left_intruders": "The same among the left vectors, 0 to 10; as there.",
    "right_match": "Mean, over the ten largest right vectors after, of the absolute inner product with the best match "
    "before, 0 to 1; high means that they stayed what they were.",
    "left_match": "The same of the left vectors, 0 to 1; as there.",
    "note": "Why a row is empty, or that the matrix did not change; empty otherwise.",
}

#: Columns that say which matrix a row is about; all others are numbers, but for ``note``.
LABELS = ("name", "role", "stack", "block", "expert", "part", "sigma_rule", "note")


def as_markdown() -> str:
    """The page ``docs/columns.md``."""
    lines = ["# Columns of `report.to_pandas()`", "", "One row a matrix; `p = min(rows, cols)`.", ""]
    lines += ["| column | meaning, range, what a high value says |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in COLUMNS.items()]
    lines += ["", "With `control=` given, also:", "", "| column | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in CONTROL_COLUMNS.items()]
    lines += ["", "With `covariances=` given, also:", "", "| column | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in OVERLAP_COLUMNS.items()]
    lines += ["", "# Columns of `comparison.to_pandas()`", "", "After the labels, every number of the reports as"]
    lines += ["`<column>_change`, after minus before; where the weights were at hand, also:", ""]
    lines += ["| column | meaning, range, what a high value says |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in COMPARISON_COLUMNS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
