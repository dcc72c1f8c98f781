// Backward: a block per token, a thread per 8 channels.
#pragma once

#include "mixture.h"
#include "rows.h"

constexpr int kKept = 6;  // experts that stay in registers: the published number; of others all is read twice
constexpr int kMaxKeptSize = 1024;  // channels, so that three such blocks share a processor's registers

// What a thread does; kExperts: their number where they are kept, else 0.
template <typename T, int kExperts, int kNoise, bool kAdaptive>
struct Backward {
  static constexpr int kPlaces = kExperts ? kExperts : 1;

  const Problem& p;
  float* const own;  // rows
  const int chunks, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool present;  // the last warp may be partly idle, but takes part in the sums
  const int chunk;
  const Scores<kNoise, kAdaptive> scores;
  const float inverse_temperature = scores.scale / kLog2e, inverse_size = 1.0f / p.size;
  const int first_score = 2 * (p.num_experts + p.num_previous);
  float temperature_sum = 0;
  // Of the token:
  float* sums = nullptr;  // [warps, num_sums]
  int token = 0;
  long long at = 0;
  float grad[kWidth], mixed[kWidth], base[kWidth];  // base: a score less it is the logarithm of a weight
  Part<T> parts[kPlaces];
  float kept[kPlaces][kWidth];  // scores, then gradients of scaled states

  DEVICE Backward(const Problem& problem, float* rows)
      : p(problem),
        own(rows),
        chunks(p.size / kWidth),
        present(threadIdx.x < chunks),
        chunk(present ? threadIdx.x : 0),
        scores(problem) {}

  DEVICE Quad* row(float* rows, int index) const {
    return reinterpret_cast<Quad*>(rows + index * p.row_floats) + threadIdx.x;
  }

