// The gradients of depthwise convolutions on CPU tensors: checks, threads, memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <tuple>

#include "conv_checks.h"
#include "deeplab_fast/depthwise_cpu.h"

namespace deeplab_fast::cpu {

namespace {

constexpr int64_t kBlock = kDepthwiseBlock;

const DepthwiseKernels& current_depthwise_kernels() {
  const std::string_view name = current_set_name(kConvolutions);
  for (const DepthwiseKernels* kernels : {&depthwise_avx512(), &depthwise_avx2()}) {
    if (name == kernels->name) return *kernels;
  }
  return depthwise_baseline();
}

// One axis: output q is multiplied by tap t with input q + offset(t).
struct Axis {
  int64_t in, out, kernel, padding, dilation;
  // Taps that meet the map for some output: first, ..., last - 1.
  int64_t first, last;

  Axis(int64_t inputs, int64_t outputs, int64_t kernel_size, int64_t padded, int64_t dilated)
      : in(inputs), out(outputs), kernel(kernel_size), padding(padded), dilation(dilated) {
    first = 0;
    while (first < kernel && offset(first) <= -out) ++first;
    last = kernel;
    while (last > first && offset(last - 1) >= in) --last;
  }

  int64_t offset(int64_t tap) const { return tap * dilation - padding; }
  int64_t taps() const { return last - first; }
  int64_t first_offset() const { return offset(first); }
  int64_t last_offset() const { return offset(last - 1); }
  // Rows from that of the first tap to that of the last one.
  int64_t reach() const { return taps() == 0 ? 1 : (taps() - 1) * dilation + 1; }
};

// The last rows of one block of channels of a map, packed, with zeros beside them.
struct Ring {
  float* data;
  int64_t rows, left, width;

  Ring(int64_t num_rows, int64_t margin, int64_t end)
      : data(nullptr), rows(num_rows), left(margin), width(margin + end + kDepthwiseSlack) {}

  int64_t floats() const { return rows * width * kBlock; }
  float* pixel(int64_t row, int64_t column) const {
    return data + (row % rows * width + left + column) * kBlock;
  }
};

struct Depthwise {
  int64_t images, channels;
  Axis rows, columns;
  const float* grad;
  const float* x;
  const float* weights;  // [blocks][kernel rows][kernel columns][kBlock]
  float* to_x;           // null where it is not asked for
  float* parts;          // [images][blocks][kernel rows][kernel columns][kBlock], or null

  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  // Without a live column no row is live.
  bool any() const { return rows.taps() > 0 && columns.taps() > 0; }

  Ring grad_ring() const {
    if (!any()) return Ring(1, 0, columns.out);
    return Ring(std::min(rows.out, rows.reach()), std::max<int64_t>(0, columns.last_offset()),
                std::max(columns.out, columns.in - columns.first_offset()));
  }
  Ring x_ring() const {
    if (!any()) return Ring(0, 0, 0);
    return Ring(std::min(rows.in, rows.reach()), std::max<int64_t>(0, -columns.first_offset()),
                std::max(columns.in, columns.out + columns.last_offset()));
  }

