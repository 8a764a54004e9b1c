// Maxima over windows of maps in channels_last, without the indices that PyTorch's gives too.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "conv_checks.h"

namespace deeplab_fast::cpu {
namespace {

using at::Tensor;

// Of a task of one thread.
constexpr int64_t kTaskElements = 32 * 1024;

inline float as_float(float value) { return value; }

// bfloat16 is the upper half of a float.
inline float as_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

struct Axis {
  int64_t size, outputs, kernel, stride, padding, dilation;

  int64_t place(int64_t output, int64_t tap) const {
    return output * stride - padding + tap * dilation;
  }
  // Taps [first, end) of an output are inside the map.
  int64_t first(int64_t output) const {
    return std::max<int64_t>(0, (padding - output * stride + dilation - 1) / dilation);
  }
  int64_t end(int64_t output) const {
    const int64_t behind = size - 1 + padding - output * stride;
    return behind < 0 ? 0 : std::min(kernel, behind / dilation + 1);
  }
};

template <typename T>
void max_pool_row(const T* image, int64_t y, const Axis& rows, const Axis& columns,
                  int64_t channels, T least, T* out) {
  const int64_t top = rows.first(y), bottom = rows.end(y);
  for (int64_t x = 0; x < columns.outputs; ++x, out += channels) {
    std::fill_n(out, channels, least);
    const int64_t left = columns.first(x), right = columns.end(x);
    for (int64_t i = top; i < bottom; ++i) {
      const int64_t row = rows.place(y, i);
      for (int64_t j = left; j < right; ++j) {
        const int64_t column = columns.place(x, j);
        const T* const from = image + (row * columns.size + column) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const float value = as_float(from[c]);
          // A NaN that came stays: nothing is larger.
          out[c] = value > as_float(out[c]) || value != value ? from[c] : out[c];
        }
      }
    }
  }
}

template <typename T>
void max_pool_map(const T* from, int64_t images, const Axis& rows, const Axis& columns,
                  int64_t channels, T least, T* to) {
  const int64_t width = columns.outputs * channels;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  at::parallel_for(0, images * rows.outputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const image = from + i / rows.outputs * rows.size * columns.size * channels;
      max_pool_row(image, i % rows.outputs, rows, columns, channels, least, to + i * width);
    }
  });
}

}  // namespace

// out [N, C, H', W'] = maxima over the windows of x [N, C, H, W], both float32 or bfloat16 in
// channels_last; (rows, columns) of each option. NaN wins. H' and W' are out's, whose windows may
// reach beyond the map.
void max_pool(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
              at::IntArrayRef padding, at::IntArrayRef dilation, const Tensor& out) {
  constexpr auto layout = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK_VALUE((x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
                        x.dim() == 4 && x.is_contiguous(layout),
                    "x must be a float32 or bfloat16 map [N, C, H, W] in channels_last, got ",
                    x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
  TORCH_CHECK_VALUE(out.scalar_type() == x.scalar_type() && out.dim() == 4 &&
                        out.is_contiguous(layout) && out.size(0) == x.size(0) &&
                        out.size(1) == x.size(1),
                    "out ", out.sizes(), " of ", out.scalar_type(), " does not fit x ", x.sizes());
  check_options("kernel", kernel, 1);
  check_options("stride", stride, 1);
  check_options("padding", padding, 0);
  check_options("dilation", dilation, 1);
  check_options("sizes of out", {out.size(2), out.size(3)}, 0);
  const auto axis = [&](int i) {
    return Axis{x.size(2 + i), out.size(2 + i), kernel[i], stride[i], padding[i], dilation[i]};
  };
  const Axis rows = axis(0), columns = axis(1);
  if (x.scalar_type() == at::kFloat) {
    max_pool_map(x.const_data_ptr<float>(), x.size(0), rows, columns, x.size(1),
                 -std::numeric_limits<float>::infinity(), out.mutable_data_ptr<float>());
    return;
  }
  constexpr uint16_t kMinusInfinity = 0xff80;
  max_pool_map(static_cast<const uint16_t*>(x.const_data_ptr()), x.size(0), rows, columns,
               x.size(1), kMinusInfinity, static_cast<uint16_t*>(out.mutable_data_ptr()));
}

}  // namespace deeplab_fast::cpu
