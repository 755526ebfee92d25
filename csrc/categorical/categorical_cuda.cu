// CUDA kernels of the categorical room.
//
// Both kernels are pairs of matrix products that share a tile of 64 samples x 64 classes: yhat of the tile, its slopes
// (which stay in shared memory), then the gradient of the weights or the sums of the leaves. 256 threads own 4 x 4
// results each; slices of the operands pass through shared memory. A result is added up by one thread in a fixed
// order, over tiles through global memory that no other thread touches, and ranges of samples are summed by a second
// kernel: no atomics, results repeat bit by bit. Weights and leaves are read once a tile of 64, and nothing of size
// N T C is written but log yhat.
#include <algorithm>

#include "categorical/categorical.h"
#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"

namespace ff {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;          // samples, classes or leaves of a tile
constexpr int kOwn = 4;            // of a thread, along both sides
constexpr int kPitch = kTile + 4;  // of a row in shared memory: 16-byte aligned, and columns spread over the banks
constexpr int kAcross = kTile / kOwn;
template <class T>
constexpr int kSlice = sizeof(T) == 4 ? 16 : 8;  // depth of a slice

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Copies a slice into shared memory: to[k][i] = from(k, i) for kSlice x 64 elements. kAlongDepth: neighbouring threads
// take neighbouring k, which are neighbours in global memory.
template <bool kAlongDepth, class T, class From>
__device__ __forceinline__ void load_slice(T* to, const From& from) {
#pragma unroll
  for (int j = 0; j < kSlice<T> * kTile / kThreads; ++j) {
    const int index = j * kThreads + int(threadIdx.x);
    const int k = kAlongDepth ? index % kSlice<T> : index / kTile;
    const int i = kAlongDepth ? index / kSlice<T> : index % kTile;
    to[k * kPitch + i] = from(k, i);
  }
}

// sum[i][j] += a[k][row + i] b[k][column + j] over the depth of a slice.
template <class T>
__device__ __forceinline__ void multiply(const T* a, const T* b, T (&sum)[kOwn][kOwn]) {
  a += threadIdx.x / kAcross * kOwn;
  b += threadIdx.x % kAcross * kOwn;
#pragma unroll
  for (int k = 0; k < kSlice<T>; ++k) {
    T row[kOwn], column[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      row[i] = a[k * kPitch + i];
      column[i] = b[k * kPitch + i];
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[i][j] += row[i] * column[j];
  }
}

// sum_l P q of 64 samples from n0 and 64 classes from c0; zeros outside.
template <class T>
__device__ __forceinline__ void mixture_tile(const CategoricalMixture<T>& m, int64_t tree, int64_t n0, int64_t c0,
                                             T* a, T* b, T (&yhat)[kOwn][kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) yhat[i][j] = T(0);
  for (int64_t l0 = 0; l0 < m.count; l0 += kSlice<T>) {
    load_slice<true>(a, [&](int k, int i) {
      const int64_t l = l0 + k, n = n0 + i;
      return l < m.count && n < m.samples ? m.weight[(n * m.trees + tree) * m.count + l] : T(0);
    });
    load_slice<false>(b, [&](int k, int i) {
      const int64_t l = l0 + k, c = c0 + i;
      return l < m.count && c < m.classes ? m.leaves[(tree * m.count + l) * m.classes + c] : T(0);
    });
    __syncthreads();
    multiply(a, b, yhat);
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ T numerator_at(const CategoricalNumerator<T>& u, int64_t n, int64_t tree, int64_t c) {
  return u.data[n * u.sample + tree * u.tree + c];
}

// A block owns 64 samples of one tree and passes over the classes; a thread owns 4 samples x 4 classes of a tile.
// Without a loss or gradient to add up the tiles of classes are dealt to blockIdx.y.
template <class T, CategoricalKind kKind>
__global__ void __launch_bounds__(kThreads) rows_kernel(CategoricalRowsParams<T> p) {
  FF_SHARED(T, a, kSlice<T> * kPitch);
  FF_SHARED(T, b, kSlice<T> * kPitch);
  FF_SHARED(T, slopes, kTile * kPitch);  // [class][sample]
  const CategoricalMixture<T>& m = p.mixture;
  const int64_t tree = blockIdx.x % m.trees, n0 = blockIdx.x / m.trees * kTile;
  const int row = threadIdx.x / kAcross * kOwn, column = threadIdx.x % kAcross * kOwn;
  T loss[kOwn] = {};

  for (int64_t c0 = int64_t(blockIdx.y) * kTile; c0 < m.classes; c0 += int64_t(gridDim.y) * kTile) {
    // 1. yhat
    T yhat[kOwn][kOwn];
    mixture_tile(m, tree, n0, c0, a, b, yhat);

    // 2. log, or loss and slopes
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t n = n0 + row + i;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int64_t c = c0 + column + j;
        T slope = T(0);
        if (n < m.samples && c < m.classes) {
          const T v = yhat[i][j] * m.scale;
          if (p.log_prob) {
            p.log_prob[(n * m.trees + tree) * m.classes + c] = log(above_floor(v, m.eps));
          } else {
            const ClassTerm<T> term =
                class_term<kKind, kKind != CategoricalKind::log_prob>(numerator_at(p.numerator, n, tree, c), v, m.eps,
                                                                      p.numerator.threshold);
            loss[i] += term.loss;
            slope = term.slope * (p.sign * m.scale);
          }
        }
        slopes[(column + j) * kPitch + row + i] = slope;
      }
    }
    if (!p.grad_weight) continue;
    __syncthreads();

    // 3. gradient of the weights: += slopes q^T, 64 leaves at a time
    for (int64_t l0 = 0; l0 < m.count; l0 += kTile) {
      T sum[kOwn][kOwn] = {};
      for (int k0 = 0; k0 < kTile; k0 += kSlice<T>) {
        load_slice<true>(b, [&](int k, int i) {
          const int64_t l = l0 + i, c = c0 + k0 + k;
          return l < m.count && c < m.classes ? m.leaves[(tree * m.count + l) * m.classes + c] : T(0);
        });
        __syncthreads();
        multiply(slopes + k0 * kPitch, b, sum);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t n = n0 + row + i;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int64_t l = l0 + column + j;
          if (n >= m.samples || l >= m.count) continue;
          T* out = p.grad_weight + (n * m.trees + tree) * m.count + l;
          *out = c0 ? *out + sum[i][j] : sum[i][j];
        }
      }
    }
  }

  // 4. loss of a sample, over its 16 threads
  if (!p.loss) return;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const T total = warp_sum<kAcross>(loss[i]);
    const int64_t n = n0 + row + i;
    if (column == 0 && n < m.samples) p.loss[n * m.trees + tree] = total;
  }
}

