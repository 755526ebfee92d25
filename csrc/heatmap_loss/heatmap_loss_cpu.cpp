// CPU kernels of the heatmap losses. Compiled once per instruction set (FF_ISA): every helper has internal linkage.
//
// Cost: the forward reads a map once from memory (softmax losses come back to it in the cache), the backward reads and
// writes it once; H + W exponentials make both axes of a target. Vectors run along the rows of maps whose rows stand in
// memory order. Maps of other strides, channels_last among them, are staged: a group of landmarks is transposed into
// scratch memory that the cache holds, worked on there, the gradient in its place, and transposed back.
#include <cstdlib>

#include "heatmap/heatmap_simd.h"
#include "heatmap_loss/heatmap_loss.h"
#include "heatmap_loss/heatmap_loss_math.h"

namespace ff {
namespace FF_ISA {
namespace {

#define FF_LAMBDA __attribute__((always_inline))
constexpr double kLog2 = 0.6931471805599453;

template <class T>
FF_INLINE T* map_of(const Maps<T>& m, const HeatmapLossSize& s, int64_t r) {
  return m.data + r / s.landmarks * m.image + r % s.landmarks * m.landmark;
}

template <class C>
FF_INLINE Vector<C> fill(C a) {
  return broadcast<C>(a);
}

// One row of pixels, in vectors: body(first pixel, count). The remainder's idle lanes are the caller's to mask.
template <class C, class Body>
FF_INLINE void each(int begin, int end, const Body& body) {
  each_vector<kLanes<C>>(begin, end, body);
}

// Targets.

// The arrays of one axis, each with room for the last vector.
template <class C>
struct Axis {
  C* g;        // [size]  the Gaussian
  C* near;     // [size]  squared distance of the nearest cell within the dilation (pixel losses)
  Cells seen;  // where g > 0
};

// Freed by hand, since a destructor would ask for exception tables.
template <class C>
struct Tables {
  Axis<C> x, y;
  C* column;  // [W]  column sums (variance)
  C* memory;

