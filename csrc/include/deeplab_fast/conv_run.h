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

// Pixels of x [images][height][width], each `channels` contiguous values.
template <typename Value>
struct InputMapOf {
  const Value* data;
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
};

using InputMap = InputMapOf<float>;

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
template <typename Factor>
struct TileGroupOf {
  AxisTiles rows;
  AxisTiles columns;
  const Factor* weights;  // panels of each product

  int64_t products() const {
    return int64_t{kForms[rows.form].products} * kForms[columns.form].products;
  }
  int64_t tiles() const {
    return static_cast<int64_t>(rows.starts.size()) * static_cast<int64_t>(columns.starts.size());
  }
};

using TileGroup = TileGroupOf<float>;

struct Blocking {
  int64_t tiles;  // in a block
  bool shared;    // all threads work on one block at a time, else each on a block of its own
};

inline int64_t chunk_channels(int64_t channels) {
  const int64_t chunks = (channels + kMaxChunk - 1) / kMaxChunk;
  return padded((channels + chunks - 1) / chunks);
}

// Floats of the buffers of one block: transformed inputs of a chunk of channels, and products.
template <typename Factor>
int64_t block_floats(int64_t products, int64_t tiles, int64_t channels, int64_t outputs) {
  const int64_t inputs = (chunk_channels(channels) + kRowPad) / kPerWord<Factor>;
  return products * tiles * (inputs + padded(outputs) + kRowPad);
}

constexpr int64_t kTilesCached = 24;
constexpr int64_t kTilesStreamed = 192;

// What the blocks may take of the last cache that processors share.
struct CacheShares {
  // Prepared weights up to this size stay in the cache, and blocks can be as small as makes the
  // products worth their calls; larger ones come from memory for each block anew, which all threads
  // then share, so that each weight is read by one of them only.
  int64_t weights;
  // Of the buffers of a shared block.
  int64_t block;
};

// Of a cache of so many bytes. Measured with 32 MiB: shared blocks of 20 MiB, and of twice that,
// which took twice as long. Where nothing is known of the cache it is taken to be of that size; a
// cache beyond 64 MiB is one of many processors, of which a process may have few.
constexpr CacheShares cache_shares(int64_t bytes) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  const int64_t size = std::clamp(bytes > 0 ? bytes : 32 * kMiB, 8 * kMiB, 64 * kMiB);
  return {size / 8 * 3, size / 8 * 5};
}

// Time of multiplying a block of `tiles` rows, in rows. A few rows beyond whole register tiles of 6
// (or 12) take as long as 4, which the latency of their additions needs.
constexpr int64_t row_cost(int64_t tiles) {
  return tiles / 6 * 6 + (tiles % 6 == 0 ? 0 : std::max<int64_t>(tiles % 6, 4));
}

