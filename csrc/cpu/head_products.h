// Entry points of the products with the weight of a head, once per instruction set.
//
// Tasks write different elements, each a sum in a fixed order: the bits do not depend on threads.
#pragma once
#include "../head.h"

namespace fisherkern {

// `panel` holds hidden states as slivers: columns that a few vector registers hold, side by side. It
// is packed sliver by sliver before the tasks of the product that reads it.
#define FISHERKERN_DECLARE_HEAD(ISA)                                                             \
  namespace ISA {                                                                                \
  /* z = h W^T + b, soft-capped: slivers of tokens */                                            \
  int64_t head_token_slivers(const Head&);                                                       \
  int64_t head_token_sliver_bytes(const Head&);                                                  \
  void head_pack_tokens(const Head&, void* panel, int64_t sliver);                               \
  int64_t head_logits_tasks(const Head&);                                                        \
  /* `next`: whether the same thread goes on with the next task */                               \
  void head_logits(const Head&, const void* panel, int64_t task, bool next);                     \
  /* out = rows W: the classes in `splits` shares, each into its own of [splits, T, d] */        \
  int64_t head_pull_tasks(const Head&, int64_t splits);                                          \
  void head_pull(const Head&, int64_t splits, void* partial, int64_t task);                      \
  void head_add_splits(const Head&, int64_t splits, const void* partial, int64_t token);         \
  /* out = beta out + rows^T h^2: slivers of features */                                         \
  int64_t head_feature_slivers(const Head&);                                                     \
  int64_t head_feature_sliver_bytes(const Head&);                                                \
  void head_pack_squares(const Head&, void* panel, int64_t sliver);                              \
  int64_t head_squares_tasks(const Head&);                                                       \
  void head_squares(const Head&, const void* panel, int64_t task);                               \
  }

FISHERKERN_DECLARE_HEAD(baseline)
#if defined(FISHERKERN_X86)
FISHERKERN_DECLARE_HEAD(avx2)
FISHERKERN_DECLARE_HEAD(avx512)
#endif

}  // namespace fisherkern