  FF_INLINE explicit Tables(const HeatmapLossSize& s) {
    const size_t w = size_t(s.width) + kLanes<C>, h = size_t(s.height) + kLanes<C>;
    memory = static_cast<C*>(malloc(sizeof(C) * (3 * w + 2 * h)));
    if (!memory) __builtin_trap();  // a few kilobytes
    x = {memory, memory + w, {}};
    y = {memory + 3 * w, memory + 3 * w + h, {}};
    column = memory + 2 * w;
  }
};

template <class C>
FF_INLINE void fill_axis(Axis<C>& axis, C centre, C sigma, int size, bool normalized) {
  constexpr int L = kLanes<C>;
  const TargetAxis<C> target = target_axis(centre, sigma, {0, size}, normalized);
  const C least = kNegligible<C>;
  Vector<C> total{};
  for (int i = 0; i < size; i += L) {
    const Vector<C> h = lane_index<C>() + C(i);
    Vector<C> g = exp_down(target_exponent(target, h));
    g = g > least && h < C(size) ? g : Vector<C>{};
    store(axis.g + i, g);
    total += g;
  }
  if (normalized) {
    const C scale = C(1) / sum<C>(total);
    for (int i = 0; i < size; i += L) store(axis.g + i, load(axis.g + i) * scale);
  }
  axis.seen = {0, size};
  while (axis.seen.begin < size && axis.g[axis.seen.begin] == C(0)) ++axis.seen.begin;
  while (axis.seen.end > axis.seen.begin && axis.g[axis.seen.end - 1] == C(0)) --axis.seen.end;
}

// nearest_distance of every cell.
template <class C>
FF_INLINE void fill_near(Axis<C>& axis, C centre, int radius, int size) {
  const Vector<C> nearest = fill(C(__builtin_rint(double(centre))));
  for (int i = 0; i < size; i += kLanes<C>) {
    const Vector<C> h = lane_index<C>() + C(i);
    const Vector<C> low = max(h - C(radius), Vector<C>{}), high = min(h + C(radius), fill(C(size - 1)));
    const Vector<C> d = max(low, min(nearest, high)) - centre;
    store(axis.near + i, d * d);
  }
}

// sum g log g of a normalised axis.
template <class C>
FF_INLINE C neg_entropy(const Axis<C>& axis) {
  C total = 0;
  for (int i = axis.seen.begin; i < axis.seen.end; ++i) total += axis.g[i] * log_scalar(axis.g[i]);
  return total;
}

// What a map's weight, point and sigma say before it is read.
template <class C>
struct Row {
  C weight, x, y, sigma;
  bool valid;
};

template <class T>
FF_INLINE Row<Compute<T>> row_of(const HeatmapLossParams<T>& p, int64_t r) {
  using C = Compute<T>;
  Row<C> row{p.weight ? p.weight[r] : C(1), p.points ? p.points[2 * r] : C(0), p.points ? p.points[2 * r + 1] : C(0),
             p.sigmas ? p.sigmas[r] : p.sigma, false};
  row.valid = render_valid(row.x, row.y, row.sigma);
  return row;
}

template <class T>
FF_INLINE void write_all(T* grad, int64_t stride, const HeatmapLossSize& s, Compute<T> value) {
  using C = Compute<T>;
  for (int y = 0; y < s.height; ++y) {
    T* line = grad + y * stride;
    each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA { put_some(line + x, fill(value), count); });
  }
}

// Functions of vectors.

FF_INLINE FloatVector log2_normal(FloatVector x) {                     // x > 0 (-127 at 0); fitted to 3e-7
  const IntVector bits = (IntVector)x, e = (bits - 0x3f3504f3) >> 23;  // mantissas in [1/sqrt 2, sqrt 2)
  const FloatVector f = (FloatVector)(bits - (e << 23)) - 1.f;
  FloatVector p = broadcast(0.17063435f);
  p = p * f - 0.27269789f;
  p = p * f + 0.29726262f;
  p = p * f - 0.35896185f;
  p = p * f + 0.48046503f;
  p = p * f - 0.72137587f;
  p = p * f + 1.44269973f;
  return p * f + __builtin_convertvector(e, FloatVector);
}
FF_INLINE DoubleVector log2_normal(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log2(x[i]);
  return x;
}

// log(1 + q) for q >= 0, to the relative precision of q; kSmall: q <= 1/2, fitted to 4e-7 of the value.
template <bool kSmall>
FF_INLINE FloatVector log1p_up(FloatVector q) {
  if constexpr (kSmall) {
    FloatVector p = broadcast(-0.05560987175f);
    p = p * q + 0.1517776501f;
    p = p * q - 0.2390177057f;
    p = p * q + 0.332139112f;
    p = p * q - 0.499951162f;
    p = p * q + 0.9999996709f;
    return p * q;
  } else {
    const FloatVector u = q + 1.f;
    return log(u) + (q - (u - 1.f)) / u;  // what rounding took from u
  }
}
template <bool kSmall>
FF_INLINE DoubleVector log1p_up(DoubleVector q) {
  for (int i = 0; i < kLanes<double>; ++i) q[i] = __builtin_log1p(q[i]);
  return q;
}

FF_INLINE FloatVector absolute(FloatVector v) { return (FloatVector)((IntVector)v & 0x7fffffff); }
FF_INLINE DoubleVector absolute(DoubleVector v) { return (DoubleVector)((LongVector)v & INT64_MAX); }
// |v| with the sign of s.
FF_INLINE FloatVector copy_sign(FloatVector v, FloatVector s) {
  return (FloatVector)(((IntVector)v & 0x7fffffff) | ((IntVector)s & INT32_MIN));
}
FF_INLINE DoubleVector copy_sign(DoubleVector v, DoubleVector s) {
  return (DoubleVector)(((LongVector)v & INT64_MAX) | ((LongVector)s & INT64_MIN));
}

// Losses by pixel: value and gradient of the prediction z against the target y, up to the factor `scale`.

template <class C>
struct Square {
  static constexpr C scale = 1;
  FF_INLINE Vector<C> value(Vector<C> z, Vector<C> y) const { return (z - y) * (z - y); }
  FF_INLINE Vector<C> gradient(Vector<C> z, Vector<C> y) const { return C(2) * (z - y); }
};

// adaptive_wing and its gradient, q = 2^(a log2(e / epsilon)); e = 0 gives a q of nothing, or of 2^-127 a. NaN comes
// through the second operand of min and max.
template <class C, bool kSmall>
struct Wing {
  C scale, alpha, theta, inverse_theta, log2_epsilon;

