// One map or one landmark: (x, y) in pixels, 0-based, pixel centres at integers; a canvas of height x width pixels.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/hd.h"

namespace ff {

// Pixels [begin, end) of one axis.
struct Cells {
  int begin, end;
};

// |h - nearest| <= radius on the canvas, nearest an integer in floating point; NaN and far away: none.
template <class T>
FF_HD Cells cells_around(T nearest, T radius, int size) {
  const T low = nearest - radius, high = nearest + radius;
  if (!(low <= T(size - 1) && high >= T(0))) return {0, 0};
  return {low > T(0) ? int(low) : 0, high < T(size - 1) ? int(high) + 1 : size};
}

// render: the visible part of one axis; everything when truncate is negative. In double: ceil(t sigma) must not depend
// on the working precision.
template <class T>
FF_HD Cells render_cells(T centre, T sigma, double truncate, int size) {
  if (truncate < 0) return {0, size};
  return cells_around(rint(double(centre)), ceil(truncate * double(sigma)), size);
}

// g(h) = exp(-(h - c)^2 / (2 sigma^2)), or that over its sum. The exponent is shifted by its largest value on the cells
// when normalised (the sum divides it out).
template <class T>
struct AxisGaussian {
  T centre, factor, shift;  // g(h) = exp(factor (h - centre)^2 - shift)
};

template <class T>
FF_HD AxisGaussian<T> axis_gaussian(T centre, T sigma, Cells cells, bool normalized) {
  const T factor = T(-0.5) / (sigma * sigma);
  T nearest = rint(centre);
  nearest = nearest < T(cells.begin) ? T(cells.begin) : nearest > T(cells.end - 1) ? T(cells.end - 1) : nearest;
  const T d = nearest - centre;
  return {centre, factor, normalized ? factor * d * d : T(0)};
}

template <class T>
FF_HD bool render_valid(T x, T y, T sigma) {
  return sigma > T(0) && (x - x) + (y - y) + (sigma - sigma) == T(0);
}

// soft-argmax: p = exp(beta (z - top)) / total, (x, y) = sum p (X, Y).
// debias: n background pixels of z = 0 and centre c are taken out of total:
// m' = (m - r c) / (1 - r) = c + (m - c) / (1 - r), r = n exp(-beta top) / total their share; unchanged unless r < 1.
template <class T>
struct Background {
  T pixels, x, y;  // n and its centre; n = 0: no debias
};

template <class T>
FF_HD T background_share(Background<T> b, T top_logit, T log_total) {
  const T r = b.pixels * exp(-(top_logit + log_total));
  return r < T(1) ? r : r != r ? r : T(0);
}

template <class T>
FF_HD T debiased(T mean, T share, T centre) {
  return centre + (mean - centre) / (T(1) - share);
}

// d(points) / d(logit at (X, Y)) . (gx, gy) = p (a (X - x) + b (Y - y) + total), (x, y) the mean before debias, and
// sum p (...) = total. From the output m':  m = c + (m' - c)(1 - r),  d m'/d m = 1 / (1 - r),
// d m'/d log(total) = -r (m' - c) / (1 - r).  X - x comes first: products of a and b with X would cancel.
template <class T>
struct LogitGrad {
  T a, b, x, y, total;
};

template <class T>
FF_HD LogitGrad<T> logit_grad(T x, T y, T gx, T gy, T share, Background<T> back) {
  if (share == T(0)) return {gx, gy, x, y, T(0)};
  const T keep = T(1) - share, a = gx / keep, b = gy / keep;
  return {a, b, back.x + (x - back.x) * keep, back.y + (y - back.y) * keep,
          -share * (a * (x - back.x) + b * (y - back.y))};
}

// peak refinements: `at(dx, dy, &value)` reads the neighbour of the peak and says whether it is on the canvas.
template <class T>
FF_HD T quarter_sign(T before, T after) {
  return T(0.25) * (T(after > before) - T(after < before));
}

enum class Refine : int { none = 0, quarter_sign = 1, quarter_second = 2, dark = 3, dark_udp = 4 };

template <class T, class At>
FF_HD void refine_peak(Refine refine, T& x, T& y, const At& at) {
  if (refine == Refine::quarter_sign) {
    T before, after;
    if (at(-1, 0, before) && at(1, 0, after)) x += quarter_sign(before, after);
    if (at(0, -1, before) && at(0, 1, after)) y += quarter_sign(before, after);
  } else if (refine == Refine::quarter_second) {
    T best = -INFINITY, value;
    int sx = 0, sy = 0;
    for (int dy = -1; dy <= 1; ++dy)
      for (int dx = -1; dx <= 1; ++dx)
        if ((dx || dy) && at(dx, dy, value) && value > best) best = value, sx = dx, sy = dy;
    const T length = sx && sy ? T(0.17677669529663688) : T(0.25);  // 1 / (4 |s - m|)
    x += T(sx) * length;
    y += T(sy) * length;
  }
}

// dark, dark_udp: with b the map under a Gaussian blur (0 outside the canvas) and l = log clip(s b, low, high) around
// the peak, the maximum of the parabola through l:  peak - Hess^-1 grad.  s = max z / max b gives the blurred map the
// height of the map; it is a constant of l, and drops out of the differences, unless a clip acts.
constexpr int kMostKernel = 63;  // pixels of the blur on each axis

// Weights of the blur at distances 0, 1, ... kernel / 2, kernel odd. OpenCV's rule: binomial up to 5, its tables for 7
// and 9, beyond that a Gaussian of sigma 0.3 ((kernel - 1) / 2 - 1) + 0.8, sum 1.
template <class T>
void blur_taps(int kernel, T* taps) {
  constexpr int kHalves[5][5] = {{256}, {128, 64}, {96, 64, 16}, {72, 56, 28, 8}, {60, 51, 30, 13, 4}};
  const int half = kernel / 2;
  if (half < 5) {
    for (int i = 0; i <= half; ++i) taps[i] = T(kHalves[half][i] / 256.0);
    return;
  }
  const double sigma = 0.3 * (half - 1) + 0.8;
  const auto gauss = [&](int i) { return exp(-0.5 * i * i / (sigma * sigma)); };
  double total = 1;
  for (int i = 1; i <= half; ++i) total += 2 * gauss(i);
  for (int i = 0; i <= half; ++i) taps[i] = T(gauss(i) / total);
}

FF_HD bool is_dark(Refine refine) { return refine == Refine::dark || refine == Refine::dark_udp; }

// The stencil reads b at distances of up to `step` pixels.
template <class T>
struct DarkRule {
  int step;
  T low, high;

