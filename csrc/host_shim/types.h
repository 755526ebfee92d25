// CUDA's vector types, error codes and the few runtime calls a launcher makes.
#pragma once
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as CUDA aligns them, so that UBSan sees a misaligned vector access.
#define FF_SHIM_VECTOR_TYPES(T, name)                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FF_SHIM_VECTOR_TYPES(float, float)
FF_SHIM_VECTOR_TYPES(double, double)
FF_SHIM_VECTOR_TYPES(int, int)
FF_SHIM_VECTOR_TYPES(unsigned, uint)
#undef FF_SHIM_VECTOR_TYPES

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace ff::shim {

constexpr size_t kStaticShared = 48 * 1024;  // also what static and dynamic memory share without an opt-in
constexpr size_t kMaxShared = 227 * 1024;    // of an H100; an A100 has 163 KB, other GPUs of its generation 99 KB

struct LastError {
  cudaError_t code = cudaSuccess;
  std::string message;
};
inline LastError& last_error() {
  static thread_local LastError error;
  return error;
}

inline cudaError_t report(cudaError_t code, const std::string& message) {
  if (code != cudaSuccess) last_error() = {code, message};
  return code;
}

// The dynamic shared memory that each kernel was allowed by cudaFuncSetAttribute.
struct SharedLimits {
  std::mutex lock;
  std::map<const void*, size_t> bytes;
};
inline SharedLimits& shared_limits() {
  static SharedLimits limits;
  return limits;
}
inline size_t shared_limit(const void* kernel) {
  SharedLimits& limits = shared_limits();
  std::lock_guard<std::mutex> hold(limits.lock);
  auto found = limits.bytes.find(kernel);
  return found == limits.bytes.end() ? 0 : found->second;
}

}  // namespace ff::shim

inline cudaError_t cudaGetLastError() {
  cudaError_t code = ff::shim::last_error().code;
  ff::shim::last_error().code = cudaSuccess;
  return code;
}

// More telling than CUDA's: the message of this thread's latest error, whatever its code.
inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : ff::shim::last_error().message.c_str();
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > ff::shim::kMaxShared)
    return ff::shim::report(cudaErrorInvalidValue, "cudaFuncSetAttribute: more shared memory than a block can have");
  ff::shim::SharedLimits& limits = ff::shim::shared_limits();
  std::lock_guard<std::mutex> hold(limits.lock);
  limits.bytes[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
