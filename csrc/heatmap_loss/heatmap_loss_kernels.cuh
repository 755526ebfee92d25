// CUDA kernels of the heatmap losses: heatmap_loss_cuda.cu builds them for float, heatmap_loss_cuda_half.cu for the
// 16-bit types, heatmap_loss_cuda_double.cu for double.
//
// One scheme. Forward, a block owns a map; backward, a block owns some rows of a map. A thread owns a column of items,
// every k-th of it, an item being 16 bytes where rows are made of whole, aligned ones, and otherwise a pixel: what
// depends on x alone stays in its registers. A warp's loads are neighbours, and a thread has kUnroll of them in flight:
// the first ones leave before the tables of the target are filled. A block shares these tables: the Gaussians of both
// axes, H + W exponentials, of which a pixel's target is a product. No atomics, and the order of every sum depends on
// the map's size and strides alone: results repeat, whatever else is in the batch. Where landmarks lie innermost
// (channels_last) a warp's loads are P apart: every 32-byte sector is fetched by the eight or sixteen landmarks that
// share it, from L2 if their blocks keep pace.
//
// Time, of 509 million pixels (B 32, P 971, 128 x 128), on an H200 (4.8 TB/s; 132 SMs at 1.98 GHz issue 3.3e13
// instructions of a lane a second, 4.2e12 of them transcendental): forward reads 2.04 GB of float, 0.42 ms, in which a
// pixel has time for 27 instructions, 3 of them transcendental; backward moves twice that, 0.85 ms. The 16-bit types
// take half the time and leave half the instructions. Every kernel says below what it needs, as compiled for sm_90.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <climits>

#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "heatmap_loss/heatmap_loss.h"
#include "heatmap_loss/heatmap_loss_math.h"

namespace ff {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;        // a block, but for
constexpr int kSmallThreads = 32;    // of a map of at most kSmallPixels
constexpr int kSmallPixels = 1024;   //
constexpr int kLargePixels = 32768;  // and, forward, kMostThreads of a map of more than that
constexpr int kMostThreads = 384;
constexpr int kSlicePixels = 32768;  // backward: a block's rows hold about so many at most
// Blocks of an SM: 768 threads of 80 registers, which have 48 kilobytes in flight. Left to itself ptxas spills to stay
// at 64; JS needs 86 for double.
template <class T, int kBlock>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 768 / kBlock;
template <class T>
constexpr int kUnroll = sizeof(T) == 8 ? 2 : 4;  // loads a thread has in flight
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLog2 = 0.6931471805599453;

// Functions. The fast ones cost one transcendental instruction of the GPU.

// 2^x: 2^-22 relative, results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef FF_HOST_SHIM
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

// log2 x: 2^-22 absolute for x in (1/2, 2), relative elsewhere; -inf below 2^-126.
__device__ __forceinline__ float fast_log2(float x) {
#ifdef FF_HOST_SHIM
  return log2f(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double fast_log2(double x) { return log2(x); }

// 1 / x: 2^-23 relative, for normal x.
__device__ __forceinline__ float fast_inverse(float x) {
#ifdef FF_HOST_SHIM
  return 1.f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double fast_inverse(double x) { return 1.0 / x; }

// log(1 + q) for q in [0, 1/2], fitted: 4.4e-7 relative.
__device__ __forceinline__ float log1p_small(float q) {
  float p = -0.05556555795f;
  p = p * q + 0.1517111332f;
  p = p * q - 0.2389840954f;
  p = p * q + 0.3321327474f;
  p = p * q - 0.4999507476f;
  p = p * q + 0.9999996467f;
  return p * q;
}
__device__ __forceinline__ double log1p_small(double q) { return log1p(q); }

// Sums and maxima of a block of any number of whole warps; all threads receive them. `shared` may be used again at
// once.

template <int kCount, class C>
__device__ __forceinline__ void block_sums(C (&value)[kCount], C (&shared)[32 * kCount]) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    value[k] = warp_sum(value[k]);
    if (lane == 0) shared[32 * k + threadIdx.x / 32] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) value[k] = warp_sum(lane < warps ? shared[32 * k + lane] : C(0));
  __syncthreads();
}

template <class C>
__device__ __forceinline__ C block_max(C value, C* shared) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_max(value);
  if (lane == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_max(lane < warps ? shared[lane] : C(-INFINITY));
  __syncthreads();
  return value;
}

// Pixels.

template <class T, bool kPacked>
struct Item {
  static constexpr int kSize = kPacked ? 16 / int(sizeof(T)) : 1;
  T value[kSize];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kPacked) {
      const uint4 bits = *reinterpret_cast<const uint4*>(p);
      memcpy(value, &bits, 16);
    } else {
      value[0] = *p;
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kPacked) {
      uint4 bits;
      memcpy(&bits, value, 16);
      *reinterpret_cast<uint4*>(p) = bits;
    } else {
      *p = value[0];
    }
  }
};

// Whether the rows of maps are whole items of 16 bytes: decided on the host, for all maps alike. Doubles go one by one:
// their arithmetic takes longer than their reads, and more registers.
template <class T>
constexpr bool kPacks = sizeof(T) < 8;
template <class T>
bool packs(const Maps<T>& m, const HeatmapLossSize& s) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return kPacks<T> && (m.column == 1 || s.width == 1) && s.width % kPack == 0 &&
         (m.row % kPack == 0 || s.height == 1) && (m.image % kPack == 0 || s.images == 1) &&
         (m.landmark % kPack == 0 || s.landmarks == 1) && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <class T>
