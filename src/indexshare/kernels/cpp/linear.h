// Products with packed weights: the inputs are broadcast against sixteen outputs, one source for a single token (bound by
// memory) and for many (bound by arithmetic).
//
// Every output is summed over its inputs in one order, whatever the number of tokens or threads: the result of a token does
// not depend on its neighbours.
#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"

namespace {

// ------------------------------------------------------------------------------------------------------------ products

template <int kFormat>
ALWAYS_INLINE Word16 weights_at(const uint8_t* data) {
  return *reinterpret_cast<const Word16*>(data);
}

// e4m3 -> bfloat16, exactly: all but the eight subnormals by moving the exponent.
#if defined(__AVX512VBMI__)
// The low or the high bytes of the 128 that are not negative.
struct Fp8Bytes {
  alignas(64) uint8_t bytes[128];
  constexpr explicit Fp8Bytes(int shift) : bytes() {
    for (int x = 0; x < 128; x++) {
      int bits = x == 127 ? 0x7fc0 : (x << 4) + (120 << 7);  // the last one is NaN
      if (x < 8) {  // x * 2^-9: its leading bit's place gives the exponent
        const int place = x >= 4 ? 2 : x >= 2 ? 1 : 0;
        bits = x == 0 ? 0 : ((118 + place) << 7) + ((x - (1 << place)) << (7 - place));
      }
      bytes[x] = uint8_t(bits >> shift);
    }
  }
  __m512i half(int which) const { return _mm512_load_si512(bytes + 64 * which); }
};
constexpr Fp8Bytes kFp8Low(0), kFp8High(8);

template <>
ALWAYS_INLINE Word16 weights_at<kFp8>(const uint8_t* data) {
  const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  // The other byte of each number looks up zero, whose bytes are zero.
  const __m512i low = _mm512_permutex2var_epi8(kFp8Low.half(0), x, kFp8Low.half(1));
  const __m512i high = _mm512_permutex2var_epi8(kFp8High.half(0), _mm512_slli_epi16(x, 8), kFp8High.half(1));
  const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(x, 7), 15);
  return (Word16)_mm512_or_si512(_mm512_or_si512(low, high), sign);
}
#else
template <>
ALWAYS_INLINE Word16 weights_at<kFp8>(const uint8_t* data) {
  typedef uint8_t Byte32 __attribute__((vector_size(32), aligned(1), may_alias));
  typedef uint16_t Half32 __attribute__((vector_size(64), aligned(2), may_alias));
  const Half32 x = __builtin_convertvector(*reinterpret_cast<const Byte32*>(data), Half32);
  const Half32 size = x & 0x7f, sign = (x & 0x80) << 8;
  const Half32 one_or_none = size == 1 ? Half32{} + 0x3b00 : Half32{};
  const Half32 small = size >= 4 ? 0x3c00 + ((size - 4) << 5) : size >= 2 ? 0x3b80 + ((size - 2) << 6) : one_or_none;
  const Half32 normal = size == 127 ? Half32{} + 0x7fc0 : (size << 4) + (120 << 7);
  Half32 bits = (size < 8 ? small : normal) | sign;
  return reinterpret_cast<Word16&>(bits);
}
#endif

// One step of sixteen sums of floats.
template <int kFormat>
ALWAYS_INLINE Float16 step(Float16 sum, Word16 weights, const uint8_t* x) {
  if constexpr (kFormat == kFp32) {
    float value;
    memcpy(&value, x, 4);
    return sum + reinterpret_cast<Float16&>(weights) * value;
  }
#if defined(__AVX512BF16__)
  return (Float16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(word_at(x)));
#else
  Word16 even = weights << 16, odd = weights & 0xffff0000u;
  const uint32_t pair = uint32_t(word_at(x)), first = pair << 16, second = pair & 0xffff0000u;
  float low, high;
  memcpy(&low, &first, 4);
  memcpy(&high, &second, 4);
  sum += reinterpret_cast<Float16&>(odd) * high;
  return sum + reinterpret_cast<Float16&>(even) * low;
#endif
}

