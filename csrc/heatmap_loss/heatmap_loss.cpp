// The heatmap losses' operators: checks, allocation, dispatch.
#include "heatmap_loss/heatmap_loss.h"

#include <algorithm>

#include "common/isa.h"
#include "common/stable_torch.h"
#include "heatmap/heatmap_torch.h"
#include "heatmap_loss/heatmap_loss_math.h"

namespace ff {
namespace {

using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

// The tensors of one call: contiguous, of the dtype computed in.
struct Call {
  const char* op;
  Tensor pred;
  OptionalTensor points, sigmas, weight;
  double sigma;
  HeatmapLossSize size;

  Call(const char* op, const Tensor& pred, const OptionalTensor& points, const OptionalTensor& sigmas, double sigma,
       const OptionalTensor& weight)
      : op(op), pred(pred), sigma(sigma) {
    FF_CHECK(pred.dim() == 4, op, ": pred must be [B, P, H, W], got ", shape(pred));
    const int64_t height = pred.size(2), width = pred.size(3);
    FF_CHECK(height > 0 && width > 0 && height < (int64_t(1) << 30) / width, op,
             ": pred must have between 1 and 2^30 pixels a map, got ", shape(pred));
    FF_CHECK(!on_cuda(pred) || height + width <= kMostLossCells, op, ": H + W must be at most ", kMostLossCells,
             " on CUDA, got ", height + width);
    size = {pred.size(0), pred.size(1), int(height), int(width), 0};
    this->points = taken("points", points, true);
    this->sigmas = taken("sigma", sigmas, false);
    this->weight = taken("weight", weight, false);
  }

  OptionalTensor taken(const char* name, const OptionalTensor& t, bool pairs) const {
    if (!t) return std::nullopt;
    FF_CHECK(t->dim() == (pairs ? 3 : 2) && t->size(0) == size.images && t->size(1) == size.landmarks &&
                 (!pairs || t->size(2) == 2),
             op, ": ", name, " must be ", pairs ? "[B, P, 2]" : "[B, P]", " with [B, P] = [", size.images, ", ",
             size.landmarks, "], got ", shape(*t));
    FF_CHECK(t->scalar_type() == compute_type(pred) && t->get_device() == pred.get_device(), op, ": ", name,
             " has the wrong dtype or device");
    return torch::stable::contiguous(*t);
  }

  Tensor rows(int64_t columns = 0) const {
    if (columns) return new_empty(pred, {size.images, size.landmarks, columns}, compute_type(pred));
    return new_empty(pred, {size.images, size.landmarks}, compute_type(pred));
  }

  // `others`: maps that are walked along with pred.
  void stage(bool others_planar = true) {
    if (!on_cuda(pred) && !(planar(pred) && others_planar))
      size.groups = (size.landmarks + kLossGroup - 1) / kLossGroup;
  }

  template <class T>
  HeatmapLossParams<T> params(const OptionalTensor& loss = std::nullopt) const {
    using C = Compute<T>;
    const auto data = [](const OptionalTensor& t) { return t ? static_cast<const C*>(t->const_data_ptr()) : nullptr; };
    return {size,         maps_of<const T>(pred),    data(points), data(sigmas), C(sigma),
            data(weight), const_cast<C*>(data(loss))};
  }

  // `cuda` and `cpu` name a launcher and a kernel of the table; only those of this build are instantiated.
  template <class T, class Params, class Cuda, class Cpu>
  void dispatch(const Params& params, [[maybe_unused]] const Cuda& cuda, [[maybe_unused]] const Cpu& cpu) const {
    if (size.images * size.landmarks == 0) return;
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(pred)) {
      const DeviceScope scope(pred);
      check_cuda(op, cuda(params, scope.stream()));
      return;
    }
#endif
#ifndef FF_HOST_SHIM
#ifdef FF_X86
    const HeatmapLossCpu<T>& table =
        choose(baseline::heatmap_loss_cpu<T>(), avx2::heatmap_loss_cpu<T>(), avx512::heatmap_loss_cpu<T>());
#else
    const HeatmapLossCpu<T>& table = baseline::heatmap_loss_cpu<T>();
#endif
    const auto kernel = cpu(table);
    const int64_t tasks = size.images * (size.groups ? size.groups : size.landmarks);
    const int64_t grain = size.groups ? 1 : std::max<int64_t>(1, 16384 / (int64_t(size.height) * size.width));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
#endif
  }

