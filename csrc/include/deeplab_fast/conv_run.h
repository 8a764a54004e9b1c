// Runs convolutions on the kernels of conv_cpu.h: cuts a map into tiles, walks them in blocks whose
// buffers stay in the caches, and shares the work between threads. Free of torch.
//
// With stride 1 and a padding that equals the dilation d, the pixels (y mod d, x mod d) of a 3x3
// convolution form d * d independent maps, its phases. A phase's rows and columns are cut into
// tiles of a form; a tile's inputs become row_form.products * column_form.products values, each of
// which takes part in one matrix product over all tiles.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <limits>
#include <thread>
#include <utility>
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
  bool shared;    // all threads work on one block at a time, else each on a block of its own
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
// the products worth their calls; larger ones come from memory for each block anew, which all
// threads then share, so that each weight is read by one of them only.
constexpr int64_t kCachedWeights = int64_t{12} << 20;
constexpr int64_t kTilesCached = 24;
constexpr int64_t kTilesStreamed = 192;
// Of the buffers of a shared block; twice this, in a third-level cache of 32 MiB, took twice as
// long.
constexpr int64_t kBlockBytes = int64_t{20} << 20;

// Time of multiplying a block of `tiles` rows, in rows. A few rows beyond whole register tiles of 6
// (or 12) take as long as 4, which the latency of their additions needs.
constexpr int64_t row_cost(int64_t tiles) {
  return tiles / 6 * 6 + (tiles % 6 == 0 ? 0 : std::max<int64_t>(tiles % 6, 4));
}

