// CUDA kernels of the gaussian room: float is built by gaussian_cuda.cu, double by gaussian_cuda_double.cu.
//
// Three families, told apart by D. All subtract the mean first and multiply by W in the working precision (no tf32):
//   D <= 4   densities alone: a lane owns a leaf in registers, the samples pass; bound by the stores
//   D <= 32  "small": a thread owns two samples (double: one) in registers, the leaves pass through shared memory and
//            the loops over the triangle are unrolled: no zero is multiplied
//   D > 32   "wide": tiled products of 64 x 64 (double: 64 x 32) by panels of 32, panels above the diagonal skipped
// Sums over samples or leaves are cut up by the sizes alone, each part has one owner and one order, and the parts meet
// in a last kernel in their order: no atomics, the same bits in every run.
//
// Multiply-adds and times of float on an H200 (67 TF/s, 4.3 TB/s; an H100 SXM differs in its 3 TB/s alone, so only at
// D <= 4). The floor counts triangles of multiply-adds; the expectation adds what the kernels issue besides, the blocks
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

constexpr int kThreads = 128;      // of a block, where nothing else is said
constexpr int kNarrowDims = 4;     // the most D of the narrow kernel
constexpr int kSmallDims = 32;     // of the small ones
constexpr int kTileRows = 64;      // of a tiled product
constexpr int kDepth = 32;         // of a panel
constexpr int kMicroRows = 8;      // rows of a tile that a thread owns
constexpr int kWarpRows = 16;      // and a warp
constexpr int kPivotColumns = 16;  // columns of W that a block computes

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

// W.

// A block owns 16 columns of one leaf's W, a thread a row of them, in double whatever T is. Row i is done once the rows
// above have been subtracted: it goes through shared memory to those below, one barrier a row. D^3 / 6 fused
// multiply-adds in double a leaf; L is read through L1, 32 steps a cache line. (160, 136): 67 M, floor 2 us at 34 TF/s
// fp64, expected 15.
template <class T>
__global__ void __launch_bounds__(kMostDims) whiten_kernel(const GaussianSize s, const GaussianLeaves<T> leaves) {
  FF_SHARED(double, pivot, 2 * kPivotColumns);
  FF_SHARED(double, logs, kMostDims);
  const int dims = s.dims, row = int(threadIdx.x), begin = int(blockIdx.y) * kPivotColumns;
  const int64_t leaf = blockIdx.x;
  const T* lower = leaves.scale_tril + leaf * dims * dims + int64_t(row < dims ? row : 0) * dims;
  const double diagonal = row < dims ? double(lower[row]) : 1.0, inverse = 1.0 / diagonal;

  // 1. the logarithms: NaN for what is not above 0
  logs[row] = diagonal > 0.0 ? log(diagonal) : double(NAN);
  __syncthreads();
  if (blockIdx.y == 0 && row < 32) {
    double sum = 0.0;
    for (int i = row; i < dims; i += 32) sum += logs[i];
    sum = warp_sum(sum);
    if (row == 0) leaves.log_norm[leaf] = T(gaussian_log_norm(sum, dims));
  }

  // 2. the columns
  double value[kPivotColumns];
#pragma unroll
  for (int c = 0; c < kPivotColumns; ++c) value[c] = row == begin + c ? 1.0 : 0.0;
  double next = row > begin && row < dims ? double(lower[begin]) : 0.0;
  for (int i = begin; i < dims; ++i) {
    double* shared = pivot + i % 2 * kPivotColumns;
    if (row == i) {
#pragma unroll
      for (int c = 0; c < kPivotColumns; ++c) shared[c] = value[c] *= inverse;
    }
    const double factor = next;
    if (i + 1 < row && row < dims) next = double(lower[i + 1]);
    __syncthreads();
    if (row > i && row < dims) {
#pragma unroll
      for (int c = 0; c < kPivotColumns; ++c) value[c] -= factor * shared[c];
    }
  }

  // 3. store
  if (row >= dims) return;
  T* out = leaves.whiten + (leaf * dims + row) * dims + begin;
#pragma unroll
  for (int c = 0; c < kPivotColumns; ++c)
    if (begin + c < dims) out[c] = begin + c <= row ? T(value[c]) : T(0);
}

// Densities and mixtures.

template <class T>
struct DensityParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;           // [N, D]
  const T* log_weight;  // [N, K] or null
  T* out;               // [N, K]  log N, or log w + log N; null: log_prob alone
  T* log_prob;          // [N]  log-sum-exp of a row, if out is null
  int64_t block_leaves;
};

// A running log-sum-exp: the largest value and the sum of exp(value - largest). NaN stays in the sum.
template <class T>
struct LogSum {
  T largest = T(-INFINITY), total = 0;

  __device__ __forceinline__ void add(T value) {
    if (value > largest) {
      total = total * exp(largest - value) + T(1);
      largest = value;
    } else if (value != T(-INFINITY)) {
      total += exp(value - largest);
    }
  }
  __device__ __forceinline__ T result() const { return gaussian_shift(largest) + log(total); }
};

