// Products with the factor U of the mean Fisher: panels of probabilities are made from logits, packed
// and multiplied while they are in the cache.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../checks.h"
#include "capability.h"
#include "panel_product.h"
#include "panel_tasks.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace {

using Optional = std::optional<Tensor>;

// Bytes of packed panels that the caches hold: those that all threads share, and those of one thread.
constexpr int64_t kCachedBytes = 8 << 20, kOwnBytes = 2 << 20;

// U [V, T] of the tokens of several batches.
class TokenFactor {
 public:
  TokenFactor(const std::vector<Tensor>& logits, const Tensor& reference, const Tensor& unit,
              const Optional& labels, const Optional& at_label, double temperature)
      : wide_(logits.at(0).scalar_type() == ScalarType::Double),
        classes_(logits[0].size(2)),
        kernel_(FISHERKERN_KERNEL(panel)) {
    const int64_t width = wide_ ? sizeof(double) : sizeof(float);
    for (const Tensor& z : logits) {
      SoftmaxFisherPanel p{};
      p.rows = problem_of(z, {}, {}, {}, temperature);
      STD_TORCH_CHECK(p.rows.classes == classes_ &&
                          (z.scalar_type() == ScalarType::Double) == wide_,
                      "logits must have one number of classes and one accumulation type");
      batches_.push_back(p);
      first_.push_back(first_.back() + p.rows.batches * p.rows.tokens);
    }
    const int64_t T = tokens();
    const auto* references = static_cast<char*>(flat_of(reference, logits[0], T, "reference"));
    const auto* units = static_cast<char*>(flat_of(unit, logits[0], T, "unit"));
    for (size_t i = 0; i < batches_.size(); ++i) {
      SoftmaxFisherPanel& p = batches_[i];
      p.reference = references + first_[i] * width;
      p.rows.weights = units + first_[i] * width;
      if (!labels) continue;
      p.labels = static_cast<const int64_t*>(
                     flat_of(*labels, logits[0], T, "labels", ScalarType::Long)) + first_[i];
      p.at_label =
          static_cast<char*>(flat_of(*at_label, logits[0], T, "at_label")) + first_[i] * width;
    }
  }

  bool wide() const { return wide_; }
  int64_t tokens() const { return first_.back(); }
  int64_t classes() const { return classes_; }
  int64_t width() const { return wide_ ? sizeof(double) : sizeof(float); }

  // These tokens and classes of diag(scale) U: [classes][stride] by class, else [tokens][stride], or
  // slices of so many classes like that, `slice_stride` apart.
  void fill(int64_t first_token, int64_t last_token, int64_t first_class, int64_t last_class,
            const void* scale, bool by_class, void* out, int64_t stride, int64_t slice = 0,
            int64_t slice_stride = 0) const {
    for (size_t i = 0; i < batches_.size(); ++i) {
      const int64_t first = std::max(first_token, first_[i]);
      const int64_t last = std::min(last_token, first_[i + 1]);
      if (first >= last) continue;
      SoftmaxFisherPanel p = batches_[i];
      p.scale = scale;
      p.transposed = by_class;
      p.stride = stride;
      p.slice = slice;
      p.slice_stride = slice_stride;
      p.out = static_cast<char*>(out) + (first - first_token) * (by_class ? 1 : stride) * width();
      kernel_(p, first - first_[i], last - first_[i], first_class, last_class);
    }
  }

 private:
  bool wide_;
  int64_t classes_;
  decltype(FISHERKERN_KERNEL(panel)) kernel_;
  std::vector<SoftmaxFisherPanel> batches_;
  std::vector<int64_t> first_{0};  // token of each batch
};

const PanelKernels& kernels_for(bool wide, const std::string& precision) {
#if defined(FISHERKERN_AMX)
  if (capability() == Capability::amx && !wide && precision != "ieee")
    return amx::split_panel_kernels();
#endif
  return FISHERKERN_KERNEL(panel_kernels)(wide);
}

