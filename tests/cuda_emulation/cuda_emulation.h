// CUDA C++ on the host, for logic and not for speed: a fiber per CUDA thread, a block, or a cluster
// of blocks, at a time.
//
// Blocks run in random order. Within a block one warp, chosen by a random priority, runs as far as
// it can before another does, its lanes in random order: the widest skew that barriers allow, so
// that a missing one shows as a wrong result. What is reported, by `error()` and by the status of
// the launch: barriers and warp operations that not all threads reach, or reach differently; lanes
// that have exited; shuffles from lanes outside the mask; shared memory of a block that has exited.
// Dynamic shared memory starts poisoned. Static shared memory is a static variable, which keeps what
// the previous block left and which the blocks of a cluster would share: they must not have any.
// Not modelled: memory ordering, bank conflicts, launch limits other than those in `launch`.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

enum class State { ready, at_barrier, at_cluster_barrier, at_copy, in_warp_operation, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  unsigned mask;          // lanes of the warp operation it waits in
  const char* operation;  // and its name
  dim3 thread;
  int rank;         // of its block in the cluster
  int64_t arrived;  // at how many cluster barriers
  void* sanitizer = nullptr;
};

struct Machine {
  dim3 grid, block, block_index, thread;
  uint64_t first_block = 0;  // of the cluster
  std::vector<Fiber> fibers;
  int current = 0, count = 0, cluster = 1;
  ucontext_t scheduler;
  std::function<void()> body;
  std::vector<unsigned char*> dynamic_shared;  // of each block of the cluster
  std::vector<uint64_t> slot;                  // what each thread offers to a shuffle
  std::mt19937 random{0};
  const char* error = nullptr;
  size_t shared_limit = 227 * 1024;
  int64_t copies = 0;
  size_t slice_bytes = 1024;  // so that rows of a few hundred classes are cut into slices
  void* scheduler_stack_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void to_scheduler(bool finished) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.sanitizer, m.scheduler_stack,
                                 m.scheduler_stack_bytes);
#endif
  (void)finished;
  swapcontext(&fiber.context, &m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, nullptr, nullptr);
#endif
}

inline dim3 block_at(uint64_t index) {
  const dim3& grid = machine().grid;
  return dim3(index % grid.x, index / grid.x % grid.y,
              index / (static_cast<uint64_t>(grid.x) * grid.y));
}

inline void run(int index) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[index];
  m.current = index;
  m.thread = fiber.thread;
  m.block_index = block_at(m.first_block + fiber.rank);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_stack_sanitizer, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_stack_sanitizer, nullptr, nullptr);
#endif
}

inline void entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  m.body();
  m.fibers[m.current].state = State::done;
  to_scheduler(true);
}

inline void wait(State state, unsigned mask = 0, const char* operation = "") {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  fiber.mask = mask;
  fiber.operation = operation;
  to_scheduler(false);
}

inline Fiber& self() { return machine().fibers[machine().current]; }

inline int lane() { return machine().current % kWarp; }

// Lets lane `i` and those it waits for go on once all have arrived; whether it did.
inline bool release_warp_operation(int first, int i) {
  Machine& m = machine();
  const Fiber& fiber = m.fibers[first + i];
  std::vector<int> members;
  for (int j = 0; j < kWarp; ++j)
    if (fiber.mask >> j & 1) members.push_back(first + j);
  for (int j : members) {
    if (j >= m.count || m.fibers[j].state == State::done) {
      m.error = "a warp operation names a lane that has exited";
      return false;
    }
    const Fiber& other = m.fibers[j];
    if (other.state != State::in_warp_operation) return false;
    if (other.mask != fiber.mask || std::strcmp(other.operation, fiber.operation) != 0) {
      m.error = "the lanes of a warp are in different warp operations";
      return false;
    }
  }
  for (int j : members) m.fibers[j].state = State::ready;
  return true;
}

