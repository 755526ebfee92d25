// CPU kernels of the routing room. Compiled once per instruction set (FF_ISA): every helper has internal linkage.
//
// A task is a group of samples, one a lane. Their units are transposed once, and the split probabilities of all F units
// stand in L1, [F] vectors: a node is then two loads at phi[n], whatever units the trees share, and its gradient one
// vector added at phi[n], with no conflicts between lanes and always in the same order. A tree is walked left to right,
// subtree by subtree of `lanes` leaves, so the memory of a tree is that of one path. The subtree's leaves are
// transposed in registers and written as whole vectors of each sample's row.
//
// Cost: the forward writes the leaves once, the backward reads their gradients once; nothing between them is stored.
#include <cstdlib>
#include <type_traits>

#include "common/simd.h"
#include "routing/routing.h"
#include "routing/routing_math.h"

namespace ff {
namespace FF_ISA {
namespace {

template <class T>
constexpr int kTail = kLogLanes<T>;  // levels of the subtree whose leaves make a square with the lanes

// A group's rows of a matrix; lanes past the last sample repeat it and are not written.
template <class T>
struct Rows {
  T* row[FF_VECTOR_BYTES / sizeof(T)];
  int count;

  FF_INLINE Rows(T* data, int64_t width, int64_t samples, int64_t first) {
    constexpr int W = FF_VECTOR_BYTES / sizeof(T);
    count = int(samples - first < W ? samples - first : W);
    for (int i = 0; i < W; ++i) row[i] = data + (first + (i < count ? i : count - 1)) * width;
  }
};

// Columns [at, at + width) of the rows as vectors over the samples, and back.
template <class T>
FF_INLINE void read_square(const Rows<const T>& rows, int64_t at, int width, Vector<T> (&a)[kLanes<T>]) {
  if (width == kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) a[i] = load(rows.row[i] + at);
  } else {
    for (int i = 0; i < kLanes<T>; ++i) a[i] = load_partial(rows.row[i] + at, width);
  }
  transpose<T>(a);
}
template <class T>
FF_INLINE void write_square(const Rows<T>& rows, int64_t at, int width, Vector<T> (&a)[kLanes<T>]) {
  transpose<T>(a);
  if (rows.count == kLanes<T> && width == kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) store(rows.row[i] + at, a[i]);
  } else {
    for (int i = 0; i < rows.count; ++i) store_partial(rows.row[i] + at, a[i], width);
  }
}

// The rows' lines `kAhead` squares on, in the order of the walk, are asked for, to be written unless T is const: the
// hardware does not foresee 16 rows at once.
template <class T>
FF_INLINE void fetch_ahead(const Rows<T>& rows, int64_t at, int64_t width) {
  constexpr int kAhead = 8, W = kLanes<std::remove_const_t<T>>;
  int64_t to = at + kAhead * W;
  if (to >= width) to += (W - 1) * width;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) __builtin_prefetch(rows.row[i] + to, !std::is_const_v<T>);
}

FF_INLINE FloatVector log1p_unit(FloatVector e) {  // of [0, 1]: 2 artanh(e / (2 + e)), to 1 ulp
  const FloatVector z = e / (e + 2.f), w = z * z;
  FloatVector p = broadcast(1.f / 15);
  p = p * w + 1.f / 13;
  p = p * w + 1.f / 11;
  p = p * w + 1.f / 9;
  p = p * w + 1.f / 7;
  p = p * w + 1.f / 5;
  p = p * w + 1.f / 3;
  return z * w * p * 2.f + z * 2.f;
}
FF_INLINE DoubleVector log1p_unit(DoubleVector e) {
  for (int i = 0; i < kLanes<double>; ++i) e[i] = __builtin_log1p(e[i]);
  return e;
}

// 1 / a of [1, 2], to 1 ulp.
template <class V>
FF_INLINE V reciprocal(V a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, FloatVector>) {
    const V r = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)a);
    return r + r * (1.f - a * r);
  }
#endif
  return 1 / a;
}

