// CUDA kernels of the pool room: float is built by pool_cuda.cu, double by pool_cuda_double.cu.
//
// Loss, gather and scatter are one scheme, told apart by what stands and what passes. Eight vectors of N leaves stand
// in a block; others pass by in tiles of four; each of the 32 pairs of a tile belongs to one lane. For a pair that
// meets (a pixel in a row's window):
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

// The scheme.

// Adds over lanes while sharing out the values: 2 kHalf values a lane become kHalf, of lanes that differ in `bit`.
template <int kHalf, class T>
__device__ __forceinline__ void fold(T* v, int bit) {
  const bool upper = threadIdx.x & bit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const T send = upper ? v[i] : v[i + kHalf], keep = upper ? v[i + kHalf] : v[i];
    v[i] = keep + shuffle_xor(send, bit);
  }
}

// Of the dot products of a warp's leaves, lane 8 t + s receives that of passing vector t and standing vector s:
// 31 shuffles for 32 sums. The first three steps run as soon as a passing vector is done.
template <class T>
__device__ __forceinline__ T fold_slots(T (&sums)[kSlots]) {
  fold<4>(sums, 4);
  fold<2>(sums, 2);
  fold<1>(sums, 1);
  return sums[0];
}
template <class T>
__device__ __forceinline__ T fold_pass(T (&sums)[kPass]) {
  fold<2>(sums, 16);
  fold<1>(sums, 8);
  return sums[0];
}

// sums[s] += held[s] . q for the standing vectors in `mask`, two at a time so that four chains of FMAs are in flight.
// A neighbour outside the mask may be computed as well: nobody reads its sum.
template <int kOwned, class T>
__device__ __forceinline__ void multiply(unsigned mask, const T (&held)[kSlots][kOwned], const T (&q)[kOwned],
                                         T (&sums)[kSlots]) {
#pragma unroll
  for (int s = 0; s < kSlots; s += 2) {
    if (!(mask >> s & 3u)) continue;
    T a = 0, b = 0, c = 0, d = 0;
#pragma unroll
    for (int j = 0; j < kOwned; j += 2) {
      a += held[s][j] * q[j];
      b += held[s + 1][j] * q[j];
      c += held[s][j + 1] * q[j + 1];
      d += held[s + 1][j + 1] * q[j + 1];
    }
    sums[s] = a + c;
    sums[s + 1] = b + d;
  }
}

// sum[s] += factor[s] q for the standing vectors in `mask`, and for no other: q may hold a NaN that is not theirs.
template <int kOwned, class T>
__device__ __forceinline__ void add(unsigned mask, const Pack<T>* factor, const T (&q)[kOwned],
                                    T (&sum)[kSlots][kOwned]) {
  constexpr int kWidth = Pack<T>::kSize;
#pragma unroll
  for (int s = 0; s < kSlots; s += kWidth) {
    const Pack<T> f = factor[s / kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (!(mask >> (s + i) & 1u)) continue;
#pragma unroll
      for (int j = 0; j < kOwned; ++j) sum[s + i][j] += f.v[i] * q[j];
    }
  }
}

template <class T, int kThreads>
struct Staged {
  static constexpr int kOwned = kVectors * Pack<T>::kSize;
  static constexpr int kLeaves = kThreads * kOwned;  // the most leaves it can take
  static constexpr int kSharedBytes = kStages * kPass * kVectors * kThreads * 16;
  static constexpr int kWarps = kThreads / 32;
  using Own = Columns<T, kThreads, true>;

  struct Exchange {
    T partial[2][kWarps][32];  // of each warp's leaves
    Pack<T> factor[2][32 / Pack<T>::kSize];
    unsigned live[2];  // pairs to add
  };

  static __device__ __forceinline__ void load(const T* row, int64_t leaves, T (&v)[kOwned]) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) Own::load(row, u * Own::kChunk, leaves, v + u * Own::kWidth);
  }
  static __device__ __forceinline__ void store(T* row, int64_t leaves, const T (&v)[kOwned]) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) Own::store(row, u * Own::kChunk, leaves, v + u * Own::kWidth);
  }

  // Vectors that this thread does not own stay 0 in every tile.
  static __device__ __forceinline__ void clear(Pack<T>* stage, int64_t leaves) {
    for (int i = 0; i < kStages * kPass * kVectors; ++i)
      if (int64_t(i % kVectors * kThreads + int(threadIdx.x)) * Own::kWidth >= leaves)
        stage[i * kThreads + threadIdx.x] = Pack<T>{};
  }

  // All leaves of all standing vectors are in registers: `held` and, to add to, `sum`. A thread copies, reads and
  // overwrites only its own part of a tile, so the one barrier a tile is for the dot products; what follows it, the
  // factors of tile k by one warp, runs beside the additions of tile k - 1 by all.
  template <bool kDot, bool kSum, class Job>
  static __device__ __forceinline__ void run(Job& job, const T* items, int64_t leaves, Pack<T>* stage,
                                             Exchange& exchange, const T (&held)[kSlots][kOwned],
                                             T (&sum)[kSlots][kOwned]) {
    using Cursor = typename Job::Cursor;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t tiles = job.tiles();
    stage += threadIdx.x;

    auto fetch = [&](int slot, const Cursor& c) {
      const unsigned mask = __ballot_sync(kAll, job.meets(c));
      const int64_t offset = job.offset(c);
#pragma unroll
      for (int t = 0; t < kPass; ++t) {
        const int64_t from = __shfl_sync(kAll, offset, t * kSlots);
        if (!(mask >> t * kSlots & 255u)) continue;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
          const int64_t n = int64_t(u * kThreads + int(threadIdx.x)) * Own::kWidth;
          if (n < leaves) cp_async16(stage + ((slot * kPass + t) * kVectors + u) * kThreads, items + from + n);
        }
      }
      cp_async_commit();
      return mask;
    };
    auto read = [&](int slot, int t, T(&q)[kOwned]) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const Pack<T> p = stage[((slot * kPass + t) * kVectors + u) * kThreads];
