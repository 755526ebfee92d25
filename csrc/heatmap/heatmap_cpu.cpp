// CPU kernels of the heatmap room. Compiled once per instruction set (FF_ISA): every helper has internal linkage.
//
// Cost: soft_argmax and peak read a map once from memory (a second pass finds it in the cache), the gradient reads and
// writes it once, render writes it once. Vectors run along the rows of planar maps, over landmarks of pixel-major ones.
#include <cstdlib>

#include "heatmap/heatmap.h"
#include "heatmap/heatmap_math.h"
#include "heatmap/heatmap_simd.h"

namespace ff {
namespace FF_ISA {
namespace {

template <class C>
FF_INLINE C infinity() {
  return C(INFINITY);
}

struct Region {
  Cells x, y;
  FF_INLINE int64_t pixels() const { return int64_t(x.end - x.begin) * (y.end - y.begin); }
};

FF_INLINE Region region_of(const HeatmapSize& s, int window, int64_t peak) {
  if (window < 0) return {{0, s.width}, {0, s.height}};
  return {cells_around<double>(double(peak % s.width), window, s.width),
          cells_around<double>(double(peak / s.width), window, s.height)};
}

template <class C>
FF_INLINE Background<C> background_of(const Region& r, bool debias) {
  return {debias ? C(r.pixels()) : C(0), C(0.5) * C(r.x.begin + r.x.end - 1), C(0.5) * C(r.y.begin + r.y.end - 1)};
}

// The landmarks [begin, end) of one task over pixel-major maps, in vectors; the last one may overlap its neighbour.
struct Chunk {
  int64_t image, begin, end;
  FF_INLINE Chunk(const HeatmapSize& s, int64_t task)
      : image(task / s.chunks),
        begin(s.landmarks * (task % s.chunks) / s.chunks),
        end(s.landmarks * (task % s.chunks + 1) / s.chunks) {}
  template <int kStep, class Body>
  FF_INLINE void each(const Body& body) const {  // body(first landmark, lanes)
    if (end - begin < kStep) return body(begin, int(end - begin));
    for (int64_t p = begin; p < end; p += kStep) body(p + kStep <= end ? p : end - kStep, kStep);
  }
};

template <class T>
FF_INLINE T* map_of(const Maps<T>& m, const HeatmapSize& s, int64_t r) {
  return m.data + r / s.landmarks * m.image + r % s.landmarks * m.landmark;
}

template <class T>
FF_INLINE Compute<T> beta_of(const SoftArgmaxParams<T>& p) {
  return p.beta_value ? p.beta * *p.beta_value : p.beta;
}

// What remains once the sums over a region are known.
template <class T>
FF_INLINE void finish(const SoftArgmaxParams<T>& p, int64_t r, const Region& region, Compute<T> beta, Compute<T> top,
                      Compute<T> total, Compute<T> x, Compute<T> y) {
  using C = Compute<T>;
  x /= total;
  y /= total;
  const C log_total = log_scalar(total);
  if (p.debias) {
    const Background<C> back = background_of<C>(region, true);
    const C share = background_share(back, beta * top, log_total);
    x = debiased(x, share, back.x);
    y = debiased(y, share, back.y);
  }
  p.points[2 * r] = x;
  p.points[2 * r + 1] = y;
  p.normalizer[2 * r] = top;
  p.normalizer[2 * r + 1] = log_total;
}

// The gradient of one map's logits, ready to be summed with p: see LogitGrad.
template <class T>
FF_INLINE LogitGrad<Compute<T>> logit_grad_of(const SoftArgmaxParams<T>& p, const Compute<T>* grad_points, int64_t r,
                                              const Region& region, Compute<T> beta) {
  using C = Compute<T>;
  const Background<C> back = background_of<C>(region, p.debias);
  const C share = p.debias ? background_share(back, beta * p.normalizer[2 * r], p.normalizer[2 * r + 1]) : C(0);
  return logit_grad(p.points[2 * r], p.points[2 * r + 1], grad_points[2 * r], grad_points[2 * r + 1], share, back);
}

// Peak.

template <class C>
struct Best {
  C value = -infinity<C>();
  int64_t index = 0;
  bool bad = false;  // NaN or +inf was met
};

// Pixels [0, n) of a row or of a whole map. Blocks stay in L1 while the first pixel that equals their maximum is found.
template <class T>
FF_INLINE void scan(const T* z, int64_t n, int64_t index, Best<Compute<T>>& best) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  constexpr int64_t kBlock = 4096;
  for (int64_t start = 0; start < n; start += kBlock) {
    const T* block = z + start;
    const int64_t size = n - start < kBlock ? n - start : kBlock;
    Vector<C> top[4];
    Index<C> nan[4] = {};
    for (auto& v : top) v = broadcast(-infinity<C>());
    int64_t i = 0;
    for (; i + 4 * L <= size; i += 4 * L)
      for (int k = 0; k < 4; ++k) {
        const Vector<C> v = get(block + i + k * L);
        top[k] = max(top[k], v);
        nan[k] |= v != v;
      }
    each_vector<L>(i, size, [&](int64_t x, int count) __attribute__((always_inline)) {
      const Vector<C> v = get_some(block + x, count);
      top[0] = max(top[0], v);
      nan[0] |= v != v;
    });
    const Index<C> any = nan[0] | nan[1] | nan[2] | nan[3];
    for (int k = 0; k < L; ++k) best.bad |= any[k] != 0;
    const C highest = max_lane<C>(max(max(top[0], top[1]), max(top[2], top[3])));
    if (!(highest > best.value)) continue;
    const auto far = typename std::conditional_t<sizeof(C) == 4, int32_t, int64_t>(kBlock);
    Index<C> here{}, first = Index<C>{} + far;
    for (int k = 0; k < L; ++k) here[k] = k;
    each_vector<L>(0, size, [&](int64_t x, int count) __attribute__((always_inline)) {
      const Vector<C> v = get_some(block + x, count);
      const Index<C> found = v == highest ? here : Index<C>{} + far;
      first = found < first ? found : first;
      here += L;
    });
    int64_t lowest = far;
    for (int k = 0; k < L; ++k) lowest = first[k] < lowest ? first[k] : lowest;
    best.value = highest;
    best.index = index + start + lowest;
  }
}

template <class T>
FF_INLINE Best<Compute<T>> planar_peak(const T* z, int64_t row, const HeatmapSize& s) {
  Best<Compute<T>> best;
  if (row == s.width)
    scan(z, int64_t(s.height) * s.width, 0, best);
  else
    for (int y = 0; y < s.height; ++y) scan(z + y * row, s.width, int64_t(y) * s.width, best);
  best.bad |= best.value == infinity<Compute<T>>();
  return best;
}

// One vector of landmarks of a pixel-major image: calls done(lane, best).
template <class T, class Done>
FF_INLINE void pixel_major_peaks(const T* z, const Maps<const T>& m, const HeatmapSize& s, int lanes,
                                 const Done& done) {
  using C = Compute<T>;
  Vector<C> top = broadcast(-infinity<C>());
  Index<C> index{}, nan{}, here{};
  for (int y = 0; y < s.height; ++y)
    for (int x = 0; x < s.width; ++x) {
      const Vector<C> v = get_some(z + y * m.row + x * m.column, lanes);
      index = v > top ? here : index;
      top = max(top, v);
      nan |= v != v;
      here += 1;
    }
  for (int k = 0; k < lanes; ++k) {
    Best<C> best;
    best.value = top[k];
    best.index = index[k];
    best.bad = nan[k] || top[k] == infinity<C>();
    done(k, best);
  }
}

// dark, dark_udp. A line of the blur's input: columns [x, x + count) of row y, 0 outside the canvas.
template <class T>
FF_INLINE Vector<Compute<T>> line_part(const PeakParams<T>& p, const T* z, int x, int y, int count) {
  using C = Compute<T>;
  const T* line = z + y * p.maps.row;
  if (p.maps.column == 1 && x >= 0 && x + count <= p.size.width) return get_some(line + x, count);
  C lanes[kWidth<T>] = {};
  const int end = x + count < p.size.width ? count : p.size.width - x;
  for (int i = x < 0 ? -x : 0; i < end; ++i) lanes[i] = C(line[(x + i) * p.maps.column]);
  return load(lanes);
}

// The highest value of the whole map under the blur: read again only where a clip may act.
template <class T>
Compute<T> blurred_top(const PeakParams<T>& p, const T* z) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const int half = p.kernel / 2, width = p.size.width, height = p.size.height;
  C* buffer = static_cast<C*>(malloc(sizeof(C) * (size_t(width) + 2 * half + 2 * L)));
  if (!buffer) __builtin_trap();  // a few kilobytes
  for (int x = 0; x < width + 2 * half + 2 * L; ++x) buffer[x] = C(0);
  Vector<C> top = broadcast(-infinity<C>());
  for (int y = 0; y < height; ++y) {
    const int begin = y < half ? -y : -half, end = y + half < height ? half : height - 1 - y;
    for (int x = 0; x < width; x += L) {
      const int count = width - x < L ? width - x : L;
      Vector<C> sum{};
      for (int d = begin; d <= end; ++d) sum += p.taps[d < 0 ? -d : d] * line_part(p, z, x, y + d, count);
      store(buffer + half + x, count == L ? sum : keep_head<C>(sum, count));
    }
    for (int x = 0; x < width; x += L) {
      Vector<C> sum{};
      for (int i = 0; i < p.kernel; ++i) sum += p.taps[i < half ? half - i : i - half] * load(buffer + x + i);
      const int count = width - x < L ? width - x : L;
      top = max(top, lane_index<C>() < C(count) ? sum : top);
    }
  }
  free(buffer);
  return max_lane<C>(top);
}

// kStep: that of the rule. Vertical sums in registers, horizontal ones from a line in L1.
template <int kStep, class T>
void refine_dark(const PeakParams<T>& p, const DarkRule<Compute<T>>& rule, const T* z, int column, int line,
                 Compute<T> value, Compute<T>& x, Compute<T>& y) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>, kSide = 2 * kStep + 1, kMostColumns = kMostKernel + kSide - 1;
  constexpr int kPadded = kSide * kSide + L;
  const int half = p.kernel / 2, columns = p.kernel + kSide - 1;
  const int left = column - kStep - half, above = line - kStep - half;
  const int begin = above < 0 ? -above : 0, end = above + columns < p.size.height ? columns : p.size.height - above;
  C sums[kSide][kMostColumns + 2 * L];  // a vector of zeros behind the columns: the last load runs into it
  int first = 0;
  for (; first < columns; first += L) {
    const int count = columns - first < L ? columns - first : L;
    Vector<C> sum[kSide] = {};
    for (int i = begin; i < end; ++i) {
      const Vector<C> v = line_part(p, z, left + first, above + i, count);
      for (int j = 0; j < kSide; ++j) {
        const int distance = i - j < half ? half - (i - j) : i - j - half;
        if (distance <= half) sum[j] += p.taps[distance] * v;
      }
    }
    for (int j = 0; j < kSide; ++j) store(sums[j] + first, sum[j]);
  }
  for (int j = 0; j < kSide; ++j) store(sums[j] + first, Vector<C>{});
  C b[kPadded];  // kSide x kSide; each row's vector runs over the next row, which is written after it
  for (int j = 0; j < kSide; ++j)
    for (int k = 0; k < kSide; k += L) {
      Vector<C> sum{};
      for (int i = 0; i < p.kernel; ++i) sum += p.taps[i < half ? half - i : i - half] * load(sums[j] + k + i);
      store(b + j * kSide + k, sum);
    }
  bool clips = false;
  for (int i = 0; i < kSide * kSide; ++i) clips |= rule.may_clip(b[i], value);
  const C scale = clips ? value / blurred_top(p, z) : C(1);
  if (!(scale > C(0))) return;  // nothing above 0 is left of the map
  for (int i = kSide * kSide; i < kPadded; ++i) b[i] = C(1);
  for (int i = 0; i < kSide * kSide; i += L) {
    Vector<C> v = load(b + i) * scale;
    v = max(v, broadcast(rule.low));
    store(b + i, log(min(v, broadcast(rule.high))));
  }
  dark_shift(
      kStep, [&](int dx, int dy) __attribute__((always_inline)) { return b[(dy + kStep) * kSide + dx + kStep]; }, x, y);
}

