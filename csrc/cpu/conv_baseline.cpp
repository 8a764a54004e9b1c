// The convolution kernels in the instruction set that the compiler takes for granted.
#include <cstdint>

#include "deeplab_fast/conv_cpu.h"
#include "deeplab_fast/strips_cpu.h"

#define DEEPLAB_FAST_SET baseline_set
#define DEEPLAB_FAST_VECTOR_BYTES 16
#define DEEPLAB_FAST_ROWS 6
#define DEEPLAB_FAST_COLUMNS 2
#include "deeplab_fast/conv_cpu_kernels.h"
#include "deeplab_fast/conv_cpu_kernels_bf16.h"
#include "deeplab_fast/strips_cpu_kernels.h"

namespace deeplab_fast::cpu {

const ConvKernels& conv_baseline() {
  static constexpr ConvKernels kernels =
      baseline_set::with_bf16(baseline_set::conv_kernels("baseline", [] { return true; }));
  return kernels;
}

const StripKernels& strips_baseline() {
  static constexpr StripKernels kernels = baseline_set::strip_kernels();
  return kernels;
}

}  // namespace deeplab_fast::cpu
