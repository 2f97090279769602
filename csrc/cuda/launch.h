// Where the device code meets the CUDA runtime: headers, dynamic shared memory, clusters of blocks and
// every launch.
//
// With FISHERKERN_HOST_EMULATION the same names come from tests/cuda_emulation and run on the CPU.
#pragma once
#ifdef FISHERKERN_HOST_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fisherkern::cuda {

__device__ inline float4* dynamic_shared() {
  extern __shared__ float4 memory[];
  return memory;
}

// What a block may opt in to on the current device: 163 KiB on sm_80, 227 KiB on sm_90.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

// Rows are kept in shared memory in slices of about this size: three blocks of a multiprocessor then
// load, add and store in turn.
inline size_t slice_bytes() { return 56 * 1024; }

inline size_t most_slice_bytes() { return 66 * 1024; }

inline bool has_clusters() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// ---- blocks of one cluster (sm_90; elsewhere each block is alone) -------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;  // no kernel with more than one block to a row is launched
#else
constexpr bool kClusters = true;
#endif

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

// The same place in the shared memory of another block.
template <class T>
__device__ inline T* of_block(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  return p;
#endif
}

// ---- copies into shared memory by the bulk copy engine ------------------------------------------

struct alignas(8) CopyBarrier {
  uint64_t word;
};

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// By one thread, before a barrier of the block.
__device__ inline void copy_barrier_init(CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread: how many bytes the copies that follow bring.
__device__ inline void copy_expect(CopyBarrier* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// By one thread; everything is a multiple of 16 bytes.
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Until the copies of the phase with this parity (0, 1, 0, ...) are there.
__device__ inline void copy_wait(CopyBarrier* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  int done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// ---- launches -----------------------------------------------------------------------------------

template <class... Parameters>
int allow_shared(void (*kernel)(Parameters...), size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;  // above this only on request
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// grid.x is a multiple of the blocks of a cluster, which are at most the 8 that every device promises.
template <class... Parameters, class... Arguments>
int launch_cluster(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads,
                   size_t shared_bytes, void* stream, Arguments... arguments) {
  if (const int error = allow_shared(kernel, shared_bytes)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (const int error = allow_shared(kernel, shared_bytes)) return error;
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      Parameters(arguments)...);
  return cudaGetLastError();
}

}  // namespace fisherkern::cuda
#endif
