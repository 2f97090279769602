// The CPU kernels as implementations of the native ops: tokens are shared out among threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "capability.h"
#include "destination.h"
#include "panel_tasks.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace {

using Optional = std::optional<Tensor>;

// The rows of a result, and how to write them.
Rows destination(SoftmaxFisher& f, const Tensor& out, const Tensor& logits) {
  const Rows rows = rows_of(out, logits, "out");
  const int64_t width = f.dtype == DType::float64 ? 8 : f.dtype == DType::float32 ? 4 : 2;
  const int64_t last = (f.batches - 1) * rows.batch_stride + (f.tokens - 1) * rows.token_stride;
  // streams are of whole vectors of elements, which memory from elsewhere may not be aligned to
  f.past_caches = reinterpret_cast<uintptr_t>(rows.data) % width == 0 &&
                  write_past_caches(rows.data, (last + f.classes) * width);
  return rows;
}

template <class Body>
void for_tokens(const SoftmaxFisher& f, Body&& body) {
  // a row is worth a thread from about 4096 classes on
  const int64_t grain = std::max<int64_t>(1, 4096 / f.classes);
  parallel_for(0, f.batches * f.tokens, grain, body);
}

template <class Kernel>
void product(Kernel kernel, const Tensor& logits, const Tensor& v, const Optional& weights,
             const Optional& logsumexp, double temperature, Tensor& out) {
  auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows vectors = rows_of(v, logits, "v"), to = destination(f, out, logits);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, vectors, to, begin, end); });
}

void matvec(const Tensor& logits, const Tensor& v, const Optional& weights,
            const Optional& logsumexp, double temperature, Tensor out) {
  product(FISHERKERN_KERNEL(matvec), logits, v, weights, logsumexp, temperature, out);
}

void sqrt_matvec(const Tensor& logits, const Tensor& v, const Optional& weights,
                 const Optional& logsumexp, double temperature, Tensor out) {
  product(FISHERKERN_KERNEL(sqrt_matvec), logits, v, weights, logsumexp, temperature, out);
}

void sqrt_rmatvec(const Tensor& logits, const Tensor& v, const Optional& weights,
                  const Optional& logsumexp, double temperature, Tensor out) {
  product(FISHERKERN_KERNEL(sqrt_rmatvec), logits, v, weights, logsumexp, temperature, out);
}

void matvec_backward(const Tensor& logits, const Tensor& v, const Tensor& grad,
                     const Optional& weights, const Optional& logsumexp, double temperature,
                     Tensor out) {
  auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows a = rows_of(v, logits, "v"), b = rows_of(grad, logits, "grad");
  const Rows to = destination(f, out, logits);
  const auto kernel = FISHERKERN_KERNEL(matvec_backward);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, a, b, to, begin, end); });
}

void quadratic(const Tensor& logits, const Tensor& v, const Optional& mask,
               const Optional& logsumexp, double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  const auto directions = directions_of(v, logits);
  const int64_t K = directions.count;
  void* to = flat_of(out, logits, f.batches * f.tokens * K * K, "out");
  const auto kernel = FISHERKERN_KERNEL(quadratic);
  for_tokens(f, [&](int64_t begin, int64_t end) {
    kernel(f, directions.rows, directions.stride, K, to, begin, end);
  });
}

void diagonal(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
              double temperature, Tensor out) {
  auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows to = destination(f, out, logits);
  const auto kernel = FISHERKERN_KERNEL(diagonal);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, to, begin, end); });
}

// The number of partial sums depends on T alone, so that the bits do not depend on the threads.
template <class Kernel>
void token_sum(Kernel kernel, const Tensor& logits, const Optional& weights,
               const Optional& logsumexp, double temperature, Tensor& out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  char* to = static_cast<char*>(flat_of(out, logits, f.classes, "out"));
  const int64_t T = f.batches * f.tokens;
  const int64_t parts = std::clamp<int64_t>(T / 16, 1, 32);
  const int64_t bytes = f.classes * (f.dtype == DType::float64 ? 8 : 4);
  if (parts == 1) {
    kernel(f, to, 0, T);
    return;
  }
  // the first part is summed where the result goes
  PanelMemory own;
  char* const sums = scratch_of((parts - 1) * bytes, own);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      kernel(f, part ? sums + (part - 1) * bytes : to, part * T / parts, (part + 1) * T / parts);
  });
  const auto add = FISHERKERN_KERNEL(add_partials);
  parallel_for(0, f.classes, 8192, [&](int64_t begin, int64_t end) {
    add(f, sums, parts - 1, to, begin, end);
  });
}

void diagonal_sum(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
                  double temperature, Tensor out) {
  token_sum(FISHERKERN_KERNEL(diagonal_sum), logits, weights, logsumexp, temperature, out);
}

void powers(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
            double temperature, Tensor out, Optional reference, Optional unit) {
  const int64_t T = logits.size(0) * logits.size(1);
  void* const r = reference ? flat_of(*reference, logits, T, "reference") : nullptr;
  void* const u = unit ? flat_of(*unit, logits, T, "unit") : nullptr;
  const auto kernel = FISHERKERN_KERNEL(probabilities_sum);
  auto with_powers = [&](const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
    kernel(f, partial, r, u, begin, end);
  };
  token_sum(with_powers, logits, weights, logsumexp, temperature, out);
}