__device__ __forceinline__ T* map_of(const Maps<T>& m, const HeatmapLossSize& s, unsigned r) {
  const unsigned landmarks = unsigned(s.landmarks);  // B P <= INT_MAX
  return m.data + r / landmarks * m.image + r % landmarks * m.landmark;
}

// `columns` x `rows` items whose first has its first pixel at (x, y).
struct Region {
  int x, y, columns, rows;
};

// How a block shares a region out: `lanes` threads side by side, as many rows of them as fit. Regions of more columns
// than threads are walked in strips of as many lanes.
struct Lanes {
  int lanes, column, row, rows;  // this thread's first column and row; rows the block takes at once

  __device__ __forceinline__ explicit Lanes(const Region& region) {
    const int threads = int(blockDim.x), strips = (region.columns + threads - 1) / threads;
    lanes = (region.columns + strips - 1) / strips;
    rows = threads / lanes;
    row = int(threadIdx.x) / lanes;
    column = int(threadIdx.x) - row * lanes;
    if (row >= rows) row = region.rows;  // threads to spare
  }
};

template <class T, bool kPacked>
class Walk {
 public:
  using Pixels = Item<T, kPacked>;
  static constexpr int kSize = Pixels::kSize;

  __device__ __forceinline__ Walk(const T* map, const Maps<const T>& m, Region region)
      : region_(region), at_(region), row_(m.row), column_(kPacked ? kSize : m.column) {
    map_ = map + region.y * row_ + (kPacked ? region.x : region.x * m.column);
    begin(at_.column);
  }

  // body(what, item, y) for all items of this thread, in ascending order; what = column(x), made once for a column.
  template <class Column, class Body>
  __device__ __forceinline__ void each(const Column& column, const Body& body) {
    for (int x = at_.column;;) {
      const auto what = column(region_.x + x * kSize);
      while (y_ < region_.rows) {
#pragma unroll
        for (int k = 0; k < kUnroll<T>; ++k)
          if (y_ + k * at_.rows < region_.rows) body(what, items_[k], region_.y + y_ + k * at_.rows);
        y_ += kUnroll<T> * at_.rows;
        load();
      }
      x += at_.lanes;
      if (x >= region_.columns) return;
      begin(x);
    }
  }

 private:
  __device__ __forceinline__ void begin(int x) {
    y_ = at_.row;
    next_ = map_ + y_ * row_ + x * column_;
    load();
  }

  // The next kUnroll items leave memory.
  __device__ __forceinline__ void load() {
    const int64_t step = at_.rows * row_;
#pragma unroll
    for (int k = 0; k < kUnroll<T>; ++k) {
      if (y_ + k * at_.rows < region_.rows) items_[k].load(next_);
      next_ += step;
    }
  }

  Region region_;
  Lanes at_;
  int64_t row_, column_;
  const T *map_, *next_;
  int y_;
  Pixels items_[kUnroll<T>];
};

// The rows of a map that are this block's: all of them, or the blockIdx.y-th of gridDim.y slices.
template <int kSize>
__device__ __forceinline__ Region block_region(const HeatmapLossSize& s) {
  const int rows = (s.height + int(gridDim.y) - 1) / int(gridDim.y), first = int(blockIdx.y) * rows;
  return {0, first, s.width / kSize, min(rows, s.height - first)};
}

// Targets.

// What a map's weight, point and sigma say before it is read.
template <class C>
struct Row {
  C weight, x, y, sigma;
  bool valid;
};

template <class T>
__device__ __forceinline__ Row<Compute<T>> row_of(const HeatmapLossParams<T>& p, int64_t r) {
  using C = Compute<T>;
  Row<C> row{p.weight ? p.weight[r] : C(1), p.points ? p.points[2 * r] : C(0), p.points ? p.points[2 * r + 1] : C(0),
             p.sigmas ? p.sigmas[r] : p.sigma, false};
  row.valid = render_valid(row.x, row.y, row.sigma);
  return row;
}

template <class C>
constexpr C kNegligiblePower = sizeof(C) == 4 ? C(-34.66) : C(-322.4);  // log kNegligible, and a little less

// Both axes in shared memory: gx[x] gy[y] is the target.
template <class C>
struct Target {
  C *gx, *gy;
  C entropy;   // sum y log y of a target of sum 1
  Cells x, y;  // of a target of sum 1: beyond these it is 0
};

// Outside of these cells a target of sum 1 is negligible: there factor ((h - c)^2 - (n - c)^2) <= factor (h - n)^2.
template <class C>
__device__ __forceinline__ Cells seen_cells(const TargetAxis<C>& axis, int size) {
  return cells_around(axis.nearest, ceil(sqrt(kNegligiblePower<C> / axis.factor)) + C(1), size);
}

