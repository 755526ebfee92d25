"""What a model does on a set of faces: figures, pictures, and a file a program can read.

found = evaluate(model, faces); print(found.markdown()); found.write(Path("results"))

Shapes: N faces, P landmarks. Points are in the pixels of the set's images. Errors are fractions of the normaliser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import draw, metrics, training
from .data import Plain, layout_of
from .inference import distribution
from .training import report
from .training.checkpoint import write_text
from .training.loop import Batches

__all__ = ["Doubt", "Evaluation", "evaluate", "markdown", "write"]

WORST = 24
"""Faces on the sheet."""


@dataclass(frozen=True)
class Doubt:
    """How well the spread tells good predictions from bad ones, over the faces that have an NME.

    aurc: area under the risk-coverage curve, a fraction as NME. oracle, random: that of an uncertainty that knows the
    errors and of one that tells nothing, which is the mean NME. auroc: `metrics.failure_auroc` at the threshold, over
    the faces whose truth allows an NME (a prediction that is not finite is a failure); NaN where all fail or none.
    """

    aurc: float
    oracle: float
    random: float
    auroc: float

    @property
    def excess(self) -> float:
        """What better spreads could win: aurc - oracle."""
        return self.aurc - self.oracle


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    metrics: over the set. regions: mean NME of each part, over the faces that have one; empty where the parts are not
    known. landmarks: mean error of each landmark [P], over the faces where it is known and predicted; NaN where none.
    names: N. points, truth: float32 [N, P, 2]. errors: NME [N], NaN where there is none. spread: [N], the root of the
    mean trace of a face's covariances over its normaliser, so that large and small faces compare; or None. doubt: None
    without a spread or an NME. worst: indices of the faces of greatest NME, those without one first. images: uint8
    [W, 3, S, S], those faces.
    """

    metrics: metrics.Metrics
    regions: dict[str, float]
    landmarks: Tensor
    names: tuple[str, ...]
    points: Tensor = field(repr=False)
    truth: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)
    spread: Tensor | None = field(repr=False)
    doubt: Doubt | None
    worst: Tensor = field(repr=False)
    images: Tensor = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Fractions and counts, fit for JSON: a figure that is not finite is None."""
        doubt = self.doubt and {"AURC": self.doubt.aurc, "oracle": self.doubt.oracle, "random": self.doubt.random}
        at = f"AUROC@{self.metrics.threshold:g}"
        return _plain(
            self.metrics.as_dict()
            | {
                "regions": self.regions,
                "landmarks": self.landmarks.tolist(),
                "failure_detection": doubt and doubt | {"excess": self.doubt.excess, at: self.doubt.auroc},  # type: ignore[union-attr]
                "worst": [self.names[index] for index in self.worst.tolist()],
            }
        )

    def markdown(self) -> str:
        """`markdown` of this one."""
        return markdown({"model": self})

    def write(self, folder: Path, name: str = "model", title: str = "") -> None:
        """`write` of this one."""
        write(folder, {name: self}, title)


def evaluate(
    source: Any,
    faces: Batches,
    normalizer: str | Tensor | float | None = None,
    threshold: float = 0.08,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    names: Sequence[str] | None = None,
    batch: int = 64,
) -> Evaluation:
    """Everything that is known of a model's predictions on a set. No random numbers: the same result every time.

    Args:
        source: a model of `fastforest.models`, evaluated in evaluation mode on its device; or what one predicted: points
            [N, P, 2] in the pixels of the set's images, and their covariance [N, P, 2, 2] or None.
        faces: the set, e.g. `data.Cached`, at the side of the model's images.
        normalizer: as `metrics.nme`; None: `training.default_normalizer`.
        threshold: of failure rate, AUC and failure detection, a fraction.
        regions: landmark indices by part; None: those of the layout of P landmarks, where it is known.
        names: N; None: the faces' numbers.
        batch: faces at a time.

    Raises:
        ValueError, TypeError: as `metrics.nme` and `metrics.region_nme`; names or predictions of another number of faces.
    """
    points, covariance, truth = _predictions(source, faces, batch)
    count, landmarks = truth.shape[:2]
    if names is not None and len(names) != count:
        raise ValueError(f"evaluate: names must hold {count}, one a face, got {len(names)}")
    if normalizer is None:
        normalizer = training.default_normalizer(landmarks)
    if regions is None:
        layout = layout_of(landmarks)
        regions = layout.regions if layout else {}
    figures = metrics.evaluate(points, truth, normalizer, threshold)
    errors = metrics.nme(points, truth, normalizer)
    by_landmark = metrics.landmark_errors(points, truth, normalizer)
    by_region = metrics.region_nme(points, truth, normalizer, regions)
    spread = None if covariance is None else _spread(covariance, truth, normalizer)
    judged = metrics.nme(truth, truth, normalizer).isfinite()
    worst = errors.nan_to_num(nan=math.inf).sort(descending=True, stable=True).indices[:WORST]
    return Evaluation(
        metrics=figures,
        regions={name: float(values.nanmean()) for name, values in by_region.items()},
        landmarks=torch.where(by_landmark.isfinite(), by_landmark, torch.nan).nanmean(dim=0),
        names=tuple(names) if names is not None else tuple(str(index) for index in range(count)),
        points=points,
        truth=truth,
        errors=errors,
        spread=spread,
        doubt=None if spread is None else _doubt(errors, spread, judged, threshold),
        worst=worst,
        images=faces.batch(worst)[0],
    )


def markdown(evaluations: Mapping[str, Evaluation]) -> str:
    """Tables in per cent, a row a model: the set's figures, the parts', failure detection."""
    first = next(iter(evaluations.values()))
    keys = [key for key in first.metrics.as_dict() if "[" in key]
    rows = {name: [found.metrics.as_dict()[key] for key in keys] for name, found in evaluations.items()}
    tables = [_table("", keys, rows)]
    if first.regions:
        rows = {name: list(found.regions.values()) for name, found in evaluations.items()}
        tables.append(_table(f"NME[{first.metrics.normalizer}] of", list(first.regions), rows))
    doubts = {name: found.doubt for name, found in evaluations.items() if found.doubt is not None}
    if doubts:
        columns = ["AURC", "oracle", "random", f"AUROC@{first.metrics.threshold:g}"]
        rows = {name: [doubt.aurc, doubt.oracle, doubt.random, doubt.auroc] for name, doubt in doubts.items()}
        tables.append(_table("spread", columns, rows))
    counts = [f"{first.metrics.images} faces"]
    counts += [f"{first.metrics.unknown} unknown landmarks left out"] if first.metrics.unknown else []
    failed = {name: found.metrics.invalid for name, found in evaluations.items() if found.metrics.invalid}
    counts += [f"{name}: {count} without an NME: failures, not in the mean" for name, count in failed.items()]
    return "\n".join([*tables, "; ".join(counts) + "."]) + "\n"


def write(folder: Path, evaluations: Mapping[str, Evaluation], title: str = "") -> None:
    """Writes what there is of one or several models on the same set; an existing file is replaced.

    results.json (`Evaluation.as_dict` by name), results.md (`markdown` and the pictures), faces.jsonl (a line a model and
    face: NME, spread, points, truth), ced.png, regions.png where there are parts, risk_coverage.png where there are
    spreads, worst.png (of several models: worst_NAME.png).

    Raises:
        ValueError: no evaluation, or ones with different normalisers or thresholds. OSError: the folder cannot be written.
    """
    first = next(iter(evaluations.values()), None)
    if first is None:
        raise ValueError("write: evaluations must hold at least one, got none")
    kind, threshold = first.metrics.normalizer, first.metrics.threshold
    for name, found in evaluations.items():
        if (found.metrics.normalizer, found.metrics.threshold) != (kind, threshold):
            got = f"{found.metrics.normalizer} and {found.metrics.threshold:g}"
            raise ValueError(f"write: {name} must have normaliser {kind} and threshold {threshold:g}, got {got}")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(evaluations, kind, threshold, title)
    for stem, picture in pictures.items():
        report.save_png(folder / f"{stem}.png", picture)
    results = {name: found.as_dict() for name, found in evaluations.items()}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    lines = [json.dumps(line) for name, found in evaluations.items() for line in _faces(name, found)]
    write_text(folder / "faces.jsonl", "\n".join(lines) + "\n")
    heading = [f"# {title}\n"] if title else []
    images = "\n".join(f"![{stem}]({stem}.png)" for stem in pictures)
    write_text(folder / "results.md", "\n".join([*heading, markdown(evaluations), images]) + "\n")


def _predictions(source: Any, faces: Batches, batch: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Points [N, P, 2], covariance [N, P, 2, 2] or None, truth [N, P, 2], all on the CPU."""
    rows = torch.arange(len(faces)).split(batch)
    if isinstance(source, tuple):
        given, spread = source
        return _checked(torch.as_tensor(given), spread, torch.cat([faces.batch(part)[1] for part in rows]))
    device, plain = next(source.parameters()).device, Plain(faces.size)
    source.eval()
    points, covariances, truths = [], [], []
    with torch.inference_mode():
        for part in rows:
            images, truth = plain(*faces.batch(part))
            found, covariance = distribution(source, images.to(device))
            points.append(found.detach().float().cpu())
            truths.append(truth)
            if covariance is not None:
                covariances.append(covariance.detach().float().cpu())
    return torch.cat(points), torch.cat(covariances) if covariances else None, torch.cat(truths)


