// Products with the weight of a head, some classes or tokens at a time.
//
// A block multiplies kBlock rows, copied side by side, by slivers of kWidth columns. BLAS packs the
// whole of W for every product, which a few tokens do not pay for; here a row of W is copied (and
// widened) to where its block is multiplied, and what follows a product is done while it is there.
#include "head_products.h"

#include <memory>

#include "row.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// A micro-tile of kRows x kWidth sums lives in registers: 24 of 32 vectors, or 12 of 16.
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
template <class A>
constexpr int kWidth = 2 * kLanes<A>;
constexpr int64_t kRowsOfBlock = 96, kColumnsOfBlock = 256, kWideColumns = 640;
// Of rows of W a block has fewer: they, and the next, share a second-level cache with the panel.
constexpr int64_t kClassesOfBlock = 48;
// Strides that are a power of two put all rows into the same few lines of a cache.
constexpr int64_t kSumsStride = kWideColumns + 16;
// Terms that are added in one go: a sliver of so many stays in the first-level cache while the rows
// of a block go by.
template <class A>
constexpr int64_t kDepth = (20 << 10) / (kWidth<A> * sizeof(A));
static_assert(kRowsOfBlock % kRows == 0 && kRowsOfBlock % kLanes<float> == 0);
static_assert(kDepth<float> % kLanes<float> == 0 && kDepth<double> % kLanes<double> == 0);

// Of rows of W so many at a time, about, are copied: reads go along memory.
template <class A>
constexpr int64_t kSteps = kWideColumns / kDepth<A>;

// Where slivers are made on the way, those of a whole block at once: rows of W are read along memory.
template <class A>
constexpr int64_t kPanelDepth = (128 << 10) / (kWideColumns * sizeof(A));
template <class A>
constexpr int64_t kSliverStride = (kPanelDepth<A> + 8) * kWidth<A>;

inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// The share [begin, end) of about equal ones of at most `most`, in multiples of `unit`.
struct Share {
  int64_t begin, end;
  Share(int64_t size, int64_t most, int64_t unit, int64_t index) {
    const int64_t count = parts_of(size, most);
    const int64_t share = parts_of(parts_of(size, count), unit) * unit;
    begin = std::min(index * share, size);
    end = std::min(begin + share, size);
  }
  int64_t size() const { return end - begin; }
};

// Runs body(begin, end) over [first, last) in about equal steps of at most `most`.
template <class Body>
void for_depths(int64_t first, int64_t last, int64_t most, Body&& body) {
  const int64_t steps = parts_of(last - first, most);
  for (int64_t i = 0; i < steps; ++i)
    body(first + i * (last - first) / steps, first + (i + 1) * (last - first) / steps);
}

// sums [R][kSumsStride] of `count` terms in N vectors each, or those added to what is there.
template <int N, int R, class A>
void micro_tile(const A* left, const A* right, int64_t count, bool add, A* sums) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][N] = {};
  for (int64_t k = 0; k < count; ++k) {
    Vec<A> b[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) b[j] = load(right + j * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = broadcast(left[r * kDepth<A> + k]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[r][j] = multiply_add(a, b[j], sum[r][j]);
    }
    right += kWidth<A>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    A* const to = sums + r * kSumsStride;
    for (int j = 0; j < N; ++j) store(to + j * L, add ? load(to + j * L) + sum[r][j] : sum[r][j]);
  }
}

template <class A>
using MicroTile = void (*)(const A*, const A*, int64_t, bool, A*);

// That of the fewest rows, at least so many, of those that there are.
template <int N, class A>
MicroTile<A> micro_tile_of(int64_t rows) {
  constexpr int kHalf = kRows / 2, kThird = kRows / 3;
  if (rows <= kThird) return micro_tile<N, kThird, A>;
  if (rows <= kHalf) return micro_tile<N, kHalf, A>;
  if (rows <= 2 * kThird) return micro_tile<N, 2 * kThird, A>;
  if (rows <= kRows - 2) return micro_tile<N, kRows - 2, A>;
  if (rows <= kRows - 1) return micro_tile<N, kRows - 1, A>;
  return micro_tile<N, kRows, A>;
}

