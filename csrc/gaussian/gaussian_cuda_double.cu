// CUDA kernels of the gaussian room for double.
#include "gaussian/gaussian_backward.cuh"
#include "gaussian/gaussian_density.cuh"
#include "gaussian/gaussian_statistics.cuh"

namespace ff {
namespace {

#ifndef FF_HOST_SHIM
[[maybe_unused]] const KernelListed listed[] = {
    {"gaussian_whiten<double>", whiten_kernel<double>},
    {"gaussian_log_prob<double> 1", narrow_kernel<double, 1>},
    {"gaussian_log_prob<double> 2", narrow_kernel<double, 2>},
    {"gaussian_log_prob<double> 3", narrow_kernel<double, 3>},
    {"gaussian_log_prob<double> 4", narrow_kernel<double, 4>},
    {"gaussian_log_prob<double> 5", narrow_kernel<double, 5>},
    {"gaussian_log_prob<double> 6", narrow_kernel<double, 6>},
    {"gaussian_mixture<double> 4", small_density_kernel<double, 4>},
    {"gaussian_log_prob<double> 8", small_density_kernel<double, 8>},
    {"gaussian_log_prob<double> 16", small_density_kernel<double, 16>},
    {"gaussian_log_prob<double> 32", small_density_kernel<double, 32>},
    {"gaussian_log_prob<double> 256", wide_density_kernel<double>},
    {"gaussian_posterior<double>", posterior_kernel<double>},
    {"gaussian_grad_x<double> 4", small_grad_x_kernel<double, 4>},
    {"gaussian_grad_x<double> 8", small_grad_x_kernel<double, 8>},
    {"gaussian_grad_x<double> 16", small_grad_x_kernel<double, 16>},
    {"gaussian_grad_x<double> 32", small_grad_x_kernel<double, 32>},
    {"gaussian_grad_x<double> 256", wide_grad_x_kernel<double>},
    {"gaussian_add_parts<double>", add_parts_kernel<double>},
    {"gaussian_grad_sums<double> 4", small_sums_kernel<double, 4, true>},
    {"gaussian_grad_sums<double> 8", small_sums_kernel<double, 8, true>},
    {"gaussian_grad_sums<double> 16", small_sums_kernel<double, 16, true>},
    {"gaussian_grad_sums<double> 32", small_sums_kernel<double, 32, true>},
    {"gaussian_grad_sums<double> 256", wide_sums_kernel<double, true>},
    {"gaussian_finish_gradient<double>", finish_gradient_kernel<double>},
    {"gaussian_statistics<double> 4", small_sums_kernel<double, 4, false>},
    {"gaussian_statistics<double> 8", small_sums_kernel<double, 8, false>},
    {"gaussian_statistics<double> 16", small_sums_kernel<double, 16, false>},
    {"gaussian_statistics<double> 32", small_sums_kernel<double, 32, false>},
    {"gaussian_statistics<double> 256", wide_sums_kernel<double, false>},
    {"gaussian_finish_statistics<double>", finish_statistics_kernel<double>},
};
#endif

}  // namespace

template int gaussian_whiten_cuda<double>(const GaussianSize&, const GaussianLeaves<double>&, CUstream_st*);
template int gaussian_log_prob_cuda<double>(const GaussianLogProbParams<double>&, CUstream_st*);
template int gaussian_backward_cuda<double>(const GaussianBackwardParams<double>&, CUstream_st*);
template int gaussian_mixture_cuda<double>(const GaussianMixtureParams<double>&, CUstream_st*);
template int gaussian_statistics_cuda<double>(const GaussianStatisticsParams<double>&, CUstream_st*);

}  // namespace ff
