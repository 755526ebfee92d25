// Launchers of the heatmap room. B images, P landmarks, R = B P maps of H x W. T: float, double, Half, BFloat16.
#pragma once
#include <cstdint>
#include <type_traits>

struct CUstream_st;  // cudaStream_t

namespace ff {

// Working precision.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Maps of any strides, in elements. On the CPU either column == 1 (planar) or landmark == 1 (pixel-major).
template <class T>
struct Maps {
  T* data;
  int64_t image, landmark, row, column;  // strides of B, P, H, W
  bool pixel_major;                      // landmark == 1: vector lanes go over landmarks
};

struct HeatmapSize {
  int64_t images, landmarks;  // B, P
  int height, width;          // H, W
  int64_t chunks;             // CPU, pixel-major: a task is one of `chunks` parts of an image's landmarks
};

template <class T>
struct RenderParams {
  HeatmapSize size;
  const T* points;           // [R, 2]  x, y in pixels
  const Compute<T>* sigmas;  // [R] or null  pixels
  Compute<T> sigma;          // pixels, where sigmas is null
  double truncate;           // in sigmas; negative: no truncation
  bool normalized;           // sum 1 over the visible canvas instead of peak 1
  T* maps;                   // [R, H, W]
};

template <class T>
struct RenderBackwardParams {
  RenderParams<T> forward;  // maps unused
  Maps<const T> grad_maps;  // any strides
  T* grad_points;           // [R, 2]
  Compute<T>* grad_sigmas;  // [R]
};

template <class T>
struct SoftArgmaxParams {
  HeatmapSize size;
  Maps<const T> maps;            // heatmaps z
  const Compute<T>* beta_value;  // [1] or null  multiplies beta
  Compute<T> beta;               // inverse temperature
  int window;                    // Chebyshev radius around the peak, negative: whole canvas
  bool debias;                   // take the background z = 0 out
  Compute<T>* points;            // [R, 2]  x, y
  Compute<T>* normalizer;        // [R, 2]  z at the largest logit; log sum exp(beta (z - that))
  int32_t* peak;                 // [R] or null  flat index of the window's centre
};

template <class T>
struct SoftArgmaxBackwardParams {
  SoftArgmaxParams<T> forward;    // its outputs are read
  const Compute<T>* grad_points;  // [R, 2]
  Maps<T> grad_maps;              // gradient of z
  Compute<T>* grad_beta;          // [R] or null  each map's part
};

template <class T>
struct PeakParams {
  HeatmapSize size;
  Maps<const T> maps;
  int refine;           // Refine in heatmap_math.h
  int kernel;           // pixels of the blur on each axis, odd; dark and dark_udp
  Compute<T> taps[32];  // its weights at distances 0 ... kernel / 2
  Compute<T>* points;   // [R, 2]  x, y
  Compute<T>* score;    // [R]
};

// CPU kernels of one instruction set. A task is a map, or, for pixel-major maps, one of an image's chunks.
template <class T>
struct HeatmapCpu {
  void (*render)(const RenderParams<T>&, int64_t begin, int64_t end);
  void (*render_backward)(const RenderBackwardParams<T>&, int64_t begin, int64_t end);
  void (*soft_argmax)(const SoftArgmaxParams<T>&, int64_t begin, int64_t end);
  void (*soft_argmax_backward)(const SoftArgmaxBackwardParams<T>&, int64_t begin, int64_t end);
  void (*peak)(const PeakParams<T>&, int64_t begin, int64_t end);
};
constexpr int64_t kMostLandmarks = 256;  // of a pixel-major chunk
constexpr int64_t kLeastLandmarks =
    32;  // unless the image has fewer: the last vector of a chunk may overlap the one before

namespace baseline {
template <class T>
const HeatmapCpu<T>& heatmap_cpu();
}
namespace avx2 {
template <class T>
const HeatmapCpu<T>& heatmap_cpu();
}
namespace avx512 {
template <class T>
const HeatmapCpu<T>& heatmap_cpu();
}

// CUDA launchers return a cudaError_t.
template <class T>
int render_cuda(const RenderParams<T>&, CUstream_st*);
template <class T>
int render_backward_cuda(const RenderBackwardParams<T>&, CUstream_st*);
template <class T>
int soft_argmax_cuda(const SoftArgmaxParams<T>&, CUstream_st*);
template <class T>
int soft_argmax_backward_cuda(const SoftArgmaxBackwardParams<T>&, CUstream_st*);
template <class T>
int peak_cuda(const PeakParams<T>&, CUstream_st*);
constexpr int kMostRenderCells = 2044;  // H + W of a rendered map on CUDA: its axes stand in shared memory

}  // namespace ff
