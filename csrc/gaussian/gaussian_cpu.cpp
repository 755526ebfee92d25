// CPU kernels of the gaussian room. Compiled once per instruction set (FF_ISA): every helper has internal linkage.
//
// Lanes go over samples: x stands in panels [D][64], and for one leaf d = x - m, z = W d and |z|^2 never leave the
// registers and L1. Differences come first: W x - W m would cancel where a leaf is narrow and far from the origin.
// FLOPs a sample and leaf: D^2 + 4 D forward; 3 D^2 more for all gradients (z again, W^T z, sum g z z^T); D^2 for the
// second moments of EM. The triangle is exact: blocks of kRows rows of W, a block's own corner unrolled.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "common/simd.h"
#include "gaussian/gaussian.h"
#include "gaussian/gaussian_math.h"

namespace ff {
namespace FF_ISA {
namespace {

constexpr int kRows = 4;  // of W at a time
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // of samples at a time: 16 sums and 4 differences in 32 registers
constexpr int kColumns = 4;  // of a tile of second moments
#else
constexpr int kVectors = 2;
constexpr int kColumns = 2;
#endif
template <class T>
constexpr int kStrip = kVectors * kLanes<T>;  // samples at a time

template <class T>
struct Buffer {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  explicit Buffer(int64_t n) : memory(static_cast<T*>(std::aligned_alloc(64, (size_t(n) * sizeof(T) + 63) / 64 * 64))) {
    if (!memory) throw std::bad_alloc();
  }
  operator T*() const { return memory.get(); }
};

template <class T>
FF_INLINE Vector<T> zip(Vector<T> a, Vector<T> b, bool upper) {
  typename VectorOf<T>::Int lane{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i / 2 + i % 2 * kLanes<T> + (upper ? kLanes<T> / 2 : 0);
#if defined(__clang__)
  Vector<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = lane[i] < kLanes<T> ? a[lane[i]] : b[lane[i] - kLanes<T>];
  return v;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// Rows become columns, in log2(lanes) rounds.
template <class T>
FF_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vector<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = zip<T>(rows[i], rows[i + L / 2], false);
      next[2 * i + 1] = zip<T>(rows[i], rows[i + L / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// out[i] = sum over the lanes of v[i]
template <class T, int kCount>
FF_INLINE void sums(const Vector<T> (&v)[kCount], T* out) {
  constexpr int L = kLanes<T>;
  static_assert(kCount % L == 0);
#pragma GCC unroll 8
  for (int first = 0; first < kCount; first += L) {
    Vector<T> level[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) level[i] = v[first + i];
#pragma GCC unroll 4
    for (int n = L / 2; n; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) level[i] = pair_sums<T>(level[2 * i], level[2 * i + 1]);
    store(out + first, level[0]);
  }
}

// W in blocks: forward, [rows i0..i0+3] x [columns 0..i0+3], column by column; backward, the same of W^T.
FF_INLINE int64_t forward_block(int i0) { return int64_t(i0) / 2 * (i0 / 4 + 1) * 4; }
FF_INLINE int64_t backward_block(int j0, int dims) { return int64_t(j0) * dims - int64_t(j0) / 2 * (j0 - 4); }

// sum_{j <= i} W_ij d_j for rows i0..i0+R-1 and a strip of samples; d [D][stride].
template <class T, int R>
FF_INLINE void whitened_rows(const T* w, const T* d, int64_t stride, int i0, Vector<T> (&z)[R][kVectors]) {
  for (auto& row : z)
    for (auto& v : row) v = Vector<T>{};
  for (int j = 0; j < i0; ++j, w += R, d += stride) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(d + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) z[r][v] += w[r] * at[v];
  }
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c, w += R, d += stride) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(d + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = c; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) z[r][v] += w[r] * at[v];
  }
}

// y_j += sum_{i >= j} W_ij u_i for j0..j0+R-1; y [.][y_stride], u [D][u_stride] from row j0 on.
template <class T, int R>
FF_INLINE void unwhitened_rows(const T* w, const T* u, int64_t u_stride, T* y, int64_t y_stride, int rows) {
  Vector<T> sum[R][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(y + r * y_stride + v * kLanes<T>);
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c, w += R, u += u_stride) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(u + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r <= c; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w[r] * at[v];
  }
  for (int i = R; i < rows; ++i, w += R, u += u_stride) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(u + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w[r] * at[v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(y + r * y_stride + v * kLanes<T>, sum[r][v]);
}

// Calls body(integral constant R, first row) for the blocks of rows.
template <class Body>
FF_INLINE void each_block(int dims, const Body& body) {
  int i0 = 0;
  for (; i0 + kRows <= dims; i0 += kRows) body(std::integral_constant<int, kRows>{}, i0);
  switch (dims - i0) {
    case 3: return body(std::integral_constant<int, 3>{}, i0);
    case 2: return body(std::integral_constant<int, 2>{}, i0);
    case 1: return body(std::integral_constant<int, 1>{}, i0);
  }
}

template <class T>
FF_INLINE void differences(const T* panel, const T* mean, int dims, T* d) {
  for (int j = 0; j < dims; ++j, panel += kPanel, d += kStrip<T>)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(d + v * kLanes<T>, load(panel + v * kLanes<T>) - mean[j]);
}

template <class T>
void pack(const GaussianSize& s, const T* x, T* panels, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    T* panel = panels + p * s.dims * kPanel;
    const int count = int(std::min<int64_t>(kPanel, s.samples - p * kPanel));
    if (count < kPanel) std::fill(panel, panel + s.dims * kPanel, T(0));
    for (int n = 0; n < count; ++n) {
      const T* row = x + (p * kPanel + n) * s.dims;
      for (int j = 0; j < s.dims; ++j) panel[j * kPanel + n] = row[j];
    }
  }
}

// W = L^-1 by rows: W_i = (e_i - sum_{k < i} L_ik W_k) / L_ii, in double.
template <class T>
void whiten(const GaussianSize& s, const GaussianLeaves<T>& leaves, int64_t begin, int64_t end) {
  const int D = s.dims;
  Buffer<double> inverse(int64_t(D) * D);
  for (int64_t k = begin; k < end; ++k) {
    const T* tril = leaves.scale_tril + k * D * D;
    double logs = 0;
    bool positive = true;
    for (int i = 0; i < D; ++i) {
      double* row = inverse + int64_t(i) * D;
      const double diagonal = tril[i * D + i], factor = 1 / diagonal;
      positive &= diagonal > 0;
      logs += std::log(diagonal);
      for (int j = 0; j < i; ++j) row[j] = 0;
      for (int a = 0; a < i; ++a) {
        const double l = -factor * double(tril[i * D + a]);
        const double* above = inverse + int64_t(a) * D;
        for (int j = 0; j <= a; ++j) row[j] += l * above[j];
      }
      row[i] = factor;
    }
    leaves.log_norm[k] = positive ? T(gaussian_log_norm(logs, D)) : T(NAN);
    T* forward = leaves.whiten + 2 * k * D * D;
    T* backward = forward + int64_t(D) * D;
    each_block(D, [&](auto rows, int i0) {
      constexpr int R = decltype(rows)::value;
      for (int j = 0; j < i0 + R; ++j)
        for (int r = 0; r < R; ++r) *forward++ = j <= i0 + r ? T(inverse[int64_t(i0 + r) * D + j]) : T(0);
      for (int i = i0; i < D; ++i)
        for (int r = 0; r < R; ++r) *backward++ = i >= i0 + r ? T(inverse[int64_t(i) * D + i0 + r]) : T(0);
    });
  }
}

template <class T>
void log_prob(const GaussianLogProbParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int D = p.size.dims;
  const int64_t K = p.size.leaves, groups = (K + kLeafGroup - 1) / kLeafGroup;
  alignas(64) T d[kMostDims * kStrip<T>], tile[kLeafGroup * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first_leaf = task % groups * kLeafGroup, first_sample = task / groups * kPanel;
    const int leaves = int(std::min<int64_t>(kLeafGroup, K - first_leaf));
    const int samples = int(std::min<int64_t>(kPanel, p.size.samples - first_sample));
    const T* panel = p.x + first_sample * D;
    for (int strip = 0; strip < samples; strip += kStrip<T>)
      for (int l = 0; l < leaves; ++l) {
        const int64_t k = first_leaf + l;
        differences(panel + strip, p.leaves.mean + k * D, D, d);
        const T* w = p.leaves.whiten + 2 * k * D * D;
        Vector<T> squares[kVectors] = {};
        each_block(D, [&](auto rows, int i0) __attribute__((always_inline)) {
          Vector<T> z[rows.value][kVectors];
          whitened_rows<T, rows.value>(w + forward_block(i0), d, kStrip<T>, i0, z);
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) squares[v] += z[r][v] * z[r][v];
        });
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          store(tile + l * kPanel + strip + v * L, p.leaves.log_norm[k] - T(0.5) * squares[v]);
      }
    for (int n = 0; n < samples; n += L)
      for (int l = 0; l < leaves; l += L) {
        Vector<T> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = load(tile + (l + i) * kPanel + n);
        transpose<T>(rows);
        T* out = p.log_prob + (first_sample + n) * K + first_leaf + l;
        const int columns = std::min(L, leaves - l), count = std::min(L, samples - n);
        if (columns == L)
          for (int i = 0; i < count; ++i) store(out + i * K, rows[i]);
        else
          for (int i = 0; i < count; ++i) store_partial(out + i * K, rows[i], columns);
      }
  }
}

// Three passes over a row that stands in L1: a = log w + log N and its maximum, exponentials, posteriors.
template <class T>
void mixture(const GaussianMixtureParams<T>& p, bool roots, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t K = p.size.leaves, whole = K / L * L;
  const int rest = int(K - whole);
  for (int64_t n = begin; n < end; ++n) {
    T* row = p.posterior + n * K;
    const T* weight = p.log_weight + n * K;
    Vector<T> top = broadcast(T(-INFINITY));
    for (int64_t k = 0; k < whole; k += L) {
      const Vector<T> a = load(row + k) + load(weight + k);
      store(row + k, a);
      top = max(top, a);
    }
    if (rest) {
      const Vector<T> a = load_partial(row + whole, rest) + load_partial(weight + whole, rest, T(-INFINITY));
      store_partial(row + whole, a, rest);
      top = max(top, a);
    }
    const T shift = gaussian_shift(max_lane<T>(top)), scale = roots ? T(0.5) : T(1);
    Vector<T> total{};
    for (int64_t k = 0; k < whole; k += L) {
      const Vector<T> e = exp((load(row + k) - shift) * scale);
      store(row + k, e);
      total += roots ? e * e : e;
    }
    if (rest) {
      const Vector<T> e = exp((load_partial(row + whole, rest, T(-INFINITY)) - shift) * scale);
      store_partial(row + whole, e, rest);
      total += roots ? e * e : e;
    }
    const T all = sum<T>(total);
    const T log_prob = shift + std::log(all);
    p.log_prob[n] = log_prob;
    T factor = all == T(0) ? T(0) : T(1) / all;
    if (roots) factor = log_prob - log_prob == T(0) ? std::sqrt(factor) : T(0);
    if (roots && factor == T(0)) {
      std::fill(row, row + K, T(0));
      continue;
    }
    for (int64_t k = 0; k < whole; k += L) store(row + k, load(row + k) * factor);
    if (rest) store_partial(row + whole, load_partial(row + whole, rest) * factor, rest);
  }
}

// Values [N, K] of one leaf group and one chunk of samples as [kLeafGroup][kChunk]; 0 where there is no sample or leaf.
template <class T>
FF_INLINE void load_group(const T* values, int64_t K, int64_t first_leaf, int64_t first_sample, int samples, T* tile) {
  constexpr int L = kLanes<T>;
  const int leaves = int(std::min<int64_t>(kLeafGroup, K - first_leaf));
  const int padded = (samples + kPanel - 1) / kPanel * kPanel;
  for (int n = 0; n < padded; n += L)
    for (int l = 0; l < leaves; l += L) {
      const T* from = values + (first_sample + n) * K + first_leaf + l;
      const int columns = std::min(L, leaves - l);
      Vector<T> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        rows[i] =
            n + i < samples ? (columns == L ? load(from + i * K) : load_partial(from + i * K, columns)) : Vector<T>{};
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(tile + (l + i) * kChunk + n, rows[i]);
    }
}

// out[i][j] += sum_n a_i b_j over whole vectors of samples; a, b [.][kChunk]; out rows of `width`.
template <class T>
FF_INLINE void product_tile(const T* a, const T* b, int samples, T* out, int64_t width) {
  Vector<T> total[kRows * kColumns] = {};
  for (int n = 0; n < samples; n += kLanes<T>) {
    Vector<T> left[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load(a + i * kChunk + n);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const Vector<T> right = load(b + j * kChunk + n);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) total[i * kColumns + j] += left[i] * right;
    }
  }
  alignas(64) T result[kRows * kColumns];
  sums<T>(total, result);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) out[i * width + j] += result[i * kColumns + j];
}

// The lower triangle of sum_n a a'^T; a, b [rows][kChunk], rows a multiple of 4.
template <class T>
FF_INLINE void product_triangle(const T* a, const T* b, int samples, int rows, T* out) {
  for (int i = 0; i < rows; i += kRows)
    for (int j = 0; j < i + kRows; j += kColumns)
      product_tile(a + i * kChunk, b + j * kChunk, samples, out + int64_t(i) * rows + j, rows);
}

// A task of the grid: a range of leaf groups and a range of chunks.
struct Task {
  int64_t leaf_range, sample_range, first_group, last_group, first_chunk, last_chunk;
  FF_INLINE Task(const GaussianGrid& g, int64_t task)
      : leaf_range(task / g.sample_ranges),
        sample_range(task % g.sample_ranges),
        first_group(g.groups * leaf_range / g.leaf_ranges),
        last_group(g.groups * (leaf_range + 1) / g.leaf_ranges),
        first_chunk(g.chunks * sample_range / g.sample_ranges),
        last_chunk(g.chunks * (sample_range + 1) / g.sample_ranges) {}
};

template <class T>
T* moments_of(T* moments, const GaussianSize& s, int64_t sample_range, int64_t k) {
  return moments + (sample_range * s.leaves + k) * gaussian_moment_size(s);
}

FF_INLINE int64_t panels_of(const GaussianSize& s) { return (s.samples + kPanel - 1) / kPanel; }

template <class T>
T* moments_begin(const GaussianBackwardParams<T>& p) {
  return p.scratch + (p.grad_x ? GaussianGrid(p.size).leaf_ranges * panels_of(p.size) * p.size.dims * kPanel : 0);
}

template <class T>
void backward(const GaussianBackwardParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const GaussianSize& s = p.size;
  const GaussianGrid grid(s);
  const int D = s.dims, rows = int(gaussian_rows(s));
  const bool of_leaves = p.grad_mean || p.grad_scale_tril;
  alignas(64) T d[kMostDims * kStrip<T>];
  Buffer<T> grads(kLeafGroup * kChunk), z(int64_t(rows) * kChunk), u(int64_t(rows) * kChunk);
  std::fill(z + int64_t(D) * kChunk, z + int64_t(rows) * kChunk, T(0));
  std::fill(u + int64_t(D) * kChunk, u + int64_t(rows) * kChunk, T(0));
  for (int64_t index = begin; index < end; ++index) {
    const Task task(grid, index);
    const int64_t first = task.first_group * kLeafGroup, last = std::min(s.leaves, task.last_group * kLeafGroup);
    if (of_leaves)
      std::fill(moments_of(moments_begin(p), s, task.sample_range, first),
                moments_of(moments_begin(p), s, task.sample_range, last), T(0));
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const int64_t first_sample = chunk * kChunk;
      const int samples = int(std::min<int64_t>(kChunk, s.samples - first_sample));
      const int padded = (samples + kPanel - 1) / kPanel * kPanel;
      const T* panels = p.x + first_sample * D;
      T* grad_x = p.grad_x ? p.scratch + (task.leaf_range * panels_of(s) * kPanel + first_sample) * D : nullptr;
      if (grad_x) std::fill(grad_x, grad_x + int64_t(padded) * D, T(0));
      for (int64_t k = first; k < last; ++k) {
        if (k % kLeafGroup == 0) load_group<T>(p.grad, s.leaves, k, first_sample, samples, grads);
        const T* grad = grads + k % kLeafGroup * kChunk;
        const T *forward = p.leaves.whiten + 2 * k * D * D, *back = forward + int64_t(D) * D;
        // 1. z and u = g z of the chunk, and grad_x while u is in L1
        for (int n = 0; n < padded; n += kStrip<T>) {
          const int64_t panel = int64_t(n / kPanel) * kPanel * D + n % kPanel;
          differences(panels + panel, p.leaves.mean + k * D, D, d);
          each_block(D, [&](auto block, int i0) __attribute__((always_inline)) {
            Vector<T> zs[block.value][kVectors];
            whitened_rows<T, block.value>(forward + forward_block(i0), d, kStrip<T>, i0, zs);
#pragma GCC unroll 4
            for (int r = 0; r < block.value; ++r)
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) {
                store(z + (i0 + r) * kChunk + n + v * L, zs[r][v]);
                store(u + (i0 + r) * kChunk + n + v * L, zs[r][v] * load(grad + n + v * L));
              }
          });
          if (grad_x)
            each_block(D, [&](auto block, int j0) __attribute__((always_inline)) {
              unwhitened_rows<T, block.value>(back + backward_block(j0, D), u + j0 * kChunk + n, kChunk,
                                              grad_x + panel + j0 * kPanel, kPanel, D - j0);
            });
        }
        if (!of_leaves) continue;
        // 2. sum g, sum u, sum u z^T
        T* second = moments_of(moments_begin(p), s, task.sample_range, k);
        T *mean = second + int64_t(rows) * rows, *count = mean + rows;
        Vector<T> total{};
        for (int n = 0; n < padded; n += L) total += load(grad + n);
        *count += sum<T>(total);
        for (int i = 0; i < D; ++i) {
          Vector<T> of_row[4] = {};
          for (int n = 0; n < padded; n += 4 * L)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) of_row[v] += load(u + i * kChunk + n + v * L);
          mean[i] += sum<T>((of_row[0] + of_row[1]) + (of_row[2] + of_row[3]));
        }
        if (p.grad_scale_tril) product_triangle<T>(u, z, padded, rows, second);
      }
    }
  }
}