inline bool advance_warp(int first) {
  Machine& m = machine();
  bool progress = false;
  int order[kWarp];
  std::iota(order, order + kWarp, 0);
  std::shuffle(order, order + kWarp, m.random);
  for (int i : order) {
    if (first + i >= m.count || m.fibers[first + i].state != State::ready) continue;
    run(first + i);
    progress = true;
    if (m.error) return true;
  }
  for (int i = 0; i < kWarp && first + i < m.count; ++i)
    if (m.fibers[first + i].state == State::in_warp_operation)
      progress |= release_warp_operation(first, i);
  return progress;
}

// How many fibers of a block (of all, if none is named) are in a state.
inline int count_in(State state, int rank = -1) {
  int found = 0;
  for (const Fiber& fiber : machine().fibers)
    found += fiber.state == state && (rank < 0 || fiber.rank == rank);
  return found;
}

// Lets the blocks go on whose threads have all arrived, then the cluster; whether any could.
inline bool release_barriers() {
  Machine& m = machine();
  const int threads = m.count / m.cluster;
  bool released = false;
  for (int rank = 0; rank < m.cluster; ++rank) {
    const int waiting = count_in(State::at_barrier, rank), done = count_in(State::done, rank);
    if (waiting == 0 || waiting + done < threads) continue;
    if (done > 0) m.error = "__syncthreads is not reached by threads that have exited";
    for (Fiber& fiber : m.fibers)
      if (fiber.rank == rank && fiber.state == State::at_barrier)
        fiber.state = State::ready, released = true;
  }
  int64_t least = INT64_MAX;
  for (const Fiber& fiber : m.fibers)
    if (fiber.state != State::done) least = std::min(least, fiber.arrived);
  for (Fiber& fiber : m.fibers)
    if (fiber.state == State::at_cluster_barrier && fiber.arrived <= least)
      fiber.state = State::ready, released = true;
  return released;
}

