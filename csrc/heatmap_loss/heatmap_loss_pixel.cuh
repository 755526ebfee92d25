// Losses by pixel: the mean square and Adaptive Wing.
#pragma once
#include "heatmap_loss/heatmap_loss_kernels.cuh"

namespace ff {
namespace {

// Value and gradient of the prediction z against the target y, up to the factor `scale`.

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

}  // namespace ff
