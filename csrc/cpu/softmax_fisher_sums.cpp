// Sums over tokens, [T, V] -> [V], with one read of the logits from memory.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// Rows added before the running sum moves on to the total, which bounds the rounding of many rows.
constexpr int64_t kFlush = 64;

// Rows are added in groups, for which the running sum is read and written once. The logits of a
// group stay in the second-level cache between their normaliser and their sum.
constexpr int kGroup = 4;
constexpr int64_t kGroupBytes = 1 << 20;

template <class T>
struct Term {
  const T* z;
  Largest<Acc<T>> top;
  Distribution<Acc<T>> p;
  Acc<T> scale;
};

// sum[i] += scale p_i, or scale p_i (1 - p_i), over `count` rows.
template <class T, bool kDiagonal, int count>
void add_group(const Term<T>* terms, const Exponential<Acc<T>>& exponential, int64_t classes,
               Acc<T>* sum) {
  using A = Acc<T>;
  const A lowest = -std::numeric_limits<A>::infinity();
  // in registers: the compiler cannot know that storing the sum leaves the terms alone
  const T* z[count];
  Vec<A> max[count], scale[count], P[count];
  for (int r = 0; r < count; ++r) {
    z[r] = terms[r].z;
    max[r] = broadcast(terms[r].top.value);
    scale[r] = broadcast(terms[r].scale);
    P[r] = broadcast(terms[r].p.largest);
  }
  for_lanes<A>(0, classes, [&](int64_t i, auto lanes) {
    Vec<A> running = load_lanes(sum + i, lanes);
    for (int r = 0; r < count; ++r) {
      const Vec<A> e = exponential(load_lanes(z[r] + i, lanes, lowest) - max[r]);
      if constexpr (kDiagonal) {
        running = multiply_add(e * scale[r], 1 - e * P[r], running);
      } else {
        running = multiply_add(e, scale[r], running);
      }
    }
    store_lanes(sum + i, running, lanes);
  });
  if constexpr (kDiagonal) {
    // at its star a row gave scale (1 - P), which cancels: put scale epsilon in its place
    for (int r = 0; r < count; ++r)
      sum[terms[r].top.star] += terms[r].scale * (terms[r].p.epsilon - (1 - terms[r].p.largest));
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
      std::clamp<int64_t>(kGroupBytes / (V * static_cast<int64_t>(sizeof(T))), 1, kGroup));
  Term<T> terms[kGroup];
  int filled = 0;
  auto add = [&] {
    switch (filled) {
      case 1: add_group<T, kDiagonal, 1>(terms, exponential, V, sum); break;
      case 2: add_group<T, kDiagonal, 2>(terms, exponential, V, sum); break;
      case 3: add_group<T, kDiagonal, 3>(terms, exponential, V, sum); break;
      case 4: add_group<T, kDiagonal, 4>(terms, exponential, V, sum); break;
    }
    filled = 0;
  };
  int64_t pending = 0;
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    if (w == 0) continue;
    const T* z = row<const T>(f, f.logits, token);
    const auto top = largest(z, V);
    const auto sums =
        exponentials<1>(z, next_row<T>(f, token, end), V, top, exponential,
                        static_cast<A*>(nullptr), nullptr,
                        [](int64_t, auto, Vec<A>, Vec<A>, Vec<A>*) {});
    const auto p = distribution<T>(f, token, top, sums.value[0]);
    A scale = w * p.largest;
    if constexpr (kDiagonal) scale /= static_cast<A>(f.temperature * f.temperature);
    terms[filled++] = {z, top, p, scale};
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
