// Manager aggregation on a CPU: a few tokens at a time, so that all of them stays in the caches.
//
// Tokens are split into chunks whose number does not depend on the number of threads. Sums over tokens are made per
// chunk and added up in the chunks' order: the same bits for any number of threads.
#include "vectors.h"

#include <cmath>
#include <cstdlib>
#include <memory>

constexpr int kMaxStates = 32;  // experts and previous states
constexpr int kTile = 4;  // tokens that share one reading of the parameters
static_assert(kTile <= kLanes);

// Mirrored by ctypes in cpu_impl.py: same order, same types.
struct Problem {
  const void* states[kMaxStates];  // [T, D] each: experts, then previous states
  void* state_grads[kMaxStates];   // [T, D] each
  const void* grad;                // [T, D]
  void* out;                       // [T, D]
  const float* statistics;         // [2, N, T]: means, inverse deviations
  float* previous_statistics;      // [2, P, T]: written by forward
  const float* norm_weight;        // [N + P, D]
  const float* norm_bias;          // [N + P, D]
  const float* logits;             // [N, D] or, adaptive, [T, N]
  const float* temperature;        // [1]
  const float* previous_weight;    // [P, D]
  const float* noise;              // [N, T, D] or null
  const uint64_t* seed;            // [1] or null
  float* norm_weight_grad;         // and so on: shapes as above
  float* norm_bias_grad;
  float* logits_grad;
  float* temperature_grad;
  float* previous_weight_grad;
  float* partial;  // [mt_cpu_partial_size()] (backward)
  int64_t num_tokens;
  int32_t size;
  int32_t num_experts;
  int32_t num_previous;
  int32_t adaptive;
  uint32_t offset;
  float noise_scale;
  float eps;
  int32_t threads;
};

namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t chunk_tokens(const Problem& p) {
  const int64_t share = (p.num_tokens + 63) / 64;  // at most 64 chunks
  return round_up(share < 32 ? 32 : share, kTile);
}

int64_t num_chunks(const Problem& p) { return (p.num_tokens + chunk_tokens(p) - 1) / chunk_tokens(p); }

// Floats of a row of channels here: whole groups of normals.
int64_t stride(const Problem& p) { return round_up(p.size, kNormals); }

// A chunk's sums over tokens: gains, biases, and logits or previous weights, [N + P, stride] each; the temperature.
int64_t partial_floats(const Problem& p) { return 3 * (p.num_experts + p.num_previous) * stride(p) + kLanes; }

template <typename Body>
void in_parallel(int64_t count, int threads, Body body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) body(i);
}

// Calls `body(token, number)` with a compile-time number of tokens, kTile or 1, over a chunk.
template <typename Body>
void each_tile(const Problem& p, int64_t chunk, Body body) {
  int64_t token = chunk * chunk_tokens(p), end = token + chunk_tokens(p);
  if (end > p.num_tokens) end = p.num_tokens;
  for (; token + kTile <= end; token += kTile) body(token, std::integral_constant<int, kTile>());
  for (; token < end; ++token) body(token, std::integral_constant<int, 1>());
}

// Memory of a thread, kept for its next call.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, round_up(floats * sizeof(float), 64))));
    size = floats;
  }
  return memory.get();
}

template <typename T>
void moments(const T* row, int size, float eps, float& mean, float& inverse_deviation) {
  Floats total = {}, squares = {};
  each_vector(size, [&](int c, auto count) { total += load(row + c, count); });
  mean = sum(total) / size;
  each_vector(size, [&](int c, auto count) {
    Floats centred = load(row + c, count) - mean;
    if constexpr (std::is_same_v<decltype(count), int>) {
      for (int lane = count; lane < kLanes; ++lane) centred[lane] = 0;
    }
    squares += centred * centred;
  });
  inverse_deviation = 1.0f / std::sqrt(sum(squares) / size + eps);
}

// Scores and weights of a tile of tokens: one number per token and expert, or one per channel too.
struct Mixing {
  const float *scores, *weights;
  int64_t of_token, of_expert;  // steps between tokens and between experts, in floats
};

// Softmax over `count` rows of scores in place, each `step` floats after the last; weights go to `weights`.
void softmax_row(const float* scores, float* weights, int count, int64_t step, int64_t floats) {
  for (int64_t c = 0; c < floats; c += kLanes) {
    Floats largest = load(scores + c), total = {};
    for (int i = 1; i < count; ++i) largest = larger(largest, load(scores + i * step + c));
    for (int i = 0; i < count; ++i) {
      const Floats weight = exponential(load(scores + i * step + c) - largest);
      total += weight;
      store(weights + i * step + c, weight);
    }
    const Floats inverse = 1.0f / total;
    for (int i = 0; i < count; ++i) store(weights + i * step + c, load(weights + i * step + c) * inverse);
  }
}