#pragma unroll
        for (int j = 0; j < Own::kWidth; ++j) q[u * Own::kWidth + j] = p.v[j];
      }
    };

    Cursor at = job.first(lane / kSlots);
    int slot = 0;
    unsigned mask = fetch(slot, at);
    for (int64_t k = 0; k <= tiles; ++k) {
      const int parity = int(k & 1), next_slot = slot == kStages - 1 ? 0 : slot + 1;
      Cursor next = at;
      job.advance(next);
      const unsigned next_mask = fetch(next_slot, next);  // past the end nothing meets

      // 1. dot
      if (kDot && k < tiles) {
        cp_async_wait<1>();
        T wide[kPass];
#pragma unroll
        for (int t = 0; t < kPass; ++t) {
          T sums[kSlots] = {};
          const unsigned here = mask >> t * kSlots & 255u;
          if (here) {
            T q[kOwned];
            read(slot, t, q);
            multiply(here, held, q, sums);
          }
          wide[t] = fold_slots(sums);
        }
        exchange.partial[parity][warp][lane] = fold_pass(wide);
      }
      __syncthreads();

      // 2. finish: the warps take turns
      if (k < tiles && warp == int(k % kWarps)) {
        T dot = 0;
        if constexpr (kDot)
          for (int w = 0; w < kWarps; ++w) dot += exchange.partial[parity][w][lane];
        bool live = job.meets(at);
        const T factor = job.finish(at, dot, live);
        if constexpr (kSum) {
          exchange.factor[parity][lane / Pack<T>::kSize].v[lane % Pack<T>::kSize] = factor;
          const unsigned all = __ballot_sync(kAll, live);
          if (lane == 0) exchange.live[parity] = all;
        }
      }

      // 3. add the tile before
      if (kSum && k > 0) {
        if (!kDot) cp_async_wait<2>();
        const int old = slot == 0 ? kStages - 1 : slot - 1;
        const unsigned live = exchange.live[parity ^ 1];
        job.touch(live);
#pragma unroll
        for (int t = 0; t < kPass; ++t) {
          const unsigned here = live >> t * kSlots & 255u;
          if (!here) continue;
          T q[kOwned];
          read(old, t, q);
          add(here, &exchange.factor[parity ^ 1][t * kSlots / Pack<T>::kSize], q, sum);
        }
      }
      at = next;
      mask = next_mask;
      slot = next_slot;
    }
  }
};

