// CUDA kernels of the heatmap room.
//
// One block owns one map: every pixel is read once from memory by one thread, 16 bytes at a time where rows follow one
// another and the map is aligned, pixel by pixel through the strides otherwise. Landmarks-innermost maps
// (channels_last) have kernels of their own for the soft-argmax, whose lanes are 32 neighbouring landmarks. No atomics:
// results repeat.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <climits>

#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "heatmap/heatmap.h"
#include "heatmap/heatmap_math.h"

namespace ff {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;      // a block of one map
constexpr int kSmallThreads = 32;  // of a map of at most kSmallPixels
constexpr int kSmallPixels = 1024;
constexpr int kUnroll = 4;  // 16-byte loads a thread has in flight
constexpr int kWarps = 8;   // of a landmarks-innermost block

template <class T>
__device__ __forceinline__ T* map_of(const Maps<T>& m, const HeatmapSize& s, int64_t r) {
  return m.data + r / s.landmarks * m.image + r % s.landmarks * m.landmark;
}

// Whether maps can be read in 16-byte packs: decided on the host, for all maps alike.
template <class T>
bool packs(const Maps<T>& m, const HeatmapSize& s) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return (m.column == 1 || s.width == 1) && (m.row == s.width || s.height == 1) && m.image % kPack == 0 &&
         m.landmark % kPack == 0 && int64_t(s.height) * s.width % kPack == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
  __device__ __forceinline__ void load(const T* p) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    memcpy(value, &bits, 16);
  }
  __device__ __forceinline__ void store(T* p) const {
    uint4 bits;
    memcpy(&bits, value, 16);
    *reinterpret_cast<uint4*>(p) = bits;
  }
};

// Calls body(value, x, y) for this thread's pixels of a map, in ascending order.
template <int kBlock, bool kPacked, class T, class Body>
__device__ __forceinline__ void each_pixel(const T* z, const Maps<const T>& m, const HeatmapSize& s, const Body& body) {
  using C = Compute<T>;
  const int pixels = s.height * s.width;
  if constexpr (kPacked) {
    constexpr int kSize = Pack<T>::kSize;
    for (int start = threadIdx.x; start < pixels / kSize; start += kBlock * kUnroll) {
      Pack<T> pack[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k)
        if (start + k * kBlock < pixels / kSize) pack[k].load(z + int64_t(start + k * kBlock) * kSize);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int first = (start + k * kBlock) * kSize;
        if (first >= pixels) break;
        int y = first / s.width, x = first - y * s.width;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          body(C(pack[k].value[j]), x, y);
          if (++x == s.width) x = 0, ++y;
        }
      }
    }
  } else {
    for (int i = threadIdx.x; i < pixels; i += kBlock) {
      const int y = i / s.width, x = i - y * s.width;
      body(C(z[y * m.row + x * m.column]), x, y);
    }
  }
}

// Peak.

template <class C>
struct Best {
  C value;
  int index;
  int bad;  // NaN or +inf was met
};

struct Higher {
  template <class C>
  __device__ __forceinline__ Best<C> operator()(Best<C> a, Best<C> b) const {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    Best<C> best = second ? b : a;
    best.bad = a.bad | b.bad;
    return best;
  }
};

template <int kBlock, bool kPacked, class T>
__device__ __forceinline__ Best<Compute<T>> find_peak(const T* z, const Maps<const T>& m, const HeatmapSize& s,
                                                      Best<Compute<T>> (&shared)[kBlock / 32]) {
  using C = Compute<T>;
  Best<C> best{C(-INFINITY), INT_MAX, 0};
  each_pixel<kBlock, kPacked>(z, m, s, [&](C v, int x, int y) {
    if (v > best.value) best.value = v, best.index = y * s.width + x;
    best.bad |= int(v != v || v == C(INFINITY));
  });
  best = block_reduce<kBlock>(best, Higher{}, shared);
  if (best.index == INT_MAX) best.index = 0;  // nothing above -inf
  return best;
}

