// What aspp.cu and aspp_sm90.cu need of torch: tensors as kernels take them, through libtorch's
// stable C interface.
#pragma once

#include "deeplab_fast/aspp_launch.cuh"
#include "launch_ops.cuh"

namespace deeplab_fast::cuda {

// Calls function(T{}) with the type of 16-bit elements.
template <typename Function>
void with_element(const Tensor& x, const Function& function) {
  if (x.scalar_type() == ScalarType::Half) return function(Half{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16,
                  "the CUDA kernels of the ASPP take float16 and bfloat16 only");
  function(Bfloat16{});
}

// Distances of a map [N, C, H, W]; the stride of a dimension of one entry has no meaning.
inline Pitch pitch_of(const Tensor& map) {
  const auto of = [&](int64_t dim) { return map.size(dim) > 1 ? map.stride(dim) : 0; };
  return {of(0), of(2), of(3)};
}

inline bool divides_by(const Pitch& pitch, int64_t n) {
  return pitch.image % n == 0 && pitch.row % n == 0 && pitch.col % n == 0;
}

// The lists of a call: Schedule.classes, parts, starts and sums on the device, int32.
struct Lists {
  const Tensor& classes;
  const Tensor& parts;
  const Tensor& starts;
  const Tensor& sums;

  int64_t programs() const { return starts.size(0) - 1; }
  int64_t cut_tiles() const { return sums.size(0); }
};

// `vectors`: every branch has a multiple of 8 filters.
inline Aspp describe(const Tensor& x, const Tensor& weight, const Tensor& scale,
                     const Tensor& shift, const Lists& lists, Tensor& partial, Tensor& y,
                     bool vectors) {
  Aspp op{};
  op.x = read<uint16_t>(x);
  op.x_pitch = pitch_of(x);
  op.channels = static_cast<int>(x.size(1));
  op.weight = read<uint16_t>(weight);
  op.weight_pitch = weight.stride(0);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type(),
                  "x, weight and y must have one dtype");
  STD_TORCH_CHECK(x.size(1) % 8 == 0 && (x.size(1) == 1 || x.stride(1) == 1) &&
                      divides_by(op.x_pitch, 8) && aligned(op.x, 16),
                  "x must have neighbouring channels, a multiple of 8, and pixels at 16-byte "
                  "boundaries");
  STD_TORCH_CHECK(weight.stride(1) == 1 && op.weight_pitch % 8 == 0 && aligned(op.weight, 16),
                  "rows of the weight must be contiguous and begin at 16-byte boundaries");
  op.scale = read<float>(scale);
  op.shift = read<float>(shift);
  op.shift_image = shift.dim() == 2 ? shift.stride(0) : 0;
  op.y = write<uint16_t>(y);
  op.y_pitch = pitch_of(y);
  op.vectors = vectors && divides_by(op.y_pitch, 8) && aligned(op.y, 16) && aligned(op.scale, 8) &&
               aligned(op.shift, 8) && op.shift_image % 2 == 0;
  op.partial = write<float>(partial);
  op.classes = read<TapClass>(lists.classes);
  op.parts = read<Part>(lists.parts);
  op.starts = read<int>(lists.starts);
  return op;
}

#define DEEPLAB_FAST_ASPP_SCHEMA                                                         \
  "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor classes, Tensor parts, " \
  "Tensor starts, Tensor sums, Tensor(a!) partial, Tensor(b!) y, int tile, bool vectors) -> ()"

}  // namespace deeplab_fast::cuda