// Four inputs of sixteen integer sums: unsigned weights, signed inputs.
ALWAYS_INLINE Int16 step_bytes(Int16 sum, Word16 weights, int32_t x) {
#if defined(__AVX512VNNI__)
  return (Int16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#else
  for (int byte = 0; byte < 4; byte++) {
    const Word16 unsigned_weights = (weights >> (8 * byte)) & 0xffu;
    sum += reinterpret_cast<const Int16&>(unsigned_weights) * int32_t(int8_t(x >> (8 * byte)));
  }
  return sum;
#endif
}

// Steps begin .. end - 1 of kRows rows times kBlocks neighbouring blocks: added to sums[row * kBlocks + block].
template <int kFormat, int kRows, int kBlocks>
ALWAYS_INLINE void multiply_floats(
    const uint8_t* const* x, const Matrix& m, int64_t block, int64_t begin, int64_t end, Float16* sums) {
  constexpr int kBytes = bytes_per_step(kFormat);
  const Place place = place_of(m, block);
  const int64_t stride = kBlocks == kStrip ? kStrip * kBytes : place.stride, group = kFormat == kFp8 ? kActivationGroup / 2 : end - begin;
  const uint8_t* data = m.data + place.first;
  for (; begin < end; begin += group) {
    const int64_t last = std::min(begin + group, end);
    Float16 acc[kRows * kBlocks];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kBlocks; i++) acc[i] = kFormat == kFp8 ? Float16{} : sums[i];
    for (int64_t d = begin; d < last; d++) {
      Word16 weights[kBlocks];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; b++) weights[b] = weights_at<kFormat>(data + d * stride + b * kBytes);
#pragma GCC unroll 16
      for (int t = 0; t < kRows; t++) {
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; b++) acc[t * kBlocks + b] = step<kFormat>(acc[t * kBlocks + b], weights[b], x[t] + d * 4);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kBlocks; i++) {
      if constexpr (kFormat == kFp8) {
        const int64_t groups = num_groups(m.width, kActivationGroup);
        sums[i] += acc[i] * static_cast<const float*>(m.scales)[(block + i % kBlocks) * groups + begin / group];
      } else {
        sums[i] = acc[i];
      }
    }
  }
}

template <int kFormat, int kRows, int kBlocks>
ALWAYS_INLINE void multiply_integers(
    const uint8_t* const* x, const Matrix& m, int64_t block, int64_t begin, int64_t end, Float16* sums) {
  constexpr int kInputs = kFormat == kInt4 ? 8 : 4, kOffset = kFormat == kInt4 ? 8 : 128, kBytes = bytes_per_step(kFormat);
  const Place place = place_of(m, block);
  const int64_t stride = kBlocks == kStrip ? kStrip * kBytes : place.stride, padded = (m.width + 7) / 8 * 8;
  const uint8_t* data = m.data + place.first;
  const int group = activation_group(m) / kInputs;
  const int64_t scale_stride = m.group == 0 ? 1 : num_groups(m.width, m.group);
  for (; begin < end; begin += group) {
    const int64_t last = std::min(begin + group, end), g = begin / group;
    Int16 acc[kRows * kBlocks];
#pragma GCC unroll 16
    for (int t = 0; t < kRows; t++) {
      const GroupScale& of_group = reinterpret_cast<const GroupScale*>(x[t] + padded)[g];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; b++) acc[t * kBlocks + b] = Int16{} - kOffset * of_group.sum;
    }
    for (int64_t d = begin; d < last; d++) {
      Word16 weights[kBlocks], high[kBlocks];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; b++) {
        weights[b] = weights_at<kFormat>(data + d * stride + b * kBytes);
        if constexpr (kFormat == kInt4) {
          high[b] = (weights[b] >> 4) & 0x0f0f0f0fu;
          weights[b] = weights[b] & 0x0f0f0f0fu;
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; t++) {
        const int32_t first = word_at(x[t] + d * kInputs);
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; b++) acc[t * kBlocks + b] = step_bytes(acc[t * kBlocks + b], weights[b], first);
        if constexpr (kFormat == kInt4) {
          const int32_t second = word_at(x[t] + d * kInputs + 4);
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; b++) acc[t * kBlocks + b] = step_bytes(acc[t * kBlocks + b], high[b], second);
        }
      }
    }
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; b++) {
      const uint16_t* scales = static_cast<const uint16_t*>(m.scales);
      const Float16 of_weights = load(scales + ((block + b) * scale_stride + (m.group == 0 ? 0 : g)) * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kRows; t++) {
        const float of_input = reinterpret_cast<const GroupScale*>(x[t] + padded)[g].scale;
        sums[t * kBlocks + b] += __builtin_convertvector(acc[t * kBlocks + b], Float16) * (of_weights * of_input);
      }
    }
  }
}