template <typename Factor>
Blocking choose_blocking(int64_t products, int64_t tiles, int64_t channels, int64_t outputs,
                         int64_t threads, const CacheShares& cache) {
  const int64_t weight_bytes = sizeof(Factor) * products * channels * padded(outputs);
  const bool cached = weight_bytes <= cache.weights;
  if (!cached || (threads > 1 && tiles < kTilesCached * threads)) {
    const int64_t bytes = 4 * block_floats<Factor>(products, 1, channels, outputs);
    // Many threads end a stage of few tiles together seldom, and wait for each other.
    const int64_t most = std::clamp(cache.block / bytes, kTilesStreamed / 2,
                                    std::max(kTilesStreamed, kTilesCached / 2 * threads));
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

// What a unit of work costs: multiply-adds of products, and lines of kPanel floats that transforms
// read or write.
struct UnitCost {
  int64_t macs;
  int64_t lines;
};

// Stages of units of work, done in one parallel region: a unit goes to the first thread that is
// free, and a stage begins when all units of the one before are done. A region for each stage would
// wait for every thread at its end, which takes long where another process holds a processor.
class Team {
 public:
  // `work` gets the unit and the number of the thread's place in a workspace.
  void add(int64_t units, std::function<void(int64_t unit, int64_t worker)> work,
           std::function<UnitCost(int64_t unit)> cost = nullptr) {
    if (units == 0) return;
    stages_.emplace_back(units, total_, std::move(work), std::move(cost));
    total_ += units;
  }

  int64_t total() const { return total_; }

  // function(stage, cost) for each unit, in their order.
  template <typename Function>
  void for_costs(const Function& function) const {
    for (size_t stage = 0; stage < stages_.size(); ++stage) {
      for (int64_t unit = 0; unit < stages_[stage].units; ++unit) {
        function(static_cast<int64_t>(stage), stages_[stage].cost(unit));
      }
    }
  }

  // parallel(count, function(begin, end)) calls the function in up to `threads` threads.
  template <typename Parallel>
  void run(int64_t threads, const Parallel& parallel) {
    parallel(std::min(threads, total_), [&](int64_t begin, int64_t) { run_units(begin); });
  }

 private:
  struct Stage {
    Stage(int64_t units, int64_t first, std::function<void(int64_t, int64_t)> work,
          std::function<UnitCost(int64_t)> cost)
        : units(units), first(first), work(std::move(work)), cost(std::move(cost)) {}
    const int64_t units;
    const int64_t first;
    const std::function<void(int64_t, int64_t)> work;
    const std::function<UnitCost(int64_t)> cost;
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

// [first, first + count) of something.
struct Span {
  int64_t first;
  int64_t count;

  int64_t end() const { return first + count; }
};

// Two axes cut into units of `first` by `second`.
struct Cut {
  int64_t first;
  int64_t second;
};

constexpr int64_t parts_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

inline Span part_of(int64_t length, int64_t size, int64_t part) {
  return {part * size, std::min(size, length - part * size)};
}

// The costs below are in lines that a transform reads or writes, of about 5 ns, which is also what
// the first reading of a line of a product's operands takes: of the multiply-adds that take as
// long, of a unit, of a tile in it, and of taking a unit from the counter that all threads share.
constexpr int64_t kLineMacs = 200;
constexpr int64_t kUnitLines = 40;
constexpr int64_t kTileLines = 12;
constexpr int64_t kTakeLines = 10;

// Time until the threads have done `units` units of cost `each`.
constexpr int64_t stage_cost(int64_t units, int64_t each, int64_t threads) {
  return (units + threads - 1) / threads * (each + kUnitLines) + units * kTakeLines;
}

// Whether a smaller unit is worth its cost: a gain of less than 3 % is none.
constexpr bool pays(int64_t cost, int64_t best) { return cost < best / 100 * 97; }

// Tiles and strips of channels that a unit transforms, of strips that cost `lines` in each tile.
inline Cut cut_transform(int64_t tiles, int64_t strips, int64_t lines, int64_t threads) {
  constexpr int64_t kMostTiles = 8;
  Cut best{};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t strip = strips;; strip = (strip + 1) / 2) {
    for (int64_t size = std::min(kMostTiles, tiles); size > 0; --size) {
      const int64_t units = parts_of(tiles, size) * parts_of(strips, strip);
      const int64_t cost = stage_cost(units, size * (strip * lines + kTileLines), threads);
      if (pays(cost, best_cost)) best = {size, strip}, best_cost = cost;
    }
    if (strip == 1) return best;
  }
}

// Rows and panels that a unit multiplies, of `products` products of depth `depth`.
inline Cut cut_product(int64_t products, int64_t rows, int64_t panels, int64_t depth,
                       int64_t threads) {
  // Rows of register tiles in every instruction set; the multiplication takes panels in pairs.
  constexpr int64_t kWholeRows = 12, kLeastRows = 24;
  Cut best{};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (const int64_t most : {8, 4, 2}) {
    const int64_t some = std::min(most, panels);
    for (int64_t parts = 1; parts == 1 || rows / parts >= kLeastRows; ++parts) {
      const int64_t size =
          parts == 1 ? rows : parts_of(parts_of(rows, parts), kWholeRows) * kWholeRows;
      const int64_t units = products * parts_of(panels, some) * parts_of(rows, size);
      const int64_t macs = row_cost(size) * some * kPanel * depth;
      const int64_t each = macs / kLineMacs + (size + some * kPanel) * depth / kPanel;
      const int64_t cost = stage_cost(units, each, threads);
      if (pays(cost, best_cost)) best = {size, some}, best_cost = cost;
    }
  }
  return best;
}

// The work on the blocks of one group. A block's buffers hold its transformed inputs
// [products][capacity][chunk], then its products [products][capacity][outputs]. Maps of In give
// maps of Out, by products of Factor.
template <typename In, typename Factor, typename Out>
class GroupWork {
 public:
  GroupWork(const ConvKernels& kernels, const InputMapOf<In>& x, TileGroupOf<Factor> group,
            const EpilogueOf<Out>& epilogue, int dilation, int64_t capacity)
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
    const Span tiles{0, block.count};
    const Cut cut = cut_product(group_.products(), block.count, num_panels(), chunk_, 1);
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      transform(block, buffer, channel, tiles, {0, depth(channel)});
      for (int64_t unit = 0; unit < product_units(block, cut); ++unit) {
        multiply(block, buffer, channel, cut, unit);
      }
    }
    finish(block, buffer, tiles, {0, padded(epilogue_.channels)});
  }

  UnitCost run_cost(Span block) const {
    UnitCost cost = finish_cost({0, block.count}, {0, padded(epilogue_.channels)});
    cost.macs = block.count * group_.products() * x_.channels * padded(epilogue_.channels);
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      cost.lines += transform_cost({0, block.count}, {0, depth(channel)}).lines;
    }
    return cost;
  }

  // A block whose units `threads` threads of a team share.
  void add_to(Team& team, Span block, float* buffer, int64_t threads) const {
    for (int64_t channel = 0; channel < x_.channels; channel += chunk_) {
      const int64_t channels = depth(channel);
      add_strips(
          team, block, channels, transform_cost({0, 1}, {0, kStrip}).lines, threads,
          [=, this](Span tiles, Span strip) { transform(block, buffer, channel, tiles, strip); },
          [this](Span tiles, Span strip) { return transform_cost(tiles, strip); });
      const Cut cut = cut_product(group_.products(), block.count, num_panels(), channels, threads);
      team.add(
          product_units(block, cut),
          [=, this](int64_t unit, int64_t) { multiply(block, buffer, channel, cut, unit); },
          [=, this](int64_t unit) {
            const ProductUnit own = product_unit(block, cut, unit);
            return UnitCost{own.rows.count * own.panels.count * kPanel * channels, 0};
          });
    }
    add_strips(
        team, block, padded(epilogue_.channels), finish_cost({0, 1}, {0, kStrip}).lines, threads,
        [=, this](Span tiles, Span strip) { finish(block, buffer, tiles, strip); },
        [this](Span tiles, Span strip) { return finish_cost(tiles, strip); });
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

  // Channels of the chunk from `channel`.
  int64_t depth(int64_t channel) const { return std::min(chunk_, x_.channels - channel); }

  UnitCost transform_cost(Span tiles, Span channels) const {
    const int64_t values = row_.inputs * column_.inputs + group_.products();
    return {0, tiles.count * parts_of(channels.count, kPanel) * values};
  }

  UnitCost finish_cost(Span tiles, Span channels) const {
    const int64_t values = row_.outputs * column_.outputs + group_.products();
    return {0, tiles.count * parts_of(channels.count, kPanel) * values};
  }

  // A stage of units of tiles and strips of channels: work and cost get both.
  template <typename Work, typename Cost>
  static void add_strips(Team& team, Span block, int64_t channels, int64_t strip_lines,
                         int64_t threads, const Work& work, const Cost& cost) {
    const int64_t strips = parts_of(channels, kStrip);
    const Cut cut = cut_transform(block.count, strips, strip_lines, threads);
    const int64_t across = parts_of(strips, cut.second);
    const auto tiles = [=](int64_t unit) { return part_of(block.count, cut.first, unit / across); };
    const auto strip = [=](int64_t unit) {
      return part_of(channels, cut.second * kStrip, unit % across);
    };
    team.add(
        parts_of(block.count, cut.first) * across,
        [=](int64_t unit, int64_t) { work(tiles(unit), strip(unit)); },
        [=](int64_t unit) { return cost(tiles(unit), strip(unit)); });
  }

  Factor* inputs(float* buffer) const { return reinterpret_cast<Factor*>(buffer); }

  float* products(float* buffer) const {
    return buffer + group_.products() * capacity_ * input_stride_ / kPerWord<Factor>;
  }

  // To the transformed inputs of the block's tiles `span`, for `channels` of the chunk from
  // `chunk`.
  void transform(Span block, float* buffer, int64_t chunk, Span span, Span channels) const {
    alignas(64) static const In zeros[kMaxChunk + kPanel] = {};
    const MapKernels<In>& rows = kernels_.forms[group_.rows.form];
    const FactorKernels<Factor>& columns = kernels_.forms[group_.columns.form];
    const int64_t depth = channels.end();
    const int64_t whole = depth / kPanel * kPanel;
    const int64_t plane = capacity_ * input_stride_;
    const int count = row_.inputs * column_.inputs;
    alignas(64) float line[kMaxProducts * kMaxInputs * kStrip];
    const In* pixels[kMaxTile];
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
                                               ? x_.data + (start + x) * x_.channels + chunk
                                               : zeros;
        }
      }
      Factor* const to = inputs(buffer) + tile * input_stride_;
      for (int64_t c = channels.first; c < whole; c += kStrip) {
        const int size = static_cast<int>(std::min<int64_t>(kStrip, whole - c));
        rows.input_rows(pixels, c, size, column_.inputs, line);
        columns.input_columns(line, size, row_.products, to + c, plane);
      }
      if (whole < depth) {
        alignas(64) In tail[kMaxTile][kPanel];
        for (int i = 0; i < count; ++i) {
          std::fill(tail[i], tail[i] + kPanel, In{});
          std::copy(pixels[i] + whole, pixels[i] + depth, tail[i]);
          pixels[i] = tail[i];
        }
        rows.input_rows(pixels, 0, kPanel, column_.inputs, line);
        columns.input_columns(line, kPanel, row_.products, to + whole, plane);
      }
    }
  }

  int64_t num_panels() const { return padded(epilogue_.channels) / kPanel; }

  // Units are products times parts of the output channels times parts of the rows, so that units
  // that follow each other read the same weights.
  int64_t product_units(Span block, Cut cut) const {
    return group_.products() * parts_of(num_panels(), cut.second) *
           parts_of(block.count, cut.first);
  }

  struct ProductUnit {
    int64_t product;
    Span panels;
    Span rows;
  };

  ProductUnit product_unit(Span block, Cut cut, int64_t unit) const {
    const int64_t down = parts_of(block.count, cut.first);
    const int64_t across = parts_of(num_panels(), cut.second);
    return {unit / (down * across), part_of(num_panels(), cut.second, unit / down % across),
            part_of(block.count, cut.first, unit % down)};
  }

  void multiply(Span block, float* buffer, int64_t channel, Cut cut, int64_t unit) const {
    const int64_t size = panel_size<Factor>(x_.channels);
    const auto [p, panels, rows] = product_unit(block, cut, unit);
    const int64_t first_row = p * capacity_ + rows.first;
    ProductOf<Factor> product{};
    product.a = inputs(buffer) + first_row * input_stride_;
    product.a_stride = input_stride_;
    product.rows = rows.count;
    product.panels = group_.weights + (p * num_panels() + panels.first) * size + channel * kPanel;
    product.panel_stride = size;
    product.num_panels = panels.count;
    product.c = products(buffer) + first_row * output_stride_ + panels.first * kPanel;
    product.c_stride = output_stride_;
    product.depth = depth(channel);
    product.accumulate = channel > 0;
    product.prefetch_rows = true;
    product.run = kRun;
    cpu::multiply(kernels_, product);
  }

  // From the products of the block's tiles `span` to the outputs `channels`.
  void finish(Span block, float* buffer, Span span, Span channels) const {
    const FormKernels& rows = kernels_.forms[group_.rows.form];
    const MapKernels<Out>& columns = kernels_.forms[group_.columns.form];
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
      for (int64_t channel = channels.first; channel < channels.end(); channel += kStrip) {
        const int count = static_cast<int>(std::min<int64_t>(kStrip, channels.end() - channel));
        rows.output_rows(products(buffer) + tile * output_stride_ + channel, plane, count,
                         column_.products, line);
        columns.output_columns(line, row_.outputs, pixels, channel, count, epilogue_);
      }
    }
  }

  const ConvKernels& kernels_;
  const InputMapOf<In>& x_;
  const TileGroupOf<Factor> group_;
  const EpilogueOf<Out>& epilogue_;
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