template <class T>
FF_INLINE void finish_peak(const PeakParams<T>& p, int64_t r, const T* z, const Best<Compute<T>>& best) {
  using C = Compute<T>;
  const int column = int(best.index % p.size.width), line = int(best.index / p.size.width);
  C x = C(column), y = C(line), score = best.value;
  refine_peak(Refine(p.refine), x, y, [&](int dx, int dy, C& value) __attribute__((always_inline)) {
    const int nx = column + dx, ny = line + dy;
    if (nx < 0 || nx >= p.size.width || ny < 0 || ny >= p.size.height) return false;
    value = C(z[ny * p.maps.row + nx * p.maps.column]);
    return true;
  });
  if (is_dark(Refine(p.refine)) && !best.bad) {
    const auto rule = dark_rule<C>(Refine(p.refine));
    if (rule.applies(score, column, line, p.size.width, p.size.height)) {
      if (rule.step == 2)
        refine_dark<2>(p, rule, z, column, line, score, x, y);
      else
        refine_dark<1>(p, rule, z, column, line, score, x, y);
    }
  }
  if (best.bad) x = y = score = C(NAN);
  p.points[2 * r] = x;
  p.points[2 * r + 1] = y;
  p.score[r] = score;
}

template <class T>
void peak(const PeakParams<T>& p, int64_t begin, int64_t end) {
  if (!p.maps.pixel_major) {
    for (int64_t r = begin; r < end; ++r) {
      const T* z = map_of(p.maps, p.size, r);
      finish_peak(p, r, z, planar_peak(z, p.maps.row, p.size));
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(p.size, task);
    chunk.each<kWidth<T>>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
      const int64_t r = chunk.image * p.size.landmarks + landmark;
      const T* z = map_of(p.maps, p.size, r);
      pixel_major_peaks(z, p.maps, p.size, lanes,
                        [&](int k, const Best<Compute<T>>& best)
                            __attribute__((always_inline)) { finish_peak(p, r + k, z + k, best); });
    });
  }
}