// Lines of a matrix to ask for while something else is multiplied.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int64_t stride_bytes, int64_t rows, int64_t row_bytes)
      : row_(static_cast<const char*>(first)),
        stride_(stride_bytes),
        rows_(rows),
        row_bytes_(row_bytes),
        lines_(rows * parts_of(row_bytes, kLine)) {
    if (row_bytes_ <= 0) rows_ = lines_ = 0;
  }

  int64_t lines() const { return lines_; }
  // The first part / whole of the lines, which are left out of this.
  Ahead share(int64_t part, int64_t whole) {
    Ahead some = *this;
    some.lines_ = lines_ * part / whole;
    const int64_t per_row = rows_ ? parts_of(row_bytes_, kLine) : 1;
    some.rows_ = std::min(parts_of(some.lines_, per_row), rows_);
    row_ += some.rows_ * stride_;
    rows_ -= some.rows_;
    lines_ = rows_ * per_row;
    return some;
  }
  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += kLine;
      if (offset_ < row_bytes_) continue;
      offset_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, row_bytes_ = 0, lines_ = 0, offset_ = 0;
};

// A thread's own memory.
template <class A>
struct alignas(64) Block {
  A left[std::max(kRowsOfBlock, kClassesOfBlock * kSteps<A>) * kDepth<A>];
  A slivers[kWideColumns / kWidth<A> * kSliverStride<A>];
  A sums[kRowsOfBlock * kSumsStride];

  static Block& own() {
    static thread_local const std::unique_ptr<Block> block(new Block);
    return *block;
  }

  // `rows` as in left by as many slivers as hold `columns`, each `stride` elements after the last. What
  // is computed beyond them is few rows, and less than a vector.
  void multiply(const A* from, int64_t rows, int64_t columns, int64_t count, const A* right,
                int64_t stride, bool add, Ahead ahead, Ahead too = {}) {
    const int64_t height = parts_of(rows, parts_of(rows, kRows));
    const MicroTile<A> whole = micro_tile_of<2, A>(height), half = micro_tile_of<1, A>(height);
    const int64_t tiles = parts_of(rows, height) * parts_of(columns, kWidth<A>);
    const int64_t lines = parts_of(ahead.lines(), tiles), others = parts_of(too.lines(), tiles);
    for (int64_t c = 0; c < columns; c += kWidth<A>, right += stride) {
      const MicroTile<A> tile = columns - c > kLanes<A> ? whole : half;
      for (int64_t r = 0; r < rows; r += height) {
        ahead.fetch(lines);
        too.fetch(others);
        tile(from + r * kDepth<A>, right, count, add, sums + r * kSumsStride + c);
      }
    }
  }
};

template <class T>
const T* at(Matrix m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.stride + column;
}

template <class T, class A>
void widen(const T* from, int64_t count, A* to) {
  for_lanes<A>(0, count, [&](int64_t i, auto lanes) {
    store_lanes(to + i, load_lanes(from + i, lanes), lanes);
  });
}

// The two vectors of a sliver from `count` columns, zeros after them.
template <class T, class A>
void fill_sliver_row(const T* from, int64_t count, bool squares, A* to) {
  constexpr int L = kLanes<A>;
  for (int j = 0; j < 2; ++j, count -= L) {
    Vec<A> x{};
    if (count >= L)
      x = load(from + j * L);
    else if (count > 0)
      x = load_some(from + j * L, count, A(0));
    store(to + j * L, squares ? x * x : x);
  }
}

// ---- logits -----------------------------------------------------------------------------------

// c tanh(z / c), within 2 ulp.
template <class A>
struct SoftCap {
  A cap;
  Exponential<A> square_of_exponential{0.5};

