// The ASPP's matrix product on Hopper: gathered cp.async and the copy engine into swizzled shared
// memory, wgmma out of it. Without torch; sm_90a alone.
//
// A block is a warpgroup that loads and two that multiply, around a ring of stages with two
// barriers each. `full`: the 128 loading threads' rows of x have landed (cp.async counts that by
// itself) and so have the filters, which one thread orders from the copy engine. `empty`: the eight
// multiplying warps are done with the stage. The loader runs ahead across the ends of parts, so
// that the next tile's operands arrive while a tile is stored.
//
// A stage holds 64 channels of the pixels and of the filters, as rows of 128 bytes, swizzled as the
// copy engine and wgmma want it: the 16-byte word w of row r lies at w xor r % 8.
//
// A cluster of two blocks takes the two halves of a tile's pixels. Each loads half of the filters
// and sends them to both, so that a stage is empty when the warps of both blocks are done with it.
#pragma once

#include "deeplab_fast/aspp.cuh"

namespace deeplab_fast::cuda {

// Registers of the threads that load and of those that multiply; together what a launch bound of
// 384 threads gives out, 168 each.
constexpr int kLoadRegisters = 56;
constexpr int kMultiplyRegisters = 224;
constexpr int kMultiplyWarps = 8;

// Doubts that only a GPU settles, each a variant of the extension (setup.py): whether wgmma needs a
// proxy fence to see rows that cp.async wrote, and whether the loader must acquire at the scope of
// the cluster what another block released.
#ifdef DEEPLAB_FAST_SM90_NOFENCE
constexpr bool kProxyFence = false;
#else
constexpr bool kProxyFence = true;
#endif
#ifdef DEEPLAB_FAST_SM90_ACQUIRE_CLUSTER
constexpr bool kAcquireCluster = true;
#else
constexpr bool kAcquireCluster = false;
#endif

// The ring of stages in shared memory, and where in it this thread is.
template <int kTile>
class Sm90Ring {
 public:
  static constexpr Tile kShape = kTiles[kTile];

  // Addresses that are the same in all blocks of a cluster; the stages begin at a multiple of 1 KB.
  __device__ explicit Sm90Ring(uint32_t memory)
      : stages_((memory + 1023) & ~1023u),
        barriers_(stages_ + kShape.stages * kShape.stage_bytes()) {}

  __device__ void init() const {
    for (int i = 0; i < kShape.stages; ++i) {
      // The 128 threads of the loading warpgroup, and one of them again for the filters.
      ptx::barrier_init(barriers_ + 16 * i, 128 + 1);
      ptx::barrier_init(barriers_ + 16 * i + 8, kMultiplyWarps * kShape.cluster);
    }
    ptx::barrier_init_fence();
  }

  __device__ uint32_t rows() const { return stages_ + stage_ * kShape.stage_bytes(); }
  __device__ uint32_t filters() const { return rows() + kShape.row_bytes(); }
  __device__ uint32_t full() const { return barriers_ + 16 * stage_; }
  __device__ uint32_t empty() const { return full() + 8; }

  __device__ void wait_full() const { ptx::barrier_wait(full(), phase_); }
  // Passes in the first round, before anything was in the stage.
  __device__ void wait_empty() const {
    if constexpr (kAcquireCluster && kShape.cluster > 1) {
      ptx::barrier_wait_cluster(empty(), phase_ ^ 1);
    } else {
      ptx::barrier_wait(empty(), phase_ ^ 1);
    }
  }

  __device__ void next() {
    if (++stage_ < kShape.stages) return;
    stage_ = 0;
    phase_ ^= 1;
  }

 private:
  uint32_t stages_, barriers_;
  uint32_t phase_ = 0;
  int stage_ = 0;
};

// The loading warpgroup. A thread copies one 16-byte word of every 16th row.
template <int kTile>
__device__ inline void load_parts(const Aspp& op, const ptx::TensorMap* filter_map,
                                  Sm90Ring<kTile> ring, int program, int rank) {
  constexpr Tile kShape = kTiles[kTile];
  constexpr int kStep = 16;
  constexpr int kRows = kShape.rows() / kStep;
  const int first_row = threadIdx.x / 8;
  const int word = threadIdx.x % 8;
  const uint32_t place = first_row * 128 + (word ^ first_row % 8) * 16;

  for (int i = op.starts[program]; i < op.starts[program + 1]; ++i) {
    const Part part = op.parts[i];
    const TapClass c = op.classes[part.tap_class];
    int64_t offset[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      // Rows behind the last pixel repeat it; they are not stored.
      const int number = rank * kShape.rows() + first_row + row * kStep;
      offset[row] = offset_of(locate_at_most(c, part.first, number), op.x_pitch) + 8 * word;
    }
    Taps taps(c, part.begin);
    for (int left = part.end - part.begin; left > 0; --left) {
      ring.wait_empty();
      if (threadIdx.x == 0) {
        // Channels beyond the last arrive as zeros. Filters beyond the branch's last are some
        // others, or zeros; their columns are not stored.
        ptx::barrier_arrive_expect(ring.full(), kShape.filter_bytes());
        const int filter = taps.weight_row() + part.filter;
        if constexpr (kShape.cluster == 1) {
          ptx::load_box(ring.filters(), filter_map, taps.channel, filter, ring.full());
        } else {
          constexpr int kShare = kShape.block_n / kShape.cluster;
          ptx::load_box_multicast(ring.filters() + rank * kShare * 128, filter_map, taps.channel,
                                  filter + rank * kShare, ring.full(), (1 << kShape.cluster) - 1);
        }
      }
      const bool real = taps.channel + 8 * word < op.channels;
      const uint16_t* from = op.x + taps.offset(op.x_pitch);
      const uint32_t to = ring.rows() + place;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        ptx::copy_async(to + row * kStep * 128, from + offset[row], real);
      }
      ptx::barrier_arrive_copies(ring.full());
      taps.next();
      ring.next();
    }
  }
}