// Soft-argmax, planar.

// max(sign z) over n pixels
template <class T>
FF_INLINE Compute<T> highest(const T* z, int64_t n, Compute<T> sign) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  Vector<C> top[4];
  for (auto& v : top) v = broadcast(-infinity<C>());
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) top[k] = max(top[k], sign * get(z + i + k * L));
  each_vector<L>(i, n, [&](int64_t x, int count) __attribute__((always_inline)) {
    top[0] = max(top[0], sign * get_some(z + x, count));
  });
  return max_lane<C>(max(max(top[0], top[1]), max(top[2], top[3])));
}

// `next` is fetched while this map is in the cache: the sums below are bound by arithmetic.
template <class T>
FF_INLINE void planar_region(const SoftArgmaxParams<T>& p, int64_t r, const T* z, const T* next, const Region& region,
                             Compute<T> beta) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const int64_t row = p.maps.row;
  const C sign = beta < C(0) ? C(-1) : C(1);
  C top = -infinity<C>();
  if (region.x.end - region.x.begin == row) {
    top = highest(z + region.y.begin * row, region.pixels(), sign);
  } else {
    for (int y = region.y.begin; y < region.y.end; ++y) {
      const C line = highest(z + y * row + region.x.begin, region.x.end - region.x.begin, sign);
      top = line > top ? line : top;
    }
  }
  top *= sign;
  const C rate = beta * C(kLog2E);
  Vector<C> total{}, sum_x{}, sum_y{};
  for (int y = region.y.begin; y < region.y.end; ++y) {
    const T* line = z + y * row;
    Vector<C> line_total{}, x = lane_index<C>() + C(region.x.begin);
    each_vector<L>(region.x.begin, region.x.end, [&](int64_t i, int count) __attribute__((always_inline)) {
      if (next) __builtin_prefetch(next + (line - z) + i, 0, 3);
      Vector<C> e = exp2_down((get_some(line + i, count) - top) * rate);
      if (count != L) e = keep_head<C>(e, count);
      line_total += e;
      sum_x += e * x;
      x += C(L);
    });
    total += line_total;
    sum_y += line_total * C(y);
  }
  finish(p, r, region, beta, top, sum<C>(total), sum<C>(sum_x), sum<C>(sum_y));
}

