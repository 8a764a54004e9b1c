// Which processors take the kernels for AVX-512.
//
// With DEEPLAB_FAST_SANITIZE these are compiled for the instructions that the compiler takes for
// granted, so that their vectors of 64 bytes run, and are looked at, anywhere.
#pragma once

namespace deeplab_fast::cpu {

inline bool has_avx512() {
#if defined(DEEPLAB_FAST_SANITIZE)
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}

inline bool has_avx512_bf16() {
#if defined(DEEPLAB_FAST_SANITIZE)
  return true;
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}

}  // namespace deeplab_fast::cpu
