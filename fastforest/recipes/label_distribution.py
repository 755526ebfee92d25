"""Label distributions, ten-fold: python -m fastforest.recipes.label_distribution --data FILE|DIR|synthetic --out DIR.

Cross validation of `LabelDistributionForest` behind a small network, of softmax regression and of the mean distribution
on MATLAB sets of features and label distributions. Everything that is fitted, the standardisation of the features and
the softmax regression's weight decay included, is fitted on the training folds. Writes results.json and results.md: the
six measures of the field, mean and deviation over the folds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import data, measures
from ..cli.common import BadInput, Parser, check_writable, guarded, whole
from ..nn import LabelDistributionForest
from ..training import report
from ..training.checkpoint import write_text
from ..training.schedules import learning_rate_factor

__all__ = ["LabelDistributionRecipe", "Network", "Preparation", "folds", "main", "run", "softmax_regression"]

MODELS = ("forest", "softmax regression", "mean distribution")
DECAYS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Of softmax regression: half the squared norm of the weights is added to the mean loss with this factor."""
WIDTH = 8.0
"""Prepared features are cut at so many deviations."""


@dataclass(frozen=True)
class LabelDistributionRecipe:
    """All that is chosen by hand.

    hidden: units of the layer before the forest, 0 for none. trees, depth, units, objective: of the forest. members:
    networks whose predictions are averaged. epochs, batch, rate, weight_decay: of AdamW, cosine schedule with warm-up.
    dropout: of the features; hidden_dropout: of the hidden layer. average: decay of the weights' moving average.
    update_every: steps between leaf updates, each of `iterations` bounding steps on `replay` rows.
    ramps: pieces into which a feature of many values is cut at its quantiles; 0 leaves it whole. binary_power: features
    of two values are divided by deviation ** binary_power: 1 is to standardise, 0 leaves rare ones small. min_count:
    features of two values of which one is seen in fewer training rows are dropped; member i takes min_count[i % len],
    softmax regression the first.
    """

    hidden: int = 128
    trees: int = 5
    depth: int = 4
    units: int = 64
    objective: str = "per_tree"
    members: int = 2
    epochs: int = 30
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    hidden_dropout: float = 0.5
    average: float = 0.995
    update_every: int = 25
    iterations: int = 5
    replay: int = 2048
    ramps: int = 0
    binary_power: float = 1.0
    min_count: tuple[int, ...] = (1,)


OF_SETS: dict[str, dict[str, Any]] = {
    "SJAFFE": {"epochs": 200, "rate": 3e-3},
    "FG-Net": {"epochs": 60, "rate": 3e-3, "weight_decay": 1.0, "hidden_dropout": 0.2},
    "synthetic": {"epochs": 50, "hidden_dropout": 0.2, "dropout": 0.0, "weight_decay": 0.01},
    "Movie": {
        "hidden": 1024,
        "depth": 5,
        "units": 128,
        "epochs": 12,
        "batch": 128,
        "rate": 2e-3,
        "weight_decay": 3.0,
        "ramps": 10,
        "binary_power": 0.0,
        "members": 3,
        "min_count": (10, 5, 10),
    },
}
"""What differs by the set's name; chosen on validation splits of the first fold's training rows."""


