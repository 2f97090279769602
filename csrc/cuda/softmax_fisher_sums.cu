// Sums over tokens, [V]: sum w p and sum w p (1 - p) / tau^2. Deterministic, no atomics.
//
// Two reads of the logits:
// 1. one block per row: what turns its logits into probabilities, into the workspace;
// 2. grid (blocks of classes, splits of tokens): partial sums [splits, V].
// Last the partial sums of a class, in their order.
//
// One read is not faster yet: clusters that keep whole rows in shared memory, a slice in each block,
// wait for the sum of every row. On an H200 they reached 0.34 of copy bandwidth for (8192, 50257)
// float32 and 0.17 for bfloat16; two reads reach 0.37 and 0.21 of what one takes.
#include <algorithm>

#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

struct alignas(16) RowConstants {  // read 16 bytes at a time
  Exponent exponent;
  Probability probability;
  float weight;
};

constexpr int64_t kPartials = 1 << 22;  // floats of workspace that splits may fill
constexpr int64_t kMinSplits = 16, kMaxSplits = 1024, kMinTokens = 16;
constexpr int kColumnThreads = 256;
// Terms added to one float before it moves on to the total: shorter chains round less.
constexpr int kChain = 32;
constexpr int kInFlight = 4;  // rows loaded before the first is used; divides kChain

int64_t split_count(const SoftmaxFisher& p) {
  const int64_t tokens = p.batches * p.tokens;
  const int64_t room = std::clamp(kPartials / p.classes, kMinSplits, kMaxSplits);
  return std::min(room, (tokens + kMinTokens - 1) / kMinTokens);
}

int64_t constants_bytes(const SoftmaxFisher& p) {
  const auto bytes = p.batches * p.tokens * static_cast<int64_t>(sizeof(RowConstants));
  return (bytes + 255) / 256 * 256;
}

int64_t workspace(const SoftmaxFisher& p) {
  return constants_bytes(p) + split_count(p) * p.classes * static_cast<int64_t>(sizeof(float));
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads)
    row_constants_kernel(const Problem problem, RowConstants* constants, float* reference,
                         float* unit) {
  const int64_t token = blockIdx.x;
  Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  Probability probability{};
  const float weight = problem.weight(token);
  float top = 0.f;
  if (weight != 0.f) {
    auto reading = PeakReading<1>::empty();
    const Span span(problem.row<T>(problem.logits, token), problem.classes);
    const RowReader<T, 0> reader(problem, span, {}, token);
    pipelined<4, Packet<T>>(
        span.groups, false,
        [&](int g, Packet<T>& packet) { packet = reader.logits.load(g, -INFINITY); },
        [&](int, const Packet<T>& packet) {
          float z[Packet<T>::kSize];
          packet.get(z);
          reading.update(exponent, z, NoInputs{}, 0);
        });
    const auto sums = block_merge(reading.settled(exponent), exponent);
    top = sums.m;
    if (!exponent.given) exponent.reference = top;
    probability.set(sums, exponent);
  }
  if (threadIdx.x != 0) return;
  constants[token] = {exponent, probability, weight};
  if (reference) {
    reference[token] = weight == 0.f ? 0.f : top;
    unit[token] = weight == 0.f ? 0.f : probability.p(exponent.power(top));
  }
}

// The kSize classes of one thread. `vectors`: rows start on 16 bytes, V is whole packets and the
// classes are one of them; otherwise neighbouring threads take neighbouring classes.
template <class T>
struct Columns {
  static constexpr int kSize = Packet<T>::kSize;
  int64_t base, stride, classes;
  bool vectors;

  __device__ Columns(int64_t classes, bool vectors) : classes(classes), vectors(vectors) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x;
    base = vectors ? (block + threadIdx.x) * kSize : block * kSize + threadIdx.x;
    stride = vectors ? 1 : blockDim.x;
  }

  __device__ int64_t index(int j) const { return base + j * stride; }

  __device__ Packet<T> load(const T* row) const {
    Packet<T> packet{};
    if (vectors) {
      if (base < classes) {
        const uint4 q = *reinterpret_cast<const uint4*>(row + base);
        packet = {{q.x, q.y, q.z, q.w}};
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (index(j) < classes) packet.set(j, load_scalar(row + index(j)));
    }
    return packet;
  }
};

