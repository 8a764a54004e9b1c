// Runs convolutions on the kernels of conv_cpu.h: cuts a map into tiles, walks them in blocks whose
// buffers stay in the caches, and shares the work between threads. Free of torch.
//
// With stride 1 and a padding that equals the dilation d, the pixels (y mod d, x mod d) of a 3x3
// convolution form d * d independent maps, its phases. A phase's rows and columns are cut into
// tiles of a form; a tile's inputs become row_form.products * column_form.products values, each of
// which takes part in one matrix product over all tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "deeplab_fast/conv_cpu.h"

namespace deeplab_fast::cpu {

// Pixels of x [images][height][width], each `channels` contiguous floats.
struct InputMap {
  const float* data;
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
};

// The tiles of one form along one axis: the positions of their first outputs.
struct AxisTiles {
  int form;
  std::vector<int32_t> starts;
};

// Tiles with `long_form` on the phases of ceil(length / dilation) samples and `short_form` on those
// that are one shorter.
inline std::vector<AxisTiles> cut_axis(int64_t length, int64_t dilation, int long_form,
                                       int short_form) {
  std::vector<AxisTiles> result;
  result.push_back({long_form, {}});
  if (short_form != long_form) result.push_back({short_form, {}});
  const int64_t most = (length + dilation - 1) / dilation;
  for (int64_t phase = 0; phase < std::min(length, dilation); ++phase) {
    const int64_t samples = (length - phase + dilation - 1) / dilation;
    AxisTiles& axis = samples == most ? result.front() : result.back();
    for (int64_t sample = 0; sample < samples; sample += kForms[axis.form].outputs) {
      axis.starts.push_back(static_cast<int32_t>(phase + dilation * sample));
    }
  }
  if (result.back().starts.empty()) result.pop_back();
  return result;
}

// Whether the form computes all outputs of a phase of this many samples.
inline bool fits_phase(int form, int64_t samples) {
  return kForms[form].halo > 0 || samples <= kForms[form].outputs;
}

// One part of a convolution: all tiles with one form along rows and one along columns.
struct TileGroup {
  AxisTiles rows;
  AxisTiles columns;
  const float* weights;  // [products][panels][channels][kPanel]

  int64_t products() const {
    return int64_t{kForms[rows.form].products} * kForms[columns.form].products;
  }
  int64_t tiles() const {
    return static_cast<int64_t>(rows.starts.size()) * static_cast<int64_t>(columns.starts.size());
  }
};

struct Blocking {
  int64_t tiles;  // in a block
  bool shared;    // all threads work on one block, else each on blocks of its own
};

inline int64_t chunk_channels(int64_t channels) {
  const int64_t chunks = (channels + kMaxChunk - 1) / kMaxChunk;
  return padded((channels + chunks - 1) / chunks);
}

// Floats of the buffers of one block: transformed inputs of a chunk of channels, and products.
inline int64_t block_floats(int64_t products, int64_t tiles, int64_t channels, int64_t outputs) {
  return products * tiles * (chunk_channels(channels) + padded(outputs) + 2 * kRowPad);
}

// Prepared weights up to this size stay in a third-level cache, and blocks can be as small as makes
// the products worth their calls; larger ones come from memory for each block anew.
constexpr int64_t kCachedWeights = int64_t{12} << 20;
constexpr int64_t kTilesCached = 24;
constexpr int64_t kTilesStreamed = 96;

// Time of multiplying a block of `tiles` rows, in rows. A few rows beyond whole register tiles of 6
// (or 12) take as long as 4, which the latency of their additions needs.
constexpr int64_t row_cost(int64_t tiles) {
  return tiles / 6 * 6 + (tiles % 6 == 0 ? 0 : std::max<int64_t>(tiles % 6, 4));
}

inline Blocking choose_blocking(int64_t products, int64_t tiles, int64_t channels, int64_t outputs,
                                int64_t threads) {
  const int64_t weights = 4 * products * channels * padded(outputs);
  const bool cached = weights <= kCachedWeights;
  const int64_t least = cached ? kTilesCached : kTilesStreamed;
  // Threads with few tiles each share the blocks: then each weight is read by one thread only.
  if (threads > 1 && tiles < (cached ? 1 : 2) * least * threads) {
    const int64_t most = 2 * kTilesStreamed;
    const int64_t blocks = std::max<int64_t>(1, (tiles + most - 1) / most);
    return {(tiles + blocks - 1) / blocks, true};
  }
  // The size by which the thread with the most blocks ends first.
  int64_t best = std::min(least, tiles), best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t size = least; size <= std::min(2 * least, tiles); ++size) {
    const int64_t blocks = (tiles + size - 1) / size;
    const int64_t cost = (blocks + threads - 1) / threads * row_cost(size);
    if (cost < best_cost) best = size, best_cost = cost;
  }
  return {best, false};
}

