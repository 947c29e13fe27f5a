// Index scores and the exact top-k of each query in one pass over the keys: no row of scores is ever stored.
//
// Lanes hold (query, head) pairs: four queries of up to four heads, or one query of up to sixteen, or a part of one with
// more. Keys stay as they lie in the cache; a pair of dims of one key is broadcast against all lanes. Scores above the
// query's threshold are appended to its candidates; when those are full, they are cut back to the best k, whose last score
// is the new threshold. Keys come in ascending order, so equal scores that come later lose, as the specification wants.
//
// Keys that are rounded to int8 meet queries that are rounded in the same way: products and their sums are whole numbers,
// exact in int32 where there are byte products and in fp32 elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "candidates.h"
#include "linear.h"
#include "pool.h"

namespace {

constexpr int kKeysAtOnce = 16;     // accumulators in registers
constexpr int kKeysPerBlock = 64;   // reused by every query of a tile while they are in the first cache
constexpr int kQueriesPerTile = 16;
constexpr int kAhead = 2 * kKeysAtOnce;

struct IndexSelect {
  const void* query;     // [num_queries, num_heads, dim]
  bool query_is_bf16;
  const float* weights;  // [num_queries, num_heads]
  const void* keys;      // pool of rows [dim]
  bool keys_are_bf16;
  bool keys_are_rounded;  // int8 with one scale
  const int64_t* page_table;  // of this sequence; null: row = position + first_row
  int64_t page_size, first_row;
  int64_t num_queries, num_past;
  int num_heads, dim, topk;
  int32_t* selection;  // [num_queries, topk] with this stride, filled with -1
  int64_t selection_stride;

  int lanes_per_query() const { return num_heads <= 4 ? 4 : (num_heads + kLanes - 1) / kLanes * kLanes; }
  int64_t key_bytes() const { return keys_are_rounded ? rounded_bytes(dim, dim) : dim * (keys_are_bf16 ? 2 : 4); }
  int64_t row(int64_t position) const {
    if (page_table == nullptr) return first_row + position;
    return page_table[position / page_size] * page_size + position % page_size;
  }
};

// Everything one thread needs, allocated once per call.
struct IndexScratch {
  std::vector<float> packed, weights, keys, key_scales, scores;
  std::vector<int32_t> positions;
  Candidates candidates[kQueriesPerTile];

  IndexScratch(int topk, int num_lanes, int dim, int num_queries) {
    const int capacity = (std::max(2 * topk, topk + 512) + kLanes - 1) / kLanes * kLanes + kLanes;
    packed.resize(size_t(num_lanes) * (dim + 1));  // bytes are padded to four
    weights.resize(num_lanes);
    keys.resize(size_t(kKeysPerBlock) * (dim + 4));  // or rounded rows
    key_scales.resize(kKeysPerBlock);
    scores.resize(size_t(num_queries) * capacity);
    positions.resize(scores.size());
    for (int i = 0; i < num_queries; i++) {
      candidates[i] = {&scores[size_t(i) * capacity], &positions[size_t(i) * capacity], 0, capacity, topk, 0.0f};
    }
  }
};

// From one key to the next, in numbers: behind a rounded key are its scale and its sum.
template <typename Number>
constexpr int key_stride(int dim) {
  return sizeof(Number) == 1 ? int(rounded_bytes(dim, dim)) : dim;
}

// Numbers of a lane of a packed query; bytes go in fours.
template <typename Number>
constexpr int lane_size(int dim) {
  return sizeof(Number) == 1 ? (dim + 3) / 4 * 4 : dim;
}

ALWAYS_INLINE GroupScale scale_of(const int8_t* key, int dim) {
  GroupScale scale;
  memcpy(&scale, key + (dim + 7) / 8 * 8, sizeof(scale));
  return scale;
}

// acc[group][key] = query lanes . key, for kKeys keys and one or two groups of sixteen lanes, which share what is broadcast.
// ahead: as many bytes as the keys have are prefetched from there.
// query: [group][dim][16 lanes]; keys: rows of `dim` numbers.
template <int kDim, int kGroups, int kKeys>
ALWAYS_INLINE void dots(
    const float* query, const float* keys, int dim_at_run_time, Float16 (*acc)[kKeysAtOnce], const char* ahead) {
  const int dim = kDim ? kDim : dim_at_run_time;
  Float16 sums[kGroups * kKeys] = {};
  for (int d = 0; d < dim; d++) {
    __builtin_prefetch(ahead + d * (kKeys * 4));
    Float16 q[kGroups];
    for (int g = 0; g < kGroups; g++) q[g] = load(query + (g * dim + d) * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; k++) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; g++) sums[g * kKeys + k] += q[g] * keys[k * dim + d];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kKeys; i++) acc[i / kKeys][i % kKeys] = sums[i];
}

