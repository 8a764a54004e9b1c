// What the C++ CPU kernels of depthwise convolutions and of inverted residuals are given.
#pragma once

#include <cstdint>

#include "deeplab_fast/conv_cpu.h"

namespace deeplab_fast::cpu {

// One row of outputs of a depthwise convolution, for epilogue->channels channels. Taps outside the
// map are left out: rows above and below it are not among `rows`, and pixels beside `width` are not
// read.
struct DepthwiseRow {
  const float* const* rows;     // of the input
  const float* const* weights;  // for each of them [taps][weight_stride]
  int64_t num_rows;
  int64_t x_stride;       // between input pixels
  int64_t width;          // input pixels in each of `rows`
  int64_t weight_stride;  // between taps
  int64_t taps;
  int64_t stride;
  int64_t dilation;
  int64_t origin;  // input pixel of the first tap of output 0
  int64_t outputs;
  const Epilogue* epilogue;
  int64_t first_pixel;  // of the epilogue, for output 0
};

struct StripKernels {
  int lanes;  // of a vector
  void (*depthwise)(const DepthwiseRow&);
  // As ConvKernels::multiply for products with an epilogue and without accumulation, whose depth is
  // small. Vectors of a panel beyond the epilogue's channels are not multiplied.
  void (*multiply)(const Product&);
  // sums[c] = the sum of x[pixel * stride + c] over pixels.
  void (*add_pixels)(const float* x, int64_t stride, int64_t pixels, int64_t channels, float* sums);
};

const StripKernels& strips_baseline();
const StripKernels& strips_avx2();
const StripKernels& strips_avx512();

}  // namespace deeplab_fast::cpu
