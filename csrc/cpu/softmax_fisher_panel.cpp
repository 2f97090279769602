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

  // What to ask for in advance: further classes of this row; or, where so few are wanted that those of a
  // later row are read before them, its.
  PanelRow(const SoftmaxFisherPanel& p, const Exponential<A>& exponential, int64_t token, bool few)
      : exponential_(exponential),
        z_(row<const T>(p.rows, p.rows.logits, token)),
        ahead_(few ? row<const T>(p.rows, p.rows.logits, later(p.rows, token)) : z_ + kLogitsAhead),
        scale_(static_cast<const A*>(p.scale)),
        reference_(static_cast<const A*>(p.reference)[token]),
        unit_(weight<A>(p.rows, token)) {}

  template <class Count>
  Vec<A> operator()(int64_t i, Count count) const {
    if (unit_ == 0) return Vec<A>{};  // whatever the row holds
    const A lowest = -std::numeric_limits<A>::infinity();
    __builtin_prefetch(ahead_ + i, 0, 3);
    const Vec<A> e = exponential_(load_lanes(z_ + i, count, lowest) - reference_) * unit_;
    return scale_ ? e * load_lanes(scale_ + i, count) : e;
  }

 private:
  static int64_t later(const SoftmaxFisher& rows, int64_t token) {
    return std::min(token + kLanes<A>, rows.batches * rows.tokens - 1);
  }

  const Exponential<A>& exponential_;
  const T* z_;
  const T* ahead_;
  const A* scale_;
  A reference_, unit_;
};

template <class T>
void panel_of(const SoftmaxFisher&, const SoftmaxFisherPanel& p, int64_t first_token,
              int64_t last_token, int64_t first_class, int64_t last_class) {
  using A = Acc<T>;
  A* const out = static_cast<A*>(p.out);
  constexpr int64_t L = kLanes<A>;
  const Exponential<A> exponential(p.rows.temperature);
  const int64_t slice = p.slice ? p.slice : last_class - first_class;
  const bool few = last_class - first_class <= kLogitsAhead;
  auto place = [&](int64_t token, int64_t c) {  // of these, counted from the first
    return p.transposed ? out + c * p.stride + token
                        : out + c / slice * p.slice_stride + token * p.stride + c % slice;
  };
  if (p.transposed) {
    std::vector<PanelRow<T>> rows;
    for (int64_t token = first_token; token < last_token; token += L) {
      const int64_t tokens = std::min(L, last_token - token);
      rows.clear();
      for (int64_t t = 0; t < tokens; ++t) rows.emplace_back(p, exponential, token + t, few);
      for_lanes<A>(first_class, last_class, [&](int64_t i, auto count) {
        Vec<A> block[L] = {};
        for (int64_t t = 0; t < tokens; ++t) block[t] = rows[t](i, count);
        transpose<A>(block);
        A* const to = place(token - first_token, i - first_class);
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
      const PanelRow<T> row(p, exponential, token, few);
      for (int64_t first = first_class; first < last_class; first += slice) {
        A* const to = place(token - first_token, first - first_class);
        for_lanes<A>(first, std::min(first + slice, last_class), [&](int64_t i, auto count) {
          store_lanes(to + i - first, row(i, count), count);
        });
      }
    }
  }
  if (!p.labels) return;
  for (int64_t token = first_token; token < last_token; ++token) {
    const int64_t label = p.labels[token];
    if (label < first_class || label >= last_class) continue;
    const A value = static_cast<const A*>(p.at_label)[token];
    *place(token - first_token, label - first_class) =
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