// The highest value of the whole map under the blur: only where a clip may act. kernel^2 reads a pixel, from L1.
template <int kBlock, class T>
__device__ __forceinline__ Compute<T> blurred_top(const PeakParams<T>& p, const T* z, const Compute<T>* taps,
                                                  Compute<T> (&shared)[kBlock / 32]) {
  using C = Compute<T>;
  const int half = p.kernel / 2, width = p.size.width, height = p.size.height;
  C top = C(-INFINITY);
  for (int i = threadIdx.x; i < width * height; i += kBlock) {
    const int y = i / width, x = i - y * width;
    const int left = x < half ? -x : -half, right = x + half < width ? half : width - 1 - x;
    const int above = y < half ? -y : -half, below = y + half < height ? half : height - 1 - y;
    C sum = C(0);
#pragma unroll 1
    for (int dy = above; dy <= below; ++dy) {
      const T* line = z + (y + dy) * p.maps.row;
      C part = C(0);
#pragma unroll 1
      for (int dx = left; dx <= right; ++dx) part += taps[dx] * C(line[(x + dx) * p.maps.column]);
      sum += taps[dy] * part;
    }
    top = Max{}(top, sum);
  }
  return block_reduce<kBlock>(top, Max{}, shared);
}

// dark, dark_udp: the block sums the columns of the stencil's window, then its rows; every thread takes the step.
template <int kBlock, int kStep, class T>
__device__ __forceinline__ void refine_dark(const PeakParams<T>& p, const T* z, int column, int row, Compute<T> value,
                                            Compute<T>& x, Compute<T>& y) {
  using C = Compute<T>;
  constexpr int kSide = 2 * kStep + 1;
  FF_SHARED(C, sums, kSide * (kMostKernel + kSide - 1));
  FF_SHARED(C, b, kSide * kSide);
  FF_SHARED(C, weights, kMostKernel);
  FF_SHARED(C, shared, kBlock / 32);
  const DarkRule<C> rule = dark_rule<C>(Refine(p.refine));
  if (!rule.applies(value, column, row, p.size.width, p.size.height)) return;  // the same for all threads
  const int half = p.kernel / 2, columns = p.kernel + kSide - 1;
  for (int i = threadIdx.x; i < p.kernel; i += kBlock) weights[i] = p.taps[i < half ? half - i : i - half];
  __syncthreads();
  const C* taps = weights + half;  // by distance
  for (int i = threadIdx.x; i < kSide * columns; i += kBlock) {
    const int j = i / columns, cx = column - kStep - half + i % columns, cy = row - kStep + j;
    const bool inside = cx >= 0 && cx < p.size.width;
    const int above = cy < half ? -cy : -half;
    const int below = !inside ? above - 1 : cy + half < p.size.height ? half : p.size.height - 1 - cy;
    C sum = C(0);
    for (int d = above; d <= below; ++d) sum += taps[d] * C(z[(cy + d) * p.maps.row + cx * p.maps.column]);
    sums[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += kBlock) {
    const C* line = sums + i / kSide * columns + i % kSide;
    C sum = C(0);
    for (int d = 0; d < p.kernel; ++d) sum += weights[d] * line[d];
    b[i] = sum;
  }
  __syncthreads();
  bool clips = false;
  for (int i = 0; i < kSide * kSide; ++i) clips |= rule.may_clip(b[i], value);
  C top = value;
  if (clips) top = blurred_top<kBlock>(p, z, taps, shared);
  const C scale = top > C(0) ? value / top : C(0);
  // Into the sums, which nobody reads any more: other warps may still compare b with the clips. A scale that is not
  // above 0, when nothing above 0 is left of the map, clips all to the same: no step.
  for (int i = threadIdx.x; i < kSide * kSide; i += kBlock) sums[i] = log(rule.clip(b[i] * scale));
  __syncthreads();
  dark_shift(kStep, [&](int dx, int dy) { return sums[(dy + kStep) * kSide + dx + kStep]; }, x, y);
}

// Bytes: one read of the map; the stencils lie in it, and come from L1 or L2. Four blocks a multiprocessor, 64
// registers: left to itself, ptxas spills one of 48 for the sake of a fifth.
template <class T, int kBlock, bool kPacked, int kStep>
__global__ void __launch_bounds__(kBlock, kBlock == kThreads ? 4 : 1) peak_kernel(PeakParams<T> p) {
  using C = Compute<T>;
  FF_SHARED(Best<C>, shared, kBlock / 32);
  const int64_t r = blockIdx.x;
  const T* z = map_of(p.maps, p.size, r);
  const Best<C> best = find_peak<kBlock, kPacked>(z, p.maps, p.size, shared);
  const int row = best.index / p.size.width, column = best.index - row * p.size.width;
  C x = C(column), y = C(row), score = best.value;
  if constexpr (kStep > 0) {
    if (!best.bad) refine_dark<kBlock, kStep>(p, z, column, row, score, x, y);  // the same for all threads
  }
  if (threadIdx.x != 0) return;
  if constexpr (kStep == 0) {
    refine_peak(Refine(p.refine), x, y, [&](int dx, int dy, C& value) {
      const int nx = column + dx, ny = row + dy;
      if (nx < 0 || nx >= p.size.width || ny < 0 || ny >= p.size.height) return false;
      value = C(z[ny * p.maps.row + nx * p.maps.column]);
      return true;
    });
  }
  if (best.bad) x = y = score = C(NAN);
  p.points[2 * r] = x;
  p.points[2 * r + 1] = y;
  p.score[r] = score;
}

// Soft-argmax.

template <class T>
__device__ __forceinline__ Compute<T> beta_of(const SoftArgmaxParams<T>& p) {
  return p.beta_value ? p.beta * *p.beta_value : p.beta;
}

__device__ __forceinline__ void region_of(const HeatmapSize& s, int window, int peak, Cells& x, Cells& y) {
  x = {0, s.width};
  y = {0, s.height};
  if (window < 0) return;
  x = cells_around(double(peak % s.width), double(window), s.width);
  y = cells_around(double(peak / s.width), double(window), s.height);
}

template <class C>
__device__ __forceinline__ Background<C> background_of(const Cells& x, const Cells& y, bool debias) {
  return {debias ? C(x.end - x.begin) * C(y.end - y.begin) : C(0), C(0.5) * C(x.begin + x.end - 1),
          C(0.5) * C(y.begin + y.end - 1)};
}

// A running softmax expectation; `top` is the highest sign * z so far, sign that of beta.
template <class C>
struct Running {
  C top, total, x, y;

  __device__ __forceinline__ void add(C v, C rate, int px, int py) {
    if (v > top) {  // seldom: about log(pixels) times a thread
      const C keep = top == C(-INFINITY) ? C(0) : exp(rate * (top - v));
      top = v, total *= keep, x *= keep, y *= keep;
    }
    // A masked pixel before any other weighs 0; NaN stays.
    const C e = exp(rate * (v - (top == C(-INFINITY) ? C(0) : top)));
    total += e, x += e * C(px), y += e * C(py);
  }
  __device__ __forceinline__ void rescale(C to, C rate) {
    const C keep = top == C(-INFINITY) ? C(0) : exp(rate * (top - to));
    top = to, total *= keep, x *= keep, y *= keep;
  }
};

template <class T>
__device__ __forceinline__ void finish(const SoftArgmaxParams<T>& p, int64_t r, const Cells& cx, const Cells& cy,
                                       Compute<T> beta, Compute<T> top, Running<Compute<T>> sums, bool bad) {
  using C = Compute<T>;
  C x = sums.x / sums.total, y = sums.y / sums.total, log_total = log(sums.total);
  if (p.debias) {
    const Background<C> back = background_of<C>(cx, cy, true);
    const C share = background_share(back, beta * top, log_total);
    x = debiased(x, share, back.x);
    y = debiased(y, share, back.y);
  }
  if (bad) x = y = top = log_total = C(NAN);
  p.points[2 * r] = x;
  p.points[2 * r + 1] = y;
  p.normalizer[2 * r] = top;
  p.normalizer[2 * r + 1] = log_total;
}

template <class T>
__device__ __forceinline__ LogitGrad<Compute<T>> logit_grad_of(const SoftArgmaxBackwardParams<T>& b, int64_t r,
                                                               const Cells& x, const Cells& y, Compute<T> beta) {
  using C = Compute<T>;
  const SoftArgmaxParams<T>& p = b.forward;
  const Background<C> back = background_of<C>(x, y, p.debias);
  const C share = p.debias ? background_share(back, beta * p.normalizer[2 * r], p.normalizer[2 * r + 1]) : C(0);
  return logit_grad(p.points[2 * r], p.points[2 * r + 1], b.grad_points[2 * r], b.grad_points[2 * r + 1], share, back);
}

// p (a (X - x) + b (Y - y) + total) at one pixel: the gradient of its logit.
template <class C>
__device__ __forceinline__ C logit_grad_at(const LogitGrad<C>& g, C above, C beta, C log_total, int x, int y) {
  return exp(beta * above - log_total) * (g.a * (C(x) - g.x) + g.b * (C(y) - g.y) + g.total);
}

template <class T, int kBlock, bool kPacked>
__global__ void __launch_bounds__(kBlock) soft_argmax_kernel(SoftArgmaxParams<T> p) {
  using C = Compute<T>;
  FF_SHARED(Best<C>, shared_best, kBlock / 32);
  FF_SHARED(C, shared, kBlock / 32);
  const int64_t r = blockIdx.x;
  const T* z = map_of(p.maps, p.size, r);
  const C beta = beta_of(p), sign = beta < C(0) ? C(-1) : C(1), rate = beta * sign;

  // 1. read: this thread's share of the sums, over the canvas, or over the window once its centre is known
  Running<C> sums{C(-INFINITY), C(0), C(0), C(0)};
  Cells cx{0, p.size.width}, cy{0, p.size.height};
  bool bad = false;
  if (p.window < 0) {
    each_pixel<kBlock, kPacked>(z, p.maps, p.size, [&](C v, int x, int y) { sums.add(sign * v, rate, x, y); });
  } else {
    const Best<C> best = find_peak<kBlock, kPacked>(z, p.maps, p.size, shared_best);
    if (threadIdx.x == 0) p.peak[r] = best.index;
    bad = best.bad != 0;
    region_of(p.size, p.window, best.index, cx, cy);
    const int width = cx.end - cx.begin, pixels = width * (cy.end - cy.begin);
    for (int i = threadIdx.x; i < pixels; i += kBlock) {
      const int y = cy.begin + i / width, x = cx.begin + i % width;
      sums.add(sign * C(z[y * p.maps.row + x * p.maps.column]), rate, x, y);
    }
  }

  // 2. reduce: rescale to the highest logit of the block, then three sums
  const C top = block_reduce<kBlock>(sums.top, Max{}, shared);
  sums.rescale(top, rate);
  sums.total = block_sum<kBlock>(sums.total, shared);
  sums.x = block_sum<kBlock>(sums.x, shared);
  sums.y = block_sum<kBlock>(sums.y, shared);
  if (threadIdx.x == 0) finish(p, r, cx, cy, beta, sign * top, sums, bad);
}

template <class T, int kBlock, bool kPacked>
__global__ void __launch_bounds__(kBlock) soft_argmax_backward_kernel(SoftArgmaxBackwardParams<T> b) {
  using C = Compute<T>;
  FF_SHARED(C, shared, kBlock / 32);
  const SoftArgmaxParams<T>& p = b.forward;
  const int64_t r = blockIdx.x;
  const T* z = map_of(p.maps, p.size, r);
  T* grad = map_of(b.grad_maps, p.size, r);
  const C beta = beta_of(p), top = p.normalizer[2 * r], log_total = p.normalizer[2 * r + 1];
  Cells cx, cy;
  region_of(p.size, p.window, p.window < 0 ? 0 : p.peak[r], cx, cy);
  const LogitGrad<C> g = logit_grad_of(b, r, cx, cy, beta);
  const int width = p.size.width, pixels = p.size.height * width;
  C sum_beta = C(0);
  const auto gradient = [&](T value, int x, int y) {
    const C above = C(value) - top;
    const C d = logit_grad_at(g, above, beta, log_total, x, y);
    sum_beta += d == C(0) ? d : d * above;  // a masked pixel: 0 * -inf
    return T(beta * d);
  };
  if (kPacked && p.window < 0) {
    constexpr int kSize = Pack<T>::kSize;
    for (int i = threadIdx.x; i < pixels / kSize; i += kBlock) {
      Pack<T> pack;
      pack.load(z + int64_t(i) * kSize);
      int y = i * kSize / width, x = i * kSize - y * width;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        pack.value[j] = gradient(pack.value[j], x, y);
        if (++x == width) x = 0, ++y;
      }
      pack.store(grad + int64_t(i) * kSize);
    }
  } else {
    for (int i = threadIdx.x; i < pixels; i += kBlock) {
      const int y = i / width, x = i - y * width;
      T out = T(C(0));
      if (x >= cx.begin && x < cx.end && y >= cy.begin && y < cy.end)
        out = gradient(z[y * p.maps.row + x * p.maps.column], x, y);
      grad[y * b.grad_maps.row + x * b.grad_maps.column] = out;
    }
  }
  if (b.grad_beta) {  // the same for all threads
    sum_beta = block_sum<kBlock>(sum_beta, shared);
    if (threadIdx.x == 0) b.grad_beta[r] = sum_beta + (p.debias ? g.total * top : C(0));
  }
}

