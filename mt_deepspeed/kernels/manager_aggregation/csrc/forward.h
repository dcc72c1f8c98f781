// Statistics: a warp per token and state. Forward: a block per kTokens tokens, a thread per 8 channels of each, so that
// they share one reading of the parameters and few tokens still make many warps.
#pragma once

#include "mixture.h"

constexpr int kStatisticsThreads = 128;
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
    for (int c = 0; c < kWidth; ++c) sum += packs[k][c];
  }
  mean = warp_sum(sum) / (chunks * kWidth);
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kMaxChunksPerLane; ++k) {
    if (lane + 32 * k >= chunks) break;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float centred = packs[k][c] - mean;
      squares += centred * centred;
    }
  }
  inverse_deviation = 1.0f / sqrtf(warp_sum(squares) / (chunks * kWidth) + eps);
}

// Statistics [2, N, T] of p.states[0 .. N - 1] into p.previous_statistics, which has that shape here.
template <typename T>
KERNEL statistics_kernel(const Problem p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, chunks = p.size / kWidth;
  const int rows = p.num_tokens * p.num_experts;
  for (int row = blockIdx.x * warps + threadIdx.x / 32; row < rows; row += gridDim.x * warps) {
    float mean, inverse_deviation;
    moments<T>(p.states[row / p.num_tokens], row % p.num_tokens, chunks, p.eps, lane, mean, inverse_deviation);
    if (lane == 0) {
      p.previous_statistics[row] = mean;
      p.previous_statistics[rows + row] = inverse_deviation;
    }
  }
}

// Of state i, if there is one.
template <typename T, int kTokens>
DEVICE void load_parts(const Problem& p, int i, const int (&tokens)[kTokens], const long long (&at)[kTokens],
                       Part<T> (&to)[kTokens]) {
  if (i >= p.num_experts + p.num_previous) return;
#pragma unroll
  for (int k = 0; k < kTokens; ++k) to[k] = load_part<T>(p, i, tokens[k], at[k]);
}

// Means and deviations of the rows that a block's threads hold, from those of its warps (Chan et al., 1979).
template <typename T, int kTokens>
DEVICE void block_moments(float* shared, bool present, int size, float eps, Part<T> (&parts)[kTokens]) {
  struct alignas(8) Moments {
    float mean, squares;
  };
  Moments* const of_warps = reinterpret_cast<Moments*>(shared);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, last = size - 32 * kWidth * (warps - 1);
  const float inverse_count = 1.0f / (warp + 1 < warps ? 32 * kWidth : last);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum += present ? parts[k].pack[c] : 0;
    const float mean = warp_sum(sum) * inverse_count;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float centred = present ? parts[k].pack[c] - mean : 0;
      squares += centred * centred;
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) of_warps[warp * kTokens + k] = {mean, squares};
  }
  sync_block();
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const float first = of_warps[k].mean;  // all is taken relative to it, so that nothing cancels
    float apart = of_warps[(warps - 1) * kTokens + k].mean - first, sum = apart * last;
    float squares = of_warps[(warps - 1) * kTokens + k].squares + apart * sum;
#pragma unroll 1
    for (int w = 0; w < warps - 1; ++w) {
      const Moments one = of_warps[w * kTokens + k];
      apart = one.mean - first;
      sum += apart * (32 * kWidth);
      squares += one.squares + apart * apart * (32 * kWidth);
    }
    const float offset = sum * (1.0f / size);
    parts[k].mean = first + offset;
    parts[k].inverse_deviation = fast_inverse(fast_sqrt((squares - offset * sum) * (1.0f / size) + eps));
  }
}

template <typename T, int kNoise, bool kAdaptive, int kTokens>
KERNEL LAUNCH_BOUNDS(kMaxSize / kWidth, 2) forward_kernel(const Problem p) {
  SHARED(shared);
  const int n = p.num_experts, chunks = p.size / kWidth;
  const bool present = threadIdx.x < chunks;  // the last warp may be partly idle, but takes part in the sums
  const int chunk = present ? threadIdx.x : 0;
  const Scores<kNoise, kAdaptive> scores(p);
  int parity = 0;  // two halves of `shared`, so that one barrier a state is enough

  for (int first = blockIdx.x * kTokens; first < p.num_tokens; first += gridDim.x * kTokens) {
    int tokens[kTokens];  // the last one repeats where there are no more: both write the same
    long long at[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      tokens[k] = first + k < p.num_tokens ? first + k : p.num_tokens - 1;
      at[k] = (long long)tokens[k] * chunks + chunk;
    }
    Part<T> parts[kTokens], next[kTokens];  // a state is loaded while the one before is computed with
    Mixture mixtures[kTokens];
    load_parts(p, 0, tokens, at, next);
    int parameters = chunk;  // where a state's lie
    for (int i = 0; i < n; ++i, parameters += chunks) {
      float gain[kWidth], bias[kWidth], logits[kWidth];
      scores.load_logits(p, parameters, logits);
      load(p.norm_weight, parameters, gain);
      load(p.norm_bias, parameters, bias);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) parts[k] = next[k];
      load_parts(p, i + 1, tokens, at, next);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        float above[kWidth], values[kWidth];
        scores.above(p, i, tokens[k], chunk, logits, mixtures[k].base, above);
        standardise(parts[k], values);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) values[c] = values[c] * gain[c] + bias[c];
        mixtures[k].add(i == 0, above, values);
      }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) mixtures[k].total[c] *= fast_inverse(mixtures[k].sum[c]);
    }
    for (int j = 0; j < p.num_previous; ++j, parameters += chunks, parity ^= 1) {
      float gain[kWidth], bias[kWidth], weight[kWidth];
      load(p.norm_weight, parameters, gain);
      load(p.norm_bias, parameters, bias);
      load(p.previous_weight, j * chunks + chunk, weight);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) parts[k] = next[k];
      load_parts(p, n + j + 1, tokens, at, next);
      block_moments(shared + parity * 2 * kTokens * (blockDim.x / 32), present, p.size, p.eps, parts);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        float values[kWidth];
        standardise(parts[k], values);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) mixtures[k].total[c] += weight[c] * (values[c] * gain[c] + bias[c]);
        if (threadIdx.x == 0) {
          p.previous_statistics[j * p.num_tokens + tokens[k]] = parts[k].mean;
          p.previous_statistics[(p.num_previous + j) * p.num_tokens + tokens[k]] = parts[k].inverse_deviation;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (present) store<T>(p.out, at[k], mixtures[k].total);
    }
  }
}
