#include "capability.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FISHERKERN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fisherkern {
namespace {

#if defined(FISHERKERN_AMX)
// Whether there are matrix units for bfloat16, and Linux lets this process use them.
bool matrix_units() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBfloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Capability detect() {
#if defined(FISHERKERN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(FISHERKERN_AMX)
    if (__builtin_cpu_supports("avx512bf16") && matrix_units()) return Capability::amx;
#endif
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
  return Capability::baseline;
}

Capability choose() {
  const Capability best = detect();
  const char* asked = std::getenv("FISHERKERN_CPU_CAPABILITY");
  if (!asked || !*asked) return best;
  for (Capability c :
       {Capability::baseline, Capability::avx2, Capability::avx512, Capability::amx})
    if (name_of(c) == asked) return c < best ? c : best;
  throw std::invalid_argument(std::string("FISHERKERN_CPU_CAPABILITY is '") + asked +
                              "'; allowed are 'baseline', 'avx2', 'avx512', 'amx'");
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

std::string name_of(Capability c) {
  switch (c) {
    case Capability::amx: return "amx";
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<std::string> compiled_capabilities() {
#if defined(FISHERKERN_AMX)
  return {"baseline", "avx2", "avx512", "amx"};
#elif defined(FISHERKERN_X86)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace fisherkern
