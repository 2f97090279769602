// Loops shared out among the threads of torch.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace fisherkern {

// Runs body(begin, end) over [first, last) as torch::stable::parallel_for does. What a thread throws is
// thrown here: of that, torch keeps neither type nor message.
template <class Body>
void parallel_for(int64_t first, int64_t last, int64_t grain, Body&& body) {
  std::exception_ptr thrown;
  std::mutex one;
  torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(one);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace fisherkern
