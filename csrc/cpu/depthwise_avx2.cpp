// The kernels of depthwise convolutions for processors with AVX2 and FMA.
#include <cstdint>

#include "deeplab_fast/depthwise_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

namespace deeplab_fast::cpu {

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace deeplab_fast::cpu

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DEEPLAB_FAST_SET depthwise_avx2_set
#define DEEPLAB_FAST_VECTOR_BYTES 32
#include "deeplab_fast/depthwise_cpu_kernels.h"
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const DepthwiseKernels& depthwise_avx2() {
  static constexpr DepthwiseKernels kernels =
      depthwise_avx2_set::depthwise_kernels("avx2", has_avx2);
  return kernels;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const DepthwiseKernels& depthwise_avx2() {
  static const DepthwiseKernels kernels = {"avx2", [] { return false; }, nullptr, nullptr, nullptr};
  return kernels;
}

}  // namespace deeplab_fast::cpu

#endif
