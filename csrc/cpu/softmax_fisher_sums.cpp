// Sums over tokens, [T, V] -> [V], with one read of the logits from memory.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

// Rows added before the running sum moves on to the total, which bounds the rounding of many rows.
constexpr int64_t kFlush = 64;

// Classes of the running sum to ask for in advance.
constexpr int64_t kAhead = 512;

// A row whose powers are known and not yet added.
template <class A, bool kDiagonal>
struct Waiting {
  const A* e;
  A* sum;
  A scale, unit;
  bool first;  // into a sum that holds nothing yet

  // sum[i] += scale p_i, or scale p_i (1 - p_i)
  template <class Count>
  void operator()(int64_t i, Count count) const {
    __builtin_prefetch(e + i + kAhead, 1, 3);
    __builtin_prefetch(sum + i + kAhead, 1, 3);
    const Vec<A> ej = load_lanes(e + i, count);
    const Vec<A> so_far = first ? Vec<A>{} : load_lanes(sum + i, count);
    const Vec<A> factor = kDiagonal ? scale * (1 - ej * unit) : broadcast(scale);
    store_lanes(sum + i, multiply_add(ej, factor, so_far), count);
  }
};

// What p is made of, u exp((z - r) / tau), where asked for: r and u of each token, zero where it does
// not count.
template <class A>
struct Powers {
  A* reference;
  A* unit;

  void write(int64_t token, A r, A u) const {
    if (!reference) return;
    reference[token] = r;
    unit[token] = u;
  }
};

template <class T, bool kDiagonal>
void token_sum(const SoftmaxFisher& f, void* partial, Powers<Acc<T>> powers, int64_t begin,
               int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* total = static_cast<A*>(partial);
  RowBuffer<A> running;
  A* sum = total;
  if (end - begin > kFlush) {
    fill_row(total, V, A(0));
    sum = running.of(V);
  }
  auto flush = [&] {
    for_lanes<A>(0, V, [&](int64_t i, auto count) {
      store_lanes(total + i, load_lanes(total + i, count) + load_lanes(sum + i, count), count);
    });
  };
  // A row is added while the powers of the next one take its place: the one waits for memory, the
  // other for arithmetic.
  A* e = scratch<A>(V);
  Waiting<A, kDiagonal> row_before{};
  bool waits = false;
  int64_t star = 0, rows = 0;
  A at_star = 0;
  auto added = [&] {
    if constexpr (kDiagonal) sum[star] += at_star;
    if (++rows % kFlush == 0 && sum != total) flush();
  };
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    if (w == 0) {
      powers.write(token, 0, 0);
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const auto sums =
        waits ? exponentials<1>(z, V, exponential, e, nullptr, Nothing{}, row_before)
              : exponentials<1>(z, V, exponential, e, nullptr, Nothing{});
    if (waits) added();
    const auto p = distribution<T>(f, token, sums);
    powers.write(token, sums.reference, p.unit);
    A scale = w * p.unit;
    if constexpr (kDiagonal) {
      scale /= static_cast<A>(f.temperature * f.temperature);
      star = std::max<int64_t>(sums.star, 0);
      // there 1 - P cancels, and epsilon does not
      at_star = scale * sums.star_power * p.epsilon;
      e[star] = 0;
    }
    row_before = {e, sum, scale, p.unit, rows % kFlush == 0};
    waits = true;
  }
  if (!waits) {
    fill_row(total, V, A(0));
    return;
  }
  for_lanes<A>(0, V, row_before);
  added();
  if (sum != total && rows % kFlush != 0) flush();
}

template <class T>
void probabilities_sum_of(const SoftmaxFisher& f, void* partial, void* reference, void* unit,
                          int64_t begin, int64_t end) {
  using A = Acc<T>;
  token_sum<T, false>(f, partial, {static_cast<A*>(reference), static_cast<A*>(unit)}, begin, end);
}
template <class T>
void diagonal_sum_of(const SoftmaxFisher& f, void* partial, int64_t begin, int64_t end) {
  token_sum<T, true>(f, partial, {}, begin, end);
}

template <class T>
void add_partials_of(const SoftmaxFisher& f, const void* partial, int64_t rows, void* out,
                     int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* from = static_cast<const A*>(partial);
  A* to = static_cast<A*>(out);
  for_lanes<A>(begin, end, [&](int64_t i, auto count) {
    Vec<A> sum = load_lanes(to + i, count);
    for (int64_t r = 0; r < rows; ++r) sum += load_lanes(from + r * f.classes + i, count);
    store_lanes(to + i, sum, count);
  });
}

}  // namespace

void probabilities_sum(const SoftmaxFisher& f, void* partial, void* reference, void* unit,
                       int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, probabilities_sum_of, partial, reference, unit, begin, end)
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
