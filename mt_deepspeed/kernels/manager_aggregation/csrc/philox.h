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

// The normals of 8 neighbouring channels, times `scale`.
DEVICE void normals(Words bits, float scale, float (&to)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float uniform = (float(bits.w[j] & 0xFFFFu) + 0.5f) * (1.0f / 65536);
    const float squared = -1.3862943611198906f * fast_log2(uniform);  // -2 ln(uniform) > 0
    // Half a turn less, where sine and cosine are exact to 2^-21, and the opposite sign.
    const float radius = -scale * squared * inverse_sqrt(squared);
    const float angle = (float(int(bits.w[j] >> 16) - 32768) + 0.5f) * (6.283185307179586f / 65536);
    to[2 * j] = radius * fast_cos(angle);
    to[2 * j + 1] = radius * fast_sin(angle);
  }
}
