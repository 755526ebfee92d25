// CUDA kernels of the routing room. No atomics: every sum has one owner and one order, so results repeat.
#include "common/kernel_list.h"
#include "common/portable.cuh"
#include "common/reduce.cuh"
#include "routing/routing.h"
#include "routing/routing_math.h"

namespace ff {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 4;    // of a forward block: they share what is read of phi
constexpr int kSubtrees = 2;   // that a thread of a forward block walks at most
constexpr int kFewNodes = 64;  // that a warp lists alone
constexpr int kStatic = 48 * 1024;

// The unit that a node reads, or -1 where phi is out of range.
template <class T>
__device__ __forceinline__ int64_t unit_of(const RouteParams<T>& p, int64_t node) {
  const int64_t u = p.phi ? int64_t(p.phi[node]) : p.wide_phi[node];
  return u >= 0 && u < p.features ? u : -1;
}

template <class T>
__device__ __forceinline__ T steepness_of(const RouteParams<T>& p) {
  return p.steepness_value ? p.steepness * *p.steepness_value : p.steepness;
}

template <bool kLog, class T>
__device__ __forceinline__ Split<T> split_of(T x) {
  return kLog ? log_split(x) : split(x);
}

// Forward: a thread owns subtrees of 2^kTail leaves (4, or both of a tree of depth 1) of kSamples samples, and a block
// shares the splits of their units, [F] packs of kSamples to the left, then to the right, where shared memory holds
// them. A path costs D loads of phi, the same for all lanes on the upper levels and neighbours on the lowest; there is
// no barrier but the one behind the splits. Bytes: a leaf is written once, a warp's leaves next to one another.
template <class T, bool kLog, bool kStaged, int kTail>
__global__ void __launch_bounds__(kThreads) route_kernel(RouteParams<T> p, int64_t chunks) {
  FF_DYN_SHARED(T, table);
  const int64_t first = blockIdx.x / chunks * kSamples, chunk = blockIdx.x % chunks;
  const T steepness = steepness_of(p);
  const auto unit = [&](int64_t s, int64_t u) {  // lanes past the last sample repeat it
    const int64_t n = first + s < p.samples ? first + s : p.samples - 1;
    return steepness * p.units[n * p.features + u];
  };
  if (kStaged) {
    for (int64_t i = threadIdx.x; i < kSamples * p.features; i += kThreads) {
      const int64_t s = i / p.features, u = i - s * p.features;
      const Split<T> d = split_of<kLog>(unit(s, u));
      table[u * kSamples + s] = d.left;
      table[(p.features + u) * kSamples + s] = d.right;
    }
    __syncthreads();
  }
  const auto splits = [&](int64_t node, Split<T>(&d)[kSamples]) {
    const int64_t u = unit_of(p, node);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      if (u < 0)
        d[s] = {T(NAN), T(NAN)};
      else if (kStaged)
        d[s] = {table[u * kSamples + s], table[(p.features + u) * kSamples + s]};
      else
        d[s] = split_of<kLog>(unit(s, u));
    }
  };
  const auto step = [](T reach, T d) { return kLog ? reach + d : reach * d; };
  const int top = p.depth - kTail;
  const int64_t leaves = int64_t(1) << p.depth, subtrees = p.trees << top;
  for (int k = 0; k < kSubtrees; ++k) {
    const int64_t i = (chunk * kSubtrees + k) * kThreads + threadIdx.x;
    if (i >= subtrees) return;
    const int64_t tree = i >> top, r = i & ((int64_t(1) << top) - 1), phi = tree * (leaves - 1);
    T reach[kSamples][1 << kTail];
    Split<T> d[kSamples];
#pragma unroll
    for (int s = 0; s < kSamples; ++s) reach[s][0] = kLog ? T(0) : T(1);
    // 1. the path to the subtree
    for (int level = 0; level < top; ++level) {
      splits(phi + (int64_t(1) << level) - 1 + (r >> (top - level)), d);
      const bool right = r >> (top - 1 - level) & 1;
#pragma unroll
      for (int s = 0; s < kSamples; ++s) reach[s][0] = step(reach[s][0], right ? d[s].right : d[s].left);
    }
    // 2. its leaves
#pragma unroll
    for (int j = 0; j < kTail; ++j)
#pragma unroll
      for (int m = (1 << j) - 1; m >= 0; --m) {
        splits(phi + (int64_t(1) << (top + j)) - 1 + (r << j) + m, d);
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          reach[s][2 * m + 1] = step(reach[s][m], d[s].right);
          reach[s][2 * m] = step(reach[s][m], d[s].left);
        }
      }
    // 3. write: an allocation is aligned, and so is every 2^kTail-th leaf
    struct alignas(sizeof(T) << kTail > 16 ? 16 : sizeof(T) << kTail) Pack {
      T v[1 << kTail];
    };
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      if (first + s >= p.samples) break;
      Pack out;
#pragma unroll
      for (int m = 0; m < 1 << kTail; ++m) out.v[m] = reach[s][m];
      *reinterpret_cast<Pack*>(p.leaf + ((first + s) * p.trees + tree) * leaves + (r << kTail)) = out;
    }
  }
}