// Landmarks innermost. A lane owns a landmark, the warps of a block share its pixels; loads of a warp are neighbours.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) soft_argmax_lanes_kernel(SoftArgmaxParams<T> p) {
  using C = Compute<T>;
  FF_SHARED(Running<C>, shared, 32 * kWarps);
  const int64_t groups = (p.size.landmarks + 31) / 32, image = blockIdx.x / groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool active = blockIdx.x % groups * 32 + lane < p.size.landmarks;  // the others repeat the last landmark
  const int64_t landmark = active ? blockIdx.x % groups * 32 + lane : p.size.landmarks - 1;
  const C beta = beta_of(p), sign = beta < C(0) ? C(-1) : C(1), rate = beta * sign;
  Running<C> sums{C(-INFINITY), C(0), C(0), C(0)};
  const T* z = p.maps.data + image * p.maps.image + landmark;
  for (int y = 0; y < p.size.height; ++y)
    for (int x = warp; x < p.size.width; x += kWarps)
      sums.add(sign * C(z[y * p.maps.row + x * p.maps.column]), rate, x, y);
  shared[threadIdx.x] = sums;
  __syncthreads();
  if (warp != 0 || !active) return;
  C top = sums.top;
  for (int w = 1; w < kWarps; ++w) top = Max{}(top, shared[32 * w + lane].top);
  sums.rescale(top, rate);
  for (int w = 1; w < kWarps; ++w) {
    Running<C> other = shared[32 * w + lane];
    other.rescale(top, rate);
    sums.total += other.total, sums.x += other.x, sums.y += other.y;
  }
  finish(p, image * p.size.landmarks + landmark, {0, p.size.width}, {0, p.size.height}, beta, sign * top, sums, false);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) soft_argmax_lanes_backward_kernel(SoftArgmaxBackwardParams<T> b) {
  using C = Compute<T>;
  FF_SHARED(C, shared, 32 * kWarps);
  const SoftArgmaxParams<T>& p = b.forward;
  const int64_t groups = (p.size.landmarks + 31) / 32, image = blockIdx.x / groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool active = blockIdx.x % groups * 32 + lane < p.size.landmarks;  // the others repeat the last landmark
  const int64_t landmark = active ? blockIdx.x % groups * 32 + lane : p.size.landmarks - 1;
  const int64_t r = image * p.size.landmarks + landmark;
  const C beta = beta_of(p);
  const LogitGrad<C> g = logit_grad_of(b, r, {0, p.size.width}, {0, p.size.height}, beta);
  const C top = p.normalizer[2 * r], log_total = p.normalizer[2 * r + 1];
  const T* z = p.maps.data + image * p.maps.image + landmark;
  T* grad = b.grad_maps.data + image * b.grad_maps.image + landmark;
  C sum_beta = C(0);
  for (int y = 0; y < p.size.height; ++y)
    for (int x = warp; x < p.size.width; x += kWarps) {
      const C above = C(z[y * p.maps.row + x * p.maps.column]) - top;
      const C d = logit_grad_at(g, above, beta, log_total, x, y);
      if (active) grad[y * b.grad_maps.row + x * b.grad_maps.column] = T(beta * d);
      sum_beta += d == C(0) ? d : d * above;
    }
  if (!b.grad_beta) return;  // the same for all threads
  shared[threadIdx.x] = sum_beta;
  __syncthreads();
  if (warp != 0 || !active) return;
  for (int w = 1; w < kWarps; ++w) sum_beta += shared[32 * w + lane];
  b.grad_beta[r] = sum_beta + (p.debias ? g.total * top : C(0));
}

