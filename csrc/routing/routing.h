// Launchers of the routing room. N samples, F units, T trees of depth D, 2^D leaves a tree; nodes breadth-first.
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t

namespace ff {

template <class T>
struct RouteParams {
  int64_t samples, features, trees;  // N, F, T
  int depth;                         // D
  bool log;                          // log probabilities
  const T* units;                    // [N, F]
  const int32_t* phi;                // [T, 2^D - 1] or null  unit read by each node; in range on the CPU
  const int64_t* wide_phi;           // the same where phi is null; CUDA only
  const T* steepness_value;          // [1] or null  multiplies steepness
  T steepness;                       // s
  T* leaf;                           // [N, T, 2^D]
};

template <class T>
struct RouteBackwardParams {
  RouteParams<T> forward;  // leaf unused
  const T* grad_leaf;      // [N, T, 2^D]
  T* grad_units;           // [N, F]
  int32_t* order;          // [T (2^D - 1)]  CUDA: nodes by unit, ascending
  int32_t* start;          // [F + 1]  CUDA: first of each unit's nodes in order
  T* scratch;              // [blocks, 2, T (2^D - 1)] or null  CUDA: where the nodes do not fit shared memory
  int64_t blocks;          // CUDA: of the scratch
};

// CPU kernels of one instruction set. A task is a group of `lanes` samples.
template <class T>
struct RoutingCpu {
  int lanes;
  void (*route)(const RouteParams<T>&, int64_t begin, int64_t end);
  void (*route_backward)(const RouteBackwardParams<T>&, int64_t begin, int64_t end);
};

namespace baseline {
template <class T>
const RoutingCpu<T>& routing_cpu();
}
namespace avx2 {
template <class T>
const RoutingCpu<T>& routing_cpu();
}
namespace avx512 {
template <class T>
const RoutingCpu<T>& routing_cpu();
}

// CUDA launchers return a cudaError_t.
template <class T>
int route_cuda(const RouteParams<T>&, CUstream_st*);
template <class T>
int route_backward_cuda(const RouteBackwardParams<T>&, CUstream_st*);

constexpr int kMaxDepth = 16;

// Bytes of shared memory that a block of the backward kernel needs with its nodes in it, and the most it may have.
template <class T>
constexpr int64_t route_backward_shared(int64_t features, int64_t nodes) {
  return int64_t(sizeof(T)) * 2 * (features + nodes);
}
constexpr int64_t kRouteShared = 96 * 1024;
constexpr int64_t kRouteScratch = int64_t(64) << 20;  // bytes, or what one block needs

}  // namespace ff