// As split and log_split of routing_math.h.
template <class T>
FF_INLINE Split<Vector<T>> split_lanes(Vector<T> x) {
  const Vector<T> e = exp_down(x < T(0) ? x : -x), large = reciprocal(e + T(1)), small = e * large;
  return {x < T(0) ? small : large, x < T(0) ? large : small};
}
template <class T>
FF_INLINE Split<Vector<T>> log_split_lanes(Vector<T> x) {
  const Vector<T> zero{}, t = log1p_unit(exp_down(x < T(0) ? x : -x));
  return {(x < T(0) ? x : zero) - t, (x > T(0) ? -x : zero) - t};
}

// A group's units: [F, 2] vectors of split probabilities (or their logarithms), then [F] sums of gradients.
template <class T>
class Units {
 public:
  Units(int64_t features, bool sums) : features_((features + kLanes<T> - 1) / kLanes<T> * kLanes<T>) {
    const size_t bytes = size_t(features_) * (sums ? 3 : 2) * sizeof(Vector<T>);
    split_ = static_cast<T*>(aligned_alloc(FF_VECTOR_BYTES, bytes));
    sum_ = sums ? split_ + features_ * 2 * kLanes<T> : nullptr;
  }
  Units(const Units&) = delete;
  ~Units() { free(split_); }

  template <bool kLog>
  FF_INLINE void read(const RouteParams<T>& p, T steepness, int64_t first) {
    const Rows<const T> rows(p.units, p.features, p.samples, first);
    for (int64_t f = 0; f < p.features; f += kLanes<T>) {
      fetch_ahead<const T>(rows, f, p.features);
      Vector<T> x[kLanes<T>];
      read_square<T>(rows, f, int(p.features - f < kLanes<T> ? p.features - f : kLanes<T>), x);
      for (int i = 0; i < kLanes<T>; ++i) {
        const Split<Vector<T>> d = kLog ? log_split_lanes<T>(x[i] * steepness) : split_lanes<T>(x[i] * steepness);
        store(split_ + (f + i) * 2 * kLanes<T>, d.left);
        store(split_ + (f + i) * 2 * kLanes<T> + kLanes<T>, d.right);
      }
    }
    if (sum_) memset(sum_, 0, size_t(features_) * sizeof(Vector<T>));
  }
  FF_INLINE void write_sums(const RouteBackwardParams<T>& b, T steepness, int64_t first) const {
    const int64_t features = b.forward.features;
    const Rows<T> rows(b.grad_units, features, b.forward.samples, first);
    for (int64_t f = 0; f < features; f += kLanes<T>) {
      fetch_ahead<T>(rows, f, features);
      Vector<T> g[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) g[i] = load(sum_ + (f + i) * kLanes<T>) * steepness;
      write_square<T>(rows, f, int(features - f < kLanes<T> ? features - f : kLanes<T>), g);
    }
  }
  FF_INLINE Split<Vector<T>> at(int32_t unit) const {
    const T* d = split_ + int64_t(unit) * 2 * kLanes<T>;
    return {load(d), load(d + kLanes<T>)};
  }
  FF_INLINE void add(int32_t unit, Vector<T> grad) const {
    T* sum = sum_ + int64_t(unit) * kLanes<T>;
    store(sum, load(sum) + grad);
  }

 private:
  int64_t features_;
  T *split_, *sum_;
};

template <bool kLog, class V>
FF_INLINE V step(V reach, V d) {
  return kLog ? reach + d : reach * d;
}

// The path from the root to subtree `r` of level `top`: the probability (or its logarithm) of reaching each level.
// Walking left to right, only the levels below the first turn change: two a subtree on the average.
template <class T, bool kLog>
struct Path {
  Vector<T> reach[kMaxDepth + 1];
  int top;

  FF_INLINE explicit Path(int levels) : top(levels) { reach[0] = broadcast<T>(kLog ? T(0) : T(1)); }
  FF_INLINE void go(const Units<T>& units, const int32_t* phi, int64_t r) {
    for (int level = r ? top - 1 - __builtin_ctzll(r) : 0; level < top; ++level) {
      const Split<Vector<T>> d = units.at(phi[(int64_t(1) << level) - 1 + (r >> (top - level))]);
      reach[level + 1] = step<kLog>(reach[level], r >> (top - 1 - level) & 1 ? d.right : d.left);
    }
  }
};

