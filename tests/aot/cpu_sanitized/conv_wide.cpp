// The convolution kernels with vectors of 64 bytes, as AVX-512 has them, in whatever instructions
// the compiler takes for granted: runs the code for panels that are one vector wide anywhere.
#include <cstdint>

#include "deeplab_fast/conv_cpu.h"

#define DEEPLAB_FAST_SET wide_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
#define DEEPLAB_FAST_ROWS 4
#include "deeplab_fast/conv_cpu_kernels.h"

namespace deeplab_fast::cpu {

const ConvKernels& conv_wide() {
  static constexpr ConvKernels kernels = wide_set::conv_kernels("wide", [] { return true; });
  return kernels;
}

}  // namespace deeplab_fast::cpu
