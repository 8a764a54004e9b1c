// Maps between fp32 and 8 bits: q = clamp(round(x / scale) + zero_point, 0, 255).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DEEPLAB_FAST_AVX2 1
#include <immintrin.h>
#endif

namespace deeplab_fast::cpu {
namespace {

using at::Tensor;

// Of a task of one thread.
constexpr int64_t kTaskElements = 32 * 1024;

struct Affine {
  float scale;
  float zero_point;
};

// Whether all values are finite: the exponent of infinity and NaN has all its bits set.
bool quantise_baseline(const float* x, uint8_t* q, int64_t count, Affine affine) {
  const float inverse = 1.0f / affine.scale;
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
    const float y = std::nearbyint(x[i] * inverse) + affine.zero_point;
    q[i] = static_cast<uint8_t>(y > 0.0f ? std::min(y, 255.0f) : 0.0f);
  }
  return largest < 0x7f800000u;
}

void dequantise_baseline(const uint8_t* q, float* x, int64_t count, Affine affine) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = (static_cast<float>(q[i]) - affine.zero_point) * affine.scale;
  }
}

#ifdef DEEPLAB_FAST_AVX2

#pragma GCC push_options
#pragma GCC target("avx2,fma")

bool quantise_avx2(const float* x, uint8_t* q, int64_t count, Affine affine) {
  const __m256 inverse = _mm256_set1_ps(1.0f / affine.scale);
  const __m256 zero_point = _mm256_set1_ps(affine.zero_point);
  const __m256 top = _mm256_set1_ps(255.0f);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  // What the packs, which work on halves, put out of order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i parts[4];
    for (int part = 0; part < 4; ++part) {
      const __m256 values = _mm256_loadu_ps(x + i + 8 * part);
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
      __m256 y = _mm256_round_ps(_mm256_mul_ps(values, inverse),
                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      y = _mm256_add_ps(y, zero_point);
      y = _mm256_min_ps(_mm256_max_ps(y, _mm256_setzero_ps()), top);
      parts[part] = _mm256_cvtps_epi32(y);
    }
    const __m256i low = _mm256_packs_epi32(parts[0], parts[1]);
    const __m256i high = _mm256_packs_epi32(parts[2], parts[3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), bytes);
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  const bool finite = *std::max_element(lanes, lanes + 8) < 0x7f800000u;
  return quantise_baseline(x + i, q + i, count - i, affine) && finite;
}

void dequantise_avx2(const uint8_t* q, float* x, int64_t count, Affine affine) {
  const __m256 scale = _mm256_set1_ps(affine.scale);
  const __m256 zero_point = _mm256_set1_ps(affine.zero_point);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i));
    const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_sub_ps(values, zero_point), scale));
  }
  dequantise_baseline(q + i, x + i, count - i, affine);
}

#pragma GCC pop_options

#endif

struct Kernels {
  bool (*quantise)(const float*, uint8_t*, int64_t, Affine);
  void (*dequantise)(const uint8_t*, float*, int64_t, Affine);
};

Kernels kernels() {
#ifdef DEEPLAB_FAST_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {quantise_avx2, dequantise_avx2};
  }
#endif
  return {quantise_baseline, dequantise_baseline};
}

void check(const char* op, const Tensor& map, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.scalar_type() == dtype &&
                        map.is_contiguous(at::MemoryFormat::ChannelsLast),
                    op, ": maps must be ", dtype, " [N, C, H, W] in channels_last");
}

}  // namespace

bool quantise(const Tensor& x, const Tensor& out, int64_t channel_offset, double scale,
              int64_t zero_point) {
  check("_quantise_cpu", x, at::kFloat);
  check("_quantise_cpu", out, at::kByte);
  const int64_t channels = x.size(1), stride = out.size(1);
  TORCH_CHECK_VALUE(x.size(0) == out.size(0) && x.size(2) == out.size(2) &&
                        x.size(3) == out.size(3) && channel_offset >= 0 &&
                        channel_offset <= stride - channels,
                    "_quantise_cpu: out has shape ", out.sizes(), ", which does not hold channels ",
                    channel_offset, ", ", channels, " of them, of x ", x.sizes());
  if (x.numel() == 0) return true;
  const Affine affine = {static_cast<float>(scale), static_cast<float>(zero_point)};
  const auto run = kernels().quantise;
  const float* from = x.const_data_ptr<float>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>() + channel_offset;
  // Whole maps are one row.
  const int64_t row = stride == channels ? std::min(x.numel(), kTaskElements) : channels;
  const int64_t pitch = stride == channels ? row : stride;
  const int64_t rows = (x.numel() + row - 1) / row;
  std::atomic<bool> finite{true};
  at::parallel_for(0, rows, std::max<int64_t>(1, kTaskElements / row), [&](int64_t a, int64_t b) {
    bool all = true;
    for (int64_t i = a; i < b; ++i) {
      const int64_t count = std::min(row, x.numel() - i * row);
      all &= run(from + i * row, to + i * pitch, count, affine);
    }
    if (!all) finite = false;
  });
  return finite;
}

void dequantise(const Tensor& x, const Tensor& out, double scale, int64_t zero_point) {
  check("_dequantise_cpu", x, at::kByte);
  check("_dequantise_cpu", out, at::kFloat);
  TORCH_CHECK_VALUE(x.sizes() == out.sizes(), "_dequantise_cpu: out has shape ", out.sizes(),
                    ", expected ", x.sizes());
  const Affine affine = {static_cast<float>(scale), static_cast<float>(zero_point)};
  const auto run = kernels().dequantise;
  const uint8_t* from = x.const_data_ptr<uint8_t>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
    run(from + begin, to + begin, end - begin, affine);
  });
}

}  // namespace deeplab_fast::cpu
