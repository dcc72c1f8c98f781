// The functions that cuda_impl.py calls. Plain C: what they are compiled with need not match torch's build.
//
// `kind`: 0 float32, 1 bfloat16, 2 float16; `device` is the current one. Those that launch return null or an error
// message.
#include <algorithm>

#include "backward.h"
#include "forward.h"

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

struct Plan {
  int threads;
  int blocks;
  size_t shared_bytes;
  bool rows_in_shared_memory;
};

template <typename Kernel>
Plan plan_backward(Kernel kernel, const Problem& p, int device) {
  Plan plan;
  plan.threads = (p.size / kWidth + 31) / 32 * 32;
  const size_t sums = (2 * (plan.threads / 32) * (2 * (p.num_experts + p.num_previous) + p.num_experts) + 3) / 4 * 4;
  const size_t rows = size_t(num_rows(p)) * p.size;
  plan.rows_in_shared_memory = (sums + rows) * sizeof(float) <= shared_memory_limit(device);
  plan.shared_bytes = (sums + (plan.rows_in_shared_memory ? rows : 0)) * sizeof(float);
  const long long resident = resident_blocks(kernel, plan.threads, plan.shared_bytes) * (long long)processors(device);
  // Each block writes its rows once: blocks of a few tokens only would spend their time on that.
  const long long useful = std::max<long long>(p.num_tokens / 16, processors(device));
  plan.blocks = int(std::max<long long>(1, std::min({resident, useful, p.num_tokens})));
  return plan;
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

// Rows of a block's part of `partial`, see backward.h.
int mt_backward_rows(const Problem* p) { return num_rows(*p); }

// Number of blocks, which is the first size of `partial` and of `partial_temperature`.
int mt_backward_blocks(const Problem* p, int kind, int device) {
  int blocks = 0;
  with_types(*p, kind, [&](auto element, auto max_experts) {
    blocks = plan_backward(backward_kernel<decltype(element), decltype(max_experts)::value>, *p, device).blocks;
  });
  return blocks;
}

const char* mt_backward(const Problem* p, int kind, int device, void* stream) {
  with_types(*p, kind, [&](auto element, auto max_experts) {
    const auto kernel = backward_kernel<decltype(element), decltype(max_experts)::value>;
    const Plan plan = plan_backward(kernel, *p, device);
    LAUNCH(kernel, plan.blocks, plan.threads, plan.shared_bytes, static_cast<Stream>(stream), *p,
           plan.rows_in_shared_memory);
  });
  return last_error();
}

int mt_problem_bytes() { return int(sizeof(Problem)); }

}  // extern "C"
