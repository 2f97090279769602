// The gradient of w times cross-entropy, w (p - e_label) / tau, for given labels.
#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

struct Gradient {
  static constexpr int kInputs = 0;
  using State = PeakSums<1>;
  const int64_t* labels;
  float inverse_temperature;
  float factor;
  int label;
  Probability probability;

  __device__ float prepare(float weight, int64_t token, int classes) {
    if (weight == 0.f) return 0.f;
    const int64_t y = labels[token];
    const bool outside = y < 0 || y >= classes;
    label = outside ? 0 : static_cast<int>(y);
    return outside ? NAN : weight;
  }

  __device__ void finish(const State& state, const Exponent& exponent, float weight) {
    probability.set(state, exponent);
    factor = weight * inverse_temperature;
  }

  __device__ float value(float e, const float (&)[1], int c) const {
    return factor * (c == label ? -probability.one_minus_p(e) : probability.p(e));
  }
};

}  // namespace

int softmax_fisher_gradient(const SoftmaxFisher& problem, const int64_t* labels, Rows out, void*,
                            void* stream) {
  Gradient op{};
  op.labels = labels;
  op.inverse_temperature = static_cast<float>(1.0 / problem.temperature);
  return launch_rows(problem, op, {}, out, stream);
}

}  // namespace fisherkern::cuda
