// Entry points of the CPU kernels, once per instruction set, each over the tokens [begin, end).
#pragma once
#include "../softmax_fisher.h"

#define FISHERKERN_DECLARE(ISA)                                                                    \
  namespace ISA {                                                                                  \
  void matvec(const SoftmaxFisher&, Rows v, Rows out, int64_t begin, int64_t end);                 \
  void sqrt_matvec(const SoftmaxFisher&, Rows v, Rows out, int64_t begin, int64_t end);            \
  void sqrt_rmatvec(const SoftmaxFisher&, Rows v, Rows out, int64_t begin, int64_t end);           \
  void matvec_backward(const SoftmaxFisher&, Rows v, Rows grad, Rows out, int64_t begin,           \
                       int64_t end);                                                               \
  void quadratic(const SoftmaxFisher&, Rows v, int64_t direction_stride, int64_t directions,       \
                 void* out, int64_t begin, int64_t end);                                           \
  void diagonal(const SoftmaxFisher&, Rows out, int64_t begin, int64_t end);                       \
  void trace(const SoftmaxFisher&, void* out, int64_t begin, int64_t end);                         \
  void stats(const SoftmaxFisher&, void* out, int64_t begin, int64_t end);                         \
  void stats_backward(const SoftmaxFisher&, const void* stats, const void* grad, Rows out,         \
                      int64_t begin, int64_t end);                                                 \
  void gradient(const SoftmaxFisher&, const int64_t* labels, Rows out, int64_t begin,              \
                int64_t end);                                                                      \
  /* seed: key, and index of the first token */                                                    \
  void sample(const SoftmaxFisher&, const int64_t* seed, int64_t* labels, Rows out, int64_t begin, \
              int64_t end);                                                                        \
  /* the tokens [begin, end) into one row of partial sums [V], all of which is written */          \
  void probabilities_sum(const SoftmaxFisher&, void* partial, void* reference, void* unit,         \
                         int64_t begin, int64_t end); /* r and u [T] may be null */                \
  void diagonal_sum(const SoftmaxFisher&, void* partial, int64_t begin, int64_t end);              \
  /* these tokens and classes of a panel; `out` is where the first of them goes */                 \
  void panel(const SoftmaxFisherPanel&, int64_t first_token, int64_t last_token,                   \
             int64_t first_class, int64_t last_class);                                             \
  /* out[c] += sum over rows of partial[row, c] for the classes [begin, end), rows in order */     \
  void add_partials(const SoftmaxFisher&, const void* partial, int64_t rows, void* out,            \
                    int64_t begin, int64_t end);                                                   \
  }

namespace fisherkern {
FISHERKERN_DECLARE(baseline)
#if defined(FISHERKERN_X86)
FISHERKERN_DECLARE(avx2)
FISHERKERN_DECLARE(avx512)
#endif
}  // namespace fisherkern
