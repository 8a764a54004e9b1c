// CUDA kernels of the upsampling ops, for sm_80 and newer. Without torch.
//
// All outputs between two source rows share their interpolation along columns, so that blocks are
// bands of outputs with the same first source row, whatever the ratio; 513 / 65 is not an integer.
//
//   argmax, confusion, softmax_add   a block takes 128 output columns of a band, a thread one
//                                    column and 8 rows at a time. Classes run in the innermost loop
//                                    over logits in shared memory; full-resolution logits are never
//                                    stored.
//   cross entropy                    a block takes a few source columns of a band. Phase 1: a
//                                    thread has one column and 4 rows and finds the softmax
//                                    statistics of its pixels. Phase 2: a thread has one (source
//                                    column, class) pair, walks the pixels between its four source
//                                    pixels and sums their gradients in registers, in a fixed
//                                    order. The sums go to a place of their own; `gather_gradient`
//                                    adds up the at most nine that a source pixel gets.
//
// Sums have a fixed order: results do not change from run to run. The only atomics count pixels.
// fp16, bf16 and fp32 logits are computed in fp32, double in double.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "deeplab_fast/bilinear.h"
#include "deeplab_fast/launch.cuh"
#include "deeplab_fast/upsample_plan.h"

namespace deeplab_fast::cuda {

// How low-resolution values are stored: as T, or in half precision.
enum class Storage { kFull, kHalf, kBfloat16 };

template <typename T>
struct Logits {
  const void* data;
  Storage storage;
  int64_t stride_image;
  int64_t stride_class;
  int64_t stride_row;
  int64_t stride_column;
  int images;
  int classes;
  Axis<T> rows;
  Axis<T> columns;

  // Outside the loops over pixels, so that the choice of type costs nothing.
  __device__ T at(int image, int c, int row, int column) const {
    const int64_t i =
        image * stride_image + c * stride_class + row * stride_row + column * stride_column;
#if defined(__CUDACC__)
    if (storage == Storage::kHalf) return __half2float(static_cast<const __half*>(data)[i]);
    if (storage == Storage::kBfloat16) {
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    }
#endif
    return static_cast<const T*>(data)[i];
  }
};

enum class LabelType { kUint8, kInt32, kInt64 };

// Contiguous labels [images, rows.out, columns.out].
struct Labels {
  const void* data;
  LabelType type;
  int64_t ignore_index;

  // -1 for an ignored pixel; a label that is neither ignored nor a class counts as ignored.
  __device__ int read(int64_t index, int classes, bool* bad) const {
    int64_t label;
    switch (type) {
      case LabelType::kUint8:
        label = static_cast<const uint8_t*>(data)[index];
        break;
      case LabelType::kInt32:
        label = static_cast<const int32_t*>(data)[index];
        break;
      default:
        label = static_cast<const int64_t*>(data)[index];
    }
    const bool ignored = label == ignore_index;
    const bool inside = label >= 0 && label < classes;
    *bad = !ignored && !inside;
    return !ignored && inside ? static_cast<int>(label) : -1;
  }
};

// Of the accurate functions: __expf is off by 1e-6 where x is -10.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float natural_log(float x) { return logf(x); }
__device__ inline double natural_log(double x) { return log(x); }

template <typename T>
__device__ inline T minus_infinity() {
  return -static_cast<T>(INFINITY);
}

// A block of the label kernels.
template <typename T>
class Tile {
 public:
  // `memory` has room for kTileWeights values and the staged logits. All threads of the block make
  // their Tile together.
  __device__ Tile(const Logits<T>& logits, const TilePlan& plan, int64_t block, T* memory)
      : logits_(logits), plan_(plan), row_weights_(memory), stage_(memory + kTileWeights) {
    const int tile = static_cast<int>(block % plan.tiles);
    block /= plan.tiles;
    const int split = static_cast<int>(block % plan.splits);
    block /= plan.splits;
    upper_ = static_cast<int>(block % logits.rows.in);
    image = static_cast<int>(block / logits.rows.in);
    lower_ = second_source(logits.rows, upper_);

    const int band_end = first_output(logits.rows, upper_ + 1);
    row_begin = first_output(logits.rows, upper_) + split * kSplitRows;
    row_end = min(row_begin + kSplitRows, band_end);

    const int first = tile * kTileColumns;
    const int last = min(first + kTileColumns, logits.columns.out) - 1;
    column = first + static_cast<int>(threadIdx.x);
    active = column <= last;
    base_ = source_cell(logits.columns, first);
    slots_ = source_tap(logits.columns, last).hi - base_ + 1;
    private_slots_ = slots_ > kPrivateSlots;
    const Tap<T> tap = source_tap(logits.columns, min(column, last));
    weight_hi_ = tap.weight;
    weight_lo_ = static_cast<T>(1) - tap.weight;
    lo_ = private_slots_ ? 2 * static_cast<int>(threadIdx.x) : tap.lo - base_;
    hi_ = private_slots_ ? lo_ + 1 : tap.hi - base_;
    first_column_ = first;
    last_column_ = last;
    if (private_slots_) slots_ = kPrivateSlots;
    // Rows behind the end repeat the last.
    const int i = threadIdx.x;
    if (i < kTileWeights && row_begin < row_end) {
      row_weights_[i] = source_tap(logits.rows, min(row_begin + i, row_end - 1)).weight;
    }
    __syncthreads();
  }

