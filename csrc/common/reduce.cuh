// Reductions over a warp and a block. The order of operations depends on the lanes alone, so results repeat bit by bit.
// An operation must be commutative: then all lanes receive the same bits.
#pragma once
#include <cstring>
#include <type_traits>

#include "common/portable.cuh"

namespace ff {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {  // not commutative for NaNs: mask them before
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// `value` of the lane whose number differs in `bits`; for any small struct, word by word.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0 && sizeof(T) <= 16,
                "shuffle_xor: a trivially copyable type of 4, 8, 12 or 16 bytes");
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(0xffffffffu, word, bits);
  memcpy(&value, words, sizeof(T));
  return value;
}

// Over each group of kLanes neighbouring lanes; all 32 lanes must call it, and all receive their group's result.
template <int kLanes = 32, class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  static_assert(kLanes >= 1 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "warp_reduce: a power of two lanes");
#pragma unroll
  for (int bits = kLanes / 2; bits; bits /= 2) value = op(value, shuffle_xor(value, bits));
  return value;
}

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<kLanes>(value, Sum{});
}

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce<kLanes>(value, Max{});
}

// Over a block of kThreads threads in x; all must call it, and all receive the result. `shared` may be used again at
// once, at the cost of a second barrier.
template <int kThreads, class T, class Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T (&shared)[kThreads / 32]) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32, "block_reduce: whole warps, at most 32");
  value = warp_reduce(value, op);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_reduce<kWarps>(shared[threadIdx.x % kWarps], op);  // every warp for itself
  __syncthreads();
  return value;
}

template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, T (&shared)[kThreads / 32]) {
  return block_reduce<kThreads>(value, Sum{}, shared);
}

}  // namespace ff
