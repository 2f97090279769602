// Small kernels with one bug each, and one without: the emulator must tell them apart.
#include "cuda_emulation.h"

namespace {

constexpr int kThreads = 64;

// Each thread writes its index and reads its mirror image, in the other warp.
__global__ void mirror(int* out, bool barrier) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = -1;
  __syncthreads();
  values[t] = t;
  if (barrier) __syncthreads();
  out[t] = values[kThreads - 1 - t];
}

__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1);
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1), __syncwarp();
}

__global__ void mixed_operations(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1);
  else out[threadIdx.x] = __shfl_up_sync(~0u, 1, 1);
}

__global__ void unwritten_shared(int* out) {
  out[threadIdx.x] = isnan(fisherkern::cuda::dynamic_shared()[threadIdx.x].x);
}

// Each block of a cluster writes its rank and reads that of the next.
__global__ void neighbours(int* out, bool meet, bool stay) {
  using namespace fisherkern::cuda;
  auto* const mine = reinterpret_cast<int*>(dynamic_shared());
  const int rank = cluster_rank();
  if (threadIdx.x == 0) *mine = rank;
  if (meet) cluster_arrive(), cluster_wait();
  if (threadIdx.x == 0) out[rank] = *of_block(mine, (rank + 1) % cluster_size());
  if (stay) cluster_arrive(), cluster_wait();
}

__global__ void endless_copy(int*) {
  using namespace fisherkern::cuda;
  auto* const barrier = reinterpret_cast<CopyBarrier*>(dynamic_shared());
  if (threadIdx.x == 0) copy_barrier_init(barrier);
  __syncthreads();
  copy_wait(barrier, 0);
}

template <class... A>
int run(void (*kernel)(A...), A... arguments) {
  return fisherkern::cuda::launch(kernel, dim3(1), kThreads, kThreads * sizeof(float4), nullptr,
                                  arguments...);
}

}  // namespace

extern "C" {
void emulation_seed(uint32_t seed) { emulation::machine().random.seed(seed); }
const char* emulation_error() {
  return emulation::machine().error ? emulation::machine().error : "";
}

int planted_mirror(int* out, int barrier) { return run(mirror, out, barrier != 0); }
int planted_divergent_shuffle(int* out) { return run(divergent_shuffle, out); }
int planted_divergent_barrier(int* out) { return run(divergent_barrier, out); }
int planted_mixed_operations(int* out) { return run(mixed_operations, out); }
int planted_neighbours(int* out, int meet, int stay) {
  return fisherkern::cuda::launch_cluster(neighbours, dim3(4), 4, kThreads, sizeof(float4), nullptr,
                                          out, meet != 0, stay != 0);
}
int planted_endless_copy(int* out) { return run(endless_copy, out); }
int planted_unwritten_shared(int* out) { return run(unwritten_shared, out); }
}