  // Weights of the lower source row for kTileRows output rows from `row` on.
  __device__ void row_weights(int row, T* weights) const {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) weights[r] = row_weights_[row - row_begin + r];
  }

  // Calls function(class, upper, lower) for each class with both source rows at this column. All
  // threads of the block call it together.
  template <typename Function>
  __device__ void for_each_class(const Function& function) {
    const int chunk = plan_.stage_classes;
    for (int first = 0; first < logits_.classes; first += chunk) {
      const int count = min(chunk, logits_.classes - first);
      if (first != staged_first_) {
        __syncthreads();
        load(first, count);
        staged_first_ = first;
        __syncthreads();
      }
      if (!active) continue;
      const T* upper = stage_;
      const T* lower = stage_ + count * plan_.pitch;
#pragma unroll 2
      for (int c = 0; c < count; ++c, upper += plan_.pitch, lower += plan_.pitch) {
        function(first + c, weight_lo_ * upper[lo_] + weight_hi_ * upper[hi_],
                 weight_lo_ * lower[lo_] + weight_hi_ * lower[hi_]);
      }
    }
  }

  // Offset of output row `row` at column 0 in [images, rows, columns].
  __device__ int64_t row_offset(int row) const {
    return (static_cast<int64_t>(image) * logits_.rows.out + row) * logits_.columns.out;
  }

  int image;
  int column;
  int row_begin;
  int row_end;
  bool active;

 private:
  __device__ void load(int first, int count) {
    const int total = 2 * count * slots_;
    // Neighbouring threads read neighbouring memory in both layouts.
    const bool classes_inside = logits_.stride_class < logits_.stride_column;
    for (int i = threadIdx.x; i < total; i += blockDim.x) {
      const int inside = classes_inside ? count : slots_;
      const int middle = classes_inside ? slots_ : count;
      const int a = i % inside, b = i / inside % middle, row = i / inside / middle;
      const int c = classes_inside ? a : b, slot = classes_inside ? b : a;
      int x = base_ + slot;
      if (private_slots_) {
        const Tap<T> tap = source_tap(logits_.columns, min(first_column_ + slot / 2, last_column_));
        x = slot % 2 ? tap.hi : tap.lo;
      }
      stage_[(row * count + c) * plan_.pitch + slot] =
          logits_.at(image, first + c, row ? lower_ : upper_, x);
    }
  }

  const Logits<T>& logits_;
  const TilePlan& plan_;
  T* row_weights_;
  T* stage_;
  int upper_, lower_, base_, slots_, lo_, hi_, first_column_, last_column_;
  int staged_first_ = -1;
  bool private_slots_;
  T weight_lo_, weight_hi_;
};

template <typename T>
struct ArgmaxState {
  T weights[kTileRows];
  T best[kTileRows];
  int label[kTileRows];
};