// Lists the nodes that read a unit, ascending: a block owns a unit, counts the nodes of smaller units, and appends its
// own in order. phi is read twice by each block, from L2.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock) route_lists_kernel(RouteBackwardParams<T> b, int64_t nodes) {
  FF_SHARED(int, shared, kBlock / 32);
  const RouteParams<T>& p = b.forward;
  const int64_t unit = blockIdx.x;  // F: only the end of the last list
  int before = 0;
  for (int64_t n = threadIdx.x; n < nodes; n += kBlock) {
    const int64_t u = unit_of(p, n);
    before += u >= 0 && u < unit;
  }
  int at = block_sum<kBlock>(before, shared);
  if (threadIdx.x == 0) b.start[unit] = at;
  if (unit == p.features) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t base = 0; base < nodes; base += kBlock) {
    const int64_t n = base + threadIdx.x;
    const bool mine = n < nodes && unit_of(p, n) == unit;
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) shared[warp] = __popc(votes);
    __syncthreads();
    int place = at;
    for (int w = 0; w < kBlock / 32; ++w) {
      if (w < warp) place += shared[w];
      at += shared[w];
    }
    if (mine) b.order[place + __popc(votes & ((1u << lane) - 1))] = int32_t(n);
    __syncthreads();
  }
}

// Backward: a block owns a sample, with all its trees, and shares the splits of its units and two numbers a node, in
// shared memory or, for large forests, in global scratch of its own.
//   1. down, level by level: the probability of reaching each node
//   2. up, level by level: each node's value from its children's, or from the gradients of its leaves; its gradient
//      takes the place of its probability
//   3. a warp owns a unit and sums the gradients of its nodes in their listed order
// Bytes: a leaf's gradient is read once, a warp's next to one another.
template <class T, bool kLog>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(RouteBackwardParams<T> b, bool staged) {
  FF_DYN_SHARED(T, memory);
  const RouteParams<T>& p = b.forward;
  const int64_t width = (int64_t(1) << p.depth) - 1, nodes = p.trees * width;
  T* const table = memory;
  T* const value = b.scratch ? b.scratch + blockIdx.x * 2 * nodes : memory + (staged ? 2 * p.features : 0);
  T* const grad = value + nodes;  // first the probability of reaching the node
  const T steepness = steepness_of(p);
  for (int64_t sample = blockIdx.x; sample < p.samples; sample += gridDim.x) {
    const T* units = p.units + sample * p.features;
    const auto split_at = [&](int64_t node) {
      const int64_t u = unit_of(p, node);
      if (u < 0) return Split<T>{T(NAN), T(NAN)};
      if (staged) return Split<T>{table[u], table[p.features + u]};
      return split(steepness * units[u]);
    };
    if (staged)
      for (int64_t u = threadIdx.x; u < p.features; u += kThreads) {
        const Split<T> d = split(steepness * units[u]);
        table[u] = d.left;
        table[p.features + u] = d.right;
      }
    __syncthreads();
    // 1. down
    for (int64_t t = threadIdx.x; !kLog && t < p.trees; t += kThreads) grad[t * width] = T(1);
    for (int level = 1; !kLog && level < p.depth; ++level) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < p.trees << (level - 1); i += kThreads) {
        const int64_t tree = i >> (level - 1);
        const int64_t n = (int64_t(1) << (level - 1)) - 1 + (i & ((int64_t(1) << (level - 1)) - 1));
        const Split<T> d = split_at(tree * width + n);
        const T reach = grad[tree * width + n];
        grad[tree * width + 2 * n + 1] = reach * d.left;
        grad[tree * width + 2 * n + 2] = reach * d.right;
      }
    }
    // 2. up
    for (int level = p.depth - 1; level >= 0; --level) {
      __syncthreads();
      const bool last = level == p.depth - 1;
      const T* leaf = b.grad_leaf + sample * p.trees * (width + 1);
      for (int64_t i = threadIdx.x; i < p.trees << level; i += kThreads) {
        const int64_t tree = i >> level, n = (int64_t(1) << level) - 1 + (i & ((int64_t(1) << level) - 1));
        const int64_t at = tree * width + n;
        T left, right;
        if (last) {
          left = leaf[2 * i], right = leaf[2 * i + 1];  // not as one pair: a gradient may start anywhere
        } else {
          left = value[at + n + 1], right = value[at + n + 2];
        }
        const Split<T> d = split_at(at);
        value[at] = kLog ? log_node_value(left, right) : node_value(d, left, right);
        grad[at] = kLog ? log_node_grad(d, left, right) : node_grad(d, grad[at], left, right);
      }
    }
    __syncthreads();
    // 3. sum
    for (int64_t u = threadIdx.x / 32; u < p.features; u += kThreads / 32) {
      T sum = T(0);
      for (int k = b.start[u] + threadIdx.x % 32; k < b.start[u + 1]; k += 32) sum += grad[b.order[k]];
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) b.grad_units[sample * p.features + u] = steepness * sum;
    }
    __syncthreads();
  }
}

