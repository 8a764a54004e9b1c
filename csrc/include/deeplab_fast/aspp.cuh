// What the CUDA kernels of the ASPP share on every architecture: the tile list as they read it, the
// addresses of its pixels and taps, and the epilogue. Without torch.
//
// The work is the list of deeplab_fast/plan/schedule.py, which says what a tap class, a part and
// an iteration are. x is [images, rows, columns, channels] with neighbouring channels, filters are
// rows of channels. Every tap of a class lies inside the map for all its pixels, so that a tap
// moves all rows of a tile by the same distance and no row needs a mask.
//
// A program runs its parts one behind the other. A whole tile gets scale, shift and ReLU in float32
// and goes to the branch's channels of y, rounded once; a part of a tile goes to its slot of
// `partial`, and aspp_sum_kernel adds the slots of a tile in their order. There are no atomics:
// results repeat to the bit.
#pragma once

#include <cstdint>

#include "deeplab_fast/aspp_tile_table.h"
#include "deeplab_fast/ptx.cuh"

namespace deeplab_fast::cuda {

// A row of Schedule.classes; the fields are those of ClassField.
struct alignas(16) TapClass {
  int row, rows, col, cols;
  int pixels;
  int row_shift, col_shift, row_taps, col_taps, dilation;
  int weight_row, weight_col_step, weight_row_step;
  int channel, channels;
  int branch;
};

// A row of Schedule.parts and Schedule.sums; the fields are those of PartField.
struct alignas(16) Part {
  int tap_class, first, filter, begin, end, slot;
  int unused[2];
};

struct Pitch {
  int64_t image, row, col;
};

// One launch. Distances are in elements.
struct Aspp {
  const uint16_t* x;
  Pitch x_pitch;
  int channels;
  const uint16_t* weight;
  int64_t weight_pitch;
  const float* scale;
  const float* shift;
  int64_t shift_image;  // distance between the shifts of two images; 0: all have the same
  uint16_t* y;
  Pitch y_pitch;
  // Filters of all branches, distances in y and addresses are such that 8 neighbouring channels
  // can be stored, and 2 scales and shifts be loaded, at once.
  bool vectors;
  float* partial;
  const TapClass* classes;
  const Part* parts;
  const int* starts;
};

struct Pixel {
  int image, row, col;
};

// Pixel `number` of a class.
__device__ inline Pixel locate(const TapClass& c, int number) {
  const int line = number / c.cols;
  const int image = line / c.rows;
  return {image, c.row + line - image * c.rows, c.col + number - line * c.cols};
}

// Pixel `first + i` of a class, or its last.
__device__ inline Pixel locate_at_most(const TapClass& c, int first, int i) {
  const int left = c.pixels - 1 - first;
  return locate(c, first + (i < left ? i : left));
}

__device__ inline int64_t offset_of(const Pixel& p, const Pitch& pitch) {
  return p.image * pitch.image + p.row * pitch.row + p.col * pitch.col;
}

// Where the iterations of a part read: taps run fastest, chunks of channels are the outer loop.
class Taps {
 public:
  Taps() = default;
  __device__ Taps(const TapClass& c, int begin)
      : row_taps_(c.row_taps),
        col_taps_(c.col_taps),
        row_shift_(c.row_shift),
        col_shift_(c.col_shift),
        dilation_(c.dilation),
        weight_row_(c.weight_row),
        weight_row_step_(c.weight_row_step),
        weight_col_step_(c.weight_col_step) {
    const int taps = row_taps_ * col_taps_;
    const int chunk = begin / taps;
    row_ = (begin - chunk * taps) / col_taps_;
    col_ = begin - chunk * taps - row_ * col_taps_;
    channel = chunk * Tile::block_c;
  }

  __device__ void next() {
    if (++col_ < col_taps_) return;
    col_ = 0;
    if (++row_ < row_taps_) return;
    row_ = 0;
    channel += Tile::block_c;
  }

