// After backward: gradients of parameters from the sums of its blocks, always in the same order.
//
// A block makes 32 channels of a row, see rows.h; the last one the temperature's.
#pragma once

#include "rows.h"

constexpr int kFinishWarps = 8;

HOST_AND_DEVICE int finish_groups(const Problem& p) { return (p.size + 31) / 32; }  // of 32 channels
HOST_AND_DEVICE int finish_blocks(const Problem& p) {
  return (p.num_rows - (p.num_previous ? 1 : 0)) * finish_groups(p) + 1;  // the sum of G belongs to other rows
}

// Sum over the warps of a block; a lane's own.
DEVICE float sum_of_warps(float* shared, float value) {
  shared[threadIdx.x] = value;
  sync_block();
  float sum = 0;
  for (int w = 0; w < kFinishWarps; ++w) sum += shared[w * 32 + threadIdx.x % 32];
  sync_block();
  return sum;
}

// Sum over blocks of a row's channel.
DEVICE float sum_of_blocks(const Problem& p, float* shared, int row, int channel) {
  const int place = channel % kWidth / 4 * (p.row_floats / 2) + channel / kWidth * 4 + channel % 4;
  float sum = 0;
#pragma unroll 8
  for (int block = threadIdx.x / 32; block < p.num_blocks; block += kFinishWarps) {
    sum += p.partial[((long long)block * p.num_rows + row) * p.row_floats + place];
  }
  return sum_of_warps(shared, sum);
}

DEVICE void finish_temperature(const Problem& p, float* shared) {
  float sum = 0;
  for (int block = threadIdx.x; block < p.num_blocks; block += blockDim.x) sum += p.partial_temperature[block];
  sum = warp_sum(sum_of_warps(shared, sum));
  // Scores were in units of log 2.
  if (threadIdx.x == 0) *p.temperature_grad = -sum / (kLog2e * *p.temperature);
}

KERNEL finish_kernel(const Problem p) {
  SHARED(shared);
  const int groups = finish_groups(p), row = blockIdx.x / groups, n = p.num_experts;
  if (blockIdx.x + 1 == gridDim.x) return finish_temperature(p, shared);
  int channel = blockIdx.x % groups * 32 + threadIdx.x % 32;
  const bool writes = threadIdx.x < 32 && channel < p.size;
  channel = channel < p.size ? channel : 0;
  const float sum = sum_of_blocks(p, shared, row, channel);
  const int previous = row - (p.adaptive ? 2 : 3) * n;
  if (previous < 0) {
    float* const to = row < n ? p.norm_weight_grad : row < 2 * n ? p.norm_bias_grad : p.logits_grad;
    if (writes) to[row % n * p.size + channel] = row < 2 * n ? sum : sum / *p.temperature;
    return;
  }
  const float total = sum_of_blocks(p, shared, p.num_rows - 1, channel);
  const int own = previous * p.size + channel, both = n * p.size + own;
  if (!writes) return;
  p.norm_weight_grad[both] = p.previous_weight[own] * sum;
  p.norm_bias_grad[both] = p.previous_weight[own] * total;
  p.previous_weight_grad[own] = p.norm_weight[both] * sum + p.norm_bias[both] * total;
}
