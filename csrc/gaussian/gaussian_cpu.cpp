// CPU kernels of the gaussian room. Compiled once per instruction set (FF_ISA): every helper has internal linkage.
//
// Lanes go over samples: x stands in panels [D][64], and for one leaf d = x - m, z = W d and |z|^2 never leave the
// registers and L1; at most kFewDims dimensions have kernels of their own. Differences come first: W x - W m would
// cancel where a leaf is narrow and far from the origin. FLOPs a sample and leaf: D^2 + 5 D forward; 3 D^2 + 7 D more
// for all gradients (z again, W^T z, sum g z z^T); D^2 + 5 D for the moments of EM. The triangle is exact: blocks of
// kRows rows of W, a block's own corner unrolled.
//
// Their loops take half a load from L1 for a multiply-add, and reach 75 to 90 % of the FMA peak, as a large GEMM does.
// Around them, at D 20, elementwise work cost as much again; it therefore stands where arithmetic hides it:
// differences, products with g or sqrt(r) and first moments in the corners.
#include "gaussian/gaussian_cpu.h"
#include "gaussian/gaussian_few.h"

namespace ff {
namespace FF_ISA {
namespace {

// W in blocks: forward, [rows i0..i0+3] x [columns 0..i0+3], column by column; backward, the same of W^T.
FF_INLINE int64_t forward_block(int i0) { return int64_t(i0) / 2 * (i0 / 4 + 1) * 4; }
FF_INLINE int64_t backward_block(int j0, int dims) { return int64_t(j0) * dims - int64_t(j0) / 2 * (j0 - 4); }

// z_i = sum_{j <= i} W_ij d_j, d = used(vector, x - m), for rows i0..i0+R-1 and a strip of samples; x [D][kPanel].
// d [D][kStrip] holds the rows before, and these rows after.
template <class T, int R, class Used>
FF_INLINE void whitened_rows(const T* w, const T* x, const T* mean, T* d, int i0, Vector<T> (&z)[R][kVectors],
                             const Used& used) {
  for (auto& row : z)
    for (auto& v : row) v = Vector<T>{};
  for (int j = 0; j < i0; ++j, w += R, d += kStrip<T>) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(d + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) z[r][v] += w[r] * at[v];
  }
  x += i0 * kPanel;
  mean += i0;
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c, w += R, d += kStrip<T>) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      at[v] = used(v, load(x + c * kPanel + v * kLanes<T>) - mean[c]);
      store(d + v * kLanes<T>, at[v]);
    }
#pragma GCC unroll 4
    for (int r = c; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) z[r][v] += w[r] * at[v];
  }
}

