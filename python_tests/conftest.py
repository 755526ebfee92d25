"""Fixtures: the backends, and the contract rerun under the other instruction sets of this processor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastforest.ops
from fastforest import _C
from fastforest.ops import _register

SHIM = Path(fastforest.ops.__file__).resolve().parent.parent / "_shim.so"


@pytest.fixture(scope="session")
def _shim_loaded() -> bool:
    if SHIM.exists():
        _register.load_shim(SHIM)
    return SHIM.exists()


@pytest.fixture(params=["cpu", "shim", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """ "cpu", "shim" (CUDA kernels run by the CPU) or "cuda"; a skip says what is missing."""
    if request.param == "shim" and not request.getfixturevalue("_shim_loaded"):
        pytest.skip("the host shim is not built (FASTFOREST_SHIM=1)")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _C.build_info()["cuda"] is None:
            pytest.skip("built without CUDA kernels")
    return request.param


@pytest.fixture
def rerun_under() -> Callable[[str, str, str], None]:
    """rerun_under(isa, file, expression): the tests of a file that match, in a process forced to an instruction set."""

    def run(isa: str, file: str, expression: str) -> None:
        if isa not in _C.build_info()["isas"]:
            pytest.skip(f"{isa} is not built for this processor")
        built = _C.build_info()["isas"]
        if built.index(isa) >= built.index(_C.isa()):
            pytest.skip(f"this process runs {_C.isa()} itself")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", expression],
            env=os.environ | {"FASTFOREST_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    return run
