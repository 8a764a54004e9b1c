// The pybind11 module `deeplab_fast._C`: facts about this build. The ops in the same shared object
// register themselves with torch's dispatcher when it is loaded.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef _OPENMP
#include <omp.h>
#endif

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
}
