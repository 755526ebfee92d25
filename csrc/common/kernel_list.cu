#include "common/kernel_list.h"

#include "common/portable.cuh"

namespace ff {

KernelListed*& KernelListed::head() {
  static KernelListed* first = nullptr;
  return first;
}

int kernel_attributes(void (*visit)(const KernelAttributes&, void*), void* context) {
#ifdef FF_HOST_SHIM
  (void)visit;
  (void)context;
  return -1;
#else
  for (KernelListed* k = KernelListed::head(); k; k = k->next) {
    cudaFuncAttributes a;
    const cudaError_t error = cudaFuncGetAttributes(&a, k->kernel);
    if (error != cudaSuccess) return error;
    visit({k->name, a.numRegs, int(a.sharedSizeBytes), int(a.localSizeBytes), a.maxThreadsPerBlock}, context);
  }
  return 0;
#endif
}

}  // namespace ff
