"""Every CUDA launcher under the host shim with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

A room ``<room>`` takes part with ``csrc/host_shim/test/<room>_driver.cpp``: a program without PyTorch that runs the
room's launchers in buffers of exactly their size, compares them with the baseline CPU kernels and prints "OK".
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DRIVERS = sorted((CSRC / "host_shim" / "test").glob("*_driver.cpp"))
TORCH_HEADERS = Path(torch.__file__).parent / "include"  # of torch/headeronly: the 16-bit types
CXX = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
BUILDS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no g++ (or CXX)"),
    pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="x86-64 Linux only"),
]


def compile_object(source: Path, flags: list[str], target: Path) -> str:
    """Return the compiler's complaint, empty if it had none."""
    command = [str(CXX), *FLAGS, *flags, "-DFF_HOST_SHIM", "-DFF_ISA=baseline", f"-I{CSRC}", f"-isystem{TORCH_HEADERS}"]
    return subprocess.run(
        [*command, "-x", "c++", "-c", str(source), "-o", str(target)], capture_output=True, text=True
    ).stderr


def build(driver: Path, flags: list[str], folder: Path) -> Path:
    """Compile and link a room's driver, all cores at once."""
    room = driver.stem.removesuffix("_driver")
    kernels = sorted((CSRC / room).glob(f"{room}_cuda*.cu"))
    sources = [*kernels, CSRC / room / f"{room}_cpu.cpp", driver, CSRC / "common" / "kernel_list.cu"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for complaint in pool.map(
            lambda pair: compile_object(pair[0], flags, pair[1]), zip(sources, objects, strict=True)
        ):
            assert not complaint, complaint
    program = folder / driver.stem
    linked = subprocess.run(
        [str(CXX), "-pthread", *flags, *map(str, objects), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in linked.stderr:
        pytest.skip(f"{CXX} has no library for {flags[0]}")
    assert not linked.returncode, linked.stderr
    return program


def run(program: Path, order: str) -> tuple[int, str]:
    done = subprocess.run(
        [program],
        env={**os.environ, "FF_SHIM_ORDER": order},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("sanitizer", BUILDS)
@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.stem.removesuffix("_driver"))
def test_launchers(driver, sanitizer, tmp_path):
    program = build(driver, BUILDS[sanitizer], tmp_path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for order, (status, output) in zip(
            ("fwd", "rev", "5"), pool.map(lambda order: run(program, order), ("fwd", "rev", "5")), strict=True
        ):
            if "FATAL: ThreadSanitizer" in output:
                pytest.skip(output.splitlines()[0])
            assert (status, output) == (0, "OK\n"), f"FF_SHIM_ORDER={order}\n{output[-6000:]}"