// A lane owns a leaf, its W, m and norm in registers; a block of 8 warps shares 256 samples and 32 leaves, so that a
// warp stores 32 neighbours. Bytes an output: 4 stored, D / 8 read through L1 (all lanes the same). About 11
// instructions an output at D = 2, a third of the time of the store: bound by memory.
template <class T, int D>
__global__ void __launch_bounds__(256) narrow_kernel(const DensityParams<T> a) {
  const int64_t leaf = int64_t(blockIdx.y) * 32 + threadIdx.x % 32, begin = int64_t(blockIdx.x) * 256;
  if (leaf >= a.size.leaves) return;
  T mean[D], w[D][D];
#pragma unroll
  for (int i = 0; i < D; ++i) {
    mean[i] = a.leaves.mean[leaf * D + i];
#pragma unroll
    for (int j = 0; j <= i; ++j) w[i][j] = a.leaves.whiten[(leaf * D + i) * D + j];
  }
  const T log_norm = a.leaves.log_norm[leaf];
  const int count = int(min(int64_t(256), a.size.samples - begin));
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < count; i += 8) {
    const int64_t n = begin + i;
    T d[D], squares = 0;
#pragma unroll
    for (int j = 0; j < D; ++j) d[j] = a.x[n * D + j] - mean[j];
#pragma unroll
    for (int r = 0; r < D; ++r) {
      T z = 0;
#pragma unroll
      for (int j = 0; j <= r; ++j) z += w[r][j] * d[j];
      squares += z * z;
    }
    T value = gaussian_log_density(log_norm, squares);
    if (a.log_weight) value += a.log_weight[n * a.size.leaves + leaf];
    a.out[n * a.size.leaves + leaf] = value;
  }
}

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

// A thread owns two samples: d in registers (2 P), one row of W at a time from shared memory, 16 bytes a read for 8
// multiply-adds, all lanes the same. A block shares the chunk's W (D P a leaf) and 256 samples. Bytes an output: 4
// stored, in whole sectors, D^2 / 64 of W from L2. About 1.2 instructions issue for a multiply-add.
template <class T, int P>
__global__ void __launch_bounds__(kThreads) small_density_kernel(const DensityParams<T> a) {
  using Chunk = Small<T, P>;
  FF_DYN_SHARED(T, memory);
  const int dims = a.size.dims;
  const Chunk s = Chunk::within(memory, dims);
  const int64_t begin = int64_t(blockIdx.x) * Chunk::kSamples, first_leaf = int64_t(blockIdx.y) * a.block_leaves;
  const int64_t end_leaf = min(a.size.leaves, first_leaf + a.block_leaves);
  LogSum<T> sum[Chunk::kOwn];
  s.load_samples(a.x, a.size, begin);
  for (int64_t first = first_leaf; first < end_leaf; first += Chunk::kLeaves) {
    // 1. load a chunk of leaves
    const int count = int(min(int64_t(Chunk::kLeaves), end_leaf - first));
    __syncthreads();
    s.load_leaves(a.leaves, a.size, first, count, begin, a.log_weight);
    __syncthreads();

    // 2. multiply
#pragma unroll 1
    for (int l = 0; l < count; ++l) {
      T d[Chunk::kOwn][P], squares[Chunk::kOwn] = {};
      s.differences(l, dims, d);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        if (i >= dims) continue;
        T z[Chunk::kOwn];
        whiten_row<P>(s.w + (l * dims + i) * P, i, d, z);
#pragma unroll
        for (int o = 0; o < Chunk::kOwn; ++o) squares[o] += z[o] * z[o];
      }
#pragma unroll
      for (int o = 0; o < Chunk::kOwn; ++o) {
        T& there = s.value[l * Chunk::kStride + int(threadIdx.x) * Chunk::kOwn + o];
        const T value = gaussian_log_density(s.norm[l], squares[o]) + there;
        if (a.out)
          there = value;
        else
          sum[o].add(value);
      }
    }

    // 3. store
    if (!a.out) continue;
    __syncthreads();
    const int l = threadIdx.x % Chunk::kLeaves;
    for (int n = threadIdx.x / Chunk::kLeaves; n < Chunk::kSamples; n += kThreads / Chunk::kLeaves)
      if (l < count && begin + n < a.size.samples)
        a.out[(begin + n) * a.size.leaves + first + l] = s.value[l * Chunk::kStride + n];
  }
  if (a.out) return;