// Fills the tables at `axes`, of peak 1 or of sum 1; readers wait for a barrier.
template <bool kNormalized, class C>
__device__ __forceinline__ void fill_target(Target<C>& t, C* axes, const Row<C>& row, const HeatmapLossSize& s,
                                            C (&shared)[128]) {
  const TargetAxis<C> x = target_axis(row.x, row.sigma, {0, s.width}, kNormalized);
  const TargetAxis<C> y = target_axis(row.y, row.sigma, {0, s.height}, kNormalized);
  t.gx = axes;
  t.gy = axes + s.width;
  C sums[4] = {};  // over x and over y: of the Gaussian, of Gaussian * logarithm
  for (int i = threadIdx.x; i < s.width + s.height; i += blockDim.x) {
    const bool along_x = i < s.width;
    C power = along_x ? target_exponent(x, C(i)) : target_exponent(y, C(i - s.width));
    power = power > C(0) ? C(0) : power;  // but for rounding it is not
    C g = exp(power);
    g = g > kNegligible<C> ? g : C(0);
    axes[i] = g;
    if constexpr (kNormalized) {
      const C part = g > C(0) ? g * power : C(0);
      sums[0] += along_x ? g : C(0);
      sums[1] += along_x ? C(0) : g;
      sums[2] += along_x ? part : C(0);
      sums[3] += along_x ? C(0) : part;
    }
  }
  if constexpr (kNormalized) {
    block_sums(sums, shared);
    const C scale = C(1) / (sums[0] * sums[1]);
    t.entropy = sums[2] / sums[0] + sums[3] / sums[1] + log(scale);
    t.x = seen_cells(x, s.width);
    t.y = seen_cells(y, s.height);
    // gy alone carries the scale: every thread for the cells that it wrote.
    for (int i = threadIdx.x; i < s.width + s.height; i += blockDim.x)
      if (i >= s.width) axes[i] *= scale;
  }
}

// gx[x], gx[x + 1], ...: an item's.
template <int kSize, class C>
__device__ __forceinline__ void load_axis(const C* gx, int x, C (&out)[kSize]) {
  if constexpr (kSize * sizeof(C) % 16 == 0) {  // packed: x is a multiple of kSize
#pragma unroll
    for (int j = 0; j < kSize * int(sizeof(C)) / 16; ++j) {
      const uint4 bits = *reinterpret_cast<const uint4*>(gx + x + j * (16 / int(sizeof(C))));
      memcpy(out + j * (16 / int(sizeof(C))), &bits, 16);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out[j] = gx[x + j];
  }
}

// What a thread keeps of a column of items.
template <int kSize, class C>
struct AxisPart {
  int64_t at;  // the column's place in a row of the gradient
  C gx[kSize];

  AxisPart() = default;
  __device__ __forceinline__ AxisPart(const C* axis, int x, int64_t stride) : at(x * stride) { load_axis(axis, x, gx); }
};

// The same value for all pixels of a block's region.
template <class T, bool kPacked>
__device__ __forceinline__ void write_all(T* map, const Maps<T>& m, Region region, Compute<T> value) {
  Item<T, kPacked> item;
#pragma unroll
  for (T& v : item.value) v = T(value);
  const Lanes at(region);
  for (int64_t y = at.row; y < region.rows; y += at.rows)
    for (int64_t x = at.column; x < region.columns; x += at.lanes)
      item.store(map + (region.y + y) * m.row + x * (kPacked ? item.kSize : m.column));
}

// Losses by pixel: value and gradient of the prediction z against the target y, up to the factor `scale`.

template <class C>
struct Square {
  static constexpr bool kClosed = false;  // foreground: y > threshold
  C scale;

  __device__ __forceinline__ C value(C z, C y) const { return (z - y) * (z - y); }
  __device__ __forceinline__ C gradient(C z, C y) const { return C(2) * (z - y); }
};

// adaptive_wing and its gradient. The power q = 2^(a log2(e / epsilon)) takes two fast functions: 1e-5 relative for
// e > 1e-8; below, q < 1e-16 is nothing beside a map's other pixels.
template <class C, bool kSmall>  // kSmall: q <= 1/2 everywhere, and log(1 + q) is a polynomial; otherwise log1p
struct Wing {
  static constexpr bool kClosed = true;  // foreground: y >= threshold
  C scale, alpha, theta, inverse_theta, log2_epsilon;

  __device__ __forceinline__ C power(C d, C y) const {  // 0 at d = 0
    return fast_exp2((alpha - y) * (fast_log2(d) - log2_epsilon));
  }
  __device__ __forceinline__ C value(C z, C y) const {
    const C d = fabs(z - y), e = min(d, theta), q = power(e, y);
    C v = kSmall ? log1p_small(q) : log1p(q);
    if (!(d <= theta)) v += (alpha - y) * q * fast_inverse(q + C(1)) * ((d - e) * inverse_theta);  // NaN comes here
    return v;
  }
  __device__ __forceinline__ C gradient(C z, C y) const {
    constexpr C kLeast = sizeof(C) == 4 ? C(1e-37) : C(1e-300);  // its inverse is finite
    const C r = z - y, e = max(min(C(fabs(r)), theta), kLeast), q = power(e, y);
    const C slope = (alpha - y) * q * fast_inverse((q + C(1)) * e);
    return r > C(0) ? slope : r < C(0) ? -slope : r;  // 0 at 0, NaN stays
  }
};

// Pixels of the foreground count `inside` times, others `outside` times.
template <class C>
struct Foreground {
  C inside, outside, threshold;
  int radius;  // of its dilation; negative: there is no foreground
};

// The foreground of one map: which rows may hold a part of it, and which pixels do.
template <class C, bool kClosed>
struct Ground {
  Foreground<C> f;
  C x, y, cut, reach;
  int width, height;

  __device__ __forceinline__ Ground(const Foreground<C>& f, const Row<C>& row, const HeatmapLossSize& s, C factor)
      : f{f.inside * factor, f.outside * factor, f.threshold, f.radius},
        x(row.x),
        y(row.y),
        cut(f.radius < 0 ? C(-1) : cut_distance(f.threshold, row.sigma)),
        reach(cut < C(0) ? C(-1) : sqrt(cut) + C(f.radius) + C(1)),  // a pixel more than a row's distance can be
        width(s.width),
        height(s.height) {}

  __device__ __forceinline__ C near_x(int px) const { return nearest_distance(x, px, f.radius, width); }

  template <int kSize>
  __device__ __forceinline__ void weights(const C (&near)[kSize], int py, C (&out)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out[j] = f.outside;
    if (!(fabs(C(py) - y) <= reach)) return;
    const C limit = cut - nearest_distance(y, py, f.radius, height);
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (kClosed ? near[j] <= limit : near[j] < limit) out[j] = f.inside;
  }
};

// With the squared distances of the foreground along x.
template <int kSize, class C>
struct PixelColumn : AxisPart<kSize, C> {
  C near[kSize];

  template <class G>
  __device__ __forceinline__ PixelColumn(const C* axis, const G& ground, int x, int64_t stride)
      : AxisPart<kSize, C>(axis, x, stride) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) near[j] = ground.near_x(x + j);
  }
};

