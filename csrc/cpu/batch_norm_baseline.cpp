// The batch norm kernels in the instruction set that the compiler takes for granted.
#include <cstdint>

#include "deeplab_fast/batch_norm_cpu.h"

#define DEEPLAB_FAST_SET batch_norm_baseline_set
#define DEEPLAB_FAST_VECTOR_BYTES 16
#include "deeplab_fast/batch_norm_cpu_kernels.h"

namespace deeplab_fast::cpu {

const BatchNormKernels& batch_norm_baseline() {
  static constexpr BatchNormKernels kernels =
      batch_norm_baseline_set::batch_norm_kernels("baseline", [] { return true; });
  return kernels;
}

}  // namespace deeplab_fast::cpu