template <class T, bool kGradBeta>
FF_INLINE void planar_region_backward(const SoftArgmaxBackwardParams<T>& b, int64_t r, const T* z, T* grad,
                                      const T* next, const Region& region, Compute<T> beta) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const SoftArgmaxParams<T>& p = b.forward;
  const LogitGrad<C> g = logit_grad_of(p, b.grad_points, r, region, beta);
  const C top = p.normalizer[2 * r], log2_total = p.normalizer[2 * r + 1] * C(kLog2E), rate = beta * C(kLog2E);
  Vector<C> sum_beta{};
  for (int y = region.y.begin; y < region.y.end; ++y) {
    const T* line = z + y * p.maps.row;
    T* grad_line = grad + y * b.grad_maps.row;
    const C base = g.b * (C(y) - g.y) + g.total;
    Vector<C> x = lane_index<C>() + C(region.x.begin);
    each_vector<L>(region.x.begin, region.x.end, [&](int64_t i, int count) __attribute__((always_inline)) {
      if (next) __builtin_prefetch(next + (line - z) + i, 0, 3);
      const Vector<C> above = get_some(line + i, count) - top;
      Vector<C> d = exp2_down(above * rate - log2_total) * ((x - g.x) * g.a + base);
      put_some(grad_line + i, beta * d, count);
      if constexpr (kGradBeta) {
        d = d == C(0) ? d : d * above;  // a masked pixel: 0 * -inf
        sum_beta += count == L ? d : keep_head<C>(d, count);
      }
      x += C(L);
    });
  }
  if constexpr (kGradBeta) b.grad_beta[r] = sum<C>(sum_beta) + (p.debias ? g.total * top : C(0));
}

