// The CUDA kernels of the library, so that their registers and spills can be read where CUDA runs.
// A room adds a kernel with one static object:  static ff::KernelListed listed{"pool_kl_loss<float>", kernel};
#pragma once

namespace ff {

struct KernelListed {
  const char* name;
  const void* kernel;
  KernelListed* next;
  template <class K>
  KernelListed(const char* n, K k) : name(n), kernel(reinterpret_cast<const void*>(k)), next(head()) {
    head() = this;
  }
  static KernelListed*& head();
};

struct KernelAttributes {
  const char* name;
  int registers, shared_bytes, local_bytes, max_threads;  // local_bytes: stack and spills of a thread
};

// Calls visit for every kernel; returns a cudaError_t, or -1 in a build without CUDA.
__attribute__((visibility("default"))) int kernel_attributes(void (*visit)(const KernelAttributes&, void*),
                                                             void* context);

}  // namespace ff
