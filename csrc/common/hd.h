// FF_HD: a function of the host and of the device, inlined on both: an out-of-line copy in an object for AVX-512
// could be the one the linker keeps, and an older processor would run it.
#pragma once
#ifdef __CUDACC__
#define FF_HD __host__ __device__ __forceinline__
#else
#include <math.h>  // not <cmath>: `exp(x)` of a float is then a float, as in CUDA
#define FF_HD inline __attribute__((always_inline))
#endif
