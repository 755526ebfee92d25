// CUDA kernels of the heatmap losses for double.
#include "heatmap_loss/heatmap_loss_pixel.cuh"
#include "heatmap_loss/heatmap_loss_softmax.cuh"

namespace ff {
namespace {

[[maybe_unused]] const KernelListed listed[] = {
    {"heatmap_loss_mse<double>", pixel_loss_kernel<double, false, Square<double>>},
    {"heatmap_loss_mse_backward<double>", pixel_loss_backward_kernel<double, false, Square<double>>},
    {"heatmap_loss_adaptive_wing<double>", pixel_loss_kernel<double, false, Wing<double, true>>},
    {"heatmap_loss_adaptive_wing_steep<double>", pixel_loss_kernel<double, false, Wing<double, false>>},
    {"heatmap_loss_adaptive_wing_backward<double>", pixel_loss_backward_kernel<double, false, Wing<double, true>>},
    {"heatmap_loss_kl<double>", divergence_kernel<SoftmaxLoss::kl, double, false>},
    {"heatmap_loss_kl_backward<double>", softmax_backward_kernel<SoftmaxLoss::kl, double, false>},
    {"heatmap_loss_js<double>", divergence_kernel<SoftmaxLoss::js, double, false>},
    {"heatmap_loss_js_backward<double>", softmax_backward_kernel<SoftmaxLoss::js, double, false>},
    {"heatmap_loss_variance<double>", variance_kernel<double, false>},
    {"heatmap_loss_variance_backward<double>", softmax_backward_kernel<SoftmaxLoss::variance, double, false>},
};

}  // namespace

template int heatmap_mse_cuda(const HeatmapMseParams<double>&, CUstream_st*);
template int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<double>&, CUstream_st*);
template int adaptive_wing_cuda(const AdaptiveWingParams<double>&, CUstream_st*);
template int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<double>&, CUstream_st*);
template int softmax_loss_cuda(const SoftmaxLossParams<double>&, CUstream_st*);
template int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<double>&, CUstream_st*);

}  // namespace ff