// Render.

template <class T>
__device__ __forceinline__ Compute<T> sigma_of(const RenderParams<T>& p, int64_t r) {
  return p.sigmas ? p.sigmas[r] : p.sigma;
}

// One axis of a map into shared memory: g, and for the gradient g (d - E d) and g (d^2 - E d^2), d = h - centre; the
// means are 0 but for sum-normalised axes.
template <bool kMoments, class C>
__device__ __forceinline__ Cells fill_axis(C* g, C* g1, C* g2, C centre, C sigma, double truncate, int size,
                                           bool normalized, C (&shared)[kThreads / 32]) {
  const Cells cells = render_cells(centre, sigma, truncate, size);
  const AxisGaussian<C> gauss = axis_gaussian(centre, sigma, cells, normalized);
  C total = C(0), first = C(0), second = C(0);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const C d = C(i) - centre;
    const C power = gauss.factor * d * d - gauss.shift;  // at most 0 but for rounding
    const C value = i >= cells.begin && i < cells.end ? exp(power > C(0) ? C(0) : power) : C(0);
    g[i] = value;
    total += value, first += value * d, second += value * d * d;
  }
  C scale = C(1), mean = C(0), square = C(0);
  if (normalized) {  // the same for all threads
    total = block_sum<kThreads>(total, shared);
    scale = total > C(0) ? C(1) / total : C(1);
    if constexpr (kMoments) {
      mean = block_sum<kThreads>(first, shared) * scale;
      square = block_sum<kThreads>(second, shared) * scale;
    }
  }
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const C d = C(i) - centre, value = g[i] * scale;
    g[i] = value;
    if constexpr (kMoments) {
      g1[i] = value * (d - mean);
      g2[i] = value * (d * d - square);
    }
  }
  return cells;
}

