// The softmax Fisher kernels: their arguments and entry points, free of torch headers.
//
// F = (diag p - p p^T) / tau^2 with p = softmax(z / tau), for T = batches * tokens rows of V classes.
// The calling convention is that of fisherkern/ops/_kernels.py: operands are canonical, values are
// checked, T and V are at least 1, a row of weight 0 is not read and its result is zero.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fisherkern {

// A [batches, tokens, V] operand; strides in elements, the class stride is 1.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
};

// Per-token pointers are contiguous [T] in the accumulation dtype (float; double for float64) or
// null. `weights` multiply a row; `mask` (bool) only says whether it counts. Never both.
struct SoftmaxFisher {
  int64_t batches;
  int64_t tokens;
  int64_t classes;
  DType dtype;
  double temperature;
  Rows logits;
  const void* weights;
  const uint8_t* mask;
  const void* logsumexp;
  bool past_caches;  // CPU: how to write row results, see cpu/destination.h
};

// A panel of the factor U of the mean Fisher: unit_t scale_c exp((z_tc - reference_t) / tau). The
// units, [T] like the weights of a token, are those of `rows`.
struct SoftmaxFisherPanel {
  SoftmaxFisher rows;
  const void* reference;  // [T]
  const void* scale;      // [V], or null for ones
  void* out;              // [T, V], or [V, T] if transposed
  int64_t stride;         // of its rows
  bool transposed;
  // CPU: at_label_t scale_c is the element at the label
  const int64_t* labels;  // [T], or null
  const void* at_label;   // [T]
  // CPU: classes of a slice, [slices][tokens][slice], and elements between slices; 0: all in one
  int64_t slice;
  int64_t slice_stride;
};

constexpr int64_t kIgnoreIndex = -100;  // the label of a token that has none
constexpr int64_t kStats = 5;           // logsumexp, entropy, trace, tr F^2, largest probability

}  // namespace fisherkern