  // From a pixel to what its tap reads, chunk included.
  __device__ int64_t offset(const Pitch& pitch) const {
    return (row_shift_ + row_ * dilation_) * pitch.row +
           (col_shift_ + col_ * dilation_) * pitch.col + channel;
  }

  // The row of the tap's first filter.
  __device__ int weight_row() const {
    return weight_row_ + row_ * weight_row_step_ + col_ * weight_col_step_;
  }

  int channel = 0;

 private:
  int row_taps_, col_taps_;
  int row_shift_, col_shift_, dilation_;
  int weight_row_, weight_row_step_, weight_col_step_;
  int row_, col_;
};

// value(p[0]), value(p[1]); of the second of a last odd channel nothing is used.
__device__ inline void load_pair(const float* p, int left, bool vectors, float (&to)[2]) {
  if (vectors) {
    const float2 pair = ptx::read_only(reinterpret_cast<const float2*>(p));
    to[0] = pair.x;
    to[1] = pair.y;
    return;
  }
  to[0] = left > 0 ? ptx::read_only(p) : 0.f;
  to[1] = left > 1 ? ptx::read_only(p + 1) : 0.f;
}

// Not a maximum, which would turn NaN into 0.
__device__ inline float relu(float v) { return v < 0.f ? 0.f : v; }

// Lanes 4 g + t, t < 4, have one word of each of four blocks; afterwards lane t has the four words
// of block t, in the order of the lanes.
__device__ inline void transpose_quad(uint32_t (&word)[4], int t) {
  const bool odd = t & 1;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = ptx::shuffle_xor(odd ? word[i] : word[i + 1], 1);
    word[i] = odd ? other : word[i];
    word[i + 1] = odd ? word[i + 1] : other;
  }
  const bool upper = t & 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = ptx::shuffle_xor(upper ? word[i] : word[i + 2], 2);
    word[i] = upper ? other : word[i];
    word[i + 2] = upper ? word[i + 2] : other;
  }
}

// Stores 16 rows and 8 kBlocks columns of a part's sums, from `row` and `col` of its tile on, by a
// warp. They are laid out as mma and wgmma leave them: lane 4 g + t has, of each block of 8
// columns, columns 2 t and 2 t + 1 of rows g and g + 8.
template <typename T, int kTile, int kBlocks>
__device__ inline void store_sums(const Aspp& op, const Part& part, int row, int col,
                                  const float (&sums)[kBlocks][4]) {
  static_assert(kBlocks % 4 == 0);
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  if (part.slot >= 0) {
    constexpr Tile kShape = kTiles[kTile];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t line = static_cast<int64_t>(part.slot) * kShape.block_m + row + g + 8 * half;
      float* to = op.partial + line * kShape.block_n + col + 2 * t;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i) =
            make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
      }
    }
    return;
  }

  const TapClass c = op.classes[part.tap_class];
  uint16_t* to[2];
  const float* shift[2];
  bool inside[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + g + 8 * half;
    const Pixel pixel = locate_at_most(c, part.first, i);
    inside[half] = i < c.pixels - part.first;
    to[half] = op.y + offset_of(pixel, op.y_pitch) + c.channel;
    shift[half] = op.shift + pixel.image * op.shift_image + c.channel;
  }
  const float* scale = op.scale + c.channel;
#pragma unroll
  for (int first = 0; first < kBlocks; first += 4) {
    uint32_t word[2][4];
    const int quad = part.filter + col + 8 * first;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = quad + 8 * i + 2 * t;
      const int left = c.channels - channel;
      float a[2] = {}, b[2] = {};
      if (left > 0) load_pair(scale + channel, left, op.vectors, a);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (left > 0) load_pair(shift[half] + channel, left, op.vectors, b);
        const float* sum = sums[first + i] + 2 * half;
        word[half][i] =
            ptx::pack<T>(relu(fmaf(sum[0], a[0], b[0])), relu(fmaf(sum[1], a[1], b[1])));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (op.vectors) {
        transpose_quad(word[half], t);
        const int channel = quad + 8 * t;
        if (inside[half] && channel < c.channels) {
          *reinterpret_cast<Vector*>(to[half] + channel) = {word[half][0], word[half][1],
                                                            word[half][2], word[half][3]};
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = quad + 8 * i + 2 * t;
        const int left = inside[half] ? c.channels - channel : 0;
        if (left > 0) to[half][channel] = static_cast<uint16_t>(word[half][i]);
        if (left > 1) to[half][channel + 1] = static_cast<uint16_t>(word[half][i] >> 16);
      }
    }
  }
}

