"""The state of a run on the disk: what a checkpoint takes of it, and how it is put back."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import metrics
from . import pictures, report
from .checkpoint import Checkpoint, CheckpointError, load, restore_weights, save, write_atomically
from .schedules import stale_rounds
from .settings import FREE, TrainConfig

if TYPE_CHECKING:
    from .loop import Run

__all__ = ["History", "prepare", "restore", "write"]


@dataclass
class History:
    """rounds: one dict a round, as in metrics.jsonl: round, step, seconds, loss (mean of the round's steps), rate,
    batch, steepness, dead_leaves and the named metrics on the held-out faces. checkpoint, picture: the last files, if
    any."""

    rounds: list[dict[str, Any]]
    checkpoint: Path | None = None
    picture: Path | None = None

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[-1]


def prepare(run: Run, out: Path) -> None:
    """Makes the folders, and mends what a killed run left: half-written files, files that lag behind the checkpoint."""
    (out / "rounds").mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "rounds"):
        for leftover in folder.glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
    if run.history.rounds:
        _follow(run, out)


def write(run: Run, out: Path, pred: Tensor, truth: Tensor, inside: pictures.Inside | None) -> None:
    """Checkpoint first: the other files follow from it."""
    save(out / "checkpoint.pt", _checkpoint(run))
    _follow(run, out)
    record, rows = run.history.last, report.spread_indices(len(pred))
    errors = metrics.nme(pred[rows], truth[rows], run.normalizer)
    picture = report.sheet(run.held_out.batch(rows)[0], pred[rows], truth[rows], errors, report.round_line(record))
    run.history.picture = _picture_path(run, out)
    report.save_png(run.history.picture, picture)
    drawn = pictures.inside_figure(inside, run.history.rounds, run.normalizer)
    report.save_png(out / "rounds" / f"inside_{record['round']:04d}.png", drawn)


def restore(run: Run, path: Path) -> None:
    """Puts everything back as it was when the checkpoint was written.

    Raises:
        CheckpointError: as `load`, or of another run.
    """
    saved = load(path)
    _check_same_run(run, path, saved)
    restore_weights(run.model, saved.weights, saved.steepness)
    run.descent.optimizer.load_state_dict(saved.optimizer)
    run.descent.scaler.load_state_dict(saved.scaler)
    if run.descent.ema is not None and saved.ema is not None:
        run.descent.ema = {name: tensor.to(run.device) for name, tensor in saved.ema.items()}
    run.step, run.batch, run.seconds_before = saved.step, saved.batch, saved.seconds
    run.history = History(saved.history, path)
    if _picture_path(run, path.parent).exists():
        run.history.picture = _picture_path(run, path.parent)
    torch.set_rng_state(saved.rng["torch"])
    run.generator.set_state(saved.rng["faces"])
    if run.device.type == "cuda" and "cuda" in saved.rng:
        torch.cuda.set_rng_state(saved.rng["cuda"], run.device)


def _follow(run: Run, out: Path) -> None:
    """The files that say what the checkpoint says."""
    if stale_rounds(run.errors()) == 0:
        write_atomically(out / "best.pt", lambda temporary: _copy(out / "checkpoint.pt", temporary))
    report.write_metrics(out / "metrics.jsonl", run.history.rounds)


def _copy(path: Path, target: Path) -> None:
    shutil.copyfile(path, target)


def _picture_path(run: Run, out: Path) -> Path:
    return out / "rounds" / f"round_{len(run.history.rounds):04d}.png"


def _checkpoint(run: Run) -> Checkpoint:
    rng = {"torch": torch.get_rng_state(), "faces": run.generator.get_state()}
    if run.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.device)
    steepness = getattr(run.model, "steepness", None)
    return Checkpoint(
        model=run.model.name,
        config=run.model.config(),
        weights=run.model.state_dict(),
        ema=run.descent.ema,
        steepness=None if steepness is None else float(steepness),
        landmarks=run.landmarks,
        size=run.train.size,
        mean_shape=run.shape,
        optimizer=run.descent.optimizer.state_dict(),
        scaler=run.descent.scaler.state_dict(),
        step=run.step,
        round=len(run.history.rounds),
        seconds=run.seconds(),
        batch=run.batch,
        rng=rng,
        train=asdict(run.config),
        settings=run.settings,
        faces=len(run.train),
        history=run.history.rounds,
    )


def _check_same_run(run: Run, path: Path, saved: Checkpoint) -> None:
    now = {"model": run.model.name, "training faces": len(run.train), **asdict(run.config)}
    then = {"model": saved.model, "training faces": saved.faces, **asdict(TrainConfig.from_dict(saved.train))}
    now["config"], then["config"] = run.model.config(), saved.config
    for name in now:
        if name not in FREE and now[name] != then[name]:
            raise CheckpointError(f"{path}: was written with {name} = {_short(then[name])}, got {_short(now[name])}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
