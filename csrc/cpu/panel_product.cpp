#include "panel_product.h"

#include "panel_tiles.h"

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
static_assert(kSlice<float> % kRows<float> == 0 && kSlice<double> % kRows<double> == 0);

template <class A>
A* slice(Panel panel, int64_t index) {
  return static_cast<A*>(panel.data) + index * panel.capacity * kSlice<A>;
}


// `count` elements as the accumulation type, zeros up to a whole slice.
template <class T, class A>
void pack_slice(const T* from, int64_t count, bool squares, A weight, A* to) {
  auto put = [&](int j, Vec<A> x) {
    if (squares) x *= x;
    store(to + j * kLanes<A>, x * weight);
  };
  if constexpr (sizeof(Acc<T>) == sizeof(A)) {
    if (count >= kSlice<A>) {
      for (int j = 0; j < kVectors; ++j) put(j, load(from + j * kLanes<A>));
      return;
    }
  }
  alignas(kVectorBytes) A values[kSlice<A>] = {};
  if constexpr (sizeof(Acc<T>) == sizeof(A)) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(values + i, load(from + i));
    if (i < count) store(values + i, load_some(from + i, count - i, A(0)));
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = to_accumulation(from[i]);
  }
  for (int j = 0; j < kVectors; ++j) put(j, load(values + j * kLanes<A>));
}

template <class T, class A>
void pack_rows(const Activations& x, const TokenList& list, Panel panel, int64_t begin,
               int64_t end) {
  const int64_t slices = slices_of(x.width(), kSlice<A>);
  // slice after slice for a few tokens: both the reads and the writes go along memory
  constexpr int64_t kTokens = 16;
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t last = std::min(first + kTokens, end);
    const T* rows[kTokens];
    for (int64_t t = first; t < last; ++t) rows[t - first] = row_of<T>(x, list[t]);
    for (int64_t s = 0; s < x.heads * slices; ++s) {
      const int64_t column = s % slices * kSlice<A>;
      const int64_t count = std::clamp<int64_t>(x.columns - column, 0, kSlice<A>);
      A* to = slice<A>(panel, s) + first * kSlice<A>;
      for (int64_t t = first; t < last; ++t, to += kSlice<A>) {
        const T* from = rows[t - first] + s / slices * x.head_stride + column;
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
  // the sums of a tile are in the second-level cache: they come while the terms are added
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) __builtin_prefetch(sums + r * kSlice<A> + j * L, 1, 3);
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

template <class A>
void multiply_tile(const PanelProduct& p, int64_t task) {
  constexpr int W = kSlice<A>;
  const Tile tile = tile_at<W>(p, task);
  const int64_t row_slices = slices_of(p.rows, W), column_slices = slices_of(p.columns, W);
  const TileSums<A, W> sums(tile);
  const int64_t last = (tile.split + 1) * p.segment_count / p.splits;
  for (int64_t s = tile.split * p.segment_count / p.splits; s < last; ++s) {
    const int64_t begin = p.segments[s], count = p.segments[s + 1] - begin;
    for (int64_t j = tile.column; j < tile.column_end; ++j) {
      const A* right = slice<A>(p.right, tile.head * column_slices + j) + begin * W;
      for (int64_t i = p.triangular ? std::max(tile.row, j) : tile.row; i < tile.row_end; ++i) {
        const A* left = slice<A>(p.left, tile.head * row_slices + i) + begin * W;
        const int rows = static_cast<int>(std::min<int64_t>(W, p.rows - i * W));
        const int columns = static_cast<int>(std::min<int64_t>(W, p.columns - j * W));
        for (int r = 0; r < rows; r += kRows<A>) {
          const int used = p.triangular && i == j ? std::min(columns, r + kRows<A>) : columns;
          A* to = sums.block(i, j) + r * W;
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
  sums.write(p);
}

template <class A>
void pack(const Activations& x, const TokenList& list, Panel panel, bool, int64_t begin,
          int64_t end) {
  switch (x.dtype) {
    case DType::float64:
      if constexpr (sizeof(A) == 8) pack_rows<double, A>(x, list, panel, begin, end);
      return;
    case DType::float32: return pack_rows<float, A>(x, list, panel, begin, end);
    case DType::bfloat16: return pack_rows<bfloat16, A>(x, list, panel, begin, end);
    case DType::float16: return pack_rows<float16, A>(x, list, panel, begin, end);
  }
}

template <class A>
constexpr PanelKernels kKernels = {
    kSlice<A>, kSegment<A>,            1,                 sizeof(A),     true, &pack<A>,
    nullptr,   &tile_count<kSlice<A>>, &multiply_tile<A>, &add_splits<A>};

}  // namespace

const PanelKernels& panel_kernels(bool wide) {
  if (wide) return kKernels<double>;
  return kKernels<float>;
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
