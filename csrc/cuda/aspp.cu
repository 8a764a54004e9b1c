// The ASPP on CUDA tensors, for sm_80 and newer.
//
// With DEEPLAB_FAST_WITHOUT_TORCH only the kernels are compiled, by nvcc alone: tests look at what
// they take of registers and shared memory where there is neither a GPU nor a torch with CUDA.
#include "deeplab_fast/aspp_launch.cuh"
#include "deeplab_fast/aspp_sm80.cuh"

#ifdef DEEPLAB_FAST_WITHOUT_TORCH

namespace deeplab_fast::cuda {

#define DEEPLAB_FAST_INSTANTIATE(T, tile)                         \
  template __global__ void aspp_sm80_kernel<T, tile>(const Aspp); \
  template __global__ void aspp_sum_kernel<T, tile>(const Aspp, const Part*)

DEEPLAB_FAST_INSTANTIATE(Bfloat16, 0);
DEEPLAB_FAST_INSTANTIATE(Bfloat16, 1);
DEEPLAB_FAST_INSTANTIATE(Bfloat16, 2);
// Differs in the names of instructions alone.
DEEPLAB_FAST_INSTANTIATE(Half, 2);
template __global__ void image_shift_kernel<Half>(const ImageShift);
template __global__ void image_shift_kernel<Bfloat16>(const ImageShift);

#undef DEEPLAB_FAST_INSTANTIATE

}  // namespace deeplab_fast::cuda

#else

#include "aspp_ops.cuh"

namespace deeplab_fast::cuda {

namespace {

void aspp(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
          const Tensor& classes, const Tensor& parts, const Tensor& starts, const Tensor& sums,
          Tensor partial, Tensor y, int64_t tile, bool vectors) {
  const Launch launch(x);
  const Lists lists{classes, parts, starts, sums};
  const Aspp op = describe(x, weight, scale, shift, lists, partial, y, vectors);
  with_element(x, [&](auto type) {
    using T = decltype(type);
    const bool found = with_tile<80>(tile, [&](auto row) {
      launch_programs<T, row>(launch, aspp_sm80_kernel<T, row>, op, lists.programs(),
                              read<Part>(sums), lists.cut_tiles());
    });
    STD_TORCH_CHECK(found, "row ", tile, " of the table of tiles is not one of sm_80");
  });
}

// [N, K] fp32: scale * (weight . pooled) + shift, weight [K, P], pooled [N, P].
Tensor image_shift(const Tensor& pooled, const Tensor& weight, const Tensor& scale,
                   const Tensor& shift) {
  const Launch launch(pooled);
  Tensor out = torch::stable::new_empty(
      pooled, std::vector<int64_t>{pooled.size(0), weight.size(0)}, ScalarType::Float);
  const ImageShift op{read<uint16_t>(pooled),
                      pooled.stride(0),
                      pooled.stride(1),
                      read<uint16_t>(weight),
                      weight.stride(0),
                      weight.stride(1),
                      read<float>(scale),
                      read<float>(shift),
                      write<float>(out),
                      static_cast<int>(pooled.size(0)),
                      static_cast<int>(weight.size(0)),
                      static_cast<int>(weight.size(1))};
  with_element(pooled, [&](auto type) { launch_image_shift<decltype(type)>(launch, op); });
  return out;
}

}  // namespace

}  // namespace deeplab_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(deeplab_fast, m) {
  m.def("_aspp_cuda" DEEPLAB_FAST_ASPP_SCHEMA);
  m.def("_image_shift_cuda(Tensor pooled, Tensor weight, Tensor scale, Tensor shift) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deeplab_fast, CUDA, m) {
  m.impl("_aspp_cuda", TORCH_BOX(&deeplab_fast::cuda::aspp));
  m.impl("_image_shift_cuda", TORCH_BOX(&deeplab_fast::cuda::image_shift));
}

#endif  // DEEPLAB_FAST_WITHOUT_TORCH
