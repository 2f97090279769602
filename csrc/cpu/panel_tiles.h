// What all panel products share: which tile a task is, and what becomes of its sums.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "panel_product.h"
#include "simd.h"

namespace fisherkern {
namespace FISHERKERN_ISA {

// Tiles are kTileSlices x kTileSlices pairs of slices of W columns each, about 200 columns square:
// their sums stay in the second-level cache.
template <int W>
constexpr int64_t kTileSlices = std::max(1, 192 / W);

inline int64_t slices_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

struct Tile {
  int64_t head, split;
  int64_t row, row_end, column, column_end;  // in slices
};

template <int W>
int64_t tiles_per_head(const PanelProduct& p) {
  const int64_t rows = slices_of(p.rows, W * kTileSlices<W>);
  const int64_t columns = slices_of(p.columns, W * kTileSlices<W>);
  return p.triangular ? rows * (rows + 1) / 2 : rows * columns;
}

template <int W>
int64_t tile_count(const PanelProduct& p) {
  return p.heads * tiles_per_head<W>(p);
}

template <int W>
Tile tile_at(const PanelProduct& p, int64_t task) {
  const int64_t per_head = tiles_per_head<W>(p), index = task / p.splits;
  int64_t row = 0, column = index % per_head;
  if (p.triangular) {
    for (; column > row; ++row) column -= row + 1;
  } else {
    const int64_t columns = slices_of(p.columns, W * kTileSlices<W>);
    row = column / columns;
    column %= columns;
  }
  constexpr int64_t n = kTileSlices<W>;
  return {index / per_head,
          task % p.splits,
          row * n,
          std::min((row + 1) * n, slices_of(p.rows, W)),
          column * n,
          std::min((column + 1) * n, slices_of(p.columns, W))};
}

// The sums of a tile, one W x W block per pair of slices, all zero.
template <class A, int W>
class TileSums {
 public:
  explicit TileSums(const Tile& tile) : tile_(tile) {
    static thread_local std::vector<A> memory;
    memory.assign(kTileSlices<W> * kTileSlices<W> * W * W + kLanes<A>, A(0));
    const auto start = reinterpret_cast<uintptr_t>(memory.data());
    sums_ = reinterpret_cast<A*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

  A* block(int64_t i, int64_t j) const {
    return sums_ + ((i - tile_.row) * kTileSlices<W> + (j - tile_.column)) * W * W;
  }

  // Into the factor, or into the partial sums of the tile's split.
  void write(const PanelProduct& p) const {
    const bool whole = p.splits == 1;
    A* const factor = whole ? static_cast<A*>(p.factor) + tile_.head * p.head_stride
                            : static_cast<A*>(p.partial) +
                                  (tile_.split * p.heads + tile_.head) * p.rows * p.columns;
    const int64_t stride = whole ? p.row_stride : p.columns;
    const A alpha = static_cast<A>(whole ? p.alpha : 1), beta = static_cast<A>(whole ? p.beta : 0);
    for (int64_t row = tile_.row * W; row < std::min(tile_.row_end * W, p.rows); ++row) {
      for (int64_t j = tile_.column; j < tile_.column_end; ++j) {
        const A* from = block(row / W, j) + row % W * W;
        A* to = factor + row * stride + j * W;
        int64_t count = std::min<int64_t>(W, p.columns - j * W);
        if (p.triangular) count = std::min(count, row + 1 - j * W);
        for (int64_t c = 0; c < count; ++c)
          to[c] = beta == 0 ? alpha * from[c] : beta * to[c] + alpha * from[c];
      }
    }
  }

 private:
  Tile tile_;
  A* sums_;
};

template <class A>
void add_splits(const PanelProduct& p, int64_t begin, int64_t end) {
  const A alpha = static_cast<A>(p.alpha), beta = static_cast<A>(p.beta);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t head = index / p.rows, row = index % p.rows;
    const A* from = static_cast<const A*>(p.partial) + index * p.columns;
    A* to = static_cast<A*>(p.factor) + head * p.head_stride + row * p.row_stride;
    const int64_t count = p.triangular ? row + 1 : p.columns;
    for (int64_t c = 0; c < count; ++c) {
      A sum = from[c];
      for (int64_t s = 1; s < p.splits; ++s) sum += from[s * p.heads * p.rows * p.columns + c];
      to[c] = beta == 0 ? alpha * sum : beta * to[c] + alpha * sum;
    }
  }
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
