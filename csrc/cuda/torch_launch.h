// Launches from torch: the device of a tensor, its current stream, and what the launcher returned.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fisherkern::cuda {

// The stable ABI has no call for this before torch 2.12, and linking libtorch_cuda would tie the
// extension to a CUDA build of torch: the symbol is looked up in the torch that is loaded.
inline void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const auto getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "no current CUDA stream");
  return stream;
}

// Runs launcher(stream) on the device of x and reports what it returns.
template <class Launcher>
void run_on_stream(const torch::stable::Tensor& x, Launcher&& launcher) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int error = launcher(current_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == 0, "the CUDA launch failed with error ", error);
}

}  // namespace fisherkern::cuda