// y_j += g sum_{i >= j} W_ij z_i for j0..j0+R-1; y [.][kPanel], z [D][kRow] from row j0 on.
template <class T, int R>
FF_INLINE void unwhitened_rows(const T* w, const T* z, const T* g, T* y, int rows) {
  Vector<T> sum[R][kVectors] = {};
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c, w += R, z += kRow) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(z + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r <= c; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w[r] * at[v];
  }
  for (int i = R; i < rows; ++i, w += R, z += kRow) {
    Vector<T> at[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) at[v] = load(z + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w[r] * at[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vector<T> factor = load(g + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* to = y + r * kPanel + v * kLanes<T>;
      store(to, load(to) + factor * sum[r][v]);
    }
  }
}

template <class T>
void pack(const GaussianSize& s, const T* x, T* panels, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int D = s.dims;
  for (int64_t p = begin; p < end; ++p) {
    T* panel = panels + p * D * kPanel;
    const T* from = x + p * kPanel * D;
    const int count = int(std::min<int64_t>(kPanel, s.samples - p * kPanel));
    for (int n = 0; n < kPanel; n += L)
      for (int j = 0; j < D; j += L) {
        const int columns = std::min(L, D - j);
        Vector<T> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          rows[i] = n + i < count ? load_partial(from + int64_t(n + i) * D + j, columns) : Vector<T>{};
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (i < columns) store(panel + (j + i) * kPanel + n, rows[i]);
      }
  }
}

// Squared condition number (of L, by Frobenius norms, over D^2) from which few dimensions are worked out in double.
constexpr double kWellConditioned = 64;

// W = L^-1 by rows: W_i = (e_i - sum_{k < i} L_ik W_k) / L_ii, in double.
template <class T>
void whiten(const GaussianSize& s, const GaussianLeaves<T>& leaves, bool gradients, int64_t begin, int64_t end) {
  const int D = s.dims;
  constexpr int kBlock = 4, L = kLanes<double>;  // vectors of a row at a time
  const int width = (D + kBlock * L - 1) / (kBlock * L) * (kBlock * L);
  Buffer<double> inverse(int64_t(D) * width);
  std::fill(+inverse, inverse + int64_t(D) * width, 0.0);
  for (int64_t k = begin; k < end; ++k) {
    const T* tril = leaves.scale_tril + k * D * D;
    double logs = 0, product = 1;
    bool positive = true;
    for (int i = 0; i < D; ++i) {
      double* row = inverse + int64_t(i) * width;
      const double diagonal = tril[i * D + i], factor = 1 / diagonal;
      positive &= diagonal > 0;
      product *= diagonal;  // few logarithms: of products that are far from over- and underflow
      if (!(product > 1e-100 && product < 1e100) || i == D - 1) logs += std::log(product), product = 1;
      for (int first = 0; first < i; first += kBlock * L) {
        DoubleVector total[kBlock] = {};
        for (int a = first; a < i; ++a) {
          const double l = tril[i * D + a];
#pragma GCC unroll 4
          for (int v = 0; v < kBlock; ++v) total[v] += l * load(inverse + int64_t(a) * width + first + v * L);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kBlock; ++v) store(row + first + v * L, -factor * total[v]);
      }
      row[i] = factor;
    }
    leaves.log_norm[k] = positive ? T(gaussian_log_norm(logs, D)) : T(NAN);
    const int64_t size = gaussian_block_size(D);
    T* forward = leaves.whiten + k * gaussian_whiten_size(D, gradients);
    T* other = forward + size;
    double of_w = 0, of_l = 0;
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) {
        double& w = inverse[int64_t(i) * width + j];
        w = gaussian_finite<T>(w);
        of_w += w * w;
        of_l += double(tril[i * D + j]) * tril[i * D + j];
      }
    const bool careful = sizeof(T) == 4 && D <= kCarefulDims && !(of_w * of_l < kWellConditioned * D * D);
    forward[size - 1] = careful;
    if (leaves.lanes) {
      T* at = leaves.lanes + k / kLeafGroup * gaussian_lane_fields(D) * kLeafGroup + k % kLeafGroup;
      const auto put = [&](double value) {
        *at = T(value);
        at += kLeafGroup;
      };
      for (int j = 0; j < D; ++j) put(leaves.mean[k * D + j]);
      for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j) put(inverse[int64_t(i) * width + j]);
      put(leaves.log_norm[k]);
      put(careful);
      for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j) put(inverse[int64_t(i) * width + j] - double(T(inverse[int64_t(i) * width + j])));
    }
    each_block(D, [&](auto rows, int i0) {
      constexpr int R = decltype(rows)::value;
      for (int j = 0; j < i0 + R; ++j)
        for (int r = 0; r < R; ++r) {
          const double w = j <= i0 + r ? inverse[int64_t(i0 + r) * width + j] : 0;
          *forward++ = T(w);
          if (!gradients && D <= kCarefulDims) *other++ = T(w - double(T(w)));
        }
      if (gradients)
        for (int i = i0; i < D; ++i)
          for (int r = 0; r < R; ++r) *other++ = i >= i0 + r ? T(inverse[int64_t(i) * width + i0 + r]) : T(0);
    });
  }
}

// -|z|^2 / 2 + log_norm of a strip in double: where D is small, the cancellation inside z is all of the result's error
// (condition number 1e6, D 2: 3e-5 of the log density in float32).
FF_INLINE void careful_squares(const float* panel, const float* mean, const float* w, float log_norm, int dims,
                               float* out) {
  typedef float Half __attribute__((vector_size(FF_VECTOR_BYTES / 2)));
  constexpr int L = kLanes<double>;
  if (dims > kCarefulDims) __builtin_unreachable();
  double full[kCarefulDims * kCarefulDims];
  const float* remainder = w + gaussian_block_size(dims);
  each_block(dims, [&](auto rows, int i0) __attribute__((always_inline)) {
    for (int j = 0; j < i0 + rows.value; ++j)
      for (int r = 0; r < rows.value; ++r) full[(i0 + r) * kCarefulDims + j] = double(*w++) + double(*remainder++);
  });
  for (int n = 0; n < kStrip<float>; n += L) {
    DoubleVector d[kCarefulDims], squares{};
    for (int i = 0; i < dims; ++i) {
      Half at;
      __builtin_memcpy(&at, panel + i * kPanel + n, sizeof(at));
      d[i] = __builtin_convertvector(at, DoubleVector) - double(mean[i]);
      DoubleVector z = full[i * kCarefulDims + i] * d[i];
      for (int j = 0; j < i; ++j) z += full[i * kCarefulDims + j] * d[j];
      squares += z * z;
    }
    const Half result = __builtin_convertvector(double(log_norm) - 0.5 * squares, Half);
    __builtin_memcpy(out + n, &result, sizeof(result));
  }
}

