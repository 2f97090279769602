// The moving average of a factor over tiles of a float32 product, and the mirror of its triangle.
#include <cmath>

#include "covariance.h"
#include "row_lanes.cuh"

namespace fisherkern::cuda {
namespace {

constexpr int kColumns = 4;  // per thread: 16 bytes of the tile

// Coefficients and sums are doubles: bound by memory all the same, and rounded once.
template <class E, bool kSquares>
__global__ void __launch_bounds__(kRowThreads) update_kernel(const FactorUpdate u, int lanes) {
  const int64_t row = RowLanes::row(lanes);
  const int64_t heads = kSquares ? 1 : u.heads;
  if (row >= heads * u.rows) return;
  const int64_t head = row / u.rows, i = row % u.rows;
  const int64_t diagonal = u.first_row + i - u.first_column;  // column of the tile
  const int64_t columns = u.lower && diagonal < u.columns ? diagonal + 1 : u.columns;
  const float* tile = u.tile + head * u.tile_head + i * u.tile_row;
  E* factor = static_cast<E*>(u.factor) + head * u.factor_head +
              (u.first_row + i) * u.factor_row + u.first_column;
  const double alpha = *static_cast<const E*>(u.alpha);
  const bool vectors = aligned16(tile) && aligned16(factor) && (!kSquares || u.tile_head % 4 == 0);
  for (int64_t c = threadIdx.x % lanes * kColumns; c < columns; c += lanes * kColumns) {
    const bool whole = vectors && c + kColumns <= columns;
    double sum[kColumns] = {};
    for (int64_t h = 0; h < (kSquares ? u.heads : 1); ++h) {
      const float* from = tile + h * u.tile_head + c;
      Sixteen<float> q{};
      if (whole) {
        q = *reinterpret_cast<const Sixteen<float>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (c + j < columns) q.value[j] = from[j];
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const double t = q.value[j];
        sum[j] += kSquares ? t * t : t;
      }
    }
    constexpr int kSize = Sixteen<E>::kSize;
#pragma unroll
    for (int k = 0; k < kColumns; k += kSize) {
      Sixteen<E> q{};
      E* to = factor + c + k;
      if (u.beta != 0) {
        if (whole) {
          q = *reinterpret_cast<const Sixteen<E>*>(to);
        } else {
#pragma unroll
          for (int j = 0; j < kSize; ++j)
            if (c + k + j < columns) q.value[j] = to[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        q.value[j] = static_cast<E>(u.beta * q.value[j] + alpha * sum[k + j]);
      if (whole) {
        *reinterpret_cast<Sixteen<E>*>(to) = q;
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          if (c + k + j < columns) to[j] = q.value[j];
      }
    }
  }
}

template <class E>
int launch_update(const FactorUpdate& u, void* stream) {
  const RowLanes rows((u.squares ? 1 : u.heads) * u.rows, u.columns, kColumns);
  if (!rows.fits()) return cudaErrorInvalidValue;
  const auto kernel = u.squares ? update_kernel<E, true> : update_kernel<E, false>;
  return launch(kernel, rows.grid(), kRowThreads, 0, stream, u, rows.lanes);
}

// ---- mirror -------------------------------------------------------------------------------------

constexpr int kTile = 32, kTileRows = 8;

// A tile on or below the diagonal goes through shared memory, so that both sides are read and
// written along their rows.
template <class E>
__global__ void __launch_bounds__(kTile* kTileRows)
    mirror_kernel(const Matrices m, int64_t tiles_per_head) {
  auto* tile = reinterpret_cast<E*>(dynamic_shared());
  constexpr int kPitch = kTile + 1;  // columns of it are in different banks
  const int64_t head = blockIdx.x / tiles_per_head, index = blockIdx.x % tiles_per_head;
  // index = i (i + 1) / 2 + j with j <= i; the root is right but for its last bit
  auto i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1) - 1) / 2);
  while (i * (i + 1) / 2 > index) --i;
  while ((i + 1) * (i + 2) / 2 <= index) ++i;
  const int64_t j = index - i * (i + 1) / 2;
  E* const a = static_cast<E*>(m.data) + head * m.head_stride;
  const int lane = threadIdx.x % kTile, first = threadIdx.x / kTile;
  for (int r = first; r < kTile; r += kTileRows) {
    const int64_t row = i * kTile + r, column = j * kTile + lane;
    if (row < m.width && column < row)
      tile[r * kPitch + lane] = a[row * m.row_stride + column * m.column_stride];
  }
  __syncthreads();
  for (int r = first; r < kTile; r += kTileRows) {
    const int64_t row = j * kTile + r, column = i * kTile + lane;
    if (column < m.width && row < column)
      a[row * m.row_stride + column * m.column_stride] = tile[lane * kPitch + r];
  }
}

template <class E>
int launch_mirror(const Matrices& m, void* stream) {
  const int64_t side = (m.width + kTile - 1) / kTile, tiles = side * (side + 1) / 2;
  if (tiles * m.heads >= 1ll << 31) return cudaErrorInvalidValue;
  return launch(mirror_kernel<E>, dim3(static_cast<unsigned>(tiles * m.heads)), kTile * kTileRows,
                kTile * (kTile + 1) * sizeof(E), stream, m, tiles);
}

}  // namespace

int factor_update(const FactorUpdate& update, void* stream) {
  switch (update.dtype) {
    case DType::float32: return launch_update<float>(update, stream);
    case DType::float64: return launch_update<double>(update, stream);
    default: return cudaErrorInvalidValue;
  }
}

int mirror(const Matrices& factor, void* stream) {
  switch (factor.dtype) {
    case DType::float32: return launch_mirror<float>(factor, stream);
    case DType::float64: return launch_mirror<double>(factor, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fisherkern::cuda
