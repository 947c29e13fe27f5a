// Absorbed MLA over selected rows, read where they lie in the cache; nothing is gathered into a copy.
//
// The rows of a token go in chunks: scores, a softmax within the chunk, the weighted sum of the same rows while they are in
// the second cache. At the end the chunks are joined in order. A token's arithmetic is the same alone and among others.
//
// BF16 with many heads: lanes are heads, a pair of numbers of a row is broadcast against sixteen queries. Otherwise lanes
// are numbers of a row, and four heads share it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "pool.h"

namespace {

constexpr int kRowsPerChunk = 256;
constexpr int kHeads = 4;  // heads and rows in registers at once, where lanes are numbers
constexpr int kRows = 4;
constexpr int kRowsAtOnce = 12;  // where lanes are heads
constexpr int kPrefetch = 8;    // rows ahead

struct MlaSparse {
  const void* query;  // [num_tokens, num_heads, width]
  bool query_is_bf16;
  const void* latents;  // pool of rows [width]
  bool latents_are_bf16;
  const Pool* rounded;  // int8 rows instead of `latents`: each chunk is widened first; null otherwise
  const int32_t* selection;  // [num_tokens, num_selected], -1 at the end
  int64_t num_tokens, num_selected;
  int num_heads, width, latent_dim;
  float scale;
  void* output;  // [num_tokens, num_heads, latent_dim] in the query's type

  int padded_heads() const {
    const int multiple = num_heads > 2 * kHeads ? kLanes : kHeads;
    return (num_heads + multiple - 1) / multiple * multiple;
  }
  bool lanes_are_heads() const {
#if defined(__AVX512BF16__)
    return query_is_bf16 && latents_are_bf16 && padded_heads() >= kLanes && width % 2 == 0;
#else
    return false;
#endif
  }
  int count(int64_t token) const {
    const int32_t* rows = selection + token * num_selected;
    return int(std::partition_point(rows, rows + num_selected, [](int32_t row) { return row >= 0; }) - rows);
  }
  // A chunk's result: peak and total of each head, then the sums [num_heads][latent_dim].
  int64_t part_size() const { return 2 * padded_heads() + int64_t(num_heads) * latent_dim; }
};

// What one thread needs while it works on a token.
struct MlaScratch {
  std::vector<float> scores, parts;
  std::vector<uint32_t> weights;  // [rows/2][padded heads], two BF16 weights each
  std::vector<float> rows;        // widened rows of a chunk, and their numbers
  std::vector<int32_t> order;

  explicit MlaScratch(const MlaSparse& a)
      : scores(size_t(kRowsPerChunk) * a.padded_heads() + kLanes),
        weights(size_t(kRowsPerChunk / 2) * a.padded_heads()),
        rows(a.rounded ? size_t(kRowsPerChunk) * a.width : 0),
        order(a.rounded ? kRowsPerChunk : 0) {
    std::iota(order.begin(), order.end(), 0);
  }
};

template <typename Number>
const Number* row_at(const MlaSparse& a, const int32_t* rows, int k) {
  return static_cast<const Number*>(a.latents) + int64_t(rows[k]) * a.width;
}

template <typename Number>
ALWAYS_INLINE void prefetch_row(const MlaSparse& a, const int32_t* rows, int k) {
  const Number* row = row_at<Number>(a, rows, k);
  for (int d = 0; d < a.width; d += 64 / int(sizeof(Number))) __builtin_prefetch(row + d);
}

// ------------------------------------------------------------------------------------------------------------ scores

// sums[row][head] over the width, for four rows and four heads.
template <typename Query, typename Latent>
ALWAYS_INLINE void dot_block(const Query* const query[kHeads], const Latent* const rows[kRows], int width, Float16 sums[16]) {
  for (int i = 0; i < 16; i++) sums[i] = Float16{};
  auto step = [&](int d, auto read_query, auto read_row) __attribute__((always_inline)) {
    Float16 q[kHeads];
    for (int h = 0; h < kHeads; h++) q[h] = read_query(query[h] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Float16 row = read_row(rows[r] + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) sums[r * kHeads + h] += row * q[h];
    }
  };
  int d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    step(d, [](const Query* p) { return load(p); }, [](const Latent* p) { return load(p); });
  }
  if (d < width) {
    const int left = width - d;
    step(d, [left](const Query* p) { return load_part(p, left); }, [left](const Latent* p) { return load_part(p, left); });
  }
}

