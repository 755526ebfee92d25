# make demo | test | check | bench | build | clean set up what they need in .venv; PYTHON=path uses that interpreter instead.
# make gpu uses python3 (or PYTHON=path), which must have a PyTorch with CUDA.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

ifdef PYTHON
PY := $(PYTHON)
SETUP :=
else
PY := .venv/bin/python
SETUP := .venv/ready
endif

# The version that the CPU is tested with; TORCH="..." names another, or an index that has a build without CUDA libraries.
TORCH ?= torch==2.13.0
TOOLS := setuptools>=77 wheel cmake>=3.24 ninja pybind11>=2.12 numpy scikit-image matplotlib pytest pytest-benchmark scipy scikit-learn pyarrow \
  h5py defusedxml tqdm tensorboard tomli kornia==0.9.0 dsntnn==0.5.3

CHECKERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

.PHONY: build demo test check bench gpu clean

.venv/ready: pyproject.toml
	python3 -m venv .venv || { echo "make: python3 -m venv failed: install your system's python3-venv package" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check $(foreach tool,$(TOOLS),"$(tool)")
	touch $@

build: $(SETUP)
	FASTFOREST_STRICT=1 FASTFOREST_SHIM=1 $(PY) setup.py --quiet build_ext --inplace

# The demo trains on the CPU: no need to wait for nvcc.
demo: $(SETUP)
	FASTFOREST_CUDA=$${FASTFOREST_CUDA-0} $(PY) setup.py --quiet build_ext --inplace
	$(PY) -m fastforest train --data synthetic --out runs/demo --overwrite

test: build
	$(PY) -m pytest python_tests

check: build
	$(PY) -m pip install --quiet --disable-pip-version-check $(CHECKERS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | \
	  xargs "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format" --dry-run --Werror

# Twice: with the system's allocator, which users have, and with one that keeps its memory, which flatters the rivals.
bench: build
	PYTHONPATH=. $(PY) -m pytest -s bench/bench_*.py
	PYTHONPATH=. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 \
	  $(PY) -m pytest -s bench/bench_*.py
	PYTHONPATH=. $(PY) bench/canvas.py

gpu:
	bash bench/gpu.sh

clean:
	rm -rf build dist .venv *.egg-info fastforest/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