// Additions in a row of the products of tiles. Rounding errors grow with the root of it, and tiles
// multiply them: at 2048 channels tile6 is off by 1.9e-5 (2-norm) with all additions in a row, by
// 5.2e-6 with these.
constexpr int64_t kRun = 128;

// Pixels of a 1x1 convolution in a block.
constexpr int64_t kPixels = 48;

// One block of tiles and its buffers.
class Block {
 public:
  Block(const ConvKernels& kernels, const InputMap& x, const TileGroup& group,
        const Epilogue& epilogue, int dilation, int64_t capacity, float* buffer)
      : kernels_(kernels),
        x_(x),
        group_(group),
        epilogue_(epilogue),
        row_(kForms[group.rows.form]),
        column_(kForms[group.columns.form]),
        dilation_(dilation),
        chunk_(chunk_channels(x.channels)),
        input_stride_(chunk_ + kRowPad),
        output_stride_(padded(epilogue.channels) + kRowPad),
        capacity_(capacity),
        inputs_(buffer),
        products_(buffer + group.products() * capacity * input_stride_) {}

  // The whole block in this thread.
  void run(int64_t first, int64_t tiles) {
    start(first, tiles);
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      transform(channel, 0, tiles);
      multiply(channel, 0, units());
    }
    finish(0, tiles);
  }

  // The whole block, parallel(count, function(begin, end)) calling the function in threads.
  template <typename Parallel>
  void run(int64_t first, int64_t tiles, const Parallel& parallel) {
    start(first, tiles);
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      parallel(tiles, [&](int64_t begin, int64_t end) { transform(channel, begin, end); });
      parallel(units(), [&](int64_t begin, int64_t end) { multiply(channel, begin, end); });
    }
    parallel(tiles, [&](int64_t begin, int64_t end) { finish(begin, end); });
  }

 private:
  static constexpr int kMaxTile = kMaxInputs * kMaxInputs;

  void start(int64_t first, int64_t tiles) {
    first_ = first;
    tiles_ = tiles;
  }

  // Position of a tile: its image and the indices of its row and column.
  void locate(int64_t tile, int64_t& image, int64_t& row, int64_t& column) const {
    const int64_t columns = static_cast<int64_t>(group_.columns.starts.size());
    const int64_t rows = static_cast<int64_t>(group_.rows.starts.size());
    tile += first_;
    column = tile % columns;
    row = tile / columns % rows;
    image = tile / (columns * rows);
  }

  void transform(int64_t channel, int64_t begin, int64_t end) const {
    alignas(64) static const float zeros[kMaxChunk + kPanel] = {};
    const FormKernels& rows = kernels_.forms[group_.rows.form];
    const FormKernels& columns = kernels_.forms[group_.columns.form];
    const int64_t depth = std::min(chunk_, x_.channels - channel);
    const int64_t whole = depth / kPanel * kPanel;
    const int64_t plane = capacity_ * input_stride_;
    const int count = row_.inputs * column_.inputs;
    alignas(64) float line[kMaxProducts * kMaxInputs * kStrip];
    const float* pixels[kMaxTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t image, row, column;
      locate(tile, image, row, column);
      const int64_t y0 = group_.rows.starts[row] - int64_t{row_.halo} * dilation_;
      const int64_t x0 = group_.columns.starts[column] - int64_t{column_.halo} * dilation_;
      for (int i = 0; i < row_.inputs; ++i) {
        const int64_t y = y0 + int64_t{i} * dilation_;
        const bool inside = y >= 0 && y < x_.height;
        const int64_t start = (image * x_.height + y) * x_.width;
        for (int j = 0; j < column_.inputs; ++j) {
          const int64_t x = x0 + int64_t{j} * dilation_;
          pixels[i * column_.inputs + j] = inside && x >= 0 && x < x_.width
                                               ? x_.data + (start + x) * x_.channels + channel
                                               : zeros;
        }
      }
      float* const to = inputs_ + tile * input_stride_;
      for (int64_t c = 0; c < whole; c += kStrip) {
        const int count = static_cast<int>(std::min<int64_t>(kStrip, whole - c));
        rows.input_rows(pixels, c, count, column_.inputs, line);
        columns.input_columns(line, count, row_.products, to + c, plane);
      }
      if (whole < depth) {
        alignas(64) float tail[kMaxTile][kPanel];
        for (int i = 0; i < count; ++i) {
          std::fill(tail[i], tail[i] + kPanel, 0.0f);
          std::copy(pixels[i] + whole, pixels[i] + depth, tail[i]);
          pixels[i] = tail[i];
        }
        rows.input_rows(pixels, 0, kPanel, column_.inputs, line);
        columns.input_columns(line, kPanel, row_.products, to + whole, plane);
      }
    }
  }

  // Units are products times parts of the output channels.
  int64_t parts() const { return (num_panels() + kUnitPanels - 1) / kUnitPanels; }
  int64_t units() const { return group_.products() * parts(); }
  int64_t num_panels() const { return padded(epilogue_.channels) / kPanel; }

  void multiply(int64_t channel, int64_t begin, int64_t end) const {
    const int64_t panel_size = x_.channels * kPanel;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit / parts(), first_panel = unit % parts() * kUnitPanels;
      Product product{};
      product.a = inputs_ + p * capacity_ * input_stride_;
      product.a_stride = input_stride_;
      product.rows = tiles_;
      product.panels =
          group_.weights + (p * num_panels() + first_panel) * panel_size + channel * kPanel;
      product.panel_stride = panel_size;
      product.num_panels = std::min(kUnitPanels, num_panels() - first_panel);
      product.c = products_ + p * capacity_ * output_stride_ + first_panel * kPanel;
      product.c_stride = output_stride_;
      product.depth = std::min(chunk_, x_.channels - channel);
      product.accumulate = channel > 0;
      product.prefetch_rows = true;
      product.run = kRun;
      kernels_.multiply(product);
    }
  }

  void finish(int64_t begin, int64_t end) const {
    const FormKernels& rows = kernels_.forms[group_.rows.form];
    const FormKernels& columns = kernels_.forms[group_.columns.form];
    const int64_t plane = capacity_ * output_stride_;
    alignas(64) float line[kMaxOutputs * kMaxProducts * kStrip];
    int64_t pixels[kMaxOutputs * kMaxOutputs];
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t image, row, column;
      locate(tile, image, row, column);
      for (int i = 0; i < row_.outputs; ++i) {
        const int64_t y = group_.rows.starts[row] + int64_t{i} * dilation_;
        for (int j = 0; j < column_.outputs; ++j) {
          const int64_t x = group_.columns.starts[column] + int64_t{j} * dilation_;
          pixels[i * column_.outputs + j] =
              y < x_.height && x < x_.width ? (image * x_.height + y) * x_.width + x : -1;
        }
      }
      const int64_t channels = padded(epilogue_.channels);
      for (int64_t channel = 0; channel < channels; channel += kStrip) {
        const int count = static_cast<int>(std::min<int64_t>(kStrip, channels - channel));
        rows.output_rows(products_ + tile * output_stride_ + channel, plane, count,
                         column_.products, line);
        columns.output_columns(line, row_.outputs, pixels, channel, count, epilogue_);
      }
    }
  }

  // Output channels that a unit multiplies at a time.
  static constexpr int64_t kUnitPanels = 8;

  const ConvKernels& kernels_;
  const InputMap& x_;
  const TileGroup& group_;
  const Epilogue& epilogue_;
  const Form& row_;
  const Form& column_;
  const int dilation_;
  const int64_t chunk_;
  const int64_t input_stride_;
  const int64_t output_stride_;
  const int64_t capacity_;
  float* const inputs_;
  float* const products_;
  int64_t first_ = 0;
  int64_t tiles_ = 0;
};

