// The pybind11 module `deeplab_fast._C`: facts about this build. The ops in the same shared object
// register themselves with torch's dispatcher when it is loaded.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "deeplab_fast/aspp_tile_table.h"

namespace deeplab_fast::cpu {

// csrc/cpu/upsample_ops.cpp
std::string instruction_set(std::string name);

}  // namespace deeplab_fast::cpu

namespace py = pybind11;

namespace {

#define DEEPLAB_FAST_STRING_(x) #x
#define DEEPLAB_FAST_STRING(x) DEEPLAB_FAST_STRING_(x)

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " DEEPLAB_FAST_STRING(__GNUC__) "." DEEPLAB_FAST_STRING(
      __GNUC_MINOR__) "." DEEPLAB_FAST_STRING(__GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

// What the processor at run time has, not what the compiler was allowed to use.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define DEEPLAB_FAST_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  DEEPLAB_FAST_FEATURE("sse4.2");
  DEEPLAB_FAST_FEATURE("avx");
  DEEPLAB_FAST_FEATURE("avx2");
  DEEPLAB_FAST_FEATURE("fma");
  DEEPLAB_FAST_FEATURE("avx512f");
  DEEPLAB_FAST_FEATURE("avx512bw");
  DEEPLAB_FAST_FEATURE("avx512dq");
  DEEPLAB_FAST_FEATURE("avx512vl");
  DEEPLAB_FAST_FEATURE("avx512vnni");
  DEEPLAB_FAST_FEATURE("avx512bf16");
#undef DEEPLAB_FAST_FEATURE
#elif defined(__aarch64__)
  features["neon"] = true;
#endif
  return features;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cpp_standard"] = __cplusplus;
  info["torch"] = TORCH_VERSION;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
  info["openmp_threads"] = omp_get_max_threads();
#else
  info["openmp"] = 0;
  info["openmp_threads"] = 1;
#endif
  info["cpu_features"] = cpu_features();
  return info;
}

py::list aspp_tiles() {
  py::list rows;
  for (const auto& tile : deeplab_fast::cuda::kTiles) {
    py::dict row;
    row["architecture"] = tile.architecture;
    row["block_m"] = tile.block_m;
    row["block_n"] = tile.block_n;
    row["block_c"] = tile.block_c;
    row["threads"] = tile.threads();
    row["stages"] = tile.stages;
    row["cluster"] = tile.cluster;
    row["occupancy"] = tile.occupancy;
    row["shared_bytes"] = tile.shared_bytes();
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts of deeplab_fast's C++ extension.";
  m.def("build_info", &build_info, R"(Facts about this build and this processor.

Returns a dict:
  compiler (str): name and version.
  cpp_standard (int): the value of __cplusplus.
  torch (str): version of the torch headers it was compiled against.
  openmp (int): the value of _OPENMP (yyyymm), 0 without OpenMP.
  openmp_threads (int): threads that a parallel region starts; follows torch.set_num_threads.
  cpu_features (dict[str, bool]): instruction sets of the processor at run time.
)");
  m.def(
      "conv_instruction_set", [] { return deeplab_fast::cpu::instruction_set(""); },
      "The instruction set of the C++ convolutions; past the dispatcher, as every plan asks.");
  m.def("aspp_tiles", &aspp_tiles, R"(The table of tiles of the CUDA matrix kernels of the ASPP.

It is the same in every build, with CUDA or without. Returns for each row a dict of ints:
  architecture: 80 for sm_80 and newer, 90 for sm_90a alone.
  block_m, block_n, block_c: pixels, filters and channels of a tile of the list; the blocks of a
    cluster take equal parts of the pixels.
  threads, shared_bytes: of a block.
  stages: chunks of channels in shared memory.
  cluster: blocks that share a tile and its filters.
  occupancy: blocks of a multiprocessor that the kernel is compiled for.
)");
}
