// Which instruction set the CPU kernels use, decided once per process.
#pragma once
#include <string>
#include <vector>

namespace fisherkern {

// amx: AVX-512, and the matrix units for bfloat16.
enum class Capability { baseline, avx2, avx512, amx };

// The best that this CPU has, or what FISHERKERN_CPU_CAPABILITY asks for if that is less.
Capability capability();
std::string name_of(Capability);
std::vector<std::string> compiled_capabilities();

}  // namespace fisherkern

// The kernel of this name for the instruction set in use.
#if defined(FISHERKERN_X86)
#define FISHERKERN_KERNEL(name)                                   \
  (capability() >= Capability::avx512 ? &avx512::name             \
   : capability() == Capability::avx2 ? &avx2::name               \
                                      : &baseline::name)
#else
#define FISHERKERN_KERNEL(name) (&baseline::name)
#endif