// A block owns 64 classes of one tree for one range of samples, and adds up all its leaves in `partial`.
template <class T, CategoricalKind kKind>
__global__ void __launch_bounds__(kThreads) leaves_kernel(CategoricalLeavesParams<T> p, int64_t tiles, int64_t range) {
  FF_SHARED(T, a, kSlice<T> * kPitch);
  FF_SHARED(T, b, kSlice<T> * kPitch);
  FF_SHARED(T, slopes, kTile * kPitch);  // [sample][class]
  FF_SHARED(int, broken, kTile);
  const CategoricalMixture<T>& m = p.mixture;
  const int64_t c0 = blockIdx.x % tiles * kTile, tree = blockIdx.x / tiles % m.trees;
  const int64_t part = blockIdx.x / tiles / m.trees;
  const int row = threadIdx.x / kAcross * kOwn, column = threadIdx.x % kAcross * kOwn;
  const int64_t begin = part * range, end = least(m.samples, begin + range);

  for (int64_t n0 = begin; n0 < end; n0 += kTile) {
    // 1. yhat
    T yhat[kOwn][kOwn];
    mixture_tile(m, tree, n0, c0, a, b, yhat);

    // 2. slopes, and the rows that are left out: an odd weight shows in every class, then its row is looked at
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t n = n0 + row + i;
      const bool exists = n < end;
      T odd = T(0);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) odd += yhat[i][j] - yhat[i][j];
      odd = warp_sum<kAcross>(odd);
      bool out = !exists || (p.sound && !p.sound[n]);
      T strange = T(0);
      if (exists && !(odd == T(0)))
        for (int64_t l = threadIdx.x % kAcross; l < m.count; l += kAcross) {
          const T w = m.weight[(n * m.trees + tree) * m.count + l];
          strange += w - w;
        }
      strange = warp_sum<kAcross>(strange);
      out = out || !(strange == T(0));
      const T factor = out ? T(0) : p.factor ? p.factor[n * m.trees + tree] : T(1);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int64_t c = c0 + column + j;
        T slope = T(0);
        if (!out && c < m.classes)
          slope = factor * class_term<kKind, false>(numerator_at(p.numerator, n, tree, c), yhat[i][j] * m.scale, m.eps,
                                                    p.numerator.threshold)
                               .slope;
        slopes[(row + i) * kPitch + column + j] = slope;
      }
      if (column == 0) broken[row + i] = out;
    }
    __syncthreads();

    // 3. sums of the leaves: += P^T slopes, 64 leaves at a time
    for (int64_t l0 = 0; l0 < m.count; l0 += kTile) {
      T sum[kOwn][kOwn] = {};
      for (int k0 = 0; k0 < kTile; k0 += kSlice<T>) {
        load_slice<false>(a, [&](int k, int i) {
          const int64_t n = n0 + k0 + k, l = l0 + i;
          return !broken[k0 + k] && l < m.count ? m.weight[(n * m.trees + tree) * m.count + l] : T(0);
        });
        __syncthreads();
        multiply(a, slopes + k0 * kPitch, sum);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t l = l0 + row + i;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int64_t c = c0 + column + j;
          if (l >= m.count || c >= m.classes) continue;
          T* out = p.partial + ((part * m.trees + tree) * m.count + l) * m.classes + c;
          *out = n0 > begin ? *out + sum[i][j] : sum[i][j];
        }
      }
    }
  }
}

