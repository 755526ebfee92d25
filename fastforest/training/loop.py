"""The loop: rounds of network steps and then leaf steps, resumable to the same bits.

Shapes: B images of side S, P landmarks. Images float32 [B, 3, S, S] in [0, 1]; points [B, P, 2] in their pixels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Augment, DataError, layout_of
from ..models.norm import synchronize_batch_norm
from . import pictures, ranks, report, state
from .errors import TrainingError
from .evaluation import default_normalizer, predict_over_ranks
from .feed import Augmentation, Batches, Feed
from .logs import StepLog
from .schedules import anneal, learning_rate_factor, plateau_factor, stale_rounds
from .settings import TrainConfig
from .state import History
from .steps import Descent, is_out_of_memory

__all__ = ["MIN_STEPS", "fit", "mean_shape"]

MIN_STEPS = 40
"""Of a round on a small set: each round also costs a leaf step, an evaluation and a picture."""
START_FACES = 512
"""Bound of the faces that a model starts from where no leaf step bounds them."""

log = logging.getLogger(__name__)


def fit(
    model: Any,
    train: Batches,
    held_out: Batches,
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    augment: Augmentation | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    settings: dict[str, Any] | None = None,
) -> History:
    """Trains in rounds; evaluates on the held-out faces after each.

    First, once, a model that has `start(images, points)` sees a bounded sample of augmented training faces, with the mean
    shape in place of unknown landmarks. A round: network steps (AdamW on `model.loss` of augmented batches), then, for a
    model with leaves, statistics over at most `leaf_faces` training faces (`model.accumulate`) and the closed-form
    `model.update()`. A landmark that is NaN has weight 0.

    With the same model, data, configuration and number of threads on the same machine, two runs agree bit for bit on
    the CPU when rounds, not minutes, end them; so do one run and the same run killed at any moment and resumed.
    The caller's random number generators are left as they were.

    In a process group, every rank calls `fit` with the same arguments, takes its part of every batch and of the
    evaluation, and ends with the same model: that of one process, but for rounding. BatchNorm is over all ranks.
    Only rank 0 writes files and calls `on_round`.

    When memory runs out, the batch is halved for the rest of the run, which the log tells (`logging`, steps.jsonl).

    Args:
        model: one of `fastforest.models`, on the device to train on; ends in evaluation mode, with the averaged
            weights if there is an average.
        train, held_out: `data.Cached` sets of one size, at least one face each.
        config: see `TrainConfig`.
        out: folder, made if missing; checkpoint.pt, best.pt (of the round with the lowest watched error),
            metrics.jsonl and rounds/round_0001.png, rounds/inside_0001.png ... are written there, each atomically,
            after every round, and steps.jsonl during it. None writes nothing.
        resume: go on from out/checkpoint.pt. Only `settings.FREE` may differ from the configuration in it.
        augment: (uint8 images, points, generator) -> (float images, points), on the model's device; default
            `data.Augment`, mirroring only faces of a known layout.
        on_round: called with the round's record once its files are written.
        settings: kept in the checkpoint, plain values: the resolved configuration of the command line.

    Raises:
        ValueError: no faces, sets that differ in size, resume without `out`.
        CheckpointError: out/checkpoint.pt missing, broken or of another run.
        TrainingError: before anything is written: a configuration that the model, the landmarks, the number of ranks or
            the packages at hand do not allow. Later: loss or gradient not finite, or no memory for the smallest batch;
            what was written before stays.
        OSError: `out` cannot be written.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise ValueError(f"fit: train and held_out need at least one face, got {len(train)} and {len(held_out)}")
    if train.size != held_out.size:
        raise ValueError(f"fit: train and held_out must be of one size, got {train.size} and {held_out.size}")
    if resume and out is None:
        raise ValueError("fit: resume needs the folder of the run (out), got None")
    _check_fits(config, model, held_out, writes=out is not None)
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda, device_type="cuda"):
        run = Run(model, train, held_out, config, out, augment, settings or {}, resume)
        return run.go(on_round)


