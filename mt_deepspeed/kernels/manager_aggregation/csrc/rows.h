// What a block of the backward kernel sums.
//
// Gradients of parameters are sums over tokens. A block adds those of its tokens to rows of its own, in shared
// memory where they fit and in its part of `partial` where not; finish.h sums over blocks: no atomics.
// Rows of D channels, G the gradient of the result, a_i weights, x_i standardised states, n_i normalised ones:
//   i                    sum of a_i G x_i
//   N + i                sum of a_i G
//   2 N + i              sum of a_i G (n_i - sum of a n)      (only when static)
//   then j = 0 .. P - 1  sum of G x_{N+j};  last: sum of G    (only when P > 0)
// A row holds the first four channels of all threads, then the others, so that neighbours lie 16 bytes apart and meet
// no bank twice; idle threads of the last warp have places too.
#pragma once

#include "problem.h"

HOST_AND_DEVICE int num_rows(const Problem& p) {
  return (p.adaptive ? 2 : 3) * p.num_experts + (p.num_previous ? p.num_previous + 1 : 0);
}

// Values summed over a token's channels, and the floats that two tokens' take: so that one barrier a token is enough.
HOST_AND_DEVICE int num_sums(const Problem& p) { return 3 * p.num_experts + 2 * p.num_previous; }
HOST_AND_DEVICE int sums_floats(const Problem& p, int threads) { return (2 * threads / 32 * num_sums(p) + 3) / 4 * 4; }

struct alignas(16) Quad {
  float values[4];
};
