// Index scores and the exact top-k of each query in one pass over the keys: no row of scores is ever stored.
//
// Lanes hold (query, head) pairs: four queries of up to four heads, or one query of up to sixteen, or a part of one with
// more. Keys stay as they lie in the cache; a pair of dims of one key is broadcast against all lanes. Scores above the
// query's threshold are appended to its candidates; when those are full, they are cut back to the best k, whose last score
// is the new threshold. Keys come in ascending order, so equal scores that come later lose, as the specification wants.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "pool.h"

namespace {

constexpr int kKeysAtOnce = 16;     // accumulators in registers
constexpr int kKeysPerBlock = 64;   // reused by every query of a tile while they are in the first cache
constexpr int kQueriesPerTile = 16;

struct IndexSelect {
  const void* query;     // [num_queries, num_heads, dim]
  bool query_is_bf16;
  const float* weights;  // [num_queries, num_heads]
  const void* keys;      // pool of rows [dim]
  bool keys_are_bf16, keys_are_rounded;
  const int64_t* page_table;  // of this sequence; null: row = position + first_row
  int64_t page_size, first_row;
  int64_t num_queries, num_past;
  int num_heads, dim, topk;
  int32_t* selection;  // [num_queries, topk] with this stride, filled with -1
  int64_t selection_stride;

  int lanes_per_query() const { return num_heads <= 4 ? 4 : (num_heads + kLanes - 1) / kLanes * kLanes; }
  int64_t row(int64_t position) const {
    if (page_table == nullptr) return first_row + position;
    return page_table[position / page_size] * page_size + position % page_size;
  }
};

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
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    float low = scores[0], high = scores[0];
    for (int i = 1; i < count; i++) low = std::min(low, scores[i]), high = std::max(high, scores[i]);
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

// Everything one thread needs, allocated once per call.
struct IndexScratch {
  std::vector<float> packed, weights, keys, scores;
  std::vector<int32_t> positions;
  Candidates candidates[kQueriesPerTile];

