// Runs CUDA C++ kernels on the CPU, for tests only: g++, C++20, x86-64 Linux. Include common/portable.cuh, not this.
//
// Every CUDA thread is a fiber, and the fibers of a block share one OS thread, so a run is deterministic. Found:
//   - wrong mathematics, by comparison with a reference;
//   - barriers and warp operations that not all threads reach, launches a GPU would refuse: an error with its line;
//   - reads of shared memory that nobody wrote, or before cp_async_wait: NaN (-1 for integers);
//   - with -fsanitize=address,undefined: out of bounds in shared and global memory, misaligned vectors;
//   - with -fsanitize=thread: a missing __syncthreads or __syncwarp, a missing atomic, within and between blocks.
// Not seen: speed, bank conflicts, the memory model, fast-math rounding, asynchrony of streams, __launch_bounds__.
//
// Environment: FF_SHIM_WORKERS=<OS threads, default all; 1 under a sanitizer>
//              FF_SHIM_ORDER=fwd|rev|<seed>, the order in which threads, warps and blocks run
#pragma once
#include "host_shim/intrinsics.h"
#include "host_shim/launch.h"
