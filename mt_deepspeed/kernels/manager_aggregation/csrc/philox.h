// Philox 4x32-10 (Salmon et al., SC 2011) and the normals made of it; the layout is described in ../noise.py.
#pragma once

#include "platform.h"

struct Words {
  unsigned w[4];
};

DEVICE Words philox(Words counter, unsigned key0, unsigned key1) {
  unsigned(&c)[4] = counter.w;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = high_product(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const unsigned high1 = high_product(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    counter = {{high1 ^ c[1] ^ key0, low1, high0 ^ c[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Adds the normals of 8 neighbouring channels, times `scale`, to `to`.
DEVICE void add_normals(Words bits, float scale, float (&to)[8]) {
  const float squared_scale = -1.3862943611198906f * scale * scale;  // -2 ln(u) = -2 ln(2) log2(u)
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // Integers become mantissas, which saves conversions: 2^23 + k, and 1 + k / 2^16.
    const float low = as_float((bits.w[j] & 0xFFFFu) | 0x4B000000u);
    const float high = as_float((bits.w[j] >> 9 & 0x7FFF80u) | 0x3F800000u);
    const float uniform = low * (1.0f / 65536) - 8388607.5f / 65536;  // exact
    const float radius = fast_sqrt(squared_scale * fast_log2(uniform));
    // 2 pi (k + 1/2) / 2^16 - pi: half a turn less, where sine and cosine are exact to 2^-21, and the opposite sign.
    const float angle = high * 6.283185307179586f - 9.424730021f;
    to[2 * j] -= radius * fast_cos(angle);
    to[2 * j + 1] -= radius * fast_sin(angle);
  }
}
