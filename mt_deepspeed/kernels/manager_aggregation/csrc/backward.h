// Backward: a block per token, a thread per 8 channels, so that every tensor is read once.
//
// Gradients of parameters are sums over tokens. A block adds those of its tokens to rows of its own, in shared
// memory where they fit and in its part of `partial` where not; the caller sums over blocks: no atomics.
// Rows of D channels, G the gradient of the result, a_i weights, x_i standardised states, s_i scores:
//   i                    sum of a_i G x_i      -> gradient of gain i
//   N + i                sum of a_i G          -> gradient of bias i
//   2 N + i              sum of d s_i / T      -> gradient of logits i (only when static)
//   then j = 0 .. P - 1  sum of G x_{N+j};  last: sum of G     (only when P > 0)
#pragma once

#include "problem.h"

constexpr int kMaxReduced = 3 * kMaxStates;  // values summed over a token's channels
constexpr int kMaxWarps = kMaxSize / kWidth / 32;

HOST_AND_DEVICE int num_rows(const Problem& p) {
  return (p.adaptive ? 2 : 3) * p.num_experts + (p.num_previous ? p.num_previous + 1 : 0);
}

DEVICE void add(float* to, const float (&values)[kWidth]) {
  Quad* quads = reinterpret_cast<Quad*>(to);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Quad sum = quads[half];
#pragma unroll
    for (int c = 0; c < 4; ++c) sum.values[c] += values[4 * half + c];
    quads[half] = sum;
  }
}

// Gradient of a layer norm's input, from sums over channels of `inner` and of `inner` x `standard`.
template <typename T>
DEVICE void store_state_grad(void* to, long long pack, const float (&inner)[kWidth], const float (&standard)[kWidth],
                             float mean_inner, float mean_along, float inverse_deviation) {
  float result[kWidth];
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    result[c] = (inner[c] - mean_inner - standard[c] * mean_along) * inverse_deviation;
  }
  store<T>(to, pack, result);
}

