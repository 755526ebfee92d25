// CPU kernels of the categorical room, compiled once for every instruction set.
//
// Floor: 2 N T L C flops for yhat and as many for what follows it (the leaves' sums, or the gradient of the weights);
// memory is read once, and nothing of size N T C is kept. A tile of classes, at most kWide vectors, is packed
// [L, tile] and stays in the cache; over it pass blocks of samples: yhat of a block is a small matrix product, its
// slopes a pass over the block, and the second product takes the slopes from the L1 cache. One register-tiled
// product serves all three: kRows x V vectors of sums, a broadcast and V loads for every kRows V multiply-adds.
//
// A few classes behind the last whole vector (100 = 6 x 16 + 4) would fill a vector with zeros. Such a tail, at most
// kTail classes, goes with the last tile, its lanes over leaves instead: yhat by dot products, the leaves' sums
// transposed. Its slopes stand behind the tile's, in a vector of their own.
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
template <class T>
constexpr int kTail = kLanes<T> / 4;  // classes of a tail: with 4 samples, the dot products fill a vector

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

// out[m, :] (+)= sum_k a[m, k] b[k, :] for M rows and V vectors, of whose last kCut reads and keeps `tail` lanes only.
// The depth is at least 1: with a path around the loop the compiler keeps the sums on the stack.
template <class T, int V, int M, bool kAdd, bool kCut>
FF_INLINE void micro(const T* __restrict__ a, int64_t a_row, int64_t a_step, const T* __restrict__ b, int64_t b_step,
                     int64_t depth, T* __restrict__ out, int64_t out_row, int tail) {
  constexpr int L = kLanes<T>;
  Vector<T> acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const T* at = out + m * out_row + v * L;
      acc[m][v] = !kAdd ? Vector<T>{} : kCut && v == V - 1 ? load_partial(at, tail) : load(at);
    }
  do {
    Vector<T> column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = kCut && v == V - 1 ? load_partial(b + v * L, tail) : load(b + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<T> f = broadcast<T>(a[m * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += f * column[v];
    }
    a += a_step, b += b_step;
  } while (--depth);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* at = out + m * out_row + v * L;
      if (kCut && v == V - 1)
        store_partial(at, acc[m][v], tail);
      else
        store(at, acc[m][v]);
    }
}

template <class T, int V, bool kAdd, bool kCut = false>
void product(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t depth, T* out,
             int64_t out_row, int64_t rows, int tail = 0) {
  for (; rows >= kRows<V>; rows -= kRows<V>, a += kRows<V> * a_row, out += kRows<V> * out_row)
    micro<T, V, kRows<V>, kAdd, kCut>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
  if (rows & 4) {
    micro<T, V, 4, kAdd, kCut>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
    a += 4 * a_row, out += 4 * out_row;
  }
  if (rows & 2) {
    micro<T, V, 2, kAdd, kCut>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
    a += 2 * a_row, out += 2 * out_row;
  }
  if (rows & 1) micro<T, V, 1, kAdd, kCut>(a, a_row, a_step, b, b_step, depth, out, out_row, tail);
}

// y / v for v in [least normal, 2^126): a refined reciprocal, within 2 ulp, at a fifth of the cost of the division;
// kExact: within one, and 1 for y = v.
template <bool kExact>
FF_INLINE FloatVector divide(FloatVector y, FloatVector v) {
#if defined(__AVX512F__)
  FloatVector r = (FloatVector)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  r = r + r * (1.f - v * r);
  const FloatVector q = y * r;
  return kExact ? q + (y - q * v) * r : q;
#else
  return y / v;
#endif
}
template <bool kExact>
FF_INLINE DoubleVector divide(DoubleVector y, DoubleVector v) {
  return y / v;
}