// The largest logit and its class for kTileRows rows from `row` on, as torch.argmax finds it: the
// first of equals, and nan before everything.
template <typename T>
__device__ inline void find_argmax(Tile<T>& tile, int row, ArgmaxState<T>& state) {
  tile.row_weights(row, state.weights);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    state.best[r] = minus_infinity<T>();
    state.label[r] = 0;
  }
  tile.for_each_class([&](int c, T upper, T lower) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const T z = (static_cast<T>(1) - state.weights[r]) * upper + state.weights[r] * lower;
      if (!(z <= state.best[r]) && state.best[r] == state.best[r]) {
        state.best[r] = z;
        state.label[r] = c;
      }
    }
  });
}

// Bounds the registers to 64 in fp32; in double, where speed does not matter, to what ptxas needs.
template <typename T>
constexpr int kTilesPerMultiprocessor = sizeof(T) == sizeof(float) ? 8 : 2;

// Labels go to `narrow` or `wide`, whichever is not null; `prob` may be null.
template <typename T>
__global__ void __launch_bounds__(kTileColumns, kTilesPerMultiprocessor<T>)
    upsample_argmax_kernel(const Logits<T> logits, const TilePlan plan, uint8_t* narrow,
                           int64_t* wide, T* prob) {
  Tile<T> tile(logits, plan, blockIdx.x, reinterpret_cast<T*>(shared_memory()));
  for (int row = tile.row_begin; row < tile.row_end; row += kTileRows) {
    ArgmaxState<T> state;
    find_argmax(tile, row, state);
    if (tile.active) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (row + r >= tile.row_end) continue;
        const int64_t at = tile.row_offset(row + r) + tile.column;
        if (narrow != nullptr) {
          narrow[at] = static_cast<uint8_t>(state.label[r]);
        } else {
          wide[at] = state.label[r];
        }
      }
    }
    if (prob == nullptr) continue;
    T sum[kTileRows] = {};
    tile.for_each_class([&](int, T upper, T lower) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const T z = (static_cast<T>(1) - state.weights[r]) * upper + state.weights[r] * lower;
        sum[r] += exponential(z - state.best[r]);
      }
    });
    if (!tile.active) continue;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (row + r < tile.row_end) {
        prob[tile.row_offset(row + r) + tile.column] = static_cast<T>(1) / sum[r];
      }
    }
  }
}

// Counts (label, argmax) pairs. With `shared_table` each block counts in shared memory and adds its
// table to `matrix` once; blocks walk over tiles so that there are few of them.
template <typename T>
__global__ void __launch_bounds__(kTileColumns, kTilesPerMultiprocessor<T>)
    upsample_confusion_kernel(const Logits<T> logits, const TilePlan plan, const Labels labels,
                              bool shared_table, unsigned long long* matrix,
                              unsigned long long* bad_labels) {
  T* const memory = reinterpret_cast<T*>(shared_memory());
  unsigned int* const table = reinterpret_cast<unsigned int*>(shared_memory() + plan.shared_bytes);
  const int cells = logits.classes * logits.classes;
  if (shared_table) {
    for (int i = threadIdx.x; i < cells; i += blockDim.x) table[i] = 0;
    __syncthreads();
  }
  const auto count = [&](int at, unsigned int pixels) {
    if (pixels == 0) return;
    if (shared_table) {
      atomicAdd(table + at, pixels);
    } else {
      atomicAdd(matrix + at, static_cast<unsigned long long>(pixels));
    }
  };
  unsigned int bad_pixels = 0;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    // The last tile may still be read.
    __syncthreads();
    Tile<T> tile(logits, plan, block, memory);
    for (int row = tile.row_begin; row < tile.row_end; row += kTileRows) {
      ArgmaxState<T> state;
      find_argmax(tile, row, state);
      if (!tile.active) continue;
      // Pixels of a column mostly fall on the same count.
      int run_at = 0;
      unsigned int run = 0;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (row + r >= tile.row_end) continue;
        bool bad;
        const int label = labels.read(tile.row_offset(row + r) + tile.column, logits.classes, &bad);
        bad_pixels += bad;
        if (label < 0) continue;
        const int at = label * logits.classes + state.label[r];
        if (at != run_at) {
          count(run_at, run);
          run_at = at;
          run = 0;
        }
        ++run;
      }
      count(run_at, run);
    }
  }
  if (bad_pixels > 0) atomicAdd(bad_labels, static_cast<unsigned long long>(bad_pixels));
  if (!shared_table) return;
  __syncthreads();
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    if (table[i] > 0) atomicAdd(matrix + i, static_cast<unsigned long long>(table[i]));
  }
}

