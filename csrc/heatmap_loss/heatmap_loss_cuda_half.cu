// CUDA kernels of the heatmap losses for the 16-bit types.
#include "heatmap_loss/heatmap_loss_pixel.cuh"
#include "heatmap_loss/heatmap_loss_softmax.cuh"

namespace ff {
namespace {

[[maybe_unused]] const KernelListed listed[] = {
    {"heatmap_loss_mse<half>", pixel_loss_kernel<Half, true, Square<float>>},
    {"heatmap_loss_mse_backward<half>", pixel_loss_backward_kernel<Half, true, Square<float>>},
    {"heatmap_loss_adaptive_wing<half>", pixel_loss_kernel<Half, true, Wing<float, true>>},
    {"heatmap_loss_adaptive_wing_steep<half>", pixel_loss_kernel<Half, true, Wing<float, false>>},
    {"heatmap_loss_adaptive_wing_backward<half>", pixel_loss_backward_kernel<Half, true, Wing<float, true>>},
    {"heatmap_loss_kl<half>", divergence_kernel<SoftmaxLoss::kl, Half, true>},
    {"heatmap_loss_kl_backward<half>", softmax_backward_kernel<SoftmaxLoss::kl, Half, true>},
    {"heatmap_loss_js<half>", divergence_kernel<SoftmaxLoss::js, Half, true>},
    {"heatmap_loss_js_backward<half>", softmax_backward_kernel<SoftmaxLoss::js, Half, true>},
    {"heatmap_loss_variance<half>", variance_kernel<Half, true>},
    {"heatmap_loss_variance_backward<half>", softmax_backward_kernel<SoftmaxLoss::variance, Half, true>},
    {"heatmap_loss_mse<half> pixels", pixel_loss_kernel<Half, false, Square<float>>},
    {"heatmap_loss_mse_backward<half> pixels", pixel_loss_backward_kernel<Half, false, Square<float>>},
    {"heatmap_loss_adaptive_wing<half> pixels", pixel_loss_kernel<Half, false, Wing<float, true>>},
    {"heatmap_loss_adaptive_wing_steep<half> pixels", pixel_loss_kernel<Half, false, Wing<float, false>>},
    {"heatmap_loss_adaptive_wing_backward<half> pixels", pixel_loss_backward_kernel<Half, false, Wing<float, true>>},
    {"heatmap_loss_kl<half> pixels", divergence_kernel<SoftmaxLoss::kl, Half, false>},
    {"heatmap_loss_kl_backward<half> pixels", softmax_backward_kernel<SoftmaxLoss::kl, Half, false>},
    {"heatmap_loss_js<half> pixels", divergence_kernel<SoftmaxLoss::js, Half, false>},
    {"heatmap_loss_js_backward<half> pixels", softmax_backward_kernel<SoftmaxLoss::js, Half, false>},
    {"heatmap_loss_variance<half> pixels", variance_kernel<Half, false>},
    {"heatmap_loss_variance_backward<half> pixels", softmax_backward_kernel<SoftmaxLoss::variance, Half, false>},
    {"heatmap_loss_mse<bfloat16>", pixel_loss_kernel<BFloat16, true, Square<float>>},
    {"heatmap_loss_mse_backward<bfloat16>", pixel_loss_backward_kernel<BFloat16, true, Square<float>>},
    {"heatmap_loss_adaptive_wing<bfloat16>", pixel_loss_kernel<BFloat16, true, Wing<float, true>>},
    {"heatmap_loss_adaptive_wing_steep<bfloat16>", pixel_loss_kernel<BFloat16, true, Wing<float, false>>},
    {"heatmap_loss_adaptive_wing_backward<bfloat16>", pixel_loss_backward_kernel<BFloat16, true, Wing<float, true>>},
    {"heatmap_loss_kl<bfloat16>", divergence_kernel<SoftmaxLoss::kl, BFloat16, true>},
    {"heatmap_loss_kl_backward<bfloat16>", softmax_backward_kernel<SoftmaxLoss::kl, BFloat16, true>},
    {"heatmap_loss_js<bfloat16>", divergence_kernel<SoftmaxLoss::js, BFloat16, true>},
    {"heatmap_loss_js_backward<bfloat16>", softmax_backward_kernel<SoftmaxLoss::js, BFloat16, true>},
    {"heatmap_loss_variance<bfloat16>", variance_kernel<BFloat16, true>},
    {"heatmap_loss_variance_backward<bfloat16>", softmax_backward_kernel<SoftmaxLoss::variance, BFloat16, true>},
};

}  // namespace

template int heatmap_mse_cuda(const HeatmapMseParams<Half>&, CUstream_st*);
template int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<Half>&, CUstream_st*);
template int adaptive_wing_cuda(const AdaptiveWingParams<Half>&, CUstream_st*);
template int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<Half>&, CUstream_st*);
template int softmax_loss_cuda(const SoftmaxLossParams<Half>&, CUstream_st*);
template int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<Half>&, CUstream_st*);
template int heatmap_mse_cuda(const HeatmapMseParams<BFloat16>&, CUstream_st*);
template int heatmap_mse_backward_cuda(const HeatmapMseBackwardParams<BFloat16>&, CUstream_st*);
template int adaptive_wing_cuda(const AdaptiveWingParams<BFloat16>&, CUstream_st*);
template int adaptive_wing_backward_cuda(const AdaptiveWingBackwardParams<BFloat16>&, CUstream_st*);
template int softmax_loss_cuda(const SoftmaxLossParams<BFloat16>&, CUstream_st*);
template int softmax_loss_backward_cuda(const SoftmaxLossBackwardParams<BFloat16>&, CUstream_st*);

}  // namespace ff