  FF_INLINE Vector<C> power(Vector<C> e, Vector<C> a) const { return exp2_down(a * (log2_normal(e) - log2_epsilon)); }
  FF_INLINE Vector<C> value(Vector<C> z, Vector<C> y) const {
    const Vector<C> d = absolute(z - y), a = alpha - y, q = power(min(fill(theta), d), a);
    return log1p_up<kSmall>(q) + a * q / (q + C(1)) * ((max(fill(theta), d) - theta) * inverse_theta);
  }
  FF_INLINE Vector<C> gradient(Vector<C> z, Vector<C> y) const {
    const Vector<C> r = z - y, e = min(fill(theta), absolute(r)), a = alpha - y, q = power(e, a);
    const Vector<C> slope = a * q / ((q + C(1)) * copy_sign(e, r));
    return r == C(0) ? Vector<C>{} : slope;
  }
};

// Pixels of a foreground count `inside` times, others `outside` times.
template <class C>
struct Foreground {
  C inside, outside, cut;  // foreground: near_x + near_y < cut (kClosed: <=)
};

// The map after this one is fetched while this one is worked on: the losses are bound by arithmetic.
template <class T>
FF_INLINE void fetch_next(const T* at, const HeatmapLossSize& s) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(at) + sizeof(T) * (size_t(s.height) * s.width);
  __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
}

template <bool kClosed, class T, class Loss>
FF_INLINE Compute<T> pixel_map(const Loss& loss, const T* z, int64_t stride, const HeatmapLossSize& s,
                               const Tables<Compute<T>>& t, const Foreground<Compute<T>>& f) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  Vector<C> inside{}, outside{};
  for (int y = 0; y < s.height; ++y) {
    const T* line = z + y * stride;
    const C g = t.y.g[y], limit = f.cut - t.y.near[y];
    Vector<C> in{}, out{};
    if (limit >= C(0)) {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
        fetch_next(line + x, s);
        Vector<C> v = loss.value(get_some(line + x, count), load(t.x.g + x) * g);
        if (count != L) v = keep_head<C>(v, count);
        const Vector<C> near = load(t.x.near + x);
        const auto within = kClosed ? near <= limit : near < limit;
        in += within ? v : Vector<C>{};
        out += within ? Vector<C>{} : v;
      });
    } else {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
        fetch_next(line + x, s);
        Vector<C> v = loss.value(get_some(line + x, count), load(t.x.g + x) * g);
        if (count != L) v = keep_head<C>(v, count);
        out += v;
      });
    }
    inside += in;
    outside += out;
  }
  return loss.scale * (f.inside * sum<C>(inside) + f.outside * sum<C>(outside)) / (C(s.height) * C(s.width));
}

template <bool kClosed, class T, class Loss>
FF_INLINE void pixel_map_backward(const Loss& loss, const T* z, int64_t stride, T* grad, int64_t grad_stride,
                                  const HeatmapLossSize& s, const Tables<Compute<T>>& t,
                                  const Foreground<Compute<T>>& f, Compute<T> factor) {
  using C = Compute<T>;
  const C k = factor * loss.scale / (C(s.height) * C(s.width)), inside = k * f.inside, outside = k * f.outside;
  for (int y = 0; y < s.height; ++y) {
    const T* line = z + y * stride;
    T* grad_line = grad + y * grad_stride;
    const C g = t.y.g[y], limit = f.cut - t.y.near[y];
    if (limit >= C(0)) {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
        fetch_next(line + x, s);
        const Vector<C> v = loss.gradient(get_some(line + x, count), load(t.x.g + x) * g), near = load(t.x.near + x);
        const auto within = kClosed ? near <= limit : near < limit;
        put_some(grad_line + x, v * (within ? fill(inside) : fill(outside)), count);
      });
    } else {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
        fetch_next(line + x, s);
        put_some(grad_line + x, loss.gradient(get_some(line + x, count), load(t.x.g + x) * g) * outside, count);
      });
    }
  }
}

// Walks: the maps of a task, one by one, where they stand or staged.

template <class T>
struct Stage {
  T* memory = nullptr;
  int64_t map;  // elements from one map to the next: a cache line off the power of two that would share its sets

  FF_INLINE explicit Stage(const HeatmapLossSize& s) : map((int64_t(s.height) * s.width + 63) / 64 * 64 + 64) {
    memory = static_cast<T*>(malloc(sizeof(T) * size_t(map) * kLossGroup));
    if (!memory) __builtin_trap();  // kLossGroup maps
  }

