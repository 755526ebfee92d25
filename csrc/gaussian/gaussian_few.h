// At most kFewDims dimensions on the CPU. Included by gaussian_cpu.cpp alone.
//
// Lanes go over leaves: the arithmetic of a density is less than that of transposing it into its row.
#pragma once
#include "gaussian/gaussian_cpu.h"

namespace ff {
namespace FF_ISA {
namespace {

// A vector of leaves in at most kFewDims dimensions, from its place in `lanes`.
template <class T, int D>
struct FewLeaves {
  static constexpr int kPairs = D * (D + 1) / 2;
  const T* at;  // mean

  FF_INLINE static FewLeaves of(const GaussianLeaves<T>& leaves, int64_t k) {
    return {leaves.lanes + k / kLeafGroup * gaussian_lane_fields(D) * kLeafGroup + k % kLeafGroup};
  }
  FF_INLINE const T* mean(int j) const { return at + j * kLeafGroup; }
  FF_INLINE const T* w(int i, int j) const { return at + (D + i * (i + 1) / 2 + j) * kLeafGroup; }
  FF_INLINE const T* log_norm() const { return at + (D + kPairs) * kLeafGroup; }
  FF_INLINE const T* careful() const { return log_norm() + kLeafGroup; }
  FF_INLINE const T* rest(int i, int j) const { return careful() + (1 + i * (i + 1) / 2 + j) * kLeafGroup; }