// Bytes: one write of the map. The axes are H + W exponentials a map, in shared memory.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads) render_kernel(RenderParams<T> p) {
  using C = Compute<T>;
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, kThreads / 32);
  const int64_t r = blockIdx.x;
  const int width = p.size.width, height = p.size.height, pixels = width * height;
  const C cx = C(p.points[2 * r]), cy = C(p.points[2 * r + 1]), sigma = sigma_of(p, r);
  C *gx = axes, *gy = axes + width;
  T* map = p.maps + r * pixels;
  if (render_valid(cx, cy, sigma)) {  // the same for all threads
    fill_axis<false>(gx, gx, gx, cx, sigma, p.truncate, width, p.normalized, shared);
    fill_axis<false>(gy, gy, gy, cy, sigma, p.truncate, height, p.normalized, shared);
  } else {
    for (int i = threadIdx.x; i < width + height; i += kThreads) axes[i] = C(NAN);
  }
  __syncthreads();
  constexpr int kSize = kPacked ? Pack<T>::kSize : 1;
  for (int i = threadIdx.x; i < pixels / kSize; i += kThreads) {
    const int y = i * kSize / width, x = i * kSize - y * width;
    if constexpr (kPacked) {  // width is a multiple of the pack: one row
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.value[j] = T(gy[y] * gx[x + j]);
      pack.store(map + int64_t(i) * kSize);
    } else {
      map[i] = T(gy[y] * gx[x]);
    }
  }
}