template <class T>
FF_INLINE void poison(const SoftArgmaxParams<T>& p, int64_t r) {
  p.points[2 * r] = p.points[2 * r + 1] = p.normalizer[2 * r] = p.normalizer[2 * r + 1] = Compute<T>(NAN);
}

// Soft-argmax, pixel-major.

// One image row at a time: its maximum, then its exponentials, while it stands in the cache.
template <class T>
FF_INLINE void pixel_major_sums(const SoftArgmaxParams<T>& p, const Chunk& chunk, Compute<T> beta) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const HeatmapSize& s = p.size;
  const Region all = region_of(s, -1, 0);
  const C sign = beta < C(0) ? C(-1) : C(1), rate = beta * sign * C(kLog2E);
  C top[kMostLandmarks], total[kMostLandmarks] = {}, sum_x[kMostLandmarks] = {}, sum_y[kMostLandmarks] = {};
  for (C& t : top) t = -infinity<C>();
  // A vector that overlaps the one before would add twice to the lanes they share: it has a place of its own.
  const T* image = p.maps.data + chunk.image * p.maps.image;
  for (int y = 0; y < s.height; ++y) {
    int slot = 0;
    chunk.each<L>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
      const T* line = image + landmark + y * p.maps.row;
      const Vector<C> before = load(top + slot);
      Vector<C> now = before;
      for (int x = 0; x < s.width; ++x) now = max(now, sign * get_some(line + x * p.maps.column, lanes));
      const Vector<C> zero = now == -infinity<C>() ? Vector<C>{} : now;
      const Vector<C> scale = before == -infinity<C>() ? Vector<C>{} : exp2_down((before - zero) * rate);
      Vector<C> line_total{}, line_x{};
      for (int x = 0; x < s.width; ++x) {
        const Vector<C> e = exp2_down((sign * get_some(line + x * p.maps.column, lanes) - zero) * rate);
        line_total += e;
        line_x += e * C(x);
      }
      store(top + slot, now);
      store(total + slot, load(total + slot) * scale + line_total);
      store(sum_x + slot, load(sum_x + slot) * scale + line_x);
      store(sum_y + slot, load(sum_y + slot) * scale + line_total * C(y));
      slot += L;
    });
  }
  int slot = 0;
  chunk.each<L>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
    for (int k = 0; k < lanes; ++k)
      finish(p, chunk.image * s.landmarks + landmark + k, all, beta, sign * top[slot + k], total[slot + k],
             sum_x[slot + k], sum_y[slot + k]);
    slot += L;
  });
}

template <class T, bool kGradBeta>
FF_INLINE void pixel_major_backward(const SoftArgmaxBackwardParams<T>& b, const Chunk& chunk, Compute<T> beta) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const SoftArgmaxParams<T>& p = b.forward;
  const HeatmapSize& s = p.size;
  const Region all = region_of(s, -1, 0);
  const C rate = beta * C(kLog2E);
  struct Row {
    C a[L], b[L], x[L], y[L], total[L], top[L], log2_total[L], beta[L];
  };
  constexpr int kRows = kMostLandmarks / L;
  Row rows[kRows];
  const T* image = p.maps.data + chunk.image * p.maps.image;
  T* grad_image = b.grad_maps.data + chunk.image * b.grad_maps.image;
  Row* row = rows;
  chunk.each<L>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
    for (int k = 0; k < L; ++k) {
      const int64_t r = chunk.image * s.landmarks + landmark + (k < lanes ? k : 0);
      const LogitGrad<C> g = logit_grad_of(p, b.grad_points, r, all, beta);
      row->a[k] = g.a, row->b[k] = g.b, row->x[k] = g.x, row->y[k] = g.y, row->total[k] = g.total;
      row->top[k] = p.normalizer[2 * r];
      row->log2_total[k] = p.normalizer[2 * r + 1] * C(kLog2E);
      row->beta[k] = C(0);
    }
    ++row;
  });
  for (int y = 0; y < s.height; ++y) {
    row = rows;
    chunk.each<L>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
      const T* line = image + landmark + y * p.maps.row;
      T* grad_line = grad_image + landmark + y * b.grad_maps.row;
      const Vector<C> a = load(row->a), mean = load(row->x);
      const Vector<C> base = load(row->b) * (C(y) - load(row->y)) + load(row->total);
      const Vector<C> top = load(row->top), log2_total = load(row->log2_total);
      Vector<C> sum_beta{};
      for (int x = 0; x < s.width; ++x) {
        const Vector<C> above = get_some(line + x * p.maps.column, lanes) - top;
        const Vector<C> d = exp2_down(above * rate - log2_total) * (a * (C(x) - mean) + base);
        put_some(grad_line + x * b.grad_maps.column, beta * d, lanes);
        if constexpr (kGradBeta) sum_beta += d == C(0) ? d : d * above;
      }
      if constexpr (kGradBeta) store(row->beta, load(row->beta) + sum_beta);
      ++row;
    });
  }
  if constexpr (kGradBeta) {
    row = rows;
    chunk.each<L>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
      for (int k = 0; k < lanes; ++k) {
        const int64_t r = chunk.image * s.landmarks + landmark + k;
        b.grad_beta[r] = row->beta[k] + (p.debias ? row->total[k] * row->top[k] : C(0));
      }
      ++row;
    });
  }
}