class Run:
    """The state of a run, and what is done to it in a round."""

    def __init__(
        self,
        model: Any,
        train: Batches,
        held_out: Batches,
        config: TrainConfig,
        out: Path | None,
        augment: Augmentation | None,
        settings: dict[str, Any],
        resume: bool,
    ) -> None:
        self.started = time.monotonic()
        self.model, self.train, self.held_out, self.config, self.settings = model, train, held_out, config, settings
        self.out = None if out is None else Path(out)
        self.writes = out is not None and ranks.rank() == 0
        self.device = next(model.parameters()).device
        self.landmarks = held_out.batch([0])[1].shape[1]
        self.normalizer = config.normalizer or default_normalizer(self.landmarks)
        self.watched = "loss" if config.watch == "loss" else f"NME[{self.normalizer}]"
        self.steps_a_round = config.steps or max(MIN_STEPS, math.ceil(len(train) / config.batch))
        self.shape = mean_shape(train)
        self.history = History([])
        self.step, self.batch, self.seconds_before, self.reserve = 0, config.batch, 0.0, 0.0
        self.log: StepLog | None = None
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        layout = layout_of(self.landmarks)
        changes = augment or Augment(train.size, flip=layout.flip if layout else None)
        self.feed = Feed(train, changes, self.generator, self.device)
        if ranks.count() > 1:
            synchronize_batch_norm(model)
        if not resume:
            self.start()
        ranks.broadcast(model)
        self.descent = Descent(model, config, self.device)
        if self.out is not None and resume:
            state.restore(self, self.out / "checkpoint.pt")
        if self.out is not None and self.writes:
            state.prepare(self, self.out)

    def start(self) -> None:
        """Clusters, calibration: whatever the model sets by data before its first step, of faces as training sees them."""
        if not hasattr(self.model, "start"):
            return
        faces = min(self.config.leaf_faces or START_FACES, len(self.train))
        images, points = self.train.batch(self.feed.order(faces))
        images, points, weight, _ = self.feed.augmented(images, points)
        if weight is not None:  # an unknown landmark is where it is in the mean
            points = torch.where((weight > 0)[..., None], points, self.shape.to(points))
        self.model.eval()
        with torch.no_grad():
            self.model.start(images, points)

    def go(self, on_round: Callable[[dict[str, Any]], None] | None) -> History:
        with contextlib.ExitStack() as stack:
            if self.out is not None and self.writes:
                self.log = stack.enter_context(
                    contextlib.closing(StepLog(self.out, self.step, self.config.tensorboard))
                )
            while not self.finished():
                self.round()
                if on_round is not None and ranks.rank() == 0:
                    on_round(self.history.last)
        if self.descent.ema is not None:
            self.model.load_state_dict(self.descent.ema, strict=False)
        self.model.eval()
        return self.history

    # where the run stands

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def errors(self) -> list[float]:
        """The watched error of every round."""
        return [record[self.watched] for record in self.history.rounds]

    def finished(self) -> bool:
        """Always at least one round, so that there is something to report."""
        done, patience = len(self.history.rounds), self.config.patience
        if not done:
            return False
        stuck = patience is not None and stale_rounds(self.errors(), self.config.min_delta) >= patience
        return stuck or (self.config.rounds is not None and done >= self.config.rounds) or self.out_of_time()

    def out_of_time(self) -> bool:
        """`reserve` is what the end of the last round took: leaf step, evaluation, files."""
        if self.config.minutes is None:
            return False
        return bool(ranks.first_says(self.seconds() + self.reserve >= 60 * self.config.minutes, self.device))

    def progress(self) -> float:
        """Position in [0, 1] for the schedules; of steps where rounds end the run, so that it repeats exactly."""
        by_steps = self.step / (self.config.rounds * self.steps_a_round) if self.config.rounds else 0.0
        if self.config.minutes is None:
            return min(1.0, by_steps)
        by_time = ranks.first_says(self.seconds() / (60 * self.config.minutes), self.device)
        return min(1.0, max(by_steps, by_time))

    def rate(self, progress: float) -> float:
        config = self.config
        if config.schedule == "plateau":
            factor = plateau_factor(self.errors(), config.plateau, drop=config.drop, min_delta=config.min_delta)
        else:
            factor = learning_rate_factor(config.schedule, progress, milestones=config.milestones, drop=config.drop)
        return config.rate * factor * min(1.0, (self.step + 1) / (config.warmup + 1))

    # a round

    def round(self) -> None:
        number = len(self.history.rounds) + 1
        loss = self.network_steps(number)
        ending = time.monotonic()
        dead = self.leaf_step()
        record = {
            "round": number,
            "step": self.step,
            "seconds": self.seconds(),
            "loss": loss,
            "rate": self.descent.rate,
            "batch": self.batch,
            "steepness": getattr(self.model, "steepness", None),
            "dead_leaves": dead,
        }
        with self.descent.averaged():
            pred, truth = predict_over_ranks(self.model, self.held_out)
            inside = pictures.look_inside(self.model, self.held_out) if self.writes else None
        record |= metrics.evaluate(pred, truth, self.normalizer, self.config.threshold).as_dict()
        self.history.rounds.append(record)
        if self.out is not None and self.writes:
            state.write(self, self.out, pred, truth, inside)
        self.history.checkpoint = None if self.out is None else self.out / "checkpoint.pt"
        if self.log is not None:
            self.log.round(record)
        self.reserve = time.monotonic() - ending

    def network_steps(self, number: int) -> float:
        """One round of gradient steps; the mean loss."""
        self.model.train()
        total, done = 0.0, 0
        orders = self.feed.order(self.steps_a_round * self.batch).split(self.batch)
        with contextlib.closing(report.Bar(f"round {number}", self.steps_a_round)) as bar:
            for images, points in self.feed.read(orders):
                if done and self.out_of_time():
                    break
                total += self.network_step(images, points, number, done + 1)
                done += 1
                bar.show(done, f"loss {total / done:.4g}")
        return total / done

    def network_step(self, images: Tensor, points: Tensor, number: int, in_round: int) -> float:
        config, progress = self.config, self.progress()
        if config.steepness is not None and hasattr(self.model, "steepness"):
            self.model.steepness = anneal(config.annealing, *config.steepness, progress)
        loss = self.gradients(images, points, progress < config.pretrain, number, in_round)
        if not math.isfinite(loss):
            raise TrainingError(self.complaint(f"the loss is {loss}", number, in_round))
        norm = self.descent.apply(self.rate(progress))
        if self.descent.lost(norm):
            raise TrainingError(self.complaint(f"the gradient's norm is {norm}", number, in_round))
        self.step += 1
        self.descent.average(self.step)
        if self.log is not None and self.step % config.log_every == 0:
            self.log.step(self.step, self.batch, loss=loss, rate=self.descent.rate, gradient_norm=norm)
        return loss

    def gradients(self, images: Tensor, points: Tensor, pretraining: bool, number: int, in_round: int) -> float:
        """Those of a batch, or of its first half, quarter, ... where memory does not do. Returns the loss."""
        while True:
            self.descent.clear()
            loss, failed = 0.0, 0.0
            try:
                loss = self.descent.backward(
                    self.feed.augmented(images[: self.batch], points[: self.batch]), pretraining
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = 1.0
            if failed and ranks.count() > 1 and any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules()):
                # The other ranks wait for this one's batch statistics in the middle of their step.
                what = f"out of memory at {self.batch} faces a step, which ranks that share BatchNorm cannot halve"
                raise TrainingError(self.complaint(what, number, in_round))
            loss, failed = ranks.sums([loss, failed], self.device)
            if not failed:
                return loss
            self.halve(number, in_round)

    def halve(self, number: int, in_round: int) -> None:
        self.descent.free()
        if self.batch <= ranks.count():
            what = f"out of memory at {self.batch} faces a step, and there is no smaller batch"
            raise TrainingError(self.complaint(what, number, in_round))
        before, self.batch = self.batch, max(ranks.count(), self.batch // 2)
        if ranks.rank() == 0:
            log.warning("out of memory at %d faces a step: going on with %d", before, self.batch)
        if self.log is not None:
            self.log.line(self.step + 1, event="out of memory", batch=self.batch)

    def leaf_step(self) -> int | None:
        """Closed-form updates from bounded samples of augmented training faces; the dead leaves after the last."""
        config = self.config
        if config.leaf_faces == 0 or not hasattr(self.model, "accumulate") or self.progress() < config.pretrain:
            return None
        self.model.eval()
        faces, dead = min(config.leaf_faces, len(self.train)), 0
        with torch.no_grad():
            for _ in range(config.leaf_updates):
                for images, points in self.feed.read(self.feed.order(faces).split(self.batch)):
                    self.model.accumulate(*self.feed.augmented(images, points)[:3])
                dead = int(self.model.update())
        return dead

    def complaint(self, what: str, number: int, in_round: int) -> str:
        kept = "no checkpoint was written yet"
        if self.history.checkpoint is not None:
            kept = f"the checkpoint of round {number - 1} is kept in {self.history.checkpoint}"
        return f"training stopped: {what} in round {number}, step {in_round}; {kept}"


def _check_fits(config: TrainConfig, model: Any, faces: Batches, *, writes: bool) -> None:
    if config.batch < ranks.count():
        raise TrainingError(f"train.batch must be at least the number of ranks, {ranks.count()}, got {config.batch}")
    if config.pretrain and not hasattr(model, "pretrain_loss"):
        raise TrainingError(
            f"train.pretrain must be 0 for the model '{model.name}', which has no pretrain_loss, got {config.pretrain:g}"
        )
    if writes:
        try:
            model.config()
        except ValueError as error:  # a checkpoint names what it holds
            raise TrainingError(f"out must be None for this model: {error}") from None
    if config.normalizer is not None:
        try:
            metrics.normalizer_distance(faces.batch([0])[1], config.normalizer)
        except ValueError as error:
            raise TrainingError(f"train.normalizer does not suit the landmarks: {error}") from None


def mean_shape(faces: Batches, bound: int = 4096) -> Tensor:
    """Mean landmarks [P, 2], float32, pixels of images of side `faces.size`; over the first `bound` faces, of each
    landmark over those in which it is known.

    Raises:
        DataError: a landmark that is known in none of them.
    """
    count = min(bound, len(faces))
    sums, known = torch.zeros(()), torch.zeros(())
    for rows in torch.arange(count).split(256):
        points = faces.batch(rows)[1].double()
        finite = points.isfinite().all(dim=-1)
        sums = sums + torch.where(finite[..., None], points, 0).sum(dim=0)
        known = known + finite.sum(dim=0)
    if not bool((known > 0).all()):
        raise DataError(f"landmark {int(known.argmin())} is known in none of the {count} faces")
    return (sums / known[:, None]).float()