template <int kFormat, int kRows, int kBlocks>
ALWAYS_INLINE void multiply(const uint8_t* const* x, const Matrix& m, int64_t block, int64_t begin, int64_t end, Float16* sums) {
  if constexpr (is_integer(kFormat)) multiply_integers<kFormat, kRows, kBlocks>(x, m, block, begin, end, sums);
  else multiply_floats<kFormat, kRows, kBlocks>(x, m, block, begin, end, sums);
}

// What fits into the registers: rows and blocks of a tile for many rows, blocks for one.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileBlocks = kStrip;
#else
constexpr int kTileRows = 2, kTileBlocks = 2;
#endif
constexpr int kRowsPerTask = 48;
constexpr int kInputsAtOnce = 256;  // the weights of a tile's blocks stay in the first cache while the rows pass

// kBlocks blocks for one row, streaming.
template <int kFormat, int kBlocks, typename Give>
ALWAYS_INLINE void multiply_row(const uint8_t* const* x, const Matrix& m, int64_t row, int64_t block, const Give& give) {
  Float16 sums[kBlocks] = {};
  multiply<kFormat, 1, kBlocks>(x, m, block, 0, num_steps(m), sums);
  give(row, block, kBlocks, sums);
}

// kBlocks blocks for up to kRowsPerTask rows, a part of the inputs at a time.
template <int kFormat, int kBlocks, typename Give>
void multiply_rows(const uint8_t* const* x, const Matrix& m, int64_t first, int64_t last, int64_t block, const Give& give) {
  alignas(64) Float16 sums[kRowsPerTask * kBlocks] = {};
  const int64_t steps = num_steps(m), part = kInputsAtOnce / inputs_per_step(kFormat);
  for (int64_t begin = 0; begin < steps; begin += part) {
    const int64_t end = std::min(begin + part, steps);
    int64_t t = first;
    for (; t + kTileRows <= last; t += kTileRows) {
      multiply<kFormat, kTileRows, kBlocks>(x + t, m, block, begin, end, sums + (t - first) * kBlocks);
    }
    for (; t + 2 <= last; t += 2) multiply<kFormat, 2, kBlocks>(x + t, m, block, begin, end, sums + (t - first) * kBlocks);
    for (; t < last; t++) multiply<kFormat, 1, kBlocks>(x + t, m, block, begin, end, sums + (t - first) * kBlocks);
  }
  for (int64_t t = first; t < last; t++) give(t, block, kBlocks, sums + (t - first) * kBlocks);
}

// Rows first .. last - 1 (at most kRowsPerTask) times blocks begin .. end - 1.
// give(row, block, count, sums): sixteen results of each of `count` blocks.
template <int kFormat, typename Give>
void multiply_tile(
    const uint8_t* const* x, const Matrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, const Give& give) {
  int64_t block = begin;
  if (last - first == 1) {
    for (; block + kStrip <= end; block += kStrip) multiply_row<kFormat, kStrip>(x + first, m, first, block, give);
    for (; block < end; block++) multiply_row<kFormat, 1>(x + first, m, first, block, give);
  } else {
    for (; block + kTileBlocks <= end; block += kTileBlocks) multiply_rows<kFormat, kTileBlocks>(x, m, first, last, block, give);
    for (; block < end; block++) multiply_rows<kFormat, 1>(x, m, first, last, block, give);
  }
}

