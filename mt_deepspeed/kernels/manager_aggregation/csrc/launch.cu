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

int forward_blocks(long long warps_needed, int device) {
  const long long blocks = (warps_needed + kForwardThreads / 32 - 1) / (kForwardThreads / 32);
  return int(std::min<long long>(blocks, 64LL * processors(device)));
}

}  // namespace

extern "C" {

const char* mt_statistics(const Problem* p, int kind, int device, void* stream) {
  const int blocks = forward_blocks(p->num_tokens * p->num_experts, device);
  with_types(*p, kind, [&](auto element, auto) {
    LAUNCH((statistics_kernel<decltype(element)>), blocks, kForwardThreads, 0, static_cast<Stream>(stream), *p);
  });
  return last_error();
}

const char* mt_forward(const Problem* p, int kind, int device, void* stream) {
  const int blocks = forward_blocks(p->num_tokens, device);
  with_types(*p, kind, [&](auto element, auto max_experts) {
    LAUNCH((forward_kernel<decltype(element), decltype(max_experts)::value>), blocks, kForwardThreads, 0,
           static_cast<Stream>(stream), *p);
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
