// The highest pixel of each mixture, and its refinement.
#pragma once
#include "pool/pool_kernels.cuh"

namespace ff {
namespace {

template <class T>
struct PeakTile {
  static constexpr int kThreads = 128;
  static constexpr int kMicroRows = sizeof(T) == 4 ? 8 : 4, kMicroPixels = 8;       // of a thread
  static constexpr int kRows = 2 * 4 * kMicroRows, kPixels = 2 * 8 * kMicroPixels;  // of a block of 2 x 2 warps
  static constexpr int kPieces = 4;                        // 16-byte vectors of a row of a stage
  static constexpr int kDepth = kPieces * Pack<T>::kSize;  // leaves of a stage
  static constexpr int kStride = kPieces + 1;              // padded: 8 neighbours' vectors lie in different banks
};

template <class T>
struct Best {
  T value;  // NaN once a NaN was seen
  int64_t where;
};

struct Higher {  // of equal values the first; a NaN above all
  template <class T>
  __device__ __forceinline__ Best<T> operator()(const Best<T>& a, const Best<T>& b) const {
    const bool second = b.value != b.value || b.value > a.value || (b.value == a.value && b.where < a.where);
    return second ? b : a;
  }
};

// A float and a pixel as a number that grows with the float and, among equals, falls with the pixel; NaN is the top.
constexpr unsigned kNanKey = 0xffffffffu;
__device__ __forceinline__ unsigned long long pack_peak(float value, int64_t where) {
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 equals 0
  const unsigned ordered = value != value ? kNanKey : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | static_cast<unsigned>(~static_cast<unsigned>(where));
}
__device__ __forceinline__ Best<float> unpack_peak(unsigned long long key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  const unsigned bits = ordered == kNanKey ? 0x7fc00000u : ordered >> 31 ? ordered ^ 0x80000000u : ~ordered;
  return {__uint_as_float(bits), static_cast<int64_t>(~static_cast<unsigned>(key))};
}

template <class T>
__device__ __forceinline__ void write_peak(const PoolPeakParams<T>& a, int64_t row, const Best<T>& best, T dx, T dy) {
  const bool undefined = best.value - best.value != T(0);  // infinities too: a broken row
  a.points[2 * row] = undefined ? T(NAN) : T(best.where % a.width) + dx;
  a.points[2 * row + 1] = undefined ? T(NAN) : T(best.where / a.width) + dy;
  a.score[row] = undefined ? T(NAN) : best.value;
}

// yhat = p q^T as a tiled product whose epilogue keeps each row's highest pixel.
// A thread owns 8 x 8 (double: 4 x 8) products and the best pixel of its rows; a block of 4 warps shares 16 leaves of
// 64 rows and 128 pixels, two stages, 30 KB. Per 16 bytes of leaves a warp reads 16 vectors, one wavefront each, for
// 256 FMAs a thread (64 cycles): the FMAs bind. Bytes from L2 per FMA: 4 (64 + 128) / (64 * 128) = 0.09, 12 a cycle
// and multiprocessor. Floor H W N R FMAs: R = 4352, 64 x 64, N = 2048: 1.1 ms at 67 TF/s.
// Every product adds its leaves in the same order, so equal leaves tie exactly. The blocks of a row meet either in one
// block (gridDim.y = 1) or by an integer maximum on keys that stand in `points` until refine_kernel reads them: its
// result does not depend on their order.
template <class T>
__global__ void __launch_bounds__(PeakTile<T>::kThreads, 3)
    peak_kernel(const PoolPeakParams<T> a, bool vectors, bool keys) {
  using Tile = PeakTile<T>;
  constexpr int kWidth = Pack<T>::kSize;
  FF_SHARED(Pack<T>, stage, 2 * (Tile::kRows + Tile::kPixels) * Tile::kStride);
  FF_SHARED(Best<T>, meeting, Tile::kRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_row = warp % 2 * (Tile::kRows / 2) + lane / 8, my_pixel = warp / 2 * (Tile::kPixels / 2) + lane % 8;
  const int64_t pixels = int64_t(a.height) * a.width, first_row = int64_t(blockIdx.x) * Tile::kRows;

  auto fetch = [&](int slot, int64_t first_pixel, int64_t base) {
    Pack<T>* to = stage + slot * (Tile::kRows + Tile::kPixels) * Tile::kStride;
    for (int i = threadIdx.x; i < (Tile::kRows + Tile::kPixels) * Tile::kPieces; i += Tile::kThreads) {
      const int v = i / Tile::kPieces, piece = i % Tile::kPieces;
      const int64_t n = base + piece * kWidth;
      const bool is_row = v < Tile::kRows;
      const int64_t index = is_row ? first_row + v : first_pixel + v - Tile::kRows;
      const T* from = (is_row ? a.prob : a.pool) + index * a.leaves + n;
      const int64_t left = index < (is_row ? a.rows : pixels) ? a.leaves - n : 0;
      Pack<T>* there = to + v * Tile::kStride + piece;
      if (vectors && left > 0) {
        cp_async16(there, from);
      } else {
        Pack<T> p{};
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          if (j < left) p.v[j] = from[j];
        *there = p;
      }
    }
    cp_async_commit();
  };

  Best<T> best[Tile::kMicroRows];
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) best[i] = {-T(INFINITY), 0};
  for (int64_t first_pixel = int64_t(blockIdx.y) * Tile::kPixels; first_pixel < pixels;
       first_pixel += int64_t(gridDim.y) * Tile::kPixels) {
    T sum[Tile::kMicroRows][Tile::kMicroPixels] = {};
    int slot = 0;
    fetch(slot, first_pixel, 0);
    for (int64_t base = 0; base < a.leaves; base += Tile::kDepth, slot ^= 1) {
      // 1. load the next leaves
      if (base + Tile::kDepth < a.leaves)
        fetch(slot ^ 1, first_pixel, base + Tile::kDepth);
      else
        cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      // 2. multiply
      const Pack<T>* rows = stage + slot * (Tile::kRows + Tile::kPixels) * Tile::kStride;
      const Pack<T>* leaves = rows + Tile::kRows * Tile::kStride;
#pragma unroll 1
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        Pack<T> p[Tile::kMicroRows];
#pragma unroll
        for (int i = 0; i < Tile::kMicroRows; ++i) p[i] = rows[(my_row + 4 * i) * Tile::kStride + piece];
#pragma unroll
        for (int j = 0; j < Tile::kMicroPixels; ++j) {
          const Pack<T> q = leaves[(my_pixel + 8 * j) * Tile::kStride + piece];
#pragma unroll
          for (int w = 0; w < kWidth; ++w)
#pragma unroll
            for (int i = 0; i < Tile::kMicroRows; ++i) sum[i][j] += p[i].v[w] * q.v[w];
        }
      }
      __syncthreads();
    }
    // 3. keep the highest; this thread's pixels ascend
#pragma unroll
    for (int j = 0; j < Tile::kMicroPixels; ++j) {
      const int64_t pixel = first_pixel + my_pixel + 8 * j;
      if (pixel >= pixels) continue;
#pragma unroll
      for (int i = 0; i < Tile::kMicroRows; ++i)
        if (sum[i][j] > best[i].value || sum[i][j] != sum[i][j]) best[i] = {sum[i][j], pixel};
    }
  }