void mean_probs(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
                double temperature, Tensor out) {
  powers(logits, weights, logsumexp, temperature, out, std::nullopt, std::nullopt);
}

void trace(const Tensor& logits, const Optional& mask, const Optional& logsumexp,
           double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  void* to = flat_of(out, logits, f.batches * f.tokens, "out");
  const auto kernel = FISHERKERN_KERNEL(trace);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, to, begin, end); });
}

void stats(const Tensor& logits, const Optional& mask, const Optional& logsumexp,
           double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  void* to = flat_of(out, logits, f.batches * f.tokens * kStats, "out");
  const auto kernel = FISHERKERN_KERNEL(stats);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, to, begin, end); });
}

void stats_backward(const Tensor& logits, const Tensor& values, const Tensor& grad,
                    const Optional& mask, double temperature, Tensor out) {
  auto f = problem_of(logits, {}, mask, {}, temperature);
  const int64_t elements = f.batches * f.tokens * kStats;
  const void* from = flat_of(values, logits, elements, "stats");
  const void* g = flat_of(grad, logits, elements, "grad");
  const Rows to = destination(f, out, logits);
  const auto kernel = FISHERKERN_KERNEL(stats_backward);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, from, g, to, begin, end); });
}

void gradient(const Tensor& logits, const Tensor& labels, const Optional& weights,
              const Optional& logsumexp, double temperature, Tensor out) {
  auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const auto* y = static_cast<const int64_t*>(
      flat_of(labels, logits, f.batches * f.tokens, "labels", ScalarType::Long));
  const Rows to = destination(f, out, logits);
  const auto kernel = FISHERKERN_KERNEL(gradient);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, y, to, begin, end); });
}

void sample(const Tensor& logits, const Tensor& seed, const Optional& weights,
            const Optional& logsumexp, double temperature, Tensor labels, Tensor out) {
  auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const auto* key = static_cast<const int64_t*>(flat_of(seed, logits, 2, "seed", ScalarType::Long));
  auto* y = static_cast<int64_t*>(
      flat_of(labels, logits, f.batches * f.tokens, "labels", ScalarType::Long));
  const Rows to = destination(f, out, logits);
  const auto kernel = FISHERKERN_KERNEL(sample);
  for_tokens(f, [&](int64_t begin, int64_t end) { kernel(f, key, y, to, begin, end); });
}

void panel(const Tensor& logits, const Tensor& reference, const Tensor& unit, const Optional& scale,
           double temperature, bool transposed, Tensor out) {
  const SoftmaxFisherPanel p =
      panel_of(logits, reference, unit, scale, temperature, transposed, out);
  // blocks of tokens and classes that fill whole cache lines of the panel either way
  constexpr int64_t kTokens = 64, kClasses = 1024;
  const int64_t T = p.rows.batches * p.rows.tokens, V = p.rows.classes;
  const int64_t blocks = (V + kClasses - 1) / kClasses;
  const int64_t width = p.rows.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  const auto kernel = FISHERKERN_KERNEL(panel);
  parallel_for(
      0, (T + kTokens - 1) / kTokens * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t token = i / blocks * kTokens, first = i % blocks * kClasses;
          SoftmaxFisherPanel part = p;
          part.out = static_cast<char*>(p.out) +
                     (transposed ? first * p.stride + token : token * p.stride + first) * width;
          kernel(part, token, std::min(token + kTokens, T), first, std::min(first + kClasses, V));
        }
      });
}

}  // namespace
}  // namespace fisherkern

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CPU, m) {
  m.impl("softmax_fisher_matvec", TORCH_BOX(&fisherkern::matvec));
  m.impl("softmax_fisher_sqrt_matvec", TORCH_BOX(&fisherkern::sqrt_matvec));
  m.impl("softmax_fisher_sqrt_rmatvec", TORCH_BOX(&fisherkern::sqrt_rmatvec));
  m.impl("softmax_fisher_matvec_backward", TORCH_BOX(&fisherkern::matvec_backward));
  m.impl("softmax_fisher_quadratic", TORCH_BOX(&fisherkern::quadratic));
  m.impl("softmax_fisher_diagonal", TORCH_BOX(&fisherkern::diagonal));
  m.impl("softmax_fisher_diagonal_sum", TORCH_BOX(&fisherkern::diagonal_sum));
  m.impl("softmax_fisher_powers", TORCH_BOX(&fisherkern::powers));
  m.impl("softmax_fisher_mean_probs", TORCH_BOX(&fisherkern::mean_probs));
  m.impl("softmax_fisher_trace", TORCH_BOX(&fisherkern::trace));
  m.impl("softmax_fisher_stats", TORCH_BOX(&fisherkern::stats));
  m.impl("softmax_fisher_stats_backward", TORCH_BOX(&fisherkern::stats_backward));
  m.impl("softmax_fisher_gradient", TORCH_BOX(&fisherkern::gradient));
  m.impl("softmax_fisher_sample", TORCH_BOX(&fisherkern::sample));
  m.impl("softmax_fisher_panel", TORCH_BOX(&fisherkern::panel));
}
