// Launchers of the gaussian room. N samples, K leaves (components), D dimensions. T: float, double.
// Leaf k is the normal distribution of mean m_k and covariance L_k L_k^T; W_k = L_k^-1, z_nk = W_k (x_n - m_k).
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t

namespace ff {

struct GaussianSize {
  int64_t samples, leaves;  // N, K
  int dims;                 // D
};

constexpr int kMostDims = 256;

// What is read of the leaves. Only the lower triangle of scale_tril is.
template <class T>
struct GaussianLeaves {
  const T* mean;        // [K, D]
  const T* scale_tril;  // [K, D, D]  L, its diagonal above 0; otherwise the leaf's densities are NaN
  T* whiten;            // [K, D, D]  scratch, filled by gaussian_whiten: W, zeros above the diagonal.
                        //            CPU: [K, gaussian_whiten_size], see gaussian_cpu.cpp
  T* log_norm;          // [K]        scratch, filled by gaussian_whiten: -(D log 2 pi) / 2 - sum_i log L_ii
  T* lanes = nullptr;   // CPU, D <= kFewDims: [ceil(K / kLeafGroup), gaussian_lane_fields, kLeafGroup] scratch, zeros
                        // before gaussian_whiten: mean, W by rows, log_norm, a flag, what rounding took from W
};

template <class T>
struct GaussianLogProbParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;   // [N, D]; on the CPU, here and below, panels [ceil(N / kPanel), D, kPanel], zeros behind the last
                // sample. In at most kFewDims dimensions densities and their gradients read [N, D]
  T* log_prob;  // [N, K]  log_norm - |z|^2 / 2
};

template <class T>
struct GaussianBackwardParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;          // [N, D]
  const T* grad;       // [N, K]  dR/dlog_prob
  T* grad_x;           // [N, D] or null       -sum_k g W_k^T z
  T* grad_mean;        // [K, D] or null       sum_n g W_k^T z
  T* grad_scale_tril;  // [K, D, D] or null    tril(W_k^T sum_n g z z^T) - diag(sum_n g / L_k,ii), zeros above
  T* scratch;          // gaussian_backward_scratch elements
};

template <class T>
struct GaussianMixtureParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;           // [N, D]
  const T* log_weight;  // [N, K]  log w; -inf: a leaf that takes no part
  T* log_prob;          // [N]     logsumexp_k(log w + log N)
  T* posterior;         // [N, K] or null  exp(log w + log N - log_prob); 0 in a row whose log_prob is -inf
};

template <class T>
struct GaussianStatisticsParams {
  GaussianSize size;
  GaussianLeaves<T> leaves;
  const T* x;          // [N, D]
  const T* log_prob;   // [N]     of the mixture: a sample whose value is not finite counts nothing, whatever it holds
  const T* posterior;  // [N, K]
  T* count;            // [K]        sum_n r
  T* first;            // [K, D]     sum_n r (x - m_k)
  T* second;           // [K, D, D]  sum_n r (x - m_k)(x - m_k)^T, both triangles
  T* scratch;          // gaussian_statistics_scratch elements
};

constexpr int kPanel = 64;       // samples of a CPU panel
constexpr int kLeafGroup = 16;   // leaves of a CPU task
constexpr int kChunk = 512;      // samples over which a CPU task sums in registers
constexpr int kCarefulDims = 6;  // up to here an ill-conditioned leaf is whitened in double
constexpr int kFewDims = 4;      // up to here lanes go over leaves
constexpr int kMostTasks = 16;   // of a CPU reduction in either direction: sums repeat for any number of threads

// Partial sums of one leaf: second moments [D4, D4] (lower triangle), first [D4], count; D4 is D, rounded up to fours.
inline int64_t gaussian_rows(const GaussianSize& s) { return (int64_t(s.dims) + 3) / 4 * 4; }
inline int64_t gaussian_moment_size(const GaussianSize& s) { return (gaussian_rows(s) + 1) * gaussian_rows(s) + 4; }

