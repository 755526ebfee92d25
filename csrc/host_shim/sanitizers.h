// What the sanitizers must be told about fibers and shared memory; in a plain build every function here is empty.
#pragma once
#include <cstddef>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {  // not in the header that g++ 12 installs
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
// The shim's own bookkeeping is shared by all fibers of a block and must not order or disturb the kernel's accesses.
#define FF_SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define FF_SHIM_UNSEEN
#endif

namespace ff::shim {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAsan = true;
inline void poison(const void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
inline void unpoison(const void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
constexpr bool kAsan = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

// release(tag) ... acquire(tag): what came before the first is ordered before what follows the second.
#if defined(__SANITIZE_THREAD__)
constexpr bool kTsan = true;
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
#else
constexpr bool kTsan = false;
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace ff::shim
