// Activations as a packed weight wants them: fp32, BF16, or int8 with a scale for each group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "weights.h"

namespace {

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
  // Several blocks become one, which is all that the next pass needs if it is like this one.
  void reset() {
    if (blocks_.size() > 1) {
      size_t size = 0;
      for (const auto& block : blocks_) size += block.size();
      blocks_.clear();
      blocks_.emplace_back(size);
    }
    used_ = 0, place_ = 0;
  }
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

}  // namespace
