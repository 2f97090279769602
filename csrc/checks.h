// From canonical tensors (fisherkern/ops/_kernels.py) to the plain arguments of the kernels. Python
// has checked what users passed; a message from here means that a caller broke the convention.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "softmax_fisher.h"

namespace fisherkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
  return DType::float32;
}

inline Rows rows_of(const Tensor& tensor, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must be [batches, tokens, classes]");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(tensor.size(i) == logits.size(i), name, " must have the shape of logits");
  STD_TORCH_CHECK(tensor.scalar_type() == logits.scalar_type(), name,
                  " must have the dtype of logits");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) == 1, name,
                  " must have a class stride of 1");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// A contiguous tensor of so many elements in the accumulation dtype (or the one given).
inline void* flat_of(const Tensor& tensor, const Tensor& logits, int64_t elements, const char* name,
                     std::optional<ScalarType> dtype = std::nullopt) {
  const auto accumulation = logits.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                       : ScalarType::Float;
  STD_TORCH_CHECK(tensor.scalar_type() == dtype.value_or(accumulation), name,
                  " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == elements, name,
                  " must be contiguous with ", elements, " elements");
  return tensor.data_ptr();
}

// Directions [batches, tokens, K, classes] for quadratic forms.
struct Directions {
  Rows rows;
  int64_t stride;
  int64_t count;
};

inline Directions directions_of(const Tensor& v, const Tensor& logits) {
  STD_TORCH_CHECK(v.dim() == 4 && v.size(0) == logits.size(0) && v.size(1) == logits.size(1) &&
                      v.size(3) == logits.size(2) && v.scalar_type() == logits.scalar_type(),
                  "v must be [batches, tokens, directions, classes] of the dtype of logits");
  STD_TORCH_CHECK(v.stride(3) == 1 || v.size(3) == 1, "v must have a class stride of 1");
  return {{v.data_ptr(), v.stride(0), v.stride(1)}, v.stride(2), v.size(2)};
}

inline SoftmaxFisher problem_of(const Tensor& logits, const std::optional<Tensor>& weights,
                                const std::optional<Tensor>& mask,
                                const std::optional<Tensor>& logsumexp, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.numel() > 0,
                  "logits must be [batches, tokens, classes] and not empty");
  SoftmaxFisher f{};
  f.batches = logits.size(0);
  f.tokens = logits.size(1);
  f.classes = logits.size(2);
  f.dtype = dtype_of(logits);
  f.temperature = temperature;
  f.logits = rows_of(logits, logits, "logits");
  const int64_t T = f.batches * f.tokens;
  if (weights) f.weights = flat_of(*weights, logits, T, "weights");
  if (mask)
    f.mask = static_cast<const uint8_t*>(flat_of(*mask, logits, T, "mask", ScalarType::Bool));
  if (logsumexp) f.logsumexp = flat_of(*logsumexp, logits, T, "logsumexp");
  return f;
}

inline SoftmaxFisherPanel panel_of(const Tensor& logits, const Tensor& reference,
                                   const Tensor& unit, const std::optional<Tensor>& scale,
                                   double temperature, bool transposed, const Tensor& out) {
  SoftmaxFisherPanel p{};
  p.rows = problem_of(logits, unit, {}, {}, temperature);
  const int64_t T = p.rows.batches * p.rows.tokens, V = p.rows.classes;
  p.reference = flat_of(reference, logits, T, "reference");
  if (scale) p.scale = flat_of(*scale, logits, V, "scale");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == (transposed ? V : T) &&
                      out.size(1) == (transposed ? T : V) &&
                      out.scalar_type() == unit.scalar_type() &&
                      (out.stride(1) == 1 || out.size(1) == 1),
                  "out must be [tokens, classes], or transposed, with a column stride of 1");
  p.out = out.data_ptr();
  p.stride = out.stride(0);
  p.transposed = transposed;
  return p;
}

}  // namespace fisherkern
