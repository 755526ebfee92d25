"""Benchmark rows are claims: contenders take turns in one process, so that their ratios are fair on a noisy machine."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Read when NumPy is loaded: its workers would spin for tens of milliseconds after scikit-learn's step and take a processor
# from whoever comes next.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")

import pytest
import torch
from roofline import floor_seconds, measure, synchronize

import fastforest as ff
from fastforest import _C

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Run = Callable[[], Any]


@dataclass
class Row:
    """One claim. Times in milliseconds; rivals' names begin with "eager" or "compile"."""

    case: str
    what: str
    ours: dict[str, float]
    rivals: dict[str, dict[str, float]]
    floor_ms: float
    error: float | None
    bars: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)

    def best(self, kind: str) -> float:
        times = [t["median"] for name, t in self.rivals.items() if kind == "rival" or name.startswith(kind)]
        return min(times, default=float("nan"))

    def ratio(self, kind: str) -> float:
        """How many times ours the best rival of this kind takes; "memory": of peak memory."""
        if kind == "memory":
            return min(v for k, v in self.peak_mb.items() if k != "ours") / max(self.peak_mb["ours"], 1e-3)
        return self.best(kind) / self.ours["median"]


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    pick = lambda share: 1e3 * ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"median": 1e3 * statistics.median(times), "p20": pick(0.2), "p80": pick(0.8)}


HOPELESS = 8


def take_turns(contenders: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Median and 20/80 % of every contender, called in rotation; short ones several times a turn.

    A contender that took over 0.5 s and more than `HOPELESS` times the fastest's at first is not called again.
    """
    times: dict[str, list[float]] = {}
    for name, run in contenders.items():
        run()
        synchronize(DEVICE)
        start = time.perf_counter()
        run()
        synchronize(DEVICE)
        times[name] = [time.perf_counter() - start]
    first = {name: taken[0] for name, taken in times.items()}
    names = [name for name in contenders if first[name] < max(0.5, HOPELESS * min(first.values()))]
    repeats = {name: max(1, min(50, int(0.02 / max(first[name], 1e-6)))) for name in names}
    times |= {name: [] for name in names}
    gc.disable()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = contenders[name]
            run()
            synchronize(DEVICE)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            synchronize(DEVICE)
            times[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    return {name: summary(t) for name, t in times.items()}


def peak_megabytes(run: Run) -> float:
    """Memory that ``run`` needs beyond what stood before it: resident peak on the CPU, allocator peak on CUDA."""
    if DEVICE.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    import ctypes

    def status(field_name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_name))
        return int(line.split()[1])

    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    run()
    return max(0, status("VmHWM:") - before) / 1024


def relative_error(got: Any, expected: Any) -> float:
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    worst = 0.0
    for a, b in pairs:
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


class Bench:
    def __init__(self) -> None:
        self.rates = measure(DEVICE)
        self.rows: list[Row] = []
        self.benchmark: Any = None  # pytest-benchmark's fixture of the test at hand

    def compare(
        self,
        case: str,
        what: str,
        ours: Run,
        rivals: Mapping[str, Run],
        *,
        bars: Mapping[str, float] | None = None,
        moved_bytes: float,
        flops: float,
        exact: Run | None = None,
        memory: bool = False,
        rounds: int = 9,
    ) -> Row:
        """Times ``ours`` against ``rivals`` in turns and files the row. ``exact`` gives the float64 result."""
        times = take_turns({"ours": ours, **rivals}, rounds)
        self.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
        row = Row(
            case,
            what,
            times.pop("ours"),
            times,
            1e3 * floor_seconds(self.rates, moved_bytes, flops),
            relative_error(ours(), exact()) if exact else None,
            dict(bars or {}),
        )
        if memory:
            row.peak_mb = {name: peak_megabytes(run) for name, run in {"ours": ours, **rivals}.items()}
        self.benchmark.extra_info.update({f"x {kind}": row.ratio(kind) for kind in row.bars} | {"rivals": row.rivals})
        self.rows.append(row)
        return row


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({torch.get_num_threads()} threads)"
    return platform.machine()


def slug(name: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return "-".join(words).lower()


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    rates = about["roofline"]
    lines = [
        f"# {about['device']}",
        "",
        f"commit {about['commit']}, PyTorch {about['torch']}, instruction set {about['isa']}, "
        f"copy {rates['copy_gbs']} GB/s, read {rates['read_gbs']} GB/s, GEMM {rates['gemm_gfs']} GF/s (float32). "
        f"Allocator: {about['allocator'] or 'the system default'}. "
        "Milliseconds, median of interleaved turns [20 %, 80 %]; bars are the ratios the project set itself.",
        "",
        "| operator | size | ours ms | floor ms | best eager ms | best compile ms | x eager | x compile | bars | error "
        "| peak MB ours / least rival |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = [
            f"{kind} {bar:.3g}x {'met' if row.ratio(kind) >= bar else f'MISSED ({row.ratio(kind):.2f}x)'}"
            for kind, bar in row.bars.items()
        ]
        memory, error = "", "" if row.error is None else f"{row.error:.1e}"
        if row.peak_mb:
            least = min(v for k, v in row.peak_mb.items() if k != "ours")
            memory = f"{row.peak_mb['ours']:.1f} / {least:.1f}"
        lines.append(
            f"| {row.what} | {row.case} | {row.ours['median']:.2f} [{row.ours['p20']:.2f}, {row.ours['p80']:.2f}] "
            f"| {row.floor_ms:.2f} | {number(row.best('eager'), 2)} | {number(row.best('compile'), 2)} "
            f"| {number(row.ratio('eager'), 1)} | {number(row.ratio('compile'), 1)} | {', '.join(met)} "
            f"| {error} | {memory} |"
        )
    return "\n".join(lines) + "\n"


@pytest.fixture
def bench(claims: Bench, benchmark: Any) -> Bench:
    claims.benchmark = benchmark
    return claims


@pytest.fixture(scope="session")
def claims() -> Iterator[Bench]:
    torch.manual_seed(0)
    session = Bench()
    yield session
    about = {
        "device": device_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "fastforest": ff.__version__,
        "isa": _C.isa(),
        "roofline": session.rates,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }
    RESULTS.mkdir(exist_ok=True)
    retaining = "-retaining-allocator" if about["allocator"] else ""
    path = RESULTS / f"{slug(about['device'])}{retaining}.json"
    path.write_text(json.dumps({"about": about, "rows": [asdict(r) for r in session.rows]}, indent=1) + "\n")
    table = markdown(about, session.rows)
    path.with_suffix(".md").write_text(table)
    print("\n" + table)
