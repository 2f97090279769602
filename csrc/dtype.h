// The storage types of operands.
#pragma once
#include <cstdint>

namespace fisherkern {

enum class DType : int32_t { float32, bfloat16, float16, float64 };

}  // namespace fisherkern