// Any number of leaves, any alignment: a chunk of leaves at a time, all from L2. The sums live in global memory and
// are updated after every kRun tiles; `emit(base, sum)` adds those of a chunk.
template <class T, bool kVector>
struct Streamed {
  static constexpr int kThreads = kStreamThreads;
  using Own = Columns<T, kThreads, kVector>;
  static constexpr int kOwned = Own::kWidth;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps == kRun, "a warp finishes a tile of the run");

  struct Exchange {
    T partial[kWarps][kRun][32];
    Pack<T> factor[kRun][32 / Pack<T>::kSize];
    unsigned live[kRun];
  };

  template <bool kDot, bool kSum, class Job, class Standing, class Emit>
  static __device__ __forceinline__ void run(Job& job, const T* items, int64_t leaves, Exchange& exchange,
                                             Standing standing, Emit emit) {
    using Cursor = typename Job::Cursor;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t tiles = job.tiles();
    Cursor start = job.first(lane / kSlots);

    // The four passing vectors of a tile; what no standing one meets is not read.
    auto read = [&](unsigned mask, int64_t offset, int64_t base, T(&q)[kPass][kOwned]) {
#pragma unroll
      for (int t = 0; t < kPass; ++t) {
        const int64_t from = __shfl_sync(kAll, offset, t * kSlots);
        if (mask >> t * kSlots & 255u) Own::load(items + from, base, leaves, q[t]);
      }
    };

    for (int64_t k = 0; k < tiles; k += kRun) {
      // 1. dot
      if constexpr (kDot) {
        for (int64_t base = 0; base < leaves; base += Own::kChunk) {
          T held[kSlots][kOwned] = {};
#pragma unroll
          for (int s = 0; s < kSlots; ++s)
            if (const T* row = standing(s)) Own::load(row, base, leaves, held[s]);
          Cursor c = start;
          for (int i = 0; i < kRun; ++i, job.advance(c)) {
            const unsigned mask = __ballot_sync(kAll, job.meets(c));
            T q[kPass][kOwned], wide[kPass];
            read(mask, job.offset(c), base, q);
#pragma unroll
            for (int t = 0; t < kPass; ++t) {
              T sums[kSlots] = {};
              const unsigned here = mask >> t * kSlots & 255u;
              if (here) multiply(here, held, q[t], sums);
              wide[t] = fold_slots(sums);
            }
            const T partial = fold_pass(wide);
            T& total = exchange.partial[warp][i][lane];
            total = base ? total + partial : partial;
          }
        }
      }
      __syncthreads();

      // 2. finish: a tile a warp
      Cursor mine = start;
      for (int i = 0; i < warp; ++i) job.advance(mine);
      T dot = 0;
      if constexpr (kDot)
        for (int w = 0; w < kWarps; ++w) dot += exchange.partial[w][warp][lane];
      bool live = job.meets(mine);
      const T factor = job.finish(mine, dot, live);
      exchange.factor[warp][lane / Pack<T>::kSize].v[lane % Pack<T>::kSize] = factor;
      const unsigned all = __ballot_sync(kAll, live);
      if (lane == 0) exchange.live[warp] = all;
      __syncthreads();

      // 3. add
      if constexpr (kSum) {
        for (int i = 0; i < kRun; ++i) job.touch(exchange.live[i]);
        for (int64_t base = 0; base < leaves; base += Own::kChunk) {
          T sum[kSlots][kOwned] = {};
          Cursor c = start;
          for (int i = 0; i < kRun; ++i, job.advance(c)) {
            const unsigned mask = exchange.live[i];
            T q[kPass][kOwned];
            read(mask, job.offset(c), base, q);
#pragma unroll
            for (int t = 0; t < kPass; ++t) {
              const unsigned here = mask >> t * kSlots & 255u;
              if (here) add(here, &exchange.factor[i][t * kSlots / Pack<T>::kSize], q[t], sum);
            }
          }
          emit(base, sum);
        }
      }
      for (int i = 0; i < kRun; ++i) job.advance(start);
      __syncthreads();
    }
  }
};

// Rows stand, pixels pass: loss and gather.

enum class RowsMode { loss, loss_and_gradient, gather };

template <class T>
struct RowsParams {
  PoolRows<T> at;
  const T* prob;  // [R, N]  null for gather
  const T* pool;  // [H, W, N]
  T eps;
  T* value;   // [R]  loss, or sum y^2
  T* out;     // [R, N]  gradient, or t
  int group;  // rows of a block, at most kSlots
};

// The pixels of the common rectangle of some rows. Lane 8 t + s works for row s.
template <class T, RowsMode kMode>
struct RowsJob {
  struct Cursor {
    int x, y;
  };
  Span xs, ys;
  int width;
  int64_t leaves;
  T inverse_variance, eps;
  const Target<T>* target;  // of this lane's row
  bool member;
  T cross = 0;  // sum y log max(yhat, eps) of this lane's pairs

  __device__ __forceinline__ int64_t tiles() const { return (length(xs) * length(ys) + kPass - 1) / kPass; }
  __device__ __forceinline__ Cursor wrapped(Cursor c) const {
    while (c.x >= xs.end) {
      c.x -= xs.end - xs.begin;
      ++c.y;
    }
    return c;
  }
  __device__ __forceinline__ Cursor first(int t) const { return wrapped({xs.begin + t, ys.begin}); }
  __device__ __forceinline__ void advance(Cursor& c) const { c = wrapped({c.x + kPass, c.y}); }
  __device__ __forceinline__ bool meets(const Cursor& c) const { return member && target->holds(c.x, c.y); }
  __device__ __forceinline__ int64_t offset(const Cursor& c) const { return (int64_t(c.y) * width + c.x) * leaves; }
  __device__ __forceinline__ void touch(unsigned) const {}
  __device__ __forceinline__ T finish(const Cursor& c, T yhat, bool live) {
    if (!live) return T(0);
    const T y = target->at(c.x, c.y, inverse_variance);
    if constexpr (kMode == RowsMode::gather) return y;
    cross += y * log(floored(yhat, eps));
    return kl_ratio(-target->weight * y, yhat, eps);
  }
};

