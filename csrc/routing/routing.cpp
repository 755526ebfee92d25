// The routing room's operators: checks, allocation, dispatch.
#include "routing/routing.h"

#include <algorithm>

#include "common/isa.h"
#include "common/stable_torch.h"

namespace ff {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

template <class F>
void with_type(const char* op, const Tensor& t, const F& f) {
  FF_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op,
           ": units must be float32 or float64");
  t.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

#ifndef FF_HOST_SHIM
template <class T>
const RoutingCpu<T>& cpu() {
#ifdef FF_X86
  return choose(baseline::routing_cpu<T>(), avx2::routing_cpu<T>(), avx512::routing_cpu<T>());
#else
  return baseline::routing_cpu<T>();
#endif
}
// Groups of samples, a few in a row: what a group asks the memory for is its thread's next.
template <class F>
void each_chunk(int64_t samples, int lanes, const F& f) {
  const int64_t groups = (samples + lanes - 1) / lanes;
  parallel_chunks(groups, std::clamp<int64_t>(groups / (8 * torch::stable::get_num_threads()), 1, 8), f);
}
template <class T>
const int32_t* checked_phi(const char* op, const Tensor& phi, int64_t features, std::vector<int32_t>& out) {
  const T* from = static_cast<const T*>(phi.const_data_ptr());
  out.resize(phi.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    FF_CHECK(from[i] >= 0 && from[i] < features, op, ": phi must be between 0 and ", features - 1,
             " (units has F = ", features, "), got ", from[i]);
    out[i] = int32_t(from[i]);
  }
  return out.data();
}
#endif

// Contiguous inputs and what follows from their shapes; owns what `params` points to.
struct Inputs {
  Tensor units, phi;
  OptionalTensor steepness;
  double factor;
  int64_t samples, features, trees, nodes;
  int depth = 0;
  bool log;
  std::vector<int32_t> checked;  // CPU: phi, in range

  Inputs(const char* op, const Tensor& units_in, const Tensor& phi_in, const OptionalTensor& steepness_in,
         double factor_in, bool log_in)
      : units(contiguous(units_in)), phi(contiguous(phi_in)), factor(factor_in), log(log_in) {
    FF_CHECK(units.dim() == 2, op, ": units must be [N, F], got ", shape(units));
    FF_CHECK(phi.dim() == 2, op, ": phi must be [T, 2^D - 1], got ", shape(phi));
    FF_CHECK(phi.scalar_type() == ScalarType::Long || phi.scalar_type() == ScalarType::Int, op,
             ": phi must be int64 or int32");
    FF_CHECK(phi.get_device() == units.get_device() && phi.is_cuda() == units.is_cuda(), op,
             ": phi must be on the device of units");
    samples = units.size(0), features = units.size(1), trees = phi.size(0), nodes = phi.size(1);
    while (depth <= kMaxDepth && (int64_t(1) << depth) - 1 < nodes) ++depth;
    FF_CHECK(depth >= 1 && depth <= kMaxDepth && (int64_t(1) << depth) - 1 == nodes, op,
             ": phi must be [T, 2^D - 1] with a depth D from 1 to 16, got ", shape(phi));
    FF_CHECK(trees < (int64_t(1) << 31) / (nodes + 1) && features < (int64_t(1) << 31), op,
             ": at most 2^31 leaves a sample, and units");
    if (steepness_in) {
      steepness = contiguous(*steepness_in);
      FF_CHECK(steepness->numel() == 1 && steepness->scalar_type() == units.scalar_type() &&
                   steepness->get_device() == units.get_device(),
               op, ": steepness must be one element with the dtype and device of units");
    }
  }

  bool empty() const { return samples * trees == 0; }

  template <class T>
  RouteParams<T> params(const char* op) {
    RouteParams<T> p{samples,   features, trees,
                     depth,     log,      static_cast<const T*>(units.const_data_ptr()),
                     nullptr,   nullptr,  steepness ? static_cast<const T*>(steepness->const_data_ptr()) : nullptr,
                     T(factor), nullptr};
    const bool wide = phi.scalar_type() == ScalarType::Long;
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(units)) {
      if (wide)
        p.wide_phi = static_cast<const int64_t*>(phi.const_data_ptr());
      else
        p.phi = static_cast<const int32_t*>(phi.const_data_ptr());
      return p;
    }
#endif
#ifndef FF_HOST_SHIM
    p.phi = wide ? checked_phi<int64_t>(op, phi, features, checked) : checked_phi<int32_t>(op, phi, features, checked);
#endif
    (void)op;
    return p;
  }
};

