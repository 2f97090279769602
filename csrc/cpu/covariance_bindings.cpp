// The covariance ops on the CPU: tokens are packed into panels of bounded size. Tokens are shared out among
// threads where there are many, tiles of the product where there are few.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "capability.h"
#include "panel_product.h"
#include "panel_tasks.h"

namespace fisherkern {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kWorkspaceBytes = 32 << 20;

// Of x [batches, tokens, heads, columns], or without heads.
Activations activations_of(const Tensor& x, const char* name) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK((last == 2 || last == 3) && x.numel() > 0, name,
                  " must be [batches, tokens, (heads,) columns] and not empty");
  STD_TORCH_CHECK(x.stride(last) == 1 || x.size(last) == 1, name,
                  " must have a column stride of 1");
  Activations a{};
  a.data = x.data_ptr();
  a.dtype = dtype_of(x);
  a.tokens = x.size(1);
  a.heads = last == 3 ? x.size(2) : 1;
  a.columns = x.size(last);
  a.batch_stride = x.stride(0);
  a.token_stride = x.stride(1);
  a.head_stride = last == 3 ? x.stride(2) : 0;
  return a;
}

// The tokens that count, in order, and the bounds of each batch among them.
class Tokens {
 public:
  Tokens(const Tensor& x, const Optional& mask, const Optional& weights) {
    const int64_t per_batch = x.size(1), T = x.size(0) * per_batch;
    const auto* counts =
        mask ? static_cast<const uint8_t*>(flat_of(*mask, x, T, "mask", ScalarType::Bool)) : nullptr;
    const bool wide = x.scalar_type() == ScalarType::Double;
    const void* values = weights ? flat_of(*weights, x, T, "weights") : nullptr;
    position_.reserve(T);
    for (int64_t t = 0; t < T; ++t) {
      if (t % per_batch == 0) bounds_.push_back(size());
      double w = 1;
      if (values) w = wide ? static_cast<const double*>(values)[t] : static_cast<const float*>(values)[t];
      if ((counts && !counts[t]) || w == 0) continue;
      position_.push_back(t);
      if (values) weight_.push_back(w);
    }
    bounds_.push_back(size());
  }

  // For operands that are weighted on both sides of a product.
  void take_roots() {
    for (double& w : weight_) w = std::sqrt(w);
  }

  int64_t size() const { return static_cast<int64_t>(position_.size()); }
  const std::vector<int64_t>& bounds() const { return bounds_; }

  TokenList list(int64_t begin, int64_t end, bool weighted) const {
    return {position_.data() + begin, weighted && !weight_.empty() ? weight_.data() + begin : nullptr,
            end - begin};
  }
  bool weighted() const { return !weight_.empty(); }

 private:
  std::vector<int64_t> position_, bounds_;
  std::vector<double> weight_;
};

// The arithmetic for these operands.
const PanelKernels& kernels_for(const Activations& x, const Tokens& tokens,
                                const PanelProduct& product, bool wide,
                                const std::string& precision) {
#if defined(FISHERKERN_AMX)
  // the matrix units take whole blocks of tokens, which batches are not
  if (capability() == Capability::amx && !wide && !product.square) {
    if (x.dtype == DType::bfloat16 && !x.squares && !tokens.weighted()) return amx::panel_kernels();
    if (precision != "ieee") return amx::split_panel_kernels();
  }
#endif
  return FISHERKERN_KERNEL(panel_kernels)(wide);
}

// factor <- beta factor + alpha left^T right over all tokens.
class Update {
 public:
  Update(const Activations& left, const Activations& right, Tokens tokens, PanelProduct product,
         bool wide, const std::string& precision)
      : left_(left),
        right_(right),
        tokens_(std::move(tokens)),
        product_(product),
        wide_(wide),
        kernels_(kernels_for(left, tokens_, product, wide, precision)),
        one_(product.triangular && kernels_.sides_alike) {
    if (one_) tokens_.take_roots();  // which both sides get
    const int64_t W = kernels_.slice_width;
    left_columns_ = product.heads * rounded_up(product.rows, W);
    const int64_t columns =
        left_columns_ + (one_ ? 0 : product.heads * rounded_up(product.columns, W));
    token_bytes_ = columns * kernels_.element_bytes;
  }

  void run() {
    const int64_t sums = product_.heads * product_.rows * product_.columns * element_bytes();
    const Shares shares(tokens_.size(), sums, kWorkspaceBytes / 2, kernels_.segment);
    if (shares.count > 1 && !product_.square)
      run_shares(shares, sums);
    else
      run_panels();
  }

 private:
  int64_t element_bytes() const { return wide_ ? sizeof(double) : sizeof(float); }