// Calls f(rows' bits, xs, ys) for runs of the block's rows whose common rectangle is at most twice a window; the whole
// block, the same for every thread.
template <class T, class F>
__device__ __forceinline__ void for_each_run(const PoolRows<T>& at, const Target<T>* targets, int count, F f) {
  const int64_t side = 2 * int64_t(at.radius) + 1;
  const int64_t limit = 2 * (side < at.width ? side : at.width) * (side < at.height ? side : at.height);
  for (int first = 0; first < count;) {
    unsigned members = 0;
    Span xs{}, ys{};
    int i = first;
    for (; i < count; ++i) {
      const Target<T>& t = targets[i];
      if (t.seen != Seen::window) continue;
      const Span wide = members ? joined(xs, t.x) : t.x, tall = members ? joined(ys, t.y) : t.y;
      if (members && length(wide) * length(tall) > limit) break;
      xs = wide;
      ys = tall;
      members |= 1u << i;
    }
    if (members) f(members, xs, ys);
    first = i;
  }
}

// Reads the block's rows into `targets`, a warp a row, and writes the answers of rows without a window.
template <int kThreads, class T>
__device__ __forceinline__ int read_rows(const RowsParams<T>& a, Target<T>* targets) {
  const int64_t begin = int64_t(blockIdx.x) * a.group;
  const int count = int(min(int64_t(a.group), a.at.rows - begin));
  for (int i = threadIdx.x / 32; i < count; i += kThreads / 32) {
    const Target<T> t = read_target(a.at, a.at.order[begin + i]);
    if (threadIdx.x % 32 == 0) targets[i] = t;
  }
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    if (targets[i].seen == Seen::window) continue;
    const T value = targets[i].seen == Seen::nothing ? T(0) : T(NAN);
    if (threadIdx.x == 0) a.value[targets[i].row] = value;
    if (!a.out) continue;
    T* out = a.out + targets[i].row * a.at.leaves;
    for (int64_t n = threadIdx.x; n < a.at.leaves; n += kThreads) out[n] = value;
  }
  return count;
}

template <RowsMode kMode, class T>
__device__ __forceinline__ RowsJob<T, kMode> rows_job(const RowsParams<T>& a, const Target<T>* targets,
                                                      unsigned members, Span xs, Span ys) {
  const int s = threadIdx.x % kSlots;
  RowsJob<T, kMode> job{};
  job.xs = xs;
  job.ys = ys;
  job.width = a.at.width;
  job.leaves = a.at.leaves;
  job.inverse_variance = a.at.inverse_variance;
  job.eps = a.eps;
  job.member = members >> s & 1u;
  job.target = targets + s;
  return job;
}

// The rows' values, from the lanes' sums in the order of warps and lanes.
template <int kThreads, RowsMode kMode, class T>
__device__ __forceinline__ void write_values(const RowsParams<T>& a, const Target<T>* targets,
                                             const RowsJob<T, kMode>& job, unsigned members, T* cross) {
  if constexpr (kMode != RowsMode::gather) {
    cross[threadIdx.x] = job.cross;
    __syncthreads();
  }
  const int s = threadIdx.x;
  if (s < kSlots && (members >> s & 1u)) {
    const Target<T>& t = targets[s];
    T value = t.square;
    if constexpr (kMode != RowsMode::gather) {
      T total = 0;
      for (int i = s; i < kThreads; i += kSlots) total += cross[i];
      value = t.weight * (t.entropy - total);
    }
    a.value[t.row] = value;
  }
  __syncthreads();
}

// Loss, or loss and gradient, or gather, for at most kLeaves leaves (2048 floats with 256 threads).
// A thread owns 8 leaves of up to 8 rows that follow one another in the order: p and the gradient, 128 registers.
// A block shares 3 tiles of 4 pixels, 96 bytes a leaf (96 KB for N = 2048), and the pairs' factors.
// Bytes per pixel of the common rectangle: N q from L2, once for the block; per row 2 N. Per thread and pixel, with 8
// rows of 8 floats: 64 FMAs to multiply, 31 lane exchanges of 4 instructions for 4 pixels, 64 FMAs to add; shared
// memory 8 + 8 wavefronts a warp for q, 2 for factors, 8 shuffles. So about 190 instructions issue where 128 are FMAs.
// R = 4352, N = 2048, sigma 2 (13 x 13), rectangles 1.3 windows: 3.0 G FMAs = 0.09 ms, all issue slots 0.17 ms, L2
// 1.0 GB = 0.18 ms at 5.5 TB/s (computed, 132 SMs at 1.75 GHz; not measured). Why rows stand: 8 of them use each q
// 16 times; more would not fit in the registers, and as a tiled product the same sums would need 1.5 wavefronts a
// FMA-cycle.
template <class T, int kThreads, RowsMode kMode>
__global__ void __launch_bounds__(kThreads) rows_staged_kernel(const RowsParams<T> a) {
  using Scheme = Staged<T, kThreads>;
  using Exchange = typename Scheme::Exchange;
  constexpr bool kDot = kMode != RowsMode::gather, kSum = kMode != RowsMode::loss;
  FF_DYN_SHARED(Pack<T>, stage);
  FF_SHARED(Exchange, exchange, 1);
  FF_SHARED(Target<T>, targets, kSlots);
  FF_SHARED(T, cross, kThreads);
  const int64_t leaves = a.at.leaves;
  Scheme::clear(stage, leaves);
  const int count = read_rows<kThreads>(a, targets);
  for_each_run(a.at, targets, count, [&](unsigned members, Span xs, Span ys) {
    auto job = rows_job<kMode>(a, targets, members, xs, ys);
    T held[kSlots][Scheme::kOwned] = {}, sum[kSlots][Scheme::kOwned] = {};
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (kDot && (members >> s & 1u)) Scheme::load(a.prob + targets[s].row * leaves, leaves, held[s]);
    Scheme::template run<kDot, kSum>(job, a.pool, leaves, stage, exchange[0], held, sum);
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (kSum && (members >> s & 1u)) Scheme::store(a.out + targets[s].row * leaves, leaves, sum[s]);
    write_values<kThreads>(a, targets, job, members, cross);
  });
}

