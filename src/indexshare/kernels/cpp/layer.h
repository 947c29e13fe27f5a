// The layers of GLM-5.2 for inference: the loop of model/glm.py with its small steps (norms, rope, cache writes) fused.
// Activations are fp32 between products; the residual stream stays fp32 through all layers.
#pragma once

#include <chrono>
#include <cstring>
#include <vector>

#include "index_select.h"
#include "linear.h"
#include "mla_sparse.h"
#include "moe.h"

namespace {

struct Norm {
  const float* weight;
  const float* bias;
};

// One decoder layer, packed. The fields are mirrored in model/native.py; a matrix without data is absent.
struct Layer {
  Norm input_norm, query_norm, latent_norm, key_norm, mlp_norm;
  Matrix q_a, q_b, kv_a, absorb, value, output;  // absorb [heads][latent, nope] and value [heads][value, latent] are stacks
  Matrix index_query, index_key, index_weights;
  Matrix gate, up, down;  // of the dense MLP or the shared experts
  Matrix router, expert_gate_up, expert_down;  // stacks of num_experts
  const float* router_bias;
  int64_t num_experts, num_chosen, normalise;
  double expert_scale;
  int64_t* expert_tokens;  // [num_experts], counted up
};

struct Geometry {  // the same for all layers; mirrored in model/native.py
  int64_t hidden, heads, query_rank, latent, nope, rope, value, index_heads, index_dim;
  int64_t interleaved, index_interleaved;
  double norm_eps, latent_norm_eps, key_norm_eps, scale;
};

// What is asked of all layers in this step.
struct Step {
  const Geometry* geometry;
  int64_t num_tokens, num_sequences;
  const int64_t* starts;      // [num_sequences + 1]
  const int64_t* contexts;    // [num_sequences]
  const int64_t* page_table;  // [num_sequences, pages_per_sequence]
  int64_t pages_per_sequence, page_size;
  const float *cos, *sin;  // [num_tokens, rope/2]
  bool is_bf16, query_only;  // is_bf16: queries, and caches that are not rounded
  int32_t* selection;  // [num_tokens, num_selected], handed from layer to layer
  int64_t num_selected;

  int64_t row(int64_t sequence, int64_t position) const {
    return page_table[sequence * pages_per_sequence + position / page_size] * page_size + position % page_size;
  }
  int64_t sequence_of(int64_t token) const {
    int64_t b = 0;
    while (token >= starts[b + 1]) b++;
    return b;
  }
  int64_t row_of(int64_t token) const {
    const int64_t b = sequence_of(token);
    return row(b, contexts[b] - starts[b + 1] + token);
  }
};

constexpr int64_t kTokensPerRun = 8;

float sum_of_squares(const float* x, int64_t count) {
  Float16 sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += load(x + i) * load(x + i);
  float sum = 0.0f;
  for (; i < count; i++) sum += x[i] * x[i];
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

void rms_norm(const float* x, const float* weight, int64_t count, double eps, float* y) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, count) / float(count) + float(eps));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < count; i++) y[i] = x[i] * scale * weight[i];
}