  IndexScratch(int topk, int num_lanes, int dim, int num_queries) {
    const int capacity = (std::max(2 * topk, topk + 512) + kLanes - 1) / kLanes * kLanes + kLanes;
    packed.resize(size_t(num_lanes) * (dim + 2));  // room for bytes that are padded
    weights.resize(num_lanes);
    keys.resize(size_t(kKeysPerBlock) * (dim + 4));
    scores.resize(size_t(num_queries) * capacity);
    positions.resize(scores.size());
    for (int i = 0; i < num_queries; i++) {
      candidates[i] = {&scores[size_t(i) * capacity], &positions[size_t(i) * capacity], 0, capacity, topk, 0.0f};
    }
  }
};

// From one key to the next, in numbers; behind a rounded key are its scale and its sum.
template <typename Number>
constexpr int key_stride(int dim) {
  return sizeof(Number) == 1 ? int(rounded_bytes(dim, dim)) : dim;
}

ALWAYS_INLINE GroupScale scale_of_key(const int8_t* key, int dim) {
  GroupScale scale;
  memcpy(&scale, key + (dim + 7) / 8 * 8, sizeof(scale));
  return scale;
}

// acc[key] += query lanes . key, for sixteen keys. query: [dim][16 lanes]; keys: rows of `dim` floats.
template <int kDim>
ALWAYS_INLINE void dots(const float* query, const float* keys, int dim_at_run_time, Float16 acc[kKeysAtOnce]) {
  const int dim = kDim ? kDim : dim_at_run_time;
  for (int k = 0; k < kKeysAtOnce; k++) acc[k] = Float16{};
  for (int d = 0; d < dim; d++) {
    const Float16 q = load(query + d * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeysAtOnce; k++) acc[k] += q * keys[k * dim + d];
  }
}

#if defined(__AVX512BF16__)
// The same in BF16: query [dim/2][16 lanes][2], products and sums in fp32.
template <int kDim>
ALWAYS_INLINE void dots(const uint16_t* query, const uint16_t* keys, int dim_at_run_time, Float16 acc[kKeysAtOnce]) {
  const int dim = kDim ? kDim : dim_at_run_time;
  __m512 sums[kKeysAtOnce];
#pragma GCC unroll 16
  for (int k = 0; k < kKeysAtOnce; k++) sums[k] = _mm512_setzero_ps();
  for (int d = 0; d < dim; d += 2) {
    const __m512bh q = (__m512bh)_mm512_loadu_si512(query + d * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeysAtOnce; k++) {
      int32_t pair;
      memcpy(&pair, keys + k * dim + d, 4);
      sums[k] = _mm512_dpbf16_ps(sums[k], q, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kKeysAtOnce; k++) acc[k] = (Float16)sums[k];
}
#endif

// The same in int8: query [dim/4][16 lanes][4], unsigned, 128 more than the number; rows of keys with their sums.
template <int kDim>
ALWAYS_INLINE void dots(const int8_t* query, const int8_t* keys, int dim_at_run_time, Int16 acc[kKeysAtOnce]) {
  const int dim = kDim ? kDim : dim_at_run_time, stride = key_stride<int8_t>(dim);
  Int16 sums[kKeysAtOnce];
#pragma GCC unroll 16
  for (int k = 0; k < kKeysAtOnce; k++) sums[k] = Int16{} - 128 * scale_of_key(keys + k * stride, dim).sum;
  for (int d = 0; d < dim; d += 4) {
    const Word16 q = *reinterpret_cast<const Word16*>(query + d * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeysAtOnce; k++) {
      sums[k] = step_bytes(sums[k], q, word_at(reinterpret_cast<const uint8_t*>(keys + k * stride + d)));
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kKeysAtOnce; k++) acc[k] = sums[k];
}

ALWAYS_INLINE Float16 relu_of(Float16 product) { return relu(product); }
ALWAYS_INLINE Float16 relu_of(Int16 product) { return __builtin_convertvector(product > 0 ? product : Int16{}, Float16); }

// Numbers that a lane of a packed query takes: whole steps of four bytes.
template <typename Number>
constexpr int lane_size(int dim) {
  return sizeof(Number) == 1 ? (dim + 3) / 4 * 4 : dim;
}

template <typename Query, typename Number>
void pack(const IndexSelect& a, int64_t first, int num_queries, Number* packed, float* weights) {
  constexpr int kPair = 4 / sizeof(Number);
  const int lanes_per_query = a.lanes_per_query();
  const int num_lanes = (num_queries * lanes_per_query + kLanes - 1) / kLanes * kLanes;
  const int size = lane_size<Number>(a.dim);
  std::fill(packed, packed + size_t(num_lanes) * size, Number{});
  std::fill(weights, weights + num_lanes, 0.0f);
  const float scale = 1.0f / std::sqrt(float(a.dim));
  std::vector<float> wide(sizeof(Number) == 1 ? a.dim : 0);
  std::vector<int8_t> rounded(sizeof(Number) == 1 ? key_stride<int8_t>(a.dim) : 0);
  for (int q = 0; q < num_queries; q++) {
    for (int h = 0; h < a.num_heads; h++) {
      const int lane = q * lanes_per_query + h;
      const Query* from = static_cast<const Query*>(a.query) + ((first + q) * a.num_heads + h) * a.dim;
      Number* to = packed + size_t(lane / kLanes) * kLanes * size;
      float rounding = 1.0f;
      if constexpr (sizeof(Number) == 1) {
        widen_row(from, a.dim, wide.data());
        encode_integers(wide.data(), a.dim, a.dim, reinterpret_cast<uint8_t*>(rounded.data()));
        rounding = scale_of_key(rounded.data(), a.dim).scale;
      }
      for (int d = 0; d < a.dim; d++) {
        Number* place = to + (d / kPair) * kLanes * kPair + (lane % kLanes) * kPair + d % kPair;
        if constexpr (sizeof(Number) == 1) *place = Number(rounded[d] + 128);
        else if constexpr (sizeof(Number) == 2) *place = reinterpret_cast<const Number&>(from[d]);
        else *place = widen(from[d]);
      }
      weights[lane] = a.weights[(first + q) * a.num_heads + h] * scale * rounding;
    }
  }
}

// The block of keys from `position` on, as Number: in place when it is a run of the cache, else copied.
template <typename Key, typename Number>
const Number* block_of_keys(const IndexSelect& a, int64_t position, int count, Number* copy) {
  const Key* pool = static_cast<const Key*>(a.keys);
  const int64_t first = a.row(position), stride = key_stride<Key>(a.dim);
  const bool is_run = a.page_table == nullptr || position % a.page_size + count <= a.page_size;
  if constexpr (sizeof(Key) == sizeof(Number)) {
    if (is_run && count == kKeysPerBlock) return reinterpret_cast<const Number*>(pool + first * stride);
  }
  for (int k = 0; k < kKeysPerBlock; k++) {
    const Key* from = pool + (k < count ? a.row(position + k) : first) * stride;  // beyond the end: any key, masked later
    if constexpr (sizeof(Key) == sizeof(Number)) memcpy(copy + size_t(k) * stride, from, stride * sizeof(Key));
    else for (int d = 0; d < a.dim; d++) copy[size_t(k) * a.dim + d] = widen(from[d]);
  }
  return copy;
}

// The scores of sixteen keys times the keys' scales.
template <typename Number>
ALWAYS_INLINE Float16 scaled(const Number* keys, int dim, Float16 scores) {
  if constexpr (sizeof(Number) == 1) {
    Float16 scales{};
    for (int k = 0; k < kKeysAtOnce; k++) scales[k] = scale_of_key(keys + k * key_stride<Number>(dim), dim).scale;
    return scores * scales;
  }
  return scores;
}

// Candidates of queries first .. first + num_queries - 1 among the keys begin .. end - 1. Returns whether a score was NaN.
template <typename Key, typename Number, int kDim>
bool scan_keys(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
  const int lanes_per_query = a.lanes_per_query();
  const Number* packed = reinterpret_cast<const Number*>(scratch.packed.data());
  for (int q = 0; q < num_queries; q++) {
    scratch.candidates[q].count = 0;
    scratch.candidates[q].threshold = -std::numeric_limits<float>::infinity();
  }
  Int16 is_nan{};
  const Int16 order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  auto take = [&](int q, Float16 found, int64_t position) {
    // Only keys up to the query itself and before `end`.
    const int64_t visible = std::min(a.num_past + first + q + 1, end) - position;
    if (visible <= 0) return;
    if (visible < kLanes) found = order < int32_t(visible) ? found : splat(-std::numeric_limits<float>::infinity());
    is_nan |= found != found;
    scratch.candidates[q].append(found + 0.0f, int32_t(position));  // no negative zero
  };
  for (int64_t block = begin; block < end; block += kKeysPerBlock) {
    const int count = int(std::min<int64_t>(kKeysPerBlock, end - block));
    const Number* keys = block_of_keys<Key, Number>(a, block, count, reinterpret_cast<Number*>(scratch.keys.data()));
    const int group_size = lanes_per_query <= kLanes ? kLanes / lanes_per_query : 1;
    for (int q = 0; q < num_queries; q += group_size) {
      if (block > a.num_past + first + std::min(q + group_size, num_queries) - 1) continue;
      const int lane = q * lanes_per_query;
      for (int k = 0; k < count; k += kKeysAtOnce) {
        const Number* first_key = keys + size_t(k) * key_stride<Number>(a.dim);
        Float16 sums[kKeysAtOnce] = {};
        for (int part = 0; part < lanes_per_query; part += kLanes) {
          std::conditional_t<sizeof(Number) == 1, Int16, Float16> acc[kKeysAtOnce];
          dots<kDim>(packed + size_t(lane + part) * lane_size<Number>(a.dim), first_key, a.dim, acc);
          const Float16 weights = load(&scratch.weights[lane + part]);
#pragma GCC unroll 16
          for (int i = 0; i < kKeysAtOnce; i++) sums[i] += relu_of(acc[i]) * weights;
        }
        if (lanes_per_query >= kLanes) {
          take(q, scaled(first_key, a.dim, add_lanes(sums)), block + k);
          continue;
        }
        Float16 quarters[4], of_query[4];
        for (int i = 0; i < 4; i++) {
          quarters[i] = add_quarters(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        }
        turn_quarters(quarters, of_query);
        for (int i = 0; i < 4 && q + i < num_queries; i++) take(q + i, scaled(first_key, a.dim, of_query[i]), block + k);
      }
    }
  }
  int found_nan = 0;
  for (int lane = 0; lane < kLanes; lane++) found_nan |= is_nan[lane];
  return found_nan != 0;
}

template <typename Key, typename Number>
bool scan(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
  Number* packed = reinterpret_cast<Number*>(scratch.packed.data());
  if (a.query_is_bf16) pack<uint16_t>(a, first, num_queries, packed, scratch.weights.data());
  else if constexpr (sizeof(Number) != 2) pack<float>(a, first, num_queries, packed, scratch.weights.data());
  switch (a.dim) {
    case 32: return scan_keys<Key, Number, 32>(a, first, num_queries, begin, end, scratch);
    case 64: return scan_keys<Key, Number, 64>(a, first, num_queries, begin, end, scratch);
    case 128: return scan_keys<Key, Number, 128>(a, first, num_queries, begin, end, scratch);
    default: return scan_keys<Key, Number, 0>(a, first, num_queries, begin, end, scratch);
  }
}

bool scan(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
  if (a.keys_are_rounded) return scan<int8_t, int8_t>(a, first, num_queries, begin, end, scratch);
#if defined(__AVX512BF16__)
  if (a.query_is_bf16 && a.keys_are_bf16 && a.dim % 2 == 0) {
    return scan<uint16_t, uint16_t>(a, first, num_queries, begin, end, scratch);
  }
#endif
  return a.keys_are_bf16 ? scan<uint16_t, float>(a, first, num_queries, begin, end, scratch)
                         : scan<float, float>(a, first, num_queries, begin, end, scratch);
}

void write_selection(const IndexSelect& a, int64_t query, Candidates& candidates) {
  candidates.cut();
  int32_t* out = a.selection + query * a.selection_stride;
  for (int i = 0; i < candidates.count; i++) out[i] = int32_t(a.row(candidates.positions[i]));
}

int lanes_of_tile(const IndexSelect& a) {
  return (kQueriesPerTile * a.lanes_per_query() + kLanes - 1) / kLanes * kLanes;
}

// Queries first .. last - 1, each over all the keys it sees. Returns whether a score was NaN.
bool index_select_queries(const IndexSelect& a, int64_t first, int64_t last) {
  IndexScratch scratch(a.topk, lanes_of_tile(a), a.dim, int(std::min<int64_t>(last - first, kQueriesPerTile)));
  bool is_nan = false;
  for (int64_t tile = first; tile < last; tile += kQueriesPerTile) {
    const int count = int(std::min<int64_t>(kQueriesPerTile, last - tile));
    const int64_t end = a.num_past + tile + count;
    if (end <= a.topk) {  // everything is taken, unscored
      for (int q = 0; q < count; q++) {
        for (int64_t s = 0; s <= a.num_past + tile + q; s++) {
          a.selection[(tile + q) * a.selection_stride + s] = int32_t(a.row(s));
        }
      }
      continue;
    }
    is_nan |= scan(a, tile, count, 0, end, scratch);
    for (int q = 0; q < count; q++) write_selection(a, tile + q, scratch.candidates[q]);
  }
  return is_nan;
}

// Part `part` of `num_parts` of the keys of up to kQueriesPerTile queries: candidates[part][query], counts beside them.
bool index_select_part(const IndexSelect& a, int64_t begin, int64_t end, float* scores, int32_t* positions, int32_t* counts) {
  IndexScratch scratch(a.topk, lanes_of_tile(a), a.dim, int(a.num_queries));
  const bool is_nan = scan(a, 0, int(a.num_queries), begin, end, scratch);
  for (int q = 0; q < a.num_queries; q++) {
    Candidates& found = scratch.candidates[q];
    found.cut();
    std::copy(found.scores, found.scores + found.count, scores + size_t(q) * a.topk);
    std::copy(found.positions, found.positions + found.count, positions + size_t(q) * a.topk);
    counts[q] = found.count;
  }
  return is_nan;
}

// The best of all parts; parts come in the order of their keys.
void index_select_join(const IndexSelect& a, int num_parts, const float* scores, const int32_t* positions, const int32_t* counts) {
  std::vector<float> all_scores(size_t(num_parts) * a.topk + kLanes);
  std::vector<int32_t> all_positions(all_scores.size());
  for (int q = 0; q < a.num_queries; q++) {
    Candidates joined{all_scores.data(), all_positions.data(), 0, int(all_scores.size()), a.topk, 0.0f};
    for (int part = 0; part < num_parts; part++) {
      const size_t from = (size_t(part) * a.num_queries + q) * a.topk;
      const int count = counts[part * a.num_queries + q];
      std::copy(scores + from, scores + from + count, joined.scores + joined.count);
      std::copy(positions + from, positions + from + count, joined.positions + joined.count);
      joined.count += count;
    }
    write_selection(a, q, joined);
  }
}

bool index_select_all(const IndexSelect& a) {
  std::atomic<bool> is_nan{false};
  const int64_t context = a.num_past + a.num_queries;
  if (a.num_queries <= kQueriesPerTile / 4 && context > a.topk) {  // too few queries to share: share the keys
    const int64_t num_threads = torch::stable::get_num_threads();
    const int64_t blocks = (context + kKeysPerBlock - 1) / kKeysPerBlock;
    const int64_t parts = std::min(num_threads, std::max<int64_t>(1, context / (2 * a.topk)));
    std::vector<float> scores(size_t(parts * a.num_queries) * a.topk);
    std::vector<int32_t> positions(scores.size()), counts(parts * a.num_queries);
    for_each_task(parts, [&](int64_t part) {
      const int64_t begin = blocks * part / parts * kKeysPerBlock;
      const int64_t end = std::min(context, blocks * (part + 1) / parts * kKeysPerBlock);
      const size_t place = size_t(part) * a.num_queries;
      if (index_select_part(a, begin, end, &scores[place * a.topk], &positions[place * a.topk], &counts[place])) is_nan = true;
    });
    index_select_join(a, int(parts), scores.data(), positions.data(), counts.data());
  } else {
    for_each_run(a.num_queries, kQueriesPerTile, [&](int64_t first, int64_t last) {
      if (index_select_queries(a, first, last)) is_nan = true;
    });
  }
  return is_nan;
}

}  // namespace
