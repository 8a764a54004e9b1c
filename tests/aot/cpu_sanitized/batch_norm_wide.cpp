// The batch norm kernels with vectors of 64 bytes, as AVX-512 has them, in whatever instructions
// the compiler takes for granted: runs the code for rows shorter than such a vector anywhere.
#include <cstdint>

#include "deeplab_fast/batch_norm_cpu.h"

#define DEEPLAB_FAST_SET batch_norm_wide_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
#include "deeplab_fast/batch_norm_cpu_kernels.h"

namespace deeplab_fast::cpu {

const BatchNormKernels& batch_norm_wide() {
  static constexpr BatchNormKernels kernels =
      batch_norm_wide_set::batch_norm_kernels("batch_norm_wide", [] { return true; });
  return kernels;
}

}  // namespace deeplab_fast::cpu
