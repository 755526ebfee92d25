// One sample and one leaf. Leaf k: normal of mean m and covariance L L^T; W = L^-1, z = W (x - m).
#pragma once
#include "common/hd.h"

namespace ff {

// log N = log_norm - |z|^2 / 2,  log_norm = -(D log 2 pi) / 2 - sum_i log L_ii
// d log N / d x = -W^T z,  d / d m = W^T z,  d / d L = tril(W^T z z^T) - diag(1 / L_ii)
template <class T, class V>  // V: T, or a vector of it
FF_HD V gaussian_log_density(T log_norm, V squares) {
  return log_norm - T(0.5) * squares;
}

// In double, whatever the working precision: each factor's logarithm would be rounded D times.
FF_HD double gaussian_log_norm(double sum_log_diagonal, int dims) {
  return -0.91893853320467274178 * dims - sum_log_diagonal;
}

// What multiplies a pair's gradient g: 0 where g is 0, since 0 * infinity and 0 * NaN are no zeros.
template <class V>  // T, or a vector of it
FF_HD V gaussian_used(V grad, V value) {
  return grad != V{} ? value : V{};
}

// An element of W, finite in T: infinity times a difference of 0 would be NaN.
template <class T>
FF_HD double gaussian_finite(double w) {
  constexpr double kMost = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  return w > kMost ? kMost : w < -kMost ? -kMost : w;
}

// log-sum-exp over leaves of a = log w + log N, from the largest a and the sum of exp(a - largest): -inf for no weight.
template <class T>
FF_HD T gaussian_shift(T largest) {
  return largest == T(-INFINITY) ? T(0) : largest;
}

}  // namespace ff
