// One class of one sample: yhat = scale sum_l P_l q_l (scale 1, or 1 / trees for the mean of a forest), target y.
#pragma once
#include "common/hd.h"

namespace ff {

// What a loss compares; log_prob: its numerator is the upstream gradient of log yhat.
enum class CategoricalKind : int { kl = 0, l2 = 1, log_prob = 2 };

// x itself, NaN where it is infinite: a broken row stays visible, even below the floor.
template <class T>
FF_HD T finite_or_nan(T x) {
  return x + (x - x);
}

template <class T>
FF_HD T above_floor(T yhat, T eps) {
  const T v = finite_or_nan(yhat);
  return v < eps ? eps : v;
}

// kl:  R = sum_c y log(y / max(yhat, eps)), 0 where y = 0;  y / yhat = -dR/dyhat, 0 where eps floors yhat
// l2:  R = sum_c (y - yhat)^2;                              2 (y - yhat) = -dR/dyhat
// A class that the mask leaves out has y = 0 for kl and y = yhat for l2; NaN stays in either.
template <class T>
struct ClassTerm {
  T loss;   // of this class
  T slope;  // -dR/dyhat;  of log_prob: d(u log yhat)/dyhat = u / yhat
};

template <CategoricalKind kKind, bool kLoss, class T>
FF_HD ClassTerm<T> class_term(T y, T yhat, T eps, T threshold) {
  y = finite_or_nan(y);
  if constexpr (kKind == CategoricalKind::l2) {
    const T v = finite_or_nan(yhat), d = y <= threshold ? v - v : y - v;
    return {d * d, T(2) * d};
  } else {
    if (y <= threshold) y = T(0);
    const T v = above_floor(yhat, eps), ratio = y / v;
    T loss = T(0);
    if constexpr (kLoss) loss = y == T(0) ? v - v : y * log(ratio);
    return {loss, finite_or_nan(yhat) < eps ? T(0) : ratio};
  }
}

}  // namespace ff