  Vec<A> operator()(Vec<A> z) const {
    Vec<A> x = z / broadcast(cap);
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < kLanes<A>; ++i) x[i] = std::tanh(x[i]);
      return x * cap;
    } else {
      const Vec<A> s = x * x;
      Vec<A> q = broadcast<A>(-5.90587e-3f);
      q = multiply_add(q, s, broadcast<A>(2.080538e-2f));
      q = multiply_add(q, s, broadcast<A>(-5.378668e-2f));
      q = multiply_add(q, s, broadcast<A>(1.3331958e-1f));
      q = multiply_add(q, s, broadcast<A>(-3.3333299e-1f));
      const Vec<A> near = multiply_add(q * s, x, x);
      const Vec<A> magnitude = x < 0 ? -x : x;
      const Vec<A> e = square_of_exponential(magnitude > 10 ? broadcast<A>(10) : magnitude);
      const Vec<A> far = 1 - 2 / (e + 1);
      return cap * (magnitude < A(0.6) ? near : x < 0 ? -far : far);
    }
  }
};

template <class T>
void pack_tokens_of(const Head& head, void* panel, int64_t sliver) {
  using A = Acc<T>;
  constexpr int W = kWidth<A>;
  A* const to = static_cast<A*>(panel) + sliver * head.features * W;
  for (int64_t t = 0; t < W; ++t) {
    const int64_t token = sliver * W + t;
    if (token < head.tokens) {
      const T* from = at<T>(head.hidden, token, 0);
      for (int64_t k = 0; k < head.features; ++k) to[k * W + t] = to_accumulation(from[k]);
    } else {
      for (int64_t k = 0; k < head.features; ++k) to[k * W + t] = 0;
    }
  }
}

// The sums of classes by tokens, turned round: logits.
template <class T>
void write_logits(const Head& head, const Acc<T>* sums, int64_t first_class, int64_t classes,
                  int64_t first_token, int64_t tokens) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const SoftCap<A> softcap{static_cast<A>(head.softcap)};
  for (int64_t c = 0; c < classes; c += L) {
    Vec<A> bias{};
    const int64_t width = std::min<int64_t>(L, classes - c);
    if (head.bias) {
      const T* from = static_cast<const T*>(head.bias) + (first_class + c) * head.bias_stride;
      for (int64_t i = 0; i < width; ++i) bias[i] = to_accumulation(from[i * head.bias_stride]);
    }
    for (int64_t t = 0; t < tokens; t += L) {
      Vec<A> block[L];
      for (int i = 0; i < L; ++i) block[i] = load(sums + (c + i) * kSumsStride + t);
      transpose<A>(block);
      for (int64_t i = 0; i < std::min<int64_t>(L, tokens - t); ++i) {
        const Vec<A> z = block[i] + bias;
        A* const to = const_cast<A*>(at<A>(head.rows, first_token + t + i, first_class + c));
        const Vec<A> capped = head.softcap ? softcap(z) : z;
        if (width == L)
          store(to, capped);
        else
          store_some(to, capped, width);
      }
    }
  }
}

template <class T>
Ahead weight_ahead(const Head& head, int64_t first, int64_t last, int64_t column, int64_t end) {
  last = std::min(last, head.classes);
  if (first >= last) return {};
  return {at<T>(head.weight, first, column), head.weight.stride * int64_t{sizeof(T)}, last - first,
          (end - column) * int64_t{sizeof(T)}};
}

template <class T>
void logits_of(const Head& head, const void* panel, int64_t task, bool next) {
  using A = Acc<T>;
  constexpr int W = kWidth<A>;
  auto& block = Block<A>::own();
  const int64_t groups = parts_of(head.tokens, kColumnsOfBlock);
  const Share tokens(head.tokens, kColumnsOfBlock, W, task % groups);
  const int64_t first_class = task / groups * kClassesOfBlock;
  const int64_t classes = std::min(kClassesOfBlock, head.classes - first_class);
  for_depths(0, head.features, kSteps<A> * kDepth<A>, [&](int64_t first, int64_t last) {
    for (int64_t c = 0; c < classes; ++c) {
      A* to = block.left + c * kDepth<A>;
      for_depths(first, last, kDepth<A>, [&](int64_t begin, int64_t end) {
        widen(at<T>(head.weight, first_class + c, begin), end - begin, to);
        to += kClassesOfBlock * kDepth<A>;
      });
    }
    Ahead ahead;
    if (last < head.features)
      ahead = weight_ahead<T>(head, first_class, first_class + classes, last,
                              std::min(2 * last - first, head.features));
    else if (next)
      ahead = weight_ahead<T>(head, first_class + classes,
                              first_class + classes + kClassesOfBlock, 0, last - first);
    const A* left = block.left;
    for_depths(first, last, kDepth<A>, [&](int64_t begin, int64_t end) {
      const A* right = static_cast<const A*>(panel) + tokens.begin * head.features + begin * W;
      block.multiply(left, classes, tokens.size(), end - begin, right, head.features * W,
                     begin > 0, ahead.share(end - begin, last - begin));
      left += kClassesOfBlock * kDepth<A>;
    });
  });
  write_logits<T>(head, block.sums, first_class, classes, tokens.begin, tokens.size());
}

