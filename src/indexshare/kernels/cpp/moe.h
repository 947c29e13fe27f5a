// The mixture of experts: tokens grouped by expert, gate and up fused, all products of a stage in one parallel run.
#pragma once

#include <vector>

#include "linear.h"

namespace {

// Matrix `number` of a stack of equal ones.
Matrix of_stack(const Matrix& stack, int64_t number) {
  Matrix one = stack;
  one.data += number * stack.num_blocks() * block_bytes(stack);
  if (stack.format == kFp8) {
    one.scales = static_cast<const float*>(stack.scales) + number * stack.num_blocks() * num_groups(stack.width, kActivationGroup);
  } else if (is_integer(stack.format)) {
    const int64_t groups = stack.group == 0 ? 1 : num_groups(stack.width, stack.group);
    one.scales = static_cast<const uint16_t*>(stack.scales) + number * stack.num_blocks() * groups * kLanes;
  }
  return one;
}

// Encoded rows of a small tile, on one thread. at(t): the numbers of row t.
class EncodedTile {
 public:
  template <typename At>
  EncodedTile(const Matrix& m, int64_t count, const At& at) : bytes_(count * padded(m)), rows_(count) {
    for (int64_t t = 0; t < count; t++) {
      rows_[t] = bytes_.data() + t * padded(m);
      encode(m, at(t), bytes_.data() + t * padded(m));
    }
  }
  const uint8_t* const* rows() const { return rows_.data(); }

 private:
  static int64_t padded(const Matrix& m) { return (encoded_bytes(m) + 63) / 64 * 64; }
  std::vector<uint8_t> bytes_;
  std::vector<const uint8_t*> rows_;
};

// Scores [T, num_experts] before the sigmoid -> the chosen experts of each token, best first, and their gates.
void route(
    float* scores, const float* bias, int64_t num_tokens, int64_t num_experts, int64_t num_chosen, bool normalise, float scale,
    int64_t* experts, float* gates) {
  for_each_run(num_tokens, 16, [&](int64_t first, int64_t last) {
    std::vector<float> choice(num_experts);
    for (int64_t t = first; t < last; t++) {
      float* score = scores + t * num_experts;
      for (int64_t e = 0; e < num_experts; e++) {
        score[e] = sigmoid(splat(score[e]))[0];
        choice[e] = score[e] + bias[e];
      }
      float total = 0.0f;
      for (int64_t a = 0; a < num_chosen; a++) {
        const int64_t best = std::max_element(choice.begin(), choice.end()) - choice.begin();  // the first of equals
        experts[t * num_chosen + a] = best;
        total += gates[t * num_chosen + a] = score[best];
        choice[best] = -std::numeric_limits<float>::infinity();
      }
      const float factor = normalise ? scale / (total + 1e-20f) : scale;
      for (int64_t a = 0; a < num_chosen; a++) gates[t * num_chosen + a] *= factor;
    }
  });
}

class Experts {
 public:
  // gate_up: a stack of gate and up in turns, one pair for each expert.
  Experts(
      const Matrix& gate_up, const Matrix& down, int64_t num_experts, int64_t num_chosen, int64_t num_tokens, const int64_t* experts,
      const float* gates)
      : gate_up_(gate_up), down_(down), num_chosen_(num_chosen), num_tokens_(num_tokens), gates_(gates), entry_(num_tokens * num_chosen) {
    // Entries: (token, choice) pairs, those of one expert side by side.
    std::vector<int64_t> counts(num_experts + 1);
    for (int64_t i = 0; i < num_tokens * num_chosen; i++) counts[experts[i] + 1]++;
    for (int64_t e = 0; e < num_experts; e++) {
      if (counts[e + 1] > 0) groups_.push_back({e, counts[e], counts[e + 1]});
      counts[e + 1] += counts[e];
    }
    token_.resize(entry_.size());
    for (int64_t i = 0; i < num_tokens * num_chosen; i++) {
      entry_[i] = counts[experts[i]]++;
      token_[entry_[i]] = i / num_chosen;
    }
    matrices_.reserve(3 * groups_.size());  // they are pointed to
  }

  void with_shared(const Matrix* gate, const Matrix* up, const Matrix* down) {
    shared_gate_ = gate, shared_up_ = up, shared_down_ = down;
  }

  // output [T][hidden_size] += the gated sum over the chosen experts, best first, then the shared one.
  void add(Input& x, int64_t hidden_size, float* output, Arena& arena) {
    const int64_t entries = int64_t(entry_.size()), width = down_.width;
    float* inner = arena.floats(entries * width);
    std::vector<const uint8_t*> rows(entries);
    const uint8_t* const* of_token = x.rows(gate_up_);
    for (int64_t i = 0; i < entries; i++) rows[i] = of_token[token_[i]];
    std::vector<Job> jobs;
    for (const Group& g : groups_) {
      matrices_.push_back(of_stack(gate_up_, 2 * g.expert));
      matrices_.push_back(of_stack(gate_up_, 2 * g.expert + 1));
      const Matrix* gate = &matrices_[matrices_.size() - 2];
      jobs.push_back({gate, rows.data() + g.first, g.count, inner + g.first * width, width, kSwiglu, gate + 1});
    }
    float *shared_inner = nullptr, *shared = nullptr;
    if (shared_gate_ != nullptr) {
      shared_inner = arena.floats(num_tokens_ * shared_down_->width);
      jobs.push_back({shared_gate_, x.rows(*shared_gate_), num_tokens_, shared_inner, shared_down_->width, kSwiglu, shared_up_});
    }
    run_jobs(jobs);

    Input y(inner, entries, width, arena), z(shared_inner, num_tokens_, shared_inner ? shared_down_->width : 0, arena);
    float* outputs = arena.floats(entries * hidden_size);
    const uint8_t* const* inner_rows = y.rows(down_);
    jobs.clear();
    for (const Group& g : groups_) {
      matrices_.push_back(of_stack(down_, g.expert));
      jobs.push_back({&matrices_.back(), inner_rows + g.first, g.count, outputs + g.first * hidden_size, hidden_size, kStore});
    }
    if (shared_inner != nullptr) {
      shared = arena.floats(num_tokens_ * hidden_size);
      jobs.push_back({shared_down_, z.rows(*shared_down_), num_tokens_, shared, hidden_size, kStore});
    }
    run_jobs(jobs);

    for_each_run(num_tokens_, 8, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        for (int64_t d = 0; d < hidden_size; d += kLanes) {
          const int count = int(std::min<int64_t>(kLanes, hidden_size - d));
          Float16 sum = shared ? load_at(shared + t * hidden_size + d, count) : Float16{};
          for (int64_t a = 0; a < num_chosen_; a++) {
            const int64_t i = t * num_chosen_ + a;
            sum += load_at(outputs + entry_[i] * hidden_size + d, count) * gates_[i];
          }
          float* to = output + t * hidden_size + d;
          store_at(to, load_at(to, count) + sum, count);
        }
      }
    });
  }

 private:
  struct Group {
    int64_t expert, first, count;
  };
  const Matrix &gate_up_, &down_;
  const Matrix *shared_gate_ = nullptr, *shared_up_ = nullptr, *shared_down_ = nullptr;
  int64_t num_chosen_, num_tokens_;
  const float* gates_;
  std::vector<int64_t> entry_, token_;
  std::vector<Group> groups_;
  std::vector<Matrix> matrices_;
};

}  // namespace
