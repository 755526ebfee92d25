// Launchers of the heatmap losses. B images, P landmarks, R = B P maps of H x W. T: float, double, Half, BFloat16.
//
// Every map's loss is w r, r the loss of heatmap_loss_math.h: summed over the map for softmax losses, its mean for
// those by pixel. A map of weight 0 is not read: its loss and gradient are 0. A point that is not finite, or a sigma
// that is not finite and above 0 (render_valid), gives NaN in its own loss and gradient.
#pragma once
#include <cstdint>

#include "heatmap/heatmap.h"

namespace ff {

struct HeatmapLossSize {
  int64_t images, landmarks;  // B, P
  int height, width;          // H, W
  int64_t
      groups;  // CPU: 0, or the groups of neighbouring landmarks of an image, when maps are staged (see the kernels)
};

template <class T>
struct HeatmapLossParams {
  HeatmapLossSize size;
  Maps<const T> pred;        // any strides  z
  const Compute<T>* points;  // [R, 2]  x, y in pixels: c; null for the variance, which has none
  const Compute<T>* sigmas;  // [R] or null  pixels
  Compute<T> sigma;          // pixels, where sigmas is null
  const Compute<T>* weight;  // [R] or null (1)  w
  Compute<T>* loss;          // [R]  w r
};

// r = mean over pixels of f (z - y)^2, f = foreground where y > threshold, background elsewhere.
template <class T>
struct HeatmapMseParams {
  HeatmapLossParams<T> maps;
  Compute<T> foreground, background, threshold;
};

// r = mean over pixels of (1 + kMapWeight M) wing(z, y), M = [y dilated by radius >= threshold].
template <class T>
struct AdaptiveWingParams {
  HeatmapLossParams<T> maps;
  Compute<T> alpha, omega, epsilon, theta;
  int radius;            // of the dilation in pixels; negative: M = 0
  Compute<T> threshold;  // of the target
};

// KL, JS or the variance of softmax(z).
template <class T>
struct SoftmaxLossParams {
  HeatmapLossParams<T> maps;
  int kind;                // SoftmaxLoss
  Compute<T>* statistics;  // [R, statistics_of(kind)]
};

// The gradient of z: grad_loss w dr/dz. `forward` is as the forward saw it (loss unused, statistics read).
template <class T, template <class> class Forward>
struct HeatmapLossBackwardParams {
  Forward<T> forward;
  const Compute<T>* grad_loss;  // [R]
  Maps<T> grad_pred;            // any strides
};
template <class T>
using HeatmapMseBackwardParams = HeatmapLossBackwardParams<T, HeatmapMseParams>;
template <class T>
using AdaptiveWingBackwardParams = HeatmapLossBackwardParams<T, AdaptiveWingParams>;
template <class T>
using SoftmaxLossBackwardParams = HeatmapLossBackwardParams<T, SoftmaxLossParams>;

// CPU kernels of one instruction set. A task is a map, or a group of staged ones.
template <class T>
struct HeatmapLossCpu {
  void (*mse)(const HeatmapMseParams<T>&, int64_t begin, int64_t end);
  void (*mse_backward)(const HeatmapMseBackwardParams<T>&, int64_t begin, int64_t end);
  void (*adaptive_wing)(const AdaptiveWingParams<T>&, int64_t begin, int64_t end);
  void (*adaptive_wing_backward)(const AdaptiveWingBackwardParams<T>&, int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxLossParams<T>&, int64_t begin, int64_t end);
  void (*softmax_backward)(const SoftmaxLossBackwardParams<T>&, int64_t begin, int64_t end);
};
constexpr int kLossGroup = 16;  // landmarks of a group

namespace baseline {
template <class T>
const HeatmapLossCpu<T>& heatmap_loss_cpu();
}
namespace avx2 {
template <class T>
const HeatmapLossCpu<T>& heatmap_loss_cpu();
}
namespace avx512 {
template <class T>
const HeatmapLossCpu<T>& heatmap_loss_cpu();
}

// CUDA launchers return a cudaError_t.
template <class T>
int heatmap_mse_cuda(const HeatmapMseParams<T>&, CUstream_st*);
template <class T>
int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<T>&, CUstream_st*);
template <class T>
int adaptive_wing_cuda(const AdaptiveWingParams<T>&, CUstream_st*);
template <class T>
int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<T>&, CUstream_st*);
template <class T>
int softmax_loss_cuda(const SoftmaxLossParams<T>&, CUstream_st*);
template <class T>
int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<T>&, CUstream_st*);
constexpr int kMostLossCells = 4092;  // H + W on CUDA: room for both axes' tables in shared memory

}  // namespace ff