#if defined(__AVX512BF16__)
ALWAYS_INLINE void dot_block(
    const uint16_t* const query[kHeads], const uint16_t* const rows[kRows], int width, Float16 out[16]) {
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
  for (int d = 0; d < width; d += 2 * kLanes) {
    const __mmask32 inside = d + 2 * kLanes <= width ? 0xffffffffu : (1u << (width - d)) - 1;
    __m512bh q[kHeads];
    for (int h = 0; h < kHeads; h++) q[h] = (__m512bh)_mm512_maskz_loadu_epi16(inside, query[h] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(inside, rows[r] + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) sums[r * kHeads + h] = _mm512_dpbf16_ps(sums[r * kHeads + h], row, q[h]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) out[i] = (Float16)sums[i];
}
#endif

// Scaled scores [row][padded heads] of `count` rows.
template <typename Query, typename Latent>
void score_rows(const MlaSparse& a, int64_t token, const int32_t* selected, int count, float* scores) {
  const Query* query = static_cast<const Query*>(a.query) + token * a.num_heads * a.width;
  const int padded = a.padded_heads();
  for (int k = 0; k < count; k += kRows) {
    const Latent* rows[kRows];
    for (int r = 0; r < kRows; r++) {
      rows[r] = row_at<Latent>(a, selected, std::min(k + r, count - 1));
      prefetch_row<Latent>(a, selected, std::min(k + r + kPrefetch, count - 1));
    }
    for (int h = 0; h < padded; h += kHeads) {
      const Query* heads[kHeads];
      for (int i = 0; i < kHeads; i++) heads[i] = query + std::min(h + i, a.num_heads - 1) * a.width;
      Float16 sums[16];
      dot_block(heads, rows, a.width, sums);
      const Float16 block = add_lanes(sums) * a.scale;
      for (int r = 0; r < std::min(kRows, count - k); r++) {
        for (int i = 0; i < kHeads; i++) scores[(k + r) * padded + h + i] = block[r * kHeads + i];
      }
    }
  }
}

#if defined(__AVX512BF16__)
// A token's query as [head groups][width/2][16][2].
void pack_query(const MlaSparse& a, int64_t token, uint16_t* packed) {
  const uint32_t* query = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.query) + token * a.num_heads * a.width);
  uint32_t* to = reinterpret_cast<uint32_t*>(packed);
  const int pairs = a.width / 2;
  for (int h = 0; h < a.padded_heads(); h++) {
    uint32_t* lane = to + h / kLanes * kLanes * pairs + h % kLanes;
    for (int d = 0; d < pairs; d++) lane[d * kLanes] = h < a.num_heads ? query[h * pairs + d] : 0;
  }
}

