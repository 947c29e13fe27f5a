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
typedef int8_t Byte16 __attribute__((vector_size(16), aligned(1), may_alias));
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
ALWAYS_INLINE float widen(int8_t x) { return x; }
ALWAYS_INLINE Float16 load(const uint16_t* p) {
  Word16 bits = __builtin_convertvector(*reinterpret_cast<const Half16*>(p), Word16) << 16;
  return reinterpret_cast<Float16&>(bits);
}

ALWAYS_INLINE Float16 load(const int8_t* p) {
  typedef int16_t Short16 __attribute__((vector_size(32)));
  const Short16 wide = __builtin_convertvector(*reinterpret_cast<const Byte16*>(p), Short16);  // GCC finds single steps
  return __builtin_convertvector(__builtin_convertvector(wide, Int16), Float16);
}

ALWAYS_INLINE Float16 larger(Float16 a, Float16 b) { return a > b ? a : b; }

// Lane l of the result is lane (l + by) % 16.
ALWAYS_INLINE Float16 turn_lanes(Float16 x, int by) {
  float twice[2 * kLanes];
  store(twice, x);
  store(twice + kLanes, x);
  return load(twice + by);
}

// The first `count` numbers, then zeros.
template <typename Number>
ALWAYS_INLINE Float16 load_part(const Number* p, int count) {
  Number part[kLanes] = {};
  for (int i = 0; i < count; i++) part[i] = p[i];
  return load(part);
}

// The first `count` of sixteen floats.
ALWAYS_INLINE Float16 load_at(const float* p, int count) { return count == kLanes ? load(p) : load_part(p, count); }
ALWAYS_INLINE void store_at(float* p, Float16 x, int count) {
  if (count == kLanes) return store(p, x);
  for (int lane = 0; lane < count; lane++) p[lane] = x[lane];
}

// Rounds to nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE void narrow(float x, uint16_t* y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *y = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
ALWAYS_INLINE void narrow(float x, float* y) { *y = x; }

// Sixteen of them. NaN stays NaN, as above.
ALWAYS_INLINE void store(uint16_t* p, Float16 x) {
  const Word16 bits = reinterpret_cast<const Word16&>(x);
  const Word16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Half16 halves = __builtin_convertvector(x == x ? rounded : Word16{} + 0x7fc0u, Half16);
  *reinterpret_cast<Half16*>(p) = halves;
}

ALWAYS_INLINE Float16 round_to_bf16(Float16 x) {
  uint16_t halves[kLanes];
  store(halves, x);
  return load(halves);
}

template <typename Number>
void widen_row(const Number* x, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i));
  for (; i < count; i++) y[i] = widen(x[i]);
}

template <typename Number>
void narrow_row(const float* x, int64_t count, Number* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i));
  for (; i < count; i++) narrow(x[i], y + i);
}

// Four bytes, wherever they lie.
ALWAYS_INLINE int32_t word_at(const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return word;
}

// To the nearest bfloat16.
void round_row(float* x, int64_t count) {
  int64_t i = 0;
  uint16_t narrowed[kLanes];
  for (; i + kLanes <= count; i += kLanes) {
    store(narrowed, load(x + i));
    store(x + i, load(narrowed));
  }
  for (; i < count; i++) {
    narrow(x[i], narrowed);
    x[i] = widen(narrowed[0]);
  }
}

// The low bytes of sixteen integers.
ALWAYS_INLINE void store(int8_t* p, Int16 v) {
  *reinterpret_cast<Byte16*>(p) = __builtin_convertvector(v, Byte16);
}

// e^x within 2 units of the last place for x from -87 to 88; below that the smallest of these.
ALWAYS_INLINE Float16 exponential(Float16 x) {
  x = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
  const Float16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number of powers of two
  const Float16 whole = shifted - 12582912.0f;
  const Float16 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Float16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Int16 power = (reinterpret_cast<const Int16&>(shifted) - 0x4b400000 + 127) << 23;
  return y * reinterpret_cast<const Float16&>(power);
}

ALWAYS_INLINE Float16 sigmoid(Float16 x) { return 1.0f / (1.0f + exponential(-x)); }
ALWAYS_INLINE Float16 silu(Float16 x) { return x * sigmoid(x); }

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
