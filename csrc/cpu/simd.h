// One vector type for every instruction set: GCC vector extensions, with intrinsics only where the
// compiler does not find the instruction itself. A file that includes this is compiled once per
// instruction set with FISHERKERN_ISA naming its namespace, so nothing here has external linkage
// outside that namespace.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fisherkern {
namespace FISHERKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulation<T>::type;

template <class A>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(A);
  typedef A vector __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename Lanes<A>::vector;
template <class A>
constexpr int kLanes = Lanes<A>::count;

typedef uint32_t vuint32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vuint16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // folds to the value itself, unlike 0 + value
}

// ---- conversions ------------------------------------------------------------------------------

inline float to_accumulation(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_accumulation(float16 x) {
  // exact through a product: shift the exponent into place, then undo the difference of biases
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  uint32_t bits = magnitude;
  float value;
  if ((x.bits & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, sizeof value);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_accumulation(float x) { return x; }
inline double to_accumulation(double x) { return x; }

inline void from_accumulation(float x, float* to) { *to = x; }
inline void from_accumulation(double x, double* to) { *to = x; }

inline void from_accumulation(float x, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline void from_accumulation(float x, float16* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (bits >= 0x38800000u) {  // normal: round the mantissa to nearest even
    half = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  } else {  // subnormal: let the float adder round to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000u;
  }
  to->bits = static_cast<uint16_t>(sign | half);
#endif
}

inline Vec<float> load(const float* from) {
  Vec<float> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec<double> load(const double* from) {
  Vec<double> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec<float> load(const bfloat16* from) {
  vuint16 half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, vuint32) << 16);
}

inline Vec<float> load(const float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_accumulation(from[i]);
  return x;
#endif
}

inline void store(float* to, Vec<float> x) { std::memcpy(to, &x, sizeof x); }
inline void store(double* to, Vec<double> x) { std::memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, Vec<float> x) {
  const vuint32 bits = reinterpret_cast<vuint32>(x);
  const vuint32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint32 kept = (x != x) ? (vuint32{} + 0x7fc0u) : rounded;
  const vuint16 half = __builtin_convertvector(kept, vuint16);
  std::memcpy(to, &half, sizeof half);
}

inline void store(float16* to, Vec<float> x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
#else
  for (int i = 0; i < kLanes<float>; ++i) from_accumulation(x[i], to + i);
#endif
}

// A store to an address aligned to its size that goes past the caches: the line is not read first.
inline void store_streaming(float* to, Vec<float> x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, x);
#else
  store(to, x);
#endif
}
inline void store_streaming(double* to, Vec<double> x) { store(to, x); }

template <class Half>
inline void store_streaming(Half* to, Vec<float> x) {
  alignas(kVectorBytes / 2) Half bits[kLanes<float>];
  store(bits, x);
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), *reinterpret_cast<const __m256i*>(bits));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), *reinterpret_cast<const __m128i*>(bits));
#else
  std::memcpy(to, bits, sizeof bits);
#endif
}

inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class A>
inline Vec<A> lane_numbers() {
  Vec<A> n;
  for (int i = 0; i < kLanes<A>; ++i) n[i] = static_cast<A>(i);
  return n;
}

// The first `count` lanes from memory, the others `fill`.
template <class T>
inline Vec<Acc<T>> load_some(const T* from, int64_t count, Acc<T> fill) {
  using A = Acc<T>;
  T some[kLanes<A>] = {};
  std::memcpy(some, from, count * sizeof(T));
  return lane_numbers<A>() < static_cast<A>(count) ? load(some) : broadcast(fill);
}

