// Convolutions as one matrix product over all taps: the rows of the product are the patches of x at
// the output pixels, gathered block by block into a buffer that stays in a second-level cache, or
// the pixels of x where they lie, for 1x1 convolutions of few channels. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "deeplab_fast/conv_cpu.h"
#include "deeplab_fast/conv_run.h"

namespace deeplab_fast::cpu {

// Along one axis of a convolution.
struct PatchAxis {
  int64_t size;  // of x
  int64_t step;  // floats between neighbours of x
  int64_t taps;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  int64_t outputs() const { return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1; }
};

// The patches of x [images][channels][rows.size][columns.size]. A patch is [rows.taps]
// [columns.taps][channels], for which channels must lie one behind another, or, where planar,
// [channels][rows.taps][columns.taps] from any x.
struct Patches {
  const float* data;
  int64_t images;
  int64_t image_step;
  int64_t channels;
  int64_t channel_step;
  PatchAxis rows;
  PatchAxis columns;
  bool planar;

  int64_t depth() const { return rows.taps * columns.taps * channels; }
  int64_t pixels() const { return images * rows.outputs() * columns.outputs(); }

  // Whether patches are the pixels of x, all at one distance.
  bool are_pixels() const {
    const auto trivial = [](const PatchAxis& axis) {
      return axis.taps == 1 && axis.stride == 1 && axis.padding == 0;
    };
    return trivial(rows) && trivial(columns) && (channels == 1 || channel_step == 1) &&
           (rows.size == 1 || rows.step == columns.size * columns.step) &&
           (images == 1 || image_step == rows.size * columns.size * columns.step);
  }
};

// Copies floats; a known kCount costs a few moves, where a call to memcpy takes longer than those.
template <int kCount>
inline void copy_floats(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, (kCount != 0 ? kCount : count) * sizeof(float));
}

// The values [begin, begin + count) of the patches of pixels [first, first + pixels), to rows
// `stride` floats apart. A line of a patch is what one row of taps gives: the taps' values one
// behind another, kLine floats, or any number of them for 0.
template <int kLine>
void gather_lines(const Patches& x, int64_t first, int64_t pixels, int64_t begin, int64_t count,
                  float* to, int64_t stride) {
  const bool planar = x.planar;
  const PatchAxis &rows = x.rows, &columns = x.columns;
  const int64_t unit = planar ? 1 : x.channels;  // floats of a tap
  const int64_t length = kLine != 0 ? kLine : columns.taps * unit;
  const int64_t tap_step = columns.dilation * columns.step;
  const int64_t reach = columns.dilation * (columns.taps - 1);
  const int64_t width = columns.outputs(), height = rows.outputs();
  int64_t column = first % width, row = first / width % height, image = first / width / height;
  const int64_t first_line = begin / length, last_line = (begin + count - 1) / length;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, to += stride) {
    const int64_t x0 = column * columns.stride - columns.padding;
    const int64_t y0 = row * rows.stride - rows.padding;
    const float* const corner = x.data + image * x.image_step + x0 * columns.step;
    // Lines that are copied as they lie.
    const bool inside = x0 >= 0 && x0 + reach < columns.size;
    const bool dense = inside && (columns.taps == 1 || tap_step == unit);
    for (int64_t line = first_line; line <= last_line; ++line) {
      const int64_t y = y0 + line % rows.taps * rows.dilation;
      const float* const from =
          corner + y * rows.step + (planar ? line / rows.taps * x.channel_step : 0);
      // Of the line, the part that is asked for.
      const int64_t low = std::max<int64_t>(begin - line * length, 0);
      const int64_t high = std::min(begin + count - line * length, length);
      float* const target = to + line * length - begin;
      if (y < 0 || y >= rows.size) {
        std::fill(target + low, target + high, 0.0f);
      } else if (dense && high - low == length) {
        copy_floats<kLine>(target, from, length);
      } else if (dense) {
        copy_floats<0>(target + low, from + low, high - low);
      } else if (inside && unit == 1) {
        for (int64_t tap = low; tap < high; ++tap) target[tap] = from[tap * tap_step];
      } else {
        for (int64_t tap = low / unit; tap * unit < high; ++tap) {
          const int64_t from_unit = std::max<int64_t>(low - tap * unit, 0);
          const int64_t to_unit = std::min(high - tap * unit, unit);
          float* const values = target + tap * unit;
          const int64_t at = x0 + tap * columns.dilation;
          if (at < 0 || at >= columns.size) {
            std::fill(values + from_unit, values + to_unit, 0.0f);
          } else if (unit == 1) {
            *values = from[tap * tap_step];
          } else {
            copy_floats<0>(values + from_unit, from + tap * tap_step + from_unit,
                           to_unit - from_unit);
          }
        }
      }
    }
    if (++column == width) {
      column = 0;
      if (++row == height) row = 0, ++image;
    }
  }
}