template <class T>
void log_prob(const GaussianLogProbParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int D = p.size.dims;
  if (D <= kFewDims)
    return each_block(D, [&](auto dims, int) {
      const int64_t first = begin * kPanel, last = std::min(end * kPanel, p.size.samples);
      if constexpr (sizeof(T) == 4)
        if (any_careful(p)) return few_dims<T, dims.value, true>(p, first, last);
      few_dims<T, dims.value, false>(p, first, last);
    });
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
        const T *w = p.leaves.whiten + k * gaussian_whiten_size(D, false), *mean = p.leaves.mean + k * D;
        // A group's part of a row is a line or two: asked for during the work, few at a time, it is there when stored.
        for (int n = strip + l; n < std::min(strip + kStrip<T>, samples); n += leaves)
          __builtin_prefetch(p.log_prob + (first_sample + n) * K + first_leaf, 1);
        T* out = tile + l * kPanel + strip;
        if constexpr (sizeof(T) == 4)
          if (w[gaussian_block_size(D) - 1] != 0) {
            careful_squares(panel + strip, mean, w, p.leaves.log_norm[k], D, out);
            continue;
          }
        Vector<T> squares[kVectors] = {};
        each_block(D, [&](auto rows, int i0) __attribute__((always_inline)) {
          Vector<T> z[rows.value][kVectors];
          whitened_rows<T, rows.value>(w + forward_block(i0), panel + strip, mean, d, i0, z,
                                       [](int, Vector<T> at) __attribute__((always_inline)) { return at; });
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) squares[v] += z[r][v] * z[r][v];
        });
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + v * L, gaussian_log_density(p.leaves.log_norm[k], squares[v]));
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

// A responsibility whose root is below this, beside the sample's largest, is no part of a sum in this precision.
template <class T>
constexpr T kNoRoot = sizeof(T) == 4 ? T(1e-16) : T(1e-120);

// Three passes over a row that stands in L1: a = log w + log N and its maximum, exponentials, posteriors.
template <class T>
void mixture(const GaussianMixtureParams<T>& p, bool roots, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t K = p.size.leaves, whole = K / L * L;
  const int rest = int(K - whole);
  const FlushSubnormals flush;
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
      Vector<T> e = exp_down((load(row + k) - shift) * scale);
      if (roots) e = e < kNoRoot<T> ? Vector<T>{} : e;
      store(row + k, e);
      total += roots ? e * e : e;
    }
    if (rest) {
      Vector<T> e = exp_down((load_partial(row + whole, rest, T(-INFINITY)) - shift) * scale);
      if (roots) e = e < kNoRoot<T> ? Vector<T>{} : e;
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

// Values [N, K] of one leaf group and one chunk of samples as [kLeafGroup][kRow]; 0 where there is no sample or leaf.
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
      for (int i = 0; i < L; ++i) store(tile + (l + i) * kRow + n, rows[i]);
    }
}

// Asks for what `load_group` will read after leaf k, the next group's or the next chunk's, a part with every leaf:
// short pieces of far rows, which the hardware does not foresee.
template <class T>
FF_INLINE void fetch_group(const T* values, int64_t K, const Task& task, int64_t k, int64_t first_sample) {
  constexpr int kPart = kChunk / kLeafGroup;
  int64_t leaf = (k / kLeafGroup + 1) * kLeafGroup;
  if (leaf >= task.last_group * kLeafGroup || leaf >= K) leaf = task.first_group * kLeafGroup, first_sample += kChunk;
  const T* from = values + (first_sample + k % kLeafGroup * kPart) * K + leaf;
  for (int n = 0; n < kPart; ++n) __builtin_prefetch(from + n * K, 0, 2);
}