  // Whether all of the stencil is on the canvas, around a peak of value z; a peak of 0 or less is clipped flat.
  FF_HD bool applies(T z, int x, int y, int width, int height) const {
    return z > T(0) && x >= step && x < width - step && y >= step && y < height - step;
  }
  // Whether a clip might act, and s must be known: s b lies between b and z.
  FF_HD bool may_clip(T b, T z) const { return !(b >= low && z <= high); }
  FF_HD T clip(T value) const { return value > low ? (value < high ? value : high) : low; }
};

template <class T>
FF_HD DarkRule<T> dark_rule(Refine refine) {
  if (refine == Refine::dark) return {2, T(1e-10), T(INFINITY)};
  return {1, T(1e-3), T(50)};
}

// Adds -Hess^-1 grad to (x, y): l(dx, dy) reads the logarithms. Nothing is added where the Hessian is singular to
// rounding or the step goes beyond 1.5 pixels on an axis.
template <class T, class L>
FF_HD void dark_shift(int step, const L& l, T& x, T& y) {
  const T c = l(0, 0), left = l(-1, 0), right = l(1, 0), up = l(0, -1), down = l(0, 1);
  const T gx = T(0.5) * (right - left), gy = T(0.5) * (down - up);
  T xx, yy, xy;
  if (step == 2) {
    xx = T(0.25) * ((l(2, 0) - c) - (c - l(-2, 0)));
    yy = T(0.25) * ((l(0, 2) - c) - (c - l(0, -2)));
    xy = T(0.25) * ((l(1, 1) - l(1, -1)) - (l(-1, 1) - l(-1, -1)));
  } else {  // the diagonal of dark_udp goes one way only
    xx = (right - c) - (c - left);
    yy = (down - c) - (c - up);
    xy = T(0.5) * (((l(1, 1) - right) - (down - c)) + ((c - left) - (up - l(-1, -1))));
  }
  const T straight = xx * yy, cross = xy * xy, det = straight - cross;
  const T size = (straight < T(0) ? -straight : straight) + cross;
  const bool regular = (det < T(0) ? -det : det) > T(4) * std::numeric_limits<T>::epsilon() * size;
  const T inverse = T(1) / (regular ? det : T(1)), most = T(1.5);
  const T sx = (xy * gy - yy * gx) * inverse, sy = (xy * gx - xx * gy) * inverse;
  const bool near = sx >= -most && sx <= most && sy >= -most && sy <= most;
  x += regular && near ? sx : T(0);
  y += regular && near ? sy : T(0);
}

}  // namespace ff
