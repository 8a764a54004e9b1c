// The functions of deeplab_fast/element.cuh on the host, bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "deeplab_fast/element.cuh"

namespace cuda_on_host {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Of a 16-bit floating-point number with so many bits of exponent and fraction.
template <int kExponent, int kFraction>
float widen(uint16_t element) {
  const uint32_t sign = static_cast<uint32_t>(element >> 15) << 31;
  const uint32_t exponent = element >> kFraction & ((1u << kExponent) - 1);
  const uint32_t fraction = element & ((1u << kFraction) - 1);
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  if (exponent == (1u << kExponent) - 1) {
    return float_of(sign | 0x7f800000u | fraction << (23 - kFraction));
  }
  const float scaled = exponent == 0
                           ? std::ldexp(static_cast<float>(fraction), 1 - kBias - kFraction)
                           : std::ldexp(static_cast<float>(fraction | 1u << kFraction),
                                        static_cast<int>(exponent) - kBias - kFraction);
  return sign ? -scaled : scaled;
}

// Rounded to nearest even.
template <int kExponent, int kFraction>
uint16_t narrow(float value) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kInfinite = ((1u << kExponent) - 1) << kFraction;
  const uint32_t sign = bits_of(value) >> 31 << 15;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | kInfinite | 1u << (kFraction - 1));
  int exponent = 0;
  const float magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | kInfinite);
  std::frexp(magnitude, &exponent);
  // In units of the last place.
  const int unit = std::max(exponent - 1, 1 - kBias) - kFraction;
  const auto whole = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  if (whole == 0) return static_cast<uint16_t>(sign);
  const uint32_t field = static_cast<uint32_t>(unit + kFraction + kBias - 1);
  // A carry out of the fraction raises the exponent by itself.
  const uint32_t encoded = whole >> kFraction ? (field << kFraction) + whole : whole;
  return static_cast<uint16_t>(sign | std::min(encoded, kInfinite));
}

// Conversions of elements of type T, by a table.
template <typename T>
struct Element;

template <>
struct Element<deeplab_fast::cuda::Half> {
  static float widen(uint16_t element) {
    static const std::vector<float> table = [] {
      std::vector<float> made(65536);
      for (int i = 0; i < 65536; ++i) {
        made[i] = cuda_on_host::widen<5, 10>(static_cast<uint16_t>(i));
      }
      return made;
    }();
    return table[element];
  }
  static uint16_t narrow(float value) { return cuda_on_host::narrow<5, 10>(value); }
};

template <>
struct Element<deeplab_fast::cuda::Bfloat16> {
  static float widen(uint16_t element) { return float_of(static_cast<uint32_t>(element) << 16); }
  static uint16_t narrow(float value) { return cuda_on_host::narrow<8, 7>(value); }
};

}  // namespace cuda_on_host

namespace deeplab_fast::cuda::ptx {

template <typename V>
V read_only(const V* p) {
  return *p;
}

inline uint32_t bits_of(float value) { return cuda_on_host::bits_of(value); }
inline float float_of(uint32_t bits) { return cuda_on_host::float_of(bits); }

template <typename T>
uint32_t pack(float low, float high) {
  return cuda_on_host::Element<T>::narrow(low) |
         static_cast<uint32_t>(cuda_on_host::Element<T>::narrow(high)) << 16;
}

template <typename T>
float unpack(uint16_t element) {
  return cuda_on_host::Element<T>::widen(element);
}

}  // namespace deeplab_fast::cuda::ptx
