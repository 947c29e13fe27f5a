// The way back of absorbed MLA over selected rows, in fp32: scores and weights are made again, nothing of them was kept.
#pragma once

#include "mla_sparse.h"

namespace {

struct MlaSparseBackward {
  MlaSparse forward;      // of fp32 query and latents; its output is not used
  const float* gradient;  // [num_tokens, num_heads, latent_dim]
  float* query_gradient;  // [num_tokens, num_heads, width]
};

struct MlaBackwardScratch {
  std::vector<float> weights, slopes;  // [num_selected][padded heads]
  std::vector<float> out;              // a token's gradient [num_heads][width], zero beyond latent_dim
  std::vector<float> peaks, totals, means;

  explicit MlaBackwardScratch(const MlaSparse& a)
      : weights(size_t(a.num_selected) * a.padded_heads() + kLanes),
        slopes(weights.size()),
        out(size_t(a.num_heads) * a.width),
        peaks(a.padded_heads() + kLanes),
        totals(peaks.size()),
        means(peaks.size()) {}
};

// A token's gradients: its query's, and those of the rows it chose, added to latents_gradient [rows][width].
void add_gradients(const MlaSparseBackward& b, int64_t token, MlaBackwardScratch& s, float* latents_gradient) {
  const MlaSparse& a = b.forward;
  const int count = a.count(token), padded = a.padded_heads(), width = a.width;
  const int32_t* rows = a.selection + token * a.num_selected;
  const float* query = static_cast<const float*>(a.query) + token * a.num_heads * width;
  float *weights = s.weights.data(), *slopes = s.slopes.data();
  for (int h = 0; h < a.num_heads; h++) {
    memcpy(&s.out[size_t(h) * width], b.gradient + (token * a.num_heads + h) * a.latent_dim, a.latent_dim * sizeof(float));
  }
  score_rows<float, float>(a, token, rows, count, weights);
  soften(weights, count, padded, false, s.peaks.data(), s.totals.data());
  MlaSparse by_choice = a;
  by_choice.query = s.out.data();
  by_choice.scale = 1.0f;
  score_rows<float, float>(by_choice, 0, rows, count, slopes);
  std::fill(s.means.begin(), s.means.end(), 0.0f);
  for (int k = 0; k < count; k++) {
    for (int h = 0; h < padded; h++) {
      weights[k * padded + h] /= s.totals[h];
      s.means[h] += weights[k * padded + h] * slopes[k * padded + h];
    }
  }
  for (int k = 0; k < count; k++) {
    for (int h = 0; h < padded; h++) {
      slopes[k * padded + h] = a.scale * weights[k * padded + h] * (slopes[k * padded + h] - s.means[h]);
    }
  }
  MlaSparse whole_rows = a;
  whole_rows.latent_dim = width;
  weigh_all<float>(whole_rows, rows, count, slopes, b.query_gradient + token * a.num_heads * width);
  // A row is a key, through the scores, and its first numbers are a value.
  for (int k = 0; k < count; k++) {
    const float* later = latents_gradient + int64_t(rows[std::min(k + kPrefetch, count - 1)]) * width;
    for (int d = 0; d < width; d += kLanes) __builtin_prefetch(later + d, 1);
    float* to = latents_gradient + int64_t(rows[k]) * width;
    for (int d = 0; d < width; d += kLanes) {
      Float16 sum = load(to + d);
      for (int h = 0; h < a.num_heads; h++) {
        sum += slopes[k * padded + h] * load(query + h * width + d) + weights[k * padded + h] * load(&s.out[size_t(h) * width + d]);
      }
      store(to + d, sum);
    }
  }
}

// latents_gradient: [num_parts][num_rows][width], zeros; each part is that of a run of the tokens.
void mla_sparse_backward_all(const MlaSparseBackward& b, int64_t num_parts, int64_t num_rows, float* latents_gradient) {
  const int64_t num_tokens = b.forward.num_tokens;
  for_each_task(num_parts, [&](int64_t part) {
    MlaBackwardScratch scratch(b.forward);
    float* own = latents_gradient + part * num_rows * b.forward.width;
    const int64_t first = num_tokens * part / num_parts, last = num_tokens * (part + 1) / num_parts;
    for (int64_t token = first; token < last; token++) add_gradients(b, token, scratch, own);
  });
}

}  // namespace
