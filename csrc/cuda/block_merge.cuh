// Merging one state per thread into one per block, always in the same order.
//
// A state is a plain struct of 32-bit words with `merge(other, exponent)`. Merges round differently
// when swapped, so one thread's result is broadcast and all threads go on with the same bits.
#pragma once
#include <cstring>

#include "exponent.cuh"

namespace fisherkern::cuda {

template <class State>
__device__ inline State shuffle_down(const State& state, int offset) {
  static_assert(sizeof(State) % 4 == 0);
  constexpr int kWords = sizeof(State) / 4;
  uint32_t words[kWords];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(~0u, words[i], offset);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Valid in lane 0.
template <class State>
__device__ inline State warp_merge(State state, const Exponent& exponent) {
#pragma unroll 1
  for (int offset = 16; offset > 0; offset /= 2)
    state.merge(shuffle_down(state, offset), exponent);
  return state;
}

// Valid in every thread; the block is whole warps. Also a barrier for other shared memory.
template <class State>
__device__ inline State block_merge(State state, const Exponent& exponent, State* warps) {
  state = warp_merge(state, exponent);
  __syncthreads();  // a previous merge may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int count = static_cast<int>(blockDim.x) / 32;
    state = static_cast<int>(threadIdx.x) < count ? warps[threadIdx.x] : State::empty();
    state = warp_merge(state, exponent);
    __syncwarp();
    if (threadIdx.x == 0) warps[0] = state;
  }
  __syncthreads();
  return warps[0];
}

template <class State>
__device__ inline State block_merge(State state, const Exponent& exponent) {
  __shared__ State warps[32];
  return block_merge(state, exponent, warps);
}

}  // namespace fisherkern::cuda