// Bytes: one read of the map. A pixel takes 9 instructions for the square, the read is the floor. For Adaptive Wing
// with its defaults it takes 30, two of them transcendental (log2, exp2) and a third (an inverse) where a lane of the
// warp has |z - y| > theta: 0.46 ms beside the 0.42 of the read; 16-bit maps take 0.44 beside 0.21. Rows within the
// dilated target take 6 more.
template <class T, bool kPacked, class Loss>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T, kMostThreads>)
    pixel_loss_kernel(HeatmapLossParams<T> p, Loss loss, Foreground<Compute<T>> foreground) {
  using C = Compute<T>;
  constexpr int kSize = Item<T, kPacked>::kSize;
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, 128);
  const unsigned r = blockIdx.x;
  const Row<C> row = row_of(p, r);
  if (row.weight == C(0) || !row.valid) {  // the same for all threads
    if (threadIdx.x == 0) p.loss[r] = row.weight == C(0) ? C(0) : C(NAN);
    return;
  }
  // 1. the first reads leave; the target
  Walk<T, kPacked> walk(map_of(p.pred, p.size, r), p.pred, block_region<kSize>(p.size));
  Target<C> target;
  fill_target<false>(target, axes, row, p.size, shared);
  const Ground<C, Loss::kClosed> ground(foreground, row, p.size, C(1));
  __syncthreads();

  // 2. this thread's share of the sum, item by item
  C sum[1] = {};
  const auto column = [&](int x) { return PixelColumn<kSize, C>(target.gx, ground, x, 1); };
  walk.each(column, [&](const auto& what, const auto& item, int y) {
    C weight[kSize];
    ground.weights(what.near, y, weight);
    const C gy = target.gy[y];
    C part = C(0);
#pragma unroll
    for (int j = 0; j < kSize; ++j) part += weight[j] * loss.value(C(item.value[j]), what.gx[j] * gy);
    sum[0] += part;
  });

  // 3. reduce
  FF_SHARED(C, warps, 32);
  block_sums(sum, warps);
  if (threadIdx.x == 0) p.loss[r] = row.weight * (loss.scale * sum[0] / (C(p.size.height) * C(p.size.width)));
}

// Bytes: one read and one write of the map, the floor for every type: a pixel takes 12 instructions for the square and
// 27 for Adaptive Wing, three of them transcendental (log2, exp2, an inverse), of the 54 that the traffic of float
// leaves and the 27 of 16 bits.
template <class T, bool kPacked, class Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kThreads>)
    pixel_loss_backward_kernel(HeatmapLossParams<T> p, const Compute<T>* __restrict__ grad_loss, Maps<T> grad_pred,
                               Loss loss, Foreground<Compute<T>> foreground) {
  using C = Compute<T>;
  constexpr int kSize = Item<T, kPacked>::kSize;
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, 128);
  const unsigned r = blockIdx.x;
  const Row<C> row = row_of(p, r);
  const Region region = block_region<kSize>(p.size);
  T* grad = map_of(grad_pred, p.size, r);
  if (row.weight == C(0) || !row.valid) {  // the same for all threads
    write_all<T, kPacked>(grad, grad_pred, region, row.weight == C(0) ? C(0) : C(NAN));
    return;
  }
  Walk<T, kPacked> walk(map_of(p.pred, p.size, r), p.pred, region);
  Target<C> target;
  fill_target<false>(target, axes, row, p.size, shared);
  const C factor = grad_loss[r] * row.weight * loss.scale / (C(p.size.height) * C(p.size.width));
  const Ground<C, Loss::kClosed> ground(foreground, row, p.size, factor);
  __syncthreads();

  const int64_t stride = kPacked ? 1 : grad_pred.column;
  const auto column = [&](int x) { return PixelColumn<kSize, C>(target.gx, ground, x, stride); };
  walk.each(column, [&](const auto& what, const auto& item, int y) {
    C weight[kSize];
    ground.weights(what.near, y, weight);
    const C gy = target.gy[y];
    Item<T, kPacked> out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.value[j] = T(weight[j] * loss.gradient(C(item.value[j]), what.gx[j] * gy));
    out.store(grad + y * grad_pred.row + what.at);
  });
}

