// What the CUDA kernels of the heatmap losses share: heatmap_loss_cuda.cu builds float, heatmap_loss_cuda_half.cu the
// 16-bit types, heatmap_loss_cuda_double.cu double.
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

}  // namespace
}  // namespace ff
