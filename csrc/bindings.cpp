// The module _C: facts about the native build. No op needs it.

#include "common/kernel_table.h"
#include "gemm/tiles.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["cuda"] = PEFT_KERNELS_CUDA_VERSION;
  facts["torch"] = PEFT_KERNELS_TORCH_VERSION;
  facts["architectures"] = PEFT_KERNELS_ARCHITECTURES;
  facts["compiler"] = PEFT_KERNELS_COMPILER;
  return facts;
}

py::list kernels(const std::string& library) {
  using Query = int (*)(int, peft_kernels::KernelResources*, const char**);
  // Loaded already, by torch: it is the very library that the ops run from.
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, "peft_kernels_kernel_resources") : nullptr;
  if (symbol == nullptr) throw std::runtime_error("expected the loaded native library, got " + library);
  const auto query = reinterpret_cast<Query>(symbol);

  py::list found;
  peft_kernels::KernelResources resources{};
  const char* error = nullptr;
  for (int index = 0; query(index, &resources, &error) == 0; ++index) {
    if (error != nullptr) throw std::runtime_error(std::string("the kernels' resources need a GPU: ") + error);
    py::dict kernel;
    kernel["name"] = resources.name;
    kernel["registers"] = resources.registers;
    kernel["shared_bytes"] = resources.shared_bytes;
    kernel["dynamic_bytes"] = resources.dynamic_bytes;
    kernel["local_bytes"] = resources.local_bytes;
    kernel["max_threads"] = resources.max_threads;
    found.append(kernel);
  }
  return found;
}

py::tuple gemm_tile(int64_t rows, int64_t columns, int processors, bool boxes) {
  using namespace peft_kernels;
  if (rows < 1 || columns < 1 || processors < 1) throw std::invalid_argument("expected sizes of at least 1");
  switch (choose(rows, columns, processors, boxes)) {
    case TileName::kWide:
      return py::make_tuple(Wide::kRows, Wide::kColumns, "sm_80");
    case TileName::kSquare:
      return py::make_tuple(Square::kRows, Square::kColumns, "sm_80");
    case TileName::kBoxWide:
      return py::make_tuple(BoxWide::kRows, BoxWide::kColumns, "sm_90a");
    case TileName::kBoxSquare:
      return py::make_tuple(BoxSquare::kRows, BoxSquare::kColumns, "sm_90a");
    default:
      return py::make_tuple(Small::kRows, Small::kColumns, "sm_80");
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the native build of peft_kernels.";
  m.def("build_facts", &build_facts, "What the library was built with: cuda, torch, architectures, compiler.");
  m.def("kernels", &kernels, py::arg("library"),
        "Of every kernel of the loaded library, as this GPU runs it: registers and local bytes (spills) a thread, static "
        "and dynamic shared bytes a block, the most threads a block may have.");
  m.def("gemm_tile", &gemm_tile, py::arg("rows"), py::arg("columns"), py::arg("processors"), py::arg("boxes"),
        "The tile of out that lora_gemm takes for out [rows, columns] on a GPU of so many SMs: rows, columns, and the "
        "architecture whose instructions multiply it. `boxes`: whether the tiles for sm_90a can be taken.");
}
