// Vectors of the instruction set at hand, through the compiler's vector extension. Included by the CPU kernels only,
// inside no namespace: everything lands in ff::<FF_ISA>, so that no build's inline functions can stand in for
// another's.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FF_VECTOR_BYTES 32
#else
#define FF_VECTOR_BYTES 16
#endif
#define FF_INLINE inline __attribute__((always_inline))

namespace ff {
namespace FF_ISA {

typedef float FloatVector __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef int64_t LongVector __attribute__((vector_size(FF_VECTOR_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatVector;
  using Int = IntVector;
};
template <>
struct VectorOf<double> {
  using Type = DoubleVector;
  using Int = LongVector;
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int kLanes = FF_VECTOR_BYTES / int(sizeof(T));

template <class T>
FF_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
FF_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
FF_INLINE Vector<T> broadcast(T a) {
  return a - Vector<T>{};
}
template <class T>
FF_INLINE Vector<T> lane_index() {
  Vector<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}
// The first `count` lanes from memory, the rest `fill`.
template <class T>
FF_INLINE Vector<T> load_partial(const T* p, int count, T fill = T(0)) {
  Vector<T> v = broadcast<T>(fill);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_mask_loadu_ps((__m512)v, __mmask16((1u << count) - 1u), p);
  else
    return (Vector<T>)_mm512_mask_loadu_pd((__m512d)v, __mmask8((1u << count) - 1u), p);
#else
  __builtin_memcpy(&v, p, sizeof(T) * count);
  return v;
#endif
}
template <class T>
FF_INLINE void store_partial(T* p, Vector<T> v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1u), (__m512d)v);
#else
  __builtin_memcpy(p, &v, sizeof(T) * count);
#endif
}
template <class V>
FF_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FF_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// Sum and maximum over the lanes, halving.
template <class T>
FF_INLINE T sum(Vector<T> v) {
  T lane[kLanes<T>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <class T>
FF_INLINE T max_lane(Vector<T> v) {
  T lane[kLanes<T>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// Lane i of the result is a[2i] + a[2i+1] in the lower half and the same of b in the upper half: eight vectors are
// summed over their lanes in 7 such steps and one more, a third of the work of eight separate sums.
template <class T>
FF_INLINE Vector<T> pair_sums(Vector<T> a, Vector<T> b) {
#if defined(__clang__)
#define FF_TAKE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FF_TAKE(...) __builtin_shuffle(a, b, typename VectorOf<T>::Int{__VA_ARGS__})
#endif
  if constexpr (kLanes<T> == 16) {
    return FF_TAKE(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           FF_TAKE(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (kLanes<T> == 8) {
    return FF_TAKE(0, 2, 4, 6, 8, 10, 12, 14) + FF_TAKE(1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (kLanes<T> == 4) {
    return FF_TAKE(0, 2, 4, 6) + FF_TAKE(1, 3, 5, 7);
  } else {
    return FF_TAKE(0, 2) + FF_TAKE(1, 3);
  }
#undef FF_TAKE
}

// a0 b0 a1 b1 ...: the first vector of it, or the second.
template <class T, bool kSecond>
FF_INLINE Vector<T> interleave(Vector<T> a, Vector<T> b) {
#if defined(__clang__)
#define FF_TAKE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FF_TAKE(...) __builtin_shuffle(a, b, typename VectorOf<T>::Int{__VA_ARGS__})
#endif
  if constexpr (kLanes<T> == 16) {
    if constexpr (kSecond) return FF_TAKE(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return FF_TAKE(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (kLanes<T> == 8) {
    if constexpr (kSecond) return FF_TAKE(4, 12, 5, 13, 6, 14, 7, 15);
    return FF_TAKE(0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (kLanes<T> == 4) {
    if constexpr (kSecond) return FF_TAKE(2, 6, 3, 7);
    return FF_TAKE(0, 4, 1, 5);
  } else {
    if constexpr (kSecond) return FF_TAKE(1, 3);
    return FF_TAKE(0, 2);
  }
#undef FF_TAKE
}

template <class T>
constexpr int kLogLanes = FF_VECTOR_BYTES / sizeof(T) == 16  ? 4
                          : FF_VECTOR_BYTES / sizeof(T) == 8 ? 3
                          : FF_VECTOR_BYTES / sizeof(T) == 4 ? 2
                                                             : 1;

// A square of vectors, transposed: interleaving the halves moves one bit of the row into the column.
template <class T>
FF_INLINE void transpose(Vector<T> (&a)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int step = 0; step < kLogLanes<T>; ++step) {
    Vector<T> b[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      b[2 * i] = interleave<T, false>(a[i], a[i + W / 2]);
      b[2 * i + 1] = interleave<T, true>(a[i], a[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = b[i];
  }
}

// exp and log to 2 ulp over the whole range, with the limits of the standard functions (NaN, infinities, 0).
// Cody-Waite reduction and a minimax polynomial; coefficients after Cephes (S. Moshier, expf and logf).
FF_INLINE FloatVector exp(FloatVector x) {
  const FloatVector hi = broadcast(88.72284f), lo = broadcast(-87.33654f);
  FloatVector c = x < lo ? lo : x;
  c = c > hi ? hi : c;
  const FloatVector magic = broadcast(12582912.f);
  const FloatVector t = c * 1.44269504f + magic;
  const IntVector n = (IntVector)t - (IntVector)magic;
  const FloatVector k = t - magic;
  FloatVector r = c - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  FloatVector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Two factors, since 2^128 at the upper end is not a float.
  const IntVector half = n >> 1;
  FloatVector e = p * (FloatVector)((half + 127) << 23) * (FloatVector)((n - half + 127) << 23);
  e = x < lo ? FloatVector{} : e;
  e = x > hi ? broadcast(INFINITY) : e;
  return x != x ? x : e;
}
FF_INLINE FloatVector log(FloatVector x) {
  // Subnormals are scaled into the normal range first.
  const IntVector small = x < 1.17549435e-38f;
  const FloatVector scaled = small ? x * 8388608.f : x;
  const IntVector bits = (IntVector)scaled;
  IntVector e = (bits >> 23) - 126;
  e = small ? e - 23 : e;
  FloatVector m = (FloatVector)((bits & 0x007fffff) | 0x3f000000);
  const IntVector low = m < 0.707106781186547524f;
  e = low ? e - 1 : e;
  m = (low ? m + m : m) - 1.f;
  const FloatVector k = __builtin_convertvector(e, FloatVector);
  const FloatVector z = m * m;
  FloatVector p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  FloatVector r = p * m * z + k * -2.12194440e-4f - z * 0.5f + m + k * 0.693359375f;
  r = x == 0.f ? broadcast(-INFINITY) : r;
  r = x == INFINITY ? x : r;
  return x < 0.f || x != x ? broadcast(NAN) : r;
}
FF_INLINE DoubleVector exp(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
FF_INLINE DoubleVector log(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// exp of x <= 0, half the steps of the general one (both after Cephes): 0 below the normal range, NaN stays.
FF_INLINE FloatVector exp_down(FloatVector x) {
  const FloatVector c = max(broadcast(-88.f), x);            // in this order NaN stays
  const FloatVector shifted = c * 1.44269504f + 12583039.f;  // 1.5 2^23 + 127: the low bits are the biased exponent
  const FloatVector k = shifted - 12583039.f;
  const FloatVector r = c - k * 0.693359375f - k * -2.12194440e-4f;
  FloatVector p = broadcast(0.00829027221f);
  p = p * r + 0.0418981612f;
  p = p * r + 0.166676387f;
  p = p * r + 0.499991477f;
  p = p * r + 0.999999702f;
  p = p * r + 1.f;
  return p * (FloatVector)((IntVector)shifted << 23);
}
FF_INLINE DoubleVector exp_down(DoubleVector x) { return exp(x); }

}  // namespace FF_ISA
}  // namespace ff
