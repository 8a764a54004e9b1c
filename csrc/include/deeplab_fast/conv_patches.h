// Convolutions as one matrix product over all taps: the rows of the product are the patches of x at
// the output pixels, gathered block by block into a buffer that stays in a second-level cache, or
// the pixels of x where they lie, for 1x1 convolutions of few channels. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "deeplab_fast/conv_cpu.h"
#include "deeplab_fast/conv_run.h"

namespace deeplab_fast::cpu {

// Along one axis of a convolution.
struct PatchAxis {
  int64_t size;  // of x
  int64_t step;  // values between neighbours of x
  int64_t taps;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  int64_t outputs() const { return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1; }
};

// The patches of x [images][channels][rows.size][columns.size]. A patch is [rows.taps]
// [columns.taps][channels], for which channels must lie one behind another, or, where planar,
// [channels][rows.taps][columns.taps] from any x.
template <typename Value>
struct PatchesOf {
  const Value* data;
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

using Patches = PatchesOf<float>;

// To the nearest, ties to even; nan stays nan.
inline BFloat16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16)};
}

// Copies values, rounding fp32 to bf16 where that is multiplied; a known kCount costs a few moves,
// where a call to memcpy takes longer than those.
template <int kCount, typename Factor, typename Value>
inline void copy_values(Factor* to, const Value* from, int64_t count) {
  if constexpr (std::is_same_v<Factor, Value>) {
    std::memcpy(to, from, (kCount != 0 ? kCount : count) * sizeof(Value));
  } else {
    std::transform(from, from + (kCount != 0 ? kCount : count), to, to_bf16);
  }
}

// The values [begin, begin + count) of one patch, which may reach beyond the map; x0 and y0 are the
// place of its corner.
template <typename Value, typename Factor>
void gather_edge(const PatchesOf<Value>& x, const Value* corner, int64_t x0, int64_t y0,
                 int64_t begin, int64_t count, Factor* to) {
  const PatchAxis &rows = x.rows, &columns = x.columns;
  const int64_t unit = x.planar ? 1 : x.channels;  // values of a tap
  const int64_t length = columns.taps * unit, tap_step = columns.dilation * columns.step;
  const bool inside = x0 >= 0 && x0 + columns.dilation * (columns.taps - 1) < columns.size;
  const bool dense = inside && (columns.taps == 1 || tap_step == unit);
  for (int64_t line = begin / length; line * length < begin + count; ++line) {
    const int64_t y = y0 + line % rows.taps * rows.dilation;
    const Value* const from =
        corner + (y - y0) * rows.step + (x.planar ? line / rows.taps * x.channel_step : 0);
    // Of the line, the part that is asked for.
    const int64_t low = std::max<int64_t>(begin - line * length, 0);
    const int64_t high = std::min(begin + count - line * length, length);
    Factor* const target = to + line * length - begin;
    if (y < 0 || y >= rows.size) {
      std::fill(target + low, target + high, Factor{});
    } else if (dense) {
      copy_values<0>(target + low, from + low, high - low);
    } else {
      for (int64_t tap = low / unit; tap * unit < high; ++tap) {
        const int64_t first = std::max<int64_t>(low - tap * unit, 0);
        const int64_t last = std::min(high - tap * unit, unit);
        Factor* const values = target + tap * unit;
        const int64_t at = x0 + tap * columns.dilation;
        if (at < 0 || at >= columns.size) {
          std::fill(values + first, values + last, Factor{});
        } else {
          copy_values<0>(values + first, from + tap * tap_step + first, last - first);
        }
      }
    }
  }
}

// The values [begin, begin + count) of the patches of pixels [first, first + pixels), to rows
// `stride` factors apart. A line of a patch is what one row of taps gives, kLine values, or any
// number of them for 0.
template <int kLine, typename Value, typename Factor>
void gather_lines(const PatchesOf<Value>& x, int64_t first, int64_t pixels, int64_t begin,
                  int64_t count, Factor* to, int64_t stride) {
  const bool planar = x.planar;
  const PatchAxis &rows = x.rows, &columns = x.columns;
  const int64_t unit = planar ? 1 : x.channels;  // values of a tap
  const int64_t length = kLine != 0 ? kLine : columns.taps * unit;
  const int64_t tap_step = columns.dilation * columns.step;
  const int64_t line_step = rows.dilation * rows.step, plane_step = planar ? x.channel_step : 0;
  const int64_t right = columns.dilation * (columns.taps - 1);
  const int64_t down = rows.dilation * (rows.taps - 1);
  const int64_t width = columns.outputs(), height = rows.outputs();
  int64_t column = first % width, row = first / width % height, image = first / width / height;
  const bool whole = begin % length == 0 && count % length == 0;
  const int64_t lines = count / length, first_plane = begin / length / rows.taps;
  const int64_t first_tap = begin / length % rows.taps;
  // Whether lines are copied as they lie.
  const bool dense = columns.taps == 1 || tap_step == unit;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, to += stride) {
    const int64_t x0 = column * columns.stride - columns.padding;
    const int64_t y0 = row * rows.stride - rows.padding;
    const Value* const corner = x.data + image * x.image_step + y0 * rows.step + x0 * columns.step;
    const bool inside = x0 >= 0 && x0 + right < columns.size && y0 >= 0 && y0 + down < rows.size;
    if (inside && whole && (dense || unit == 1)) {
      const Value* from = corner + first_plane * plane_step + first_tap * line_step;
      Factor* target = to;
      for (int64_t line = 0, tap = first_tap; line < lines; ++line, target += length) {
        if (dense) {
          copy_values<kLine>(target, from, length);
        } else {
          for (int64_t i = 0; i < length; ++i) copy_values<1>(target + i, from + i * tap_step, 1);
        }
        from += line_step;
        if (++tap == rows.taps) tap = 0, from += plane_step - rows.taps * line_step;
      }
    } else {
      gather_edge(x, corner, x0, y0, begin, count, to);
    }
    if (++column == width) {
      column = 0;
      if (++row == height) row = 0, ++image;
    }
  }
}

