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

struct Exponent {
  float scale, scale_low, reference, bias;
  bool given;

  static constexpr float kMaxDepth = 1e4f;  // e is 0 long before, and 0 * depth must not be NaN

  __device__ Exponent(const Problem& problem, const float* logsumexp)
      : scale(problem.scale),
        scale_low(problem.scale_low),
        reference(0.f),
        bias(0.f),
        given(logsumexp != nullptr) {
    if (given) {
      // temperature * logsumexp to twice the precision: subtracting it must not cost digits of z
      const double product = static_cast<double>(*logsumexp) * problem.temperature;
      reference = static_cast<float>(product);
      const double rest = product - static_cast<double>(reference);
      bias = isfinite(reference) ? -static_cast<float>(rest) * scale : 0.f;
    }
  }

  __device__ float log2(float z) const { return log2(z, reference); }
  __device__ float log2(float z, float base) const { return fmaf(z - base, scale, bias); }

  // Of a term of a sum over classes: the rounding of its exponent is left alone, |t| / 2 ulp of either
  // sign, and terms with a large |t| are small.
  __device__ float term(float t) const { return power_of_two(t); }

  __device__ float power(float z) const { return power(z, reference); }

  // 2^t for t = log2(z, base), times what the roundings of t and of the scale lost: left alone, they
  // cost |t| / 2 ulp, which is more than plain PyTorch loses.
  __device__ float power(float z, float base) const {
    const float d = z - base, t = fmaf(d, scale, bias), e = power_of_two(t);
    const float lost = fmaf(d, scale_low, fmaf(d, scale, -t) + bias);
    return e == 0.f ? 0.f : fmaf(e, kLn2 * lost, e);  // where d is -inf, lost is NaN
  }

  // What logits are measured from while m is the largest so far: never an infinity, as a sum that
  // has one is discarded in the end, and -inf - (-inf) would spoil those that meet -inf first.
  __device__ float base(float m) const { return given ? reference : isinf(m) ? 0.f : m; }

  // Whether a logit is so far above `base` that powers from there might overflow: the third power of
  // 2^kLag must not, summed over all classes.
  static constexpr float kLag = 24.f;
  __device__ bool far(float z, float base) const { return !given && (z - base) * scale > kLag; }

  // The power of the largest logit, 0 where there is none.
  __device__ float at_star(float z) const {
    return z == -INFINITY ? 0.f : given ? power(z) : 1.f;
  }

  // Equal infinities are at distance zero, not NaN.
  __device__ float distance(float a, float b) const { return a == b ? 0.f : (a - b) * scale; }

  // Factor of the terms relative to the maximum `low` when the maximum becomes `high`.
  __device__ float ratio(float high, float low) const {
    return given ? 1.f : power_of_two(distance(low, high));
  }
};

}  // namespace fisherkern::cuda