#if defined(__AVX512BF16__)
// The same in BF16: query [group][dim/2][16 lanes][2], products and sums in fp32.
template <int kDim, int kGroups, int kKeys>
ALWAYS_INLINE void dots(
    const uint16_t* query, const uint16_t* keys, int dim_at_run_time, Float16 (*acc)[kKeysAtOnce], const char* ahead) {
  const int dim = kDim ? kDim : dim_at_run_time;
  __m512 sums[kGroups * kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kKeys; i++) sums[i] = _mm512_setzero_ps();
  for (int d = 0; d < dim; d += 2) {
    __builtin_prefetch(ahead + d * (kKeys * 2));
    __m512bh q[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; g++) q[g] = (__m512bh)_mm512_loadu_si512(query + (g * dim + d) * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; k++) {
      int32_t pair;
      memcpy(&pair, keys + k * dim + d, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; g++) sums[g * kKeys + k] = _mm512_dpbf16_ps(sums[g * kKeys + k], q[g], both);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kKeys; i++) acc[i / kKeys][i % kKeys] = (Float16)sums[i];
}
#endif

#if defined(__AVX512VNNI__)
// The same in int8: query [group][dim/4][16 lanes][4], unsigned, 128 more than the number.
template <int kDim, int kGroups, int kKeys>
ALWAYS_INLINE void dots(
    const int8_t* query, const int8_t* keys, int dim_at_run_time, Float16 (*acc)[kKeysAtOnce], const char* ahead) {
  const int dim = kDim ? kDim : dim_at_run_time, stride = key_stride<int8_t>(dim), lane = lane_size<int8_t>(dim);
  Int16 sums[kGroups * kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kKeys; i++) sums[i] = Int16{} - 128 * scale_of(keys + i % kKeys * stride, dim).sum;
  for (int i = dim * kKeys; i < stride * kKeys; i += 64) __builtin_prefetch(ahead + i);
  for (int d = 0; d < dim; d += 4) {
    __builtin_prefetch(ahead + d * kKeys);
    Word16 q[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; g++) q[g] = *reinterpret_cast<const Word16*>(query + (g * lane + d) * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; k++) {
      const int32_t four = word_at(reinterpret_cast<const uint8_t*>(keys + k * stride + d));
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; g++) sums[g * kKeys + k] = step_bytes(sums[g * kKeys + k], q[g], four);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kKeys; i++) acc[i / kKeys][i % kKeys] = __builtin_convertvector(sums[i], Float16);
}
#endif

// Sixteen keys for one group of lanes, or for two.
template <int kDim, typename Number>
ALWAYS_INLINE void dots_of_groups(
    int num_groups, const Number* query, const Number* keys, int dim, Float16 (*acc)[kKeysAtOnce], const char* ahead) {
  if (num_groups == 1) return dots<kDim, 1, kKeysAtOnce>(query, keys, dim, acc, ahead);
  constexpr int kHalf = kKeysAtOnce / 2;
  const int half = kHalf * key_stride<Number>(kDim ? kDim : dim);
  Float16 second[2][kKeysAtOnce];
  dots<kDim, 2, kHalf>(query, keys, dim, acc, ahead);
  dots<kDim, 2, kHalf>(query, keys + half, dim, second, ahead + half * sizeof(Number));
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; i++) acc[0][kHalf + i] = second[0][i], acc[1][kHalf + i] = second[1][i];
}

