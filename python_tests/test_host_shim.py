"""The host shim runs CUDA kernels on the CPU: its clean self-test passes, and each planted bug is found."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = CSRC / "host_shim" / "test" / "selftest.cu"
CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
BUILDS = {
    "plain": [],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
RACE = "data race"
LINE = "the planted line"  # kernels.cpp:<line behind #ifdef BUG_...>

# bug, build that finds it, FF_SHIM_ORDER, what the output says
FOUND = [
    ("MISSING_BARRIER", "plain", "fwd", ["sum_rows: WRONG"]),
    ("MISSING_BARRIER", "thread", "fwd", [RACE, "sum_rows_kernel"]),
    ("MISSING_BARRIER", "thread", "rev", [RACE, "sum_rows_kernel"]),  # here the sums happen to be right
    ("DIVERGENT_BARRIER", "plain", "fwd", ["different __syncthreads", LINE]),
    ("EARLY_RETURN", "plain", "fwd", ["61 threads returned before __syncthreads"]),
    ("SHUFFLE_MASK", "plain", "fwd", ["lanes of one warp met at different operations", LINE]),
    ("MISSING_LANES", "plain", "fwd", ["deadlock", "waits in a warp operation", LINE]),
    ("NO_OPT_IN", "plain", "fwd", ["count: more dynamic shared memory"]),
    ("MISSING_WAIT", "plain", "fwd", ["reverse_tiles: WRONG"]),
    ("MISSING_REUSE_BARRIER", "thread", "rev", [RACE, "reverse_tiles_kernel"]),
    ("MISSING_SYNCWARP", "thread", "fwd", [RACE, "add_neighbours_kernel"]),
    ("MISSING_FENCE", "thread", "fwd", [RACE, "sum_last_block_kernel"]),
    ("PLAIN_ADD", "thread", "fwd", [RACE, LINE]),
    ("SHARED_OVERRUN", "address", "fwd", ["index 128 out of bounds", LINE]),
    ("DYNAMIC_OVERRUN", "address", "fwd", ["use-after-poison", LINE]),
    ("GLOBAL_OVERRUN", "address", "fwd", ["heap-buffer-overflow", LINE]),
    ("MISALIGNED", "address", "fwd", ["misaligned address", LINE]),
]

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no g++ (or CXX)"),
    pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="x86-64 Linux only"),
]


def compile_with(flags: list[str], target: Path, *sources: Path) -> str:
    """Return the compiler's complaint, empty if it had none."""
    command = [str(CXX), *FLAGS, *flags, "-DFF_HOST_SHIM", f"-I{CSRC}", "-o", str(target), *map(str, sources)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """Build every variant, all cores at once; return ``run(bug, build, **environment) -> (exit status, output)``."""
    folder = tmp_path_factory.mktemp("host_shim")
    driver = folder / "driver.o"
    kernels = folder / "kernels.cpp"
    shutil.copy(KERNELS, kernels)  # as CMake does: g++ would take a .cu for a linker script
    assert not compile_with(["-c"], driver, KERNELS.with_name("selftest_main.cpp"))

    def compile_variant(variant: tuple[str, str]) -> str:
        bug, build = variant
        return compile_with([f"-DBUG_{bug}", *BUILDS[build]], folder / f"{bug}-{build}", kernels, driver)

    variants = {("NONE", build) for build in BUILDS} | {(bug, build) for bug, build, _, _ in FOUND}
    slowest_first = sorted(variants, key=lambda variant: variant[1])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = dict(zip(slowest_first, pool.map(compile_variant, slowest_first), strict=True))

    def run(bug: str, build: str, **environment: str) -> tuple[int, str]:
        complaint = complaints[bug, build]
        if "cannot find" in complaint:
            pytest.skip(f"{CXX} lacks the sanitizer library for build {build}")
        assert not complaint, complaint
        done = subprocess.run(
            [folder / f"{bug}-{build}"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if "FATAL: ThreadSanitizer" in done.stdout:
            pytest.skip(done.stdout.splitlines()[0])
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("order", ["fwd", "rev", "7"])
def test_clean(selftest, build, order):
    assert selftest("NONE", build, FF_SHIM_ORDER=order) == (0, "OK\n")


@pytest.mark.parametrize("workers", ["1", "3"])
def test_workers(selftest, workers):
    assert selftest("NONE", "plain", FF_SHIM_WORKERS=workers) == (0, "OK\n")


def test_bad_order(selftest):
    status, output = selftest("NONE", "plain", FF_SHIM_ORDER="backwards")
    assert status != 0
    assert "FF_SHIM_ORDER must be fwd, rev or a number" in output


@pytest.mark.parametrize(
    ("bug", "build", "order", "says"), FOUND, ids=[f"{bug}-{build}-{order}" for bug, build, order, _ in FOUND]
)
def test_planted_bug(selftest, bug, build, order, says):
    status, output = selftest(bug, build, FF_SHIM_ORDER=order)
    assert status != 0, output
    lines = KERNELS.read_text().splitlines()
    for text in says:
        if text is LINE:
            text = f"kernels.cpp:{lines.index(f'#ifdef BUG_{bug}') + 2}"
            assert re.search(rf"{text}\b", output), f"{text} is not in\n{output}"
        else:
            assert text in output


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("unsigned f() { return __activemask(); }", "__activemask"),
        ("void f() { __shared__ float x[2]; }", "write FF_SHARED"),
        ("void f(float* x) { atomicMax(x, 1.0f); }", "constraints not satisfied"),
        ("short f(short x) { return __shfl_sync(~0u, x, 0); }", "constraints not satisfied"),
    ],
    ids=["activemask", "shared", "atomic_type", "shuffle_type"],
)
def test_refuses_what_it_cannot_watch(tmp_path, line, complaint):
    (tmp_path / "kernel.cpp").write_text(f'#include "common/portable.cuh"\n{line}\n')
    command = [str(CXX), "-std=c++20", "-fsyntax-only", "-DFF_HOST_SHIM", f"-I{CSRC}", str(tmp_path / "kernel.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_same_source_compiles_for_a_gpu(tmp_path):
    command = [str(NVCC), "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-Xcompiler=-Wall", f"-I{CSRC}"]
    subprocess.run([*command, "-c", str(KERNELS), "-o", str(tmp_path / "selftest.o")], check=True)
