// V F V^T per token for K directions: their covariance under p, divided by tau^2.
//
// Pairs of directions are computed in tiles: the diagonal tiles by the symmetric kernel, grid (T,
// tiles), the others, grid (T, pairs of tiles), with their mirror image. One direction is a tile.
#include <algorithm>
#include <climits>

#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

constexpr int kTile = 4;
constexpr int kThreads = 256;  // leaves enough registers to a tile

// Tile `pair` of the strict lower triangle, row by row.
__device__ inline void unrank(int pair, int& row, int& column) {
  row = 1;
  while (pair >= row) pair -= row++;
  column = pair;
}

template <class T, int kSide, bool kSymmetric>
__global__ void __launch_bounds__(kThreads, kSide == 1 ? 4 : 1)
    quadratic_kernel(const Problem problem, const Rows directions, int64_t direction_stride,
                     int count, int first, float* out) {
  using State = Moments<kSide, kSide, kSymmetric>;
  constexpr int kInputs = State::kInputs, kSize = Packet<T>::kSize;
  const int64_t token = blockIdx.x;
  int left = blockIdx.y, right = blockIdx.y;
  if constexpr (!kSymmetric) unrank(first + blockIdx.y, left, right);
  left *= kSide, right *= kSide;
  float* const covariance = out + token * count * count;

  State state = State::empty();
  float factor = 0.f;
  const float weight = problem.weight(token);
  if (weight != 0.f) {
    Inputs<kInputs> rows;
    T* const base = static_cast<T*>(directions.data);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      const int direction = k < kSide ? left + k : right + k - kSide;
      rows.rows[k] = directions;  // beyond the last direction: that one again, not written
      rows.rows[k].data = base + min(direction, count - 1) * direction_stride;
    }
    const Span span(problem.row<T>(problem.logits, token), problem.classes);
    const RowReader<T, kInputs> reader(problem, span, rows, token);
    const Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
    using Group = typename RowReader<T, kInputs>::Group;
    pipelined<(kInputs > 1 ? 1 : 2), Group>(
        span.groups, false, [&](int group, Group& held) { reader.load(group, held); },
        [&](int group, const Group& held) {
          float z[kSize];
          held.logits.get(z);
          state.update(exponent, z, [&](int j, auto& x) { held.get(j, x); }, 0);
        });
    state = block_merge(state.settled(exponent), exponent);
    const auto inverse_temperature = static_cast<float>(1.0 / problem.temperature);
    factor = weight / state.total(exponent) * inverse_temperature * inverse_temperature;
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = kSymmetric ? i : 0; j < kSide; ++j) {
      if (left + i >= count || right + j >= count) continue;
      const float value = factor == 0.f ? 0.f : state.c[i][j] * factor;
      covariance[(left + i) * count + right + j] = value;
      covariance[(right + j) * count + left + i] = value;
    }
}

}  // namespace

int softmax_fisher_quadratic(const SoftmaxFisher& problem, Rows directions,
                             int64_t direction_stride, int64_t count, float* out, void*,
                             void* stream) {
  const int64_t tiles = (count + kTile - 1) / kTile, pairs = tiles * (tiles - 1) / 2;
  constexpr int64_t kMost = 65535;  // of a grid in y
  if (count < 1 || tiles > kMost || pairs > INT_MAX) return cudaErrorInvalidValue;
  return dispatch(problem, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int64_t y, int64_t first = 0) {
      return launch(kernel, dim3(token_count(problem), static_cast<unsigned>(y)), kThreads, 0,
                    stream, Problem(problem), directions, direction_stride,
                    static_cast<int>(count), static_cast<int>(first), out);
    };
    if (count == 1) return run(quadratic_kernel<T, 1, true>, 1);
    int error = run(quadratic_kernel<T, kTile, true>, tiles);
    for (int64_t first = 0; first < pairs && !error; first += kMost)
      error = run(quadratic_kernel<T, kTile, false>, std::min(pairs - first, kMost), first);
    return error;
  });
}

}  // namespace fisherkern::cuda
