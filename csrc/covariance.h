// The covariance kernels: sums of outer products of rows, with the operands of a panel product. Free
// of torch headers.
//
//   symmetric   factor[h] <- beta factor[h] + alpha sum_t w_t x_th x_th^T, lower triangle
//   cross       factor <- beta factor + alpha sum_t w_t g_t x_t^T, and two squares of it
//
// The calling convention is that of fisherkern/ops/_kernels.py. x may have a last coordinate 1 (the
// bias) that is not in memory.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fisherkern {

// Rows [batches, tokens, heads, columns]; strides in elements, the column stride is 1.
struct Activations {
  const void* data;
  DType dtype;
  int64_t tokens;  // per batch
  int64_t heads;
  int64_t columns;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
  bool bias;     // one more column, of ones
  bool squares;  // of the elements

  int64_t width() const { return columns + bias; }
};

}  // namespace fisherkern
