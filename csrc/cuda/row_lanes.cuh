// Rows shared out to blocks: `lanes` neighbouring threads take a row, each some columns at a time.
//
// Short rows (heads of 64 columns) then fill a block together, long ones have a block each.
#pragma once
#include <cstdint>

#include "launch.h"

namespace fisherkern::cuda {

constexpr int kRowThreads = 256;

struct RowLanes {
  int lanes;
  int64_t blocks;

  RowLanes(int64_t rows, int64_t columns, int columns_per_thread) : lanes(1) {
    while (lanes < kRowThreads && lanes * columns_per_thread < columns) lanes *= 2;
    const int64_t per_block = kRowThreads / lanes;
    blocks = (rows + per_block - 1) / per_block;
  }

  // A grid has 32-bit indices; offsets do not.
  bool fits() const { return blocks < (1ll << 31); }
  dim3 grid() const { return dim3(static_cast<unsigned>(blocks)); }

  __device__ static int64_t row(int lanes) {
    return static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  }
};

// 16 bytes of one type, moved at once.
template <class E>
struct alignas(16) Sixteen {
  static constexpr int kSize = 16 / sizeof(E);
  E value[kSize];
};

__device__ inline bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace fisherkern::cuda