inline void gather(const Patches& x, int64_t first, int64_t pixels, int64_t begin, int64_t count,
                   float* to, int64_t stride) {
  const int64_t length = x.columns.taps * (x.planar ? 1 : x.channels);
  // 3x3, 5x5 and 7x7 of planes.
  const auto function = length == 3   ? gather_lines<3>
                        : length == 5 ? gather_lines<5>
                        : length == 7 ? gather_lines<7>
                                      : gather_lines<0>;
  function(x, first, pixels, begin, count, to, stride);
}

// Additions in a row, and the depth of a block: with its panel a register tile stays in a first-level
// cache.
constexpr int64_t kDepth = 384;
// Pixels of a 1x1 convolution that are a multiple of so many floats apart push each other out of a
// first-level cache. They are copied where so many outputs make up for it (2048 channels to 512: 43
// against 38 GMAC/s, 1280 to 256 the other way round; 2026-11-27, AMD EPYC with AVX2).
constexpr int64_t kBadStep = 1024;
constexpr int64_t kCopyOutputs = 256;
// Output pixels in a block: its patches and sums stay in a second-level cache, and the weights are
// read from it or from the third-level one seldom enough. A multiple of all heights of register
// tiles.
constexpr int64_t kPixels = 96;
constexpr int64_t kPixelStep = 12;

// y [pixels][outputs] by weights [panels][depth][kPanel]; threads, parallel and allocate as for
// run_tiles.
template <typename Parallel, typename Allocate>
void run_patches(const ConvKernels& kernels, const Patches& x, const float* weights,
                 const Epilogue& epilogue, int64_t threads, const Parallel& parallel,
                 const Allocate& allocate) {
  const int64_t pixels = x.pixels(), depth = x.depth(), outputs = epilogue.channels;
  if (pixels == 0) return;
  threads = useful_threads(pixels * depth * outputs, threads);
  const int64_t chunks = (depth + kDepth - 1) / kDepth;
  const int64_t chunk = padded((depth + chunks - 1) / chunks);
  const bool copies =
      !x.are_pixels() || (x.columns.step % kBadStep == 0 && outputs >= kCopyOutputs);
  const int64_t rounds = (pixels + kPixels * threads - 1) / (kPixels * threads);
  const int64_t each = (pixels + rounds * threads - 1) / (rounds * threads);
  const int64_t size = (each + kPixelStep - 1) / kPixelStep * kPixelStep;
  const int64_t patch_stride = chunk + kRowPad, sum_stride = padded(outputs) + kRowPad;
  const int64_t patch_floats = copies ? size * patch_stride : 0;
  const int64_t floats = patch_floats + (chunk < depth ? size * sum_stride : 0);
  auto buffers = allocate(floats * threads);
  Team team;
  team.add((pixels + size - 1) / size, [&](int64_t block, int64_t worker) {
    float* const patches = buffers.data() + worker * floats;
    Product product{};
    product.first_pixel = block * size;
    product.rows = std::min(size, pixels - product.first_pixel);
    product.panel_stride = depth * kPanel;
    product.num_panels = padded(outputs) / kPanel;
    product.c = patches + patch_floats;
    product.c_stride = sum_stride;
    product.run = chunk;
    product.prefetch_rows = true;
    for (int64_t begin = 0; begin < depth; begin += chunk) {
      product.depth = std::min(chunk, depth - begin);
      if (copies) {
        gather(x, product.first_pixel, product.rows, begin, product.depth, patches, patch_stride);
        product.a = patches;
        product.a_stride = patch_stride;
      } else {
        product.a = x.data + product.first_pixel * x.columns.step + begin;
        product.a_stride = x.columns.step;
      }
      product.panels = weights + begin * kPanel;
      product.accumulate = begin > 0;
      product.epilogue = begin + chunk < depth ? nullptr : &epilogue;
      kernels.multiply(product);
    }
  });
  team.run(threads, parallel);
}

}  // namespace deeplab_fast::cpu