class Preparation:
    """Features made ready for a linear layer, by the training rows alone.

    Constant features are dropped, and those of two values of which one is rarer than `min_count`. The others of two
    values are centred and divided by their deviation ** binary_power, all of them together then scaled to a mean
    variance of 1. Features of many values are standardised, or, with `ramps`, each becomes that many ramps between its
    quantiles, standardised: a linear layer then sees any piecewise linear function of it.
    """

    def __init__(self, features: Tensor, ramps: int = 0, binary_power: float = 1.0, min_count: int = 1) -> None:
        low, high = features.amin(0), features.amax(0)
        two = ((features == low) | (features == high)).all(0)
        rarer = torch.minimum((features == low).sum(0), (features == high).sum(0))
        self.binary = (two & (low < high) & (rarer >= min_count)).nonzero()[:, 0]
        self.real = (~two).nonzero()[:, 0]
        self.edges: Tensor | None = None
        if ramps:
            levels = torch.linspace(0, 1, ramps + 1, dtype=features.dtype)
            self.edges = features[:, self.real].quantile(levels, dim=0)
        rows = self._columns(features)
        self.mean = rows.mean(0)
        deviation = (rows - self.mean).square().mean(0).sqrt()
        # A ramp between equal quantiles is constant.
        self.kept = deviation > 1e-6
        self.scale = deviation.where(self.kept, deviation.new_ones(()))
        count = len(self.binary)
        if count:
            variance = self.scale[:count] ** 2
            scale = self.scale[:count] ** binary_power
            self.scale[:count] = scale * (variance / scale**2).mean().sqrt()

    def __call__(self, features: Tensor) -> Tensor:
        rows = (self._columns(features) - self.mean) / self.scale
        return rows[:, self.kept].clamp(-WIDTH, WIDTH)

    def _columns(self, features: Tensor) -> Tensor:
        return torch.cat([features[:, self.binary], self._ramps(features[:, self.real])], dim=1)

    def _ramps(self, real: Tensor) -> Tensor:
        if self.edges is None:
            return real
        width = self.edges.diff(dim=0)
        steps = (real[:, None] - self.edges[:-1]) / torch.where(width > 0, width, 1.0)
        return torch.where(width > 0, steps.clamp(0, 1), 0.0).flatten(1)


class Network(nn.Module):
    """Dropout, a hidden layer if any, and a `LabelDistributionForest`."""

    def __init__(self, features: int, classes: int, recipe: LabelDistributionRecipe, seed: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(recipe.dropout)]
        if recipe.hidden:
            layers += [nn.Linear(features, recipe.hidden), nn.ReLU(), nn.Dropout(recipe.hidden_dropout)]
        self.body = nn.Sequential(*layers)
        self.head = LabelDistributionForest(
            recipe.hidden or features,
            classes,
            trees=recipe.trees,
            depth=recipe.depth,
            units=recipe.units,
            objective=recipe.objective,
            update_every=recipe.update_every,
            iterations=recipe.iterations,
            seed=seed,
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.body(features))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.head.loss(self.body(features), labels)