void layer_norm(const float* x, const Norm& norm, int64_t count, double eps, float* y) {
  float mean = 0.0f, variance = 0.0f;
  for (int64_t i = 0; i < count; i++) mean += x[i];
  mean /= float(count);
  for (int64_t i = 0; i < count; i++) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(variance / float(count) + float(eps));
  for (int64_t i = 0; i < count; i++) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

// Rotates pairs of x [rope] and stores them as two halves, as ops.rope does.
void rotate(const float* x, const float* cos, const float* sin, int64_t rope, bool interleaved, float* y) {
  const int64_t half = rope / 2;
  float turned[1024];
  for (int64_t i = 0; i < half; i++) {
    const float first = interleaved ? x[2 * i] : x[i], second = interleaved ? x[2 * i + 1] : x[i + half];
    turned[i] = first * cos[i] - second * sin[i];
    turned[i + half] = second * cos[i] + first * sin[i];
  }
  memcpy(y, turned, rope * sizeof(float));
}

// Where the time goes, in seconds, by operation of the specification.
struct Seconds {
  double linear, index_select, mla_sparse, moe_experts;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Queries, keys and attention of one layer; hidden [T][D] grows by its output.
class LayerRun {
 public:
  LayerRun(const Layer& layer, const Step& step, Pool latents, Pool index_keys, Arena& arena, Seconds& seconds)
      : layer_(layer), step_(step), g_(*step.geometry), latents_(latents), index_keys_(index_keys), arena_(arena), seconds_(seconds) {}

  // Returns whether an index score was NaN; then `hidden` is of no use.
  bool run(float* hidden) {
    arena_.reset();
    const int64_t T = step_.num_tokens;
    double begun = now();
    auto spend = [&](double& on) { const double time = now(); on += time - begun, begun = time; };
    float* normed = arena_.floats(T * g_.hidden);
    norm_rows(hidden, layer_.input_norm, normed);
    {
      Input x(normed, T, g_.hidden, arena_);
      project(x);
    }
    write_caches();
    {
      Input q(query_latent_, T, g_.query_rank, arena_);
      query_ = arena_.floats(T * g_.heads * (g_.nope + g_.rope));
      std::vector<Job> jobs{job(layer_.q_b, q, query_)};
      if (runs_indexer()) {
        index_query_ = arena_.floats(T * g_.index_heads * g_.index_dim);
        jobs.push_back(job(layer_.index_query, q, index_query_));
      }
      run_jobs(jobs);
    }
    absorb();
    spend(seconds_.linear);
    if (runs_indexer() && select()) return true;
    spend(seconds_.index_select);
    const uint8_t* attended = attend();
    spend(seconds_.mla_sparse);
    take_values(attended);
    {
      Input x(values_, T, g_.heads * g_.value, arena_);
      run_jobs({job(layer_.output, x, hidden, kAdd)});
    }
    arena_.reset();
    normed = arena_.floats(T * g_.hidden);
    norm_rows(hidden, layer_.mlp_norm, normed);
    if (layer_.num_experts == 0) dense(normed, hidden);
    spend(seconds_.linear);
    if (layer_.num_experts > 0) mixture(normed, hidden);
    spend(seconds_.moe_experts);
    return false;
  }

 private:
  bool runs_indexer() const { return layer_.index_query.data != nullptr && !step_.query_only; }

  static Job job(const Matrix& m, Input& x, float* out, Target target = kStore) {
    return {&m, x.rows(m), x.num_rows(), out, m.num_outputs, target};
  }

  void norm_rows(const float* x, const Norm& norm, float* y) {
    for_each_run(step_.num_tokens, kTokensPerRun, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) rms_norm(x + t * g_.hidden, norm.weight, g_.hidden, g_.norm_eps, y + t * g_.hidden);
    });
  }

  void project(Input& x) {
    const int64_t T = step_.num_tokens;
    query_latent_ = arena_.floats(T * g_.query_rank);
    std::vector<Job> jobs{job(layer_.q_a, x, query_latent_)};
    if (!step_.query_only) {
      latent_ = arena_.floats(T * (g_.latent + g_.rope));
      jobs.push_back(job(layer_.kv_a, x, latent_));
    }
    if (runs_indexer()) {
      index_key_ = arena_.floats(T * g_.index_dim);
      index_weights_ = arena_.floats(T * g_.index_heads);
      jobs.push_back(job(layer_.index_key, x, index_key_));
      jobs.push_back(job(layer_.index_weights, x, index_weights_));
    }
    run_jobs(jobs);
  }

  // Norms of the latents, rope of the keys; what later tokens will attend to is written.
  void write_caches() {
    for_each_run(step_.num_tokens, kTokensPerRun, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        float* query = query_latent_ + t * g_.query_rank;
        rms_norm(query, layer_.query_norm.weight, g_.query_rank, g_.latent_norm_eps, query);
        if (step_.query_only) continue;
        const float *cos = step_.cos + t * g_.rope / 2, *sin = step_.sin + t * g_.rope / 2;
        const int64_t row = step_.row_of(t);
        float* latent = latent_ + t * (g_.latent + g_.rope);
        rms_norm(latent, layer_.latent_norm.weight, g_.latent, g_.latent_norm_eps, latent);
        rotate(latent + g_.latent, cos, sin, g_.rope, g_.interleaved, latent + g_.latent);
        latents_.write(row, latent);
        if (!runs_indexer()) continue;
        float* key = index_key_ + t * g_.index_dim;
        layer_norm(key, layer_.key_norm, g_.index_dim, g_.key_norm_eps, key);
        rotate(key, cos, sin, g_.rope, g_.index_interleaved, key);
        index_keys_.write(row, key);
        const float share = 1.0f / std::sqrt(float(g_.index_heads));
        for (int64_t h = 0; h < g_.index_heads; h++) index_weights_[t * g_.index_heads + h] *= share;
      }
    });
  }

  // Queries into the latent space: [T][heads][latent + rope] in the cache's type.
  void absorb() {
    const int64_t width = g_.latent + g_.rope, head_dim = g_.nope + g_.rope;
    absorbed_ = arena_.bytes(step_.num_tokens * g_.heads * width * number_size());
    const int64_t tiles = (step_.num_tokens + kTile - 1) / kTile;
    for_each_task(g_.heads * tiles, [&](int64_t task) {
      const int64_t head = task / tiles, first = task % tiles * kTile, last = std::min(first + kTile, step_.num_tokens);
      float wide[kTile * 16 * 8];
      Matrix m = of_stack(layer_.absorb, head);
      EncodedTile x(m, last - first, [&](int64_t t) { return query_ + ((first + t) * g_.heads + head) * head_dim; });
      // A few blocks at a time, so that `wide` is small.
      for (int64_t block = 0; block < m.num_blocks(); block += 8) {
        const int64_t end = std::min(block + 8, m.num_blocks());
        multiply_tile(x.rows(), m, 0, last - first, block, end, [&](int64_t t, int64_t b, int count, const Float16* sums) {
          for (int i = 0; i < count; i++) store(wide + t * 128 + (b - block + i) * kLanes, sums[i]);
        });
        const int64_t numbers = std::min((end - block) * kLanes, g_.latent - block * kLanes);
        for (int64_t t = first; t < last; t++) {
          put(absorbed_, (t * g_.heads + head) * width + block * kLanes, wide + (t - first) * 128, numbers);
        }
      }
      for (int64_t t = first; t < last; t++) {
        float turned[1024];
        const int64_t place = t * g_.rope / 2;
        rotate(query_ + (t * g_.heads + head) * head_dim + g_.nope, step_.cos + place, step_.sin + place, g_.rope, g_.interleaved, turned);
        put(absorbed_, (t * g_.heads + head) * width + g_.latent, turned, g_.rope);
      }
    });
  }

  bool select() {
    const int64_t per_token = g_.index_heads * g_.index_dim;
    uint8_t* query = arena_.bytes(step_.num_tokens * per_token * number_size());
    for_each_run(step_.num_tokens, kTokensPerRun, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const int64_t place = t * g_.rope / 2;
        for (int64_t h = 0; h < g_.index_heads; h++) {
          float* x = index_query_ + t * per_token + h * g_.index_dim;
          rotate(x, step_.cos + place, step_.sin + place, g_.rope, g_.index_interleaved, x);
        }
        put(query, t * per_token, index_query_ + t * per_token, per_token);
      }
    });
    bool is_nan = false;
    std::fill(step_.selection, step_.selection + step_.num_tokens * step_.num_selected, -1);
    for (int64_t b = 0; b < step_.num_sequences; b++) {
      const int64_t start = step_.starts[b];
      IndexSelect a{};
      a.query = query + start * per_token * number_size();
      a.query_is_bf16 = a.keys_are_bf16 = step_.is_bf16;
      a.weights = index_weights_ + start * g_.index_heads;
      a.keys = index_keys_.data;
      a.keys_are_rounded = index_keys_.group > 0;
      a.page_table = step_.page_table + b * step_.pages_per_sequence;
      a.page_size = step_.page_size;
      a.num_queries = step_.starts[b + 1] - start;
      a.num_past = step_.contexts[b] - a.num_queries;
      a.num_heads = int(g_.index_heads);
      a.dim = int(g_.index_dim);
      a.topk = int(step_.num_selected);
      a.selection = step_.selection + start * step_.num_selected;
      a.selection_stride = step_.num_selected;
      is_nan |= index_select_all(a);
    }
    return is_nan;
  }

  const uint8_t* attend() {
    const int64_t T = step_.num_tokens;
    uint8_t* attended = arena_.bytes(T * g_.heads * g_.latent * number_size());
    MlaSparse a{};
    a.query = absorbed_;
    a.latents = latents_.data;
    a.rounded = latents_.group > 0 ? &latents_ : nullptr;
    a.query_is_bf16 = a.latents_are_bf16 = step_.is_bf16;
    a.selection = step_.selection;
    a.num_tokens = T;
    a.num_selected = step_.num_selected;
    a.num_heads = int(g_.heads);
    a.width = int(g_.latent + g_.rope);
    a.latent_dim = int(g_.latent);
    a.scale = float(g_.scale);
    a.output = attended;
    mla_sparse_all(a);
    return attended;
  }

  // From the attended latents to values, head by head.
  void take_values(const uint8_t* attended) {
    const int64_t T = step_.num_tokens;
    values_ = arena_.floats(T * g_.heads * g_.value);
    const int64_t tiles = (T + kTile - 1) / kTile, size = g_.latent * number_size();
    for_each_task(g_.heads * tiles, [&](int64_t task) {
      const int64_t head = task / tiles, first = task % tiles * kTile, last = std::min(first + kTile, T);
      const Matrix m = of_stack(layer_.value, head);
      const uint8_t* rows[kTile];
      for (int64_t t = first; t < last; t++) rows[t - first] = attended + (t * g_.heads + head) * size;
      const Job out{&m, rows, last - first, values_ + (first * g_.heads + head) * g_.value, g_.heads * g_.value, kStore};
      multiply_tile(rows, m, 0, last - first, 0, m.num_blocks(), [&](int64_t t, int64_t b, int count, const Float16* sums) {
        give_block(out, kStore, t, b, count, sums);
      });
    });
  }

  void dense(float* normed, float* hidden) {
    const int64_t T = step_.num_tokens, width = layer_.down.width;
    Input x(normed, T, g_.hidden, arena_);
    float* inner = arena_.floats(T * width);
    Job gate = job(layer_.gate, x, inner, kSwiglu);
    gate.up = &layer_.up;
    run_jobs({gate});
    Input y(inner, T, width, arena_);
    run_jobs({job(layer_.down, y, hidden, kAdd)});
  }

  void mixture(float* normed, float* hidden) {
    const int64_t T = step_.num_tokens, chosen = layer_.num_chosen;
    Input x(normed, T, g_.hidden, arena_);
    float* scores = arena_.floats(T * layer_.num_experts);
    run_jobs({job(layer_.router, x, scores)});
    std::vector<int64_t> experts(size_t(T) * chosen);
    std::vector<float> gates(experts.size());
    route(scores, layer_.router_bias, T, layer_.num_experts, chosen, layer_.normalise, float(layer_.expert_scale), experts.data(), gates.data());
    for (const int64_t expert : experts) layer_.expert_tokens[expert]++;
    Experts run(layer_.expert_gate_up, layer_.expert_down, layer_.num_experts, chosen, T, experts.data(), gates.data());
    run.with_shared(&layer_.gate, &layer_.up, &layer_.down);
    run.add(x, g_.hidden, hidden, arena_);
  }

  static constexpr int64_t kTile = 32;

  int64_t number_size() const { return step_.is_bf16 ? 2 : 4; }

  void put(uint8_t* array, int64_t place, const float* x, int64_t count) const {
    if (step_.is_bf16) narrow_row(x, count, reinterpret_cast<uint16_t*>(array) + place);
    else memcpy(reinterpret_cast<float*>(array) + place, x, count * sizeof(float));
  }

  const Layer& layer_;
  const Step& step_;
  const Geometry& g_;
  Pool latents_, index_keys_;
  Arena& arena_;
  Seconds& seconds_;
  float *query_latent_ = nullptr, *latent_ = nullptr, *index_key_ = nullptr, *index_weights_ = nullptr;
  float *query_ = nullptr, *index_query_ = nullptr, *values_ = nullptr;
  uint8_t* absorbed_ = nullptr;
};

}  // namespace