template <class T, bool kDiagonal>
__global__ void __launch_bounds__(kColumnThreads)
    columns_kernel(const Problem problem, int64_t tokens, const RowConstants* constants,
                   bool vectors, float* partials) {
  constexpr int kSize = Packet<T>::kSize;
  const Columns<T> columns(problem.classes, vectors);
  const int64_t share = (tokens + gridDim.y - 1) / gridDim.y;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < tokens ? begin + share : tokens;

  float total[kSize] = {};
  for (int64_t link = begin; link < end; link += kChain) {
    float chain[kSize] = {};
    for (int64_t token = link; token < link + kChain && token < end; token += kInFlight) {
      Packet<T> held[kInFlight];
      float weight[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        weight[u] = token + u < end ? constants[token + u].weight : 0.f;
        if (weight[u] != 0.f)
          held[u] = columns.load(problem.row<T>(problem.logits, token + u));
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (weight[u] == 0.f) continue;
        const RowConstants row = constants[token + u];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float e = row.exponent.power(held[u].get(j));
          float value = row.probability.p(e);
          if (kDiagonal) value *= row.probability.one_minus_p(e);
          chain[j] = fmaf(weight[u], value, chain[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) total[j] += chain[j];
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (columns.index(j) < problem.classes)
      partials[blockIdx.y * static_cast<int64_t>(problem.classes) + columns.index(j)] = total[j];
}

__global__ void reduce_kernel(const float* partials, int64_t classes, int splits, double factor,
                              float* out) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= classes) return;
  double total = 0;
  for (int i = 0; i < splits; ++i) total += partials[i * classes + c];
  out[c] = static_cast<float>(total * factor);
}

template <class T>
bool whole_packets(const SoftmaxFisher& p) {
  constexpr int kSize = Packet<T>::kSize;
  return reinterpret_cast<uintptr_t>(p.logits.data) % 16 == 0 && p.classes % kSize == 0 &&
         p.logits.batch_stride % kSize == 0 && p.logits.token_stride % kSize == 0;
}

template <bool kDiagonal>
int launch_sums(const SoftmaxFisher& p, float* out, float* reference, float* unit, void* memory,
                void* stream) {
  return dispatch(p, [&](auto type) {
    using T = decltype(type);
    const Problem problem(p);
    const unsigned tokens = token_count(p);
    auto* constants = static_cast<RowConstants*>(memory);
    auto* partials =
        reinterpret_cast<float*>(static_cast<unsigned char*>(memory) + constants_bytes(p));
    int error = launch(row_constants_kernel<T>, dim3(tokens), kLoneThreads, 0, stream,
                       problem, constants, reference, unit);
    if (error) return error;

    const auto splits = static_cast<unsigned>(split_count(p));
    const int64_t per_thread = Packet<T>::kSize;
    const int threads = static_cast<int>(std::clamp<int64_t>(
        (p.classes + 32 * per_thread - 1) / (32 * per_thread) * 32, 32, kColumnThreads));
    const auto blocks =
        static_cast<unsigned>((p.classes + threads * per_thread - 1) / (threads * per_thread));
    error = launch(columns_kernel<T, kDiagonal>, dim3(blocks, splits), threads, 0, stream, problem,
                   static_cast<int64_t>(tokens), constants, whole_packets<T>(p), partials);
    const double factor = kDiagonal ? 1.0 / (p.temperature * p.temperature) : 1.0;
    if (error) return error;
    return launch(reduce_kernel, dim3(static_cast<unsigned>((p.classes + 127) / 128)), 128, 0,
                  stream, partials, p.classes, static_cast<int>(splits), factor, out);
  });
}

}  // namespace

int64_t softmax_fisher_diagonal_sum_workspace(const SoftmaxFisher& problem) {
  return workspace(problem);
}

int softmax_fisher_diagonal_sum(const SoftmaxFisher& problem, float* out, void* memory,
                                void* stream) {
  return launch_sums<true>(problem, out, nullptr, nullptr, memory, stream);
}

int64_t softmax_fisher_powers_workspace(const SoftmaxFisher& problem) {
  return workspace(problem);
}

int softmax_fisher_powers(const SoftmaxFisher& problem, float* out, float* reference, float* unit,
                          void* memory, void* stream) {
  return launch_sums<false>(problem, out, reference, unit, memory, stream);
}

}  // namespace fisherkern::cuda