// The leaves of subtree r, kDepth levels deep, whose root is on level `top`.
template <class T, bool kLog, int kDepth>
FF_INLINE void leaves_of(const Units<T>& units, const int32_t* phi, int top, int64_t r, Vector<T> root, Vector<T>* p) {
  p[0] = root;
#pragma GCC unroll 4
  for (int j = 0; j < kDepth; ++j) {
    const int32_t* nodes = phi + (int64_t(1) << (top + j)) - 1 + (r << j);
#pragma GCC unroll 8
    for (int i = (1 << j) - 1; i >= 0; --i) {
      const Split<Vector<T>> d = units.at(nodes[i]);
      p[2 * i + 1] = step<kLog>(p[i], d.right);
      p[2 * i] = step<kLog>(p[i], d.left);
    }
  }
}

// The value of a node from its children's, whose gradient is added to its unit.
template <class T, bool kLog>
FF_INLINE Vector<T> merge(const Units<T>& units, int32_t unit, Vector<T> reach, Vector<T> left, Vector<T> right) {
  const Split<Vector<T>> d = units.at(unit);
  units.add(unit, kLog ? log_node_grad(d, left, right) : node_grad(d, reach, left, right));
  return kLog ? log_node_value(left, right) : node_value(d, left, right);
}

// The value of subtree r from its leaves' gradients. One loop over its nodes, whose numbers are constants once
// unrolled.
template <class T, bool kLog, int kDepth>
FF_INLINE Vector<T> value_of(const Units<T>& units, const int32_t* phi, int top, int64_t r, Vector<T> root,
                             const Vector<T>* leaf) {
  constexpr int kInner = (1 << kDepth) - 1;
  const auto unit = [&](int n) __attribute__((always_inline)) {
    const int level = 31 - __builtin_clz(n + 1);
    return phi[(int64_t(1) << (top + level)) - 1 + (r << level) + n - ((1 << level) - 1)];
  };
  Vector<T> reach[kInner], value[2 * kInner + 1];
  reach[0] = root;
#pragma GCC unroll 8
  for (int n = 0; n < (kLog ? 0 : kInner / 2); ++n) {
    const Split<Vector<T>> d = units.at(unit(n));
    reach[2 * n + 1] = reach[n] * d.left;
    reach[2 * n + 2] = reach[n] * d.right;
  }
#pragma GCC unroll 16
  for (int i = 0; i <= kInner; ++i) value[kInner + i] = leaf[i];
#pragma GCC unroll 16
  for (int n = kInner - 1; n >= 0; --n)
    value[n] = merge<T, kLog>(units, unit(n), kLog ? root : reach[n], value[2 * n + 1], value[2 * n + 2]);
  return value[0];
}

// Calls body(constant of d) for the depth of a tree that is shallower than kTail.
template <class T, int kDepth = 1, class Body>
FF_INLINE void with_depth(int depth, const Body& body) {
  if constexpr (kDepth < kTail<T>) {
    if (depth == kDepth)
      body(std::integral_constant<int, kDepth>{});
    else
      with_depth<T, kDepth + 1>(depth, body);
  }
}

template <class T>
FF_INLINE T steepness_of(const RouteParams<T>& p) {
  return p.steepness_value ? p.steepness * *p.steepness_value : p.steepness;
}

// Calls body(first sample, units) for every group.
template <class T, bool kLog, class Body>
FF_INLINE void each_group(const RouteParams<T>& p, bool sums, int64_t begin, int64_t end, const Body& body) {
  Units<T> units(p.features, sums);
  const T steepness = steepness_of(p);
  for (int64_t group = begin; group < end; ++group) {
    units.template read<kLog>(p, steepness, group * kLanes<T>);
    body(group * kLanes<T>, units);
  }
}