// Sums over samples of kRows x kColumns products: out[i][j] += sum_n a_i b_j; a, b [.][kRow], out rows of `width`.
template <class T>
FF_INLINE void product_tile(const T* a, const T* b, int samples, T* out, int64_t width) {
  Vector<T> total[kRows * kColumns] = {};
  for (int n = 0; n < samples; n += kLanes<T>) {
    Vector<T> left[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load(a + i * kRow + n);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const Vector<T> right = load(b + j * kRow + n);
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

// One block of kRows rows: rows_at(n, a, b, total) makes a vector of samples of them, keeps what tiles need and adds to
// their sums. With kCorners their products with each other, up to the diagonal, are taken on the way.
template <class T, class Rows>
FF_INLINE void product_corner(int samples, T* first, T* out, int64_t width, const Rows& rows_at) {
  constexpr int kCorner = kCorners ? kRows * (kRows + 1) / 2 : 0, L = kLanes<T>;
  constexpr int kSums = (kRows + kCorner + L - 1) / L * L;
  Vector<T> total[kSums] = {};
  for (int n = 0; n < samples; n += L) {
    Vector<T> a[kRows], b[kRows];
    rows_at(n, a, b, total);
    if constexpr (kCorners) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j <= i; ++j) total[kRows + i * (i + 1) / 2 + j] += a[i] * b[j];
    }
  }
  alignas(64) T result[kSums];
  sums<T>(total, result);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    first[i] += result[i];
    if constexpr (kCorners)
#pragma GCC unroll 4
      for (int j = 0; j <= i; ++j) out[i * width + j] += result[kRows + i * (i + 1) / 2 + j];
  }
}