#pragma unroll
  for (int o = 0; o < Chunk::kOwn; ++o) {
    const int64_t n = begin + int(threadIdx.x) * Chunk::kOwn + o;
    if (n < a.size.samples) a.log_prob[n] = sum[o].result();
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

// A block owns 64 samples and some leaves, one after the other; 17 KB of panels. Per pair D^2 / 2 multiply-adds (the
// diagonal of 16-row blocks rounds up), 4 (64 + 64) / (64 * 64) = 0.125 bytes from L2 a multiply-add, 4 bytes stored,
// one a sector. A panel costs a thread 1024 multiply-adds, 96 reads of shared memory and about 130 instructions of
// staging; the other blocks of the multiprocessor run through its barriers.
template <class T>
__global__ void __launch_bounds__(kThreads, Tile<T>::kBlocks) wide_density_kernel(const DensityParams<T> a) {
  using Shape = Tile<T>;
  FF_SHARED(T, left, Shape::kLeft);
  FF_SHARED(T, right, Shape::kRight);
  FF_SHARED(T, partial, 4 * Shape::kColumns);
  const int64_t begin = int64_t(blockIdx.x) * Shape::kColumns, first = int64_t(blockIdx.y) * a.block_leaves;
  const int64_t end = min(a.size.leaves, first + a.block_leaves);
  const int64_t n = begin + threadIdx.x;
  const bool owner = int(threadIdx.x) < Shape::kColumns && n < a.size.samples;
  LogSum<T> sum;
  for (int64_t leaf = first; leaf < end; ++leaf) {
    T squares[Shape::kSize] = {};
    for (int row = 0; row < a.size.dims; row += kTileRows) {
      typename Shape::Sums z;
      whiten_tile(a.size, a.leaves, leaf, a.x, begin, row, left, right, z);
#pragma unroll
      for (int r = 0; r < kMicroRows; ++r)
#pragma unroll
        for (int c = 0; c < Shape::kSize; ++c) squares[c] += z[r][c] * z[r][c];
    }
#pragma unroll
    for (int c = 0; c < Shape::kSize; ++c) {
      squares[c] += shuffle_xor(squares[c], 16);
      if (threadIdx.x % 32 < 16) partial[threadIdx.x / 32 * Shape::kColumns + my_column<T>() + c] = squares[c];
    }
    __syncthreads();
    if (!owner) continue;
    T total = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) total += partial[w * Shape::kColumns + threadIdx.x];
    T value = gaussian_log_density(a.leaves.log_norm[leaf], total);
    if (a.log_weight) value += a.log_weight[n * a.size.leaves + leaf];
    if (a.out)
      a.out[n * a.size.leaves + leaf] = value;
    else
      sum.add(value);
  }
  if (!a.out && owner) a.log_prob[n] = sum.result();
}

// Turns log w + log N into the posterior and its log-sum-exp. A warp owns a row, read twice (from L2 the second time)
// and written once: 12 bytes an element, K = 160, N = 4096: 8 MB, 2 us.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) posterior_kernel(const GaussianMixtureParams<T> a) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, count = a.size.leaves;
  if (n >= a.size.samples) return;
  T* row = a.posterior + n * count;
  LogSum<T> sum;
  for (int64_t k = lane; k < count; k += 32) sum.add(row[k]);
  const T shift = gaussian_shift(warp_max(sum.largest));
  const T total = warp_sum(sum.total * exp(sum.largest - shift));
  if (lane == 0) a.log_prob[n] = shift + log(total);
  const T factor = total == T(0) ? T(0) : T(1) / total;
  for (int64_t k = lane; k < count; k += 32) row[k] = exp(row[k] - shift) * factor;
}

// The gradient of the samples.

template <class T>
struct GradXParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;     // [N, D]
  const T* grad;  // [N, K]
  T* out;         // [parts, N, D]  -sum over a part of the leaves of g W^T z
  int64_t block_leaves;
};

// As small_density_kernel; the row of W that gave z_i serves at once for grad_x += W_i g z_i, so 2 D^2 / 2
// multiply-adds a pair and d and grad_x in registers (4 P).
template <class T, int P>
__global__ void __launch_bounds__(kThreads) small_grad_x_kernel(const GradXParams<T> a) {
  using Chunk = Small<T, P>;
  constexpr int kSize = Pack<T>::kSize;
  FF_DYN_SHARED(T, memory);
  const int dims = a.size.dims;
  const Chunk s = Chunk::within(memory, dims);
  const int64_t begin = int64_t(blockIdx.x) * Chunk::kSamples, first_leaf = int64_t(blockIdx.y) * a.block_leaves;
  const int64_t end_leaf = min(a.size.leaves, first_leaf + a.block_leaves);
  T out[Chunk::kOwn][P] = {};
  s.load_samples(a.x, a.size, begin);
  for (int64_t first = first_leaf; first < end_leaf; first += Chunk::kLeaves) {
    // 1. load a chunk of leaves
    const int count = int(min(int64_t(Chunk::kLeaves), end_leaf - first));
    __syncthreads();
    s.load_leaves(a.leaves, a.size, first, count, begin, a.grad);
    __syncthreads();

    // 2. multiply forth and back
#pragma unroll 1
    for (int l = 0; l < count; ++l) {
      T d[Chunk::kOwn][P], g[Chunk::kOwn];
      s.differences(l, dims, d);
#pragma unroll
      for (int o = 0; o < Chunk::kOwn; ++o) g[o] = -s.value[l * Chunk::kStride + int(threadIdx.x) * Chunk::kOwn + o];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        if (i >= dims) continue;
        const T* row = s.w + (l * dims + i) * P;
        T z[Chunk::kOwn];
        whiten_row<P>(row, i, d, z);
#pragma unroll
        for (int o = 0; o < Chunk::kOwn; ++o) z[o] *= g[o];
#pragma unroll
        for (int q = 0; q < P / kSize; ++q) {
          if (q * kSize > i) continue;
          const Pack<T> w = load_pack(row + q * kSize);
#pragma unroll
          for (int e = 0; e < kSize; ++e)
            if (q * kSize + e <= i) {
#pragma unroll
              for (int o = 0; o < Chunk::kOwn; ++o) out[o][q * kSize + e] += w.v[e] * z[o];
            }
        }
      }
    }
  }

  // 3. store, by way of the samples' place, of which each thread read its own
#pragma unroll
  for (int j = 0; j < P; ++j)
    if (j < dims) {
#pragma unroll
      for (int o = 0; o < Chunk::kOwn; ++o) s.x[j * Chunk::kStride + int(threadIdx.x) * Chunk::kOwn + o] = out[o][j];
    }
  __syncthreads();
  T* to = a.out + (int64_t(blockIdx.y) * a.size.samples + begin) * dims;
  for (int e = threadIdx.x; e < Chunk::kSamples * dims; e += kThreads) {
    const int n = e / dims, j = e - n * dims;
    if (begin + n < a.size.samples) to[e] = s.x[j * Chunk::kStride + n];
  }
}