// Bytes: one read of the visible part of the incoming gradient.
template <class T>
__global__ void __launch_bounds__(kThreads) render_backward_kernel(RenderBackwardParams<T> b) {
  using C = Compute<T>;
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, kThreads / 32);
  const RenderParams<T>& p = b.forward;
  const int64_t r = blockIdx.x;
  const int width = p.size.width, height = p.size.height;
  const C cx = C(p.points[2 * r]), cy = C(p.points[2 * r + 1]), sigma = sigma_of(p, r);
  if (!render_valid(cx, cy, sigma)) {  // the same for all threads
    if (threadIdx.x == 0) {
      b.grad_points[2 * r] = b.grad_points[2 * r + 1] = T(C(NAN));
      b.grad_sigmas[r] = C(NAN);
    }
    return;
  }
  C *gx = axes, *gy = axes + 3 * width;
  const Cells cells_x =
      fill_axis<true>(gx, gx + width, gx + 2 * width, cx, sigma, p.truncate, width, p.normalized, shared);
  const Cells cells_y =
      fill_axis<true>(gy, gy + height, gy + 2 * height, cy, sigma, p.truncate, height, p.normalized, shared);
  __syncthreads();
  const T* grad = map_of(b.grad_maps, p.size, r);
  const int columns = cells_x.end - cells_x.begin, pixels = columns * (cells_y.end - cells_y.begin);
  C sum_x = C(0), sum_y = C(0), sum_sigma = C(0);
  for (int i = threadIdx.x; i < pixels; i += kThreads) {
    const int y = cells_y.begin + i / columns, x = cells_x.begin + i % columns;
    const C g = C(grad[y * b.grad_maps.row + x * b.grad_maps.column]);
    sum_x += g * gx[width + x] * gy[y];
    sum_y += g * gx[x] * gy[height + y];
    sum_sigma += g * (gx[2 * width + x] * gy[y] + gx[x] * gy[2 * height + y]);
  }
  sum_x = block_sum<kThreads>(sum_x, shared);
  sum_y = block_sum<kThreads>(sum_y, shared);
  sum_sigma = block_sum<kThreads>(sum_sigma, shared);
  if (threadIdx.x != 0) return;
  const C inverse = C(1) / (sigma * sigma);
  b.grad_points[2 * r] = T(sum_x * inverse);
  b.grad_points[2 * r + 1] = T(sum_y * inverse);
  b.grad_sigmas[r] = sum_sigma * inverse / sigma;
}

