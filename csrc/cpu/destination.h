// How to write a result: past the caches, or into memory that the system has yet to hand out.
#pragma once
#include <cstddef>

namespace fisherkern {

// Decides whether a result of so many bytes is best written past the caches. A large result leaves
// them before anyone reads it, and ordinary stores would read every line first (at 256 x 50257
// float32, one thread: 13.7 ms instead of 19.7). Memory that has never been touched is another
// matter: the system clears each page, in the cache, when it is first written, and streaming over
// that is slower (54 ms against 17 with two threads). Asking for huge pages there was tried: 13 ms,
// but 80 while the system is busy making them, so it is left to the user (THP_MEM_ALLOC_ENABLE=1).
bool write_past_caches(void* data, size_t bytes);

}  // namespace fisherkern
