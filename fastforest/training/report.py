"""What a run tells: a bar on a terminal, a line of metrics and a picture a round."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import draw
from . import ranks
from .checkpoint import write_atomically, write_text

__all__ = ["Bar", "duration", "plain", "round_line", "save_png", "sheet", "spread_indices", "write_metrics"]

SHEET_FACES = 24


class Bar:
    """A progress bar of one line on standard error, with rate and time left; says nothing where that is not a terminal,
    and on one rank of many alone."""

    def __init__(self, label: str, total: float, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        silent = not stream.isatty() or ranks.rank() != 0
        self.bar = tqdm(
            total=total,
            desc=label,
            file=stream,
            leave=False,
            disable=silent,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f} %|{bar}| {remaining} left, {rate_fmt}{postfix}",
        )

    def show(self, done: float, note: str = "") -> None:
        """`done` of `total`; redraws at most ten times a second."""
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Wipes the line."""
        self.bar.close()


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(3725)
    ('1:15', '1:02:05')
    """
    whole = round(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return minutes if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def round_line(record: Mapping[str, Any]) -> str:
    """One round in one line: position, loss, the named metrics, dead leaves."""
    error = next(f"{key} {100 * value:.2f} %" for key, value in record.items() if key.startswith("NME["))
    dead = f"  dead leaves {record['dead_leaves']}" if record.get("dead_leaves") else ""
    return f"round {record['round']:3d}  {duration(record['seconds'])}  loss {record['loss']:.4g}  {error}{dead}"


def write_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl: one JSON object a round; a value that is not finite is null."""
    lines = (json.dumps({key: plain(value) for key, value in record.items()}) for record in history)
    write_text(path, "".join(line + "\n" for line in lines))


def sheet(images: Tensor, pred: Tensor, truth: Tensor, errors: Tensor, title: str) -> np.ndarray:
    """Contact sheet of the faces given, each with its NME. images uint8 [B, 3, S, S], points in their pixels."""
    captions = [f"{100 * error:.1f} %" if math.isfinite(error) else "no NME" for error in errors.tolist()]
    return draw.contact_sheet(images, pred, truth, captions=captions, title=title)


def spread_indices(count: int, wanted: int = SHEET_FACES) -> Tensor:
    """`wanted` of `count` indices, evenly spaced; all of them where there are fewer."""
    return torch.arange(min(wanted, count)) * count // min(wanted, count)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as PNG, atomically. OSError where the folder cannot be written."""
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))


def plain(value: Any) -> Any:
    """A number that JSON knows: one that is not finite is None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
