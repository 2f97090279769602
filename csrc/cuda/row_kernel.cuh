// For the ops whose result is a row.
//
// Pass 1 sums a state over the row, pass 2 writes op.value per class, from the end of the row: where it
// is read from memory again, L2 still has that.
//
// An Op has: State, kInputs (row inputs beside the logits), prepare(weight, token, classes),
// finish(state, exponent, weight) and value(e, x, class).
#pragma once
#include "row_states.cuh"
#include "team.cuh"

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

  __device__ void load(int group, Group& to) const {
    to.logits = logits.load(group, -INFINITY);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) to.inputs[k] = inputs[k].load(group, 0.f);
  }

  // From here on the part of a team is read from its shared memory.
  template <class State>
  __device__ void keep(const Team<true>& team, TeamScratch<State>* scratch) {
    auto* const memory = reinterpret_cast<unsigned char*>(scratch) + kScratchBytes<State>;
    Operand<T>* operands[1 + kInputs] = {&logits};
#pragma unroll
    for (int k = 0; k < kInputs; ++k) operands[1 + k] = &inputs[k];
    team.fetch<T, 1 + kInputs>(operands, memory, &scratch->copies);
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

template <class T, class Op, bool kResident>
__global__ void __launch_bounds__(kTeamThreads, 4)
    row_kernel(const Problem problem, Op op, const Inputs<Op::kInputs> inputs, const Rows out) {
  using Reader = RowReader<T, Op::kInputs>;
  using Group = typename Reader::Group;
  using State = typename Op::State;
  constexpr int kSize = Packet<T>::kSize;
  if constexpr (kResident && !kClusters) return;
  Team<kResident> team;
  const int64_t token = team.token();
  const Span span(problem.row<T>(problem.logits, token), problem.classes);
  team.take(span);
  const Operand<T> result(span, problem.row<T>(out, token));
  const float weight = op.prepare(problem.weight(token), token, problem.classes);
  if (weight == 0.f) {
    const float zeros[kSize] = {};
    for (int g = team.begin + threadIdx.x; g < team.end; g += blockDim.x) result.store(g, zeros);
    return;
  }

  Reader reader(problem, span, inputs, token);
  auto* const scratch = reinterpret_cast<TeamScratch<State>*>(dynamic_shared());
  if constexpr (kResident) reader.keep(team, scratch);
  Exponent exponent(problem, problem.logsumexp ? problem.logsumexp + token : nullptr);
  auto reading = State::Reading::empty();
  pipelined<2, Group>(
      team.groups(), false, [&](int g, Group& held) { reader.load(team.begin + g, held); },
      [&](int g, const Group& held) {
        float z[kSize];
        held.logits.get(z);
        const auto get = [&](int j, auto& x) { held.get(j, x); };
        reading.update(exponent, z, get, reader.logits.first(team.begin + g));
      });
  const State state = team.merge(State(reading.settled(exponent)), exponent, scratch);
  team.done_reading();
  if (!exponent.given) exponent.reference = state.m;
  op.finish(state, exponent, weight);

  pipelined<2, Group>(
      team.groups(), true, [&](int g, Group& held) { reader.load(team.begin + g, held); },
      [&](int g, const Group& held) {
        float value[kSize], x[Reader::kHeld];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          held.get(j, x);
          const float e = exponent.power(held.logits.get(j));
          value[j] = op.value(e, x, reader.logits.first(team.begin + g) + j);
        }
        result.store(team.begin + g, value);
      });
  team.leave();
}

template <class Op>
int launch_rows(const SoftmaxFisher& p, Op op, const Inputs<Op::kInputs>& inputs, Rows out,
                void* stream) {
  return dispatch(p, [&](auto type) {
    using T = decltype(type);
    const auto slices = Slices::of<T>(p, 1 + Op::kInputs, kScratchBytes<typename Op::State>);
    const unsigned tokens = token_count(p);
    if (slices.cluster > 0)
      return launch_cluster(row_kernel<T, Op, true>, dim3(tokens * slices.cluster), slices.cluster,
                            slices.threads, slices.bytes, stream, Problem(p), op, inputs, out);
    return launch(row_kernel<T, Op, false>, dim3(tokens), kTeamThreads, 0, stream,
                  Problem(p), op, inputs, out);
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