// The outputs of one group. `parallel` is as for Block; allocate(floats) gives memory that lives
// until its result is destroyed, with data() to the first float, aligned to 64 bytes.
template <typename Parallel, typename Allocate>
void run_group(const ConvKernels& kernels, const InputMap& x, const TileGroup& group,
               const Epilogue& epilogue, int dilation, const Blocking& blocking,
               const Parallel& parallel, const Allocate& allocate) {
  const int64_t tiles = x.images * group.tiles();
  const int64_t size = std::min(blocking.tiles, tiles);
  if (tiles == 0) return;
  const int64_t blocks = (tiles + size - 1) / size;
  const int64_t floats = block_floats(group.products(), size, x.channels, epilogue.channels);
  if (blocking.shared) {
    auto buffer = allocate(floats);
    Block block(kernels, x, group, epilogue, dilation, size, buffer.data());
    for (int64_t i = 0; i < blocks; ++i) {
      block.run(i * size, std::min(size, tiles - i * size), parallel);
    }
    return;
  }
  parallel(blocks, [&](int64_t begin, int64_t end) {
    auto buffer = allocate(floats);
    Block block(kernels, x, group, epilogue, dilation, size, buffer.data());
    for (int64_t i = begin; i < end; ++i) block.run(i * size, std::min(size, tiles - i * size));
  });
}

