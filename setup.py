"""Drives CMake with Ninja: per-file instruction-set flags, and nvcc without a CUDA build of PyTorch."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "fastforest: PyTorch was not found by the Python that builds. Install it first (pip install 'torch>=2.11'), "
            "then build with: pip install --no-build-isolation ."
        )
    return Path(spec.submodule_search_locations[0])


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    return next(
        (c for c in [*candidates, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if c and Path(c).exists()), None
    )


def cuda_compiler() -> str | None:
    """The nvcc to build with, or None for a CPU build. FASTFOREST_CUDA=0|1 overrides what is found."""
    wanted = os.environ.get("FASTFOREST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"fastforest: FASTFOREST_CUDA must be 0 or 1, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        sys.exit("fastforest: FASTFOREST_CUDA=1 but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def cmake_architectures(torch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") in CMake's words ("80-real;90")."""
    names = []
    for item in torch_list.replace(" ", ";").split(";"):
        number, plus, _ = item.partition("+")
        if number:
            names.append(number.replace(".", "") + ("" if plus else "-real"))
    return ";".join(names)


class CMakeBuild(build_ext):
    def run(self) -> None:
        output = Path(self.get_ext_fullpath("fastforest._C")).resolve().parent
        build = HERE / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        nvcc = cuda_compiler()
        import pybind11

        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTFOREST_TORCH_DIR={torch_folder()}",
            f"-DFASTFOREST_OUTPUT={output}",
            f"-DFASTFOREST_VERSION={self.distribution.get_version()}",
            f"-DFASTFOREST_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DFASTFOREST_SHIM={'ON' if os.environ.get('FASTFOREST_SHIM') == '1' else 'OFF'}",
            f"-DFASTFOREST_STRICT={'ON' if os.environ.get('FASTFOREST_STRICT') == '1' else 'OFF'}",
            f"-DFASTFOREST_ARCHS={cmake_architectures(os.environ.get('TORCH_CUDA_ARCH_LIST', '8.0;9.0+PTX'))}",
        ]
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        # CMake and Ninja may stand beside an interpreter whose environment was not activated.
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        cmake = shutil.which("cmake", path=env["PATH"])
        if cmake is None:
            sys.exit("fastforest: cmake was not found: pip install cmake ninja")
        subprocess.run([cmake, "-G", "Ninja", "-S", str(HERE), "-B", str(build), *arguments], check=True, env=env)
        subprocess.run([cmake, "--build", str(build)], check=True, env=env)


class CMakeExtension(Extension):
    def __init__(self) -> None:
        super().__init__("fastforest._C", sources=[])


torch_folder()
setup(ext_modules=[CMakeExtension()], cmdclass={"build_ext": CMakeBuild})
