// Arguments of the kernels and what a thread does with its 8 channels of one token.
//
// Shapes: T tokens, N experts, P previous states, D channels (a multiple of 8, at most 2048).
#pragma once

#include "philox.h"

constexpr int kMaxStates = 32;  // experts and previous states
constexpr int kMaxSize = 2048;
constexpr int kWidth = 8;  // channels of a thread: 16 bytes of a 2-byte type
constexpr float kLog2e = 1.4426950408889634f;

constexpr int kFewExperts = 6;  // the published number
constexpr int kManyExperts = 24;

enum Noise { kNone = 0, kGiven = 1, kPhilox = 2 };

// Mirrored by ctypes in cuda_impl.py: same order, same types.
struct Problem {
  const void* states[kMaxStates];    // [T, D] each: experts, then previous states
  void* state_grads[kMaxStates];     // [T, D] each (backward)
  const void* grad;                  // [T, D] (backward)
  void* out;                         // [T, D] (forward)
  const float* statistics;           // [2, N, T]: means, inverse deviations
  float* previous_statistics;        // [2, P, T]: written by forward
  const float* norm_weight;          // [N + P, D]
  const float* norm_bias;            // [N + P, D]
  const float* logits;               // [N, D] or, adaptive, [T, N]
  float* logits_grad;                // [T, N], adaptive (backward)
  const float* temperature;          // [1]
  const float* previous_weight;      // [P, D]
  const float* noise;                // [N, T, D]
  const long long* seed;             // [1]
  float* partial;                    // [blocks, rows, D] (backward)
  float* partial_temperature;        // [blocks] (backward)
  long long num_tokens;
  int size;
  int num_experts;
  int num_previous;
  int adaptive;
  int noise_kind;
  unsigned offset;
  float noise_scale;
  float eps;
  // Of backward, chosen by mt_plan_backward.
  int num_blocks;
  int num_rows;
  int shared_rows;  // whether a block's rows lie in shared memory
  int shared_bytes;
};

// 8 channels as they are read, 16 bytes at a time. Held as words: the compiler would take 2-byte ones apart.
template <typename T>
struct alignas(16) Pack {
  unsigned words[kWidth * sizeof(T) / 4];

  DEVICE float operator[](int c) const {
    if constexpr (sizeof(T) == 4) {
      return as_float(words[c]);
    } else {
      return to_float(T(), c % 2 ? words[c / 2] >> 16 : words[c / 2] & 0xFFFFu);
    }
  }
};

struct alignas(16) Quad {
  float values[4];
};

template <typename T, typename Index>
DEVICE Pack<T> load(const void* from, Index pack) {
  return static_cast<const Pack<T>*>(from)[pack];
}

template <typename Index>
DEVICE void load(const float* from, Index pack, float (&to)[kWidth]) {
  const Pack<float> found = load<float>(static_cast<const void*>(from), pack);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) to[c] = found[c];
}

template <typename T>
DEVICE void store(void* to, long long pack, const float (&values)[kWidth]) {
  struct alignas(16) Made {
    T values[kWidth];
  } made;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) from_float(values[c], made.values[c]);
  static_cast<Made*>(to)[pack] = made;
}

// Scores (logit + noise) / temperature in units of log 2, so that a softmax is made of powers of 2.
template <int kNoise, bool kAdaptive>
struct Scores {
  float scale;
  unsigned key0 = 0, key1 = 0;

  DEVICE explicit Scores(const Problem& p) : scale(kLog2e / *p.temperature) {
    if constexpr (kNoise == kPhilox) {
      const unsigned long long seed = static_cast<unsigned long long>(*p.seed);
      key0 = unsigned(seed), key1 = unsigned(seed >> 32);
    }
  }

  // Logits of an expert that all tokens share.
  DEVICE void load_logits(const Problem& p, int pack, float (&to)[kWidth]) const {
    if constexpr (!kAdaptive) load(p.logits, pack, to);
  }

  // Scores of a token's channels less `base`.
  DEVICE void above(const Problem& p, int i, long long token, int chunk, const float (&logits)[kWidth],
                    const float (&base)[kWidth], float (&to)[kWidth]) const {
    float own = 0;
    if constexpr (kAdaptive) own = p.logits[token * p.num_experts + i];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) to[c] = (kAdaptive ? own : logits[c]) * scale - base[c];
    if constexpr (kNoise == kGiven) {
      float noise[kWidth];
      load(p.noise, (i * p.num_tokens + token) * (p.size / kWidth) + chunk, noise);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) to[c] += noise[c] * scale;
    }
    if constexpr (kNoise == kPhilox) {
      const Words counter = {{unsigned(token), unsigned(i), unsigned(chunk), p.offset}};
      add_normals(philox(counter, key0, key1), p.noise_scale * scale, to);
    }
  }
};

// Calls `body` for each expert. A few of them are unrolled, so that what is kept of each lies in registers; many are
// looped over, and lie in local memory.
template <int kMaxExperts, typename Body>
DEVICE void each_expert(int num_experts, Body body) {
  if constexpr (kMaxExperts <= kFewExperts) {
#pragma unroll
    for (int i = 0; i < kMaxExperts; ++i) {
      if (i < num_experts) body(i);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < num_experts; ++i) body(i);
  }
}

// Scores (logit + noise) / temperature of this thread's channels, and their softmax over the experts, which may be
// put into the same array.
template <int kMaxExperts>
DEVICE void mixing_weights(const Problem& p, long long token, int chunk, float inverse_temperature,
                           float (&scores)[kMaxExperts][kWidth], float (&weights)[kMaxExperts][kWidth]) {
  const int chunks = p.size / kWidth;
  const unsigned long long seed = p.noise_kind == kPhilox ? static_cast<unsigned long long>(*p.seed) : 0;
  float largest[kWidth], sum[kWidth];
#pragma unroll
  for (int c = 0; c < kWidth; ++c) largest[c] = -INFINITY, sum[c] = 0;
  each_expert<kMaxExperts>(p.num_experts, [&](int i) {
    float noise[kWidth] = {};
    if (p.noise_kind == kGiven) load(p.noise, (i * p.num_tokens + token) * chunks + chunk, noise);
    if (p.noise_kind == kPhilox) {
      const Words counter = {{unsigned(token), unsigned(i), unsigned(chunk), p.offset}};
      add_normals(philox(counter, unsigned(seed), unsigned(seed >> 32)), p.noise_scale, noise);
    }
    if (p.adaptive) {
      const float logit = p.logits[token * p.num_experts + i];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) scores[i][c] = logit;
    } else {
      load(p.logits, i * chunks + chunk, scores[i]);
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      scores[i][c] = (scores[i][c] + noise[c]) * inverse_temperature;
      largest[c] = fmaxf(largest[c], scores[i][c]);
    }
  });
  each_expert<kMaxExperts>(p.num_experts, [&](int i) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      weights[i][c] = fast_exp2((scores[i][c] - largest[c]) * kLog2e);
      sum[c] += weights[i][c];
    }
  });
#pragma unroll
  for (int c = 0; c < kWidth; ++c) sum[c] = fast_inverse(sum[c]);
  each_expert<kMaxExperts>(p.num_experts, [&](int i) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) weights[i][c] *= sum[c];
  });
}
