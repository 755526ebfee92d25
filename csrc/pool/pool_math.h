// The windowed target of one landmark. B images, P landmarks, R = B P rows, H x W canvas, N leaves.
// y(h) = gx(x) gy(y) on the window |h - round(c)| <= radius clipped to the canvas, renormalised to 1 per axis.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace ff {

// A range of canvas cells [begin, end) along one axis; empty where the window misses the canvas.
struct Span {
  int begin, end;
};

// A coordinate far outside int's range misses any canvas; NaN does too (the caller looks at the point itself).
template <class T>
FF_HD Span window_span(T centre, int radius, int size) {
  const T nearest = rint(centre);
  if (!(nearest >= T(-radius) && nearest <= T(size - 1) + T(radius))) return {0, 0};
  const int c = int(nearest);
  return {c - radius > 0 ? c - radius : 0, c + radius + 1 < size ? c + radius + 1 : size};
}

// log of the unnormalised axis target at cell h
template <class T>
FF_HD T axis_log(int h, T centre, T inverse_variance) {
  const T d = T(h) - centre;
  return T(-0.5) * d * d * inverse_variance;
}

// The largest axis_log on the span: taken at the cell nearest to the centre, it shifts the exponentials.
template <class T>
FF_HD T axis_log_max(Span span, T centre, T inverse_variance) {
  const T nearest = rint(centre);
  const int h = nearest < T(span.begin) ? span.begin : nearest > T(span.end - 1) ? span.end - 1 : int(nearest);
  return axis_log(h, centre, inverse_variance);
}

// yhat itself, NaN where it is infinite: a broken row stays visible even below the floor.
template <class T>
FF_HD T defined(T yhat) {
  return yhat + (yhat - yhat);
}

// Gradient factor y / yhat of one pixel, 0 where eps floors yhat.
template <class T>
FF_HD T kl_ratio(T y, T yhat, T eps) {
  const T v = defined(yhat);
  return v < eps ? T(0) : y / v;
}

template <class T>
FF_HD T floored(T yhat, T eps) {
  const T v = defined(yhat);
  return v < eps ? eps : v;
}

// Rows sorted by this key stand near one another on the canvas: cells of 2^shift pixels along a Morton curve.
// Rows without a place (NaN, far away) come first: key 0 is theirs.
template <class T>
FF_HD uint32_t position_key(T x, T y, int width, int height, int shift) {
  if (!(x > T(-1e6) && x < T(1e6) && y > T(-1e6) && y < T(1e6))) return 0;
  const int cx = int(x) < 0 ? 0 : int(x) >= width ? width - 1 : int(x);
  const int cy = int(y) < 0 ? 0 : int(y) >= height ? height - 1 : int(y);
  const uint32_t a = uint32_t(cx) >> shift, b = uint32_t(cy) >> shift;
  uint32_t code = 0;
  for (int bit = 0; bit < 8; ++bit) code |= ((a >> bit & 1u) << (2 * bit)) | ((b >> bit & 1u) << (2 * bit + 1));
  return code + 1;
}

// The finest cells, not below 4 pixels, whose code fits in 16 bits.
inline int position_shift(int width, int height) {
  int shift = 2;
  while (((width > height ? width : height) - 1) >> shift > 255) ++shift;
  return shift;
}

// Quarter-pixel refinement from the 3 x 3 neighbourhood of a peak, -inf outside the canvas.
// refine 1: a quarter towards the higher neighbour on each axis that has both. refine 2: a quarter towards the
// second-highest pixel (lowest index among equals), none if there is no finite one.
template <class T>
FF_HD void peak_shift(const T near[9], int x, int y, int width, int height, int refine, T* dx, T* dy) {
  *dx = *dy = T(0);
  if (refine == 1) {
    if (x > 0 && x + 1 < width) *dx = T(0.25) * T((near[5] > near[3]) - (near[5] < near[3]));
    if (y > 0 && y + 1 < height) *dy = T(0.25) * T((near[7] > near[1]) - (near[7] < near[1]));
    return;
  }
  int second = -1;
  for (int k = 0; k < 9; ++k)
    if (k != 4 && near[k] > (second < 0 ? -T(INFINITY) : near[second])) second = k;
  if (second < 0) return;
  const int sx = second % 3 - 1, sy = second / 3 - 1;
  const T step = T(0.25) / sqrt(T(sx * sx + sy * sy));
  *dx = T(sx) * step;
  *dy = T(sy) * step;
}

}  // namespace ff