// Losses of the softmax.

// exp(v - top), where all of a masked pixel's rivals may be masked as well.
template <class C>
__device__ __forceinline__ C exp_below(C v, C top) {
  return fast_exp2((v - (top == C(-INFINITY) ? C(0) : top)) * C(kLog2E));
}

// What sums over exp(z - old) are multiplied by when `top` takes the place of `old`.
template <class C>
__device__ __forceinline__ C rescaling(C old, C top) {
  return old == C(-INFINITY) ? C(0) : fast_exp2((old - top) * C(kLog2E));
}

// Sums of e = exp(z - top) about a pivot pixel, both moving along: top is the largest z so far. The pivot is where it
// was met, so that moments of a narrow p do not cancel.
template <class C>
struct Moments {
  C top, total, px, py, x, y, xx, yy;

  __device__ __forceinline__ void move(C to_x, C to_y) {
    const C a = to_x - px, b = to_y - py;
    xx += a * (a * total - C(2) * x);
    yy += b * (b * total - C(2) * y);
    x -= a * total;
    y -= b * total;
    px = to_x, py = to_y;
  }
  __device__ __forceinline__ void rescale(C to) {
    const C keep = rescaling(top, to);
    top = to, total *= keep, x *= keep, y *= keep, xx *= keep, yy *= keep;
  }
};

template <int kSize, class C>
__device__ __forceinline__ C largest(const C (&v)[kSize]) {  // NaNs lose; the sums have them
  C top = v[0];
#pragma unroll
  for (int j = 1; j < kSize; ++j) top = max(top, v[j]);
  return top;
}

// Writes what a map that is hidden or invalid has for results.
template <class T>
__device__ __forceinline__ void finish_unread(const SoftmaxLossParams<T>& p, int64_t r, int statistics,
                                              Compute<T> value) {
  if (threadIdx.x == 0) p.maps.loss[r] = value;
  if (int(threadIdx.x) < statistics) p.statistics[r * statistics + threadIdx.x] = value;
}

// KL and JS. Bytes: one read of the map; JS reads once more, from the caches, the pixels where the target is not 0.
// sum exp(z - top) is taken online: a thread's sums are rescaled when an item exceeds its top, about log(items) times.
// KL's cross sum of y (z - pivot), the pivot being the logit of the target's centre, is taken in the same pass and
// needs no rescaling. A pixel takes 10 instructions, one transcendental, and 5 more where the target is not 0: the read
// is the floor for every type. There JS takes about 200 (its logarithms must be precise, since p - y cancels): the
// floor again while these are few, sigma below 2 on 128 x 128 pixels; beyond, 0.3 ms for every tenth of the pixels.
template <SoftmaxLoss kLoss, class T, bool kPacked>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T, kMostThreads>) divergence_kernel(SoftmaxLossParams<T> p) {
  using C = Compute<T>;
  constexpr int kSize = Item<T, kPacked>::kSize, kStatistics = statistics_of(kLoss);
  constexpr bool kKl = kLoss == SoftmaxLoss::kl;
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, 128);
  FF_SHARED(C, shared_sums, 64);
  const HeatmapLossSize& s = p.maps.size;
  const unsigned r = blockIdx.x;
  const Row<C> row = row_of(p.maps, r);
  if (row.weight == C(0) || !row.valid)  // the same for all threads
    return finish_unread(p, r, kStatistics, row.weight == C(0) ? C(0) : C(NAN));

  // 1. the first reads leave; the target
  const T* map = map_of(p.maps.pred, s, r);
  Walk<T, kPacked> walk(map, p.maps.pred, block_region<kSize>(s));
  C pivot = C(0);
  if constexpr (kKl) {
    const auto nearest = [](C centre, int size) { return int(max(C(0), min(rint(centre), C(size - 1)))); };
    pivot = C(map[nearest(row.y, s.height) * p.maps.pred.row + nearest(row.x, s.width) * p.maps.pred.column]);
    if (!(pivot - pivot == C(0))) pivot = C(0);
  }
  Target<C> target;
  fill_target<true>(target, axes, row, s, shared);
  __syncthreads();

  // 2. this thread's sums: of e, and of y (z - pivot), or of e where y = 0
  C top = C(-INFINITY), total = C(0), other = C(0);
  const auto column = [&](int x) { return AxisPart<kSize, C>(target.gx, x, 1); };
  walk.each(column, [&](const auto& what, const auto& item, int y) {
    C z[kSize], e[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = C(item.value[j]);
    const C highest = largest(z);
    if (highest > top) {
      const C keep = rescaling(top, highest);
      top = highest;
      total *= keep;
      if (!kKl) other *= keep;
    }
    C part = C(0);
#pragma unroll
    for (int j = 0; j < kSize; ++j) part += e[j] = exp_below(z[j], top);
    total += part;
    const C gy = target.gy[y];
    if (gy == C(0)) {
      if (!kKl) other += part;
      return;
    }
    part = C(0);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if constexpr (kKl) {
        part += what.gx[j] > C(0) ? what.gx[j] * (z[j] - pivot) : C(0);  // a masked pixel, 0 * -inf, counts 0
      } else {
        part += what.gx[j] > C(0) ? C(0) : e[j];
      }
    }
    other += kKl ? gy * part : part;
  });

  // 3. reduce
  const C block_top = block_max(top, shared_sums), keep = rescaling(top, block_top);
  C sums[2] = {total * keep, kKl ? other : other * keep};
  block_sums(sums, shared_sums);
  const C log_total = block_top == C(-INFINITY) ? C(NAN) : log(sums[0]);
  C loss = target.entropy - sums[1] + ((block_top - pivot) + log_total);

  // 4. JS: its parts and those of K where y > 0, now that p is known
  if constexpr (!kKl) {
    C parts[2] = {};
    const C log2_total = log_total * C(kLog2E);
    const Region seen{target.x.begin, target.y.begin, target.x.end - target.x.begin, target.y.end - target.y.begin};
    if (seen.columns > 0) {
      Walk<T, false> again(map, p.maps.pred, seen);
      again.each([&](int x) { return target.gx[x]; },
                 [&](C gx, const auto& item, int y) {
                   const C goal = gx * target.gy[y];
                   if (!(goal > C(0))) return;
                   const C q = fast_exp2((C(item.value[0]) - block_top) * C(kLog2E) - log2_total);
                   parts[0] += js_part(q, goal);
                   parts[1] += q * js_log_ratio(q, goal);
                 });
    }
    block_sums(parts, shared_sums);
    loss = parts[0] + C(0.5 * kLog2) * (sums[1] / sums[0]);
    if (threadIdx.x == 0) p.statistics[int64_t(r) * kStatistics + 2] = parts[1];
  }
  if (threadIdx.x != 0) return;
  p.maps.loss[r] = row.weight * loss;
  p.statistics[int64_t(r) * kStatistics] = block_top;
  p.statistics[int64_t(r) * kStatistics + 1] = log_total;
}

