// The kernels as torch operators of one instruction set: INDEXSHARE_OPERATORS is their namespace.
// Python checks shapes and types; structures travel as bytes whose fields are mirrored there (kernels/packed.py, model/native.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <mutex>

#include "index_select.h"
#include "layer.h"
#include "linear.h"
#include "mla_sparse.h"
#include "mla_sparse_backward.h"
#include "model.h"
#include "moe.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

void widen_rows(const Tensor& tensor, float* y) {
  const void* x = tensor.data_ptr();
  const bool narrow = is_bf16(tensor);
  for_each_run(tensor.numel(), 1 << 14, [=](int64_t first, int64_t last) {
    if (narrow) widen_row(static_cast<const uint16_t*>(x) + first, last - first, y + first);
    else memcpy(y + first, static_cast<const float*>(x) + first, (last - first) * sizeof(float));
  });
}

void narrow_rows(const float* x, const Tensor& tensor) {
  void* y = tensor.data_ptr();
  const bool narrow = is_bf16(tensor);
  for_each_run(tensor.numel(), 1 << 14, [=](int64_t first, int64_t last) {
    if (narrow) narrow_row(x + first, last - first, static_cast<uint16_t*>(y) + first);
    else memcpy(static_cast<float*>(y) + first, x + first, (last - first) * sizeof(float));
  });
}

// Memory of the operators that use it, for one of them at a time: torch lets several Python threads call.
class SharedArena {
 public:
  SharedArena() : lock_(mutex()) { arena().reset(); }
  Arena& operator*() const { return arena(); }
  Arena* operator->() const { return &arena(); }

 private:
  static std::mutex& mutex() {
    static std::mutex shared;
    return shared;
  }
  static Arena& arena() {
    static Arena shared;
    return shared;
  }
  std::lock_guard<std::mutex> lock_;
};

int64_t structure_size(int64_t which) { return which == 0 ? sizeof(Matrix) : which == 1 ? sizeof(Layer) : sizeof(Model); }

// matrix: the structure, whose data and scales are not read. weight in the format's own numbers -> packed bytes.
void pack_weight(const Tensor& weight, const Tensor& matrix, const Tensor& packed) {
  const Matrix& m = *data<Matrix>(matrix);
  uint8_t* out = mutable_data<uint8_t>(packed);
  switch (m.format) {
    case kFp32: return pack_numbers(data<uint32_t>(weight), m, out);
    case kBf16: return pack_numbers(data<uint16_t>(weight), m, out);
    case kInt4: return pack_nibbles(data<uint8_t>(weight), m, out);
    default: return pack_numbers(data<uint8_t>(weight), m, out);
  }
}

int64_t packed_bytes(const Tensor& matrix) {
  const Matrix& m = *data<Matrix>(matrix);
  return m.num_blocks() * block_bytes(m);
}

// x [T, in] -> output [T, out], both BF16 or fp32.
void linear(const Tensor& x, const Tensor& matrix, const Tensor& output) {
  const Matrix& m = *data<Matrix>(matrix);
  SharedArena arena;
  float *wide = arena->floats(x.numel()), *sums = arena->floats(output.numel());
  widen_rows(x, wide);
  Input rows(wide, x.size(0), m.width, *arena);
  run_jobs({{&m, rows.rows(m), x.size(0), sums, m.num_outputs, kStore}});
  narrow_rows(sums, output);
}

void moe_experts(
    const Tensor& hidden, const Tensor& experts, const Tensor& gates, const Tensor& gate_up, const Tensor& down, int64_t num_experts,
    const Tensor& output) {
  const int64_t num_tokens = hidden.size(0), width = hidden.size(1);
  SharedArena arena;
  float *wide = arena->floats(hidden.numel()), *sums = arena->floats(hidden.numel());
  std::fill(sums, sums + hidden.numel(), 0.0f);
  widen_rows(hidden, wide);
  Input x(wide, num_tokens, width, *arena);
  Experts run(*data<Matrix>(gate_up), *data<Matrix>(down), num_experts, experts.size(1), num_tokens, data<int64_t>(experts), data<float>(gates));
  run.add(x, width, sums, *arena);
  narrow_rows(sums, output);
}

