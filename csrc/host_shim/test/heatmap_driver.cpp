// Runs every CUDA launcher of the heatmap room under the host shim and compares it with the baseline CPU kernels, on
// small odd cases in buffers of exactly their size. For the sanitizers: prints "OK", or what differs and exits with 1.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "heatmap/heatmap.h"
#include "heatmap/heatmap_math.h"
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

// Maps of one layout. What lies between them holds the fill.
template <class T>
class MapArray {
 public:
  MapArray(const Case& c, Layout layout, T fill)
      : c_(c), fill_(fill), maps_(strides(c, layout)), memory_(last(c.images - 1, c.rows() - 1) + 1, fill, c.offset) {
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
  static ff::Maps<T> strides(const Case& c, Layout layout) {
    const int64_t p = c.landmarks, h = c.height, w = c.width, map = h * (w + 3) + 1;
    ff::Maps<T> m{nullptr, p * h * w, h * w, w, 1, false};
    if (layout == Layout::padded) m = {nullptr, p * map + 2, map, w + 3, 1, false};
    if (layout == Layout::transposed) m = {nullptr, p * h * w, h * w, 1, h, false};
    if (layout == Layout::pixel_major) m = {nullptr, h * w * p, 1, w * p, p, p > 1 && w > 1};
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
  struct SoftArgmax {
    C beta;
    bool tensor;  // beta_value, and the gradient of it
    int window;
    bool debias;
  };
  struct Render {
    bool tensor;  // sigmas
    double truncate;
    bool normalized;
  };

  const Case& c;
  unsigned state = 12345;
  // The CPU kernels walk maps of planar rows or with landmarks innermost.
  Layout cpu_layout = c.layout == Layout::transposed && c.width > 1 ? Layout::planar : c.layout;
  MapArray<T> maps{c, c.layout, T(C(NAN))}, cpu_maps{c, cpu_layout, T(C(NAN))};
  ff::HeatmapSize size{c.images, c.landmarks, c.height, c.width, std::max<int64_t>(1, c.landmarks / 32)};
  int64_t tasks = cpu_maps.maps().pixel_major ? c.images * size.chunks : c.rows();
  const ff::HeatmapCpu<T>& cpu = ff::baseline::heatmap_cpu<T>();

  explicit Run(const Case& given) : c(given) {
    // Some maps hold a NaN, are masked wholly or in part, hold +inf, the same value everywhere or their highest often.
    for (int r = 0; r < c.rows(); ++r)
      for (int y = 0; y < c.height; ++y)
        for (int x = 0; x < c.width; ++x) {
          const C uniform = C(6) * random();
          const C value = r % 8 == 2                 ? -C(INFINITY)
                          : r % 8 == 3 && x % 3 != 1 ? -C(INFINITY)
                          : r % 8 == 5               ? C(0.5)
                          : r % 8 == 0               ? std::floor(uniform)
                                                     : uniform;
          set(r, y, x, value);
        }
    if (c.rows() > 4) {
      set(1, c.height / 2, c.width / 2, C(NAN));
      set(4, c.height / 3, c.width / 2, C(INFINITY));
    }
    for (int refine = 0; refine < 5; ++refine) peak(refine, 11);
    for (int kernel : {1, 9, 33}) peak(4, kernel);
    for (const SoftArgmax& s :
         {SoftArgmax{C(1.5), false, -1, false}, SoftArgmax{C(0.8), true, -1, true},
          SoftArgmax{C(-0.7), true, -1, false}, SoftArgmax{C(1), true, 2, true}, SoftArgmax{C(1.1), false, 50, false}})
      soft_argmax(s);
    if (c.rows() > 10) return;  // a block a map: enough of them were seen
    for (const Render& o : {Render{false, -1, true}, Render{true, 1.5, false}, Render{true, 3, true}}) render(o);
  }

  C random() {
    state = state * 1664525u + 1013904223u;
    return C(state >> 8) / C(1 << 24);
  }

  void set(int r, int y, int x, C value) { maps.at(r, y, x) = cpu_maps.at(r, y, x) = T(value); }

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
    const double rounding = bytes == 2 ? 1e-3 : 0, working = sizeof(C) == 4 ? 2e-5 : 1e-12;
    if (difference > rounding * largest + working * std::max(largest, 1.0))
      fail(c, sizeof(T), what, "off by", difference, largest);
  }

  void compare_maps(const char* what, MapArray<T>& expected, MapArray<T>& got) {
    compare(what, expected.take(), got.take(), sizeof(T));
    if (!got.clean()) fail(c, sizeof(T), what, "wrote between the maps", 0, 0);
  }

  void peak(int refine, int kernel) {
    Array<C> found(2 * c.rows(), C(7)), expected(2 * c.rows(), C(8)), score(c.rows(), C(7)), cpu_score(c.rows(), C(8));
    ff::PeakParams<T> p{size, maps.readable(), refine, kernel, {}, found.get(), score.get()};
    ff::blur_taps(kernel, p.taps);
    check("peak", ff::peak_cuda(p, nullptr));
    p.maps = cpu_maps.readable();
    p.points = expected.get();
    p.score = cpu_score.get();
    cpu.peak(p, 0, tasks);
    compare("peak", expected.values(), found.values());
    compare("peak score", cpu_score.values(), score.values());
  }

  void soft_argmax(const SoftArgmax& s) {
    const int rows = c.rows(), centres = s.window < 0 ? 0 : rows, factors = s.tensor ? rows : 0;
    Array<C> factor(1, C(1.25)), points(2 * rows, C(7)), cpu_points(2 * rows, C(8));
    Array<C> normalizer(2 * rows, C(7)), cpu_normalizer(2 * rows, C(8));
    Array<int32_t> centre(centres, 7), cpu_centre(centres, 8);
    const ff::SoftArgmaxParams<T> forward{size,         maps.readable(),  s.tensor ? factor.get() : nullptr,
                                          s.beta,       s.window,         s.debias,
                                          points.get(), normalizer.get(), centres ? centre.get() : nullptr};
    ff::SoftArgmaxParams<T> cpu_forward = forward;
    cpu_forward.maps = cpu_maps.readable();
    cpu_forward.points = cpu_points.get();
    cpu_forward.normalizer = cpu_normalizer.get();
    cpu_forward.peak = centres ? cpu_centre.get() : nullptr;
    check("soft_argmax", ff::soft_argmax_cuda(forward, nullptr));
    cpu.soft_argmax(cpu_forward, 0, tasks);
    compare("soft_argmax", cpu_points.values(), points.values());
    // Of a map without a result the centre and the normalizer may be any; the gradient is NaN all the same.
    for (int r = 0; r < rows; ++r) {
      if (cpu_points[2 * r] == cpu_points[2 * r]) continue;
      if (centres) cpu_centre[r] = centre[r];
      for (int i : {2 * r, 2 * r + 1}) normalizer[i] = cpu_normalizer[i] = C(NAN);
    }
    compare("soft_argmax centre", cpu_centre.values(), centre.values());
    compare("soft_argmax normalizer", cpu_normalizer.values(), normalizer.values());

    Array<C> grad_points(2 * rows, C(0)), grad_factor(factors, C(7)), cpu_grad_factor(factors, C(8));
    for (int i = 0; i < 2 * rows; ++i) grad_points[i] = random() - C(0.5);
    MapArray<T> grad(c, c.layout, T(7)), cpu_grad(c, cpu_layout, T(8));
    check("soft_argmax backward",
          ff::soft_argmax_backward_cuda<T>(
              {forward, grad_points.get(), grad.maps(), factors ? grad_factor.get() : nullptr}, nullptr));
    cpu.soft_argmax_backward(
        {cpu_forward, grad_points.get(), cpu_grad.maps(), factors ? cpu_grad_factor.get() : nullptr}, 0, tasks);
    compare_maps("soft_argmax gradient", cpu_grad, grad);
    compare("soft_argmax gradient of beta", cpu_grad_factor.values(), grad_factor.values());
  }

  void render(const Render& o) {
    const int rows = c.rows();
    Array<T> points(2 * rows, T(0)), grad_points(2 * rows, T(7)), cpu_grad_points(2 * rows, T(8));
    Array<C> sigmas(rows, C(0)), grad_sigmas(rows, C(7)), cpu_grad_sigmas(rows, C(8));
    for (int r = 0; r < rows; ++r) {
      points[2 * r] = T(random() * C(c.width + 2) - C(1.5));
      points[2 * r + 1] = T(random() * C(c.height + 2) - C(1.5));
      sigmas[r] = C(0.6) + C(2) * random();
    }
    if (rows > 5) {
      points[2] = T(C(NAN));
      points[5] = T(C(INFINITY));
      points[6] = T(C(-3e4));
      sigmas[4] = C(0);
      sigmas[5] = C(NAN);
    }
    MapArray<T> grad(c, c.layout, T(C(NAN)));
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < c.pixels(); ++i) grad.at(r, i / c.width, i % c.width) = T(random() - C(0.3));
    if (rows > 1) grad.at(rows - 1, c.height / 2, c.width / 2) = T(C(NAN));
    MapArray<T> out(c, Layout::planar, T(7)), expected(c, Layout::planar, T(8));
    ff::RenderParams<T> forward{size,         points.get(), o.tensor ? sigmas.get() : nullptr, C(1.3), o.truncate,
                                o.normalized, nullptr};
    ff::RenderBackwardParams<T> backward{forward, grad.readable(), grad_points.get(), grad_sigmas.get()};
    forward.maps = out.maps().data;
    check("render", ff::render_cuda(forward, nullptr));
    forward.maps = expected.maps().data;
    cpu.render(forward, 0, rows);
    compare_maps("render", expected, out);

    check("render backward", ff::render_backward_cuda(backward, nullptr));
    backward.grad_points = cpu_grad_points.get();
    backward.grad_sigmas = cpu_grad_sigmas.get();
    cpu.render_backward(backward, 0, rows);
    compare("render gradient", cpu_grad_points.values(), grad_points.values(), sizeof(T));
    compare("render gradient of sigma", cpu_grad_sigmas.values(), grad_sigmas.values());
  }
};

