// Small kernels that use every feature of the shim, each with planted bugs: -DBUG_... breaks one line.
#include "common/hd.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "host_shim/test/selftest.h"

namespace ff::selftest {
namespace {

FF_HD float square_root(float x) { return sqrt(x); }

// A block per row. The reduction is spelled out, because reduce.cuh has no place to plant a bug in.
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const float* __restrict__ x, int columns, float* __restrict__ row_sum, float* __restrict__ total) {
  FF_SHARED(float, part, kThreads);
  const int thread = threadIdx.x;
#ifdef BUG_EARLY_RETURN
  if (thread >= columns) return;
#endif
  float sum = 0;
#ifdef BUG_GLOBAL_OVERRUN
  for (int i = thread; i <= columns; i += kThreads) sum += x[blockIdx.x * columns + i];
#else
  for (int i = thread; i < columns; i += kThreads) sum += x[blockIdx.x * columns + i];
#endif
  part[thread] = sum;
#ifdef BUG_DIVERGENT_BARRIER
  if (thread < 100) __syncthreads();
#endif
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  for (int half = kThreads / 2; half; half /= 2) {
#ifdef BUG_SHARED_OVERRUN
    if (thread < half) part[thread] += part[kThreads - thread];
#else
    if (thread < half) part[thread] += part[thread + half];
#endif
    __syncthreads();
  }
  if (thread == 0) {
    row_sum[blockIdx.x] = part[0];
#ifdef BUG_PLAIN_ADD
    *total += part[0];
#else
    atomicAdd(total, part[0]);
#endif
  }
}

// Double buffering: while one tile is written out, the next is on its way.
__global__ void __launch_bounds__(kThreads)
    reverse_tiles_kernel(const float* __restrict__ x, int tiles, float* __restrict__ y) {
  FF_SHARED(float, buffer, 2 * kTile);
  const int thread = threadIdx.x;
  auto fetch = [&](int tile, int stage) {
    if (tile < tiles) cp_async16(buffer + stage * kTile + 4 * thread, x + tile * kTile + 4 * thread);
    cp_async_commit();
  };
  int stage = 0;
  fetch(blockIdx.x, stage);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, stage ^= 1) {
    fetch(tile + gridDim.x, stage ^ 1);
#ifndef BUG_MISSING_WAIT
    cp_async_wait<1>();
#endif
    __syncthreads();
    for (int i = thread; i < kTile; i += kThreads) y[tile * kTile + i] = buffer[stage * kTile + kTile - 1 - i];
#ifndef BUG_MISSING_REUSE_BARRIER
    __syncthreads();
#endif
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const int* __restrict__ x, int n, int bins, int* __restrict__ counts) {
  FF_DYN_SHARED(int, local);
#ifdef BUG_DYNAMIC_OVERRUN
  for (int b = threadIdx.x; b <= bins; b += kThreads) local[b] = 0;
#else
  for (int b = threadIdx.x; b < bins; b += kThreads) local[b] = 0;
#endif
  __syncthreads();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) atomicAdd(local + x[i], 1);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads)
    if (local[b]) atomicAdd(counts + b, local[b]);
}

struct Peak {
  float value;
  int index;
};

struct Higher {  // of equal values the first
  __device__ Peak operator()(Peak a, Peak b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
  }
};

__global__ void __launch_bounds__(kThreads)
    argmax_rows_kernel(const float* __restrict__ x, int columns, int* __restrict__ index, int* __restrict__ positive) {
  FF_SHARED(Peak, peaks, kThreads / 32);
  FF_SHARED(int, counts, kThreads / 32);
  FF_SHARED(float, sums, kThreads / 32);
  const float* row = x + blockIdx.x * columns;
  Peak best{-INFINITY, columns};
  float norm = 0;
  int count = 0;
  for (int first = 0; first < columns; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const float value = i < columns ? row[i] : -INFINITY;
    best = Higher{}(best, Peak{value, i});
    if (i < columns) norm = max(norm, square_root(value * value));
#ifdef BUG_SHUFFLE_MASK
    if (i < columns) count += __popc(__ballot_sync(0xffffffffu, value > 0));
#else
    count += __popc(__ballot_sync(0xffffffffu, value > 0));
#endif
  }
  best = block_reduce<kThreads>(best, Higher{}, peaks);
  count = block_sum<kThreads>(threadIdx.x % 32 == 0 ? count : 0, counts);
  norm = block_reduce<kThreads>(norm, Max{}, sums);
  const bool consistent = norm >= fabs(row[best.index]) && warp_max(norm) == norm && warp_sum(1) == 32;
  if (threadIdx.x == 0) {
    index[blockIdx.x] = consistent ? best.index : -1;
    positive[blockIdx.x] = count;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_neighbours_kernel(const float* __restrict__ x, int n, float* __restrict__ y) {
  using Row = float[32];
  FF_SHARED(Row, rows, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float value = i < n ? x[i] : 0.0f;
  rows[warp][lane] = value;
#ifdef BUG_MISSING_LANES
  if (lane < 16) __syncwarp();
  __syncthreads();
#endif
#ifndef BUG_MISSING_SYNCWARP
  __syncwarp();
#endif
  if (i < n) y[i] = value + rows[warp][(lane + 1) % 32];
}

__global__ void __launch_bounds__(kThreads)
    sum_last_block_kernel(const double* __restrict__ x, int n, double* partial, int* __restrict__ ticket,
                          double* __restrict__ total) {
  FF_SHARED(double, sums, kThreads / 32);
  FF_SHARED(bool, last, 1);
  double sum = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) sum += x[i];
  sum = block_sum<kThreads>(sum, sums);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
#ifdef BUG_MISSING_FENCE
    last[0] = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
#else
    __threadfence();
    last[0] = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
#endif
  }
  __syncthreads();
  if (!last[0]) return;
  sum = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kThreads) sum += partial[i];
  sum = block_sum<kThreads>(sum, sums);
  if (threadIdx.x == 0) *total = sum;
}