// -> whether a score was NaN. page_table: int64 [P] of the sequence. Keys in uint8 are rounded rows.
bool index_select(
    const Tensor& query, const Tensor& weights, const Tensor& keys, const Tensor& page_table, int64_t page_size, int64_t first_row,
    int64_t context, const Tensor& selection) {
  IndexSelect a{};
  a.query = query.data_ptr();
  a.query_is_bf16 = is_bf16(query);
  a.weights = data<float>(weights);
  a.keys = keys.data_ptr();
  a.keys_are_bf16 = is_bf16(keys);
  a.keys_are_rounded = keys.scalar_type() == ScalarType::Byte;
  a.page_table = page_table.numel() ? data<int64_t>(page_table) : nullptr;
  a.page_size = page_size;
  a.first_row = first_row;
  a.num_queries = query.size(0);
  a.num_past = context - a.num_queries;
  a.num_heads = int(query.size(1));
  a.dim = int(query.size(2));
  a.topk = int(selection.size(1));
  a.selection = mutable_data<int32_t>(selection);
  a.selection_stride = selection.size(1);
  return index_select_all(a);
}

// x [T, D] -> weight * x / rms(x), all BF16 or fp32.
void rms_norm_rows(const Tensor& x, const Tensor& weight, double eps, const Tensor& output) {
  const int64_t width = weight.numel(), num_rows = x.numel() / width;
  SharedArena arena;
  float *wide = arena->floats(x.numel()), *scales = arena->floats(width);
  widen_rows(weight, scales);
  widen_rows(x, wide);
  for_each_run(num_rows, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) rms_norm(wide + t * width, scales, width, eps, wide + t * width);
  });
  narrow_rows(wide, output);
}

// group: 0, or numbers that share a scale in rounded rows.
void mla_sparse(
    const Tensor& query, const Tensor& latents, int64_t group, const Tensor& selection, double scale, const Tensor& output) {
  const Pool rounded{mutable_data<uint8_t>(latents), query.size(2), is_bf16(query), int(group), output.size(2)};
  MlaSparse a{};
  a.query = query.data_ptr();
  a.query_is_bf16 = is_bf16(query);
  a.latents = latents.data_ptr();
  a.rounded = group > 0 ? &rounded : nullptr;
  a.latents_are_bf16 = is_bf16(group > 0 ? query : latents);
  a.selection = data<int32_t>(selection);
  a.num_tokens = query.size(0);
  a.num_selected = selection.size(1);
  a.num_heads = int(query.size(1));
  a.width = int(query.size(2));
  a.latent_dim = int(output.size(2));
  a.scale = float(scale);
  a.output = output.data_ptr();
  mla_sparse_all(a);
}

// All fp32. latents_gradient: [parts, R, W], zeros.
void mla_sparse_backward(
    const Tensor& query, const Tensor& latents, const Tensor& selection, const Tensor& gradient, double scale, const Tensor& query_gradient,
    const Tensor& latents_gradient) {
  MlaSparse a{};
  a.query = query.data_ptr();
  a.latents = latents.data_ptr();
  a.selection = data<int32_t>(selection);
  a.num_tokens = query.size(0);
  a.num_selected = selection.size(1);
  a.num_heads = int(query.size(1));
  a.width = int(query.size(2));
  a.latent_dim = int(gradient.size(2));
  a.scale = float(scale);
  const MlaSparseBackward b{a, data<float>(gradient), mutable_data<float>(query_gradient)};
  mla_sparse_backward_all(b, latents_gradient.size(0), latents_gradient.size(1), mutable_data<float>(latents_gradient));
}

// positions int64 [T] -> cos and sin fp32 [T, rope/2].
void rope_table(const Tensor& positions, double theta, const Tensor& cos, const Tensor& sin) {
  fill_rope_table(data<int64_t>(positions), positions.numel(), theta, cos.size(1), mutable_data<float>(cos), mutable_data<float>(sin));
}