// One block a map, of a size that fits it.
template <class Params, class Kernel>
int launch_maps(const HeatmapSize& s, int threads, Kernel kernel, const Params& params, CUstream_st* stream) {
  const int64_t rows = s.images * s.landmarks;
  if (rows == 0) return cudaSuccess;
  if (rows > INT_MAX) return cudaErrorInvalidConfiguration;
  FF_LAUNCH(kernel, dim3(unsigned(rows)), dim3(threads), 0, stream, params);
  return cudaGetLastError();
}

template <class Params, class Kernel>
int launch_lanes(const HeatmapSize& s, Kernel kernel, const Params& params, CUstream_st* stream) {
  const int64_t blocks = s.images * ((s.landmarks + 31) / 32);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  FF_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(32 * kWarps), 0, stream, params);
  return cudaGetLastError();
}

template <class Params, class Kernel>
int launch_render(const HeatmapSize& s, size_t shared_bytes, Kernel kernel, const Params& params, CUstream_st* stream) {
  const int64_t rows = s.images * s.landmarks;
  if (rows == 0) return cudaSuccess;
  if (rows > INT_MAX || s.height + s.width > kMostRenderCells) return cudaErrorInvalidConfiguration;
  FF_LAUNCH(kernel, dim3(unsigned(rows)), dim3(kThreads), shared_bytes, stream, params);
  return cudaGetLastError();
}

bool small(const HeatmapSize& s) { return s.height * s.width <= kSmallPixels; }

template <int kStep, class T>
int launch_peak(const PeakParams<T>& p, CUstream_st* stream) {
  const bool packed = packs(p.maps, p.size);
  if (small(p.size)) {
    auto kernel = packed ? peak_kernel<T, kSmallThreads, true, kStep> : peak_kernel<T, kSmallThreads, false, kStep>;
    return launch_maps(p.size, kSmallThreads, kernel, p, stream);
  }
  auto kernel = packed ? peak_kernel<T, kThreads, true, kStep> : peak_kernel<T, kThreads, false, kStep>;
  return launch_maps(p.size, kThreads, kernel, p, stream);
}

}  // namespace

template <class T>
int peak_cuda(const PeakParams<T>& p, CUstream_st* stream) {
  if (p.refine == int(Refine::dark)) return launch_peak<2>(p, stream);
  if (p.refine == int(Refine::dark_udp)) return launch_peak<1>(p, stream);
  return launch_peak<0>(p, stream);
}

template <class T>
int soft_argmax_cuda(const SoftArgmaxParams<T>& p, CUstream_st* stream) {
  if (p.maps.pixel_major && p.window < 0) return launch_lanes(p.size, soft_argmax_lanes_kernel<T>, p, stream);
  const bool packed = packs(p.maps, p.size);
  if (small(p.size)) {
    auto kernel = packed ? soft_argmax_kernel<T, kSmallThreads, true> : soft_argmax_kernel<T, kSmallThreads, false>;
    return launch_maps(p.size, kSmallThreads, kernel, p, stream);
  }
  auto kernel = packed ? soft_argmax_kernel<T, kThreads, true> : soft_argmax_kernel<T, kThreads, false>;
  return launch_maps(p.size, kThreads, kernel, p, stream);
}

template <class T>
int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<T>& b, CUstream_st* stream) {
  const HeatmapSize& s = b.forward.size;
  if constexpr (sizeof(T) < 8) {  // in doubles that kernel spills: they take the way of any strides
    if (b.forward.maps.pixel_major && b.grad_maps.pixel_major && b.forward.window < 0)
      return launch_lanes(s, soft_argmax_lanes_backward_kernel<T>, b, stream);
  }
  const bool packed = packs(b.forward.maps, s) && packs(b.grad_maps, s);
  if (small(s)) {
    auto kernel = packed ? soft_argmax_backward_kernel<T, kSmallThreads, true>
                         : soft_argmax_backward_kernel<T, kSmallThreads, false>;
    return launch_maps(s, kSmallThreads, kernel, b, stream);
  }
  auto kernel =
      packed ? soft_argmax_backward_kernel<T, kThreads, true> : soft_argmax_backward_kernel<T, kThreads, false>;
  return launch_maps(s, kThreads, kernel, b, stream);
}