  // 4. reduce over the lanes of a row, then over the two warps that share it
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    best[i] = warp_reduce<8>(best[i], Higher{});
    if (warp / 2 == 1 && lane % 8 == 0) meeting[my_row + 4 * i] = best[i];
  }
  __syncthreads();
  if (warp / 2 == 1 || lane % 8 != 0) return;
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    const int64_t row = first_row + my_row + 4 * i;
    if (row >= a.rows) continue;
    const Best<T> winner = Higher{}(best[i], meeting[my_row + 4 * i]);
    if constexpr (sizeof(T) == 4) {
      if (keys) {
        atomicMax(reinterpret_cast<unsigned long long*>(a.points) + row, pack_peak(winner.value, winner.where));
        continue;
      }
    }
    write_peak(a, row, winner, T(0), T(0));
  }
}

// Unpacks the keys, if there are any, and refines. A warp owns a row, its lanes the leaves: 8 N q and N p from L2 a
// row, a 500th of the search at 64 x 64.
template <class T>
__global__ void __launch_bounds__(128) refine_kernel(const PoolPeakParams<T> a, bool keys) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * 4 + int(threadIdx.x / 32);
  if (row >= a.rows) return;
  Best<T> best{};
  if (lane == 0) {  // the only lane that touches the outputs
    bool packed = false;
    if constexpr (sizeof(T) == 4) {
      packed = keys;
      if (keys) best = unpack_peak(reinterpret_cast<const unsigned long long*>(a.points)[row]);
    }
    if (!packed) {
      best.value = a.score[row];
      if (best.value == best.value) best.where = int64_t(a.points[2 * row + 1]) * a.width + int64_t(a.points[2 * row]);
    }
  }
  best.value = __shfl_sync(kAll, best.value, 0);
  best.where = __shfl_sync(kAll, best.where, 0);
  T dx = 0, dy = 0;
  if (a.refine && best.value == best.value) {
    const int x = int(best.where % a.width), y = int(best.where / a.width);
    T near[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      const int nx = x + k % 3 - 1, ny = y + k / 3 - 1;
      near[k] = -T(INFINITY);
      if (k == 4 || nx < 0 || nx >= a.width || ny < 0 || ny >= a.height) continue;
      const T* p = a.prob + row * a.leaves;
      const T* q = a.pool + (int64_t(ny) * a.width + nx) * a.leaves;
      T sum = 0;
      for (int64_t n = lane; n < a.leaves; n += 32) sum += p[n] * q[n];
      near[k] = warp_sum(sum);
    }
    peak_shift(near, x, y, a.width, a.height, a.refine, &dx, &dy);
  }
  if (lane == 0) write_peak(a, row, best, dx, dy);
}

}  // namespace

