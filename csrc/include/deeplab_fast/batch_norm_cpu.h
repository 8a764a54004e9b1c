// What the C++ CPU batch norm kernels are given, how a map is cut for them, and which build of them
// runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace deeplab_fast::cpu {

enum class Activation { kNone, kRelu, kRelu6, kHardswish };

// Rows one behind another in a dense map [pixels][channels]. A row is `pixels` pixels, so that maps
// of few channels fill vectors as well.
struct Piece {
  int64_t first;  // of all values of the map
  int64_t rows;
  int64_t pixels;
  int64_t channels;

  int64_t width() const { return pixels * channels; }
};

// The shortest full row in values, and the longest vector: vectors per channel are repeated up to
// it, so that kernels may read that many values of them.
constexpr int64_t kMinWidth = 64;
// Values that are summed up before sums are combined in double. Fixed, and not a share of a thread,
// so that results do not depend on the number of threads; below it a thread does not pay.
constexpr int64_t kUnitValues = 1 << 16;
// Units of a large map: more processors than that do not make memory faster.
constexpr int64_t kMaxUnits = 64;

// A map cut into rows and these into units of the same size. The pixels behind the last full row
// are a piece of their own.
struct MapCut {
  int64_t channels;
  int64_t packed;  // pixels in a row
  int64_t rows;
  int64_t rest;  // pixels
  int64_t unit_rows;
  int64_t units;  // without the rest

  MapCut(int64_t pixels, int64_t num_channels) : channels(num_channels) {
    const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // Where the row has a multiple of 16 values, no vector of it is cut off.
    const int64_t whole = 16 / std::gcd(channels, int64_t{16});
    packed = channels < kMinWidth ? whole * divide_up(kMinWidth, whole * channels) : 1;
    rows = pixels / packed;
    rest = pixels % packed;
    units = divide_up(rows * width(), kUnitValues);
    // Even shares for 2, 4 or 8 threads.
    if (units > 8) units = std::min(kMaxUnits, divide_up(units, 8) * 8);
    unit_rows = units == 0 ? 0 : divide_up(rows, units);
    if (units != 0) units = divide_up(rows, unit_rows);
  }

  int64_t width() const { return packed * channels; }
  int64_t pieces() const { return units + (rest != 0); }
  Piece unit(int64_t i) const {
    return i == units ? last() : some(i * unit_rows, std::min(rows, (i + 1) * unit_rows));
  }
  Piece some(int64_t row_begin, int64_t row_end) const {
    return {row_begin * width(), row_end - row_begin, packed, channels};
  }
  Piece last() const { return {rows * width(), 1, rest, channels}; }
};

// Vectors hold a value for each value of a full row, and at least kMinWidth.
template <typename T>
struct Forward {
  const T* x;
  const T* mean;
  const T* scale;  // rstd * weight
  const T* bias;
  const T* residual;  // null for none
  T* y;
  Activation act;
};

template <typename T>
struct Backward {
  const T* grad;
  const T* x;
  const T* out;  // null: computed from x again
  const T* mean;
  const T* scale;
  const T* bias;
  const T* mean_grad;  // null where mean and rstd are constants
  const T* slope;      // rstd * mean_grad_xhat
  T* dx;
  T* d_residual;  // null where it is not asked for
  Activation act;
};

// Scratch values that a kernel needs for rows of this width.
constexpr int64_t batch_norm_scratch(int64_t width) { return 3 * (width + kMinWidth); }

template <typename T>
struct BatchNormFunctions {
  // to [2][channels]: mean and sum of squared differences from it.
  void (*stats)(const T* x, const Piece&, T* scratch, double* to);
  void (*bn_act)(const Forward<T>&, const Piece&);
  // to [2][channels]: sum of g and of g * (x - mean).
  void (*reduce)(const Backward<T>&, const Piece&, T* scratch, double* to);
  void (*backward)(const Backward<T>&, const Piece&);
  // The channels [begin, end) from what `stats` gave for each piece, [pieces][2][channels].
  void (*combine_stats)(const double* parts, const double* counts, int64_t pieces, int64_t channels,
                        int64_t begin, int64_t end, T* mean, T* variance);
  // The same for `reduce`; rstd [channels].
  void (*combine_sums)(const double* parts, int64_t pieces, int64_t channels, int64_t begin,
                       int64_t end, const T* rstd, T* sum, T* sum_xhat);
};

struct BatchNormKernels {
  const char* name;
  bool (*supported)();
  BatchNormFunctions<float> single_precision;
  BatchNormFunctions<double> double_precision;
};

const BatchNormKernels& batch_norm_baseline();
const BatchNormKernels& batch_norm_avx2();
const BatchNormKernels& batch_norm_avx512();

}  // namespace deeplab_fast::cpu
