// Bindings of the pool room: checks, allocation, dispatch.
#include "pool/pool.h"

#include "common/dispatch.h"
#include "common/isa.h"
#include "pool/pool_math.h"

namespace ff {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

template <class T>
const PoolCpu<T>& cpu() {
#if defined(FF_X86)
  return choose(baseline::pool_cpu<T>(), avx2::pool_cpu<T>(), avx512::pool_cpu<T>());
#else
  return baseline::pool_cpu<T>();
#endif
}

// The windowed rows, made contiguous, and the order of their positions; owns what PoolRows points to.
template <class T>
struct Rows {
  Tensor points, weight, order;
  PoolRows<T> at;

  Rows(const char* op, const Tensor& like, const Tensor& points_, const OptionalTensor& weight_, int64_t images,
       int64_t landmarks, int64_t height, int64_t width, int64_t leaves, double sigma, int64_t radius)
      : points(contiguous(points_)) {
    FF_CHECK(points.dim() == 3 && points.size(0) == images && points.size(1) == landmarks && points.size(2) == 2, op,
             ": points must be [", images, ", ", landmarks, ", 2], got ", shape(points));
    check_like(op, "points", points, like);
    FF_CHECK(sigma > 0 && radius >= 0 && radius < (1 << 24), op, ": sigma must be positive and radius in [0, 2^24)");
    FF_CHECK(height > 0 && width > 0 && leaves > 0 && height < (1 << 24) && width < (1 << 24), op,
             ": the canvas and the leaves must not be empty");
    at.points = points.const_data_ptr<T>();
    at.weight = nullptr;
    if (weight_) {
      weight = contiguous(*weight_);
      FF_CHECK(weight.dim() == 2 && weight.size(0) == images && weight.size(1) == landmarks, op, ": weight must be [",
               images, ", ", landmarks, "], got ", shape(weight));
      check_like(op, "weight", weight, like);
      at.weight = weight.const_data_ptr<T>();
    }
    at.rows = images * landmarks;
    FF_CHECK(at.rows < (int64_t(1) << 31), op, ": at most 2^31 rows");
    at.height = int(height);
    at.width = int(width);
    at.leaves = leaves;
    at.radius = int(radius);
    at.inverse_variance = T(1 / (sigma * sigma));
    at.order = nullptr;
    sort(op);
  }

 private:
  void sort(const char* op) {
    if (!at.rows) return;
    order = new_empty(points, {at.rows}, ScalarType::Int);
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(points)) {
      DeviceScope scope(points);
      Tensor keys = new_empty(points, {at.rows}, ScalarType::Int);
      check_cuda(op, pool_position_keys_cuda<T>(at, keys.mutable_data_ptr<int32_t>(), scope.stream()));
      // aten::argsort.stable(Tensor self, *, bool stable, int dim=-1, bool descending=False) -> Tensor
      StableIValue stack[] = {torch::stable::detail::from(keys), torch::stable::detail::from(true),
                              torch::stable::detail::from(int64_t(-1)), torch::stable::detail::from(false)};
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::argsort", "stable", stack, TORCH_ABI_VERSION));
      const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
      torch::stable::copy_(order, sorted);
      at.order = order.const_data_ptr<int32_t>();
      return;
    }
#endif
    (void)op;
    // Counting sort: stable, so that the order, and with it every sum, is the same in each run.
    const int shift = position_shift(at.width, at.height);
    std::vector<uint32_t> keys(at.rows);
    uint32_t most = 0;
    for (int64_t r = 0; r < at.rows; ++r) {
      keys[r] = position_key(at.points[2 * r], at.points[2 * r + 1], at.width, at.height, shift);
      most = std::max(most, keys[r]);
    }
    std::vector<int64_t> starts(most + 2, 0);
    for (uint32_t key : keys) ++starts[key + 1];
    for (size_t k = 1; k < starts.size(); ++k) starts[k] += starts[k - 1];
    int32_t* out = order.mutable_data_ptr<int32_t>();
    for (int64_t r = 0; r < at.rows; ++r) out[starts[keys[r]]++] = int32_t(r);
    at.order = out;
  }
};

