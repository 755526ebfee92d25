#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under eight minutes: build, contract on CUDA, compute-sanitizer, benchmarks.
# Uses PYTHON (default python3) as it is: it must have torch with CUDA, cmake, ninja, pybind11, pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
command -v nvcc >/dev/null || [ -n "${CUDA_HOME-}" ] || { echo "make gpu: nvcc was not found" >&2; exit 1; }
$PY -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || { echo "make gpu: PyTorch sees no CUDA GPU" >&2; exit 1; }
FASTFOREST_CUDA=1 TORCH_CUDA_ARCH_LIST=$($PY -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
  $PY setup.py --quiet build_ext --inplace
$PY -c "from fastforest import _C; import json; print(json.dumps(_C.kernel_attributes(), indent=1))"
$PY -m pytest python_tests -k "contract or cuda" -x
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 "$sanitizer" --tool $tool --error-exitcode 1 $PY bench/sanitize.py
done
PYTHONPATH=. $PY -m pytest -s bench/bench_*.py
