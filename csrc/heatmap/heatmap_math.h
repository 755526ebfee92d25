// One map or one landmark: (x, y) in pixels, 0-based, pixel centres at integers; a canvas of height x width pixels.
#pragma once
#include <cmath>
#include <cstdint>

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

enum class Refine : int { none = 0, quarter_sign = 1, quarter_second = 2 };

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

}  // namespace ff
