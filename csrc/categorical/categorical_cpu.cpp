// CPU kernels of the categorical room, compiled once for every instruction set.
//
// Floor: 2 N T L C flops for yhat and as many for what follows it (the leaves' sums, or the gradient of the weights);
// memory is read once, and nothing of size N T C is kept. A tile of classes, at most kWide vectors, is packed
// [L, tile] and stays in the cache; over it pass blocks of samples: yhat of a block is a small matrix product, its
// slopes a pass over the block, and the second product takes the slopes from the L1 cache. One register-tiled
// product serves all three: kRows x V vectors of sums, a broadcast and V loads for every kRows V multiply-adds.
#include <new>
#include <type_traits>

#include "categorical/categorical.h"
#include "common/simd.h"

namespace ff {
namespace FF_ISA {
namespace {

constexpr int kWide = FF_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a tile (32 or 16 registers)
template <int V>
constexpr int kRows = V == kWide ? 6 : 8;  // rows of a register tile

// Cache-line aligned scratch.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(sizeof(T) * (n > 0 ? n : 1), kAlign))) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// out[m, :] (+)= sum_k a[m, k] b[k, :] for M rows and V vectors, of whose last only `tail` lanes are kept.
template <class T, int V, int M, bool kAdd, bool kTail>
FF_INLINE void micro(const T* __restrict__ a, int64_t a_row, int64_t a_step, const T* __restrict__ b, int64_t b_step,
                     int64_t depth, T* __restrict__ out, int64_t out_row, int tail) {
  constexpr int L = kLanes<T>;
  Vector<T> acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const T* at = out + m * out_row + v * L;
      acc[m][v] = !kAdd ? Vector<T>{} : kTail && v == V - 1 ? load_partial(at, tail) : load(at);
    }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector<T> column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<T> f = broadcast<T>(a[m * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += f * column[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* at = out + m * out_row + v * L;
      if (kTail && v == V - 1)
        store_partial(at, acc[m][v], tail);
      else
        store(at, acc[m][v]);
    }
}

template <class T, int V, bool kAdd, bool kTail = false>
void product(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t depth, T* out,
             int64_t out_row, int64_t rows, int tail = 0) {
  for (; rows >= kRows<V>; rows -= kRows<V>, a += kRows<V> * a_row, out += kRows<V> * out_row)
    micro<T, V, kRows<V>, kAdd, kTail>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
  if (rows & 4) {
    micro<T, V, 4, kAdd, kTail>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
    a += 4 * a_row, out += 4 * out_row;
  }
  if (rows & 2) {
    micro<T, V, 2, kAdd, kTail>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
    a += 2 * a_row, out += 2 * out_row;
  }
  if (rows & 1) micro<T, V, 1, kAdd, kTail>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
}

// y / v for v in [least normal, 2^126): a refined reciprocal, within an ulp, at a third of the cost of the division.
FF_INLINE FloatVector divide(FloatVector y, FloatVector v) {
#if defined(__AVX512F__)
  FloatVector r = (FloatVector)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  r = r + r * (1.f - v * r);
  const FloatVector q = y * r;
  return q + (y - q * v) * r;
#else
  return y / v;
#endif
}
FF_INLINE DoubleVector divide(DoubleVector y, DoubleVector v) { return y / v; }

// categorical_math.h's class_term, over lanes.
template <class T>
struct Terms {
  Vector<T> loss, slope;
};
template <CategoricalKind kKind, bool kLoss, class T>
FF_INLINE Terms<T> class_terms(Vector<T> y, Vector<T> yhat, T eps, T threshold) {
  y = y + (y - y);
  const Vector<T> v = yhat + (yhat - yhat);
  if constexpr (kKind == CategoricalKind::l2) {
    const Vector<T> d = y <= broadcast<T>(threshold) ? v - v : y - v;
    return {d * d, d + d};
  } else {
    y = y <= broadcast<T>(threshold) ? Vector<T>{} : y;
    const auto low = v < broadcast<T>(eps);
    const Vector<T> floored = low ? broadcast<T>(eps) : v, ratio = divide(y, floored);
    Vector<T> loss{};
    if constexpr (kLoss) loss = y == Vector<T>{} ? v - v : y * log(ratio);
    return {loss, low ? Vector<T>{} : ratio};
  }
}

// The tiles of the classes, of nearly equal width.
template <class T>
struct Tiles {
  int64_t vectors, count;
  explicit Tiles(int64_t classes)
      : vectors((classes + kLanes<T> - 1) / kLanes<T>), count((vectors + kWide - 1) / kWide) {}
  int64_t begin(int64_t tile) const { return tile * vectors / count; }  // in vectors
  int width(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

// Calls f with the number of vectors as a constant.
template <class F>
FF_INLINE void with_width(int vectors, F f) {
  if constexpr (kWide == 4) {
    if (vectors == 4) return f(std::integral_constant<int, 4>{});
    if (vectors == 3) return f(std::integral_constant<int, 3>{});
  }
  if (vectors == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

template <class F>
FF_INLINE void with_kind(CategoricalKind kind, F f) {
  switch (kind) {
    case CategoricalKind::kl: return f(std::integral_constant<CategoricalKind, CategoricalKind::kl>{});
    case CategoricalKind::l2: return f(std::integral_constant<CategoricalKind, CategoricalKind::l2>{});
    default: return f(std::integral_constant<CategoricalKind, CategoricalKind::log_prob>{});
  }
}

// packed[l, :] = leaves[l, begin ...], zeros behind the last class.
template <class T, int V>
void pack(const T* leaves, int64_t classes, int64_t count, int rest, T* packed) {
  for (int64_t l = 0; l < count; ++l, leaves += classes, packed += V * kLanes<T>)
    for (int v = 0; v < V; ++v) {
      const int left = rest - v * kLanes<T>;
      store(packed + v * kLanes<T>, left >= kLanes<T> ? load(leaves + v * kLanes<T>)
                                                      : load_partial(leaves + v * kLanes<T>, left > 0 ? left : 0));
    }
}

template <class T>
FF_INLINE Vector<T> load_class(const T* row, int v, int rest) {
  const int left = rest - v * kLanes<T>;
  return left >= kLanes<T> ? load(row + v * kLanes<T>) : load_partial(row + v * kLanes<T>, left > 0 ? left : 0);
}

template <class T>
void transpose(const CategoricalMixture<T>& m, T* transposed, int64_t begin, int64_t end) {
  constexpr int kBlock = 16;
  const Tiles<T> tiles(m.classes);
  const int64_t padded = categorical_padded(m.count, kLanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tree = item / tiles.count, tile = item % tiles.count;
    const int64_t first = tiles.begin(tile) * kLanes<T>;
    const int64_t last = min(m.classes, tiles.begin(tile + 1) * kLanes<T>);
    const T* q = m.leaves + tree * m.count * m.classes;
    T* out = transposed + tree * m.classes * padded;
    for (int64_t l0 = 0; l0 < padded; l0 += kBlock)
      for (int64_t c = first; c < last; ++c)
        for (int64_t l = l0; l < min(padded, l0 + kBlock); ++l)
          out[c * padded + l] = l < m.count ? q[l * m.classes + c] : T(0);
  }
}

// One tile of classes of one tree for samples [begin, end): yhat in `slopes`, then what is asked.
template <class T, int V>
void rows_tile(const CategoricalRowsParams<T>& a, int64_t tree, int64_t first, int rest, int64_t begin, int64_t end,
               const T* packed, T* slopes) {
  constexpr int L = kLanes<T>, W = V * L;
  const CategoricalMixture<T>& m = a.mixture;
  const int64_t row = m.trees * m.count, padded = categorical_padded(m.count, L);
  const int classes = min(rest, W);
  for (int64_t n0 = begin; n0 < end; n0 += kCategoricalBlock) {
    const int64_t samples = min(int64_t(kCategoricalBlock), end - n0);
    product<T, V, false>(m.weight + n0 * row + tree * m.count, row, 1, packed, W, m.count, slopes, W, samples);

    if (a.log_prob) {
      for (int64_t n = 0; n < samples; ++n) {
        T* out = a.log_prob + ((n0 + n) * m.trees + tree) * m.classes + first;
        for (int v = 0; v < V; ++v) {
          Vector<T> x = load(slopes + n * W + v * L) * m.scale;
          x = x + (x - x);
          x = log(x < broadcast<T>(m.eps) ? broadcast<T>(m.eps) : x);
          const int left = rest - v * L;
          if (left >= L)
            store(out + v * L, x);
          else
            store_partial(out + v * L, x, left);
        }
      }
      continue;
    }

    const auto terms = [&](auto kind, auto with_loss) {
      const Vector<T> factor = broadcast<T>(a.sign * m.scale);
      for (int64_t n = 0; n < samples; ++n) {
        const T* y = a.numerator.data + (n0 + n) * a.numerator.sample + tree * a.numerator.tree + first;
        Vector<T> loss{};
        for (int v = 0; v < V; ++v) {
          T* at = slopes + n * W + v * L;
          const Terms<T> t = class_terms<kind(), with_loss(), T>(load_class(y, v, rest), load(at) * m.scale, m.eps,
                                                                 a.numerator.threshold);
          loss += t.loss;
          store(at, t.slope * factor);
        }
        // Lanes behind the last class hold y = 0, yhat = 0: they add nothing.
        if constexpr (with_loss()) {
          T& total = a.loss[(n0 + n) * m.trees + tree];
          total = (first ? total : T(0)) + sum<T>(loss);
        }
      }
    };
    with_kind(a.numerator.kind, [&](auto kind) {
      if (a.loss)
        terms(kind, std::true_type{});
      else
        terms(kind, std::false_type{});
    });

    if (!a.grad_weight) continue;
    T* grad = a.grad_weight + n0 * row + tree * m.count;
    const T* q = a.transposed + (tree * m.classes + first) * padded;
    for (int64_t l = 0; l < padded; l += kWide * L) {
      const int tail = int(m.count - l) % L;
      const bool partial = tail && l + kWide * L >= padded;
      with_width(int(min(int64_t(kWide), (padded - l) / L)), [&](auto width) {
        const auto run = [&](auto add, auto cut) {
          product<T, width(), add(), cut()>(slopes, W, 1, q + l, padded, classes, grad + l, row, samples, tail);
        };
        if (partial)
          first ? run(std::true_type{}, std::true_type{}) : run(std::false_type{}, std::true_type{});
        else
          first ? run(std::true_type{}, std::false_type{}) : run(std::false_type{}, std::false_type{});
      });
    }
  }
}

template <class T>
void rows(const CategoricalRowsParams<T>& a, int64_t samples, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const CategoricalMixture<T>& m = a.mixture;
  const Tiles<T> tiles(m.classes);
  const int64_t ranges = (m.samples + samples - 1) / samples;
  Buffer<T> packed(m.count * kWide * L), slopes(kCategoricalBlock * kWide * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tree = item / ranges, n0 = item % ranges * samples, n1 = min(m.samples, n0 + samples);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t first = tiles.begin(tile) * L;
      const int rest = int(min(m.classes - first, int64_t(kWide) * L));
      with_width(tiles.width(tile), [&](auto width) {
        pack<T, width()>(m.leaves + tree * m.count * m.classes + first, m.classes, m.count, rest, packed.data());
        rows_tile<T, width()>(a, tree, first, rest, n0, n1, packed.data(), slopes.data());
      });
    }
  }
}

// Whether n values are all finite.
template <class T>
bool finite(const T* x, int64_t n) {
  Vector<T> odd{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vector<T> v = load(x + i);
    odd += v - v;
  }
  const Vector<T> v = load_partial(x + i, int(n - i));
  odd += v - v;
  return sum<T>(odd) == T(0);
}

template <class T>
void sound(const T* target, int64_t classes, uint8_t* out, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) out[n] = finite(target + n * classes, classes);
}

template <class T, int V>
void leaves_tile(const CategoricalLeavesParams<T>& a, int64_t tree, int64_t first, int rest, int64_t begin,
                 int64_t end, const T* packed, T* slopes, T* sums) {
  constexpr int L = kLanes<T>, W = V * L;
  const CategoricalMixture<T>& m = a.mixture;
  const int64_t row = m.trees * m.count;
  for (int64_t i = 0; i < m.count * W; i += L) store(sums + i, Vector<T>{});
  for (int64_t n0 = begin; n0 < end; n0 += kCategoricalBlock) {
    const int64_t samples = min(int64_t(kCategoricalBlock), end - n0);
    const T* weight = m.weight + n0 * row + tree * m.count;
    product<T, V, false>(weight, row, 1, packed, W, m.count, slopes, W, samples);
    Vector<T> odd{};
    with_kind(a.numerator.kind, [&](auto kind) {
      for (int64_t n = 0; n < samples; ++n) {
        const T* y = a.numerator.data + (n0 + n) * a.numerator.sample + tree * a.numerator.tree + first;
        const Vector<T> factor = broadcast<T>(a.factor ? a.factor[(n0 + n) * m.trees + tree] : T(1));
        for (int v = 0; v < V; ++v) {
          T* at = slopes + n * W + v * L;
          const Vector<T> slope = class_terms<kind(), false, T>(load_class(y, v, rest), load(at) * m.scale, m.eps,
                                                                a.numerator.threshold)
                                      .slope *
                                  factor;
          odd += slope - slope;
          store(at, slope);
        }
      }
    });
    // A weight that is not finite shows in every class: only then are the rows looked at one by one.
    const bool all = sum<T>(odd) == T(0);
    for (int64_t n = 0; n < samples;) {
      int64_t stop = n;
      const auto good = [&](int64_t i) {
        return (!a.sound || a.sound[n0 + i]) && (all || finite(weight + i * row, m.count));
      };
      while (stop < samples && good(stop)) ++stop;
      product<T, V, true>(weight + n * row, 1, row, slopes + n * W, W, stop - n, sums, W, stop > n ? m.count : 0);
      n = stop + 1;
    }
  }
}

// out (= or +=) sign scale q sum: one vector, or what is left of one.
template <class T>
FF_INLINE void finish(const CategoricalLeavesParams<T>& a, int64_t at, Vector<T> total, int lanes) {
  const bool whole = lanes >= kLanes<T>;
  total = total * (a.sign * a.mixture.scale);
  const auto read = [&](const T* p) { return whole ? load(p) : load_partial(p, lanes); };
  if (a.times_leaves) total = total * read(a.mixture.leaves + at);
  if (a.accumulate) total = total + read(a.out + at);
  if (whole)
    store(a.out + at, total);
  else
    store_partial(a.out + at, total, lanes);
}

template <class T>
void leaves(const CategoricalLeavesParams<T>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const CategoricalMixture<T>& m = a.mixture;
  const Tiles<T> tiles(m.classes);
  const int64_t blocks = (m.samples + kCategoricalBlock - 1) / kCategoricalBlock;
  Buffer<T> packed(m.count * kWide * L), sums(m.count * kWide * L), slopes(kCategoricalBlock * kWide * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % tiles.count, tree = item / tiles.count % m.trees, part = item / tiles.count / m.trees;
    const int64_t n0 = part * blocks / a.parts * kCategoricalBlock;
    const int64_t n1 = min(m.samples, (part + 1) * blocks / a.parts * kCategoricalBlock);
    const int64_t first = tiles.begin(tile) * L;
    const int rest = int(min(m.classes - first, int64_t(kWide) * L));
    with_width(tiles.width(tile), [&](auto width) {
      constexpr int V = width();
      pack<T, V>(m.leaves + tree * m.count * m.classes + first, m.classes, m.count, rest, packed.data());
      leaves_tile<T, V>(a, tree, first, rest, n0, n1, packed.data(), slopes.data(), sums.data());
      for (int64_t l = 0; l < m.count; ++l) {
        const int64_t at = (tree * m.count + l) * m.classes + first;
        for (int v = 0; v < V && rest > v * L; ++v) {
          const Vector<T> total = load(sums.data() + (l * V + v) * L);
          const int lanes = rest - v * L;
          if (a.parts == 1)
            finish<T>(a, at + v * L, total, lanes);
          else if (lanes >= L)
            store(a.partial + part * m.trees * m.count * m.classes + at + v * L, total);
          else
            store_partial(a.partial + part * m.trees * m.count * m.classes + at + v * L, total, lanes);
        }
      }
    });
  }
}

template <class T>
void sum_parts(const CategoricalLeavesParams<T>& a, int64_t begin, int64_t end) {
  const CategoricalMixture<T>& m = a.mixture;
  const int64_t size = m.trees * m.count * m.classes;
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < m.classes; c += kLanes<T>) {
      const int lanes = int(min(int64_t(kLanes<T>), m.classes - c));
      Vector<T> total{};
      for (int64_t part = 0; part < a.parts; ++part) {
        const T* p = a.partial + part * size + r * m.classes + c;
        total += lanes == kLanes<T> ? load(p) : load_partial(p, lanes);
      }
      finish<T>(a, r * m.classes + c, total, lanes);
    }
}

}  // namespace

template <class T>
const CategoricalCpu<T>& categorical_cpu() {
  static const CategoricalCpu<T> table = {kLanes<T>, kWide * kLanes<T>, transpose<T>, rows<T>,
                                          sound<T>,  leaves<T>,         sum_parts<T>};
  return table;
}
template const CategoricalCpu<float>& categorical_cpu<float>();
template const CategoricalCpu<double>& categorical_cpu<double>();

}  // namespace FF_ISA
}  // namespace ff
