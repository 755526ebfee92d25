// CUDA kernels of the gaussian room for float, and what both types share. The number is the most D of a kernel.
#include "gaussian/gaussian_backward.cuh"
#include "gaussian/gaussian_density.cuh"
#include "gaussian/gaussian_statistics.cuh"

namespace ff {
namespace {

#ifndef FF_HOST_SHIM
[[maybe_unused]] const KernelListed listed[] = {
    {"gaussian_whiten<float>", whiten_kernel<float>},
    {"gaussian_log_prob<float> 1", narrow_kernel<float, 1>},
    {"gaussian_log_prob<float> 2", narrow_kernel<float, 2>},
    {"gaussian_log_prob<float> 3", narrow_kernel<float, 3>},
    {"gaussian_log_prob<float> 4", narrow_kernel<float, 4>},
    {"gaussian_log_prob<float> 5", narrow_kernel<float, 5>},
    {"gaussian_log_prob<float> 6", narrow_kernel<float, 6>},
    {"gaussian_mixture<float> 4", small_density_kernel<float, 4>},
    {"gaussian_log_prob<float> 8", small_density_kernel<float, 8>},
    {"gaussian_log_prob<float> 16", small_density_kernel<float, 16>},
    {"gaussian_log_prob<float> 32", small_density_kernel<float, 32>},
    {"gaussian_log_prob<float> 256", wide_density_kernel<float>},
    {"gaussian_posterior<float>", posterior_kernel<float>},
    {"gaussian_grad_x<float> 4", small_grad_x_kernel<float, 4>},
    {"gaussian_grad_x<float> 8", small_grad_x_kernel<float, 8>},
    {"gaussian_grad_x<float> 16", small_grad_x_kernel<float, 16>},
    {"gaussian_grad_x<float> 32", small_grad_x_kernel<float, 32>},
    {"gaussian_grad_x<float> 256", wide_grad_x_kernel<float>},
    {"gaussian_add_parts<float>", add_parts_kernel<float>},
    {"gaussian_grad_sums<float> 4", small_sums_kernel<float, 4, true>},
    {"gaussian_grad_sums<float> 8", small_sums_kernel<float, 8, true>},
    {"gaussian_grad_sums<float> 16", small_sums_kernel<float, 16, true>},
    {"gaussian_grad_sums<float> 32", small_sums_kernel<float, 32, true>},
    {"gaussian_grad_sums<float> 256", wide_sums_kernel<float, true>},
    {"gaussian_finish_gradient<float>", finish_gradient_kernel<float>},
    {"gaussian_statistics<float> 4", small_sums_kernel<float, 4, false>},
    {"gaussian_statistics<float> 8", small_sums_kernel<float, 8, false>},
    {"gaussian_statistics<float> 16", small_sums_kernel<float, 16, false>},
    {"gaussian_statistics<float> 32", small_sums_kernel<float, 32, false>},
    {"gaussian_statistics<float> 256", wide_sums_kernel<float, false>},
    {"gaussian_finish_statistics<float>", finish_statistics_kernel<float>},
};
#endif

}  // namespace

// The parts of grad_x, then those of the leaves' sums in the same place.
int64_t gaussian_backward_scratch_cuda(const GaussianSize& s) {
  const int64_t parts = leaf_split(s).count;
  const int64_t of_x = parts > 1 ? parts * s.samples * s.dims : 0, of_leaves = gaussian_statistics_scratch_cuda(s);
  return of_x > of_leaves ? of_x : of_leaves;
}
int64_t gaussian_statistics_scratch_cuda(const GaussianSize& s) {
  return s.leaves * sample_split(s).count * sums_size(s.dims);
}

template int gaussian_whiten_cuda<float>(const GaussianSize&, const GaussianLeaves<float>&, CUstream_st*);
template int gaussian_log_prob_cuda<float>(const GaussianLogProbParams<float>&, CUstream_st*);
template int gaussian_backward_cuda<float>(const GaussianBackwardParams<float>&, CUstream_st*);
template int gaussian_mixture_cuda<float>(const GaussianMixtureParams<float>&, CUstream_st*);
template int gaussian_statistics_cuda<float>(const GaussianStatisticsParams<float>&, CUstream_st*);

}  // namespace ff