// A block owns 64 samples and some leaves. z of a leaf stands in shared memory (272 D bytes), then W^T z passes in
// tiles whose sums go to `out` at once: 8 bytes a sum for D / 2 multiply-adds, each element with one owner. D^2
// multiply-adds a pair.
template <class T>
__global__ void __launch_bounds__(kThreads, Tile<T>::kBlocks) wide_grad_x_kernel(const GradXParams<T> a) {
  using Shape = Tile<T>;
  FF_DYN_SHARED(T, z);
  const int dims = a.size.dims, row = my_row(), column = my_column<T>();
  T* left = z + dims * Shape::kColumnStride;
  T* right = left + Shape::kLeft;
  const int64_t begin = int64_t(blockIdx.x) * Shape::kColumns, first = int64_t(blockIdx.y) * a.block_leaves;
  const int64_t end = min(a.size.leaves, first + a.block_leaves);
  T* out = a.out + (int64_t(blockIdx.y) * a.size.samples + begin + column) * dims;
  for (int64_t leaf = first; leaf < end; ++leaf) {
    // 1. z
    for (int row0 = 0; row0 < dims; row0 += kTileRows) {
      typename Shape::Sums sums;
      whiten_tile(a.size, a.leaves, leaf, a.x, begin, row0, left, right, sums);
#pragma unroll
      for (int r = 0; r < kMicroRows; ++r) {
        if (row0 + row + r >= dims) continue;
        Pack<T> values;
#pragma unroll
        for (int c = 0; c < Shape::kSize; ++c) values.v[c] = sums[r][c];
        *reinterpret_cast<Pack<T>*>(z + (row0 + row + r) * Shape::kColumnStride + column) = values;
      }
    }

    // 2. W^T z, times g
    T g[Shape::kSize];
#pragma unroll
    for (int c = 0; c < Shape::kSize; ++c)
      g[c] = begin + column + c < a.size.samples ? -a.grad[(begin + column + c) * a.size.leaves + leaf] : T(0);
    const T* w = a.leaves.whiten + leaf * dims * dims;
    for (int row0 = 0; row0 < dims; row0 += kTileRows) {
      typename Shape::Sums sums;
      clear<T>(sums);
      for (int k0 = row0; k0 < dims; k0 += kDepth) {
        __syncthreads();
        stage_along<kTileRows, Shape::kRowStride>(left, [&](int r, int k) {
          return k0 + k < dims && row0 + r <= k0 + k ? w[(k0 + k) * dims + row0 + r] : T(0);
        });
        __syncthreads();
        if (row0 + warp_row() < min(dims, k0 + kDepth))  // otherwise W is 0 there
          multiply<false>(left + row, Shape::kRowStride, z + k0 * Shape::kColumnStride + column, Shape::kColumnStride,
                          static_cast<const T*>(nullptr), min(kDepth, dims - k0), sums);
      }
#pragma unroll
      for (int c = 0; c < Shape::kSize; ++c) {
        if (begin + column + c >= a.size.samples) continue;
#pragma unroll
        for (int r = 0; r < kMicroRows; ++r) {
          if (row0 + row + r >= dims) continue;
          T& to = out[c * dims + row0 + row + r];
          const T value = g[c] * sums[r][c];
          to = leaf == first ? value : to + value;
        }
      }
    }
  }
}

// out = the sum of the parts, in their order. A thread owns an element: 4 (parts + 1) bytes.
template <class T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const T* __restrict__ parts, int64_t count, int64_t size, T* __restrict__ out) {
  const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (e >= size) return;
  T sum = 0;
  for (int64_t p = 0; p < count; ++p) sum += parts[p * size + e];
  out[e] = sum;
}

// The sums of the leaves: sum w, sum w v and the lower triangle of sum w v v^T over the samples, where v = z and w = g
// (kWhitened, of the gradient), or v = x - m and w = r, 0 for a sample whose log_prob is not finite (of the
// statistics).

template <class T>
struct SumsParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;         // [N, D]
  const T* weight;    // [N, K]
  const T* log_prob;  // [N], not read if kWhitened
  T* out;             // [K, parts, sums_size]
  Split split;        // of the samples
};

template <bool kWhitened, class T>
__device__ __forceinline__ bool counts(const SumsParams<T>& a, int64_t n) {
  if (n >= a.size.samples) return false;
  if constexpr (kWhitened) return true;
  const T value = a.log_prob[n];
  return value - value == T(0);
}

constexpr int kSmallSums = 16 + 4 + 1;  // of a thread: second moments of a 4 x 4 tile, first of its rows, count

// Tile t of the lower triangle of 4 x 4 tiles, row by row.
__device__ __forceinline__ void tile_place(int t, int& row, int& column) {
  row = 0;
  while (t > row) t -= ++row;
  column = t;
}

