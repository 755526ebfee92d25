"""steps.jsonl and TensorBoard's event files: what a run tells while it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import write_text
from .errors import TrainingError
from .report import plain

__all__ = ["StepLog"]


class StepLog:
    """One JSON object a line, written at once; with `tensorboard` the numbers of steps and rounds as scalars too.

    Lines after `step`, of steps that a resumed run does again, and a line that was cut are taken out.

    Raises:
        TrainingError: `tensorboard` without the package.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        path = out / "steps.jsonl"
        self.board = _board(out, step) if tensorboard else None
        write_text(path, "".join(line + "\n" for line in _lines_until(path, step)))
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.seen, self.since = step, time.monotonic()

    def step(self, step: int, faces: int, **numbers: float) -> None:
        """A line: step, the numbers, and images a second of `faces` a step since the last line."""
        now = time.monotonic()
        speed = faces * (step - self.seen) / max(now - self.since, 1e-9)
        self.seen, self.since = step, now
        self.line(step, **numbers, images_per_second=round(speed, 2))

    def line(self, step: int, **values: float | str) -> None:
        """A line: step and the values."""
        self.file.write(json.dumps({"step": step} | {name: plain(value) for name, value in values.items()}) + "\n")
        self._scalars("steps", step, values)

    def round(self, record: Mapping[str, Any]) -> None:
        """A round's numbers, for TensorBoard: metrics.jsonl has them. The time since is no step's."""
        self._scalars("rounds", record["step"], record)
        if self.board is not None:
            self.board.flush()
        self.since = time.monotonic()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self.board is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{group}/{name}", value, step)


def _board(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "train.tensorboard needs the package tensorboard: pip install 'fastforest[tensorboard]'"
        ) from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _lines_until(path: Path, step: int) -> list[str]:
    if step == 0 or not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            until = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            until = False
        if until:
            lines.append(line)
    return lines
