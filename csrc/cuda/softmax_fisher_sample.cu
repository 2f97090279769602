// Labels y ~ p by inversion, and w (p - e_y) / tau, in one kernel.
//
// y is the least class whose cumulative sum of e exceeds u S, u uniform and S = sum e. Classes are
// cut into at most kMaxChunks chunks, each summed by one warp; the chunk that holds u S is then
// summed again class by class. The label is chosen before anything is written: out may be logits.
#include "../philox.h"
#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

constexpr int kMaxChunks = 256;
constexpr int kNone = -1;
using Sums = PeakSums<1>;

// Chunk c of a row: groups [c * chunk_groups, (c + 1) * chunk_groups), 32 at a time.
struct Chunks {
  int groups, chunk_groups, count;

  __device__ explicit Chunks(int groups) : groups(groups) {
    const int tiles = (groups + 31) / 32;
    const int chunk_tiles = (tiles + kMaxChunks - 1) / kMaxChunks;
    chunk_groups = chunk_tiles * 32;
    count = (tiles + chunk_tiles - 1) / chunk_tiles;
  }

  __device__ int begin(int chunk) const { return chunk * chunk_groups; }
  __device__ int end(int chunk) const { return min(begin(chunk) + chunk_groups, groups); }
};

// One row as the sampler sees it: its powers come from the cache or from the logits.
template <class T>
struct Row {
  static constexpr int kSize = Packet<T>::kSize;
  Operand<T> logits;
  RowCache<T> cache;
  bool cached;
  Exponent exponent;

  __device__ void powers(int group, float (&e)[kSize]) const {
    if (cached) {
      cache.load(group, e);
    } else {
      const Packet<T> packet = logits.load(group, -INFINITY);
#pragma unroll
      for (int j = 0; j < kSize; ++j) e[j] = exponent.power(packet.get(j));
    }
  }
};

// One state per chunk, in shared memory; each chunk belongs to one warp.
template <class T>
__device__ void sum_chunks(Row<T>& row, const Chunks& chunks, Sums* chunk_sums) {
  constexpr int kSize = Packet<T>::kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool maximum_first = row.cached && !row.exponent.given;
  Peak peak = Peak::empty();
  if (maximum_first) {
    for (int chunk = warp; chunk < chunks.count; chunk += warps)
      for (int g = chunks.begin(chunk) + lane; g < chunks.end(chunk); g += 32) {
        const Packet<T> packet = row.logits.load(g, -INFINITY);
        float z[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          z[j] = packet.get(j);
          peak.update(z[j], row.logits.first(g) + j);
        }
        row.cache.store(g, z);
      }
    peak = block_merge(peak, row.exponent);
    row.exponent.reference = peak.m;
  }
  const float unused[1] = {};
  for (int chunk = warp; chunk < chunks.count; chunk += warps) {
    Sums sums = maximum_first ? Sums::at(peak, unused) : Sums::empty();
    for (int g = chunks.begin(chunk) + lane; g < chunks.end(chunk); g += 32) {
      float e[kSize];
      if (maximum_first) {
        row.cache.load(g, e);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          e[j] = row.exponent.power(e[j], row.exponent.base(peak.m));
          sums.add(e[j], unused, row.logits.first(g) + j, peak);
        }
      } else {
        row.logits.load(g, -INFINITY).get(e);
        sums.update(row.exponent, e, NoInputs{}, 0);
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          if (row.cached) e[j] = row.exponent.power(e[j]);
      }
      if (row.cached) row.cache.store(g, e);
    }
    sums = warp_merge(sums, row.exponent);
    if (lane == 0) chunk_sums[chunk] = sums;
  }
}

// sum over the lower lanes and this one.
__device__ inline double inclusive_scan(double x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double lower = __shfl_up_sync(~0u, x, offset);
    if (lane >= offset) x += lower;
  }
  return x;
}

// The first item of an increasing sequence of sums that exceeds the target; `before` is the sum of
// the items below it. Where rounding hides it, the last item that is not empty.
struct Choice {
  int item;
  double before;
};

// Items first(lane), ... of every lane, in lane order; mass(i) of each. Called by one whole warp.
template <class Mass>
__device__ Choice choose(int per_lane, int count, double before, double target, Mass mass) {
  const int lane = threadIdx.x % 32;
  const int begin = min(lane * per_lane, count), end = min(begin + per_lane, count);
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += mass(i);
  const double inclusive = before + inclusive_scan(sum);
  const unsigned beyond = __ballot_sync(~0u, inclusive > target && sum > 0);
  const unsigned some = __ballot_sync(~0u, sum > 0);
  if (!some) return {kNone, before};
  const int owner = beyond ? __ffs(beyond) - 1 : 31 - __clz(some);
  Choice choice{kNone, 0};
  double cumulative = inclusive - sum;
  for (int i = begin; i < end; ++i) {
    const double m = mass(i);
    if (!(m > 0)) continue;
    choice = {i, cumulative};
    cumulative += m;
    if (cumulative > target) break;
  }
  choice.item = __shfl_sync(~0u, choice.item, owner);
  choice.before = __shfl_sync(~0u, choice.before, owner);
  return choice;
}

