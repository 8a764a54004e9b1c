// The tiles of the CUDA matrix kernels, one table for all architectures. Host code without CUDA and
// without torch; deeplab_fast/ops/aspp_cuda.py chooses a row for each call.
//
// The ASPP's branches and its projection use the same rows: the projection is the same product with
// one tap. No row was measured yet; the reasons are counts of bytes and registers.
//
// Every row:
//   - block_c = 64 channels are 128 bytes: a cache line, and the widest swizzle.
//   - Of an accumulator a thread holds block_m block_n / (cluster 32 multiplying warps) registers:
//     128 are what 255 leave room for, 64 where two blocks share a multiprocessor.
//
// Rejected:
//   - sm_90, 256x128 for 128x256: the same bytes a product from L2, but 12 KB instead of 10 from
//     shared memory for each 16 channels of a warpgroup, and rows are what is gathered.
//   - sm_90, 192x256 with three consumers: 160 registers for one with 128 accumulators, 56 KB a
//     stage. A pair that shares its filters reads less and fits.
//   - sm_90, a tile for each consumer (ping-pong), to hide the epilogue: two tiles of 64x256 read
//     80 KB a stage where one of 128x256 reads 48, and a tile of 2048 channels has 32 iterations
//     for each tap before its epilogue.
//   - sm_90, rows by the copy engine's im2col mode: a tensor map for each live tap of each class
//     (148 for three branches of nine classes), encoded at every call, since x moves.
//   - sm_80, 128x256 with 4 warps: 256 accumulators a thread.
//   - sm_80, block_c = 32 with more stages: half a cache line a row, twice the barriers.
#pragma once

#include <cstddef>

namespace deeplab_fast::cuda {

struct Tile {
  int architecture;  // 80: runs on sm_80 and newer; 90: sm_90a alone
  int block_m;       // pixels of a tile of the list; the blocks of a cluster take equal parts
  int block_n;       // filters
  int warps_m;       // warps (80) or warpgroups (90) that multiply, along the pixels of a block
  int warps_n;       // and along the filters
  int stages;        // chunks of channels in shared memory
  int cluster;       // blocks that share their filters
  int occupancy;     // blocks of a multiprocessor
  static constexpr int block_c = 64;

  constexpr int rows() const { return block_m / cluster; }
  constexpr int threads() const {
    return architecture == 90 ? 128 * (1 + warps_m * warps_n) : 32 * warps_m * warps_n;
  }
  constexpr int row_bytes() const { return rows() * block_c * 2; }
  constexpr int filter_bytes() const { return block_n * block_c * 2; }
  constexpr int stage_bytes() const { return row_bytes() + filter_bytes(); }
  // Of a block. On sm_90 two barriers a stage follow the stages, and the stages begin at a multiple
  // of 1 KB, which the swizzle counts from.
  constexpr size_t shared_bytes() const {
    return static_cast<size_t>(stages) * stage_bytes() +
           (architecture == 90 ? 1024 + 16 * static_cast<size_t>(stages) : 0);
  }
};

inline constexpr Tile kTiles[] = {
    // 85 FLOP for each byte from L2 and one block of 144 KB: GPUs with 163 KB a block (sm_80,
    // sm_90 without sm_90a code, sm_100).
    {80, 128, 256, 2, 4, 3, 1, 1},
    // 96 KB: the most of sm_86, sm_89 and sm_120, which have 99 KB; 64 FLOP a byte.
    {80, 128, 128, 2, 4, 3, 1, 1},
    // Small maps: classes of few pixels fill half the rows. 72 KB and 4 warps, so that one block's
    // epilogue hides behind the other's products where two fit.
    {80, 64, 128, 2, 2, 3, 1, 2},
    // 128 FLOP a byte: a pair loads half the filters each and sends them to both. The widest tile
    // of the list, so it needs classes of many pixels.
    {90, 256, 256, 2, 1, 4, 2, 1},
    // 85 FLOP a byte; m64n256k16. 4 stages are 192 of 227 KB; a fifth does not fit.
    {90, 128, 256, 2, 1, 4, 1, 1},
    // Fewer filters than 256, or too few tiles. 64 FLOP a byte; m64n128k16.
    {90, 128, 128, 2, 1, 6, 1, 1},
    // Small maps. Consumers side by side along the filters, m64n128k16.
    {90, 64, 256, 1, 2, 5, 1, 1},
};
inline constexpr int kTileCount = static_cast<int>(sizeof(kTiles) / sizeof(kTiles[0]));

}  // namespace deeplab_fast::cuda
