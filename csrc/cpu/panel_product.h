// Products of packed panels: the matrix products of this package, with what surrounds them fused in.
//
// A panel holds rows of tokens cut into slices of kSlice columns, [slices][capacity][kSlice] in the
// accumulation type. Packing is where rows are selected, widened, weighted and given their bias
// coordinate, so that no such copy of the whole input exists. A product adds up the tokens of two
// panels, tile by tile of the result; a tile belongs to one thread and its tokens come in a fixed
// order, so that the bits do not depend on the threads.
#pragma once
#include "../covariance.h"

namespace fisherkern {

// Tokens to pack: positions in the flattened [batches, tokens], and their weights if there are any.
struct TokenList {
  const int64_t* position;  // null: 0, 1, 2, ...
  const double* weight;     // null: all one
  int64_t count;

  int64_t operator[](int64_t t) const { return position ? position[t] : t; }
};

struct Panel {
  void* data;
  int64_t capacity;  // tokens
};

// factor <- beta factor + alpha (sum over segments of left^T right), or of its squares. With an
// epilogue: factor <- diag(addend_scale) addend + alpha diag(row_scale) (...).
struct PanelProduct {
  Panel left, right;
  int64_t rows, columns;  // of a factor
  int64_t heads;
  const int64_t* segments;  // bounds of count + 1: tokens that are multiplied in one go
  int64_t segment_count;
  bool square;      // the product of each segment, before it is added
  bool triangular;  // only the tiles that touch the lower triangle, and only that half of them
  int64_t splits;   // shares of the segments, each a task of its own,
  void* partial;    // and their sums [splits, heads, rows, columns] where there are several
  void* factor;
  int64_t head_stride, row_stride;
  double alpha, beta;
  const void* row_scale;  // [rows], or null for ones
  const void* addend;     // or null: the factor, times beta
  const void* addend_scale;
  int64_t addend_stride;
};

// The kernels of one arithmetic, and how its panels look.
struct PanelKernels {
  int64_t slice_width;    // columns of a slice
  int64_t segment;        // tokens that are best multiplied in one go
  int64_t token_block;    // tokens of a panel come in multiples of this, the last filled with zeros
  int64_t element_bytes;  // of a panel
  bool sides_alike;       // a panel may serve as left and as right one
  // the tokens [begin, end) of the list, all heads; begin is a multiple of token_block
  void (*pack)(const Activations&, const TokenList&, Panel, bool left, int64_t begin, int64_t end);
  // `count` tokens of each column of a [columns][stride] in the accumulation type, into both panels
  // (the right one may have no data); null where a panel is nothing but such columns side by side
  void (*pack_columns)(const void*, int64_t stride, int64_t columns, int64_t count, Panel left,
                       Panel right);
  int64_t (*tile_count)(const PanelProduct&);
  void (*multiply_tile)(const PanelProduct&, int64_t task);  // task = tile * splits + split
  // the rows [begin, end) of all heads, splits in order
  void (*add_splits)(const PanelProduct&, int64_t begin, int64_t end);
};

#define FISHERKERN_DECLARE_PANELS(ISA)      \
  namespace ISA {                           \
  const PanelKernels& panel_kernels(bool wide); /* double, or float */ \
  }

FISHERKERN_DECLARE_PANELS(baseline)
#if defined(FISHERKERN_X86)
FISHERKERN_DECLARE_PANELS(avx2)
FISHERKERN_DECLARE_PANELS(avx512)
#endif
#if defined(FISHERKERN_AMX)
namespace amx {
// bfloat16 without weights, summed in float.
const PanelKernels& panel_kernels();
// Anything narrower than double, as float in three bfloat16 terms.
const PanelKernels& split_panel_kernels();
}  // namespace amx
#endif

}  // namespace fisherkern