// A block owns a leaf and a part of the samples, 128 at a time. A thread owns first a sample (z in place of d, as in
// small_density_kernel, W once a block), then a 4 x 4 tile of the triangle and every G-th sample, where G threads share
// a tile; they meet in shared memory at the end, in their order. Per pair D^2 / 2 multiply-adds for z and as many for
// the sums, with 2 reads of 16 bytes for 16; x from L2, 4 D bytes.
template <class T, int P, bool kWhitened>
__global__ void __launch_bounds__(kThreads) small_sums_kernel(const SumsParams<T> a) {
  constexpr int kSize = Pack<T>::kSize, kStride = P + kSize;
  constexpr int kValues = kStride > kSmallSums ? kThreads * kStride : kThreads * kSmallSums;
  constexpr int kRows = kWhitened ? P : 1;
  FF_SHARED(T, w, kRows * P);
  FF_SHARED(T, v, kValues);
  FF_SHARED(T, weight, kThreads);
  FF_SHARED(T, mean, P);
  const int dims = a.size.dims, tiles = (dims + 3) / 4 * ((dims + 3) / 4 + 1) / 2, groups = kThreads / tiles;
  const int tile = int(threadIdx.x) % tiles, group = int(threadIdx.x) / tiles;
  const int64_t leaf = blockIdx.x / a.split.count, part = blockIdx.x % a.split.count;
  const int64_t first = part * a.split.each, end = min(a.size.samples, first + a.split.each);
  int tile_row, tile_column;
  tile_place(tile, tile_row, tile_column);
  if (int(threadIdx.x) < P)
    mean[threadIdx.x] = int(threadIdx.x) < dims ? a.leaves.mean[leaf * dims + threadIdx.x] : T(0);
  if constexpr (kWhitened) {
    for (int e = threadIdx.x; e < dims * P; e += kThreads)
      w[e] = e % P < dims ? a.leaves.whiten[(leaf * dims + e / P) * dims + e % P] : T(0);
  }
  T second[4][4] = {}, of_rows[4] = {}, count = 0;
  for (int64_t begin = first; begin < end; begin += kThreads) {
    // 1. load
    __syncthreads();
    const int j = threadIdx.x % P;
    for (int n = threadIdx.x / P; n < kThreads; n += kThreads / P)
      v[n * kStride + j] = j < dims && counts<kWhitened>(a, begin + n) ? a.x[(begin + n) * dims + j] - mean[j] : T(0);
    weight[threadIdx.x] =
        counts<kWhitened>(a, begin + threadIdx.x) ? a.weight[(begin + threadIdx.x) * a.size.leaves + leaf] : T(0);
    __syncthreads();

    // 2. z in place
    if constexpr (kWhitened) {
      T d[1][P];
      T* mine = v + int(threadIdx.x) * kStride;
#pragma unroll
      for (int q = 0; q < P / kSize; ++q) {
        const Pack<T> p = load_pack(mine + q * kSize);
#pragma unroll
        for (int e = 0; e < kSize; ++e) d[0][q * kSize + e] = p.v[e];
      }
#pragma unroll
      for (int i = 0; i < P; ++i) {
        if (i >= dims) continue;
        T z[1];
        whiten_row<P>(w + i * P, i, d, z);
        mine[i] = z[0];
      }
      __syncthreads();
    }

    // 3. add
    if (group >= groups) continue;
    for (int n = group; n < kThreads; n += groups) {
      T rows[4], columns[4];
      const T factor = weight[n];
#pragma unroll
      for (int q = 0; q < 4 / kSize; ++q) {
        const Pack<T> r = load_pack(v + n * kStride + 4 * tile_row + q * kSize);
        const Pack<T> c = load_pack(v + n * kStride + 4 * tile_column + q * kSize);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          rows[q * kSize + e] = r.v[e];
          columns[q * kSize + e] = factor * c.v[e];
        }
      }
      count += factor;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        of_rows[r] += factor * rows[r];
#pragma unroll
        for (int c = 0; c < 4; ++c) second[r][c] += rows[r] * columns[c];
      }
    }
  }

  // 4. the threads of a tile meet
  __syncthreads();
  T* mine = v + int(threadIdx.x) * kSmallSums;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    mine[16 + r] = of_rows[r];
#pragma unroll
    for (int c = 0; c < 4; ++c) mine[4 * r + c] = second[r][c];
  }
  mine[20] = count;
  __syncthreads();
  T* out = a.out + int64_t(blockIdx.x) * sums_size(dims);
  for (int i = threadIdx.x; i < tiles * kSmallSums; i += kThreads) {
    const int t = i / kSmallSums, e = i % kSmallSums;
    T sum = 0;
    for (int g = 0; g < groups; ++g) sum += v[(g * tiles + t) * kSmallSums + e];
    int row, column;
    tile_place(t, row, column);
    if (e < 16) {
      row = 4 * row + e / 4;
      column = 4 * column + e % 4;
      if (row < dims && column <= row) out[1 + dims + row * dims + column] = sum;
    } else if (e < 20) {
      row = 4 * row + e - 16;
      if (column == 0 && row < dims) out[1 + row] = sum;
    } else if (t == 0) {
      out[0] = sum;
    }
  }
}

// Where the values of the wide sums stand: v [kColumns, value_stride], the rows of a warp whole.
template <class T>
FF_HD int value_stride(int dims) {
  return (dims + kWarpRows - 1) / kWarpRows * kWarpRows + 16 / int(sizeof(T));
}