// A convolution by all its groups, as a team's stages. block_tiles 0 chooses the blocks, n asks for
// blocks of n tiles for each thread, -n for blocks of n tiles that the threads share.
template <typename In, typename Factor, typename Out>
class TileWork {
 public:
  TileWork(const ConvKernels& kernels, const InputMapOf<In>& x,
           const std::vector<TileGroupOf<Factor>>& groups, const EpilogueOf<Out>& epilogue,
           int dilation, int64_t block_tiles, int64_t threads, const CacheShares& cache) {
    int64_t work = 0;
    for (const TileGroupOf<Factor>& group : groups) {
      work += group.products() * x.images * group.tiles() * x.channels * epilogue.channels;
    }
    if (work == 0) return;
    threads_ = useful_threads(work, threads);
    int64_t floats = 0;
    for (const TileGroupOf<Factor>& group : groups) {
      const int64_t tiles = x.images * group.tiles();
      Blocking blocking = choose_blocking<Factor>(group.products(), tiles, x.channels,
                                                  epilogue.channels, threads_, cache);
      if (block_tiles != 0) blocking = {std::abs(block_tiles), block_tiles < 0};
      blocking.tiles = std::min(blocking.tiles, tiles);
      parts_.push_back(
          {GroupWork<In, Factor, Out>(kernels, x, group, epilogue, dilation, blocking.tiles),
           blocking, tiles});
      floats = std::max(floats, block_floats<Factor>(group.products(), blocking.tiles, x.channels,
                                                     epilogue.channels));
    }
    block_floats_ = padded(floats);
  }

