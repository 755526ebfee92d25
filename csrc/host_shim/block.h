// One CUDA block while it runs: its threads, its shared memory, and the places where threads wait for each other.
// All functions here are called by a running CUDA thread.
#pragma once
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

#include "host_shim/fiber.h"
#include "host_shim/types.h"

namespace ff::shim {

using Place = std::source_location;
using Fold = uint64_t (*)(uint64_t, uint64_t);

enum class State : uint8_t { kReady, kAtBarrier, kAtWarpOperation, kReturned };

// The order in which threads, warps and blocks run. Deterministic: a failure repeats.
struct Order {
  enum Kind : uint8_t { kForward, kReverse, kShuffled } kind = kForward;
  unsigned seed = 0;
};

struct Block;

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned group;
};
constexpr int kMaxAsyncCopies = 64;
constexpr size_t kAsyncCopyBytes = 16;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int lane = 0;
  int warp = 0;
  State state = State::kReturned;
  Place place;            // where it waits
  unsigned barriers = 0;  // passed

  // its part in a warp operation
  unsigned mask = 0;
  int source = 0;
  Fold fold = nullptr;
  uint64_t in = 0;
  uint64_t out = 0;
  unsigned meeting = 0;  // number of the latest __syncwarp

  AsyncCopy copies[kMaxAsyncCopies];  // in flight
  int copy_count = 0;
  unsigned copy_group = 0;
};

// Bytes that no array owns, between and behind arrays. An odd multiple of 16, so that an array is 16-byte aligned,
// as FF_SHARED and FF_DYN_SHARED promise, and not by luck more.
constexpr size_t kGap = 80;
constexpr size_t kDynamicOffset = kStaticShared + kGap;
constexpr int kMaxArrays = 64;

struct SharedArray {
  const void* key;  // one address for each FF_SHARED in the program
  size_t offset;
};

struct Block {
  Thread* threads = nullptr;
  int count = 0;    // threads
  int running = 0;  // not returned
  int arrived = 0;  // at the barrier
  unsigned warp_meetings[32] = {};
  uint3 index{};
  dim3 block_dim;
  dim3 grid_dim;
  Order order;

  unsigned char* shared = nullptr;  // static part, gap, dynamic part, gap
  size_t static_bytes = 0;          // used, gaps included
  size_t array_bytes = 0;           // used, without gaps: what a GPU would count
  size_t dynamic_bytes = 0;
  size_t dynamic_limit = 0;  // allowed by cudaFuncSetAttribute, 0: not asked
  SharedArray arrays[kMaxArrays];
  int array_count = 0;

  Fiber scheduler;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::string error;
};

// The kernel's `threadIdx` and friends read this. A fiber never changes its OS thread.
inline constinit thread_local Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

// Addresses that carry TSan's orderings. Each block has its own, so that blocks stay unordered among each other, and
// so have successive meetings: a thread may leave one after others have arrived at the next, which must not count.
constexpr unsigned kBarrierTags = 2;
constexpr unsigned kWarpTags = 64;
inline void* exit_tag(const Block& block) { return block.shared; }
inline void* barrier_tag(const Block& block, unsigned meeting) { return block.shared + 1 + meeting % kBarrierTags; }
inline void* warp_tag(const Block& block, int warp, unsigned meeting) {
  return block.shared + 1 + kBarrierTags + unsigned(warp) * kWarpTags + meeting % kWarpTags;
}

inline bool operator==(const Place& a, const Place& b) {
  return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name());
}

inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, int part) { text += std::to_string(part); }
inline void append(std::string& text, const Place& part) {
  text += part.file_name();
  text += ":";
  text += std::to_string(part.line());
}