// Bytes: one read of the map, the floor. Online, as above, with both axes' moments: a pixel takes 15 instructions, one
// transcendental.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T, kMostThreads>) variance_kernel(SoftmaxLossParams<T> p) {
  using C = Compute<T>;
  constexpr int kSize = Item<T, kPacked>::kSize, kStatistics = statistics_of(SoftmaxLoss::variance);
  FF_SHARED(C, shared, 128);
  FF_SHARED(C, shared_means, 96);
  const HeatmapLossSize& s = p.maps.size;
  const unsigned r = blockIdx.x;
  const Row<C> row = row_of(p.maps, r);
  if (row.weight == C(0) || !row.valid)  // the same for all threads
    return finish_unread(p, r, kStatistics, row.weight == C(0) ? C(0) : C(NAN));
  Walk<T, kPacked> walk(map_of(p.maps.pred, s, r), p.maps.pred, block_region<kSize>(s));

  // 1. this thread's moments
  Moments<C> m{C(-INFINITY), 0, 0, 0, 0, 0, 0, 0};
  walk.each([](int x) { return x; },
            [&](int x, const auto& item, int y) {
              C z[kSize];
#pragma unroll
              for (int j = 0; j < kSize; ++j) z[j] = C(item.value[j]);
              const C highest = largest(z);
              if (highest > m.top) {
                C where = C(x);
#pragma unroll
                for (int j = 1; j < kSize; ++j)
                  if (z[j] == highest) where = C(x + j);
                m.rescale(highest);
                m.move(where, C(y));
              }
              const C dx = C(x) - m.px, dy = C(y) - m.py;
              C part = C(0);
#pragma unroll
              for (int j = 0; j < kSize; ++j) {
                const C e = exp_below(z[j], m.top), d = dx + C(j), first = e * d;
                part += e;
                m.x += first;
                m.xx += first * d;
              }
              m.total += part;
              m.y += part * dy;
              m.yy += part * dy * dy;
            });

  // 2. reduce: to one top, for a pixel near the mean; then all moments about that pixel
  m.rescale(block_max(m.top, shared));
  C means[3] = {m.total, m.total * m.px + m.x, m.total * m.py + m.y};
  block_sums(means, shared_means);
  const C total = means[0];
  m.move(rint(means[1] / total), rint(means[2] / total));
  C sums[4] = {m.x, m.y, m.xx, m.yy};
  block_sums(sums, shared);
  if (threadIdx.x != 0) return;
  const C dx = sums[0] / total, dy = sums[1] / total, vx = sums[2] / total - dx * dx, vy = sums[3] / total - dy * dy;
  p.maps.loss[r] = row.weight * variance_loss(vx, vy, row.sigma);
  C* out = p.statistics + int64_t(r) * kStatistics;
  out[0] = m.top;
  out[1] = m.top == C(-INFINITY) ? C(NAN) : log(total);
  out[2] = m.px + dx;
  out[3] = m.py + dy;
  out[4] = vx;
  out[5] = vy;
}

