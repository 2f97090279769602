// Sums over tokens, [T, V] -> [V], with one read of the logits from memory.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// Rows added before the running sum moves on to the total, which bounds the rounding of many rows.
constexpr int64_t kFlush = 64;

// Rows are added in groups, for which the running sum is read and written once. Their powers and
// the running sum should stay in a second-level cache.
constexpr int kGroup = 4;
constexpr int64_t kGroupBytes = 1 << 20;

template <class A>
struct Term {
  const A* e;
  Distribution<A> p;
  A scale;
  int64_t star;
  A star_power;
};

// sum[i] += scale e_i, or scale e_i (1 - p_i), over `count` rows.
template <class A, bool kDiagonal, int count>
void add_group(const Term<A>* terms, int64_t classes, A* sum) {
  // in registers: the compiler cannot know that storing the sum leaves the terms alone
  const A* e[count];
  Vec<A> scale[count], unit[count];
  for (int r = 0; r < count; ++r) {
    e[r] = terms[r].e;
    scale[r] = broadcast(terms[r].scale);
    unit[r] = broadcast(terms[r].p.unit);
  }
  for_lanes<A>(0, classes, [&](int64_t i, auto lanes) {
    Vec<A> running = load_lanes(sum + i, lanes);
    for (int r = 0; r < count; ++r) {
      const Vec<A> ej = load_lanes(e[r] + i, lanes);
      if constexpr (kDiagonal) {
        running = multiply_add(ej * scale[r], 1 - ej * unit[r], running);
      } else {
        running = multiply_add(ej, scale[r], running);
      }
    }
    store_lanes(sum + i, running, lanes);
  });
  if constexpr (kDiagonal) {
    // at its star a row gave (1 - P), which cancels: put epsilon in its place
    for (int r = 0; r < count; ++r) {
      const Term<A>& t = terms[r];
      sum[t.star] += t.scale * t.star_power * (t.p.epsilon - (1 - t.star_power * t.p.unit));
    }
  }
}

template <class T, bool kDiagonal>
void token_sum(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* total = static_cast<A*>(partial);
  fill_row(total, V, A(0));
  std::vector<A> running;
  A* sum = total;
  if (end - begin > kFlush) {
    running.assign(V, A(0));
    sum = running.data();
  }
  auto flush = [&] {
    for_lanes<A>(0, V, [&](int64_t i, auto count) {
      store_lanes(total + i, load_lanes(total + i, count) + load_lanes(sum + i, count), count);
      store_lanes(sum + i, Vec<A>{}, count);
    });
  };
  const int group = static_cast<int>(
      std::clamp<int64_t>(kGroupBytes / (V * static_cast<int64_t>(sizeof(A))) - 1, 1, kGroup));
  A* e = scratch<A>(group * V);
  Term<A> terms[kGroup];
  int filled = 0;
  auto add = [&] {
    switch (filled) {
      case 1: add_group<A, kDiagonal, 1>(terms, V, sum); break;
      case 2: add_group<A, kDiagonal, 2>(terms, V, sum); break;
      case 3: add_group<A, kDiagonal, 3>(terms, V, sum); break;
      case 4: add_group<A, kDiagonal, 4>(terms, V, sum); break;
    }
    filled = 0;
  };
  int64_t pending = 0;
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    if (w == 0) continue;
    A* powers = e + filled * V;
    const auto sums = exponentials<1>(row<const T>(f, f.logits, token), V, exponential, powers,
                                      nullptr, NoTerm{});
    const auto p = distribution<T>(f, token, sums);
    A scale = w * p.unit;
    if constexpr (kDiagonal) scale /= static_cast<A>(f.temperature * f.temperature);
    terms[filled++] = {powers, p, scale, std::max<int64_t>(sums.star, 0), sums.star_power};
    ++pending;
    if (filled == group) {
      add();
      if (sum != total && pending >= kFlush) {
        flush();
        pending = 0;
      }
    }
  }
  add();
  if (sum != total) flush();
}

template <class T>
void probabilities_sum_of(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  token_sum<T, false>(f, partial, begin, end);
}
template <class T>
void diagonal_sum_of(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  token_sum<T, true>(f, partial, begin, end);
}

template <class T>
void add_partials_of(const SoftmaxFisher& f, const void* partial, int64_t rows, void* out,
                     int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* from = static_cast<const A*>(partial);
  for_lanes<A>(begin, end, [&](int64_t i, auto count) {
    Vec<A> sum = load_lanes(from + i, count);
    for (int64_t r = 1; r < rows; ++r) sum += load_lanes(from + r * f.classes + i, count);
    store_lanes(static_cast<A*>(out) + i, sum, count);
  });
}

}  // namespace

void probabilities_sum(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, probabilities_sum_of, partial, begin, end)
}
void diagonal_sum(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, diagonal_sum_of, partial, begin, end)
}
void add_partials(const SoftmaxFisher& f, const void* partial, int64_t rows, void* out,
                  int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, add_partials_of, partial, rows, out, begin, end)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