// No maps, more cells than a block has room for, and the most that it has.
template <class T>
void limits() {
  const auto render = [](int images, int width, T* maps, T* grad_points, ff::Compute<T>* grad_sigma) {
    const T points[2] = {T(3), T(0)};
    const ff::RenderParams<T> p{{images, 1, 1, width, 1}, points, nullptr, 1, -1, false, maps};
    const ff::Maps<const T> grad{maps, width, width, width, 1, false};
    const int code = ff::render_cuda(p, nullptr);
    return code ? code : ff::render_backward_cuda<T>({p, grad, grad_points, grad_sigma}, nullptr);
  };
  constexpr int kMost = ff::kMostRenderCells - 1;
  Array<T> maps(kMost, T(7)), grad(2, T(7));
  Array<ff::Compute<T>> grad_sigma(1, 7);
  const int none = render(0, 1, nullptr, nullptr, nullptr);
  const int most = render(1, kMost, maps.get(), grad.get(), grad_sigma.get());
  const int more = render(1, kMost + 1, nullptr, nullptr, nullptr);
  if (none == 0 && most == 0 && maps[3] == T(1) && maps[kMost - 1] == T(0) && more != 0) return;
  std::printf("render of no maps, the most and too many cells of %zu bytes: %d, %d, %d\n", sizeof(T), none, most, more);
  failed = true;
}

}  // namespace

