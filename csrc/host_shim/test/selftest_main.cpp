// Runs the self-test's kernels, with no framework. Prints "OK", or a line for each kernel that is wrong and exits
// with 1.
#include <cmath>
#include <cstdio>
#include <memory>

#include "host_shim/test/selftest.h"

namespace {

using namespace ff::selftest;

bool failed = false;

void check(const char* name, int code, bool right) {
  if (code) std::printf("%s: %s\n", name, error_text(code));
  if (!code && !right) std::printf("%s: WRONG\n", name);
  failed = failed || code || !right;
}

// Exactly as long as needed, so that ASan's red zone begins right behind.
template <class T>
std::unique_ptr<T[]> filled(int n, T (*value)(int)) {
  std::unique_ptr<T[]> array(new T[n]);
  for (int i = 0; i < n; ++i) array[i] = value(i);
  return array;
}

template <class T>
T zero(int) {
  return 0;
}

float wave(int i) { return float(i * 37 % 101 - 50); }  // sums of these are exact

void test_sum_rows(int rows, int columns) {
  auto x = filled<float>(rows * columns, wave);
  auto row_sum = filled<float>(rows, zero);
  float total = NAN;
  const int code = sum_rows(x.get(), rows, columns, row_sum.get(), &total, nullptr);
  bool right = true;
  double expected_total = 0;
  for (int r = 0; r < rows; ++r) {
    double expected = 0;
    for (int c = 0; c < columns; ++c) expected += x[r * columns + c];
    right = right && row_sum[r] == expected;
    expected_total += expected;
  }
  check("sum_rows", code, right && total == expected_total);
}

void test_reverse_tiles(int tiles, int blocks) {
  auto x = filled<float>(tiles * kTile, wave);
  auto y = filled<float>(tiles * kTile, zero);
  const int code = reverse_tiles(x.get(), tiles, blocks, y.get(), nullptr);
  bool right = true;
  for (int i = 0; i < tiles * kTile; ++i) right = right && y[i] == x[i / kTile * kTile + kTile - 1 - i % kTile];
  check("reverse_tiles", code, right);
}

void test_count(int n, int bins) {
  auto x = filled<int>(n, [](int i) { return i * i % 97; });
  auto counts = filled<int>(bins, zero);
  const int code = count(x.get(), n, bins, counts.get(), nullptr);
  auto expected = filled<int>(bins, zero);
  for (int i = 0; i < n; ++i) ++expected[x[i]];
  bool right = true;
  for (int b = 0; b < bins; ++b) right = right && counts[b] == expected[b];
  check("count", code, right);
}

void test_argmax_rows(int rows, int columns) {
  auto x = filled<float>(rows * columns, wave);
  auto index = filled<int>(rows, zero), positive = filled<int>(rows, zero);
  const int code = argmax_rows(x.get(), rows, columns, index.get(), positive.get(), nullptr);
  bool right = true;
  for (int r = 0; r < rows; ++r) {
    int best = 0, above = 0;
    for (int c = 0; c < columns; ++c) {
      if (x[r * columns + c] > x[r * columns + best]) best = c;
      above += x[r * columns + c] > 0;
    }
    right = right && index[r] == best && positive[r] == above;
  }
  check("argmax_rows", code, right);
}

void test_add_neighbours(int n) {
  auto x = filled<float>(n, wave);
  auto y = filled<float>(n, zero);
  const int code = add_neighbours(x.get(), n, y.get(), nullptr);
  bool right = true;
  for (int i = 0; i < n; ++i) {
    const int neighbour = i / 32 * 32 + (i + 1) % 32;
    right = right && y[i] == x[i] + (neighbour < n ? x[neighbour] : 0);
  }
  check("add_neighbours", code, right);
}

void test_sum_last_block(int n, int blocks) {
  auto x = filled<double>(n, [](int i) { return double(wave(i)); });
  auto partial = filled<double>(blocks, zero);
  int ticket = 0;
  double total = NAN, expected = 0;
  const int code = sum_last_block(x.get(), n, blocks, partial.get(), &ticket, &total, nullptr);
  for (int i = 0; i < n; ++i) expected += x[i];
  check("sum_last_block", code, total == expected);
}

void test_intrinsics() {
  int wrong = 0;
  const int code = intrinsics(&wrong, nullptr);
  check("intrinsics", code, wrong == 0);
}

void test_refused_launch() {
  float total = 0;
  const int code = sum_rows(nullptr, 0, 1, nullptr, &total, nullptr);
  check("refused launch", 0, code == 9);  // cudaErrorInvalidConfiguration
}

}  // namespace

int main() {
  test_sum_rows(5, 67);
  test_sum_rows(3, 300);
  test_reverse_tiles(7, 2);
  test_count(1000, 14000);  // 56 KB
  test_argmax_rows(3, 333);
  test_argmax_rows(2, 1);
  test_add_neighbours(200);
  test_sum_last_block(1000, 6);
  test_intrinsics();
  test_refused_launch();
  if (!failed) std::printf("OK\n");
  return failed;
}