  // The gradient of pred by a backward launcher and kernel; `forward` makes the forward's parameters.
  template <template <class> class Params, class Forward, class Cuda, class Cpu>
  Tensor backward(const Tensor& grad_loss_in, const Forward& forward, const Cuda& cuda, const Cpu& cpu) {
    const Tensor grad_loss = *taken("grad_loss", grad_loss_in, false);
    Tensor grad_pred = torch::stable::empty_like(pred);
    prefer_huge_pages(grad_pred);
    stage(planar(grad_pred));
    with_map_type(op, pred, [&](auto value) {
      using T = decltype(value);
      const HeatmapLossBackwardParams<T, Params> b{
          forward(value), static_cast<const Compute<T>*>(grad_loss.const_data_ptr()), maps_of<T>(grad_pred)};
      dispatch<T>(b, cuda, cpu);
    });
    return grad_pred;
  }
};

// Mean squared error.

template <class T>
HeatmapMseParams<T> mse_params(const HeatmapLossParams<T>& maps, double foreground, double background,
                               double threshold) {
  using C = Compute<T>;
  return {maps, C(foreground), C(background), C(threshold)};
}

Tensor mse(const Tensor& pred, const Tensor& points, const OptionalTensor& sigmas, double sigma,
           const OptionalTensor& weight, double foreground, double background, double threshold) {
  Call call("heatmap_mse_loss", pred, points, sigmas, sigma, weight);
  Tensor loss = call.rows();
  call.stage();
  with_map_type(call.op, pred, [&](auto value) {
    using T = decltype(value);
    call.dispatch<T>(
        mse_params(call.params<T>(loss), foreground, background, threshold),
        [](const auto& p, auto* stream) { return heatmap_mse_cuda(p, stream); },
        [](const auto& table) { return table.mse; });
  });
  return loss;
}

Tensor mse_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& points, const OptionalTensor& sigmas,
                    double sigma, const OptionalTensor& weight, double foreground, double background,
                    double threshold) {
  Call call("heatmap_mse_loss backward", pred, points, sigmas, sigma, weight);
  return call.backward<HeatmapMseParams>(
      grad_loss,
      [&](auto value) { return mse_params(call.params<decltype(value)>(), foreground, background, threshold); },
      [](const auto& b, auto* stream) { return heatmap_mse_backward_cuda(b, stream); },
      [](const auto& table) { return table.mse_backward; });
}

// Adaptive Wing.

template <class T>
AdaptiveWingParams<T> wing_params(const HeatmapLossParams<T>& maps, double alpha, double omega, double epsilon,
                                  double theta, int64_t radius, double threshold) {
  using C = Compute<T>;
  return {maps, C(alpha), C(omega), C(epsilon), C(theta), int(std::min<int64_t>(radius, 1 << 30)), C(threshold)};
}

Tensor adaptive_wing_rows(const Tensor& pred, const Tensor& points, const OptionalTensor& sigmas, double sigma,
                          const OptionalTensor& weight, double alpha, double omega, double epsilon, double theta,
                          int64_t radius, double threshold) {
  Call call("adaptive_wing_loss", pred, points, sigmas, sigma, weight);
  Tensor loss = call.rows();
  call.stage();
  with_map_type(call.op, pred, [&](auto value) {
    using T = decltype(value);
    call.dispatch<T>(
        wing_params(call.params<T>(loss), alpha, omega, epsilon, theta, radius, threshold),
        [](const auto& p, auto* stream) { return adaptive_wing_cuda(p, stream); },
        [](const auto& table) { return table.adaptive_wing; });
  });
  return loss;
}

Tensor adaptive_wing_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& points,
                              const OptionalTensor& sigmas, double sigma, const OptionalTensor& weight, double alpha,
                              double omega, double epsilon, double theta, int64_t radius, double threshold) {
  Call call("adaptive_wing_loss backward", pred, points, sigmas, sigma, weight);
  return call.backward<AdaptiveWingParams>(
      grad_loss,
      [&](auto value) {
        return wing_params(call.params<decltype(value)>(), alpha, omega, epsilon, theta, radius, threshold);
      },
      [](const auto& b, auto* stream) { return adaptive_wing_backward_cuda(b, stream); },
      [](const auto& table) { return table.adaptive_wing_backward; });
}

// Losses of the softmax.