// 40 threads: a full warp, and one of 8 lanes.
__global__ void __launch_bounds__(64) intrinsics_kernel(int* __restrict__ wrong) {
  FF_SHARED(int, cells, 4);
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32, lanes = threadIdx.x < 32 ? 32 : 8;
  int errors = 0;
  errors += __shfl_sync(all, lane, 5) != 5;
  errors += __shfl_sync(all, lane, 1, 4) != lane / 4 * 4 + 1;
  errors += __shfl_up_sync(all, lane, 1, 8) != (lane % 8 ? lane - 1 : lane);
  errors += __shfl_down_sync(all, 0.5 * lane, 1, 8) != 0.5 * (lane % 8 < 7 ? lane + 1 : lane);
  errors += __shfl_xor_sync(all, static_cast<long long>(lane) << 40, 3) != static_cast<long long>(lane ^ 3) << 40;
  errors += __popc(__ballot_sync(all, lane % 2)) != lanes / 2;
  errors += !__any_sync(all, lane == 7) || __any_sync(all, lane == 32);
  errors += !__all_sync(all, lane < 32) || __all_sync(all, lane != 7);
  errors += __reduce_max_sync(all, -lane) != 0;
  errors += __reduce_min_sync(all, -lane) != 1 - lanes;
  errors += __reduce_add_sync(all, -lane) != -lanes * (lanes - 1) / 2;
  if (lane < 4) errors += __reduce_xor_sync(0xfu, 1u << lane) != 0xfu;  // only lanes of the mask
  errors += __float_as_int(__int_as_float(lane)) != lane || __ffs(8 << lane % 16) != 4 + lane % 16;
  errors += __clz(1) != 31 || __fdividef(1.0f, 4.0f) != 0.25f || fabs(rsqrtf(4.0f) - 0.5f) > 1e-6f;
  errors += fabs(__expf(1.0f) - 2.71828f) > 1e-4f || fabs(__logf(2.0f) - 0.693147f) > 1e-5f;
  errors += max(lane, 40) != 40 || min(lane, -1) != -1 || min(1.5f, 2.0f) != 1.5f;
  if (threadIdx.x < 4) cells[threadIdx.x] = 0;
  __syncthreads();
  atomicMax(&cells[0], lane);
  atomicMin(&cells[1], -lane);
  atomicOr(&cells[2], 1 << lane % 8);
  if (threadIdx.x < 32) {
    for (int old = 0, seen; (seen = atomicCAS(&cells[3], old, old + 1)) != old;) old = seen;
  }
  __syncthreads();
  errors += cells[0] != 31 || cells[1] != -31 || cells[2] != 255 || cells[3] != 32;
  FF_SHARED(float4, fours, 2);
  if (threadIdx.x < 2) fours[threadIdx.x] = make_float4(1, 2, 3, 4);
  __syncthreads();
#ifdef BUG_MISALIGNED
  const float4 four = *reinterpret_cast<const float4*>(&fours[0].y);
#else
  const float4 four = fours[1];
#endif
  errors += four.w != 4 || sizeof(double2) != 16 || blockDim.x != 40 || gridDim.x != 1 || warpSize != 32;
  if (errors) atomicAdd(wrong, errors);
}

}  // namespace

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int sum_rows(const float* x, int rows, int columns, float* row_sum, float* total, CUstream_st* stream) {
  if (const cudaError_t error = cudaMemsetAsync(total, 0, sizeof(float), stream)) return error;
  FF_LAUNCH(sum_rows_kernel, dim3(rows), dim3(kThreads), 0, stream, x, columns, row_sum, total);
  return cudaGetLastError();
}

int reverse_tiles(const float* x, int tiles, int blocks, float* y, CUstream_st* stream) {
  FF_LAUNCH(reverse_tiles_kernel, blocks, kThreads, 0, stream, x, tiles, y);
  return cudaGetLastError();
}

int count(const int* x, int n, int bins, int* counts, CUstream_st* stream) {
  const int bytes = bins * static_cast<int>(sizeof(int));
#ifndef BUG_NO_OPT_IN
  const auto more_shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(count_kernel, more_shared, bytes)) return error;
#endif
  FF_LAUNCH(count_kernel, dim3(3), dim3(kThreads), bytes, stream, x, n, bins, counts);
  return cudaGetLastError();
}

int argmax_rows(const float* x, int rows, int columns, int* index, int* positive, CUstream_st* stream) {
  FF_LAUNCH(argmax_rows_kernel, dim3(rows), dim3(kThreads), 0, stream, x, columns, index, positive);
  return cudaGetLastError();
}

int add_neighbours(const float* x, int n, float* y, CUstream_st* stream) {
  FF_LAUNCH(add_neighbours_kernel, dim3((n + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, x, n, y);
  return cudaGetLastError();
}

int sum_last_block(const double* x, int n, int blocks, double* partial, int* ticket, double* total,
                   CUstream_st* stream) {
  FF_LAUNCH(sum_last_block_kernel, dim3(blocks), dim3(kThreads), 0, stream, x, n, partial, ticket, total);
  return cudaGetLastError();
}

int intrinsics(int* wrong, CUstream_st* stream) {
  FF_LAUNCH(intrinsics_kernel, 1, 40, 0, stream, wrong);
  return cudaGetLastError();
}

}  // namespace ff::selftest
