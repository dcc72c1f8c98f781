// Statistics and forward: a warp per token, no shared memory, no synchronisation of blocks.
#pragma once

#include "problem.h"

constexpr int kForwardThreads = 128;
constexpr int kForwardBlocks = 3;  // on a processor at a time: at most 170 registers, for more warps to hide latency
constexpr int kMaxChunksPerLane = kMaxSize / kWidth / 32;

// Mean and inverse deviation of a row; all lanes of the warp call it and receive the same.
template <typename T>
DEVICE void moments(const void* state, long long token, int chunks, float eps, int lane, float& mean,
                    float& inverse_deviation) {
  Pack<T> packs[kMaxChunksPerLane];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kMaxChunksPerLane; ++k) {
    const int chunk = lane + 32 * k;
    if (chunk >= chunks) break;
    packs[k] = load<T>(state, token * chunks + chunk);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum += to_float(packs[k].values[c]);
  }
  mean = warp_sum(sum) / (chunks * kWidth);
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kMaxChunksPerLane; ++k) {
    if (lane + 32 * k >= chunks) break;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float centred = to_float(packs[k].values[c]) - mean;
      squares += centred * centred;
    }
  }
  inverse_deviation = 1.0f / sqrtf(warp_sum(squares) / (chunks * kWidth) + eps);
}

// Statistics [2, N, T] of p.states[0 .. N - 1] into p.previous_statistics, which has that shape here.
template <typename T>
KERNEL statistics_kernel(const Problem p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, chunks = p.size / kWidth;
  const long long rows = p.num_tokens * p.num_experts;
  for (long long row = blockIdx.x * warps + threadIdx.x / 32; row < rows; row += (long long)gridDim.x * warps) {
    float mean, inverse_deviation;
    moments<T>(p.states[row / p.num_tokens], row % p.num_tokens, chunks, p.eps, lane, mean, inverse_deviation);
    if (lane == 0) {
      p.previous_statistics[row] = mean;
      p.previous_statistics[rows + row] = inverse_deviation;
    }
  }
}

template <typename T, int kMaxExperts>
KERNEL LAUNCH_BOUNDS(kForwardThreads, kForwardBlocks) forward_kernel(const Problem p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, chunks = p.size / kWidth;
  const int n = p.num_experts;
  const float inverse_temperature = 1.0f / *p.temperature;
  for (long long token = blockIdx.x * warps + threadIdx.x / 32; token < p.num_tokens;
       token += (long long)gridDim.x * warps) {
    for (int j = 0; j < p.num_previous; ++j) {
      float mean, inverse_deviation;
      moments<T>(p.states[n + j], token, chunks, p.eps, lane, mean, inverse_deviation);
      if (lane == 0) {
        p.previous_statistics[j * p.num_tokens + token] = mean;
        p.previous_statistics[(p.num_previous + j) * p.num_tokens + token] = inverse_deviation;
      }
    }
    sync_warp();  // lane 0's numbers are read by all lanes below
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      float weights[kMaxExperts][kWidth], total[kWidth] = {};
      mixing_weights<kMaxExperts>(p, token, chunk, inverse_temperature, weights, weights);
      each_expert<kMaxExperts>(n, [&](int i) {
        const float mean = p.statistics[i * p.num_tokens + token];
        const float inverse_deviation = p.statistics[(n + i) * p.num_tokens + token];
        const Pack<T> pack = load<T>(p.states[i], token * chunks + chunk);
        float gain[kWidth], bias[kWidth];
        load(p.norm_weight, i * chunks + chunk, gain);
        load(p.norm_bias, i * chunks + chunk, bias);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float standard = (to_float(pack.values[c]) - mean) * inverse_deviation;
          total[c] += weights[i][c] * (standard * gain[c] + bias[c]);
        }
      });
      for (int j = 0; j < p.num_previous; ++j) {
        const float mean = p.previous_statistics[j * p.num_tokens + token];
        const float inverse_deviation = p.previous_statistics[(p.num_previous + j) * p.num_tokens + token];
        float gain[kWidth], bias[kWidth], weight[kWidth];
        load(p.norm_weight, (n + j) * chunks + chunk, gain);
        load(p.norm_bias, (n + j) * chunks + chunk, bias);
        load(p.previous_weight, j * chunks + chunk, weight);
        const Pack<T> pack = load<T>(p.states[n + j], token * chunks + chunk);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float standard = (to_float(pack.values[c]) - mean) * inverse_deviation;
          total[c] += weight[c] * (standard * gain[c] + bias[c]);
        }
      }
      store<T>(p.out, token * chunks + chunk, total);
    }
  }
}