  // Between the scratch memory and `count` landmarks from `first` on, of any strides.
  template <bool kOut, class U>
  FF_INLINE void move(const Maps<U>& m, const HeatmapLossSize& s, int64_t image, int64_t first, int count) {
    U* const base = m.data + image * m.image + first * m.landmark;
    for (int y = 0; y < s.height; ++y) {
      int x = 0;
      if constexpr (sizeof(T) == sizeof(Compute<T>)) {
        constexpr int W = kWidth<T>;
        if (m.landmark == 1 && count == kLossGroup)
          for (; x + W <= s.width; x += W)
            for (int k = 0; k < kLossGroup; k += W) {
              Vector<T> tile[W];
              for (int i = 0; i < W; ++i)
                tile[i] = kOut ? load(memory + (k + i) * map + y * s.width + x)
                               : load(base + k + y * m.row + (x + i) * m.column);
              transpose<T>(tile);
              for (int i = 0; i < W; ++i) {
                if constexpr (kOut)
                  store(base + k + y * m.row + (x + i) * m.column, tile[i]);
                else
                  store(memory + (k + i) * map + y * s.width + x, tile[i]);
              }
            }
      }
      for (; x < s.width; ++x)
        for (int k = 0; k < count; ++k) {
          T& here = memory[k * map + y * s.width + x];
          U& there = base[k * m.landmark + y * m.row + x * m.column];
          if constexpr (kOut)
            there = here;
          else
            here = there;
        }
    }
  }
};

// body(map r, its pixels, their row stride) for every map of the tasks [begin, end).
template <class T, class Body>
FF_INLINE void walk(const HeatmapLossParams<T>& p, int64_t begin, int64_t end, const Body& body) {
  const HeatmapLossSize& s = p.size;
  if (!s.groups) {
    for (int64_t r = begin; r < end; ++r) body(r, map_of(p.pred, s, r), p.pred.row);
    return;
  }
  Stage<T> stage(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / s.groups, first = task % s.groups * kLossGroup;
    const int count = int(s.landmarks - first < kLossGroup ? s.landmarks - first : kLossGroup);
    stage.template move<false>(p.pred, s, image, first, count);
    for (int k = 0; k < count; ++k) body(image * s.landmarks + first + k, stage.memory + k * stage.map, s.width);
  }
  free(stage.memory);
}

// body(map r, its pixels, their row stride, its gradient, its row stride, the factor grad_loss w), where the row is
// neither hidden nor invalid.
template <class T, template <class> class Forward, class Body>
FF_INLINE void walk_backward(const HeatmapLossBackwardParams<T, Forward>& b, int64_t begin, int64_t end,
                             const Body& body) {
  using C = Compute<T>;
  const HeatmapLossParams<T>& p = b.forward.maps;
  const HeatmapLossSize& s = p.size;
  const auto one = [&](int64_t r, const T* z, int64_t stride, T* grad, int64_t grad_stride) FF_LAMBDA {
    const Row<C> row = row_of(p, r);
    if (row.weight == C(0))
      write_all(grad, grad_stride, s, C(0));
    else if (!row.valid)
      write_all(grad, grad_stride, s, C(NAN));
    else
      body(r, row, z, stride, grad, grad_stride, b.grad_loss[r] * row.weight);
  };
  if (!s.groups) {
    for (int64_t r = begin; r < end; ++r)
      one(r, map_of(p.pred, s, r), p.pred.row, map_of(b.grad_pred, s, r), b.grad_pred.row);
    return;
  }
  Stage<T> stage(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / s.groups, first = task % s.groups * kLossGroup;
    const int count = int(s.landmarks - first < kLossGroup ? s.landmarks - first : kLossGroup);
    stage.template move<false>(p.pred, s, image, first, count);
    for (int k = 0; k < count; ++k) {
      T* map = stage.memory + k * stage.map;
      one(image * s.landmarks + first + k, map, s.width, map, s.width);
    }
    stage.template move<true>(b.grad_pred, s, image, first, count);
  }
  free(stage.memory);
}

// Losses by pixel.

template <class C>
FF_INLINE void fill_tables(Tables<C>& t, const Row<C>& row, const HeatmapLossSize& s, int radius) {
  fill_axis(t.x, row.x, row.sigma, s.width, false);
  fill_axis(t.y, row.y, row.sigma, s.height, false);
  fill_near(t.x, row.x, radius, s.width);
  fill_near(t.y, row.y, radius, s.height);
}

