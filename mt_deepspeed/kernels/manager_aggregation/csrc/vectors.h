// Vectors of floats in the compiler's own vector types, as wide as the processor's registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

template <typename T, int kSize>
struct VectorOf {
  typedef T type __attribute__((vector_size(kSize)));
};
using Floats = VectorOf<float, kBytes>::type;
using Ints = VectorOf<int32_t, kBytes>::type;
using Words = VectorOf<uint32_t, kBytes>::type;
using Longs = VectorOf<uint64_t, kBytes>::type;
using Halves = VectorOf<uint16_t, kBytes / 2>::type;

struct bfloat16 {
  uint16_t bits;
};

struct Full {};  // a whole vector of channels; an int in its place: the last few, fewer than kLanes

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* from, Full = {}) {
  Floats to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Floats load(const bfloat16* from, Full = {}) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

template <typename T>
Floats load(const T* from, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

inline void store(float* to, Floats value, Full = {}) { std::memcpy(to, &value, sizeof value); }

inline void store(bfloat16* to, Floats value, Full = {}) {
  const Words bits = (Words)value;
  const Words nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
  const Words rounded = value == value ? nearest : (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

template <typename T>
void store(T* to, Floats value, int count) {
  T buffer[kLanes];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

// Calls `body(channel, Full)` for whole vectors of channels and `body(channel, count)` for the rest.
template <typename Body>
inline void each_vector(int size, Body body) {
  int c = 0;
  for (; c + kLanes <= size; c += kLanes) body(c, Full{});
  if (c < size) body(c, size - c);
}

template <int kSize>
float sum_lanes(typename VectorOf<float, kSize>::type value) {
  if constexpr (kSize == 8) {
    return value[0] + value[1];
  } else {
    typename VectorOf<float, kSize / 2>::type halves[2];
    std::memcpy(halves, &value, sizeof value);
    return sum_lanes<kSize / 2>(halves[0] + halves[1]);
  }
}

inline float sum(Floats value) { return sum_lanes<kBytes>(value); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// x <= 0; below -87.3, where the result would not be a normal number, that of -87.3. Of NaN: NaN.
inline Floats exponential(Floats x) {
  const Floats given = x;
  x = larger(x, splat(-87.3f));
  const Floats magic = splat(12582912.0f);  // adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = splat(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  const Floats result = (Floats)((Ints)y + (((Ints)shifted - (Ints)magic) << 23));
  return given == given ? result : given;
}

// Natural logarithm of normal, positive numbers.
inline Floats logarithm(Floats x) {
  const Words bits = (Words)x;
  Floats m = (Floats)((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  Floats e = __builtin_convertvector((Ints)(bits >> 23) - 126, Floats);
  const auto small = m < 0.707106781f;
  e = small ? e - 1.0f : e;
  m = (small ? m + m : m) - 1.0f;
  Floats y = splat(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const Floats square = m * m;
  y = y * m * square - e * 2.12194440e-4f - square * 0.5f;
  return m + y + e * 0.693359375f;
}

// Square root of positive numbers: Newton's iterations for its inverse.
inline Floats square_root(Floats x) {
  Floats y = (Floats)(0x5F3759DFu - ((Words)x >> 1));
  for (int i = 0; i < 3; ++i) y = y * (1.5f - 0.5f * x * y * y);
  return x * y;
}

// Sine and cosine of 2 pi (k + 1/2) / 2^16 for 0 <= k < 2^16. The quarter is found in integers, without rounding.
inline void sine_cosine(Words k, Floats& sine, Floats& cosine) {
  const Ints quarter = (Ints)((k + 8192) >> 14);
  const Ints rest = (Ints)k - (quarter << 14);  // -8192 to 8191
  const Floats x = (__builtin_convertvector(rest, Floats) + 0.5f) * 9.58737992e-5f;
  const Floats square = x * x;
  Floats s = splat(-1.9515295891e-4f);
  s = s * square + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  s = s * square * x + x;
  Floats c = splat(2.443315711809948e-5f);
  c = c * square - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * square * square - 0.5f * square + 1.0f;
  const auto odd = (quarter & 1) != 0;
  sine = (Floats)((Ints)(odd ? c : s) ^ ((quarter & 2) << 30));
  cosine = (Floats)((Ints)(odd ? s : c) ^ (((quarter + 1) & 2) << 30));
}

// 64-bit products of the low 32 bits of each lane; the high ones may hold anything.
inline Longs product(Longs x, uint32_t by) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  return (Longs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xFFFFFFFFu) * by;
#endif
}

// Standard normals of one token and expert, see ../noise.py. Writes whole groups of kNormals.
constexpr int kNormals = 8 * (kBytes / 8);

inline void philox_normals(uint64_t seed, uint32_t token, uint32_t expert, uint32_t offset, int size, float* to) {
  constexpr int kBlocks = kBytes / 8;
  Longs blocks = {};
  for (int lane = 0; lane < kBlocks; ++lane) blocks[lane] = lane;
  for (int first = 0; first < size; first += kNormals) {
    Longs c0 = Longs{} + token, c1 = Longs{} + expert, c2 = blocks + uint64_t(first / 8), c3 = Longs{} + offset;
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Longs product0 = product(c0, 0xD2511F53u), product1 = product(c2, 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ key0;
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ key1;
      c3 = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    uint64_t pairs[4][kBlocks];  // (cosine's, sine's normal) of word j of each block
    for (int half = 0; half < 2; ++half) {
      const Longs low = half ? c2 : c0, high = half ? c3 : c1;
      const Words words = (Words)((low & 0xFFFFFFFFu) | (high << 32));
      const Floats uniform = __builtin_convertvector((Ints)(words & 0xFFFFu), Floats) + 0.5f;
      const Floats radius = square_root(-2.0f * logarithm(uniform * (1.0f / 65536)));
      Floats sine, cosine;
      sine_cosine(words >> 16, sine, cosine);
      const Longs real = (Longs)(radius * cosine), imaginary = (Longs)(radius * sine);
      const Longs even = (real & 0xFFFFFFFFu) | (imaginary << 32);
      const Longs odd = (real >> 32) | (imaginary & ~uint64_t(0xFFFFFFFFu));
      std::memcpy(pairs[2 * half], &even, sizeof even);
      std::memcpy(pairs[2 * half + 1], &odd, sizeof odd);
    }
    uint64_t ordered[kBlocks][4];
    for (int block = 0; block < kBlocks; ++block) {
      for (int j = 0; j < 4; ++j) ordered[block][j] = pairs[j][block];
    }
    std::memcpy(to + first, ordered, sizeof ordered);
  }
}