inline void run_cluster() {
  Machine& m = machine();
  const int threads = m.count / m.cluster;
  for (int i = 0; i < m.count; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.state = State::ready;
    fiber.thread = dim3(i % threads);
    fiber.rank = i / threads;
    fiber.arrived = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<int> warps((m.count + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::shuffle(warps.begin(), warps.end(), m.random);
  int64_t polled = -1;  // copies that had been made when those who wait for one looked last
  while (!m.error) {
    bool progress = false;
    for (int warp : warps) {
      progress = advance_warp(warp * kWarp);
      if (progress) break;  // the first warp of the priority that can run, runs again
    }
    if (m.error || count_in(State::done) == m.count) return;
    if (progress || release_barriers()) continue;
    if (count_in(State::at_copy) == 0 || polled == m.copies)
      m.error = "deadlock: threads wait at different barriers, or for a copy that none began";
    for (Fiber& fiber : m.fibers)
      if (fiber.state == State::at_copy) fiber.state = State::ready;
    polled = m.copies;
  }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Machine& m = machine();
  const int first = m.current / kWarp * kWarp;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  m.slot[m.current] = bits;
  wait(State::in_warp_operation, mask, operation);
  if (!(mask >> source & 1)) {
    m.error = "a shuffle reads a lane outside its mask";
    to_scheduler(false);
  }
  bits = m.slot[first + source];
  wait(State::in_warp_operation, mask, operation);  // before a slot is used again
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

}  // namespace emulation

#define threadIdx (emulation::machine().thread)
#define blockIdx (emulation::machine().block_index)
#define blockDim (emulation::machine().block)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() { emulation::wait(emulation::State::at_barrier); }

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::wait(emulation::State::in_warp_operation, mask, "__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(mask, value, source & 31, "__shfl_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, value, lane + offset < 32 ? lane + offset : lane,
                            "__shfl_down_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, value, lane >= offset ? lane - offset : lane, "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulation::Machine& m = emulation::machine();
  const int first = m.current / emulation::kWarp * emulation::kWarp;
  m.slot[m.current] = predicate != 0;
  emulation::wait(emulation::State::in_warp_operation, mask, "__ballot_sync");
  unsigned votes = 0;
  for (int i = 0; i < emulation::kWarp; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(m.slot[first + i]) << i;
  emulation::wait(emulation::State::in_warp_operation, mask, "__ballot_sync");
  return votes;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

using std::isfinite;
using std::isinf;
using std::isnan;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace fisherkern::cuda {

inline float4* dynamic_shared() {
  return reinterpret_cast<float4*>(emulation::machine().dynamic_shared[emulation::self().rank]);
}

inline size_t shared_memory_limit() { return emulation::machine().shared_limit; }
inline size_t slice_bytes() { return emulation::machine().slice_bytes; }
inline size_t most_slice_bytes() { return 64 * 1024; }
inline bool has_clusters() { return emulation::machine().slice_bytes > 0; }

constexpr bool kClusters = true;

inline int cluster_rank() { return emulation::self().rank; }
inline int cluster_size() { return emulation::machine().cluster; }
inline void cluster_arrive() { ++emulation::self().arrived; }
inline void cluster_wait() { emulation::wait(emulation::State::at_cluster_barrier); }

template <class T>
T* of_block(T* p, int rank) {
  emulation::Machine& m = emulation::machine();
  if (rank != cluster_rank() && emulation::count_in(emulation::State::done, rank) > 0)
    m.error = "shared memory is read of a block whose threads have exited";
  auto* base = m.dynamic_shared[emulation::self().rank];
  return reinterpret_cast<T*>(m.dynamic_shared[rank] + (reinterpret_cast<unsigned char*>(p) - base));
}

// Copies are made at once; who reads without waiting may still come before the thread that asks.
struct CopyBarrier {
  int64_t phase, pending;
};

inline void copy_barrier_init(CopyBarrier* barrier) { *barrier = {0, 0}; }

inline void copy_expect(CopyBarrier* barrier, unsigned bytes) {
  barrier->pending += bytes;
  if (barrier->pending == 0) ++barrier->phase;
  ++emulation::machine().copies;
}

inline void bulk_copy(void* to, const void* from, unsigned bytes, CopyBarrier* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    emulation::machine().error = "a bulk copy is not aligned to 16 bytes";
  std::memcpy(to, from, bytes);
  barrier->pending -= bytes;
  if (barrier->pending == 0) ++barrier->phase;
  ++emulation::machine().copies;
}

inline void copy_wait(CopyBarrier* barrier, int parity) {
  while (barrier->phase % 2 == parity) emulation::wait(emulation::State::at_copy);
}

template <class... Parameters, class... Arguments>
int launch_cluster(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads,
                   size_t shared_bytes, void*, Arguments... arguments) {
  emulation::Machine& m = emulation::machine();
  if (threads < 1 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x == 0 ||
      grid.y == 0 || shared_bytes > m.shared_limit || cluster > 16 || grid.x % cluster ||
      (cluster > 1 && threads % emulation::kWarp))
    return cudaErrorInvalidConfiguration;
  m.error = nullptr;
  m.grid = grid;
  m.block = dim3(threads);
  m.cluster = cluster;
  m.count = threads * cluster;
  m.fibers.resize(m.count);
  m.slot.resize(m.count);
  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z / cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), m.random);
  m.body = [&] { kernel(Parameters(arguments)...); };
  for (uint64_t index : order) {
    m.first_block = index * cluster;
    // one allocation per block of exactly the requested size, so that AddressSanitizer sees its end
    std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> shared;
    m.dynamic_shared.clear();
    for (int rank = 0; rank < cluster; ++rank) {
      shared.emplace_back(static_cast<unsigned char*>(
                              std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)),
                          &std::free);
      std::memset(shared.back().get(), 0xFF, shared_bytes);  // NaN in every format
      m.dynamic_shared.push_back(shared.back().get());
    }
    emulation::run_cluster();
    if (m.error) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  return launch_cluster(kernel, grid, 1, threads, shared_bytes, stream, arguments...);
}

}  // namespace fisherkern::cuda