// Panels [begin, end): grad_x = -sum over the leaf ranges, in their order.
template <class T>
void backward_x(const GaussianBackwardParams<T>& p, int64_t begin, int64_t end) {
  const GaussianSize& s = p.size;
  const GaussianGrid grid(s);
  const int64_t width = int64_t(s.dims) * kPanel, stride = panels_of(s) * width;
  Buffer<T> total(width);
  for (int64_t panel = begin; panel < end; ++panel) {
    const T* part = p.scratch + panel * width;
    for (int64_t i = 0; i < width; ++i) total[i] = -part[i];
    for (int64_t range = 1; range < grid.leaf_ranges; ++range)
      for (int64_t i = 0; i < width; ++i) total[i] -= part[range * stride + i];
    const int64_t count = std::min<int64_t>(kPanel, s.samples - panel * kPanel);
    for (int64_t n = 0; n < count; ++n)
      for (int j = 0; j < s.dims; ++j) p.grad_x[(panel * kPanel + n) * s.dims + j] = total[j * kPanel + n];
  }
}

// Adds the sample ranges of one leaf into the first, in their order.
template <class T>
FF_INLINE T* gather_moments(T* moments, const GaussianSize& s, int64_t k) {
  const GaussianGrid grid(s);
  const int64_t size = gaussian_moment_size(s);
  T* total = moments_of(moments, s, 0, k);
  for (int64_t range = 1; range < grid.sample_ranges; ++range) {
    const T* part = moments_of(moments, s, range, k);
    for (int64_t i = 0; i < size; ++i) total[i] += part[i];
  }
  return total;
}

