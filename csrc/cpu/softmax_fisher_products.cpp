// F v, its square roots, its derivative, and quadratic forms, row by row.
//
// Vectors are centred at v* = v[star] before they are averaged: mu = sum' p_j (v_j - v*), so that
// v_j - <p, v> = (v_j - v*) - mu does not cancel on a peaked row. While the star is not known yet,
// v[0] stands in for v*; what that adds, (v[0] - v*) epsilon, is small where P is large.
#include "row.h"
#include "softmax_fisher.h"

namespace fisherkern {
namespace FISHERKERN_ISA {
namespace {

enum class Product { fisher, root, root_transposed };

// sum' p_j (v_j - v*) from sum' e_j (v_j - v[0])
template <class T, int N>
Acc<T> mean_from_star(const RowSums<Acc<T>, N>& row, Distribution<Acc<T>> p, int n, const T* v) {
  const int64_t star = std::max<int64_t>(row.star, 0);
  const double shift = double(to_accumulation(v[0])) - to_accumulation(v[star]);
  return static_cast<Acc<T>>(p.unit * (row.value[n] + shift * row.value[0]));
}

template <class T, Product kind>
void product_row(const SoftmaxFisher& f, int64_t token, const T* z, const T* v, Acc<T> w, T* out) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* e = scratch<A>(V);
  const A centre = to_accumulation(v[0]);
  const auto sums = exponentials<2>(
      z, V, exponential, e, nullptr, [&](int64_t i, auto count, Vec<A> ej, Vec<A>, Vec<A>* s) {
        __builtin_prefetch(v + i + kBlock, 0, 3);
        if constexpr (kind == Product::root) {
          s[1] = multiply_add(square_root(ej), load_lanes(v + i, count), s[1]);
        } else {
          s[1] = multiply_add(ej, load_lanes(v + i, count) - centre, s[1]);
        }
      });
  const auto p = distribution<T>(f, token, sums);
  const int64_t star = std::max<int64_t>(sums.star, 0);
  const A v_star = to_accumulation(v[star]);
  if constexpr (kind == Product::root) {
    // sqrt(p) v - p <sqrt p, v>; at the star P is taken out of the bracket, which leaves epsilon
    const A scale = w / static_cast<A>(f.temperature);
    const A rest = std::sqrt(p.unit) * static_cast<A>(sums.value[1]);
    const A root = std::sqrt(p.largest);
    const Vec<A> along = broadcast(std::sqrt(p.unit) * scale);
    const Vec<A> dot = broadcast(-(root * v_star + rest) * p.unit * scale);
    write_row(f, out, [&](int64_t i, auto count) {
      const Vec<A> ej = load_lanes(e + i, count);
      return multiply_add(ej, dot, square_root(ej) * along * load_lanes(v + i, count));
    });
    from_accumulation(scale * (root * p.epsilon * v_star - p.largest * rest), out + star);
  } else {
    const A mean = mean_from_star(sums, p, 1, v);
    const A tau = static_cast<A>(f.temperature);
    const A scale = kind == Product::fisher ? w * p.unit / (tau * tau) : w * std::sqrt(p.unit) / tau;
    write_row(f, out, [&](int64_t i, auto count) {
      const Vec<A> centred = load_lanes(v + i, count) - v_star - mean;
      Vec<A> factor = load_lanes(e + i, count);
      if constexpr (kind == Product::root_transposed) factor = square_root(factor);
      return factor * scale * centred;
    });
  }
}

template <class T, Product kind>
void product(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const Acc<T> w = weight<Acc<T>>(f, token);
    T* to = row<T>(f, out, token);
    if (w == 0) {
      fill_row(to, f.classes, Acc<T>(0));
    } else {
      product_row<T, kind>(f, token, row<const T>(f, f.logits, token), row<const T>(f, v, token), w,
                           to);
    }
  }
}

template <class T>
void matvec_of(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  product<T, Product::fisher>(f, v, out, begin, end);
}
template <class T>
void root_of(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  product<T, Product::root>(f, v, out, begin, end);
}
template <class T>
void transposed_root_of(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  product<T, Product::root_transposed>(f, v, out, begin, end);
}

template <class T>
void matvec_backward_of(const SoftmaxFisher& f, Rows v, Rows grad, Rows out, int64_t begin,
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
    const T* z = row<const T>(f, f.logits, token);
    const T* a = row<const T>(f, v, token);
    const T* b = row<const T>(f, grad, token);
    const A a_centre = to_accumulation(a[0]), b_centre = to_accumulation(b[0]);
    const auto sums = exponentials<3>(
        z, V, exponential, e, nullptr, [&](int64_t i, auto count, Vec<A> ej, Vec<A>, Vec<A>* s) {
          s[1] = multiply_add(ej, load_lanes(a + i, count) - a_centre, s[1]);
          s[2] = multiply_add(ej, load_lanes(b + i, count) - b_centre, s[2]);
        });
    const auto p = distribution<T>(f, token, sums);
    const int64_t star = std::max<int64_t>(sums.star, 0);
    const A a_star = to_accumulation(a[star]), b_star = to_accumulation(b[star]);
    const A a_mean = mean_from_star(sums, p, 1, a), b_mean = mean_from_star(sums, p, 2, b);
    auto centred_product = [&](int64_t i, auto count) {
      return (load_lanes(a + i, count) - a_star - a_mean) *
             (load_lanes(b + i, count) - b_star - b_mean);
    };
    Vec<A> products{};
    for_lanes<A>(0, V, [&](int64_t i, auto count) {
      products = multiply_add(load_lanes(e + i, count), centred_product(i, count), products);
    });
    const A mean = p.unit * static_cast<A>(horizontal_sum(products));
    const A scale = w * p.unit / static_cast<A>(f.temperature * f.temperature * f.temperature);
    write_row(f, to, [&](int64_t i, auto count) {
      return load_lanes(e + i, count) * scale * (centred_product(i, count) - mean);
    });
  }
}