template <class... Parts>
std::string join(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

FF_SHIM_UNSEEN inline void record_error(Block& block, std::string message) {
  if constexpr (kTsan) {  // no way back: TSan would next report the string itself
    std::fprintf(stderr, "host shim: %s\n", message.c_str());
    std::_Exit(66);
  }
  if (block.error.empty()) block.error = std::move(message);
}

// Ends the block: the scheduler does not come back to a block with an error. Takes parts, because a string of the
// caller would never be destroyed.
template <class... Parts>
[[noreturn]] FF_SHIM_UNSEEN void fail(const Parts&... parts) {
  Thread* self = current;
  record_error(*self->block, join(parts...));
  switch_fiber(self->fiber, self->block->scheduler, true);
  die("a thread of a failed block ran on");
}

FF_SHIM_UNSEEN inline void open_barrier(Block& block) {
  block.arrived = 0;
  const Thread* first = nullptr;
  for (int i = 0; i < block.count; ++i) {
    Thread& thread = block.threads[i];
    if (thread.state != State::kAtBarrier) continue;
    thread.state = State::kReady;
    if (!first) first = &thread;
    if (thread.place != first->place)
      fail("threads of one block met at different __syncthreads(): ", first->place, " and ", thread.place);
  }
  // A GPU lets returned threads off; here it is an error, because it is seldom meant and never portable.
  if (block.running < block.count)
    fail(block.count - block.running, " threads returned before __syncthreads() at ", first->place);
}

FF_SHIM_UNSEEN inline void sync_block(Place place) {
  Thread* self = current;
  Block& block = *self->block;
  self->place = place;
  self->state = State::kAtBarrier;
  void* tag = barrier_tag(block, self->barriers++);
  release(tag);
  if (++block.arrived == block.running) {
    open_barrier(block);
  } else {
    switch_fiber(self->fiber, block.scheduler);
  }
  acquire(tag);
}

constexpr int kOwnValue = -1;

// All lanes of `mask` meet. With a fold, each receives the fold of all values; otherwise the value of lane `source`.
// Orders no memory: on a GPU only __syncwarp does.
FF_SHIM_UNSEEN inline uint64_t meet_warp(unsigned mask, uint64_t value, int source, Fold fold, Place place) {
  Thread* self = current;
  Block& block = *self->block;
  Thread* lanes = block.threads + self->warp * 32;
  const int left = block.count - self->warp * 32;
  const int lane_count = left < 32 ? left : 32;
  if (!(mask >> self->lane & 1)) fail("a lane is not in its own mask at ", place);
  if (lane_count < 32 && mask != ~0u && mask >> lane_count)
    fail("the mask names a lane that the block does not have, at ", place);

  self->mask = mask;
  self->source = source;
  self->fold = fold;
  self->in = value;
  self->place = place;
  self->state = State::kAtWarpOperation;
  bool complete = true;
  for (int i = 0; i < lane_count; ++i) {
    const Thread& other = lanes[i];
    if (!(mask >> i & 1)) continue;
    if (other.state == State::kReturned) fail("the mask names a lane that has returned, at ", place);
    complete = complete && other.state == State::kAtWarpOperation && other.mask == mask;
  }
  if (!complete) {
    switch_fiber(self->fiber, block.scheduler);
    return self->out;
  }

  uint64_t folded = 0;
  bool first = true;
  for (int i = 0; i < lane_count; ++i) {
    if (!(mask >> i & 1)) continue;
    if (lanes[i].fold != fold) fail("lanes of one warp met at different operations: ", lanes[i].place, " and ", place);
    if (fold) folded = first ? lanes[i].in : fold(folded, lanes[i].in);
    first = false;
  }
  for (int i = 0; i < lane_count; ++i) {
    if (!(mask >> i & 1)) continue;
    const int from = lanes[i].source == kOwnValue ? i : lanes[i].source;
    const bool defined = from < lane_count && (mask >> from & 1);
    lanes[i].out = fold ? folded : defined ? lanes[from].in : ~0ull;  // undefined on a GPU: a NaN here
    lanes[i].state = State::kReady;
  }
  return self->out;
}

inline uint64_t fold_nothing(uint64_t a, uint64_t) { return a; }

FF_SHIM_UNSEEN inline void sync_warp(unsigned mask, Place place) {
  Thread* self = current;
  Block& block = *self->block;
  // The first lane to arrive numbers the meeting.
  const Thread* waiting = nullptr;
  const int first = self->warp * 32;
  for (int i = first; i < first + 32 && i < block.count; ++i) {
    const Thread& other = block.threads[i];
    if (other.state == State::kAtWarpOperation && other.mask == mask && (mask >> other.lane & 1)) waiting = &other;
  }
  self->meeting = waiting ? waiting->meeting : block.warp_meetings[self->warp]++;
  void* tag = warp_tag(block, self->warp, self->meeting);
  release(tag);
  meet_warp(mask, 0, kOwnValue, fold_nothing, place);
  acquire(tag);
}

FF_SHIM_UNSEEN inline void* shared_array(const void* key, size_t bytes, size_t align) {
  Block& block = *current->block;
  for (int i = 0; i < block.array_count; ++i)
    if (block.arrays[i].key == key) return block.shared + block.arrays[i].offset;
  const size_t offset = (block.static_bytes + align - 1) / align * align;
  if (block.array_count == kMaxArrays || offset + bytes > kStaticShared)
    fail("more than 48 KB of static shared memory");
  block.arrays[block.array_count++] = {key, offset};
  block.static_bytes = offset + bytes + kGap;
  block.array_bytes += bytes;
  if (block.array_bytes + block.dynamic_bytes > (block.dynamic_limit ? kMaxShared : kStaticShared))
    fail("static and dynamic shared memory together exceed what the block may have");
  unpoison(block.shared + offset, bytes);
  return block.shared + offset;
}

inline void* dynamic_shared() { return current->block->shared + kDynamicOffset; }

// Not inlined and with an open size, so that the sanitizers see the access: the shim's other code is hidden from them.
__attribute__((noipa)) inline void visible_copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}

