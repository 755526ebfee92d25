// A fiber: a stack of its own and a switch that keeps ASan and TSan informed. One CUDA thread is one fiber.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "host_shim/sanitizers.h"

// Saves the callee-saved registers on the current stack, stores the stack pointer in *save, and goes on from `restore`.
// In assembly at file scope, so that no compiler reasons about what a call of it leaves unchanged.
extern "C" void ff_shim_switch(void** save, void* restore);
#if defined(__x86_64__)
asm(R"(
  .pushsection .text.ff_shim_switch,"axG",@progbits,ff_shim_switch,comdat
  .weak ff_shim_switch
  .hidden ff_shim_switch
  .type ff_shim_switch, @function
ff_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size ff_shim_switch, .-ff_shim_switch
  .popsection
)");
constexpr int kSavedRegisters = 6;
#else
#error "the host shim switches stacks on x86-64 only"
#endif

namespace ff::shim {

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "host shim: %s\n", why);
  std::abort();
}

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kPageBytes = 4096;

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // lowest byte
  size_t stack_bytes = 0;
  void* asan_frames = nullptr;  // ASan's "fake stack"
  void* tsan = nullptr;         // TSan's name of this fiber
};

// `from` is the running fiber; returns when something switches back to it, which a fiber that `ends` must not expect.
FF_SHIM_UNSEEN inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_frames, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch alone orders nothing
#endif
  ff_shim_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_frames, nullptr, nullptr);
#endif
}

// The first act of a fresh fiber: completes the switch, and notes where the stack it came from lies.
inline void enter_fiber([[maybe_unused]] Fiber& came_from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &came_from.stack, &came_from.stack_bytes);
#endif
}

// Makes the next switch to `fiber` start `entry`, which must never return.
FF_SHIM_UNSEEN inline void arm_fiber(Fiber& fiber, void (*entry)()) {
  char* top = static_cast<char*>(const_cast<void*>(fiber.stack)) + fiber.stack_bytes;
  unpoison(top - kPageBytes, kPageBytes);           // the frame of the last `entry`
  void** slot = reinterpret_cast<void**>(top) - 2;  // `ret` leaves the stack as a call would: 8 bytes off 16
  *slot = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = slot - kSavedRegisters;
  fiber.asan_frames = nullptr;
}

inline Fiber new_fiber() {
  Fiber fiber;
  void* map = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) die("no memory for the stack of a CUDA thread");
  mprotect(map, kPageBytes, PROT_NONE);  // an overflow faults instead of reaching a neighbour
  fiber.stack = static_cast<char*>(map) + kPageBytes;
  fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Fibers of ended launches: making them anew would be most of the time of a small launch.
struct FiberStore {
  std::mutex lock;
  std::vector<Fiber> fibers;
};
inline FiberStore& fiber_store() {
  static FiberStore& store = *new FiberStore;  // outlives every thread that may give fibers back
  return store;
}

inline Fiber take_fiber() {
  FiberStore& store = fiber_store();
  std::lock_guard<std::mutex> hold(store.lock);
  if (store.fibers.empty()) return new_fiber();
  Fiber fiber = store.fibers.back();
  store.fibers.pop_back();
  unpoison(fiber.stack, fiber.stack_bytes);  // the frames of a block that failed
  return fiber;
}

inline void give_fiber(const Fiber& fiber) {
  FiberStore& store = fiber_store();
  std::lock_guard<std::mutex> hold(store.lock);
  store.fibers.push_back(fiber);
}

}  // namespace ff::shim
