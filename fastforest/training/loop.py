"""The loop: rounds of network steps and then leaf steps, resumable to the same bits.

Shapes: B images of side S, P landmarks. Images float32 [B, 3, S, S] in [0, 1]; points [B, P, 2] in their pixels.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import metrics
from ..data import FLIP_68, Augment, Plain
from . import report
from .checkpoint import Checkpoint, CheckpointError, load, restore_weights, save
from .schedules import ANNEALINGS, LEARNING_RATES, anneal, learning_rate_factor

__all__ = ["Batches", "History", "TrainConfig", "TrainingError", "default_normalizer", "fit", "mean_shape", "predict"]

MIN_STEPS = 40
"""Of a round on a small set: each round also costs a leaf step, an evaluation and a picture."""

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Batches(Protocol):
    """Faces by index, as `data.Cached` gives them."""

    size: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor, /) -> tuple[Tensor, Tensor]: ...


class TrainingError(RuntimeError):
    """A run that cannot go on. The message is one sentence."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are for some hundreds to thousands of faces on a CPU.

    rounds, minutes: where to stop, whichever comes first; at least one is needed. Minutes are wall-clock time from the
    start of `fit`, pictures and evaluations included; the last round is cut short to keep them.
    steps: network steps a round; None: one pass over the training set, but at least `MIN_STEPS`.
    batch: faces a step.
    rate, weight_decay: of AdamW.
    schedule: "cosine", "step" or "constant".
    warmup: steps over which the learning rate rises linearly; steps, not a share of the run, because a run that its
    minutes end may have few on a busy machine, and unwarmed ones do lasting harm.
    steepness: (start, end) of the split nodes' steepness; None leaves it alone. annealing: "linear" or "exponential".
    leaf_faces: bound of the faces a leaf step accumulates over, drawn anew each round; 0: no leaf steps.
    clip: largest norm of the gradient; None: not clipped.
    ema: decay of the weights' running average, used for evaluation; None: no average.
    amp: bfloat16 autocast of the network steps.
    seed: of the order, augmentation and dropout (not of the model's first weights).
    normalizer: of the metrics; None: "inter_ocular" where the number of landmarks has it, else "box".
    threshold: of failure rate and AUC.
    """

    rounds: int | None = None
    minutes: float | None = None
    steps: int | None = None
    batch: int = 32
    rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 20
    steepness: tuple[float, float] | None = None
    annealing: str = "exponential"
    leaf_faces: int = 512
    clip: float | None = 5.0
    ema: float | None = None
    amp: bool = False
    seed: int = 0
    normalizer: str | None = None
    threshold: float = 0.08

    def __post_init__(self) -> None:
        if self.rounds is None and self.minutes is None:
            raise ValueError("TrainConfig: rounds or minutes must be given, got neither")
        for name, least in (("rounds", 1), ("steps", 1), ("batch", 1), ("warmup", 0), ("leaf_faces", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"TrainConfig: {name} must be an integer of at least {least}, got {value!r}")
        for name in ("minutes", "rate", "clip", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"TrainConfig: {name} must be a positive finite number, got {value!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"TrainConfig: weight_decay must not be negative, got {self.weight_decay!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"TrainConfig: ema must be in [0, 1), got {self.ema!r}")
        if self.steepness is not None and not all(0 < value < math.inf for value in self.steepness):
            raise ValueError(f"TrainConfig: steepness must be two positive numbers, got {self.steepness!r}")
        known = {"schedule": LEARNING_RATES, "annealing": ANNEALINGS, "normalizer": (None, *metrics.KINDS)}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(item) for item in allowed if item is not None)
                raise ValueError(f"TrainConfig: {name} must be one of {names}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        known = {field.name for field in fields(cls)}
        config = {key: value for key, value in values.items() if key in known}
        if config.get("steepness") is not None:
            config["steepness"] = tuple(config["steepness"])
        return cls(**config)


@dataclass
class History:
    """rounds: one dict a round, as in metrics.jsonl: round, step, seconds, loss (mean of the round's steps), rate,
    steepness, dead_leaves and the named metrics on the held-out faces. checkpoint, picture: the last files, if any."""

    rounds: list[dict[str, Any]]
    checkpoint: Path | None = None
    picture: Path | None = None

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[-1]


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
) -> History:
    """Trains in rounds; evaluates on the held-out faces after each.

    A round: network steps (AdamW on `model.loss` of augmented batches), then, for a model with leaves, statistics over
    at most `leaf_faces` training faces (`model.accumulate`) and the closed-form `model.update()`.

    With the same model, data, configuration and number of threads on the same machine, two runs agree bit for bit on
    the CPU when rounds, not minutes, end them; so do one run and the same run stopped after any round and resumed.
    The caller's random number generators are left as they were.

    Args:
        model: one of `fastforest.models`, on the device to train on; ends in evaluation mode, with the averaged
            weights if there is an average.
        train, held_out: `data.Cached` sets of one size, at least one face each.
        config: see `TrainConfig`.
        out: folder, made if missing; checkpoint.pt, metrics.jsonl and rounds/round_0001.png ... are written there,
            each atomically, after every round. None writes nothing.
        resume: go on from out/checkpoint.pt. Only rounds and minutes may differ from the configuration in it.
        augment: (uint8 images, points, generator) -> (float images, points); default `data.Augment`, mirroring only
            68-point faces.
        on_round: called with the round's record once its files are written.

    Raises:
        ValueError: no faces, sets that differ in size, resume without `out`.
        CheckpointError: out/checkpoint.pt missing, broken or of another run.
        TrainingError: loss or gradient not finite; what was written before stays.
        OSError: `out` cannot be written.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise ValueError(f"fit: train and held_out need at least one face, got {len(train)} and {len(held_out)}")
    if train.size != held_out.size:
        raise ValueError(f"fit: train and held_out must be of one size, got {train.size} and {held_out.size}")
    if resume and out is None:
        raise ValueError("fit: resume needs the folder of the run (out), got None")
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda, device_type="cuda"):
        run = _Run(model, train, held_out, config, out, augment)
        if resume:
            run.restore()
        return run.go(on_round)


class _Run:
    """The state of a run, and what is done to it in a round."""

    def __init__(
        self,
        model: Any,
        train: Batches,
        held_out: Batches,
        config: TrainConfig,
        out: Path | None,
        augment: Augmentation | None,
    ) -> None:
        self.started = time.monotonic()
        self.model, self.train, self.held_out, self.config = model, train, held_out, config
        self.out = None if out is None else Path(out)
        self.device = next(model.parameters()).device
        self.landmarks = held_out.batch([0])[1].shape[1]
        self.augment = augment or Augment(train.size, flip=FLIP_68 if self.landmarks == len(FLIP_68) else None)
        self.normalizer = config.normalizer or default_normalizer(self.landmarks)
        self.steps_a_round = config.steps or max(MIN_STEPS, math.ceil(len(train) / config.batch))
        self.optimizer = torch.optim.AdamW(  # fused: 10 ms a step on two cores where the default takes 55
            model.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True
        )
        self.ema = None if config.ema is None else {n: p.detach().clone() for n, p in model.named_parameters()}
        self.shape = mean_shape(train)
        self.history = History([])
        self.step, self.seconds_before, self.reserve = 0, 0.0, 0.0
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        if self.out is not None:
            (self.out / "rounds").mkdir(parents=True, exist_ok=True)

    def go(self, on_round: Callable[[dict[str, Any]], None] | None) -> History:
        while not self.finished():
            self.round()
            if on_round is not None:
                on_round(self.history.last)
        if self.ema is not None:
            self.model.load_state_dict(self.ema, strict=False)
        self.model.eval()
        return self.history

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def finished(self) -> bool:
        """Always at least one round, so that there is something to report."""
        if not self.history.rounds:
            return False
        rounds, minutes = self.config.rounds, self.config.minutes
        return (rounds is not None and len(self.history.rounds) >= rounds) or self.out_of_time(minutes)

    def out_of_time(self, minutes: float | None) -> bool:
        """`reserve` is what the end of the last round took: leaf step, evaluation, files."""
        return minutes is not None and self.seconds() + self.reserve >= 60 * minutes

    def progress(self) -> float:
        """Position in [0, 1] for the schedules; of steps where rounds end the run, so that it repeats exactly."""
        by_steps = self.step / (self.config.rounds * self.steps_a_round) if self.config.rounds else 0.0
        by_time = self.seconds() / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

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
            "rate": self.optimizer.param_groups[0]["lr"],
            "steepness": getattr(self.model, "steepness", None),
            "dead_leaves": dead,
        }
        with self.averaged():
            pred, truth = predict(self.model, self.held_out)
        record |= metrics.evaluate(pred, truth, self.normalizer, self.config.threshold).as_dict()
        self.history.rounds.append(record)
        if self.out is not None:
            self.write(self.out, pred, truth)
        self.reserve = time.monotonic() - ending

    def network_steps(self, number: int) -> float:
        """One round of gradient steps; the mean loss."""
        self.model.train()
        total, done = 0.0, 0
        order = self.order(self.steps_a_round * self.config.batch)
        bar = report.Bar(f"round {number}", self.steps_a_round)
        for rows in order.split(self.config.batch):
            if done and self.out_of_time(self.config.minutes):
                break
            total += self.network_step(rows, number, done + 1)
            done += 1
            bar.show(done, f"loss {total / done:.4g}")
        bar.close()
        return total / done

    def network_step(self, rows: Tensor, number: int, in_round: int) -> float:
        config, progress = self.config, self.progress()
        rate = config.rate * learning_rate_factor(config.schedule, progress)
        rate *= min(1.0, (self.step + 1) / (config.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if config.steepness is not None and hasattr(self.model, "steepness"):
            self.model.steepness = anneal(config.annealing, *config.steepness, progress)
        images, points = self.drawn(rows)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.amp):
            loss = self.model.loss(images, points)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(self.complaint(f"the loss is {value}", number, in_round))
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        if not math.isfinite(norm):
            raise TrainingError(self.complaint(f"the gradient's norm is {norm}", number, in_round))
        self.optimizer.step()
        self.step += 1
        if self.ema is not None and config.ema is not None:
            # Early averages lean on the weights of now, not on the untrained ones.
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter.detach(), 1 - decay)
        return value

    def leaf_step(self) -> int | None:
        """Closed-form update from a bounded sample of augmented training faces; the number of dead leaves."""
        if self.config.leaf_faces == 0 or not hasattr(self.model, "accumulate"):
            return None
        self.model.eval()
        faces = min(self.config.leaf_faces, len(self.train))
        with torch.no_grad():
            for rows in self.order(faces).split(self.config.batch):
                self.model.accumulate(*self.drawn(rows))
            return int(self.model.update())

    def order(self, count: int) -> Tensor:
        """`count` training faces: whole passes in random order, the last one cut."""
        passes = math.ceil(count / len(self.train))
        orders = [torch.randperm(len(self.train), generator=self.generator) for _ in range(passes)]
        return torch.cat(orders)[:count]

    def drawn(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, points = self.train.batch(rows)
        images, points = self.augment(images, points, self.generator)
        return images.to(self.device), points.to(self.device)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model, for an evaluation."""
        if self.ema is None:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.model.load_state_dict(self.ema, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)

    def complaint(self, what: str, number: int, in_round: int) -> str:
        kept = "no checkpoint was written yet"
        if self.history.checkpoint is not None:
            kept = f"the checkpoint of round {number - 1} is kept in {self.history.checkpoint}"
        return f"training stopped: {what} in round {number}, step {in_round}; {kept}"

    def write(self, out: Path, pred: Tensor, truth: Tensor) -> None:
        """Checkpoint first: the other files follow from it."""
        record, rows = self.history.last, report.spread_indices(len(pred))
        save(out / "checkpoint.pt", self.checkpoint())
        self.history.checkpoint = out / "checkpoint.pt"
        report.write_metrics(out / "metrics.jsonl", self.history.rounds)
        errors = metrics.nme(pred[rows], truth[rows], self.normalizer)
        title = report.round_line(record)
        picture = report.sheet(self.held_out.batch(rows)[0], pred[rows], truth[rows], errors, title)
        self.history.picture = self.picture_path(out)
        report.save_png(self.history.picture, picture)

    def picture_path(self, out: Path) -> Path:
        return out / "rounds" / f"round_{len(self.history.rounds):04d}.png"

    def checkpoint(self) -> Checkpoint:
        rng = {"torch": torch.get_rng_state(), "faces": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        steepness = getattr(self.model, "steepness", None)
        return Checkpoint(
            model=self.model.name,
            config=self.model.config(),
            weights=self.model.state_dict(),
            ema=self.ema,
            steepness=None if steepness is None else float(steepness),
            landmarks=self.landmarks,
            size=self.train.size,
            mean_shape=self.shape,
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            round=len(self.history.rounds),
            seconds=self.seconds(),
            rng=rng,
            train=asdict(self.config),
            faces=len(self.train),
            history=self.history.rounds,
        )

    def restore(self) -> None:
        """Puts everything back as it was when the checkpoint was written."""
        assert self.out is not None
        path = self.out / "checkpoint.pt"
        saved = load(path)
        self.check_same_run(path, saved)
        restore_weights(self.model, saved.weights, saved.steepness)
        self.optimizer.load_state_dict(saved.optimizer)
        if self.ema is not None and saved.ema is not None:
            self.ema = {name: tensor.to(self.device) for name, tensor in saved.ema.items()}
        self.step, self.seconds_before = saved.step, saved.seconds
        self.history = History(saved.history, path)
        if self.picture_path(self.out).exists():
            self.history.picture = self.picture_path(self.out)
        torch.set_rng_state(saved.rng["torch"])
        self.generator.set_state(saved.rng["faces"])
        if self.device.type == "cuda" and "cuda" in saved.rng:
            torch.cuda.set_rng_state(saved.rng["cuda"], self.device)

    def check_same_run(self, path: Path, saved: Checkpoint) -> None:
        now = {"model": self.model.name, "training faces": len(self.train), **asdict(self.config)}
        then = {"model": saved.model, "training faces": saved.faces, **asdict(TrainConfig.from_dict(saved.train))}
        now["config"], then["config"] = self.model.config(), saved.config
        for name in now:
            if name not in ("rounds", "minutes") and now[name] != then[name]:
                raise CheckpointError(
                    f"{path}: was written with {name} = {_short(then[name])}, got {_short(now[name])}"
                )


@torch.no_grad()
def predict(model: Any, faces: Batches, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Predictions and truth [N, P, 2] on the CPU, pixels of images of side `faces.size`; evaluation mode, float32."""
    model.eval()
    device = next(model.parameters()).device
    plain, predicted, truths = Plain(faces.size), [], []
    for rows in torch.arange(len(faces)).split(batch):
        images, points = plain(*faces.batch(rows))
        predicted.append(model(images.to(device)).float().cpu())
        truths.append(points)
    return torch.cat(predicted), torch.cat(truths)


def mean_shape(faces: Batches, bound: int = 4096) -> Tensor:
    """Mean landmarks [P, 2], float32, pixels of images of side `faces.size`; over the first `bound` faces."""
    sums, count = torch.zeros(0), min(bound, len(faces))
    for rows in torch.arange(count).split(256):
        points = faces.batch(rows)[1].double().sum(dim=0)
        sums = points if sums.numel() == 0 else sums + points
    return (sums / count).float()


def default_normalizer(landmarks: int) -> str:
    """ "inter_ocular" where the outer eye corners are known, else "box"."""
    return "inter_ocular" if landmarks in metrics.OUTER_EYE_CORNERS else "box"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