// The window of one map of any strides, pixel by pixel: windows are small.
template <class T>
FF_INLINE void strided_region(const SoftArgmaxParams<T>& p, int64_t r, const T* z, const Region& region,
                              Compute<T> beta) {
  using C = Compute<T>;
  const C sign = beta < C(0) ? C(-1) : C(1);
  C top = -infinity<C>(), total = 0, sum_x = 0, sum_y = 0;
  for (int y = region.y.begin; y < region.y.end; ++y)
    for (int x = region.x.begin; x < region.x.end; ++x) {
      const C v = sign * C(z[y * p.maps.row + x * p.maps.column]);
      top = v > top ? v : top;
    }
  top *= sign;
  for (int y = region.y.begin; y < region.y.end; ++y)
    for (int x = region.x.begin; x < region.x.end; ++x) {
      const C e = exp_scalar(beta * (C(z[y * p.maps.row + x * p.maps.column]) - top));
      total += e;
      sum_x += e * C(x);
      sum_y += e * C(y);
    }
  finish(p, r, region, beta, top, total, sum_x, sum_y);
}

template <class T>
FF_INLINE void strided_region_backward(const SoftArgmaxBackwardParams<T>& b, int64_t r, const T* z, T* grad,
                                       const Region& region, Compute<T> beta) {
  using C = Compute<T>;
  const SoftArgmaxParams<T>& p = b.forward;
  const LogitGrad<C> g = logit_grad_of(p, b.grad_points, r, region, beta);
  const C top = p.normalizer[2 * r], log_total = p.normalizer[2 * r + 1];
  C sum_beta = 0;
  for (int y = region.y.begin; y < region.y.end; ++y)
    for (int x = region.x.begin; x < region.x.end; ++x) {
      const C above = C(z[y * p.maps.row + x * p.maps.column]) - top;
      const C d = exp_scalar(beta * above - log_total) * (g.a * (C(x) - g.x) + g.b * (C(y) - g.y) + g.total);
      grad[y * b.grad_maps.row + x * b.grad_maps.column] = T(beta * d);
      sum_beta += d == C(0) ? d : d * above;
    }
  if (b.grad_beta) b.grad_beta[r] = sum_beta + (p.debias ? g.total * top : C(0));
}

