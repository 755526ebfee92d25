// Runs every CUDA launcher of the gaussian room under the host shim and compares it with the formulas in double, on
// small odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "gaussian/gaussian.h"
#include "host_shim/test/array.h"

namespace {

using Values = std::vector<double>;

bool failed = false;

struct Case {
  int samples, leaves, dims;
  bool broken;  // a sample that holds a NaN, a row without weight, and a leaf whose diagonal is not above 0
};

template <class T>
struct Run {
  const Case& c;
  const int64_t N = c.samples, K = c.leaves, D = c.dims;
  unsigned state = 12345;
  Array<T> x{N * D, T(0)}, mean{K * D, T(0)}, lower{K * D * D, T(NAN)}, log_weight{N * K, T(0)}, grad{N * K, T(0)};
  Array<T> whiten{K * D * D, T(7)}, log_norm{K, T(7)};
  ff::GaussianSize size{N, K, c.dims};
  ff::GaussianLeaves<T> leaves{mean.get(), lower.get(), whiten.get(), log_norm.get()};
  Values w = Values(K * D * D), norm = Values(K), z = Values(N * K * D), density = Values(N * K);

  explicit Run(const Case& given) : c(given) {
    for (int64_t i = 0; i < N * D; ++i) x[i] = T(4 * uniform() - 2);
    for (int64_t i = 0; i < K * D; ++i) mean[i] = T(4 * uniform() - 2);
    for (int64_t i = 0; i < N * K; ++i) grad[i] = T(uniform() - 0.5);
    for (int64_t i = 0; i < N * K; ++i) log_weight[i] = T(i % 7 == 3 ? -INFINITY : -3 * uniform());
    for (int64_t k = 0; k < K; ++k)  // above the diagonal stays NaN: not to be read
      for (int64_t i = 0; i < D; ++i)
        for (int64_t j = 0; j <= i; ++j)
          lower[(k * D + i) * D + j] = T(i == j ? 0.5 + uniform() : (uniform() - 0.5) / std::sqrt(double(D)));
    if (c.broken && N > 3) {
      x[1 * D + D / 2] = T(NAN);
      for (int64_t k = 0; k < K; ++k) log_weight[2 * K + k] = T(-INFINITY);
    }
    prepare();
    log_prob();
    backward(true, !c.broken);
    if (!c.broken) backward(false, true);
    mixture();
    if (c.broken && K > 1 && D > 1) {
      lower[(1 * D + D - 1) * D + D - 1] = T(-1);
      prepare();
      log_prob();
    }
  }

  double uniform() {
    state = state * 1664525u + 1013904223u;
    return double(state >> 8) / double(1 << 24);
  }

  void check(const char* what, int code) {
    if (!code) return;
    std::printf("%s: error %d\n", what, code);
    failed = true;
  }

  void compare(const char* what, const Values& expected, Array<T>& got) {
    double largest = 0, difference = 0;
    bool odd = false;
    for (int64_t i = 0; i < got.size(); ++i) {
      const double e = expected[i], g = double(got[i]);
      if (e - e == 0) largest = std::max(largest, std::abs(e));
      if (e == g || (e != e && g != g)) continue;
      odd = odd || !(e - e == 0) || !(g - g == 0);
      difference = std::max(difference, std::abs(e - g));
    }
    const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
    if (!odd && difference <= tolerance * largest) return;
    std::printf("%s [%d samples, %d leaves, %d dimensions, broken %d, %zu bytes]: off by %g of %g%s\n", what, c.samples,
                c.leaves, c.dims, int(c.broken), sizeof(T), difference, largest, odd ? ", or not finite" : "");
    failed = true;
  }

  void prepare() {
    std::fill(w.begin(), w.end(), 0.0);
    for (int64_t k = 0; k < K; ++k) {
      const T* l = lower.get() + k * D * D;
      double* inverse = w.data() + k * D * D;
      norm[k] = -0.5 * double(D) * std::log(8 * std::atan(1.0));
      for (int64_t i = 0; i < D; ++i) {
        const double diagonal = double(l[i * D + i]);
        norm[k] -= diagonal > 0 ? std::log(diagonal) : double(NAN);
        for (int64_t j = 0; j <= i; ++j) {
          double sum = i == j;
          for (int64_t a = j; a < i; ++a) sum -= double(l[i * D + a]) * inverse[a * D + j];
          inverse[i * D + j] = sum / diagonal;
        }
      }
    }
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        double squares = 0;
        for (int64_t i = 0; i < D; ++i) {
          double sum = 0;
          for (int64_t j = 0; j <= i; ++j)
            sum += w[(k * D + i) * D + j] * (double(x[n * D + j]) - double(mean[k * D + j]));
          z[(n * K + k) * D + i] = sum;
          squares += sum * sum;
        }
        density[n * K + k] = norm[k] - squares / 2;
      }
    check("whiten", ff::gaussian_whiten_cuda(size, leaves, nullptr));
    compare("whiten", w, whiten);
    compare("log_norm", norm, log_norm);
  }

  void log_prob() {
    Array<T> out(N * K, T(7));
    check("log_prob", ff::gaussian_log_prob_cuda<T>({size, leaves, x.get(), out.get()}, nullptr));
    compare("log_prob", density, out);
  }

