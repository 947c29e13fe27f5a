// The exact top-k of a stream of scores, with little more than k of them in memory.
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

// The best of what has been seen so far of one query.
struct Candidates {
  float* scores;
  int32_t* positions;
  int count, capacity, topk;
  float threshold;

  // How many scores are at least `bound`.
  int num_from(float bound) const {
    Int16 sums{};
    for (int i = 0; i < count; i += kLanes) sums -= load(scores + i) >= bound;
    int sum = 0;
    for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
    return sum;
  }

  // Keeps the best k, in their order; among equals the first. Bisects for the k-th best score: a pass over scores that
  // lie in the first cache costs less than moving them.
  void cut() {
    if (count <= topk) return;
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(scores + count, scores + padded, scores[0]);
    Float16 lows = load(scores), highs = lows;
    for (int i = kLanes; i < padded; i += kLanes) {
      const Float16 v = load(scores + i);
      lows = v < lows ? v : lows;
      highs = larger(v, highs);
    }
    float low = lows[0], high = highs[0];
    for (int lane = 1; lane < kLanes; lane++) low = std::min(low, lows[lane]), high = std::max(high, highs[lane]);
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    // At least k scores are >= low, fewer than k are >= the number after high.
    int32_t from = ordered(low), to = ordered(high) + 1;
    int num_kept = count;
    while (int64_t(to) - from > 1 && num_kept != topk) {
      const int32_t middle = int32_t((int64_t(from) + to) / 2);
      const int found = num_from(unordered(middle));
      if (found >= topk) from = middle, num_kept = found;
      else to = middle;
    }
    // More than k are left only if the last of them are equal: the first of those stay.
    const float last = unordered(from);
    int num_surplus = num_kept - topk, kept = 0;
    if (num_surplus == 0) {
      kept = keep_from(last);
    } else {
      int num_ties = topk - num_from(unordered(from + 1));
      for (int i = 0; i < count; i++) {
        const bool keep = scores[i] > last || (scores[i] == last && num_ties-- > 0);
        scores[kept] = scores[i];
        positions[kept] = positions[i];
        kept += keep;
      }
    }
    count = topk;
    threshold = last;
  }

  // Moves scores of at least `bound` to the front. Returns their number.
  int keep_from(float bound) {
    int kept = 0;
    for (int i = 0; i < count; i += kLanes) {
#if defined(__AVX512F__)
      const __m512 v = _mm512_loadu_ps(scores + i);
      const __m512i places = _mm512_loadu_si512(positions + i);
      const __mmask16 keep = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ);
      _mm512_storeu_ps(scores + kept, _mm512_maskz_compress_ps(keep, v));
      _mm512_storeu_si512(positions + kept, _mm512_maskz_compress_epi32(keep, places));
      kept += __builtin_popcount(keep);
#else
      for (int lane = i; lane < std::min(i + kLanes, count); lane++) {
        scores[kept] = scores[lane];
        positions[kept] = positions[lane];
        kept += scores[lane] >= bound;
      }
#endif
    }
    return kept;
  }

  // Floats in their order as whole numbers, and back. Zero has one sign here (see `take`).
  static int32_t ordered(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }
  static float unordered(int32_t bits) {
    bits ^= (bits >> 31) & 0x7fffffff;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }

  ALWAYS_INLINE void append(Float16 found, int32_t position) {
#if defined(__AVX512F__)
    const __m512 v = (__m512)found;
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_set1_ps(threshold), _CMP_GT_OQ);
    if (!above) return;
    const __m512i places = _mm512_add_epi32(
        _mm512_set1_epi32(position), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_ps(scores + count, _mm512_maskz_compress_ps(above, v));
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(above, places));
    count += __builtin_popcount(above);
#else
    for (int lane = 0; lane < kLanes; lane++) {
      if (found[lane] > threshold) {
        scores[count] = found[lane];
        positions[count++] = position + lane;
      }
    }
#endif
    if (count > capacity - kLanes) cut();
  }
};

}  // namespace