// A matrix [rows][columns] to pack.
Activations matrix(const void* data, int64_t columns, int64_t stride, bool wide) {
  Activations a{};
  a.data = data;
  a.dtype = wide ? DType::float64 : DType::float32;
  a.tokens = INT64_MAX;
  a.heads = 1;
  a.columns = columns;
  a.token_stride = stride;
  return a;
}

Activations block_of(const Tensor& y, const char* name, int64_t rows, bool wide) {
  STD_TORCH_CHECK(y.dim() == 2 && y.size(0) == rows && (y.size(1) <= 1 || y.stride(1) == 1) &&
                      y.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  name, " must be [", rows, ", k] in the accumulation type, its columns adjacent");
  return matrix(y.data_ptr(), y.size(1), y.stride(0), wide);
}

// The rows from `row` on.
Activations from_row(Activations a, int64_t row) {
  a.data = static_cast<const char*>(a.data) +
           row * a.token_stride * (a.dtype == DType::float64 ? sizeof(double) : sizeof(float));
  return a;
}

// The panel from a slice and a token on; the token is a multiple of the token block.
Panel part_of(const PanelKernels& kernels, Panel panel, int64_t slice, int64_t token) {
  panel.data = static_cast<char*>(panel.data) +
               (slice * panel.capacity + token) * kernels.slice_width * kernels.element_bytes;
  return panel;
}

// The square roots of a scale [V], for either use of it; null where there is none.
class Roots {
 public:
  Roots(const void* scale, int64_t classes, bool wide) {
    if (!scale) return;
    wide_.resize(classes);
    for (int64_t c = 0; c < classes; ++c)
      wide_[c] = std::sqrt(wide ? static_cast<const double*>(scale)[c]
                                : static_cast<const float*>(scale)[c]);
    if (!wide) narrow_.assign(wide_.begin(), wide_.end());
  }

  const double* wide(int64_t first) const { return wide_.empty() ? nullptr : &wide_[first]; }
  // in the accumulation type
  const void* plain() const {
    if (!narrow_.empty()) return narrow_.data();
    return wide_.empty() ? nullptr : wide_.data();
  }

 private:
  std::vector<double> wide_;
  std::vector<float> narrow_;
};

// The products U^T diag(scale) [y, 1] and U^T diag(scale) U over ranges of classes, a panel at a time.
// Both sides get the roots of the scale: one panel of U then serves both.
class Projection {
 public:
  Projection(const TokenFactor& factor, const Roots& roots, const Activations& block, bool gram,
             const std::string& precision)
      : kernels(kernels_for(factor.wide(), precision)),
        factor_(factor),
        roots_(roots),
        block_(block),
        twice_(gram && !kernels.sides_alike),
        token_slices_(slices(factor.tokens())),
        column_slices_(slices(block.width())) {}

  const PanelKernels& kernels;

  // Bytes of a panel per class.
  int64_t class_bytes() const {
    return (token_slices_ * (twice_ ? 2 : 1) + column_slices_) * kernels.slice_width *
           kernels.element_bytes;
  }

  // The classes of a panel of so many bytes: whole segments, which are whole blocks of tokens.
  int64_t capacity(int64_t bytes) const {
    const int64_t capacity = bytes / class_bytes() / kernels.segment;
    return std::min(std::max(capacity, int64_t{1}) * kernels.segment,
                    rounded_up(factor_.classes(), kernels.token_block));
  }