def folds(count: int, parts: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(training rows, test rows) of each part; a shuffle by the seed, sizes differ by at most 1.

    Raises:
        ValueError: fewer than 2 parts, or fewer than 2 rows a part.

    >>> [test.numel() for _, test in folds(11, 4, 0)]
    [3, 3, 3, 2]
    """
    if parts < 2 or count < 2 * parts:
        raise ValueError(f"folds: needs at least 2 parts and 2 rows for each, got {parts} parts and {count} rows")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    pieces = order.tensor_split(parts)
    return [(torch.cat([*pieces[:i], *pieces[i + 1 :]]), piece) for i, piece in enumerate(pieces)]


def softmax_regression(features: Tensor, labels: Tensor, decay: float, steps: int = 300) -> Callable[[Tensor], Tensor]:
    """The maximum-entropy model, p = softmax(W x + b): least cross-entropy plus decay |W|^2 / 2, by L-BFGS in float64.

    Returns:
        the function from features [N, F] to distributions [N, C].
    """
    x, y = features.double(), labels.double()
    weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = y.mean(0).clamp_min(1e-6).log().requires_grad_()
    descent = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> float:
        descent.zero_grad()
        value = -(y * functional.linear(x, weight, bias).log_softmax(-1)).sum(-1).mean()
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return float(value.detach())

    descent.step(loss)
    w, b = weight.detach().float(), bias.detach().float()
    return lambda rows: functional.linear(rows, w, b).softmax(-1)


def train_forest(
    features: Tensor, labels: Tensor, recipe: LabelDistributionRecipe, seed: int
) -> Callable[[Tensor], Tensor]:
    """One network on prepared features; predicts with the averaged weights and leaves fitted to all training rows."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    network = Network(features.shape[1], labels.shape[1], recipe, seed)
    network.eval()
    with torch.no_grad():
        network.head.calibrate(network.body(features[: recipe.replay]))
    network.head.initialize(labels)
    weights = list(network.parameters())
    averaged = [weight.detach().clone() for weight in weights]
    descent = torch.optim.AdamW(weights, recipe.rate, weight_decay=recipe.weight_decay)
    batch = min(recipe.batch, len(features))
    total, warmup = recipe.epochs * (len(features) // batch), 50
    step = 0
    while step < total:
        for rows in torch.randperm(len(features), generator=order).split(batch)[: len(features) // batch]:
            if step % recipe.update_every == 0:
                recent = torch.randperm(len(features), generator=order)[: recipe.replay]
                _fit_leaves(network, features[recent], labels[recent], recipe.iterations)
            rate = recipe.rate * learning_rate_factor("cosine", step / total) * min(1.0, (step + 1) / warmup)
            descent.param_groups[0]["lr"] = rate
            network.train()
            descent.zero_grad()
            network.loss(features[rows], labels[rows]).backward()
            descent.step()
            step += 1
            decay = min(recipe.average, step / (step + 10))
            torch._foreach_lerp_(averaged, [weight.detach() for weight in weights], 1 - decay)
    with torch.no_grad():
        for weight, mean in zip(weights, averaged, strict=True):
            weight.copy_(mean)
    _fit_leaves(network, features, labels, 20)

    @torch.no_grad()
    def predict(rows: Tensor) -> Tensor:
        return network(rows)

    return predict


def _fit_leaves(network: Network, features: Tensor, labels: Tensor, iterations: int) -> None:
    """Bounding steps with the routing held fixed, without dropout: leaves are fitted to what will be predicted with."""
    network.eval()
    with torch.no_grad():
        seen = network.body(features)
    for _ in range(iterations):
        network.head.accumulate(seen, labels)
        network.head.update()


def choose_decay(features: Tensor, labels: Tensor, seed: int) -> float:
    """The decay of softmax regression with the least K-L divergence on a tenth of the training rows."""
    train, held = folds(len(features), min(10, len(features) // 2), seed)[0]
    found = {
        decay: float(measures.distribution_measures(model(features[held]), labels[held])["kl"].mean())
        for decay in DECAYS
        for model in [softmax_regression(features[train], labels[train], decay, steps=100)]
    }
    return min(found, key=lambda decay: found[decay])


def cross_validate(
    given: data.DistributionSet, parts: int, seed: int, recipe: LabelDistributionRecipe
) -> dict[str, Any]:
    """What results.json holds of one set."""
    start = time.monotonic()
    found: dict[str, list[dict[str, float]]] = {model: [] for model in MODELS}
    decay = 0.0
    bar = report.Bar(given.name, parts)
    for part, (train, test) in enumerate(folds(len(given.features), parts, seed)):
        x, y = given.features[train], given.labels[train]
        rows, truth = given.features[test], given.labels[test]
        prepared = {
            least: Preparation(x, recipe.ramps, recipe.binary_power, least) for least in dict.fromkeys(recipe.min_count)
        }
        plain = prepared[recipe.min_count[0]]
        if part == 0:
            # Chosen once: on the first fold's training rows, as the settings of the forest were.
            decay = choose_decay(plain(x), y, seed)
        forests = []
        for member in range(recipe.members):
            own = prepared[recipe.min_count[member % len(recipe.min_count)]]
            forests.append(train_forest(own(x), y, recipe, 1000 * seed + part * recipe.members + member)(own(rows)))
        predicted = (
            torch.stack(forests).mean(0),
            softmax_regression(plain(x), y, decay)(plain(rows)),
            y.mean(0).expand_as(truth),
        )
        for model, pred in zip(MODELS, predicted, strict=True):
            values = measures.distribution_measures(pred, truth)
            found[model].append({name: float(value.mean()) for name, value in values.items()})
        bar.show(part + 1)
    bar.close()
    return {
        "samples": len(given.features),
        "features": given.features.shape[1],
        "classes": given.labels.shape[1],
        "renormalised": given.renormalised,
        "seconds": round(time.monotonic() - start, 1),
        "softmax_decay": decay,
        "recipe": asdict(recipe),
        "models": {model: _aggregate(rows) for model, rows in found.items()},
    }


def _aggregate(rows: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, deviation (of folds, n - 1) and each fold's value by measure."""
    by_name = {name: [row[name] for row in rows] for name in measures.DISTRIBUTION_MEASURES}
    return {
        name: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)), "folds": values}
        for name, values in by_name.items()
    }


def run(name: str, out: Path, parts: int = 10, seed: int = 0, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole recipe; returns what results.json holds.

    Args:
        name: "synthetic", a .mat file or a folder of them.
        out: folder for the results, made if missing.
        parts: of the cross validation.
        seed: of folds, weights and order.
        changes: fields of `LabelDistributionRecipe` to set for every set.

    Raises:
        DataError: a set cannot be used. BadInput: out cannot be written, or a set is too small.
    """
    check_writable(out)
    sets = [data.synthetic_distributions(seed)] if name == "synthetic" else _read(Path(name))
    small = next((given for given in sets if len(given.features) < 2 * parts), None)
    if small is not None:
        raise BadInput(f"{small.name}: has {len(small.features)} rows, too few for {parts} folds")
    summary: dict[str, Any] = {"data": name, "folds": parts, "seed": seed, "sets": {}}
    for given in sets:
        recipe = replace(LabelDistributionRecipe(), **(OF_SETS.get(given.name, {}) | (changes or {})))
        summary["sets"][given.name] = cross_validate(given, parts, seed, recipe)
        print(_set_table(given.name, summary["sets"][given.name]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "results.md", _markdown(summary))
    return summary


def _read(path: Path) -> list[data.DistributionSet]:
    return [data.read_distributions(path)] if path.suffix == ".mat" else data.read_distributions_folder(path)


def _markdown(summary: dict[str, Any]) -> str:
    lines = [
        "# Label distributions",
        "",
        f"{summary['folds']}-fold cross validation, seed {summary['seed']}: mean +- deviation over the folds.",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(_set_table(*item) for item in summary["sets"].items())


def _set_table(name: str, found: dict[str, Any]) -> str:
    title = f"{name}: {found['samples']} samples, {found['features']} features, {found['classes']} classes"
    arrows = [f"{m} {'down' if measures.SMALLER_IS_BETTER[m] else 'up'}" for m in measures.DISTRIBUTION_MEASURES]
    lines = [f"{title} ({found['seconds']:.0f} s)", "", f"| model | {' | '.join(arrows)} |", "|---|" + "---|" * 6]
    for model, values in found["models"].items():
        cells = [f"{v['mean']:.4f} +- {v['deviation']:.4f}" for v in values.values()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(prog="fastforest.recipes.label_distribution", description="Label distributions, cross-validated.")
    parser.add_argument("--data", default="synthetic", metavar="synthetic|FILE|DIR", help="(default: synthetic)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=whole(2), default=10, help="(default: 10)")
    parser.add_argument("--epochs", type=whole(1), help="(default: by the set)")
    parser.add_argument("--members", type=whole(1), help="networks to average (default: by the set)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of folds, weights and order (default: 0)")
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    options = parser.parse_args(arguments)
    named = {"epochs": options.epochs, "members": options.members}
    changes = {key: value for key, value in named.items() if value is not None}

    def report_results() -> None:
        run(options.data, options.out, options.folds, options.seed, changes)
        print(f"written to {options.out}")

    return guarded(report_results, options)


if __name__ == "__main__":
    sys.exit(main())
