// A kernel launch: blocks are dealt to worker threads, and each worker runs the fibers of one block at a time.
#pragma once
#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "host_shim/block.h"

namespace ff::shim {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;
  size_t dynamic_limit;
  Order order;
  void (*body)(const void*);
  const void* context;

  size_t blocks() const { return size_t(grid.x) * grid.y * grid.z; }
  size_t threads() const { return size_t(block.x) * block.y * block.z; }
};

inline Order order_from_environment() {
  const char* text = std::getenv("FF_SHIM_ORDER");
  if (!text || !std::strcmp(text, "fwd")) return {Order::kForward, 0};
  if (!std::strcmp(text, "rev")) return {Order::kReverse, 0};
  char* end;
  const unsigned long seed = std::strtoul(text, &end, 10);
  if (*end || end == text) die("FF_SHIM_ORDER must be fwd, rev or a number");
  return {Order::kShuffled, unsigned(seed)};
}

inline unsigned workers_from_environment() {
  if (kTsan || kAsan) return 1;  // races between blocks are found without real threads, and repeat
  const char* text = std::getenv("FF_SHIM_WORKERS");
  return text ? unsigned(std::atoi(text)) : std::thread::hardware_concurrency();
}

// The i-th block to run. The stride is a prime, so every block has its turn unless that prime divides their number.
inline size_t nth_block(size_t i, size_t blocks, Order order) {
  constexpr size_t kStride = 2654435761;
  if (order.kind == Order::kReverse) return blocks - 1 - i;
  if (order.kind == Order::kShuffled && blocks % kStride) return (i * kStride + order.seed) % blocks;
  return i;
}

class Worker {
 public:
  explicit Worker(const Launch& launch) : launch_(launch), threads_(launch.threads() * kFiberSets) {
    for (Thread& thread : threads_) thread.fiber = take_fiber();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    for (unsigned char* memory : memories_) {
      acquire(memory);  // exit_tag: all threads of that block have returned
      unpoison(memory, shared_bytes());
      std::free(memory);
    }
    for (Thread& thread : threads_) give_fiber(thread.fiber);
  }

  // Returns what went wrong, or an empty string.
  FF_SHIM_UNSEEN std::string run(size_t number) {
    begin(number);
    unsigned random = (launch_.order.seed + 1) * 2654435761u + unsigned(number);
    while (block_.running && block_.error.empty()) {
      int warps[32], lanes[32];
      arrange(warps, random);
      arrange(lanes, random);
      bool progress = false;
      for (int warp : warps) progress = run_warp(warp, lanes) || progress;
      if (!progress && block_.error.empty()) record_error(block_, deadlock());
    }
    return block_.error.empty() ? "" : join("block ", int(number), ": ", block_.error.c_str());
  }

 private:
  // Under TSan successive blocks take turns with two sets of fibers: the same fiber would order them.
  static constexpr int kFiberSets = kTsan ? 2 : 1;

  size_t shared_bytes() const { return (kDynamicOffset + launch_.dynamic_bytes + kGap + 127) / 128 * 128; }

  FF_SHIM_UNSEEN void begin(size_t number) {
    const dim3 grid = launch_.grid, dim = launch_.block;
    const int count = int(launch_.threads());
    if (kTsan || memories_.empty())  // under TSan no block inherits the tags of another
      memories_.push_back(static_cast<unsigned char*>(std::aligned_alloc(128, shared_bytes())));
    block_.threads = threads_.data() + number % kFiberSets * count;
    block_.count = block_.running = count;
    block_.arrived = 0;
    block_.index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    block_.block_dim = dim;
    block_.grid_dim = grid;
    block_.order = launch_.order;
    block_.shared = memories_.back();
    block_.static_bytes = block_.array_bytes = 0;
    block_.array_count = 0;
    block_.dynamic_bytes = launch_.dynamic_bytes;
    block_.dynamic_limit = launch_.dynamic_limit;
    block_.body = launch_.body;
    block_.context = launch_.context;
    block_.error.clear();

    // Unwritten shared memory reads as NaN or -1; under ASan only what arrays own can be touched.
    unpoison(block_.shared, shared_bytes());
    std::memset(block_.shared, 0xFF, shared_bytes());
    poison(block_.shared, shared_bytes());
    unpoison(block_.shared + kDynamicOffset, launch_.dynamic_bytes);
#if defined(__SANITIZE_THREAD__)
    block_.scheduler.tsan = __tsan_get_current_fiber();
#endif
    release(&block_);

    for (int i = 0; i < count; ++i) {
      Thread& thread = block_.threads[i];
      thread.block = &block_;
      thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
      thread.lane = i % 32;
      thread.warp = i / 32;
      thread.state = State::kReady;
      thread.barriers = 0;
      thread.copy_count = 0;
      thread.copy_group = 0;
      arm_fiber(thread.fiber, run_thread);
    }
  }

