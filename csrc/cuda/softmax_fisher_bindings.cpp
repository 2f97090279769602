// The softmax Fisher launchers as implementations of the native ops: workspace and stream come from
// torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "softmax_fisher.h"
#include "torch_launch.h"

namespace fisherkern::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Runs launcher(workspace, stream) on the device of the logits and reports what it returns.
template <class Launcher>
void run(const Tensor& logits, int64_t workspace_bytes, Launcher&& launcher) {
  run_on_stream(logits, [&](void* stream) {
    Tensor memory;
    void* workspace = nullptr;
    if (workspace_bytes > 0) {
      memory = torch::stable::new_empty(logits, {workspace_bytes}, ScalarType::Byte);
      workspace = memory.data_ptr();
    }
    return launcher(workspace, stream);
  });
}

template <class Kernel>
void product(Kernel kernel, const Tensor& logits, const Tensor& v, const Optional& weights,
             const Optional& logsumexp, double temperature, const Tensor& out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows vectors = rows_of(v, logits, "v"), to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) { return kernel(f, vectors, to, memory, stream); });
}

void matvec(const Tensor& logits, const Tensor& v, const Optional& weights,
            const Optional& logsumexp, double temperature, Tensor out) {
  product(softmax_fisher_matvec, logits, v, weights, logsumexp, temperature, out);
}

void sqrt_matvec(const Tensor& logits, const Tensor& v, const Optional& weights,
                 const Optional& logsumexp, double temperature, Tensor out) {
  product(softmax_fisher_sqrt_matvec, logits, v, weights, logsumexp, temperature, out);
}

void sqrt_rmatvec(const Tensor& logits, const Tensor& v, const Optional& weights,
                  const Optional& logsumexp, double temperature, Tensor out) {
  product(softmax_fisher_sqrt_rmatvec, logits, v, weights, logsumexp, temperature, out);
}

void matvec_backward(const Tensor& logits, const Tensor& v, const Tensor& grad,
                     const Optional& weights, const Optional& logsumexp, double temperature,
                     Tensor out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows a = rows_of(v, logits, "v"), b = rows_of(grad, logits, "grad");
  const Rows to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_matvec_backward(f, a, b, to, memory, stream);
  });
}

void quadratic(const Tensor& logits, const Tensor& v, const Optional& mask,
               const Optional& logsumexp, double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  const auto directions = directions_of(v, logits);
  auto* to = static_cast<float*>(
      flat_of(out, logits, f.batches * f.tokens * directions.count * directions.count, "out"));
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_quadratic(f, directions.rows, directions.stride, directions.count, to,
                                    memory, stream);
  });
}

void diagonal(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
              double temperature, Tensor out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const Rows to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_diagonal(f, to, memory, stream);
  });
}

void diagonal_sum(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
                  double temperature, Tensor out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  auto* to = static_cast<float*>(flat_of(out, logits, f.classes, "out"));
  run(logits, softmax_fisher_diagonal_sum_workspace(f), [&](void* memory, void* stream) {
    return softmax_fisher_diagonal_sum(f, to, memory, stream);
  });
}

void powers(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
            double temperature, Tensor sums, Optional reference, Optional unit) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  auto* to = static_cast<float*>(flat_of(sums, logits, f.classes, "sums"));
  STD_TORCH_CHECK(reference.has_value() == unit.has_value(), "reference and unit go together");
  const auto per_token = [&](const Optional& x, const char* name) {
    return x ? static_cast<float*>(flat_of(*x, logits, f.batches * f.tokens, name)) : nullptr;
  };
  float* const references = per_token(reference, "reference");
  float* const units = per_token(unit, "unit");
  run(logits, softmax_fisher_powers_workspace(f), [&](void* memory, void* stream) {
    return softmax_fisher_powers(f, to, references, units, memory, stream);
  });
}

void mean_probs(const Tensor& logits, const Optional& weights, const Optional& logsumexp,
                double temperature, Tensor out) {
  powers(logits, weights, logsumexp, temperature, out, {}, {});
}

void trace(const Tensor& logits, const Optional& mask, const Optional& logsumexp,
           double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  auto* to = static_cast<float*>(flat_of(out, logits, f.batches * f.tokens, "out"));
  run(logits, softmax_fisher_trace_workspace(f), [&](void* memory, void* stream) {
    return softmax_fisher_trace(f, to, memory, stream);
  });
}

