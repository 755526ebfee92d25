// CUDA kernels of the heatmap losses for float.
#include "heatmap_loss/heatmap_loss_pixel.cuh"
#include "heatmap_loss/heatmap_loss_softmax.cuh"

namespace ff {
namespace {

[[maybe_unused]] const KernelListed listed[] = {
    {"heatmap_loss_mse<float>", pixel_loss_kernel<float, true, Square<float>>},
    {"heatmap_loss_mse_backward<float>", pixel_loss_backward_kernel<float, true, Square<float>>},
    {"heatmap_loss_adaptive_wing<float>", pixel_loss_kernel<float, true, Wing<float, true>>},
    {"heatmap_loss_adaptive_wing_steep<float>", pixel_loss_kernel<float, true, Wing<float, false>>},
    {"heatmap_loss_adaptive_wing_backward<float>", pixel_loss_backward_kernel<float, true, Wing<float, true>>},
    {"heatmap_loss_kl<float>", divergence_kernel<SoftmaxLoss::kl, float, true>},
    {"heatmap_loss_kl_backward<float>", softmax_backward_kernel<SoftmaxLoss::kl, float, true>},
    {"heatmap_loss_js<float>", divergence_kernel<SoftmaxLoss::js, float, true>},
    {"heatmap_loss_js_backward<float>", softmax_backward_kernel<SoftmaxLoss::js, float, true>},
    {"heatmap_loss_variance<float>", variance_kernel<float, true>},
    {"heatmap_loss_variance_backward<float>", softmax_backward_kernel<SoftmaxLoss::variance, float, true>},
    {"heatmap_loss_mse<float> pixels", pixel_loss_kernel<float, false, Square<float>>},
    {"heatmap_loss_mse_backward<float> pixels", pixel_loss_backward_kernel<float, false, Square<float>>},
    {"heatmap_loss_adaptive_wing<float> pixels", pixel_loss_kernel<float, false, Wing<float, true>>},
    {"heatmap_loss_adaptive_wing_steep<float> pixels", pixel_loss_kernel<float, false, Wing<float, false>>},
    {"heatmap_loss_adaptive_wing_backward<float> pixels", pixel_loss_backward_kernel<float, false, Wing<float, true>>},
    {"heatmap_loss_kl<float> pixels", divergence_kernel<SoftmaxLoss::kl, float, false>},
    {"heatmap_loss_kl_backward<float> pixels", softmax_backward_kernel<SoftmaxLoss::kl, float, false>},
    {"heatmap_loss_js<float> pixels", divergence_kernel<SoftmaxLoss::js, float, false>},
    {"heatmap_loss_js_backward<float> pixels", softmax_backward_kernel<SoftmaxLoss::js, float, false>},
    {"heatmap_loss_variance<float> pixels", variance_kernel<float, false>},
    {"heatmap_loss_variance_backward<float> pixels", softmax_backward_kernel<SoftmaxLoss::variance, float, false>},
};

}  // namespace

template int heatmap_mse_cuda(const HeatmapMseParams<float>&, CUstream_st*);
template int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<float>&, CUstream_st*);
template int adaptive_wing_cuda(const AdaptiveWingParams<float>&, CUstream_st*);
template int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<float>&, CUstream_st*);
template int softmax_loss_cuda(const SoftmaxLossParams<float>&, CUstream_st*);
template int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<float>&, CUstream_st*);

}  // namespace ff
