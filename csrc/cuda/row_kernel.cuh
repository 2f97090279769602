// One block per row, for the ops whose result is a row.
//
// Pass 1 sums a state over the row, pass 2 writes op.value per class. Where a float per class fits
// shared memory, the row is read once and each power is taken once: logits, then powers are kept
// there. Otherwise pass 1 sums online and pass 2 reads again from the end, where L2 still has it.
// With a given logsumexp pass 1 knows the powers at once.
//
// An Op has: State, kInputs (row inputs beside the logits), prepare(weight, token, classes),
// finish(state, exponent, weight) and value(e, x, class).
#pragma once
#include <algorithm>

#include "block_merge.cuh"
#include "row_states.cuh"

namespace fisherkern::cuda {

template <int kInputs>
struct Inputs {
  Rows rows[kInputs > 0 ? kInputs : 1];
};

template <class T, int kInputs>
struct RowReader {
  static constexpr int kSize = Packet<T>::kSize;
  static constexpr int kHeld = kInputs > 0 ? kInputs : 1;  // no arrays of length 0
  Operand<T> logits;
  Operand<T> inputs[kHeld];

  struct Group {
    Packet<T> logits;
    Packet<T> inputs[kHeld];

    __device__ void get(int j, float (&x)[kHeld]) const {
      x[0] = 0.f;
#pragma unroll
      for (int k = 0; k < kInputs; ++k) x[k] = inputs[k].get(j);
    }
  };

  __device__ RowReader(const Problem& problem, const Span& span, const Inputs<kInputs>& rows,
                       int64_t token)
      : logits(span, problem.row<T>(problem.logits, token)) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k)
      inputs[k] = Operand<T>(span, problem.row<T>(rows.rows[k], token));
  }

  __device__ void load_inputs(int group, Group& to) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) to.inputs[k] = inputs[k].load(group, 0.f);
  }

  __device__ void load(int group, Group& to) const {
    to.logits = logits.load(group, -INFINITY);
    load_inputs(group, to);
  }
};

struct NoInputs {
  template <class X>
  __device__ void operator()(int, X&) const {}
};

// f(group) for the groups of this thread, kUnroll of them prepared by `load` before the first use.
template <int kUnroll, class Group, class Load, class Use>
__device__ inline void pipelined(int groups, bool reverse, Load load, Use use) {
  for (int base = threadIdx.x; base < groups; base += kUnroll * blockDim.x) {
    Group held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int g = base + u * static_cast<int>(blockDim.x);
      if (g < groups) load(reverse ? groups - 1 - g : g, held[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int g = base + u * static_cast<int>(blockDim.x);
      if (g < groups) use(reverse ? groups - 1 - g : g, held[u]);
    }
  }
}

// Pass 1 over a row in shared memory: the maximum first, so that no power is taken twice.
template <class T, class Op>
__device__ typename Op::State sum_cached(const RowReader<T, Op::kInputs>& reader, const Span& span,
                                         const RowCache<T>& cache, Exponent& exponent) {
  using Reader = RowReader<T, Op::kInputs>;
  using Group = typename Reader::Group;
  constexpr int kSize = Packet<T>::kSize;
  Peak peak = Peak::empty();
  pipelined<4, Packet<T>>(
      span.groups, false,
      [&](int group, Packet<T>& packet) { packet = reader.logits.load(group, -INFINITY); },
      [&](int group, const Packet<T>& packet) {
        float z[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          z[j] = packet.get(j);
          peak.update(z[j], reader.logits.first(group) + j);
        }
        cache.store(group, z);
      });
  peak = block_merge(peak, exponent);
  exponent.reference = peak.m;

  float x[Reader::kHeld] = {};
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
    x[k] = load_scalar(reader.inputs[k].row + (peak.index < span.classes ? peak.index : 0));
  typename Op::State state = Op::State::at(peak, x);
  pipelined<2, Group>(
      span.groups, false, [&](int group, Group& held) { reader.load_inputs(group, held); },
      [&](int group, const Group& held) {
        float e[kSize];
        cache.load(group, e);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          e[j] = exponent.power(e[j], exponent.base(peak.m));
          held.get(j, x);
          state.add(e[j], x, reader.logits.first(group) + j, peak);
        }
        cache.store(group, e);
      });
  return state;
}

