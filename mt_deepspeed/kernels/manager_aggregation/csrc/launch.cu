// The functions that cuda_impl.py calls. Plain C: what they are compiled with need not match torch's build.
//
// `kind`: 0 float32, 1 bfloat16, 2 float16; `device` is the current one. Those that launch return null or an error
// message.
#include <algorithm>

#include "backward.h"
#include "finish.h"
#include "forward.h"

#define QUOTED(text) #text
#define TEXT(macro) QUOTED(macro)

namespace {

#ifdef __CUDACC__
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

int threads_of_a_token(const Problem& p) { return (p.size / kWidth + 31) / 32 * 32; }

// Calls `call` with a value of the element type.
template <typename Call>
void with_element(int kind, Call call) {
  if (kind == 0) return call(float());
  if (kind == 1) return call(bfloat16());
  call(float16());
}

// Calls `call` with the kind of noise and whether logits are adaptive.
template <typename Call>
void with_kinds(const Problem& p, Call call) {
  const auto with_noise = [&](auto adaptive) {
    if (p.noise_kind == kNone) return call(std::integral_constant<int, kNone>(), adaptive);
    if (p.noise_kind == kGiven) return call(std::integral_constant<int, kGiven>(), adaptive);
    call(std::integral_constant<int, kPhilox>(), adaptive);
  };
  if (p.adaptive) return with_noise(std::true_type());
  with_noise(std::false_type());
}

// Two tokens share what is read of the parameters, unless that would leave processors without work.
constexpr int kTokens = 2;
constexpr int kWarpsThatKeepBusy = 16;

template <int kTokens, typename Element>
void launch_forward(const Problem& p, int device, Stream stream) {
  const int threads = threads_of_a_token(p);
  const long long needed = (p.num_tokens + kTokens - 1) / kTokens;
  const int blocks = int(std::min<long long>(needed, 64LL * processors(device)));
  const size_t shared_bytes = 2 * 2 * kTokens * (threads / 32) * sizeof(float);
  with_kinds(p, [&](auto noise, auto adaptive) {
    LAUNCH((forward_kernel<Element, decltype(noise)::value, decltype(adaptive)::value, kTokens>), blocks, threads,
           shared_bytes, stream, p);
  });
}

// Calls `call` with the backward kernel for the problem.
template <typename Call>
void with_backward(const Problem& p, int kind, Call call) {
  with_element(kind, [&](auto element) {
    with_kinds(p, [&](auto noise, auto adaptive) {
      using Element = decltype(element);
      constexpr int kNoise = decltype(noise)::value;
      constexpr bool kAdaptive = decltype(adaptive)::value;
      if (!p.shared_rows) return call(backward_kernel<Element, 0, kNoise, kAdaptive, false>);
      if (p.num_experts == kKept && p.size <= kMaxKeptSize) {
        return call(backward_kernel<Element, kKept, kNoise, kAdaptive, true>);
      }
      call(backward_kernel<Element, 0, kNoise, kAdaptive, true>);
    });
  });
}

// Shared memory that a block asks for, and how many of them a processor holds.
const char* plan_rows(Problem& p, int kind, bool shared_rows, int& resident) {
  const int threads = threads_of_a_token(p);
  p.shared_rows = shared_rows;
  p.shared_bytes = int((sums_floats(p, threads) + (shared_rows ? p.num_rows * p.row_floats : 0)) * sizeof(float));
  const char* error = nullptr;
  with_backward(p, kind, [&](auto kernel) { error = resident_blocks(kernel, threads, p.shared_bytes, resident); });
  return error;
}

const char* plan_backward(Problem& p, int kind, int device) {
  constexpr int kWarpsWorthSharing = 8;
  p.num_rows = num_rows(p);
  p.row_floats = threads_of_a_token(p) * kWidth;
  const size_t needed = (sums_floats(p, threads_of_a_token(p)) + size_t(p.num_rows) * p.row_floats) * sizeof(float);
  const bool fits = needed <= shared_memory_limit(device);
  int resident = 0;
  if (const char* error = plan_rows(p, kind, fits, resident)) return error;
  if (fits && resident * threads_of_a_token(p) < 32 * kWarpsWorthSharing) {
    if (const char* error = plan_rows(p, kind, false, resident)) return error;
  }
  // Each block writes its rows once: blocks of a few tokens only would spend their time on that.
  const long long useful = std::max<long long>(p.num_tokens / 16, processors(device));
  const long long possible = resident * (long long)processors(device);
  p.num_blocks = int(std::max<long long>(1, std::min<long long>({possible, useful, p.num_tokens})));
  return nullptr;
}

}  // namespace

extern "C" {

const char* mt_statistics(const Problem* p, int kind, int device, void* stream) {
  const long long needed = (p->num_tokens * p->num_experts * 32LL + kStatisticsThreads - 1) / kStatisticsThreads;
  const int blocks = int(std::min<long long>(needed, 64LL * processors(device)));
  with_element(kind, [&](auto element) {
    LAUNCH((statistics_kernel<decltype(element)>), blocks, kStatisticsThreads, 0, static_cast<Stream>(stream), *p);
  });
  return last_error();
}

const char* mt_forward(const Problem* p, int kind, int device, void* stream) {
  const long long warps = p->num_tokens / kTokens * (long long)threads_of_a_token(*p) / 32;
  const bool few = warps < (long long)kWarpsThatKeepBusy * processors(device);
  with_element(kind, [&](auto element) {
    if (few) return launch_forward<1, decltype(element)>(*p, device, static_cast<Stream>(stream));
    launch_forward<kTokens, decltype(element)>(*p, device, static_cast<Stream>(stream));
  });
  return last_error();
}

// Chooses how backward runs, and with it the sizes of `partial` and `partial_temperature`: the last fields of `p`.
const char* mt_plan_backward(Problem* p, int kind, int device, void*) { return plan_backward(*p, kind, device); }

// After mt_plan_backward.
const char* mt_backward(const Problem* p, int kind, int, void* stream) {
  const auto queue = static_cast<Stream>(stream);
  with_backward(*p, kind, [&](auto kernel) {
    LAUNCH(kernel, p->num_blocks, threads_of_a_token(*p), p->shared_bytes, queue, *p);
  });
  LAUNCH(finish_kernel, finish_blocks(*p), 32 * kFinishWarps, 32 * kFinishWarps * sizeof(float), queue, *p);
  return last_error();
}

// Why the kernels cannot run on the current device (an older driver, another processor), or null.
const char* mt_unusable() { return unusable(statistics_kernel<float>); }

// What the library was compiled from, see build.py.
const char* mt_sources() { return TEXT(MT_SOURCES); }

int mt_problem_bytes() { return int(sizeof(Problem)); }

}  // extern "C"