// The scores (logit + noise) / temperature of one token, [N, stride].
void score_rows(const Problem& p, int64_t token, float* scores) {
  const float inverse_temperature = 1.0f / *p.temperature;
  for (int i = 0; i < p.num_experts; ++i) {
    float* const row = scores + i * stride(p);
    const float* noise = nullptr;
    float scale = 1;
    if (p.noise) {
      noise = p.noise + (i * p.num_tokens + token) * p.size;
    } else if (p.seed) {
      philox_normals(*p.seed, uint32_t(token), i, p.offset, p.size, row);
      noise = row;
      scale = p.noise_scale;
    }
    each_vector(p.size, [&](int c, auto count) {
      Floats score = p.adaptive ? splat(p.logits[token * p.num_experts + i]) : load(p.logits + i * p.size + c, count);
      if (noise) score += scale * load(noise + c, count);
      store(row + c, score * inverse_temperature);
    });
  }
}

// Of adaptive managers without noise: one score per token and expert, [N, kLanes], a token in each lane.
void score_tokens(const Problem& p, int64_t token, int tokens, float* scores) {
  const int n = p.num_experts;
  const float inverse_temperature = 1.0f / *p.temperature;
  for (int i = 0; i < n; ++i) {
    store(scores + i * kLanes, Floats{});
    for (int t = 0; t < tokens; ++t) scores[i * kLanes + t] = p.logits[(token + t) * n + i] * inverse_temperature;
  }
}

bool one_per_token(const Problem& p) { return p.adaptive && !p.noise && !p.seed; }
bool one_for_all(const Problem& p) { return !p.adaptive && !p.noise && !p.seed; }

int64_t mixing_floats(const Problem& p) { return kTile * p.num_experts * stride(p); }

// Fills `scores` and `weights` (mixing_floats() each) for a tile, or, once per chunk, for all tokens.
Mixing mix(const Problem& p, int64_t token, int tokens, bool first, float* scores, float* weights) {
  const int n = p.num_experts;
  if (one_per_token(p)) {
    score_tokens(p, token, tokens, scores);
    softmax_row(scores, weights, n, kLanes, kLanes);
    return {scores, weights, 1, kLanes};
  }
  const int64_t plane = n * stride(p);
  const int rows = one_for_all(p) ? (first ? 1 : 0) : tokens;
  for (int t = 0; t < rows; ++t) {
    score_rows(p, token + t, scores + t * plane);
    softmax_row(scores + t * plane, weights + t * plane, n, stride(p), round_up(p.size, kLanes));
  }
  return {scores, weights, one_for_all(p) ? 0 : plane, stride(p)};
}

template <bool kPerToken, typename Count>
Floats mixed_load(const float* row, int c, Count) {
  if constexpr (kPerToken) return splat(*row);
  return load(row + c);  // rows of scratch memory are padded
}

template <typename T>
const T* state(const Problem& p, int i, int64_t token) {
  return static_cast<const T*>(p.states[i]) + token * p.size;
}

// Mean and inverse deviation of state `i` for a tile's tokens.
template <int kTokens>
struct Standard {
  float mean[kTokens], inverse[kTokens];

  Standard(const Problem& p, int i, int64_t token) {
    const bool expert = i < p.num_experts;
    const int64_t number = expert ? p.num_experts : p.num_previous, row = expert ? i : i - p.num_experts;
    const float* from = (expert ? p.statistics : p.previous_statistics) + row * p.num_tokens + token;
    for (int t = 0; t < kTokens; ++t) mean[t] = from[t], inverse[t] = from[number * p.num_tokens + t];
  }
  Floats operator()(Floats x, int t) const { return (x - mean[t]) * inverse[t]; }
};

// sum_i a_i n_i of a tile's tokens, and sum_j w_j n_(N+j) if `previous`; `done(t, channel, count, total)` takes it.
template <typename T, bool kPerToken, int kTokens, typename Done>
void aggregate(const Problem& p, int64_t token, const Mixing& mixing, bool previous, Done done) {
  const int n = p.num_experts, states = previous ? n + p.num_previous : n;
  float means[kMaxStates][kTokens], inverses[kMaxStates][kTokens];
  for (int i = 0; i < states; ++i) {
    const Standard<kTokens> standard(p, i, token);
    std::memcpy(means[i], standard.mean, sizeof means[i]);
    std::memcpy(inverses[i], standard.inverse, sizeof inverses[i]);
  }
  each_vector(p.size, [&](int c, auto count) {
    Floats total[kTokens] = {};
    for (int i = 0; i < states; ++i) {
      const Floats gain = load(p.norm_weight + i * p.size + c, count);
      const Floats bias = load(p.norm_bias + i * p.size + c, count);
      for (int t = 0; t < kTokens; ++t) {
        const Floats weight =
            i < n ? mixed_load<kPerToken>(mixing.weights + t * mixing.of_token + i * mixing.of_expert, c, count)
                  : load(p.previous_weight + (i - n) * p.size + c, count);
        const Floats x = load(state<T>(p, i, token + t) + c, count);
        total[t] += weight * ((x - means[i][t]) * inverses[i][t] * gain + bias);
      }
    }
    for (int t = 0; t < kTokens; ++t) done(t, c, count, total[t]);
  });
}

