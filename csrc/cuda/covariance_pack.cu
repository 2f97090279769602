// Rows of activations into operands of products: mask, weights, squares and the bias enter.
#include "covariance.h"
#include "packets.cuh"
#include "row_lanes.cuh"

namespace fisherkern::cuda {
namespace {

constexpr int kColumns = 8;  // per thread: 16 bytes of half precision

__device__ inline float weight_of(const TokenWeights& w, int64_t offset) {
  if (w.weights) return w.weights[offset];
  return w.mask && !w.mask[offset] ? 0.f : 1.f;
}

// Columns [c, c + 8) of a row of x; zero past its end, but for the bias.
template <class T>
__device__ void load_columns(const Activations& x, const T* row, int64_t c,
                             float (&value)[kColumns]) {
  constexpr int kSize = Packet<T>::kSize;
  if (aligned16(row) && c + kColumns <= x.columns) {
#pragma unroll
    for (int k = 0; k < kColumns; k += kSize) {
      const uint4 q = *reinterpret_cast<const uint4*>(row + c + k);
      const Packet<T> packet{{q.x, q.y, q.z, q.w}};
#pragma unroll
      for (int j = 0; j < kSize; ++j) value[k + j] = packet.get(j);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      value[j] = c + j < x.columns ? load_scalar(row + c + j) : 0.f;
      if (x.bias && c + j == x.columns) value[j] = 1.f;
    }
  }
}

template <class T, class P>
__global__ void __launch_bounds__(kRowThreads)
    pack_kernel(const Activations x, const TokenWeights weights, const Panel panel, int lanes) {
  const int64_t row = RowLanes::row(lanes);
  if (row >= x.heads * panel.tokens) return;
  const int64_t head = row / panel.tokens, index = row % panel.tokens;
  const int64_t token = panel.first_token + index;
  const int64_t batch = token / x.tokens, position = token % x.tokens;
  const float weight = weight_of(weights, head * weights.head_stride + batch * weights.batch_stride +
                                              position * weights.token_stride);
  const T* from = static_cast<const T*>(x.data) + head * x.head_stride + batch * x.batch_stride +
                  position * x.token_stride;
  const int64_t width = x.columns + x.bias;
  P* to = static_cast<P*>(panel.data) + row * panel.row;
  for (int64_t c = threadIdx.x % lanes * kColumns; c < panel.row; c += lanes * kColumns) {
    float value[kColumns] = {};
    if (weight != 0.f) {  // true of NaN
      load_columns(x, from, c, value);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (x.squares) value[j] *= value[j];
        value[j] *= weight;
        // past the width: a weight of NaN stays out of it
        if (c + j >= width) value[j] = 0.f;
      }
    }
    constexpr int kSize = Packet<P>::kSize;
#pragma unroll
    for (int k = 0; k < kColumns; k += kSize) {
      Packet<P> packet{};
#pragma unroll
      for (int j = 0; j < kSize; ++j) packet.set(j, value[k + j]);
      *reinterpret_cast<uint4*>(to + c + k) =
          make_uint4(packet.word[0], packet.word[1], packet.word[2], packet.word[3]);
    }
  }
}

template <class T, class P>
int launch_pack(const Activations& x, const TokenWeights& weights, const Panel& panel,
                void* stream) {
  const RowLanes rows(x.heads * panel.tokens, panel.row, kColumns);
  if (!rows.fits()) return cudaErrorInvalidValue;
  return launch(pack_kernel<T, P>, rows.grid(), kRowThreads, 0, stream, x, weights, panel,
                rows.lanes);
}

}  // namespace

int covariance_pack(const Activations& x, const TokenWeights& weights, const Panel& panel,
                    void* stream) {
  if (panel.row % kColumns || panel.row < x.width()) return cudaErrorInvalidValue;
  if (panel.dtype == DType::float32) {
    switch (x.dtype) {
      case DType::float32: return launch_pack<float, float>(x, weights, panel, stream);
      case DType::bfloat16: return launch_pack<__nv_bfloat16, float>(x, weights, panel, stream);
      case DType::float16: return launch_pack<__half, float>(x, weights, panel, stream);
      default: return cudaErrorInvalidValue;
    }
  }
  // neither a weighted value nor a square is one of half precision
  if (panel.dtype != x.dtype || weights.weights || x.squares) return cudaErrorInvalidValue;
  if (panel.dtype == DType::bfloat16)
    return launch_pack<__nv_bfloat16, __nv_bfloat16>(x, weights, panel, stream);
  if (panel.dtype != DType::float16) return cudaErrorInvalidValue;
  return launch_pack<__half, __half>(x, weights, panel, stream);
}

}  // namespace fisherkern::cuda
