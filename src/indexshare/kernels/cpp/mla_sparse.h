// Absorbed MLA over selected rows: scores of four heads and four rows at a time, one softmax, then the weighted sum of the
// same rows. A row is read where it lies in the cache; nothing is gathered into a copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kHeads = 4;       // heads and rows in registers at once
constexpr int kRows = 4;
constexpr int kValueVectors = 4;  // of a latent, in registers for the weighted sum
constexpr int kPrefetch = 8;    // rows ahead

struct MlaSparse {
  const void* query;  // [num_tokens, num_heads, width]
  bool query_is_bf16;
  const void* latents;  // pool of rows [width]
  bool latents_are_bf16;
  const int32_t* selection;  // [num_tokens, num_selected], -1 at the end
  int64_t num_tokens, num_selected;
  int num_heads, width, latent_dim;
  float scale;
  void* output;  // [num_tokens, num_heads, latent_dim] in the query's type

  int count(int64_t token) const {
    const int32_t* rows = selection + token * num_selected;
    return int(std::partition_point(rows, rows + num_selected, [](int32_t row) { return row >= 0; }) - rows);
  }
};

// sums[row][head] over the width.
template <typename Query, typename Latent>
ALWAYS_INLINE void dot_block(const Query* const query[kHeads], const Latent* const rows[kRows], int width, Float16 sums[16]) {
  for (int i = 0; i < 16; i++) sums[i] = Float16{};
  for (int d = 0; d < width; d += kLanes) {
    Float16 q[kHeads];
    for (int h = 0; h < kHeads; h++) q[h] = load(query[h] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Float16 row = load(rows[r] + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) sums[r * kHeads + h] += row * q[h];
    }
  }
}

#if defined(__AVX512BF16__)
ALWAYS_INLINE void dot_block(
    const uint16_t* const query[kHeads], const uint16_t* const rows[kRows], int width, Float16 out[16]) {
  __m512 sums[16];
  for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
  auto step = [&](auto read, int d) {
    __m512bh q[kHeads];
    for (int h = 0; h < kHeads; h++) q[h] = read(query[h] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const __m512bh row = read(rows[r] + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) sums[r * kHeads + h] = _mm512_dpbf16_ps(sums[r * kHeads + h], row, q[h]);
    }
  };
  int d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    step([](const uint16_t* p) __attribute__((always_inline)) { return (__m512bh)_mm512_loadu_si512(p); }, d);
  }
  if (d < width) {
    step([](const uint16_t* p) __attribute__((always_inline)) {
      return (__m512bh)_mm512_maskz_loadu_epi16(0xffff, p);
    }, d);
  }
  for (int i = 0; i < 16; i++) out[i] = (Float16)sums[i];
}
#endif

// Scaled scores [row][padded heads] of rows begin .. end - 1 of a token.
template <typename Query, typename Latent>
void score_rows(const MlaSparse& a, int64_t token, int begin, int end, float* scores) {
  const Query* query = static_cast<const Query*>(a.query) + token * a.num_heads * a.width;
  const Latent* pool = static_cast<const Latent*>(a.latents);
  const int32_t* selected = a.selection + token * a.num_selected;
  const int padded = (a.num_heads + kHeads - 1) / kHeads * kHeads;
  const Float16 scale = splat(a.scale);
  for (int k = begin; k < end; k += kRows) {
    const Latent* rows[kRows];
    for (int r = 0; r < kRows; r++) {
      rows[r] = pool + int64_t(selected[std::min(k + r, end - 1)]) * a.width;
      const Latent* ahead = pool + int64_t(selected[std::min(k + r + kPrefetch, end - 1)]) * a.width;
      for (int d = 0; d < a.width; d += 64 / int(sizeof(Latent))) __builtin_prefetch(ahead + d);
    }
    for (int h = 0; h < padded; h += kHeads) {
      const Query* heads[kHeads];
      for (int i = 0; i < kHeads; i++) heads[i] = query + std::min(h + i, a.num_heads - 1) * a.width;
      Float16 sums[16];
      dot_block(heads, rows, a.width, sums);
      const Float16 block = add_lanes(sums) * scale;
      for (int r = 0; r < std::min(kRows, end - k); r++) {
        for (int i = 0; i < kHeads; i++) scores[(k + r) * padded + h + i] = block[r * kHeads + i];
      }
    }
  }
}

