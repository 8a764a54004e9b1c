// What the C++ CPU kernels of depthwise convolutions are given, and which build of them runs.
#pragma once

#include <cstdint>

namespace deeplab_fast::cpu {

// Channels that are taken at once: a cache line. Lines of packed rows are that far apart.
constexpr int kDepthwiseBlock = 16;
constexpr int kMaxDepthwiseKernel = 7;
// Pixels that kernels may read behind a packed row, without any effect.
constexpr int kDepthwiseSlack = 16;

// Packed rows of a map, each with the weights [taps][kDepthwiseBlock] that it is multiplied by.
struct DepthwiseRows {
  int count;
  const float* pixels[kMaxDepthwiseKernel];
  const float* weights[kMaxDepthwiseKernel];
};

struct DepthwiseKernels {
  const char* name;
  bool (*supported)();
  // Packs `pixels` pixels `stride` floats apart; channels that are missing become 0.
  // spoilt [kDepthwiseBlock] gets nan where a channel is not finite; may be null.
  void (*pack)(const float* from, int64_t stride, int64_t pixels, int channels, float* to,
               float* spoilt);
  // to[p] = sum over rows and taps t of weights[t] * row[p + t * step], with `step` in pixels.
  void (*correlate)(const DepthwiseRows& rows, int taps, int64_t step, int64_t pixels, int channels,
                    float* to, int64_t stride);
  // sums [taps][kDepthwiseBlock], sums[t] += sum over p of a[p] * b[p + t * step].
  void (*dot)(const float* a, const float* b, int taps, int64_t step, int64_t pixels, float* sums);
};

const DepthwiseKernels& depthwise_baseline();
const DepthwiseKernels& depthwise_avx2();
const DepthwiseKernels& depthwise_avx512();

}  // namespace deeplab_fast::cpu
