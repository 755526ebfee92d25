// W, densities, mixtures and posteriors.
#pragma once
#include "gaussian/gaussian_kernels.cuh"

namespace ff {
namespace {

constexpr int kPivotColumns = 16;  // columns of W that a block computes

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
    if (begin + c < dims) out[c] = begin + c <= row ? T(gaussian_finite<T>(value[c])) : T(0);
}

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
// warp stores 32 neighbours. In double, from L itself, whatever T is: in few dimensions the cancellation inside z is
// all of a density's error (condition number 1e6, D 2: 3e-5 of it in float32). Bytes an output: 4 stored, D / 8 read
// through L1 (all lanes the same). D (D + 5) / 2 operations in double an output, at D = 2 below the time of the store.
template <class T, int D>
__global__ void __launch_bounds__(256) narrow_kernel(const DensityParams<T> a) {
  const int64_t leaf = int64_t(blockIdx.y) * 32 + threadIdx.x % 32, begin = int64_t(blockIdx.x) * 256;
  if (leaf >= a.size.leaves) return;
  double mean[D], w[D][D];
  const T* lower = a.leaves.scale_tril + leaf * D * D;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    mean[i] = double(a.leaves.mean[leaf * D + i]);
    w[i][i] = 1.0 / double(lower[i * D + i]);
#pragma unroll
    for (int j = 0; j < i; ++j) {
      double total = 0.0;
#pragma unroll
      for (int k = j; k < i; ++k) total += double(lower[i * D + k]) * w[k][j];
      w[i][j] = -w[i][i] * total;
    }
  }
  const double log_norm = double(a.leaves.log_norm[leaf]);
  const int count = int(min(int64_t(256), a.size.samples - begin));
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < count; i += 8) {
    const int64_t n = begin + i;
    double d[D], squares = 0.0;
#pragma unroll
    for (int j = 0; j < D; ++j) d[j] = double(a.x[n * D + j]) - mean[j];
#pragma unroll
    for (int r = 0; r < D; ++r) {
      double z = 0.0;
#pragma unroll
      for (int j = 0; j <= r; ++j) z += w[r][j] * d[j];
      squares += z * z;
    }
    T value = T(gaussian_log_density(log_norm, squares));
    if (a.log_weight) value += a.log_weight[n * a.size.leaves + leaf];
    a.out[n * a.size.leaves + leaf] = value;
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

// With `out`, the leaves of a tile of samples are shared out to several blocks.
template <class T>
int launch_density(DensityParams<T> a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  if (a.out && s.dims <= kCarefulDims) {
    const auto narrow = [&](auto dims) {
      auto kernel = narrow_kernel<T, decltype(dims)::value>;
      return launch(kernel, parts_of(s.samples, 256), parts_of(s.leaves, 32), 256, 0, stream, a);
    };
    switch (s.dims) {
      case 1: return narrow(Constant<1>{});
      case 2: return narrow(Constant<2>{});
      case 3: return narrow(Constant<3>{});
      case 4: return narrow(Constant<4>{});
      case 5: return narrow(Constant<5>{});
      default: return narrow(Constant<6>{});
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

}  // namespace ff
