// The one pass over the logits of a row that all kernels of this family share.
//
//   r        reference: the largest logit of the first step, close to that of the row
//   m        largest logit of the row, at position `star` (the first of ties)
//   e_j      exp((z_j - r) / tau)
//   s'       sum of e_j without the star
//   p_j      unit e_j, with unit = 1 / (e_star + s') or exp(r / tau - logsumexp) where one is given
//   P        p of the star; epsilon = unit s' is 1 - P, never by subtraction
//
// A fixed reference leaves nothing to rescale when a larger logit turns up, and a logit that is so
// much larger that its power could overflow is met by starting again from the maximum of the row.
// The star is left out of every sum and put back in closed form: what is small beside it on a peaked
// row keeps its relative accuracy.
#pragma once
#include <vector>

#include "../softmax_fisher.h"
#include "simd.h"

namespace fisherkern {
namespace FISHERKERN_ISA {

// Partial sums are flushed to double this often, which bounds the error of a long row. It is also
// the unit in which sampling looks for its class.
constexpr int64_t kBlock = 2048;

// The powers of so many classes are taken while their maximum is looked for, as if it were none of the
// row; where it is one, the few times that happens, they are taken again. Looking first would read the
// logits in bursts, and memory rests in between.
constexpr int64_t kStep = 256;

// Classes of the logits to ask for in advance.
constexpr int64_t kLogitsAhead = 3 * kStep;

template <class T>
inline T* row(const SoftmaxFisher& f, Rows rows, int64_t token) {
  return static_cast<T*>(rows.data) + (token / f.tokens) * rows.batch_stride +
         (token % f.tokens) * rows.token_stride;
}

// The weight of a token; 1 where there are none.
template <class A>
inline A weight(const SoftmaxFisher& f, int64_t token) {
  return f.weights ? static_cast<const A*>(f.weights)[token] : A(1);
}

inline bool counts(const SoftmaxFisher& f, int64_t token) { return !f.mask || f.mask[token]; }

// Memory for one row, its lanes on cache lines.
template <class A>
class RowBuffer {
 public:
  A* of(int64_t classes) {
    if (static_cast<int64_t>(memory_.size()) < classes + kLanes<A>)
      memory_.resize(classes + kLanes<A>);
    const auto start = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<A*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

 private:
  std::vector<A> memory_;
};

// A row for this thread, kept between calls: O(V) per thread.
template <class A>
inline A* scratch(int64_t classes) {
  static thread_local RowBuffer<A> buffer;
  return buffer.of(classes);
}

// NaN compares as less than everything: it reaches the sums instead, as exp(NaN).
template <class T>
inline Acc<T> maximum_of(const T* z, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A lowest = -std::numeric_limits<A>::infinity();
  Vec<A> m0 = broadcast(lowest), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L) {
    m0 = maximum(load(z + i), m0);
    m1 = maximum(load(z + i + L), m1);
    m2 = maximum(load(z + i + 2 * L), m2);
    m3 = maximum(load(z + i + 3 * L), m3);
  }
  for (; i + L <= end; i += L) m0 = maximum(load(z + i), m0);
  if (i < end) m1 = maximum(load_some(z + i, end - i, lowest), m1);
  return horizontal_maximum(maximum(maximum(m0, m1), maximum(m2, m3)));
}

// Runs body(i, count) over [begin, end): count is the constant number of lanes but for the last.
template <class A, class Body>
inline void for_lanes(int64_t begin, int64_t end, Body&& body) {
  constexpr int L = kLanes<A>;
  int64_t i = begin;
  for (; i + L <= end; i += L) body(i, std::integral_constant<int, L>{});
  if (i < end) body(i, end - i);
}

template <class T, int L>
inline Vec<Acc<T>> load_lanes(const T* from, std::integral_constant<int, L>, Acc<T> = 0) {
  return load(from);
}
template <class T>
inline Vec<Acc<T>> load_lanes(const T* from, int64_t count, Acc<T> fill = 0) {
  return load_some(from, count, fill);
}
template <class T, int L>
inline void store_lanes(T* to, Vec<Acc<T>> x, std::integral_constant<int, L>) {
  store(to, x);
}
template <class T>
inline void store_lanes(T* to, Vec<Acc<T>> x, int64_t count) {
  store_some(to, x, count);
}

template <class T>
inline void fill_row(T* out, int64_t classes, Acc<T> value) {
  for_lanes<Acc<T>>(0, classes, [&](int64_t i, auto count) {
    store_lanes(out + i, broadcast<Acc<T>>(value), count);
  });
}

// Two logits to a 32-bit lane: either half is a float as it stands, with nothing to widen.
inline float maximum_of(const bfloat16* z, int64_t begin, int64_t end) {
  constexpr int L = kLanes<float>;
  const float lowest = -std::numeric_limits<float>::infinity();
  Vec<float> low = broadcast(lowest), high = low;
  int64_t i = begin;
  for (; i + 2 * L <= end; i += 2 * L) {
    vuint32 pairs;
    std::memcpy(&pairs, z + i, sizeof pairs);
    low = maximum(reinterpret_cast<Vec<float>>(pairs << 16), low);
    high = maximum(reinterpret_cast<Vec<float>>(pairs & 0xffff0000u), high);
  }
  for (; i + L <= end; i += L) low = maximum(load(z + i), low);
  if (i < end) high = maximum(load_some(z + i, end - i, lowest), high);
  return horizontal_maximum(maximum(low, high));
}

// Where `value`, which is there, occurs first.
template <class T>
inline int64_t position_of(Acc<T> value, const T* z, int64_t begin, int64_t end) {
  constexpr int L = kLanes<Acc<T>>;
  for (int64_t i = begin; i + L <= end; i += L) {
    const int lane = first_equal(load(z + i), value);
    if (lane < L) return i + lane;
  }
  begin = end - (end - begin) % L;
  while (!(to_accumulation(z[begin]) == value)) ++begin;
  return begin;
}

template <class A, int N>
struct RowSums {
  A reference;
  A max;
  A star_power;  // e of the star
  int64_t star;
  double value[N];  // without the star; value[0] is s', NaN where the row has no distribution