int main() {
  using enum Layout;
  // One pixel; single rows and columns; small maps as packs of 16 bytes, with a tail of the unrolled loads, off their
  // alignment and of other strides; the same for large maps; landmarks innermost: fewer than a vector, a warp and a
  // rest, two chunks, maps of one pixel and large ones.
  for (const Case& c :
       {Case{1, 1, 1, 1, planar, 0}, Case{2, 2, 1, 32, padded, 0}, Case{2, 2, 8, 1, transposed, 0},
        Case{2, 4, 7, 9, planar, 0}, Case{3, 2, 6, 10, planar, 0}, Case{1, 2, 24, 23, planar, 0},
        Case{3, 2, 6, 8, planar, 1}, Case{2, 3, 5, 11, padded, 1}, Case{2, 3, 5, 7, transposed, 0},
        Case{1, 2, 33, 35, planar, 0}, Case{1, 5, 33, 36, planar, 0}, Case{1, 2, 64, 68, planar, 0},
        Case{1, 2, 33, 35, padded, 0}, Case{2, 3, 5, 9, pixel_major, 0}, Case{2, 35, 3, 9, pixel_major, 0},
        Case{1, 67, 2, 3, pixel_major, 1}, Case{1, 5, 1, 1, pixel_major, 0}, Case{1, 2, 37, 31, pixel_major, 0}})
    Run<float> run(c);
  for (const Case& c :
       {Case{2, 3, 7, 9, planar, 0}, Case{2, 3, 6, 11, planar, 0}, Case{1, 3, 6, 8, planar, 1},
        Case{1, 2, 33, 36, planar, 0}, Case{1, 2, 33, 35, padded, 0}, Case{1, 33, 3, 5, pixel_major, 0}})
    Run<double> run(c);
  for (const Case& c :
       {Case{2, 3, 7, 9, planar, 0}, Case{2, 3, 6, 8, planar, 0}, Case{1, 3, 6, 8, planar, 3},
        Case{1, 2, 33, 40, planar, 0}, Case{1, 2, 33, 35, transposed, 0}, Case{2, 33, 3, 5, pixel_major, 0}})
    Run<Half> run(c);
  limits<float>();
  limits<double>();
  if (!failed) std::printf("OK\n");
  return failed;
}