// A 1x1 convolution: y [pixels][outputs] from x [pixels][channels], weights [panels][channels]
// [kPanel].
template <typename Parallel, typename Allocate>
void run_pixels(const ConvKernels& kernels, const InputMap& x, const float* weights,
                const Epilogue& epilogue, int64_t threads, const Parallel& parallel,
                const Allocate& allocate) {
  const int64_t pixels = x.images * x.height * x.width;
  if (pixels == 0) return;
  const int64_t chunk = chunk_channels(x.channels);
  const int64_t stride = padded(epilogue.channels) + kRowPad;
  // Blocks of pixels whose inputs and sums stay in a second-level cache.
  const int64_t rounds = (pixels + kPixels * threads - 1) / (kPixels * threads);
  const int64_t size = (pixels + rounds * threads - 1) / (rounds * threads);
  const int64_t blocks = (pixels + size - 1) / size;
  parallel(blocks, [&](int64_t begin, int64_t end) {
    auto sums = allocate(chunk < x.channels ? size * stride : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * size;
      Product product{};
      product.a_stride = x.channels;
      // Long rows that are a power of two apart would push each other out of the cache.
      product.prefetch_rows = x.channels < 512;
      product.rows = std::min(size, pixels - first);
      product.panel_stride = x.channels * kPanel;
      product.num_panels = padded(epilogue.channels) / kPanel;
      product.c = sums.data();
      product.c_stride = stride;
      product.first_pixel = first;
      for (int64_t channel = 0; channel < x.channels; channel += chunk) {
        product.a = x.data + first * x.channels + channel;
        product.panels = weights + channel * kPanel;
        product.depth = std::min(chunk, x.channels - channel);
        product.accumulate = channel > 0;
        product.run = chunk;
        product.epilogue = channel + chunk < x.channels ? nullptr : &epilogue;
        kernels.multiply(product);
      }
    }
  });
}

}  // namespace deeplab_fast::cpu
