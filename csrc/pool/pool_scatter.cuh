// Pixels stand, rows pass: scatter.
#pragma once
#include "pool/pool_scheme.cuh"

namespace ff {
namespace {

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
int pool_scatter_cuda(const PoolScatterParams<T>& a, CUstream_st* stream) {
  if (!a.at.height || !a.at.width || !a.at.leaves || (a.accumulate && !a.at.rows)) return cudaSuccess;
  return a.pool ? launch_pixels<true>(a, stream) : launch_pixels<false>(a, stream);
}

}  // namespace ff
