// Labels y ~ p by inversion, and w (p - e_y) / tau, in one kernel.
//
// y is the least class whose cumulative sum of e exceeds u S, u uniform and S = sum e. The blocks of a
// team know what lies before their part; the one where u S falls cuts its part into chunks, each
// summed by one warp, and sums the chunk that holds u S again class by class. The label is chosen
// before anything is written: out may be the logits.
#include "../philox.h"
#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

constexpr int kMaxChunks = 64;
constexpr int kNone = -1;
using Sums = PeakSums<1>;

// Chunk c of a part of a row: groups [begin(c), end(c)), 32 at a time.
struct Chunks {
  int first, last, chunk_groups, count;

  __device__ Chunks(int first, int last) : first(first), last(last) {
    const int tiles = (last - first + 31) / 32;
    const int chunk_tiles = (tiles + kMaxChunks - 1) / kMaxChunks;
    chunk_groups = chunk_tiles * 32;
    count = tiles == 0 ? 0 : (tiles + chunk_tiles - 1) / chunk_tiles;
  }

  __device__ int begin(int chunk) const { return first + chunk * chunk_groups; }
  __device__ int end(int chunk) const { return min(begin(chunk) + chunk_groups, last); }
};

// One state per chunk, in shared memory; each chunk belongs to one warp.
template <class T>
__device__ void sum_chunks(const Operand<T>& logits, const Exponent& exponent, const Chunks& chunks,
                           Sums* chunk_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int chunk = warp; chunk < chunks.count; chunk += warps) {
    auto reading = Sums::Reading::empty();
    for (int g = chunks.begin(chunk) + lane; g < chunks.end(chunk); g += 32) {
      float z[Packet<T>::kSize];
      logits.load(g, -INFINITY).get(z);
      reading.update(exponent, z, NoInputs{}, 0);
    }
    const Sums sums = warp_merge(reading.settled(exponent), exponent);
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

// Sum of e of a chunk, with e measured from the maximum of the row.
__device__ inline double chunk_mass(const Sums& sums, const Exponent& exponent, float maximum) {
  return static_cast<double>(exponent.ratio(maximum, sums.m)) *
         (static_cast<double>(sums.star) + static_cast<double>(sums.s));
}

// The same of all chunks of a block, in the order that `choose` adds them. Called by one whole warp.
__device__ inline double block_mass(const Chunks& chunks, const Sums* chunk_sums,
                                    const Exponent& exponent, float maximum) {
  double total = 0;
  for (int i = threadIdx.x % 32; i < chunks.count; i += 32)
    total += chunk_mass(chunk_sums[i], exponent, maximum);
  return __shfl_sync(~0u, inclusive_scan(total), 31);
}

// The class of a block that the target falls on, `before` lying before the block. By one whole warp.
template <class T>
__device__ int choose_class(const Operand<T>& logits, const Chunks& chunks, const Sums* chunk_sums,
                            const Exponent& exponent, float maximum, double before,
                            double target) {
  constexpr int kSize = Packet<T>::kSize;
  const int lane = threadIdx.x % 32;
  const Choice chunk =
      choose((chunks.count + 31) / 32, chunks.count, before, target,
             [&](int i) { return chunk_mass(chunk_sums[i], exponent, maximum); });
  if (chunk.item == kNone) return kNone;

  before = chunk.before;
  int last = kNone;
  for (int g = chunks.begin(chunk.item); g < chunks.end(chunk.item); g += 32) {
    float e[kSize] = {};
    if (g + lane < chunks.last) {
      const Packet<T> packet = logits.load(g + lane, -INFINITY);
#pragma unroll
      for (int j = 0; j < kSize; ++j) e[j] = exponent.power(packet.get(j));
    }
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
        positive = logits.first(g + lane) + j;
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

struct Scratch {
  TeamScratch<Sums> team;
  Sums chunk_sums[kMaxChunks];
  double mass;  // of this block
  int label;    // chosen by this block
  int owner;    // which block chooses
};
constexpr size_t kBytes = (sizeof(Scratch) + 15) / 16 * 16;

// The label of a row, in every thread. The masses of the blocks decide who chooses.
template <class T, bool kResident>
__device__ int draw(const Team<kResident>& team, const Operand<T>& logits, const Exponent& exponent,
                    const Chunks& chunks, const Sums& row, double u, Scratch* scratch) {
  if (threadIdx.x < 32) {
    const double mass = block_mass(chunks, scratch->chunk_sums, exponent, row.m);
    if (threadIdx.x == 0) scratch->mass = mass;
  }
  team.meet();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    const double mass = lane < team.size ? *of_block(&scratch->mass, lane) : 0.0;
    const double total = __shfl_sync(~0u, inclusive_scan(mass), 31);
    const bool known = total > 0 && !isinf(total);
    const double target = u * total;
    const Choice block = choose(1, team.size, 0.0, target, [&](int) { return mass; });
    int label = kNone;
    if (known && block.item == team.rank)
      label = choose_class(logits, chunks, scratch->chunk_sums, exponent, row.m, block.before,
                           target);
    if (lane == 0) scratch->label = label, scratch->owner = known ? block.item : 0;
  }
  team.meet();
  return *of_block(&scratch->label, scratch->owner);
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kTeamThreads, kResident ? 4 : 2)
    sample_kernel(const Problem problem, const int64_t* seed, float inverse_temperature,
                  int64_t* labels, const Rows out) {
  constexpr int kSize = Packet<T>::kSize;
  if constexpr (kResident && !kClusters) return;
  auto* const scratch = reinterpret_cast<Scratch*>(dynamic_shared());
  Team<kResident> team;
  const int64_t token = team.token();
  T* const row = problem.row<T>(problem.logits, token);
  const Span span(row, problem.classes);
  team.take(span);
  const Operand<T> result(span, problem.row<T>(out, token));
  const float weight = problem.weight(token);
  if (weight == 0.f) {
    const float zeros[kSize] = {};
    for (int g = team.begin + threadIdx.x; g < team.end; g += blockDim.x) result.store(g, zeros);
    if (threadIdx.x == 0 && team.rank == 0) labels[token] = kIgnoreIndex;
    return;
  }

  Operand<T> logits(span, row);
  Operand<T>* const operands[1] = {&logits};
  team.template fetch<T, 1>(operands, reinterpret_cast<unsigned char*>(scratch) + kBytes,
                            &scratch->team.copies);
  Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  const Chunks chunks(team.begin, team.end);
  sum_chunks(logits, exponent, chunks, scratch->chunk_sums);
  __syncthreads();
  Sums sums = Sums::empty();
  for (int i = threadIdx.x; i < chunks.count; i += blockDim.x)
    sums.merge(scratch->chunk_sums[i], exponent);
  sums = team.merge(sums, exponent, &scratch->team);
  if (!exponent.given) exponent.reference = sums.m;

  int label = kNone;
  if (!isnan(sums.total(exponent) + sums.s))  // the same for the whole team
    label = draw(team, logits, exponent, chunks, sums, philox_uniform(seed[0], seed[1] + token),
                 scratch);
  team.done_reading();
  if (threadIdx.x == 0 && team.rank == 0) labels[token] = label == kNone ? kIgnoreIndex : label;

  Probability probability;
  probability.set(sums, exponent);
  const float factor = weight * inverse_temperature;
  for (int g = team.end - 1 - static_cast<int>(threadIdx.x); g >= team.begin; g -= blockDim.x) {
    const Packet<T> packet = logits.load(g, -INFINITY);
    float value[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float e = exponent.power(packet.get(j));
      const bool labelled = logits.first(g) + j == label;
      value[j] = factor * (labelled ? -probability.one_minus_p(e) : probability.p(e));
    }
    result.store(g, value);
  }
  team.leave();
}

}  // namespace

int softmax_fisher_sample(const SoftmaxFisher& problem, const int64_t* seed, int64_t* labels,
                          Rows out, void*, void* stream) {
  return dispatch(problem, [&](auto type) {
    using T = decltype(type);
    const auto slices = Slices::of<T>(problem, 1, kBytes);
    const auto inverse = static_cast<float>(1.0 / problem.temperature);
    const unsigned tokens = token_count(problem);
    if (slices.cluster > 0)
      return launch_cluster(sample_kernel<T, true>, dim3(tokens * slices.cluster), slices.cluster,
                            slices.threads, slices.bytes, stream, Problem(problem), seed, inverse,
                            labels, out);
    return launch(sample_kernel<T, false>, dim3(tokens), kTeamThreads, kBytes,
                  stream, Problem(problem), seed, inverse, labels, out);
  });
}

}  // namespace fisherkern::cuda
