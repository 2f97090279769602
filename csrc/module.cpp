// The Python module fisherkern._C: importing it registers the ops, and it tells what was built. Free of
// torch headers: those of 2.11 refuse pybind11 beside the stable ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/capability.h"

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
