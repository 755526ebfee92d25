// What the CUDA kernels of the gaussian room share: float is built by gaussian_cuda.cu, double by
// gaussian_cuda_double.cu.
//
// Three families, told apart by D. All subtract the mean first and multiply by W, no tf32:
//   D <= 6   densities alone: a lane owns a leaf in registers, in double, the samples pass
//   D <= 32  "small": a thread owns two samples (double: one) in registers, the leaves pass through shared memory and
//            the loops over the triangle are unrolled: no zero is multiplied
//   D > 32   "wide": tiled products of 64 x 64 (double: 64 x 32) by panels of 32, panels above the diagonal skipped
// Sums over samples or leaves are cut up by the sizes alone, each part has one owner and one order, and the parts meet
// in a last kernel in their order: no atomics, the same bits in every run.
//
// Multiply-adds and times of float on an H200 (67 TF/s, 4.3 TB/s; an H100 SXM differs in its 3 TB/s alone, so only at
// D <= 6). The floor counts triangles of multiply-adds; the expectation adds what the kernels issue besides, the blocks
// of 16 rows and of 64 columns that the diagonal cuts, and launches. Computed, not measured:
//   log_prob (4096, 160, 2)       2.6 MB stored: floor 0.6 us, expected 3, a launch
//   log_prob (4096, 160, 20)      0.15 G: floor 4.5 us, expected 10
//   log_prob (1024, 160, 136)     1.5 G: floor 46 us, expected 75
//   backward (4096, 160, 20)      z twice, W^T u, u z^T, 0.55 G: floor 17 us, expected 35
//   backward (1024, 160, 136)     the same, 6.1 G: floor 185 us, expected 300
//   statistics (4096, 160, 20)    0.14 G for sum r d d^T: floor 4 us, expected 10
//   statistics (4096, 160, 136)   6.1 G: floor 180 us, expected 370 (of its tiles 61 % lie under the diagonal)
#pragma once
#include <type_traits>

#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "gaussian/gaussian.h"
#include "gaussian/gaussian_math.h"

namespace ff {
namespace {

constexpr int kThreads = 128;   // of a block, where nothing else is said
constexpr int kSmallDims = 32;  // of the small ones
constexpr int kTileRows = 64;   // of a tiled product
constexpr int kDepth = 32;      // of a panel
constexpr int kMicroRows = 8;   // rows of a tile that a thread owns
constexpr int kWarpRows = 16;   // and a warp

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

// How work is cut up: by the sizes alone, and not by the type, so that scratch has one size.

struct Split {
  int64_t each, count;  // items of a part, parts
};

inline int64_t parts_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// About `wanted` parts, each a multiple of `grain`.
inline Split split_items(int64_t items, int64_t wanted, int64_t grain) {
  if (!items) return {grain, 0};
  const int64_t each = parts_of(parts_of(items, wanted), grain) * grain;
  return {each, parts_of(items, each)};
}

#ifdef FF_HOST_SHIM
constexpr int64_t kWantedBlocks = 8;  // so that small tests pass through every loop
#else
constexpr int64_t kWantedBlocks = 528;  // four for each multiprocessor of an H200
#endif

// The leaves of a block that owns a tile of samples.
inline Split leaf_split(const GaussianSize& s) {
  const bool small = s.dims <= kSmallDims;
  const int64_t tiles = parts_of(s.samples, small ? 256 : 64);
  return split_items(s.leaves, tiles ? parts_of(kWantedBlocks, tiles) : 1, small ? 8 : 1);
}

// The samples of a block that owns a leaf.
inline Split sample_split(const GaussianSize& s) {
  const int64_t leaves = s.leaves ? s.leaves : 1;
  return split_items(s.samples, parts_of(kWantedBlocks, leaves), s.dims <= kSmallDims ? 128 : 64);
}

// A leaf's sums over a part of the samples: the count, first moments [D], second moments [D, D] (lower triangle).
FF_HD int64_t sums_size(int dims) { return 1 + dims + int64_t(dims) * dims; }

// Shared memory and phases of the small kernels. A thread owns kOwn neighbouring samples of the block's kSamples;
// leaves pass in chunks of kLeaves, so that a chunk's values of a sample fill a sector of [N, K]. P: D, rounded up.
template <class T, int P>
struct Small {
  static constexpr int kOwn = 8 / int(sizeof(T));
  static constexpr int kSamples = kThreads * kOwn;
  static constexpr int kStride = kSamples + 2;
  static constexpr int kLeaves = 32 / int(sizeof(T));
  struct alignas(8) Own {
    T v[kOwn];
  };

  T* w;      // [kLeaves * D, P]
  T* value;  // [kLeaves, kStride]  what [N, K] holds of the chunk
  T* x;      // [D, kStride]
  T* mean;   // [kLeaves, D]
  T* norm;   // [kLeaves]