def _checked(points: Tensor, covariance: Any, truth: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    if points.shape != truth.shape:
        raise ValueError(f"evaluate: points must be {list(truth.shape)}, got {list(points.shape)}")
    if covariance is None:
        return points.detach().cpu(), None, truth
    covariance = torch.as_tensor(covariance)
    if tuple(covariance.shape) != (*truth.shape, 2):
        raise ValueError(f"evaluate: covariance must be {[*truth.shape, 2]}, got {list(covariance.shape)}")
    return points.detach().cpu(), covariance.detach().cpu(), truth


def _spread(covariance: Tensor, truth: Tensor, normalizer: str | Tensor | float) -> Tensor:
    trace = covariance.double().diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    if isinstance(normalizer, str):
        normalizer = metrics.normalizer_distance(truth, normalizer)
    return trace.mean(dim=-1).clamp_min(0).sqrt() / normalizer


def _doubt(errors: Tensor, spread: Tensor, judged: Tensor, threshold: float) -> Doubt | None:
    """judged: [N], the faces whose truth has an NME. The others have no spread either, which would pass for a find."""
    valid = errors.isfinite()
    if not bool(valid.any()):
        return None
    error, doubt = errors[valid], spread[valid]
    return Doubt(
        aurc=metrics.aurc(error, doubt),
        oracle=metrics.aurc(error, error),
        random=float(error.mean()),
        auroc=metrics.failure_auroc(errors[judged], spread[judged], threshold),
    )


def _pictures(evaluations: Mapping[str, Evaluation], kind: str, threshold: float, title: str) -> dict[str, draw.Array]:
    errors = {name: found.errors for name, found in evaluations.items()}
    pictures = {"ced": draw.ced_figure(errors, kind, threshold, title)}
    regions = {name: found.regions for name, found in evaluations.items() if found.regions}
    if regions:
        pictures["regions"] = draw.regions_figure(regions, kind, title)
    doubts = {}
    for name, found in evaluations.items():
        if found.spread is not None and found.doubt is not None:
            valid = found.errors.isfinite()
            doubts[name] = (found.errors[valid], found.spread[valid])
    if doubts:
        pictures["risk_coverage"] = draw.risk_coverage_figure(doubts, kind, title)
    for name, found in evaluations.items():
        stem = "worst" if len(evaluations) == 1 else f"worst_{name}"
        pictures[stem] = _worst_sheet(name, found)
    return pictures


def _worst_sheet(name: str, found: Evaluation) -> draw.Array:
    rows = found.worst
    captions = []
    for index in rows.tolist():
        error = float(found.errors[index])
        short = found.names[index] if len(found.names[index]) <= 24 else "..." + found.names[index][-21:]
        captions.append(f"{short}  {100 * error:.1f} %" if math.isfinite(error) else f"{short}  no NME")
    points = found.points[rows]
    title = f"{name}: the {len(rows)} worst of {len(found.names)} faces, NME[{found.metrics.normalizer}]; white: truth"
    return draw.contact_sheet(found.images, points, found.truth[rows], captions=captions, title=title)


def _faces(model: str, found: Evaluation) -> list[dict[str, Any]]:
    spread = [None] * len(found.names) if found.spread is None else found.spread.tolist()
    rows = zip(found.names, found.errors.tolist(), spread, found.points.tolist(), found.truth.tolist(), strict=True)
    keys = ("name", "nme", "spread", "points", "truth")
    return [_plain({"model": model} | dict(zip(keys, row, strict=True))) for row in rows]


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, values in rows.items():
        cells = [f"{100 * value:.2f} %" if math.isfinite(value) else "-" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return report.plain(value)