void stats(const Tensor& logits, const Optional& mask, const Optional& logsumexp,
           double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, logsumexp, temperature);
  auto* to = static_cast<float*>(flat_of(out, logits, f.batches * f.tokens * kStats, "out"));
  run(logits, softmax_fisher_stats_workspace(f), [&](void* memory, void* stream) {
    return softmax_fisher_stats(f, to, memory, stream);
  });
}

void stats_backward(const Tensor& logits, const Tensor& values, const Tensor& grad,
                    const Optional& mask, double temperature, Tensor out) {
  const auto f = problem_of(logits, {}, mask, {}, temperature);
  const int64_t elements = f.batches * f.tokens * kStats;
  const auto* from = static_cast<const float*>(flat_of(values, logits, elements, "stats"));
  const auto* g = static_cast<const float*>(flat_of(grad, logits, elements, "grad"));
  const Rows to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_stats_backward(f, from, g, to, memory, stream);
  });
}

void gradient(const Tensor& logits, const Tensor& labels, const Optional& weights,
              const Optional& logsumexp, double temperature, Tensor out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const auto* y = static_cast<const int64_t*>(
      flat_of(labels, logits, f.batches * f.tokens, "labels", ScalarType::Long));
  const Rows to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_gradient(f, y, to, memory, stream);
  });
}

void sample(const Tensor& logits, const Tensor& seed, const Optional& weights,
            const Optional& logsumexp, double temperature, Tensor labels, Tensor out) {
  const auto f = problem_of(logits, weights, {}, logsumexp, temperature);
  const auto* key = static_cast<const int64_t*>(flat_of(seed, logits, 2, "seed", ScalarType::Long));
  auto* y = static_cast<int64_t*>(
      flat_of(labels, logits, f.batches * f.tokens, "labels", ScalarType::Long));
  const Rows to = rows_of(out, logits, "out");
  run(logits, 0, [&](void* memory, void* stream) {
    return softmax_fisher_sample(f, key, y, to, memory, stream);
  });
}

void panel(const Tensor& logits, const Tensor& reference, const Tensor& unit, const Optional& scale,
           double temperature, bool transposed, Tensor out) {
  const auto p = panel_of(logits, reference, unit, scale, temperature, transposed, out);
  run_on_stream(logits, [&](void* stream) { return softmax_fisher_panel(p, stream); });
}

}  // namespace
}  // namespace fisherkern::cuda

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CUDA, m) {
  m.impl("softmax_fisher_matvec", TORCH_BOX(&fisherkern::cuda::matvec));
  m.impl("softmax_fisher_sqrt_matvec", TORCH_BOX(&fisherkern::cuda::sqrt_matvec));
  m.impl("softmax_fisher_sqrt_rmatvec", TORCH_BOX(&fisherkern::cuda::sqrt_rmatvec));
  m.impl("softmax_fisher_matvec_backward", TORCH_BOX(&fisherkern::cuda::matvec_backward));
  m.impl("softmax_fisher_quadratic", TORCH_BOX(&fisherkern::cuda::quadratic));
  m.impl("softmax_fisher_diagonal", TORCH_BOX(&fisherkern::cuda::diagonal));
  m.impl("softmax_fisher_diagonal_sum", TORCH_BOX(&fisherkern::cuda::diagonal_sum));
  m.impl("softmax_fisher_mean_probs", TORCH_BOX(&fisherkern::cuda::mean_probs));
  m.impl("softmax_fisher_powers", TORCH_BOX(&fisherkern::cuda::powers));
  m.impl("softmax_fisher_trace", TORCH_BOX(&fisherkern::cuda::trace));
  m.impl("softmax_fisher_stats", TORCH_BOX(&fisherkern::cuda::stats));
  m.impl("softmax_fisher_stats_backward", TORCH_BOX(&fisherkern::cuda::stats_backward));
  m.impl("softmax_fisher_gradient", TORCH_BOX(&fisherkern::cuda::gradient));
  m.impl("softmax_fisher_sample", TORCH_BOX(&fisherkern::cuda::sample));
  m.impl("softmax_fisher_panel", TORCH_BOX(&fisherkern::cuda::panel));
}
