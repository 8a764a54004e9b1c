// What the C++ CPU convolution kernels are given, and which build of them runs.
#pragma once

#include <cstdint>

#include "deeplab_fast/conv_forms.h"

namespace deeplab_fast::cpu {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// Channels in a panel of prepared weights [products][panels][input channels][kPanel], and the unit
// in which transforms walk channels: a cache line of floats. Factors of bf16 lie in pairs of input
// channels, [products][panels][pairs][kPanel][2], an odd last channel beside zeros.
constexpr int kPanel = 16;
// Input channels that are transformed and multiplied at a time: their panel of weights fills half
// of a first-level cache.
constexpr int kMaxChunk = 256;
// Added to the rows of buffers: a power of two between rows puts them into one set of a cache.
constexpr int kRowPad = 16;

// Channels that a transform takes at a time, so that its lines between rows and columns stay in a
// first-level cache.
constexpr int kStrip = 64;

// Factors that are multiplied and summed at a time, a word of four bytes.
template <typename Factor>
constexpr int kPerWord = sizeof(float) / sizeof(Factor);

// Factors in a panel of so many input channels.
template <typename Factor>
constexpr int64_t panel_size(int64_t channels) {
  return (channels + kPerWord<Factor> - 1) / kPerWord<Factor> * kPerWord<Factor> * kPanel;
}

constexpr int64_t padded(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel; }

// y = act(product + shift + residual), act clamping to [low, high] or, for hardswish,
// v * clamp(v + 3, 0, 6) / 6. Computed in fp32, and rounded once to what maps are stored as.
template <typename Value>
struct EpilogueOf {
  const float* shift;       // [channels]
  const Value* residual;    // null for none
  int64_t residual_stride;  // between pixels
  Value* out;               // the first of the output channels
  int64_t out_stride;       // between pixels
  int64_t channels;
  float low;
  float high;
  bool hardswish;
};

using Epilogue = EpilogueOf<float>;

// The transforms of one form, along rows or columns of a tile, for `count` channels from `channel`,
// a multiple of kPanel up to kStrip: those that read and write maps.
template <typename Value>
struct MapKernels {
  // to [products][columns][kStrip]; pixels [inputs][columns] point to channel 0.
  void (*input_rows)(const Value* const* pixels, int64_t channel, int count, int columns,
                     float* to);
  // from [rows][products][kStrip]; pixels [rows][outputs], negative for none.
  void (*output_columns)(const float* from, int rows, const int64_t* pixels, int64_t channel,
                         int count, const EpilogueOf<Value>& epilogue);
};

// Those that write what is multiplied.
template <typename Factor>
struct FactorKernels {
  // from [rows][inputs][kStrip] to row r * products + p at to + (r * products + p) * stride.
  void (*input_columns)(const float* from, int count, int rows, Factor* to, int64_t stride);
};

struct FormKernels : MapKernels<float>,
                     MapKernels<BFloat16>,
                     FactorKernels<float>,
                     FactorKernels<BFloat16> {
  // from + (p * columns + q) * stride to [outputs][columns][kStrip].
  void (*output_rows)(const float* from, int64_t stride, int count, int columns, float* to);
};

// c [rows][columns] = a [rows][depth] times panels, or c += it, in fp32. What follows the panels is
// prefetched, being multiplied next as a rule. Only the last depth of a map may be no multiple of
// kPerWord.
//
// Products of bf16 are exact. How the two of a pair are added to a sum depends on the instruction
// set: vdpbf16ps takes denormals for zero and rounds in its own way, others round after each; two
// roundings for a pair bound both.
template <typename Factor>
struct ProductOf {
  const Factor* a;
  int64_t a_stride;
  int64_t rows;
  const Factor* panels;
  int64_t panel_stride;
  int64_t num_panels;
  float* c;
  int64_t c_stride;
  int64_t depth;
  bool accumulate;
  // Whether the rows of a that are multiplied next are prefetched.
  bool prefetch_rows;
  // Additions to one sum in a row; the sums of such runs are added up.
  int64_t run;
  // Not null: the sums go through it to the pixels from first_pixel on, and not to c.
  const EpilogueOf<Factor>* epilogue;
  int64_t first_pixel;
};

using Product = ProductOf<float>;

struct ConvKernels {
  const char* name;
  bool (*supported)();
  FormKernels forms[kNumForms];
  void (*multiply)(const Product&);
  // weights [outputs][channels][3][3] -> panel `panel` of each product of the two forms: channels
  // [kPanel] floats at to + product * stride; output channels beyond the last are 0.
  void (*prepare)(const float* weights, int64_t outputs, int64_t channels, int64_t panel,
                  const Form& rows, const Form& columns, float* to, int64_t stride);
  // Null, as is what is of bf16 in the forms, in a set that leaves bf16 to others.
  void (*multiply_bf16)(const ProductOf<BFloat16>&);
};

inline void multiply(const ConvKernels& kernels, const Product& product) {
  kernels.multiply(product);
}

inline void multiply(const ConvKernels& kernels, const ProductOf<BFloat16>& product) {
  kernels.multiply_bf16(product);
}

const ConvKernels& conv_baseline();
const ConvKernels& conv_avx2();
const ConvKernels& conv_avx512();
const ConvKernels& conv_avx512_bf16();

}  // namespace deeplab_fast::cpu