template <typename Give>
void multiply_tile(
    const uint8_t* const* x, const Matrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, const Give& give) {
  switch (m.format) {
    case kFp32: return multiply_tile<kFp32>(x, m, first, last, begin, end, give);
    case kBf16: return multiply_tile<kBf16>(x, m, first, last, begin, end, give);
    case kInt8: return multiply_tile<kInt8>(x, m, first, last, begin, end, give);
    case kInt4: return multiply_tile<kInt4>(x, m, first, last, begin, end, give);
    default: return multiply_tile<kFp8>(x, m, first, last, begin, end, give);
  }
}

// ----------------------------------------------------------------------------------------------------------------- jobs

// What becomes of the sums of a job.
enum Target { kStore, kAdd, kSwiglu };

// A product of some rows with one matrix; jobs that do not depend on each other run together.
struct Job {
  const Matrix* matrix;
  const uint8_t* const* rows;
  int64_t num_rows;
  float* output;   // row r begins at output + r * stride
  int64_t stride;
  Target target;
  const Matrix* up = nullptr;  // kSwiglu: `matrix` is the gate, output = silu(gate) * up
};

ALWAYS_INLINE void give_block(const Job& job, Target target, int64_t row, int64_t block, int count, const Float16* sums) {
  float* out = job.output + row * job.stride;
  for (int i = 0; i < count; i++) {
    float* to = out + (block + i) * kLanes;
    const int left = int(std::min<int64_t>(kLanes, job.matrix->num_outputs - (block + i) * kLanes));
    Float16 result = sums[i];
    if (target == kAdd) result += load_at(to, left);
    if (target == kSwiglu) result *= silu(load_at(to, left));
    store_at(to, result, left);
  }
}

constexpr int64_t kBytesPerTask = 256 * 1024;  // of weights: they stay in the second cache while the rows pass

void run_jobs(const std::vector<Job>& jobs) {
  struct Part {
    int64_t first_task, blocks_per_task, tiles;
  };
  std::vector<Part> parts;
  int64_t num_tasks = 0;
  for (const Job& job : jobs) {
    const int64_t blocks = job.matrix->num_blocks();
    // One row waits for memory: small tasks, so that the threads end together.
    const int64_t bytes = job.num_rows == 1 ? kBytesPerTask / 2 : kBytesPerTask;
    const int64_t size = std::clamp<int64_t>(bytes / block_bytes(*job.matrix) / kStrip * kStrip, kStrip, 16);
    const int64_t tiles = (job.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    parts.push_back({num_tasks, size, tiles});
    num_tasks += (blocks + size - 1) / size * tiles;
  }
  for_each_task(num_tasks, [&](int64_t task) {
    size_t j = parts.size() - 1;
    while (parts[j].first_task > task) j--;
    const Job& job = jobs[j];
    const int64_t inside = task - parts[j].first_task, size = parts[j].blocks_per_task;
    const int64_t begin = inside / parts[j].tiles * size, end = std::min(begin + size, job.matrix->num_blocks());
    const int64_t first = inside % parts[j].tiles * kRowsPerTask, last = std::min<int64_t>(first + kRowsPerTask, job.num_rows);
    auto run = [&](const Matrix& m, Target target) {
      multiply_tile(job.rows, m, first, last, begin, end, [&](int64_t row, int64_t block, int count, const Float16* sums) {
        give_block(job, target, row, block, count, sums);
      });
    };
    run(*job.matrix, job.target == kSwiglu ? kStore : job.target);
    if (job.target == kSwiglu) run(*job.up, kSwiglu);
  });
}

}  // namespace
