// Products with packed weights. Sixteen outputs, a block, lie side by side and the inputs are broadcast against them: one
// source for a single token (bound by memory) and for many (bound by arithmetic). Four blocks, a strip, take turns step by
// step, so that a product reads one stream (the last strip has what is left).
//
//     fp32  [out/64][in  ][4][16]         int8  [out/64][in/4][4][16][4]  unsigned, 128 more than the value
//     bf16  [out/64][in/2][4][16][2]      int4  [out/64][in/8][4][16][4]  bytes: inputs 0-3 low, 4-7 high, 8 more than the value
//     fp8   [out/64][in/2][4][16][2]      scales [out/16][groups][16] in BF16; of fp8 [out/16][groups] in fp32
//
// Every output is summed over its inputs in one order, whatever the number of tokens or threads: the result of a token does
// not depend on its neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

enum Format : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kFp8 = 4 };

// A weight [num_outputs, width]; the fields are mirrored in native.py.
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

// ------------------------------------------------------------------------------------------------------------- inputs

struct GroupScale {
  float scale;
  int32_t sum;
};

int64_t num_groups(int64_t width, int group) { return (width + group - 1) / group; }

// Bytes of an encoded input row: numbers, then (integers) a scale and a sum for each group.
int64_t encoded_bytes(const Matrix& m) {
  if (m.format == kFp32) return m.width * 4;
  if (!is_integer(m.format)) return (m.width + 1) / 2 * 4;
  return (m.width + 7) / 8 * 8 + num_groups(m.width, activation_group(m)) * int64_t(sizeof(GroupScale));
}

void encode_integers(const float* x, int64_t width, int group, uint8_t* out) {
  int8_t* numbers = reinterpret_cast<int8_t*>(out);
  const int64_t padded = (width + 7) / 8 * 8;
  GroupScale* scales = reinterpret_cast<GroupScale*>(out + padded);
  for (int64_t begin = 0; begin < width; begin += group) {
    const int64_t end = std::min(begin + group, width);
    Float16 peaks{};
    Int16 is_nan{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Float16 v = load(x + i), size = v < 0.0f ? -v : v;
      peaks = larger(size, peaks);
      is_nan |= v != v;
    }
    float peak = 0.0f;
    int found_nan = 0;
    for (; i < end; i++) peak = std::max(peak, std::fabs(x[i])), found_nan |= x[i] != x[i];
    for (int lane = 0; lane < kLanes; lane++) peak = std::max(peak, peaks[lane]), found_nan |= is_nan[lane];
    const float scale = found_nan || std::isinf(peak) ? std::numeric_limits<float>::quiet_NaN() : peak / 127.0f;
    Int16 sums{};
    int32_t sum = 0;
    i = begin;
    // Division, not a product with the inverse: the specification divides. Adding 1.5 * 2^23 rounds to nearest, ties to even.
    for (; i + kLanes <= end; i += kLanes) {
      const Float16 rounded = (scale > 0.0f ? load(x + i) / scale : Float16{}) + 12582912.0f;
      const Int16 q = reinterpret_cast<const Int16&>(rounded) - 0x4b400000;
      sums += q;
      store(numbers + i, q);
    }
    for (; i < end; i++) {
      const int32_t q = scale > 0.0f ? int32_t(std::nearbyint(x[i] / scale)) : 0;
      numbers[i] = int8_t(q);
      sum += q;
    }
    for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
    *scales++ = {scale, sum};
  }
  for (int64_t i = width; i < padded; i++) numbers[i] = 0;
}

void encode(const Matrix& m, const float* x, uint8_t* out) {
  if (m.format == kFp32) {
    memcpy(out, x, m.width * 4);
  } else if (is_integer(m.format)) {
    encode_integers(x, m.width, activation_group(m), out);
  } else {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(out);
    narrow_row(x, m.width, numbers);
    if (m.width % 2) numbers[m.width] = 0;
  }
}

// Memory that one call after the other uses again: fresh pages from the system cost more than small products.
class Arena {
 public:
  void reset() { used_ = 0, place_ = 0; }
  uint8_t* bytes(int64_t count) {
    count = (count + 63) / 64 * 64;
    while (place_ < blocks_.size() && used_ + count > int64_t(blocks_[place_].size()) - 64) place_++, used_ = 0;
    if (place_ == blocks_.size()) blocks_.emplace_back(size_t(std::max<int64_t>(count, 1 << 22)) + 64), used_ = 0;
    uint8_t* first = blocks_[place_].data();
    first += (64 - reinterpret_cast<uintptr_t>(first) % 64) % 64 + used_;
    used_ += count;
    return first;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * sizeof(float))); }

 private:
  std::vector<std::vector<uint8_t>> blocks_;
  size_t place_ = 0;
  int64_t used_ = 0;
};

// Rows of activations in fp32, and encoded as a matrix wants them; encoded once for all matrices with the same wish.
class Input {
 public:
  Input(const float* x, int64_t num_rows, int64_t stride, Arena& arena) : x_(x), num_rows_(num_rows), stride_(stride), arena_(arena) {}

  int64_t num_rows() const { return num_rows_; }

  const uint8_t* const* rows(const Matrix& m) {
    const int kind = is_integer(m.format) ? 16 + activation_group(m) : m.format == kFp32 ? 1 : 0;
    for (const auto& known : encodings_) {
      if (known.kind == kind) return known.rows.data();
    }
    encodings_.emplace_back();
    Encoding& made = encodings_.back();
    made.kind = kind;
    const int64_t size = (encoded_bytes(m) + 63) / 64 * 64;
    uint8_t* first = arena_.bytes(num_rows_ * size);
    for (int64_t t = 0; t < num_rows_; t++) made.rows.push_back(first + t * size);
    for_each_run(num_rows_, 32, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) encode(m, x_ + t * stride_, first + t * size);
    });
    return made.rows.data();
  }

 private:
  struct Encoding {
    int kind;
    std::vector<const uint8_t*> rows;
  };
  const float* x_;
  int64_t num_rows_, stride_;
  Arena& arena_;
  std::vector<Encoding> encodings_;
};

// ------------------------------------------------------------------------------------------------------------ products

ALWAYS_INLINE int32_t word_at(const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return word;
}

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
      int bits = (x << 4) + (120 << 7);
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
  const Half32 normal = (size << 4) + (120 << 7);
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

// ---------------------------------------------------------------------------------------------------------------- packing

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
