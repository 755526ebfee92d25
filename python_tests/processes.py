"""Two ranks of a process group over gloo, each a script of this folder that calls `rank_of_two`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

Work = Callable[[int, int], dict[str, torch.Tensor]]


def rank_of_two(work: Work) -> None:
    """python SCRIPT STORE RANK OUT: `work(rank, 2)` in a process group, saved to OUT."""
    store, rank, out = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    torch.save(work(int(rank), 2), out)
    distributed.destroy_process_group()


def on_two_ranks(script: Any, folder: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """(alone, first, second): `work(0, 1)` of the module `script` in this process, and what its two ranks saved."""
    root = str(Path(__file__).parents[1])  # a script's own folder, not the present one, is where it imports from
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    runs = [
        subprocess.Popen(
            [sys.executable, script.__file__, str(folder / "store"), str(rank), str(folder / f"{rank}.pt")],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = script.work(0, 1)
    for run in runs:
        _, errors = run.communicate(timeout=100)
        assert run.returncode == 0, errors[-3000:]
    return alone, *(torch.load(folder / f"{rank}.pt") for rank in range(2))
