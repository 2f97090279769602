// Sums over the classes of one row that can be extended by a class and merged with one another.
//
// z logits, e the powers of exponent.cuh, m the largest logit so far. The "star" is the first class
// with z = m: it is kept out of the primed sums, because 1 - p of a peaked row must come from the
// other classes and not from a subtraction. Of equal maxima one is the star, the others count 1.
//
// What a thread sums while it reads is a State::Reading, `settled` before any merge. The lanes of a
// warp meet new maxima at different times, and a branch for them would be taken by nearly every
// packet: so the smaller of the star and a class is what joins the sums, without a branch, and the
// base of the powers moves only when the maximum has left it far behind.
//
// `update` takes a packet of classes at once. get(j, x) reads the other inputs of class j.
#pragma once
#include <climits>
#include <type_traits>

#include "exponent.cuh"

namespace fisherkern::cuda {

template <class State>
__device__ inline void exchange(State& a, State& b) {
  const State c = a;
  a = b;
  b = c;
}

template <int kSize>
__device__ inline float largest(const float (&z)[kSize]) {
  float top = z[0];
#pragma unroll
  for (int j = 1; j < kSize; ++j) top = fmaxf(top, z[j]);
  return top;
}

// NaN where either is.
__device__ inline float least(float a, float b) {
#ifdef FISHERKERN_HOST_EMULATION
  return isnan(a) || isnan(b) ? NAN : fminf(a, b);
#else
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#endif
}

template <int kSize>
__device__ inline int first_equal(const float (&z)[kSize], float top) {
  int first = 0;
#pragma unroll
  for (int j = kSize - 1; j >= 0; --j)
    if (z[j] == top) first = j;
  return first;
}

// s' = sum' e; from order 2 on q2' = sum' e^2; from order 3 on q3' = sum' e^3 and the entropy term
// h = sum e (m - z) scale (over all classes and from the reference where a logsumexp is given);
// order 4 counts the classes that share the maximum.
template <int kOrder>
struct PeakTerms;
template <>
struct PeakTerms<1> {
  float m, star, s;
};
template <>
struct PeakTerms<2> : PeakTerms<1> {
  float q2;
};
template <>
struct PeakTerms<3> : PeakTerms<2> {
  float q3, h;
};
template <>
struct PeakTerms<4> : PeakTerms<3> {
  float ties;
};

template <int kOrder>
struct PeakReading;

template <int kOrder>
struct PeakSums : PeakTerms<kOrder> {
  using Reading = PeakReading<kOrder>;
  using PeakTerms<kOrder>::m;
  using PeakTerms<kOrder>::star;
  using PeakTerms<kOrder>::s;

  __device__ static PeakSums empty() {
    PeakSums state{};
    state.m = -INFINITY;
    return state;
  }

  __device__ void merge(PeakSums other, const Exponent& exponent) {
    if (other.m > m || (other.m == m && other.star > star)) exchange(*this, other);
    if constexpr (kOrder >= 4)
      if (other.m == m) this->ties += other.ties;
    const float depth = fminf(exponent.distance(m, other.m), Exponent::kMaxDepth);
    other.demote(exponent.ratio(m, other.m), exponent.given ? 0.f : depth);
    s += other.s;
    if constexpr (kOrder >= 2) this->q2 += other.q2;
    if constexpr (kOrder >= 3) this->q3 += other.q3, this->h += other.h;
  }

  // The star joins the others and all are rescaled by `ratio`, 2^-depth.
  __device__ void demote(float ratio, float depth) {
    if constexpr (kOrder >= 3) {
      this->h = ratio * fmaf(depth, s + star, this->h);
      this->q3 = ratio * ratio * ratio * fmaf(star * star, star, this->q3);
    }
    if constexpr (kOrder >= 2) this->q2 = ratio * ratio * fmaf(star, star, this->q2);
    s = ratio * (s + star);
    star = 0.f;
  }

  // A maximum of -inf or inf leaves no distribution.
  __device__ float total(const Exponent& exponent) const {
    return exponent.given ? 1.f : isinf(m) ? NAN : 1.f + s;
  }
};

// The same while a thread reads: the primed sums relative to `base`, at most 2^kLag below the star.
template <int kOrder>
struct PeakReading {
  float base, star;  // logits
  PeakTerms<kOrder> sums;

  __device__ static PeakReading empty() {
    PeakReading reading{};
    reading.base = reading.star = -INFINITY;
    return reading;
  }

