// Runs every CUDA launcher of the categorical room under the host shim and compares it with the baseline CPU kernels,
// on small odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits
// with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "categorical/categorical.h"
#include "host_shim/test/array.h"

namespace {

bool failed = false;

struct Case {
  int64_t samples, trees, leaves, classes;
  bool broken;  // a sample with a NaN weight, another with an infinite target
};

template <class T>
struct Run {
  const Case& c;
  unsigned state = 12345;
  Array<T> weight{c.samples * c.trees * c.leaves, T(0)}, leaves{c.trees * c.leaves * c.classes, T(0)};
  Array<T> target{c.samples * c.classes, T(0)}, grad{c.samples * c.trees * c.classes, T(0)};
  Array<T> factor{c.samples * c.trees, T(0)};
  Array<uint8_t> sound{c.samples, uint8_t(1)};
  const ff::CategoricalCpu<T>& cpu = ff::baseline::categorical_cpu<T>();
  ff::CategoricalMixture<T> mixture;

  explicit Run(const Case& given) : c(given) {
    for (Array<T>* a : {&weight, &leaves, &target, &grad, &factor})
      for (int64_t i = 0; i < a->size(); ++i) (*a)[i] = uniform();
    if (c.broken) {
      weight[2 * c.trees * c.leaves] = T(NAN);
      target[5 * c.classes + c.classes - 1] = T(INFINITY);
    }
    mixture = {weight.get(), leaves.get(), c.samples, c.trees, c.leaves, c.classes, T(0.25), T(0.3)};
    Array<uint8_t> expected(c.samples, uint8_t(7));
    check("sound", ff::categorical_sound_cuda(target.get(), c.samples, c.classes, sound.get(), nullptr));
    cpu.sound(target.get(), c.classes, expected.get(), 0, c.samples);
    compare("sound", expected, sound);

    const T none = -std::numeric_limits<T>::infinity();
    const ff::CategoricalNumerator<T> upstream{ff::CategoricalKind::log_prob, grad.get(), c.trees * c.classes,
                                               c.classes, none};
    rows("log_prob", {}, true, false, false, T(1));
    rows("log_prob backward", upstream, false, false, true, T(1));
    sums("log_prob leaves", upstream, false, false, false, T(1));
    for (ff::CategoricalKind kind : {ff::CategoricalKind::kl, ff::CategoricalKind::l2})
      for (T threshold : {none, T(0.3)}) {
        const ff::CategoricalNumerator<T> y{kind, target.get(), c.classes, 0, threshold};
        rows("loss", y, false, true, false, T(-1));
        rows("loss and gradient", y, false, true, true, T(-1));
        sums("loss leaves", y, true, false, false, T(-1));
        sums("statistics", y, false, true, false, T(1));
        sums("statistics into out", y, false, true, true, T(1));
      }
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

  template <class U>
  void compare(const char* what, Array<U>& expected, Array<U>& got) {
    double largest = 0, difference = 0;
    bool odd = false;
    for (int64_t i = 0; i < expected.size(); ++i) {
      const double e = double(expected[i]), g = double(got[i]);
      if (e - e == 0) largest = std::max(largest, std::abs(e));
      if (e == g || (e != e && g != g)) continue;
      odd = odd || !(e - e == 0) || !(g - g == 0);
      difference = std::max(difference, std::abs(e - g));
    }
    if (!odd && difference <= (sizeof(T) == 4 ? 2e-5 : 1e-12) * largest) return;
    std::printf("%s [N %d T %d L %d C %d, %zu bytes]: off by %g of %g\n", what, int(c.samples), int(c.trees),
                int(c.leaves), int(c.classes), sizeof(T), difference, largest);
    failed = true;
  }

  void rows(const char* what, const ff::CategoricalNumerator<T>& numerator, bool log_prob, bool loss, bool gradient,
            T sign) {
    const int64_t logs = log_prob ? c.samples * c.trees * c.classes : 0, losses = loss ? c.samples * c.trees : 0;
    const int64_t weights = gradient ? weight.size() : 0;
    Array<T> out(logs, T(7)), out_loss(losses, T(7)), out_grad(weights, T(7));
    Array<T> expected(logs, T(8)), expected_loss(losses, T(8)), expected_grad(weights, T(8));
    const auto params = [&](Array<T>& a, Array<T>& b, Array<T>& d, const T* transposed) {
      return ff::CategoricalRowsParams<T>{mixture,
                                          numerator,
                                          transposed,
                                          log_prob ? a.get() : nullptr,
                                          loss ? b.get() : nullptr,
                                          gradient ? d.get() : nullptr,
                                          sign};
    };
    check(what, ff::categorical_rows_cuda(params(out, out_loss, out_grad, nullptr), nullptr));
    Array<T> transposed(c.trees * c.classes * ff::categorical_padded(c.leaves, cpu.lanes), T(9));
    cpu.transpose(mixture, transposed.get(), 0, c.trees * cpu.tiles(c.classes));
    const int64_t range = 2 * ff::kCategoricalBlock;
    cpu.rows(params(expected, expected_loss, expected_grad, transposed.get()), range, 0,
             c.trees * ((c.samples + range - 1) / range));
    compare(what, expected, out);
    compare(what, expected_loss, out_loss);
    compare(what, expected_grad, out_grad);
  }

  void sums(const char* what, const ff::CategoricalNumerator<T>& numerator, bool by_factor, bool times_leaves,
            bool accumulate, T sign) {
    const int64_t parts = ff::categorical_parts_cuda(c.samples, c.trees, c.leaves, c.classes);
    Array<T> partial(parts * leaves.size(), T(6)), out(leaves.size(), T(0.5)), expected(leaves.size(), T(0.5));
    ff::CategoricalLeavesParams<T> params{mixture,     numerator,    by_factor ? factor.get() : nullptr,
                                          sound.get(), times_leaves, accumulate,
                                          sign,        parts,        partial.get(),
                                          out.get()};
    check(what, ff::categorical_leaves_cuda(params, nullptr));
    Array<T> cpu_partial(2 * leaves.size(), T(6));
    params.parts = 2;
    params.partial = cpu_partial.get();
    params.out = expected.get();
    cpu.leaves(params, 0, 2 * c.trees * cpu.tiles(c.classes));
    cpu.sum(params, 0, c.trees * c.leaves);
    compare(what, expected, out);
  }
};

}  // namespace

int main() {
  // One of everything; a tile and its neighbours along each axis; several tiles of all three, with broken samples.
  for (const Case& c : {Case{1, 1, 1, 1, false}, Case{64, 1, 64, 64, false}, Case{67, 2, 65, 3, true},
                        Case{7, 3, 5, 131, true}, Case{130, 1, 17, 65, true}})
    Run<float> run(c);
  for (const Case& c : {Case{65, 2, 9, 7, true}, Case{3, 1, 66, 65, false}}) Run<double> run(c);
  if (!failed) std::printf("OK\n");
  return failed;
}