// The same with lanes that are heads.
void score_rows_of_heads(const MlaSparse& a, const uint16_t* packed, const int32_t* selected, int count, float* scores) {
  constexpr int kNumbersPerLine = 32;
  const int padded = a.padded_heads();
  for (int r = 0; r < std::min(kRowsAtOnce, count); r++) prefetch_row<uint16_t>(a, selected, r);
  for (int k = 0; k < count; k += kRowsAtOnce) {
    const uint16_t *rows[kRowsAtOnce], *later[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; r++) {
      rows[r] = row_at<uint16_t>(a, selected, std::min(k + r, count - 1));
      later[r] = row_at<uint16_t>(a, selected, std::min(k + r + kRowsAtOnce, count - 1));
    }
    for (int h = 0; h < padded; h += kLanes) {
      const uint16_t* query = packed + size_t(h) * a.width;
      __m512 sums[kRowsAtOnce];
#pragma GCC unroll 16
      for (int r = 0; r < kRowsAtOnce; r++) sums[r] = _mm512_setzero_ps();
      int row = 0, line = h == 0 ? 0 : a.width;
      for (int d = 0; d < a.width; d += 2) {
        // The next rows, one line at a time: asked for all at once, they would hold these up.
        if (line < a.width) __builtin_prefetch(later[row] + line);
        if (++row == kRowsAtOnce) row = 0, line += kNumbersPerLine;
        const __m512bh q = (__m512bh)_mm512_loadu_si512(query + d * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRowsAtOnce; r++) {
          int32_t pair;
          memcpy(&pair, rows[r] + d, 4);
          sums[r] = _mm512_dpbf16_ps(sums[r], q, (__m512bh)_mm512_set1_epi32(pair));
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRowsAtOnce; r++) {
        if (r >= count - k) break;
        store(scores + (k + r) * padded + h, (Float16)sums[r] * a.scale);
      }
    }
  }
}
#endif

// ----------------------------------------------------------------------------------------------------------- softmax

// scores [count][padded] -> weights e^(score - peak) in place, with the peak and the total of each head.
// round: the weights will be BF16, and the total is that of the rounded ones.
void soften(float* scores, int count, int padded, bool round, float* peaks, float* totals) {
  const int size = (count * padded + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count * padded, scores + size, -std::numeric_limits<float>::infinity());
  const int period = std::max(padded, kLanes);  // with few heads a vector holds several rows
  for (int h = 0; h < padded; h += kLanes) {
    Float16 peak = load(scores + h);
    for (int i = h + period; i < size; i += period) peak = larger(peak, load(scores + i));
    for (int width = padded; width < kLanes; width *= 2) peak = larger(peak, turn_lanes(peak, width));
    Float16 total{};
    for (int i = h; i < size; i += period) {
      Float16 weights = exponential(load(scores + i) - peak);
      if (round) weights = round_to_bf16(weights);
      store(scores + i, weights);
      total += weights;
    }
    for (int width = padded; width < kLanes; width *= 2) total += turn_lanes(total, width);
    for (int lane = 0; lane < std::min(kLanes, padded); lane++) {
      peaks[h + lane] = peak[lane];
      totals[h + lane] = total[lane];
    }
  }
}

// ------------------------------------------------------------------------------------------------------ weighted sums

// Numbers begin .. begin + 16 * kVectors - 1 of the sums of four heads.
template <int kVectors, typename Latent>
ALWAYS_INLINE void weigh(const MlaSparse& a, const int32_t* selected, int head, int begin, int count, const float* weights, float* out) {
  const int padded = a.padded_heads();
  Float16 sums[kHeads][kVectors] = {};
  for (int k = 0; k < count; k++) {
    const Latent* row = row_at<Latent>(a, selected, k) + begin;
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
#pragma GCC unroll 4
  for (int i = 0; i < kHeads; i++) {
    if (i >= a.num_heads - head) break;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(out + (head + i) * a.latent_dim + begin + v * kLanes, sums[i][v]);
  }
}

template <typename Latent>
void weigh_all(const MlaSparse& a, const int32_t* selected, int count, const float* weights, float* out) {
  for (int head = 0; head < a.num_heads; head += kHeads) {
    int begin = 0;
    for (; begin + 4 * kLanes <= a.latent_dim; begin += 4 * kLanes) weigh<4, Latent>(a, selected, head, begin, count, weights, out);
    for (; begin < a.latent_dim; begin += kLanes) weigh<1, Latent>(a, selected, head, begin, count, weights, out);
  }
}

#if defined(__AVX512BF16__)
// In BF16, two rows in each step: thirty-two numbers of kCount heads from `head` on. weights: [rows/2][padded] pairs.
template <int kCount>
ALWAYS_INLINE void weigh_pairs(
    const MlaSparse& a, const int32_t* selected, int head, int begin, int count, const uint32_t* weights, float* out) {
  const int padded = a.padded_heads();
  const bool is_whole = begin + 2 * kLanes <= a.latent_dim;
  const __mmask32 inside = is_whole ? 0xffffffffu : 0xffffu;
  __m512 low[kCount], high[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i++) low[i] = high[i] = _mm512_setzero_ps();
  for (int k = 0; k < count; k += 2) {
    const uint16_t* first = row_at<uint16_t>(a, selected, k) + begin;
    const uint16_t* second = row_at<uint16_t>(a, selected, std::min(k + 1, count - 1)) + begin;
    const __m512i x = _mm512_maskz_loadu_epi16(inside, first), y = _mm512_maskz_loadu_epi16(inside, second);
    const __m512bh u = (__m512bh)_mm512_unpacklo_epi16(x, y), v = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(int32_t(weights[k / 2 * padded + head + i]));
      low[i] = _mm512_dpbf16_ps(low[i], u, pair);
      high[i] = _mm512_dpbf16_ps(high[i], v, pair);
    }
  }
  // Constant indices keep the sums in registers: all loops over them are unrolled.
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i++) {
    if (i >= a.num_heads - head) break;
    // Unpacking has left numbers 0-3, 8-11, ... in one register and 4-7, 12-15, ... in the other.
    const Float16 u = (Float16)low[i], v = (Float16)high[i];
    float* to = out + (head + i) * a.latent_dim + begin;
    store(to, SHUFFLE(u, v, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    if (is_whole) store(to + kLanes, SHUFFLE(u, v, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}

void weigh_all_pairs(const MlaSparse& a, const int32_t* selected, int count, float* scores, uint32_t* weights, float* out) {
  const int padded = a.padded_heads(), pairs = (count + 1) / 2;
  // The scores are BF16 already: their upper halves are the numbers.
  if (count % 2) std::fill(scores + count * padded, scores + (count + 1) * padded, 0.0f);
  for (int k = 0; k < pairs; k++) {
    for (int h = 0; h < padded; h += kLanes) {
      const int left = std::min(kLanes, padded - h);
      const Float16 even = load_at(scores + 2 * k * padded + h, left), odd = load_at(scores + (2 * k + 1) * padded + h, left);
      const Word16 both = (reinterpret_cast<const Word16&>(even) >> 16) | (reinterpret_cast<const Word16&>(odd) & 0xffff0000u);
      store_at(reinterpret_cast<float*>(weights + k * padded + h), reinterpret_cast<const Float16&>(both), left);
    }
  }
  for (int begin = 0; begin < a.latent_dim; begin += 2 * kLanes) {
    int head = 0;
    for (; head + 8 <= padded; head += 8) weigh_pairs<8>(a, selected, head, begin, count, weights, out);
    for (; head < padded; head += 4) weigh_pairs<4>(a, selected, head, begin, count, weights, out);
  }
}
#endif

// ------------------------------------------------------------------------------------------------------------- chunks

// query: packed, where lanes are heads.
template <typename Query, typename Latent>
void attend_chunk(
    const MlaSparse& a, int64_t token, [[maybe_unused]] const uint16_t* query, const int32_t* rows, int count, MlaScratch& s, float* part) {
  const int padded = a.padded_heads();
  float* sums = part + 2 * padded;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(Query) == 2 && sizeof(Latent) == 2) {
    if (a.lanes_are_heads()) score_rows_of_heads(a, query, rows, count, s.scores.data());
    else score_rows<Query, Latent>(a, token, rows, count, s.scores.data());
    soften(s.scores.data(), count, padded, true, part, part + padded);
    return weigh_all_pairs(a, rows, count, s.scores.data(), s.weights.data(), sums);
  }
#endif
  score_rows<Query, Latent>(a, token, rows, count, s.scores.data());
  soften(s.scores.data(), count, padded, false, part, part + padded);
  weigh_all<Latent>(a, rows, count, s.scores.data(), sums);
}

template <typename Number>
void widen_rows(const MlaSparse& a, const int32_t* rows, int count, Number* to) {
  const int64_t size = a.rounded->row_bytes();
  for (int k = 0; k < count; k++) {
    const uint8_t* ahead = a.rounded->data + rows[std::min(k + kPrefetch, count - 1)] * size;
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(ahead + i);
    a.rounded->read(rows[k], to + int64_t(k) * a.width);
  }
}

// `size` rows of a token.
void attend_rows(
    const MlaSparse& a, int64_t token, const uint16_t* query, const int32_t* rows, int size, MlaScratch& s, float* part) {
  if (a.query_is_bf16) {
    if (a.latents_are_bf16) attend_chunk<uint16_t, uint16_t>(a, token, query, rows, size, s, part);
    else attend_chunk<uint16_t, float>(a, token, query, rows, size, s, part);
  } else {
    if (a.latents_are_bf16) attend_chunk<float, uint16_t>(a, token, query, rows, size, s, part);
    else attend_chunk<float, float>(a, token, query, rows, size, s, part);
  }
}

// Chunk `chunk` of a token.
void attend_chunk(const MlaSparse& a, int64_t token, const uint16_t* query, int chunk, int count, MlaScratch& s, float* part) {
  const int32_t* rows = a.selection + token * a.num_selected + chunk * kRowsPerChunk;
  const int size = std::min(kRowsPerChunk, count - chunk * kRowsPerChunk);
  if (a.rounded == nullptr) return attend_rows(a, token, query, rows, size, s, part);
  if (a.latents_are_bf16) widen_rows(a, rows, size, reinterpret_cast<uint16_t*>(s.rows.data()));
  else widen_rows(a, rows, size, s.rows.data());
  MlaSparse widened = a;
  widened.latents = s.rows.data();
  attend_rows(widened, token, query, s.order.data(), size, s, part);
}

// Packed queries of one token after the other.
class PackedQuery {
 public:
  explicit PackedQuery(const MlaSparse& a) : a_(a), packed_(a.lanes_are_heads() ? size_t(a.padded_heads()) * a.width : 0) {}
  const uint16_t* of([[maybe_unused]] int64_t token) {
#if defined(__AVX512BF16__)
    if (a_.lanes_are_heads()) pack_query(a_, token, packed_.data());
#endif
    return packed_.data();
  }

 private:
  const MlaSparse& a_;
  std::vector<uint16_t> packed_;
};

// The chunks of a token, in order -> its output; zeros where no row was selected.
void join_chunks(const MlaSparse& a, int64_t token, int num_chunks, const float* parts) {
  const int padded = a.padded_heads();
  const int64_t size = a.part_size();
  std::vector<float> shares(num_chunks);
  for (int h = 0; h < a.num_heads; h++) {
    float peak = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int c = 0; c < num_chunks; c++) peak = std::max(peak, parts[c * size + h]);
    for (int c = 0; c < num_chunks; c++) {
      shares[c] = std::exp(parts[c * size + h] - peak);
      total += shares[c] * parts[c * size + padded + h];
    }
    const int64_t place = (token * a.num_heads + h) * a.latent_dim;
    for (int d = 0; d < a.latent_dim; d += kLanes) {
      Float16 sum{};
      for (int c = 0; c < num_chunks; c++) sum += load(parts + c * size + 2 * padded + h * a.latent_dim + d) * shares[c];
      if (num_chunks > 0) sum = sum / total;
      if (a.query_is_bf16) store(static_cast<uint16_t*>(a.output) + place + d, sum);
      else store(static_cast<float*>(a.output) + place + d, sum);
    }
  }
}

void mla_sparse_all(const MlaSparse& a) {
  const int max_chunks = int((a.num_selected + kRowsPerChunk - 1) / kRowsPerChunk);
  if (a.num_tokens == 1) {  // one token: share its chunks
    const int count = a.count(0), num_chunks = (count + kRowsPerChunk - 1) / kRowsPerChunk;
    std::vector<float> parts(size_t(num_chunks) * a.part_size());
    PackedQuery packed(a);
    const uint16_t* query = packed.of(0);
    for_each_task(num_chunks, [&](int64_t chunk) {
      MlaScratch scratch(a);
      attend_chunk(a, 0, query, int(chunk), count, scratch, &parts[chunk * a.part_size()]);
    });
    return join_chunks(a, 0, num_chunks, parts.data());
  }
  for_each_run(a.num_tokens, 4, [&](int64_t first, int64_t last) {
    MlaScratch scratch(a);
    PackedQuery packed(a);
    scratch.parts.resize(size_t(max_chunks) * a.part_size());
    for (int64_t token = first; token < last; token++) {
      const int count = a.count(token), num_chunks = (count + kRowsPerChunk - 1) / kRowsPerChunk;
      const uint16_t* query = packed.of(token);
      for (int c = 0; c < num_chunks; c++) attend_chunk(a, token, query, c, count, scratch, &scratch.parts[c * a.part_size()]);
      join_chunks(a, token, num_chunks, scratch.parts.data());
    }
  });
}

}  // namespace
