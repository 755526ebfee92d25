// What the bindings of both heatmap rooms share: element types, and maps of any strides.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/stable_torch.h"
#include "heatmap/heatmap.h"

namespace ff {

// Calls f with a value of the tensor's element type.
template <class F>
auto with_map_type(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default: FF_CHECK(false, op, ": expected float32, float64, bfloat16 or float16"); return f(float{});
  }
}

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows in memory order, or landmarks innermost (channels_last).
inline bool planar(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1; }
inline bool pixel_major(const Tensor& t) { return !planar(t) && t.stride(1) == 1; }

template <class T>
Maps<T> maps_of(const Tensor& t) {
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          pixel_major(t)};
}

}  // namespace ff