// ---- rows W -----------------------------------------------------------------------------------

template <class T>
void pull_of(const Head& head, int64_t splits, void* partial, int64_t task) {
  using A = Acc<T>;
  constexpr int W = kWidth<A>;
  auto& block = Block<A>::own();
  // tokens change first: those that follow find W in a cache
  const int64_t token_blocks = parts_of(head.tokens, kRowsOfBlock);
  const int64_t column_blocks = parts_of(head.features, kWideColumns);
  const Share tokens(head.tokens, kRowsOfBlock, kRows, task % token_blocks);
  const Share columns(head.features, kWideColumns, W, task / token_blocks % column_blocks);
  const int64_t split = task / token_blocks / column_blocks;
  const int64_t first = split * head.classes / splits, last = (split + 1) * head.classes / splits;
  for_depths(first, last, kPanelDepth<A>, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
      widen(at<A>(head.rows, t, begin), count, block.left + (t - tokens.begin) * kDepth<A>);
    for (int64_t k = 0; k < count; ++k) {
      const T* row = at<T>(head.weight, begin + k, 0);
      for (int64_t c = columns.begin; c < columns.end; c += W)
        fill_sliver_row(row + c, columns.end - c, false,
                        block.slivers + (c - columns.begin) / W * kSliverStride<A> + k * W);
    }
    const int64_t next = std::min(end + kPanelDepth<A>, last);
    block.multiply(block.left, tokens.size(), columns.size(), count, block.slivers, kSliverStride<A>,
                   begin > first,
                   weight_ahead<T>(head, end, next, columns.begin, columns.end),
                   {at<A>(head.rows, tokens.begin, end), head.rows.stride * int64_t{sizeof(A)},
                    tokens.size(), (next - end) * int64_t{sizeof(A)}});
  });
  const Matrix to = splits > 1 ? Matrix{static_cast<A*>(partial) +
                                            split * head.tokens * head.features,
                                        head.features}
                               : head.out;
  for (int64_t t = tokens.begin; t < tokens.end; ++t)
    widen(block.sums + (t - tokens.begin) * kSumsStride, columns.size(),
          const_cast<A*>(at<A>(to, t, columns.begin)));
}

template <class T>
void add_splits_of(const Head& head, int64_t splits, const void* partial, int64_t token) {
  using A = Acc<T>;
  const A* from = static_cast<const A*>(partial) + token * head.features;
  A* const to = const_cast<A*>(at<A>(head.out, token, 0));
  for_lanes<A>(0, head.features, [&](int64_t i, auto lanes) {
    Vec<A> sum = load_lanes(from + i, lanes);
    for (int64_t s = 1; s < splits; ++s)
      sum += load_lanes(from + s * head.tokens * head.features + i, lanes);
    store_lanes(to + i, sum, lanes);
  });
}

// ---- rows^T h^2 -------------------------------------------------------------------------------

template <class T>
void pack_squares_of(const Head& head, void* panel, int64_t sliver) {
  using A = Acc<T>;
  constexpr int W = kWidth<A>;
  A* const to = static_cast<A*>(panel) + sliver * head.tokens * W;
  for (int64_t t = 0; t < head.tokens; ++t)
    fill_sliver_row(at<T>(head.hidden, t, sliver * W), head.features - sliver * W, true,
                    to + t * W);
}

