// Launchers of the pool room. R rows (image, landmark), H x W canvas, N leaves; float or double.
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t

namespace ff {

// What every windowed operator reads.
template <class T>
struct PoolRows {
  const T* points;       // [R, 2]  x, y in canvas pixels
  const T* weight;       // [R] or null  multiplies the row; 0 hides it, NaN points included
  const int32_t* order;  // [R]  rows by position, so that neighbours share the pool rows they load
  int64_t rows;          // R
  int height, width;     // H, W
  int64_t leaves;        // N
  int radius;            // cells; the window is 2 radius + 1 wide
  T inverse_variance;    // 1 / sigma^2, pixels^-2
};

template <class T>
struct PoolKlLossParams {
  PoolRows<T> at;
  const T* prob;  // [R, N]
  const T* pool;  // [H, W, N]
  T eps;          // floor of yhat
  T* loss;        // [R]  w sum_W y (log y - log max(yhat, eps))
  T* grad_prob;   // [R, N] or null  its gradient
};

// S(h, n) = sum over rows of  w y(h) p_n             (pool null: cross statistics)
//                             w y(h) / yhat(h) p_n   (pool given; rows with yhat not in [eps, inf) are left out)
// out (=, += or -=) S or, with times_pool, pool * S.
template <class T>
struct PoolScatterParams {
  PoolRows<T> at;
  const T* prob;    // [R, N]
  const T* pool;    // [H, W, N] or null
  T eps;            // floor of yhat
  bool times_pool;  // multiply by the pool: bounding statistics
  bool accumulate;  // add to out (only reached pixels are touched); otherwise every element is written
  T scale;          // multiplies S
  T* out;           // [H, W, N]
};

// t_n = sum_W y(h) q(h, n) and sum_W y^2; both 0 for hidden rows and windows that miss. A weight hides, no more.
template <class T>
struct PoolGatherParams {
  PoolRows<T> at;
  const T* pool;  // [H, W, N]
  T* out;         // [R, N]
  T* square;      // [R]
};

// Highest pixel of yhat = p . q, never stored; lowest flat index wins. Then, per refine, its neighbours.
template <class T>
struct PoolPeakParams {
  const T* prob;  // [R, N]
  const T* pool;  // [H, W, N]
  int64_t rows;   // R
  int height, width;
  int64_t leaves;  // N
  int refine;      // 0 none, 1 quarter_sign, 2 quarter_second
  T* points;       // [R, 2]
  T* score;        // [R]
};

// CPU kernels: ranges of work items, called in parallel. One table for each instruction set.
template <class T>
struct PoolCpu {
  void (*kl_loss)(const PoolKlLossParams<T>&, int64_t begin, int64_t end);  // positions in order
  void (*scatter)(const PoolScatterParams<T>&, const int32_t* tile_rows, const int64_t* tile_starts, int64_t begin,
                  int64_t end);                                            // canvas tiles
  void (*gather)(const PoolGatherParams<T>&, int64_t begin, int64_t end);  // positions in order
  void (*peak)(const PoolPeakParams<T>&, int64_t begin, int64_t end);      // rows
};
constexpr int kPoolTile = 16;  // canvas tiles of the scatter are kPoolTile x kPoolTile pixels

#define FF_POOL_TABLES(isa)     \
  namespace isa {               \
  template <class T>            \
  const PoolCpu<T>& pool_cpu(); \
  }
FF_POOL_TABLES(baseline)
FF_POOL_TABLES(avx2)
FF_POOL_TABLES(avx512)
#undef FF_POOL_TABLES

// CUDA launchers return a cudaError_t and need no memory but their outputs (peak keeps its search's keys in points).
template <class T>
int pool_position_keys_cuda(const PoolRows<T>&, int32_t* keys, CUstream_st*);  // keys [R], no order
template <class T>
int pool_kl_loss_cuda(const PoolKlLossParams<T>&, CUstream_st*);
template <class T>
int pool_scatter_cuda(const PoolScatterParams<T>&, CUstream_st*);
template <class T>
int pool_gather_cuda(const PoolGatherParams<T>&, CUstream_st*);
template <class T>
int pool_peak_cuda(const PoolPeakParams<T>&, CUstream_st*);

}  // namespace ff