template <bool kClosed, class T, class Loss, class Ground>
FF_INLINE void pixel_loss(const HeatmapLossParams<T>& p, int64_t begin, int64_t end, const Loss& loss, int radius,
                          const Ground& ground) {
  using C = Compute<T>;
  Tables<C> t(p.size);
  walk(p, begin, end, [&](int64_t r, const T* z, int64_t stride) FF_LAMBDA {
    const Row<C> row = row_of(p, r);
    p.loss[r] = row.weight;
    if (row.weight == C(0)) return;
    p.loss[r] = C(NAN);
    if (!row.valid) return;
    fill_tables(t, row, p.size, radius);
    p.loss[r] = row.weight * pixel_map<kClosed>(loss, z, stride, p.size, t, ground(row.sigma));
  });
  free(t.memory);
}

template <bool kClosed, class T, template <class> class Forward, class Loss, class Ground>
FF_INLINE void pixel_loss_backward(const HeatmapLossBackwardParams<T, Forward>& b, int64_t begin, int64_t end,
                                   const Loss& loss, int radius, const Ground& ground) {
  using C = Compute<T>;
  const HeatmapLossSize& s = b.forward.maps.size;
  Tables<C> t(s);
  walk_backward(b, begin, end,
                [&](int64_t, const Row<C>& row, const T* z, int64_t stride, T* grad, int64_t grad_stride, C factor)
                    FF_LAMBDA {
                      fill_tables(t, row, s, radius);
                      pixel_map_backward<kClosed>(loss, z, stride, grad, grad_stride, s, t, ground(row.sigma), factor);
                    });
  free(t.memory);
}

template <class T>
FF_INLINE auto mse_ground(const HeatmapMseParams<T>& p) {
  using C = Compute<T>;
  // Without a foreground no pixel is compared.
  const bool plain = p.foreground == p.background;
  return [&p, plain](C sigma) FF_LAMBDA {
    return Foreground<C>{p.foreground, p.background, plain ? C(-1) : cut_distance(p.threshold, sigma)};
  };
}

template <class T>
void mse(const HeatmapMseParams<T>& p, int64_t begin, int64_t end) {
  pixel_loss<false>(p.maps, begin, end, Square<Compute<T>>{}, 0, mse_ground(p));
}

template <class T>
void mse_backward(const HeatmapMseBackwardParams<T>& b, int64_t begin, int64_t end) {
  pixel_loss_backward<false>(b, begin, end, Square<Compute<T>>{}, 0, mse_ground(b.forward));
}

// Calls f with the loss, compiled for small q where no pixel exceeds it.
template <class T, class F>
FF_INLINE void with_wing(const AdaptiveWingParams<T>& p, const F& f) {
  using C = Compute<T>;
  const C ratio = p.theta / p.epsilon, log2_epsilon = C(__builtin_log2(double(p.epsilon)));
  if (ratio <= C(1) && __builtin_pow(double(ratio), double(p.alpha) - 1) <= 0.5)
    f(Wing<C, true>{p.omega, p.alpha, p.theta, C(1) / p.theta, log2_epsilon});
  else
    f(Wing<C, false>{p.omega, p.alpha, p.theta, C(1) / p.theta, log2_epsilon});
}

template <class T>
FF_INLINE auto wing_ground(const AdaptiveWingParams<T>& p) {
  using C = Compute<T>;
  return [&p](C sigma) FF_LAMBDA {
    return Foreground<C>{C(1 + kMapWeight), C(1), p.radius < 0 ? C(-1) : cut_distance(p.threshold, sigma)};
  };
}

template <class T>
void adaptive_wing_loss(const AdaptiveWingParams<T>& p, int64_t begin, int64_t end) {
  with_wing(p, [&](const auto& loss) FF_LAMBDA {
    pixel_loss<true>(p.maps, begin, end, loss, p.radius < 0 ? 0 : p.radius, wing_ground(p));
  });
}

template <class T>
void adaptive_wing_loss_backward(const AdaptiveWingBackwardParams<T>& b, int64_t begin, int64_t end) {
  const AdaptiveWingParams<T>& p = b.forward;
  with_wing(p, [&](const auto& loss) FF_LAMBDA {
    pixel_loss_backward<true>(b, begin, end, loss, p.radius < 0 ? 0 : p.radius, wing_ground(p));
  });
}

// Losses of the softmax.