  template <int kSize, class Get>
  __device__ void update(const Exponent& exponent, const float (&z)[kSize], Get, int) {
    const float top = largest(z);
    if (exponent.far(top, base)) move(exponent, top);
    const float from = exponent.base(base);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if constexpr (kOrder >= 4) sums.ties = z[j] > star ? 1.f : sums.ties + (z[j] == star);
      const float t = exponent.log2(least(star, z[j]), from), e = exponent.term(t);
      star = fmaxf(star, z[j]);
      sums.s += e;
      if constexpr (kOrder >= 2) sums.q2 = fmaf(e, e, sums.q2);
      if constexpr (kOrder >= 3) {
        sums.q3 = fmaf(e * e, e, sums.q3);
        sums.h = fmaf(e, fminf(-t, Exponent::kMaxDepth), sums.h);
      }
    }
  }

  __device__ void move(const Exponent& exponent, float to) {
    const float ratio = exponent.ratio(to, base);
    if constexpr (kOrder >= 2) sums.q2 *= ratio * ratio;
    if constexpr (kOrder >= 3) {
      sums.q3 *= ratio * ratio * ratio;
      const float depth = fminf(exponent.distance(to, base), Exponent::kMaxDepth);
      sums.h = ratio * fmaf(depth, sums.s, sums.h);
    }
    sums.s *= ratio;
    base = to;
  }

  __device__ PeakSums<kOrder> settled(const Exponent& exponent) {
    if (!exponent.given) move(exponent, star);
    PeakSums<kOrder> result;
    static_cast<PeakTerms<kOrder>&>(result) = sums;
    result.m = star;
    result.star = exponent.at_star(star);
    if constexpr (kOrder >= 3)
      if (exponent.given && star != -INFINITY)
        result.h += result.star * fminf(-exponent.log2(star), Exponent::kMaxDepth);
    return result;
  }
};

// s = sum e, a_k = sum e (x_k - centre_k) and c_ij = sum e (x_i - mean_i)(x_j - mean_j), i of the
// first kLeft inputs, j of the kRight after them (the same ones if kSymmetric). The centre is x at
// the star: on a peaked row the mean is close to it, and only their difference counts.
// While a thread reads, c is about the centre; `settled` moves it to the mean before any merge, so
// that the rounding of that subtraction averages out over the threads.
struct MeanReading;

template <int kLeft, int kRight = 0, bool kSymmetric = false>
struct Moments {
  using Reading = std::conditional_t<kRight == 0, MeanReading, Moments>;
  static constexpr int kInputs = kSymmetric ? kLeft : kLeft + kRight;
  static constexpr bool kCross = kRight > 0;
  static constexpr int kRows = kCross ? kLeft : 1, kColumns = kCross ? kRight : 1;
  float m, s;
  float centre[kInputs], a[kInputs];
  float c[kRows][kColumns];

  __device__ static constexpr int right(int j) { return kSymmetric ? j : kLeft + j; }

  __device__ static Moments empty() {
    Moments state{};
    state.m = -INFINITY;
    return state;
  }

  __device__ void add(float e, const float (&x)[kInputs]) {
    float d[kInputs];
    s += e;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      d[k] = x[k] - centre[k];
      a[k] = fmaf(e, d[k], a[k]);
    }
    if constexpr (kCross) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (!kSymmetric || i <= j) c[i][j] = fmaf(e * d[i], d[right(j)], c[i][j]);
    }
  }

  template <int kSize, class Get>
  __device__ void update(const Exponent& exponent, const float (&z)[kSize], Get get, int) {
    const float top = largest(z);
    float x[kInputs];
    if (top > m) {
      const int star = first_equal(z, top);
      float at_star[kInputs] = {};
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        get(j, x);
#pragma unroll
        for (int k = 0; k < kInputs; ++k)
          if (j == star) at_star[k] = x[k];
      }
      recentre(at_star, exponent.ratio(top, m));
      m = top;
    }
    const float base = exponent.base(m);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      get(j, x);
      add(exponent.term(exponent.log2(z[j], base)), x);
    }
  }

  __device__ void recentre(const float (&x)[kInputs], float ratio) {
    float shift[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) shift[k] = centre[k] - x[k];
    if constexpr (kCross) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int r = right(j);
          if (kSymmetric && i > j) continue;
          c[i][j] = ratio * (c[i][j] + shift[i] * a[r] + shift[r] * fmaf(shift[i], s, a[i]));
        }
    }
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      a[k] = ratio * fmaf(shift[k], s, a[k]);
      centre[k] = x[k];
    }
    s *= ratio;
  }

  __device__ const Moments& settled(const Exponent&) {
    if constexpr (kCross) {
      const float inverse = s > 0.f ? 1.f / s : 0.f;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          c[i][j] = fmaf(-a[i] * inverse, a[right(j)], c[i][j]);
    }
    return *this;
  }

  // Chan, Golub and LeVeque, 1983.
  __device__ void merge(Moments other, const Exponent& exponent) {
    if (other.m > m) exchange(*this, other);
    const float ratio = exponent.ratio(m, other.m);
    const float added = ratio * other.s;
    if constexpr (kCross) {
      if (s > 0.f && other.s > 0.f) {
        const float harmonic = s / (s + added) * added;
        float d[kInputs];
#pragma unroll
        for (int k = 0; k < kInputs; ++k)
          d[k] = other.centre[k] - centre[k] + (other.a[k] / other.s - a[k] / s);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            c[i][j] += fmaf(harmonic * d[i], d[right(j)], ratio * other.c[i][j]);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) c[i][j] += ratio * other.c[i][j];
      }
    }
