// The matrix unit of recent Xeons: how a thread sets it up, and how its operands lie.
//
// It multiplies a [16 rows][16 pairs] by a [16 pairs][16 columns] tile of bfloat16 into float, where
// a pair holds the same column of two tokens in 32 bits. A block of 32 tokens is 16 pairs, a slice
// 32 columns:
//
//   right panel  [slice][block][16 pairs][32 columns]
//   left panel   [slice][block][32 columns][16 pairs]
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd.h"

namespace fisherkern {
namespace FISHERKERN_ISA {

constexpr int W = 32;
constexpr int64_t kBlock = 32, kPairs = kBlock / 2;
constexpr int64_t kPairsOfBlock = W * kPairs;

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is this thread's for the lifetime of the object.
class MatrixUnit {
 public:
  MatrixUnit() {
    const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// A block of 32 columns as a right panel has it, into that of a left one.
inline void store_left(const uint32_t (*pairs)[W], uint32_t* to) {
  for (int half = 0; half < 2; ++half) {
    Vec<float> square[16];
    for (int p = 0; p < 16; ++p) std::memcpy(&square[p], pairs[p] + 16 * half, sizeof square[p]);
    transpose<float>(square);
    for (int c = 0; c < 16; ++c)
      std::memcpy(to + (16 * half + c) * kPairs, &square[c], sizeof square[c]);
  }
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
