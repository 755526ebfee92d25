// fastforest._C: what was built and what was chosen. Operators are registered with PyTorch by _ops, not here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/kernel_list.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::stringstream stream(list);
  for (std::string part; stream >> part;) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FF_VERSION;
#ifdef FF_CUDA_VERSION
  info["cuda"] = FF_CUDA_VERSION;
  info["cuda_architectures"] = split(FF_CUDA_ARCHS);
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["compiler"] = FF_COMPILER;
  info["isas"] = split(FF_ISAS);
  info["isa"] = ff::name(ff::chosen_isa());
  return info;
}

py::dict kernel_attributes() {
  py::dict kernels;
#ifdef FF_CUDA_VERSION
  const int error = ff::kernel_attributes(
      [](const ff::KernelAttributes& a, void* context) {
        py::dict row;
        row["registers"] = a.registers;
        row["shared_bytes"] = a.shared_bytes;
        row["local_bytes"] = a.local_bytes;
        row["max_threads"] = a.max_threads;
        (*static_cast<py::dict*>(context))[a.name] = row;
      },
      &kernels);
  if (error) throw std::runtime_error("kernel_attributes: needs a CUDA device (error " + std::to_string(error) + ")");
  return kernels;
#else
  throw std::runtime_error("kernel_attributes: this build has no CUDA kernels (nvcc was not found when it was built)");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fastforest holds.";
  m.def("build_info", &build_info,
        "build_info() -> dict: version, cuda and cuda_architectures (or None), compiler, isas built, isa chosen.");
  m.def(
      "isa", [] { return ff::name(ff::chosen_isa()); },
      "isa() -> str: the instruction set of the CPU kernels, forced by FASTFOREST_ISA=baseline|avx2|avx512.");
  m.def("kernel_attributes", &kernel_attributes,
        "kernel_attributes() -> dict: registers, shared_bytes, local_bytes (stack and spills), max_threads a CUDA "
        "kernel.\n"
        "RuntimeError without a CUDA build and device.");
}