  // As many whole segments as a panel of so many bytes takes, of all the tokens at most.
  int64_t capacity(int64_t bytes) const {
    const int64_t segment = kernels_.segment;
    const int64_t most = std::max(bytes / token_bytes_ / segment, int64_t{1}) * segment;
    return std::clamp<int64_t>(tokens_.size(), 1, most);
  }

  PanelProduct in_memory(char* memory, int64_t capacity) const {
    PanelProduct p = product_;
    p.left = p.right = {memory, capacity};
    if (!one_) p.right.data = memory + capacity * left_columns_ * kernels_.element_bytes;
    return p;
  }

  // The tokens [first, last) of those from begin to end.
  void pack(const PanelProduct& p, int64_t begin, int64_t end, int64_t first, int64_t last) const {
    kernels_.pack(left_, tokens_.list(begin, end, true), p.left, true, first, last);
    if (!one_) kernels_.pack(right_, tokens_.list(begin, end, false), p.right, false, first, last);
  }

  // A panel of all threads after another, whose tiles they share.
  void run_panels() {
    int64_t most = capacity(kWorkspaceBytes);
    // where the product of a batch is squared, a panel holds whole batches
    const auto& bounds = tokens_.bounds();
    const int64_t batches = static_cast<int64_t>(bounds.size()) - 1;
    if (product_.square)
      for (int64_t b = 0; b < batches; ++b) most = std::max(most, bounds[b + 1] - bounds[b]);
    most = rounded_up(most, kernels_.token_block);

    PanelMemory own;
    PanelProduct p = in_memory(scratch_of(most * token_bytes_, own), most);

    int64_t begin = 0, batch = 0;
    do {
      std::vector<int64_t> segments{0};
      int64_t end = begin;
      if (p.square) {
        for (; batch < batches && bounds[batch + 1] - begin <= most; ++batch)
          if ((end = bounds[batch + 1]) - begin > segments.back()) segments.push_back(end - begin);
      } else {
        end = std::min(begin + most, tokens_.size());
        segments = segments_of(end - begin, kernels_.segment);
      }
      constexpr int64_t kTokens = 64;  // that a thread packs at a time
      share_out((end - begin + kTokens - 1) / kTokens, [&](int64_t i) {
        pack(p, begin, end, i * kTokens, std::min((i + 1) * kTokens, end - begin));
      });
      p.segments = segments.data();
      p.segment_count = static_cast<int64_t>(segments.size()) - 1;
      multiply(kernels_, {p}, wide_);
      p.beta = 1;
      begin = end;
    } while (begin < tokens_.size());
  }

  // Shares of the tokens, each with sums of its own, which are added in order.
  void run_shares(const Shares& shares, int64_t sum_bytes) {
    constexpr int64_t kThreads = 16;  // whose panels half of the workspace is for
    const int64_t most = rounded_up(std::min(capacity(kWorkspaceBytes / 2 / kThreads), shares.width),
                                    kernels_.token_block);
    const PanelMemory sums(shares.count * sum_bytes);
    share_out(
        shares.count, [&] { return PanelMemory(most * token_bytes_); },
        [&](const PanelMemory& memory, int64_t share) {
          PanelProduct p = in_memory(memory.data(), most);
          p.splits = 1;
          p.factor = sums.data() + share * sum_bytes;
          p.row_stride = p.columns;
          p.head_stride = p.rows * p.columns;
          p.alpha = 1;
          p.beta = 0;
          const int64_t last = std::min((share + 1) * shares.width, tokens_.size());
          for (int64_t begin = share * shares.width; begin < last; begin += most) {
            const int64_t end = std::min(begin + most, last);
            pack(p, begin, end, 0, end - begin);
            const auto segments = segments_of(end - begin, kernels_.segment);
            p.segments = segments.data();
            p.segment_count = static_cast<int64_t>(segments.size()) - 1;
            for (int64_t tile = 0; tile < kernels_.tile_count(p); ++tile)
              kernels_.multiply_tile(p, tile);
            p.beta = 1;
          }
        });
    PanelProduct total = product_;
    total.splits = shares.count;
    total.partial = sums.data();
    add_splits(kernels_, total);
  }

  const Activations &left_, &right_;
  Tokens tokens_;
  PanelProduct product_;
  bool wide_;
  const PanelKernels& kernels_;
  bool one_;  // panel for both sides
  int64_t left_columns_, token_bytes_;
};

