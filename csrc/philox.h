// Philox-4x32-10 of Salmon et al. 2011, one uniform number per index.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FISHERKERN_HOST_DEVICE __host__ __device__
#else
#define FISHERKERN_HOST_DEVICE
#endif

namespace fisherkern {

// In [0, 1) with 53 random bits; equal to fisherkern.reference.philox_uniform.
FISHERKERN_HOST_DEVICE inline double philox_uniform(int64_t seed, int64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(uint64_t(seed) >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(uint64_t(index) >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) * 0x1p-53;
}

}  // namespace fisherkern
