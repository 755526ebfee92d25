"""What ran it: the lines that every table of results ends with."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["machine", "processor"]


def machine() -> dict[str, str | int]:
    """Processor, threads and versions; of a CUDA device its name."""
    found: dict[str, str | int] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
