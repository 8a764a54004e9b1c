// The ASPP on CUDA tensors, for sm_90a alone.
//
// With DEEPLAB_FAST_WITHOUT_TORCH only the kernels are compiled, by nvcc alone.
#include "deeplab_fast/aspp_launch.cuh"
#include "deeplab_fast/aspp_sm90.cuh"

#ifdef DEEPLAB_FAST_WITHOUT_TORCH

namespace deeplab_fast::cuda {

#define DEEPLAB_FAST_INSTANTIATE(T, tile)                                                     \
  template __global__ void aspp_sm90_kernel<T, tile>(const Aspp,                              \
                                                     const __grid_constant__ ptx::TensorMap); \
  template __global__ void aspp_sum_kernel<T, tile>(const Aspp, const Part*)

DEEPLAB_FAST_INSTANTIATE(Bfloat16, 3);
DEEPLAB_FAST_INSTANTIATE(Bfloat16, 4);
DEEPLAB_FAST_INSTANTIATE(Bfloat16, 5);
DEEPLAB_FAST_INSTANTIATE(Bfloat16, 6);
// Differs in the names of instructions alone.
DEEPLAB_FAST_INSTANTIATE(Half, 6);

#undef DEEPLAB_FAST_INSTANTIATE

}  // namespace deeplab_fast::cuda

#else

#include "aspp_ops.cuh"

namespace deeplab_fast::cuda {

namespace {

// cuTensorMapEncodeTiled of the driver, which is not linked: the extension must load without one.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &result));
#else
    STD_CUDA_CHECK(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr,
                    "the CUDA driver has no cuTensorMapEncodeTiled; it needs to be of CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// Boxes of `rows` filters by 64 channels, swizzled; zeros outside.
CUtensorMap map_filters(const Tensor& weight, int channels, int rows) {
  CUtensorMap map;
  const bool half = weight.scalar_type() == ScalarType::Half;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(channels),
                              static_cast<cuuint64_t>(weight.size(0))};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(weight.stride(0)) * 2};
  const cuuint32_t box[] = {Tile::block_c, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encoder()(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                const_cast<void*>(weight.const_data_ptr()), sizes, pitch, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with error ",
                  static_cast<int>(result), " for a weight of ", weight.size(0), " rows of ",
                  channels, " channels");
  return map;
}

void aspp(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
          const Tensor& classes, const Tensor& parts, const Tensor& starts, const Tensor& sums,
          Tensor partial, Tensor y, int64_t tile, bool vectors) {
  const Launch launch(x);
  const Lists lists{classes, parts, starts, sums};
  const Aspp op = describe(x, weight, scale, shift, lists, partial, y, vectors);
  with_element(x, [&](auto type) {
    using T = decltype(type);
    const bool found = with_tile<90>(tile, [&](auto row) {
      constexpr Tile kShape = kTiles[row];
      const CUtensorMap map = map_filters(weight, op.channels, kShape.block_n / kShape.cluster);
      launch_programs<T, row>(launch, aspp_sm90_kernel<T, row>, op, lists.programs(),
                              read<Part>(sums), lists.cut_tiles(), map);
    });
    STD_TORCH_CHECK(found, "row ", tile, " of the table of tiles is not one of sm_90a");
  });
}

// Programs of a row (blocks, or clusters of them) that the current device runs at the same time:
// lists of tiles assume as many as it has multiprocessors for.
int64_t residency(int64_t tile, bool half) {
  int64_t programs = 0;
  const auto count = [&](auto type, auto row) {
    constexpr Tile kShape = kTiles[row];
    const auto kernel = aspp_sm90_kernel<decltype(type), row>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(kShape.shared_bytes())));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned int>(kShape.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kShape.cluster);
    config.blockDim = dim3(kShape.threads());
    config.dynamicSmemBytes = kShape.shared_bytes();
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    programs = clusters;
  };
  const bool found =
      with_tile<90>(tile, [&](auto row) { half ? count(Half{}, row) : count(Bfloat16{}, row); });
  STD_TORCH_CHECK(found, "row ", tile, " of the table of tiles is not one of sm_90a");
  return programs;
}

}  // namespace

}  // namespace deeplab_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(deeplab_fast, m) {
  m.def("_aspp_sm90" DEEPLAB_FAST_ASPP_SCHEMA);
  m.def("_aspp_sm90_residency(int tile, bool half) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(deeplab_fast, CUDA, m) {
  m.impl("_aspp_sm90", TORCH_BOX(&deeplab_fast::cuda::aspp));
}

// It takes no tensor that says which device.
STABLE_TORCH_LIBRARY_IMPL(deeplab_fast, CompositeExplicitAutograd, m) {
  m.impl("_aspp_sm90_residency", TORCH_BOX(&deeplab_fast::cuda::residency));
}

#endif  // DEEPLAB_FAST_WITHOUT_TORCH
