// What a kernel file includes. One source serves nvcc and, with FF_HOST_SHIM, the CPU (host_shim/host_shim.h).
// Beyond CUDA C++ it may use three spellings:
//   FF_SHARED(T, name, N);        `__shared__ T name[N]`, at least 16-byte aligned; T without a comma
//   FF_DYN_SHARED(T, name);       `T* name`, the dynamic shared memory, 16-byte aligned
//   FF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...);   name kernel<A, B> with `auto` first
#pragma once
#ifdef FF_HOST_SHIM
#include "host_shim/host_shim.h"

#define FF_SHARED(T, name, N)                                   \
  auto& name = *static_cast<T(*)[N]>([]() -> void* {            \
    static char key;                                            \
    constexpr size_t align = alignof(T) > 16 ? alignof(T) : 16; \
    return ::ff::shim::shared_array(&key, sizeof(T[N]), align); \
  }())
#define FF_DYN_SHARED(T, name) T* name = static_cast<T*>(::ff::shim::dynamic_shared())
#define FF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ff::shim::launch(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

#else
#include <cuda_runtime.h>

#define FF_SHARED(T, name, N) __shared__ alignas(alignof(T) > 16 ? alignof(T) : 16) T name[N]
#define FF_DYN_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char ff_dynamic_[]; \
  T* name = reinterpret_cast<T*>(ff_dynamic_)
#define FF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace ff {

// Starts a copy of 16 bytes, both addresses multiples of 16, from global to shared memory, past L1.
#ifdef FF_HOST_SHIM
inline void cp_async16(void* shared, const void* global, shim::Place place = shim::Place::current()) {
  shim::copy_async(shared, global, place);
}
#else
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
#endif

// Closes the group of this thread's copies started so far.
__device__ __forceinline__ void cp_async_commit() {
#ifdef FF_HOST_SHIM
  shim::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N groups of this thread are in flight. Other threads see the data after a __syncthreads.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef FF_HOST_SHIM
  shim::wait_copies(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace ff