// grad_mean = W^T sum u; grad_scale_tril = tril(W^T S) - diag(sum g / L_ii). S is symmetric: its lower triangle is
// enough, since row a >= i >= j.
template <class T>
void backward_leaves(const GaussianBackwardParams<T>& p, int64_t begin, int64_t end) {
  const GaussianSize& s = p.size;
  const int D = s.dims, rows = int(gaussian_rows(s));
  for (int64_t k = begin; k < end; ++k) {
    const T* second = gather_moments(moments_begin(p), s, k);
    const T *mean = second + int64_t(rows) * rows, *count = mean + rows;
    const T* back = p.leaves.whiten + (2 * k + 1) * D * D;
    each_block(D, [&](auto block, int j0) {
      constexpr int R = decltype(block)::value;
      const T* w = back + backward_block(j0, D);
      if (p.grad_mean)
        for (int r = 0; r < R; ++r) {
          T total = 0;
          for (int i = j0 + r; i < D; ++i) total += w[(i - j0) * R + r] * mean[i];
          p.grad_mean[k * D + j0 + r] = total;
        }
      if (p.grad_scale_tril) {
        alignas(64) T row[R][kMostDims] = {};
        for (int a = j0; a < D; ++a) {
          const T *from = second + int64_t(a) * rows, *of = w + (a - j0) * R;
          const int columns = std::min(a, j0 + R - 1) + 1;
          for (int j = 0; j < columns; ++j)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) row[r][j] += of[r] * from[j];
        }
        for (int r = 0; r < R; ++r) {
          const int i = j0 + r;
          T* out = p.grad_scale_tril + (k * D + i) * D;
          std::copy(row[r], row[r] + i + 1, out);
          std::fill(out + i + 1, out + D, T(0));
          out[i] -= *count / p.leaves.scale_tril[(k * D + i) * D + i];
        }
      }
    });
  }
}

