// Products with packed weights: [out / 16][in / pair][16][pair], so that one line of memory holds sixteen outputs and the
// inputs are broadcast. Prefill and decode run the same sums in the same order (over the inputs, one pair after the other,
// in fp32), so a token's result does not depend on the tokens beside it, on the chunk or on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "vectors.h"

namespace {

// How many inputs lie side by side: two in BF16, for the dot-product instruction.
template <typename Number>
constexpr int kPair = sizeof(Number) == 2 ? 2 : 1;

constexpr int kTokensAtOnce = 8;   // with three blocks of outputs: 24 accumulators
constexpr int kBlocksAtOnce = 3;
constexpr int kTokensPerTask = 64;
constexpr int kBlocksPerTask = 12;

template <typename Number>
ALWAYS_INLINE Float16 step(Float16 sum, const Number* weights, const Number* x);

template <>
ALWAYS_INLINE Float16 step<float>(Float16 sum, const float* weights, const float* x) {
  return sum + load(weights) * *x;
}

template <>
ALWAYS_INLINE Float16 step<uint16_t>(Float16 sum, const uint16_t* weights, const uint16_t* x) {
#if defined(__AVX512BF16__)
  int32_t pair;
  memcpy(&pair, x, 4);
  return (Float16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(pair));
#else
  // Even and odd inputs of sixteen outputs: the two halves of each 32-bit word.
  Word16 words;
  memcpy(&words, weights, 64);
  Word16 even = words << 16, odd = words & 0xffff0000u;
  sum += reinterpret_cast<Float16&>(even) * widen(x[0]);
  return sum + reinterpret_cast<Float16&>(odd) * widen(x[1]);
#endif
}

// kTokens rows of x [.., in] times kBlocks blocks of packed weights; give(token, block, sums) takes the results.
template <int kTokens, int kBlocks, typename Number, typename Give>
ALWAYS_INLINE void multiply(
    const Number* const x[kTokens], const Number* packed, int64_t width, Give give) {
  Float16 sums[kTokens][kBlocks];
  for (int t = 0; t < kTokens; t++) {
    for (int b = 0; b < kBlocks; b++) sums[t][b] = Float16{};
  }
  const int64_t block_size = width * kLanes;
  for (int64_t d = 0; d < width; d += kPair<Number>) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; b++) {
        sums[t][b] = step<Number>(sums[t][b], packed + b * block_size + d * kLanes, x[t] + d);
      }
    }
  }
  for (int t = 0; t < kTokens; t++) {
    for (int b = 0; b < kBlocks; b++) give(t, b, sums[t][b]);
  }
}

// All of `num_tokens` rows (at most kTokensAtOnce) times blocks begin .. end - 1; give(token, block, sums).
template <int kTokens, int kBlocks, typename Number, typename Give>
void multiply_tile(const Number* const* x, const Number* packed, int64_t width, int64_t begin, int64_t end, Give give) {
  int64_t block = begin;
  for (; block + kBlocks <= end; block += kBlocks) {
    multiply<kTokens, kBlocks, Number>(x, packed + block * width * kLanes, width, [&](int t, int b, Float16 sums) {
      give(t, block + b, sums);
    });
  }
  for (; block < end; block++) {
    multiply<kTokens, 1, Number>(x, packed + block * width * kLanes, width, [&](int t, int, Float16 sums) {
      give(t, block, sums);
    });
  }
}

template <typename Number, typename Give>
void multiply_tokens(
    const Number* const* x, int64_t num_tokens, const Number* packed, int64_t width, int64_t begin, int64_t end, Give give) {
  int64_t token = 0;
  auto from = [&](int64_t first) {
    return [&give, first](int t, int64_t block, Float16 sums) { give(first + t, block, sums); };
  };
  // Weights of a group of blocks stay in the second cache while all tokens pass.
  for (; token + kTokensAtOnce <= num_tokens; token += kTokensAtOnce) {
    multiply_tile<kTokensAtOnce, kBlocksAtOnce>(x + token, packed, width, begin, end, from(token));
  }
  for (; token + 4 <= num_tokens; token += 4) multiply_tile<4, 4>(x + token, packed, width, begin, end, from(token));
  for (; token + 2 <= num_tokens; token += 2) multiply_tile<2, 6>(x + token, packed, width, begin, end, from(token));
  for (; token < num_tokens; token++) multiply_tile<1, 8>(x + token, packed, width, begin, end, from(token));
}

// The sixteen results of a block, without those beyond the end.
template <typename Number>
ALWAYS_INLINE void write_block(Float16 sums, int64_t block, int64_t num_outputs, Number* row) {
  const int64_t first = block * kLanes;
  const int count = int(std::min<int64_t>(kLanes, num_outputs - first));
  for (int lane = 0; lane < count; lane++) narrow(sums[lane], row + first + lane);
}

// Rows of weight [out, in] -> blocks begin .. end - 1 of the packed form; missing outputs are zero.
template <typename Number>
void pack_blocks(const Number* weight, int64_t num_outputs, int64_t width, int64_t begin, int64_t end, Number* packed) {
  constexpr int pair = kPair<Number>;
  for (int64_t block = begin; block < end; block++) {
    Number* to = packed + block * width * kLanes;
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t row = block * kLanes + lane;
      for (int64_t d = 0; d < width; d++) {
        to[d / pair * kLanes * pair + lane * pair + d % pair] = row < num_outputs ? weight[row * width + d] : Number{};
      }
    }
  }
}

}  // namespace
