// Runs every CUDA launcher of the pool room under the host shim and compares it with the baseline CPU kernels, on small
// odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "host_shim/test/array.h"
#include "pool/pool.h"

namespace {

bool failed = false;

struct Case {
  int rows, height, width, leaves, radius;
  int offset;     // elements by which every vector is off its alignment
  bool weighted;  // with hidden rows, and a row that holds a NaN
};

template <class T>
struct Run {
  const Case& c;
  int64_t pixels = int64_t(c.height) * c.width;
  unsigned state = 12345;
  Array<T> points{2 * c.rows, T(0)}, weight{c.rows, T(1)};
  Array<T> prob{int64_t(c.rows) * c.leaves, T(0), c.offset}, pool{pixels * c.leaves, T(0), c.offset};
  Array<int32_t> order{c.rows, 0};
  ff::PoolRows<T> at;
  const ff::PoolCpu<T>& cpu = ff::baseline::pool_cpu<T>();

  explicit Run(const Case& given) : c(given) {
    for (int i = 0; i < prob.size(); ++i) prob[i] = uniform() / T(c.leaves);
    for (int i = 0; i < pool.size(); ++i) pool[i] = uniform() / T(pixels);
    for (int r = 0; r < c.rows; ++r) {
      points[2 * r] = uniform() * T(c.width + 2) - T(1.5);
      points[2 * r + 1] = uniform() * T(c.height + 2) - T(1.5);
      weight[r] = uniform();
    }
    if (c.weighted && c.rows > 5) {
      points[0] = T(NAN);
      weight[0] = T(0);
      points[2] = T(INFINITY);
      points[5] = T(-1e9);
    }
    at = {points.get(), c.weighted ? weight.get() : nullptr, nullptr, c.rows, c.height, c.width, c.leaves,
          c.radius,     T(1) / T(0.36 * (c.radius + 1))};
    Array<int32_t> keys(c.rows, 0);
    check("keys", ff::pool_position_keys_cuda(at, keys.get(), nullptr));
    std::iota(order.get(), order.get() + c.rows, 0);
    std::stable_sort(order.get(), order.get() + c.rows, [&](int a, int b) { return keys[a] < keys[b]; });
    at.order = order.get();

    scatter("cross", nullptr, false, false, T(1));
    gather();
    if (c.weighted && c.rows > 5) {
      prob[3 * c.leaves] = T(NAN);
      prob[4 * c.leaves] = T(INFINITY);
    }
    kl_loss(true);
    kl_loss(false);
    scatter("statistics", pool.get(), true, false, T(1));
    scatter("statistics into out", pool.get(), true, true, T(1));
    scatter("gradient", pool.get(), false, false, T(-1));
    peak();
  }

  T uniform() {
    state = state * 1664525u + 1013904223u;
    return T(state >> 8) / T(1 << 24) + T(0.001);
  }

  void check(const char* what, int code) {
    if (!code) return;
    std::printf("%s: error %d\n", what, code);
    failed = true;
  }

  void compare(const char* what, Array<T>& expected, Array<T>& got) {
    T largest = 0, difference = 0;
    bool odd = false;
    for (int64_t i = 0; i < expected.size(); ++i) {
      const T e = expected[i], g = got[i];
      if (e == g || (e != e && g != g)) continue;
      odd = odd || !(e - e == T(0)) || !(g - g == T(0));
      difference = std::max(difference, std::abs(e - g));
    }
    // An infinite magnitude would let every difference pass.
    for (int64_t i = 0; i < expected.size(); ++i)
      if (expected[i] - expected[i] == T(0)) largest = std::max(largest, std::abs(expected[i]));
    const T tolerance = sizeof(T) == 4 ? T(2e-5) : T(1e-12);
    if (!odd && difference <= tolerance * largest) return;
    std::printf("%s [%d rows, %d x %d, %d leaves, radius %d, offset %d, %zu bytes]: off by %g of %g\n", what, c.rows,
                c.height, c.width, c.leaves, c.radius, c.offset, sizeof(T), double(difference), double(largest));
    failed = true;
  }

