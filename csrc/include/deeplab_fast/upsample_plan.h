// How the CUDA kernels of the upsampling ops are launched: blocks, threads and shared memory. Host
// code without CUDA and without torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "deeplab_fast/bilinear.h"

namespace deeplab_fast::cuda {

// A block of the label kernels takes this many output columns, one for each thread ...
constexpr int kTileColumns = 128;
// ... and this many output rows at a time, whose state it keeps in registers.
constexpr int kTileRows = 8;
// More output rows than this between two source rows are given to several blocks.
constexpr int kSplitRows = 32;
// Row weights that a tile keeps: of all rows, and of the repeated last one behind them.
constexpr int kTileWeights = kSplitRows + kTileRows;
// Logits of shared memory: 16 KB in fp32, which leaves room for 6 blocks on an SM of sm_80.
constexpr int kStageValues = 4096;
// Softmax statistics of so many pixels are kept between the two phases of the gradient kernel.
constexpr int kPixels = 512;
constexpr int kPixelRows = 4;
constexpr int kMaxThreads = 256;
// One block sums up what the blocks of the gradient kernel found.
constexpr int kFinishThreads = 256;
constexpr int kGatherThreads = 256;

// The most output indices that one source index has.
template <typename T>
int most_outputs(const Axis<T>& axis) {
  int most = 1;
  for (int cell = 0, first = 0; cell < axis.in; ++cell) {
    const int next = first_output(axis, cell + 1);
    most = std::max(most, next - first);
    first = next;
  }
  return most;
}

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Blocks of the label kernels: (image, source row, split, column tile), the last fastest.
struct TilePlan {
  int tiles;
  int splits;
  int slots;          // columns of the staged logits; kPrivateSlots where tiles need more
  int pitch;          // slots, made odd to spread over the banks
  int stage_classes;  // classes that are staged at a time
  int64_t blocks;
  size_t shared_bytes;
};

// Each thread stages its own two source columns where a tile has more than these.
constexpr int kPrivateSlots = 2 * kTileColumns;

template <typename T>
TilePlan plan_tiles(int images, int classes, const Axis<T>& rows, const Axis<T>& columns) {
  TilePlan plan{};
  plan.tiles = divide_up(columns.out, kTileColumns);
  plan.splits = divide_up(most_outputs(rows), kSplitRows);
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const int first = tile * kTileColumns;
    const int last = std::min(first + kTileColumns, columns.out) - 1;
    const int count = source_tap(columns, last).hi - source_cell(columns, first) + 1;
    plan.slots = std::max(plan.slots, count);
  }
  plan.slots = std::min(plan.slots, kPrivateSlots);
  plan.pitch = plan.slots | 1;
  plan.stage_classes = std::min(classes, kStageValues / (2 * plan.pitch));
  plan.blocks = static_cast<int64_t>(images) * rows.in * plan.splits * plan.tiles;
  plan.shared_bytes = sizeof(T) * (kTileWeights + 2 * plan.stage_classes * plan.pitch);
  return plan;
}

// Blocks of the cross entropy kernel: (image, source row, split, tile of source columns), the last
// fastest. A block owns the outputs between its source pixels.
struct CellPlan {
  int cells;  // source columns of a tile
  int tiles;
  int splits;
  int threads;
  int pitch;
  int stage_classes;
  int64_t blocks;
  size_t stage_bytes;
};

template <typename T>
CellPlan plan_cells(int images, int classes, const Axis<T>& rows, const Axis<T>& columns,
                    bool with_grad) {
  CellPlan plan{};
  // In its second phase a thread has one (cell, class) pair; a sub-tile of kPixels pixels is no
  // wider than kPixels / kPixelRows columns.
  const int64_t wide = static_cast<int64_t>(kPixels / kPixelRows) * columns.in / columns.out;
  const int most = static_cast<int>(std::clamp<int64_t>(wide, 1, kPixels / kPixelRows));
  plan.threads = 128;
  plan.cells = std::min(most, columns.in);
  if (with_grad) {
    double best = 0;
    for (int threads = 128; threads <= kMaxThreads; threads += 32) {
      const int cells = std::max(1, std::min({threads / classes, most, columns.in}));
      const int pairs = cells * classes;
      const double busy = static_cast<double>(pairs) / (divide_up(pairs, threads) * threads);
      // More threads have to be worth it: smaller blocks share an SM more evenly.
      if (busy > best * 1.02) {
        best = busy;
        plan.threads = threads;
        plan.cells = cells;
      }
    }
  }
  plan.tiles = divide_up(columns.in, plan.cells);
  plan.splits = divide_up(most_outputs(rows), kSplitRows);
  plan.pitch = (plan.cells + 1) | 1;
  plan.stage_classes = std::min(classes, kStageValues / (2 * plan.pitch));
  plan.blocks = static_cast<int64_t>(images) * rows.in * plan.splits * plan.tiles;
  plan.stage_bytes = sizeof(T) * 2 * plan.stage_classes * plan.pitch;
  return plan;
}

// Values of the partial gradients: [images][source rows][splits][source columns][4][classes].
template <typename T>
int64_t partial_size(const CellPlan& plan, int images, int classes, const Axis<T>& rows,
                     const Axis<T>& columns) {
  return static_cast<int64_t>(images) * rows.in * plan.splits * columns.in * 4 * classes;
}

}  // namespace deeplab_fast::cuda
