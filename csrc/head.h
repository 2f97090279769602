// Products of hidden states and logits with the weight of a head, free of torch headers.
//
// The calling convention is that of fisherkern/ops/_kernels.py: operands are canonical, values are
// checked, T, V and d are at least 1. Results are in the accumulation type (double for double, else
// float), in which everything is added up.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fisherkern {

// [rows, columns]; strides in elements, that of columns is 1.
struct Matrix {
  void* data;
  int64_t stride;
};

struct Head {
  DType dtype;  // of hidden states, W and b
  int64_t tokens;
  int64_t classes;
  int64_t features;  // d
  Matrix hidden;     // [T, d]
  Matrix weight;     // [V, d]
  const void* bias;  // [V], or null
  int64_t bias_stride;
  double softcap;  // 0: none
  Matrix rows;     // logits, or what is made of them [T, V], in the accumulation type
  Matrix out;      // [T, d] or [V, d], in the accumulation type
  double beta;     // of what is in `out` already
};

}  // namespace fisherkern