template <typename A>
struct Accumulator {
  A* data;  // [images, classes, rows.out, columns.out]
  int64_t stride_image;
  int64_t stride_class;
  int64_t stride_row;
  int64_t stride_column;
};

template <typename T, typename A>
__global__ void __launch_bounds__(kTileColumns, kTilesPerMultiprocessor<T>)
    upsample_softmax_add_kernel(const Logits<T> logits, const TilePlan plan,
                                const Accumulator<A> to, bool flip) {
  Tile<T> tile(logits, plan, blockIdx.x, reinterpret_cast<T*>(shared_memory()));
  const int column = flip ? logits.columns.out - 1 - tile.column : tile.column;
  for (int row = tile.row_begin; row < tile.row_end; row += kTileRows) {
    T weights[kTileRows], top[kTileRows], sum[kTileRows];
    tile.row_weights(row, weights);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      top[r] = minus_infinity<T>();
      sum[r] = 0;
    }
    const auto logit = [&](int r, T upper, T lower) {
      return (static_cast<T>(1) - weights[r]) * upper + weights[r] * lower;
    };
    tile.for_each_class([&](int, T upper, T lower) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const T z = logit(r, upper, lower);
        top[r] = z > top[r] ? z : top[r];
      }
    });
    tile.for_each_class([&](int, T upper, T lower) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        sum[r] += exponential(logit(r, upper, lower) - top[r]);
      }
    });
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) sum[r] = static_cast<T>(1) / sum[r];
    A* const first =
        to.data + tile.image * to.stride_image + row * to.stride_row + column * to.stride_column;
    tile.for_each_class([&](int c, T upper, T lower) {
      A* const out = first + c * to.stride_class;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (row + r >= tile.row_end) continue;
        const T prob = exponential(logit(r, upper, lower) - top[r]) * sum[r];
        out[r * to.stride_row] = static_cast<A>(out[r * to.stride_row] + prob);
      }
    });
  }
}

// What one block of the cross entropy kernel found.
struct BlockSums {
  double loss;
  double weight;
  int64_t valid;
  int64_t bad;
};

template <typename T>
struct CrossEntropy {
  Labels labels;
  const T* class_weights;  // [classes], null for ones
  const T* weight_sum;     // sum of class_weights, null where those are
  T smoothing;
  const T* pixel_grad;  // [images, rows, columns], null for ones
  T* pixel_loss;        // the same shape, may be null
  BlockSums* sums;      // [blocks]
  T* partial;           // see partial_size
};

// Softmax statistics of a pixel: the gradient of its logit z is scale * exp(z - top), less `hard`
// at the label. An ignored pixel has label -1 and scale 0, which is nan where its softmax is.
template <typename T>
struct alignas(4 * sizeof(T)) Pixel {
  T top;
  T scale;
  T weight;  // of the right source column
  int label;
};

template <typename T>
struct PixelMemory {
  Pixel<T> pixels[kPixels];
  T hard[kPixels];
  T smoothed[kPixels];
  T row_weights[kSplitRows];
  int first_columns[kPixels / kPixelRows + 1];
};

// Adds up a value of each thread, in a fixed order; the sum is thread 0's. `memory` has room for a
// value of each thread.
template <typename V>
__device__ inline V block_sum(V value, V* memory) {
  __syncthreads();
  memory[threadIdx.x] = value;
  int count = blockDim.x;
  while (count > 1) {
    const int half = (count + 1) / 2;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count - half) {
      memory[threadIdx.x] += memory[threadIdx.x + half];
    }
    count = half;
  }
  __syncthreads();
  return memory[0];
}

