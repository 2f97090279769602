// Products of float panels on the matrix units of recent Xeons, which multiply bfloat16: a float is
// the sum of three terms of 8 bits each, and six of the nine products of terms are above 2^-26 of
// the product. That takes less than half the time of float arithmetic, at its accuracy.
//
// Panels are as in matrix_unit.h, with the terms of a block after each other: [slice][block][term].
#include "matrix_unit.h"
#include "panel_product.h"
#include "panel_tiles.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

constexpr int kTerms = 3;
constexpr int64_t kSplitBlock = kTerms * kPairsOfBlock;
// A slice of the right panel stays in the first-level cache while all rows of a tile go by.
constexpr int64_t kSegment = 128;

uint32_t* block_of(Panel panel, int64_t slice, int64_t token) {
  return static_cast<uint32_t*>(panel.data) +
         (slice * panel.capacity + token) / kBlock * kSplitBlock;
}

// The 16 pairs of x and y rounded to bfloat16; what is left of each goes back to it.
__m512i next_terms(__m512& x, __m512& y) {
  const __m512i interleaved =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i terms = (__m512i)_mm512_cvtne2ps_pbh(y, x);
  const __m512i pairs = _mm512_permutexvar_epi16(interleaved, terms);
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
  const __m512i upper = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), pairs);
  y = _mm512_sub_ps(y, _mm512_castsi512_ps(upper));
  return pairs;
}

// An infinity and a NaN leave a NaN, which is none of the value.
__m512 without_nan(__m512 x) {
  constexpr int kNaN = 0x01 | 0x80;  // classes of VFPCLASSPS
  return _mm512_maskz_mov_ps(~_mm512_fpclass_ps_mask(x, kNaN), x);
}

// 32 columns of a token.
struct Columns {
  __m512 half[2] = {};
};

template <class T>
Columns load_columns(const T* from, int64_t count, bool squares, float weight) {
  Columns columns;
  for (int h = 0; h < 2; ++h) {
    const int64_t here = std::clamp<int64_t>(count - 16 * h, 0, 16);
    if (here == 0) break;
    Vec<float> x = here == 16 ? load(from + 16 * h) : load_some(from + 16 * h, here, 0.f);
    if (squares) x *= x;
    columns.half[h] = x * weight;
  }
  return columns;
}

void store_pairs(Columns even, Columns odd, uint32_t (*pairs)[kPairs][W], int64_t pair) {
  for (int h = 0; h < 2; ++h) {
    __m512 x = even.half[h], y = odd.half[h];
    for (int term = 0; term < kTerms; ++term) {
      _mm512_storeu_si512(pairs[term][pair] + 16 * h, next_terms(x, y));
      if (term > 0) continue;
      x = without_nan(x);
      y = without_nan(y);
    }
  }
}

template <class T>
void pack_rows(const Activations& x, const TokenList& list, Panel panel, bool left, int64_t begin,
               int64_t end) {
  const int64_t slices = slices_of(x.width(), W);
  alignas(64) uint32_t pairs[kTerms][kPairs][W];
  for (int64_t block = begin; block < end; block += kBlock) {
    const T* tokens[kBlock];
    float weights[kBlock];
    for (int64_t t = block; t < std::min(block + kBlock, end); ++t) {
      tokens[t - block] = row_of<T>(x, list[t]);
      weights[t - block] = list.weight ? static_cast<float>(list.weight[t]) : 1.f;
    }
    for (int64_t s = 0; s < x.heads * slices; ++s) {
      const int64_t column = s % slices * W, bias = x.bias ? x.columns - column : -1;
      auto row = [&](int64_t t) {
        Columns columns;
        if (block + t >= end) return columns;
        const T* from = tokens[t] + s / slices * x.head_stride + column;
        columns = load_columns(from, x.columns - column, x.squares, weights[t]);
        if (bias >= 0 && bias < W) {
          __m512& half = columns.half[bias / 16];
          half = _mm512_mask_mov_ps(half, 1u << bias % 16, _mm512_set1_ps(weights[t]));
        }
        return columns;
      };
      uint32_t* const to = block_of(panel, s, block);
      auto* const rows = left ? pairs : reinterpret_cast<uint32_t(*)[kPairs][W]>(to);
      for (int64_t p = 0; p < kPairs; ++p)
        store_pairs(row(2 * p), row(2 * p + 1), rows, p);
      if (left)
        for (int term = 0; term < kTerms; ++term)
          store_left(pairs[term], to + term * kPairsOfBlock);
    }
  }
}

void pack(const Activations& x, const TokenList& list, Panel panel, bool left, int64_t begin,
          int64_t end) {
  switch (x.dtype) {
    case DType::float64: return;  // not served
    case DType::float32: return pack_rows<float>(x, list, panel, left, begin, end);
    case DType::bfloat16: return pack_rows<bfloat16>(x, list, panel, left, begin, end);
    case DType::float16: return pack_rows<float16>(x, list, panel, left, begin, end);
  }
}