template <typename Query, typename Number>
void pack(const IndexSelect& a, int64_t first, int num_queries, Number* packed, float* weights) {
  constexpr int kPair = 4 / sizeof(Number);
  const int lanes_per_query = a.lanes_per_query(), size = lane_size<Number>(a.dim);
  const int num_lanes = (num_queries * lanes_per_query + kLanes - 1) / kLanes * kLanes;
  std::fill(packed, packed + size_t(num_lanes) * size, Number{});
  std::fill(weights, weights + num_lanes, 0.0f);
  std::vector<float> wide(a.dim);
  std::vector<int8_t> rounded(a.keys_are_rounded ? a.key_bytes() : 0);
  const float scale = 1.0f / std::sqrt(float(a.dim));
  for (int q = 0; q < num_queries; q++) {
    for (int h = 0; h < a.num_heads; h++) {
      const int lane = q * lanes_per_query + h;
      const Query* from = static_cast<const Query*>(a.query) + ((first + q) * a.num_heads + h) * a.dim;
      Number* to = packed + size_t(lane / kLanes) * kLanes * size;
      weights[lane] = a.weights[(first + q) * a.num_heads + h] * scale;
      widen_row(from, a.dim, wide.data());
      if (a.keys_are_rounded) {
        encode_integers(wide.data(), a.dim, a.dim, reinterpret_cast<uint8_t*>(rounded.data()));
        weights[lane] *= scale_of(rounded.data(), a.dim).scale;
        for (int d = 0; d < a.dim; d++) wide[d] = rounded[d];
      }
      for (int d = 0; d < a.dim; d++) {
        Number* place = to + (d / kPair) * kLanes * kPair + (lane % kLanes) * kPair + d % kPair;
        if constexpr (sizeof(Number) == 1) *place = Number(rounded[d] + 128);
        else narrow(wide[d], place);
      }
    }
  }
}

// The block of keys from `position` on, as Number: in place when it is a run of the cache, else copied.
// scales: of rounded keys.
template <typename Number>
const Number* block_of_keys(const IndexSelect& a, int64_t position, int count, Number* copy, float* scales) {
  const uint8_t* pool = static_cast<const uint8_t*>(a.keys);
  const int64_t first = a.row(position), size = a.key_bytes(), stride = key_stride<Number>(a.dim);
  const bool is_run = a.page_table == nullptr || position % a.page_size + count <= a.page_size;
  const bool is_same = sizeof(Number) == (a.keys_are_rounded ? 1 : a.keys_are_bf16 ? 2 : 4);
  const bool in_place = is_run && is_same && count == kKeysPerBlock;
  for (int k = 0; k < kKeysPerBlock; k++) {
    if (in_place && !a.keys_are_rounded) break;
    const uint8_t* from = pool + (k < count ? a.row(position + k) : first) * size;  // beyond the end: any key, masked later
    Number* to = copy + k * stride;
    if (a.keys_are_rounded) scales[k] = scale_of(reinterpret_cast<const int8_t*>(from), a.dim).scale;
    if (in_place) continue;
    if (is_same) {
      memcpy(to, from, size);
    } else if constexpr (sizeof(Number) == 4) {
      if (a.keys_are_rounded) widen_row(reinterpret_cast<const int8_t*>(from), a.dim, to);
      else widen_row(reinterpret_cast<const uint16_t*>(from), a.dim, to);
    }
  }
  return in_place ? reinterpret_cast<const Number*>(pool + first * size) : copy;
}