struct Canvas {
  int64_t height, width, leaves;
};

Canvas check_pool(const char* op, const Tensor& pool) {
  FF_CHECK(pool.dim() == 3, op, ": pool must be [H, W, N], got ", shape(pool));
  return {pool.size(0), pool.size(1), pool.size(2)};
}

void check_prob(const char* op, const Tensor& prob, int64_t leaves) {
  FF_CHECK(prob.dim() == 3 && (leaves < 0 || prob.size(2) == leaves), op, ": prob must be [B, P, ", leaves, "], got ",
           shape(prob));
}

std::tuple<Tensor, Tensor> pool_kl_loss(const Tensor& prob_, const Tensor& pool_, const Tensor& points,
                                        const OptionalTensor& weight, double sigma, int64_t radius, double eps,
                                        bool need_grad) {
  const char* op = "pool_kl_loss";
  const Canvas canvas = check_pool(op, pool_);
  check_prob(op, prob_, canvas.leaves);
  check_like(op, "pool", pool_, prob_);
  const Tensor prob = contiguous(prob_), pool = contiguous(pool_);
  return with_type(op, prob, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const int64_t images = prob.size(0), landmarks = prob.size(1);
    const Rows<T> rows(op, prob, points, weight, images, landmarks, canvas.height, canvas.width, canvas.leaves, sigma,
                       radius);
    Tensor loss = new_empty(prob, {images, landmarks});
    Tensor grad = new_output(prob, {images, landmarks, need_grad ? canvas.leaves : 0});
    const PoolKlLossParams<T> params{
        rows.at, prob.const_data_ptr<T>(),   pool.const_data_ptr<T>(),
        T(eps),  loss.mutable_data_ptr<T>(), need_grad ? grad.mutable_data_ptr<T>() : nullptr};
    if (!rows.at.rows) return {loss, grad};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(prob)) {
      DeviceScope scope(prob);
      check_cuda(op, pool_kl_loss_cuda(params, scope.stream()));
      return {loss, grad};
    }
#endif
    const auto kernel = cpu<T>().kl_loss;
    parallel_chunks(rows.at.rows, 32, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
    return {loss, grad};
  });
}

// Runs a scatter on either device. The rows of each canvas tile are listed first, in order of position.
template <class T>
void run_scatter(const char* op, const PoolScatterParams<T>& params, const Tensor& out) {
#ifdef FF_HAS_CUDA_LAUNCHERS
  if (on_cuda(out)) {
    DeviceScope scope(out);
    return check_cuda(op, pool_scatter_cuda(params, scope.stream()));
  }
#endif
  (void)op;
  (void)out;
  const PoolRows<T>& at = params.at;
  const int tiles_x = (at.width + kPoolTile - 1) / kPoolTile, tiles_y = (at.height + kPoolTile - 1) / kPoolTile;
  const int64_t tiles = int64_t(tiles_x) * tiles_y;
  std::vector<int64_t> starts(tiles + 1, 0);
  std::vector<int32_t> list;
  const auto for_each_tile = [&](auto f) {
    for (int64_t i = 0; i < at.rows; ++i) {
      const int32_t r = at.order[i];
      if (at.weight && at.weight[r] == T(0)) continue;
      const Span x = window_span(at.points[2 * r], at.radius, at.width);
      const Span y = window_span(at.points[2 * r + 1], at.radius, at.height);
      if (x.begin >= x.end || y.begin >= y.end) continue;
      for (int ty = y.begin / kPoolTile; ty <= (y.end - 1) / kPoolTile; ++ty)
        for (int tx = x.begin / kPoolTile; tx <= (x.end - 1) / kPoolTile; ++tx) f(int64_t(ty) * tiles_x + tx, r);
    }
  };
  for_each_tile([&](int64_t tile, int32_t) { ++starts[tile + 1]; });
  for (int64_t t = 0; t < tiles; ++t) starts[t + 1] += starts[t];
  list.resize(starts[tiles]);
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for_each_tile([&](int64_t tile, int32_t r) { list[next[tile]++] = r; });
  const auto kernel = cpu<T>().scatter;
  parallel_chunks(tiles, 1,
                  [&](int64_t begin, int64_t end) { kernel(params, list.data(), starts.data(), begin, end); });
}

