// Rows in packets of 16 bytes, whatever their alignment.
//
// A row is cut into groups of kSize classes that start on 16-byte boundaries of the logits: group
// g covers classes [g kSize - lead, (g + 1) kSize - lead). Only the first and the last group may
// stick out of the row; there, and in operands aligned otherwise, classes are accessed singly.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../softmax_fisher.h"
#include "launch.h"

namespace fisherkern::cuda {

template <class T>
struct Packet {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t word[4];

  __device__ float get(int j) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[j]);
    } else {
      const auto bits = static_cast<unsigned short>(word[j / 2] >> (16 * (j % 2)));
      if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(bits));
      else return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
  }

  __device__ void get(float (&x)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = get(j);
  }

  __device__ static uint32_t bits(float x) {
    if constexpr (sizeof(T) == 4) return __float_as_uint(x);
    else if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(__float2half_rn(x));
    else return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }

  __device__ void set(int j, float x) {
    if constexpr (sizeof(T) == 4) {
      word[j] = bits(x);
    } else {
      const int shift = 16 * (j % 2);
      word[j / 2] = (word[j / 2] & ~(0xFFFFu << shift)) | bits(x) << shift;
    }
  }
};

template <class T>
__device__ inline float load_scalar(const T* p) {
  if constexpr (sizeof(T) == 4) return *p;
  else if constexpr (std::is_same_v<T, __half>) return __half2float(*p);
  else return __bfloat162float(*p);
}

template <class T>
__device__ inline void store_scalar(T* p, float x) {
  if constexpr (sizeof(T) == 4) *p = x;
  else if constexpr (std::is_same_v<T, __half>) *p = __float2half_rn(x);
  else *p = __float2bfloat16_rn(x);
}

// How the classes of one row fall into groups.
struct Span {
  int classes, lead, groups;

  template <class T>
  __device__ Span(const T* logits, int classes) : classes(classes) {
    constexpr int kSize = Packet<T>::kSize;
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    groups = (lead + classes + kSize - 1) / kSize;
  }
};

struct Bytes {
  uintptr_t from = 0;
  unsigned count = 0;
};

// One row of one operand, read or written by the groups of a span.
template <class T>
struct Operand {
  static constexpr int kSize = Packet<T>::kSize;
  T* row;
  int classes, lead;
  bool aligned;  // the groups start on 16-byte boundaries here too

  Operand() = default;
  __device__ Operand(const Span& span, T* row)
      : row(row),
        classes(span.classes),
        lead(span.lead),
        aligned((reinterpret_cast<uintptr_t>(row) / sizeof(T) - span.lead) % kSize == 0) {}

  __device__ int first(int group) const { return group * kSize - lead; }

  // What holds the classes of groups [begin, end), in whole units of 16 bytes.
  __device__ Bytes bytes(int begin, int end) const {
    const int low = max(first(begin), 0), high = min(first(end), classes);
    if (low >= high) return {};
    const uintptr_t from = reinterpret_cast<uintptr_t>(row + low) / 16 * 16;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(row + high) + 15) / 16 * 16;
    return {from, static_cast<unsigned>(to - from)};
  }

  // Those bytes are at `memory` now; the rest of the row is nowhere.
  __device__ void move(const Bytes& bytes, void* memory) {
    const auto moved = reinterpret_cast<uintptr_t>(memory) - bytes.from;
    row = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(row) + moved);
  }

  __device__ bool inside(int c) const { return c >= 0 && c < classes; }
  __device__ bool whole(int c) const { return aligned && c >= 0 && c + kSize <= classes; }

  // Classes outside the row read as `padding`.
  __device__ Packet<T> load(int group, float padding) const {
    const int c = first(group);
    Packet<T> packet;
    if (whole(c)) {
      const uint4 q = *reinterpret_cast<const uint4*>(row + c);
      packet.word[0] = q.x, packet.word[1] = q.y, packet.word[2] = q.z, packet.word[3] = q.w;
    } else {
      for (int i = 0; i < 4; ++i) packet.word[i] = 0;
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        packet.set(j, inside(c + j) ? load_scalar(row + c + j) : padding);
    }
    return packet;
  }

  __device__ void store(int group, const float (&value)[kSize]) const {
    const int c = first(group);
    if (whole(c)) {
      Packet<T> p{};
#pragma unroll
      for (int j = 0; j < kSize; ++j) p.set(j, value[j]);
      *reinterpret_cast<uint4*>(row + c) = make_uint4(p.word[0], p.word[1], p.word[2], p.word[3]);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (inside(c + j)) store_scalar(row + c + j, value[j]);
    }
  }
};

}  // namespace fisherkern::cuda
