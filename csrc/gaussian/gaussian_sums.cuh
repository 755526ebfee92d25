// The sums of the leaves: sum w, sum w v and the lower triangle of sum w v v^T over the samples, where v = z and w = g
// (kWhitened, of the gradient), or v = x - m and w = r, 0 for a sample whose log_prob is not finite (of the
// statistics).
#pragma once
#include "gaussian/gaussian_kernels.cuh"

namespace ff {
namespace {

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
        mine[i] = gaussian_used(weight[threadIdx.x], z[0]);
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
            for (int e = 0; e < Shape::kSize; ++e)
              values.v[e] = gaussian_used(weight[column + c], z[q * Shape::kSize + e][c]);
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

}  // namespace
}  // namespace ff
