// Statistics of p per row: trace alone, all five, and the gradient of the five.
//
// Primed sums leave out the largest class: p* its probability, eps = sum' p, Q = sum' p^2,
// C = sum' p^3. Then 1 - p* = eps, and with it (for tau = 1)
//   tr F   = p* eps + eps - Q
//   tr F^2 = p*^2 eps^2 + Q - 2 C + 2 p*^2 Q + Q^2
// have no term that cancels. Rows are split over blocks where there are few of them.
#include <algorithm>

#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

constexpr int kMaxSplits = 16;

// Trace (order 2) or all five (order 3) from the sums of a whole row.
template <int kOrder>
__device__ void write_stats(const Problem& problem, const PeakSums<kOrder>& sums,
                            const Exponent& exponent, int64_t token, float* out) {
  const float total = sums.total(exponent), inverse = 1.f / total;
  const float rest = sums.s * inverse;
  // a row of -inf has no star; what its classes have is 0, or NaN with the logsumexp of that row
  const bool empty = exponent.given && sums.m == -INFINITY;
  const float p = empty ? exponent.power(sums.m) : sums.star * inverse;
  const float q = sums.q2 * inverse * inverse;
  const auto inverse_temperature = static_cast<float>(1.0 / problem.temperature);
  const float squared = inverse_temperature * inverse_temperature;
  const float trace = (p * rest + (rest - q)) * squared;
  if constexpr (kOrder == 2) {
    out[token] = trace;
  } else {
    float* stats = out + token * kStats;
    const float c = sums.q3 * inverse * inverse * inverse;
    if (exponent.given) {
      stats[0] = problem.logsumexp[token];
      stats[1] = sums.h * kLn2;
    } else {
      const double largest = static_cast<double>(sums.m) / problem.temperature;
      const float above = log1pf(sums.s);
      // a row of -inf, or with inf, still has a logsumexp
      const bool infinite = isinf(sums.m) && !isnan(sums.s);
      stats[0] = infinite ? sums.m : static_cast<float>(largest + above);
      stats[1] = isnan(total) ? NAN : above + sums.h * inverse * kLn2;
    }
    stats[2] = trace;
    stats[3] = (p * rest * (p * rest) + (q - 2.f * c) + q * (2.f * p * p + q)) * squared * squared;
    stats[4] = p;
  }
}

template <int kOrder>
__device__ void write_zeros(int64_t token, float* out) {
  if constexpr (kOrder == 2) out[token] = 0.f;
  else
    for (int k = 0; k < kStats; ++k) out[token * kStats + k] = 0.f;
}

// Grid (T, splits). With one split a block finishes its row, otherwise it leaves its sums.
template <class T, int kOrder>
__global__ void __launch_bounds__(kTeamThreads, 4)
    stats_kernel(const Problem problem, float* out, PeakSums<kOrder>* partials) {
  const int64_t token = blockIdx.x;
  if (problem.weight(token) == 0.f) {
    if (threadIdx.x == 0 && blockIdx.y == 0) write_zeros<kOrder>(token, out);
    return;
  }
  const Span span(problem.row<T>(problem.logits, token), problem.classes);
  const RowReader<T, 0> reader(problem, span, {}, token);
  const Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  const int share = (span.groups + gridDim.y - 1) / gridDim.y;
  const int begin = min(static_cast<int>(blockIdx.y) * share, span.groups);
  auto reading = PeakReading<kOrder>::empty();
  pipelined<4, Packet<T>>(
      min(share, span.groups - begin), false,
      [&](int g, Packet<T>& packet) { packet = reader.logits.load(begin + g, -INFINITY); },
      [&](int, const Packet<T>& packet) {
        float z[Packet<T>::kSize];
        packet.get(z);
        reading.update(exponent, z, NoInputs{}, 0);
      });
  const auto sums = block_merge(reading.settled(exponent), exponent);
  if (threadIdx.x != 0) return;
  if (partials) partials[token * gridDim.y + blockIdx.y] = sums;
  else write_stats(problem, sums, exponent, token, out);
}

template <int kOrder>
__global__ void finish_stats_kernel(const Problem problem, int64_t tokens, int splits,
                                    const PeakSums<kOrder>* partials, float* out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= tokens || problem.weight(token) == 0.f) return;
  const Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  auto sums = PeakSums<kOrder>::empty();
  for (int i = 0; i < splits; ++i) sums.merge(partials[token * splits + i], exponent);
  write_stats(problem, sums, exponent, token, out);
}

// Enough blocks for a large device, none with less than 8192 classes.
int split_count(const SoftmaxFisher& p) {
  const int64_t wanted = 512 / (p.batches * p.tokens);
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({wanted, p.classes / 8192, kMaxSplits})));
}

template <int kOrder>
int64_t workspace(const SoftmaxFisher& p) {
  const int splits = split_count(p);
  return splits == 1 ? 0 : p.batches * p.tokens * splits * sizeof(PeakSums<kOrder>);
}