// The same for any N and any alignment (kVector: N and the pointers allow 16-byte vectors).
// A thread owns 16 bytes of leaves of a chunk of 4 KB; a block shares the dot products of 32 pixels and 8 rows.
// Bytes per pixel and leaf, 8 rows, 4-byte leaves: q twice (8), p and the gradient again every 32 pixels (3). Why: the
// sums of huge N fit nowhere on the chip, so they pass through L2 as seldom as 32 pixels allow.
template <class T, bool kVector, RowsMode kMode>
__global__ void __launch_bounds__(kStreamThreads, 2) rows_streamed_kernel(const RowsParams<T> a) {
  using Scheme = Streamed<T, kVector>;
  using Exchange = typename Scheme::Exchange;
  using Own = typename Scheme::Own;
  constexpr bool kDot = kMode != RowsMode::gather, kSum = kMode != RowsMode::loss;
  FF_SHARED(Exchange, exchange, 1);
  FF_SHARED(Target<T>, targets, kSlots);
  FF_SHARED(T, cross, kStreamThreads);
  const int64_t leaves = a.at.leaves;
  const int count = read_rows<kStreamThreads>(a, targets);
  for_each_run(a.at, targets, count, [&](unsigned members, Span xs, Span ys) {
    auto job = rows_job<kMode>(a, targets, members, xs, ys);
    unsigned begun = 0;  // chunks are many, runs of tiles one after another: the first run starts the sums
    Scheme::template run<kDot, kSum>(
        job, a.pool, leaves, exchange[0],
        [&](int s) { return members >> s & 1u ? a.prob + targets[s].row * leaves : nullptr; },
        [&](int64_t base, T(&sum)[kSlots][Scheme::kOwned]) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (!(members >> s & 1u)) continue;
            T* out = a.out + targets[s].row * leaves;
            if (begun) {
              T before[Scheme::kOwned];
              Own::load(out, base, leaves, before);
#pragma unroll
              for (int j = 0; j < Scheme::kOwned; ++j) sum[s][j] += before[j];
            }
            Own::store(out, base, leaves, sum[s]);
          }
          if (base + Own::kChunk >= leaves) begun = 1;
        });
    write_values<kStreamThreads>(a, targets, job, members, cross);
  });
}

// Pixels stand, rows pass: scatter.

constexpr int kBatch = 128;                     // rows whose targets are in shared memory
constexpr int kScanRows = 4;                    // rows a thread looks at in one step of the search
constexpr int kTileWidth = 4, kTileHeight = 2;  // pixels of a block
static_assert(kTileWidth * kTileHeight == kSlots, "a pixel a slot");

// The rows of a batch. Lane 8 t + s works for pixel s.
template <class T, bool kDot>
struct PixelsJob {
  using Cursor = int;
  const Target<T>* batch;
  int count;
  int x, y;  // of this lane's pixel
  int64_t leaves;
  T inverse_variance, eps;
  unsigned touched = 0;  // pixels that a row reached

  __device__ __forceinline__ int64_t tiles() const { return (count + kPass - 1) / kPass; }
  __device__ __forceinline__ Cursor first(int t) const { return t; }
  __device__ __forceinline__ void advance(Cursor& c) const { c += kPass; }
  __device__ __forceinline__ bool meets(Cursor c) const { return c < count && batch[c].holds(x, y); }
  __device__ __forceinline__ int64_t offset(Cursor c) const { return c < count ? batch[c].row * leaves : 0; }
  __device__ __forceinline__ void touch(unsigned live) {
    live |= live >> 16;
    touched |= (live | live >> 8) & 255u;
  }
  __device__ __forceinline__ T finish(Cursor c, T yhat, bool& live) {
    if (!live) return T(0);
    const T target = batch[c].weight * batch[c].at(x, y, inverse_variance);
    if constexpr (!kDot) return target;
    live = yhat >= eps && yhat - yhat == T(0);
    return live ? target / yhat : T(0);
  }
};

