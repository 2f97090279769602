// Panels of scaled probabilities, unit scale exp((z - reference) / tau): [T, V] or transposed.
#include "exponent.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8;

// What does not depend on the dtype.
struct Panel {
  const float* reference;
  const float* scale;
  float* out;
  int64_t stride;
  int64_t tokens;  // of all batches
  int64_t class_tiles;
  bool transposed;
};

// A tile of tokens and classes. Transposed, it goes through shared memory: logits are read and the
// panel is written along their rows.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows)
    panel_kernel(const Problem problem, const Panel panel) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared());
  constexpr int kPitch = kTile + 1;  // columns of it are in different banks
  const int64_t first_token = blockIdx.x / panel.class_tiles * kTile;
  const int64_t first_class = blockIdx.x % panel.class_tiles * kTile;
  const int lane = threadIdx.x % kTile;
  const Exponent exponent(problem, nullptr);
  const int64_t c = first_class + lane;
  const float scale = c < problem.classes && panel.scale ? panel.scale[c] : 1.f;
  for (int r = threadIdx.x / kTile; r < kTile; r += kTileRows) {
    const int64_t token = first_token + r;
    if (token >= panel.tokens || c >= problem.classes) continue;
    const float unit = problem.weight(token);
    float value = 0.f;  // whatever the row holds
    if (unit != 0.f) {
      const T* z = problem.row<const T>(problem.logits, token);
      value = exponent.power(load_scalar(z + c), panel.reference[token]) * unit * scale;
    }
    if (panel.transposed)
      tile[r * kPitch + lane] = value;
    else
      panel.out[token * panel.stride + c] = value;
  }
  if (!panel.transposed) return;
  __syncthreads();
  const int64_t token = first_token + lane;
  for (int r = threadIdx.x / kTile; r < kTile; r += kTileRows) {
    if (token < panel.tokens && first_class + r < problem.classes)
      panel.out[(first_class + r) * panel.stride + token] = tile[lane * kPitch + r];
  }
}

}  // namespace

int softmax_fisher_panel(const SoftmaxFisherPanel& p, void* stream) {
  const int64_t tokens = p.rows.batches * p.rows.tokens;
  const int64_t class_tiles = (p.rows.classes + kTile - 1) / kTile;
  const int64_t blocks = (tokens + kTile - 1) / kTile * class_tiles;
  if (blocks >= 1ll << 31) return cudaErrorInvalidValue;
  const Panel panel{static_cast<const float*>(p.reference),
                    static_cast<const float*>(p.scale),
                    static_cast<float*>(p.out),
                    p.stride,
                    tokens,
                    class_tiles,
                    p.transposed};
  return dispatch(p.rows, [&](auto t) {
    return launch(panel_kernel<decltype(t)>, dim3(static_cast<unsigned>(blocks)), kTile * kTileRows,
                  kTile * (kTile + 1) * sizeof(float), stream, Problem(p.rows), panel);
  });
}

}  // namespace fisherkern::cuda
