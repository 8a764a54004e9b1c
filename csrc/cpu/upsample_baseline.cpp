// The upsampling kernels in the instruction set that the compiler takes for granted.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "deeplab_fast/upsample_cpu.h"

#define DEEPLAB_FAST_SET baseline_set
#define DEEPLAB_FAST_VECTOR_BYTES 16
#include "deeplab_fast/upsample_cpu_kernels.h"

namespace deeplab_fast::cpu {

const InstructionSet& baseline() {
  static const InstructionSet set = {"baseline", [] { return true; }, true,
                                     baseline_set::kernels<float>(),
                                     baseline_set::kernels<double>()};
  return set;
}

}  // namespace deeplab_fast::cpu