// A block owns a leaf and a part of the samples, 64 at a time: v stands in shared memory (260 D bytes), then the tiles
// of the triangle pass. With one tile its sums stay in registers; with more they live in the block's own part of `out`,
// 8 bytes a sum for 64 multiply-adds, and stay in L2. Per pair D^2 / 2 multiply-adds for z and as many for the sums.
template <class T, bool kWhitened>
__global__ void __launch_bounds__(kThreads, Tile<T>::kBlocks) wide_sums_kernel(const SumsParams<T> a) {
  using Shape = Tile<T>;
  constexpr int kOwned = kMostDims / kThreads;
  FF_DYN_SHARED(T, v);
  const int dims = a.size.dims, stride = value_stride<T>(dims), row = my_row(), column = my_column<T>();
  T* left = v + Shape::kColumns * stride;
  T* right = left + Shape::kLeft;
  T* weight = right + Shape::kRight;
  const int64_t leaf = blockIdx.x / a.split.count, part = blockIdx.x % a.split.count;
  const int64_t first = part * a.split.each, end = min(a.size.samples, first + a.split.each);
  const bool one_tile = dims <= kTileRows && dims <= Shape::kColumns;
  T* out = a.out + int64_t(blockIdx.x) * sums_size(dims);
  T* second = out + 1 + dims;
  T of_rows[kOwned] = {}, count = 0;
  typename Shape::Sums sums;
  clear<T>(sums);
  for (int64_t begin = first; begin < end; begin += Shape::kColumns) {
    // 1. load, and z
    __syncthreads();
    if (int(threadIdx.x) < Shape::kColumns) {
      const int64_t n = begin + threadIdx.x;
      weight[threadIdx.x] = counts<kWhitened>(a, n) ? a.weight[n * a.size.leaves + leaf] : T(0);
    }
    if constexpr (kWhitened) {
      for (int row0 = 0; row0 < dims; row0 += kTileRows) {
        typename Shape::Sums z;
        whiten_tile(a.size, a.leaves, leaf, a.x, begin, row0, left, right, z);
        if (row0 + warp_row() >= dims) continue;
#pragma unroll
        for (int c = 0; c < Shape::kSize; ++c)
#pragma unroll
          for (int q = 0; q < kMicroRows / Shape::kSize; ++q) {
            Pack<T> values;
#pragma unroll
            for (int e = 0; e < Shape::kSize; ++e) values.v[e] = z[q * Shape::kSize + e][c];
            *reinterpret_cast<Pack<T>*>(v + (column + c) * stride + row0 + row + q * Shape::kSize) = values;
          }
      }
    } else {
      for (int n = threadIdx.x / 32; n < Shape::kColumns; n += kThreads / 32) {
        const bool counted = counts<false>(a, begin + n);
        for (int i = threadIdx.x % 32; i < stride; i += 32)
          v[n * stride + i] = counted && i < dims ? a.x[(begin + n) * dims + i] - a.leaves.mean[leaf * dims + i] : T(0);
      }
    }
    __syncthreads();

    // 2. add: count and first moments, then tile by tile
    for (int n = 0; n < Shape::kColumns; ++n) {
      count += weight[n];
#pragma unroll
      for (int q = 0; q < kOwned; ++q) {
        const int i = int(threadIdx.x) + q * kThreads;
        if (i < dims) of_rows[q] += weight[n] * v[n * stride + i];
      }
    }
    const bool is_first = begin == first, is_last = begin + Shape::kColumns >= end;
    for (int row0 = 0; row0 < dims; row0 += kTileRows) {
      if (row0 + warp_row() >= dims) continue;  // no barrier below
      const int last = min(dims, row0 + warp_row() + kWarpRows);
      for (int column0 = 0; column0 < last; column0 += Shape::kColumns) {
        const auto each = [&](auto f) {
#pragma unroll
          for (int r = 0; r < kMicroRows; ++r)
#pragma unroll
            for (int c = 0; c < Shape::kSize; ++c) {
              const int i = row0 + row + r, j = column0 + column + c;
              if (i < dims && j <= i) f(second[i * dims + j], sums[r][c]);
            }
        };
        if (!one_tile) {
          clear<T>(sums);
          if (!is_first) each([](T& there, T& here) { here = there; });
        }
        multiply<true>(v + row0 + row, stride, v + min(column0 + column, stride - Shape::kSize), stride, weight,
                       Shape::kColumns, sums);
        if (!one_tile || is_last) each([](T& there, T& here) { there = here; });
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kOwned; ++q) {
    const int i = int(threadIdx.x) + q * kThreads;
    if (i < dims) out[1 + i] = of_rows[q];
  }
  if (threadIdx.x == 0) out[0] = count;
}

// The sum over a leaf's parts of one of its sums.
template <class T>
__device__ __forceinline__ T gather(const T* parts, int64_t leaf, int64_t count, int dims, int64_t which) {
  const int64_t size = sums_size(dims);
  const T* from = parts + leaf * count * size + which;
  T sum = 0;
  for (int64_t p = 0; p < count; ++p) sum += from[p * size];
  return sum;
}

template <class T>
struct FinishGradientParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* parts;  // [K, count, sums_size]
  int64_t count;
  T* grad_mean;        // [K, D] or null
  T* grad_scale_tril;  // [K, D, D] or null
};

// A block owns a tile of one leaf's grad_scale_tril = tril(W^T S) - diag(sum g / L_ii), and those of the first column
// grad_mean = W^T sum g z. Only the lower triangle of S is read, since i >= row >= column. D^3 / 6 multiply-adds and
// 2 D^2 parts read a leaf.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_gradient_kernel(const FinishGradientParams<T> a) {
  using Shape = Tile<T>;
  FF_SHARED(T, left, Shape::kLeft);
  FF_SHARED(T, right, Shape::kRight);
  FF_SHARED(T, moments, kMostDims);
  const int dims = a.size.dims, columns = (dims + Shape::kColumns - 1) / Shape::kColumns;
  const int row0 = int(blockIdx.y) / columns * kTileRows, column0 = int(blockIdx.y) % columns * Shape::kColumns;
  const int64_t leaf = blockIdx.x;
  const T* w = a.leaves.whiten + leaf * dims * dims;

  // 1. grad_mean
  if (a.grad_mean && column0 == 0) {
    for (int i = threadIdx.x; i < dims; i += kThreads) moments[i] = gather(a.parts, leaf, a.count, dims, 1 + i);
    __syncthreads();
    const int i = row0 + int(threadIdx.x);
    if (int(threadIdx.x) < kTileRows && i < dims) {
      T sum = 0;
      for (int k = i; k < dims; ++k) sum += w[k * dims + i] * moments[k];
      a.grad_mean[leaf * dims + i] = sum;
    }
  }
  if (!a.grad_scale_tril) return;

  // 2. grad_scale_tril
  typename Shape::Sums sums;
  clear<T>(sums);
  for (int k0 = row0; column0 < row0 + kTileRows && k0 < dims; k0 += kDepth) {
    __syncthreads();
    stage_along<kTileRows, Shape::kRowStride>(
        left, [&](int r, int k) { return k0 + k < dims && row0 + r <= k0 + k ? w[(k0 + k) * dims + row0 + r] : T(0); });
    stage_along<Shape::kColumns, Shape::kColumnStride>(right, [&](int c, int k) {
      return k0 + k < dims && column0 + c <= k0 + k
                 ? gather(a.parts, leaf, a.count, dims, 1 + dims + (k0 + k) * dims + column0 + c)
                 : T(0);
    });
    __syncthreads();
    if (row0 + warp_row() < dims)
      multiply<false>(left + my_row(), Shape::kRowStride, right + my_column<T>(), Shape::kColumnStride,
                      static_cast<const T*>(nullptr), min(kDepth, dims - k0), sums);
  }
#pragma unroll
  for (int r = 0; r < kMicroRows; ++r)
#pragma unroll
    for (int c = 0; c < Shape::kSize; ++c) {
      const int i = row0 + my_row() + r, j = column0 + my_column<T>() + c;
      if (i >= dims || j >= dims) continue;
      const int64_t at = (leaf * dims + i) * dims + j;
      T value = j <= i ? sums[r][c] : T(0);
      if (i == j) value -= gather(a.parts, leaf, a.count, dims, 0) / a.leaves.scale_tril[at];
      a.grad_scale_tril[at] = value;
    }
}

