// Rows of a cache: numbers of the activations' type, or rounded to int8 (kernels/cache_formats.py has the format).
#pragma once

#include "inputs.h"

namespace {

// Bytes of `width` rounded numbers with their scales.
constexpr int64_t rounded_bytes(int64_t width, int group) {
  return (width + 7) / 8 * 8 + (width + group - 1) / group * int64_t(sizeof(GroupScale));
}

ALWAYS_INLINE void round_to(float* to, Float16 x) { store(to, x); }
ALWAYS_INLINE void round_to(uint16_t* to, Float16 x) {
#if defined(__AVX512BF16__)  // one instruction, which takes numbers below 2^-126 for zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  store(to, x);
#endif
}

struct Pool {
  uint8_t* data;
  int64_t width;  // numbers in a row
  bool is_bf16;   // else fp32; of rounded rows: what they are widened to
  int group;      // rounded rows: numbers that share a scale; else 0
  int64_t rounded;  // the first of `width` numbers are int8, the others BF16

  int64_t row_bytes() const {
    if (group == 0) return width * (is_bf16 ? 2 : 4);
    return rounded_bytes(rounded, group) + (2 * (width - rounded) + 7) / 8 * 8;
  }

  void write(int64_t row, const float* x) const {
    uint8_t* to = data + row * row_bytes();
    if (group > 0) {
      encode_integers(x, rounded, group, to);
      narrow_row(x + rounded, width - rounded, reinterpret_cast<uint16_t*>(to + rounded_bytes(rounded, group)));
    } else if (is_bf16) {
      narrow_row(x, width, reinterpret_cast<uint16_t*>(to));
    } else {
      memcpy(to, x, width * sizeof(float));
    }
  }

  // A rounded row, widened.
  template <typename Number>
  void read(int64_t row, Number* to) const {
    const uint8_t* from = data + row * row_bytes();
    const int8_t* numbers = reinterpret_cast<const int8_t*>(from);
    const GroupScale* scales = reinterpret_cast<const GroupScale*>(from + (rounded + 7) / 8 * 8);
    for (int64_t begin = 0; begin < rounded; begin += group) {
      const int64_t end = std::min(begin + group, rounded);
      const float scale = scales[begin / group].scale;
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) round_to(to + i, load(numbers + i) * scale);
      for (; i < end; i++) narrow(numbers[i] * scale, to + i);
    }
    const uint16_t* plain = reinterpret_cast<const uint16_t*>(from + rounded_bytes(rounded, group));
    if constexpr (sizeof(Number) == 2) memcpy(to + rounded, plain, (width - rounded) * 2);
    else widen_row(plain, width - rounded, to + rounded);
  }
};

}  // namespace
