// The operations that are worth it, as torch operators of one instruction set: INDEXSHARE_OPERATORS is their namespace.
// Python checks shapes and types (kernels/native.py); work is split over torch's own threads, so there is one pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "index_select.h"
#include "mla_sparse.h"

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

template <typename F>
void split(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, f);
}

// -> whether a score was NaN. page_table: int64 [P] of the sequence.
bool index_select(
    const Tensor& query, const Tensor& weights, const Tensor& keys, const Tensor& page_table, int64_t page_size,
    int64_t first_row, int64_t context, const Tensor& selection) {
  IndexSelect a{};
  a.query = query.data_ptr();
  a.query_is_bf16 = is_bf16(query);
  a.weights = static_cast<const float*>(weights.data_ptr());
  a.keys = keys.data_ptr();
  a.keys_are_bf16 = is_bf16(keys);
  a.page_table = page_table.numel() ? static_cast<const int64_t*>(page_table.data_ptr()) : nullptr;
  a.page_size = page_size;
  a.first_row = first_row;
  a.num_queries = query.size(0);
  a.num_past = context - a.num_queries;
  a.num_heads = int(query.size(1));
  a.dim = int(query.size(2));
  a.topk = int(selection.size(1));
  a.selection = static_cast<int32_t*>(selection.data_ptr());
  a.selection_stride = selection.size(1);

  const int64_t num_threads = torch::stable::get_num_threads();
  std::atomic<bool> is_nan{false};
  if (a.num_queries <= kQueriesPerTile && context > a.topk) {  // too few queries to share: share the keys
    const int64_t blocks = (context + kKeysPerBlock - 1) / kKeysPerBlock;
    const int64_t parts = std::min(num_threads, std::max<int64_t>(1, context / (2 * a.topk)));
    std::vector<float> scores(size_t(parts * a.num_queries) * a.topk);
    std::vector<int32_t> positions(scores.size()), counts(parts * a.num_queries);
    split(parts, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) {
        const int64_t begin = blocks * part / parts * kKeysPerBlock;
        const int64_t end = std::min(context, blocks * (part + 1) / parts * kKeysPerBlock);
        const size_t place = size_t(part) * a.num_queries;
        if (index_select_part(a, begin, end, &scores[place * a.topk], &positions[place * a.topk], &counts[place])) is_nan = true;
      }
    });
    index_select_join(a, int(parts), scores.data(), positions.data(), counts.data());
  } else {
    // Later queries see more keys: tiles are dealt out in turn, so that threads end together.
    const int64_t tiles = (a.num_queries + kQueriesPerTile - 1) / kQueriesPerTile;
    split(num_threads, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; thread++) {
        for (int64_t tile = thread; tile < tiles; tile += num_threads) {
          const int64_t begin = tile * kQueriesPerTile;
          if (index_select_queries(a, begin, std::min(begin + kQueriesPerTile, a.num_queries))) is_nan = true;
        }
      }
    });
  }
  return is_nan;
}

void mla_sparse(const Tensor& query, const Tensor& latents, const Tensor& selection, double scale, const Tensor& output) {
  MlaSparse a{};
  a.query = query.data_ptr();
  a.query_is_bf16 = is_bf16(query);
  a.latents = latents.data_ptr();
  a.latents_are_bf16 = is_bf16(latents);
  a.selection = static_cast<const int32_t*>(selection.data_ptr());
  a.num_tokens = query.size(0);
  a.num_selected = selection.size(1);
  a.num_heads = int(query.size(1));
  a.width = int(query.size(2));
  a.latent_dim = int(output.size(2));
  a.scale = float(scale);
  a.output = output.data_ptr();

  const int64_t num_threads = torch::stable::get_num_threads();
  if (a.num_tokens >= num_threads) {
    split(a.num_tokens, [&](int64_t first, int64_t last) { mla_sparse_tokens(a, first, last); });
    return;
  }
  const int padded = (a.num_heads + kHeads - 1) / kHeads * kHeads;
  std::vector<float> scores(size_t(a.num_selected) * padded);
  for (int64_t token = 0; token < a.num_tokens; token++) {
    const int count = a.count(token);
    const int pieces = (count + 63) / 64;
    split(pieces, [&](int64_t first, int64_t last) {
      mla_score_rows(a, token, int(first * 64), int(std::min<int64_t>(last * 64, count)), scores.data());
    });
    softmax_rows(scores.data(), count, padded);
    split(num_weigh_parts(a), [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) mla_weigh_part(a, token, int(part), count, scores.data());
    });
  }
}

}  // namespace

#define LIBRARY_OF(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENTATIONS_OF(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

LIBRARY_OF(INDEXSHARE_OPERATORS, m) {
  m.def(
      "index_select(Tensor query, Tensor weights, Tensor keys, Tensor page_table, int page_size, int first_row, "
      "int context, Tensor(a!) selection) -> bool");
  m.def("mla_sparse(Tensor query, Tensor latents, Tensor selection, float scale, Tensor(a!) output) -> ()");
}

IMPLEMENTATIONS_OF(INDEXSHARE_OPERATORS, m) {
  m.impl("index_select", TORCH_BOX(&index_select));
  m.impl("mla_sparse", TORCH_BOX(&mla_sparse));
}
