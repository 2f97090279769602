#include "capability.h"

#include <cstdlib>
#include <stdexcept>

namespace fisherkern {
namespace {

Capability detect() {
#if defined(FISHERKERN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Capability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
  return Capability::baseline;
}

Capability choose() {
  const Capability best = detect();
  const char* asked = std::getenv("FISHERKERN_CPU_CAPABILITY");
  if (!asked || !*asked) return best;
  for (Capability c : {Capability::baseline, Capability::avx2, Capability::avx512})
    if (name_of(c) == asked) return c < best ? c : best;
  throw std::invalid_argument(std::string("FISHERKERN_CPU_CAPABILITY is '") + asked +
                              "'; allowed are 'baseline', 'avx2', 'avx512'");
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

std::string name_of(Capability c) {
  return c == Capability::avx512 ? "avx512" : c == Capability::avx2 ? "avx2" : "baseline";
}

std::vector<std::string> compiled_capabilities() {
#if defined(FISHERKERN_X86)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace fisherkern