template <class T>
int render_cuda(const RenderParams<T>& p, CUstream_st* stream) {
  const bool packed = p.size.width % (16 / int(sizeof(T))) == 0 && reinterpret_cast<uintptr_t>(p.maps) % 16 == 0;
  auto kernel = packed ? render_kernel<T, true> : render_kernel<T, false>;
  return launch_render(p.size, sizeof(Compute<T>) * (p.size.width + p.size.height), kernel, p, stream);
}

template <class T>
int render_backward_cuda(const RenderBackwardParams<T>& b, CUstream_st* stream) {
  const HeatmapSize& s = b.forward.size;
  return launch_render(s, 3 * sizeof(Compute<T>) * (s.width + s.height), render_backward_kernel<T>, b, stream);
}

template int peak_cuda(const PeakParams<float>&, CUstream_st*);
template int peak_cuda(const PeakParams<double>&, CUstream_st*);
template int peak_cuda(const PeakParams<Half>&, CUstream_st*);
template int peak_cuda(const PeakParams<BFloat16>&, CUstream_st*);
template int soft_argmax_cuda(const SoftArgmaxParams<float>&, CUstream_st*);
template int soft_argmax_cuda(const SoftArgmaxParams<double>&, CUstream_st*);
template int soft_argmax_cuda(const SoftArgmaxParams<Half>&, CUstream_st*);
template int soft_argmax_cuda(const SoftArgmaxParams<BFloat16>&, CUstream_st*);
template int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<float>&, CUstream_st*);
template int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<double>&, CUstream_st*);
template int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<Half>&, CUstream_st*);
template int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<BFloat16>&, CUstream_st*);
template int render_cuda(const RenderParams<float>&, CUstream_st*);
template int render_cuda(const RenderParams<double>&, CUstream_st*);
template int render_cuda(const RenderParams<Half>&, CUstream_st*);
template int render_cuda(const RenderParams<BFloat16>&, CUstream_st*);
template int render_backward_cuda(const RenderBackwardParams<float>&, CUstream_st*);
template int render_backward_cuda(const RenderBackwardParams<double>&, CUstream_st*);
template int render_backward_cuda(const RenderBackwardParams<Half>&, CUstream_st*);
template int render_backward_cuda(const RenderBackwardParams<BFloat16>&, CUstream_st*);

#ifndef FF_HOST_SHIM
namespace {
// The kernels of the aligned, full-sized case, and the widest type of each.
const KernelListed listed[] = {
    {"heatmap_peak<float>", peak_kernel<float, kThreads, true, 0>},
    {"heatmap_peak<double>", peak_kernel<double, kThreads, true, 0>},
    {"heatmap_peak_dark_udp<float>", peak_kernel<float, kThreads, true, 1>},
    {"heatmap_peak_dark_udp<double>", peak_kernel<double, kThreads, true, 1>},
    {"heatmap_peak_dark_udp<half>", peak_kernel<Half, kThreads, true, 1>},
    {"heatmap_peak_dark_udp<bfloat16>", peak_kernel<BFloat16, kThreads, true, 1>},
    {"heatmap_soft_argmax<float>", soft_argmax_kernel<float, kThreads, true>},
    {"heatmap_soft_argmax<double>", soft_argmax_kernel<double, kThreads, true>},
    {"heatmap_soft_argmax<half>", soft_argmax_kernel<Half, kThreads, true>},
    {"heatmap_soft_argmax<bfloat16>", soft_argmax_kernel<BFloat16, kThreads, true>},
    {"heatmap_soft_argmax_backward<float>", soft_argmax_backward_kernel<float, kThreads, true>},
    {"heatmap_soft_argmax_backward<double>", soft_argmax_backward_kernel<double, kThreads, true>},
    {"heatmap_soft_argmax_lanes<float>", soft_argmax_lanes_kernel<float>},
    {"heatmap_soft_argmax_lanes<double>", soft_argmax_lanes_kernel<double>},
    {"heatmap_soft_argmax_lanes_backward<float>", soft_argmax_lanes_backward_kernel<float>},
    {"heatmap_render<float>", render_kernel<float, true>},
    {"heatmap_render<double>", render_kernel<double, true>},
    {"heatmap_render_backward<float>", render_backward_kernel<float>},
    {"heatmap_render_backward<double>", render_backward_kernel<double>},
};
}  // namespace
#endif

}  // namespace ff