template <typename Value, typename Factor>
void gather(const PatchesOf<Value>& x, int64_t first, int64_t pixels, int64_t begin, int64_t count,
            Factor* to, int64_t stride) {
  const int64_t length = x.columns.taps * (x.planar ? 1 : x.channels);
  // 3x3, 5x5 and 7x7 of planes.
  const auto function = length == 3   ? gather_lines<3, Value, Factor>
                        : length == 5 ? gather_lines<5, Value, Factor>
                        : length == 7 ? gather_lines<7, Value, Factor>
                                      : gather_lines<0, Value, Factor>;
  function(x, first, pixels, begin, count, to, stride);
}

// Additions in a row, and the depth of a block, whose panel stays in a first-level cache.
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

// y [pixels][outputs] by the panels of weights [outputs][depth]; threads, parallel and allocate as
// for run_tiles. What is stored as another type than is multiplied goes through memory.
template <typename Value, typename Factor, typename Out, typename Parallel, typename Allocate>
void run_patches(const ConvKernels& kernels, const PatchesOf<Value>& x, const Factor* weights,
                 const EpilogueOf<Out>& epilogue, int64_t threads, const Parallel& parallel,
                 const Allocate& allocate) {
  const int64_t pixels = x.pixels(), depth = x.depth(), outputs = epilogue.channels;
  if (pixels == 0) return;
  threads = useful_threads(pixels * depth * outputs, threads);
  const int64_t chunks = (depth + kDepth - 1) / kDepth;
  const int64_t chunk = padded((depth + chunks - 1) / chunks);
  constexpr bool kConverts = !std::is_same_v<Value, Factor>;
  constexpr bool kFinishes = std::is_same_v<Factor, Out>;
  const bool copies =
      kConverts || !x.are_pixels() || (x.columns.step % kBadStep == 0 && outputs >= kCopyOutputs);
  const int64_t rounds = (pixels + kPixels * threads - 1) / (kPixels * threads);
  const int64_t each = (pixels + rounds * threads - 1) / (rounds * threads);
  const int64_t size = (each + kPixelStep - 1) / kPixelStep * kPixelStep;
  const int64_t patch_stride = chunk + kRowPad, sum_stride = padded(outputs) + kRowPad;
  const int64_t patch_floats = copies ? size * patch_stride / kPerWord<Factor> : 0;
  const int64_t floats = patch_floats + (chunk < depth || !kFinishes ? size * sum_stride : 0);
  auto buffers = allocate(floats * threads);
  Team team;
  team.add((pixels + size - 1) / size, [&](int64_t block, int64_t worker) {
    float* const buffer = buffers.data() + worker * floats;
    Factor* const patches = reinterpret_cast<Factor*>(buffer);
    ProductOf<Factor> product{};
    product.first_pixel = block * size;
    product.rows = std::min(size, pixels - product.first_pixel);
    product.panel_stride = panel_size<Factor>(depth);
    product.num_panels = padded(outputs) / kPanel;
    product.c = buffer + patch_floats;
    product.c_stride = sum_stride;
    product.run = chunk;
    product.prefetch_rows = true;
    for (int64_t begin = 0; begin < depth; begin += chunk) {
      product.depth = std::min(chunk, depth - begin);
      if (copies) {
        gather(x, product.first_pixel, product.rows, begin, product.depth, patches, patch_stride);
        product.a = patches;
        product.a_stride = patch_stride;
      } else if constexpr (!kConverts) {
        product.a = x.data + product.first_pixel * x.columns.step + begin;
        product.a_stride = x.columns.step;
      }
      product.panels = weights + begin * kPanel;
      product.accumulate = begin > 0;
      if constexpr (kFinishes) product.epilogue = begin + chunk < depth ? nullptr : &epilogue;
      multiply(kernels, product);
    }
    if constexpr (!kFinishes) {
      const MapKernels<Out>& identity = kernels.forms[kLine1];
      for (int64_t row = 0; row < product.rows; ++row) {
        const int64_t pixel = product.first_pixel + row;
        identity.output_columns(product.c + row * sum_stride, 1, &pixel, 0,
                                static_cast<int>(padded(outputs)), epilogue);
      }
    }
  });
  team.run(threads, parallel);
}

}  // namespace deeplab_fast::cpu