enum class Scatter { statistics, gradient, cross };

void scatter(const char* op, Scatter kind, const Tensor& prob_, const OptionalTensor& pool_, const Tensor& points,
             const OptionalTensor& weight, int64_t height, int64_t width, double sigma, int64_t radius, double eps,
             Tensor& out, bool accumulate) {
  check_prob(op, prob_, out.size(2));
  const Tensor prob = contiguous(prob_);
  Tensor pool;
  if (pool_) {
    check_like(op, "pool", *pool_, prob);
    pool = contiguous(*pool_);
  }
  with_type(op, prob, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(op, prob, points, weight, prob.size(0), prob.size(1), height, width, out.size(2), sigma, radius);
    run_scatter(op,
                PoolScatterParams<T>{rows.at, prob.const_data_ptr<T>(), pool_ ? pool.const_data_ptr<T>() : nullptr,
                                     T(eps), kind == Scatter::statistics, accumulate,
                                     kind == Scatter::gradient ? T(-1) : T(1), out.mutable_data_ptr<T>()},
                out);
  });
}

Tensor pool_kl_statistics(const Tensor& prob, const Tensor& pool, const Tensor& points, const OptionalTensor& weight,
                          double sigma, int64_t radius, double eps) {
  const char* op = "pool_kl_statistics";
  const Canvas c = check_pool(op, pool);
  Tensor out = new_output(pool, {c.height, c.width, c.leaves});
  scatter(op, Scatter::statistics, prob, pool, points, weight, c.height, c.width, sigma, radius, eps, out, false);
  return out;
}

void pool_kl_statistics_(const Tensor& prob, const Tensor& pool, const Tensor& points, const OptionalTensor& weight,
                         double sigma, int64_t radius, double eps, Tensor out) {
  const char* op = "pool_kl_statistics";
  const Canvas c = check_pool(op, pool);
  FF_CHECK(out.dim() == 3 && out.size(0) == c.height && out.size(1) == c.width && out.size(2) == c.leaves, op,
           ": out must be ", shape(pool), ", got ", shape(out));
  FF_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  check_like(op, "out", out, prob);
  scatter(op, Scatter::statistics, prob, pool, points, weight, c.height, c.width, sigma, radius, eps, out, true);
}

Tensor pool_kl_loss_backward_pool(const Tensor& prob, const Tensor& pool, const Tensor& points,
                                  const OptionalTensor& weight, double sigma, int64_t radius, double eps) {
  const char* op = "pool_kl_loss_backward_pool";
  const Canvas c = check_pool(op, pool);
  Tensor out = new_output(pool, {c.height, c.width, c.leaves});
  scatter(op, Scatter::gradient, prob, pool, points, weight, c.height, c.width, sigma, radius, eps, out, false);
  return out;
}

Tensor pool_l2_cross(const Tensor& prob, const Tensor& points, const OptionalTensor& weight, int64_t height,
                     int64_t width, double sigma, int64_t radius) {
  check_prob("pool_l2_cross", prob, -1);
  Tensor out = new_output(prob, {height, width, prob.size(2)});
  scatter("pool_l2_cross", Scatter::cross, prob, std::nullopt, points, weight, height, width, sigma, radius, 0, out,
          false);
  return out;
}

