// Runs every CUDA launcher of the heatmap losses under the host shim and compares it with the baseline CPU kernels, on
// small odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits with 1.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "heatmap_loss/heatmap_loss.h"
#include "heatmap_loss/heatmap_loss_math.h"
#include "host_shim/test/array.h"

namespace {

using torch::headeronly::Half;
using Values = std::vector<double>;

bool failed = false;

enum class Layout { planar, padded, transposed, pixel_major };

struct Case {
  int images, landmarks, height, width;
  Layout layout;
  int offset;  // elements by which the maps are off their alignment

  int rows() const { return images * landmarks; }
  int pixels() const { return height * width; }
};

void fail(const Case& c, size_t bytes, const char* what, const char* how, double difference, double largest) {
  std::printf("%s [%d images, %d landmarks, %d x %d, layout %d, offset %d, %zu bytes]: %s %g of %g\n", what, c.images,
              c.landmarks, c.height, c.width, int(c.layout), c.offset, bytes, how, difference, largest);
  failed = true;
}

// Maps of the case's layout. What lies between them holds the fill.
template <class T>
class MapArray {
 public:
  MapArray(const Case& c, T fill)
      : c_(c), fill_(fill), maps_(strides(c)), memory_(last(c.images - 1, c.rows() - 1) + 1, fill, c.offset) {
    maps_.data = memory_.get();
  }
  const ff::Maps<T>& maps() const { return maps_; }
  ff::Maps<const T> readable() const {
    return {maps_.data, maps_.image, maps_.landmark, maps_.row, maps_.column, maps_.pixel_major};
  }
  T& at(int r, int y, int x) {
    return maps_
        .data[r / c_.landmarks * maps_.image + r % c_.landmarks * maps_.landmark + y * maps_.row + x * maps_.column];
  }
  // In the order [B, P, H, W]. Puts the fill there: whether it is everywhere then is told by `clean`.
  Values take() {
    Values taken;
    for (int i = 0; i < c_.rows() * c_.pixels(); ++i) {
      T& value = at(i / c_.pixels(), i % c_.pixels() / c_.width, i % c_.width);
      taken.push_back(double(value));
      value = fill_;
    }
    return taken;
  }
  bool clean() {
    return std::all_of(memory_.get(), memory_.get() + memory_.size(), [&](T value) { return value == fill_; });
  }

 private:
  static ff::Maps<T> strides(const Case& c) {
    const int64_t p = c.landmarks, h = c.height, w = c.width, map = h * (w + 8) + 8;
    ff::Maps<T> m{nullptr, p * h * w, h * w, w, 1, false};
    if (c.layout == Layout::padded) m = {nullptr, p * map + 16, map, w + 8, 1, false};
    if (c.layout == Layout::transposed) m = {nullptr, p * h * w, h * w, 1, h, false};
    if (c.layout == Layout::pixel_major) m = {nullptr, h * w * p, 1, w * p, p, p > 1 && w > 1};
    return m;
  }
  int64_t last(int image, int row) const {
    return image * maps_.image + row % c_.landmarks * maps_.landmark + (c_.height - 1) * maps_.row +
           (c_.width - 1) * maps_.column;
  }

  const Case& c_;
  T fill_;
  ff::Maps<T> maps_;
  Array<T> memory_;
};

template <class T>
struct Run {
  using C = ff::Compute<T>;
  static constexpr C kNan = C(NAN);

  const Case& c;
  unsigned state = 12345;
  MapArray<T> pred{c, T(kNan)};
  Array<C> points{2 * c.rows(), C(0)}, sigmas{c.rows(), C(0)}, weight{c.rows(), C(1)}, grad_loss{c.rows(), C(0)};
  ff::HeatmapLossSize size{c.images, c.landmarks, c.height, c.width, 0};
  ff::HeatmapLossSize cpu_size = size;
  int64_t tasks = c.rows();
  const ff::HeatmapLossCpu<T>& cpu = ff::baseline::heatmap_loss_cpu<T>();