// In place over the first axis of [count][padded].
void softmax_rows(float* scores, int count, int padded) {
  for (int h = 0; h < padded; h++) {
    float peak = scores[h];
    for (int k = 1; k < count; k++) peak = std::max(peak, scores[k * padded + h]);
    float total = 0.0f;
    for (int k = 0; k < count; k++) total += scores[k * padded + h] = std::exp(scores[k * padded + h] - peak);
    const float inverse = 1.0f / total;
    for (int k = 0; k < count; k++) scores[k * padded + h] *= inverse;
  }
}

// Dims begin .. begin + 16 * kVectors - 1 of the attended latents of four heads.
template <int kVectors, typename Query, typename Latent>
ALWAYS_INLINE void weigh(const MlaSparse& a, int64_t token, int head, int begin, int count, const float* weights) {
  const Latent* pool = static_cast<const Latent*>(a.latents);
  const int32_t* selected = a.selection + token * a.num_selected;
  const int padded = (a.num_heads + kHeads - 1) / kHeads * kHeads;
  Float16 sums[kHeads][kVectors] = {};
  for (int k = 0; k < count; k++) {
    const Latent* row = pool + int64_t(selected[k]) * a.width + begin;
    Float16 values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) values[v] = load(row + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kHeads; i++) {
      const Float16 weight = splat(weights[k * padded + head + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[i][v] += weight * values[v];
    }
  }
  for (int i = 0; i < std::min(kHeads, a.num_heads - head); i++) {
    Query* out = static_cast<Query*>(a.output) + (token * a.num_heads + head + i) * a.latent_dim + begin;
    for (int v = 0; v < kVectors; v++) {
      for (int lane = 0; lane < kLanes; lane++) narrow(sums[i][v][lane], out + v * kLanes + lane);
    }
  }
}

// Part `part` of the weighted sum: four heads and 64 dims.
template <typename Query, typename Latent>
void weigh_part(const MlaSparse& a, int64_t token, int part, int count, const float* weights) {
  const int chunks = (a.latent_dim + kValueVectors * kLanes - 1) / (kValueVectors * kLanes);
  const int head = part / chunks * kHeads, begin = part % chunks * kValueVectors * kLanes;
  switch (std::min(kValueVectors, (a.latent_dim - begin) / kLanes)) {
    case 4: return weigh<4, Query, Latent>(a, token, head, begin, count, weights);
    case 3: return weigh<3, Query, Latent>(a, token, head, begin, count, weights);
    case 2: return weigh<2, Query, Latent>(a, token, head, begin, count, weights);
    default: return weigh<1, Query, Latent>(a, token, head, begin, count, weights);
  }
}

int num_weigh_parts(const MlaSparse& a) {
  return (a.num_heads + kHeads - 1) / kHeads * ((a.latent_dim + kValueVectors * kLanes - 1) / (kValueVectors * kLanes));
}

// Calls f<Query, Latent>() for the types at hand.
template <typename F>
void with_types(const MlaSparse& a, F f) {
  if (a.query_is_bf16) {
    if (a.latents_are_bf16) f(uint16_t{}, uint16_t{});
    else f(uint16_t{}, float{});
  } else {
    if (a.latents_are_bf16) f(float{}, uint16_t{});
    else f(float{}, float{});
  }
}

void mla_score_rows(const MlaSparse& a, int64_t token, int begin, int end, float* scores) {
  with_types(a, [&](auto q, auto l) { score_rows<decltype(q), decltype(l)>(a, token, begin, end, scores); });
}

void mla_weigh_part(const MlaSparse& a, int64_t token, int part, int count, const float* weights) {
  with_types(a, [&](auto q, auto l) { weigh_part<decltype(q), decltype(l)>(a, token, part, count, weights); });
}

void mla_sparse_tokens(const MlaSparse& a, int64_t first, int64_t last) {
  const int padded = (a.num_heads + kHeads - 1) / kHeads * kHeads;
  std::vector<float> scores(size_t(a.num_selected) * padded);
  for (int64_t token = first; token < last; token++) {
    const int count = a.count(token);
    mla_score_rows(a, token, 0, count, scores.data());
    softmax_rows(scores.data(), count, padded);
    for (int part = 0; part < num_weigh_parts(a); part++) mla_weigh_part(a, token, part, count, scores.data());
  }
}

}  // namespace
