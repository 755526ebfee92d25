// What the CUDA kernels of the pool room share: float is built by pool_cuda.cu, double by pool_cuda_double.cu.
//
// Loss, gather and scatter are one scheme (pool_scheme.cuh), told apart by what stands and what passes. Eight vectors
// of N leaves stand in a block; others pass by in tiles of four; each of the 32 pairs of a tile belongs to one lane.
// For a pair that meets (a pixel in a row's window):
//   1. dot     its dot product: every thread over its own leaves, then over the block
//   2. finish  the pair's factor, such as y / yhat
//   3. add     factor * passing vector to the sum of the standing one: every thread for its own leaves
// RowsJob: rows stand, the pixels of their common rectangle pass. PixelsJob: pixels stand, the rows that reach them
// pass. Whatever passes is read from L2 once for eight that stand, and every sum has one owner and one order, so no
// atomics, no scratch memory, and the same bits in every run.
#pragma once
#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "pool/pool.h"
#include "pool/pool_math.h"

namespace ff {
namespace {

constexpr int kSlots = 8;            // vectors that stand in a block
constexpr int kPass = 4;             // vectors in a tile of passing ones: kSlots * kPass pairs, one a lane
constexpr int kStages = 3;           // tiles in shared memory: added, multiplied, on its way
constexpr int kVectors = 2;          // 16-byte vectors that a thread of a staged kernel owns
constexpr int kStreamThreads = 256;  // of a streamed kernel
constexpr int kRun = 8;              // tiles between two updates of the sums in a streamed kernel
constexpr unsigned kAll = 0xffffffffu;

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

// The leaves a thread owns in a chunk of kThreads * kWidth, next to its neighbour's: as one 16-byte vector, or one by
// one where the vectors would not be aligned. Leaves past the end read as 0.
template <class T, int kThreads, bool kVector>
struct Columns {
  static constexpr int kWidth = Pack<T>::kSize;
  static constexpr int kChunk = kThreads * kWidth;

  static __device__ __forceinline__ void load(const T* row, int64_t base, int64_t leaves, T* out) {
    if constexpr (kVector) {
      const int64_t n = base + int64_t(threadIdx.x) * kWidth;
      Pack<T> p{};
      if (n < leaves) p = *reinterpret_cast<const Pack<T>*>(row + n);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[j] = p.v[j];
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t n = base + j * kThreads + int(threadIdx.x);
        out[j] = n < leaves ? row[n] : T(0);
      }
    }
  }

  static __device__ __forceinline__ void store(T* row, int64_t base, int64_t leaves, const T* in) {
    if constexpr (kVector) {
      const int64_t n = base + int64_t(threadIdx.x) * kWidth;
      Pack<T> p;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) p.v[j] = in[j];
      if (n < leaves) *reinterpret_cast<Pack<T>*>(row + n) = p;
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t n = base + j * kThreads + int(threadIdx.x);
        if (n < leaves) row[n] = in[j];
      }
    }
  }
};

__device__ __forceinline__ Span joined(Span a, Span b) { return {min(a.begin, b.begin), max(a.end, b.end)}; }
__device__ __forceinline__ int64_t length(Span s) { return s.end - s.begin; }
__device__ __forceinline__ bool inside(int h, Span s) { return h >= s.begin && h < s.end; }

// Targets.

// One axis of a target, over a warp; all lanes receive it.
template <class T>
struct Axis {
  T top, total, entropy, square;  // shift of the exponents, sum v, sum g log g, sum g^2, where g = v / total
};

template <class T>
__device__ __forceinline__ Axis<T> measure_axis(Span span, T centre, T inverse_variance) {
  const T top = axis_log_max(span, centre, inverse_variance);
  T total = 0, entropy = 0, square = 0;
  for (int h = span.begin + int(threadIdx.x % 32); h < span.end; h += 32) {
    const T e = axis_log(h, centre, inverse_variance) - top;
    const T v = exp(e);
    total += v;
    entropy += v * e;
    square += v * v;
  }
  total = warp_sum(total);
  entropy = warp_sum(entropy) / total - log(total);
  square = warp_sum(square) / (total * total);
  return {top, total, entropy, square};
}

enum class Seen : int { nothing, window, undefined };

// A row's target and what the kernels must know of the row.
template <class T>
struct Target {
  Seen seen;
  int row;    // into prob and points
  Span x, y;  // empty unless seen is window
  T px, py, top_x, top_y;
  T scale;  // 1 / (sum of x sum of y)
  T weight;
  T entropy, square;  // sum y log y, sum y^2

  __device__ __forceinline__ T at(int hx, int hy, T inverse_variance) const {
    return scale * exp((axis_log(hx, px, inverse_variance) - top_x) + (axis_log(hy, py, inverse_variance) - top_y));
  }
  __device__ __forceinline__ bool holds(int hx, int hy) const { return inside(hx, x) && inside(hy, y); }
};

// A warp reads one row.
template <class T>
__device__ __forceinline__ Target<T> read_target(const PoolRows<T>& at, int row) {
  Target<T> t{};
  t.row = row;
  t.seen = Seen::nothing;
  t.weight = at.weight ? at.weight[row] : T(1);
  if (t.weight == T(0)) return t;
  t.px = at.points[2 * int64_t(row)];
  t.py = at.points[2 * int64_t(row) + 1];
  if (!(t.px - t.px == T(0) && t.py - t.py == T(0) && t.weight - t.weight == T(0))) {
    t.seen = Seen::undefined;
    return t;
  }
  const Span x = window_span(t.px, at.radius, at.width), y = window_span(t.py, at.radius, at.height);
  if (x.begin >= x.end || y.begin >= y.end) return t;
  const Axis<T> ax = measure_axis(x, t.px, at.inverse_variance), ay = measure_axis(y, t.py, at.inverse_variance);
  t.seen = Seen::window;
  t.x = x;
  t.y = y;
  t.top_x = ax.top;
  t.top_y = ay.top;
  t.scale = T(1) / ax.total * (T(1) / ay.total);
  t.entropy = ax.entropy + ay.entropy;
  t.square = ax.square * ay.square;
  return t;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace ff
