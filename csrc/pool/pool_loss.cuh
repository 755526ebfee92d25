// Rows stand, pixels pass: loss and gather.
#pragma once
#include "pool/pool_scheme.cuh"

namespace ff {
namespace {

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

}  // namespace

template <class T>
int pool_kl_loss_cuda(const PoolKlLossParams<T>& a, CUstream_st* stream) {
  const RowsParams<T> params{a.at, a.prob, a.pool, a.eps, a.loss, a.grad_prob, 0};
  return a.grad_prob ? launch_rows<RowsMode::loss_and_gradient>(params, stream)
                     : launch_rows<RowsMode::loss>(params, stream);
}

template <class T>
int pool_gather_cuda(const PoolGatherParams<T>& a, CUstream_st* stream) {
  return launch_rows<RowsMode::gather>(RowsParams<T>{a.at, nullptr, a.pool, T(0), a.square, a.out, 0}, stream);
}

}  // namespace ff
