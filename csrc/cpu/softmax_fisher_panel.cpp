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

// A square of lanes on its side: blocks of half the size change places, then those within them.
template <class A>
inline void transpose(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Index Lanes __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2) {
    Lanes upper, lower;
    for (int n = 0; n < L; ++n) {
      upper[n] = n & half ? L + (n ^ half) : n;
      lower[n] = n & half ? L + n : n ^ half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & half) continue;
      const Vec<A> a = rows[i], b = rows[i | half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i | half] = __builtin_shuffle(a, b, lower);
    }
  }
}

template <class T>
void panel_of(const SoftmaxFisher&, const SoftmaxFisherPanel& p, int64_t first_token,
              int64_t last_token, int64_t first_class, int64_t last_class) {
  using A = Acc<T>;
  A* const out = static_cast<A*>(p.out);
  if (!p.transposed) {
    for (int64_t token = first_token; token < last_token; ++token) {
      const PanelRow<T> row(p, token);
      A* const to = out + token * p.stride;
      for_lanes<A>(first_class, last_class,
                   [&](int64_t i, auto count) { store_lanes(to + i, row(i, count), count); });
    }
    return;
  }
  constexpr int64_t L = kLanes<A>;
  for (int64_t token = first_token; token < last_token; token += L) {
    const int64_t tokens = std::min(L, last_token - token);
    std::vector<PanelRow<T>> rows;
    for (int64_t t = 0; t < tokens; ++t) rows.emplace_back(p, token + t);
    for_lanes<A>(first_class, last_class, [&](int64_t i, auto count) {
      Vec<A> block[L] = {};
      for (int64_t t = 0; t < tokens; ++t) block[t] = rows[t](i, count);
      transpose<A>(block);
      A* const to = out + i * p.stride + token;
      for (int64_t c = 0; c < count; ++c) {
        if (tokens == L)
          store(to + c * p.stride, block[c]);
        else
          store_some(to + c * p.stride, block[c], tokens);
      }
    });
  }
}

}  // namespace

void panel(const SoftmaxFisherPanel& p, int64_t first_token, int64_t last_token,
           int64_t first_class, int64_t last_class) {
  FISHERKERN_FOR_DTYPE(p.rows, panel_of, p, first_token, last_token, first_class, last_class)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
