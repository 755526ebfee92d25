// Buffers of the sanitizer drivers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

// Of exactly its size: right behind its end begins ASan's red zone. What a kernel sees begins behind `offset` elements,
// so that it may be off its alignment.
template <class T>
class Array {
 public:
  Array(int64_t n, T fill, int offset = 0) : n_(n), offset_(offset), data_(new T[n + offset]) {
    std::fill(data_.get(), data_.get() + n + offset, fill);
  }
  T* get() { return data_.get() + offset_; }
  const T* get() const { return data_.get() + offset_; }
  T& operator[](int64_t i) { return data_[i + offset_]; }
  int64_t size() const { return n_; }
  std::vector<double> values() const { return std::vector<double>(get(), get() + n_); }

 private:
  int64_t n_;
  int offset_;
  std::unique_ptr<T[]> data_;
};
