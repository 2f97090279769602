// sum w p over tokens with one read of the logits, on sm_90: partial sums [clusters, V].
//
// A cluster of blocks takes a row, each block the same classes of every row. The bulk copy engine
// brings some rows ahead. A thread has up to kPerThread classes in registers: their logits, then
// powers relative to the largest logit of its warp. What the warps of all blocks have found makes
// probabilities of them, and one barrier of the cluster per row is all that threads wait for.
#pragma once
#include "team.cuh"

namespace fisherkern::cuda {

constexpr int kPerThread = 16;
constexpr int kSumThreads = 1024;
constexpr int kMaxSumCluster = 16;
constexpr int kMostStages = 3;  // rows in shared memory: one in use, the others on their way
constexpr int kRowsPerChain = 32;  // added to one float before it moves on: shorter chains round less
constexpr int kMostSumBlocks = 512;  // bounds the partial sums

// What one warp knows of a row: its largest logit and sum e relative to that.
struct RowPart {
  float m, s;

  __device__ void merge(RowPart other, const Exponent& exponent) {
    if (other.m > m) {
      const RowPart lower = *this;
      *this = other;
      other = lower;
    }
    s = fmaf(exponent.ratio(m, other.m), other.s, s);
  }
};

struct SumScratch {
  CopyBarrier copies[kMostStages];
  RowPart parts[2][kSumThreads / 32];  // of this row, while others still read those of the last
};

// How a launch is shared out. cluster = 0: not possible.
struct SumSlices {
  int cluster = 0, threads = 0, stages = kMostStages;
  int64_t classes = 0;  // of a block
  size_t bytes = 0;

  template <class T>
  static SumSlices of(const SoftmaxFisher& p) {
    SumSlices s;
    if (!has_clusters()) return s;
    const int cluster = cluster_of(p.classes);
    s.classes = (p.classes + cluster - 1) / cluster;
    s.threads = static_cast<int>((s.classes + 32 * kPerThread - 1) / (32 * kPerThread) * 32);
    const size_t places = s.threads * kPerThread;
    const auto bytes = [&] {
      return scratch_bytes() + places * sizeof(float) + s.stages * slot(places * sizeof(T));
    };
    if (bytes() > shared_memory_limit()) s.stages = 2;
    s.bytes = bytes();
    if (s.threads > kSumThreads || s.bytes > shared_memory_limit()) return s;
    s.cluster = cluster;
    return s;
  }

  static int cluster_of(int64_t classes) {
    int cluster = 1;
    while (cluster < kMaxCluster && classes > cluster * sum_classes()) cluster *= 2;
    while (cluster < kMaxSumCluster && classes > cluster * most_sum_classes()) cluster *= 2;
    return cluster;
  }

  // An upper bound of `clusters`.
  static int64_t most_clusters(const SoftmaxFisher& p) {
    const int64_t blocks = std::max(1, kMostSumBlocks / cluster_of(p.classes));
    return std::min(blocks, p.batches * p.tokens);
  }

  // No more than the device holds at one time: each goes through its rows alone.
  template <class Kernel>
  int clusters(Kernel kernel, const SoftmaxFisher& p) const {
    const int64_t resident = resident_clusters(kernel, cluster, threads, bytes);
    return static_cast<int>(std::min(resident, most_clusters(p)));
  }

  __host__ __device__ static size_t scratch_bytes() { return (sizeof(SumScratch) + 15) / 16 * 16; }
  // A slice begins and ends anywhere in 16 bytes. Past its end there is memory for all threads: they
  // need not ask whether a class is theirs before they read.
  __host__ __device__ static size_t slot(size_t bytes) { return bytes + 32; }
};

template <class F>
__device__ inline float warp_all(float x, F f) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = f(x, __shfl_down_sync(~0u, x, offset));
  return __shfl_sync(~0u, x, 0);
}

// The tokens of one cluster, less those of weight zero.
struct TokenWalk {
  const Problem& problem;
  int64_t tokens, step;

  __device__ int64_t from(int64_t token) const {
    while (token < tokens && problem.weight(token) == 0.f) token += step;
    return token;
  }
  __device__ int64_t after(int64_t token) const { return from(token + step); }
};

