// The scheme of loss, gather and scatter: its sums, staged in registers or streamed, and the choice between them.
#pragma once
#include "pool/pool_kernels.cuh"

namespace ff {
namespace {

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

}  // namespace
}  // namespace ff