  // factors <- the products over some classes, [y, 1] after the gram where there is one. `each` runs
  // tasks that do not depend on each other, `multiply` the products of a panel.
  template <class Each, class Multiply>
  void add_up(int64_t first_class, int64_t last_class, char* memory, int64_t capacity, void* gram,
              void* out, Each&& each, Multiply&& multiply) const {
    const int64_t T = factor_.tokens(), K = block_.width();
    const Panel left{memory, capacity};
    const Panel columns = part_of(kernels, left, token_slices_, 0);
    const Panel right = twice_ ? part_of(kernels, columns, column_slices_, 0) : left;
    std::vector<PanelProduct> products;
    if (gram) products.push_back(product(left, right, T, gram));
    if (K) products.push_back(product(left, columns, K, out));
    if (gram) products[0].triangular = true;
    for (int64_t begin = first_class; begin < last_class; begin += capacity) {
      const int64_t count = std::min(capacity, last_class - begin);
      fill(begin, count, left, columns, right, each);
      const auto segments = segments_of(count, kernels.segment);
      for (PanelProduct& p : products) {
        p.segments = segments.data();
        p.segment_count = static_cast<int64_t>(segments.size()) - 1;
      }
      multiply(products);
      for (PanelProduct& p : products) p.beta = 1;
    }
  }

 private:
  int64_t slices(int64_t columns) const {
    return (columns + kernels.slice_width - 1) / kernels.slice_width;
  }

  PanelProduct product(Panel left, Panel right, int64_t columns, void* factor) const {
    PanelProduct p{};
    p.left = left;
    p.right = right;
    p.rows = factor_.tokens();
    p.columns = columns;
    p.heads = 1;
    p.splits = 1;
    p.factor = factor;
    p.row_stride = columns;
    p.alpha = 1;
    return p;
  }

  // A task fills and packs so many classes of a group of slices.
  template <class Each>
  void fill(int64_t begin, int64_t count, Panel left, Panel columns, Panel right,
            Each&& each) const {
    constexpr int64_t kClasses = 256;
    const int64_t T = factor_.tokens(), W = kernels.slice_width;
    const int64_t group = std::max<int64_t>(1, 96 / W);
    const int64_t groups = (token_slices_ + group - 1) / group;
    const int64_t parts = (count + kClasses - 1) / kClasses;
    each(parts * (groups + (column_slices_ > 0)), [&](int64_t task) {
      const int64_t first = task % parts * kClasses, last = std::min(first + kClasses, count);
      const int64_t slice = task / parts * group;
      if (slice >= token_slices_) {
        kernels.pack(from_row(block_, begin + first),
                     {nullptr, roots_.wide(begin + first), last - first},
                     part_of(kernels, columns, 0, first), false, 0, last - first);
        return;
      }
      const int64_t token = slice * W, last_token = std::min(token + group * W, T);
      auto fill = [&](int64_t from, int64_t to, bool by_class, void* data, int64_t stride) {
        factor_.fill(from, to, begin + first, begin + last, roots_.plain(), by_class, data, stride);
      };
      if (kernels.sides_alike) {  // a panel is the factor as it is, slice by slice
        for (int64_t t = token; t < last_token; t += W)
          fill(t, std::min(t + W, last_token), true, part_of(kernels, left, t / W, first).data, W);
        return;
      }
      static thread_local PanelMemory buffer;
      buffer.reserve(kClasses * group * W * factor_.width());
      fill(token, last_token, false, buffer.data(), kClasses);
      kernels.pack_columns(buffer.data(), kClasses, last_token - token, last - first,
                           part_of(kernels, left, slice, first),
                           twice_ ? part_of(kernels, right, slice, first)
                                  : Panel{nullptr, left.capacity});
    });
  }

  const TokenFactor& factor_;
  const Roots& roots_;
  const Activations& block_;
  bool twice_;
  int64_t token_slices_, column_slices_;
};