inline Blocking choose_blocking(int64_t products, int64_t tiles, int64_t channels, int64_t outputs,
                                int64_t threads) {
  const bool cached = 4 * products * channels * padded(outputs) <= kCachedWeights;
  if (!cached || (threads > 1 && tiles < kTilesCached * threads)) {
    const int64_t bytes = 4 * block_floats(products, 1, channels, outputs);
    const int64_t most = std::clamp(kBlockBytes / bytes, kTilesStreamed / 2, kTilesStreamed);
    const int64_t blocks = std::max<int64_t>(1, (tiles + most - 1) / most);
    return {(tiles + blocks - 1) / blocks, threads > 1};
  }
  // The size by which the thread with the most blocks ends first.
  int64_t best = std::min(kTilesCached, tiles), best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t size = best; size <= std::min(2 * kTilesCached, tiles); ++size) {
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

// Stages of units of work, done in one parallel region: a unit goes to the first thread that is
// free, and a stage begins when all units of the one before are done. A region for each stage would
// wait for every thread at its end, which takes long where another process holds a processor.
class Team {
 public:
  // `work` gets the unit and the number of the thread's place in a workspace.
  void add(int64_t units, std::function<void(int64_t unit, int64_t worker)> work) {
    if (units == 0) return;
    stages_.emplace_back(units, total_, std::move(work));
    total_ += units;
  }

  // parallel(count, function(begin, end)) calls the function in up to `threads` threads.
  template <typename Parallel>
  void run(int64_t threads, const Parallel& parallel) {
    parallel(std::min(threads, total_), [&](int64_t begin, int64_t) { run_units(begin); });
  }

 private:
  struct Stage {
    Stage(int64_t units, int64_t first, std::function<void(int64_t, int64_t)> work)
        : units(units), first(first), work(std::move(work)) {}
    const int64_t units;
    const int64_t first;
    const std::function<void(int64_t, int64_t)> work;
    std::atomic<int64_t> done{0};
  };

  // Units are taken in order, so that whoever waits does so for units that others are at.
  void run_units(int64_t worker) {
    size_t stage = 0;
    for (;;) {
      const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
      if (unit >= total_) return;
      while (unit >= stages_[stage].first + stages_[stage].units) ++stage;
      if (stage > 0) wait(stages_[stage - 1]);
      stages_[stage].work(unit - stages_[stage].first, worker);
      stages_[stage].done.fetch_add(1, std::memory_order_release);
    }
  }

  static void wait(const Stage& stage) {
    constexpr int kSpins = 256;
    for (int i = 0; stage.done.load(std::memory_order_acquire) < stage.units; ++i) {
      if (i >= kSpins) std::this_thread::yield();
    }
  }

  std::deque<Stage> stages_;
  std::atomic<int64_t> next_{0};
  int64_t total_ = 0;
};

// Tiles [first, first + count) of a group.
struct Span {
  int64_t first;
  int64_t count;
};

// The work on the blocks of one group. A block's buffers hold its transformed inputs
// [products][capacity][chunk], then its products [products][capacity][outputs].
class GroupWork {
 public:
  // What transforms and finishes a unit's tiles takes about as long as a unit of products.
  static constexpr int64_t kUnitTiles = 8;

  GroupWork(const ConvKernels& kernels, const InputMap& x, TileGroup group,
            const Epilogue& epilogue, int dilation, int64_t capacity)
      : kernels_(kernels),
        x_(x),
        group_(std::move(group)),
        epilogue_(epilogue),
        row_(kForms[group_.rows.form]),
        column_(kForms[group_.columns.form]),
        dilation_(dilation),
        chunk_(chunk_channels(x.channels)),
        input_stride_(chunk_ + kRowPad),
        output_stride_(padded(epilogue.channels) + kRowPad),
        capacity_(capacity) {}

  // A whole block in one thread.
  void run(Span block, float* buffer) const {
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      transform(block, buffer, channel, {0, block.count});
      for (int64_t unit = 0; unit < units(); ++unit) multiply(block, buffer, channel, unit);
    }
    finish(block, buffer, {0, block.count});
  }

  // A block whose units the threads of a team share.
  void add_to(Team& team, Span block, float* buffer) const {
    const int64_t parts = (block.count + kUnitTiles - 1) / kUnitTiles;
    const auto part = [block](int64_t unit) {
      const int64_t first = unit * kUnitTiles;
      return Span{first, std::min(kUnitTiles, block.count - first)};
    };
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      team.add(parts,
               [=, this](int64_t unit, int64_t) { transform(block, buffer, channel, part(unit)); });
      team.add(units(),
               [=, this](int64_t unit, int64_t) { multiply(block, buffer, channel, unit); });
    }
    team.add(parts, [=, this](int64_t unit, int64_t) { finish(block, buffer, part(unit)); });
  }

 private:
  static constexpr int kMaxTile = kMaxInputs * kMaxInputs;

  // Position of a tile: its image and the indices of its row and column.
  void locate(int64_t tile, int64_t& image, int64_t& row, int64_t& column) const {
    const int64_t columns = static_cast<int64_t>(group_.columns.starts.size());
    const int64_t rows = static_cast<int64_t>(group_.rows.starts.size());
    column = tile % columns;
    row = tile / columns % rows;
    image = tile / (columns * rows);
  }

  float* products(float* buffer) const {
    return buffer + group_.products() * capacity_ * input_stride_;
  }

  // To the transformed inputs of the block's tiles `span`, for the chunk from `channel`.
  void transform(Span block, float* buffer, int64_t channel, Span span) const {
    alignas(64) static const float zeros[kMaxChunk + kPanel] = {};
    const FormKernels& rows = kernels_.forms[group_.rows.form];
    const FormKernels& columns = kernels_.forms[group_.columns.form];
    const int64_t depth = std::min(chunk_, x_.channels - channel);
    const int64_t whole = depth / kPanel * kPanel;
    const int64_t plane = capacity_ * input_stride_;
    const int count = row_.inputs * column_.inputs;
    alignas(64) float line[kMaxProducts * kMaxInputs * kStrip];
    const float* pixels[kMaxTile];
    for (int64_t tile = span.first; tile < span.first + span.count; ++tile) {
      int64_t image, row, column;
      locate(block.first + tile, image, row, column);
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
      float* const to = buffer + tile * input_stride_;
      for (int64_t c = 0; c < whole; c += kStrip) {
        const int size = static_cast<int>(std::min<int64_t>(kStrip, whole - c));
        rows.input_rows(pixels, c, size, column_.inputs, line);
        columns.input_columns(line, size, row_.products, to + c, plane);
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

  void multiply(Span block, float* buffer, int64_t channel, int64_t unit) const {
    const int64_t panel_size = x_.channels * kPanel;
    const int64_t p = unit / parts(), first_panel = unit % parts() * kUnitPanels;
    Product product{};
    product.a = buffer + p * capacity_ * input_stride_;
    product.a_stride = input_stride_;
    product.rows = block.count;
    product.panels =
        group_.weights + (p * num_panels() + first_panel) * panel_size + channel * kPanel;
    product.panel_stride = panel_size;
    product.num_panels = std::min(kUnitPanels, num_panels() - first_panel);
    product.c = products(buffer) + p * capacity_ * output_stride_ + first_panel * kPanel;
    product.c_stride = output_stride_;
    product.depth = std::min(chunk_, x_.channels - channel);
    product.accumulate = channel > 0;
    product.prefetch_rows = true;
    product.run = kRun;
    kernels_.multiply(product);
  }

  // From the products of the block's tiles `span` to the outputs.
  void finish(Span block, float* buffer, Span span) const {
    const FormKernels& rows = kernels_.forms[group_.rows.form];
    const FormKernels& columns = kernels_.forms[group_.columns.form];
    const int64_t plane = capacity_ * output_stride_;
    alignas(64) float line[kMaxOutputs * kMaxProducts * kStrip];
    int64_t pixels[kMaxOutputs * kMaxOutputs];
    for (int64_t tile = span.first; tile < span.first + span.count; ++tile) {
      int64_t image, row, column;
      locate(block.first + tile, image, row, column);
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
        rows.output_rows(products(buffer) + tile * output_stride_ + channel, plane, count,
                         column_.products, line);
        columns.output_columns(line, row_.outputs, pixels, channel, count, epilogue_);
      }
    }
  }

  // Output channels that a unit multiplies, in panels.
  static constexpr int64_t kUnitPanels = 8;

  const ConvKernels& kernels_;
  const InputMap& x_;
  const TileGroup group_;
  const Epilogue& epilogue_;
  const Form& row_;
  const Form& column_;
  const int dilation_;
  const int64_t chunk_;
  const int64_t input_stride_;
  const int64_t output_stride_;
  const int64_t capacity_;
};

// Multiply-adds that are worth another thread: 25 microseconds.
constexpr int64_t kThreadWork = 1000000;

inline int64_t useful_threads(int64_t work, int64_t threads) {
  return std::clamp<int64_t>(work / kThreadWork, 1, threads);
}

// A convolution by all its groups. block_tiles 0 chooses the blocks, n blocks of n tiles for each
// thread, -n blocks of n tiles that the threads share. parallel(count, function(begin, end)) calls
// the function in threads; allocate(floats) gives memory that lives as long as its result, with
// data() to the first float, aligned to 64 bytes.
template <typename Parallel, typename Allocate>
void run_tiles(const ConvKernels& kernels, const InputMap& x, const std::vector<TileGroup>& groups,
               const Epilogue& epilogue, int dilation, int64_t block_tiles, int64_t threads,
               const Parallel& parallel, const Allocate& allocate) {
  int64_t work = 0;
  for (const TileGroup& group : groups) {
    work += group.products() * x.images * group.tiles() * x.channels * epilogue.channels;
  }
  if (work == 0) return;
  threads = useful_threads(work, threads);

  struct Part {
    GroupWork work;
    Blocking blocking;
    int64_t tiles;
  };
  std::deque<Part> parts;
  int64_t floats = 0;
  for (const TileGroup& group : groups) {
    const int64_t tiles = x.images * group.tiles();
    Blocking blocking =
        choose_blocking(group.products(), tiles, x.channels, epilogue.channels, threads);
    if (block_tiles != 0) blocking = {std::abs(block_tiles), block_tiles < 0};
    blocking.tiles = std::min(blocking.tiles, tiles);
    parts.push_back(
        {GroupWork(kernels, x, group, epilogue, dilation, blocking.tiles), blocking, tiles});
    floats = std::max(
        floats, block_floats(group.products(), blocking.tiles, x.channels, epilogue.channels));
  }
  // One buffer serves the shared blocks, one after the other, and each thread's own ones.
  floats = padded(floats);
  auto buffers = allocate(floats * threads);
  float* const buffer = buffers.data();
  Team team;
  for (const Part& part : parts) {
    const GroupWork& group = part.work;
    const int64_t size = part.blocking.tiles, tiles = part.tiles;
    const auto block = [size, tiles](int64_t i) {
      return Span{i * size, std::min(size, tiles - i * size)};
    };
    const int64_t blocks = (tiles + size - 1) / size;
    if (part.blocking.shared) {
      for (int64_t i = 0; i < blocks; ++i) group.add_to(team, block(i), buffer);
    } else {
      team.add(blocks, [=, &group](int64_t i, int64_t worker) {
        group.run(block(i), buffer + worker * floats);
      });
    }
  }
  team.run(threads, parallel);
}

}  // namespace deeplab_fast::cpu
