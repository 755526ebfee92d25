// Keys that bring rows of neighbouring windows together.
#pragma once
#include "pool/pool_kernels.cuh"

namespace ff {
namespace {

// A thread owns a row: 8 or 16 bytes read, 4 written.
template <class T>
__global__ void __launch_bounds__(256)
    position_keys_kernel(const PoolRows<T> at, int shift, int32_t* __restrict__ keys) {
  const int64_t r = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (r < at.rows) keys[r] = int32_t(position_key(at.points[2 * r], at.points[2 * r + 1], at.width, at.height, shift));
}

}  // namespace

template <class T>
int pool_position_keys_cuda(const PoolRows<T>& at, int32_t* keys, CUstream_st* stream) {
  if (!at.rows) return cudaSuccess;
  auto kernel = position_keys_kernel<T>;
  FF_LAUNCH(kernel, dim3(unsigned((at.rows + 255) / 256)), dim3(256), 0, stream, at,
            position_shift(at.width, at.height), keys);
  return cudaGetLastError();
}

}  // namespace ff