template <class T>
inline void store_some(T* to, Vec<Acc<T>> x, int64_t count) {
  T some[kLanes<Acc<T>>];
  store(some, x);
  std::memcpy(to, some, count * sizeof(T));
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vec<float> load_some(const float* from, int64_t count, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(count), from);
}
inline void store_some(float* to, Vec<float> x, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
#endif

// The lane of the first element equal to `value`, or as many as there are lanes.
template <class A>
inline int first_equal(Vec<A> x, A value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return __builtin_ctz(_mm512_cmpeq_ps_mask(x, broadcast(value)) | 1u << kLanes<A>);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return __builtin_ctz(
        static_cast<unsigned>(_mm256_movemask_ps(x == broadcast(value))) | 1u << kLanes<A>);
#endif
  int lane = 0;
  while (lane < kLanes<A> && !(x[lane] == value)) ++lane;
  return lane;
}

// ---- arithmetic -------------------------------------------------------------------------------

inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

// The larger of the two; `b` where either is NaN.
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

inline Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
inline Vec<double> square_root(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// A square of lanes on its side: blocks of half the size change places, then those within them.
template <class A>
inline void transpose(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Index Order __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2) {
    Order upper, lower;
    for (int n = 0; n < L; ++n) {
      upper[n] = n & half ? L + (n ^ half) : n;
      lower[n] = n & half ? L + n : n ^ half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & half) continue;
      const Vec<A> a = rows[i], b = rows[i | half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i | half] = __builtin_shuffle(a, b, lower);
    }
  }
}

// Pairwise and in double: the order depends on nothing but the width of the vector.
inline double horizontal_sum(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#else
  double part[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) part[i] = x[i];
  for (int width = kLanes<float> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
#endif
}

inline double horizontal_sum(Vec<double> x) {
  double sum = 0;
  for (int i = 0; i < kLanes<double>; ++i) sum += x[i];
  return sum;
}

inline float horizontal_maximum(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float largest = x[0];
  for (int i = 1; i < kLanes<float>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

inline double horizontal_maximum(Vec<double> x) {
  double largest = x[0];
  for (int i = 1; i < kLanes<double>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// exp(d / tau) below the overflow of the type, to within 1 ulp of the rounding of d. The reduced
// argument comes from one fused multiply-add, so that the error does not grow with |d|. Results far
// below 2^-126 are zero, that of -inf included; NaN stays NaN.
template <class A>
struct Exponential;

template <>
struct Exponential<float> {
#if defined(__AVX512F__)
  static constexpr double kLeastExponent = -200;
#else
  static constexpr double kLeastExponent = -126;  // of what the exponent bits can hold
#endif
  double temperature;
  float scale, scale_low, least;
  explicit Exponential(double tau) : temperature(tau) {
    const double exact = 1.4426950408889634 / temperature;
    scale = static_cast<float>(exact);
    scale_low = static_cast<float>(exact - scale);
    least = static_cast<float>(kLeastExponent / exact);
  }
  Vec<float> operator()(Vec<float> d) const {
    const Vec<float> bounded = maximum(broadcast(least), d);
    // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    const Vec<float> shift = broadcast(12582912.0f);
    const Vec<float> whole = multiply_add(bounded, broadcast(scale), shift);
    const Vec<float> n = whole - shift;
    Vec<float> f = multiply_add(bounded, broadcast(scale), -n);
    f = multiply_add(bounded, broadcast(scale_low), f);
    Vec<float> p = broadcast(1.55946782e-4f);
    p = multiply_add(p, f, broadcast(1.34066439e-3f));
    p = multiply_add(p, f, broadcast(9.61769297e-3f));
    p = multiply_add(p, f, broadcast(5.55031055e-2f));
    p = multiply_add(p, f, broadcast(2.40226528e-1f));
    p = multiply_add(p, f, broadcast(6.93147215e-1f));
    p = multiply_add(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);  // underflows by itself
#else
    const vuint32 exponent = (reinterpret_cast<vuint32>(whole) + 127u) << 23;
    const Vec<float> e = p * reinterpret_cast<Vec<float>>(exponent);
    return d < broadcast(least) ? Vec<float>{} : e;
#endif
  }
};

template <>
struct Exponential<double> {
  double temperature;
  explicit Exponential(double tau) : temperature(tau) {}
  Vec<double> operator()(Vec<double> d) const {
    for (int i = 0; i < kLanes<double>; ++i) d[i] = std::exp(d[i] / temperature);
    return d;
  }
};

}  // namespace FISHERKERN_ISA
}  // namespace fisherkern
