// CPU kernels of the pool room, compiled once for every instruction set.
//
// Floor of the loss with gradient: 4 K^2 N flops a row (K = 2 radius + 1) and, when rows share nothing, K^2 N reads.
// A pixel's leaves are read from memory once: the mixture at that pixel is all its gradient factor y / yhat needs, so
// the dot products and the accumulation of the gradient follow one another while the leaves are in the L1 cache, and
// rows that stand near one another (the order of PoolRows) take turns on them.
#include "common/simd.h"
#include "pool/pool.h"
#include "pool/pool_math.h"

namespace ff {
namespace FF_ISA {
namespace {

constexpr int kGroup = 8;                             // rows that share pool rows
constexpr int64_t kBlockBytes = 32 * 1024;            // leaves of a run of pixels, within L1
constexpr int kMaxBlock = 16;                         // pixels in a run
constexpr int kWide = FF_VECTOR_BYTES == 64 ? 4 : 2;  // vectors held per pixel by the scatter (32 or 16 registers)
constexpr int kScatterBlock = 4;                      // pixels of a scatter run
constexpr int kFewRows = 6;                           // rows up to which a scatter goes pixel by pixel

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(new T[n > 0 ? n : 1]) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

// out[i] = p . q_i for P <= 8 pixels whose leaves follow one another
template <class T, int P>
FF_INLINE void dot_pixels(const T* __restrict__ p, const T* __restrict__ q, int64_t leaves, T* __restrict__ out) {
  constexpr int kUnroll = P <= 4 ? 2 : 1, L = kLanes<T>;
  Vector<T> acc[kUnroll][P] = {};
  int64_t n = 0;
  for (; n + kUnroll * L <= leaves; n += kUnroll * L)
    for (int u = 0; u < kUnroll; ++u) {
      const Vector<T> v = load(p + n + u * L);
      for (int i = 0; i < P; ++i) acc[u][i] += v * load(q + i * leaves + n + u * L);
    }
  for (; n + L <= leaves; n += L) {
    const Vector<T> v = load(p + n);
    for (int i = 0; i < P; ++i) acc[0][i] += v * load(q + i * leaves + n);
  }
  if (n < leaves) {
    const int rest = int(leaves - n);
    const Vector<T> v = load_partial(p + n, rest);
    for (int i = 0; i < P; ++i) acc[0][i] += v * load_partial(q + i * leaves + n, rest);
  }
  Vector<T> s[8] = {};
  for (int i = 0; i < P; ++i) {
    s[i] = acc[0][i];
    for (int u = 1; u < kUnroll; ++u) s[i] += acc[u][i];
  }
  // Each step halves the vectors; the lanes left over are folded the same way.
  constexpr int kVectors = P > 4 ? 8 : P > 2 ? 4 : P > 1 ? 2 : 1;
  for (int count = kVectors; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) s[i] = pair_sums<T>(s[2 * i], s[2 * i + 1]);
  if constexpr (kVectors >= kLanes<T>) {
    // More vectors than lanes only where a vector has two or four lanes: sum them one by one.
    for (int i = 0; i < P; ++i) {
      Vector<T> one = acc[0][i];
      for (int u = 1; u < kUnroll; ++u) one += acc[u][i];
      out[i] = sum<T>(one);
    }
  } else {
    for (int width = kLanes<T>; width > kVectors; width /= 2) s[0] = pair_sums<T>(s[0], s[0]);
    T lane[kLanes<T>];
    store(lane, s[0]);
    for (int i = 0; i < P; ++i) out[i] = lane[i];
  }
}

template <class T>
void dot_run(const T* p, const T* q, int64_t leaves, int count, T* out) {
  for (; count >= 8; count -= 8, q += 8 * leaves, out += 8) dot_pixels<T, 8>(p, q, leaves, out);
  switch (count) {
    case 7: return dot_pixels<T, 7>(p, q, leaves, out);
    case 6: return dot_pixels<T, 6>(p, q, leaves, out);
    case 5: return dot_pixels<T, 5>(p, q, leaves, out);
    case 4: return dot_pixels<T, 4>(p, q, leaves, out);
    case 3: return dot_pixels<T, 3>(p, q, leaves, out);
    case 2: return dot_pixels<T, 2>(p, q, leaves, out);
    case 1: return dot_pixels<T, 1>(p, q, leaves, out);
  }
}

// sum += factor_i q_i over a run of pixels
template <class T>
void add_run(const T* __restrict__ factor, const T* __restrict__ q, int64_t leaves, int count, T* __restrict__ total) {
  constexpr int L = kLanes<T>, kHeld = 8;
  int64_t n = 0;
  for (; n + kHeld * L <= leaves; n += kHeld * L) {
    Vector<T> acc[kHeld];
    for (int u = 0; u < kHeld; ++u) acc[u] = load(total + n + u * L);
    for (int i = 0; i < count; ++i) {
      const Vector<T> f = broadcast<T>(factor[i]);
      for (int u = 0; u < kHeld; ++u) acc[u] += f * load(q + i * leaves + n + u * L);
    }
    for (int u = 0; u < kHeld; ++u) store(total + n + u * L, acc[u]);
  }
  for (; n + L <= leaves; n += L) {
    Vector<T> acc = load(total + n);
    for (int i = 0; i < count; ++i) acc += broadcast<T>(factor[i]) * load(q + i * leaves + n);
    store(total + n, acc);
  }
  if (n < leaves) {
    const int rest = int(leaves - n);
    Vector<T> acc = load_partial(total + n, rest);
    for (int i = 0; i < count; ++i) acc += broadcast<T>(factor[i]) * load_partial(q + i * leaves + n, rest);
    store_partial(total + n, acc, rest);
  }
}

// One axis of the target: values that sum to 1 on the span; returns sum g log g.
template <class T>
T axis_values(Span span, T centre, T inverse_variance, T* g) {
  const T top = axis_log_max(span, centre, inverse_variance);
  T total = 0, entropy = 0;
  for (int h = span.begin; h < span.end; ++h) {
    const T e = axis_log(h, centre, inverse_variance) - top;
    const T v = std::exp(e);
    g[h - span.begin] = v;
    total += v;
    entropy += v * e;
  }
  const T inverse = T(1) / total;
  for (int i = 0; i < span.end - span.begin; ++i) g[i] *= inverse;
  return entropy * inverse - std::log(total);
}

template <class T>
struct Row {
  int64_t index;  // into prob, points
  Span x, y;
  T weight;
  T entropy;  // sum y log y
  T* gx;      // [x.end - x.begin]
  T* gy;      // [y.end - y.begin]
};

enum class Seen { window, nothing, undefined };

template <class T>
int axis_capacity(const PoolRows<T>& at) {
  const int64_t width = 2 * int64_t(at.radius) + 1, side = max(at.width, at.height);
  return int(min(width, side));
}

// What stands at a place of the order: a window, nothing to count, or a row that is NaN.
template <class T>
Seen read_row(const PoolRows<T>& at, int64_t index, Row<T>& row) {
  row.index = index;
  row.weight = at.weight ? at.weight[index] : T(1);
  if (row.weight == T(0)) return Seen::nothing;
  const T px = at.points[2 * index], py = at.points[2 * index + 1];
  if (!(px - px == T(0) && py - py == T(0) && row.weight - row.weight == T(0))) return Seen::undefined;
  row.x = window_span(px, at.radius, at.width);
  row.y = window_span(py, at.radius, at.height);
  if (row.x.begin >= row.x.end || row.y.begin >= row.y.end) return Seen::nothing;
  row.entropy = axis_values(row.x, px, at.inverse_variance, row.gx);
  row.entropy += axis_values(row.y, py, at.inverse_variance, row.gy);
  return Seen::window;
}

FF_INLINE Span joined(Span a, Span b) { return {min(a.begin, b.begin), max(a.end, b.end)}; }
FF_INLINE int64_t length(Span s) { return s.end - s.begin; }
FF_INLINE Span overlap(Span a, Span b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// Loss and gradient of a group of rows: for every run of pixels of their common rectangle, each row that overlaps it.
template <class T>
void kl_group(const PoolKlLossParams<T>& a, Row<T>* rows, int count, T* yhat, int64_t window_capacity) {
  const int64_t leaves = a.at.leaves;
  const int block =
      int(max<int64_t>(kScatterBlock, min<int64_t>(kMaxBlock, kBlockBytes / (int64_t(sizeof(T)) * leaves))));
  Span xs = rows[0].x, ys = rows[0].y;
  for (int r = 1; r < count; ++r) {
    xs = joined(xs, rows[r].x);
    ys = joined(ys, rows[r].y);
  }
  if (a.grad_prob)
    for (int r = 0; r < count; ++r) std::memset(a.grad_prob + rows[r].index * leaves, 0, sizeof(T) * leaves);
  for (int y = ys.begin; y < ys.end; ++y)
    for (int x = xs.begin; x < xs.end; x += block) {
      for (int r = 0; r < count; ++r) {
        const Row<T>& row = rows[r];
        const Span run = overlap({x, x + block}, row.x);
        if (run.begin >= run.end || y < row.y.begin || y >= row.y.end) continue;
        const int n = run.end - run.begin;
        const T* q = a.pool + (int64_t(y) * a.at.width + run.begin) * leaves;
        T* out = yhat + r * window_capacity + (y - row.y.begin) * length(row.x) + (run.begin - row.x.begin);
        dot_run(a.prob + row.index * leaves, q, leaves, n, out);
        if (!a.grad_prob) continue;
        T factor[kMaxBlock];
        const T gy = row.gy[y - row.y.begin] * -row.weight;
        for (int i = 0; i < n; ++i) factor[i] = kl_ratio(gy * row.gx[run.begin - row.x.begin + i], out[i], a.eps);
        add_run(factor, q, leaves, n, a.grad_prob + row.index * leaves);
      }
    }
  for (int r = 0; r < count; ++r) {
    const Row<T>& row = rows[r];
    const int width = int(length(row.x));
    const T* out = yhat + r * window_capacity;
    T cross = 0;
    for (int y = 0; y < length(row.y); ++y, out += width) {
      Vector<T> line{};
      for (int x = 0; x < width; x += kLanes<T>) {
        const int rest = min(kLanes<T>, width - x);
        const Vector<T> raw = load_partial(out + x, rest, T(1)), floor = broadcast<T>(a.eps);
        const Vector<T> v = raw + (raw - raw);  // as `defined`
        line += load_partial(row.gx + x, rest) * log(v < floor ? floor : v);
      }
      cross += row.gy[y] * sum<T>(line);
    }
    a.loss[row.index] = row.weight * (row.entropy - cross);
  }
}

template <class T>
void kl_loss(const PoolKlLossParams<T>& a, int64_t begin, int64_t end) {
  const int64_t leaves = a.at.leaves;
  const int axis = axis_capacity(a.at);
  const int64_t window = int64_t(min(axis, a.at.width)) * min(axis, a.at.height);
  Buffer<T> axes(int64_t(2) * axis * (kGroup + 1)), yhat(window * kGroup);
  Row<T> rows[kGroup + 1];
  for (int r = 0; r <= kGroup; ++r) {
    rows[r].gx = axes.data() + int64_t(2) * axis * r;
    rows[r].gy = rows[r].gx + axis;
  }
  int count = 0;
  Span xs{}, ys{};
  for (int64_t i = begin; i < end; ++i) {
    Row<T>& next = rows[count];
    const int64_t index = a.at.order[i];
    const Seen seen = read_row(a.at, index, next);
    if (seen != Seen::window) {
      const T value = seen == Seen::nothing ? T(0) : T(NAN);
      a.loss[index] = value;
      if (a.grad_prob)
        for (int64_t n = 0; n < leaves; ++n) a.grad_prob[index * leaves + n] = value;
      continue;
    }
    // A group stays together while its common rectangle is at most twice a window.
    const Span wide = count ? joined(xs, next.x) : next.x, tall = count ? joined(ys, next.y) : next.y;
    if (count == kGroup || length(wide) * length(tall) > 2 * window) {
      kl_group(a, rows, count, yhat.data(), window);
      Row<T> first = rows[0];
      rows[0] = rows[count];
      rows[count].gx = first.gx;
      rows[count].gy = first.gy;
      xs = rows[0].x;
      ys = rows[0].y;
      count = 1;
    } else {
      xs = wide;
      ys = tall;
      ++count;
    }
  }
  if (count) kl_group(a, rows, count, yhat.data(), window);
}

// A run of pixels of the scatter: for every 4 vectors of leaves, all rows that reach it, the sums held in registers.
template <class T, int kVectors>
FF_INLINE void scatter_leaves(const PoolScatterParams<T>& a, const T* const* p, const T* factor, int rows,
                              unsigned pixels, const T* q, T* out, int64_t n) {
  constexpr int L = kLanes<T>;
  Vector<T> acc[kScatterBlock][kVectors] = {};
  for (int r = 0; r < rows; ++r) {
    Vector<T> v[kVectors];
    for (int u = 0; u < kVectors; ++u) v[u] = load(p[r] + n + u * L);
    for (int i = 0; i < kScatterBlock; ++i) {
      const Vector<T> f = broadcast<T>(factor[r * kScatterBlock + i]);
      for (int u = 0; u < kVectors; ++u) acc[i][u] += f * v[u];
    }
  }
  const int64_t leaves = a.at.leaves;
  const bool times_pool = a.times_pool, accumulate = a.accumulate;
  const T scale = a.scale;
  for (int i = 0; i < kScatterBlock; ++i) {
    if (!(pixels >> i & 1)) continue;
    for (int u = 0; u < kVectors; ++u) {
      const int64_t at = i * leaves + n + u * L;
      Vector<T> s = acc[i][u] * scale;
      if (times_pool) s *= load(q + at);
      if (accumulate) s += load(out + at);
      store(out + at, s);
    }
  }
}

// Few rows: memory decides, and one pixel after the other is the order in which the hardware foresees it.
template <class T>
FF_INLINE void scatter_pixel(const PoolScatterParams<T>& a, const T* const* __restrict__ p,
                             const T* __restrict__ factor, int rows, const T* __restrict__ q, T* __restrict__ out) {
  constexpr int L = kLanes<T>;
  const int64_t leaves = a.at.leaves;
  const bool times_pool = a.times_pool, accumulate = a.accumulate;
  const T scale = a.scale;
  int64_t n = 0;
  for (; n + L <= leaves; n += L) {
    Vector<T> s{};
    for (int r = 0; r < rows; ++r) s += broadcast<T>(factor[r * kScatterBlock] * scale) * load(p[r] + n);
    if (times_pool) s *= load(q + n);
    if (accumulate) s += load(out + n);
    store(out + n, s);
  }
  if (n < leaves) {
    const int rest = int(leaves - n);
    Vector<T> s{};
    for (int r = 0; r < rows; ++r) s += broadcast<T>(factor[r * kScatterBlock] * scale) * load_partial(p[r] + n, rest);
    if (times_pool) s *= load_partial(q + n, rest);
    if (accumulate) s += load_partial(out + n, rest);
    store_partial(out + n, s, rest);
  }
}

// `pixels`: bit i says that a row reaches pixel i of the run.
template <class T>
void scatter_run(const PoolScatterParams<T>& a, const T* const* p, const T* factor, int rows, unsigned pixels,
                 const T* q, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t leaves = a.at.leaves;
  if (rows <= kFewRows) {
    for (int i = 0; i < kScatterBlock; ++i)
      if (pixels >> i & 1) scatter_pixel(a, p, factor + i, rows, q + i * leaves, out + i * leaves);
    return;
  }
  int64_t n = 0;
  for (; n + kWide * L <= leaves; n += kWide * L) scatter_leaves<T, kWide>(a, p, factor, rows, pixels, q, out, n);
  for (; n + L <= leaves; n += L) scatter_leaves<T, 1>(a, p, factor, rows, pixels, q, out, n);
  if (n < leaves) {
    const int rest = int(leaves - n);
    Vector<T> acc[kScatterBlock] = {};
    for (int r = 0; r < rows; ++r) {
      const Vector<T> v = load_partial(p[r] + n, rest);
      for (int i = 0; i < kScatterBlock; ++i) acc[i] += broadcast<T>(factor[r * kScatterBlock + i]) * v;
    }
    for (int i = 0; i < kScatterBlock; ++i) {
      if (!(pixels >> i & 1)) continue;
      Vector<T> s = acc[i] * a.scale;
      if (a.times_pool) s *= load_partial(q + i * leaves + n, rest);
      if (a.accumulate) s += load_partial(out + i * leaves + n, rest);
      store_partial(out + i * leaves + n, s, rest);
    }
  }
}

// Tiles of the canvas; tile_rows lists, for each, the rows whose windows reach it. No two tiles share a pixel, so
// nothing is added atomically and the sums do not depend on the number of threads.
template <class T>
void scatter(const PoolScatterParams<T>& a, const int32_t* tile_rows, const int64_t* tile_starts, int64_t begin,
             int64_t end) {
  const PoolRows<T>& at = a.at;
  const int64_t leaves = at.leaves;
  const int tiles_x = (at.width + kPoolTile - 1) / kPoolTile, axis = axis_capacity(at);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int32_t* list = tile_rows + tile_starts[tile];
    const int listed = int(tile_starts[tile + 1] - tile_starts[tile]);
    const int x0 = int(tile % tiles_x) * kPoolTile, y0 = int(tile / tiles_x) * kPoolTile;
    const Span tile_x{x0, min(x0 + kPoolTile, at.width)}, tile_y{y0, min(y0 + kPoolTile, at.height)};
    if (!listed) {
      if (!a.accumulate)
        for (int y = tile_y.begin; y < tile_y.end; ++y)
          std::memset(a.out + (int64_t(y) * at.width + x0) * leaves, 0, sizeof(T) * leaves * length(tile_x));
      continue;
    }
    Buffer<T> axes(int64_t(2) * axis * listed), factor(int64_t(kScatterBlock) * listed);
    Buffer<Row<T>> rows(listed);
    Buffer<const T*> reach(listed);
    int count = 0;
    for (int i = 0; i < listed; ++i) {
      Row<T>& row = rows.data()[count];
      row.gx = axes.data() + int64_t(2) * axis * i;
      row.gy = row.gx + axis;
      count += read_row(at, list[i], row) == Seen::window;
    }
    for (int y = tile_y.begin; y < tile_y.end; ++y)
      for (int x = tile_x.begin; x < tile_x.end; x += kScatterBlock) {
        const Span block{x, min(x + kScatterBlock, tile_x.end)};
        const int64_t pixel = (int64_t(y) * at.width + x) * leaves;
        int reached = 0;
        unsigned pixels = 0;
        for (int i = 0; i < count; ++i) {
          const Row<T>& row = rows.data()[i];
          const Span run = overlap(block, row.x);
          if (y < row.y.begin || y >= row.y.end || run.begin >= run.end) continue;
          T* f = factor.data() + int64_t(reached) * kScatterBlock;
          for (int k = 0; k < kScatterBlock; ++k) f[k] = T(0);
          const T* p = a.prob + row.index * leaves;
          T yhat[kScatterBlock];
          if (a.pool) dot_run(p, a.pool + pixel + (run.begin - x) * leaves, leaves, run.end - run.begin, yhat);
          const T gy = row.gy[y - row.y.begin] * row.weight;
          bool any = false;
          for (int k = run.begin; k < run.end; ++k) {
            const T target = gy * row.gx[k - row.x.begin], mix = a.pool ? yhat[k - run.begin] : T(1);
            if (!(mix >= a.eps && mix - mix == T(0))) continue;
            f[k - x] = target / mix;
            any = true;
            pixels |= 1u << (k - x);
          }
          if (any) reach.data()[reached++] = p;
        }
        if (!a.accumulate)
          for (int k = block.begin; k < block.end; ++k)
            if (!(pixels >> (k - x) & 1)) std::memset(a.out + pixel + (k - x) * leaves, 0, sizeof(T) * leaves);
        if (reached)
          scatter_run(a, reach.data(), factor.data(), reached, pixels, a.pool ? a.pool + pixel : nullptr,
                      a.out + pixel);
      }
  }
}

template <class T>
T sum_of_squares(const T* g, Span span) {
  T total = 0;
  for (int i = 0; i < length(span); ++i) total += g[i] * g[i];
  return total;
}

template <class T>
void gather(const PoolGatherParams<T>& a, int64_t begin, int64_t end) {
  const int64_t leaves = a.at.leaves;
  const int axis = axis_capacity(a.at);
  Buffer<T> axes(int64_t(3) * axis);
  Row<T> row;
  row.gx = axes.data();
  row.gy = row.gx + axis;
  T* factor = row.gy + axis;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = a.at.order[i];
    T* out = a.out + index * leaves;
    const Seen seen = read_row(a.at, index, row);
    const T start = seen == Seen::undefined ? T(NAN) : T(0);
    for (int64_t n = 0; n < leaves; ++n) out[n] = start;
    a.square[index] = start;
    if (seen != Seen::window) continue;
    a.square[index] = sum_of_squares(row.gx, row.x) * sum_of_squares(row.gy, row.y);
    for (int y = row.y.begin; y < row.y.end; ++y) {
      const T gy = row.gy[y - row.y.begin];
      for (int x = 0; x < length(row.x); ++x) factor[x] = gy * row.gx[x];
      add_run(factor, a.pool + (int64_t(y) * a.at.width + row.x.begin) * leaves, leaves, int(length(row.x)), out);
    }
  }
}

constexpr int kPeakRows = 32;  // rows that share a run of pixels

template <class T>
void peak(const PoolPeakParams<T>& a, int64_t begin, int64_t end) {
  const int64_t leaves = a.leaves, pixels = int64_t(a.height) * a.width;
  const int64_t block = max<int64_t>(8, kBlockBytes / (int64_t(sizeof(T)) * leaves) / 8 * 8);
  Buffer<T> yhat(block);
  for (int64_t first = begin; first < end; first += kPeakRows) {
    const int rows = int(min<int64_t>(kPeakRows, end - first));
    T best[kPeakRows];
    int64_t where[kPeakRows];
    bool undefined[kPeakRows];
    for (int r = 0; r < rows; ++r) {
      best[r] = -INFINITY;
      where[r] = 0;
      undefined[r] = false;
    }
    for (int64_t start = 0; start < pixels; start += block) {
      const int count = int(min(block, pixels - start));
      for (int r = 0; r < rows; ++r) {
        dot_run(a.prob + (first + r) * leaves, a.pool + start * leaves, leaves, count, yhat.data());
        for (int i = 0; i < count; ++i) {
          const T v = yhat.data()[i];
          undefined[r] |= v - v != T(0);
          if (v > best[r]) {
            best[r] = v;
            where[r] = start + i;
          }
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t index = first + r;
      if (undefined[r]) {
        a.points[2 * index] = a.points[2 * index + 1] = a.score[index] = T(NAN);
        continue;
      }
      const int x = int(where[r] % a.width), y = int(where[r] / a.width);
      T dx = 0, dy = 0;
      if (a.refine) {
        // The 3 x 3 neighbourhood, -inf outside the canvas.
        T near[9];
        for (int k = 0; k < 9; ++k) {
          const int nx = x + k % 3 - 1, ny = y + k / 3 - 1;
          near[k] = -INFINITY;
          if (nx >= 0 && nx < a.width && ny >= 0 && ny < a.height)
            dot_pixels<T, 1>(a.prob + index * leaves, a.pool + (int64_t(ny) * a.width + nx) * leaves, leaves, near + k);
        }
        peak_shift(near, x, y, a.width, a.height, a.refine, &dx, &dy);
      }
      a.points[2 * index] = T(x) + dx;
      a.points[2 * index + 1] = T(y) + dy;
      a.score[index] = best[r];
    }
  }
}

}  // namespace

template <class T>
const PoolCpu<T>& pool_cpu() {
  static constexpr PoolCpu<T> table{kl_loss<T>, scatter<T>, gather<T>, peak<T>};
  return table;
}
template const PoolCpu<float>& pool_cpu<float>();
template const PoolCpu<double>& pool_cpu<double>();

}  // namespace FF_ISA
}  // namespace ff