// The class that u S falls on. Called by one whole warp.
template <class T>
__device__ int choose_class(const Row<T>& row, const Chunks& chunks, const Sums* chunk_sums,
                            float maximum, double u) {
  constexpr int kSize = Packet<T>::kSize;
  const int lane = threadIdx.x % 32;
  const auto chunk_mass = [&](int i) {
    const Sums& sums = chunk_sums[i];
    const float ratio = row.exponent.ratio(maximum, sums.m);
    return static_cast<double>(ratio) *
           (static_cast<double>(sums.star) + static_cast<double>(sums.s));
  };
  double total = 0;
  for (int i = lane; i < chunks.count; i += 32) total += chunk_mass(i);
  total = __shfl_sync(~0u, inclusive_scan(total), 31);
  if (!(total > 0) || isinf(total)) return kNone;
  const double target = u * total;
  const Choice chunk = choose((chunks.count + 31) / 32, chunks.count, 0.0, target, chunk_mass);
  if (chunk.item == kNone) return kNone;

  double before = chunk.before;
  int last = kNone;
  for (int g = chunks.begin(chunk.item); g < chunks.end(chunk.item); g += 32) {
    float e[kSize] = {};
    if (g + lane < chunks.groups) row.powers(g + lane, e);
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum += e[j];
    const double inclusive = before + inclusive_scan(sum);
    double cumulative = inclusive - sum;
    int found = kNone, positive = kNone;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      cumulative += e[j];
      if (e[j] > 0.f) {
        positive = row.logits.first(g + lane) + j;
        if (found == kNone && cumulative > target) found = positive;
      }
    }
    if (found == kNone && inclusive > target) found = positive;
    const unsigned hit = __ballot_sync(~0u, found != kNone);
    if (hit) return __shfl_sync(~0u, found, __ffs(hit) - 1);
    const unsigned some = __ballot_sync(~0u, positive != kNone);
    if (some) last = __shfl_sync(~0u, positive, 31 - __clz(some));
    before = __shfl_sync(~0u, inclusive, 31);
  }
  return last;
}

template <class T>
__global__ void __launch_bounds__(1024)
    sample_kernel(const Problem problem, const int64_t* seed, float inverse_temperature,
                  int64_t* labels, const Rows out, bool cached) {
  constexpr int kSize = Packet<T>::kSize;
  __shared__ Sums chunk_sums[kMaxChunks];
  __shared__ int chosen;
  const int64_t token = blockIdx.x;
  T* const logits = problem.row<T>(problem.logits, token);
  const Span span(logits, problem.classes);
  const Operand<T> result(span, problem.row<T>(out, token));
  const float weight = problem.weight(token);
  if (weight == 0.f) {
    const float zeros[kSize] = {};
    for (int g = threadIdx.x; g < span.groups; g += blockDim.x) result.store(g, zeros);
    if (threadIdx.x == 0) labels[token] = kIgnoreIndex;
    return;
  }

  const float* given = problem.logsumexp ? problem.logsumexp + token : nullptr;
  Row<T> row{Operand<T>(span, logits), {dynamic_shared(), span.groups}, cached,
             Exponent(problem, given)};
  const Chunks chunks(span.groups);
  sum_chunks(row, chunks, chunk_sums);
  __syncthreads();
  Sums sums = Sums::empty();
  for (int i = threadIdx.x; i < chunks.count; i += blockDim.x)
    sums.merge(chunk_sums[i], row.exponent);
  sums = block_merge(sums, row.exponent);
  if (!row.exponent.given) row.exponent.reference = sums.m;

  if (threadIdx.x < 32) {
    int label = kNone;
    if (!isnan(sums.total(row.exponent) + sums.s))  // the same for the whole warp
      label = choose_class(row, chunks, chunk_sums, sums.m, philox_uniform(*seed, token));
    if (threadIdx.x == 0) {
      chosen = label;
      labels[token] = label == kNone ? kIgnoreIndex : label;
    }
  }
  __syncthreads();

  const int label = chosen;
  Probability probability;
  probability.set(sums, row.exponent);
  const float factor = weight * inverse_temperature;
  for (int i = threadIdx.x; i < span.groups; i += blockDim.x) {
    const int g = span.groups - 1 - i;  // the end of the row is still in L2
    float value[kSize];
    row.powers(g, value);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float e = value[j];
      const bool labelled = row.logits.first(g) + j == label;
      value[j] = factor * (labelled ? -probability.one_minus_p(e) : probability.p(e));
    }
    result.store(g, value);
  }
}

}  // namespace

int softmax_fisher_sample(const SoftmaxFisher& problem, const int64_t* seed, int64_t* labels,
                          Rows out, void*, void* stream) {
  return dispatch(problem, [&](auto type) {
    using T = decltype(type);
    const size_t bytes = row_cache_bytes<T>(problem.classes);
    return launch(sample_kernel<T>, dim3(token_count(problem)), row_threads(problem.classes), bytes,
                  stream, Problem(problem), seed,
                  static_cast<float>(1.0 / problem.temperature), labels, out, bytes > 0);
  });
}

}  // namespace fisherkern::cuda