constexpr int kSumThreads = 256;

// Adds the parts of cut tiles in their order and finishes them as whole tiles are. A thread has 8
// columns of a row; blocks are (tile, kSumThreads threads of it), the last fastest.
template <typename T, int kTile>
__global__ void aspp_sum_kernel(const Aspp op, const Part* sums) {
  constexpr Tile kShape = kTiles[kTile];
  constexpr int kVectors = kShape.block_n / 8;
  constexpr int kBlocks = kShape.block_m * kVectors / kSumThreads;
  const Part part = sums[blockIdx.x / kBlocks];
  const TapClass c = op.classes[part.tap_class];
  const int index = static_cast<int>(blockIdx.x % kBlocks * kSumThreads + threadIdx.x);
  const int row = index / kVectors;
  const int col = index % kVectors * 8;
  const int left = c.channels - part.filter - col;
  if (row >= c.pixels - part.first || left <= 0) return;

  float sum[8] = {};
  for (int slot = part.begin; slot < part.end; ++slot) {
    const int64_t line = static_cast<int64_t>(slot) * kShape.block_m + row;
    const auto* from = reinterpret_cast<const Vector*>(op.partial + line * kShape.block_n + col);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vector four = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[4 * i + j] += ptx::float_of(four.word[j]);
    }
  }
  const Pixel pixel = locate(c, part.first + row);
  const int channel = c.channel + part.filter + col;
  const float* shift = op.shift + pixel.image * op.shift_image + channel;
  uint16_t* to = op.y + offset_of(pixel, op.y_pitch) + channel;
  Vector packed;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float a[2], b[2];
    load_pair(op.scale + channel + i, left - i, op.vectors, a);
    load_pair(shift + i, left - i, op.vectors, b);
    packed.word[i / 2] =
        ptx::pack<T>(relu(fmaf(sum[i], a[0], b[0])), relu(fmaf(sum[i + 1], a[1], b[1])));
  }
  if (op.vectors) {
    *reinterpret_cast<Vector*>(to) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < left) to[i] = static_cast<uint16_t>(packed.word[i / 2] >> 16 * (i % 2));
  }
}

// The pooled branch of the projection as a shift of each image.
struct ImageShift {
  const uint16_t* pooled;  // [images, channels]
  int64_t pooled_image, pooled_channel;
  const uint16_t* weight;  // [filters, channels]
  int64_t weight_filter, weight_channel;
  const float* scale;  // [filters]
  const float* shift;
  float* out;  // [images, filters]
  int images, filters, channels;
};

constexpr int kShiftThreads = 256;

// out = scale * (weight . pooled) + shift; a warp has one filter of one image.
template <typename T>
__global__ void image_shift_kernel(const ImageShift op) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kShiftThreads / 32) + threadIdx.x / 32;
  const int image = static_cast<int>(warp / op.filters);
  const int filter = static_cast<int>(warp % op.filters);
  if (image >= op.images) return;
  const uint16_t* pooled = op.pooled + image * op.pooled_image;
  const uint16_t* weight = op.weight + filter * op.weight_filter;
  float sum = 0.f;
  for (int i = lane; i < op.channels; i += 32) {
    sum = fmaf(ptx::unpack<T>(pooled[i * op.pooled_channel]),
               ptx::unpack<T>(weight[i * op.weight_channel]), sum);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += ptx::float_of(ptx::shuffle_xor(ptx::bits_of(sum), lanes));
  }
  if (lane == 0) op.out[warp] = fmaf(op.scale[filter], sum, op.shift[filter]);
}

}  // namespace deeplab_fast::cuda