template <class T, bool kLog>
int launch_route(const RouteParams<T>& p, CUstream_st* stream) {
  const int tail = p.depth == 1 ? 1 : 2;
  const int64_t chunks = ((p.trees << (p.depth - tail)) + kThreads * kSubtrees - 1) / (kThreads * kSubtrees);
  const int64_t blocks = (p.samples + kSamples - 1) / kSamples * chunks;
  if (blocks >= int64_t(1) << 31) return cudaErrorInvalidConfiguration;
  const int64_t bytes = 2 * kSamples * p.features * int64_t(sizeof(T));
  const bool staged = bytes <= kStatic;
  auto kernel = tail == 1 ? (staged ? route_kernel<T, kLog, true, 1> : route_kernel<T, kLog, false, 1>)
                          : (staged ? route_kernel<T, kLog, true, 2> : route_kernel<T, kLog, false, 2>);
  FF_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), staged ? size_t(bytes) : 0, stream, p, chunks);
  return cudaGetLastError();
}

}  // namespace

template <class T>
int route_cuda(const RouteParams<T>& p, CUstream_st* stream) {
  return p.log ? launch_route<T, true>(p, stream) : launch_route<T, false>(p, stream);
}

template <class T>
int route_backward_cuda(const RouteBackwardParams<T>& b, CUstream_st* stream) {
  const RouteParams<T>& p = b.forward;
  const int64_t nodes = p.trees * ((int64_t(1) << p.depth) - 1);
  if (b.blocks >= int64_t(1) << 31) return cudaErrorInvalidConfiguration;
  const int threads = nodes > kFewNodes ? kThreads : 32;
  auto lists = nodes > kFewNodes ? route_lists_kernel<T, kThreads> : route_lists_kernel<T, 32>;
  FF_LAUNCH(lists, dim3(unsigned(p.features + 1)), dim3(threads), 0, stream, b, nodes);
  const int error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  auto kernel = p.log ? route_backward_kernel<T, true> : route_backward_kernel<T, false>;
  // With scratch, the units' splits are still shared where they fit.
  const int64_t bytes = route_backward_shared<T>(p.features, b.scratch ? 0 : nodes);
  const bool staged = bytes <= kRouteShared;
  if (staged && bytes > kStatic) {
    const int allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (allowed != cudaSuccess) return allowed;
  }
  FF_LAUNCH(kernel, dim3(unsigned(b.blocks)), dim3(kThreads), staged ? size_t(bytes) : 0, stream, b, staged);
  return cudaGetLastError();
}

template int route_cuda(const RouteParams<float>&, CUstream_st*);
template int route_cuda(const RouteParams<double>&, CUstream_st*);
template int route_backward_cuda(const RouteBackwardParams<float>&, CUstream_st*);
template int route_backward_cuda(const RouteBackwardParams<double>&, CUstream_st*);

#ifndef FF_HOST_SHIM
namespace {
const KernelListed listed[] = {
    {"routing_route<float>", route_kernel<float, false, true, 2>},
    {"routing_route<float, log>", route_kernel<float, true, true, 2>},
    {"routing_route<double>", route_kernel<double, false, true, 2>},
    {"routing_route_unstaged<float>", route_kernel<float, false, false, 2>},
    {"routing_route_lists<float>", route_lists_kernel<float, kThreads>},
    {"routing_route_backward<float>", route_backward_kernel<float, false>},
    {"routing_route_backward<float, log>", route_backward_kernel<float, true>},
    {"routing_route_backward<double>", route_backward_kernel<double, false>},
};
}  // namespace
#endif

}  // namespace ff
