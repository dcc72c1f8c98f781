// Runs CUDA kernels on the CPU, for tests: the threads of a block take turns, one block after the other.
//
// Every thread is a fiber that runs until its next barrier or warp sum and then hands over to the next one, so that
// threads of a warp, which meet the same ones, go in step. A block's barrier holds because ours are met by all threads
// after equally many hand-overs, which is checked.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

struct bfloat16 {
  unsigned short bits;
};
using float16 = _Float16;

#define DEVICE inline
#define KERNEL inline void
#define LAUNCH_BOUNDS(threads, blocks)
#define HOST_AND_DEVICE inline
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  emulate::run(blocks, threads, shared_bytes, [&] { (kernel)(__VA_ARGS__); }), (void)(stream)
#define SHARED(name) float* name = emulate::shared.data()

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

inline std::vector<float> shared;
inline std::vector<float> lanes;  // one value of each thread, for warp sums
inline std::vector<ucontext_t> fibers;
inline ucontext_t scheduler;
inline std::vector<bool> finished;
inline std::vector<int> handovers, barriers;  // of each thread, so far
inline std::vector<int> handovers_at;         // each barrier of the block
inline std::function<void()> body;

inline void yield() {
  const unsigned me = threadIdx.x;
  ++handovers[me];
  swapcontext(&fibers[me], &scheduler);
  threadIdx.x = me;
}

inline void barrier() {
  const size_t number = barriers[threadIdx.x]++;
  if (number == handovers_at.size()) handovers_at.push_back(handovers[threadIdx.x]);
  if (handovers_at[number] != handovers[threadIdx.x]) std::abort();
  yield();
}

inline void enter() {
  body();
  finished[threadIdx.x] = true;
}

inline void run(int blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  constexpr size_t kStack = 256 << 10;
  body = std::move(kernel);
  gridDim.x = blocks, blockDim.x = threads;
  std::unique_ptr<char[]> stacks(new char[kStack * threads]);
  lanes.assign(threads, 0);
  for (int block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    // A guard behind what was asked for, and not-a-numbers in it, as nothing initialises shared memory.
    shared.assign(shared_bytes / sizeof(float) + 1, NAN);
    shared.back() = 12345.0f;
    fibers.assign(threads, {});
    finished.assign(threads, false);
    handovers.assign(threads, 0);
    barriers.assign(threads, 0);
    handovers_at.clear();
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = stacks.get() + kStack * t;
      fibers[t].uc_stack.ss_size = kStack;
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], enter, 0);
    }
    while (std::find(finished.begin(), finished.end(), false) != finished.end()) {
      for (int t = 0; t < threads; ++t) {
        threadIdx.x = t;
        if (!finished[t]) swapcontext(&scheduler, &fibers[t]);
      }
    }
    for (int count : barriers) {
      if (count != barriers[0]) std::abort();
    }
    if (shared.back() != 12345.0f) std::abort();
  }
}

}  // namespace emulate

inline void sync_warp() { emulate::yield(); }
inline void sync_block() { emulate::barrier(); }

inline float warp_sum(float x) {
  emulate::lanes[threadIdx.x] = x;
  emulate::yield();
  float values[32];
  for (int lane = 0; lane < 32; ++lane) values[lane] = emulate::lanes[threadIdx.x / 32 * 32 + lane];
  emulate::yield();
  // The order of a butterfly of exchanges.
  for (int step = 16; step; step /= 2) {
    for (int lane = 0; lane < step; ++lane) values[lane] += values[lane + step];
  }
  return values[0];
}

inline float as_float(unsigned bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(bfloat16, unsigned bits) { return as_float(bits << 16); }
inline float to_float(float16, unsigned bits) {
  const unsigned short half = static_cast<unsigned short>(bits);
  float16 result;
  std::memcpy(&result, &half, 2);
  return float(result);
}
inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, bfloat16& to) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  to.bits = static_cast<unsigned short>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);  // nearest, ties to even
}
inline void from_float(float x, float16& to) { to = float16(x); }

inline float fast_log2(float x) { return std::log2(x); }
inline float fast_sin(float x) { return std::sin(x); }
inline float fast_cos(float x) { return std::cos(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_sqrt(float x) { return std::sqrt(x); }
inline float fast_inverse(float x) { return 1.0f / x; }
inline void forget(unsigned&) {}
inline unsigned high_product(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
using std::fmaxf;

// A device of 3 processors that hold 8 blocks each; its shared memory is what the test says.
inline int processors(int) { return 3; }
inline size_t shared_memory_limit(int) {
  const char* bytes = std::getenv("EMULATED_SHARED_BYTES");
  return bytes ? std::atol(bytes) : 232448;
}
template <typename Kernel>
const char* resident_blocks(Kernel, int, int, int& blocks) {
  blocks = 8;
  return nullptr;
}
template <typename Kernel>
const char* unusable(Kernel) {
  return nullptr;
}
inline const char* last_error() { return nullptr; }