// Finds, in order, the rows whose windows reach a block's pixels: `flush(list, count)` gets at least kBatch of them at
// a time, or the last ones. A warp looks at kScanRows times 32 neighbours of the order; ballots keep the order.
template <int kThreads, class T, class Flush>
__device__ __forceinline__ void search_rows(const PoolRows<T>& at, Span xs, Span ys, int* list, int* counts,
                                            Flush flush) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int found = 0;
  for (int64_t base = 0; base < at.rows; base += kThreads * kScanRows) {
    int row[kScanRows];
    unsigned reach[kScanRows];
    int mine = 0;
#pragma unroll
    for (int j = 0; j < kScanRows; ++j) {
      const int64_t i = base + (warp * kScanRows + j) * 32 + lane;
      row[j] = i < at.rows ? at.order[i] : -1;
    }
#pragma unroll
    for (int j = 0; j < kScanRows; ++j) {
      bool hit = false;
      if (row[j] >= 0) {
        const Span x = window_span(at.points[2 * int64_t(row[j])], at.radius, at.width);
        const Span y = window_span(at.points[2 * int64_t(row[j]) + 1], at.radius, at.height);
        const T weight = at.weight ? at.weight[row[j]] : T(1);
        hit = x.begin < xs.end && x.end > xs.begin && y.begin < ys.end && y.end > ys.begin && weight != T(0) &&
              weight - weight == T(0);
      }
      reach[j] = __ballot_sync(kAll, hit);
      mine += __popc(reach[j]);
    }
    if (lane == 0) counts[warp] = mine;
    __syncthreads();
    int place = found;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) place += counts[w];
      found += counts[w];
    }
#pragma unroll
    for (int j = 0; j < kScanRows; ++j) {
      if (reach[j] >> lane & 1u) list[place + __popc(reach[j] & ((1u << lane) - 1u))] = row[j];
      place += __popc(reach[j]);
    }
    __syncthreads();
    if (found >= kBatch || (found && base + kThreads * kScanRows >= at.rows)) {
      flush(list, found);  // ends with a barrier
      found = 0;
    }
  }
}

// Where a block's pixels are, and the batches of rows that reach them: `f(job)` for each batch.
template <bool kDot, int kThreads, class T, class F>
__device__ __forceinline__ void for_each_batch(const PoolScatterParams<T>& a, int x0, int y0, int* list, int* counts,
                                               Target<T>* batch, F f) {
  const Span xs{x0, min(x0 + kTileWidth, a.at.width)}, ys{y0, min(y0 + kTileHeight, a.at.height)};
  search_rows<kThreads>(a.at, xs, ys, list, counts, [&](const int* rows, int found) {
    for (int begin = 0; begin < found; begin += kBatch) {
      const int count = min(kBatch, found - begin);
      for (int i = threadIdx.x / 32; i < count; i += kThreads / 32) {
        const Target<T> t = read_target(a.at, rows[begin + i]);
        if (threadIdx.x % 32 == 0) batch[i] = t;
      }
      __syncthreads();
      const int s = threadIdx.x % kSlots;
      PixelsJob<T, kDot> job{};
      job.batch = batch;
      job.count = count;
      job.x = x0 + s % kTileWidth;
      job.y = y0 + s / kTileWidth;
      job.leaves = a.at.leaves;
      job.inverse_variance = a.at.inverse_variance;
      job.eps = a.eps;
      f(job);
      __syncthreads();
    }
  });
}

template <class T>
__device__ __forceinline__ void block_pixels(const PoolRows<T>& at, int* x0, int* y0) {
  const unsigned across = unsigned(at.width + kTileWidth - 1) / kTileWidth;
  *x0 = int(blockIdx.x % across) * kTileWidth;
  *y0 = int(blockIdx.x / across) * kTileHeight;
}