template <class T>
void squares_of(const Head& head, const void* panel, int64_t task) {
  using A = Acc<T>;
  constexpr int W = kWidth<A>, L = kLanes<A>;
  auto& block = Block<A>::own();
  const int64_t column_blocks = parts_of(head.features, kWideColumns);
  const Share columns(head.features, kWideColumns, W, task % column_blocks);
  const int64_t first_class = task / column_blocks * kClassesOfBlock;
  const int64_t classes = std::min(kClassesOfBlock, head.classes - first_class);
  for_depths(0, head.tokens, kDepth<A>, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += L) {
      for_lanes<A>(0, classes, [&](int64_t c, auto count) {
        Vec<A> square[L] = {};
        for (int64_t i = 0; i < std::min<int64_t>(L, end - t); ++i)
          square[i] = load_lanes(at<A>(head.rows, t + i, first_class + c), count);
        transpose<A>(square);
        for (int64_t i = 0; i < count; ++i)
          store(block.left + (c + i) * kDepth<A> + t - begin, square[i]);
      });
    }
    const A* right = static_cast<const A*>(panel) + columns.begin * head.tokens + begin * W;
    Ahead ahead;
    if (end == head.tokens && head.beta != 0)
      ahead = {at<A>(head.out, first_class, columns.begin),
               head.out.stride * int64_t{sizeof(A)}, classes,
               columns.size() * int64_t{sizeof(A)}};
    block.multiply(block.left, classes, columns.size(), end - begin, right, head.tokens * W, begin > 0, ahead);
  });
  const A beta = static_cast<A>(head.beta);
  for (int64_t c = 0; c < classes; ++c) {
    const A* from = block.sums + c * kSumsStride;
    A* const to = const_cast<A*>(at<A>(head.out, first_class + c, columns.begin));
    for_lanes<A>(0, columns.size(), [&](int64_t i, auto lanes) {
      Vec<A> x = load_lanes(from + i, lanes);
      if (beta != 0) x += beta * load_lanes(to + i, lanes);
      store_lanes(to + i, x, lanes);
    });
  }
}

int64_t width(const Head& head) {
  return head.dtype == DType::float64 ? kWidth<double> : kWidth<float>;
}
int64_t element_bytes(const Head& head) {
  return head.dtype == DType::float64 ? sizeof(double) : sizeof(float);
}

}  // namespace

int64_t head_token_slivers(const Head& head) { return parts_of(head.tokens, width(head)); }
int64_t head_token_sliver_bytes(const Head& head) {
  return head.features * width(head) * element_bytes(head);
}
void head_pack_tokens(const Head& head, void* panel, int64_t sliver) {
  FISHERKERN_FOR_DTYPE(head, pack_tokens_of, panel, sliver)
}
int64_t head_logits_tasks(const Head& head) {
  return parts_of(head.classes, kClassesOfBlock) * parts_of(head.tokens, kColumnsOfBlock);
}
void head_logits(const Head& head, const void* panel, int64_t task, bool next) {
  FISHERKERN_FOR_DTYPE(head, logits_of, panel, task, next)
}

int64_t head_pull_tasks(const Head& head, int64_t splits) {
  return splits * parts_of(head.tokens, kRowsOfBlock) * parts_of(head.features, kWideColumns);
}
void head_pull(const Head& head, int64_t splits, void* partial, int64_t task) {
  FISHERKERN_FOR_DTYPE(head, pull_of, splits, partial, task)
}
void head_add_splits(const Head& head, int64_t splits, const void* partial, int64_t token) {
  FISHERKERN_FOR_DTYPE(head, add_splits_of, splits, partial, token)
}

int64_t head_feature_slivers(const Head& head) { return parts_of(head.features, width(head)); }
int64_t head_feature_sliver_bytes(const Head& head) {
  return head.tokens * width(head) * element_bytes(head);
}
void head_pack_squares(const Head& head, void* panel, int64_t sliver) {
  FISHERKERN_FOR_DTYPE(head, pack_squares_of, panel, sliver)
}
int64_t head_squares_tasks(const Head& head) {
  return parts_of(head.classes, kClassesOfBlock) * parts_of(head.features, kWideColumns);
}
void head_squares(const Head& head, const void* panel, int64_t task) {
  FISHERKERN_FOR_DTYPE(head, squares_of, panel, task)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