// A left panel has the tokens of a column side by side, as they come; a right one is its transpose.
void pack_columns(const void* data, int64_t stride, int64_t columns, int64_t count, Panel left,
                  Panel right) {
  const float* const values = static_cast<const float*>(data);
  auto widened = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  for (int64_t s = 0; s < slices_of(columns, W); ++s) {
    for (int64_t block = 0; block < count; block += kBlock) {
      uint32_t* const to = block_of(left, s, block);
      for (int64_t c = 0; c < W; ++c) {
        Columns tokens;
        if (s * W + c < columns)
          tokens = load_columns(values + (s * W + c) * stride + block, count - block, false, 1.f);
        __m512 &x = tokens.half[0], &y = tokens.half[1];
        for (int term = 0; term < kTerms; ++term) {
          const __m512i terms = (__m512i)_mm512_cvtne2ps_pbh(y, x);
          _mm512_storeu_si512(to + term * kPairsOfBlock + c * kPairs, terms);
          x = _mm512_sub_ps(x, widened(_mm512_castsi512_si256(terms)));
          y = _mm512_sub_ps(y, widened(_mm512_extracti64x4_epi64(terms, 1)));
          if (term > 0) continue;
          x = without_nan(x);
          y = without_nan(y);
        }
      }
      if (!right.data) continue;
      uint32_t* const across = block_of(right, s, block);
      for (int64_t half = 0; half < 2 * kTerms; ++half) {
        const uint32_t* from = to + half * 16 * kPairs;
        Vec<float> square[16];
        for (int c = 0; c < 16; ++c) std::memcpy(&square[c], from + c * kPairs, sizeof square[c]);
        transpose<float>(square);
        uint32_t* const pairs = across + half / 2 * kPairsOfBlock + half % 2 * 16;
        for (int p = 0; p < 16; ++p) std::memcpy(pairs + p * W, &square[p], sizeof square[p]);
      }
    }
  }
}

// Terms of the two sides of a block, to the four products of halves.
#define FISHERKERN_LOAD_LEFT(term)                                        \
  _tile_loadd(4, left + (term) * kPairsOfBlock, kLeft);                   \
  _tile_loadd(5, left + (term) * kPairsOfBlock + kHalf * kPairs, kLeft);
#define FISHERKERN_LOAD_RIGHT(term)                           \
  _tile_loadd(6, right + (term) * kPairsOfBlock, kStride);    \
  _tile_loadd(7, right + (term) * kPairsOfBlock + kHalf, kStride);
#define FISHERKERN_MULTIPLY   \
  _tile_dpbf16ps(0, 4, 6);    \
  _tile_dpbf16ps(1, 4, 7);    \
  _tile_dpbf16ps(2, 5, 6);    \
  _tile_dpbf16ps(3, 5, 7);

// sums [W][W] = the product of `blocks` blocks of tokens, or += but for the first of a tile. The unit
// adds up a block of each product of terms before it adds it to the sums: chains are short enough for
// all tokens of a panel to go into one.
void micro_tile(const uint32_t* left, const uint32_t* right, int64_t blocks, bool first,
                float* sums) {
  constexpr int64_t kHalf = 16, kStride = W * sizeof(uint32_t), kLeft = kPairs * sizeof(uint32_t);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kHalf, kStride);
    _tile_loadd(2, sums + kHalf * W, kStride);
    _tile_loadd(3, sums + kHalf * W + kHalf, kStride);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    FISHERKERN_LOAD_LEFT(2) FISHERKERN_LOAD_RIGHT(0) FISHERKERN_MULTIPLY
    FISHERKERN_LOAD_LEFT(1) FISHERKERN_MULTIPLY
    FISHERKERN_LOAD_RIGHT(1) FISHERKERN_MULTIPLY
    FISHERKERN_LOAD_LEFT(0) FISHERKERN_MULTIPLY
    FISHERKERN_LOAD_RIGHT(2) FISHERKERN_MULTIPLY
    FISHERKERN_LOAD_RIGHT(0) FISHERKERN_MULTIPLY
    left += kSplitBlock;
    right += kSplitBlock;
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kHalf, kStride);
  _tile_stored(2, sums + kHalf * W, kStride);
  _tile_stored(3, sums + kHalf * W + kHalf, kStride);
}

#undef FISHERKERN_LOAD_LEFT
#undef FISHERKERN_LOAD_RIGHT
#undef FISHERKERN_MULTIPLY

void multiply_tile(const PanelProduct& p, int64_t task) {
  const Tile tile = tile_at<W>(p, task);
  const int64_t row_slices = slices_of(p.rows, W), column_slices = slices_of(p.columns, W);
  const int64_t first = tile.split * p.segment_count / p.splits;
  const int64_t last = (tile.split + 1) * p.segment_count / p.splits;
  // the first segment writes them; where no token counts there is none
  const TileSums<float, W> sums(tile, first == last);
  const MatrixUnit unit;
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = p.segments[s], blocks = slices_of(p.segments[s + 1] - begin, kBlock);
    for (int64_t j = tile.column; j < tile.column_end; ++j) {
      const uint32_t* right = block_of(p.right, tile.head * column_slices + j, begin);
      for (int64_t i = p.triangular ? std::max(tile.row, j) : tile.row; i < tile.row_end; ++i)
        micro_tile(block_of(p.left, tile.head * row_slices + i, begin), right, blocks, s == first,
                   sums.block(i, j));
    }
  }
  sums.write(p);
}

constexpr PanelKernels kKernels = {W,
                                   kSegment,
                                   kBlock,
                                   kTerms * sizeof(uint16_t),
                                   false,
                                   &pack,
                                   &pack_columns,
                                   &tile_count<W>,
                                   &multiply_tile,
                                   &add_splits<float>};

}  // namespace

const PanelKernels& split_panel_kernels() { return kKernels; }

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
