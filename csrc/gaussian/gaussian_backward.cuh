// The gradients of densities: of the samples, and from the sums of the leaves.
#pragma once
#include "gaussian/gaussian_sums.cuh"

namespace ff {
namespace {

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
        for (int o = 0; o < Chunk::kOwn; ++o) z[o] = g[o] * gaussian_used(g[o], z[o]);
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
    T g[Shape::kSize];
#pragma unroll
    for (int c = 0; c < Shape::kSize; ++c)
      g[c] = begin + column + c < a.size.samples ? -a.grad[(begin + column + c) * a.size.leaves + leaf] : T(0);
    for (int row0 = 0; row0 < dims; row0 += kTileRows) {
      typename Shape::Sums sums;
      whiten_tile(a.size, a.leaves, leaf, a.x, begin, row0, left, right, sums);
#pragma unroll
      for (int r = 0; r < kMicroRows; ++r) {
        if (row0 + row + r >= dims) continue;
        Pack<T> values;
#pragma unroll
        for (int c = 0; c < Shape::kSize; ++c) values.v[c] = gaussian_used(g[c], sums[r][c]);
        *reinterpret_cast<Pack<T>*>(z + (row0 + row + r) * Shape::kColumnStride + column) = values;
      }
    }

    // 2. W^T z, times g
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

template <class T>
int write_zeros(T* to, int64_t count, CUstream_st* stream) {
  return to && count ? cudaMemsetAsync(to, 0, size_t(count) * sizeof(T), stream) : cudaSuccess;
}

}  // namespace

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

}  // namespace ff
