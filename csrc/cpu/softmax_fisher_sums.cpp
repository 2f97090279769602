// Sums over tokens, [T, V] -> [V]: the logits are read once, and each e_j is computed once.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// Rows added before the running sum moves on to the total, which bounds the rounding of many rows.
constexpr int64_t kRows = 64;

template <class T, bool kDiagonal>
void token_sum(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* e = scratch<A>(V);
  A* total = static_cast<A*>(partial);
  fill_row(total, V, A(0));
  std::vector<A> running;
  A* sum = total;
  if (end - begin > kRows) {
    running.assign(V, A(0));
    sum = running.data();
  }
  auto flush = [&] {
    for_lanes<A>(0, V, [&](int64_t i, auto count) {
      store_lanes(total + i, load_lanes(total + i, count) + load_lanes(sum + i, count), count);
      store_lanes(sum + i, Vec<A>{}, count);
    });
  };
  int64_t pending = 0;
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    if (w == 0) continue;
    const T* z = row<const T>(f, f.logits, token);
    const auto top = largest(z, V);
    const auto sums = exponentials<1>(z, V, top, exponential, e, nullptr,
                                      [](int64_t, auto, Vec<A>, Vec<A>, Vec<A>*) {});
    const auto p = distribution<T>(f, token, top, sums.value[0]);
    A scale = w * p.largest;
    const A before = sum[top.star];
    if constexpr (kDiagonal) {
      scale /= static_cast<A>(f.temperature * f.temperature);
      for_lanes<A>(0, V, [&](int64_t i, auto count) {
        const Vec<A> ej = load_lanes(e + i, count);
        const Vec<A> term = ej * scale * (1 - ej * p.largest);
        store_lanes(sum + i, load_lanes(sum + i, count) + term, count);
      });
      sum[top.star] = before + scale * p.epsilon;
    } else {
      for_lanes<A>(0, V, [&](int64_t i, auto count) {
        const Vec<A> so_far = load_lanes(sum + i, count);
        const Vec<A> next = multiply_add(load_lanes(e + i, count), broadcast(scale), so_far);
        store_lanes(sum + i, next, count);
      });
    }
    if (sum != total && ++pending == kRows) {
      flush();
      pending = 0;
    }
  }
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
