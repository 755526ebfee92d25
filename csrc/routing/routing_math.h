// One node of one sample's tree: x = s f, the steepness times the unit that the node reads.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace ff {

// d and 1 - d, or their logarithms: both from exp(-|x|), so that neither is a rounded difference.
template <class T>
struct Split {
  T left, right;
};

// d = sigmoid(x) = 1 / (1 + exp(-x))
template <class T>
FF_HD Split<T> split(T x) {
  const T e = exp(x < T(0) ? x : -x), large = T(1) / (T(1) + e), small = e * large;
  return x < T(0) ? Split<T>{small, large} : Split<T>{large, small};
}

// log sigmoid(+-x) = min(+-x, 0) - log(1 + exp(-|x|))
template <class T>
FF_HD Split<T> log_split(T x) {
  const T t = log1p(exp(x < T(0) ? x : -x));
  return {(x < T(0) ? x : T(0)) - t, (x > T(0) ? -x : T(0)) - t};
}

// What the leaves below a node are worth, from its children, and the gradient of x. T: a number or a vector of them.
//
// P_l = product over the path. V = sum over the leaves below of P_l / P_node g_l, reach = P_node:
//   V = d V_left + (1 - d) V_right,   dR/dx = P_node d (1 - d) (V_left - V_right)
// which is A_left (1 - d) - A_right d with A = P V, without its cancellation.
template <class T>
FF_HD T node_value(Split<T> d, T left, T right) {
  return d.left * left + d.right * right;
}
template <class T>
FF_HD T node_grad(Split<T> d, T reach, T left, T right) {
  return reach * d.left * d.right * (left - right);
}

// log P_l = sum over the path. A = sum of g_l below:   dR/dx = (1 - d) A_left - d A_right
template <class T>
FF_HD T log_node_value(T left, T right) {
  return left + right;
}
template <class T>
FF_HD T log_node_grad(Split<T> d, T left, T right) {
  return d.right * left - d.left * right;
}

}  // namespace ff
