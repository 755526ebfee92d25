"""Gaussian leaves in the plane, and the three failures met in practice: python -m fastforest.recipes.toy --out DIR.

Writes toy.png, the leaves of one tree as ellipses while expectation maximisation moves them; failures.png, each failure
beside what the library does about it; and results.json. Under a minute; no data needed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from torch import Tensor

from ..cli.common import Parser, check_writable, guarded, whole
from ..nn import GaussianForest
from ..ops.gaussian import gaussian_log_prob
from ..training import report
from ..training.checkpoint import write_text

__all__ = ["clouds", "collapse", "converge", "drag", "main", "run", "same_outputs"]

FRAMES = (0, 1, 3, 10, 30)
POINTS, BAD, GOOD, INK = "#9aa5b1", "#d55e00", "#0072b2", "#222222"


def clouds(count: int, seed: int) -> Tensor:
    """Labels [count, 2]: six Gaussian clouds of different shapes, far from the origin.

    Raises:
        ValueError: count < 6.
    """
    if count < 6:
        raise ValueError(f"clouds: count must be at least 6, got {count}")
    rng = np.random.default_rng(seed)
    owner = np.arange(count) % 6
    turn = 2 * np.pi * owner / 6
    centre = np.stack([6 + 3 * np.cos(turn), 5 + 2.2 * np.sin(turn)], axis=1)
    long, short = 0.75, 0.22
    z = rng.standard_normal((count, 2)) * (long, short)
    tilt = turn + np.pi / 2 * (owner % 2)
    x = np.cos(tilt) * z[:, 0] - np.sin(tilt) * z[:, 1]
    y = np.sin(tilt) * z[:, 0] + np.cos(tilt) * z[:, 1]
    return torch.from_numpy(centre + np.stack([x, y], axis=1)).float()


def converge(labels: Tensor, frames: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """The leaves of a tree of depth 3 after each number of EM iterations: mean [8, 2], covariance [8, 2, 2], likelihood.

    k-means++ of the labels starts them; all leaves are as likely, as in the first half of the sequential scheme.
    """
    forest = GaussianForest(1, 2, trees=1, depth=3, seed=seed)
    forest.initialize(labels)
    found = []
    for done, wanted in zip((0, *frames), frames, strict=False):
        if wanted > done:
            forest.fit_leaves(labels, iterations=wanted - done)
        density = gaussian_log_prob(labels, forest.mean[0], forest.scale_tril[0])
        likelihood = float((density - math.log(8)).logsumexp(-1).mean())
        scale = forest.scale_tril[0]
        found.append({"iterations": wanted, "mean": forest.mean[0].clone(), "covariance": scale @ scale.mT})
        found[-1]["log_likelihood"] = likelihood
    return found


def collapse(seed: int, iterations: int = 60) -> dict[str, Any]:
    """Labels on a line, one of them far away: a covariance without a floor becomes singular, with it never does.

    The one without is textbook EM: Sigma = S2 / S0 - mu mu^T, nothing added.
    """
    rng = np.random.default_rng(seed)
    along = rng.uniform(0, 4, 60)
    labels = torch.from_numpy(np.stack([along, 0.5 * along], axis=1)).float()
    labels = torch.cat([labels, torch.tensor([[1.0, 3.0]])])
    mean, covariance = labels[[0, 20, 40, 60]].clone(), torch.eye(2).repeat(4, 1, 1)
    survived = iterations
    for iteration in range(iterations):
        scale, info = torch.linalg.cholesky_ex(covariance)
        if bool((info != 0).any()) or not bool(mean.isfinite().all()):
            survived = iteration
            break
        # Without log space either: densities as the published code has them.
        density = gaussian_log_prob(labels, mean, scale).exp()
        share = density / density.sum(1, keepdim=True)
        mass = share.sum(0)
        mean = share.T @ labels / mass[:, None]
        apart = labels[:, None] - mean
        covariance = torch.einsum("nk,nki,nkj->kij", share, apart, apart) / mass[:, None, None]
    forest = GaussianForest(1, 2, trees=1, depth=2, seed=seed)
    forest.initialize(labels)
    forest.fit_leaves(labels, iterations=iterations)
    scale = forest.scale_tril[0]
    return {
        "labels": labels,
        "without": {"iterations": survived, "mean": mean, "covariance": covariance},
        "with": {"iterations": iterations, "mean": forest.mean[0], "covariance": scale @ scale.mT},
        "least_deviation": {
            "without": float(torch.linalg.eigvalsh(covariance.double()).amin().clamp_min(0).sqrt()),
            "with": float(torch.linalg.eigvalsh((scale @ scale.mT).double()).amin().sqrt()),
        },
        "finite": bool(scale.isfinite().all() and forest.mean.isfinite().all()),
    }


def same_outputs(labels: Tensor, seed: int, steps: int = 150) -> dict[str, Any]:
    """Features of a hundredth and of fifty times their due scale, a short training each. Weak units give every input
    the same output, and hardly learn; saturated ones send it to one leaf from the start, before anything is known.
    `SoftForest.calibrate` rescales the units once, and both start and learn alike.

    spread: deviation of the predictions over inputs, over that of the labels. error: root of the mean squared one, in
    the same unit. leaves_reached: at the start, the exponential of the routing's entropy, of 16.
    """
    generator = torch.Generator().manual_seed(seed)
    known = (labels - labels.mean(0)) / labels.std(0)
    noise = torch.randn(len(labels), 14, generator=generator)
    features = torch.cat([known + 0.1 * noise[:, :2], noise], dim=1)
    found: dict[str, Any] = {}
    for name, scale in (("weak", 0.01), ("saturated", 50.0)):
        for calibrated in (False, True):
            torch.manual_seed(seed)
            forest = GaussianForest(16, 2, depth=4, units=32, seed=seed)
            forest.initialize(labels)
            given = scale * features
            if calibrated:
                forest.calibrate(given)
            with torch.no_grad():
                prob = forest.routing(given)
            # In proportion to the weights: what differs between the cases is the scale of the units alone.
            rate = 0.05 * float(forest.routing.weight.detach().square().mean().sqrt())
            descent = torch.optim.Adam(forest.parameters(), rate)
            for step in range(steps):
                descent.zero_grad()
                forest.loss(given, labels).backward()
                descent.step()
                if step % 20 == 19:
                    forest.accumulate(given, labels)
                    forest.update()
            with torch.no_grad():
                pred = forest(given)
            found[f"{name}, calibrated" if calibrated else name] = {
                "pred": pred,
                "spread": float(pred.std(0).norm() / labels.std(0).norm()),
                "error": float((pred - labels).square().mean(0).sum().sqrt() / labels.std(0).norm()),
                "leaves_reached": float((-torch.xlogy(prob, prob).sum(-1)).exp().mean()),
            }
    return found


def drag(labels: Tensor, seed: int) -> dict[str, Any]:
    """Learned mixing weights pi that multiply a leaf's probability but are not normalised over the leaves a sample
    reaches: the mean, sum pi P mu, shrinks to the origin. The mixture's own weights sum to 1.

    pull: distance of the mean prediction to the mean label, over the latter's distance to the origin.
    """
    torch.manual_seed(seed)
    forest = GaussianForest(16, 2, trees=1, depth=3, units=16, seed=seed)
    forest.initialize(labels)
    features = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        log_prob = forest.routing.log_prob(features)[:, 0]
    density = gaussian_log_prob(labels, forest.mean[0], forest.scale_tril[0])
    share = (log_prob + density).softmax(1).mean(0)
    shrunk = (log_prob.exp() * share) @ forest.mean[0]
    kept = (log_prob + share.log()).softmax(1) @ forest.mean[0]
    own = forest(features).detach()
    away = float(labels.mean(0).norm())
    means = {"unnormalised": shrunk, "normalised": kept, "library": own}
    return {
        "labels": labels,
        "means": means,
        "pull": {name: float((value.mean(0) - labels.mean(0)).norm()) / away for name, value in means.items()},
    }


def run(out: Path, samples: int = 900, seed: int = 0) -> dict[str, Any]:
    """The whole recipe; returns what results.json holds.

    Raises:
        BadInput: out cannot be written.
    """
    check_writable(out)
    labels = clouds(samples, seed)
    frames = converge(labels, FRAMES, seed)
    collapsed, same, dragged = collapse(seed), same_outputs(labels[:300], seed), drag(labels, seed)
    summary = {
        "samples": samples,
        "seed": seed,
        "convergence": [{key: frame[key] for key in ("iterations", "log_likelihood")} for frame in frames],
        "collapse": {
            "iterations_without_floor": collapsed["without"]["iterations"],
            "least_deviation": collapsed["least_deviation"],
            "finite_with_floor": collapsed["finite"],
        },
        "same_outputs": {
            name: {key: value for key, value in case.items() if key != "pred"} for name, case in same.items()
        },
        "drag": dragged["pull"],
    }
    out.mkdir(parents=True, exist_ok=True)
    report.save_png(out / "toy.png", _convergence_picture(labels, frames))
    report.save_png(out / "failures.png", _failures_picture(labels[:300], collapsed, same, dragged))
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _convergence_picture(labels: Tensor, frames: list[dict[str, Any]]) -> np.ndarray:
    figure = Figure(figsize=(3.1 * len(frames), 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(frames), sharex=True, sharey=True)
    for axes, frame in zip(panels, frames, strict=True):
        _points(axes, labels, POINTS, "label")
        _ellipses(axes, frame["mean"], frame["covariance"], GOOD, "leaf, 2 deviations")
        started = frame["iterations"] == 0
        name = "k-means++ start" if started else f"{frame['iterations']} iteration{'s' * (frame['iterations'] > 1)}"
        _panel(axes, f"{name}\nmean log likelihood {frame['log_likelihood']:.3f}", None)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9, markerscale=1.5)
    return _rgb(figure)


def _failures_picture(
    labels: Tensor, collapsed: dict[str, Any], same: dict[str, Any], dragged: dict[str, Any]
) -> np.ndarray:
    """A column a failure: above what goes wrong, below what the library does."""
    figure = Figure(figsize=(12.5, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, case, colour in ((panels[0, 0], "without", BAD), (panels[1, 0], "with", GOOD)):
        _points(axes, collapsed["labels"], POINTS, "labels on a line, one astray")
        _ellipses(axes, collapsed[case]["mean"], collapsed[case]["covariance"], colour, "leaf, 2 deviations")
        least = collapsed["least_deviation"][case]
        if case == "without":
            title = (
                f"1. No floor: singular after {collapsed[case]['iterations']} iterations\nleast deviation {least:.1e}"
            )
        else:
            title = f"Floor: sound after {collapsed[case]['iterations']} iterations\nleast deviation {least:.3f}"
        _panel(axes, title, "upper left", (-0.6, 4.6), (-0.4, 5.2))
    for axes, case, colour in ((panels[0, 1], "weak", BAD), (panels[1, 1], "weak, calibrated", GOOD)):
        _points(axes, labels, POINTS, "labels")
        _points(axes, same[case]["pred"], colour, "predictions, trained")
        bad = "2. Units too weak: one output for every input" if case == "weak" else "Calibrated units: outputs differ"
        _panel(
            axes, f"{bad}\nerror {same[case]['error']:.2f} of the labels' deviation", "lower left", (0, 12), (-1.2, 10)
        )
    cases = ((panels[0, 2], "unnormalised", BAD), (panels[1, 2], "library", GOOD))
    for axes, case, colour in cases:
        _points(axes, dragged["labels"], POINTS, "labels")
        _points(axes, dragged["means"][case], colour, "predictions, untrained")
        axes.plot(0, 0, "+", color=INK, markersize=10, label="origin")
        dragging = case == "unnormalised"
        title = "3. Weights that sum to less than 1: dragged home" if dragging else "Mixture of weights that sum to 1"
        _panel(
            axes, f"{title}\nmean off by {dragged['pull'][case]:.0%} of its distance", "lower right", (-1, 12), (-2, 10)
        )
    return _rgb(figure)


def _points(axes: Axes, points: Tensor, colour: str, label: str) -> None:
    x, y = points.detach().double().numpy().T
    axes.plot(x, y, ".", color=colour, markersize=3.2, alpha=0.8, label=label)


def _ellipses(axes: Axes, mean: Tensor, covariance: Tensor, colour: str, label: str) -> None:
    """Two standard deviations; a leaf that is not finite has none to draw."""
    fine = mean.isfinite().all(-1) & covariance.isfinite().flatten(1).all(-1)
    values, vectors = np.linalg.eigh(covariance[fine].double().numpy())
    axis = 4 * np.sqrt(np.maximum(values, 0))
    angle = np.degrees(np.arctan2(vectors[:, 1, 1], vectors[:, 0, 1]))
    places = mean[fine].double().numpy()
    ellipses = EllipseCollection(
        axis[:, 1],
        axis[:, 0],
        angle,
        units="xy",
        offsets=places,
        transOffset=axes.transData,
        facecolors="none",
        edgecolors=colour,
        linewidths=1.6,
    )
    axes.add_collection(ellipses)
    axes.plot(*places.T, "o", color=colour, markersize=4, label=label)


def _panel(
    axes: Axes,
    title: str,
    legend: Any,
    x: tuple[float, float] = (1.8, 11.4),
    y: tuple[float, float] = (1.2, 8.8),
) -> None:
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.set_title(title, fontsize=10, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8, loc=legend, markerscale=1.5)


def _rgb(figure: Figure) -> np.ndarray:
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def _lines(summary: dict[str, Any]) -> str:
    first, last = summary["convergence"][0], summary["convergence"][-1]
    collapsed, same, pull = summary["collapse"], summary["same_outputs"], summary["drag"]
    least = collapsed["least_deviation"]
    lines = [
        f"EM            mean log likelihood {first['log_likelihood']:.3f} at the start, {last['log_likelihood']:.3f} after "
        f"{last['iterations']} iterations",
        f"collapse      without a floor: singular after {collapsed['iterations_without_floor']} iterations (least deviation "
        f"{least['without']:.1e}); with it: {least['with']:.3f}, finite: {collapsed['finite_with_floor']}",
    ]
    for name, case in same.items():
        lines.append(
            f"same outputs  {name}: predictions spread {case['spread']:.3f} of the labels', error {case['error']:.3f}; "
            f"{case['leaves_reached']:.1f} of 16 leaves reached at the start"
        )
    shares = ", ".join(f"{name} {value:.1%}" for name, value in pull.items())
    lines.append(f"drag          distance of the mean prediction, relative to the labels' mean: {shares}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(prog="fastforest.recipes.toy", description="Gaussian leaves in the plane, and three failures.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=whole(60), default=900, help="labels (default: 900)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    options = parser.parse_args(arguments)

    def report_results() -> None:
        print(_lines(run(options.out, options.samples, options.seed)))
        print(f"written to {options.out}")

    return guarded(report_results, options)


if __name__ == "__main__":
    sys.exit(main())