// wgmma's description of rows of 128 bytes, swizzled, eight rows every 1 KB. Neither the distance
// between neighbouring columns of such blocks nor an offset of the swizzle is needed: a row is as
// wide as the swizzle, and rows begin at a multiple of 1 KB. Adding 2 moves 16 channels on.
__device__ inline uint64_t describe_rows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = static_cast<uint64_t>(1024 / 16) << 32;
  return kSwizzle128 | kEightRows | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// A multiplying warpgroup.
template <typename T, int kTile>
__device__ inline void multiply_parts(const Aspp& op, Sm90Ring<kTile> ring, int program, int rank) {
  constexpr Tile kShape = kTiles[kTile];
  constexpr int kWarpgroupN = kShape.block_n / kShape.warps_n;
  static_assert(kShape.rows() == 64 * kShape.warps_m);
  static_assert(kShape.warps_m * kShape.warps_n * 4 == kMultiplyWarps);
  constexpr int kBlocks = kWarpgroupN / 8;
  const int warpgroup = threadIdx.x / 128 - 1;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int row = warpgroup % kShape.warps_m * 64;
  const int col = warpgroup / kShape.warps_m * kWarpgroupN;
  const auto release = [&](uint32_t empty) {
    if constexpr (kTiles[kTile].cluster == 1) {
      if (lane == 0) ptx::barrier_arrive(empty);
    } else {
      if (lane < kTiles[kTile].cluster) ptx::barrier_arrive_at(empty, lane);
    }
  };

  for (int i = op.starts[program]; i < op.starts[program + 1]; ++i) {
    const Part part = op.parts[i];
    float sums[kBlocks][4];
    uint32_t previous = 0;
    for (int j = part.begin; j < part.end; ++j) {
      ring.wait_full();
      // The rows were written by cp.async, and wgmma reads by another way.
      if constexpr (kProxyFence) ptx::fence_async_proxy();
      const uint64_t a = describe_rows(ring.rows() + row * 128);
      const uint64_t b = describe_rows(ring.filters() + col * 128);
      ptx::wgmma_hold(sums);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tile::block_c / 16; ++step) {
        ptx::wgmma<T>(sums, a + 2 * step, b + 2 * step, j > part.begin || step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_hold(sums);
      // These products run on while the next stage is waited for; those before them are done.
      ptx::wgmma_wait<1>();
      if (j > part.begin) release(previous);
      previous = ring.empty();
      ring.next();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sums);
    release(previous);
    store_sums<T, kTile>(op, part, rank * kShape.rows() + row + 16 * warp, col, sums);
  }
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads(), 1)
    aspp_sm90_kernel(const Aspp op, const __grid_constant__ ptx::TensorMap filter_map) {
  constexpr Tile kShape = kTiles[kTile];
  static_assert(kShape.architecture == 90 && kShape.threads() == 384);
  const int program = static_cast<int>(blockIdx.x) / kShape.cluster;
  const int rank = kShape.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  Sm90Ring<kTile> ring(ptx::dynamic_shared());
  if (threadIdx.x == 0) {
    ptx::prefetch(&filter_map);
    ring.init();
  }
  if constexpr (kShape.cluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }

  if (threadIdx.x < 128) {
    ptx::give_registers<kLoadRegisters>();
    load_parts<kTile>(op, &filter_map, ring, program, rank);
  } else {
    ptx::take_registers<kMultiplyRegisters>();
    multiply_parts<T, kTile>(op, ring, program, rank);
  }

  // Until then the other block may still send filters here and release stages.
  if constexpr (kShape.cluster > 1) ptx::cluster_sync();
}

}  // namespace deeplab_fast::cuda
