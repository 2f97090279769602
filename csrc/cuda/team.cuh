// A row and the blocks that share it.
//
// On sm_90 a cluster of blocks keeps the row in shared memory, a slice of it in each, brought by the
// bulk copy engine: memory is read once, and several blocks of a multiprocessor wait, add and store in
// turn. Elsewhere, and where the row does not fit, one block reads it from memory twice.
#pragma once
#include <algorithm>

#include "block_merge.cuh"
#include "packets.cuh"
#include "problem.cuh"

namespace fisherkern::cuda {

constexpr int kMaxCluster = 8;  // what every sm_90 offers
constexpr int kTeamThreads = 256;

// How the rows of a launch are shared out. cluster = 0: not kept in shared memory.
struct Slices {
  int cluster = 0, threads = kTeamThreads;
  size_t bytes = 0;

  template <class T>
  static Slices of(const SoftmaxFisher& p, int operands, size_t scratch) {
    Slices s;
    const int64_t groups = p.classes / Packet<T>::kSize + 2;  // with a part at either end
    int cluster = 1;
    while (cluster < kMaxCluster && operands * groups * 16 > cluster * int64_t(slice_bytes()))
      cluster *= 2;
    const int64_t share = (groups + cluster - 1) / cluster;
    const size_t bytes = scratch + operands * slot(share);
    const int64_t blocks = p.batches * p.tokens * cluster;
    s.threads = static_cast<int>(std::min<int64_t>(kTeamThreads, (share + 31) / 32 * 32));
    // larger slices leave too few blocks to a multiprocessor: reading twice is faster then
    if (!has_clusters() || share * operands * 16 > int64_t(most_slice_bytes())) return s;
    if (bytes > shared_memory_limit() || blocks >= (1ll << 31)) return s;
    s.cluster = cluster, s.bytes = bytes;
    return s;
  }

  // An operand aligned otherwise than the logits needs up to 16 bytes more at either end.
  __host__ __device__ static size_t slot(int64_t groups) { return (groups + 2) * 16; }
};

// What a block has in dynamic shared memory before its slices.
template <class State>
struct TeamScratch {
  CopyBarrier copies;
  State warps[32];
  State own, all;
};

template <class State>
constexpr size_t kScratchBytes = (sizeof(TeamScratch<State>) + 15) / 16 * 16;

// One block and its part, groups [begin, end), of a row. Without kResident the part is the row.
template <bool kResident>
struct Team {
  int rank = 0, size = 1;
  int begin = 0, end = 0;

  __device__ Team() {
    if constexpr (kResident) rank = cluster_rank(), size = cluster_size();
  }

  __device__ int64_t token() const { return blockIdx.x / size; }

  __device__ void take(const Span& span) {
    const int share = (span.groups + size - 1) / size;
    begin = min(rank * share, span.groups);
    end = min(begin + share, span.groups);
  }

  __device__ int groups() const { return end - begin; }

  // Moves the part of each operand into shared memory, from `memory` on, and waits for it.
  template <class T, int kCount>
  __device__ void fetch(Operand<T>* const (&operands)[kCount], unsigned char* memory,
                        CopyBarrier* copies) const {
    if constexpr (kResident) {
      if (threadIdx.x == 0) copy_barrier_init(copies);
      __syncthreads();
      const size_t slot = Slices::slot(groups());
      Bytes bytes[kCount];
      unsigned total = 0;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        bytes[k] = operands[k]->bytes(begin, end);
        total += bytes[k].count;
      }
      if (threadIdx.x == 0) {
        copy_expect(copies, total);
#pragma unroll
        for (int k = 0; k < kCount; ++k)
          if (bytes[k].count > 0)
            bulk_copy(memory + k * slot, reinterpret_cast<const void*>(bytes[k].from),
                      bytes[k].count, copies);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) operands[k]->move(bytes[k], memory + k * slot);
      copy_wait(copies, 0);
    }
  }

  // The states of all threads of all blocks as one, in every thread.
  template <class State>
  __device__ State merge(State state, const Exponent& exponent, TeamScratch<State>* scratch) const {
    if constexpr (kResident) {
      state = block_merge(state, exponent, scratch->warps);
      if (size == 1) return state;
      if (threadIdx.x == 0) scratch->own = state;
      meet();
      if (threadIdx.x < 32) {
        const int lane = static_cast<int>(threadIdx.x);
        state = lane < size ? *of_block(&scratch->own, lane) : State::empty();
        state = warp_merge(state, exponent);
        if (lane == 0) scratch->all = state;
      }
      __syncthreads();
      return scratch->all;
    } else {
      return block_merge(state, exponent);
    }
  }

  // Until all blocks are here; what they wrote into their shared memory is visible then.
  __device__ void meet() const {
    if (size == 1) return __syncthreads();
    cluster_arrive();
    cluster_wait();
  }

  // A block has read the shared memory of others for the last time; and waits, before it ends, until
  // they have done with its own.
  __device__ void done_reading() const {
    if constexpr (kResident)
      if (size > 1) cluster_arrive();
  }
  __device__ void leave() const {
    if constexpr (kResident)
      if (size > 1) cluster_wait();
  }
};

}  // namespace fisherkern::cuda
