// The covariance launchers as native ops. fisherkern/ops/_cuda_kernels.py calls them around products of
// torch; a message from here means that it broke the convention.
#include <torch/csrc/stable/library.h>


#include "../checks.h"
#include "covariance.h"
#include "torch_launch.h"

namespace fisherkern::cuda {
namespace {

using Optional = std::optional<Tensor>;

void check_factor(const Tensor& factor, const char* shape) {
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float ||
                      factor.scalar_type() == ScalarType::Double,
                  "factor must be ", shape, ", float32 or float64");
}

// Values per token [heads, batches, tokens] with any strides.
void check_per_token(const Tensor& values, const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(values.dim() == 3 && values.scalar_type() == dtype, name,
                  " must be [heads, batches, tokens] of its dtype");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(values.size(i) == x.size(i), name, " must have the leading shape of x");
}

void pack(const Tensor& x, const Optional& mask, const Optional& weights, bool bias, bool squares,
          int64_t first_token, Tensor panel) {
  // strides of no columns, or of one, say nothing
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) * x.size(1) * x.size(2) > 0 &&
                      (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(3) > 0 || bias),
                  "x must be [heads, batches, tokens, columns] with a column stride of 1");
  STD_TORCH_CHECK(!(mask && weights), "mask and weights exclude each other");
  Activations a{};
  a.data = x.data_ptr();
  a.dtype = dtype_of(x);
  a.tokens = x.size(2);
  a.heads = x.size(0);
  a.columns = x.size(3);
  a.head_stride = x.stride(0);
  a.batch_stride = x.stride(1);
  a.token_stride = x.stride(2);
  a.bias = bias;
  a.squares = squares;

  TokenWeights w{};
  if (mask) check_per_token(*mask, x, ScalarType::Bool, "mask");
  if (weights) check_per_token(*weights, x, ScalarType::Float, "weights");
  if (mask) w.mask = static_cast<const uint8_t*>(mask->data_ptr());
  if (weights) w.weights = static_cast<const float*>(weights->data_ptr());
  if (mask || weights) {
    const Tensor& given = mask ? *mask : *weights;
    w.head_stride = given.stride(0);
    w.batch_stride = given.stride(1);
    w.token_stride = given.stride(2);
  }

  STD_TORCH_CHECK(panel.dim() == 3 && panel.is_contiguous() && panel.size(0) == a.heads &&
                      panel.size(2) >= a.width() && panel.size(2) % 8 == 0,
                  "panel must be contiguous [heads, tokens, 8 n >= width]");
  STD_TORCH_CHECK(first_token >= 0 && first_token + panel.size(1) <= x.size(1) * x.size(2),
                  "the tokens of the panel must be tokens of x");
  Panel p{};
  p.data = panel.data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.data) % 16 == 0, "panel must be aligned");
  p.dtype = dtype_of(panel);
  p.first_token = first_token;
  p.tokens = panel.size(1);
  p.row = panel.size(2);
  run_on_stream(x, [&](void* stream) { return covariance_pack(a, w, p, stream); });
}

void update(const Tensor& tile, const Tensor& alpha, double beta, int64_t first_row,
            int64_t first_column, bool lower, bool squares, Tensor factor) {
  check_factor(factor, "[heads, rows, columns]");
  STD_TORCH_CHECK(factor.dim() == 3 && (factor.stride(2) == 1 || factor.size(2) == 1),
                  "factor must be [heads, rows, columns] with a column stride of 1");
  STD_TORCH_CHECK(tile.dim() == 3 && tile.scalar_type() == ScalarType::Float &&
                      (tile.stride(2) == 1 || tile.size(2) == 1) && tile.numel() > 0,
                  "tile must be float32 [heads, rows, columns] with a column stride of 1");
  STD_TORCH_CHECK(factor.size(0) == (squares ? 1 : tile.size(0)) && first_row >= 0 &&
                      first_column >= 0 && first_row + tile.size(1) <= factor.size(1) &&
                      first_column + tile.size(2) <= factor.size(2),
                  "the tile must lie inside the factor");
  STD_TORCH_CHECK(!lower || first_row >= first_column, "a row of the tile is above the diagonal");
  FactorUpdate u{};
  u.tile = static_cast<const float*>(tile.data_ptr());
  u.heads = tile.size(0);
  u.rows = tile.size(1);
  u.columns = tile.size(2);
  u.tile_head = tile.stride(0);
  u.tile_row = tile.stride(1);
  u.factor = factor.data_ptr();
  u.dtype = dtype_of(factor);
  u.factor_head = factor.stride(0);
  u.factor_row = factor.stride(1);
  u.first_row = first_row;
  u.first_column = first_column;
  u.alpha = flat_of(alpha, factor, 1, "alpha");
  u.beta = beta;
  u.lower = lower;
  u.squares = squares;
  run_on_stream(factor, [&](void* stream) { return factor_update(u, stream); });
}

void mirror_of(Tensor factor) {
  check_factor(factor, "[heads, columns, columns]");
  STD_TORCH_CHECK(factor.dim() == 3 && factor.size(1) == factor.size(2) && factor.numel() > 0,
                  "factor must be [heads, columns, columns] and not empty");
  const Matrices m{factor.data_ptr(), dtype_of(factor),  factor.size(0),  factor.size(1),
                   factor.stride(0),  factor.stride(1), factor.stride(2)};
  run_on_stream(factor, [&](void* stream) { return mirror(m, stream); });
}

}  // namespace
}  // namespace fisherkern::cuda

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CUDA, m) {
  m.impl("covariance_pack", TORCH_BOX(&fisherkern::cuda::pack));
  m.impl("factor_update", TORCH_BOX(&fisherkern::cuda::update));
  m.impl("mirror", TORCH_BOX(&fisherkern::cuda::mirror_of));
}
