// The ASPP's matrix product on the tensor cores of sm_80 and newer: cp.async, ldmatrix, mma.sync.
// Without torch.
//
// A block holds `stages` chunks of 64 channels in shared memory, each the tile's pixels and filters
// as rows of 128 bytes. The 16-byte words of row r lie at their place xor r % 8, so that the eight
// rows that ldmatrix reads at a time lie in different banks, and so do those that cp.async writes.
// Every thread copies its words of each chunk. Copies run `stages` - 1 chunks ahead, across the
// ends of parts: while a tile is stored, the next one's operands arrive.
#pragma once

#include "deeplab_fast/aspp.cuh"

namespace deeplab_fast::cuda {

// A thread's share of the copies.
template <int kTile>
class Sm80Loader {
 public:
  __device__ Sm80Loader(const Aspp& op, uint32_t memory)
      : op_(op),
        part_(op.starts[blockIdx.x]),
        end_part_(op.starts[blockIdx.x + 1]),
        row_(threadIdx.x / 8),
        word_(threadIdx.x % 8),
        to_(memory + row_ * 128 + (word_ ^ row_ % 8) * 16) {
    if (part_ < end_part_) begin_part();
  }

  // The next chunk of the program into a stage, as one group; an empty one behind the last.
  __device__ void load(int stage) {
    if (part_ < end_part_) {
      const uint32_t to = to_ + stage * kShape.stage_bytes();
      const int channel = taps_.channel + 8 * word_;
      const bool real = channel < op_.channels;
      const uint16_t* x = op_.x + taps_.offset(op_.x_pitch);
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::copy_async(to + i * kStep * 128, x + offset_[i], real);

      const uint16_t* weight =
          op_.weight + (taps_.weight_row() + first_filter_) * op_.weight_pitch + channel;
#pragma unroll
      for (int i = 0; i < kFilters; ++i) {
        // Beyond the branch's filters zeros do; their columns are not stored.
        ptx::copy_async(to + kShape.row_bytes() + i * kStep * 128,
                        weight + i * kStep * op_.weight_pitch, real && i * kStep < filters_);
      }
      taps_.next();
      if (--left_ == 0 && ++part_ < end_part_) begin_part();
    }
    ptx::copy_commit();
  }

 private:
  static constexpr Tile kShape = kTiles[kTile];
  // Rows of a pass of all threads: a multiple of 8, so that a thread's words keep their place.
  static constexpr int kStep = kShape.threads() / 8;
  static constexpr int kRows = kShape.block_m / kStep;
  static constexpr int kFilters = kShape.block_n / kStep;

  __device__ void begin_part() {
    const Part part = op_.parts[part_];
    const TapClass c = op_.classes[part.tap_class];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // Rows behind the last pixel repeat it; they are not stored.
      const Pixel pixel = locate_at_most(c, part.first, row_ + i * kStep);
      offset_[i] = offset_of(pixel, op_.x_pitch) + 8 * word_;
    }
    taps_ = Taps(c, part.begin);
    left_ = part.end - part.begin;
    first_filter_ = static_cast<int64_t>(part.filter) + row_;
    filters_ = c.channels - part.filter - row_;
  }

  const Aspp& op_;
  int part_, end_part_;
  int row_, word_;
  uint32_t to_;
  int64_t offset_[kRows];
  Taps taps_;
  int left_ = 0;
  int64_t first_filter_ = 0;
  int filters_ = 0;
};

template <typename T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads(), kTiles[kTile].occupancy)
    aspp_sm80_kernel(const Aspp op) {
  constexpr Tile kShape = kTiles[kTile];
  constexpr int kWarpM = kShape.block_m / kShape.warps_m;
  constexpr int kWarpN = kShape.block_n / kShape.warps_n;
  constexpr int kRowBlocks = kWarpM / 16;
  constexpr int kColBlocks = kWarpN / 8;
  constexpr int kSteps = Tile::block_c / 16;

  const uint32_t memory = ptx::dynamic_shared();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / kShape.warps_n * kWarpM;
  const int warp_col = warp % kShape.warps_n * kWarpN;
  // Row of a 16x16 operand whose address this lane gives to ldmatrix, and which half of its 16
  // channels; b has its two blocks of 8 filters in the place of a's halves of channels.
  const int a_row = warp_row + lane % 16;
  const int b_row = warp_col + lane / 16 * 8 + lane % 8;
  const uint32_t a_at = memory + a_row * 128;
  const uint32_t b_at = memory + kShape.row_bytes() + b_row * 128;
  const uint32_t a_word = lane / 16 ^ lane % 8;
  const uint32_t b_word = lane / 8 % 2 ^ lane % 8;

  Sm80Loader<kTile> loader(op, memory);
  for (int stage = 0; stage < kShape.stages - 1; ++stage) loader.load(stage);
  int stage = 0;
  for (int i = op.starts[blockIdx.x]; i < op.starts[blockIdx.x + 1]; ++i) {
    const Part part = op.parts[i];
    float sums[kRowBlocks][kColBlocks][4] = {};
    for (int left = part.end - part.begin; left > 0; --left) {
      ptx::copy_wait<kShape.stages - 2>();
      // Everyone's words of this stage are there, and nobody reads the previous stage any more.
      __syncthreads();
      loader.load(stage == 0 ? kShape.stages - 1 : stage - 1);

      const uint32_t offset = stage * kShape.stage_bytes();
      uint32_t a[2][kRowBlocks][4], b[2][kColBlocks / 2][4];
      const auto read = [&](int step) {
        const uint32_t a_from = a_at + offset + (a_word ^ 2 * step) * 16;
        const uint32_t b_from = b_at + offset + (b_word ^ 2 * step) * 16;
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          ptx::load_matrices(a[step % 2][m], a_from + m * 16 * 128);
        }
#pragma unroll
        for (int n = 0; n < kColBlocks / 2; ++n) {
          ptx::load_matrices(b[step % 2][n], b_from + n * 16 * 128);
        }
      };
      read(0);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) read(step + 1);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int n = 0; n < kColBlocks; ++n) {
            const uint32_t (&pair)[4] = b[step % 2][n / 2];
            ptx::mma<T>(sums[m][n], a[step % 2][m], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
          }
        }
      }
      stage = stage + 1 < kShape.stages ? stage + 1 : 0;
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      store_sums<T, kTile>(op, part, warp_row + 16 * m, warp_col, sums[m]);
    }
  }
}

}  // namespace deeplab_fast::cuda
