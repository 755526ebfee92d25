// CUDA kernels of the pool room for float. The number is the most leaves of a staged kernel.
#include "pool/pool_keys.cuh"
#include "pool/pool_loss.cuh"
#include "pool/pool_peak.cuh"
#include "pool/pool_scatter.cuh"

namespace ff {
namespace {

[[maybe_unused]] const KernelListed listed[] = {
    {"pool_kl_loss<float> 512", rows_staged_kernel<float, 64, RowsMode::loss>},
    {"pool_kl_loss<float> 1024", rows_staged_kernel<float, 128, RowsMode::loss>},
    {"pool_kl_loss<float> 2048", rows_staged_kernel<float, 256, RowsMode::loss>},
    {"pool_kl_loss<float> vectors", rows_streamed_kernel<float, true, RowsMode::loss>},
    {"pool_kl_loss<float> scalars", rows_streamed_kernel<float, false, RowsMode::loss>},
    {"pool_kl_loss_grad<float> 512", rows_staged_kernel<float, 64, RowsMode::loss_and_gradient>},
    {"pool_kl_loss_grad<float> 1024", rows_staged_kernel<float, 128, RowsMode::loss_and_gradient>},
    {"pool_kl_loss_grad<float> 2048", rows_staged_kernel<float, 256, RowsMode::loss_and_gradient>},
    {"pool_kl_loss_grad<float> vectors", rows_streamed_kernel<float, true, RowsMode::loss_and_gradient>},
    {"pool_kl_loss_grad<float> scalars", rows_streamed_kernel<float, false, RowsMode::loss_and_gradient>},
    {"pool_gather<float> 512", rows_staged_kernel<float, 64, RowsMode::gather>},
    {"pool_gather<float> 1024", rows_staged_kernel<float, 128, RowsMode::gather>},
    {"pool_gather<float> 2048", rows_staged_kernel<float, 256, RowsMode::gather>},
    {"pool_gather<float> vectors", rows_streamed_kernel<float, true, RowsMode::gather>},
    {"pool_gather<float> scalars", rows_streamed_kernel<float, false, RowsMode::gather>},
    {"pool_scatter<float> 512", pixels_staged_kernel<float, 64, true>},
    {"pool_scatter<float> 1024", pixels_staged_kernel<float, 128, true>},
    {"pool_scatter<float> 2048", pixels_staged_kernel<float, 256, true>},
    {"pool_scatter<float> vectors", pixels_streamed_kernel<float, true, true>},
    {"pool_scatter<float> scalars", pixels_streamed_kernel<float, false, true>},
    {"pool_cross<float> 512", pixels_staged_kernel<float, 64, false>},
    {"pool_cross<float> 1024", pixels_staged_kernel<float, 128, false>},
    {"pool_cross<float> 2048", pixels_staged_kernel<float, 256, false>},
    {"pool_cross<float> vectors", pixels_streamed_kernel<float, true, false>},
    {"pool_cross<float> scalars", pixels_streamed_kernel<float, false, false>},
    {"pool_peak<float>", peak_kernel<float>},
    {"pool_refine<float>", refine_kernel<float>},
    {"pool_position_keys<float>", position_keys_kernel<float>},
};

}  // namespace

template int pool_position_keys_cuda<float>(const PoolRows<float>&, int32_t*, CUstream_st*);
template int pool_kl_loss_cuda<float>(const PoolKlLossParams<float>&, CUstream_st*);
template int pool_scatter_cuda<float>(const PoolScatterParams<float>&, CUstream_st*);
template int pool_gather_cuda<float>(const PoolGatherParams<float>&, CUstream_st*);
template int pool_peak_cuda<float>(const PoolPeakParams<float>&, CUstream_st*);

}  // namespace ff