template <class T>
void quadratic_of(const SoftmaxFisher& f, Rows v, int64_t direction_stride, int64_t K, void* out,
                  int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t V = f.classes;
  const Exponential<A> exponential(f.temperature);
  A* e = scratch<A>(V);
  std::vector<A> offset(K);
  for (int64_t token = begin; token < end; ++token) {
    A* to = static_cast<A*>(out) + token * K * K;
    if (!counts(f, token)) {
      std::fill(to, to + K * K, A(0));
      continue;
    }
    const T* z = row<const T>(f, f.logits, token);
    const T* directions = row<const T>(f, v, token);
    const A centre = to_accumulation(directions[0]);
    // the first direction joins the pass over the logits; further ones read e again
    const auto sums = exponentials<2>(
        z, V, exponential, e, nullptr, [&](int64_t i, auto count, Vec<A> ej, Vec<A>, Vec<A>* s) {
          s[1] = multiply_add(ej, load_lanes(directions + i, count) - centre, s[1]);
        });
    const auto p = distribution<T>(f, token, sums);
    const int64_t star = std::max<int64_t>(sums.star, 0);
    offset[0] = to_accumulation(directions[star]) + mean_from_star(sums, p, 1, directions);
    auto accumulate = [&](auto&& term) {
      double total = 0;
      for (int64_t block = 0; block < V; block += kBlock) {
        Vec<A> sum{};
        for_lanes<A>(block, std::min(block + kBlock, V), [&](int64_t i, auto count) {
          sum = multiply_add(load_lanes(e + i, count), term(i, count), sum);
        });
        total += horizontal_sum(sum);
      }
      return static_cast<A>(p.unit * total);
    };
    for (int64_t k = 1; k < K; ++k) {
      const T* direction = directions + k * direction_stride;
      const A at_star = to_accumulation(direction[star]);
      offset[k] = at_star + accumulate([&](int64_t i, auto count) {
                    return load_lanes(direction + i, count) - at_star;
                  });
    }
    const A scale = 1 / static_cast<A>(f.temperature * f.temperature);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t l = 0; l <= k; ++l) {
        const T* a = directions + k * direction_stride;
        const T* b = directions + l * direction_stride;
        const A covariance = scale * accumulate([&](int64_t i, auto count) {
          return (load_lanes(a + i, count) - offset[k]) * (load_lanes(b + i, count) - offset[l]);
        });
        to[k * K + l] = to[l * K + k] = covariance;
      }
    }
  }
}

template <class T>
void diagonal_of(const SoftmaxFisher& f, Rows out, int64_t begin, int64_t end) {
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
    const T* z = row<const T>(f, f.logits, token);
    const auto sums = exponentials<1>(z, V, exponential, e, nullptr, Nothing{});
    const auto p = distribution<T>(f, token, sums);
    const A scale = w * p.unit / static_cast<A>(f.temperature * f.temperature);
    write_row(f, to, [&](int64_t i, auto count) {
      const Vec<A> ej = load_lanes(e + i, count);
      return ej * scale * (1 - ej * p.unit);
    });
    from_accumulation(scale * sums.star_power * p.epsilon, to + std::max<int64_t>(sums.star, 0));
  }
}

}  // namespace

void matvec(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, matvec_of, v, out, begin, end)
}
void sqrt_matvec(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, root_of, v, out, begin, end)
}
void sqrt_rmatvec(const SoftmaxFisher& f, Rows v, Rows out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, transposed_root_of, v, out, begin, end)
}
void matvec_backward(const SoftmaxFisher& f, Rows v, Rows grad, Rows out, int64_t begin,
                     int64_t end) {
  FISHERKERN_FOR_DTYPE(f, matvec_backward_of, v, grad, out, begin, end)
}
void quadratic(const SoftmaxFisher& f, Rows v, int64_t direction_stride, int64_t directions,
               void* out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, quadratic_of, v, direction_stride, directions, out, begin, end)
}
void diagonal(const SoftmaxFisher& f, Rows out, int64_t begin, int64_t end) {
  FISHERKERN_FOR_DTYPE(f, diagonal_of, out, begin, end)
}

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