template <typename T>
void statistics(const Problem& p) {
  in_parallel(num_chunks(p) * p.num_experts, p.threads, [&](int64_t item) {
    const int64_t i = item % p.num_experts, first = item / p.num_experts * chunk_tokens(p);
    float *means = p.previous_statistics + i * p.num_tokens, *inverses = means + p.num_experts * p.num_tokens;
    for (int64_t token = first; token < first + chunk_tokens(p) && token < p.num_tokens; ++token) {
      moments(state<T>(p, i, token), p.size, p.eps, means[token], inverses[token]);
    }
  });
}

template <typename T, bool kPerToken>
void forward(const Problem& p) {
  in_parallel(num_chunks(p), p.threads, [&](int64_t chunk) {
    float* const scores = scratch(2 * mixing_floats(p));
    float* const weights = scores + mixing_floats(p);
    bool first = true;
    each_tile(p, chunk, [&](int64_t token, auto number) {
      constexpr int kTokens = number();
      for (int j = 0; j < p.num_previous; ++j) {
        float *means = p.previous_statistics + j * p.num_tokens, *inverses = means + p.num_previous * p.num_tokens;
        for (int64_t t = token; t < token + kTokens; ++t) {
          moments(state<T>(p, p.num_experts + j, t), p.size, p.eps, means[t], inverses[t]);
        }
      }
      const Mixing mixing = mix(p, token, kTokens, first, scores, weights);
      first = false;
      aggregate<T, kPerToken, kTokens>(p, token, mixing, true, [&](int t, int c, auto count, Floats total) {
        store(static_cast<T*>(p.out) + (token + t) * p.size + c, total, count);
      });
    });
  });
}

enum class Role { kExpert, kExpertPerToken, kPrevious };

// Gradients that belong to state `i`, for a tile; `mixed` and `inner` are [kTokens, stride], scratch memory.
template <typename T, Role kRole, int kTokens>
void differentiate(const Problem& p, int i, int64_t token, const Mixing& mixing, const float* mixed, float* inner,
                   float* partial) {
  constexpr bool kPrevious = kRole == Role::kPrevious, kPerToken = kRole == Role::kExpertPerToken;
  const Standard<kTokens> standard(p, i, token);
  const int64_t width = stride(p), plane = (p.num_experts + p.num_previous) * width;
  float* const rows = partial + i * width;
  const float inverse_temperature = 1.0f / *p.temperature;
  Floats inner_sum[kTokens] = {}, along_sum[kTokens] = {}, score_sum[kTokens] = {}, temperature_sum = {};

  each_vector(p.size, [&](int c, auto count) {
    const Floats gain = load(p.norm_weight + i * p.size + c, count);
    const Floats bias = load(p.norm_bias + i * p.size + c, count);
    Floats gain_grad = load(rows + c), bias_grad = load(rows + plane + c), third_grad = load(rows + 2 * plane + c);
    for (int t = 0; t < kTokens; ++t) {
      const Floats grad = load(static_cast<const T*>(p.grad) + (token + t) * p.size + c, count);
      const Floats x = standard(load(state<T>(p, i, token + t) + c, count), t);
      const Floats normed = x * gain + bias;
      const int64_t row = t * mixing.of_token + i * mixing.of_expert;
      Floats normed_grad;
      if constexpr (kPrevious) {
        normed_grad = grad * load(p.previous_weight + (i - p.num_experts) * p.size + c, count);
        third_grad += grad * normed;
      } else {
        normed_grad = grad * mixed_load<kPerToken>(mixing.weights + row, c, count);
        const Floats score_grad = normed_grad * (normed - load(mixed + t * width + c)) * inverse_temperature;
        score_sum[t] += score_grad;
        if constexpr (!kPerToken) {
          third_grad += score_grad;
          temperature_sum += score_grad * load(mixing.scores + row + c);
        }
      }
      gain_grad += normed_grad * x;
      bias_grad += normed_grad;
      const Floats scaled = normed_grad * gain;
      inner_sum[t] += scaled;
      along_sum[t] += scaled * x;
      store(inner + t * width + c, scaled);
    }
    store(rows + c, gain_grad);
    store(rows + plane + c, bias_grad);
    store(rows + 2 * plane + c, third_grad);
  });

  for (int t = 0; t < kTokens; ++t) {
    const float mean_inner = sum(inner_sum[t]) / p.size, mean_along = sum(along_sum[t]) / p.size;
    const T* const from = state<T>(p, i, token + t);
    T* const to = static_cast<T*>(p.state_grads[i]) + (token + t) * p.size;
    each_vector(p.size, [&](int c, auto count) {
      const Floats x = standard(load(from + c, count), t);
      store(to + c, (load(inner + t * width + c) - mean_inner - x * mean_along) * standard.inverse[t], count);
    });
    if (!kPrevious && p.adaptive) {
      const float total = sum(score_sum[t]);
      p.logits_grad[(token + t) * p.num_experts + i] = total;
      if (kPerToken) temperature_sum[0] += total * mixing.scores[t * mixing.of_token + i * mixing.of_expert];
    }
  }
  float* const temperature = partial + 3 * plane;
  store(temperature, load(temperature) - temperature_sum);
}