// Where there is a `reference`, p = unit exp((z - reference) / tau) of every token is left too.
template <class T>
__global__ void __launch_bounds__(kSumThreads, 1)
    resident_sums_kernel(const Problem problem, int64_t tokens, int share, int stages,
                         float* partials, float* reference, float* unit) {
  if constexpr (!kClusters) return;
  const int rank = cluster_rank(), size = cluster_size(), index = blockIdx.x / size;
  const int first = min(rank * share, problem.classes);
  const int count = min(share, problem.classes - first);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto* const memory = reinterpret_cast<unsigned char*>(dynamic_shared());
  auto* const scratch = reinterpret_cast<SumScratch*>(memory);
  auto* const all_totals = reinterpret_cast<float*>(memory + SumSlices::scratch_bytes());
  const int places = blockDim.x * kPerThread;
  auto* const slots = reinterpret_cast<unsigned char*>(all_totals + places);
  const size_t slot = SumSlices::slot(places * sizeof(T));
  // Class i of this thread is 32 i from its first: those of a warp lie together.
  const int mine = warp * 32 * kPerThread + lane;
  float* const totals = all_totals + mine;
  // The warp that has the last class, and those after it, leave some out.
  const bool whole = (warp + 1) * 32 * kPerThread <= count;
  const TokenWalk walk{problem, tokens, gridDim.x / size};

  const auto bytes_of = [&](int64_t token) {
    const auto row = reinterpret_cast<uintptr_t>(problem.row<T>(problem.logits, token) + first);
    const uintptr_t from = row / 16 * 16, to = (row + count * sizeof(T) + 15) / 16 * 16;
    return Bytes{from, static_cast<unsigned>(to - from)};
  };
  int64_t ahead = walk.from(index);
  const auto prefetch = [&](int stage) {
    if (ahead < tokens) {
      const Bytes bytes = bytes_of(ahead);
      copy_expect(&scratch->copies[stage], bytes.count);
      bulk_copy(slots + stage * slot, reinterpret_cast<const void*>(bytes.from), bytes.count,
                &scratch->copies[stage]);
    }
    ahead = walk.after(ahead);
  };
  if (threadIdx.x == 0)
    for (int stage = 0; stage < stages; ++stage) copy_barrier_init(&scratch->copies[stage]);
  __syncthreads();
  if (threadIdx.x == 0 && count > 0)
    for (int stage = 0; stage < stages; ++stage) prefetch(stage);

  if (reference && rank == 0)
    for (int64_t t = index + threadIdx.x * walk.step; t < tokens; t += blockDim.x * walk.step)
      if (problem.weight(t) == 0.f) reference[t] = unit[t] = 0.f;

  float sum[kPerThread] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) totals[32 * i] = 0.f;
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      totals[32 * i] += sum[i];
      sum[i] = 0.f;
    }
  };

  int row = 0, stage = 0, phase = 0;
  for (int64_t token = walk.from(index); token < tokens; token = walk.after(token), ++row) {
    const Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
    float e[kPerThread], m = -INFINITY, s = 0.f;
    if (count > 0) copy_wait(&scratch->copies[stage], phase);
    const auto at = reinterpret_cast<uintptr_t>(problem.row<T>(problem.logits, token) + first);
    const auto* const z = reinterpret_cast<const T*>(slots + stage * slot + at % 16) + mine;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) e[i] = load_scalar(z + 32 * i);
    if (!whole)
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (mine + 32 * i >= count) e[i] = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) m = fmaxf(m, e[i]);
    m = warp_all(m, [](float a, float b) { return fmaxf(a, b); });
    const float base = exponent.base(m);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      e[i] = exponent.power(e[i], base);
      s += e[i];
    }
    s = warp_all(s, [](float a, float b) { return a + b; });
    if (lane == 0) scratch->parts[row % 2][warp] = {m, s};
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0 && count > 0) prefetch(stage);
    if (++stage == stages) stage = 0, phase ^= 1;

    RowPart all{-INFINITY, 0.f};
    // a block per lane, or several lanes to a block: the number of blocks is a power of two
    for (int i = lane / size; i < warps; i += 32 / size)
      all.merge(*of_block(&scratch->parts[row % 2][i], lane % size), exponent);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      all.merge({__shfl_down_sync(~0u, all.m, offset), __shfl_down_sync(~0u, all.s, offset)},
                exponent);
    all = {__shfl_sync(~0u, all.m, 0), __shfl_sync(~0u, all.s, 0)};
    // a maximum of -inf or inf leaves no distribution
    const float inverse = exponent.given ? 1.f : isinf(all.m) ? NAN : 1.f / all.s;
    const float factor = problem.weight(token) * inverse * exponent.ratio(all.m, m);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum[i] = fmaf(factor, e[i], sum[i]);
    if (row % kRowsPerChain == kRowsPerChain - 1) flush();
    if (reference && rank == 0 && threadIdx.x == 0) {
      reference[token] = all.m;
      unit[token] = exponent.given ? exponent.power(all.m) : inverse;
    }
  }
  flush();
  float* const partial = partials + static_cast<int64_t>(index) * problem.classes + first;
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) partial[c] = all_totals[c];
  cluster_arrive();  // others may still read the parts of the last row
  cluster_wait();
}

}  // namespace fisherkern::cuda
