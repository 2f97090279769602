// C entry points of the emulated launchers for ctypes, and the controls of the emulation.
#include "covariance.h"
#include "cuda_emulation.h"
#include "softmax_fisher.h"

using namespace fisherkern;

extern "C" {

void emulation_seed(uint32_t seed) { emulation::machine().random.seed(seed); }
// How large the slices of a row are that a block of a cluster keeps; 0: no clusters, as before sm_90.
void emulation_slice_bytes(uint64_t bytes) { emulation::machine().slice_bytes = bytes; }
const char* emulation_error() {
  return emulation::machine().error ? emulation::machine().error : "";
}

#define ROWS_OP(name)                                                        \
  int name(const SoftmaxFisher* p, Rows v, Rows out, void* workspace) {      \
    return cuda::name(*p, v, out, workspace, nullptr);                       \
  }
ROWS_OP(softmax_fisher_matvec)
ROWS_OP(softmax_fisher_sqrt_matvec)
ROWS_OP(softmax_fisher_sqrt_rmatvec)

#define FLOAT_OP(name)                                                       \
  int64_t name##_workspace(const SoftmaxFisher* p) {                         \
    return cuda::name##_workspace(*p);                                       \
  }                                                                          \
  int name(const SoftmaxFisher* p, float* out, void* workspace) {            \
    return cuda::name(*p, out, workspace, nullptr);                          \
  }
FLOAT_OP(softmax_fisher_diagonal_sum)
FLOAT_OP(softmax_fisher_trace)
FLOAT_OP(softmax_fisher_stats)

int64_t softmax_fisher_powers_workspace(const SoftmaxFisher* p) {
  return cuda::softmax_fisher_powers_workspace(*p);
}

int softmax_fisher_powers(const SoftmaxFisher* p, float* out, float* reference, float* unit,
                          void* workspace) {
  return cuda::softmax_fisher_powers(*p, out, reference, unit, workspace, nullptr);
}

int softmax_fisher_matvec_backward(const SoftmaxFisher* p, Rows v, Rows grad, Rows out,
                                   void* workspace) {
  return cuda::softmax_fisher_matvec_backward(*p, v, grad, out, workspace, nullptr);
}

int softmax_fisher_diagonal(const SoftmaxFisher* p, Rows out, void* workspace) {
  return cuda::softmax_fisher_diagonal(*p, out, workspace, nullptr);
}

int softmax_fisher_quadratic(const SoftmaxFisher* p, Rows directions, int64_t stride,
                             int64_t count, float* out, void* workspace) {
  return cuda::softmax_fisher_quadratic(*p, directions, stride, count, out, workspace, nullptr);
}

int softmax_fisher_stats_backward(const SoftmaxFisher* p, const float* stats, const float* grad,
                                  Rows out, void* workspace) {
  return cuda::softmax_fisher_stats_backward(*p, stats, grad, out, workspace, nullptr);
}

int softmax_fisher_gradient(const SoftmaxFisher* p, const int64_t* labels, Rows out,
                            void* workspace) {
  return cuda::softmax_fisher_gradient(*p, labels, out, workspace, nullptr);
}

int softmax_fisher_sample(const SoftmaxFisher* p, const int64_t* seed, int64_t* labels, Rows out,
                          void* workspace) {
  return cuda::softmax_fisher_sample(*p, seed, labels, out, workspace, nullptr);
}

int softmax_fisher_panel(const SoftmaxFisher* p, const float* reference, const float* scale,
                         float* out, int64_t stride, bool transposed, void*) {
  return cuda::softmax_fisher_panel({*p, reference, scale, out, stride, transposed}, nullptr);
}

int covariance_pack(const Activations* x, const cuda::TokenWeights* weights,
                    const cuda::Panel* panel) {
  return cuda::covariance_pack(*x, *weights, *panel, nullptr);
}

int factor_update(const cuda::FactorUpdate* update) {
  return cuda::factor_update(*update, nullptr);
}

int mirror(const cuda::Matrices* factor) { return cuda::mirror(*factor, nullptr); }

}  // extern "C"
