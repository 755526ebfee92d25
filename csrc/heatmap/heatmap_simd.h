// Maps in vectors: loads and stores of every element type in the working precision, whole vectors and remainders, 2^x.
// Included by CPU kernels only; internal linkage, as everything compiled once per instruction set.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/simd.h"
#include "heatmap/heatmap.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ff {
namespace FF_ISA {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

typedef uint16_t ShortVector __attribute__((vector_size(FF_VECTOR_BYTES / 2)));
template <class C>
using Index = typename VectorOf<C>::Int;
template <class T>
constexpr int kWidth = kLanes<Compute<T>>;  // elements a vector of the working precision holds

// Loads and stores that convert.

FF_INLINE FloatVector widen(const BFloat16*, ShortVector h) {
  return (FloatVector)(__builtin_convertvector(h, IntVector) << 16);
}
FF_INLINE ShortVector narrow(const BFloat16*, FloatVector v) {  // round half to even
  const IntVector bits = (IntVector)v;
  const IntVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v != v ? IntVector{} + 0x7fc0 : rounded, ShortVector);
}
#if defined(__AVX512F__)  // maskz: GCC 12 warns of the undefined source of the plain forms
FF_INLINE FloatVector widen(const Half*, ShortVector h) {
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
}
FF_INLINE ShortVector narrow(const Half*, FloatVector v) {
  return (ShortVector)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0);
}
#elif defined(__AVX2__)
FF_INLINE FloatVector widen(const Half*, ShortVector h) { return (FloatVector)_mm256_cvtph_ps((__m128i)h); }
FF_INLINE ShortVector narrow(const Half*, FloatVector v) { return (ShortVector)_mm256_cvtps_ph((__m256)v, 0); }
#else
// After F. Giesen, half_to_float and float_to_half (public domain): the exponent is rebased by a product or a sum.
FF_INLINE FloatVector widen(const Half*, ShortVector h) {
  const IntVector bits = __builtin_convertvector(h, IntVector);
  const FloatVector rebased = (FloatVector)((bits & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
  const IntVector special = (bits & 0x7c00) == 0x7c00;
  return (FloatVector)((IntVector)rebased | (special & 0x7f800000) | ((bits & 0x8000) << 16));
}
FF_INLINE ShortVector narrow(const Half*, FloatVector v) {
  const IntVector all = (IntVector)v, sign = (all >> 16) & 0x8000, bits = all & 0x7fffffff;
  const IntVector small = (IntVector)((FloatVector)bits + 0.5f) - 0x3f000000;
  const IntVector normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  IntVector h = bits < (113 << 23) ? small : normal;
  h = bits >= (143 << 23) ? IntVector{} + 0x7c00 : h;
  h = bits > 0x7f800000 ? IntVector{} + 0x7e00 : h;
  return __builtin_convertvector(h | sign, ShortVector);
}
#endif

template <class T>
FF_INLINE Vector<Compute<T>> get(const T* p) {
  if constexpr (sizeof(T) == 2) {
    ShortVector h;
    __builtin_memcpy(&h, p, sizeof(h));
    return widen(p, h);
  } else {
    return load(p);
  }
}
template <class T>
FF_INLINE void put(T* p, Vector<Compute<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const ShortVector h = narrow(p, v);
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    store(p, v);
  }
}
// The first `count` lanes; the others repeat element 0.
template <class T>
FF_INLINE Vector<Compute<T>> get_head(const T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (FloatVector)_mm512_mask_loadu_ps(_mm512_set1_ps(*p), __mmask16((1u << count) - 1), p);
#endif
  T lanes[kWidth<T>];
  for (T& lane : lanes) lane = *p;
  __builtin_memcpy(lanes, p, sizeof(T) * count);
  return get(lanes);
}
template <class T>
FF_INLINE void put_head(T* p, Vector<Compute<T>> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
    return;
  }
#endif
  T lanes[kWidth<T>];
  put(lanes, v);
  __builtin_memcpy(p, lanes, sizeof(T) * count);
}
template <class C>
FF_INLINE Vector<C> keep_head(Vector<C> v, int count) {
  return lane_index<C>() < C(count) ? v : Vector<C>{};
}
// Calls body(x, vector count) over [begin, end): whole vectors first, then the rest.
template <int kStep, class Body>
FF_INLINE void each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t x = begin;
  for (; x + kStep <= end; x += kStep) body(x, kStep);
  if (x < end) body(x, int(end - x));
}
template <class T>
FF_INLINE Vector<Compute<T>> get_some(const T* p, int count) {
  return count == kWidth<T> ? get(p) : get_head(p, count);
}
template <class T>
FF_INLINE void put_some(T* p, Vector<Compute<T>> v, int count) {
  if (count == kWidth<T>)
    put(p, v);
  else
    put_head(p, v, count);
}

// 2^x for x <= 1: 0 below -127 (the scale's bits vanish), NaN kept whatever its payload. Degree 5 on [-1/2, 1/2],
// fitted to the least relative error, 9e-8. Half the steps of a general exp, and they bound the soft-argmax.
FF_INLINE FloatVector exp2_down(FloatVector x) {
  const FloatVector c = max(broadcast(-127.f), x);
  const FloatVector shifted = c + 12583039.f;  // 1.5 2^23 + 127: the low bits are the biased exponent
  const FloatVector f = c - (shifted - 12583039.f);
  FloatVector p = broadcast(1.326472571e-3f);
  p = p * f + 9.67151309e-3f;
  p = p * f + 5.550733751e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.f;
  return p * (FloatVector)((IntVector)shifted << 23);
}
FF_INLINE DoubleVector exp2_down(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
FF_INLINE float exp_scalar(float x) { return __builtin_expf(x); }
FF_INLINE double exp_scalar(double x) { return __builtin_exp(x); }
FF_INLINE float log_scalar(float x) { return __builtin_logf(x); }
FF_INLINE double log_scalar(double x) { return __builtin_log(x); }
constexpr double kLog2E = 1.4426950408889634;

}  // namespace
}  // namespace FF_ISA
}  // namespace ff