// A block of the cross entropy kernel.
template <typename T, bool kGrad, bool kSmooth>
class Cells {
 public:
  __device__ Cells(const Logits<T>& logits, const CellPlan& plan, const CrossEntropy<T>& op,
                   PixelMemory<T>& memory, T* stage)
      : logits_(logits), plan_(plan), op_(op), memory_(memory), stage_(stage) {
    int64_t block = blockIdx.x;
    const int tile = static_cast<int>(block % plan.tiles);
    block /= plan.tiles;
    split_ = static_cast<int>(block % plan.splits);
    block /= plan.splits;
    upper_ = static_cast<int>(block % logits.rows.in);
    image_ = static_cast<int>(block / logits.rows.in);
    lower_ = second_source(logits.rows, upper_);
    x_begin_ = tile * plan.cells;
    x_end_ = min(x_begin_ + plan.cells, logits.columns.in);
    const int band_end = first_output(logits.rows, upper_ + 1);
    row_begin_ = first_output(logits.rows, upper_) + split_ * kSplitRows;
    row_end_ = min(row_begin_ + kSplitRows, band_end);
    for (int i = threadIdx.x; i <= x_end_ - x_begin_; i += blockDim.x) {
      memory.first_columns[i] = first_output(logits.columns, x_begin_ + i);
    }
    for (int i = threadIdx.x; i < kSplitRows && row_begin_ < row_end_; i += blockDim.x) {
      memory.row_weights[i] = source_tap(logits.rows, min(row_begin_ + i, row_end_ - 1)).weight;
    }
    __syncthreads();
  }

  __device__ void run() {
    const int column_end = memory_.first_columns[x_end_ - x_begin_];
    bool first = true;
    for (int column = memory_.first_columns[0]; column < column_end; column += columns_) {
      columns_ = min(column_end - column, kPixels / kPixelRows);
      const int most_rows = kPixels / columns_ / kPixelRows * kPixelRows;
      for (int row = row_begin_; row < row_end_; row += rows_) {
        rows_ = min(row_end_ - row, most_rows);
        row_ = row;
        column_ = column;
        find_statistics();
        __syncthreads();
        if constexpr (kGrad) {
          sum_gradients(first);
          __syncthreads();
        }
        first = false;
      }
    }
    if (kGrad && first) clear_gradients();
    write_sums();
  }

 private:
  __device__ void load(int first, int count) {
    const int slots = min(x_end_ + 1, logits_.columns.in) - x_begin_;
    const int total = 2 * count * slots;
    const bool classes_inside = logits_.stride_class < logits_.stride_column;
    for (int i = threadIdx.x; i < total; i += blockDim.x) {
      const int inside = classes_inside ? count : slots;
      const int middle = classes_inside ? slots : count;
      const int a = i % inside, b = i / inside % middle, row = i / inside / middle;
      const int c = classes_inside ? a : b, slot = classes_inside ? b : a;
      stage_[(row * count + c) * plan_.pitch + slot] =
          logits_.at(image_, first + c, row ? lower_ : upper_, x_begin_ + slot);
    }
  }

  template <typename Function>
  __device__ void for_each_class(bool active, const Tap<T>& tap, const Function& function) {
    const int chunk = plan_.stage_classes;
    const T weight_hi = tap.weight, weight_lo = static_cast<T>(1) - tap.weight;
    const int lo = tap.lo - x_begin_, hi = tap.hi - x_begin_;
    for (int first = 0; first < logits_.classes; first += chunk) {
      const int count = min(chunk, logits_.classes - first);
      if (first != staged_first_) {
        __syncthreads();
        load(first, count);
        staged_first_ = first;
        __syncthreads();
      }
      if (!active) continue;
      const T* upper = stage_;
      const T* lower = stage_ + count * plan_.pitch;
#pragma unroll 2
      for (int c = 0; c < count; ++c, upper += plan_.pitch, lower += plan_.pitch) {
        function(first + c, weight_lo * upper[lo] + weight_hi * upper[hi],
                 weight_lo * lower[lo] + weight_hi * lower[hi]);
      }
    }
  }