template <class T>
void backward(const GaussianBackwardParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const GaussianSize& s = p.size;
  const GaussianGrid grid(s);
  const int D = s.dims, rows = int(gaussian_rows(s));
  const bool of_leaves = p.grad_mean || p.grad_scale_tril;
  const FlushSubnormals flush;
  alignas(64) T d[kMostDims * kStrip<T>];
  Buffer<T> grads(kLeafGroup * kRow), z(int64_t(rows) * kRow), u(kRows * kRow);
  std::fill(z + int64_t(D) * kRow, z + int64_t(rows) * kRow, T(0));
  for (int64_t index = begin; index < end; ++index) {
    const Task task(grid, index);
    const int64_t first = task.first_group * kLeafGroup, last = std::min(s.leaves, task.last_group * kLeafGroup);
    if (of_leaves)
      std::fill(moments_of(moments_begin(p), s, task.sample_range, first),
                moments_of(moments_begin(p), s, task.sample_range, last), T(0));
    if (D <= kFewDims) {
      each_block(D, [&](auto dims, int) { few_dims_task<T, dims.value>(p, task, of_leaves); });
      continue;
    }
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const int64_t first_sample = chunk * kChunk;
      const int samples = int(std::min<int64_t>(kChunk, s.samples - first_sample));
      const int padded = (samples + kPanel - 1) / kPanel * kPanel;
      const T* panels = p.x + first_sample * D;
      T* grad_x = p.grad_x ? p.scratch + (task.leaf_range * panels_of(s) * kPanel + first_sample) * D : nullptr;
      if (grad_x) std::fill(grad_x, grad_x + int64_t(padded) * D, T(0));
      for (int64_t k = first; k < last; ++k) {
        if (k % kLeafGroup == 0) load_group<T>(p.grad, s.leaves, k, first_sample, samples, grads);
        fetch_group(p.grad, s.leaves, task, k, first_sample);
        const T* grad = grads + k % kLeafGroup * kRow;
        const T* forward = p.leaves.whiten + k * gaussian_whiten_size(D, true);
        const T* back = forward + gaussian_block_size(D);
        T* second = of_leaves ? moments_of(moments_begin(p), s, task.sample_range, k) : nullptr;
        // 1. z of the chunk, and grad_x while it is in L1
        for (int n = 0; n < padded; n += kStrip<T>) {
          const int64_t panel = int64_t(n / kPanel) * kPanel * D + n % kPanel;
          Vector<T> g[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) g[v] = load(grad + n + v * L);
          const auto used = [&](int v, Vector<T> at) __attribute__((always_inline)) { return gaussian_used(g[v], at); };
          each_block(D, [&](auto block, int i0) __attribute__((always_inline)) {
            Vector<T> zs[block.value][kVectors];
            whitened_rows<T, block.value>(forward + forward_block(i0), panels + panel, p.leaves.mean + k * D, d, i0, zs,
                                          used);
#pragma GCC unroll 4
            for (int r = 0; r < block.value; ++r)
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) store(z + (i0 + r) * kRow + n + v * L, zs[r][v]);
          });
          if (grad_x)
            each_block(D, [&](auto block, int j0) __attribute__((always_inline)) {
              unwhitened_rows<T, block.value>(back + backward_block(j0, D), z + j0 * kRow + n, grad + n,
                                              grad_x + panel + j0 * kPanel, D - j0);
            });
        }
        if (!of_leaves) continue;
        // 2. sum g, sum u, sum u z^T, where u = g z
        T *mean = second + int64_t(rows) * rows, *count = mean + rows;
        Vector<T> total{};
        for (int n = 0; n < padded; n += L) total += load(grad + n);
        *count += sum<T>(total);
        for (int i = 0; i < rows; i += kRows) {
          const T* at = z + i * kRow;
          T* out = second + int64_t(i) * rows;
          product_corner<T>(padded, mean + i, out + i, rows,
                            [&](int n, Vector<T>(&a)[kRows], Vector<T>(&b)[kRows], Vector<T>* sums)
                                __attribute__((always_inline)) {
                                  const Vector<T> g = load(grad + n);
#pragma GCC unroll 4
                                  for (int r = 0; r < kRows; ++r) {
                                    b[r] = load(at + r * kRow + n);
                                    a[r] = g * b[r];
                                    store(u + r * kRow + n, a[r]);
                                    sums[r] += a[r];
                                  }
                                });
          if (p.grad_scale_tril)
            for (int j = 0; j < (kCorners ? i : i + kRows); j += kColumns)
              product_tile<T>(u, z + j * kRow, padded, out + j, rows);
        }
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
    const T* back = p.leaves.whiten + k * gaussian_whiten_size(D, true) + gaussian_block_size(D);
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

// Second moments as products of s = sqrt(r) d: one panel serves both factors. Vectors of samples that are no part of a
// leaf are left out: in many dimensions a sample belongs to few leaves.
template <class T>
void statistics(const GaussianStatisticsParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const GaussianSize& s = p.size;
  const GaussianGrid grid(s);
  const int D = s.dims, rows = int(gaussian_rows(s));
  const FlushSubnormals flush;
  Buffer<T> roots(kLeafGroup * kRow), scaled(int64_t(rows) * kRow), root(kChunk);
  for (int64_t index = begin; index < end; ++index) {
    const Task task(grid, index);
    const int64_t first = task.first_group * kLeafGroup, last = std::min(s.leaves, task.last_group * kLeafGroup);
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const int64_t first_sample = chunk * kChunk;
      const int samples = int(std::min<int64_t>(kChunk, s.samples - first_sample));
      const T* panels = p.x + first_sample * D;
      for (int64_t k = first; k < last; ++k) {
        if (k % kLeafGroup == 0) load_group<T>(p.posterior, s.leaves, k, first_sample, samples, roots);
        fetch_group(p.posterior, s.leaves, task, k, first_sample);
        const T *all = roots + k % kLeafGroup * kRow, *mean = p.leaves.mean + k * D;
        // 1. which vectors take part, and their roots
        const T* from[kChunk / L];
        int vectors = 0;
        Vector<T> weights{};
        for (int n = 0; n < samples; n += L) {
          const Vector<T> q = load(all + n);
          if (all_zero<T>(q)) continue;
          store(root + vectors * L, q);
          weights += q * q;
          from[vectors++] = panels + int64_t(n / kPanel) * D * kPanel + n % kPanel;
        }
        if (!vectors) continue;
        // 2. s, the first and the second moments
        T* second = moments_of(p.scratch, s, task.sample_range, k);
        T *of_mean = second + int64_t(rows) * rows, *count = of_mean + rows;
        *count += sum<T>(weights);
        each_block(D, [&](auto block, int i) {
          T *at = scaled + i * kRow, *out = second + int64_t(i) * rows;
          product_corner<T>(
              vectors * L, of_mean + i, out + i, rows,
              [&](int n, Vector<T>(&a)[kRows], Vector<T>(&b)[kRows], Vector<T>* sums) __attribute__((always_inline)) {
                const Vector<T> q = load(root + n);
                const T* x = from[n / L] + i * kPanel;
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                  a[r] = b[r] = r < block.value ? (load(x + r * kPanel) - mean[i + r]) * q : Vector<T>{};
                  store(at + r * kRow + n, a[r]);
                  sums[r] += a[r] * q;
                }
              });
          for (int j = 0; j < (kCorners ? i : i + kRows); j += kColumns)
            product_tile<T>(at, scaled + j * kRow, vectors * L, out + j, rows);
        });
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