// out <- U^T diag(scale) [y, 1] and the lower triangle of gram <- U^T diag(scale) U.
void project(std::vector<Tensor> logits, const Tensor& reference, const Tensor& unit,
             const Optional& labels, const Optional& at_label, double temperature,
             const Optional& scale, const Tensor& y, bool ones, std::string precision,
             int64_t workspace, Tensor out, Optional gram) {
  const TokenFactor factor(logits, reference, unit, labels, at_label, temperature);
  const bool wide = factor.wide();
  const int64_t T = factor.tokens(), V = factor.classes();
  Activations block = block_of(y, "y", V, wide);
  block.bias = ones;
  const int64_t K = block.width();
  auto* const outs = static_cast<char*>(flat_of(out, logits[0], T * K, "out"));
  char* const grams =
      gram ? static_cast<char*>(flat_of(*gram, logits[0], T * T, "gram")) : nullptr;
  const Roots roots(scale ? flat_of(*scale, logits[0], V, "scale") : nullptr, V, wide);
  const Projection projection(factor, roots, block, grams != nullptr, precision);
  const PanelKernels& kernels = projection.kernels;

  const int64_t gram_bytes = grams ? T * T * factor.width() : 0, out_bytes = T * K * factor.width();
  const Shares shares(V, gram_bytes + out_bytes, workspace / 2, kernels.segment);
  if (shares.count == 1) {
    // Where there are many tokens it is the results that go to and fro in memory, once per panel:
    // then a few segments, cached or not.
    const int64_t wanted = std::max(kCachedBytes, 4 * kernels.segment * projection.class_bytes());
    const int64_t capacity = projection.capacity(std::min(workspace, wanted));
    const PanelMemory memory(capacity * projection.class_bytes());
    projection.add_up(
        0, V, memory.data(), capacity, grams, outs,
        [](int64_t count, auto&& task) { share_out(count, task); },
        [&](const std::vector<PanelProduct>& products) { multiply(kernels, products, wide); });
    return;
  }
  constexpr int64_t kThreads = 16;  // whose panels the other half of the workspace is for
  const int64_t most = projection.capacity(std::min(workspace / 2 / kThreads, kOwnBytes));
  const int64_t panels = (shares.width + most - 1) / most;
  const int64_t capacity = rounded_up((shares.width + panels - 1) / panels, kernels.segment);
  const PanelMemory sums(shares.count * (gram_bytes + out_bytes));
  char* const out_sums = sums.data() + shares.count * gram_bytes;
  share_out(
      shares.count, [&] { return PanelMemory(capacity * projection.class_bytes()); },
      [&](const PanelMemory& memory, int64_t share) {
        const int64_t first = share * shares.width, last = std::min(first + shares.width, V);
        projection.add_up(
            first, last, memory.data(), capacity,
            grams ? sums.data() + share * gram_bytes : nullptr, out_sums + share * out_bytes,
            [](int64_t count, auto&& task) {
              for (int64_t i = 0; i < count; ++i) task(i);
            },
            [&](const std::vector<PanelProduct>& products) {
              for (const PanelProduct& p : products)
                for (int64_t tile = 0; tile < kernels.tile_count(p); ++tile)
                  kernels.multiply_tile(p, tile);
            });
      });
  auto add = [&](void* to, char* partial, int64_t columns, bool triangular) {
    PanelProduct p{};
    p.rows = T;
    p.columns = columns;
    p.heads = 1;
    p.triangular = triangular;
    p.splits = shares.count;
    p.partial = partial;
    p.factor = to;
    p.row_stride = columns;
    p.alpha = 1;
    add_splits(kernels, p);
  };
  if (grams) add(grams, sums.data(), T, true);
  if (K) add(outs, out_sums, K, false);
}