  static __device__ __forceinline__ Small within(T* memory, int dims) {
    Small s;
    s.w = memory;
    s.value = s.w + kLeaves * dims * P;
    s.x = s.value + kLeaves * kStride;
    s.mean = s.x + dims * kStride;
    s.norm = s.mean + kLeaves * dims;
    return s;
  }
  static int bytes(int dims) {
    return int(sizeof(T)) * (kLeaves * dims * P + kLeaves * kStride + dims * kStride + kLeaves * dims + kLeaves);
  }

  __device__ __forceinline__ void load_samples(const T* from, const GaussianSize& size, int64_t begin) const {
    const int dims = size.dims;
    for (int e = threadIdx.x; e < kSamples * dims; e += kThreads) {
      const int n = e / dims, j = e - n * dims;
      x[j * kStride + n] = begin + n < size.samples ? from[begin * dims + e] : T(0);
    }
  }

  // `values` [N, K] or null, which reads as zeros.
  __device__ __forceinline__ void load_leaves(const GaussianLeaves<T>& leaves, const GaussianSize& size, int64_t first,
                                              int count, int64_t begin, const T* values) const {
    const int dims = size.dims;
    const int j = threadIdx.x % P;
    for (int row = threadIdx.x / P; row < count * dims; row += kThreads / P)
      if (j < dims) w[row * P + j] = leaves.whiten[(first * dims + row) * dims + j];
    for (int e = threadIdx.x; e < count * dims; e += kThreads) mean[e] = leaves.mean[first * dims + e];
    if (int(threadIdx.x) < count) norm[threadIdx.x] = leaves.log_norm[first + threadIdx.x];
    const int l = threadIdx.x % kLeaves;
    for (int n = threadIdx.x / kLeaves; n < kSamples; n += kThreads / kLeaves)
      value[l * kStride + n] =
          values && l < count && begin + n < size.samples ? values[(begin + n) * size.leaves + first + l] : T(0);
  }

  __device__ __forceinline__ void differences(int l, int dims, T (&d)[kOwn][P]) const {
#pragma unroll
    for (int j = 0; j < P; ++j) {
      Own at{};
      T m = 0;
      if (j < dims) {
        at = *reinterpret_cast<const Own*>(x + j * kStride + int(threadIdx.x) * kOwn);
        m = mean[l * dims + j];
      }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) d[o][j] = at.v[o] - m;
    }
  }
};

// z_i of this thread's samples: the dot product with row i of W, whose P values start at `row`.
template <int P, class T, int kOwn>
__device__ __forceinline__ void whiten_row(const T* row, int i, const T (&d)[kOwn][P], T (&z)[kOwn]) {
  constexpr int kSize = Pack<T>::kSize;
#pragma unroll
  for (int o = 0; o < kOwn; ++o) z[o] = 0;
#pragma unroll
  for (int q = 0; q < P / kSize; ++q) {
    if (q * kSize > i) continue;
    const Pack<T> w = load_pack(row + q * kSize);
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (q * kSize + e <= i) {
#pragma unroll
        for (int o = 0; o < kOwn; ++o) z[o] += w.v[e] * d[o][q * kSize + e];
      }
  }
}

// The wide scheme. A tile is kTileRows x kColumns sums over a depth; a thread owns 8 rows and a pack of columns of it:
// lane % 16 tells the columns, the warp and lane / 16 the rows. Both factors lie in shared memory with the depth
// outermost. Per step of depth a warp reads two vectors of rows, one wavefront each, and one of columns, two, for 32
// multiply-adds a thread: with four warps 16 of 32 cycles.
template <class T>
struct Tile {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int kColumns = 16 * kSize;
  static constexpr int kRowStride = kTileRows + kSize;
  static constexpr int kColumnStride = kColumns + kSize;
  static constexpr int kBlocks = 16 / int(sizeof(T));  // of a multiprocessor, as registers allow
  static constexpr int kLeft = kDepth * kRowStride;
  static constexpr int kRight = kDepth * kColumnStride;
  using Sums = T[kMicroRows][kSize];
};

__device__ __forceinline__ int warp_row() { return int(threadIdx.x) / 32 * kWarpRows; }
__device__ __forceinline__ int my_row() { return warp_row() + int(threadIdx.x) % 32 / 16 * kMicroRows; }
template <class T>
__device__ __forceinline__ int my_column() {
  return int(threadIdx.x) % 16 * Pack<T>::kSize;
}

template <class T>
__device__ __forceinline__ void clear(T (&sums)[kMicroRows][Pack<T>::kSize]) {
#pragma unroll
  for (int r = 0; r < kMicroRows; ++r)
#pragma unroll
    for (int c = 0; c < Pack<T>::kSize; ++c) sums[r][c] = 0;
}

// sums += left^T (weight right) over `depth` steps; the pointers are at this thread's rows and columns. A weight that
// is null counts 1.
template <bool kWeighted, class T>
__device__ __forceinline__ void multiply(const T* left, int left_stride, const T* right, int right_stride,
                                         const T* weight, int depth, T (&sums)[kMicroRows][Pack<T>::kSize]) {
  constexpr int kSize = Pack<T>::kSize;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    Pack<T> b = load_pack(right + k * right_stride);
    if constexpr (kWeighted) {
#pragma unroll
      for (int c = 0; c < kSize; ++c) b.v[c] *= weight[k];
    }
#pragma unroll
    for (int q = 0; q < kMicroRows / kSize; ++q) {
      const Pack<T> a = load_pack(left + k * left_stride + q * kSize);
#pragma unroll
      for (int e = 0; e < kSize; ++e)
#pragma unroll
        for (int c = 0; c < kSize; ++c) sums[q * kSize + e][c] += a.v[e] * b.v[c];
    }
  }
}

