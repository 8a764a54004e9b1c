// Runs depthwise convolutions and inverted residuals on the kernels of strips_cpu.h. Free of torch.
//
// An inverted residual is project(depthwise(expand(x))), where expand and project are 1x1
// convolutions and each may be missing. Its expanded map, the largest of it, is not stored: a unit
// of work is a strip of columns, a range of rows and a group of channels of one image. It expands
// rows into a ring of as many as the taps of an output reach over, filters one row at a time, and
// projects that. The pixels of padding are those that are left out, not act(shift).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "deeplab_fast/conv_run.h"
#include "deeplab_fast/strips_cpu.h"

namespace deeplab_fast::cpu {

// The geometry of a depthwise convolution along one axis.
struct DepthwiseAxis {
  int64_t length;  // of the input
  int64_t outputs;
  int64_t taps;
  int64_t stride;
  int64_t dilation;
  int64_t padding;  // before the first pixel

  int64_t reach() const { return (taps - 1) * dilation; }
  // Input pixels [first, end) inside the map that outputs [begin, until) read.
  int64_t first(int64_t begin) const {
    return std::clamp<int64_t>(begin * stride - padding, 0, length);
  }
  int64_t end(int64_t until) const {
    return std::clamp<int64_t>((until - 1) * stride - padding + reach() + 1, 0, length);
  }
};

struct InvertedResidual {
  InputMap x;
  int64_t channels;  // of the depthwise convolution
  DepthwiseAxis rows;
  DepthwiseAxis columns;
  const float* expand;     // [panels][x.channels][kPanel], null for none: channels = x.channels
  Epilogue expanded;       // shift [padded(channels)] and activation
  const float* depthwise;  // [rows.taps][columns.taps][padded(channels)]
  Epilogue filtered;       // shift and activation; where nothing is projected also the output
  const float* project;    // [panels][channels][kPanel], null for none
  Epilogue projected;      // of the output
  float* sums;             // [images][rows.outputs][channels] of the filtered map, null for none;
                           // only where nothing is projected
};

// What a unit covers.
struct StripUnits {
  int64_t rows;      // of outputs
  int64_t columns;   // of outputs
  int64_t channels;  // a multiple of kPanel, or all
  double time;       // predicted, in multiply-adds of a product
};

// Output rows that are filtered between two products, so that these have rows enough.
inline int64_t strip_batch(const InvertedResidual& block, int64_t columns) {
  constexpr int64_t kEnough = 48;
  if (block.expand == nullptr && block.project == nullptr) return 1;
  return std::clamp<int64_t>((kEnough + columns - 1) / columns, 1, block.rows.outputs);
}

inline int64_t ring_rows(const InvertedResidual& block, int64_t columns) {
  return block.rows.reach() + 1 + (strip_batch(block, columns) - 1) * block.rows.stride;
}

inline int64_t strip_inputs(const InvertedResidual& block, int64_t columns) {
  return std::min(block.columns.length,
                  (columns - 1) * block.columns.stride + block.columns.reach() + 1);
}

// Floats that a unit's ring and its filtered rows take.
inline int64_t strip_floats(const InvertedResidual& block, const StripUnits& unit) {
  const int64_t channels = padded(unit.channels);
  int64_t floats = 0;
  if (block.expand != nullptr) {
    floats += ring_rows(block, unit.columns) * strip_inputs(block, unit.columns) * channels;
  }
  if (block.project != nullptr)
    floats += strip_batch(block, unit.columns) * unit.columns * channels;
  return floats;
}

// The units that take the least time in so many threads by what they compute twice, of those whose
// buffers stay in a second-level cache.
inline StripUnits choose_units(const InvertedResidual& block, int64_t threads) {
  // Of 512 KiB, which weights and inputs share.
  constexpr int64_t kCacheFloats = (320 << 10) / sizeof(float);
  // Multiply-adds that take as long as one of a depthwise convolution, and as starting a unit.
  constexpr double kFilterCost = 2, kUnitCost = 2e5;
  // And as reading a float of the input, which each group of channels does.
  constexpr double kReadCost = 6;
  // Of a group: wider ones take 3 to 12 % longer, as their rings leave the second-level cache.
  constexpr int64_t kMostChannels = 96;
  const bool whole_channels = block.project != nullptr;
  StripUnits best{0, 0, 0, std::numeric_limits<double>::infinity()};
  const auto consider = [&](int64_t rows, int64_t columns, int64_t channels) {
    StripUnits unit{rows, columns, channels, 0};
    const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
    const int64_t units = block.x.images * parts(block.rows.outputs, unit.rows) *
                          parts(block.columns.outputs, unit.columns) *
                          parts(block.channels, unit.channels);
    const double outputs = static_cast<double>(unit.rows * unit.columns);
    const double inputs = static_cast<double>(
        strip_inputs(block, unit.columns) *
        std::min(block.rows.length, (unit.rows - 1) * block.rows.stride + block.rows.reach() + 1));
    double work = kFilterCost * outputs * unit.channels * block.rows.taps * block.columns.taps;
    if (block.expand != nullptr) {
      work += inputs * block.x.channels * (unit.channels + kReadCost);
    }
    if (whole_channels) work += outputs * unit.channels * block.projected.channels;
    unit.time = static_cast<double>(parts(units, threads)) * (work + kUnitCost);
    // The ring is in the third-level cache then.
    if (strip_floats(block, unit) > kCacheFloats) unit.time *= 1.2;
    if (unit.time < best.time) best = unit;
  };
  for (int64_t column_parts = 1; column_parts <= 32; ++column_parts) {
    const int64_t columns = (block.columns.outputs + column_parts - 1) / column_parts;
    for (int64_t row_parts = 1; row_parts <= 64; ++row_parts) {
      const int64_t rows = (block.rows.outputs + row_parts - 1) / row_parts;
      if (whole_channels) {
        consider(rows, columns, block.channels);
      } else {
        for (int64_t channels = 3 * kPanel; channels <= kMostChannels; channels += 3 * kPanel) {
          consider(rows, columns, std::min(channels, block.channels));
          if (channels >= block.channels) break;
        }
      }
      if (rows == 1) break;
    }
    // Sums are those of whole rows.
    if (block.sums != nullptr || columns <= 16) break;
  }
  return best;
}

// One unit: output rows [y, y_end) and columns [x, x_end) of an image, channels [channel,
// channel + channels) of the depthwise convolution.
class StripUnit {
 public:
  StripUnit(const StripKernels& kernels, const InvertedResidual& block, int64_t image, int64_t x,
            int64_t x_end, int64_t channel, int64_t channels, float* buffer)
      : kernels_(kernels),
        block_(block),
        image_(image),
        x_(x),
        x_end_(x_end),
        channel_(channel),
        channels_(channels),
        // Whole vectors, also beyond the last channel: there weights and shifts are 0.
        stride_((channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
        left_(block.columns.first(x)),
        width_(block.columns.end(x_end) - left_),
        batch_(strip_batch(block, x_end - x)),
        capacity_(ring_rows(block, x_end - x)),
        ring_(buffer),
        filtered_(buffer + (block.expand == nullptr ? 0 : capacity_ * width_ * stride_)),
        rows_(block.rows.taps),
        weights_(block.rows.taps) {}

  void run(int64_t y, int64_t y_end) {
    int64_t have = block_.rows.first(y);
    for (; y < y_end; y += batch_) {
      const int64_t until = std::min(y + batch_, y_end);
      if (block_.expand != nullptr) {
        const int64_t wanted = block_.rows.end(until);
        // Where the stride is larger than the kernel, rows between are not needed.
        have = std::max(have, std::min(block_.rows.first(y), wanted));
        expand(have, wanted);
        have = std::max(have, wanted);
      }
      for (int64_t row = y; row < until; ++row) filter(row, row - y);
      if (block_.project != nullptr) project(y, until);
    }
  }

 private:
  int64_t input_pixel(int64_t y, int64_t x) const {
    return (image_ * block_.rows.length + y) * block_.columns.length + x;
  }
  int64_t output_pixel(int64_t y, int64_t x) const {
    return (image_ * block_.rows.outputs + y) * block_.columns.outputs + x;
  }

  // Rows [y, end) of the input into the ring; those that lie one behind the other in both at once.
  void expand(int64_t y, int64_t end) const {
    const bool whole = width_ == block_.columns.length;
    while (y < end && width_ > 0) {
      const int64_t slot = y % capacity_;
      const int64_t count = whole ? std::min(end - y, capacity_ - slot) : 1;
      Epilogue epilogue = block_.expanded;
      epilogue.shift += channel_;
      epilogue.out = ring_ + slot * width_ * stride_;
      epilogue.out_stride = stride_;
      epilogue.channels = stride_;
      multiply(block_.x.data + input_pixel(y, left_) * block_.x.channels, block_.x.channels,
               count * width_, block_.expand + channel_ * block_.x.channels, block_.x.channels,
               epilogue, 0);
      y += count;
    }
  }

  void filter(int64_t y, int64_t place) {
    const int64_t padded_channels = padded(block_.channels);
    const int64_t first = y * block_.rows.stride - block_.rows.padding;
    DepthwiseRow row{};
    for (int64_t t = 0; t < block_.rows.taps; ++t) {
      const int64_t from = first + t * block_.rows.dilation;
      if (from < 0 || from >= block_.rows.length) continue;
      rows_[row.num_rows] =
          block_.expand == nullptr
              ? block_.x.data + input_pixel(from, left_) * block_.x.channels + channel_
              : ring_ + from % capacity_ * width_ * stride_;
      weights_[row.num_rows++] =
          block_.depthwise + t * block_.columns.taps * padded_channels + channel_;
    }
    Epilogue epilogue = block_.filtered;
    epilogue.shift += channel_;
    if (block_.project == nullptr) {
      epilogue.channels = channels_;
      epilogue.out += channel_;
      if (epilogue.residual != nullptr) epilogue.residual += channel_;
      row.first_pixel = output_pixel(y, x_);
    } else {
      epilogue.channels = channels_;
      epilogue.out = filtered_ + place * (x_end_ - x_) * stride_;
      epilogue.out_stride = stride_;
    }
    row.rows = rows_.data();
    row.weights = weights_.data();
    row.x_stride = block_.expand == nullptr ? block_.x.channels : stride_;
    row.width = width_;
    row.weight_stride = padded_channels;
    row.taps = block_.columns.taps;
    row.stride = block_.columns.stride;
    row.dilation = block_.columns.dilation;
    row.origin = x_ * block_.columns.stride - block_.columns.padding - left_;
    row.outputs = x_end_ - x_;
    row.epilogue = &epilogue;
    kernels_.depthwise(row);
    if (block_.sums != nullptr) {
      kernels_.add_pixels(
          epilogue.out + row.first_pixel * epilogue.out_stride, epilogue.out_stride, row.outputs,
          channels_, block_.sums + (image_ * block_.rows.outputs + y) * block_.channels + channel_);
    }
  }

  void project(int64_t y, int64_t end) const {
    const int64_t width = x_end_ - x_;
    const bool whole = width == block_.columns.outputs;
    for (int64_t row = y; row < end; row += whole ? end - y : 1) {
      multiply(filtered_ + (row - y) * width * stride_, stride_, whole ? (end - y) * width : width,
               block_.project, channels_, block_.projected, output_pixel(row, x_));
    }
  }

  void multiply(const float* a, int64_t a_stride, int64_t pixels, const float* panels,
                int64_t depth, const Epilogue& epilogue, int64_t first_pixel) const {
    Product product{};
    product.a = a;
    product.a_stride = a_stride;
    product.rows = pixels;
    product.panels = panels;
    product.panel_stride = depth * kPanel;
    product.depth = depth;
    product.epilogue = &epilogue;
    product.first_pixel = first_pixel;
    kernels_.multiply(product);
  }

  const StripKernels& kernels_;
  const InvertedResidual& block_;
  const int64_t image_, x_, x_end_, channel_, channels_, stride_, left_, width_, batch_, capacity_;
  float* const ring_;
  float* const filtered_;
  std::vector<const float*> rows_;
  std::vector<const float*> weights_;
};

// By strips, whose columns are whole rows where nothing is projected and there are sums; parallel
// and allocate as for run_tiles.
template <typename Parallel, typename Allocate>
void run_strips(const StripKernels& kernels, const InvertedResidual& block, int64_t threads,
                const Parallel& parallel, const Allocate& allocate) {
  const int64_t images = block.x.images;
  const int64_t outputs = images * block.rows.outputs * block.columns.outputs;
  if (outputs == 0) return;
  int64_t work = outputs * block.channels * block.rows.taps * block.columns.taps;
  if (block.expand != nullptr) {
    work += images * block.x.height * block.x.width * block.x.channels * block.channels;
  }
  if (block.project != nullptr) work += outputs * block.channels * block.projected.channels;
  threads = useful_threads(work, threads);
  const StripUnits size = choose_units(block, threads);
  const int64_t floats = padded(strip_floats(block, size));
  auto buffers = allocate(floats * threads);
  float* const buffer = buffers.data();
  const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
  const int64_t groups = parts(block.channels, size.channels);
  const int64_t strips = parts(block.columns.outputs, size.columns);
  const int64_t ranges = parts(block.rows.outputs, size.rows);
  Team team;
  team.add(images * ranges * strips * groups, [&](int64_t unit, int64_t worker) {
    const int64_t channel = unit % groups * size.channels;
    unit /= groups;
    const int64_t x = unit % strips * size.columns;
    unit /= strips;
    const int64_t y = unit % ranges * size.rows;
    StripUnit(kernels, block, unit / ranges, x, std::min(x + size.columns, block.columns.outputs),
              channel, std::min(size.channels, block.channels - channel), buffer + worker * floats)
        .run(y, std::min(y + size.rows, block.rows.outputs));
  });
  team.run(threads, parallel);
}

// A 1x1 convolution, y [pixels][outputs] from x [pixels][channels], weights [panels][channels]
// [kPanel], on the kernels for few channels.
template <typename Parallel>
void run_strip_pixels(const StripKernels& kernels, const InputMap& x, const float* weights,
                      const Epilogue& epilogue, int64_t threads, const Parallel& parallel) {
  const int64_t pixels = x.images * x.height * x.width;
  if (pixels == 0) return;
  threads = useful_threads(pixels * x.channels * epilogue.channels, threads);
  // Rows of a unit: enough to pay for reading the weights again, few enough to stay in a cache.
  constexpr int64_t kPixels = 96;
  const int64_t rounds = (pixels + kPixels * threads - 1) / (kPixels * threads);
  const int64_t size = (pixels + rounds * threads - 1) / (rounds * threads);
  Team team;
  team.add((pixels + size - 1) / size, [&](int64_t block, int64_t) {
    Product product{};
    product.first_pixel = block * size;
    product.a = x.data + product.first_pixel * x.channels;
    product.a_stride = x.channels;
    product.rows = std::min(size, pixels - product.first_pixel);
    product.panels = weights;
    product.panel_stride = x.channels * kPanel;
    product.depth = x.channels;
    product.epilogue = &epilogue;
    kernels.multiply(product);
  });
  team.run(threads, parallel);
}

// By strips; or, where maps are small and strips would expand much of them twice, the filtered map
// by groups of channels and its projection.
template <typename Parallel, typename Allocate>
void run_inverted_residual(const StripKernels& kernels, const InvertedResidual& block,
                           int64_t threads, const Parallel& parallel, const Allocate& allocate) {
  // Multiply-adds that take as long as writing and reading a float of the filtered map.
  constexpr double kMapCost = 12;
  const int64_t pixels = block.x.images * block.rows.outputs * block.columns.outputs;
  if (block.project == nullptr || pixels == 0) {
    run_strips(kernels, block, threads, parallel, allocate);
    return;
  }
  InvertedResidual first = block;
  first.project = nullptr;
  const double projection = static_cast<double>(pixels * block.channels) *
                            (block.projected.channels + kMapCost) / threads;
  if (choose_units(block, threads).time <= choose_units(first, threads).time + projection) {
    run_strips(kernels, block, threads, parallel, allocate);
    return;
  }
  auto map = allocate(pixels * block.channels);
  first.filtered.out = map.data();
  first.filtered.out_stride = block.channels;
  run_strips(kernels, first, threads, parallel, allocate);
  const InputMap filtered{map.data(), block.x.images, block.rows.outputs, block.columns.outputs,
                          block.channels};
  run_strip_pixels(kernels, filtered, block.project, block.projected, threads, parallel);
}

}  // namespace deeplab_fast::cpu