  int64_t threads() const { return threads_; }

  // Floats of the buffer: it serves the shared blocks, one after the other, and each thread's own.
  int64_t floats() const { return block_floats_ * threads_; }

  void add_to(Team& team, float* buffer) const {
    for (const Part& part : parts_) {
      const GroupWork<In, Factor, Out>& group = part.work;
      const int64_t size = part.blocking.tiles, tiles = part.tiles, floats = block_floats_;
      const int64_t blocks = parts_of(tiles, size);
      if (part.blocking.shared) {
        for (int64_t i = 0; i < blocks; ++i) {
          group.add_to(team, part_of(tiles, size, i), buffer, threads_);
        }
      } else {
        team.add(
            blocks,
            [=, &group](int64_t i, int64_t worker) {
              group.run(part_of(tiles, size, i), buffer + worker * floats);
            },
            [=, &group](int64_t i) { return group.run_cost(part_of(tiles, size, i)); });
      }
    }
  }

 private:
  struct Part {
    GroupWork<In, Factor, Out> work;
    Blocking blocking;
    int64_t tiles;
  };

  std::deque<Part> parts_;
  int64_t threads_ = 1;
  int64_t block_floats_ = 0;
};

// Runs a TileWork of these arguments. parallel(count, function(begin, end)) calls the function in
// threads; allocate(floats) gives memory that lives as long as its result, with data() to the first
// float, aligned to 64 bytes.
template <typename In, typename Factor, typename Out, typename Parallel, typename Allocate>
void run_tiles(const ConvKernels& kernels, const InputMapOf<In>& x,
               const std::vector<TileGroupOf<Factor>>& groups, const EpilogueOf<Out>& epilogue,
               int dilation, int64_t block_tiles, int64_t threads, const CacheShares& cache,
               const Parallel& parallel, const Allocate& allocate) {
  const TileWork work(kernels, x, groups, epilogue, dilation, block_tiles, threads, cache);
  if (work.floats() == 0) return;
  auto buffers = allocate(work.floats());
  Team team;
  work.add_to(team, buffers.data());
  team.run(work.threads(), parallel);
}

}  // namespace deeplab_fast::cpu