// categorical_math.h's class_term, over lanes. KL without the loss is the leaves' pass, where the rows that are not
// finite are left out: it looks for none.
template <class T>
struct Terms {
  Vector<T> loss, slope;
};
template <CategoricalKind kKind, bool kLoss, class T>
FF_INLINE Terms<T> class_terms(Vector<T> y, Vector<T> yhat, T eps, T threshold) {
  constexpr bool kChecked = kLoss || kKind != CategoricalKind::kl;
  if constexpr (kChecked) y = y + (y - y);
  const Vector<T> v = kChecked ? yhat + (yhat - yhat) : yhat;
  if constexpr (kKind == CategoricalKind::l2) {
    const Vector<T> d = y <= broadcast<T>(threshold) ? v - v : y - v;
    return {d * d, d + d};
  } else {
    y = y <= broadcast<T>(threshold) ? Vector<T>{} : y;
    const auto low = v < broadcast<T>(eps);
    const Vector<T> ratio = divide<kLoss>(y, low ? broadcast<T>(eps) : v);
    Vector<T> loss{};
    if constexpr (kLoss) loss = y == Vector<T>{} ? v - v : y * log(ratio);
    return {loss, low ? Vector<T>{} : ratio};
  }
}

// The tiles of the classes, of nearly equal width; the tail belongs to the last.
template <class T>
struct Tiles {
  int tail;  // classes
  int64_t classes, vectors, count;
  explicit Tiles(int64_t n)
      : tail(n > kLanes<T> && n % kLanes<T> <= kTail<T> ? int(n % kLanes<T>) : 0),
        classes(n),
        vectors((n - tail + kLanes<T> - 1) / kLanes<T>),
        count((vectors + kWide - 1) / kWide) {}
  int64_t begin(int64_t tile) const { return tile * vectors / count; }  // in vectors
  int width(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
  int64_t first(int64_t tile) const { return begin(tile) * kLanes<T>; }
  int64_t end(int64_t tile) const { return tile + 1 == count ? classes : first(tile + 1); }
  int tail_of(int64_t tile) const { return tile + 1 == count ? tail : 0; }
};

template <class T>
int64_t tiles(int64_t classes) {
  return Tiles<T>(classes).count;
}

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

// One tile: classes [first, first + rest) of one tree, the last `tail` of them its tail.
struct Tile {
  int64_t tree, first;
  int rest, tail;
};

// Scratch of one tile.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count)
      : padded(categorical_padded(count, kLanes<T>)),
        packed(count * kWide * kLanes<T>),
        packed_tail(kTail<T> * padded),
        slopes(kCategoricalBlock * kStride) {
    for (int64_t i = 0; i < kCategoricalBlock * kStride; ++i) slopes.data()[i] = T(0);
  }
  static constexpr int kStride = (kWide + 1) * kLanes<T>;  // of the slopes
  int64_t padded;
  Buffer<T> packed, packed_tail, slopes;
};

// packed[l, :] = scale leaves[l, first ...], zeros behind the last class; packed_tail[c, l] likewise.
template <class T, int V>
void pack(const CategoricalMixture<T>& m, const Tile& t, Scratch<T>& s) {
  constexpr int L = kLanes<T>;
  const T* leaves = m.leaves + t.tree * m.count * m.classes + t.first;
  T* packed = s.packed.data();
  for (int64_t l = 0; l < m.count; ++l, leaves += m.classes, packed += V * L)
    for (int v = 0; v < V; ++v) {
      const int left = t.rest - v * L;
      store(packed + v * L, (left >= L ? load(leaves + v * L) : load_partial(leaves + v * L, left)) * m.scale);
    }
  if (!t.tail) return;
  leaves = m.leaves + t.tree * m.count * m.classes + t.first + V * L;
  for (int64_t l = 0; l < s.padded; ++l)
    for (int c = 0; c < kTail<T>; ++c)
      s.packed_tail.data()[c * s.padded + l] = l < m.count && c < t.tail ? leaves[l * m.classes + c] * m.scale : T(0);
}

