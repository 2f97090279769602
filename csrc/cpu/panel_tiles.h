// What all panel products share: which tile a task is, and what becomes of its sums.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "panel_product.h"
#include "simd.h"

namespace fisherkern {
namespace FISHERKERN_ISA {

// The sums of a tile stay in the second-level cache: tiles are this many columns square, at most. One
// of 2 MB is what all CPUs with matrix units have, which ask for more data, too.
#if defined(__AMX_TILE__)
constexpr int64_t kTileColumns = 384;
#else
constexpr int64_t kTileColumns = 192;
#endif
template <int W>
constexpr int64_t kTileSlices = std::max<int64_t>(1, kTileColumns / W);

template <class T>
const T* row_of(const Activations& x, int64_t position) {
  return static_cast<const T*>(x.data) + position / x.tokens * x.batch_stride +
         position % x.tokens * x.token_stride;
}

inline int64_t slices_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

struct Tile {
  int64_t head, split;
  int64_t row, row_end, column, column_end;  // in slices
};

// How many slices the tiles of a side have, all about the same.
template <int W>
int64_t tile_slices(int64_t columns) {
  const int64_t slices = slices_of(columns, W);
  return slices_of(slices, slices_of(slices, kTileSlices<W>));
}

template <int W>
int64_t tiles_per_head(const PanelProduct& p) {
  const int64_t rows = slices_of(p.rows, W * tile_slices<W>(p.rows));
  const int64_t columns = slices_of(p.columns, W * tile_slices<W>(p.columns));
  return p.triangular ? rows * (rows + 1) / 2 : rows * columns;
}

template <int W>
int64_t tile_count(const PanelProduct& p) {
  return p.heads * tiles_per_head<W>(p);
}

template <int W>
Tile tile_at(const PanelProduct& p, int64_t task) {
  const int64_t per_head = tiles_per_head<W>(p), index = task / p.splits;
  const int64_t height = tile_slices<W>(p.rows), width = tile_slices<W>(p.columns);
  int64_t row = 0, column = index % per_head;
  if (p.triangular) {
    for (; column > row; ++row) column -= row + 1;
  } else {
    const int64_t columns = slices_of(p.columns, W * width);
    row = column / columns;
    column %= columns;
  }
  return {index / per_head,
          task % p.splits,
          row * height,
          std::min((row + 1) * height, slices_of(p.rows, W)),
          column * width,
          std::min((column + 1) * width, slices_of(p.columns, W))};
}

// Where sums go, and what is added to them.
template <class A>
class Destination {
 public:
  Destination(const PanelProduct& p, int64_t head)
      : p_(p), factor_(static_cast<A*>(p.factor) + head * p.head_stride) {}

  void write(int64_t row, int64_t column, const A* sums, int64_t count) const {
    A alpha = static_cast<A>(p_.alpha), beta = static_cast<A>(p_.beta);
    A* const to = factor_ + row * p_.row_stride + column;
    const A* addend = to;
    if (p_.row_scale) alpha *= static_cast<const A*>(p_.row_scale)[row];
    if (p_.addend) {
      addend = static_cast<const A*>(p_.addend) + row * p_.addend_stride + column;
      beta = p_.addend_scale ? static_cast<const A*>(p_.addend_scale)[row] : A(1);
    } else if (beta == 0) {
      for (int64_t c = 0; c < count; ++c) to[c] = alpha * sums[c];
      return;
    }
    for (int64_t c = 0; c < count; ++c) to[c] = beta * addend[c] + alpha * sums[c];
  }

 private:
  const PanelProduct& p_;
  A* factor_;
};

// The sums of a tile, one W x W block per pair of slices, all zero if asked for.
template <class A, int W>
class TileSums {
 public:
  explicit TileSums(const Tile& tile, bool zero = true) : tile_(tile) {
    static thread_local std::vector<A> memory;
    memory.resize(kTileSlices<W> * kTileSlices<W> * W * W + kLanes<A>);
    if (zero) std::fill(memory.begin(), memory.end(), A(0));
    const auto start = reinterpret_cast<uintptr_t>(memory.data());
    sums_ = reinterpret_cast<A*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

  A* block(int64_t i, int64_t j) const {
    return sums_ + ((i - tile_.row) * kTileSlices<W> + (j - tile_.column)) * W * W;
  }

  // Into the factor, or into the partial sums of the tile's split.
  void write(const PanelProduct& p) const {
    if (p.splits > 1) {
      A* const to = static_cast<A*>(p.partial) +
                    (tile_.split * p.heads + tile_.head) * p.rows * p.columns;
      for_rows(p, [&](int64_t row, int64_t column, const A* from, int64_t count) {
        std::copy(from, from + count, to + row * p.columns + column);
      });
      return;
    }
    const Destination<A> destination(p, tile_.head);
    for_rows(p, [&](int64_t row, int64_t column, const A* from, int64_t count) {
      destination.write(row, column, from, count);
    });
  }

 private:
  // What counts of each row of each block.
  template <class Body>
  void for_rows(const PanelProduct& p, Body&& body) const {
    for (int64_t row = tile_.row * W; row < std::min(tile_.row_end * W, p.rows); ++row) {
      for (int64_t j = tile_.column; j < tile_.column_end; ++j) {
        int64_t count = std::min<int64_t>(W, p.columns - j * W);
        if (p.triangular) count = std::min(count, row + 1 - j * W);
        if (count > 0) body(row, j * W, block(row / W, j) + row % W * W, count);
      }
    }
  }

  Tile tile_;
  A* sums_;
};

template <class A>
void add_splits(const PanelProduct& p, int64_t begin, int64_t end) {
  std::vector<A> sums(p.columns);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t head = index / p.rows, row = index % p.rows;
    const A* from = static_cast<const A*>(p.partial) + index * p.columns;
    const int64_t count = p.triangular ? row + 1 : p.columns;
    for (int64_t c = 0; c < count; ++c) {
      A sum = from[c];
      for (int64_t s = 1; s < p.splits; ++s) sum += from[s * p.heads * p.rows * p.columns + c];
      sums[c] = sum;
    }
    Destination<A>(p, head).write(row, 0, sums.data(), count);
  }
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
