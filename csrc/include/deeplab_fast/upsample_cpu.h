// What the C++ CPU kernels of the upsampling ops are given, and which build of them runs.
#pragma once

#include <cstdint>

namespace deeplab_fast::cpu {

// Output rows [row_begin, row_end) between the source rows `source_row` and `source_row` + 1. They
// share their interpolation along columns. A band has at most kBandRows rows, so that it does not
// depend on the number of threads what is summed before what.
struct Band {
  int source_row;
  int row_begin;
  int row_end;
};

constexpr int kBandRows = 32;
// Elements behind the end of `Problem::source` that kernels may read and do not use.
constexpr int kSourceSlack = 64;

enum class LabelType { kUint8, kInt32, kInt64 };

// Upsampling of `source` [images][height][classes][width] to [out_height][out_width].
//
// Output columns are cut into `blocks` vectors of `lanes` columns; the last is filled up with
// copies of the last column. The sources of block b are the `count[b]` columns from `base[b]`; `lo`
// and `hi` are relative to the base.
template <typename T>
struct Problem {
  const T* source;
  int images;
  int classes;
  int height;
  int width;
  int out_height;
  int out_width;
  bool finite;  // no value of `source` is infinite or nan
  const Band* bands;
  int num_bands;
  const T* row_weights;  // [out_height], of the second source row
  int blocks;
  const int32_t* base;
  const int32_t* count;
  const int32_t* lo;        // [blocks * lanes]
  const int32_t* hi;        // [blocks * lanes]
  const T* column_weights;  // [blocks * lanes], of `hi`
};

struct Labels {
  const void* data;  // [images, out_height, out_width]
  LabelType type;
  int64_t ignore_index;
};

// Of the labels of one unit. A bad label is neither ignore_index nor a class; it counts as ignored.
struct LabelCounts {
  int64_t valid;
  int64_t bad;
  int64_t first_bad;  // linear index into the labels, where there is one
};

template <typename T>
struct ArgmaxResult {
  uint8_t* narrow;  // labels up to 256 classes
  int64_t* wide;    // labels beyond
  T* prob;          // null where it is not asked for
};

template <typename T>
struct CrossEntropy {
  Labels labels;
  LabelCounts* counts;     // [units]
  const T* class_weights;  // [classes], null for ones
  T weight_sum;            // sum of class_weights
  T smoothing;
  const T* pixel_grad;  // [images, out_height, out_width], null for ones
  T* pixel_loss;        // the same shape, null where only the sums are needed
  double* loss;         // [units]
  double* weight;       // [units], sums of the labels' weights
  T* partial;           // [units][2][classes][width], null where no gradient is needed
};

struct Confusion {
  Labels labels;
  LabelCounts* counts;  // [units]
  int64_t* matrix;      // [classes][classes]
};

struct Accumulator {
  void* data;  // [images, classes, out_height, out_width]
  bool is_double;
  int64_t stride_image;
  int64_t stride_class;
  int64_t stride_row;
  int64_t stride_column;
};

// The kernels in one instruction set. Units of work are (image, band), unit = image * num_bands +
// band; each function does the units [begin, end).
template <typename T>
struct Kernels {
  int lanes;
  void (*argmax)(const Problem<T>&, const ArgmaxResult<T>&, int64_t begin, int64_t end);
  void (*cross_entropy)(const Problem<T>&, const CrossEntropy<T>&, int64_t begin, int64_t end);
  void (*confusion)(const Problem<T>&, const Confusion&, int64_t begin, int64_t end);
  void (*softmax_add)(const Problem<T>&, const Accumulator&, int64_t begin, int64_t end);
  void (*exp)(const T* values, T* result, int64_t count);  // of values <= 0
  void (*log)(const T* values, T* result, int64_t count);  // of values >= 1
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  // Taken without being asked for. Off for a set that was never measured to be the fastest.
  bool automatic;
  Kernels<float> single_precision;
  Kernels<double> double_precision;
};

const InstructionSet& baseline();
const InstructionSet& avx2();
const InstructionSet& avx512();

}  // namespace deeplab_fast::cpu