  // Phase 1, for the pixels of the sub-tile [rows_][columns_] at (row_, column_).
  __device__ void find_statistics() {
    const int items = (rows_ + kPixelRows - 1) / kPixelRows * columns_;
    // Every thread makes every turn: for_each_class has barriers.
    for (int base = 0; base < items; base += blockDim.x) {
      const int item = base + static_cast<int>(threadIdx.x);
      const bool active = item < items;
      const int x = active ? item % columns_ : 0;
      const int y = active ? item / columns_ * kPixelRows : 0;
      const Tap<T> tap = source_tap(logits_.columns, column_ + x);
      T weights[kPixelRows], top[kPixelRows], sum[kPixelRows], smooth[kPixelRows];
#pragma unroll
      for (int r = 0; r < kPixelRows; ++r) {
        weights[r] = memory_.row_weights[min(row_ - row_begin_ + y + r, kSplitRows - 1)];
        top[r] = minus_infinity<T>();
        sum[r] = 0;
        smooth[r] = 0;
      }
      for_each_class(active, tap, [&](int, T upper, T lower) {
#pragma unroll
        for (int r = 0; r < kPixelRows; ++r) {
          const T z = (static_cast<T>(1) - weights[r]) * upper + weights[r] * lower;
          top[r] = z > top[r] ? z : top[r];
        }
      });
      for_each_class(active, tap, [&](int c, T upper, T lower) {
        const T class_weight = kSmooth && op_.class_weights ? op_.class_weights[c] : T(1);
#pragma unroll
        for (int r = 0; r < kPixelRows; ++r) {
          const T z = (static_cast<T>(1) - weights[r]) * upper + weights[r] * lower;
          sum[r] += exponential(z - top[r]);
          if (kSmooth) smooth[r] += class_weight * (z - top[r]);
        }
      });
      if (!active) continue;
#pragma unroll
      for (int r = 0; r < kPixelRows; ++r) {
        if (y + r >= rows_) continue;
        const int i = (y + r) * columns_ + x;
        memory_.pixels[i] = {top[r], sum[r], tap.weight, tap.lo};
        if (kSmooth) memory_.smoothed[i] = smooth[r];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows_ * columns_; i += blockDim.x) finish_pixel(i);
  }

  // Turns the sums of a pixel, {top, sum, weight, source column}, into its loss and what phase 2
  // needs.
  __device__ void finish_pixel(int i) {
    const int y = i / columns_, x = i - y * columns_;
    const Pixel<T> pixel = memory_.pixels[i];
    const T top = pixel.top, sum = pixel.scale;
    const int64_t at =
        (static_cast<int64_t>(image_) * logits_.rows.out + row_ + y) * logits_.columns.out +
        column_ + x;
    bool bad;
    const int label = op_.labels.read(at, logits_.classes, &bad);
    bad_ += bad;
    T loss = 0, scale = 0, hard = 0, smoothed = 0;
    if (label >= 0) {
      const T one = 1;
      const T weight = op_.class_weights ? op_.class_weights[label] : one;
      const T row_weight = memory_.row_weights[row_ - row_begin_ + y];
      const int lo = pixel.label, hi = second_source(logits_.columns, lo);
      const T upper = (one - pixel.weight) * logits_.at(image_, label, upper_, lo) +
                      pixel.weight * logits_.at(image_, label, upper_, hi);
      const T lower = (one - pixel.weight) * logits_.at(image_, label, lower_, lo) +
                      pixel.weight * logits_.at(image_, label, lower_, hi);
      const T z = (one - row_weight) * upper + row_weight * lower;
      const T log_sum = natural_log(sum);
      const T factor = kGrad && op_.pixel_grad ? op_.pixel_grad[at] : one;
      loss = weight * (log_sum - (z - top));
      hard = weight * factor;
      if (kSmooth) {
        const T weight_sum = op_.weight_sum ? *op_.weight_sum : static_cast<T>(logits_.classes);
        const T share = op_.smoothing / static_cast<T>(logits_.classes);
        const T smooth = memory_.smoothed[i];
        loss = (one - op_.smoothing) * loss + share * (weight_sum * log_sum - smooth);
        hard = (one - op_.smoothing) * hard;
        smoothed = share * factor;
        scale = (hard + smoothed * weight_sum) / sum;
      } else {
        scale = hard / sum;
      }
      ++valid_;
      loss_ += static_cast<double>(loss);
      weight_ += static_cast<double>(weight);
    } else {
      scale = static_cast<T>(0) / sum;
    }
    if (op_.pixel_loss) op_.pixel_loss[at] = loss;
    if (kGrad) {
      memory_.pixels[i] = {top, scale, pixel.weight, label};
      memory_.hard[i] = hard;
      if (kSmooth) memory_.smoothed[i] = smoothed;
    }
  }

  // Phase 2: what the sub-tile's pixels give to the four source pixels around them.
  __device__ void sum_gradients(bool first) {
    const int classes = logits_.classes;
    const int pairs = (x_end_ - x_begin_) * classes;
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
      const int cell = pair / classes, c = pair % classes;
      const int begin = max(memory_.first_columns[cell], column_) - column_;
      const int end = min(memory_.first_columns[cell + 1], column_ + columns_) - column_;
      T corners[4] = {};
      if (begin < end) {
        const int left = x_begin_ + cell, right = second_source(logits_.columns, left);
        const T upper_left = logits_.at(image_, c, upper_, left);
        const T upper_right = logits_.at(image_, c, upper_, right);
        const T lower_left = logits_.at(image_, c, lower_, left);
        const T lower_right = logits_.at(image_, c, lower_, right);
        const T class_weight = kSmooth && op_.class_weights ? op_.class_weights[c] : T(1);
        for (int y = 0; y < rows_; ++y) {
          const T weight = memory_.row_weights[row_ - row_begin_ + y],
                  other = static_cast<T>(1) - weight;
          const T z_left = other * upper_left + weight * lower_left;
          const T z_right = other * upper_right + weight * lower_right;
          T to_left = 0, to_right = 0;
          for (int i = y * columns_ + begin; i < y * columns_ + end; ++i) {
            const Pixel<T> pixel = memory_.pixels[i];
            const T share = static_cast<T>(1) - pixel.weight;
            const T z = share * z_left + pixel.weight * z_right;
            T g = pixel.scale * exponential(z - pixel.top);
            if (kSmooth) g -= memory_.smoothed[i] * class_weight;
            if (pixel.label == c) g -= memory_.hard[i];
            to_left += share * g;
            to_right += pixel.weight * g;
          }
          corners[0] += other * to_left;
          corners[1] += other * to_right;
          corners[2] += weight * to_left;
          corners[3] += weight * to_right;
        }
      }
      T* const out = partial(cell) + c;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[i * classes] = first ? corners[i] : out[i * classes] + corners[i];
      }
    }
  }

  __device__ void clear_gradients() {
    T* const out = partial(0);
    const int64_t count = static_cast<int64_t>(x_end_ - x_begin_) * 4 * logits_.classes;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = 0;
  }

  __device__ T* partial(int cell) const {
    const int64_t row =
        (static_cast<int64_t>(image_) * logits_.rows.in + upper_) * plan_.splits + split_;
    return op_.partial + (row * logits_.columns.in + x_begin_ + cell) * 4 * logits_.classes;
  }

  __device__ void write_sums() {
    __syncthreads();
    double* const memory = reinterpret_cast<double*>(&memory_);
    const double loss = block_sum(loss_, memory);
    const double weight = block_sum(weight_, memory);
    // Counts are far below 2^53.
    const double valid = block_sum(static_cast<double>(valid_), memory);
    const double bad = block_sum(static_cast<double>(bad_), memory);
    if (threadIdx.x == 0) {
      op_.sums[blockIdx.x] = {loss, weight, static_cast<int64_t>(valid), static_cast<int64_t>(bad)};
    }
  }

  const Logits<T>& logits_;
  const CellPlan& plan_;
  const CrossEntropy<T>& op_;
  PixelMemory<T>& memory_;
  T* stage_;
  int image_, upper_, lower_, split_, x_begin_, x_end_, row_begin_, row_end_;
  int row_ = 0, column_ = 0, rows_ = 1, columns_ = 1;
  int staged_first_ = -1;
  int valid_ = 0, bad_ = 0;
  double loss_ = 0, weight_ = 0;
};

