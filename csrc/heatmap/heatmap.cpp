// The heatmap room's operators: checks, allocation, dispatch.
#include "heatmap/heatmap.h"

#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "common/stable_torch.h"
#include "heatmap/heatmap_math.h"
#include "heatmap/heatmap_torch.h"

namespace ff {
namespace {

using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What the CPU kernels walk without a copy.
Tensor walkable(const Tensor& t) {
  return on_cuda(t) || planar(t) || pixel_major(t) ? t : torch::stable::contiguous(t);
}

HeatmapSize size_of(const char* op, const Tensor& t) {
  FF_CHECK(t.dim() == 4, op, ": heatmap must be [B, P, H, W], got ", shape(t));
  const int64_t height = t.size(2), width = t.size(3);
  FF_CHECK(height > 0 && width > 0 && height < (int64_t(1) << 30) / width, op,
           ": heatmap must have between 1 and 2^30 pixels a map, got ", shape(t));
  HeatmapSize s{t.size(0), t.size(1), int(height), int(width), 0};
  if (!on_cuda(t) && pixel_major(t) && s.images > 0) {
    const int64_t enough = (2 * torch::stable::get_num_threads() + s.images - 1) / s.images;
    s.chunks = std::max<int64_t>(
        {1, (s.landmarks + kMostLandmarks - 1) / kMostLandmarks, std::min(s.landmarks / kLeastLandmarks, enough)});
  }
  return s;
}

// `cuda` and `cpu` name a launcher and a kernel of the table; only those of this build are instantiated.
template <class T, class Params, class Cuda, class Cpu>
void dispatch([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& on, const HeatmapSize& s,
              const Params& params, [[maybe_unused]] const Cuda& cuda, [[maybe_unused]] const Cpu& cpu) {
  if (s.images * s.landmarks == 0) return;
#ifdef FF_HAS_CUDA_LAUNCHERS
  if (on_cuda(on)) {
    const DeviceScope scope(on);
    const int error = cuda(params, scope.stream());
    FF_CHECK(error == 0, op, ": CUDA error ", error);
    return;
  }
#endif
#ifndef FF_HOST_SHIM
#ifdef FF_X86
  const HeatmapCpu<T>& table = choose(baseline::heatmap_cpu<T>(), avx2::heatmap_cpu<T>(), avx512::heatmap_cpu<T>());
#else
  const HeatmapCpu<T>& table = baseline::heatmap_cpu<T>();
#endif
  const auto kernel = cpu(table);
  const int64_t tasks = s.images * (s.chunks ? s.chunks : s.landmarks);
  const int64_t grain = s.chunks ? 1 : std::max<int64_t>(1, 16384 / (int64_t(s.height) * s.width));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
#endif
}

void check_like(const char* op, const char* name, const Tensor& t, ScalarType type, const Tensor& on) {
  FF_CHECK(t.scalar_type() == type && t.get_device() == on.get_device(), op, ": ", name,
           " has the wrong dtype or device");
}

template <class T>
RenderParams<T> render_params(const Tensor& points, const OptionalTensor& sigmas, double sigma, HeatmapSize size,
                              bool normalized, double truncate) {
  // The window of a number is that of the number, not of its rounding to float: ceil(t sigma) is settled here, and
  // handed on half a cell low, so that the kernels' ceil finds it again.
  const double cells = std::ceil(truncate * sigma);
  if (!sigmas && cells >= 1) truncate = (cells - 0.5) / double(Compute<T>(sigma));
  return {size,       data<T>(points), sigmas ? data<Compute<T>>(*sigmas) : nullptr, Compute<T>(sigma), truncate,
          normalized, nullptr};
}

HeatmapSize render_check(const char* op, const Tensor& points, const OptionalTensor& sigmas, int64_t height,
                         int64_t width) {
  FF_CHECK(points.dim() == 3 && points.size(2) == 2, op, ": points must be [B, P, 2], got ", shape(points));
  FF_CHECK(height > 0 && width > 0 && height < (int64_t(1) << 30) / width, op, ": size must be positive, got (", height,
           ", ", width, ")");
  FF_CHECK(!on_cuda(points) || height + width <= kMostRenderCells, op, ": H + W must be at most ", kMostRenderCells,
           " on CUDA, got ", height + width);
  if (sigmas) {
    FF_CHECK(sigmas->dim() == 2 && sigmas->size(0) == points.size(0) && sigmas->size(1) == points.size(1), op,
             ": sigma must be [B, P] = [", points.size(0), ", ", points.size(1), "], got ", shape(*sigmas));
    check_like(op, "sigma", *sigmas, compute_type(points), points);
  }
  return {points.size(0), points.size(1), int(height), int(width), 0};
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

Tensor render(const Tensor& points_in, const OptionalTensor& sigmas_in, double sigma, int64_t height, int64_t width,
              bool normalized, double truncate) {
  const char* op = "render_gaussian";
  const HeatmapSize size = render_check(op, points_in, sigmas_in, height, width);
  const Tensor points = torch::stable::contiguous(points_in);
  const OptionalTensor sigmas = contiguous(sigmas_in);
  Tensor maps = new_empty(points, {size.images, size.landmarks, height, width});
  prefer_huge_pages(maps);
  with_map_type(op, points, [&](auto type) {
    using T = decltype(type);
    auto p = render_params<T>(points, sigmas, sigma, size, normalized, truncate);
    p.maps = mutable_data<T>(maps);
    dispatch<T>(
        op, points, size, p, [](const auto& q, auto* stream) { return render_cuda(q, stream); },
        [](const auto& table) { return table.render; });
  });
  return maps;
}

std::tuple<Tensor, Tensor> render_backward(const Tensor& grad_maps, const Tensor& points_in,
                                           const OptionalTensor& sigmas_in, double sigma, bool normalized,
                                           double truncate) {
  const char* op = "render_gaussian backward";
  FF_CHECK(grad_maps.dim() == 4, op, ": grad_maps must be [B, P, H, W], got ", shape(grad_maps));
  const HeatmapSize size = render_check(op, points_in, sigmas_in, grad_maps.size(2), grad_maps.size(3));
  FF_CHECK(grad_maps.size(0) == size.images && grad_maps.size(1) == size.landmarks, op, ": grad_maps ",
           shape(grad_maps), " does not fit points ", shape(points_in));
  check_like(op, "grad_maps", grad_maps, points_in.scalar_type(), points_in);
  const Tensor points = torch::stable::contiguous(points_in);
  const OptionalTensor sigmas = contiguous(sigmas_in);
  Tensor grad_points = new_empty(points, {size.images, size.landmarks, 2});
  Tensor grad_sigmas = new_empty(points, {size.images, size.landmarks}, compute_type(points));
  with_map_type(op, points, [&](auto type) {
    using T = decltype(type);
    const RenderBackwardParams<T> b{render_params<T>(points, sigmas, sigma, size, normalized, truncate),
                                    maps_of<const T>(grad_maps), mutable_data<T>(grad_points),
                                    mutable_data<Compute<T>>(grad_sigmas)};
    dispatch<T>(
        op, points, size, b, [](const auto& q, auto* stream) { return render_backward_cuda(q, stream); },
        [](const auto& table) { return table.render_backward; });
  });
  return {grad_points, grad_sigmas};
}

template <class T>
SoftArgmaxParams<T> soft_argmax_params(const Tensor& heatmap, const OptionalTensor& beta_value, double beta,
                                       int64_t window, bool debias, const HeatmapSize& size, const Tensor& points,
                                       const Tensor& normalizer, const Tensor& peak) {
  using C = Compute<T>;
  return {size,
          maps_of<const T>(heatmap),
          beta_value ? data<C>(*beta_value) : nullptr,
          C(beta),
          int(std::min<int64_t>(window, 1 << 30)),
          debias,
          const_cast<C*>(data<C>(points)),
          const_cast<C*>(data<C>(normalizer)),
          window < 0 ? nullptr : const_cast<int32_t*>(data<int32_t>(peak))};
}

void soft_argmax_check(const char* op, const Tensor& heatmap, const OptionalTensor& beta_value) {
  if (!beta_value) return;
  FF_CHECK(beta_value->numel() == 1, op, ": beta must be a number or a tensor of one element, got ",
           shape(*beta_value));
  check_like(op, "beta", *beta_value, compute_type(heatmap), heatmap);
}

std::tuple<Tensor, Tensor, Tensor> soft_argmax(const Tensor& heatmap_in, const OptionalTensor& beta_value, double beta,
                                               int64_t window, bool debias) {
  const char* op = "soft_argmax";
  FF_CHECK(heatmap_in.dim() == 4, op, ": heatmap must be [B, P, H, W], got ", shape(heatmap_in));
  soft_argmax_check(op, heatmap_in, beta_value);
  const Tensor heatmap = walkable(heatmap_in);
  const HeatmapSize size = size_of(op, heatmap);
  const ScalarType type = compute_type(heatmap);
  Tensor points = new_empty(heatmap, {size.images, size.landmarks, 2}, type);
  Tensor normalizer = new_empty(heatmap, {size.images, size.landmarks, 2}, type);
  Tensor peak = new_empty(heatmap, {size.images, window < 0 ? 0 : size.landmarks}, ScalarType::Int);
  with_map_type(op, heatmap, [&](auto value) {
    using T = decltype(value);
    const auto p = soft_argmax_params<T>(heatmap, beta_value, beta, window, debias, size, points, normalizer, peak);
    dispatch<T>(
        op, heatmap, size, p, [](const auto& q, auto* stream) { return soft_argmax_cuda(q, stream); },
        [](const auto& table) { return table.soft_argmax; });
  });
  return {points, normalizer, peak};
}

std::tuple<Tensor, Tensor> soft_argmax_backward(const Tensor& grad_points_in, const Tensor& heatmap_in,
                                                const OptionalTensor& beta_value, double beta, int64_t window,
                                                bool debias, const Tensor& points, const Tensor& normalizer,
                                                const Tensor& peak, bool needs_beta) {
  const char* op = "soft_argmax backward";
  FF_CHECK(heatmap_in.dim() == 4, op, ": heatmap must be [B, P, H, W], got ", shape(heatmap_in));
  soft_argmax_check(op, heatmap_in, beta_value);
  const ScalarType type = compute_type(heatmap_in);
  const int64_t images = heatmap_in.size(0), landmarks = heatmap_in.size(1);
  for (const Tensor* t : {&grad_points_in, &points, &normalizer}) {
    FF_CHECK(t->dim() == 3 && t->size(0) == images && t->size(1) == landmarks && t->size(2) == 2, op,
             ": grad_points, points and normalizer must be [B, P, 2], got ", shape(*t));
    check_like(op, "grad_points, points or normalizer", *t, type, heatmap_in);
  }
  FF_CHECK(points.is_contiguous() && normalizer.is_contiguous() && peak.is_contiguous(), op,
           ": points, normalizer and peak must be contiguous");
  FF_CHECK(peak.scalar_type() == ScalarType::Int && (window < 0 || peak.numel() == images * landmarks), op,
           ": peak must be int32 [B, P], got ", shape(peak));
  const Tensor grad_points = torch::stable::contiguous(grad_points_in);
  Tensor grad_heatmap = torch::stable::empty_like(heatmap_in);
  // The kernels walk both alike; an input of other strides is copied, and its gradient written by way of a copy.
  const bool alike = on_cuda(heatmap_in) || (planar(heatmap_in) && planar(grad_heatmap)) ||
                     (pixel_major(heatmap_in) && pixel_major(grad_heatmap));
  const Tensor heatmap = alike ? heatmap_in : torch::stable::contiguous(heatmap_in);
  Tensor grad = alike ? grad_heatmap : new_empty(heatmap, {images, landmarks, heatmap_in.size(2), heatmap_in.size(3)});
  const HeatmapSize size = size_of(op, heatmap);
  Tensor grad_beta = new_empty(heatmap, {images, needs_beta ? landmarks : 0}, type);
  prefer_huge_pages(grad);
  with_map_type(op, heatmap, [&](auto value) {
    using T = decltype(value);
    const SoftArgmaxBackwardParams<T> b{
        soft_argmax_params<T>(heatmap, beta_value, beta, window, debias, size, points, normalizer, peak),
        data<Compute<T>>(grad_points), maps_of<T>(grad), needs_beta ? mutable_data<Compute<T>>(grad_beta) : nullptr};
    dispatch<T>(
        op, heatmap, size, b, [](const auto& q, auto* stream) { return soft_argmax_backward_cuda(q, stream); },
        [](const auto& table) { return table.soft_argmax_backward; });
  });
  if (!alike) torch::stable::copy_(grad_heatmap, grad);
  return {grad_heatmap, grad_beta};
}

std::tuple<Tensor, Tensor> peak(const Tensor& heatmap_in, int64_t refine, int64_t kernel) {
  const char* op = "peak";
  FF_CHECK(heatmap_in.dim() == 4, op, ": heatmap must be [B, P, H, W], got ", shape(heatmap_in));
  FF_CHECK(refine >= 0 && refine <= 4, op, ": refine must be 0 to 4, got ", refine);
  FF_CHECK(kernel >= 1 && kernel <= kMostKernel && kernel % 2 == 1, op, ": kernel must be odd, from 1 to ", kMostKernel,
           ", got ", kernel);
  const Tensor heatmap = walkable(heatmap_in);
  const HeatmapSize size = size_of(op, heatmap);
  Tensor points = new_empty(heatmap, {size.images, size.landmarks, 2}, compute_type(heatmap));
  Tensor score = new_empty(heatmap, {size.images, size.landmarks}, compute_type(heatmap));
  with_map_type(op, heatmap, [&](auto value) {
    using T = decltype(value);
    PeakParams<T> p{size,
                    maps_of<const T>(heatmap),
                    int(refine),
                    int(kernel),
                    {},
                    mutable_data<Compute<T>>(points),
                    mutable_data<Compute<T>>(score)};
    blur_taps(p.kernel, p.taps);
    dispatch<T>(
        op, heatmap, size, p, [](const auto& q, auto* stream) { return peak_cuda(q, stream); },
        [](const auto& table) { return table.peak; });
  });
  return {points, score};
}

FF_SCHEMAS(m) {
  m.def(
      "heatmap_render(Tensor points, Tensor? sigmas, float sigma, int height, int width, bool normalized, "
      "float truncate) -> Tensor");
  m.def(
      "heatmap_render_backward(Tensor grad_maps, Tensor points, Tensor? sigmas, float sigma, bool normalized, "
      "float truncate) -> (Tensor, Tensor)");
  m.def(
      "heatmap_soft_argmax(Tensor heatmap, Tensor? beta_value, float beta, int window, bool debias) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "heatmap_soft_argmax_backward(Tensor grad_points, Tensor heatmap, Tensor? beta_value, float beta, int window, "
      "bool debias, Tensor points, Tensor normalizer, Tensor peak, bool needs_beta) -> (Tensor, Tensor)");
  m.def("heatmap_peak(Tensor heatmap, int refine, int kernel) -> (Tensor, Tensor)");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("heatmap_render", TORCH_BOX(&render));
  m.impl("heatmap_render_backward", TORCH_BOX(&render_backward));
  m.impl("heatmap_soft_argmax", TORCH_BOX(&soft_argmax));
  m.impl("heatmap_soft_argmax_backward", TORCH_BOX(&soft_argmax_backward));
  m.impl("heatmap_peak", TORCH_BOX(&peak));
}

}  // namespace
}  // namespace ff
