// Matrix-vector products with the softmax Fisher and its roots, their derivative, and the diagonal.
//
// F = (diag p - p p^T) / tau^2, L = (diag sqrt p - p sqrt p^T) / tau, p = e / s; v* is v at the
// largest logit and mu = sum p (v - v*), so that v - <p, v> = (v - v*) - mu without cancellation.
#include "row_kernel.cuh"
#include "softmax_fisher.h"

namespace fisherkern::cuda {
namespace {

struct Weighted {
  __device__ float prepare(float weight, int64_t, int) const { return weight; }
};

// w p (v - <p, v>) / tau^2, or with kRoot sqrt(w) sqrt(p) (v - <p, v>) / tau.
template <bool kRoot>
struct Centred : Weighted {
  static constexpr int kInputs = 1;
  using State = Moments<1>;
  float inverse_temperature;
  float factor, centre, mean;

  __device__ void finish(const State& state, const Exponent& exponent, float weight) {
    const float inverse = 1.f / state.total(exponent);
    factor = weight * inverse_temperature *
             (kRoot ? sqrtf(inverse) : inverse * inverse_temperature);
    centre = state.centre[0];
    mean = state.a[0] * inverse;
  }

  __device__ float value(float e, const float (&v)[1], int) const {
    return factor * (kRoot ? sqrtf(e) : e) * ((v[0] - centre) - mean);
  }
};

// sqrt(w) (sqrt(p) v - p <sqrt p, v>) / tau; at the star sqrt(p) (1 - p) v - p sum' sqrt(p) v.
struct SqrtMatvec : Weighted {
  static constexpr int kInputs = 1;
  using State = RootSums;
  float inverse_temperature;
  float factor, inverse, root_inverse, dot, other_dot, complement;
  int star;

  __device__ void finish(const State& state, const Exponent& exponent, float weight) {
    inverse = 1.f / state.total(exponent);
    root_inverse = sqrtf(inverse);
    factor = weight * inverse_temperature;
    other_dot = state.b * root_inverse;
    dot = sqrtf(state.star) * state.v * root_inverse + other_dot;
    complement = state.s * inverse;
    star = state.index;
  }

  __device__ float value(float e, const float (&v)[1], int c) const {
    const float p = e * inverse, root = sqrtf(e) * root_inverse;
    const float lv = c == star ? root * complement * v[0] - p * other_dot : root * v[0] - p * dot;
    return factor * lv;
  }
};

// w (a - p sum a) / tau^3 with a = p (v - <p, v>) (g - <p, g>); sum a is a covariance.
struct MatvecBackward : Weighted {
  static constexpr int kInputs = 2;
  using State = Moments<1, 1>;
  float inverse_temperature;
  float factor, covariance;
  float centre[2], mean[2];

  __device__ void finish(const State& state, const Exponent& exponent, float weight) {
    const float inverse = 1.f / state.total(exponent);
    factor = weight * inverse * inverse_temperature * inverse_temperature * inverse_temperature;
    covariance = state.c[0][0] * inverse;
    for (int k = 0; k < 2; ++k) {
      centre[k] = state.centre[k];
      mean[k] = state.a[k] * inverse;
    }
  }

  __device__ float value(float e, const float (&x)[2], int) const {
    const float v = (x[0] - centre[0]) - mean[0], g = (x[1] - centre[1]) - mean[1];
    return factor * e * (v * g - covariance);
  }
};

// w p (1 - p) / tau^2.
struct Diagonal : Weighted {
  static constexpr int kInputs = 0;
  using State = PeakSums<1>;
  float inverse_temperature;
  float factor;
  Probability probability;

  __device__ void finish(const State& state, const Exponent& exponent, float weight) {
    probability.set(state, exponent);
    factor = weight * inverse_temperature * inverse_temperature;
  }

  __device__ float value(float e, const float (&)[1], int) const {
    return factor * (probability.p(e) * probability.one_minus_p(e));
  }
};

template <class Op>
Op with_temperature(const SoftmaxFisher& problem) {
  Op op{};
  op.inverse_temperature = static_cast<float>(1.0 / problem.temperature);
  return op;
}

}  // namespace

int softmax_fisher_matvec(const SoftmaxFisher& problem, Rows v, Rows out, void*, void* stream) {
  return launch_rows(problem, with_temperature<Centred<false>>(problem), {{v}}, out, stream);
}

int softmax_fisher_matvec_backward(const SoftmaxFisher& problem, Rows v, Rows grad, Rows out, void*,
                                   void* stream) {
  const auto op = with_temperature<MatvecBackward>(problem);
  return launch_rows(problem, op, {{v, grad}}, out, stream);
}

int softmax_fisher_sqrt_matvec(const SoftmaxFisher& problem, Rows v, Rows out, void*,
                               void* stream) {
  return launch_rows(problem, with_temperature<SqrtMatvec>(problem), {{v}}, out, stream);
}

int softmax_fisher_sqrt_rmatvec(const SoftmaxFisher& problem, Rows v, Rows out, void*,
                                void* stream) {
  return launch_rows(problem, with_temperature<Centred<true>>(problem), {{v}}, out, stream);
}

int softmax_fisher_diagonal(const SoftmaxFisher& problem, Rows out, void*, void* stream) {
  return launch_rows(problem, with_temperature<Diagonal>(problem), {}, out, stream);
}

}  // namespace fisherkern::cuda
