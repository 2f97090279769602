// Which instruction set the CPU kernels use, decided once per process.
#pragma once
#include <string>
#include <vector>

namespace fisherkern {

enum class Capability { baseline, avx2, avx512 };

// The best that this CPU has, or what FISHERKERN_CPU_CAPABILITY asks for if that is less.
Capability capability();
std::string name_of(Capability);
std::vector<std::string> compiled_capabilities();

}  // namespace fisherkern
