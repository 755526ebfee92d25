// What every binding needs of PyTorch's stable ABI: checks, device and stream, registration for both backends.
// The host shim compiles the same bindings with FF_HOST_SHIM: CUDA launchers on CPU tensors, in a namespace of its own.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(FF_CUDA) && !defined(FF_HOST_SHIM)
#include <torch/csrc/stable/c/shim.h>
// A PyTorch without CUDA lacks this symbol; weak lets one library load in both.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));
#endif

struct CUstream_st;  // cudaStream_t

#define FF_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace ff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

#if defined(FF_HOST_SHIM)
#define FF_NAMESPACE fastforest_shim
inline bool on_cuda(const Tensor&) { return true; }
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  CUstream_st* stream() const { return nullptr; }
};
#elif defined(FF_CUDA)
#define FF_NAMESPACE fastforest
inline bool on_cuda(const Tensor& t) { return t.is_cuda(); }
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()), device(t.get_device_index()) {}
  CUstream_st* stream() const {
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &s));
    return static_cast<CUstream_st*>(s);
  }
};
#else
#define FF_NAMESPACE fastforest
inline bool on_cuda(const Tensor&) { return false; }
#endif

#if defined(FF_HOST_SHIM) || defined(FF_CUDA)
#define FF_HAS_CUDA_LAUNCHERS 1
#endif

// Fresh memory comes page by page; huge pages make the first write of a large CPU output several times faster
// (128 MiB of statistics: 55 of 66 ms were page faults). Smaller ones often come from the heap, which shrinks and grows
// again: there the pages' clearing costs more than it saves.
inline void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__)
  const size_t bytes = size_t(t.numel()) * t.element_size();
  if (t.is_cuda() || bytes < (size_t(16) << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.const_data_ptr()) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.const_data_ptr()) + bytes) & ~uintptr_t(4095);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const Tensor out = torch::stable::new_empty(like, std::vector<int64_t>(sizes));
  prefer_huge_pages(out);
  return out;
}

// A launcher's cudaError_t.
inline void check_cuda(const char* op, int error) { FF_CHECK(error == 0, op, ": CUDA error ", error); }

// Items [0, count) in chunks handed to whichever thread is free: rows and tiles differ in cost.
template <class F>
void parallel_chunks(int64_t count, int64_t chunk, const F& f) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      for (int64_t c; (c = next.fetch_add(1)) < chunks;) f(c * chunk, std::min(count, (c + 1) * chunk));
  });
}

// Schemas: FF_SCHEMAS(m) { m.def("op(Tensor x) -> Tensor"); }     Implementations: FF_IMPLEMENTATIONS(m) { m.impl(...);
// }
#define FF_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(FF_NAMESPACE, m)
#if defined(FF_CUDA) && !defined(FF_HOST_SHIM)
#define FF_IMPLEMENTATIONS(m)                                              \
  static void implementations(torch::stable::detail::StableLibrary& m);    \
  STABLE_TORCH_LIBRARY_IMPL(FF_NAMESPACE, CPU, m) { implementations(m); }  \
  STABLE_TORCH_LIBRARY_IMPL(FF_NAMESPACE, CUDA, m) { implementations(m); } \
  static void implementations(torch::stable::detail::StableLibrary& m)
#else
#define FF_IMPLEMENTATIONS(m)                                             \
  static void implementations(torch::stable::detail::StableLibrary& m);   \
  STABLE_TORCH_LIBRARY_IMPL(FF_NAMESPACE, CPU, m) { implementations(m); } \
  static void implementations(torch::stable::detail::StableLibrary& m)
#endif

}  // namespace ff