  explicit Run(const Case& given) : c(given) {
    if (pred.maps().column != 1 && c.width > 1) {  // maps that the CPU stages
      cpu_size.groups = (c.landmarks + ff::kLossGroup - 1) / ff::kLossGroup;
      tasks = c.images * cpu_size.groups;
    }
    for (int r = 0; r < c.rows(); ++r) {
      points[2 * r] = random() * C(c.width + 2) - C(1.5);
      points[2 * r + 1] = random() * C(c.height + 2) - C(1.5);
      sigmas[r] = C(0.6) + C(2) * random();
      grad_loss[r] = random() - C(0.4);
      weight[r] = C(0.2) + random();
      for (int i = 0; i < c.pixels(); ++i)
        pred.at(r, i / c.width, i % c.width) = T(r % 3 ? C(2) * random() - C(1) : C(9) * random());
    }
    if (c.rows() > 5) {  // hidden with all that it has; without a place; far away; of no width; with a NaN
      weight[0] = C(0);
      points[0] = sigmas[0] = kNan;
      pred.at(0, c.height / 2, 0) = T(kNan);
      points[3] = C(INFINITY);
      points[4] = C(-3e4);
      sigmas[3] = C(0);
      pred.at(4, c.height / 3, c.width / 2) = T(kNan);
    }
    mse(C(1), C(1), C(0), true);
    mse(C(5), C(1), C(0.01), true);
    mse(C(1), C(0), C(0.3), false);
    wing(C(2.1), C(14), C(1), C(0.5), 1, C(0.2), true);
    wing(C(2.1), C(14), C(1), C(0.5), -1, C(0.2), false);
    wing(C(2.5), C(3), C(0.2), C(1), 9, C(1e-3), true);
    if (c.rows() > 5) {  // masked wholly or in part, the same everywhere, infinite
      for (int i = 0; i < c.pixels(); ++i) {
        T& masked = pred.at(1, i / c.width, i % c.width);
        masked = T(C(-INFINITY));
        if (i % c.width % 3 != 1) pred.at(2, i / c.width, i % c.width) = T(C(-INFINITY));
        pred.at(5, i / c.width, i % c.width) = T(C(0.5));
      }
      points[2] = points[3] = C(1);
      pred.at(3, c.height / 2, c.width / 2) = T(C(INFINITY));
      sigmas[3] = C(1);
    }
    softmax(ff::SoftmaxLoss::kl, true);
    softmax(ff::SoftmaxLoss::js, true);
    softmax(ff::SoftmaxLoss::variance, true);
    softmax(ff::SoftmaxLoss::kl, false);
  }

  C random() {
    state = state * 1664525u + 1013904223u;
    return C(state >> 8) / C(1 << 24);
  }

  void check(const char* what, int code) {
    if (code) fail(c, sizeof(T), what, "error", code, 0);
  }

  // `bytes`: of the type in which both were rounded.
  void compare(const char* what, const Values& expected, const Values& got, size_t bytes = sizeof(C)) {
    double largest = 0, difference = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double e = expected[i], g = got[i];
      if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
      if (e == g || (e != e && g != g)) continue;
      difference = std::isfinite(e) && std::isfinite(g) ? std::max(difference, std::abs(e - g)) : INFINITY;
    }
    const double rounding = bytes == 2 ? 1e-3 : 0, working = sizeof(C) == 4 ? 1e-5 : 1e-12;
    if (difference > (rounding + working) * largest) fail(c, sizeof(T), what, "off by", difference, largest);
  }

  // `tensors`: sigmas and weight.
  ff::HeatmapLossParams<T> params(bool tensors, C* loss) {
    return {
        size, pred.readable(), points.get(), tensors ? sigmas.get() : nullptr, C(1.3), tensors ? weight.get() : nullptr,
        loss};
  }

  template <template <class> class Params, class Launcher, class BackwardLauncher, class Kernel, class BackwardKernel>
  void run(const char* what, Params<T> p, Launcher cuda, BackwardLauncher cuda_backward, Kernel kernel,
           BackwardKernel kernel_backward, Array<C>* statistics = nullptr, Array<C>* cpu_statistics = nullptr) {
    Array<C> loss(c.rows(), C(7)), expected(c.rows(), C(8));
    Params<T> cpu_p = p;
    p.maps.loss = loss.get();
    cpu_p.maps.loss = expected.get();
    cpu_p.maps.size = cpu_size;
    if constexpr (requires { p.statistics; }) {
      p.statistics = statistics->get();
      cpu_p.statistics = cpu_statistics->get();
    }
    check(what, cuda(p, nullptr));
    kernel(cpu_p, 0, tasks);
    compare(what, expected.values(), loss.values());
    if (statistics) {  // of a map without a loss they may be any; its gradient is NaN all the same
      const int64_t each = statistics->size() / c.rows();
      for (int64_t i = 0; i < statistics->size(); ++i)
        if (std::isnan(expected[i / each])) (*statistics)[i] = (*cpu_statistics)[i] = kNan;
      compare(what, cpu_statistics->values(), statistics->values());
    }
    MapArray<T> grad(c, T(7)), cpu_grad(c, T(8));
    check(what, cuda_backward({p, grad_loss.get(), grad.maps()}, nullptr));
    kernel_backward({cpu_p, grad_loss.get(), cpu_grad.maps()}, 0, tasks);
    compare(what, cpu_grad.take(), grad.take(), sizeof(T));
    if (!grad.clean()) fail(c, sizeof(T), what, "wrote between the maps", 0, 0);
  }

  void mse(C foreground, C background, C threshold, bool tensors) {
    run<ff::HeatmapMseParams>("mse", {params(tensors, nullptr), foreground, background, threshold},
                              ff::heatmap_mse_cuda<T>, ff::heatmap_mse_backward_cuda<T>, cpu.mse, cpu.mse_backward);
  }