template <class T>
FF_INLINE Compute<T> highest(const T* z, int64_t stride, const HeatmapLossSize& s) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  Vector<C> top[4];
  for (auto& v : top) v = fill(C(-INFINITY));
  for (int y = 0; y < s.height; ++y) {
    const T* line = z + y * stride;
    int x = 0;
    for (; x + 4 * L <= s.width; x += 4 * L)
      for (int k = 0; k < 4; ++k) top[k] = max(top[k], get(line + x + k * L));
    each<C>(x, s.width, [&](int64_t i, int count) FF_LAMBDA { top[0] = max(top[0], get_some(line + i, count)); });
  }
  return max_lane<C>(max(max(top[0], top[1]), max(top[2], top[3])));
}

// js_part and js_log_ratio.
template <class C>
FF_INLINE Vector<C> js_parts(Vector<C> p, Vector<C> y) {
  const Vector<C> s = p + y, low = p < y ? p : y, inverse = C(1) / s;
  const Vector<C> v = absolute(p - y) * inverse, w = C(2) * (low * inverse), v2 = v * v;
  const Vector<C> near = v2 * (C(1) + v2 * (C(1) / 6 + v2 * (C(1) / 15 + v2 * (C(1) / 28 + v2 * (C(1) / 45)))));
  const Vector<C> far = (v + C(1)) * log(v + C(1)) + (w > C(0) ? w * log(w) : w);
  return s == C(0) ? s : C(0.25) * s * (v < C(sizeof(C) == 8 ? 0.03 : 0.25) ? near : far);
}
template <class C>
FF_INLINE Vector<C> js_log_ratios(Vector<C> p, Vector<C> y) {
  const Vector<C> inverse = C(1) / (p + y), share = y * inverse, u = C(1) - share;
  const Vector<C> small = log(u) - (share - (C(1) - u)) / u, large = log(p * inverse);
  return p > C(0) ? (y < p ? small : large) : p;
}

// Sums over one map of e = exp(z - top).
template <class C>
struct Sums {
  C total;
  C absent;  // JS: of e where the target is 0
  C cross;   // KL: of y (z - top)
};

template <SoftmaxLoss kLoss, class T>
FF_INLINE Sums<Compute<T>> softmax_sums(const T* z, int64_t stride, const HeatmapLossSize& s,
                                        const Tables<Compute<T>>& t, Compute<T> top) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  const auto below = [&](const T* at, int count) FF_LAMBDA {
    fetch_next(at, s);
    return get_some(at, count) - top;
  };
  const auto exponential = [&](Vector<C> x, int count) FF_LAMBDA {
    const Vector<C> e = exp2_down(x * C(kLog2E));
    return count == L ? e : keep_head<C>(e, count);
  };
  Vector<C> total{}, absent{}, cross{};
  for (int y = 0; y < s.height; ++y) {
    const T* line = z + y * stride;
    const C g = t.y.g[y];
    Vector<C> sum_e{}, sum_absent{}, sum_cross{};
    if (g == C(0)) {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA { sum_e += exponential(below(line + x, count), count); });
      sum_absent = sum_e;
    } else {
      each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
        const Vector<C> v = below(line + x, count), e = exponential(v, count), gx = load(t.x.g + x);
        sum_e += e;
        if constexpr (kLoss == SoftmaxLoss::kl)
          sum_cross += gx > C(0) ? gx * v : gx;  // a masked pixel, 0 * -inf, counts 0
        else
          sum_absent += gx > C(0) ? Vector<C>{} : e;
      });
    }
    total += sum_e;
    absent += sum_absent;
    cross += g * sum_cross;
  }
  return {sum<C>(total), sum<C>(absent), sum<C>(cross)};
}

// The same by columns (t.column) and by rows (t.y.g), for the variance: moments about the mean are taken of these.
template <class T>
FF_INLINE Compute<T> marginals(const T* z, int64_t stride, const HeatmapLossSize& s, const Tables<Compute<T>>& t,
                               Compute<T> top) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  for (int x = 0; x < s.width; x += L) store(t.column + x, Vector<C>{});
  Vector<C> total{};
  for (int y = 0; y < s.height; ++y) {
    const T* line = z + y * stride;
    Vector<C> sum_e{};
    each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
      fetch_next(line + x, s);
      Vector<C> e = exp2_down((get_some(line + x, count) - top) * C(kLog2E));
      if (count != L) e = keep_head<C>(e, count);
      sum_e += e;
      store(t.column + x, load(t.column + x) + e);
    });
    t.y.g[y] = sum<C>(sum_e);
    total += sum_e;
  }
  return sum<C>(total);
}

