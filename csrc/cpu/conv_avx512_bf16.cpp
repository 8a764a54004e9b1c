// The convolution kernels for processors with AVX-512 and its instructions for bf16.
#include <cstdint>

#include "deeplab_fast/conv_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#include "deeplab_fast/avx512.h"

#pragma GCC push_options
#if !defined(DEEPLAB_FAST_SANITIZE)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define DEEPLAB_FAST_BF16_INSTRUCTIONS
#endif
#define DEEPLAB_FAST_SET avx512_bf16_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
#define DEEPLAB_FAST_ROWS 6
#define DEEPLAB_FAST_COLUMNS 4
#include "deeplab_fast/conv_cpu_kernels.h"
#include "deeplab_fast/conv_cpu_kernels_bf16.h"
#pragma GCC pop_options

namespace deeplab_fast::cpu {

// What is of fp32 is that of AVX-512. No function of the set may run here: made by the compiler.
const ConvKernels& conv_avx512_bf16() {
  static constexpr ConvKernels of_bf16 = avx512_bf16_set::with_bf16({});
  static const ConvKernels kernels = [] {
    ConvKernels made = conv_avx512();
    made.name = "avx512_bf16";
    made.supported = has_avx512_bf16;
    for (int form = 0; form < kNumForms; ++form) {
      MapKernels<BFloat16>& maps = made.forms[form];
      maps = of_bf16.forms[form];
      FactorKernels<BFloat16>& factors = made.forms[form];
      factors = of_bf16.forms[form];
    }
    made.multiply_bf16 = of_bf16.multiply_bf16;
    return made;
  }();
  return kernels;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const ConvKernels& conv_avx512_bf16() {
  static const ConvKernels kernels = {"avx512_bf16", [] { return false; }, {}, nullptr, nullptr,
                                      nullptr};
  return kernels;
}

}  // namespace deeplab_fast::cpu

#endif
