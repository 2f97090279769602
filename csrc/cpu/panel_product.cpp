#include "panel_product.h"

#include <vector>

#include "simd.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// A micro-tile of kRows x kSlice sums lives in registers: 24 of 32 vectors, or 12 of 16.
constexpr int kVectors = 3;
template <class A>
constexpr int kSlice = kVectors * kLanes<A>;
template <class A>
constexpr int kRows = kVectorBytes == 64 ? 8 : kLanes<A> == 2 ? 2 : 4;
// Tokens of a segment: one slice of the right panel stays in the first-level cache while all rows of
// a tile go by, and a chain of additions is short enough to be more accurate than a plain product.
template <class A>
constexpr int64_t kSegment = std::min<int64_t>(128, (24 << 10) / (kSlice<A> * sizeof(A)));
// Columns of a tile: its sums stay in the second-level cache.
template <class A>
constexpr int64_t kTileSlices = std::max<int64_t>(1, 192 / kSlice<A>);

static_assert(kSlice<float> % kRows<float> == 0 && kSlice<double> % kRows<double> == 0);

template <class A>
int64_t slices_of(int64_t columns) {
  return (columns + kSlice<A> - 1) / kSlice<A>;
}

template <class A>
A* slice(Panel panel, int64_t index) {
  return static_cast<A*>(panel.data) + index * panel.capacity * kSlice<A>;
}


// `count` elements as the accumulation type, zeros up to a whole slice.
template <class T, class A>
void pack_slice(const T* from, int64_t count, bool squares, A weight, A* to) {
  alignas(kVectorBytes) A values[kSlice<A>] = {};
  if constexpr (sizeof(Acc<T>) == sizeof(A)) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(values + i, load(from + i));
    if (i < count) store(values + i, load_some(from + i, count - i, A(0)));
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = to_accumulation(from[i]);
  }
  for (int j = 0; j < kVectors; ++j) {
    Vec<A> x = load(values + j * kLanes<A>);
    if (squares) x *= x;
    store(to + j * kLanes<A>, x * weight);
  }
}

template <class T, class A>
void pack_rows(const Activations& x, const TokenList& list, Panel panel, int64_t begin,
               int64_t end) {
  const int64_t slices = slices_of<A>(x.width());
  // slice after slice for a few tokens: both the reads and the writes go along memory
  constexpr int64_t kTokens = 16;
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t last = std::min(first + kTokens, end);
    for (int64_t s = 0; s < x.heads * slices; ++s) {
      const int64_t column = s % slices * kSlice<A>;
      const int64_t count = std::clamp<int64_t>(x.columns - column, 0, kSlice<A>);
      A* to = slice<A>(panel, s) + first * kSlice<A>;
      for (int64_t t = first; t < last; ++t, to += kSlice<A>) {
        const int64_t position = list.position[t];
        const T* from = static_cast<const T*>(x.data) + position / x.tokens * x.batch_stride +
                        position % x.tokens * x.token_stride + s / slices * x.head_stride + column;
        const A weight = list.weight ? static_cast<A>(list.weight[t]) : A(1);
        pack_slice(from, count, x.squares, weight, to);
        if (x.bias && column <= x.columns && x.columns < column + kSlice<A>)
          to[x.columns - column] = weight;
      }
    }
  }
}

