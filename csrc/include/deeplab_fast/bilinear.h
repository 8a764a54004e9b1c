// Index arithmetic of torch.nn.functional.interpolate(mode="bilinear"), bit for bit, and its
// inverse. For host and device, without torch.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DEEPLAB_FAST_HOST_DEVICE __host__ __device__
#else
#define DEEPLAB_FAST_HOST_DEVICE
#endif

namespace deeplab_fast {

// One axis of an interpolation. T is float for logits of fp32 and lower, double for double.
template <typename T>
struct Axis {
  int in;
  int out;
  T scale;
  bool align_corners;
};

// The two source indices of an output index and the weight of the second; lo == hi at the end.
template <typename T>
struct Tap {
  int lo;
  int hi;
  T weight;
};

template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline Axis<T> make_axis(int in, int out, bool align_corners) {
  T scale;
  if (align_corners) {
    scale = out > 1 ? static_cast<T>(in - 1) / static_cast<T>(out - 1) : static_cast<T>(0);
  } else {
    scale = static_cast<T>(in) / static_cast<T>(out);
  }
  return {in, out, scale, align_corners};
}

DEEPLAB_FAST_HOST_DEVICE inline float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

DEEPLAB_FAST_HOST_DEVICE inline double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Position of an output pixel on the source axis, not clamped at its end. The multiplication and
// the subtraction are one fused operation, as in PyTorch's compiled kernels.
template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline T source_position(const Axis<T>& axis, int index) {
  if (axis.align_corners) return axis.scale * static_cast<T>(index);
  const T half = static_cast<T>(0.5);
  const T position = fused_multiply_add(axis.scale, static_cast<T>(index) + half, -half);
  return position < static_cast<T>(0) ? static_cast<T>(0) : position;
}

// First source index of an output index.
template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline int source_cell(const Axis<T>& axis, int index) {
  if (axis.in == axis.out) return index;
#if defined(__CUDA_ARCH__)
  const int cell = static_cast<int>(source_position(axis, index));
#else
  // PyTorch's CPU code rounds to float before it takes the floor, for double as well.
  const int cell = static_cast<int>(std::floor(static_cast<float>(source_position(axis, index))));
#endif
  return cell < axis.in - 1 ? cell : axis.in - 1;
}

// The second source index that goes with a first one. An axis that keeps its size has none: 0 times
// a neighbour that is not finite would be nan.
template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline int second_source(const Axis<T>& axis, int lo) {
  return lo < axis.in - 1 && axis.in != axis.out ? lo + 1 : lo;
}

template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline Tap<T> source_tap(const Axis<T>& axis, int index) {
  if (axis.in == axis.out) return {index, index, static_cast<T>(0)};
  const int lo = source_cell(axis, index);
  T weight = source_position(axis, index) - static_cast<T>(lo);
  weight = weight < static_cast<T>(0) ? static_cast<T>(0) : weight;
  weight = weight > static_cast<T>(1) ? static_cast<T>(1) : weight;
  return {lo, second_source(axis, lo), weight};
}

// The smallest output index whose first source index is `cell` or more; axis.out where there is
// none. The outputs of a cell are [first_output(cell), first_output(cell + 1)), empty for some
// cells when the axis shrinks.
template <typename T>
DEEPLAB_FAST_HOST_DEVICE inline int first_output(const Axis<T>& axis, int cell) {
  if (cell <= 0) return 0;
  if (cell >= axis.in) return axis.out;
  if (axis.in == axis.out) return cell;
  int first = axis.out;
  if (axis.scale > static_cast<T>(0)) {
    const T half = static_cast<T>(0.5);
    const T guess = axis.align_corners ? static_cast<T>(cell) / axis.scale
                                       : (static_cast<T>(cell) + half) / axis.scale - half;
    if (guess < static_cast<T>(axis.out)) first = static_cast<int>(guess);
  }
  // source_cell never falls, so that the guess, off by its rounding, is corrected step by step.
  while (first > 0 && source_cell(axis, first - 1) >= cell) --first;
  while (first < axis.out && source_cell(axis, first) < cell) ++first;
  return first;
}

}  // namespace deeplab_fast
