// The gaussian room's operators: checks, allocation, dispatch.
#include "gaussian/gaussian.h"

#include <algorithm>
#include <cmath>

#include "common/dispatch.h"
#include "common/isa.h"

namespace ff {
namespace {

using torch::stable::new_empty;

// The arguments every operator has, contiguous.
struct Given {
  Tensor x, mean, scale_tril;
  GaussianSize size;

  Given(const char* op, const Tensor& x_in, const Tensor& mean_in, const Tensor& scale_tril_in)
      : x(torch::stable::contiguous(x_in)),
        mean(torch::stable::contiguous(mean_in)),
        scale_tril(torch::stable::contiguous(scale_tril_in)) {
    FF_CHECK(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= kMostDims, op,
             ": x must be [N, D] with D from 1 to 256, got ", shape(x));
    const int64_t dims = x.size(1);
    FF_CHECK(mean.dim() == 2 && mean.size(1) == dims, op, ": mean must be [K, ", dims, "], got ", shape(mean));
    const int64_t leaves = mean.size(0);
    FF_CHECK(scale_tril.dim() == 3 && scale_tril.size(0) == leaves && scale_tril.size(1) == dims &&
                 scale_tril.size(2) == dims,
             op, ": scale_tril must be [", leaves, ", ", dims, ", ", dims, "], got ", shape(scale_tril));
    check_like(op, "mean", mean, x);
    check_like(op, "scale_tril", scale_tril, x);
    size = {x.size(0), leaves, int(dims)};
  }
  Tensor per_leaf(const char* op, const char* name, const Tensor& t) const {
    FF_CHECK(t.dim() == 2 && t.size(0) == size.samples && t.size(1) == size.leaves, op, ": ", name, " must be [",
             size.samples, ", ", size.leaves, "], got ", shape(t));
    check_like(op, name, t, x);
    return torch::stable::contiguous(t);
  }
  bool empty() const { return size.samples == 0 || size.leaves == 0; }
};

#ifndef FF_HOST_SHIM
template <class T>
const GaussianCpu<T>& table() {
#ifdef FF_X86
  return choose(baseline::gaussian_cpu<T>(), avx2::gaussian_cpu<T>(), avx512::gaussian_cpu<T>());
#else
  return baseline::gaussian_cpu<T>();
#endif
}

int64_t panels_of(const GaussianSize& s) { return (s.samples + kPanel - 1) / kPanel; }

// Items in chunks of about `flops` work; one thread for little work.
template <class F>
void parallel_work(int64_t items, double flops_an_item, const F& f) {
  const int64_t chunk = std::max<int64_t>(1, int64_t(2e5 / std::max(flops_an_item, 1.0)));
  if (items <= chunk)
    f(int64_t(0), items);
  else
    parallel_chunks(items, chunk, f);
}
#endif

// The leaves prepared, and on the CPU, where densities or moments read them, the samples in panels.
template <class T>
struct Prepared {
  Tensor whiten, log_norm, lanes, panels;
  GaussianLeaves<T> leaves;
  const T* x;  // as densities read it