// Candidates of queries first .. first + num_queries - 1 among the keys begin .. end - 1. Returns whether a score was NaN.
template <typename Number, int kDim>
bool scan_keys(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
  const int lanes_per_query = a.lanes_per_query(), stride = key_stride<Number>(a.dim);
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
    if (a.keys_are_rounded) found *= load(&scratch.key_scales[position % kKeysPerBlock]);
    if (visible < kLanes) found = order < int32_t(visible) ? found : splat(-std::numeric_limits<float>::infinity());
    is_nan |= found != found;
    scratch.candidates[q].append(found + 0.0f, int32_t(position));  // no negative zero
  };
  // A group of lanes holds four queries, one, or a part of one; two groups go at once, or all parts of a query.
  const int queries_per_group = lanes_per_query < kLanes ? kLanes / lanes_per_query : 1;
  const int parts = std::max(1, lanes_per_query / kLanes), groups_at_once = std::max(2, parts);
  const int num_groups = (num_queries + queries_per_group - 1) / queries_per_group * parts;
  for (int64_t block = begin; block < end; block += kKeysPerBlock) {
    const int count = int(std::min<int64_t>(kKeysPerBlock, end - block));
    const Number* keys = block_of_keys(a, block, count, reinterpret_cast<Number*>(scratch.keys.data()), scratch.key_scales.data());
    for (int g = 0; g < num_groups; g += groups_at_once) {
      const int q = g / parts * queries_per_group, last = std::min((g + groups_at_once) / parts * queries_per_group, num_queries) - 1;
      if (block > a.num_past + first + last) continue;
      for (int k = 0; k < count; k += kKeysAtOnce) {
        // Sixteen rows at once are more streams than the hardware follows: keys two steps ahead are asked for.
        const int64_t later = std::min(block + k + kAhead, end - 1);
        const char* ahead = static_cast<const char*>(a.keys) + a.row(later) * a.key_bytes();
        Float16 sums[2][kKeysAtOnce] = {};
        for (int part = 0; part < groups_at_once && g + part < num_groups; part += 2) {
          const int now = std::min({2, groups_at_once - part, num_groups - g - part});
          const int lane = (g + part) * kLanes;
          Float16 acc[2][kKeysAtOnce];
          dots_of_groups<kDim>(now, packed + size_t(lane) * lane_size<Number>(a.dim), keys + k * stride, a.dim, acc, ahead);
          for (int j = 0; j < now; j++) {
            const Float16 weights = load(&scratch.weights[lane + j * kLanes]);
            Float16* to = sums[parts > 1 ? 0 : j];
#pragma GCC unroll 16
            for (int i = 0; i < kKeysAtOnce; i++) to[i] += relu(acc[j][i]) * weights;
          }
        }
        for (int j = 0; j < (parts > 1 ? 1 : 2) && q + j * queries_per_group < num_queries; j++) {
          if (queries_per_group == 1) {
            take(q + j, add_lanes(sums[j]), block + k);
            continue;
          }
          Float16 quarters[4], of_query[4];
          for (int i = 0; i < 4; i++) {
            const Float16* of_key = sums[j] + 4 * i;
            quarters[i] = add_quarters(of_key[0], of_key[1], of_key[2], of_key[3]);
          }
          turn_quarters(quarters, of_query);
          for (int i = 0; i < 4 && q + 4 * j + i < num_queries; i++) take(q + 4 * j + i, of_query[i], block + k);
        }
      }
    }
  }
  int found_nan = 0;
  for (int lane = 0; lane < kLanes; lane++) found_nan |= is_nan[lane];
  return found_nan != 0;
}

template <typename Number>
bool scan(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
  Number* packed = reinterpret_cast<Number*>(scratch.packed.data());
  if (a.query_is_bf16) pack<uint16_t>(a, first, num_queries, packed, scratch.weights.data());
  else pack<float>(a, first, num_queries, packed, scratch.weights.data());
  switch (a.dim) {
    case 32: return scan_keys<Number, 32>(a, first, num_queries, begin, end, scratch);
    case 64: return scan_keys<Number, 64>(a, first, num_queries, begin, end, scratch);
    case 128: return scan_keys<Number, 128>(a, first, num_queries, begin, end, scratch);
    default: return scan_keys<Number, 0>(a, first, num_queries, begin, end, scratch);
  }
}

// Numbers are as narrow as there are instructions for.
bool scan(const IndexSelect& a, int64_t first, int num_queries, int64_t begin, int64_t end, IndexScratch& scratch) {
#if defined(__AVX512VNNI__)
  if (a.keys_are_rounded) return scan<int8_t>(a, first, num_queries, begin, end, scratch);
#endif
#if defined(__AVX512BF16__)
  if (a.query_is_bf16 && a.keys_are_bf16 && a.dim % 2 == 0) return scan<uint16_t>(a, first, num_queries, begin, end, scratch);
#endif
  return scan<float>(a, first, num_queries, begin, end, scratch);
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