Tensor route(const Tensor& units_in, const Tensor& phi_in, const OptionalTensor& steepness, double factor, bool log) {
  const char* op = "route";
  Inputs in(op, units_in, phi_in, steepness, factor, log);
  Tensor leaf = new_output(in.units, {in.samples, in.trees, in.nodes + 1});
  with_type(op, in.units, [&](auto type) {
    using T = decltype(type);
    auto p = in.params<T>(op);
    p.leaf = static_cast<T*>(leaf.mutable_data_ptr());
    if (in.empty()) return;
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(in.units)) {
      const DeviceScope scope(in.units);
      return check_cuda(op, route_cuda(p, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    const RoutingCpu<T>& table = cpu<T>();
    each_chunk(in.samples, table.lanes, [&](int64_t begin, int64_t end) { table.route(p, begin, end); });
#endif
  });
  return leaf;
}

Tensor route_backward(const Tensor& grad_in, const Tensor& units_in, const Tensor& phi_in,
                      const OptionalTensor& steepness, double factor, bool log) {
  const char* op = "route backward";
  Inputs in(op, units_in, phi_in, steepness, factor, log);
  FF_CHECK(grad_in.dim() == 3 && grad_in.size(0) == in.samples && grad_in.size(1) == in.trees &&
               grad_in.size(2) == in.nodes + 1 && grad_in.scalar_type() == in.units.scalar_type() &&
               grad_in.get_device() == in.units.get_device(),
           op, ": the gradient must be [N, T, 2^D] with the dtype and device of units, got ", shape(grad_in));
  const Tensor grad = contiguous(grad_in);
  Tensor grad_units = new_output(in.units, {in.samples, in.features});
  if (in.empty()) return torch::stable::fill_(grad_units, 0);
  with_type(op, in.units, [&](auto type) {
    using T = decltype(type);
    RouteBackwardParams<T> b{in.params<T>(op),
                             static_cast<const T*>(grad.const_data_ptr()),
                             static_cast<T*>(grad_units.mutable_data_ptr()),
                             nullptr,
                             nullptr,
                             nullptr,
                             0};
#ifdef FF_HAS_CUDA_LAUNCHERS
    if (on_cuda(in.units)) {
      const DeviceScope scope(in.units);
      const int64_t nodes = in.trees * in.nodes;
      const Tensor lists = new_empty(in.units, {nodes + in.features + 1}, ScalarType::Int);
      b.order = static_cast<int32_t*>(lists.mutable_data_ptr());
      b.start = b.order + nodes;
      b.blocks = in.samples;
      OptionalTensor scratch;
      if (route_backward_shared<T>(in.features, nodes) > kRouteShared) {
        const int64_t most = std::max<int64_t>(1, kRouteScratch / (2 * nodes * int64_t(sizeof(T))));
        b.blocks = std::min(in.samples, most);
        scratch = new_empty(in.units, {b.blocks, 2 * nodes});
        b.scratch = static_cast<T*>(scratch->mutable_data_ptr());
      }
      return check_cuda(op, route_backward_cuda(b, scope.stream()));
    }
#endif
#ifndef FF_HOST_SHIM
    const RoutingCpu<T>& table = cpu<T>();
    each_chunk(in.samples, table.lanes, [&](int64_t begin, int64_t end) { table.route_backward(b, begin, end); });
#endif
  });
  return grad_units;
}

FF_SCHEMAS(m) {
  m.def("routing_route(Tensor units, Tensor phi, Tensor? steepness_value, float steepness, bool log) -> Tensor");
  m.def(
      "routing_route_backward(Tensor grad, Tensor units, Tensor phi, Tensor? steepness_value, float steepness, "
      "bool log) -> Tensor");
}

FF_IMPLEMENTATIONS(m) {
  m.impl("routing_route", TORCH_BOX(&route));
  m.impl("routing_route_backward", TORCH_BOX(&route_backward));
}

}  // namespace
}  // namespace ff
