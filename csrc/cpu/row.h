// The passes over one row that the kernels of this family are made of.
//
//   m        largest logit, at position `star` (the first of ties)
//   e_j      exp((z_j - m) / tau), so that e_star = 1
//   s'       sum of e_j without the star; s = 1 + s'
//   P        largest probability: 1 / s, or exp(m / tau - logsumexp) where one was given; p_j = P e_j
//   epsilon  1 - P = P s', never by subtraction
//
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

template <class T>
inline T* row(const SoftmaxFisher& f, Rows rows, int64_t token) {
  return static_cast<T*>(rows.data) + (token / f.tokens) * rows.batch_stride +
         (token % f.tokens) * rows.token_stride;
}

// The logits of the token after this one among those of a task, or null.
template <class T>
inline const T* next_row(const SoftmaxFisher& f, int64_t token, int64_t end) {
  return token + 1 < end ? row<const T>(f, f.logits, token + 1) : nullptr;
}

// The weight of a token; 1 where there are none.
template <class A>
inline A weight(const SoftmaxFisher& f, int64_t token) {
  return f.weights ? static_cast<const A*>(f.weights)[token] : A(1);
}

inline bool counts(const SoftmaxFisher& f, int64_t token) { return !f.mask || f.mask[token]; }

// Memory of one row for this thread, kept between calls: O(V) per thread.
template <class A>
inline A* scratch(int64_t classes) {
  static thread_local std::vector<A> memory;
  if (static_cast<int64_t>(memory.size()) < classes) memory.resize(classes);
  return memory.data();
}

template <class A>
struct Largest {
  A value;
  int64_t star;
};

// NaN compares as less than everything: it reaches the sums instead, as exp(NaN - m).
template <class T>
inline Largest<Acc<T>> largest(const T* z, int64_t classes) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A lowest = -std::numeric_limits<A>::infinity();
  A best = lowest;
  int64_t block = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, classes);
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
    const A top = horizontal_maximum(maximum(maximum(m0, m1), maximum(m2, m3)));
    if (top > best) {
      best = top;
      block = begin;
    }
  }
  int64_t star = block;
  while (star + 1 < classes && !(to_accumulation(z[star]) == best)) ++star;
  return {best, star};
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

template <int N>
struct Sums {
  double value[N] = {};
};

// One pass over the e_j of a row without its star, d = z - m. Stores them to `e` (the star's 1 as
// well) unless that is null. Accumulator 0 of N is s'; term(i, count, e_j, d, sums) adds to the
// others. The mass of each block, star included, goes to `block_mass` unless that is null.
//
// Meanwhile it asks for the logits of the row `next` (if not null), so that the search for their
// maximum finds them in the cache: without this, memory idles while exponentials are computed.
template <int N, class T, class Term>
inline Sums<N> exponentials(const T* z, const T* next, int64_t classes, Largest<Acc<T>> top,
                            const Exponential<Acc<T>>& exponential, Acc<T>* e, double* block_mass,
                            Term&& term) {
  using A = Acc<T>;
  const A lowest = -std::numeric_limits<A>::infinity();
  Sums<N> total;
  auto part = [&](int64_t begin, int64_t end) {
    Vec<A> sums[N] = {};
    for_lanes<A>(begin, end, [&](int64_t i, auto count) {
      if (next) __builtin_prefetch(next + i, 0, 2);
      const Vec<A> d = load_lanes(z + i, count, lowest) - top.value;
      const Vec<A> ej = exponential(d);
      if (e) store_lanes(e + i, ej, count);
      sums[0] += ej;
      term(i, count, ej, d, sums);
    });
    const double mass = horizontal_sum(sums[0]);
    total.value[0] += mass;
    for (int n = 1; n < N; ++n) total.value[n] += horizontal_sum(sums[n]);
    return mass;
  };
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, classes);
    double mass;
    if (top.star >= begin && top.star < end) {
      const double before = part(begin, top.star);
      mass = before + part(top.star + 1, end);
      mass += 1;
    } else {
      mass = part(begin, end);
    }
    if (block_mass) block_mass[begin / kBlock] = mass;
  }
  // a row of nothing but -inf, and one that holds +inf, have no distribution
  const A self = to_accumulation(z[top.star]) - top.value;
  if (e) e[top.star] = self == 0 ? A(1) : std::numeric_limits<A>::quiet_NaN();
  if (!(self == 0)) total.value[0] = std::numeric_limits<double>::quiet_NaN();
  return total;
}

template <class A>
struct Distribution {
  A largest;  // P
  A epsilon;
};

// P and epsilon from s' (and the logsumexp of the token, if there is one).
template <class T>
inline Distribution<Acc<T>> distribution(const SoftmaxFisher& f, int64_t token,
                                         Largest<Acc<T>> top, double rest) {
  using A = Acc<T>;
  double p = 1 / (1 + rest);
  if (f.logsumexp && rest == rest)
    p = std::exp(top.value / f.temperature - static_cast<const A*>(f.logsumexp)[token]);
  return {static_cast<A>(p), static_cast<A>(p * rest)};
}

// A result this large leaves the caches before anyone reads it: it is written past them.
constexpr int64_t kStreamBytes = 16 << 20;

// out[i] = value(i, lanes) over a row of a result [T, V]. `out` may be the logits.
template <class T, class Value>
inline void write_row(const SoftmaxFisher& f, T* out, Value&& value) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr std::integral_constant<int, L> all{};
  const int64_t V = f.classes;
  if (f.batches * f.tokens * V * static_cast<int64_t>(sizeof(T)) < kStreamBytes) {
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

template <class T>
inline void fill_row(T* out, int64_t classes, Acc<T> value) {
  for_lanes<Acc<T>>(0, classes, [&](int64_t i, auto count) {
    store_lanes(out + i, broadcast<Acc<T>>(value), count);
  });
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