// out[n, c] = sum_l a[n, l] q[c, l] for kTail classes, lanes over leaves, 4 samples at a time.
template <class T>
void dots(const T* a, int64_t a_row, int64_t count, const T* q, int64_t padded, int64_t samples, T* out,
          int64_t out_row) {
  if constexpr (kTail<T> > 0) {
    constexpr int L = kLanes<T>, R = kTail<T>;
    for (int64_t n = 0; n < samples; n += 4) {
      const int some = int(min(int64_t(4), samples - n));
      const T* row[4];
      for (int i = 0; i < 4; ++i) row[i] = a + (n + min(i, some - 1)) * a_row;
      Vector<T> acc[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) acc[i] = Vector<T>{};
      const auto step = [&](int64_t l, auto read) {
        Vector<T> leaf[R];
#pragma GCC unroll 4
        for (int c = 0; c < R; ++c) leaf[c] = load(q + c * padded + l);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector<T> p = read(row[i] + l);
#pragma GCC unroll 4
          for (int c = 0; c < R; ++c) acc[i * R + c] += p * leaf[c];
        }
      };
      int64_t l = 0;
      for (; l + L <= count; l += L) step(l, [](const T* p) { return load(p); });
      if (const int left = int(count - l)) step(l, [&](const T* p) { return load_partial(p, left); });
#pragma GCC unroll 4
      for (int half = L / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) acc[i] = pair_sums<T>(acc[2 * i], acc[2 * i + 1]);
      T lanes[L];
      store(lanes, acc[0]);
      for (int i = 0; i < some; ++i) __builtin_memcpy(out + (n + i) * out_row, lanes + i * R, sizeof(T) * R);
    }
  }
}

// slopes[n, :] = yhat of samples [n0, n0 + samples) of a tile.
template <class T, int V>
void mix(const CategoricalMixture<T>& m, const Tile& t, int64_t n0, int64_t samples, Scratch<T>& s) {
  constexpr int W = V * kLanes<T>, S = Scratch<T>::kStride;
  const int64_t row = m.trees * m.count;
  const T* weight = m.weight + n0 * row + t.tree * m.count;
  T* slopes = s.slopes.data();
  product<T, V, false>(weight, row, 1, s.packed.data(), W, m.count, slopes, S, samples);
  if (t.tail) dots<T>(weight, row, m.count, s.packed_tail.data(), s.padded, samples, slopes + W, S);
}

// Asks for the row of a sample and tree, to be written unless T is const: the rows of other trees lie between, out of
// the prefetcher's sight.
template <class T>
FF_INLINE void ask(T* rows, const CategoricalMixture<std::remove_const_t<T>>& m, const Tile& t, int64_t n) {
  if (n >= m.samples) return;
  T* next = rows + (n * m.trees + t.tree) * m.count;
  for (int64_t l = 0; l < m.count; l += 64 / int(sizeof(T))) __builtin_prefetch(next + l, !std::is_const_v<T>);
}

// Calls f(v, lanes) for the vectors of a tile: all but the last are whole.
template <class T, int V, class F>
FF_INLINE void each_vector(const Tile& t, F f) {
#pragma GCC unroll 4
  for (int v = 0; v + 1 < V; ++v) f(v, kLanes<T>);
  const int left = t.rest - (V - 1) * kLanes<T>;
  if (left >= kLanes<T>)
    f(V - 1, kLanes<T>);
  else
    f(V - 1, left);
  if (t.tail) f(V, t.tail);
}

// A vector, or what is left of one.
template <class T>
FF_INLINE Vector<T> load_some(const T* p, int lanes) {
  return lanes >= kLanes<T> ? load(p) : load_partial(p, lanes);
}
template <class T>
FF_INLINE void store_some(T* p, Vector<T> v, int lanes) {
  if (lanes >= kLanes<T>)
    store(p, v);
  else
    store_partial(p, v, lanes);
}

template <class T>
void transpose(const CategoricalMixture<T>& m, T* transposed, int64_t begin, int64_t end) {
  constexpr int kBlock = 16;
  const Tiles<T> tiles(m.classes);
  const int64_t padded = categorical_padded(m.count, kLanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tree = item / tiles.count, tile = item % tiles.count;
    const int64_t first = tiles.first(tile), last = tiles.end(tile);
    const T* q = m.leaves + tree * m.count * m.classes;
    T* out = transposed + tree * m.classes * padded;
    for (int64_t l0 = 0; l0 < padded; l0 += kBlock)
      for (int64_t c = first; c < last; ++c)
        for (int64_t l = l0; l < min(padded, l0 + kBlock); ++l)
          out[c * padded + l] = l < m.count ? q[l * m.classes + c] : T(0);
  }
}