// The factor as destination; rows and columns are those of the product.
PanelProduct destination(const Tensor& factor, const Tensor& x, const Tensor& alpha, double beta) {
  const int64_t n = factor.dim();
  const bool wide = factor.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || (factor.scalar_type() == ScalarType::Float &&
                           x.scalar_type() != ScalarType::Double),
                  "factor must be float32 or float64, and no narrower than x");
  STD_TORCH_CHECK(factor.stride(n - 1) == 1 || factor.size(n - 1) == 1,
                  "factor must have a column stride of 1");
  STD_TORCH_CHECK(alpha.numel() == 1 && alpha.scalar_type() == factor.scalar_type(),
                  "alpha must be one element of the dtype of factor");
  PanelProduct p{};
  p.rows = factor.size(n - 2);
  p.columns = factor.size(n - 1);
  p.heads = 1;
  p.factor = factor.data_ptr();
  p.row_stride = factor.stride(n - 2);
  p.alpha = wide ? *static_cast<const double*>(alpha.data_ptr())
                 : *static_cast<const float*>(alpha.data_ptr());
  p.beta = beta;
  return p;
}

void covariance_update(const Tensor& x, const Optional& mask, const Optional& weights,
                       const Tensor& alpha, double beta, bool bias, std::string precision,
                       Tensor factor) {
  Activations a = activations_of(x, "x");
  a.bias = bias;
  PanelProduct p = destination(factor, x, alpha, beta);
  STD_TORCH_CHECK(factor.dim() == 3 && factor.size(0) == a.heads && p.rows == a.width() &&
                      p.columns == a.width(),
                  "factor must be [heads, columns, columns]");
  p.heads = a.heads;
  p.head_stride = factor.stride(0);
  p.triangular = true;
  const bool wide = factor.scalar_type() == ScalarType::Double;
  Update(a, a, Tokens(x, mask, weights), p, wide, precision).run();
}

void cross_update(const Tensor& x, const Tensor& g, const Optional& mask, const Optional& weights,
                  const Tensor& alpha, double beta, bool bias, std::string form,
                  std::string precision, Tensor factor) {
  Activations right = activations_of(x, "x"), left = activations_of(g, "g");
  STD_TORCH_CHECK(x.dim() == 3 && g.dim() == 3 && x.size(0) == g.size(0) &&
                      x.size(1) == g.size(1) && x.scalar_type() == g.scalar_type(),
                  "x and g must be [batches, tokens, columns] of one dtype");
  STD_TORCH_CHECK(form == "product" || form == "squares" || form == "samples",
                  "form must be product, squares or samples");
  right.bias = bias;
  left.squares = right.squares = form == "squares";
  PanelProduct p = destination(factor, x, alpha, beta);
  STD_TORCH_CHECK(factor.dim() == 2 && p.rows == left.width() && p.columns == right.width(),
                  "factor must be [columns of g, columns of x]");
  p.square = form == "samples";
  const bool wide = factor.scalar_type() == ScalarType::Double;
  Update(left, right, Tokens(x, mask, weights), p, wide, precision).run();
}

// Copies the rows [first, last) left of the diagonal onto the columns above it, some columns at a
// time: a row that is written to is written to 64 times before its page is left.
template <class E>
void mirror_rows(E* a, int64_t row_stride, int64_t column_stride, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 64;
  for (int64_t block = 0; block < last; block += kBlock)
    for (int64_t row = first; row < last; ++row)
      for (int64_t column = block; column < std::min(block + kBlock, row); ++column)
        a[column * row_stride + row * column_stride] = a[row * row_stride + column * column_stride];
}

void mirror(Tensor factor) {
  STD_TORCH_CHECK(factor.dim() == 3 && factor.size(1) == factor.size(2) &&
                      (factor.scalar_type() == ScalarType::Double ||
                       factor.scalar_type() == ScalarType::Float),
                  "factor must be [heads, columns, columns], float32 or float64");
  constexpr int64_t kRows = 64;
  const int64_t D = factor.size(1), blocks = (D + kRows - 1) / kRows;
  const bool wide = factor.scalar_type() == ScalarType::Double;
  share_out(factor.size(0) * blocks, [&](int64_t i) {
    // the longest block rows first
    const int64_t first = (blocks - 1 - i % blocks) * kRows, last = std::min(first + kRows, D);
    const int64_t offset = i / blocks * factor.stride(0);
    auto of = [&](auto* a) {
      mirror_rows(a + offset, factor.stride(1), factor.stride(2), first, last);
    };
    wide ? of(static_cast<double*>(factor.data_ptr())) : of(static_cast<float*>(factor.data_ptr()));
  });
}

}  // namespace
}  // namespace fisherkern

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CPU, m) {
  m.impl("covariance_update", TORCH_BOX(&fisherkern::covariance_update));
  m.impl("cross_update", TORCH_BOX(&fisherkern::cross_update));
  m.impl("mirror", TORCH_BOX(&fisherkern::mirror));
}
