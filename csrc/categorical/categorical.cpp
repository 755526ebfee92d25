// Bindings of the categorical room: checks, allocation, dispatch.
#include "categorical/categorical.h"

#include <limits>

#include "common/dispatch.h"
#include "common/isa.h"

namespace ff {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

template <class T>
const CategoricalCpu<T>& cpu() {
#if defined(FF_X86)
  return choose(baseline::categorical_cpu<T>(), avx2::categorical_cpu<T>(), avx512::categorical_cpu<T>());
#else
  return baseline::categorical_cpu<T>();
#endif
}

// Weights and leaves, checked and made contiguous; owns what the parameters point to.
struct Mixture {
  const char* op;
  Tensor weight, leaves;
  int64_t samples, trees, count, classes;

  Mixture(const char* op_, const Tensor& weight_, const Tensor& leaves_) : op(op_) {
    FF_CHECK(weight_.dim() == 3, op, ": weight must be [N, T, L], got ", shape(weight_));
    FF_CHECK(leaves_.dim() == 3 && leaves_.size(0) == weight_.size(1) && leaves_.size(1) == weight_.size(2), op,
             ": leaves must be [", weight_.size(1), ", ", weight_.size(2), ", C], got ", shape(leaves_));
    check_like(op, "leaves", leaves_, weight_);
    FF_CHECK(leaves_.numel() > 0, op, ": leaves must not be empty, got ", shape(leaves_));
    weight = contiguous(weight_);
    leaves = contiguous(leaves_);
    samples = weight.size(0), trees = leaves.size(0), count = leaves.size(1), classes = leaves.size(2);
    FF_CHECK(samples < (int64_t(1) << 31) && count < (int64_t(1) << 31) && classes < (int64_t(1) << 31), op,
             ": sizes must be below 2^31");
  }

  template <class T>
  CategoricalMixture<T> at(double scale, double eps) const {
    return {weight.const_data_ptr<T>(), leaves.const_data_ptr<T>(), samples, trees, count, classes, T(scale), T(eps)};
  }

