// One pixel or one map of the heatmap losses: z the prediction at pixel h, y the target there, never stored:
// y = exp(-|h - c|^2 / 2 sigma^2), a product of two axes, peak 1 for the losses by
// pixel, sum 1 over the visible canvas for those of softmax(z).
#pragma once
#include <cmath>
#include <cstdint>

#include "common/hd.h"
#include "heatmap/heatmap_math.h"

namespace ff {

// Below this share of an axis's peak a float target counts as 0: it is lost in the rounding of what it is added to, and
// products of two axes stay normal numbers (subnormal ones take a hundred times as long on the CPU).
template <class T>
constexpr T kNegligible = sizeof(T) == 4 ? T(8.9e-16) : T(1e-140);

// y > threshold (or >=) is |h - c|^2 < cut (or <=):  cut = -2 sigma^2 log(threshold), all pixels for threshold <= 0.
// Squared distances compare without the rounding of exp.
template <class T>
FF_HD T cut_distance(T threshold, T sigma) {
  return threshold > T(0) ? T(-2) * sigma * sigma * log(threshold) : T(INFINITY);
}

// Dilation: the greatest y over the cells |m - h| <= radius of an axis, clipped to the canvas, is that of the cell
// nearest to the centre, since y falls with the distance. Here its squared distance.
template <class T>
FF_HD T nearest_distance(T centre, int cell, int radius, int size) {
  const T low = T(cell < radius ? 0 : cell - radius), high = T(radius < size - cell ? cell + radius : size - 1);
  T nearest = rint(centre);
  nearest = nearest < low ? low : nearest > high ? high : nearest;
  return (nearest - centre) * (nearest - centre);
}

// Adaptive Wing: X. Wang, L. Bo, L. Fuxin, "Adaptive wing loss for robust face alignment via heatmap regression", 2019.
// With d = |z - y|, a = alpha - y, e = min(d, theta), q = (e / epsilon)^a, the paper's two branches are one:
//   omega (log(1 + q) + a q / (1 + q) (d - e) / theta),   slope in d: omega a q / ((1 + q) e), 0 at d = 0.
template <class T>
struct AdaptiveWing {
  T alpha, omega, epsilon, theta;
};

template <class T>
FF_HD T adaptive_wing(AdaptiveWing<T> w, T z, T y) {
  const T d = fabs(z - y), a = w.alpha - y, e = d < w.theta ? d : w.theta;
  const T q = pow(e / w.epsilon, a);
  const T loss = w.omega * (log1p(q) + a * q / (T(1) + q) * ((d - e) / w.theta));
  return d != d ? d : loss;
}

template <class T>
FF_HD T adaptive_wing_grad(AdaptiveWing<T> w, T z, T y) {
  const T d = fabs(z - y), a = w.alpha - y, e = d < w.theta ? d : w.theta;
  if (d != d) return d;
  if (e == T(0)) return T(0);
  const T q = pow(e / w.epsilon, a), slope = w.omega * a * q / ((T(1) + q) * e);
  return z < y ? -slope : slope;
}

constexpr int kMapWeight = 10;  // a pixel of the dilated target counts 1 + kMapWeight times

// Losses of p = softmax(z) = exp((z - top) - log_total), top = max z, log_total = log sum exp(z - top).
enum class SoftmaxLoss : int { kl = 0, js = 1, variance = 2 };

// What the gradient needs of a map, and the forward stores: top, log_total, and for
//   js: K = sum p log(p / (p + y));   variance: the mean (x, y) and the variances (vx, vy) of p.
FF_HD constexpr int statistics_of(SoftmaxLoss loss) {
  return loss == SoftmaxLoss::kl ? 2 : loss == SoftmaxLoss::js ? 3 : 6;
}

// KL(y || p) = sum y log y - sum y (z - top) + log_total;   d/dz = p - y.  sum y log y is the sum of both axes' own;
// y = 0 contributes nothing, whatever z.

// JS = (KL(y || m) + KL(p || m)) / 2, m = (p + y) / 2. With s = p + y and v = |p - y| / s a pixel's part is
// s f(v) / 4, f(v) = (1 + v) log(1 + v) + (1 - v) log(1 - v) = v^2 + v^4/6 + v^6/15 + v^8/28 + v^10/45 + ...:
// errors of p and y enter squared where they agree.
template <class T>
FF_HD T js_part(T p, T y) {
  const T s = p + y, low = p < y ? p : y;
  if (s == T(0)) return s;
  const T v = fabs(p - y) / s, w = T(2) * (low / s), v2 = v * v;  // w = 1 - v
  const T near = v2 * (T(1) + v2 * (T(1) / 6 + v2 * (T(1) / 15 + v2 * (T(1) / 28 + v2 * (T(1) / 45)))));
  const T far = (T(1) + v) * log1p(v) + (w > T(0) ? w * log(w) : w);
  // The series ends: for double it serves a smaller v.
  return T(0.25) * s * (v < (sizeof(T) == 8 ? T(0.03) : T(0.25)) ? near : far);
}

// d JS / dz = p (k - K) / 2, k = log(p / (p + y)), K = sum p k: the log 2 of log(p / m) = k + log 2 drops out, and with
// it the cancellation of a p that hardly meets y. k = 0 where y = 0; p = 0 has no part in K.
template <class T>
FF_HD T js_log_ratio(T p, T y) {
  if (!(p > T(0))) return p;  // NaN stays
  const T s = p + y;
  return y < p ? log1p(-(y / s)) : log(p / s);
}

// Variance regulariser: A. Nibali, Z. He, S. Morgan, L. Prendergast, "Numerical coordinate regression with
// convolutional neural networks", 2018: (vx - sigma^2)^2 + (vy - sigma^2)^2, in pixels squared.
//   d/dz = p (a ((X - x)^2 - vx) + b ((Y - y)^2 - vy)),  a = 2 (vx - sigma^2), b = 2 (vy - sigma^2).
template <class T>
FF_HD T variance_loss(T vx, T vy, T sigma) {
  const T a = vx - sigma * sigma, b = vy - sigma * sigma;
  return a * a + b * b;
}

}  // namespace ff