// Lets ptxas take up to 128 registers; left to itself it spills some of 80.
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == sizeof(float) ? 2 : 1;

template <typename T, bool kGrad, bool kSmooth>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor<T>)
    upsample_cross_entropy_kernel(const Logits<T> logits, const CellPlan plan,
                                  const CrossEntropy<T> op) {
  static_assert(sizeof(PixelMemory<T>) >= kMaxThreads * sizeof(double), "block_sum's memory");
  PixelMemory<T>& memory = *reinterpret_cast<PixelMemory<T>*>(shared_memory());
  T* const stage = reinterpret_cast<T*>(shared_memory() + sizeof(PixelMemory<T>));
  Cells<T, kGrad, kSmooth>(logits, plan, op, memory, stage).run();
}

// loss = total loss, over the total weight for a mean; scale = what the summed gradients are
// multiplied with, times `grad` where that is not null. One block.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_cross_entropy_kernel(const BlockSums* sums, int64_t blocks, bool mean, const T* grad,
                                T* loss, T* scale, int64_t* bad_labels) {
  double* const memory = reinterpret_cast<double*>(shared_memory());
  double total_loss = 0, total_weight = 0, valid = 0, bad = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    total_loss += sums[i].loss;
    total_weight += sums[i].weight;
    valid += static_cast<double>(sums[i].valid);
    bad += static_cast<double>(sums[i].bad);
  }
  total_loss = block_sum(total_loss, memory);
  total_weight = block_sum(total_weight, memory);
  valid = block_sum(valid, memory);
  bad = block_sum(bad, memory);
  if (threadIdx.x != 0) return;
  double factor = 1;
  if (mean) {
    // Without a pixel that counts the mean is nan and its gradient 0, as in PyTorch.
    total_loss /= total_weight;
    factor = valid > 0 ? 1 / total_weight : 0;
  }
  if (grad != nullptr) factor *= static_cast<double>(*grad);
  if (loss != nullptr) *loss = static_cast<T>(total_loss);
  *scale = static_cast<T>(factor);
  *bad_labels = static_cast<int64_t>(bad);
}

