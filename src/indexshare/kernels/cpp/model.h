// A whole step: embedding, layers, last norm, logits. One call, because what surrounds the layers takes longer in Python than
// a small model's layers here, and because a large model's weights drive Python's own memory out of the caches.
#pragma once

#include <vector>

#include "layer.h"

namespace {

// The fields are mirrored in model/native.py.
struct Model {
  Geometry geometry;
  const Layer* layers;
  int64_t num_layers;
  const void* embedding;  // [vocab][hidden] in the activations' type; null: hidden states are given
  int64_t vocab;
  Norm norm;
  Matrix head;
  double rope_theta;
};

// Angles in fp64, as the specification has them.
void fill_rope_table(const int64_t* positions, int64_t count, double theta, int64_t half, float* cos, float* sin) {
  std::vector<double> frequencies(half);
  for (int64_t i = 0; i < half; i++) frequencies[i] = std::pow(theta, -double(2 * i) / double(2 * half));
  for_each_run(count, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      for (int64_t i = 0; i < half; i++) {
        const double angle = double(positions[t]) * frequencies[i];
        cos[t * half + i] = float(std::cos(angle));
        sin[t * half + i] = float(std::sin(angle));
      }
    }
  });
}

class ModelRun {
 public:
  struct Result {
    void* hidden;  // [T][hidden] after the last norm
    float* logits;  // [num_logits][vocab]
    int64_t num_logits;
    int32_t* selections;  // [num_selections][T][num_selected]
    int64_t num_selections;
  };

  ModelRun(const Model& model, const Step& step, const int64_t* caches, int latent_group, int key_group, Arena& arena, Seconds& seconds)
      : model_(model), step_(step), g_(model.geometry), caches_(caches), latent_group_(latent_group), key_group_(key_group), arena_(arena), seconds_(seconds) {}

  // Returns 0, 1 + the number of the first layer with a NaN score, or -1: a token id is outside the vocabulary.
  int64_t run(const void* inputs, const int64_t* positions, const Result& result) {
    const int64_t T = step_.num_tokens;
    for (int64_t t = 0; model_.embedding != nullptr && t < T; t++) {
      const int64_t token_id = static_cast<const int64_t*>(inputs)[t];
      if (token_id < 0 || token_id >= model_.vocab) return -1;
    }
    stream_.resize(T * g_.hidden);
    table_.resize(T * g_.rope);
    int64_t failed = 0;
    Team::lead([&] {
      fill_rope_table(positions, T, model_.rope_theta, g_.rope / 2, table_.data(), table_.data() + T * g_.rope / 2);
      step_.cos = table_.data(), step_.sin = step_.cos + T * g_.rope / 2;
      read(inputs);
      failed = run_layers(result);
      if (failed != 0) return;
      norm(result.hidden);
      const double begun = now();
      if (result.num_logits > 0) make_logits(result);
      seconds_.linear += now() - begun;
    });
    return failed;
  }

 private:
  int64_t row_bytes() const { return g_.hidden * (step_.is_bf16 ? 2 : 4); }

  template <typename F>
  void for_each_token(const F& f) const {
    for_each_run(step_.num_tokens, kTokensPerRun, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) f(t);
    });
  }

  void widen(const uint8_t* row, float* to) const {
    if (step_.is_bf16) widen_row(reinterpret_cast<const uint16_t*>(row), g_.hidden, to);
    else memcpy(to, row, row_bytes());
  }

  // Rows of the embedding, or the hidden states that are given, into the residual stream.
  void read(const void* inputs) {
    const uint8_t* rows = static_cast<const uint8_t*>(model_.embedding == nullptr ? inputs : model_.embedding);
    const int64_t* token_ids = static_cast<const int64_t*>(inputs);
    for_each_token([&](int64_t t) {
      widen(rows + (model_.embedding == nullptr ? t : token_ids[t]) * row_bytes(), stream_.data() + t * g_.hidden);
    });
  }

  int64_t run_layers(const Result& result) {
    int64_t next = 0;
    for (int64_t i = 0; i < model_.num_layers; i++) {
      const Layer& layer = model_.layers[i];
      const bool chooses = layer.index_query.data != nullptr && !step_.query_only;
      if (chooses || step_.selection == nullptr) {
        step_.selection = result.selections + next * step_.num_tokens * step_.num_selected;
        if (chooses && result.num_selections > 1) next++;
      }
      const Pool latents = pool(i, 0, g_.latent + g_.rope, latent_group_, g_.latent);
      const Pool index_keys = pool(i, 1, g_.index_dim, key_group_, g_.index_dim);
      if (LayerRun(layer, step_, latents, index_keys, arena_, seconds_).run(stream_.data())) return i + 1;
    }
    return 0;
  }

  Pool pool(int64_t layer, int which, int64_t width, int group, int64_t rounded) const {
    return {reinterpret_cast<uint8_t*>(caches_[2 * layer + which]), width, step_.is_bf16, group, rounded};
  }

  void norm(void* hidden) {
    for_each_token([&](int64_t t) {
      float* row = stream_.data() + t * g_.hidden;
      uint8_t* to = static_cast<uint8_t*>(hidden) + t * row_bytes();
      rms_norm(row, model_.norm.weight, g_.hidden, g_.norm_eps, row);
      if (step_.is_bf16) narrow_row(row, g_.hidden, reinterpret_cast<uint16_t*>(to));
      else memcpy(to, row, row_bytes());
    });
  }

  // From the hidden states as they are handed out, and rounded to their type, so that a product by itself gives the same.
  void make_logits(const Result& result) {
    const int64_t first = step_.num_tokens - result.num_logits, vocab = model_.vocab;
    for (int64_t t = first; t < step_.num_tokens; t++) {
      widen(static_cast<const uint8_t*>(result.hidden) + t * row_bytes(), stream_.data() + t * g_.hidden);
    }
    arena_.reset();
    Input x(stream_.data() + first * g_.hidden, result.num_logits, g_.hidden, arena_);
    run_jobs({{&model_.head, x.rows(model_.head), result.num_logits, result.logits, vocab, kStore}});
    if (!step_.is_bf16) return;
    for_each_run(result.num_logits * vocab, 1 << 14, [&](int64_t begin, int64_t end) { round_row(result.logits + begin, end - begin); });
  }

  const Model& model_;
  Step step_;
  const Geometry& g_;
  const int64_t* caches_;
  int latent_group_, key_group_;
  Arena& arena_;
  Seconds& seconds_;
  std::vector<float> stream_, table_;
};

}  // namespace
