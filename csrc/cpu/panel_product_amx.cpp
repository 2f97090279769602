// Products of bfloat16 panels on the matrix units of recent Xeons: exact products, float sums.
#include "matrix_unit.h"
#include "panel_product.h"
#include "panel_tiles.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// The unit adds tokens one after the other: the sums of a segment are flushed to bound their error.
constexpr int64_t kSegment = 512;
constexpr uint16_t kOne = 0x3f80;

uint32_t* block_of(Panel panel, int64_t slice, int64_t token) {
  return static_cast<uint32_t*>(panel.data) +
         (slice * panel.capacity + token) / kBlock * kPairsOfBlock;
}

// 32 columns of one token, zeros past the last.
__m512i load_columns(const uint16_t* from, int64_t count) {
  const uint32_t mask = count >= W ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1;
  return _mm512_maskz_loadu_epi16(mask, from);
}

void pack(const Activations& x, const TokenList& list, Panel panel, bool left, int64_t begin,
          int64_t end) {
  const int64_t slices = slices_of(x.width(), W);
  alignas(64) uint32_t pairs[kPairs][W];
  for (int64_t block = begin; block < end; block += kBlock) {
    const uint16_t* rows_of_block[kBlock];
    for (int64_t t = block; t < std::min(block + kBlock, end); ++t)
      rows_of_block[t - block] = row_of<uint16_t>(x, list[t]);
    for (int64_t s = 0; s < x.heads * slices; ++s) {
      const int64_t column = s % slices * W, bias = x.bias ? x.columns - column : -1;
      const uint32_t ones = bias >= 0 && bias < W ? 1u << bias : 0;
      auto row = [&](int64_t t) {
        if (block + t >= end) return _mm512_setzero_si512();
        const uint16_t* from = rows_of_block[t] + s / slices * x.head_stride + column;
        return _mm512_mask_set1_epi16(load_columns(from, x.columns - column), ones, kOne);
      };
      uint32_t* to = block_of(panel, s, block);
      uint32_t(*rows)[W] = left ? pairs : reinterpret_cast<uint32_t(*)[W]>(to);
      for (int64_t p = 0; p < kPairs; ++p) {
        const __m512i even = row(2 * p), odd = row(2 * p + 1);
        auto widened = [](__m512i v, int half) {
          return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(v, 1)
                                            : _mm512_castsi512_si256(v));
        };
        for (int half = 0; half < 2; ++half)
          _mm512_storeu_si512(rows[p] + 16 * half,
                              _mm512_or_si512(widened(even, half),
                                              _mm512_slli_epi32(widened(odd, half), 16)));
      }
      if (left) store_left(pairs, to);
    }
  }
}

// sums [W][W] += the product of `blocks` blocks of tokens
void micro_tile(const uint32_t* left, const uint32_t* right, int64_t blocks, float* sums) {
  constexpr int64_t kHalf = 16, kStride = W * sizeof(uint32_t), kLeft = kPairs * sizeof(uint32_t);
  alignas(64) float product[W][W];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t b = 0; b < blocks; ++b) {
    _tile_loadd(4, left, kLeft);
    _tile_loadd(5, left + kHalf * kPairs, kLeft);
    _tile_loadd(6, right, kStride);
    _tile_loadd(7, right + kHalf, kStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    left += kPairsOfBlock;
    right += kPairsOfBlock;
  }
  _tile_stored(0, product[0], kStride);
  _tile_stored(1, product[0] + kHalf, kStride);
  _tile_stored(2, product[kHalf], kStride);
  _tile_stored(3, product[kHalf] + kHalf, kStride);
  for (int i = 0; i < W * W; i += kLanes<float>)
    store(sums + i, load(sums + i) + load(product[0] + i));
}

void multiply_tile(const PanelProduct& p, int64_t task) {
  const Tile tile = tile_at<W>(p, task);
  const int64_t row_slices = slices_of(p.rows, W), column_slices = slices_of(p.columns, W);
  const TileSums<float, W> sums(tile);
  const MatrixUnit unit;
  const int64_t last = (tile.split + 1) * p.segment_count / p.splits;
  for (int64_t s = tile.split * p.segment_count / p.splits; s < last; ++s) {
    const int64_t begin = p.segments[s], blocks = slices_of(p.segments[s + 1] - begin, kBlock);
    for (int64_t j = tile.column; j < tile.column_end; ++j) {
      const uint32_t* right = block_of(p.right, tile.head * column_slices + j, begin);
      for (int64_t i = p.triangular ? std::max(tile.row, j) : tile.row; i < tile.row_end; ++i)
        micro_tile(block_of(p.left, tile.head * row_slices + i, begin), right, blocks,
                   sums.block(i, j));
    }
  }
  sums.write(p);
}

constexpr PanelKernels kKernels = {W,     kSegment, kBlock,          sizeof(uint16_t),  false,
                                   &pack, nullptr, &tile_count<W>, &multiply_tile, &add_splits<float>};

}  // namespace

const PanelKernels& panel_kernels() { return kKernels; }

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