// One tile of classes of one tree for samples [begin, end): yhat in the slopes, then what is asked.
template <class T, int V>
void rows_tile(const CategoricalRowsParams<T>& a, const Tile& t, int64_t begin, int64_t end, Scratch<T>& s) {
  constexpr int L = kLanes<T>, S = Scratch<T>::kStride;
  const CategoricalMixture<T>& m = a.mixture;
  const int64_t row = m.trees * m.count, padded = s.padded, first = t.first, tree = t.tree;
  T* slopes = s.slopes.data();
  for (int64_t n0 = begin; n0 < end; n0 += kCategoricalBlock) {
    const int64_t samples = min(int64_t(kCategoricalBlock), end - n0);
    mix<T, V>(m, t, n0, samples, s);

    if (a.log_prob) {
      for (int64_t n = 0; n < samples; ++n) {
        T* out = a.log_prob + ((n0 + n) * m.trees + tree) * m.classes + first;
        each_vector<T, V>(t, [&](int v, int lanes) {
          Vector<T> x = load(slopes + n * S + v * L);
          x = x + (x - x);
          store_some(out + v * L, log(x < broadcast<T>(m.eps) ? broadcast<T>(m.eps) : x), lanes);
        });
      }
      continue;
    }

    const auto terms = [&](auto kind, auto with_loss) {
      const Vector<T> factor = broadcast<T>(a.sign * m.scale);
      const T eps = m.eps, threshold = a.numerator.threshold;
      for (int64_t n = 0; n < samples; ++n) {
        ask(m.weight, m, t, n0 + n + kCategoricalBlock);
        if (a.grad_weight) ask(a.grad_weight, m, t, n0 + n);
        const T* y = a.numerator.data + (n0 + n) * a.numerator.sample + tree * a.numerator.tree + first;
        Vector<T> loss{};
        each_vector<T, V>(t, [&](int v, int lanes) {
          T* at = slopes + n * S + v * L;
          const Terms<T> term =
              class_terms<kind(), with_loss(), T>(load_some(y + v * L, lanes), load(at), eps, threshold);
          loss += term.loss;
          store_some(at, term.slope * factor, lanes);
        });
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
          product<T, width(), add(), cut()>(slopes, S, 1, q + l, padded, t.rest, grad + l, row, samples, tail);
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
  const CategoricalMixture<T>& m = a.mixture;
  const Tiles<T> tiles(m.classes);
  const int64_t ranges = (m.samples + samples - 1) / samples;
  Scratch<T> scratch(m.count);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tree = item / ranges, n0 = item % ranges * samples, n1 = min(m.samples, n0 + samples);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Tile t = {tree, tiles.first(tile), int(tiles.end(tile) - tiles.first(tile)), tiles.tail_of(tile)};
      with_width(tiles.width(tile), [&](auto width) {
        pack<T, width()>(m, t, scratch);
        rows_tile<T, width()>(a, t, n0, n1, scratch);
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

// sums[l, :] of a tile over samples [begin, end), in rows of the slopes' stride; tail_sums[c, l] is where the tail's
// stand meanwhile.
template <class T, int V>
void leaves_tile(const CategoricalLeavesParams<T>& a, const Tile& t, int64_t begin, int64_t end, Scratch<T>& s, T* sums,
                 T* tail_sums) {
  constexpr int L = kLanes<T>, W = V * L, S = Scratch<T>::kStride;
  const CategoricalMixture<T>& m = a.mixture;
  const int64_t row = m.trees * m.count;
  T* slopes = s.slopes.data();
  for (int64_t i = 0; i < m.count * S; i += L) store(sums + i, Vector<T>{});
  for (int64_t i = 0; i < t.tail * s.padded; i += L) store(tail_sums + i, Vector<T>{});
  for (int64_t n0 = begin; n0 < end; n0 += kCategoricalBlock) {
    const int64_t samples = min(int64_t(kCategoricalBlock), end - n0);
    const T* weight = m.weight + n0 * row + t.tree * m.count;
    mix<T, V>(m, t, n0, samples, s);
    Vector<T> total{};
    const T eps = m.eps, threshold = a.numerator.threshold;
    with_kind(a.numerator.kind, [&](auto kind) {
      for (int64_t n = 0; n < samples; ++n) {
        const T* y = a.numerator.data + (n0 + n) * a.numerator.sample + t.tree * a.numerator.tree + t.first;
        ask(m.weight, m, t, n0 + n + kCategoricalBlock);
        const Vector<T> factor = broadcast<T>(a.factor ? a.factor[(n0 + n) * m.trees + t.tree] : T(1));
        each_vector<T, V>(t, [&](int v, int lanes) {
          T* at = slopes + n * S + v * L;
          const Vector<T> yhat = load(at);
          total += yhat;
          const Terms<T> term = class_terms<kind(), false, T>(load_some(y + v * L, lanes), yhat, eps, threshold);
          store_some(at, term.slope * factor, lanes);
        });
      }
    });
    // A weight that is not finite shows in yhat of every class: only then are the rows looked at one by one.
    const bool all = sum<T>(total - total) == T(0);
    const auto good = [&](int64_t i) {
      return (!a.sound || a.sound[n0 + i]) && (all || finite(weight + i * row, m.count));
    };
    for (int64_t n = 0, stop; n < samples; n = stop + 1) {
      for (stop = n; stop < samples && good(stop);) ++stop;
      if (stop == n) continue;
      const T *p = weight + n * row, *slope = slopes + n * S;
      product<T, V, true>(p, 1, row, slope, S, stop - n, sums, S, m.count);
      if (!t.tail) continue;
      for (int64_t l = 0; l < s.padded; l += kWide * L) {
        const int left = int(m.count % L);
        with_width(int(min(int64_t(kWide), (s.padded - l) / L)), [&](auto width) {
          const auto run = [&](auto cut) {
            product<T, width(), true, cut()>(slope + W, 1, S, p + l, row, stop - n, tail_sums + l, s.padded, t.tail,
                                             left);
          };
          left&& l + kWide* L >= s.padded ? run(std::true_type{}) : run(std::false_type{});
        });
      }
    }
  }
  for (int64_t l = 0; l < (t.tail ? m.count : 0); ++l)
    for (int c = 0; c < t.tail; ++c) sums[l * S + W + c] = tail_sums[c * s.padded + l];
}

// out (= or +=) sign scale q sum: one vector, or what is left of one.
template <class T>
FF_INLINE void finish(const CategoricalLeavesParams<T>& a, int64_t at, Vector<T> total, int lanes) {
  total = total * (a.sign * a.mixture.scale);
  if (a.times_leaves) total = total * load_some(a.mixture.leaves + at, lanes);
  if (a.accumulate) total = total + load_some(a.out + at, lanes);
  store_some(a.out + at, total, lanes);
}

template <class T>
void leaves(const CategoricalLeavesParams<T>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>, S = Scratch<T>::kStride;
  const CategoricalMixture<T>& m = a.mixture;
  const Tiles<T> tiles(m.classes);
  const int64_t blocks = (m.samples + kCategoricalBlock - 1) / kCategoricalBlock;
  Scratch<T> scratch(m.count);
  Buffer<T> sums(m.count * S), tail_sums(kTail<T> * scratch.padded);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % tiles.count, tree = item / tiles.count % m.trees, part = item / tiles.count / m.trees;
    const int64_t n0 = part * blocks / a.parts * kCategoricalBlock;
    const int64_t n1 = min(m.samples, (part + 1) * blocks / a.parts * kCategoricalBlock);
    const Tile t = {tree, tiles.first(tile), int(tiles.end(tile) - tiles.first(tile)), tiles.tail_of(tile)};
    with_width(tiles.width(tile), [&](auto width) {
      pack<T, width()>(m, t, scratch);
      leaves_tile<T, width()>(a, t, n0, n1, scratch, sums.data(), tail_sums.data());
      for (int64_t l = 0; l < m.count; ++l) {
        const int64_t at = (tree * m.count + l) * m.classes + t.first;
        each_vector<T, width()>(t, [&](int v, int lanes) {
          const Vector<T> total = load(sums.data() + l * S + v * L);
          if (a.parts == 1)
            finish<T>(a, at + v * L, total, lanes);
          else
            store_some(a.partial + part * m.trees * m.count * m.classes + at + v * L, total, lanes);
        });
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
        total += load_some(p, lanes);
      }
      finish<T>(a, r * m.classes + c, total, lanes);
    }
}

}  // namespace

template <class T>
const CategoricalCpu<T>& categorical_cpu() {
  static const CategoricalCpu<T> table = {kLanes<T>, tiles<T>,  transpose<T>, rows<T>,
                                          sound<T>,  leaves<T>, sum_parts<T>};
  return table;
}
template const CategoricalCpu<float>& categorical_cpu<float>();
template const CategoricalCpu<double>& categorical_cpu<double>();

}  // namespace FF_ISA
}  // namespace ff
