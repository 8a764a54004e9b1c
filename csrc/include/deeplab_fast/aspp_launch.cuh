// The launches behind the ASPP's matrix products. Without torch; launch.cuh has what Launch is.
#pragma once

#include <cstdint>
#include <type_traits>

#include "deeplab_fast/aspp.cuh"
#include "deeplab_fast/launch.cuh"

namespace deeplab_fast::cuda {

// Calls run(std::integral_constant<int, tile>) for a row of kTiles of this architecture; false
// where `tile` is no such row.
template <int kArchitecture, int kTile = 0, typename Run>
bool with_tile(int64_t tile, const Run& run) {
  if constexpr (kTile == kTileCount) {
    return false;
  } else {
    if constexpr (kTiles[kTile].architecture == kArchitecture) {
      if (tile == kTile) {
        run(std::integral_constant<int, kTile>{});
        return true;
      }
    }
    return with_tile<kArchitecture, kTile + 1>(tile, run);
  }
}

// `kernel` over the programs of a list, then the sums of its cut tiles. Further arguments of the
// kernel follow `op`.
template <typename T, int kTile, typename Launch, typename Kernel, typename... Arguments>
void launch_programs(const Launch& launch, const Kernel& kernel, const Aspp& op, int64_t programs,
                     const Part* sums, int64_t cut_tiles, const Arguments&... arguments) {
  constexpr Tile kShape = kTiles[kTile];
  if (programs > 0) {
    launch(kernel,
           Grid{programs * kShape.cluster, kShape.threads(), kShape.shared_bytes(), kShape.cluster},
           op, arguments...);
  }
  if (cut_tiles > 0) {
    constexpr int kBlocks = kShape.block_m * kShape.block_n / 8 / kSumThreads;
    launch(aspp_sum_kernel<T, kTile>, Grid{cut_tiles * kBlocks, kSumThreads}, op, sums);
  }
}

template <typename T, typename Launch>
void launch_image_shift(const Launch& launch, const ImageShift& op) {
  constexpr int kWarps = kShiftThreads / 32;
  const int64_t warps = static_cast<int64_t>(op.images) * op.filters;
  if (warps > 0) {
    launch(image_shift_kernel<T>, Grid{(warps + kWarps - 1) / kWarps, kShiftThreads}, op);
  }
}

}  // namespace deeplab_fast::cuda