template <class C>
FF_INLINE void moments(const C* marginal, int size, C& mean, C& variance) {
  double mass = 0, first = 0, second = 0;
  for (int i = 0; i < size; ++i) mass += double(marginal[i]), first += double(marginal[i]) * i;
  const double centre = first / mass;
  for (int i = 0; i < size; ++i) second += double(marginal[i]) * (i - centre) * (i - centre);
  mean = C(centre);
  variance = C(second / mass);
}

// JS over the pixels where the target is not 0: its parts, and those of K.
template <class T>
FF_INLINE void js_sums(const T* z, int64_t stride, const Tables<Compute<T>>& t, Compute<T> top, Compute<T> log_total,
                       Compute<T>& parts, Compute<T>& ratios) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  const C log2_total = log_total * C(kLog2E);
  Vector<C> sum_parts{}, sum_ratios{};
  for (int y = t.y.seen.begin; y < t.y.seen.end; ++y) {
    const T* line = z + y * stride;
    const C g = t.y.g[y];
    Vector<C> row_parts{}, row_ratios{};
    each<C>(t.x.seen.begin, t.x.seen.end, [&](int64_t x, int count) FF_LAMBDA {
      const Vector<C> target = load(t.x.g + x) * g;
      const Vector<C> p = exp2_down((get_some(line + x, count) - top) * C(kLog2E) - log2_total);
      Vector<C> part = js_parts<C>(p, target), ratio = p * js_log_ratios<C>(p, target);
      if (count != L) part = keep_head<C>(part, count), ratio = keep_head<C>(ratio, count);
      row_parts += part;
      row_ratios += ratio;
    });
    sum_parts += row_parts;
    sum_ratios += row_ratios;
  }
  parts = sum<C>(sum_parts);
  ratios = sum<C>(sum_ratios);
}

template <SoftmaxLoss kLoss, class T>
FF_INLINE void softmax_loss(const SoftmaxLossParams<T>& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int kStatistics = statistics_of(kLoss);
  const HeatmapLossSize& s = p.maps.size;
  Tables<C> t(s);
  walk(p.maps, begin, end, [&](int64_t r, const T* z, int64_t stride) FF_LAMBDA {
    const Row<C> row = row_of(p.maps, r);
    C* statistics = p.statistics + r * kStatistics;
    C& loss = p.maps.loss[r];
    if (row.weight == C(0) || !row.valid) {
      loss = row.weight == C(0) ? C(0) : C(NAN);
      for (int i = 0; i < kStatistics; ++i) statistics[i] = loss;
      return;
    }
    const C top = highest(z, stride, s);
    statistics[0] = top;
    if constexpr (kLoss == SoftmaxLoss::variance) {
      const C total = marginals(z, stride, s, t, top);
      statistics[1] = log_scalar(total);
      moments(t.column, s.width, statistics[2], statistics[4]);
      moments(t.y.g, s.height, statistics[3], statistics[5]);
      loss = row.weight * variance_loss(statistics[4], statistics[5], row.sigma);
    } else {
      fill_axis(t.x, row.x, row.sigma, s.width, true);
      fill_axis(t.y, row.y, row.sigma, s.height, true);
      const Sums<C> sums = softmax_sums<kLoss>(z, stride, s, t, top);
      const C log_total = log_scalar(sums.total);
      statistics[1] = log_total;
      if constexpr (kLoss == SoftmaxLoss::kl) {
        loss = row.weight * (neg_entropy(t.x) + neg_entropy(t.y) - sums.cross + log_total);
      } else {
        C parts, ratios;
        js_sums(z, stride, t, top, log_total, parts, ratios);
        statistics[2] = ratios;
        loss = row.weight * (parts + C(0.5 * kLog2) * (sums.absent / sums.total));
      }
    }
  });
  free(t.memory);
}