  void kl_loss(bool gradient) {
    const int64_t n = gradient ? prob.size() : 0;
    Array<T> loss(c.rows, T(7)), expected_loss(c.rows, T(8)), grad(n, T(7), c.offset), expected(n, T(8), c.offset);
    ff::PoolKlLossParams<T> params{
        at, prob.get(), pool.get(), T(0.1) / T(pixels), loss.get(), gradient ? grad.get() : nullptr};
    check("kl_loss", ff::pool_kl_loss_cuda(params, nullptr));
    params.loss = expected_loss.get();
    params.grad_prob = gradient ? expected.get() : nullptr;
    cpu.kl_loss(params, 0, c.rows);
    compare("kl_loss", expected_loss, loss);
    compare("kl_loss gradient", expected, grad);
  }

  void scatter(const char* what, const T* given_pool, bool times_pool, bool accumulate, T scale) {
    Array<T> out(pool.size(), T(0.5), c.offset), expected(pool.size(), T(0.5), c.offset);
    ff::PoolScatterParams<T> params{at, prob.get(), given_pool, T(0), times_pool, accumulate, scale, out.get()};
    if (given_pool) params.eps = T(0.1) / T(pixels);
    check(what, ff::pool_scatter_cuda(params, nullptr));
    params.out = expected.get();
    // Every row is listed for every tile: the CPU kernel picks those that reach it.
    const auto tiles_along = [](int n) { return (n + ff::kPoolTile - 1) / ff::kPoolTile; };
    const int64_t tiles = int64_t(tiles_along(c.width)) * tiles_along(c.height);
    std::vector<int32_t> list;
    std::vector<int64_t> starts{0};
    for (int64_t t = 0; t < tiles; ++t) {
      list.insert(list.end(), order.get(), order.get() + c.rows);
      starts.push_back(int64_t(list.size()));
    }
    cpu.scatter(params, list.data(), starts.data(), 0, tiles);
    compare(what, expected, out);
  }

  void gather() {
    Array<T> out(prob.size(), T(7), c.offset), expected(prob.size(), T(8), c.offset);
    Array<T> square(c.rows, T(7)), expected_square(c.rows, T(8));
    ff::PoolGatherParams<T> params{at, pool.get(), out.get(), square.get()};
    check("gather", ff::pool_gather_cuda(params, nullptr));
    params.out = expected.get();
    params.square = expected_square.get();
    cpu.gather(params, 0, c.rows);
    compare("gather", expected, out);
    compare("gather square", expected_square, square);
  }

  void peak() {
    for (int refine = 0; refine < 3; ++refine) {
      Array<T> found(2 * c.rows, T(7)), expected(2 * c.rows, T(8)), score(c.rows, T(7)), expected_score(c.rows, T(8));
      ff::PoolPeakParams<T> params{prob.get(), pool.get(), c.rows,      c.height,   c.width,
                                   c.leaves,   refine,     found.get(), score.get()};
      check("peak", ff::pool_peak_cuda(params, nullptr));
      params.points = expected.get();
      params.score = expected_score.get();
      cpu.peak(params, 0, c.rows);
      compare("peak", expected, found);
      compare("peak score", expected_score, score);
    }
  }
};

}  // namespace

int main() {
  // Few leaves, as vectors, as scalars and off their alignment; a staged kernel of each size; more leaves than fit; one
  // of everything; rows in groups of 8, and more of them than a batch; windows larger than the canvas.
  for (const Case& c :
       {Case{19, 9, 11, 20, 3, 0, true}, Case{9, 5, 7, 13, 2, 0, true}, Case{9, 5, 7, 20, 2, 1, false},
        Case{7, 3, 5, 516, 1, 0, true}, Case{2, 3, 3, 1028, 1, 0, false}, Case{2, 3, 3, 2052, 1, 0, false},
        Case{2, 3, 3, 1029, 1, 0, false}, Case{1, 1, 1, 1, 0, 0, false}, Case{2113, 13, 11, 4, 0, 0, true},
        Case{3, 2, 35, 4, 40, 0, false}})
    Run<float> run(c);
  for (const Case& c : {Case{9, 7, 9, 10, 2, 0, true}, Case{7, 5, 3, 7, 1, 0, true}, Case{2, 2, 3, 514, 1, 0, false},
                        Case{2, 2, 3, 514, 1, 1, false}})
    Run<double> run(c);
  if (!failed) std::printf("OK\n");
  return failed;
}
