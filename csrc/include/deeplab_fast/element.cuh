// Elements of maps as kernels read, convert and write them. Without torch.
//
// Tests replace the functions by host code of the same meaning
// (tests/aot/cuda_on_host/elements_on_host.h).
#pragma once

#include <cstdint>

namespace deeplab_fast::cuda {

// Types of 16-bit elements. They are stored as uint16_t.
struct Half {};
struct Bfloat16 {};

struct alignas(16) Vector {
  uint32_t word[4];
};

}  // namespace deeplab_fast::cuda

#if defined(__CUDACC__)

#include <type_traits>

namespace deeplab_fast::cuda::ptx {

// Of memory that nothing writes while the kernel runs.
template <typename V>
__device__ inline V read_only(const V* p) {
  return __ldg(p);
}

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Both rounded to nearest even; `low` goes to the lower half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <typename T>
__device__ inline float unpack(uint16_t element) {
  if constexpr (std::is_same_v<T, Half>) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element));
    return value;
  } else {
    return __uint_as_float(static_cast<uint32_t>(element) << 16);
  }
}

}  // namespace deeplab_fast::cuda::ptx

#endif  // __CUDACC__