template <int kOrder>
int launch_stats(const SoftmaxFisher& p, float* out, void* memory, void* stream) {
  return dispatch(p, [&](auto type) {
    using T = decltype(type);
    const int splits = split_count(p);
    auto* partials = splits == 1 ? nullptr : static_cast<PeakSums<kOrder>*>(memory);
    const unsigned tokens = token_count(p);
    const int error = launch(stats_kernel<T, kOrder>, dim3(tokens, splits),
                             kLoneThreads, 0, stream, Problem(p), out, partials);
    if (error || splits == 1) return error;
    return launch(finish_stats_kernel<kOrder>, dim3((tokens + 63) / 64), 64, 0, stream, Problem(p),
                  static_cast<int64_t>(tokens), splits, partials, out);
  });
}

// With a_c = -g_H log p - 2 g_tr p / tau^2 + g_tr2 (2 p - 6 p^2 + 4 p sum p^2) / tau^4, the result
// is p (g_lse + a - <p, a>) / tau; a is taken relative to its value at the largest class, so that
// a - <p, a> of a peaked row does not cancel. g_max p* (e_* - p) / tau is shared among ties.
struct Gradients {
  float logsumexp, entropy, trace, trace_squared, largest;
};

template <class T>
__global__ void __launch_bounds__(kTeamThreads, 4)
    stats_backward_kernel(const Problem problem, const float* stats, const float* grad,
                          const Rows out) {
  constexpr int kSize = Packet<T>::kSize;
  const int64_t token = blockIdx.x;
  const Span span(problem.row<T>(problem.logits, token), problem.classes);
  const Operand<T> result(span, problem.row<T>(out, token));
  if (problem.weight(token) == 0.f) {
    const float zeros[kSize] = {};
    for (int g = threadIdx.x; g < span.groups; g += blockDim.x) result.store(g, zeros);
    return;
  }
  const RowReader<T, 0> reader(problem, span, {}, token);
  const Exponent exponent(problem, stats + token * kStats);
  const auto load = [&](int group, Packet<T>& packet) {
    packet = reader.logits.load(group, -INFINITY);
  };

  auto reading = PeakReading<4>::empty();
  pipelined<4, Packet<T>>(span.groups, false, load, [&](int, const Packet<T>& packet) {
    float z[kSize];
    packet.get(z);
    reading.update(exponent, z, NoInputs{}, 0);
  });
  const auto sums = block_merge(reading.settled(exponent), exponent);

  const auto inverse_temperature = static_cast<float>(1.0 / problem.temperature);
  const float squared = inverse_temperature * inverse_temperature;
  const float* g = grad + token * kStats;
  const float p_star = sums.star, log_star = exponent.log2(sums.m);
  const float s2 = fmaf(p_star, p_star, sums.q2);
  // a - a* = log_factor (log2 p - log2 p*) + (p - p*) (first + second (p + p*))
  const float log_factor = -g[1] * kLn2;
  const float first = -2.f * g[2] * squared + g[3] * squared * squared * (2.f + 4.f * s2);
  const float second = -6.f * g[3] * squared * squared;
  const float log_mean = -sums.h - log_star * (p_star + sums.s);
  const float mean = log_factor * log_mean + first * (sums.q2 - p_star * sums.s) +
                     second * (sums.q3 - p_star * p_star * sums.s);
  const float top = g[4] * p_star / sums.ties;
  // 1/n - p* as (1 - n p*) / n, and 1 - p* from the others
  const float top_complement = (sums.s - (sums.ties - 1.f) * p_star) * top;

  pipelined<2, Packet<T>>(span.groups, true, load, [&](int group, const Packet<T>& packet) {
    float value[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float z = packet.get(j), t = exponent.log2(z), p = exponent.power(z);
      const float logs = fmaxf(t - log_star, -Exponent::kMaxDepth);
      const float a = log_factor * logs + (p - p_star) * (first + second * (p + p_star)) - mean;
      const float largest = z == sums.m ? top_complement : -g[4] * p_star * p;
      value[j] = (p * (g[0] + a) + largest) * inverse_temperature;
    }
    result.store(group, value);
  });
}

}  // namespace

int64_t softmax_fisher_trace_workspace(const SoftmaxFisher& problem) {
  return workspace<2>(problem);
}

int softmax_fisher_trace(const SoftmaxFisher& problem, float* out, void* memory, void* stream) {
  return launch_stats<2>(problem, out, memory, stream);
}

int64_t softmax_fisher_stats_workspace(const SoftmaxFisher& problem) {
  return workspace<3>(problem);
}

int softmax_fisher_stats(const SoftmaxFisher& problem, float* out, void* memory, void* stream) {
  return launch_stats<3>(problem, out, memory, stream);
}

int softmax_fisher_stats_backward(const SoftmaxFisher& problem, const float* stats,
                                  const float* grad, Rows out, void*, void* stream) {
  return dispatch(problem, [&](auto type) {
    using T = decltype(type);
    return launch(stats_backward_kernel<T>, dim3(token_count(problem)),
                  kLoneThreads, 0, stream, Problem(problem), stats, grad, out);
  });
}

}  // namespace fisherkern::cuda