// inputs: token ids int64 [T], or hidden states [T, D] where the model has no embedding. -> hidden [T, D] after the last norm,
// and logits fp32 [n, vocab] after the last n tokens. lengths: starts of the sequences (one more than there are), then
// contexts. caches: int64 [layers, 2], addresses of latents and index keys.
// selections [n, T, K]: with n > 1 each layer that runs its indexer writes a new one, else the next replaces the last.
// latent_group, key_group: 0, or numbers that share a scale in rounded rows. seconds: fp64 [4], see Seconds; added to.
// -> as ModelRun::run.
int64_t run_model(
    const Tensor& model, const Tensor& inputs, const Tensor& positions, const Tensor& hidden, const Tensor& logits, const Tensor& lengths,
    const Tensor& page_table, int64_t page_size, const Tensor& caches, int64_t latent_group, int64_t key_group, bool query_only,
    const Tensor& selections, const Tensor& seconds) {
  SharedArena arena;
  const Model& m = *data<Model>(model);
  Step step{};
  step.geometry = &m.geometry;
  step.num_tokens = hidden.size(0);
  step.num_sequences = page_table.size(0);
  step.starts = data<int64_t>(lengths);
  step.contexts = step.starts + step.num_sequences + 1;
  step.page_table = data<int64_t>(page_table);
  step.pages_per_sequence = page_table.size(1);
  step.page_size = page_size;
  step.is_bf16 = is_bf16(hidden);
  step.query_only = query_only;
  step.num_selected = selections.size(2);
  const ModelRun::Result result{hidden.data_ptr(), mutable_data<float>(logits), logits.size(0), mutable_data<int32_t>(selections), selections.size(0)};
  ModelRun run(m, step, data<int64_t>(caches), int(latent_group), int(key_group), *arena, *mutable_data<Seconds>(seconds));
  return run.run(inputs.data_ptr(), data<int64_t>(positions), result);
}

}  // namespace

#define LIBRARY_OF(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENTATIONS_OF(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

LIBRARY_OF(INDEXSHARE_OPERATORS, m) {
  m.def("structure_size(int which) -> int");
  m.def("pack(Tensor weight, Tensor matrix, Tensor(a!) packed) -> ()");
  m.def("packed_bytes(Tensor matrix) -> int");
  m.def("linear(Tensor x, Tensor matrix, Tensor(a!) output) -> ()");
  m.def(
      "moe_experts(Tensor hidden, Tensor experts, Tensor gates, Tensor gate_up, Tensor down, int num_experts, "
      "Tensor(a!) output) -> ()");
  m.def(
      "index_select(Tensor query, Tensor weights, Tensor keys, Tensor page_table, int page_size, int first_row, "
      "int context, Tensor(a!) selection) -> bool");
  m.def("mla_sparse(Tensor query, Tensor latents, int group, Tensor selection, float scale, Tensor(a!) output) -> ()");
  m.def(
      "mla_sparse_backward(Tensor query, Tensor latents, Tensor selection, Tensor gradient, float scale, "
      "Tensor(a!) query_gradient, Tensor(b!) latents_gradient) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) output) -> ()");
  m.def("rope_table(Tensor positions, float theta, Tensor(a!) cos, Tensor(b!) sin) -> ()");
  m.def(
      "run_model(Tensor model, Tensor inputs, Tensor positions, Tensor(a!) hidden, Tensor(b!) logits, Tensor lengths, "
      "Tensor page_table, int page_size, Tensor caches, int latent_group, int key_group, bool query_only, "
      "Tensor(c!) selections, Tensor(d!) seconds) -> int");
}

IMPLEMENTATIONS_OF(INDEXSHARE_OPERATORS, m) {
  m.impl("pack", TORCH_BOX(&pack_weight));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("index_select", TORCH_BOX(&index_select));
  m.impl("mla_sparse", TORCH_BOX(&mla_sparse));
  m.impl("mla_sparse_backward", TORCH_BOX(&mla_sparse_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_rows));
  m.impl("rope_table", TORCH_BOX(&rope_table));
  m.impl("run_model", TORCH_BOX(&run_model));
}
#define CATCH_ALL_OF(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CompositeExplicitAutograd, m)
CATCH_ALL_OF(INDEXSHARE_OPERATORS, m) { m.impl("structure_size", TORCH_BOX(&structure_size)); }
