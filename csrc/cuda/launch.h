// Where the device code meets the CUDA runtime: headers, dynamic shared memory and every launch.
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

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // above this only on request
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      Parameters(arguments)...);
  return cudaGetLastError();
}

}  // namespace fisherkern::cuda
#endif