const char* softmax_name(int64_t kind, bool backward) {
  FF_CHECK(kind >= 0 && kind <= 2, "heatmap_loss_softmax: kind must be 0, 1 or 2, got ", kind);
  constexpr const char* kNames[] = {"heatmap_kl_loss", "heatmap_js_loss", "heatmap_variance_loss"};
  constexpr const char* kBackward[] = {"heatmap_kl_loss backward", "heatmap_js_loss backward",
                                       "heatmap_variance_loss backward"};
  return backward ? kBackward[kind] : kNames[kind];
}

void softmax_check(const Call& call, int64_t kind) {
  FF_CHECK(call.points.has_value() == (SoftmaxLoss(kind) != SoftmaxLoss::variance), call.op,
           ": points belong to kinds 0 and 1 alone");
}

std::tuple<Tensor, Tensor> softmax(const Tensor& logits, const OptionalTensor& points, const OptionalTensor& sigmas,
                                   double sigma, const OptionalTensor& weight, int64_t kind) {
  Call call(softmax_name(kind, false), logits, points, sigmas, sigma, weight);
  softmax_check(call, kind);
  Tensor loss = call.rows(), statistics = call.rows(statistics_of(SoftmaxLoss(kind)));
  call.stage();
  with_map_type(call.op, logits, [&](auto value) {
    using T = decltype(value);
    call.dispatch<T>(
        SoftmaxLossParams<T>{call.params<T>(loss), int(kind), static_cast<Compute<T>*>(statistics.mutable_data_ptr())},
        [](const auto& p, auto* stream) { return softmax_loss_cuda(p, stream); },
        [](const auto& table) { return table.softmax; });
  });
  return {loss, statistics};
}

Tensor softmax_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& points,
                        const OptionalTensor& sigmas, double sigma, const OptionalTensor& weight, int64_t kind,
                        const Tensor& statistics) {
  Call call(softmax_name(kind, true), logits, points, sigmas, sigma, weight);
  softmax_check(call, kind);
  FF_CHECK(statistics.is_contiguous() && statistics.scalar_type() == compute_type(logits) &&
               statistics.get_device() == logits.get_device() &&
               statistics.numel() == call.size.images * call.size.landmarks * statistics_of(SoftmaxLoss(kind)),
           call.op, ": statistics must be as the forward returned them, got ", shape(statistics));
  return call.backward<SoftmaxLossParams>(
      grad_loss,
      [&](auto value) {
        using T = decltype(value);
        return SoftmaxLossParams<T>{
            call.params<T>(), int(kind),
            const_cast<Compute<T>*>(static_cast<const Compute<T>*>(statistics.const_data_ptr()))};
      },
      [](const auto& b, auto* stream) { return softmax_loss_backward_cuda(b, stream); },
      [](const auto& table) { return table.softmax_backward; });
}

#define FF_LOSS_INPUTS "Tensor pred, Tensor points, Tensor? sigmas, float sigma, Tensor? weight, "
#define FF_WING_OPTIONS "float alpha, float omega, float epsilon, float theta, int radius, float threshold"
#define FF_SOFTMAX_INPUTS "Tensor logits, Tensor? points, Tensor? sigmas, float sigma, Tensor? weight, int kind"

FF_SCHEMAS(m) {
  m.def("heatmap_loss_mse(" FF_LOSS_INPUTS "float foreground, float background, float threshold) -> Tensor");
  m.def("heatmap_loss_mse_backward(Tensor grad_loss, " FF_LOSS_INPUTS
        "float foreground, float background, float threshold) -> Tensor");
  m.def("heatmap_loss_adaptive_wing(" FF_LOSS_INPUTS FF_WING_OPTIONS ") -> Tensor");
  m.def("heatmap_loss_adaptive_wing_backward(Tensor grad_loss, " FF_LOSS_INPUTS FF_WING_OPTIONS ") -> Tensor");
  m.def("heatmap_loss_softmax(" FF_SOFTMAX_INPUTS ") -> (Tensor, Tensor)");
  m.def("heatmap_loss_softmax_backward(Tensor grad_loss, " FF_SOFTMAX_INPUTS ", Tensor statistics) -> Tensor");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("heatmap_loss_mse", TORCH_BOX(&mse));
  m.impl("heatmap_loss_mse_backward", TORCH_BOX(&mse_backward));
  m.impl("heatmap_loss_adaptive_wing", TORCH_BOX(&adaptive_wing_rows));
  m.impl("heatmap_loss_adaptive_wing_backward", TORCH_BOX(&adaptive_wing_backward));
  m.impl("heatmap_loss_softmax", TORCH_BOX(&softmax));
  m.impl("heatmap_loss_softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace ff