template <typename T, bool kPerToken>
void backward(const Problem& p) {
  in_parallel(num_chunks(p), p.threads, [&](int64_t chunk) {
    const int64_t width = stride(p);
    float* const scores = scratch(2 * mixing_floats(p) + 2 * kTile * width);
    float* const weights = scores + mixing_floats(p);
    float *const mixed = weights + mixing_floats(p), *const inner = mixed + kTile * width;
    float* const partial = p.partial + chunk * partial_floats(p);
    std::memset(partial, 0, partial_floats(p) * sizeof(float));
    bool first = true;
    each_tile(p, chunk, [&](int64_t token, auto number) {
      constexpr int kTokens = number();
      const Mixing mixing = mix(p, token, kTokens, first, scores, weights);
      first = false;
      aggregate<T, kPerToken, kTokens>(p, token, mixing, false, [&](int t, int c, auto, Floats total) {
        store(mixed + t * width + c, total);
      });
      constexpr Role kRole = kPerToken ? Role::kExpertPerToken : Role::kExpert;
      for (int i = 0; i < p.num_experts; ++i) {
        differentiate<T, kRole, kTokens>(p, i, token, mixing, mixed, inner, partial);
      }
      for (int i = p.num_experts; i < p.num_experts + p.num_previous; ++i) {
        differentiate<T, Role::kPrevious, kTokens>(p, i, token, mixing, mixed, inner, partial);
      }
    });
  });
}

// Adds up the chunks' sums, in their order.
void reduce(const Problem& p) {
  const int states = p.num_experts + p.num_previous;
  const int64_t chunks = num_chunks(p), each = partial_floats(p), width = stride(p);
  in_parallel(3 * states, p.num_tokens * p.size > 32768 ? p.threads : 1, [&](int64_t row) {
    const int kind = row / states, i = row % states;
    float* to = kind == 0 ? p.norm_weight_grad + i * p.size : p.norm_bias_grad + i * p.size;
    if (kind == 2) {
      if (i < p.num_experts && p.adaptive) return;
      to = i < p.num_experts ? p.logits_grad + i * p.size : p.previous_weight_grad + (i - p.num_experts) * p.size;
    }
    each_vector(p.size, [&](int c, auto count) {
      Floats total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load(p.partial + chunk * each + row * width + c);
      store(to + c, total, count);
    });
  });
  Floats total = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load(p.partial + (chunk + 1) * each - kLanes);
  *p.temperature_grad = sum(total);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t mt_cpu_problem_bytes() { return sizeof(Problem); }

EXPORT int64_t mt_cpu_partial_size(const Problem* p) { return num_chunks(*p) * partial_floats(*p); }

// Statistics [2, N, T] of the experts into `previous_statistics`, which has that shape here.
EXPORT void mt_cpu_statistics(const Problem* p, int is_bfloat16) {
  is_bfloat16 ? statistics<bfloat16>(*p) : statistics<float>(*p);
}

EXPORT void mt_cpu_forward(const Problem* p, int is_bfloat16) {
  if (one_per_token(*p)) {
    is_bfloat16 ? forward<bfloat16, true>(*p) : forward<float, true>(*p);
  } else {
    is_bfloat16 ? forward<bfloat16, false>(*p) : forward<float, false>(*p);
  }
}

EXPORT void mt_cpu_backward(const Problem* p, int is_bfloat16) {
  if (one_per_token(*p)) {
    is_bfloat16 ? backward<bfloat16, true>(*p) : backward<float, true>(*p);
  } else {
    is_bfloat16 ? backward<bfloat16, false>(*p) : backward<float, false>(*p);
  }
  reduce(*p);
}