template <class T, bool kLog>
void route_groups(const RouteParams<T>& p, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const int64_t leaves = int64_t(1) << p.depth, nodes = leaves - 1;
  const Vector<T> root = broadcast<T>(kLog ? T(0) : T(1));
  each_group<T, kLog>(p, false, begin, end, [&](int64_t first, const Units<T>& units) {
    const Rows<T> rows(p.leaf, p.trees * leaves, p.samples, first);
    if (p.depth < kTail<T>) {
      // Several trees make a square.
      with_depth<T>(p.depth, [&](auto depth) {
        constexpr int L = 1 << depth;
        for (int64_t t = 0; t < p.trees; t += W / L) {
          const int some = int(p.trees - t < W / L ? p.trees - t : W / L);
          Vector<T> leaf[W] = {};
          for (int i = 0; i < some; ++i)
            leaves_of<T, kLog, depth>(units, p.phi + (t + i) * nodes, 0, 0, root, leaf + i * L);
          write_square<T>(rows, t * L, some * L, leaf);
        }
      });
      return;
    }
    const int top = p.depth - kTail<T>;
    for (int64_t t = 0; t < p.trees; ++t) {
      const int32_t* phi = p.phi + t * nodes;
      Path<T, kLog> path(top);
      for (int64_t r = 0; r < int64_t(1) << top; ++r) {
        path.go(units, phi, r);
        Vector<T> leaf[W];
        leaves_of<T, kLog, kTail<T>>(units, phi, top, r, path.reach[top], leaf);
        fetch_ahead<T>(rows, t * leaves + r * W, p.trees * leaves);
        write_square<T>(rows, t * leaves + r * W, W, leaf);
      }
    }
  });
}

template <class T, bool kLog>
void backward_groups(const RouteBackwardParams<T>& b, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const RouteParams<T>& p = b.forward;
  const int64_t leaves = int64_t(1) << p.depth, nodes = leaves - 1;
  const Vector<T> root = broadcast<T>(T(1));
  const T steepness = steepness_of(p);
  // Gradients need the probabilities themselves, of log probabilities too.
  each_group<T, false>(p, true, begin, end, [&](int64_t first, const Units<T>& units) {
    const Rows<const T> rows(b.grad_leaf, p.trees * leaves, p.samples, first);
    if (p.depth < kTail<T>) {
      with_depth<T>(p.depth, [&](auto depth) {
        constexpr int L = 1 << depth;
        for (int64_t t = 0; t < p.trees; t += W / L) {
          const int some = int(p.trees - t < W / L ? p.trees - t : W / L);
          Vector<T> v[W];
          read_square<T>(rows, t * L, some * L, v);
          for (int i = 0; i < some; ++i)
            value_of<T, kLog, depth>(units, p.phi + (t + i) * nodes, 0, 0, root, v + i * L);
        }
      });
    } else {
      const int top = p.depth - kTail<T>;
      for (int64_t t = 0; t < p.trees; ++t) {
        const int32_t* phi = p.phi + t * nodes;
        Path<T, false> path(top);
        Vector<T> pending[kMaxDepth];  // values of left children that wait for their sibling, by their parent's level
        for (int64_t r = 0; r < int64_t(1) << top; ++r) {
          if (!kLog) path.go(units, phi, r);
          fetch_ahead<const T>(rows, t * leaves + r * W, p.trees * leaves);
          Vector<T> v[W];
          read_square<T>(rows, t * leaves + r * W, W, v);
          Vector<T> value = value_of<T, kLog, kTail<T>>(units, phi, top, r, path.reach[top], v);
          int level = top - 1;
          for (int64_t q = r; level >= 0 && q & 1; --level) {
            q >>= 1;
            const int32_t unit = phi[(int64_t(1) << level) - 1 + q];
            value = merge<T, kLog>(units, unit, path.reach[level], pending[level], value);
          }
          if (level >= 0) pending[level] = value;
        }
      }
    }
    units.write_sums(b, steepness, first);
  });
}

template <class T>
void route(const RouteParams<T>& p, int64_t begin, int64_t end) {
  p.log ? route_groups<T, true>(p, begin, end) : route_groups<T, false>(p, begin, end);
}
template <class T>
void route_backward(const RouteBackwardParams<T>& b, int64_t begin, int64_t end) {
  b.forward.log ? backward_groups<T, true>(b, begin, end) : backward_groups<T, false>(b, begin, end);
}

}  // namespace

template <class T>
const RoutingCpu<T>& routing_cpu() {
  static constexpr RoutingCpu<T> table{kLanes<T>, route<T>, route_backward<T>};
  return table;
}
template const RoutingCpu<float>& routing_cpu<float>();
template const RoutingCpu<double>& routing_cpu<double>();

}  // namespace FF_ISA
}  // namespace ff
