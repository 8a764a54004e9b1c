// The upsampling kernels for processors with AVX2 and FMA.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "deeplab_fast/upsample_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

namespace deeplab_fast::cpu {

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace deeplab_fast::cpu

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DEEPLAB_FAST_SET avx2_set
#define DEEPLAB_FAST_VECTOR_BYTES 32
#include "deeplab_fast/upsample_cpu_kernels.h"
namespace deeplab_fast::cpu::avx2_set {

constexpr Kernels<float> kSinglePrecision = kernels<float>();
constexpr Kernels<double> kDoublePrecision = kernels<double>();

}  // namespace deeplab_fast::cpu::avx2_set
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const InstructionSet& avx2() {
  static const InstructionSet set = {"avx2", has_avx2, true, avx2_set::kSinglePrecision,
                                     avx2_set::kDoublePrecision};
  return set;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const InstructionSet& avx2() {
  static const InstructionSet set = {"avx2", [] { return false; }, true, {}, {}};
  return set;
}

}  // namespace deeplab_fast::cpu

#endif
