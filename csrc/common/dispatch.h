// What bindings of operators in float and double share: the element type, and arguments that agree.
#pragma once
#include "common/stable_torch.h"

namespace ff {

using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the tensor's element type.
template <class F>
auto with_type(const char* op, const Tensor& t, const F& f) {
  const ScalarType type = t.scalar_type();
  FF_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": tensors must be float32 or float64");
  return type == ScalarType::Float ? f(float{}) : f(double{});
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FF_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first argument");
  FF_CHECK(t.get_device() == like.get_device() && t.is_cuda() == like.is_cuda(), op, ": ", name,
           " must be on the device of the first argument");
}

}  // namespace ff
