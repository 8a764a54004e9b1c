// The kernels of depthwise convolutions for processors with AVX-512.
#include <cstdint>

#include "deeplab_fast/depthwise_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include "deeplab_fast/avx512.h"

#pragma GCC push_options
#if !defined(DEEPLAB_FAST_SANITIZE)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define DEEPLAB_FAST_SET depthwise_avx512_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
#include "deeplab_fast/depthwise_cpu_kernels.h"
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const DepthwiseKernels& depthwise_avx512() {
  static constexpr DepthwiseKernels kernels =
      depthwise_avx512_set::depthwise_kernels("avx512", has_avx512);
  return kernels;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const DepthwiseKernels& depthwise_avx512() {
  static const DepthwiseKernels kernels = {"avx512", [] { return false; }, nullptr, nullptr,
                                           nullptr};
  return kernels;
}

}  // namespace deeplab_fast::cpu

#endif
