// Scores of the experts and the mixture that they make, as forward and backward need them.
#pragma once

#include "philox.h"
#include "problem.h"

// What a thread reads of one state and token; the statistics of experts only.
template <typename T>
struct Part {
  Pack<T> pack;
  float mean, inverse_deviation;
};

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
  DEVICE void above(const Problem& p, int i, int token, int chunk, const float (&logits)[kWidth],
                    const float (&base)[kWidth], float (&to)[kWidth]) const {
    float own = 0;
    if constexpr (kAdaptive) own = p.logits[token * p.num_experts + i];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) to[c] = (kAdaptive ? own : logits[c]) * scale - base[c];
    if constexpr (kNoise == kGiven) {
      float noise[kWidth];
      load(p.noise, (long long)(i * p.num_tokens + token) * (p.size / kWidth) + chunk, noise);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) to[c] += noise[c] * scale;
    }
    if constexpr (kNoise == kPhilox) {
      const Words counter = {{unsigned(token), unsigned(i), unsigned(chunk), p.offset}};
      add_normals(philox(counter, key0, key1), p.noise_scale * scale, to);
    }
  }
};

// Of state i and a token; `at`: where in the state its channels lie.
template <typename T>
DEVICE Part<T> load_part(const Problem& p, int i, int token, long long at) {
  Part<T> part;
  part.pack = load<T>(p.states[i], at);
  if (i < p.num_experts) {
    part.mean = p.statistics[i * p.num_tokens + token];
    part.inverse_deviation = p.statistics[(p.num_experts + i) * p.num_tokens + token];
  }
  return part;
}

template <typename T>
DEVICE void standardise(const Part<T>& part, float (&to)[kWidth]) {
  const float shift = -part.mean * part.inverse_deviation;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) to[c] = part.pack[c] * part.inverse_deviation + shift;
}

// A token's mixture of the experts seen so far: weights are 2^(score - base). The base is 0, or the first score where
// that is far from 0, and is raised when a later score exceeds it by so much that the sums might overflow.
struct Mixture {
  static constexpr float kExcess = 64;
  float total[kWidth] = {}, sum[kWidth] = {}, base[kWidth] = {};

  DEVICE void add(bool first, float (&above)[kWidth], const float (&values)[kWidth]) {
    float most = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) most = fmaxf(most, fabsf(above[c]));
    if (most > kExcess) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float excess = fmaxf(above[c], 0.0f), rise = first ? above[c] : excess, decay = fast_exp2(-excess);
        base[c] += rise, above[c] -= rise, sum[c] *= decay, total[c] *= decay;
      }
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float weight = fast_exp2(above[c]);
      sum[c] += weight;
      total[c] += weight * values[c];
    }
  }
};