// Second moments as products of s = sqrt(r) d: one panel serves both factors.
template <class T>
void statistics(const GaussianStatisticsParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const GaussianSize& s = p.size;
  const GaussianGrid grid(s);
  const int D = s.dims, rows = int(gaussian_rows(s));
  Buffer<T> roots(kLeafGroup * kChunk), scaled(int64_t(rows) * kChunk);
  std::fill(scaled + int64_t(D) * kChunk, scaled + int64_t(rows) * kChunk, T(0));
  for (int64_t index = begin; index < end; ++index) {
    const Task task(grid, index);
    const int64_t first = task.first_group * kLeafGroup, last = std::min(s.leaves, task.last_group * kLeafGroup);
    std::fill(moments_of(p.scratch, s, task.sample_range, first), moments_of(p.scratch, s, task.sample_range, last),
              T(0));
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const int64_t first_sample = chunk * kChunk;
      const int samples = int(std::min<int64_t>(kChunk, s.samples - first_sample));
      const int padded = (samples + kPanel - 1) / kPanel * kPanel;
      const T* panels = p.x + first_sample * D;
      for (int64_t k = first; k < last; ++k) {
        if (k % kLeafGroup == 0) load_group<T>(p.posterior, s.leaves, k, first_sample, samples, roots);
        const T *root = roots + k % kLeafGroup * kChunk, *mean = p.leaves.mean + k * D;
        T* second = moments_of(p.scratch, s, task.sample_range, k);
        T *of_mean = second + int64_t(rows) * rows, *count = of_mean + rows;
        Vector<T> weights{};
        for (int n = 0; n < padded; n += L) weights += load(root + n) * load(root + n);
        const T weight = sum<T>(weights);
        *count += weight;
        if (weight == T(0)) continue;
        for (int j = 0; j < D; ++j) {
          Vector<T> total[4] = {};
          for (int n = 0; n < padded; n += 4 * L) {
            const T* from = panels + (int64_t(n / kPanel) * D + j) * kPanel + n % kPanel;
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
              const Vector<T> q = load(root + n + v * L);
              const Vector<T> at = (load(from + v * L) - mean[j]) * q;
              store(scaled + j * kChunk + n + v * L, at);
              total[v] += at * q;
            }
          }
          of_mean[j] += sum<T>((total[0] + total[1]) + (total[2] + total[3]));
        }
        product_triangle<T>(scaled, scaled, padded, rows, second);
      }
    }
  }
}

template <class T>
void statistics_leaves(const GaussianStatisticsParams<T>& p, int64_t begin, int64_t end) {
  const GaussianSize& s = p.size;
  const int D = s.dims, rows = int(gaussian_rows(s));
  for (int64_t k = begin; k < end; ++k) {
    const T* second = gather_moments(p.scratch, s, k);
    const T* mean = second + int64_t(rows) * rows;
    p.count[k] = mean[rows];
    std::copy(mean, mean + D, p.first + k * D);
    T* out = p.second + k * D * D;
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) out[i * D + j] = out[j * D + i] = second[int64_t(i) * rows + j];
  }
}

}  // namespace

template <class T>
const GaussianCpu<T>& gaussian_cpu() {
  static constexpr GaussianCpu<T> table{
      pack<T>,       whiten<T>,          log_prob<T>,   mixture<T>,          backward<T>,
      backward_x<T>, backward_leaves<T>, statistics<T>, statistics_leaves<T>};
  return table;
}
template const GaussianCpu<float>& gaussian_cpu<float>();
template const GaussianCpu<double>& gaussian_cpu<double>();

}  // namespace FF_ISA
}  // namespace ff