  // Fills `turns` with 0..31 in the launch's order.
  FF_SHIM_UNSEEN void arrange(int (&turns)[32], unsigned& random) {
    for (int i = 0; i < 32; ++i) turns[i] = launch_.order.kind == Order::kReverse ? 31 - i : i;
    if (launch_.order.kind != Order::kShuffled) return;
    for (int i = 31; i > 0; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(turns[i], turns[(random >> 16) % unsigned(i + 1)]);
    }
  }

  // Runs a warp until each of its lanes waits for another warp, or has returned. Tells whether any lane ran.
  FF_SHIM_UNSEEN bool run_warp(int warp, const int (&lanes)[32]) {
    bool progress = false;
    for (bool again = true; again;) {
      again = false;
      for (int lane : lanes) {
        const int i = warp * 32 + lane;
        if (i >= block_.count || block_.threads[i].state != State::kReady) continue;
        current = &block_.threads[i];
        switch_fiber(block_.scheduler, current->fiber);
        current = nullptr;
        if (!block_.error.empty()) return true;
        again = progress = true;
      }
    }
    return progress;
  }

  FF_SHIM_UNSEEN std::string deadlock() const {
    constexpr int kShown = 4;
    std::string message = "deadlock: not all threads reach";
    const Thread* shown = nullptr;
    int count = 0;
    for (int i = 0; i < block_.count && count < kShown; ++i) {
      const Thread& thread = block_.threads[i];
      if (thread.state == State::kReturned) continue;
      if (shown && shown->state == thread.state && shown->place == thread.place) continue;
      shown = &thread;
      message += count++ ? "; thread " : " a meeting point; thread ";
      append(message, i);
      message += thread.state == State::kAtBarrier ? " waits in __syncthreads at " : " waits in a warp operation at ";
      append(message, thread.place);
    }
    return message;
  }

  const Launch& launch_;
  std::vector<Thread> threads_;
  std::vector<unsigned char*> memories_;
  Block block_;
};

inline cudaError_t run_launch(const Launch& launch) {
  const size_t blocks = launch.blocks();
  const dim3 grid = launch.grid, dim = launch.block;
  if (!launch.threads() || launch.threads() > 1024 || dim.z > 64 || !blocks || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return report(cudaErrorInvalidConfiguration, "invalid configuration: grid or block is empty or too large");
  if (launch.dynamic_bytes > std::max(launch.dynamic_limit, kStaticShared))
    return report(cudaErrorInvalidValue,
                  "more dynamic shared memory than 48 KB, or than the kernel was allowed by cudaFuncSetAttribute");

  const unsigned workers = unsigned(std::clamp<size_t>(workers_from_environment(), 1, blocks));
  std::atomic<size_t> next{0};
  std::vector<std::string> errors(workers);
  auto work = [&](unsigned w) {
    Worker worker(launch);
    for (size_t i; errors[w].empty() && (i = next++) < blocks;)
      errors[w] = worker.run(nth_block(i, blocks, launch.order));
  };
  std::vector<std::thread> others;
  for (unsigned w = 1; w < workers; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& other : others) other.join();
  for (const std::string& error : errors)
    if (!error.empty()) return report(cudaErrorLaunchFailure, error);
  return cudaSuccess;
}

// As kernel<<<grid, block, dynamic_bytes, stream>>>(arguments...), and returns when the kernel has ended.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  auto call = [&] { std::apply(kernel, parameters); };
  auto body = [](const void* context) { (*static_cast<const decltype(call)*>(context))(); };
  const size_t limit = shared_limit(reinterpret_cast<const void*>(kernel));
  return run_launch({grid, block, dynamic_bytes, limit, order_from_environment(), body, &call});
}

}  // namespace ff::shim