std::tuple<Tensor, Tensor> pool_l2_target(const Tensor& pool_, const Tensor& points, const OptionalTensor& weight,
                                          double sigma, int64_t radius) {
  const char* op = "pool_l2_target";
  const Canvas c = check_pool(op, pool_);
  FF_CHECK(points.dim() == 3, op, ": points must be [B, P, 2], got ", shape(points));
  const Tensor pool = contiguous(pool_);
  return with_type(op, pool, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const int64_t images = points.size(0), landmarks = points.size(1);
    const Rows<T> rows(op, pool, points, weight, images, landmarks, c.height, c.width, c.leaves, sigma, radius);
    Tensor target = new_output(pool, {images, landmarks, c.leaves}), square = new_empty(pool, {images, landmarks});
    const PoolGatherParams<T> params{rows.at, pool.const_data_ptr<T>(), target.mutable_data_ptr<T>(),
                                     square.mutable_data_ptr<T>()};
    if (!rows.at.rows) return {target, square};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(pool)) {
      DeviceScope scope(pool);
      check_cuda(op, pool_gather_cuda(params, scope.stream()));
      return {target, square};
    }
#endif
    const auto kernel = cpu<T>().gather;
    parallel_chunks(rows.at.rows, 16, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
    return {target, square};
  });
}

std::tuple<Tensor, Tensor> pool_peak(const Tensor& prob_, const Tensor& pool_, int64_t refine) {
  const char* op = "pool_peak";
  const Canvas c = check_pool(op, pool_);
  check_prob(op, prob_, c.leaves);
  check_like(op, "pool", pool_, prob_);
  FF_CHECK(c.height > 0 && c.width > 0 && c.leaves > 0, op, ": the canvas and the leaves must not be empty");
  const Tensor prob = contiguous(prob_), pool = contiguous(pool_);
  return with_type(op, prob, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const int64_t images = prob.size(0), landmarks = prob.size(1);
    Tensor points = new_empty(prob, {images, landmarks, 2}), score = new_empty(prob, {images, landmarks});
    const PoolPeakParams<T> params{prob.const_data_ptr<T>(),
                                   pool.const_data_ptr<T>(),
                                   images * landmarks,
                                   int(c.height),
                                   int(c.width),
                                   c.leaves,
                                   int(refine),
                                   points.mutable_data_ptr<T>(),
                                   score.mutable_data_ptr<T>()};
    if (!params.rows) return {points, score};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(prob)) {
      DeviceScope scope(prob);
      check_cuda(op, pool_peak_cuda(params, scope.stream()));
      return {points, score};
    }
#endif
    const auto kernel = cpu<T>().peak;
    parallel_chunks(params.rows, 32, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
    return {points, score};
  });
}

}  // namespace

FF_SCHEMAS(m) {
  m.def(
      "pool_kl_loss(Tensor prob, Tensor pool, Tensor points, Tensor? weight, float sigma, int radius, float eps, "
      "bool need_grad) -> (Tensor, Tensor)");
  m.def(
      "pool_kl_loss_backward_pool(Tensor prob, Tensor pool, Tensor points, Tensor? weight, float sigma, int radius, "
      "float eps) -> Tensor");
  m.def(
      "pool_kl_statistics(Tensor prob, Tensor pool, Tensor points, Tensor? weight, float sigma, int radius, float eps) "
      "-> Tensor");
  m.def(
      "pool_kl_statistics_(Tensor prob, Tensor pool, Tensor points, Tensor? weight, float sigma, int radius, float "
      "eps, "
      "Tensor(a!) out) -> ()");
  m.def(
      "pool_l2_cross(Tensor prob, Tensor points, Tensor? weight, int height, int width, float sigma, int radius) -> "
      "Tensor");
  m.def("pool_l2_target(Tensor pool, Tensor points, Tensor? weight, float sigma, int radius) -> (Tensor, Tensor)");
  m.def("pool_peak(Tensor prob, Tensor pool, int refine) -> (Tensor, Tensor)");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("pool_kl_loss", TORCH_BOX(&pool_kl_loss));
  m.impl("pool_kl_loss_backward_pool", TORCH_BOX(&pool_kl_loss_backward_pool));
  m.impl("pool_kl_statistics", TORCH_BOX(&pool_kl_statistics));
  m.impl("pool_kl_statistics_", TORCH_BOX(&pool_kl_statistics_));
  m.impl("pool_l2_cross", TORCH_BOX(&pool_l2_cross));
  m.impl("pool_l2_target", TORCH_BOX(&pool_l2_target));
  m.impl("pool_peak", TORCH_BOX(&pool_peak));
}

}  // namespace ff