// A thread owns one class of one leaf and sums the ranges of samples in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(CategoricalLeavesParams<T> p) {
  const CategoricalMixture<T>& m = p.mixture;
  const int64_t size = m.trees * m.count * m.classes;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  T total = T(0);
  for (int64_t part = 0; part < p.parts; ++part) total += p.partial[part * size + i];
  total *= p.sign * m.scale;
  if (p.times_leaves) total *= m.leaves[i];
  p.out[i] = p.accumulate ? p.out[i] + total : total;
}

// A warp owns one sample and reads its target once.
template <class T>
__global__ void __launch_bounds__(kThreads) sound_kernel(const T* target, int64_t samples, int64_t classes,
                                                         uint8_t* sound) {
  const int64_t n = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  T odd = T(0);
  if (n < samples)
    for (int64_t c = threadIdx.x % 32; c < classes; c += 32) {
      const T y = target[n * classes + c];
      odd += y - y;
    }
  odd = warp_sum(odd);
  if (n < samples && threadIdx.x % 32 == 0) sound[n] = odd == T(0);
}

[[maybe_unused]] const KernelListed listed[] = {
    {"categorical_rows<float> kl", rows_kernel<float, CategoricalKind::kl>},
    {"categorical_rows<float> l2", rows_kernel<float, CategoricalKind::l2>},
    {"categorical_rows<float> log_prob", rows_kernel<float, CategoricalKind::log_prob>},
    {"categorical_rows<double> kl", rows_kernel<double, CategoricalKind::kl>},
    {"categorical_rows<double> l2", rows_kernel<double, CategoricalKind::l2>},
    {"categorical_rows<double> log_prob", rows_kernel<double, CategoricalKind::log_prob>},
    {"categorical_leaves<float> kl", leaves_kernel<float, CategoricalKind::kl>},
    {"categorical_leaves<float> l2", leaves_kernel<float, CategoricalKind::l2>},
    {"categorical_leaves<float> log_prob", leaves_kernel<float, CategoricalKind::log_prob>},
    {"categorical_leaves<double> kl", leaves_kernel<double, CategoricalKind::kl>},
    {"categorical_leaves<double> l2", leaves_kernel<double, CategoricalKind::l2>},
    {"categorical_leaves<double> log_prob", leaves_kernel<double, CategoricalKind::log_prob>},
    {"categorical_sum<float>", sum_kernel<float>},
    {"categorical_sum<double>", sum_kernel<double>},
    {"categorical_sound<float>", sound_kernel<float>},
    {"categorical_sound<double>", sound_kernel<double>},
};

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