// An asynchronous copy lands at the last moment the program allows in order fwd (a missing wait then reads NaN), at
// once in order rev, and a seed mixes the two.
FF_SHIM_UNSEEN inline void hold_copy(void* to, const void* from, Place place) {
  Thread* self = current;
  const Order& order = self->block->order;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kAsyncCopyBytes)
    fail("cp_async16 of an address that is not a multiple of 16, at ", place);
  const unsigned hash = (order.seed + 1) * 2654435761u + self->copy_group * 40503u;
  if (order.kind == Order::kReverse || (order.kind == Order::kShuffled && (hash >> 16 & 1))) return;
  if (self->copy_count == kMaxAsyncCopies) fail("more than 64 cp_async16 of one thread in flight, at ", place);
  std::memset(to, 0xFF, kAsyncCopyBytes);
  self->copies[self->copy_count++] = {to, from, self->copy_group};
}

// Written at once in every order, so that the sanitizers see a bad address, or a reader of the old contents, here.
inline void copy_async(void* to, const void* from, Place place) {
  visible_copy(to, from, kAsyncCopyBytes);
  hold_copy(to, from, place);
}

FF_SHIM_UNSEEN inline void commit_copies() { ++current->copy_group; }

// Lands all but the `keep` youngest committed groups.
FF_SHIM_UNSEEN inline void wait_copies(unsigned keep) {
  Thread* self = current;
  const unsigned landed = self->copy_group > keep ? self->copy_group - keep : 0;
  int left = 0;
  for (int i = 0; i < self->copy_count; ++i) {
    const AsyncCopy& copy = self->copies[i];
    if (copy.group < landed) {
      visible_copy(copy.to, copy.from, kAsyncCopyBytes);
    } else {
      self->copies[left++] = copy;
    }
  }
  self->copy_count = left;
}

// Where a CUDA thread begins and ends.
FF_SHIM_UNSEEN inline void run_thread() {
  Thread* self = current;
  Block& block = *self->block;
  enter_fiber(block.scheduler);
  acquire(&block);
  block.body(block.context);
  release(exit_tag(block));
  self->state = State::kReturned;
  --block.running;
  if (block.running && block.arrived == block.running) open_barrier(block);
  switch_fiber(self->fiber, block.scheduler, true);
  die("a returned thread ran on");
}

}  // namespace ff::shim