  // [N, C] of a target or, with trees, [N, T, C] of a gradient.
  Tensor numerator(const char* name, const Tensor& t, bool by_tree) const {
    if (by_tree) {
      FF_CHECK(t.dim() == 3 && t.size(0) == samples && t.size(1) == trees && t.size(2) == classes, op, ": ", name,
               " must be [", samples, ", ", trees, ", ", classes, "], got ", shape(t));
    } else {
      FF_CHECK(t.dim() == 2 && t.size(0) == samples && t.size(1) == classes, op, ": ", name, " must be [", samples,
               ", ", classes, "], got ", shape(t));
    }
    check_like(op, name, t, weight);
    return contiguous(t);
  }
};

template <class T>
CategoricalNumerator<T> target_of(const Tensor& target, int64_t kind, double threshold) {
  FF_CHECK(kind == 0 || kind == 1, "categorical_loss: kind must be 0 (KL) or 1 (L2), got ", kind);
  return {CategoricalKind(kind), target.const_data_ptr<T>(), target.size(1), 0, T(threshold)};
}

template <class T>
CategoricalNumerator<T> gradient_of(const Tensor& grad) {
  return {CategoricalKind::log_prob, grad.const_data_ptr<T>(), grad.size(1) * grad.size(2), grad.size(2),
          -std::numeric_limits<T>::infinity()};
}

template <class T>
void run_rows(const Mixture& m, CategoricalRowsParams<T> params) {
  if (!m.samples) return;
#ifdef FF_HAS_CUDA_LAUNCHERS
  if (on_cuda(m.weight)) {
    DeviceScope scope(m.weight);
    return check_cuda(m.op, categorical_rows_cuda(params, scope.stream()));
  }
#endif
  const CategoricalCpu<T>& kernels = cpu<T>();
  Tensor transposed;
  if (params.grad_weight) {
    transposed = new_empty(m.leaves, {m.trees, m.classes, categorical_padded(m.count, kernels.lanes)});
    const int64_t tiles = kernels.tiles(m.classes);
    T* out = transposed.mutable_data_ptr<T>();
    parallel_chunks(m.trees * tiles, 1,
                    [&](int64_t begin, int64_t end) { kernels.transpose(params.mixture, out, begin, end); });
    params.transposed = out;
  }
  // About 32 items of whole blocks; a range of 10 blocks repays the packing of its leaves.
  const int64_t blocks = (m.samples + kCategoricalBlock - 1) / kCategoricalBlock;
  const int64_t range = kCategoricalBlock * std::clamp<int64_t>(blocks * m.trees / 32, 1, 10);
  const int64_t items = m.trees * ((m.samples + range - 1) / range);
  parallel_chunks(items, 1, [&](int64_t begin, int64_t end) { kernels.rows(params, range, begin, end); });
}

// `target` null: no sample is looked at for NaN before its weights are.
template <class T>
void run_leaves(const Mixture& m, CategoricalLeavesParams<T> params, const T* target) {
  const int64_t size = m.leaves.numel();
  Tensor flags = new_empty(m.weight, {target ? m.samples : 0}, ScalarType::Byte), partial;
  uint8_t* sound = target ? flags.mutable_data_ptr<uint8_t>() : nullptr;
  params.sound = sound;
#ifdef FF_HAS_CUDA_LAUNCHERS
  if (on_cuda(m.weight)) {
    DeviceScope scope(m.weight);
    if (target && m.samples)
      check_cuda(m.op, categorical_sound_cuda(target, m.samples, m.classes, sound, scope.stream()));
    params.parts = categorical_parts_cuda(m.samples, m.trees, m.count, m.classes);
    partial = new_empty(m.weight, {params.parts * size});
    params.partial = partial.mutable_data_ptr<T>();
    return check_cuda(m.op, categorical_leaves_cuda(params, scope.stream()));
  }
#endif
  const CategoricalCpu<T>& kernels = cpu<T>();
  if (target)
    parallel_chunks(m.samples, 512,
                    [&](int64_t begin, int64_t end) { kernels.sound(target, m.classes, sound, begin, end); });
  const int64_t tiles = kernels.tiles(m.classes);
  const int64_t blocks = (m.samples + kCategoricalBlock - 1) / kCategoricalBlock;
  params.parts = std::clamp<int64_t>(32 / (m.trees * tiles), 1, std::max<int64_t>(1, blocks / 4));
  if (params.parts > 1) {
    partial = new_empty(m.weight, {params.parts * size});
    params.partial = partial.mutable_data_ptr<T>();
  }
  parallel_chunks(params.parts * m.trees * tiles, 1,
                  [&](int64_t begin, int64_t end) { kernels.leaves(params, begin, end); });
  if (params.parts > 1)
    parallel_chunks(m.trees * m.count, 16, [&](int64_t begin, int64_t end) { kernels.sum(params, begin, end); });
}

Tensor categorical_log_prob(const Tensor& weight, const Tensor& leaves, double scale, double eps) {
  const Mixture m("categorical_log_prob", weight, leaves);
  Tensor out = new_output(m.weight, {m.samples, m.trees, m.classes});
  return with_type(m.op, m.weight, [&](auto zero) {
    using T = decltype(zero);
    CategoricalRowsParams<T> params{m.at<T>(scale, eps), {}, nullptr, out.mutable_data_ptr<T>(), nullptr, nullptr, 1};
    run_rows(m, params);
    return out;
  });
}

std::tuple<Tensor, Tensor> categorical_log_prob_backward(const Tensor& grad_, const Tensor& weight,
                                                         const Tensor& leaves, double scale, double eps,
                                                         bool need_weight, bool need_leaves) {
  const Mixture m("categorical_log_prob_backward", weight, leaves);
  const Tensor grad = m.numerator("grad", grad_, true);
  Tensor grad_weight = new_output(m.weight, {need_weight ? m.samples : 0, m.trees, m.count});
  Tensor grad_leaves = new_output(m.weight, {need_leaves ? m.trees : 0, m.count, m.classes});
  return with_type(m.op, m.weight, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const CategoricalMixture<T> at = m.at<T>(scale, eps);
    if (need_weight)
      run_rows(m, CategoricalRowsParams<T>{at, gradient_of<T>(grad), nullptr, nullptr, nullptr,
                                           grad_weight.mutable_data_ptr<T>(), T(1)});
    if (need_leaves)
      run_leaves(m,
                 CategoricalLeavesParams<T>{at, gradient_of<T>(grad), nullptr, nullptr, false, false, T(1), 1, nullptr,
                                            grad_leaves.mutable_data_ptr<T>()},
                 static_cast<const T*>(nullptr));
    return {grad_weight, grad_leaves};
  });
}

std::tuple<Tensor, Tensor> categorical_loss(const Tensor& weight, const Tensor& leaves, const Tensor& target_,
                                            int64_t kind, double scale, double eps, double threshold, bool need_grad) {
  const Mixture m("categorical_loss", weight, leaves);
  const Tensor target = m.numerator("target", target_, false);
  Tensor loss = new_empty(m.weight, {m.samples, m.trees});
  Tensor grad = new_output(m.weight, {m.samples, m.trees, need_grad ? m.count : 0});
  return with_type(m.op, m.weight, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    run_rows(m, CategoricalRowsParams<T>{m.at<T>(scale, eps), target_of<T>(target, kind, threshold), nullptr, nullptr,
                                         loss.mutable_data_ptr<T>(), need_grad ? grad.mutable_data_ptr<T>() : nullptr,
                                         T(-1)});
    return {loss, grad};
  });
}

