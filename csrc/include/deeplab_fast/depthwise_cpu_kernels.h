// The C++ CPU kernels of depthwise convolutions, in one instruction set.
//
// Included once by each csrc/cpu/depthwise_<set>.cpp, in the way and under the rules of
// upsample_cpu_kernels.h. The file defines DEEPLAB_FAST_SET (a namespace) and
// DEEPLAB_FAST_VECTOR_BYTES.
//
// Vectors hold channels.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

typedef float Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));

constexpr int kBlock = kDepthwiseBlock;
constexpr int kLanes = DEEPLAB_FAST_VECTOR_BYTES / sizeof(float);
// Vectors of a block that are in registers at once, and how often that makes a block.
constexpr int kVectors = kBlock / kLanes < 2 ? 1 : 2;
constexpr int kGroup = kVectors * kLanes;
// Sums in registers: 12 hide the latency of their additions and leave room for two factors.
constexpr int kSums = 12;
constexpr int kPixels = kSums / kVectors;
static_assert(kPixels <= kDepthwiseSlack);
// Products that are summed up before sums are added to others, for their roundings' sake.
constexpr int64_t kRun = 256;

#define DEEPLAB_FAST_INLINE inline __attribute__((always_inline))

DEEPLAB_FAST_INLINE Vector load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

DEEPLAB_FAST_INLINE void store(float* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

void pack(const float* from, int64_t stride, int64_t pixels, int channels, float* to,
          float* spoilt) {
  if (channels < kBlock) {
    for (int64_t p = 0; p < pixels; ++p, from += stride, to += kBlock) {
      for (int c = 0; c < kBlock; ++c) to[c] = c < channels ? from[c] : 0.0f;
      // Zero times what is not finite is nan.
      for (int c = 0; spoilt != nullptr && c < kBlock; ++c) spoilt[c] += 0.0f * to[c];
    }
    return;
  }
  Vector found[kBlock / kLanes] = {};
  for (int64_t p = 0; p < pixels; ++p, from += stride, to += kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlock / kLanes; ++v) {
      const Vector x = load(from + v * kLanes);
      store(to + v * kLanes, x);
      found[v] += 0.0f * x;
    }
  }
  if (spoilt == nullptr) return;
  for (int v = 0; v < kBlock / kLanes; ++v) {
    store(spoilt + v * kLanes, load(spoilt + v * kLanes) + found[v]);
  }
}

void correlate(const DepthwiseRows& rows, int taps, int64_t step, int64_t pixels, int channels,
               float* to, int64_t stride) {
  step *= kBlock;
  for (int64_t p = 0; p < pixels; p += kPixels) {
    const int64_t left = pixels - p < kPixels ? pixels - p : kPixels;
    const bool whole = left == kPixels && channels == kBlock;
    float rest[kPixels * kBlock];
    float* const out = whole ? to + p * stride : rest;
    const int64_t out_stride = whole ? stride : kBlock;
    for (int first = 0; first < kBlock; first += kGroup) {
      Vector sum[kPixels][kVectors] = {};
      for (int r = 0; r < rows.count; ++r) {
        const float* x = rows.pixels[r] + p * kBlock + first;
        const float* w = rows.weights[r] + first;
        for (int t = 0; t < taps; ++t, x += step, w += kBlock) {
          Vector factor[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) factor[v] = load(w + v * kLanes);
#pragma GCC unroll 12
          for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              sum[i][v] += factor[v] * load(x + i * kBlock + v * kLanes);
            }
          }
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          store(out + i * out_stride + first + v * kLanes, sum[i][v]);
        }
      }
    }
    if (whole) continue;
    for (int64_t i = 0; i < left; ++i) {
      __builtin_memcpy(to + (p + i) * stride, rest + i * kBlock, channels * sizeof(float));
    }
  }
}

template <int kTaps>
void dot_taps(const float* a, const float* b, int64_t step, int64_t pixels, float* sums) {
  // Pixels with sums of their own, of which few taps would have too few.
  constexpr int kApart = kTaps * kVectors * 2 <= kSums ? kSums / (kTaps * kVectors) : 1;
  Vector sum[kApart][kTaps][kVectors] = {};
  int64_t p = 0;
  for (; p + kApart <= pixels; p += kApart, a += kApart * kBlock, b += kApart * kBlock) {
#pragma GCC unroll 12
    for (int i = 0; i < kApart; ++i) {
      Vector factor[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) factor[v] = load(a + i * kBlock + v * kLanes);
#pragma GCC unroll 7
      for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sum[i][t][v] += factor[v] * load(b + t * step + i * kBlock + v * kLanes);
        }
      }
    }
  }
  for (; p < pixels; ++p, a += kBlock, b += kBlock) {
#pragma GCC unroll 7
    for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sum[0][t][v] += load(a + v * kLanes) * load(b + t * step + v * kLanes);
      }
    }
  }
#pragma GCC unroll 7
  for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const to = sums + t * kBlock + v * kLanes;
      Vector all = sum[0][t][v];
#pragma GCC unroll 12
      for (int i = 1; i < kApart; ++i) all += sum[i][t][v];
      store(to, load(to) + all);
    }
  }
}

void dot(const float* a, const float* b, int taps, int64_t step, int64_t pixels, float* sums) {
  constexpr void (*functions[])(const float*, const float*, int64_t, int64_t, float*) = {
      dot_taps<1>, dot_taps<2>, dot_taps<3>, dot_taps<4>, dot_taps<5>, dot_taps<6>, dot_taps<7>};
  static_assert(sizeof(functions) / sizeof(functions[0]) == kMaxDepthwiseKernel);
  for (int64_t p = 0; p < pixels; p += kRun) {
    const int64_t count = pixels - p < kRun ? pixels - p : kRun;
    for (int first = 0; first < kBlock; first += kGroup) {
      const int64_t place = p * kBlock + first;
      functions[taps - 1](a + place, b + place, step * kBlock, count, sums + first);
    }
  }
}

constexpr DepthwiseKernels depthwise_kernels(const char* name, bool (*supported)()) {
  return {name, supported, pack, correlate, dot};
}

#undef DEEPLAB_FAST_INLINE

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
