"""What this machine can do, measured in the same run as the claims: copy and read bandwidth, GEMM rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of ``run`` in seconds, after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(device: torch.device) -> dict[str, float]:
    """copy_gbs: bytes read and written per second; read_gbs: bytes read by a sum; gemm_gfs: float32 GEMM."""
    big = 1 << (28 if device.type == "cuda" else 25)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.ones(big, device=device), torch.zeros(big, device=device)
    rates = {
        "copy_gbs": 8 * big / seconds(lambda: b.copy_(a), device, 7) / 1e9,
        "read_gbs": 4 * big / seconds(lambda: a.sum(), device, 7) / 1e9,
    }
    x = torch.randn(side, side, device=device)
    out = torch.empty_like(x)
    rates["gemm_gfs"] = 2 * side**3 / seconds(lambda: torch.mm(x, x, out=out), device, 5) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def floor_seconds(rates: dict[str, float], moved_bytes: float, flops: float) -> float:
    """The larger of bytes over read bandwidth and flops over the GEMM rate."""
    return max(moved_bytes / rates["read_gbs"], flops / rates["gemm_gfs"]) / 1e9