// Pass 1 as the row streams by; `cached` keeps the powers, which a given logsumexp makes final.
template <class T, class Op>
__device__ typename Op::State sum_online(const RowReader<T, Op::kInputs>& reader, const Span& span,
                                         const RowCache<T>& cache, bool cached,
                                         const Exponent& exponent) {
  using Reader = RowReader<T, Op::kInputs>;
  using Group = typename Reader::Group;
  constexpr int kSize = Packet<T>::kSize;
  typename Op::State state = Op::State::empty();
  pipelined<2, Group>(
      span.groups, false, [&](int group, Group& held) { reader.load(group, held); },
      [&](int group, const Group& held) {
        float z[kSize];
        held.logits.get(z);
        const auto get = [&](int j, auto& x) { held.get(j, x); };
        state.update(exponent, z, get, reader.logits.first(group));
        if (!cached) return;
#pragma unroll
        for (int j = 0; j < kSize; ++j) z[j] = exponent.power(z[j]);
        cache.store(group, z);
      });
  return state;
}

// With 64 registers a thread, what 1024 threads have, ptxas spills in some of these ops; without
// the 1 block below it still stops at 64.
template <class Op>
constexpr int kMaxThreads = Op::kInputs == 1 ? 1024 : 512;

template <class T, class Op>
__global__ void __launch_bounds__(kMaxThreads<Op>, 1)
    row_kernel(const Problem problem, Op op, const Inputs<Op::kInputs> inputs, const Rows out,
               bool cached) {
  using Reader = RowReader<T, Op::kInputs>;
  using Group = typename Reader::Group;
  constexpr int kSize = Packet<T>::kSize;
  const int64_t token = blockIdx.x;
  const Span span(problem.row<T>(problem.logits, token), problem.classes);
  const Operand<T> result(span, problem.row<T>(out, token));
  const float weight = op.prepare(problem.weight(token), token, problem.classes);
  if (weight == 0.f) {
    const float zeros[kSize] = {};
    for (int g = threadIdx.x; g < span.groups; g += blockDim.x) result.store(g, zeros);
    return;
  }

  const Reader reader(problem, span, inputs, token);
  const RowCache<T> cache{dynamic_shared(), span.groups};
  Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  typename Op::State state = cached && !exponent.given
                                 ? sum_cached<T, Op>(reader, span, cache, exponent)
                                 : sum_online<T, Op>(reader, span, cache, cached, exponent);
  state.settle();
  state = block_merge(state, exponent);
  if (!exponent.given) exponent.reference = state.m;
  op.finish(state, exponent, weight);

  pipelined<2, Group>(
      span.groups, true,
      [&](int group, Group& held) {
        if (!cached) held.logits = reader.logits.load(group, -INFINITY);
        reader.load_inputs(group, held);
      },
      [&](int group, const Group& held) {
        float value[kSize], x[Reader::kHeld];
        if (cached) cache.load(group, value);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float e =
              cached ? value[j] : exponent.power(held.logits.get(j));
          held.get(j, x);
          value[j] = op.value(e, x, reader.logits.first(group) + j);
        }
        result.store(group, value);
      });
}

template <class Op>
int launch_rows(const SoftmaxFisher& p, Op op, const Inputs<Op::kInputs>& inputs, Rows out,
                void* stream) {
  return dispatch(p, [&](auto type) {
    using T = decltype(type);
    const size_t bytes = row_cache_bytes<T>(p.classes);
    const int threads = std::min(row_threads(p.classes), kMaxThreads<Op>);
    return launch(row_kernel<T, Op>, dim3(token_count(p)), threads, bytes, stream, Problem(p), op,
                  inputs, out, bytes > 0);
  });
}

// p and 1 - p of one class from its power.
struct Probability {
  float inverse;     // 1 / sum e
  float star;        // the power of the largest class
  float complement;  // and its 1 - p, summed from the others

  template <class State>
  __device__ void set(const State& state, const Exponent& exponent) {
    inverse = 1.f / state.total(exponent);
    star = state.m == -INFINITY ? -1.f : state.star;  // none where all powers are zero
    complement = state.s * inverse;
  }

  __device__ float p(float e) const { return e * inverse; }
  __device__ float one_minus_p(float e) const { return e == star ? complement : 1.f - e * inverse; }
};

}  // namespace fisherkern::cuda