template <class T, CategoricalKind kKind>
void launch_rows(const CategoricalRowsParams<T>& p, CUstream_st* stream) {
  const CategoricalMixture<T>& m = p.mixture;
  const bool apart = !p.loss && !p.grad_weight;
  const dim3 grid(unsigned(m.trees * tiles_of(m.samples)),
                  unsigned(apart ? std::min<int64_t>(tiles_of(m.classes), 65535) : 1));
  const auto kernel = rows_kernel<T, kKind>;
  FF_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, p);
}

template <class T, CategoricalKind kKind>
void launch_leaves(const CategoricalLeavesParams<T>& p, CUstream_st* stream) {
  const CategoricalMixture<T>& m = p.mixture;
  const int64_t tiles = tiles_of(m.classes), range = (tiles_of(m.samples) + p.parts - 1) / p.parts * kTile;
  const auto kernel = leaves_kernel<T, kKind>;
  FF_LAUNCH(kernel, dim3(unsigned(p.parts * m.trees * tiles)), dim3(kThreads), 0, stream, p, tiles, range);
}

}  // namespace

int64_t categorical_parts_cuda(int64_t samples, int64_t trees, int64_t, int64_t classes) {
  const int64_t blocks = tiles_of(samples);
  if (!blocks) return 0;
  const int64_t wanted = std::max<int64_t>(1, std::min(512 / (trees * tiles_of(classes)), blocks));
  const int64_t range = (blocks + wanted - 1) / wanted;
  return (blocks + range - 1) / range;  // no empty range
}

template <class T>
int categorical_rows_cuda(const CategoricalRowsParams<T>& p, CUstream_st* stream) {
  if (!p.mixture.samples) return 0;
  switch (p.numerator.kind) {
    case CategoricalKind::kl: launch_rows<T, CategoricalKind::kl>(p, stream); break;
    case CategoricalKind::l2: launch_rows<T, CategoricalKind::l2>(p, stream); break;
    default: launch_rows<T, CategoricalKind::log_prob>(p, stream);
  }
  return cudaGetLastError();
}

template <class T>
int categorical_sound_cuda(const T* target, int64_t samples, int64_t classes, uint8_t* sound, CUstream_st* stream) {
  if (!samples) return 0;
  const auto kernel = sound_kernel<T>;
  FF_LAUNCH(kernel, dim3(unsigned((samples + kThreads / 32 - 1) / (kThreads / 32))), dim3(kThreads), 0, stream, target,
            samples, classes, sound);
  return cudaGetLastError();
}

template <class T>
int categorical_leaves_cuda(const CategoricalLeavesParams<T>& p, CUstream_st* stream) {
  const CategoricalMixture<T>& m = p.mixture;
  if (p.parts) switch (p.numerator.kind) {
      case CategoricalKind::kl: launch_leaves<T, CategoricalKind::kl>(p, stream); break;
      case CategoricalKind::l2: launch_leaves<T, CategoricalKind::l2>(p, stream); break;
      default: launch_leaves<T, CategoricalKind::log_prob>(p, stream);
    }
  const int error = cudaGetLastError();
  if (error) return error;
  const int64_t size = m.trees * m.count * m.classes;
  const auto kernel = sum_kernel<T>;
  FF_LAUNCH(kernel, dim3(unsigned((size + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

template int categorical_rows_cuda<float>(const CategoricalRowsParams<float>&, CUstream_st*);
template int categorical_rows_cuda<double>(const CategoricalRowsParams<double>&, CUstream_st*);
template int categorical_sound_cuda<float>(const float*, int64_t, int64_t, uint8_t*, CUstream_st*);
template int categorical_sound_cuda<double>(const double*, int64_t, int64_t, uint8_t*, CUstream_st*);
template int categorical_leaves_cuda<float>(const CategoricalLeavesParams<float>&, CUstream_st*);
template int categorical_leaves_cuda<double>(const CategoricalLeavesParams<double>&, CUstream_st*);

}  // namespace ff