// Scatter for at most kLeaves leaves.
// A thread owns 8 leaves of a block's 4 x 2 pixels: q and the sums, 128 registers. A block shares 3 tiles of 4 rows
// (96 bytes a leaf), the list of rows that reach it and 128 of their targets.
// Bytes per pixel: N p / 8 from L2 for every row that reaches the block (a 13 x 13 window reaches 1.3 times its share),
// 16 R / 8 to search all rows, N q and N out once. The same counts as rows_staged_kernel: R = 4352, N = 2048, sigma 2
// on 64 x 64: FMAs 0.09 ms, issue 0.17 ms, L2 1.0 GB = 0.18 ms (computed). Why pixels stand: each is written once, by
// one thread, with neither lists in memory nor atomics, and a row's p serves 8 pixels 16 times.
template <class T, int kThreads, bool kDot>
__global__ void __launch_bounds__(kThreads) pixels_staged_kernel(const PoolScatterParams<T> a) {
  using Scheme = Staged<T, kThreads>;
  using Exchange = typename Scheme::Exchange;
  FF_DYN_SHARED(Pack<T>, stage);
  FF_SHARED(Exchange, exchange, 1);
  FF_SHARED(Target<T>, batch, kBatch);
  FF_SHARED(int, list, kBatch + kThreads * kScanRows);
  FF_SHARED(int, counts, kThreads / 32);
  const int64_t leaves = a.at.leaves;
  int x0, y0;
  block_pixels(a.at, &x0, &y0);
  auto pixel = [&](int s) -> int64_t {  // offset of its leaves, -1 outside the canvas
    const int x = x0 + s % kTileWidth, y = y0 + s / kTileWidth;
    return x < a.at.width && y < a.at.height ? (int64_t(y) * a.at.width + x) * leaves : -1;
  };
  T held[kSlots][Scheme::kOwned] = {}, sum[kSlots][Scheme::kOwned] = {};
  unsigned touched = 0;
  bool loaded = false;
  for_each_batch<kDot, kThreads>(a, x0, y0, list, counts, batch, [&](PixelsJob<T, kDot>& job) {
    if (!loaded) {
      loaded = true;
      Scheme::clear(stage, leaves);
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
        if (kDot && pixel(s) >= 0) Scheme::load(a.pool + pixel(s), leaves, held[s]);
    }
    Scheme::template run<kDot, true>(job, a.prob, leaves, stage, exchange[0], held, sum);
    touched |= job.touched;
  });
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const bool reached = touched >> s & 1u;
    if (pixel(s) < 0 || (!reached && a.accumulate)) continue;
    T result[Scheme::kOwned] = {};
    if (reached) {
      if (a.accumulate) Scheme::load(a.out + pixel(s), leaves, result);
#pragma unroll
      for (int j = 0; j < Scheme::kOwned; ++j)
        result[j] += a.scale * sum[s][j] * (kDot && a.times_pool ? held[s][j] : T(1));
    }
    Scheme::store(a.out + pixel(s), leaves, result);
  }
}

// The same for any N and any alignment. A thread owns 16 bytes of leaves of a chunk of 4 KB; a block shares the dot
// products of 32 rows and its 4 x 2 pixels. Bytes per row that reaches the block and leaf, 4-byte leaves: p twice (8),
// q and the sums of 8 pixels again every 32 rows (3).
template <class T, bool kVector, bool kDot>
__global__ void __launch_bounds__(kStreamThreads, 1) pixels_streamed_kernel(const PoolScatterParams<T> a) {
  using Scheme = Streamed<T, kVector>;
  using Exchange = typename Scheme::Exchange;
  using Own = typename Scheme::Own;
  FF_SHARED(Exchange, exchange, 1);
  FF_SHARED(Target<T>, batch, kBatch);
  FF_SHARED(int, list, kBatch + kStreamThreads * kScanRows);
  FF_SHARED(int, counts, kStreamThreads / 32);
  const int64_t leaves = a.at.leaves;
  int x0, y0;
  block_pixels(a.at, &x0, &y0);
  auto pixel = [&](int s) -> int64_t {
    const int x = x0 + s % kTileWidth, y = y0 + s / kTileWidth;
    return x < a.at.width && y < a.at.height ? (int64_t(y) * a.at.width + x) * leaves : -1;
  };
  unsigned written = a.accumulate ? 255u : 0u;  // pixels whose sums stand in memory
  for_each_batch<kDot, kStreamThreads>(a, x0, y0, list, counts, batch, [&](PixelsJob<T, kDot>& job) {
    Scheme::template run<kDot, true>(
        job, a.prob, leaves, exchange[0],
        [&](int s) -> const T* { return kDot && pixel(s) >= 0 ? a.pool + pixel(s) : nullptr; },
        [&](int64_t base, T(&sum)[kSlots][Scheme::kOwned]) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (!(job.touched >> s & 1u)) continue;
            T result[Scheme::kOwned] = {}, q[Scheme::kOwned];
            if (written >> s & 1u) Own::load(a.out + pixel(s), base, leaves, result);
            const bool times = kDot && a.times_pool;
            if (times) Own::load(a.pool + pixel(s), base, leaves, q);
#pragma unroll
            for (int j = 0; j < Scheme::kOwned; ++j) result[j] += a.scale * sum[s][j] * (times ? q[j] : T(1));
            Own::store(a.out + pixel(s), base, leaves, result);
          }
          if (base + Own::kChunk >= leaves) {
            written |= job.touched;
            job.touched = 0;
          }
        });
  });
  for (int s = 0; s < kSlots; ++s)
    if (!(written >> s & 1u) && pixel(s) >= 0)
      for (int64_t n = threadIdx.x; n < leaves; n += kStreamThreads) a.out[pixel(s) + n] = T(0);
}

