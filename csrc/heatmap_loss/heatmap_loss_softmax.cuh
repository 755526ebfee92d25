// Losses of the softmax: Kullback-Leibler, Jensen-Shannon and the variance.
#pragma once
#include "heatmap_loss/heatmap_loss_kernels.cuh"

namespace ff {
namespace {

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