  FF_INLINE void whitened(const T* x, Vector<T> (&z)[D]) const {
#pragma GCC unroll 4
    for (int j = 0; j < D; ++j) {
      const Vector<T> d = x[j] - load(mean(j));
#pragma GCC unroll 4
      for (int i = j; i < D; ++i) z[i] = j ? z[i] + load(w(i, j)) * d : load(w(i, j)) * d;
    }
  }
  FF_INLINE Vector<T> density(const T* x) const {
    Vector<T> z[D];
    whitened(x, z);
    Vector<T> squares = z[0] * z[0];
#pragma GCC unroll 4
    for (int i = 1; i < D; ++i) squares += z[i] * z[i];
    return gaussian_log_density(T(0), squares) + load(log_norm());
  }
};

// Densities in double of the leaves whose flag is set: where D is small, the cancellation inside z is all of the
// result's error (condition number 1e6, D 2: 3e-5 of the log density in float32).
template <int D>
FF_INLINE FloatVector careful_density(const FewLeaves<float, D>& leaves, const float* x, FloatVector plain) {
  typedef float Half __attribute__((vector_size(FF_VECTOR_BYTES / 2)));
  constexpr int L = kLanes<double>;
  const auto wide = [](const float* p) __attribute__((always_inline)) {
    Half at;
    __builtin_memcpy(&at, p, sizeof(at));
    return __builtin_convertvector(at, DoubleVector);
  };
  const FloatVector flag = load(leaves.careful());
  if (max_lane<float>(flag) == 0.f) return plain;
  float result[2 * L];
  for (int l = 0; l < 2 * L; l += L) {
    DoubleVector d[D], squares{};
    for (int i = 0; i < D; ++i) {
      d[i] = double(x[i]) - wide(leaves.mean(i) + l);
      DoubleVector z{};
      for (int j = 0; j <= i; ++j) z += (wide(leaves.w(i, j) + l) + wide(leaves.rest(i, j) + l)) * d[j];
      squares += z * z;
    }
    const Half half = __builtin_convertvector(wide(leaves.log_norm() + l) - 0.5 * squares, Half);
    __builtin_memcpy(result + l, &half, sizeof(half));
  }
  return flag > 0.f ? load(result) : plain;
}

constexpr int kAhead = 16;  // samples on, whose lines are asked for: parts of rows are not foreseen by the hardware

// Samples [begin, end). A leaf is loaded once for some of them.
template <class T, int D, bool kCareful>
void few_dims(const GaussianLogProbParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t K = p.size.leaves;
  const auto some = [&](auto samples, int64_t n) __attribute__((always_inline)) {
    const T* x = p.x + n * D;
    T* out = p.log_prob + n * K;
    for (int64_t k = 0; k < K; k += L) {
      const auto leaves = FewLeaves<T, D>::of(p.leaves, k);
      for (int i = 0; i < samples; ++i) {
        __builtin_prefetch(out + (i + kAhead) * K + k, 1);
        Vector<T> density = leaves.density(x + i * D);
        if constexpr (kCareful) density = careful_density<D>(leaves, x + i * D, density);
        if (K - k >= L)
          store(out + i * K + k, density);
        else
          store_partial(out + i * K + k, density, int(K - k));
      }
    }
  };
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) some(std::integral_constant<int, 4>{}, n);
  for (; n < end; ++n) some(std::integral_constant<int, 1>{}, n);
}

template <class T>
bool any_careful(const GaussianLogProbParams<T>& p) {
  for (int64_t k = 0; k < p.size.leaves; ++k)
    if (p.leaves.whiten[k * gaussian_whiten_size(p.size.dims, false) + gaussian_block_size(p.size.dims) - 1] != T(0))
      return true;
  return false;
}

constexpr int kFewSamples = 128;  // whose grad_x, one vector a dimension, stays in L1 (D 2: 16 KB)

// Some vectors of leaves and at most kFewSamples samples: adds to `moments` [kSums][L] a vector of leaves: sum u z^T,
// sum u, sum g; and, unless it is null, to grad_x [kFewSamples][D][L], whose lanes are still to be summed.
template <class T, int D, int kSome>
FF_INLINE void few_dims_backward(const GaussianBackwardParams<T>& p, int64_t k, int64_t first, int samples, T* grad_x,
                                 T* moments) {
  constexpr int L = kLanes<T>, kPairs = D * (D + 1) / 2, kSums = kPairs + D + 1;
  const int64_t K = p.size.leaves;
  Vector<T> totals[kSome][kSums];
#pragma GCC unroll 2
  for (int s = 0; s < kSome; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) totals[s][i] = load(moments + (s * kSums + i) * L);
  const int columns = int(std::min<int64_t>(L, K - k - (kSome - 1) * L));  // of the last vector
  for (int n = 0; n < samples; ++n) {
    const T *x = p.x + (first + n) * D, *grad = p.grad + (first + n) * K + k;
    Vector<T> y[D] = {};
#pragma GCC unroll 2
    for (int s = 0; s < kSome; ++s) {
      const auto leaves = FewLeaves<T, D>::of(p.leaves, k + s * L);
      __builtin_prefetch(grad + kAhead * K + s * L);
      const Vector<T> g = s < kSome - 1 || columns == L ? load(grad + s * L) : load_partial(grad + s * L, columns);
      Vector<T> z[D];
      leaves.whitened(x, z);
      int pair = 0;
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) {
        z[i] = gaussian_used(g, z[i]);
        const Vector<T> u = g * z[i];
#pragma GCC unroll 4
        for (int j = 0; j <= i; ++j) {
          totals[s][pair++] += u * z[j];
          y[j] += load(leaves.w(i, j)) * u;
        }
        totals[s][kPairs + i] += u;
      }
      totals[s][kPairs + D] += g;
    }
    if (grad_x)
#pragma GCC unroll 4
      for (int j = 0; j < D; ++j) store(grad_x + (n * D + j) * L, load(grad_x + (n * D + j) * L) + y[j]);
  }
#pragma GCC unroll 2
  for (int s = 0; s < kSome; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) store(moments + (s * kSums + i) * L, totals[s][i]);
}

// A task in few dimensions: its leaves' moments, and its part of grad_x in panels.
template <class T, int D>
void few_dims_task(const GaussianBackwardParams<T>& p, const Task& task, bool of_leaves) {
  constexpr int L = kLanes<T>, kPairs = D * (D + 1) / 2, kSums = kPairs + D + 1;
  const GaussianSize& s = p.size;
  const int64_t first_leaf = task.first_group * kLeafGroup;
  const int64_t last_leaf = std::min(s.leaves, task.last_group * kLeafGroup);
  const int64_t vectors = (last_leaf - first_leaf + L - 1) / L;
  Buffer<T> moments(vectors * kSums * L), sums_x(p.grad_x ? kFewSamples * D * L : 1);
  std::fill(+moments, moments + vectors * kSums * L, T(0));
  const int64_t end = std::min(s.samples, task.last_chunk * kChunk);
  for (int64_t first = task.first_chunk * kChunk; first < end; first += kFewSamples) {
    const int samples = int(std::min<int64_t>(kFewSamples, end - first));
    T* grad_x = p.grad_x ? +sums_x : nullptr;
    if (grad_x) std::fill(grad_x, grad_x + kFewSamples * D * L, T(0));
    constexpr int kSome = D <= 2 ? 2 : 1;
    int64_t v = 0;
    for (; v + kSome <= vectors; v += kSome)
      few_dims_backward<T, D, kSome>(p, first_leaf + v * L, first, samples, grad_x, moments + v * kSums * L);
    for (; v < vectors; ++v)
      few_dims_backward<T, D, 1>(p, first_leaf + v * L, first, samples, grad_x, moments + v * kSums * L);
    if (!grad_x) continue;
    T* out = p.scratch + (task.leaf_range * ((s.samples + kPanel - 1) / kPanel) * kPanel + first) * D;
    for (int n = 0; n < (samples + kPanel - 1) / kPanel * kPanel; n += L)
#pragma GCC unroll 4
      for (int j = 0; j < D; ++j) {
        Vector<T> lanes[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) lanes[i] = load(grad_x + ((n + i) * D + j) * L);
        sums<T>(lanes, out + int64_t(n / kPanel) * kPanel * D + j * kPanel + n % kPanel);
      }
  }
  if (!of_leaves) return;
  for (int64_t k = first_leaf; k < last_leaf; ++k) {
    T* second = moments_of(moments_begin(p), s, task.sample_range, k);
    const T* from = moments + (k - first_leaf) / L * kSums * L + (k - first_leaf) % L;
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) second[i * kRows + j] = from[(i * (i + 1) / 2 + j) * L];
    for (int i = 0; i < D; ++i) second[kRows * kRows + i] = from[(kPairs + i) * L];
    second[kRows * kRows + kRows] = from[(kPairs + D) * L];
  }
}

}  // namespace
}  // namespace FF_ISA
}  // namespace ff
