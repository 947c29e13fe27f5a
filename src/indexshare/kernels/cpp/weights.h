// Packed weights. Sixteen outputs, a block, lie side by side; four blocks, a strip, take turns step by step, so that a product
// reads one stream (the last strip has what is left).
//
//     fp32  [out/64][in  ][4][16]         int8  [out/64][in/4][4][16][4]  unsigned, 128 more than the value
//     bf16  [out/64][in/2][4][16][2]      int4  [out/64][in/8][4][16][4]  bytes: inputs 0-3 low, 4-7 high, 8 more than the value
//     fp8   [out/64][in/2][4][16][2]      scales [out/16][groups][16] in BF16; of fp8 [out/16][groups] in fp32
#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "vectors.h"

namespace {

enum Format : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kFp8 = 4 };

// A weight [num_outputs, width]; the fields are mirrored in kernels/packed.py.
struct Matrix {
  const uint8_t* data;
  const void* scales;
  int64_t num_outputs, width;
  int32_t format, group;  // group: inputs that share a scale of weights (0: all) and, for integers, one of activations

  int64_t num_blocks() const { return (num_outputs + kLanes - 1) / kLanes; }
};

// Inputs in one step of 64 bytes of weights (32 of fp8), and bytes of input that it takes.
constexpr int inputs_per_step(int format) { return format == kFp32 ? 1 : format == kInt8 ? 4 : format == kInt4 ? 8 : 2; }
constexpr int bytes_per_step(int format) { return format == kFp8 ? 32 : 64; }
constexpr bool is_integer(int format) { return format == kInt8 || format == kInt4; }
constexpr int kActivationGroup = 128;

int64_t num_steps(const Matrix& m) { return (m.width + inputs_per_step(m.format) - 1) / inputs_per_step(m.format); }
int64_t block_bytes(const Matrix& m) { return num_steps(m) * bytes_per_step(m.format); }

constexpr int kStrip = 4;  // blocks

// Where the steps of a block lie in a matrix: bytes before the first one, and from one to the next.
struct Place {
  int64_t first, stride;
};
Place place_of(const Matrix& m, int64_t block) {
  const int64_t inside = block % kStrip, strip = block - inside, bytes = bytes_per_step(m.format);
  return {strip * block_bytes(m) + inside * bytes, std::min<int64_t>(kStrip, m.num_blocks() - strip) * bytes};
}

int activation_group(const Matrix& m) { return m.format == kInt4 ? m.group : kActivationGroup; }

// Input `d` of output `row` of a plain weight in the format's own numbers: what the packed form holds.
template <typename Number>
void pack_numbers(const Number* weight, const Matrix& m, uint8_t* out) {
  constexpr int kPair = sizeof(Number) == 4 ? 1 : sizeof(Number) == 2 ? 2 : 0;
  const int pair = kPair ? kPair : m.format == kFp8 ? 2 : 4;
  for_each_run(m.num_blocks(), 4, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      const Place place = place_of(m, block);
      auto step = [&](int64_t d) { return reinterpret_cast<Number*>(out + place.first + d / pair * place.stride); };
      for (int64_t d = 0; d < num_steps(m) * pair; d += pair) std::fill(step(d), step(d) + kLanes * pair, Number{});
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t row = block * kLanes + lane;
        if (row >= m.num_outputs) break;
        for (int64_t d = 0; d < m.width; d++) {
          const Number value = weight[row * m.width + d];
          step(d)[lane * pair + d % pair] = m.format == kInt8 ? Number(value + 128) : value;
        }
      }
    }
  });
}

// From [out][ceil(in / 2)] bytes, the even input low.
void pack_nibbles(const uint8_t* weight, const Matrix& m, uint8_t* out) {
  const int64_t stride = (m.width + 1) / 2;
  for_each_run(m.num_blocks(), 4, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      const Place place = place_of(m, block);
      auto step = [&](int64_t d) { return out + place.first + d / 8 * place.stride; };
      for (int64_t d = 0; d < m.width; d += 8) std::fill(step(d), step(d) + 64, uint8_t{});
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t row = block * kLanes + lane;
        if (row >= m.num_outputs) break;
        for (int64_t d = 0; d < m.width; d++) {
          const uint8_t nibble = (weight[row * stride + d / 2] >> (d % 2 * 4)) & 15;
          step(d)[lane * 4 + d % 4] |= uint8_t(nibble << (d % 8 / 4 * 4));
        }
      }
    }
  });
}

}  // namespace
