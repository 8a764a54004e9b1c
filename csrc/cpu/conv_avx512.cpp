// The convolution kernels for processors with AVX-512.
#include <cstdint>

#include "deeplab_fast/conv_cpu.h"
#include "deeplab_fast/strips_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#include "deeplab_fast/avx512.h"

#pragma GCC push_options
#if !defined(DEEPLAB_FAST_SANITIZE)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define DEEPLAB_FAST_SET avx512_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
// 12 rows of 2 vectors were slower on Zen 4 where rows are a power of two apart: 12 rows of 8 KiB
// share one set of a first-level cache.
#define DEEPLAB_FAST_ROWS 6
#define DEEPLAB_FAST_COLUMNS 4
#include "deeplab_fast/conv_cpu_kernels.h"
#include "deeplab_fast/strips_cpu_kernels.h"
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const ConvKernels& conv_avx512() {
  static constexpr ConvKernels kernels = avx512_set::conv_kernels("avx512", has_avx512);
  return kernels;
}

const StripKernels& strips_avx512() {
  static constexpr StripKernels kernels = avx512_set::strip_kernels();
  return kernels;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const ConvKernels& conv_avx512() {
  static const ConvKernels kernels = {"avx512", [] { return false; }, {}, nullptr, nullptr,
                                      nullptr};
  return kernels;
}

const StripKernels& strips_avx512() {
  static const StripKernels kernels = {};
  return kernels;
}

}  // namespace deeplab_fast::cpu

#endif
