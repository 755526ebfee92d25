// The statistics of expectation maximisation, from the sums of the leaves.
#pragma once
#include "gaussian/gaussian_sums.cuh"

namespace ff {
namespace {

// A thread owns an element of `second`, and of `first` and `count` at its edge: 4 (parts + 1) bytes.
template <class T>
__global__ void __launch_bounds__(256)
    finish_statistics_kernel(const GaussianStatisticsParams<T> a, const int64_t count) {
  const int dims = a.size.dims, size = dims * dims;
  const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (e >= a.size.leaves * size) return;
  const int64_t leaf = e / size;
  const int i = int(e % size) / dims, j = int(e % size) % dims;
  a.second[e] = gather(a.scratch, leaf, count, dims, 1 + dims + max(i, j) * dims + min(i, j));
  if (j == 0) a.first[leaf * dims + i] = gather(a.scratch, leaf, count, dims, 1 + i);
  if (i == 0 && j == 0) a.count[leaf] = gather(a.scratch, leaf, count, dims, 0);
}

}  // namespace

template <class T>
int gaussian_statistics_cuda(const GaussianStatisticsParams<T>& a, CUstream_st* stream) {
  const GaussianSize& s = a.size;
  if (!s.leaves) return cudaSuccess;
  const Split split = sample_split(s);
  if (split.count) {
    const int error =
        launch_sums<false>(SumsParams<T>{s, a.leaves, a.x, a.posterior, a.log_prob, a.scratch, split}, stream);
    if (error != cudaSuccess) return error;
  }
  auto kernel = finish_statistics_kernel<T>;  // no parts: zeros
  return launch(kernel, parts_of(s.leaves * s.dims * s.dims, 256), 1, 256, 0, stream, a, split.count);
}

}  // namespace ff