  DEVICE void add(int index, const float (&values)[kWidth]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad& place = row(own, index)[half * blockDim.x];
      Quad sum = place;
#pragma unroll
      for (int c = 0; c < 4; ++c) sum.values[c] += values[4 * half + c];
      place = sum;
    }
  }

  template <typename Body>
  DEVICE void each_expert(Body body) {
    if constexpr (kExperts > 0) {
#pragma unroll
      for (int i = 0; i < kExperts; ++i) body(i, i);
    } else {
#pragma unroll 1
      for (int i = 0; i < p.num_experts; ++i) body(i, 0);
    }
  }

  DEVICE void put_sum(int index, float value) {
    value = warp_sum(value);
    if (lane == 0) sums[warp * num_sums(p) + index] = value;
  }

  // The warps' sums of some values, always in the same order.
  template <int kCount>
  DEVICE void total(int index, float (&to)[kCount]) const {
#pragma unroll
    for (float& sum : to) sum = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) to[c] += sums[w * num_sums(p) + index + c];
    }
  }

  // Expert i normalised.
  DEVICE void normalise(int i, int place, float (&to)[kWidth]) const {
    float gain[kWidth], bias[kWidth];
    load(p.norm_weight, i * chunks + chunk, gain);
    load(p.norm_bias, i * chunks + chunk, bias);
    standardise(parts[place], to);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) to[c] = to[c] * gain[c] + bias[c];
  }

  // Expert i's scores less `base`.
  DEVICE void score(int i, float (&to)[kWidth]) const {
    float logits[kWidth];
    scores.load_logits(p, i * chunks + chunk, logits);
    scores.above(p, i, token, chunk, logits, base, to);
  }

  // The mixture of experts, and the base.
  DEVICE void mix() {
    if constexpr (kExperts > 0) return mix_kept();
    Mixture mixture;
    each_expert([&](int i, int place) {
      float above[kWidth], values[kWidth];
      parts[place] = load_part<T>(p, i, token, at);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) base[c] = mixture.base[c];
      score(i, above);
      normalise(i, place, values);
      mixture.add(i == 0, above, values);
    });
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      mixed[c] = mixture.total[c] * fast_inverse(mixture.sum[c]);
      base[c] = mixture.base[c] + fast_log2(mixture.sum[c]);
    }
  }

  DEVICE void mix_kept() {
    float largest[kWidth], sum[kWidth] = {};
#pragma unroll
    for (int c = 0; c < kWidth; ++c) base[c] = mixed[c] = 0, largest[c] = -INFINITY;
    each_expert([&](int i, int place) { parts[place] = load_part<T>(p, i, token, at); });
    each_expert([&](int i, int place) {
      score(i, kept[place]);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) largest[c] = fmaxf(largest[c], kept[place][c]);
    });
    each_expert([&](int i, int place) {
      float values[kWidth];
      normalise(i, place, values);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float weight = fast_exp2(kept[place][c] - largest[c]);
        sum[c] += weight;
        mixed[c] += weight * values[c];
      }
    });
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      mixed[c] *= fast_inverse(sum[c]);
      base[c] = largest[c] + fast_log2(sum[c]);
    }
  }

  // Between phases: else all experts' parameters and standardised states would be kept.
  DEVICE void forget_derived() {
    if constexpr (kExperts > 0) {
      each_expert([&](int, int place) {
        for (unsigned& word : parts[place].pack.words) forget(word);
      });
    }
  }

  // Gradients of expert i's parameters, and the sums that its state's gradient needs.
  DEVICE void differentiate(int i, int place) {
    float gain[kWidth], bias[kWidth], above[kWidth], standard[kWidth];
    float along[kWidth], own_grad[kWidth], score_grad[kWidth];
    if constexpr (kExperts > 0) sync_warp();  // keeps the compiler from mixing experts, which takes more registers
    load(p.norm_weight, i * chunks + chunk, gain);
    load(p.norm_bias, i * chunks + chunk, bias);
    if constexpr (kExperts == 0) {
      parts[place] = load_part<T>(p, i, token, at);
      score(i, above);
    } else {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) above[c] = kept[place][c] - base[c];
    }
    standardise(parts[place], standard);
    float inner_sum = 0, along_sum = 0, score_sum = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      own_grad[c] = fast_exp2(above[c]) * grad[c];
      along[c] = own_grad[c] * standard[c];
      score_grad[c] = own_grad[c] * (standard[c] * gain[c] + bias[c] - mixed[c]);
      kept[place][c] = own_grad[c] * gain[c];
      inner_sum += kept[place][c];
      along_sum += kept[place][c] * standard[c];
      score_sum += score_grad[c];
      temperature_sum += score_grad[c] * above[c];
    }
    add(i, along);
    add(p.num_experts + i, own_grad);
    if constexpr (!kAdaptive) add(2 * p.num_experts + i, score_grad);
    put_sum(2 * i, inner_sum);
    put_sum(2 * i + 1, along_sum);
    if constexpr (kAdaptive) put_sum(first_score + i, score_sum);
  }

  // Gradient of a layer norm's input, after a barrier; `inner`: the gradient of the result times gain.
  DEVICE void store_gradient(int i, const Part<T>& part, const float (&inner)[kWidth]) {
    float found[2], result[kWidth];
    total(2 * i, found);
    const float mean_inner = found[0] * inverse_size, mean_along = found[1] * inverse_size;
    standardise(part, result);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      result[c] = (inner[c] - mean_inner - result[c] * mean_along) * part.inverse_deviation;
    }
    if (present) store<T>(p.state_grads[i], at, result);
    if constexpr (kAdaptive) {
      if (i < p.num_experts && threadIdx.x == 0) {
        float score_sum[1];
        total(first_score + i, score_sum);
        p.logits_grad[token * p.num_experts + i] = score_sum[0] * inverse_temperature;
      }
    }
  }

  // Previous state j, and its `inner`.
  DEVICE Part<T> load_previous(int j, float (&inner)[kWidth]) {
    const int pack = (p.num_experts + j) * chunks + chunk;
    float gain[kWidth], weight[kWidth];
    load(p.norm_weight, pack, gain);
    load(p.previous_weight, j * chunks + chunk, weight);
    Part<T> part = load_part<T>(p, p.num_experts + j, token, at);
    part.mean = p.previous_statistics[j * p.num_tokens + token];
    part.inverse_deviation = p.previous_statistics[(p.num_previous + j) * p.num_tokens + token];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) inner[c] = grad[c] * weight[c] * gain[c];
    return part;
  }

  DEVICE void differentiate_previous(int j, int first_row) {
    float inner[kWidth], along[kWidth], inner_sum = 0, along_sum = 0;
    standardise(load_previous(j, inner), along);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      inner_sum += inner[c];
      along_sum += inner[c] * along[c];
      along[c] *= grad[c];
    }
    add(first_row + j, along);
    put_sum(2 * (p.num_experts + j), inner_sum);
    put_sum(2 * (p.num_experts + j) + 1, along_sum);
  }

  DEVICE void run(int next, float* free_sums) {
    token = next, at = (long long)token * chunks + chunk, sums = free_sums;
    const Pack<T> found = load<T>(p.grad, at);
    mix();
#pragma unroll
    for (int c = 0; c < kWidth; ++c) grad[c] = present ? found[c] : 0;
    forget_derived();
    each_expert([&](int i, int place) {
      differentiate(i, place);
      if constexpr (kExperts == 0) {
        sync_block();
        store_gradient(i, parts[place], kept[place]);
      }
    });
    const int first_row = (kAdaptive ? 2 : 3) * p.num_experts;
#pragma unroll 1
    for (int j = 0; j < p.num_previous; ++j) differentiate_previous(j, first_row);
    if (p.num_previous) add(first_row + p.num_previous, grad);
    sync_block();
    forget_derived();
    if constexpr (kExperts > 0) {
      each_expert([&](int i, int place) { store_gradient(i, parts[place], kept[place]); });
    }
#pragma unroll 1
    for (int j = 0; j < p.num_previous; ++j) {
      float inner[kWidth];
      const Part<T> part = load_previous(j, inner);
      store_gradient(p.num_experts + j, part, inner);
    }
  }
};

template <typename T, int kExperts, int kNoise, bool kAdaptive, bool kShared>
KERNEL LAUNCH_BOUNDS(kExperts ? kMaxKeptSize / kWidth : kMaxSize / kWidth, kExperts ? 3 : 2)
backward_kernel(const Problem p) {
  SHARED(shared);
  float* const part = p.partial + (long long)blockIdx.x * p.num_rows * p.row_floats;
  Backward<T, kExperts, kNoise, kAdaptive> thread(p, kShared ? shared + sums_floats(p, blockDim.x) : part);
  const auto each_quad = [&](auto body) {
    for (int row = 0; row < p.num_rows; ++row) body(row, 0), body(row, blockDim.x);
  };
  each_quad([&](int row, int half) { thread.row(thread.own, row)[half] = Quad{}; });
  int parity = 0;
  for (int token = blockIdx.x; token < p.num_tokens; token += gridDim.x, parity ^= 1) {
    thread.run(token, shared + parity * thread.warps * num_sums(p));
  }
  if (kShared) {
    each_quad([&](int row, int half) { thread.row(part, row)[half] = thread.row(thread.own, row)[half]; });
  }
  sync_block();  // `shared` is free again
  const float sum = warp_sum(thread.temperature_sum);
  if (thread.lane == 0) shared[thread.warp] = sum;
  sync_block();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < thread.warps; ++w) total += shared[w];
    p.partial_temperature[blockIdx.x] = total;
  }
}
