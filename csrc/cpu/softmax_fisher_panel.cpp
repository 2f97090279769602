// Panels of scaled probabilities: what the matrix products with the low-rank part of the Fisher read.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// The panel of one row of logits, from class to class.
template <class T>
class PanelRow {
 public:
  using A = Acc<T>;

  PanelRow(const SoftmaxFisherPanel& p, int64_t token)
      : exponential_(p.rows.temperature),
        z_(row<const T>(p.rows, p.rows.logits, token)),
        scale_(static_cast<const A*>(p.scale)),
        reference_(static_cast<const A*>(p.reference)[token]),
        unit_(weight<A>(p.rows, token)) {}

  template <class Count>
  Vec<A> operator()(int64_t i, Count count) const {
    if (unit_ == 0) return Vec<A>{};  // whatever the row holds
    const A lowest = -std::numeric_limits<A>::infinity();
    __builtin_prefetch(z_ + i + kLogitsAhead, 0, 3);
    const Vec<A> e = exponential_(load_lanes(z_ + i, count, lowest) - reference_) * unit_;
    return scale_ ? e * load_lanes(scale_ + i, count) : e;
  }

 private:
  Exponential<A> exponential_;
  const T* z_;
  const A* scale_;
  A reference_, unit_;
};

template <class T>
void panel_of(const SoftmaxFisher&, const SoftmaxFisherPanel& p, int64_t first_token,
              int64_t last_token, int64_t first_class, int64_t last_class) {
  using A = Acc<T>;
  A* const out = static_cast<A*>(p.out);
  constexpr int64_t L = kLanes<A>;
  if (p.transposed) {
    std::vector<PanelRow<T>> rows;
    for (int64_t token = first_token; token < last_token; token += L) {
      const int64_t tokens = std::min(L, last_token - token);
      rows.clear();
      for (int64_t t = 0; t < tokens; ++t) rows.emplace_back(p, token + t);
      for_lanes<A>(first_class, last_class, [&](int64_t i, auto count) {
        Vec<A> block[L] = {};
        for (int64_t t = 0; t < tokens; ++t) block[t] = rows[t](i, count);
        transpose<A>(block);
        A* const to = out + (i - first_class) * p.stride + token - first_token;
        for (int64_t c = 0; c < count; ++c) {
          if (tokens == L)
            store(to + c * p.stride, block[c]);
          else
            store_some(to + c * p.stride, block[c], tokens);
        }
      });
    }
  } else {
    for (int64_t token = first_token; token < last_token; ++token) {
      const PanelRow<T> row(p, token);
      A* const to = out + (token - first_token) * p.stride;
      for_lanes<A>(first_class, last_class, [&](int64_t i, auto count) {
        store_lanes(to + i - first_class, row(i, count), count);
      });
    }
  }
  if (!p.labels) return;
  for (int64_t token = first_token; token < last_token; ++token) {
    const int64_t label = p.labels[token];
    if (label < first_class || label >= last_class) continue;
    const int64_t t = token - first_token, c = label - first_class;
    const A value = static_cast<const A*>(p.at_label)[token];
    out[p.transposed ? c * p.stride + t : t * p.stride + c] =
        p.scale ? value * static_cast<const A*>(p.scale)[label] : value;
  }
}

}  // namespace

void panel(const SoftmaxFisherPanel& p, int64_t first_token, int64_t last_token,
           int64_t first_class, int64_t last_class) {
  FISHERKERN_FOR_DTYPE(p.rows, panel_of, p, first_token, last_token, first_class, last_class)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
