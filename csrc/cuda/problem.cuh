// The arguments of a launch in the form the kernels want, and the choice of dtype and block size.
#pragma once
#include <cmath>
#include <cstdint>

#include "launch.h"
#include "packets.cuh"

namespace fisherkern::cuda {

struct Problem {
  int64_t tokens;  // of one batch
  int classes;
  float scale, scale_low;  // log2(e) / temperature and what rounding it lost
  double temperature;
  Rows logits;
  const float* weights;
  const uint8_t* mask;
  const float* logsumexp;

  explicit Problem(const SoftmaxFisher& p)
      : tokens(p.tokens),
        classes(static_cast<int>(p.classes)),
        scale(static_cast<float>(1.4426950408889634 / p.temperature)),
        scale_low(static_cast<float>(1.4426950408889634 / p.temperature - scale)),
        temperature(p.temperature),
        logits(p.logits),
        weights(static_cast<const float*>(p.weights)),
        mask(p.mask),
        logsumexp(static_cast<const float*>(p.logsumexp)) {}

  // Tokens are counted in 32 bits (`supported`): dividing 64 would take a hundred instructions.
  template <class T>
  __device__ T* row(const Rows& rows, int64_t token) const {
    const auto index = static_cast<uint32_t>(token), inner = static_cast<uint32_t>(tokens);
    const uint32_t batch = index / inner;
    return static_cast<T*>(rows.data) + batch * rows.batch_stride +
           (index - batch * inner) * rows.token_stride;
  }

  __device__ float weight(int64_t token) const {
    if (weights) return weights[token];
    return mask && !mask[token] ? 0.f : 1.f;
  }
};

// Class indices and grid.x are 32-bit; offsets of rows are not.
inline bool supported(const SoftmaxFisher& p) {
  return p.dtype != DType::float64 && p.classes <= (1 << 30) && p.batches * p.tokens < (1ll << 31);
}

inline unsigned token_count(const SoftmaxFisher& p) {
  return static_cast<unsigned>(p.batches * p.tokens);
}

// Threads of a block that reads a row alone. Merging their sums takes as long as reading some 50 KB:
// long rows do not get more, but other blocks to run beside. H200, stats of (8192, 50257) float32:
// 0.45 of copy bandwidth with 1024 threads, 0.74 with 256, 0.87 with 128.
constexpr int kLoneThreads = 128;

template <class F>
int dispatch(const SoftmaxFisher& p, F f) {
  if (!supported(p)) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::float32: return f(float{});
    case DType::bfloat16: return f(__nv_bfloat16{});
    case DType::float16: return f(__half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fisherkern::cuda