// How a CPU reduction is cut up: ranges of leaf groups times ranges of chunks, from the sizes alone. By samples first,
// since they are then read row by row, while the partial sums stay small.
struct GaussianGrid {
  int64_t groups, chunks, leaf_ranges, sample_ranges;
  explicit GaussianGrid(const GaussianSize& s)
      : groups((s.leaves + kLeafGroup - 1) / kLeafGroup), chunks((s.samples + kChunk - 1) / kChunk) {
    const int64_t room = (int64_t(1) << 21) / (s.leaves * gaussian_moment_size(s) + 1) + 1;
    sample_ranges = chunks < kMostTasks ? chunks : kMostTasks;
    if (sample_ranges > room) sample_ranges = room;
    leaf_ranges = 2 * sample_ranges >= kMostTasks ? 1 : (kMostTasks - 1) / (sample_ranges ? sample_ranges : 1) + 1;
    if (leaf_ranges > groups) leaf_ranges = groups;
  }
  int64_t tasks() const { return leaf_ranges * sample_ranges; }
};

// W of one leaf on the CPU: its blocks, a flag, and those of W^T (for gradients) or what rounding took from W (for
// densities in few dimensions).
inline int64_t gaussian_block_size(int dims) { return int64_t(dims + 3) / 4 * ((dims + 3) / 4 + 1) * 8 + 4; }
inline int64_t gaussian_whiten_size(int dims, bool gradients) {
  return gaussian_block_size(dims) * (gradients || dims <= kCarefulDims ? 2 : 1);
}

inline int64_t gaussian_lane_fields(int dims) { return dims + int64_t(dims) * (dims + 1) + 2; }

// CPU kernels of one instruction set; each does the items [begin, end) of what the comment names.
template <class T>
struct GaussianCpu {
  // panels: x [N, D] into panels
  void (*pack)(const GaussianSize&, const T* x, T* panels, int64_t begin, int64_t end);
  // leaves
  void (*whiten)(const GaussianSize&, const GaussianLeaves<T>&, bool gradients, int64_t begin, int64_t end);
  // panels in few dimensions, panel * groups + leaf group in more
  void (*log_prob)(const GaussianLogProbParams<T>&, int64_t begin, int64_t end);
  // samples; posterior holds log N before. roots: leaves sqrt(posterior), zeros where log_prob is not finite
  void (*mixture)(const GaussianMixtureParams<T>&, bool roots, int64_t begin, int64_t end);
  // tasks of the grid; scratch: grad_x [leaf_ranges, N panels, D, kPanel], then moments [sample_ranges, K, moment size]
  void (*backward)(const GaussianBackwardParams<T>&, int64_t begin, int64_t end);
  // panels; leaves
  void (*backward_x)(const GaussianBackwardParams<T>&, int64_t begin, int64_t end);
  void (*backward_leaves)(const GaussianBackwardParams<T>&, int64_t begin, int64_t end);
  // tasks of the grid; posterior holds roots; adds to scratch: moments [sample_ranges, K, moment size]
  void (*statistics)(const GaussianStatisticsParams<T>&, int64_t begin, int64_t end);
  // leaves
  void (*statistics_leaves)(const GaussianStatisticsParams<T>&, int64_t begin, int64_t end);
};
namespace baseline {
template <class T>
const GaussianCpu<T>& gaussian_cpu();
}
namespace avx2 {
template <class T>
const GaussianCpu<T>& gaussian_cpu();
}
namespace avx512 {
template <class T>
const GaussianCpu<T>& gaussian_cpu();
}

// CUDA launchers return a cudaError_t. gaussian_whiten runs before the others, on the same stream.
template <class T>
int gaussian_whiten_cuda(const GaussianSize&, const GaussianLeaves<T>&, CUstream_st*);
template <class T>
int gaussian_log_prob_cuda(const GaussianLogProbParams<T>&, CUstream_st*);
template <class T>
int gaussian_backward_cuda(const GaussianBackwardParams<T>&, CUstream_st*);
template <class T>
int gaussian_mixture_cuda(const GaussianMixtureParams<T>&, CUstream_st*);
template <class T>
int gaussian_statistics_cuda(const GaussianStatisticsParams<T>&, CUstream_st*);
// Elements of T that the partial sums of a launch need.
int64_t gaussian_backward_scratch_cuda(const GaussianSize&);
int64_t gaussian_statistics_scratch_cuda(const GaussianSize&);

}  // namespace ff