Tensor categorical_loss_backward_leaves(const Tensor& grad_, const Tensor& weight, const Tensor& leaves,
                                        const Tensor& target_, int64_t kind, double scale, double eps,
                                        double threshold) {
  const Mixture m("categorical_loss_backward_leaves", weight, leaves);
  const Tensor target = m.numerator("target", target_, false);
  FF_CHECK(grad_.dim() == 2 && grad_.size(0) == m.samples && grad_.size(1) == m.trees, m.op, ": grad must be [",
           m.samples, ", ", m.trees, "], got ", shape(grad_));
  check_like(m.op, "grad", grad_, m.weight);
  const Tensor grad = contiguous(grad_);
  Tensor out = new_output(m.weight, {m.trees, m.count, m.classes});
  return with_type(m.op, m.weight, [&](auto zero) {
    using T = decltype(zero);
    run_leaves(
        m,
        CategoricalLeavesParams<T>{m.at<T>(scale, eps), target_of<T>(target, kind, threshold), grad.const_data_ptr<T>(),
                                   nullptr, false, false, T(-1), 1, nullptr, out.mutable_data_ptr<T>()},
        target.const_data_ptr<T>());
    return out;
  });
}

void statistics(const Mixture& m, const Tensor& target_, double scale, double eps, double threshold, Tensor& out,
                bool accumulate) {
  const Tensor target = m.numerator("target", target_, false);
  with_type(m.op, m.weight, [&](auto zero) {
    using T = decltype(zero);
    run_leaves(m,
               CategoricalLeavesParams<T>{m.at<T>(scale, eps), target_of<T>(target, 0, threshold), nullptr, nullptr,
                                          true, accumulate, T(1), 1, nullptr, out.mutable_data_ptr<T>()},
               target.const_data_ptr<T>());
  });
}

Tensor categorical_statistics(const Tensor& weight, const Tensor& leaves, const Tensor& target, double scale,
                              double eps, double threshold) {
  const Mixture m("categorical_statistics", weight, leaves);
  Tensor out = new_output(m.weight, {m.trees, m.count, m.classes});
  statistics(m, target, scale, eps, threshold, out, false);
  return out;
}

void categorical_statistics_(const Tensor& weight, const Tensor& leaves, const Tensor& target, double scale, double eps,
                             double threshold, Tensor out) {
  const Mixture m("categorical_statistics", weight, leaves);
  FF_CHECK(out.dim() == 3 && out.size(0) == m.trees && out.size(1) == m.count && out.size(2) == m.classes, m.op,
           ": out must be ", shape(m.leaves), ", got ", shape(out));
  FF_CHECK(out.is_contiguous(), m.op, ": out must be contiguous");
  check_like(m.op, "out", out, m.weight);
  statistics(m, target, scale, eps, threshold, out, true);
}

}  // namespace

FF_SCHEMAS(m) {
  m.def("categorical_log_prob(Tensor weight, Tensor leaves, float scale, float eps) -> Tensor");
  m.def(
      "categorical_log_prob_backward(Tensor grad, Tensor weight, Tensor leaves, float scale, float eps, bool "
      "need_weight, bool need_leaves) -> (Tensor, Tensor)");
  m.def(
      "categorical_loss(Tensor weight, Tensor leaves, Tensor target, int kind, float scale, float eps, float "
      "threshold, bool need_grad) -> (Tensor, Tensor)");
  m.def(
      "categorical_loss_backward_leaves(Tensor grad, Tensor weight, Tensor leaves, Tensor target, int kind, float "
      "scale, float eps, float threshold) -> Tensor");
  m.def(
      "categorical_statistics(Tensor weight, Tensor leaves, Tensor target, float scale, float eps, float threshold) "
      "-> Tensor");
  m.def(
      "categorical_statistics_(Tensor weight, Tensor leaves, Tensor target, float scale, float eps, float threshold, "
      "Tensor(a!) out) -> ()");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("categorical_log_prob", TORCH_BOX(&categorical_log_prob));
  m.impl("categorical_log_prob_backward", TORCH_BOX(&categorical_log_prob_backward));
  m.impl("categorical_loss", TORCH_BOX(&categorical_loss));
  m.impl("categorical_loss_backward_leaves", TORCH_BOX(&categorical_loss_backward_leaves));
  m.impl("categorical_statistics", TORCH_BOX(&categorical_statistics));
  m.impl("categorical_statistics_", TORCH_BOX(&categorical_statistics_));
}

}  // namespace ff
