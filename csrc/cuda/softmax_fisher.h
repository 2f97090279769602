// Launchers of the CUDA back end, one per op of fisherkern/ops/_reference_kernels.py.
//
// Each returns a cudaError_t as int, enqueues on `stream` (a cudaStream_t), neither allocates nor
// waits for the device, and may be captured in a CUDA graph. `workspace` is device memory of at
// least <op>_workspace(problem) bytes, aligned to 16; ops without such a function ignore it. Rows
// are float32, bfloat16 or float16; float64 is refused with cudaErrorInvalidValue.
// T = batches * tokens; row outputs have the dtype of the logits, the others are float.
#pragma once
#include "../softmax_fisher.h"

namespace fisherkern::cuda {

int softmax_fisher_matvec(const SoftmaxFisher& problem, Rows v, Rows out, void* workspace,
                          void* stream);
int softmax_fisher_matvec_backward(const SoftmaxFisher& problem, Rows v, Rows grad, Rows out,
                                   void* workspace, void* stream);
// For the two roots the weights come with their root already taken.
int softmax_fisher_sqrt_matvec(const SoftmaxFisher& problem, Rows v, Rows out, void* workspace,
                               void* stream);
int softmax_fisher_sqrt_rmatvec(const SoftmaxFisher& problem, Rows v, Rows out, void* workspace,
                                void* stream);
int softmax_fisher_diagonal(const SoftmaxFisher& problem, Rows out, void* workspace, void* stream);

// `directions` [B, S, K, V]; out [T, K, K].
int softmax_fisher_quadratic(const SoftmaxFisher& problem, Rows directions,
                             int64_t direction_stride, int64_t count, float* out, void* workspace,
                             void* stream);

// out [V].
int64_t softmax_fisher_diagonal_sum_workspace(const SoftmaxFisher& problem);
int softmax_fisher_diagonal_sum(const SoftmaxFisher& problem, float* out, void* workspace,
                                void* stream);
// out [V] = sum w p; where they are given, reference and unit [T] with
// p = unit exp((z - reference) / tau), both 0 for a weight of 0.
int64_t softmax_fisher_powers_workspace(const SoftmaxFisher& problem);
int softmax_fisher_powers(const SoftmaxFisher& problem, float* out, float* reference, float* unit,
                          void* workspace, void* stream);

// out [T] and [T, 5].
int64_t softmax_fisher_trace_workspace(const SoftmaxFisher& problem);
int softmax_fisher_trace(const SoftmaxFisher& problem, float* out, void* workspace, void* stream);
int64_t softmax_fisher_stats_workspace(const SoftmaxFisher& problem);
int softmax_fisher_stats(const SoftmaxFisher& problem, float* out, void* workspace, void* stream);
// stats and grad [T, 5].
int softmax_fisher_stats_backward(const SoftmaxFisher& problem, const float* stats,
                                  const float* grad, Rows out, void* workspace, void* stream);

// labels [T]; out may be the logits themselves.
int softmax_fisher_gradient(const SoftmaxFisher& problem, const int64_t* labels, Rows out,
                            void* workspace, void* stream);
// seed: key and index of the first token, int64 on the device; out may be the logits themselves.
int softmax_fisher_sample(const SoftmaxFisher& problem, const int64_t* seed, int64_t* labels,
                          Rows out, void* workspace, void* stream);

// Tiles of logits are read where they lie, in whatever part of a row they are.
int softmax_fisher_panel(const SoftmaxFisherPanel& panel, void* stream);

}  // namespace fisherkern::cuda