// Sums the partial gradients of each source pixel, in a fixed order, times *scale, into contiguous
// [images, classes, rows.in, columns.in].
template <typename T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_gradient_kernel(const T* partial, const T* scale, int images, int classes, int height,
                           int width, int splits, Storage storage, void* out) {
  const int64_t total = static_cast<int64_t>(images) * height * width * classes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int c = static_cast<int>(i % classes);
  const int x = static_cast<int>(i / classes % width);
  const int y = static_cast<int>(i / classes / width % height);
  const int image = static_cast<int>(i / classes / width / height);

  T sum = 0;
  // Source row y is the lower one of the band before it, and the upper one of its own. Behind the
  // last row both taps fall on it.
  for (int row = 0; row < 3; ++row) {
    const int band = row == 0 ? y - 1 : y;
    const int lower = row != 1;
    if (band < 0 || (row == 2 && y != height - 1)) continue;
    for (int split = 0; split < splits; ++split) {
      const int64_t line = ((static_cast<int64_t>(image) * height + band) * splits + split) * width;
      for (int column = 0; column < 3; ++column) {
        const int cell = column == 0 ? x - 1 : x;
        const int right = column != 1;
        if (cell < 0 || (column == 2 && x != width - 1)) continue;
        sum += partial[((line + cell) * 4 + 2 * lower + right) * classes + c];
      }
    }
  }
  const int64_t to = ((static_cast<int64_t>(image) * classes + c) * height + y) * width + x;
  const T result = *scale * sum;
#if defined(__CUDACC__)
  if (storage == Storage::kHalf) {
    static_cast<__half*>(out)[to] = __float2half_rn(static_cast<float>(result));
    return;
  }
  if (storage == Storage::kBfloat16) {
    static_cast<__nv_bfloat16*>(out)[to] = __float2bfloat16_rn(static_cast<float>(result));
    return;
  }
#endif
  static_cast<T*>(out)[to] = result;
}

}  // namespace deeplab_fast::cuda