#pragma unroll
    for (int k = 0; k < kInputs; ++k)
      a[k] += ratio * fmaf(other.centre[k] - centre[k], other.s, other.a[k]);
    s += added;
  }

  __device__ float total(const Exponent& exponent) const {
    return exponent.given ? 1.f : isinf(m) ? NAN : s;
  }
};

// One input and its mean, while a thread reads: s and a without the star, about a fixed centre.
struct MeanReading {
  float base, star, at_star, centre, s, a;

  __device__ static MeanReading empty() { return {-INFINITY, -INFINITY, 0.f, 0.f, 0.f, 0.f}; }

  template <int kSize, class Get>
  __device__ void update(const Exponent& exponent, const float (&z)[kSize], Get get, int) {
    float x[1];
    if (star == -INFINITY) get(0, x), centre = x[0];
    const float top = largest(z);
    if (exponent.far(top, base)) {
      const float ratio = exponent.ratio(top, base);
      s *= ratio, a *= ratio;
      base = top;
    }
    const float from = exponent.base(base);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      get(j, x);
      const float e = exponent.term(exponent.log2(least(star, z[j]), from));
      const float joins = z[j] > star ? at_star : x[0];
      at_star = z[j] > star ? x[0] : at_star;
      star = fmaxf(star, z[j]);
      s += e;
      a = fmaf(e, joins - centre, a);
    }
  }

  __device__ Moments<1> settled(const Exponent& exponent) const {
    const float ratio = exponent.given ? 1.f : exponent.ratio(star, base);
    auto result = Moments<1>::empty();
    result.m = star;
    result.centre[0] = at_star;
    result.a[0] = ratio * fmaf(centre - at_star, s, a);
    result.s = fmaf(ratio, s, exponent.at_star(star));
    return result;
  }
};

// For <sqrt p, v>: s' as above, b' = sum' sqrt(e) v, and v at the star.
struct RootSums {
  using Reading = RootSums;
  float m, star, s, b, v;
  int index;

  __device__ static RootSums empty() { return {-INFINITY, 0.f, 0.f, 0.f, 0.f, INT_MAX}; }

  __device__ const RootSums& settled(const Exponent&) const { return *this; }

  template <int kSize, class Get>
  __device__ void update(const Exponent& exponent, const float (&z)[kSize], Get get, int first) {
    const float top = largest(z);
    float x[1];
    int skip = -1;
    if (top > m) {
      demote(exponent.ratio(top, m));
      m = top;
      star = exponent.given ? exponent.power(top) : 1.f;
      skip = first_equal(z, top);
      index = first + skip;
    }
    const float base = exponent.base(m);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      get(j, x);
      const float e = j == skip ? 0.f : exponent.term(exponent.log2(z[j], base));
      if (j == skip) v = x[0];
      s += e;
      b = fmaf(sqrtf(e), x[0], b);
    }
  }

  __device__ void demote(float ratio) {
    b = sqrtf(ratio) * fmaf(sqrtf(star), v, b);
    s = ratio * (s + star);
    star = 0.f;
  }

  __device__ void merge(RootSums other, const Exponent& exponent) {
    if (other.m > m || (other.m == m && other.index < index)) exchange(*this, other);
    other.demote(exponent.ratio(m, other.m));
    b += other.b;
    s += other.s;
  }

  __device__ float total(const Exponent& exponent) const {
    return exponent.given ? 1.f : isinf(m) ? NAN : 1.f + s;
  }
};

}  // namespace fisherkern::cuda