// Bytes: one read and one write of the map, the floor: a pixel takes 12 instructions, one of them transcendental. Where
// the target is not 0 JS takes about 60, for a precise logarithm.
template <SoftmaxLoss kLoss, class T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kThreads>)
    softmax_backward_kernel(SoftmaxLossBackwardParams<T> b) {
  using C = Compute<T>;
  constexpr int kSize = Item<T, kPacked>::kSize, kStatistics = statistics_of(kLoss);
  FF_DYN_SHARED(C, axes);
  FF_SHARED(C, shared, 128);
  const HeatmapLossParams<T>& p = b.forward.maps;
  const unsigned r = blockIdx.x;
  const Row<C> row = row_of(p, r);
  const Region region = block_region<kSize>(p.size);
  T* grad = map_of(b.grad_pred, p.size, r);
  if (row.weight == C(0) || !row.valid) {  // the same for all threads
    write_all<T, kPacked>(grad, b.grad_pred, region, row.weight == C(0) ? C(0) : C(NAN));
    return;
  }
  Walk<T, kPacked> walk(map_of(p.pred, p.size, r), p.pred, region);
  const C* statistics = b.forward.statistics + int64_t(r) * kStatistics;
  const C top = statistics[0], log2_total = statistics[1] * C(kLog2E), factor = b.grad_loss[r] * row.weight;
  const auto probability = [&](T z) { return fast_exp2((C(z) - top) * C(kLog2E) - log2_total); };
  const int64_t stride = kPacked ? 1 : b.grad_pred.column;

  if constexpr (kLoss == SoftmaxLoss::variance) {
    const C mean_x = statistics[2], mean_y = statistics[3], vx = statistics[4], vy = statistics[5];
    const C square = row.sigma * row.sigma, a = C(2) * factor * (vx - square), c = C(2) * factor * (vy - square);
    const auto column = [&](int x) {
      AxisPart<kSize, C> part;
      part.at = x * stride;
#pragma unroll
      for (int j = 0; j < kSize; ++j) part.gx[j] = a * ((C(x + j) - mean_x) * (C(x + j) - mean_x) - vx);
      return part;
    };
    walk.each(column, [&](const auto& what, const auto& item, int y) {
      const C dy = C(y) - mean_y, base = c * (dy * dy - vy);
      Item<T, kPacked> out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.value[j] = T(probability(item.value[j]) * (what.gx[j] + base));
      out.store(grad + y * b.grad_pred.row + what.at);
    });
  } else {
    Target<C> target;
    fill_target<true>(target, axes, row, p.size, shared);
    __syncthreads();
    const C mean = kLoss == SoftmaxLoss::js ? statistics[2] : C(0), half = C(0.5) * factor;
    const auto column = [&](int x) { return AxisPart<kSize, C>(target.gx, x, stride); };
    walk.each(column, [&](const auto& what, const auto& item, int y) {
      const C gy = kLoss == SoftmaxLoss::kl ? target.gy[y] * factor : target.gy[y];
      Item<T, kPacked> out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const C q = probability(item.value[j]), goal = what.gx[j] * gy;
        if constexpr (kLoss == SoftmaxLoss::kl) {
          out.value[j] = T(q * factor - goal);
        } else {
          C k = -mean;
          if (goal > C(0)) k += js_log_ratio(q, goal);
          out.value[j] = T(half * q * k);
        }
      }
      out.store(grad + y * b.grad_pred.row + what.at);
    });
  }
}

// Launches.

// A block's threads: about as many as the map's size asks for, in whole rows of items where that is possible.
inline int threads_of(const HeatmapLossSize& s, int item, int most) {
  const int pixels = s.height * s.width, columns = s.width / item;
  const int wanted = pixels <= kSmallPixels ? kSmallThreads : pixels <= kLargePixels ? kThreads : most;
  const int strips = (columns + wanted - 1) / wanted, lanes = (columns + strips - 1) / strips;
  return (wanted / lanes * lanes + 31) / 32 * 32;
}

template <class C, class Kernel, class... Params>
int launch_maps(const HeatmapLossSize& s, int threads, int slices, Kernel kernel, CUstream_st* stream,
                const Params&... params) {
  const int64_t rows = s.images * s.landmarks;
  if (rows == 0) return cudaSuccess;
  if (rows > INT_MAX || s.height + s.width > kMostLossCells) return cudaErrorInvalidConfiguration;
  const size_t tables = sizeof(C) * size_t(s.height + s.width);
  FF_LAUNCH(kernel, dim3(unsigned(rows), unsigned(slices)), dim3(threads), tables, stream, params...);
  return cudaGetLastError();
}

// Items of one pixel or of a pack.
template <class T>
int item_of(bool packed) {
  return packed ? Item<T, true>::kSize : 1;
}

// Forward: a block a map.
template <class T, class Kernel, class... Params>
int launch_forward(const HeatmapLossSize& s, bool packed, Kernel kernel, CUstream_st* stream, const Params&... params) {
  const int threads = threads_of(s, item_of<T>(packed), kMostThreads);
  return launch_maps<Compute<T>>(s, threads, 1, kernel, stream, params...);
}

// Backward: a block some rows of a map, alike but for the last.
template <class T, class Kernel, class... Params>
int launch_backward(const HeatmapLossSize& s, bool packed, Kernel kernel, CUstream_st* stream,
                    const Params&... params) {
  const int threads = threads_of(s, item_of<T>(packed), kThreads);
  const int most = s.width < kSlicePixels ? kSlicePixels / s.width : 1;  // rows of a slice
  return launch_maps<Compute<T>>(s, threads, (s.height + most - 1) / most, kernel, stream, params...);
}