// A thread owns an element of `second`, and of `first` and `count` at its edge: 4 (parts + 1) bytes.
template <class T>
__global__ void __launch_bounds__(256)
    finish_statistics_kernel(const GaussianStatisticsParams<T> a, const int64_t count) {
  const int dims = a.size.dims, size = dims * dims;
  const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (e >= a.size.leaves * size) return;
  const int64_t leaf = e / size;
  const int i = int(e % size) / dims, j = int(e % size) % dims;
  a.second[e] = gather(a.scratch, leaf, count, dims, 1 + dims + max(i, j) * dims + min(i, j));
  if (j == 0) a.first[leaf * dims + i] = gather(a.scratch, leaf, count, dims, 1 + i);
  if (i == 0 && j == 0) a.count[leaf] = gather(a.scratch, leaf, count, dims, 0);
}

// Launches.

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

// With `out`, the leaves of a tile of samples are shared out to several blocks.
template <class T>
int launch_density(DensityParams<T> a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  if (a.out && s.dims <= kNarrowDims) {
    const auto narrow = [&](auto dims) {
      auto kernel = narrow_kernel<T, decltype(dims)::value>;
      return launch(kernel, parts_of(s.samples, 256), parts_of(s.leaves, 32), 256, 0, stream, a);
    };
    switch (s.dims) {
      case 1: return narrow(Constant<1>{});
      case 2: return narrow(Constant<2>{});
      case 3: return narrow(Constant<3>{});
      default: return narrow(Constant<4>{});
    }
  }
  const Split split = a.out ? leaf_split(s) : Split{s.leaves, 1};
  a.block_leaves = split.each;
  if (s.dims <= kSmallDims)
    return with_small_dims(s.dims, [&](auto p) {
      using Chunk = Small<T, decltype(p)::value>;
      auto kernel = small_density_kernel<T, decltype(p)::value>;
      return launch(kernel, parts_of(s.samples, Chunk::kSamples), split.count, kThreads, Chunk::bytes(s.dims), stream,
                    a);
    });
  auto kernel = wide_density_kernel<T>;
  return launch(kernel, parts_of(s.samples, Tile<T>::kColumns), split.count, kThreads, 0, stream, a);
}

