// Products with the weight of a head as implementations of the native ops.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../head.h"
#include "capability.h"
#include "head_products.h"
#include "panel_tasks.h"

namespace fisherkern {
namespace {

Matrix matrix_of(const Tensor& tensor, int64_t rows, int64_t columns, ScalarType dtype,
                 const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                      tensor.scalar_type() == dtype &&
                      (tensor.stride(1) == 1 || tensor.size(1) == 1),
                  name, " has the wrong shape, dtype or strides");
  return {tensor.data_ptr(), tensor.stride(0)};
}

// Operands of these roles; the rows [T, V] and the result are in the accumulation dtype.
Head head_of(const Tensor& like, int64_t tokens, int64_t classes, int64_t features) {
  STD_TORCH_CHECK(tokens > 0 && classes > 0 && features > 0, "nothing to multiply");
  Head head{};
  head.dtype = dtype_of(like);
  head.tokens = tokens;
  head.classes = classes;
  head.features = features;
  return head;
}

ScalarType accumulation_of(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a thread: it asks for the operands of the next while it is at one.
constexpr int64_t kTasksInARow = 4;

void logits(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
            std::optional<double> softcap, Tensor out) {
  const int64_t T = hidden.size(0), V = weight.size(0), d = weight.size(1);
  Head head = head_of(weight, T, V, d);
  head.hidden = matrix_of(hidden, T, d, weight.scalar_type(), "hidden");
  head.weight = matrix_of(weight, V, d, weight.scalar_type(), "weight");
  head.rows = matrix_of(out, T, V, accumulation_of(weight), "out");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == V &&
                        bias->scalar_type() == weight.scalar_type(),
                    "bias has the wrong shape or dtype");
    head.bias = bias->data_ptr();
    head.bias_stride = bias->stride(0);
  }
  head.softcap = softcap.value_or(0);
  const int64_t slivers = FISHERKERN_KERNEL(head_token_slivers)(head);
  const int64_t bytes = FISHERKERN_KERNEL(head_token_sliver_bytes)(head);
  const PanelMemory panel(slivers * bytes);
  const auto pack = FISHERKERN_KERNEL(head_pack_tokens);
  share_out(slivers, [&](int64_t i) { pack(head, panel.data(), i); });
  const auto kernel = FISHERKERN_KERNEL(head_logits);
  const int64_t tasks = FISHERKERN_KERNEL(head_logits_tasks)(head);
  share_out((tasks + kTasksInARow - 1) / kTasksInARow, [&](int64_t i) {
    const int64_t last = std::min((i + 1) * kTasksInARow, tasks);
    for (int64_t task = i * kTasksInARow; task < last; ++task)
      kernel(head, panel.data(), task, task + 1 < last);
  });
}

void pull(const Tensor& rows, const Tensor& weight, Tensor out) {
  constexpr int64_t kSplits = 16;
  const int64_t T = rows.size(0), V = weight.size(0), d = weight.size(1);
  Head head = head_of(weight, T, V, d);
  const ScalarType accumulation = accumulation_of(weight);
  head.rows = matrix_of(rows, T, V, accumulation, "rows");
  head.weight = matrix_of(weight, V, d, weight.scalar_type(), "weight");
  head.out = matrix_of(out, T, d, accumulation, "out");
  // partial sums take an eighth of the memory of the rows at most
  const int64_t splits = std::clamp<int64_t>(V / (8 * d), 1, kSplits);
  const int64_t width = head.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  const PanelMemory partial(splits > 1 ? splits * T * d * width : 0);
  const auto kernel = FISHERKERN_KERNEL(head_pull);
  share_out(FISHERKERN_KERNEL(head_pull_tasks)(head, splits),
            [&](int64_t task) { kernel(head, splits, partial.data(), task); });
  if (splits == 1) return;
  const auto add = FISHERKERN_KERNEL(head_add_splits);
  share_out(T, [&](int64_t token) { add(head, splits, partial.data(), token); });
}

void squares(const Tensor& rows, const Tensor& hidden, double beta, Tensor out) {
  const int64_t T = rows.size(0), V = rows.size(1), d = hidden.size(1);
  Head head = head_of(hidden, T, V, d);
  const ScalarType accumulation = accumulation_of(hidden);
  head.rows = matrix_of(rows, T, V, accumulation, "rows");
  head.hidden = matrix_of(hidden, T, d, hidden.scalar_type(), "hidden");
  head.out = matrix_of(out, V, d, accumulation, "out");
  head.beta = beta;
  const int64_t slivers = FISHERKERN_KERNEL(head_feature_slivers)(head);
  const int64_t bytes = FISHERKERN_KERNEL(head_feature_sliver_bytes)(head);
  const PanelMemory panel(slivers * bytes);
  const auto pack = FISHERKERN_KERNEL(head_pack_squares);
  share_out(slivers, [&](int64_t i) { pack(head, panel.data(), i); });
  const auto kernel = FISHERKERN_KERNEL(head_squares);
  share_out(FISHERKERN_KERNEL(head_squares_tasks)(head),
            [&](int64_t task) { kernel(head, panel.data(), task); });
}

}  // namespace
}  // namespace fisherkern

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CPU, m) {
  m.impl("head_logits", TORCH_BOX(&fisherkern::logits));
  m.impl("head_pull", TORCH_BOX(&fisherkern::pull));
  m.impl("head_squares", TORCH_BOX(&fisherkern::squares));
}