// Peak.

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

// Keys.

// A thread owns a row: 8 or 16 bytes read, 4 written.
template <class T>
__global__ void __launch_bounds__(256)
    position_keys_kernel(const PoolRows<T> at, int shift, int32_t* __restrict__ keys) {
  const int64_t r = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (r < at.rows) keys[r] = int32_t(position_key(at.points[2 * r], at.points[2 * r + 1], at.width, at.height, shift));
}

// Launches.

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls go(kernel, threads, dynamic shared bytes) with the kernel for this many leaves: `staged(threads)` where the
// leaves fit in the registers of a block, `streamed(vectors)` otherwise. Double is for checks: streamed alone.
template <class T, class Staged_, class Streamed_, class Go>
int choose_kernel(int64_t leaves, bool vectors, Staged_ staged, Streamed_ streamed, Go go) {
  if constexpr (sizeof(T) == 4) {
    const auto with = [&](auto threads) {
      return go(staged(threads), threads.value, Staged<T, threads.value>::kSharedBytes);
    };
    if (vectors && leaves <= Staged<T, 64>::kLeaves) return with(std::integral_constant<int, 64>{});
    if (vectors && leaves <= Staged<T, 128>::kLeaves) return with(std::integral_constant<int, 128>{});
    if (vectors && leaves <= Staged<T, 256>::kLeaves) return with(std::integral_constant<int, 256>{});
  }
  return vectors ? go(streamed(std::true_type{}), kStreamThreads, 0)
                 : go(streamed(std::false_type{}), kStreamThreads, 0);
}

template <class Kernel, class Params>
int launch(Kernel* kernel, int64_t blocks, int threads, int shared_bytes, const Params& params, CUstream_st* stream) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  FF_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream, params);
  return cudaGetLastError();
}

constexpr int64_t kWantedBlocks = 264;  // before rows are grouped: two for each multiprocessor of an H200

template <RowsMode kMode, class T>
int launch_rows(RowsParams<T> params, CUstream_st* stream) {
  const int64_t rows = params.at.rows, leaves = params.at.leaves;
  if (!rows || !leaves) return cudaSuccess;
  const int64_t fair = rows / kWantedBlocks;
  params.group = int(fair < 1 ? 1 : fair > kSlots ? kSlots : fair);
  const bool vectors =
      leaves % Pack<T>::kSize == 0 && aligned(params.prob) && aligned(params.pool) && aligned(params.out);
  return choose_kernel<T>(
      leaves, vectors, [](auto threads) { return rows_staged_kernel<T, decltype(threads)::value, kMode>; },
      [](auto vector) { return rows_streamed_kernel<T, decltype(vector)::value, kMode>; },
      [&](auto kernel, int threads, int shared) {
        return launch(kernel, (rows + params.group - 1) / params.group, threads, shared, params, stream);
      });
}

template <bool kDot, class T>
int launch_pixels(const PoolScatterParams<T>& params, CUstream_st* stream) {
  const PoolRows<T>& at = params.at;
  const bool vectors =
      at.leaves % Pack<T>::kSize == 0 && aligned(params.prob) && aligned(params.pool) && aligned(params.out);
  const int64_t blocks =
      int64_t((at.width + kTileWidth - 1) / kTileWidth) * ((at.height + kTileHeight - 1) / kTileHeight);
  return choose_kernel<T>(
      at.leaves, vectors, [](auto threads) { return pixels_staged_kernel<T, decltype(threads)::value, kDot>; },
      [](auto vector) { return pixels_streamed_kernel<T, decltype(vector)::value, kDot>; },
      [&](auto kernel, int threads, int shared) { return launch(kernel, blocks, threads, shared, params, stream); });
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

template <class T>
int pool_kl_loss_cuda(const PoolKlLossParams<T>& a, CUstream_st* stream) {
  const RowsParams<T> params{a.at, a.prob, a.pool, a.eps, a.loss, a.grad_prob, 0};
  return a.grad_prob ? launch_rows<RowsMode::loss_and_gradient>(params, stream)
                     : launch_rows<RowsMode::loss>(params, stream);
}

template <class T>
int pool_scatter_cuda(const PoolScatterParams<T>& a, CUstream_st* stream) {
  if (!a.at.height || !a.at.width || !a.at.leaves || (a.accumulate && !a.at.rows)) return cudaSuccess;
  return a.pool ? launch_pixels<true>(a, stream) : launch_pixels<false>(a, stream);
}

template <class T>
int pool_gather_cuda(const PoolGatherParams<T>& a, CUstream_st* stream) {
  return launch_rows<RowsMode::gather>(RowsParams<T>{a.at, nullptr, a.pool, T(0), a.square, a.out, 0}, stream);
}

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