  Prepared(const char* op, const Given& g, bool gradients = false, bool moments = false)
      : whiten(new_output(g.x, {g.size.leaves, on_cuda(g.x) ? int64_t(g.size.dims) * g.size.dims
                                                            : gaussian_whiten_size(g.size.dims, gradients)})),
        log_norm(new_empty(g.x, {g.size.leaves})),
        lanes(g.x),
        panels(g.x),
        leaves{g.mean.const_data_ptr<T>(), g.scale_tril.const_data_ptr<T>(), whiten.mutable_data_ptr<T>(),
               log_norm.mutable_data_ptr<T>()},
        x(g.x.const_data_ptr<T>()) {
    (void)gradients, (void)moments;
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(g.x)) {
      const DeviceScope scope(g.x);
      check_cuda(op, gaussian_whiten_cuda(g.size, leaves, scope.stream()));
      return;
    }
#endif
#ifndef FF_HOST_SHIM
    (void)op;
    const double D = g.size.dims;
    const bool few = g.size.dims <= kFewDims;
    if (few) {
      lanes = new_empty(g.x,
                        {(g.size.leaves + kLeafGroup - 1) / kLeafGroup, gaussian_lane_fields(g.size.dims), kLeafGroup});
      torch::stable::zero_(lanes);
      leaves.lanes = lanes.mutable_data_ptr<T>();
    }
    parallel_work(g.size.leaves, D * D * D / 3,
                  [&](int64_t b, int64_t e) { table<T>().whiten(g.size, leaves, gradients, b, e); });
    if (few && !moments) return;
    panels = new_empty(g.x, {panels_of(g.size), g.size.dims, kPanel});
    T* to = panels.mutable_data_ptr<T>();
    parallel_work(panels_of(g.size), 4 * D * kPanel,
                  [&](int64_t b, int64_t e) { table<T>().pack(g.size, g.x.const_data_ptr<T>(), to, b, e); });
    if (!few) x = to;
#endif
  }
};

#ifndef FF_HOST_SHIM
template <class T>
void log_prob_cpu(const GaussianLogProbParams<T>& p) {
  const double D = p.size.dims, flops = (D * D + 4 * D + 8) * kPanel;
  const int64_t groups = (p.size.leaves + kLeafGroup - 1) / kLeafGroup;
  if (p.size.dims <= kFewDims)
    return parallel_work(panels_of(p.size), flops * double(p.size.leaves),
                         [&](int64_t b, int64_t e) { table<T>().log_prob(p, b, e); });
  parallel_work(panels_of(p.size) * groups, flops * kLeafGroup,
                [&](int64_t b, int64_t e) { table<T>().log_prob(p, b, e); });
}

// Densities and the log-sum-exp over them, panel by panel while its rows are in the cache; few panels, one after the
// other, since leaves then share the threads. done(begin, end): what is left to do to these samples.
template <class T, class Done>
void mixture_cpu(const GaussianLogProbParams<T>& densities, const GaussianMixtureParams<T>& p, bool roots,
                 const Done& done) {
  const double D = p.size.dims;
  const int64_t panels = panels_of(p.size), samples = p.size.samples;
  const int64_t tasks = p.size.dims <= kFewDims ? 1 : (p.size.leaves + kLeafGroup - 1) / kLeafGroup;
  const bool together = panels >= 16;
  if (!together) log_prob_cpu(densities);
  parallel_work(panels, ((D * D + 4 * D + 8) * together + 40) * double(p.size.leaves) * kPanel,
                [&](int64_t first, int64_t last) {
                  for (int64_t panel = first; panel < last; ++panel) {
                    const int64_t b = panel * kPanel, e = std::min(b + kPanel, samples);
                    if (together) table<T>().log_prob(densities, panel * tasks, (panel + 1) * tasks);
                    table<T>().mixture(p, roots, b, e);
                    done(b, e);
                  }
                });
}

// In pieces that stay in the cache. `rows` [N, K] or null.
template <class T>
void mixture_cpu(const Given& g, const Prepared<T>& prepared, const T* log_weight, T* log_prob, T* rows) {
  const int64_t K = g.size.leaves, piece = std::max<int64_t>(1024, (1 << 20) / K / kPanel * kPanel);
  Tensor scratch = new_empty(g.x, {rows ? 0 : std::min(piece, g.size.samples), K});
  for (int64_t first = 0; first < g.size.samples; first += piece) {
    GaussianSize size = g.size;
    size.samples = std::min(piece, g.size.samples - first);
    T* to = rows ? rows + first * K : scratch.mutable_data_ptr<T>();
    mixture_cpu<T>({size, prepared.leaves, prepared.x + first * size.dims, to},
                   {size, prepared.leaves, nullptr, log_weight + first * K, log_prob + first, to}, false,
                   [](int64_t, int64_t) {});
  }
}
#endif

Tensor log_prob(const Tensor& x, const Tensor& mean, const Tensor& scale_tril) {
  const char* op = "gaussian_log_prob";
  const Given g(op, x, mean, scale_tril);
  Tensor out = new_output(g.x, {g.size.samples, g.size.leaves});
  if (g.empty()) return out;
  with_type(op, g.x, [&](auto type) {
    using T = decltype(type);
    const Prepared<T> prepared(op, g);
    const GaussianLogProbParams<T> p{g.size, prepared.leaves, prepared.x, out.mutable_data_ptr<T>()};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(g.x)) {
      const DeviceScope scope(g.x);
      return check_cuda(op, gaussian_log_prob_cuda(p, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    log_prob_cpu(p);
#endif
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> log_prob_backward(const Tensor& grad_in, const Tensor& x, const Tensor& mean,
                                                     const Tensor& scale_tril, bool needs_x, bool needs_mean,
                                                     bool needs_scale_tril) {
  const char* op = "gaussian_log_prob backward";
  const Given g(op, x, mean, scale_tril);
  const Tensor grad = g.per_leaf(op, "grad", grad_in);
  const GaussianSize& s = g.size;
  const auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    Tensor t = new_empty(g.x, needed ? std::vector<int64_t>(sizes) : std::vector<int64_t>{0});
    if (needed && g.empty()) torch::stable::zero_(t);
    return t;
  };
  Tensor grad_x = output(needs_x, {s.samples, s.dims}), grad_mean = output(needs_mean, {s.leaves, s.dims});
  Tensor grad_scale_tril = output(needs_scale_tril, {s.leaves, s.dims, s.dims});
  if (g.empty()) return {grad_x, grad_mean, grad_scale_tril};
  with_type(op, g.x, [&](auto type) {
    using T = decltype(type);
    const Prepared<T> prepared(op, g, true);
    GaussianBackwardParams<T> p{s,
                                prepared.leaves,
                                prepared.x,
                                grad.const_data_ptr<T>(),
                                needs_x ? grad_x.mutable_data_ptr<T>() : nullptr,
                                needs_mean ? grad_mean.mutable_data_ptr<T>() : nullptr,
                                needs_scale_tril ? grad_scale_tril.mutable_data_ptr<T>() : nullptr,
                                nullptr};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(g.x)) {
      const DeviceScope scope(g.x);
      const Tensor scratch = new_empty(g.x, {gaussian_backward_scratch_cuda(s)});
      p.scratch = scratch.mutable_data_ptr<T>();
      return check_cuda(op, gaussian_backward_cuda(p, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    const GaussianGrid grid(s);
    const bool of_leaves = needs_mean || needs_scale_tril;
    const int64_t of_x = needs_x ? grid.leaf_ranges * panels_of(s) * kPanel * s.dims : 0;
    const Tensor scratch =
        new_output(g.x, {of_x + (of_leaves ? grid.sample_ranges * s.leaves * gaussian_moment_size(s) : 0)});
    p.scratch = scratch.mutable_data_ptr<T>();
    const double D = s.dims;
    parallel_chunks(grid.tasks(), 1, [&](int64_t b, int64_t e) { table<T>().backward(p, b, e); });
    if (needs_x)
      parallel_work(panels_of(s), kPanel * D * double(grid.leaf_ranges + 4),
                    [&](int64_t b, int64_t e) { table<T>().backward_x(p, b, e); });
    if (of_leaves)
      parallel_work(s.leaves, D * D * D / 3 + D * D * double(grid.sample_ranges),
                    [&](int64_t b, int64_t e) { table<T>().backward_leaves(p, b, e); });
#endif
  });
  return {grad_x, grad_mean, grad_scale_tril};
}

std::tuple<Tensor, Tensor> mixture(const Tensor& x, const Tensor& log_weight_in, const Tensor& mean,
                                   const Tensor& scale_tril, bool needs_posterior) {
  const char* op = "gaussian_mixture";
  const Given g(op, x, mean, scale_tril);
  const Tensor log_weight = g.per_leaf(op, "log_weight", log_weight_in);
  Tensor log_prob = new_empty(g.x, {g.size.samples});
  Tensor posterior = new_output(g.x, {needs_posterior ? g.size.samples : 0, g.size.leaves});
  FF_CHECK(g.size.leaves > 0, op, ": mean must have a leaf, got ", shape(mean));
  if (g.empty()) return {log_prob, posterior};
  with_type(op, g.x, [&](auto type) {
    using T = decltype(type);
    const Prepared<T> prepared(op, g);
    T* rows = needs_posterior ? posterior.mutable_data_ptr<T>() : nullptr;
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(g.x)) {
      const DeviceScope scope(g.x);
      // With room for every leaf's density the leaves of a sample are shared by blocks.
      const bool room = !rows && g.size.samples * g.size.leaves <= int64_t(1) << 24;
      const Tensor densities = new_empty(g.x, {room ? g.size.samples : 0, g.size.leaves});
      if (room) rows = densities.mutable_data_ptr<T>();
      const GaussianMixtureParams<T> p{
          g.size, prepared.leaves, prepared.x, log_weight.const_data_ptr<T>(), log_prob.mutable_data_ptr<T>(), rows};
      return check_cuda(op, gaussian_mixture_cuda(p, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    mixture_cpu<T>(g, prepared, log_weight.const_data_ptr<T>(), log_prob.mutable_data_ptr<T>(), rows);
#endif
  });
  return {log_prob, posterior};
}

#ifdef FF_HAS_CUDA_LAUNCHERS
// t [N, K] times factor [N], in place.
void scale_rows(const Tensor& t, const Tensor& factor) {
  // aten::mul_.Tensor(Tensor(a!) self, Tensor other) -> Tensor(a!)
  StableIValue stack[] = {torch::stable::detail::from(t),
                          torch::stable::detail::from(torch::stable::unsqueeze(factor, 1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that was returned
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Tensor& x, const Tensor& log_weight_in, const Tensor& mean,
                                                      const Tensor& scale_tril, const OptionalTensor& weight_in) {
  const char* op = "gaussian_statistics";
  const Given g(op, x, mean, scale_tril);
  const Tensor log_weight = g.per_leaf(op, "log_weight", log_weight_in);
  const GaussianSize& s = g.size;
  FF_CHECK(s.leaves > 0, op, ": mean must have a leaf, got ", shape(mean));
  Tensor count = new_empty(g.x, {s.leaves}), first = new_empty(g.x, {s.leaves, s.dims});
  Tensor second = new_empty(g.x, {s.leaves, s.dims, s.dims}), log_prob = new_empty(g.x, {s.samples}), weight;
  if (weight_in) {
    FF_CHECK(weight_in->dim() == 1 && weight_in->size(0) == s.samples, op, ": weight must be [", s.samples, "], got ",
             shape(*weight_in));
    check_like(op, "weight", *weight_in, g.x);
    weight = torch::stable::contiguous(*weight_in);
  }
  if (g.empty()) {
    for (Tensor* t : {&count, &first, &second}) torch::stable::zero_(*t);
    return {count, first, second, log_prob};
  }
  with_type(op, g.x, [&](auto type) {
    using T = decltype(type);
    const Prepared<T> prepared(op, g, false, true);
    GaussianStatisticsParams<T> p{s,
                                  prepared.leaves,
                                  prepared.x,
                                  log_prob.const_data_ptr<T>(),
                                  nullptr,
                                  count.mutable_data_ptr<T>(),
                                  first.mutable_data_ptr<T>(),
                                  second.mutable_data_ptr<T>(),
                                  nullptr};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(g.x)) {
      const DeviceScope scope(g.x);
      const Tensor posterior = new_output(g.x, {s.samples, s.leaves});
      p.posterior = posterior.const_data_ptr<T>();
      const GaussianMixtureParams<T> m{s,
                                       prepared.leaves,
                                       prepared.x,
                                       log_weight.const_data_ptr<T>(),
                                       log_prob.mutable_data_ptr<T>(),
                                       posterior.mutable_data_ptr<T>()};
      check_cuda(op, gaussian_mixture_cuda(m, scope.stream()));
      if (weight_in) scale_rows(posterior, weight);
      const Tensor scratch = new_empty(g.x, {gaussian_statistics_scratch_cuda(s)});
      p.scratch = scratch.mutable_data_ptr<T>();
      return check_cuda(op, gaussian_statistics_cuda(p, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    // Piece by piece: a piece's posterior stays in the cache until its moments are taken.
    const double D = s.dims;
    const int64_t piece = std::max<int64_t>(8, (1 << 20) / s.leaves / kChunk) * kChunk;
    GaussianSize size = s;
    size.samples = std::min(piece, s.samples);
    const int64_t ranges = GaussianGrid(size).sample_ranges;
    const Tensor posterior = new_output(g.x, {size.samples, s.leaves});
    Tensor scratch = new_output(g.x, {ranges * s.leaves * gaussian_moment_size(s)});
    torch::stable::zero_(scratch);
    p.scratch = scratch.mutable_data_ptr<T>();
    p.posterior = posterior.const_data_ptr<T>();
    T* panels = prepared.panels.template mutable_data_ptr<T>();
    const T* counts = weight_in ? weight.const_data_ptr<T>() : nullptr;
    for (int64_t n = 0; counts && n < s.samples; ++n)
      FF_CHECK(counts[n] >= T(0) && counts[n] - counts[n] == T(0), op, ": weight must be finite and at least 0, got ",
               counts[n], " in sample ", n);
    for (int64_t begin = 0; begin < s.samples; begin += piece) {
      p.size.samples = std::min(piece, s.samples - begin);
      p.x = panels + begin * s.dims;
      T* log_probs = log_prob.mutable_data_ptr<T>() + begin;
      const T* weights = log_weight.const_data_ptr<T>() + begin * s.leaves;
      const GaussianLogProbParams<T> densities{p.size, prepared.leaves, prepared.x + begin * s.dims,
                                               posterior.mutable_data_ptr<T>()};
      const GaussianMixtureParams<T> m{p.size,  prepared.leaves, nullptr,
                                       weights, log_probs,       posterior.mutable_data_ptr<T>()};
      mixture_cpu<T>(densities, m, true, [&](int64_t b, int64_t e) {
        for (int64_t n = b; counts && n < e; ++n) {
          const T root = std::sqrt(counts[begin + n]);
          for (int64_t k = 0; k < s.leaves; ++k) m.posterior[n * s.leaves + k] *= root;
        }
      });
      // A sample that counts nothing must not reach the sums as 0 times NaN.
      for (int64_t n = begin; n < begin + p.size.samples; ++n)
        if (p.log_prob[n] - p.log_prob[n] != T(0))
          for (int j = 0; j < s.dims; ++j) panels[(n / kPanel * s.dims + j) * kPanel + n % kPanel] = T(0);
      parallel_chunks(GaussianGrid(p.size).tasks(), 1, [&](int64_t b, int64_t e) { table<T>().statistics(p, b, e); });
    }
    p.size = size;
    parallel_work(s.leaves, D * D * double(ranges + 2),
                  [&](int64_t b, int64_t e) { table<T>().statistics_leaves(p, b, e); });
#endif
  });
  return {count, first, second, log_prob};
}

FF_SCHEMAS(m) {
  m.def("gaussian_log_prob(Tensor x, Tensor mean, Tensor scale_tril) -> Tensor");
  m.def(
      "gaussian_log_prob_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale_tril, bool needs_x, "
      "bool needs_mean, bool needs_scale_tril) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gaussian_mixture(Tensor x, Tensor log_weight, Tensor mean, Tensor scale_tril, bool needs_posterior) -> "
      "(Tensor, Tensor)");
  m.def(
      "gaussian_statistics(Tensor x, Tensor log_weight, Tensor mean, Tensor scale_tril, Tensor? weight) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("gaussian_log_prob", TORCH_BOX(&log_prob));
  m.impl("gaussian_log_prob_backward", TORCH_BOX(&log_prob_backward));
  m.impl("gaussian_mixture", TORCH_BOX(&mixture));
  m.impl("gaussian_statistics", TORCH_BOX(&statistics));
}

}  // namespace
}  // namespace ff
