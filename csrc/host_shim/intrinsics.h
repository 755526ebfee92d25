// The names of CUDA C++ that kernels use. What nvcc would refuse is refused here too, as far as that is cheap:
// __activemask is missing because its answer depends on the scheduler, __shared__ because only FF_SHARED is watched.
#pragma once
#include <math.h>  // not <cmath>: this one gives ::exp(float) as CUDA has it

#include <atomic>
#include <bit>
#include <concepts>
#include <type_traits>

#include "host_shim/block.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static_assert(false, "write FF_SHARED(type, name, count)");

#define threadIdx (::ff::shim::current->index)
#define blockIdx (::ff::shim::current->block->index)
#define blockDim (::ff::shim::current->block->block_dim)
#define gridDim (::ff::shim::current->block->grid_dim)
constexpr int warpSize = 32;

namespace ff::shim {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <class T>
concept AtomicInteger = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

template <class T>
concept Atomic = AtomicInteger<T> || std::same_as<T, float> || std::same_as<T, double>;

template <Shuffled T>
T shuffle(unsigned mask, T value, int source, Place place) {
  uint64_t in = 0;
  __builtin_memcpy(&in, &value, sizeof(T));  // the builtin: TSan would see a call of memcpy
  const uint64_t out = meet_warp(mask, in, source, nullptr, place);
  __builtin_memcpy(&value, &out, sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool vote, Place place) {
  auto either = [](uint64_t a, uint64_t b) { return a | b; };
  return unsigned(meet_warp(mask, uint64_t(vote) << current->lane, kOwnValue, either, place));
}

template <class T, class Operation>
T exchange(T* at, Operation operation) {
  std::atomic_ref<T> atomic(*at);
  T old = atomic.load(std::memory_order_relaxed);
  while (!atomic.compare_exchange_weak(old, operation(old), std::memory_order_relaxed)) {
  }
  return old;
}

template <class T>
using Same = std::type_identity_t<T>;  // only the pointer decides an atomic's type

}  // namespace ff::shim

// Barriers and fences

inline void __syncthreads(ff::shim::Place place = ff::shim::Place::current()) { ff::shim::sync_block(place); }
inline void __syncwarp(unsigned mask = ~0u, ff::shim::Place place = ff::shim::Place::current()) {
  ff::shim::sync_warp(mask, place);
}
// TSan knows no fences. This orders a fence after all earlier ones: enough for "the last block sums", where it may
// hide a race but never invents one.
inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)
  static char tag;
  ff::shim::release(&tag);
  ff::shim::acquire(&tag);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}
inline void __threadfence_block() { __threadfence(); }

// Warp operations

template <ff::shim::Shuffled T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, ff::shim::Place place = ff::shim::Place::current()) {
  const int self = ff::shim::current->lane;
  return ff::shim::shuffle(mask, value, self / width * width + (lane & (width - 1)), place);
}
template <ff::shim::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  ff::shim::Place place = ff::shim::Place::current()) {
  const int self = ff::shim::current->lane, from = self ^ bits;
  return ff::shim::shuffle(mask, value, from / width > self / width ? ff::shim::kOwnValue : from, place);
}
template <ff::shim::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32,
                   ff::shim::Place place = ff::shim::Place::current()) {
  const int self = ff::shim::current->lane;
  const bool inside = self % width + int(step) < width;
  return ff::shim::shuffle(mask, value, inside ? self + int(step) : ff::shim::kOwnValue, place);
}
template <ff::shim::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32,
                 ff::shim::Place place = ff::shim::Place::current()) {
  const int self = ff::shim::current->lane;
  const bool inside = self % width >= int(step);
  return ff::shim::shuffle(mask, value, inside ? self - int(step) : ff::shim::kOwnValue, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, ff::shim::Place place = ff::shim::Place::current()) {
  return ff::shim::ballot(mask, vote != 0, place);
}
inline int __any_sync(unsigned mask, int vote, ff::shim::Place place = ff::shim::Place::current()) {
  return ff::shim::ballot(mask, vote != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, ff::shim::Place place = ff::shim::Place::current()) {
  return ff::shim::ballot(mask, vote == 0, place) == 0;
}
// CUDA has these for int and unsigned, and the bitwise ones for unsigned only.
#define FF_SHIM_WARP_REDUCTION(name, T, expression)                                           \
  inline T name(unsigned mask, T value, ff::shim::Place place = ff::shim::Place::current()) { \
    auto fold = [](uint64_t x, uint64_t y) {                                                  \
      [[maybe_unused]] const T a = T(x), b = T(y);                                            \
      return uint64_t(unsigned(expression));                                                  \
    };                                                                                        \
    return T(ff::shim::meet_warp(mask, unsigned(value), ff::shim::kOwnValue, fold, place));   \
  }
FF_SHIM_WARP_REDUCTION(__reduce_add_sync, int, unsigned(a) + unsigned(b))
FF_SHIM_WARP_REDUCTION(__reduce_add_sync, unsigned, a + b)
FF_SHIM_WARP_REDUCTION(__reduce_min_sync, int, a < b ? a : b)
FF_SHIM_WARP_REDUCTION(__reduce_min_sync, unsigned, a < b ? a : b)
FF_SHIM_WARP_REDUCTION(__reduce_max_sync, int, a > b ? a : b)
FF_SHIM_WARP_REDUCTION(__reduce_max_sync, unsigned, a > b ? a : b)
FF_SHIM_WARP_REDUCTION(__reduce_and_sync, unsigned, a& b)
FF_SHIM_WARP_REDUCTION(__reduce_or_sync, unsigned, a | b)
FF_SHIM_WARP_REDUCTION(__reduce_xor_sync, unsigned, a ^ b)
#undef FF_SHIM_WARP_REDUCTION

// Atomics: relaxed, as on a GPU, so they order nothing else

template <ff::shim::Atomic T>
T atomicAdd(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T old) { return T(old + value); });
}
template <ff::shim::AtomicInteger T>
T atomicMin(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T old) { return value < old ? value : old; });
}
template <ff::shim::AtomicInteger T>
T atomicMax(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T old) { return value > old ? value : old; });
}
template <ff::shim::AtomicInteger T>
T atomicAnd(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T old) { return old & value; });
}
template <ff::shim::AtomicInteger T>
T atomicOr(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T old) { return old | value; });
}
template <ff::shim::AtomicInteger T>
T atomicCAS(T* at, ff::shim::Same<T> expected, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [expected, value](T old) { return old == expected ? value : old; });
}
template <ff::shim::Atomic T>
  requires(!std::same_as<T, double>)
T atomicExch(T* at, ff::shim::Same<T> value) {
  return ff::shim::exchange(at, [value](T) { return value; });
}

// Arithmetic

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }

// As CUDA: mixed integers are compared in their common type, and a NaN loses against a number.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return T(fmin(T(a), T(b)));
  } else {
    return T(b) < T(a) ? T(b) : T(a);
  }
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return T(fmax(T(a), T(b)));
  } else {
    return T(a) < T(b) ? T(b) : T(a);
  }
}