// to[k][r] = value(r, at), at = from + r stride + k, where memory has k innermost: 8 k of 4 r a warp, so whole sectors
// and, with the strides of a Tile, no bank twice. A thread has one k. `at` moves on: offsets of its own for each r
// would fill the registers.
__device__ __forceinline__ int across_k() { return int(threadIdx.x) / 32 * 8 + int(threadIdx.x) % 8; }
template <int kCount, int kStride, class T, class F>
__device__ __forceinline__ void stage_across(T* to, const T* from, int stride, const F& value) {
  const int k = across_k(), r = int(threadIdx.x) % 32 / 8;
  const T* at = from + r * stride + k;
  T v[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i, at += 4 * stride) v[i] = value(i * 4 + r, at);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) to[k * kStride + i * 4 + r] = v[i];
}

// to[k][r] = value(r, k), where memory has r innermost.
template <int kCount, int kStride, class T, class F>
__device__ __forceinline__ void stage_along(T* to, const F& value) {
  constexpr int kSteps = kThreads / kCount;
  const int k = int(threadIdx.x) / kCount, r = int(threadIdx.x) % kCount;
  T v[kDepth / kSteps];
#pragma unroll
  for (int i = 0; i < kDepth / kSteps; ++i) v[i] = value(r, i * kSteps + k);
#pragma unroll
  for (int i = 0; i < kDepth / kSteps; ++i) to[(i * kSteps + k) * kStride + r] = v[i];
}

// z of the samples from `begin` and the rows from `row`: panels of W and of d = x - m, up to the diagonal. Starts with
// a barrier; zeros for rows and samples past the end.
template <class T>
__device__ __forceinline__ void whiten_tile(const GaussianSize& s, const GaussianLeaves<T>& leaves, int64_t leaf,
                                            const T* x, int64_t begin, int row, T* left, T* right,
                                            T (&sums)[kMicroRows][Pack<T>::kSize]) {
  using Shape = Tile<T>;
  const int dims = s.dims, end = min(dims, row + kTileRows);
  const T* w = leaves.whiten + leaf * dims * dims;
  const T* mean = leaves.mean + leaf * dims;
  const int last = min(row + warp_row() + kWarpRows, dims);  // of this warp's rows, past the end
  const int samples = int(min(int64_t(Shape::kColumns), s.samples - begin));
  clear<T>(sums);
  for (int k0 = 0; k0 < end; k0 += kDepth) {
    __syncthreads();
    const int k = k0 + across_k();
    const T m = k < dims ? mean[k] : T(0);
    stage_across<kTileRows, Shape::kRowStride>(left, w + row * dims + k0, dims, [&](int r, const T* at) {
      return row + r < dims && k <= row + r ? *at : T(0);
    });
    stage_across<Shape::kColumns, Shape::kColumnStride>(right, x + begin * dims + k0, dims, [&](int n, const T* at) {
      return n < samples && k < dims ? *at - m : T(0);
    });
    __syncthreads();
    if (row + warp_row() < dims)
      multiply<false>(left + my_row(), Shape::kRowStride, right + my_column<T>(), Shape::kColumnStride,
                      static_cast<const T*>(nullptr), min(kDepth, last - k0), sums);
  }
}

constexpr int kFreeShared = 48 * 1024;  // bytes a kernel may have without asking

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, int64_t blocks, int64_t rows, int threads, int shared, CUstream_st* stream,
           const Arguments&... arguments) {
  if (blocks > 0x7fffffff || rows > 65535) return cudaErrorInvalidConfiguration;
  if (shared > kFreeShared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  FF_LAUNCH(kernel, dim3(unsigned(blocks), unsigned(rows)), dim3(unsigned(threads)), size_t(shared), stream,
            arguments...);
  return cudaGetLastError();
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f with D, rounded up to what the small kernels are built for.
template <class F>
int with_small_dims(int dims, const F& f) {
  if (dims <= 4) return f(Constant<4>{});
  if (dims <= 8) return f(Constant<8>{});
  if (dims <= 16) return f(Constant<16>{});
  return f(Constant<32>{});
}

}  // namespace
}  // namespace ff