template <class T, class Loss>
int pixel_loss(const HeatmapLossParams<T>& p, const Loss& loss, const Foreground<Compute<T>>& f, CUstream_st* stream) {
  const bool packed = packs(p.pred, p.size);
  auto kernel = packed ? pixel_loss_kernel<T, kPacks<T>, Loss> : pixel_loss_kernel<T, false, Loss>;
  return launch_forward<T>(p.size, packed, kernel, stream, p, loss, f);
}

template <class T, template <class> class Forward, class Loss>
int pixel_loss_backward(const HeatmapLossBackwardParams<T, Forward>& b, const Loss& loss,
                        const Foreground<Compute<T>>& f, CUstream_st* stream) {
  const HeatmapLossParams<T>& p = b.forward.maps;
  const bool packed = packs(p.pred, p.size) && packs(b.grad_pred, p.size);
  auto kernel = packed ? pixel_loss_backward_kernel<T, kPacks<T>, Loss> : pixel_loss_backward_kernel<T, false, Loss>;
  return launch_backward<T>(p.size, packed, kernel, stream, p, b.grad_loss, b.grad_pred, loss, f);
}

template <class T>
Foreground<Compute<T>> foreground_of(const HeatmapMseParams<T>& p) {
  return {p.foreground, p.background, p.threshold, p.foreground == p.background ? -1 : 0};
}

template <class T>
Foreground<Compute<T>> foreground_of(const AdaptiveWingParams<T>& p) {
  using C = Compute<T>;
  return {C(1 + kMapWeight), C(1), p.threshold, p.radius};
}

template <bool kSmall, class T>
Wing<Compute<T>, kSmall> wing_of(const AdaptiveWingParams<T>& p) {
  using C = Compute<T>;
  return {p.omega, p.alpha, p.theta, C(1) / p.theta, C(std::log2(double(p.epsilon)))};
}

template <SoftmaxLoss kLoss, class T>
int divergence(const SoftmaxLossParams<T>& p, CUstream_st* stream) {
  const bool packed = packs(p.maps.pred, p.maps.size);
  auto kernel = packed ? divergence_kernel<kLoss, T, kPacks<T>> : divergence_kernel<kLoss, T, false>;
  return launch_forward<T>(p.maps.size, packed, kernel, stream, p);
}

template <SoftmaxLoss kLoss, class T>
int softmax_backward(const SoftmaxLossBackwardParams<T>& b, CUstream_st* stream) {
  const HeatmapLossSize& s = b.forward.maps.size;
  const bool packed = packs(b.forward.maps.pred, s) && packs(b.grad_pred, s);
  auto kernel = packed ? softmax_backward_kernel<kLoss, T, kPacks<T>> : softmax_backward_kernel<kLoss, T, false>;
  return launch_backward<T>(s, packed, kernel, stream, b);
}

}  // namespace

template <class T>
int heatmap_mse_cuda(const HeatmapMseParams<T>& p, CUstream_st* stream) {
  return pixel_loss(p.maps, Square<Compute<T>>{1}, foreground_of(p), stream);
}

template <class T>
int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<T>& b, CUstream_st* stream) {
  return pixel_loss_backward(b, Square<Compute<T>>{1}, foreground_of(b.forward), stream);
}

template <class T>
int adaptive_wing_cuda(const AdaptiveWingParams<T>& p, CUstream_st* stream) {
  // The largest q is that of e = theta: ratio^(alpha - y), y between 0 and 1.
  const double ratio = double(p.theta) / double(p.epsilon);
  if (ratio <= 1 && std::pow(ratio, double(p.alpha) - 1) <= 0.5)
    return pixel_loss(p.maps, wing_of<true>(p), foreground_of(p), stream);
  return pixel_loss(p.maps, wing_of<false>(p), foreground_of(p), stream);
}

template <class T>
int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<T>& b, CUstream_st* stream) {
  return pixel_loss_backward(b, wing_of<true>(b.forward), foreground_of(b.forward), stream);  // whatever kSmall is
}

template <class T>
int softmax_loss_cuda(const SoftmaxLossParams<T>& p, CUstream_st* stream) {
  switch (SoftmaxLoss(p.kind)) {
    case SoftmaxLoss::kl: return divergence<SoftmaxLoss::kl>(p, stream);
    case SoftmaxLoss::js: return divergence<SoftmaxLoss::js>(p, stream);
    case SoftmaxLoss::variance: break;
  }
  const bool packed = packs(p.maps.pred, p.maps.size);
  auto kernel = packed ? variance_kernel<T, kPacks<T>> : variance_kernel<T, false>;
  return launch_forward<T>(p.maps.size, packed, kernel, stream, p);
}

template <class T>
int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<T>& b, CUstream_st* stream) {
  switch (SoftmaxLoss(b.forward.kind)) {
    case SoftmaxLoss::kl: return softmax_backward<SoftmaxLoss::kl>(b, stream);
    case SoftmaxLoss::js: return softmax_backward<SoftmaxLoss::js>(b, stream);
    case SoftmaxLoss::variance: break;
  }
  return softmax_backward<SoftmaxLoss::variance>(b, stream);
}

}  // namespace ff
