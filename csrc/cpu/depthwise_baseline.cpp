// The kernels of depthwise convolutions in the instruction set that the compiler takes for granted.
#include <cstdint>

#include "deeplab_fast/depthwise_cpu.h"

#define DEEPLAB_FAST_SET depthwise_baseline_set
#define DEEPLAB_FAST_VECTOR_BYTES 16
#include "deeplab_fast/depthwise_cpu_kernels.h"

namespace deeplab_fast::cpu {

const DepthwiseKernels& depthwise_baseline() {
  static constexpr DepthwiseKernels kernels =
      depthwise_baseline_set::depthwise_kernels("baseline", [] { return true; });
  return kernels;
}

}  // namespace deeplab_fast::cpu
