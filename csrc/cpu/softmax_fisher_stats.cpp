// Per-token scalars of F in one read of the logits, and their derivative.
//
// With Q, C the sums of p_j^2 and p_j^3 without the star, whose probability is P = 1 - epsilon:
//   tr F    tau^2 = P epsilon + sum' p_j (1 - p_j) = P epsilon + epsilon - Q
//   tr F^2  tau^4 = P^2 epsilon^2 + Q - 2 C + 2 P^2 Q + Q^2
//   entropy       = (logsumexp - m / tau) + sum' p_j (m - z_j) / tau
// Every term is small where the row is peaked, and none cancels (Q <= epsilon^2, p_j <= 1/2).
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

template <class T>
void trace_of(const SoftmaxFisher& f, void* out, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Exponential<A> exponential(f.temperature);
  for (int64_t token = begin; token < end; ++token) {
    A& to = static_cast<A*>(out)[token];
    if (!counts(f, token)) {
      to = 0;
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const auto sums = exponentials<2>(
        z, f.classes, exponential, static_cast<A*>(nullptr), nullptr,
        [](int64_t, auto, Vec<A> ej, Vec<A>, Vec<A>* s) { s[1] = multiply_add(ej, ej, s[1]); });
    const auto p = distribution<T>(f, token, sums);
    const double unit = p.unit;
    const double P = p.largest, epsilon = p.epsilon, Q = unit * unit * sums.value[1];
    to = static_cast<A>((P * epsilon + epsilon - Q) / (f.temperature * f.temperature));
  }
}

template <class T>
void stats_of(const SoftmaxFisher& f, void* out, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Exponential<A> exponential(f.temperature);
  const double tau = f.temperature, tau2 = tau * tau;
  for (int64_t token = begin; token < end; ++token) {
    A* to = static_cast<A*>(out) + token * kStats;
    if (!counts(f, token)) {
      std::fill(to, to + kStats, A(0));
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const Vec<A> least = broadcast(std::numeric_limits<A>::lowest());
    const auto sums = exponentials<4>(
        z, f.classes, exponential, static_cast<A*>(nullptr), nullptr,
        [&](int64_t, auto, Vec<A> ej, Vec<A> d, Vec<A>* s) {
          const Vec<A> square = ej * ej;
          s[1] += square;
          s[2] = multiply_add(square, ej, s[2]);
          s[3] = multiply_add(ej, maximum(least, d), s[3]);  // 0 times -inf is 0 here
        });
    const double rest = sums.value[0];
    const auto p = distribution<T>(f, token, sums);
    const double P = p.largest, epsilon = p.epsilon, unit = p.unit;
    const double Q = unit * unit * sums.value[1], C = unit * unit * unit * sums.value[2];
    const double m = sums.max / tau;
    double above = std::log1p(rest / sums.star_power);  // logsumexp - m / tau
    if (f.logsumexp && rest == rest) above = static_cast<const A*>(f.logsumexp)[token] - m;
    // sum' p_j (m - z_j) / tau, from what was summed with r in place of m
    const double depth = unit * ((double(sums.max) - sums.reference) * rest - sums.value[3]) / tau;
    to[0] = static_cast<A>(m + above);
    to[1] = static_cast<A>(above + depth);
    to[2] = static_cast<A>((P * epsilon + epsilon - Q) / tau2);
    to[3] = static_cast<A>((P * P * (epsilon * epsilon + 2 * Q) + Q - 2 * C + Q * Q) /
                           (tau2 * tau2));
    to[4] = p.largest;
  }
}

template <class T>
void stats_backward_of(const SoftmaxFisher& f, const void* stats, const void* grad, Rows out,
                       int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  const A lowest = -std::numeric_limits<A>::infinity();
  const double tau = f.temperature, tau2 = tau * tau, tau4 = tau2 * tau2;
  for (int64_t token = begin; token < end; ++token) {
    T* to = row<T>(f, out, token);
    if (!counts(f, token)) {
      fill_row(to, V, A(0));
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const A* value = static_cast<const A*>(stats) + token * kStats;
    const A* g = static_cast<const A*>(grad) + token * kStats;
    const A max = maximum_of(z, 0, V);
    const double P = value[4];
    // <p, a> in closed form from the statistics of the row
    const double s2 = 1 - tau2 * value[2];
    const double s3 = (s2 + s2 * s2 - tau4 * value[3]) / 2;
    const double mean = g[1] * double(value[1]) - 2 * g[2] * s2 / tau2 +
                        g[3] * (2 * s2 - 6 * s3 + 4 * s2 * s2) / tau4;
    // p (constant + linear p + quadratic p^2 + logarithmic log p) / tau
    const A log_largest = static_cast<A>(max / tau - value[0]);
    const A constant = static_cast<A>(g[0] - mean - g[4] * P - g[1] * double(log_largest));
    const A linear = static_cast<A>(P * (-2 * g[2] / tau2 + g[3] * (2 + 4 * s2) / tau4));
    const A quadratic = static_cast<A>(-6 * P * P * g[3] / tau4);
    const A logarithmic = static_cast<A>(-g[1] / tau);
    const A scale = static_cast<A>(P / tau);
    const Vec<A> least = broadcast(std::numeric_limits<A>::lowest());
    write_row(f, to, [&](int64_t i, auto count) {
      const Vec<A> d = load_lanes(z + i, count, lowest) - max;
      const Vec<A> e = exponential(d);
      Vec<A> a = multiply_add(e, broadcast(quadratic), broadcast(linear));
      a = multiply_add(e, a, broadcast(constant));
      a = multiply_add(maximum(least, d), broadcast(logarithmic), a);
      return e * scale * a;
    });
    if (g[4] != 0) {  // ties share the derivative of the largest probability
      int64_t ties = 0;
      for (int64_t i = 0; i < V; ++i) ties += to_accumulation(z[i]) == max;
      // the whole value again, and rounded once: on a peaked row its two parts nearly cancel
      const double others = double(constant) + linear + quadratic;
      const A at_star = static_cast<A>(P / tau * (others + double(g[4]) / ties));
      for (int64_t i = 0; i < V; ++i)
        if (to_accumulation(z[i]) == max) from_accumulation(at_star, to + i);
    }
  }
}

}  // namespace

void trace(const SoftmaxFisher& f, void* out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, trace_of, out, begin, end)
}
void stats(const SoftmaxFisher& f, void* out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, stats_of, out, begin, end)
}
void stats_backward(const SoftmaxFisher& f, const void* stats, const void* grad, Rows out,
                    int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, stats_backward_of, stats, grad, out, begin, end)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
