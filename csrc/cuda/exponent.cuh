// Powers of two for one row: e = 2^((z - reference) scale + bias), scale = log2(e) / temperature.
//
// Without a given logsumexp the reference is the largest logit, met while the row is read, and
// probabilities are e / sum e. With one, e is the probability itself and is never rescaled.
#pragma once
#include <cmath>

#include "problem.cuh"

namespace fisherkern::cuda {

constexpr float kLn2 = 0.693147181f;

// Flushes results below 2^-126: probabilities that no float32 sum can tell from zero.
__device__ inline float power_of_two(float t) {
#ifdef FISHERKERN_HOST_EMULATION
  const float e = std::exp2(t);
  return e < 1.17549435e-38f ? 0.f : e;
#else
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#endif
}

// What an online sum does with one more logit z after the largest one so far, m.
struct Step {
  bool higher;  // z is the new largest
  float ratio;  // factor of the old terms
  float e;      // this term, after any rescaling
  float depth;  // bits between the logit and its reference; between the maxima if higher
};

struct Exponent {
  float scale, reference, bias;
  bool given;

  static constexpr float kMaxDepth = 1e4f;  // e is 0 long before, and 0 * depth must not be NaN

  __device__ Exponent(const Problem& problem, const float* logsumexp)
      : scale(problem.scale), reference(0.f), bias(0.f), given(logsumexp != nullptr) {
    if (given) {
      // temperature * logsumexp to twice the precision: subtracting it must not cost digits of z
      const double product = static_cast<double>(*logsumexp) * problem.temperature;
      reference = static_cast<float>(product);
      const double rest = product - static_cast<double>(reference);
      bias = isfinite(reference) ? -static_cast<float>(rest) * scale : 0.f;
    }
  }

  __device__ float log2(float z) const { return fmaf(z - reference, scale, bias); }

  // Equal infinities are at distance zero, not NaN.
  __device__ float distance(float a, float b) const { return a == b ? 0.f : (a - b) * scale; }

  __device__ Step step(float m, float z) const {
    const bool higher = z > m;
    if (given) {
      const float t = log2(z);
      return {higher, 1.f, power_of_two(t), fminf(-t, kMaxDepth)};
    }
    const float depth = fabsf(distance(z, m));
    const float e = power_of_two(-depth);
    return {higher, higher ? e : 1.f, higher ? 1.f : e, fminf(depth, kMaxDepth)};
  }

  // Factor of the terms relative to the maximum `low` when the maximum becomes `high`.
  __device__ float ratio(float high, float low) const {
    return given ? 1.f : power_of_two(distance(low, high));
  }
};

}  // namespace fisherkern::cuda
