// What differs between nvcc and a C++ compiler that runs these kernels on the CPU for tests (emulate.h).
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#define DEVICE __device__ __forceinline__
#define KERNEL __global__ void
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define HOST_AND_DEVICE __host__ __device__ inline
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<blocks, threads, shared_bytes, stream>>>(__VA_ARGS__)
#define SHARED(name) extern __shared__ __align__(16) float name[]

DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }

DEVICE float to_float(bfloat16, unsigned bits) { return as_float(bits << 16); }
DEVICE float to_float(float16, unsigned bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE void from_float(float x, float& to) { to = x; }
DEVICE void from_float(float x, bfloat16& to) { to = __float2bfloat16_rn(x); }
DEVICE void from_float(float x, float16& to) { to = __float2half_rn(x); }

// The hardware's own functions; denormal numbers count as 0, which spares scaling them.
#define FAST(name, instruction)                                  \
  DEVICE float name(float x) {                                   \
    float y;                                                     \
    asm(#instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                    \
  }
FAST(fast_log2, lg2)
FAST(fast_exp2, ex2)
FAST(fast_sin, sin)
FAST(fast_cos, cos)
FAST(fast_sqrt, sqrt)
FAST(fast_inverse, rcp)
#undef FAST

// After it the compiler derives from `x` and from memory anew, instead of keeping in registers what it derived before.
DEVICE void forget(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

DEVICE unsigned high_product(unsigned x, unsigned y) { return __umulhi(x, y); }

// Sum over the lanes of a warp; the same bits in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

inline int processors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline size_t shared_memory_limit(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Null, or what an error means.
inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Null, or what went wrong since the last call.
inline const char* last_error() { return text(cudaGetLastError()); }

// Allows the kernel `shared_bytes` and finds how many of its blocks a processor holds at a time.
template <typename Kernel>
const char* resident_blocks(Kernel kernel, int threads, int shared_bytes, int& blocks) {
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const char* error = text(cudaFuncSetAttribute(kernel, limit, shared_bytes))) return error;
  return text(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
}

// Null, or why the kernel cannot be loaded on the current device.
template <typename Kernel>
const char* unusable(Kernel kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();  // clears it: said here, and not by the next call
  return text(error);
}

#else
#include "emulate.h"
#endif
