// Sixteen floats at once, on any instruction set: the compiler lowers them to one AVX-512 register, two AVX2, or four SSE or NEON.
// Only what it cannot find by itself (BF16 dot products, compression by a mask) has intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Int16){__VA_ARGS__})
#endif

namespace {

constexpr int kLanes = 16;
typedef float Float16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Half16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Word16 __attribute__((vector_size(64), aligned(4), may_alias));

ALWAYS_INLINE Float16 load(const float* p) { return *reinterpret_cast<const Float16*>(p); }
ALWAYS_INLINE void store(float* p, Float16 v) { *reinterpret_cast<Float16*>(p) = v; }
ALWAYS_INLINE Float16 splat(float x) { return Float16{} + x; }

// A bfloat16 is the upper half of a float.
ALWAYS_INLINE float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
ALWAYS_INLINE float widen(float x) { return x; }
ALWAYS_INLINE Float16 load(const uint16_t* p) {
  Word16 bits = __builtin_convertvector(*reinterpret_cast<const Half16*>(p), Word16) << 16;
  return reinterpret_cast<Float16&>(bits);
}

// Rounds to nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE void narrow(float x, uint16_t* y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *y = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
ALWAYS_INLINE void narrow(float x, float* y) { *y = x; }

// NaN in x stays: a comparison with NaN is false.
ALWAYS_INLINE Float16 relu(Float16 x) { return x < 0.0f ? Float16{} : x; }

// Sums of the four lanes inside each quarter, of four vectors: quarter l of the result holds a, b, c, d of quarter l.
ALWAYS_INLINE Float16 add_quarters(Float16 a, Float16 b, Float16 c, Float16 d) {
  Float16 ab = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  Float16 cd = SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  return SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Four vectors of quarters -> their sums over quarters, one vector after the other.
ALWAYS_INLINE Float16 add_across(const Float16 y[4]) {
  Float16 a = SHUFFLE(y[0], y[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              SHUFFLE(y[0], y[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  Float16 b = SHUFFLE(y[2], y[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              SHUFFLE(y[2], y[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// The same vectors turned: z[q] holds quarter q of all four.
ALWAYS_INLINE void turn_quarters(const Float16 y[4], Float16 z[4]) {
  Float16 a = SHUFFLE(y[0], y[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  Float16 b = SHUFFLE(y[2], y[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  Float16 c = SHUFFLE(y[0], y[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  Float16 d = SHUFFLE(y[2], y[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  z[0] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  z[1] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  z[2] = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  z[3] = SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// The sum of each of sixteen vectors.
ALWAYS_INLINE Float16 add_lanes(const Float16 v[16]) {
  Float16 y[4];
  for (int i = 0; i < 4; i++) y[i] = add_quarters(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  return add_across(y);
}

}  // namespace
