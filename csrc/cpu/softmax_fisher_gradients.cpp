// w (p - e_label) / tau at given labels, and at labels sampled from p.
#include "../philox.h"
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

template <class T>
void write_gradient(const SoftmaxFisher& f, Distribution<Acc<T>> p, const Acc<T>* e, int64_t star,
                    int64_t label, Acc<T> w, T* out) {
  using A = Acc<T>;
  const A unit = w / static_cast<A>(f.temperature);
  const Vec<A> scale = broadcast(unit * p.unit);
  // out may be the logits: e holds all that is still needed of them
  write_row(f, out, [&](int64_t i, auto count) { return load_lanes(e + i, count) * scale; });
  const A missing = label == star ? p.epsilon : 1 - p.unit * e[label];
  from_accumulation(-unit * missing, out + label);
}

template <class T>
void gradient_of(const SoftmaxFisher& f, const int64_t* labels, Rows out, int64_t begin,
                 int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* e = scratch<A>(V);
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    T* to = row<T>(f, out, token);
    if (w == 0) {
      fill_row(to, V, A(0));
      continue;
    }
    if (labels[token] < 0 || labels[token] >= V) {
      fill_row(to, V, std::numeric_limits<A>::quiet_NaN());
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const auto sums = exponentials<1>(z, V, exponential, e, nullptr, Nothing{});
    const auto p = distribution<T>(f, token, sums);
    write_gradient<T>(f, p, e, sums.star, labels[token], w, to);
  }
}

// Classes that sampling passes over together.
constexpr int64_t kStretch = 64;

// The least class whose cumulative e exceeds u times the whole: first its block, then within.
template <class A>
int64_t invert(const A* e, int64_t classes, const std::vector<double>& block_mass, double u) {
  double whole = 0;
  for (double mass : block_mass) whole += mass;
  const double target = u * whole;
  double before = 0;
  int64_t block = 0, last = 0;
  const int64_t blocks = static_cast<int64_t>(block_mass.size());
  for (; block < blocks; ++block) {
    if (block_mass[block] > 0) {
      last = block;
      if (before + block_mass[block] > target) break;
      before += block_mass[block];
    }
  }
  if (block == blocks) block = last;
  const int64_t end = std::min((block + 1) * kBlock, classes);
  int64_t i = block * kBlock;
  // whole stretches first: one class after the other, each addition waits for the one before
  for (; i + kStretch <= end; i += kStretch) {
    Vec<A> sum{};
    for_lanes<A>(i, i + kStretch, [&](int64_t j, auto lanes) { sum += load_lanes(e + j, lanes); });
    const double mass = horizontal_sum(sum);
    if (before + mass > target) break;
    before += mass;
  }
  for (; i < end; ++i) {
    before += e[i];
    if (before > target) return i;
  }
  // rounding left the target just past this block: the last class that is possible
  int64_t label = end - 1;
  while (label > block * kBlock && !(e[label] > 0)) --label;
  return label;
}

template <class T>
void sample_of(const SoftmaxFisher& f, const int64_t* seed, int64_t* labels, Rows out,
               int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* e = scratch<A>(V);
  std::vector<double> block_mass((V + kBlock - 1) / kBlock);
  for (int64_t token = begin; token < end; ++token) {
    const A w = weight<A>(f, token);
    T* to = row<T>(f, out, token);
    labels[token] = kIgnoreIndex;
    if (w == 0) {
      fill_row(to, V, A(0));
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const auto sums = exponentials<1>(z, V, exponential, e, block_mass.data(), Nothing{});
    if (sums.value[0] != sums.value[0]) {
      fill_row(to, V, std::numeric_limits<A>::quiet_NaN());
      continue;
    }
    labels[token] = invert(e, V, block_mass, philox_uniform(seed[0], seed[1] + token));
    const auto p = distribution<T>(f, token, sums);
    write_gradient<T>(f, p, e, sums.star, labels[token], w, to);
  }
}

}  // namespace

void gradient(const SoftmaxFisher& f, const int64_t* labels, Rows out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, gradient_of, labels, out, begin, end)
}
void sample(const SoftmaxFisher& f, const int64_t* seed, int64_t* labels, Rows out, int64_t begin,
            int64_t end) {
  FISHERKERN_FOR_DTYPE(f, sample_of, seed, labels, out, begin, end)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
