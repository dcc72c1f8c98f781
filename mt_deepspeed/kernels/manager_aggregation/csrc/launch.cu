// The functions that cuda_impl.py calls. Plain C: what they are compiled with need not match torch's build.
//
// `kind`: 0 float32, 1 bfloat16, 2 float16; `device` is the current one. Those that launch return null or an error
// message.
#include <algorithm>

#include "backward.h"
#include "forward.h"

#define QUOTED(text) #text
#define TEXT(macro) QUOTED(macro)

namespace {

#ifdef __CUDACC__
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

// Calls `call` with a value of the element type and the bound on the number of experts that fit.
template <typename Call>
void with_types(const Problem& p, int kind, Call call) {
  const auto with_type = [&](auto element) {
    if (p.num_experts <= kFewExperts) return call(element, std::integral_constant<int, kFewExperts>());
    return call(element, std::integral_constant<int, kManyExperts>());
  };
  if (kind == 0) return with_type(float());
  if (kind == 1) return with_type(bfloat16());
  with_type(float16());
}

int backward_threads(const Problem& p) { return (p.size / kWidth + 31) / 32 * 32; }

template <typename Kernel>
const char* plan_backward(Kernel kernel, Problem& p, int device) {
  const int threads = backward_threads(p);
  const size_t sums = (2 * (threads / 32) * (2 * (p.num_experts + p.num_previous) + p.num_experts) + 3) / 4 * 4;
  const size_t rows = size_t(num_rows(p)) * p.size;
  p.num_rows = num_rows(p);
  p.shared_rows = (sums + rows) * sizeof(float) <= shared_memory_limit(device);
  p.shared_bytes = (sums + (p.shared_rows ? rows : 0)) * sizeof(float);
  int resident = 0;
  if (const char* error = resident_blocks(kernel, threads, p.shared_bytes, resident)) return error;
  // Each block writes its rows once: blocks of a few tokens only would spend their time on that.
  const long long useful = std::max<long long>(p.num_tokens / 16, processors(device));
  const long long possible = resident * (long long)processors(device);
  p.num_blocks = int(std::max<long long>(1, std::min({possible, useful, p.num_tokens})));
  return nullptr;
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
  const int threads = (p.size / kWidth + 31) / 32 * 32;
  const long long needed = (p.num_tokens + kTokens - 1) / kTokens;
  const int blocks = int(std::min<long long>(needed, 64LL * processors(device)));
  const size_t shared_bytes = 2 * 2 * kTokens * (threads / 32) * sizeof(float);
  with_kinds(p, [&](auto noise, auto adaptive) {
    LAUNCH((forward_kernel<Element, decltype(noise)::value, decltype(adaptive)::value, kTokens>), blocks, threads,
           shared_bytes, stream, p);
  });
}

}  // namespace

extern "C" {

const char* mt_statistics(const Problem* p, int kind, int device, void* stream) {
  const long long needed = (p->num_tokens * p->num_experts * 32 + kStatisticsThreads - 1) / kStatisticsThreads;
  const int blocks = int(std::min<long long>(needed, 64LL * processors(device)));
  with_types(*p, kind, [&](auto element, auto) {
    LAUNCH((statistics_kernel<decltype(element)>), blocks, kStatisticsThreads, 0, static_cast<Stream>(stream), *p);
  });
  return last_error();
}

const char* mt_forward(const Problem* p, int kind, int device, void* stream) {
  const long long warps = p->num_tokens / kTokens * ((p->size / kWidth + 31) / 32);
  const bool few = warps < (long long)kWarpsThatKeepBusy * processors(device);
  with_types(*p, kind, [&](auto element, auto) {
    if (few) return launch_forward<1, decltype(element)>(*p, device, static_cast<Stream>(stream));
    launch_forward<kTokens, decltype(element)>(*p, device, static_cast<Stream>(stream));
  });
  return last_error();
}

// Chooses how backward runs, and with it the sizes of `partial` and `partial_temperature`: the last fields of `p`.
const char* mt_plan_backward(Problem* p, int kind, int device, void*) {
  const char* error = nullptr;
  with_types(*p, kind, [&](auto element, auto max_experts) {
    error = plan_backward(backward_kernel<decltype(element), decltype(max_experts)::value>, *p, device);
  });
  return error;
}

// After mt_plan_backward.
const char* mt_backward(const Problem* p, int kind, int, void* stream) {
  with_types(*p, kind, [&](auto element, auto max_experts) {
    LAUNCH((backward_kernel<decltype(element), decltype(max_experts)::value>), p->num_blocks, backward_threads(*p),
           p->shared_bytes, static_cast<Stream>(stream), *p);
  });
  return last_error();
}

// Why the kernels cannot run on the current device (an older driver, another processor), or null.
const char* mt_unusable() { return unusable(statistics_kernel<float>); }

// What the library was compiled from, see build.py.
const char* mt_sources() { return TEXT(MT_SOURCES); }

int mt_problem_bytes() { return int(sizeof(Problem)); }

}  // extern "C"