  void backward(bool needs_x, bool needs_leaves) {
    Array<T> grad_x(needs_x ? N * D : 0, T(7));
    Array<T> grad_mean(needs_leaves ? K * D : 0, T(7)), grad_lower(needs_leaves ? K * D * D : 0, T(7));
    Array<T> scratch(ff::gaussian_backward_scratch_cuda(size), T(NAN));
    check("backward",
          ff::gaussian_backward_cuda<T>(
              {size, leaves, x.get(), grad.get(), needs_x ? grad_x.get() : nullptr,
               needs_leaves ? grad_mean.get() : nullptr, needs_leaves ? grad_lower.get() : nullptr, scratch.get()},
              nullptr));
    Values of_x(N * D, 0.0), of_mean(K * D, 0.0), of_lower(K * D * D, 0.0), back(D);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const double g = double(grad[n * K + k]);
        const double* whitened = z.data() + (n * K + k) * D;
        for (int64_t j = 0; j < D; ++j) {
          back[j] = 0;
          for (int64_t i = j; i < D; ++i) back[j] += w[(k * D + i) * D + j] * whitened[i];
          of_x[n * D + j] -= g * back[j];
          of_mean[k * D + j] += g * back[j];
        }
        for (int64_t i = 0; i < D; ++i) {
          for (int64_t j = 0; j <= i; ++j) of_lower[(k * D + i) * D + j] += g * back[i] * whitened[j];
          of_lower[(k * D + i) * D + i] -= g / double(lower[(k * D + i) * D + i]);
        }
      }
    compare("grad_x", of_x, grad_x);
    compare("grad_mean", of_mean, grad_mean);
    compare("grad_scale_tril", of_lower, grad_lower);
  }

  void mixture() {
    Values expected(N), posterior(N * K, 0.0);
    for (int64_t n = 0; n < N; ++n) {
      double largest = -INFINITY, total = 0;
      for (int64_t k = 0; k < K; ++k) largest = std::max(largest, double(log_weight[n * K + k]) + density[n * K + k]);
      const double shift = largest == -INFINITY ? 0 : largest;
      for (int64_t k = 0; k < K; ++k) {
        posterior[n * K + k] = std::exp(double(log_weight[n * K + k]) + density[n * K + k] - shift);
        total += posterior[n * K + k];
      }
      expected[n] = shift + std::log(total);
      for (int64_t k = 0; total != 0 && k < K; ++k) posterior[n * K + k] /= total;
    }
    Array<T> alone(N, T(7)), both(N, T(7)), got(N * K, T(7));
    check("mixture",
          ff::gaussian_mixture_cuda<T>({size, leaves, x.get(), log_weight.get(), alone.get(), nullptr}, nullptr));
    compare("mixture without posterior", expected, alone);
    check("mixture",
          ff::gaussian_mixture_cuda<T>({size, leaves, x.get(), log_weight.get(), both.get(), got.get()}, nullptr));
    compare("mixture", expected, both);
    compare("posterior", posterior, got);

    Array<T> count(K, T(7)), first(K * D, T(7)), second(K * D * D, T(7));
    Array<T> scratch(ff::gaussian_statistics_scratch_cuda(size), T(NAN));
    check("statistics", ff::gaussian_statistics_cuda<T>({size, leaves, x.get(), both.get(), got.get(), count.get(),
                                                         first.get(), second.get(), scratch.get()},
                                                        nullptr));
    Values of_count(K, 0.0), of_first(K * D, 0.0), of_second(K * D * D, 0.0);
    for (int64_t n = 0; n < N; ++n) {
      if (expected[n] - expected[n] != 0) continue;
      for (int64_t k = 0; k < K; ++k) {
        const double r = posterior[n * K + k];
        of_count[k] += r;
        for (int64_t i = 0; i < D; ++i) {
          const double d = double(x[n * D + i]) - double(mean[k * D + i]);
          of_first[k * D + i] += r * d;
          for (int64_t j = 0; j < D; ++j)
            of_second[(k * D + i) * D + j] += r * d * (double(x[n * D + j]) - double(mean[k * D + j]));
        }
      }
    }
    compare("count", of_count, count);
    compare("first", of_first, first);
    compare("second", of_second, second);
  }
};

}  // namespace

int main() {
  // D at and around the bounds of each family; leaves in one chunk, in several, in none; samples in one part and in
  // several, of one chunk and of more.
  for (const Case& c : {Case{5, 3, 1, true}, Case{261, 35, 2, true}, Case{300, 9, 3, false}, Case{7, 90, 4, false},
                        Case{150, 11, 5, true}, Case{131, 3, 16, false}, Case{261, 9, 20, true}, Case{3, 2, 32, false},
                        Case{131, 9, 33, true}, Case{9, 2, 136, false}, Case{2, 1, 256, false}, Case{0, 3, 4, false},
                        Case{0, 2, 40, false}, Case{3, 0, 4, false}, Case{3, 0, 40, false}, Case{1, 1, 1, false}})
    Run<float> run(c);
  for (const Case& c : {Case{5, 3, 1, true}, Case{140, 10, 3, false}, Case{261, 9, 20, true}, Case{7, 20, 8, false},
                        Case{35, 9, 33, true}, Case{5, 2, 136, false}, Case{2, 1, 256, false}, Case{3, 0, 2, false}})
    Run<double> run(c);
  if (!failed) std::printf("OK\n");
  return failed;
}
