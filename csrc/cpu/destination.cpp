#include "destination.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fisherkern {
namespace {

constexpr size_t kStreamBytes = 16 << 20;

// Whether the page in the middle was never touched: no allocator leaves a large block half used.
bool untouched(void* data, size_t bytes) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(data) + bytes / 2) / page * page;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(middle), page, &resident) == 0 && !(resident & 1);
#else
  return false;
#endif
}

}  // namespace

bool write_past_caches(void* data, size_t bytes) {
  return bytes >= kStreamBytes && !untouched(data, bytes);
}

}  // namespace fisherkern