template <class T>
int pool_peak_cuda(const PoolPeakParams<T>& a, CUstream_st* stream) {
  using Tile = PeakTile<T>;
  const int64_t pixels = int64_t(a.height) * a.width;
  if (!a.rows || !a.leaves || !pixels) return cudaSuccess;
  const bool vectors = a.leaves % Pack<T>::kSize == 0 && aligned(a.prob) && aligned(a.pool);
  // The canvas is shared out to many blocks where a key of 64 bits can stand in a row's two floats.
  const int64_t tiles = (pixels + Tile::kPixels - 1) / Tile::kPixels;
  const bool keys = sizeof(T) == 4 && tiles > 1 && pixels <= 0xffffffffll &&
                    reinterpret_cast<uintptr_t>(a.points) % sizeof(unsigned long long) == 0;
  const int64_t splits = !keys ? 1 : tiles < 65535 ? tiles : 65535;
  if (keys) {
    const cudaError_t error = cudaMemsetAsync(a.points, 0, size_t(a.rows) * 2 * sizeof(T), stream);
    if (error != cudaSuccess) return error;
  }
  auto kernel = peak_kernel<T>;
  FF_LAUNCH(kernel, dim3(unsigned((a.rows + Tile::kRows - 1) / Tile::kRows), unsigned(splits)), dim3(Tile::kThreads), 0,
            stream, a, vectors, keys);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || (!keys && !a.refine)) return error;
  auto refine = refine_kernel<T>;
  FF_LAUNCH(refine, dim3(unsigned((a.rows + 3) / 4)), dim3(128), 0, stream, a, keys);
  return cudaGetLastError();
}

}  // namespace ff