// The first N vectors of sums [kRows][kSlice] += the product of `count` tokens, or its square.
template <int N, class A>
void micro_tile(const A* left, const A* right, int64_t count, bool square, A* sums) {
  constexpr int R = kRows<A>, L = kLanes<A>;
  Vec<A> sum[R][N] = {};
  for (int64_t t = 0; t < count; ++t) {
    Vec<A> b[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b[j] = load(right + j * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = broadcast(left[r]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[r][j] = multiply_add(a, b[j], sum[r][j]);
    }
    left += kSlice<A>;
    right += kSlice<A>;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      A* to = sums + r * kSlice<A> + j * L;
      const Vec<A> x = sum[r][j];
      store(to, load(to) + (square ? x * x : x));
    }
  }
}

struct Tile {
  int64_t head, row, column, split;  // row and column in tiles
};

template <class A>
int64_t tiles_per_head(const PanelProduct& p) {
  constexpr int64_t width = kTileSlices<A> * kSlice<A>;
  const int64_t rows = (p.rows + width - 1) / width, columns = (p.columns + width - 1) / width;
  return p.triangular ? rows * (rows + 1) / 2 : rows * columns;
}

template <class A>
Tile tile_at(const PanelProduct& p, int64_t task) {
  constexpr int64_t width = kTileSlices<A> * kSlice<A>;
  const int64_t per_head = tiles_per_head<A>(p), columns = (p.columns + width - 1) / width;
  Tile tile{task / p.splits / per_head, 0, task / p.splits % per_head, task % p.splits};
  if (p.triangular) {
    for (; tile.column > tile.row; ++tile.row) tile.column -= tile.row + 1;
  } else {
    tile.row = tile.column / columns;
    tile.column %= columns;
  }
  return tile;
}

template <class A>
void multiply(const PanelProduct& p, int64_t task) {
  constexpr int W = kSlice<A>;
  const Tile tile = tile_at<A>(p, task);
  const int64_t row_slices = slices_of<A>(p.rows), column_slices = slices_of<A>(p.columns);
  const int64_t i0 = tile.row * kTileSlices<A>, j0 = tile.column * kTileSlices<A>;
  const int64_t i1 = std::min(i0 + kTileSlices<A>, row_slices);
  const int64_t j1 = std::min(j0 + kTileSlices<A>, column_slices);
  // sums of the tile, one W x W block per pair of slices
  static thread_local std::vector<A> memory;
  memory.assign(kTileSlices<A> * kTileSlices<A> * W * W + kLanes<A>, A(0));
  const auto start = reinterpret_cast<uintptr_t>(memory.data());
  A* const sums = reinterpret_cast<A*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  auto block = [&](int64_t i, int64_t j) {
    return sums + ((i - i0) * kTileSlices<A> + (j - j0)) * W * W;
  };
  const int64_t last = (tile.split + 1) * p.segment_count / p.splits;
  for (int64_t s = tile.split * p.segment_count / p.splits; s < last; ++s) {
    const int64_t begin = p.segments[s], count = p.segments[s + 1] - begin;
    for (int64_t j = j0; j < j1; ++j) {
      const A* right = slice<A>(p.right, tile.head * column_slices + j) + begin * W;
      for (int64_t i = p.triangular ? std::max(i0, j) : i0; i < i1; ++i) {
        const A* left = slice<A>(p.left, tile.head * row_slices + i) + begin * W;
        const int rows = static_cast<int>(std::min<int64_t>(W, p.rows - i * W));
        const int columns = static_cast<int>(std::min<int64_t>(W, p.columns - j * W));
        for (int r = 0; r < rows; r += kRows<A>) {
          const int used = p.triangular && i == j ? std::min(columns, r + kRows<A>) : columns;
          A* to = block(i, j) + r * W;
          if (used > 2 * kLanes<A>)
            micro_tile<3>(left + r, right, count, p.square, to);
          else if (used > kLanes<A>)
            micro_tile<2>(left + r, right, count, p.square, to);
          else
            micro_tile<1>(left + r, right, count, p.square, to);
        }
      }
    }
  }
  const bool whole = p.splits == 1;
  A* const factor = whole ? static_cast<A*>(p.factor) + tile.head * p.head_stride
                          : static_cast<A*>(p.partial) +
                                (tile.split * p.heads + tile.head) * p.rows * p.columns;
  const int64_t stride = whole ? p.row_stride : p.columns;
  const A alpha = static_cast<A>(whole ? p.alpha : 1), beta = static_cast<A>(whole ? p.beta : 0);
  for (int64_t row = i0 * W; row < std::min(i1 * W, p.rows); ++row) {
    for (int64_t j = j0; j < j1; ++j) {
      const A* from = block(row / W, j) + row % W * W;
      A* to = factor + row * stride + j * W;
      int64_t count = std::min<int64_t>(W, p.columns - j * W);
      if (p.triangular) count = std::min(count, row + 1 - j * W);
      for (int64_t c = 0; c < count; ++c)
        to[c] = beta == 0 ? alpha * from[c] : beta * to[c] + alpha * from[c];
    }
  }
}

template <class A>
void add_splits_of(const PanelProduct& p, int64_t begin, int64_t end) {
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

}  // namespace

int64_t slice_width(bool wide) { return wide ? kSlice<double> : kSlice<float>; }
int64_t segment_length(bool wide) { return wide ? kSegment<double> : kSegment<float>; }

void pack(const Activations& x, const TokenList& list, bool wide, Panel panel, int64_t begin,
          int64_t end) {
  switch (x.dtype) {
    case DType::float64: return pack_rows<double, double>(x, list, panel, begin, end);
    case DType::float32:
      return wide ? pack_rows<float, double>(x, list, panel, begin, end)
                  : pack_rows<float, float>(x, list, panel, begin, end);
    case DType::bfloat16:
      return wide ? pack_rows<bfloat16, double>(x, list, panel, begin, end)
                  : pack_rows<bfloat16, float>(x, list, panel, begin, end);
    case DType::float16:
      return wide ? pack_rows<float16, double>(x, list, panel, begin, end)
                  : pack_rows<float16, float>(x, list, panel, begin, end);
  }
}

int64_t tile_count(const PanelProduct& p, bool wide) {
  return p.heads * (wide ? tiles_per_head<double>(p) : tiles_per_head<float>(p));
}

void multiply_tile(const PanelProduct& p, bool wide, int64_t task) {
  wide ? multiply<double>(p, task) : multiply<float>(p, task);
}

void add_splits(const PanelProduct& p, bool wide, int64_t begin, int64_t end) {
  wide ? add_splits_of<double>(p, begin, end) : add_splits_of<float>(p, begin, end);
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