  void wing(C alpha, C omega, C epsilon, C theta, int radius, C threshold, bool tensors) {
    run<ff::AdaptiveWingParams>(
        "adaptive wing", {params(tensors, nullptr), alpha, omega, epsilon, theta, radius, threshold},
        ff::adaptive_wing_cuda<T>, ff::adaptive_wing_backward_cuda<T>, cpu.adaptive_wing, cpu.adaptive_wing_backward);
  }

  void softmax(ff::SoftmaxLoss kind, bool tensors) {
    const int each = ff::statistics_of(kind);
    Array<C> statistics(each * c.rows(), C(7)), cpu_statistics(each * c.rows(), C(8));
    ff::SoftmaxLossParams<T> p{params(tensors, nullptr), int(kind), nullptr};
    if (kind == ff::SoftmaxLoss::variance) p.maps.points = nullptr;
    constexpr const char* kNames[] = {"kl", "js", "variance"};
    run<ff::SoftmaxLossParams>(kNames[int(kind)], p, ff::softmax_loss_cuda<T>, ff::softmax_loss_backward_cuda<T>,
                               cpu.softmax, cpu.softmax_backward, &statistics, &cpu_statistics);
  }
};

// No maps, more cells than a block has room for, and the most that it has.
template <class T>
void limits() {
  using C = ff::Compute<T>;
  const auto launch = [](int images, int width, T* maps, C* loss) {
    const C points[2] = {C(3), C(0)}, grad_loss[1] = {C(1)};
    const ff::HeatmapLossParams<T> p{
        {images, 1, 1, width, 0}, {maps, width, width, width, 1, false}, points, nullptr, C(1), nullptr, loss};
    const ff::HeatmapMseParams<T> mse{p, C(1), C(1), C(0)};
    const int code = ff::heatmap_mse_cuda(mse, nullptr);
    return code ? code
                : ff::heatmap_mse_backward_cuda<T>({mse, grad_loss, {maps, width, width, width, 1, false}}, nullptr);
  };
  constexpr int kMost = ff::kMostLossCells - 1;
  Array<T> maps(kMost, T(0));
  Array<C> loss(1, C(7));
  const int none = launch(0, 1, nullptr, nullptr);
  const int most = launch(1, kMost, maps.get(), loss.get());
  const int more = launch(1, kMost + 1, nullptr, nullptr);
  const double expected = 1.7724 / kMost;  // sum exp(-d^2) = sqrt(pi), cut off at 3
  if (none == 0 && most == 0 && more != 0 && std::abs(loss[0] / expected - 1) < 1e-3 && maps[3] < T(0)) return;
  std::printf("mse of no maps, the most and too many cells of %zu bytes: %d, %d, %d\n", sizeof(T), none, most, more);
  failed = true;
}

}  // namespace

int main() {
  using enum Layout;
  // One pixel; single rows and columns; small maps as packs of 16 bytes, off their alignment, of padded rows, and of
  // odd rows and other strides; the same for maps of a large block, with a tail of the unrolled loads; a map of the
  // largest block, whose gradient takes two; landmarks innermost.
  for (const Case& c :
       {Case{1, 1, 1, 1, planar, 0}, Case{2, 2, 1, 32, padded, 0}, Case{2, 2, 8, 1, transposed, 0},
        Case{2, 4, 7, 9, planar, 0}, Case{3, 2, 6, 8, planar, 0}, Case{3, 2, 6, 8, planar, 1},
        Case{2, 3, 5, 12, padded, 0}, Case{2, 3, 5, 7, transposed, 0}, Case{1, 2, 33, 35, planar, 0},
        Case{1, 6, 35, 36, planar, 0}, Case{1, 2, 64, 84, padded, 0}, Case{1, 1, 182, 184, planar, 0},
        Case{2, 3, 5, 9, pixel_major, 0}, Case{2, 35, 3, 9, pixel_major, 0}, Case{1, 67, 2, 3, pixel_major, 1},
        Case{1, 5, 1, 1, pixel_major, 0}, Case{1, 3, 37, 31, pixel_major, 0}})
    Run<float> run(c);
  for (const Case& c : {Case{2, 3, 7, 9, planar, 0}, Case{1, 2, 33, 36, padded, 0}, Case{1, 33, 3, 5, pixel_major, 0}})
    Run<double> run(c);
  for (const Case& c :
       {Case{2, 3, 7, 9, planar, 0}, Case{2, 3, 6, 8, planar, 0}, Case{1, 3, 6, 8, planar, 3},
        Case{1, 2, 33, 40, padded, 0}, Case{1, 2, 33, 35, transposed, 0}, Case{2, 33, 3, 5, pixel_major, 0}})
    Run<Half> run(c);
  limits<float>();
  limits<double>();
  if (!failed) std::printf("OK\n");
  return failed;
}
