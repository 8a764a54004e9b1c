// The convolution kernels for processors with AVX2 and FMA.
#include <cstdint>

#include "deeplab_fast/conv_cpu.h"
#include "deeplab_fast/strips_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

namespace deeplab_fast::cpu {

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace deeplab_fast::cpu

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DEEPLAB_FAST_SET avx2_set
#define DEEPLAB_FAST_VECTOR_BYTES 32
#define DEEPLAB_FAST_ROWS 6
#define DEEPLAB_FAST_COLUMNS 2
#include "deeplab_fast/conv_cpu_kernels.h"
#include "deeplab_fast/conv_cpu_kernels_bf16.h"
#include "deeplab_fast/strips_cpu_kernels.h"
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const ConvKernels& conv_avx2() {
  static constexpr ConvKernels kernels =
      avx2_set::with_bf16(avx2_set::conv_kernels("avx2", has_avx2));
  return kernels;
}

const StripKernels& strips_avx2() {
  static constexpr StripKernels kernels = avx2_set::strip_kernels();
  return kernels;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const ConvKernels& conv_avx2() {
  static const ConvKernels kernels = {"avx2", [] { return false; }, {}, nullptr, nullptr, nullptr};
  return kernels;
}

const StripKernels& strips_avx2() {
  static const StripKernels kernels = {};
  return kernels;
}

}  // namespace deeplab_fast::cpu

#endif
