// Launchers of the categorical room. N samples, T trees of L leaves, C classes (pixels); float or double.
#pragma once
#include <cstdint>

#include "categorical/categorical_math.h"

struct CUstream_st;  // cudaStream_t

namespace ff {

// What every operator reads. A forest's mean is one tree of all leaves, with scale 1 / trees.
template <class T>
struct CategoricalMixture {
  const T* weight;                         // [N, T, L]  routing probabilities
  const T* leaves;                         // [T, L, C]
  int64_t samples, trees, count, classes;  // N, T, L, C
  T scale;                                 // yhat = scale sum_l P_l q_l
  T eps;                                   // floor of yhat
};

// y of a loss [N, C], or the upstream gradient of log yhat [N, T, C].
template <class T>
struct CategoricalNumerator {
  CategoricalKind kind;
  const T* data;
  int64_t sample, tree;  // strides, elements; tree 0 where trees share it
  T threshold;           // classes whose y is at or below it are left out; -inf: none
};

// Rows (sample, tree): log yhat; or a loss and the gradient of its weights; or the gradient alone.
template <class T>
struct CategoricalRowsParams {
  CategoricalMixture<T> mixture;
  CategoricalNumerator<T> numerator;  // data null: log yhat is written and nothing else
  const T* transposed;                // [T, C, padded L] (CPU: categorical_padded(L)) or null without grad_weight
  T* log_prob;                        // [N, T, C] or null
  T* loss;                            // [N, T] or null
  T* grad_weight;                     // [N, T, L] or null
  T sign;                             // grad_weight = sign scale sum_c slope q;  -1 for a loss, 1 for log_prob
};

// S(t, l, c) = scale sum_n factor_nt P_ntl slope_ntc;  out (= or +=) sign S, or q S for statistics. Rows whose weights
// are not finite, and samples whose `sound` is 0, are left out.
template <class T>
struct CategoricalLeavesParams {
  CategoricalMixture<T> mixture;
  CategoricalNumerator<T> numerator;
  const T* factor;       // [N, T] or null (1)
  const uint8_t* sound;  // [N] 1 where the target is finite, or null (all)
  bool times_leaves;     // multiply by the leaves: bounding statistics
  bool accumulate;       // add to out
  T sign;                // multiplies S
  int64_t parts;         // ranges of samples, summed in order
  T* partial;            // [parts, T, L, C]; the CPU needs none for one part
  T* out;                // [T, L, C]
};

constexpr int kCategoricalBlock = 48;  // samples whose slopes stand in the cache together

// CPU kernels: ranges of work items, called in parallel. One table for each instruction set.
template <class T>
struct CategoricalCpu {
  int lanes;                                                                                    // of a vector
  int64_t (*tiles)(int64_t classes);                                                            // tiles of the classes
  void (*transpose)(const CategoricalMixture<T>&, T* transposed, int64_t begin, int64_t end);   // (tree, tile) items
  void (*rows)(const CategoricalRowsParams<T>&, int64_t samples, int64_t begin, int64_t end);   // (tree, range) items
  void (*sound)(const T* target, int64_t classes, uint8_t* sound, int64_t begin, int64_t end);  // samples
  void (*leaves)(const CategoricalLeavesParams<T>&, int64_t begin, int64_t end);  // (part, tree, tile) items
  void (*sum)(const CategoricalLeavesParams<T>&, int64_t begin, int64_t end);     // rows (tree, leaf) of several parts
};

inline int64_t categorical_padded(int64_t leaves, int lanes) { return (leaves + lanes - 1) / lanes * lanes; }

#define FF_CATEGORICAL_TABLES(isa)            \
  namespace isa {                             \
  template <class T>                          \
  const CategoricalCpu<T>& categorical_cpu(); \
  }
FF_CATEGORICAL_TABLES(baseline)
FF_CATEGORICAL_TABLES(avx2)
FF_CATEGORICAL_TABLES(avx512)
#undef FF_CATEGORICAL_TABLES

// CUDA launchers return a cudaError_t.
template <class T>
int categorical_rows_cuda(const CategoricalRowsParams<T>&, CUstream_st*);
template <class T>
int categorical_sound_cuda(const T* target, int64_t samples, int64_t classes, uint8_t* sound, CUstream_st*);
template <class T>
int categorical_leaves_cuda(const CategoricalLeavesParams<T>&, CUstream_st*);
// Ranges of samples that fill the device, given the tiles of leaves and classes; a function of the shape alone.
int64_t categorical_parts_cuda(int64_t samples, int64_t trees, int64_t leaves, int64_t classes);

}  // namespace ff
