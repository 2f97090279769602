// How work on panels is shared out among threads, and where panels live.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "panel_product.h"
#include "parallel.h"

namespace fisherkern {

inline int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Runs task(i) for i in [0, count); a thread takes the next as soon as it is free.
template <class Task>
void share_out(int64_t count, Task&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) task(i);
  });
}

// The same with something of its own for each thread that takes part.
template <class Make, class Task>
void share_out(int64_t count, Make&& make, Task&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    int64_t i = next++;
    if (i >= count) return;
    const auto own = make();
    for (; i < count; i = next++) task(own, i);
  });
}

// Bytes on cache lines, not initialised. Many are a mapping of their own on Linux, on pages of 2 MiB if
// the system has them: products go to and fro in them, past what a translation buffer holds. They are not
// taken from the heap, where a call between a network's activations would leave a hole of its size.
class PanelMemory {
 public:
  explicit PanelMemory(int64_t bytes = 0) { reserve(bytes); }

  // At least so many; what was there is lost.
  void reserve(int64_t bytes) {
    if (bytes <= bytes_) return;
    memory_.reset();  // before more is asked for
    bytes_ = 0;
#if defined(__linux__)
    if (bytes >= kPage / 2) {
      map(bytes);
      return;
    }
#endif
    const int64_t size = rounded_up(bytes, kLine);
    memory_ = {static_cast<char*>(std::aligned_alloc(kLine, size)), Release{}};
    if (!memory_) throw std::bad_alloc();
    bytes_ = size;
  }
  char* data() const { return memory_.get(); }

 private:
  static constexpr int64_t kLine = 64, kPage = 2 << 20;
  struct Release {
    int64_t mapped;  // bytes, or 0: it is of the heap
    void operator()(char* memory) const {
#if defined(__linux__)
      if (mapped) {
        munmap(memory, mapped);
        return;
      }
#endif
      std::free(memory);
    }
  };

#if defined(__linux__)
  void map(int64_t bytes) {
    // one page more than is needed, and both ends given back, for the kernel aligns to 4 KiB
    const int64_t size = rounded_up(bytes, kPage);
    void* whole = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(whole);
    const int64_t before = -reinterpret_cast<intptr_t>(whole) & (kPage - 1);
    if (before) munmap(begin, before);
    munmap(begin + before + size, kPage - before);
    memory_ = {begin + before, Release{size}};
    madvise(memory_.get(), size, MADV_HUGEPAGE);
    bytes_ = size;
  }
#endif

  std::unique_ptr<char, Release> memory_;
  int64_t bytes_ = 0;
};

// Memory for a call. What a thread needs little of it keeps: to map and fault its pages anew takes up to
// a fifth of a covariance, and as long as a sum over tokens itself.
inline char* scratch_of(int64_t bytes, PanelMemory& own) {
  constexpr int64_t kKept = 8 << 20;
  static thread_local PanelMemory kept;
  PanelMemory& memory = bytes <= kKept ? kept : own;
  memory.reserve(bytes <= kKept ? kKept : bytes);
  return memory.data();
}

// The bounds of segments of `count` tokens in all.
inline std::vector<int64_t> segments_of(int64_t count, int64_t segment) {
  std::vector<int64_t> bounds{0};
  for (int64_t at = 0; at < count; at += segment) bounds.push_back(std::min(at + segment, count));
  return bounds;
}

// Tokens are shared out where the sums of a share are small enough: a thread that makes a panel then
// multiplies it itself, and no panel goes from the cache of one core to that of another. How many shares
// there are does not depend on the threads, nor do the bits.
struct Shares {
  static constexpr int64_t kFewest = 8, kMost = 32, kFewestTokens = 512;

  Shares(int64_t tokens, int64_t sum_bytes, int64_t bytes, int64_t segment) {
    const int64_t affordable = std::min(kMost, bytes / std::max<int64_t>(sum_bytes, 1));
    const int64_t wanted = std::min(affordable, tokens / kFewestTokens);
    if (wanted < kFewest) return;
    width = rounded_up((tokens + wanted - 1) / wanted, segment);
    count = (tokens + width - 1) / width;
  }

  int64_t count = 1, width = 0;
};

// The sums of the splits of a product, one after the other.
inline void add_splits(const PanelKernels& kernels, const PanelProduct& p) {
  parallel_for(0, p.heads * p.rows, 64, [&](int64_t first, int64_t last) {
    kernels.add_splits(p, first, last);
  });
}

// Products whose panels are ready, their tiles shared out. Where there are few tiles the tokens are
// shared out too, whatever the number of threads.
inline void multiply(const PanelKernels& kernels, std::vector<PanelProduct> products, bool wide) {
  constexpr int64_t kTasks = 16;
  int64_t tiles = 0;
  for (const PanelProduct& p : products) tiles += kernels.tile_count(p);
  std::vector<PanelMemory> partial(products.size());
  std::vector<int64_t> first_task{0};
  for (size_t i = 0; i < products.size(); ++i) {
    PanelProduct& p = products[i];
    p.splits = std::clamp<int64_t>(kTasks / std::max<int64_t>(tiles, 1), 1,
                                   std::max<int64_t>(p.segment_count / 4, 1));
    if (p.splits > 1) {
      partial[i].reserve(p.splits * p.heads * p.rows * p.columns *
                         (wide ? sizeof(double) : sizeof(float)));
      p.partial = partial[i].data();
    }
    first_task.push_back(first_task.back() + kernels.tile_count(p) * p.splits);
  }
  share_out(first_task.back(), [&](int64_t task) {
    size_t i = 0;
    while (task >= first_task[i + 1]) ++i;
    kernels.multiply_tile(products[i], task - first_task[i]);
  });
  for (const PanelProduct& p : products)
    if (p.splits > 1) add_splits(kernels, p);
}

}  // namespace fisherkern