template <class T>
void soft_argmax(const SoftArgmaxParams<T>& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const C beta = beta_of(p);
  if (!p.maps.pixel_major) {
    for (int64_t r = begin; r < end; ++r) {
      const T* z = map_of(p.maps, p.size, r);
      if (p.window < 0) {
        planar_region(p, r, z, r + 1 < end ? map_of(p.maps, p.size, r + 1) : nullptr, region_of(p.size, -1, 0), beta);
        continue;
      }
      const Best<C> best = planar_peak(z, p.maps.row, p.size);
      p.peak[r] = int32_t(best.index);
      if (best.bad)
        poison(p, r);
      else
        planar_region(p, r, z, static_cast<const T*>(nullptr), region_of(p.size, p.window, best.index), beta);
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(p.size, task);
    if (p.window < 0) {
      pixel_major_sums(p, chunk, beta);
      continue;
    }
    chunk.each<kWidth<T>>([&](int64_t landmark, int lanes) __attribute__((always_inline)) {
      const int64_t r = chunk.image * p.size.landmarks + landmark;
      const T* z = map_of(p.maps, p.size, r);
      pixel_major_peaks(z, p.maps, p.size, lanes, [&](int k, const Best<C>& best) __attribute__((always_inline)) {
        p.peak[r + k] = int32_t(best.index);
        if (best.bad)
          poison(p, r + k);
        else
          strided_region(p, r + k, z + k, region_of(p.size, p.window, best.index), beta);
      });
    });
  }
}

template <class T>
FF_INLINE void zero_map(T* grad, const Maps<T>& m, const HeatmapSize& s) {
  for (int y = 0; y < s.height; ++y) __builtin_memset(static_cast<void*>(grad + y * m.row), 0, sizeof(T) * s.width);
}

template <class T>
void soft_argmax_backward(const SoftArgmaxBackwardParams<T>& b, int64_t begin, int64_t end) {
  const SoftArgmaxParams<T>& p = b.forward;
  const Compute<T> beta = beta_of(p);
  if (!p.maps.pixel_major) {
    for (int64_t r = begin; r < end; ++r) {
      const T* z = map_of(p.maps, p.size, r);
      const T* next = p.window < 0 && r + 1 < end ? map_of(p.maps, p.size, r + 1) : nullptr;
      T* grad = map_of(b.grad_maps, p.size, r);
      if (p.window >= 0) zero_map(grad, b.grad_maps, p.size);
      const Region region = region_of(p.size, p.window, p.window < 0 ? 0 : p.peak[r]);
      if (b.grad_beta)
        planar_region_backward<T, true>(b, r, z, grad, next, region, beta);
      else
        planar_region_backward<T, false>(b, r, z, grad, next, region, beta);
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(p.size, task);
    if (p.window < 0) {
      if (b.grad_beta)
        pixel_major_backward<T, true>(b, chunk, beta);
      else
        pixel_major_backward<T, false>(b, chunk, beta);
      continue;
    }
    T* grad = b.grad_maps.data + chunk.image * b.grad_maps.image + chunk.begin;
    for (int y = 0; y < p.size.height; ++y)
      for (int x = 0; x < p.size.width; ++x)
        __builtin_memset(static_cast<void*>(grad + y * b.grad_maps.row + x * b.grad_maps.column), 0,
                         sizeof(T) * (chunk.end - chunk.begin));
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t r = chunk.image * p.size.landmarks + k;
      strided_region_backward(b, r, map_of(p.maps, p.size, r), map_of(b.grad_maps, p.size, r),
                              region_of(p.size, p.window, p.peak[r]), beta);
    }
  }
}

// Render.

// The axes of one map, and for the gradient their first and second moments: g, g (d - E d), g (d^2 - E d^2), d = h - c;
// the means are 0 but for sum-normalised axes.
template <class C>
struct Axis {
  C *g, *g1, *g2;
  Cells cells;
};

// Room for the axes of both directions; freed by hand, since a destructor would ask for exception tables. Zeros:
// vectors of a window at the end reach past what is filled, and 0 times what stood there before might be NaN.
template <class C>
struct AxisMemory {
  int padded_width, padded_height;
  C* memory;
  FF_INLINE AxisMemory(const HeatmapSize& s, int arrays)
      : padded_width(s.width + kLanes<C>),
        padded_height(s.height + kLanes<C>),
        memory(static_cast<C*>(calloc(size_t(arrays) * (size_t(padded_width) + padded_height), sizeof(C)))) {
    if (!memory) __builtin_trap();  // a few kilobytes
  }
  FF_INLINE Axis<C> x() const { return {memory, memory + padded_width, memory + 2 * padded_width, {}}; }
  FF_INLINE Axis<C> y(int arrays) const {
    C* start = memory + arrays * padded_width;
    return {start, start + padded_height, start + 2 * padded_height, {}};
  }
};

template <bool kMoments, class C>
FF_INLINE void fill_axis(Axis<C>& axis, C centre, C sigma, double truncate, int size, bool normalized) {
  constexpr int L = kLanes<C>;
  axis.cells = render_cells(centre, sigma, truncate, size);
  const TargetAxis<C> target = target_axis(centre, sigma, axis.cells, normalized);
  Vector<C> total{};
  for (int i = 0; i < size; i += L) {
    const Vector<C> h = lane_index<C>() + C(i);
    Vector<C> g = exp(min(target_exponent(target, h), Vector<C>{}));
    g = h >= C(axis.cells.begin) && h < C(axis.cells.end) ? g : Vector<C>{};
    store(axis.g + i, g);
    total += g;
  }
  const C all = sum<C>(total), scale = normalized && all > C(0) ? C(1) / all : C(1);
  if constexpr (!kMoments) {
    if (normalized)
      for (int i = 0; i < size; i += L) store(axis.g + i, load(axis.g + i) * scale);
    return;
  }
  Vector<C> first{}, second{};
  for (int i = 0; i < size; i += L) {
    const Vector<C> d = lane_index<C>() + (C(i) - centre), g = load(axis.g + i) * scale;
    store(axis.g + i, g);
    first += g * d;
    second += g * d * d;
  }
  const C mean = normalized ? sum<C>(first) : C(0), square = normalized ? sum<C>(second) : C(0);
  for (int i = 0; i < size; i += L) {
    const Vector<C> d = lane_index<C>() + (C(i) - centre), g = load(axis.g + i);
    store(axis.g1 + i, g * (d - mean));
    store(axis.g2 + i, g * (d * d - square));
  }
}

template <class T>
FF_INLINE Compute<T> sigma_of(const RenderParams<T>& p, int64_t r) {
  return p.sigmas ? p.sigmas[r] : p.sigma;
}

template <class T>
void render(const RenderParams<T>& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const int height = p.size.height, width = p.size.width;
  const AxisMemory<C> memory(p.size, 1);
  Axis<C> ax = memory.x(), ay = memory.y(1);
  for (int64_t r = begin; r < end; ++r) {
    const C x = C(p.points[2 * r]), y = C(p.points[2 * r + 1]), sigma = sigma_of(p, r);
    T* map = p.maps + r * height * width;
    if (!render_valid(x, y, sigma)) {
      for (int64_t i = 0; i < int64_t(height) * width; ++i) map[i] = T(C(NAN));
      continue;
    }
    fill_axis<false>(ax, x, sigma, p.truncate, width, p.normalized);
    fill_axis<false>(ay, y, sigma, p.truncate, height, p.normalized);
    for (int j = 0; j < height; ++j) {
      T* line = map + int64_t(j) * width;
      const C g = ay.g[j];
      each_vector<L>(0, width, [&](int64_t i, int count) __attribute__((always_inline)) {
        put_some(line + i, load(ax.g + i) * g, count);
      });
    }
  }
  free(memory.memory);
}

template <class T>
void render_backward(const RenderBackwardParams<T>& b, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int L = kWidth<T>;
  const RenderParams<T>& p = b.forward;
  const AxisMemory<C> memory(p.size, 3);
  Axis<C> ax = memory.x(), ay = memory.y(3);
  const bool gathered = b.grad_maps.column != 1;
  T* gather = gathered ? static_cast<T*>(malloc(sizeof(T) * p.size.width)) : nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const C x = C(p.points[2 * r]), y = C(p.points[2 * r + 1]), sigma = sigma_of(p, r);
    if (!render_valid(x, y, sigma)) {
      b.grad_points[2 * r] = b.grad_points[2 * r + 1] = T(C(NAN));
      b.grad_sigmas[r] = C(NAN);
      continue;
    }
    fill_axis<true>(ax, x, sigma, p.truncate, p.size.width, p.normalized);
    fill_axis<true>(ay, y, sigma, p.truncate, p.size.height, p.normalized);
    const T* map = map_of(b.grad_maps, p.size, r);
    Vector<C> grad_x{}, grad_y{}, grad_sigma{};
    for (int j = ay.cells.begin; j < ay.cells.end; ++j) {
      const T* line = map + j * b.grad_maps.row;
      if (gathered) {
        for (int i = ax.cells.begin; i < ax.cells.end; ++i) gather[i] = line[i * b.grad_maps.column];
        line = gather;
      }
      Vector<C> s0{}, s1{}, s2{};
      each_vector<L>(ax.cells.begin, ax.cells.end, [&](int64_t i, int count) __attribute__((always_inline)) {
        Vector<C> g = get_some(line + i, count);
        if (count != L) g = keep_head<C>(g, count);
        s0 += g * load(ax.g + i);
        s1 += g * load(ax.g1 + i);
        s2 += g * load(ax.g2 + i);
      });
      grad_x += s1 * ay.g[j];
      grad_y += s0 * ay.g1[j];
      grad_sigma += s2 * ay.g[j] + s0 * ay.g2[j];
    }
    const C inverse = C(1) / (sigma * sigma);
    b.grad_points[2 * r] = T(sum<C>(grad_x) * inverse);
    b.grad_points[2 * r + 1] = T(sum<C>(grad_y) * inverse);
    b.grad_sigmas[r] = sum<C>(grad_sigma) * inverse / sigma;
  }
  free(gather);
  free(memory.memory);
}

}  // namespace

template <class T>
const HeatmapCpu<T>& heatmap_cpu() {
  static constexpr HeatmapCpu<T> table{render<T>, render_backward<T>, soft_argmax<T>, soft_argmax_backward<T>, peak<T>};
  return table;
}
template const HeatmapCpu<float>& heatmap_cpu<float>();
template const HeatmapCpu<double>& heatmap_cpu<double>();
template const HeatmapCpu<Half>& heatmap_cpu<Half>();
template const HeatmapCpu<BFloat16>& heatmap_cpu<BFloat16>();

}  // namespace FF_ISA
}  // namespace ff
