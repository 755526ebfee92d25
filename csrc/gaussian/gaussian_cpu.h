// What the CPU kernels of the gaussian room share. Included by gaussian_cpu.cpp alone.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "common/simd.h"
#include "gaussian/gaussian.h"
#include "gaussian/gaussian_math.h"

namespace ff {
namespace FF_ISA {
namespace {

constexpr int kRows = 4;  // of W at a time
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // of samples at a time: 16 sums and 4 differences in 32 registers
constexpr int kColumns = 4;  // of a tile of second moments
#else
constexpr int kVectors = 2;
constexpr int kColumns = 2;
#endif
// Whether registers suffice to sum a block's own products while its rows are made.
constexpr bool kCorners = kVectors == 4;
template <class T>
constexpr int kStrip = kVectors * kLanes<T>;  // samples at a time

// Rows of a chunk lie a little further apart than kChunk: at a power of two they would share few sets of L1.
constexpr int kRow = kChunk + 16;

// Products of vanishing responsibilities are subnormal, and each such result would cost a hundred cycles: 0 instead.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

template <class T>
struct Buffer {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  explicit Buffer(int64_t n) : memory(static_cast<T*>(std::aligned_alloc(64, (size_t(n) * sizeof(T) + 63) / 64 * 64))) {
    if (!memory) throw std::bad_alloc();
  }
  operator T*() const { return memory.get(); }
};

// out[i] = sum over the lanes of v[i]. What is read of `out` is read from memory: taken from a register in other
// pieces, it would be stored in parts and loaded whole, and wait for all stores before.
template <class T, int kCount>
FF_INLINE void sums(const Vector<T> (&v)[kCount], T* out) {
  constexpr int L = kLanes<T>;
  static_assert(kCount % L == 0);
#pragma GCC unroll 8
  for (int first = 0; first < kCount; first += L) {
    Vector<T> level[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) level[i] = v[first + i];
#pragma GCC unroll 4
    for (int n = L / 2; n; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) level[i] = pair_sums<T>(level[2 * i], level[2 * i + 1]);
    store(out + first, level[0]);
  }
  asm volatile("" : : "r"(out) : "memory");
}

template <class T>
FF_INLINE bool all_zero(Vector<T> v) {
  const auto differ = v != Vector<T>{};
  int64_t part[sizeof(v) / sizeof(int64_t)], any = 0;
  __builtin_memcpy(part, &differ, sizeof(v));
  for (int64_t bits : part) any |= bits;
  return any == 0;
}

// Calls body(integral constant R, first row) for the blocks of rows.
template <class Body>
FF_INLINE void each_block(int dims, const Body& body) {
  int i0 = 0;
  for (; i0 + kRows <= dims; i0 += kRows) body(std::integral_constant<int, kRows>{}, i0);
  switch (dims - i0) {
    case 3: return body(std::integral_constant<int, 3>{}, i0);
    case 2: return body(std::integral_constant<int, 2>{}, i0);
    case 1: return body(std::integral_constant<int, 1>{}, i0);
  }
}

// A task of the grid: a range of leaf groups and a range of chunks.
struct Task {
  int64_t leaf_range, sample_range, first_group, last_group, first_chunk, last_chunk;
  FF_INLINE Task(const GaussianGrid& g, int64_t task)
      : leaf_range(task / g.sample_ranges),
        sample_range(task % g.sample_ranges),
        first_group(g.groups * leaf_range / g.leaf_ranges),
        last_group(g.groups * (leaf_range + 1) / g.leaf_ranges),
        first_chunk(g.chunks * sample_range / g.sample_ranges),
        last_chunk(g.chunks * (sample_range + 1) / g.sample_ranges) {}
};

template <class T>
T* moments_of(T* moments, const GaussianSize& s, int64_t sample_range, int64_t k) {
  return moments + (sample_range * s.leaves + k) * gaussian_moment_size(s);
}

FF_INLINE int64_t panels_of(const GaussianSize& s) { return (s.samples + kPanel - 1) / kPanel; }

template <class T>
T* moments_begin(const GaussianBackwardParams<T>& p) {
  return p.scratch + (p.grad_x ? GaussianGrid(p.size).leaf_ranges * panels_of(p.size) * p.size.dims * kPanel : 0);
}

}  // namespace
}  // namespace FF_ISA
}  // namespace ff
