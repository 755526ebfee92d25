// CUDA kernels of the pool room for double. Streamed kernels alone.
#include "pool/pool_keys.cuh"
#include "pool/pool_loss.cuh"
#include "pool/pool_peak.cuh"
#include "pool/pool_scatter.cuh"

namespace ff {
namespace {

[[maybe_unused]] const KernelListed listed[] = {
    {"pool_kl_loss<double> vectors", rows_streamed_kernel<double, true, RowsMode::loss>},
    {"pool_kl_loss<double> scalars", rows_streamed_kernel<double, false, RowsMode::loss>},
    {"pool_kl_loss_grad<double> vectors", rows_streamed_kernel<double, true, RowsMode::loss_and_gradient>},
    {"pool_kl_loss_grad<double> scalars", rows_streamed_kernel<double, false, RowsMode::loss_and_gradient>},
    {"pool_gather<double> vectors", rows_streamed_kernel<double, true, RowsMode::gather>},
    {"pool_gather<double> scalars", rows_streamed_kernel<double, false, RowsMode::gather>},
    {"pool_scatter<double> vectors", pixels_streamed_kernel<double, true, true>},
    {"pool_scatter<double> scalars", pixels_streamed_kernel<double, false, true>},
    {"pool_cross<double> vectors", pixels_streamed_kernel<double, true, false>},
    {"pool_cross<double> scalars", pixels_streamed_kernel<double, false, false>},
    {"pool_peak<double>", peak_kernel<double>},
    {"pool_refine<double>", refine_kernel<double>},
    {"pool_position_keys<double>", position_keys_kernel<double>},
};

}  // namespace

template int pool_position_keys_cuda<double>(const PoolRows<double>&, int32_t*, CUstream_st*);
template int pool_kl_loss_cuda<double>(const PoolKlLossParams<double>&, CUstream_st*);
template int pool_scatter_cuda<double>(const PoolScatterParams<double>&, CUstream_st*);
template int pool_gather_cuda<double>(const PoolGatherParams<double>&, CUstream_st*);
template int pool_peak_cuda<double>(const PoolPeakParams<double>&, CUstream_st*);

}  // namespace ff
