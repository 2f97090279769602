// Launchers of the covariance family: what stands before and behind a product of cuBLAS.
//
//   covariance_pack   rows of activations -> operands of a product
//   factor_update     tiles of a product  -> the moving average in the factor
//   mirror            lower triangle      -> upper triangle
//
// The schedule is fisherkern/ops/_cuda_kernels.py. Each launcher returns a cudaError_t as int, enqueues
// on `stream`, allocates nothing, does not wait for the device, and may be captured in a CUDA graph.
#pragma once
#include "../covariance.h"

namespace fisherkern::cuda {

// Per token of x [heads, batches, tokens], strides in elements; at most one pointer is not null.
struct TokenWeights {
  const float* weights;
  const uint8_t* mask;
  int64_t head_stride;
  int64_t batch_stride;
  int64_t token_stride;
};

// Operands [heads, tokens, row] of a product, contiguous and aligned to 16 bytes: `tokens` of
// batches * tokens rows of x, from first_token on. Columns past the width of x are zero.
struct Panel {
  void* data;
  DType dtype;  // float32, or that of x where it holds the value: no weights, no squares
  int64_t first_token;
  int64_t tokens;
  int64_t row;
};

// The value is that of x, squared with x.squares, 1 in the column of a bias; times its weight, in
// float32. Tokens of weight 0 are not read.
int covariance_pack(const Activations& x, const TokenWeights& weights, const Panel& panel,
                    void* stream);

// factor[h, r, c] <- beta factor + alpha tile[h, r - first_row, c - first_column], with `lower` only
// where c <= r. With `squares` the factor has one head and gets the sum over the heads of the tile of
// tile^2, in their order. The factor is not read where beta is 0. Strides in elements, columns 1.
struct FactorUpdate {
  const float* tile;
  int64_t heads, rows, columns;  // of the tile
  int64_t tile_head, tile_row;   // its strides
  void* factor;
  DType dtype;  // of the factor and alpha: float32 or float64
  int64_t factor_head, factor_row;
  int64_t first_row, first_column;
  const void* alpha;  // one element, on the device
  double beta;
  bool lower, squares;
};
int factor_update(const FactorUpdate& update, void* stream);

// Copies what is below the diagonal onto what is above; factor [heads, width, width], any strides.
struct Matrices {
  void* data;
  DType dtype;  // float32 or float64
  int64_t heads, width;
  int64_t head_stride, row_stride, column_stride;
};
int mirror(const Matrices& factor, void* stream);

}  // namespace fisherkern::cuda