// out <- diag(y_scale) y + alpha diag(scale) U c: the coefficients are packed once, a thread makes the
// panel of some classes for itself.
void expand(std::vector<Tensor> logits, const Tensor& reference, const Tensor& unit,
            const Optional& labels, const Optional& at_label, double temperature,
            const Optional& scale, const Tensor& c, double alpha, const Optional& y,
            const Optional& y_scale, std::string precision, int64_t workspace, Tensor out) {
  const TokenFactor factor(logits, reference, unit, labels, at_label, temperature);
  const bool wide = factor.wide();
  const int64_t T = factor.tokens(), V = factor.classes();
  const Activations coefficients = block_of(c, "c", T, wide);
  const int64_t K = coefficients.columns;
  flat_of(out, logits[0], V * K, "out");
  PanelProduct product{};
  product.columns = K;
  product.heads = 1;
  product.splits = 1;
  product.row_stride = K;
  product.alpha = alpha;
  const void* const rows = scale ? flat_of(*scale, logits[0], V, "scale") : nullptr;
  const Activations addend = y ? block_of(*y, "y", V, wide) : Activations{};
  const void* const addends = y_scale ? flat_of(*y_scale, logits[0], V, "y_scale") : nullptr;

  const PanelKernels& kernels = kernels_for(wide, precision);
  const int64_t W = kernels.slice_width, bytes = W * kernels.element_bytes;
  const int64_t column_slices = (K + W - 1) / W;
  // the classes of a panel: those of a tile
  const int64_t slices = std::max<int64_t>(1, 192 / W), classes = slices * W;
  // tokens of a panel, of one of which each thread has its own
  constexpr int64_t kThreads = 8;
  int64_t capacity = workspace / ((column_slices + kThreads * slices) * bytes);
  capacity = std::max(capacity / kernels.segment, int64_t{1}) * kernels.segment;
  capacity = std::min(capacity, rounded_up(T, kernels.token_block));
  const PanelMemory memory(capacity * column_slices * bytes);
  const Panel right{memory.data(), capacity};

  constexpr int64_t kTokens = 64;  // that a thread fills and packs at a time
  for (int64_t begin = 0; begin < T; begin += capacity) {
    const int64_t count = std::min(capacity, T - begin);
    share_out((count + kTokens - 1) / kTokens, [&](int64_t part) {
      const int64_t first = part * kTokens, last = std::min(first + kTokens, count);
      kernels.pack(from_row(coefficients, begin + first), {nullptr, nullptr, last - first},
                   part_of(kernels, right, 0, first), false, 0, last - first);
    });
    const auto segments = segments_of(count, kernels.segment);
    share_out((V + classes - 1) / classes, [&](int64_t task) {
      const int64_t first_class = task * classes, last_class = std::min(first_class + classes, V);
      static thread_local PanelMemory buffer, own;
      own.reserve(capacity * slices * bytes);
      PanelProduct p = product;
      p.left = {own.data(), capacity};
      p.right = right;
      p.rows = last_class - first_class;
      p.segments = segments.data();
      p.segment_count = static_cast<int64_t>(segments.size()) - 1;
      p.factor = static_cast<char*>(out.data_ptr()) + first_class * K * factor.width();
      auto of_classes = [&](const void* values) -> const void* {
        return values ? static_cast<const char*>(values) + first_class * factor.width() : nullptr;
      };
      p.row_scale = of_classes(rows);
      if (begin > 0) {
        p.beta = 1;
      } else if (y) {
        p.addend = from_row(addend, first_class).data;
        p.addend_stride = addend.token_stride;
        p.addend_scale = of_classes(addends);
      }
      for (int64_t first = 0; first < count; first += kTokens) {
        const int64_t last = std::min(first + kTokens, count);
        const Panel to = part_of(kernels, p.left, 0, first);
        auto fill = [&](void* data, int64_t stride, int64_t slice, int64_t slice_stride) {
          factor.fill(begin + first, begin + last, first_class, last_class, nullptr, false, data,
                      stride, slice, slice_stride);
        };
        if (kernels.sides_alike) {  // a panel is the factor as it is, slice by slice
          fill(to.data, W, W, capacity * W);
          continue;
        }
        buffer.reserve(kTokens * classes * factor.width());
        fill(buffer.data(), classes, 0, 0);
        kernels.pack(matrix(buffer.data(), p.rows, classes, wide), {nullptr, nullptr, last - first},
                     to, true, 0, last - first);
      }
      for (int64_t tile = 0; tile < kernels.tile_count(p); ++tile) kernels.multiply_tile(p, tile);
    });
  }
}

}  // namespace
}  // namespace fisherkern

STABLE_TORCH_LIBRARY_IMPL(fisherkern_native, CPU, m) {
  m.impl("softmax_fisher_project", TORCH_BOX(&fisherkern::project));
  m.impl("softmax_fisher_expand", TORCH_BOX(&fisherkern::expand));
}
