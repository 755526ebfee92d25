// Runs every CUDA launcher of the routing room under the host shim and compares it with the baseline CPU kernels, on
// small odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "host_shim/sanitizers.h"
#include "host_shim/test/array.h"
#include "routing/routing.h"

namespace {

bool failed = false;

struct Case {
  int64_t samples, features, trees;
  int depth;
  bool log, wide, tensor;  // phi of 64 bits; steepness from memory
  int64_t blocks;          // of the scratch, 0: the nodes stand in shared memory
  int offset;              // elements by which the gradient is off its alignment
};

template <class T>
class Run {
 public:
  explicit Run(const Case& given) : c(given) {
    const int64_t width = (int64_t(1) << c.depth) - 1, nodes = c.trees * width, leaves = c.trees * (width + 1);
    Array<T> units(c.samples * c.features, T(0)), factor(1, T(0.75));
    for (int64_t i = 0; i < units.size(); ++i) units[i] = T(8) * random() - T(4);
    if (c.samples > 2) {
      units[c.features] = T(NAN);
      units[2 * c.features] = T(INFINITY);
    }
    Array<int32_t> phi(nodes, 0);
    Array<int64_t> wide(c.wide ? nodes : 0, 0);
    for (int64_t i = 0; i < nodes; ++i) {
      phi[i] = int32_t(random() * T(c.features)) % int32_t(c.features);
      if (c.wide) wide[i] = phi[i];
    }
    Array<T> leaf(c.samples * leaves, T(7)), expected(c.samples * leaves, T(8));
    const ff::RouteParams<T> cpu_params{c.samples, c.features,    c.trees,
                                        c.depth,   c.log,         units.get(),
                                        phi.get(), nullptr,       c.tensor ? factor.get() : nullptr,
                                        T(1.5),    expected.get()};
    ff::RouteParams<T> params = cpu_params;
    params.leaf = leaf.get();
    if (c.wide) params.phi = nullptr, params.wide_phi = wide.get();
    const ff::RoutingCpu<T>& cpu = ff::baseline::routing_cpu<T>();
    const int64_t groups = (c.samples + cpu.lanes - 1) / cpu.lanes;
    check("route", ff::route_cuda(params, nullptr));
    cpu.route(cpu_params, 0, groups);
    compare("route", expected, leaf);

    Array<T> grad_leaf(c.samples * leaves, T(0), c.offset);
    for (int64_t i = 0; i < grad_leaf.size(); ++i) grad_leaf[i] = random() - T(0.5);
    Array<T> grad(c.samples * c.features, T(7)), cpu_grad(c.samples * c.features, T(8));
    Array<int32_t> order(nodes, -1), start(c.features + 1, -1);
    Array<T> scratch(c.blocks * 2 * nodes, T(NAN));
    const ff::RouteBackwardParams<T> b{params,
                                       grad_leaf.get(),
                                       grad.get(),
                                       order.get(),
                                       start.get(),
                                       c.blocks ? scratch.get() : nullptr,
                                       c.blocks ? c.blocks : c.samples};
    check("route backward", ff::route_backward_cuda(b, nullptr));
    cpu.route_backward({cpu_params, grad_leaf.get(), cpu_grad.get(), nullptr, nullptr, nullptr, 0}, 0, groups);
    compare("route gradient", cpu_grad, grad);
  }

 private:
  const Case& c;
  unsigned state = 12345;

  T random() {
    state = state * 1664525u + 1013904223u;
    return T(state >> 8) / T(1 << 24);
  }

  void fail(const char* what, const char* how, double by, double of) {
    std::printf("%s [N %d, F %d, T %d, D %d, log %d, %zu bytes]: %s %g of %g\n", what, int(c.samples), int(c.features),
                int(c.trees), c.depth, c.log, sizeof(T), how, by, of);
    failed = true;
  }

  void check(const char* what, int code) {
    if (code) fail(what, "error", code, 0);
  }

  void compare(const char* what, Array<T>& expected, Array<T>& got) {
    double largest = 0, difference = 0;
    for (int64_t i = 0; i < expected.size(); ++i) {
      const double e = expected[i], g = got[i];
      if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
      if (e == g || (e != e && g != g)) continue;
      difference = std::isfinite(e) && std::isfinite(g) ? std::max(difference, std::abs(e - g)) : INFINITY;
    }
    if (difference > (sizeof(T) == 4 ? 1e-5 : 1e-12) * largest) fail(what, "off by", difference, largest);
  }
};

// A node out of range poisons the leaves below it, and reads nothing.
void out_of_range() {
  float units[2] = {0, 0}, leaf[4] = {7, 7, 7, 7};
  const int64_t phi[3] = {0, int64_t(1) << 32, 1};
  const int code = ff::route_cuda<float>({1, 2, 1, 2, false, units, nullptr, phi, nullptr, 1.f, leaf}, nullptr);
  if (code == 0 && leaf[0] != leaf[0] && leaf[1] != leaf[1] && leaf[2] == 0.25f && leaf[3] == 0.25f) return;
  std::printf("phi out of range: %d, %g %g %g %g\n", code, leaf[0], leaf[1], leaf[2], leaf[3]);
  failed = true;
}

}  // namespace

int main() {
  // Ones; a tree of depth 1, its leaves in pairs; a block of samples and a rest; more subtrees than a block; units that
  // all nodes share; nodes in scratch, one block for all samples.
  for (const bool log : {false, true})
    for (const Case& c : {Case{1, 1, 1, 1, log, false, false, 0, 0}, Case{5, 3, 7, 1, log, true, true, 0, 1},
                          Case{4, 5, 3, 2, log, false, true, 0, 0}, Case{9, 13, 5, 6, log, true, false, 0, 1},
                          Case{3, 2, 2, 10, log, true, false, 0, 0}, Case{2, 7, 1, 11, log, false, false, 0, 3},
                          Case{3, 9, 3, 7, log, true, false, 1, 0}})
      Run<float> run(c);
  for (const Case& c : {Case{5, 3, 7, 1, false, true, true, 0, 1}, Case{9, 13, 5, 6, true, true, false, 0, 1},
                        Case{3, 2, 2, 9, false, false, false, 0, 0}, Case{3, 9, 3, 5, false, true, false, 2, 1}})
    Run<double> run(c);
  // More units than the shared memory of a forward block holds.
  for (const bool log : {false, true}) Run<double> run(Case{3, 769, 2, 3, log, true, true, 0, 0});
  // And than that of a backward block. Not under TSan, whose shadow of a block for each of 12,401 units takes 4 GB:
  // past the limit a block reads its units from global memory, which nobody writes; all that it shares, the nodes in
  // shared memory or scratch, the cases above share in the same way.
  if (!ff::shim::kTsan)
    for (const bool log : {false, true}) {
      Run<float> forward(Case{3, 1601, 2, 3, log, true, true, 0, 0});
      Run<float> backward(Case{3, 12400, 2, 3, log, false, true, 2, 1});
    }
  out_of_range();
  if (!failed) std::printf("OK\n");
  return failed;
}