template <class T>
int launch_grad_x(const GaussianBackwardParams<T>& b, CUstream_st* stream) {
  const GaussianSize& s = b.size;
  const Split split = leaf_split(s);
  const GradXParams<T> a{s, b.leaves, b.x, b.grad, split.count == 1 ? b.grad_x : b.scratch, split.each};
  int error;
  if (s.dims <= kSmallDims) {
    error = with_small_dims(s.dims, [&](auto p) {
      using Chunk = Small<T, decltype(p)::value>;
      auto kernel = small_grad_x_kernel<T, decltype(p)::value>;
      return launch(kernel, parts_of(s.samples, Chunk::kSamples), split.count, kThreads, Chunk::bytes(s.dims), stream,
                    a);
    });
  } else {
    using Shape = Tile<T>;
    const int shared = int(sizeof(T)) * (s.dims * Shape::kColumnStride + Shape::kLeft + Shape::kRight);
    auto kernel = wide_grad_x_kernel<T>;
    error = launch(kernel, parts_of(s.samples, Shape::kColumns), split.count, kThreads, shared, stream, a);
  }
  if (error != cudaSuccess || split.count == 1) return error;
  const int64_t size = s.samples * s.dims;
  auto kernel = add_parts_kernel<T>;
  return launch(kernel, parts_of(size, 256), 1, 256, 0, stream, static_cast<const T*>(b.scratch), split.count, size,
                b.grad_x);
}

template <bool kWhitened, class T>
int launch_sums(const SumsParams<T>& a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  const int64_t blocks = s.leaves * a.split.count;
  if (s.dims <= kSmallDims)
    return with_small_dims(s.dims, [&](auto p) {
      auto kernel = small_sums_kernel<T, decltype(p)::value, kWhitened>;
      return launch(kernel, blocks, 1, kThreads, 0, stream, a);
    });
  using Shape = Tile<T>;
  const int shared =
      int(sizeof(T)) * (Shape::kColumns * value_stride<T>(s.dims) + Shape::kLeft + Shape::kRight + Shape::kColumns);
  auto kernel = wide_sums_kernel<T, kWhitened>;
  return launch(kernel, blocks, 1, kThreads, shared, stream, a);
}

template <class T>
int write_zeros(T* to, int64_t count, CUstream_st* stream) {
  return to && count ? cudaMemsetAsync(to, 0, size_t(count) * sizeof(T), stream) : cudaSuccess;
}

}  // namespace

template <class T>
int gaussian_whiten_cuda(const GaussianSize& s, const GaussianLeaves<T>& leaves, CUstream_st* stream) {
  if (!s.leaves) return cudaSuccess;
  auto kernel = whiten_kernel<T>;
  return launch(kernel, s.leaves, parts_of(s.dims, kPivotColumns), int(parts_of(s.dims, 32)) * 32, 0, stream, s,
                leaves);
}

template <class T>
int gaussian_log_prob_cuda(const GaussianLogProbParams<T>& a, CUstream_st* stream) {
  if (!a.size.samples || !a.size.leaves) return cudaSuccess;
  return launch_density(DensityParams<T>{a.size, a.leaves, a.x, nullptr, a.log_prob, nullptr, 0}, stream);
}

template <class T>
int gaussian_backward_cuda(const GaussianBackwardParams<T>& a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  const int64_t dims = s.dims;
  if (!s.samples || !s.leaves) {
    int error = write_zeros(a.grad_x, s.samples * dims, stream);
    if (error == cudaSuccess) error = write_zeros(a.grad_mean, s.leaves * dims, stream);
    if (error == cudaSuccess) error = write_zeros(a.grad_scale_tril, s.leaves * dims * dims, stream);
    return error;
  }
  if (a.grad_x) {
    const int error = launch_grad_x(a, stream);
    if (error != cudaSuccess) return error;
  }
  if (!a.grad_mean && !a.grad_scale_tril) return cudaSuccess;
  // The parts of grad_x are used up: the stream is one.
  const Split split = sample_split(s);
  const int error = launch_sums<true>(SumsParams<T>{s, a.leaves, a.x, a.grad, nullptr, a.scratch, split}, stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = parts_of(dims, kTileRows) * parts_of(dims, Tile<T>::kColumns);
  auto kernel = finish_gradient_kernel<T>;
  return launch(kernel, s.leaves, tiles, kThreads, 0, stream,
                FinishGradientParams<T>{s, a.leaves, a.scratch, split.count, a.grad_mean, a.grad_scale_tril});
}

template <class T>
int gaussian_mixture_cuda(const GaussianMixtureParams<T>& a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  if (!s.samples) return cudaSuccess;
  if (s.leaves || !a.posterior) {
    const int error = launch_density(
        DensityParams<T>{s, a.leaves, a.x, a.log_weight, a.posterior, a.posterior ? nullptr : a.log_prob, 0}, stream);
    if (error != cudaSuccess || !a.posterior) return error;
  }
  auto kernel = posterior_kernel<T>;
  return launch(kernel, parts_of(s.samples, kThreads / 32), 1, kThreads, 0, stream, a);
}

template <class T>
int gaussian_statistics_cuda(const GaussianStatisticsParams<T>& a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  if (!s.leaves) return cudaSuccess;
  const Split split = sample_split(s);
  if (split.count) {
    const int error =
        launch_sums<false>(SumsParams<T>{s, a.leaves, a.x, a.posterior, a.log_prob, a.scratch, split}, stream);
    if (error != cudaSuccess) return error;
  }
  auto kernel = finish_statistics_kernel<T>;  // no parts: zeros
  return launch(kernel, parts_of(s.leaves * s.dims * s.dims, 256), 1, 256, 0, stream, a, split.count);
}

}  // namespace ff