  double whole() const { return star_power + value[0]; }
};

// Nothing to add besides s', nothing to do meanwhile.
struct Nothing {
  template <class... Arguments>
  void operator()(Arguments&&...) const {}
};

// Logits this far above the reference (times tau) start the row again: exp(3 * 25) fits a float.
constexpr double kHeadroom = 25;

// Stores the e_j to `e` unless that is null. Accumulator 0 of N is s'; term(i, count, e_j, d, sums)
// adds to the others, d = z - r. The mass of each block, star included, goes to `block_mass` unless
// that is null. meanwhile(i, count) is called once for all classes, before their e is overwritten:
// memory traffic of another kind hides behind the arithmetic.
template <int N, class T, class Term, class Meanwhile = Nothing>
RowSums<Acc<T>, N> exponentials(const T* z, int64_t classes, const Exponential<Acc<T>>& exponential,
                                Acc<T>* e, double* block_mass, Term&& term,
                                Meanwhile&& meanwhile = {}, bool from_maximum = false) {
  using A = Acc<T>;
  const A lowest = -std::numeric_limits<A>::infinity();
  RowSums<A, N> row{};
  row.reference = lowest;
  for (int64_t begin = 0; begin < classes && row.reference == lowest; begin += kStep)
    row.reference = maximum_of(z, begin, std::min(begin + kStep, classes));
  if (from_maximum) row.reference = maximum_of(z, 0, classes);
  const A reference = row.reference;
  if (!(std::abs(reference) < -lowest)) {  // nothing but -inf and NaN, or +inf
    row.value[0] = std::numeric_limits<double>::quiet_NaN();
    row.max = reference;
    for_lanes<A>(0, classes, meanwhile);
    if (e) fill_row(e, classes, std::numeric_limits<A>::quiet_NaN());
    return row;
  }
  const A ceiling = reference + static_cast<A>(kHeadroom * exponential.temperature);

  Vec<A> sums[N] = {};
  Vec<A> tops;
  auto powers = [&](int64_t i, auto count) {
    const Vec<A> zi = load_lanes(z + i, count, lowest);
    const Vec<A> d = zi - reference;
    const Vec<A> ej = exponential(d);
    if (e) store_lanes(e + i, ej, count);
    sums[0] += ej;
    term(i, count, ej, d, sums);
    return zi;
  };
  auto new_powers = [&](int64_t i, auto count) {
    __builtin_prefetch(z + i + kLogitsAhead, 0, 3);
    meanwhile(i, count);
    tops = maximum(powers(i, count), tops);
  };
  auto flush = [&] {
    const double mass = horizontal_sum(sums[0]);
    row.value[0] += mass;
    for (int n = 1; n < N; ++n) row.value[n] += horizontal_sum(sums[n]);
    for (Vec<A>& sum : sums) sum = Vec<A>{};
    return mass;
  };

  row.star = -1;
  row.max = lowest;
  double mass = 0;
  for (int64_t begin = 0; begin < classes; begin += kStep) {
    const int64_t end = std::min(begin + kStep, classes);
    Vec<A> sums_before[N];
    std::copy(sums, sums + N, sums_before);
    tops = broadcast(lowest);
    for_lanes<A>(begin, end, new_powers);
    const A top = horizontal_maximum(tops);
    if (top > row.max) {
      if (!(top <= ceiling) && !from_maximum) {
        for_lanes<A>(end, classes, meanwhile);
        return exponentials<N>(z, classes, exponential, e, block_mass, term, Nothing{}, true);
      }
      std::copy(sums_before, sums_before + N, sums);
      // the star so far is an ordinary class from now on
      if (row.star >= 0) {
        mass += flush();
        powers(row.star, int64_t{1});
        flush();  // its own block has counted that mass
      }
      row.max = top;
      row.star = position_of(top, z, begin, end);
      row.star_power = exponential(broadcast<A>(top - reference))[0];
      if (e) e[row.star] = row.star_power;
      mass += row.star_power;
      for_lanes<A>(begin, row.star, powers);
      for_lanes<A>(row.star + 1, end, powers);
    }
    if (end % kBlock != 0 && end != classes) continue;
    mass += flush();
    if (block_mass) block_mass[begin / kBlock] = mass;
    mass = 0;
  }
  if (!(row.max < -lowest)) row.value[0] = std::numeric_limits<double>::quiet_NaN();
  return row;
}

template <class A>
struct Distribution {
  A unit;
  A largest;  // P
  A epsilon;
};

template <class T, int N>
inline Distribution<Acc<T>> distribution(const SoftmaxFisher& f, int64_t token,
                                         const RowSums<Acc<T>, N>& row) {
  using A = Acc<T>;
  double unit = 1 / row.whole();
  if (f.logsumexp && unit == unit)
    unit = std::exp(row.reference / f.temperature - static_cast<const A*>(f.logsumexp)[token]);
  return {static_cast<A>(unit), static_cast<A>(unit * row.star_power),
          static_cast<A>(unit * row.value[0])};
}

// out[i] = value(i, lanes) over a row of a result [T, V]. `out` may be the logits.
template <class T, class Value>
inline void write_row(const SoftmaxFisher& f, T* out, Value&& value) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr std::integral_constant<int, L> all{};
  const int64_t V = f.classes;
  if (!f.past_caches) {
    for_lanes<A>(0, V, [&](int64_t i, auto lanes) { store_lanes(out + i, value(i, lanes), lanes); });
    return;
  }
  constexpr int64_t line = L * sizeof(T);
  const int64_t offset = reinterpret_cast<uintptr_t>(out) % line;
  int64_t i = std::min<int64_t>(offset ? (line - offset) / sizeof(T) : 0, V);
  if (i > 0) store_lanes(out, value(int64_t{0}, i), i);
  for (; i + L <= V; i += L) store_streaming(out + i, value(i, all));
  if (i < V) store_lanes(out + i, value(i, V - i), V - i);
  finish_streaming();
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern

// Calls `kernel<T>(...)` for the storage type of the logits.
#define FISHERKERN_FOR_DTYPE(problem, kernel, ...)                           \
  switch ((problem).dtype) {                                                 \
    case DType::float32: kernel<float>(problem, __VA_ARGS__); break;         \
    case DType::bfloat16: kernel<bfloat16>(problem, __VA_ARGS__); break;     \
    case DType::float16: kernel<float16>(problem, __VA_ARGS__); break;       \
    case DType::float64: kernel<double>(problem, __VA_ARGS__); break;        \
  }
