// The upsampling kernels for processors with AVX-512.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "deeplab_fast/upsample_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#include "deeplab_fast/avx512.h"

#pragma GCC push_options
#if !defined(DEEPLAB_FAST_SANITIZE)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define DEEPLAB_FAST_SET avx512_set
#define DEEPLAB_FAST_VECTOR_BYTES 64
#include "deeplab_fast/upsample_cpu_kernels.h"
namespace deeplab_fast::cpu::avx512_set {

constexpr Kernels<float> kSinglePrecision = kernels<float>();
constexpr Kernels<double> kDoublePrecision = kernels<double>();

}  // namespace deeplab_fast::cpu::avx512_set
#pragma GCC pop_options

namespace deeplab_fast::cpu {

const InstructionSet& avx512() {
  static const InstructionSet set = {"avx512", has_avx512, false, avx512_set::kSinglePrecision,
                                     avx512_set::kDoublePrecision};
  return set;
}

}  // namespace deeplab_fast::cpu

#else

namespace deeplab_fast::cpu {

const InstructionSet& avx512() {
  static const InstructionSet set = {"avx512", [] { return false; }, false, {}, {}};
  return set;
}

}  // namespace deeplab_fast::cpu

#endif