template <SoftmaxLoss kLoss, class T>
FF_INLINE void softmax_loss_backward(const SoftmaxLossBackwardParams<T>& b, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  const SoftmaxLossParams<T>& p = b.forward;
  const HeatmapLossSize& s = p.maps.size;
  Tables<C> t(s);
  walk_backward(
      b, begin, end,
      [&](int64_t r, const Row<C>& row, const T* z, int64_t stride, T* grad, int64_t grad_stride, C factor) FF_LAMBDA {
        const C* statistics = p.statistics + r * statistics_of(kLoss);
        const C top = statistics[0], log2_total = statistics[1] * C(kLog2E);
        const auto probability = [&](const T* at, int count) FF_LAMBDA {
          fetch_next(at, s);
          return exp2_down((get_some(at, count) - top) * C(kLog2E) - log2_total);
        };
        if constexpr (kLoss == SoftmaxLoss::variance) {
          const C mean_x = statistics[2], mean_y = statistics[3], vx = statistics[4], vy = statistics[5];
          const C square = row.sigma * row.sigma;
          const C a = C(2) * factor * (vx - square), c = C(2) * factor * (vy - square);
          for (int x = 0; x < s.width; x += L) {
            const Vector<C> d = lane_index<C>() + (C(x) - mean_x);
            store(t.column + x, a * (d * d - vx));
          }
          for (int y = 0; y < s.height; ++y) {
            const T* line = z + y * stride;
            T* grad_line = grad + y * grad_stride;
            const C base = c * ((C(y) - mean_y) * (C(y) - mean_y) - vy);
            each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
              put_some(grad_line + x, probability(line + x, count) * (load(t.column + x) + base), count);
            });
          }
        } else {
          fill_axis(t.x, row.x, row.sigma, s.width, true);
          fill_axis(t.y, row.y, row.sigma, s.height, true);
          const C mean = kLoss == SoftmaxLoss::js ? statistics[2] : C(0), half = C(0.5) * factor;
          const C absent = kLoss == SoftmaxLoss::js ? -half * mean : factor;  // by p where y = 0
          for (int y = 0; y < s.height; ++y) {
            const T* line = z + y * stride;
            T* grad_line = grad + y * grad_stride;
            const C g = t.y.g[y];
            const auto plain = [&](int64_t x, int count)
                                   FF_LAMBDA { put_some(grad_line + x, probability(line + x, count) * absent, count); };
            if (g == C(0)) {
              each<C>(0, s.width, plain);
            } else if constexpr (kLoss == SoftmaxLoss::kl) {
              const C scaled = g * factor;
              each<C>(0, s.width, [&](int64_t x, int count) FF_LAMBDA {
                put_some(grad_line + x, probability(line + x, count) * factor - load(t.x.g + x) * scaled, count);
              });
            } else {
              each<C>(0, t.x.seen.begin, plain);
              each<C>(t.x.seen.begin, t.x.seen.end, [&](int64_t x, int count) FF_LAMBDA {
                const Vector<C> q = probability(line + x, count);
                put_some(grad_line + x, half * q * (js_log_ratios<C>(q, load(t.x.g + x) * g) - mean), count);
              });
              each<C>(t.x.seen.end, s.width, plain);
            }
          }
        }
      });
  free(t.memory);
}

template <class T>
void softmax(const SoftmaxLossParams<T>& p, int64_t begin, int64_t end) {
  switch (SoftmaxLoss(p.kind)) {
    case SoftmaxLoss::kl: return softmax_loss<SoftmaxLoss::kl>(p, begin, end);
    case SoftmaxLoss::js: return softmax_loss<SoftmaxLoss::js>(p, begin, end);
    case SoftmaxLoss::variance: return softmax_loss<SoftmaxLoss::variance>(p, begin, end);
  }
}

template <class T>
void softmax_backward(const SoftmaxLossBackwardParams<T>& b, int64_t begin, int64_t end) {
  switch (SoftmaxLoss(b.forward.kind)) {
    case SoftmaxLoss::kl: return softmax_loss_backward<SoftmaxLoss::kl>(b, begin, end);
    case SoftmaxLoss::js: return softmax_loss_backward<SoftmaxLoss::js>(b, begin, end);
    case SoftmaxLoss::variance: return softmax_loss_backward<SoftmaxLoss::variance>(b, begin, end);
  }
}

}  // namespace

template <class T>
const HeatmapLossCpu<T>& heatmap_loss_cpu() {
  static constexpr HeatmapLossCpu<T> table{
      mse<T>, mse_backward<T>, adaptive_wing_loss<T>, adaptive_wing_loss_backward<T>, softmax<T>, softmax_backward<T>};
  return table;
}
template const HeatmapLossCpu<float>& heatmap_loss_cpu<float>();
template const HeatmapLossCpu<double>& heatmap_loss_cpu<double>();
template const HeatmapLossCpu<Half>& heatmap_loss_cpu<Half>();
template const HeatmapLossCpu<BFloat16>& heatmap_loss_cpu<BFloat16>();

}  // namespace FF_ISA
}  // namespace ff
