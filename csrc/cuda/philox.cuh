// Philox-4x32-10 (Salmon et al. 2011), bit for bit fisherkern.reference.philox_uniform.
#pragma once
#include <cstdint>

#include "launch.h"

namespace fisherkern::cuda {

// One double in [0, 1) with 53 random bits: key = seed, counter = (halves of index, 0, 0).
__device__ inline double philox_uniform(int64_t seed, int64_t index) {
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  auto c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) * 0x1p-53;
}

}  // namespace fisherkern::cuda