  // One block of channels of one image. The rings' margins are zeros, and stay so.
  void run(const DepthwiseKernels& kernels, int64_t unit, const Ring& of_grad,
           const Ring& of_x) const {
    const int64_t image = unit / blocks(), block = unit % blocks(), channel = block * kBlock;
    const int count = static_cast<int>(std::min(kBlock, channels - channel));
    const float* const g = grad + image * rows.out * columns.out * channels + channel;
    const float* const from = x + image * rows.in * columns.in * channels + channel;
    const float* const w = to_x == nullptr ? nullptr : weights + block * taps() * kBlock;
    float* const sums = parts == nullptr ? nullptr : parts + unit * taps() * kBlock;
    float spoilt[kBlock] = {};
    if (sums != nullptr) std::fill_n(sums, taps() * kBlock, 0.0f);
    const int64_t first = any() ? rows.first : 0, last = any() ? rows.last : 0;
    int64_t packed = 0, done = 0;
    for (int64_t q = 0; q < rows.out; ++q) {
      kernels.pack(g + q * columns.out * channels, channels, columns.out, count,
                   of_grad.pixel(q, 0), spoilt);
      if (sums != nullptr && first < last) {
        for (; packed < rows.in && packed <= q + rows.last_offset(); ++packed) {
          kernels.pack(from + packed * columns.in * channels, channels, columns.in, count,
                       of_x.pixel(packed, 0), nullptr);
        }
        for (int64_t r = first; r < last; ++r) {
          const int64_t y = q + rows.offset(r);
          if (y < 0 || y >= rows.in) continue;
          kernels.dot(of_grad.pixel(q, 0), of_x.pixel(y, columns.first_offset()),
                      static_cast<int>(columns.taps()), columns.dilation, columns.out,
                      sums + (r * columns.kernel + columns.first) * kBlock);
        }
      }
      if (to_x == nullptr) continue;
      for (; done < rows.in &&
             (first == last || q + 1 == rows.out || done - rows.first_offset() <= q);
           ++done) {
        DepthwiseRows found{};
        for (int64_t r = first; r < last; ++r) {
          const int64_t row = done - rows.offset(r);
          if (row < 0 || row >= rows.out) continue;
          found.pixels[found.count] = of_grad.pixel(row, -columns.first_offset());
          found.weights[found.count++] = w + (r * columns.kernel + columns.first) * kBlock;
        }
        kernels.correlate(found, static_cast<int>(columns.taps()), -columns.dilation, columns.in,
                          count, to_x + (image * rows.in + done) * columns.in * channels + channel,
                          channels);
      }
    }
    for (int c = 0; sums != nullptr && c < kBlock; ++c) {
      // Of a filter whose gradient is not finite all taps are nan, as padding times it is.
      for (int64_t t = 0; t < taps() && std::isnan(spoilt[c]); ++t)
        sums[t * kBlock + c] = spoilt[c];
    }
  }
};

Axis checked_axis(const Tensor& grad, const Tensor& x, const Tensor& weight, int axis,
                  at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t in = x.size(axis), kernel = weight.size(axis);
  const int64_t pad = padding[axis - 2], dilated = dilation[axis - 2];
  TORCH_CHECK_VALUE(
      grad.size(axis) >= 1 && grad.size(axis) == in + 2 * pad - dilated * (kernel - 1), "grad ",
      grad.sizes(), " does not fit x ", x.sizes(), " and weight ", weight.sizes(), " with padding ",
      padding, ", dilation ", dilation);
  return Axis(in, grad.size(axis), kernel, pad, dilated);
}

}  // namespace

// (gradient to x, gradient to weight) of a depthwise convolution with stride 1:
//   dx[n, y, x, c] = sum over taps t of weight[c, t] * grad[n, (y, x) - offset(t), c],
//   dweight[c, t] = sum over n, y, x of grad[n, y, x, c] * x[n, (y, x) + offset(t), c],
// offset(t) = t * dilation - padding. Maps [N, C, H, W] are channels_last, weight [C, 1, R, S]. One
// that is not asked for has no elements. A unit of work is a block of channels of an image, whose
// rows are packed one behind another once, so that the bits do not depend on the threads.
std::tuple<Tensor, Tensor> depthwise_gradients(const Tensor& grad, const Tensor& x,
                                               const Tensor& weight_any, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, bool to_x,
                                               bool to_weight) {
  check_map("grad", grad);
  check_map("x", x);
  check_options("padding", padding, 0);
  check_options("dilation", dilation, 1);
  const int64_t images = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(weight_any.dim() == 4 && weight_any.scalar_type() == at::kFloat &&
                        weight_any.size(0) == channels && weight_any.size(1) == 1 &&
                        std::min(weight_any.size(2), weight_any.size(3)) >= 1 &&
                        std::max(weight_any.size(2), weight_any.size(3)) <= kMaxDepthwiseKernel,
                    "weight must be float32 [", channels, ", 1, R, S] with R and S from 1 to ",
                    kMaxDepthwiseKernel, ", got ", weight_any.scalar_type(), " ",
                    weight_any.sizes());
  TORCH_CHECK_VALUE(grad.size(0) == images && grad.size(1) == channels, "grad ", grad.sizes(),
                    " does not fit x ", x.sizes());
  const Axis rows = checked_axis(grad, x, weight_any, 2, padding, dilation);
  const Axis columns = checked_axis(grad, x, weight_any, 3, padding, dilation);
  const Tensor weight = weight_any.contiguous();
  const float* const given = weight.const_data_ptr<float>();
  Tensor grad_x = to_x ? at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast)
                       : at::empty({0}, x.options());
  Tensor grad_weight = at::empty({0}, x.options());
  if (to_weight) grad_weight = at::empty(weight.sizes(), weight.options());

  Depthwise work{images,
                 channels,
                 rows,
                 columns,
                 grad.const_data_ptr<float>(),
                 x.const_data_ptr<float>(),
                 nullptr,
                 to_x ? grad_x.data_ptr<float>() : nullptr,
                 nullptr};
  const int64_t blocks = work.blocks(), taps = work.taps(), size = blocks * taps * kBlock;
  const Workspace packed = allocate(to_x ? size : 0);
  const Workspace parts = allocate(to_weight ? images * size : 0);
  for (int64_t i = 0; to_x && i < size; ++i) {
    const int64_t channel = i / (taps * kBlock) * kBlock + i % kBlock;
    packed.data()[i] = channel < channels ? given[channel * taps + i / kBlock % taps] : 0.0f;
  }
  work.weights = packed.data();
  if (to_weight) work.parts = parts.data();
  const DepthwiseKernels& kernels = current_depthwise_kernels();
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    Ring of_grad = work.grad_ring(), of_x = work.x_ring();
    const int64_t floats = of_grad.floats() + (to_weight ? of_x.floats() : 0);
    const Workspace rings = allocate(floats);
    std::fill_n(rings.data(), floats, 0.0f);
    of_grad.data = rings.data();
    of_x.data = rings.data() + of_grad.floats();
    for (int64_t unit = begin; unit < end; ++unit) work.run(kernels, unit, of_grad, of_x);
  });
  for (int64_t i = 0; to_weight && i < channels * taps; ++i) {
    const int64_t channel = i / taps, tap = i % taps;
    const float* const part =
        parts.data() + (channel / kBlock * taps + tap) * kBlock + channel % kBlock;
    float sum = 0;
    for (int64_t image = 0; image < images; ++image) sum += part[image * size];
    grad_weight.data_ptr<float>()[i] = sum;
  }
  return {grad_x, grad_weight};
}

}  // namespace deeplab_fast::cpu