template <typename T, int kMaxExperts>
KERNEL backward_kernel(const Problem p) {
  SHARED(shared);
  const int chunks = p.size / kWidth, chunk = threadIdx.x, n = p.num_experts, states = n + p.num_previous;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool present = chunk < chunks;  // the last warp may be partly idle, but takes part in the sums
  const int rows = p.num_rows, reduced = 2 * states + n;
  float* const sums = shared;  // [2, warps, reduced]: two tokens' sums, so that one barrier a token is enough
  float* const own = p.shared_rows ? shared + (2 * warps * reduced + 3) / 4 * 4
                                           : p.partial + (long long)blockIdx.x * rows * p.size;
  const float zeros[kWidth] = {};
  if (present) {
    for (int row = 0; row < rows; ++row) store<float>(own, row * chunks + chunk, zeros);
  }
  const float inverse_temperature = 1.0f / *p.temperature, inverse_size = 1.0f / p.size;
  float temperature_sum = 0;
  int parity = 0;

  for (long long token = blockIdx.x; token < p.num_tokens; token += gridDim.x, parity ^= 1) {
    float* const here = sums + parity * warps * reduced;
    float grad[kWidth] = {}, grads[kMaxExperts][kWidth];  // grads: of the normalised experts
    Pack<T> packs[kMaxExperts];
    if (present) {
      const Pack<T> found = load<T>(p.grad, token * chunks + chunk);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) grad[c] = found[c];
      each_expert<kMaxExperts>(n, [&](int i) {
        packs[i] = load<T>(p.states[i], token * chunks + chunk);
      });
    }

    // Sums over channels: of inner = gain x gradient, of inner x standardised state, of the scores' gradients.
    float mixed[kWidth] = {}, scores[kMaxExperts][kWidth];
    if (present) {
      mixing_weights<kMaxExperts>(p, token, chunk, inverse_temperature, scores, grads);
      each_expert<kMaxExperts>(n, [&](int i) {
        const float mean = p.statistics[i * p.num_tokens + token];
        const float inverse_deviation = p.statistics[(n + i) * p.num_tokens + token];
        float gain[kWidth], bias[kWidth];
        load(p.norm_weight, i * chunks + chunk, gain);
        load(p.norm_bias, i * chunks + chunk, bias);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float standard = (packs[i][c] - mean) * inverse_deviation;
          mixed[c] += grads[i][c] * (standard * gain[c] + bias[c]);
        }
      });
    }
    each_expert<kMaxExperts>(n, [&](int i) {
      float inner_sum = 0, along_sum = 0, score_sum = 0;
      if (present) {
        const float mean = p.statistics[i * p.num_tokens + token];
        const float inverse_deviation = p.statistics[(n + i) * p.num_tokens + token];
        float gain[kWidth], bias[kWidth], gain_grad[kWidth], score_grad[kWidth];
        load(p.norm_weight, i * chunks + chunk, gain);
        load(p.norm_bias, i * chunks + chunk, bias);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float standard = (packs[i][c] - mean) * inverse_deviation;
          grads[i][c] *= grad[c];
          gain_grad[c] = grads[i][c] * standard;
          score_grad[c] = grads[i][c] * (standard * gain[c] + bias[c] - mixed[c]) * inverse_temperature;
          temperature_sum -= score_grad[c] * scores[i][c];
          inner_sum += grads[i][c] * gain[c];
          along_sum += gain_grad[c] * gain[c];
          score_sum += score_grad[c];
        }
        add(own + i * p.size + chunk * kWidth, gain_grad);
        add(own + (n + i) * p.size + chunk * kWidth, grads[i]);
        if (!p.adaptive) add(own + (2 * n + i) * p.size + chunk * kWidth, score_grad);
      }
      inner_sum = warp_sum(inner_sum);
      along_sum = warp_sum(along_sum);
      if (p.adaptive) score_sum = warp_sum(score_sum);
      if (lane == 0) {
        here[warp * reduced + i] = inner_sum;
        here[warp * reduced + states + i] = along_sum;
        here[warp * reduced + 2 * states + i] = score_sum;
      }
    });
    const int first_row = (p.adaptive ? 2 : 3) * n;
    for (int j = 0; j < p.num_previous; ++j) {
      float inner_sum = 0, along_sum = 0;
      if (present) {
        const float mean = p.previous_statistics[j * p.num_tokens + token];
        const float inverse_deviation = p.previous_statistics[(p.num_previous + j) * p.num_tokens + token];
        const Pack<T> pack = load<T>(p.states[n + j], token * chunks + chunk);
        float gain[kWidth], weight[kWidth], along[kWidth];
        load(p.norm_weight, (n + j) * chunks + chunk, gain);
        load(p.previous_weight, j * chunks + chunk, weight);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          along[c] = grad[c] * (pack[c] - mean) * inverse_deviation;
          inner_sum += grad[c] * weight[c] * gain[c];
          along_sum += along[c] * weight[c] * gain[c];
        }
        add(own + (first_row + j) * p.size + chunk * kWidth, along);
      }
      inner_sum = warp_sum(inner_sum);
      along_sum = warp_sum(along_sum);
      if (lane == 0) {
        here[warp * reduced + n + j] = inner_sum;
        here[warp * reduced + states + n + j] = along_sum;
      }
    }
    if (present && p.num_previous) add(own + (first_row + p.num_previous) * p.size + chunk * kWidth, grad);
    sync_block();

    // The warps' sums, always in the same order.
    const auto total = [&](int value) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += here[w * reduced + value];
      return sum;
    };
    if (p.adaptive && threadIdx.x < n) {
      p.logits_grad[token * n + threadIdx.x] = total(2 * states + threadIdx.x);
    }
    if (!present) continue;
    each_expert<kMaxExperts>(n, [&](int i) {
      const float mean = p.statistics[i * p.num_tokens + token];
      const float inverse_deviation = p.statistics[(n + i) * p.num_tokens + token];
      float gain[kWidth], standard[kWidth];
      load(p.norm_weight, i * chunks + chunk, gain);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        standard[c] = (packs[i][c] - mean) * inverse_deviation;
        gain[c] *= grads[i][c];
      }
      store_state_grad<T>(p.state_grads[i], token * chunks + chunk, gain, standard, total(i) * inverse_size,
                          total(states + i) * inverse_size, inverse_deviation);
    });
    for (int j = 0; j < p.num_previous; ++j) {
      const float mean = p.previous_statistics[j * p.num_tokens + token];
      const float inverse_deviation = p.previous_statistics[(p.num_previous + j) * p.num_tokens + token];
      const Pack<T> pack = load<T>(p.states[n + j], token * chunks + chunk);
      float gain[kWidth], weight[kWidth], standard[kWidth];
      load(p.norm_weight, (n + j) * chunks + chunk, gain);
      load(p.previous_weight, j * chunks + chunk, weight);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        standard[c] = (pack[c] - mean) * inverse_deviation;
        gain[c] *= grad[c] * weight[c];
      }
      store_state_grad<T>(p.state_grads[n + j], token * chunks + chunk, gain, standard, total(n + j) * inverse_size,
                          total(states + n + j) * inverse_size, inverse_deviation);
    }
  }

  if (p.shared_rows && present) {
    for (int row = 0; row < rows; ++row) {
      float values[kWidth];
      load(own, row * chunks + chunk, values);
      store<float>(p.partial + (long long)blockIdx.x * rows * p.size, row * chunks + chunk, values);
    }
  }
  sync_block();  // `sums` is free again
  temperature_sum = warp_sum(temperature_sum);
  if (lane == 0) sums[warp] = temperature_sum;
  sync_block();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < warps; ++w) total += sums[w];
    p.partial_temperature[blockIdx.x] = total;
  }
}
