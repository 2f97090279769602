// Every schema of the compiled back ends, and the build information that Python asks for. The
// implementations register themselves per device: cpu/bindings.cpp, cuda/bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/capability.h"

STABLE_TORCH_LIBRARY(fisherkern_native, m) {
#define FISHERKERN_VECTOR "Tensor? weights, Tensor? logsumexp, float temperature"
#define FISHERKERN_SCALAR "Tensor? mask, Tensor? logsumexp, float temperature"
  m.def("softmax_fisher_matvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sqrt_matvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sqrt_rmatvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_matvec_backward(Tensor logits, Tensor v, Tensor grad, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_quadratic(Tensor logits, Tensor v, " FISHERKERN_SCALAR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_diagonal(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_diagonal_sum(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_mean_probs(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_trace(Tensor logits, " FISHERKERN_SCALAR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_stats(Tensor logits, " FISHERKERN_SCALAR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_stats_backward(Tensor logits, Tensor stats, Tensor grad, Tensor? mask, "
        "float temperature, Tensor(a!) out) -> ()");
  m.def("softmax_fisher_gradient(Tensor logits, Tensor labels, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sample(Tensor logits, Tensor seed, " FISHERKERN_VECTOR
        ", Tensor(a!) labels, Tensor(b!) out) -> ()");
#undef FISHERKERN_VECTOR
#undef FISHERKERN_SCALAR
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = FISHERKERN_COMPILER;
  info["torch"] = FISHERKERN_TORCH;
  info["cpu_capabilities"] = fisherkern::compiled_capabilities();
  std::vector<std::string> architectures;
#if defined(FISHERKERN_CUDA_ARCHITECTURES)
  std::string list = FISHERKERN_CUDA_ARCHITECTURES;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(';', begin), list.size());
    architectures.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled back ends of fisherkern; the ops are in torch.ops.fisherkern_native.";
  m.def("build_info", &build_info, "Compiler, torch version, CPU capabilities, CUDA architectures.");
  m.def("cpu_capability", [] { return fisherkern::name_of(fisherkern::capability()); },
        "The instruction set in use: FISHERKERN_CPU_CAPABILITY, or the best this CPU has.");
}
