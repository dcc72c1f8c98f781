// Arguments of the kernels and what a thread does with its 8 channels of one token.
//
// Shapes: T tokens, N experts, P previous states, D channels (a multiple of 8, at most 2048); T <= 2^25.
#pragma once

#include "platform.h"

constexpr int kMaxStates = 32;  // experts and previous states
constexpr int kMaxSize = 2048;
constexpr int kWidth = 8;  // channels of a thread: 16 bytes of a 2-byte type
constexpr float kLog2e = 1.4426950408889634f;

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
  const float* temperature;          // [1]
  const float* previous_weight;      // [P, D]
  const float* noise;                // [N, T, D]
  const long long* seed;             // [1]
  float* norm_weight_grad;           // and so on: shapes as above
  float* norm_bias_grad;
  float* logits_grad;
  float* temperature_grad;
  float* previous_weight_grad;
  float* partial;                    // [num_blocks, num_rows, row_floats], see rows.h
  float* partial_temperature;        // [blocks]
  int num_tokens;
  int size;
  int num_experts;
  int num_previous;
  int adaptive;
  int noise_kind;
  unsigned offset;
  float noise_scale;
  float eps;
  // Of backward, chosen by mt_plan_backward:
  int num_blocks;
  int num_rows;
  int row_floats;
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
