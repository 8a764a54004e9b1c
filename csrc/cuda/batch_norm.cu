// Batch norm in training on CUDA tensors, for sm_80 and newer.
//
// With DEEPLAB_FAST_WITHOUT_TORCH only the kernels are compiled, by nvcc alone: tests look at what
// they take of registers and shared memory where there is neither a GPU nor a torch with CUDA.
#include "deeplab_fast/batch_norm_launch.cuh"

#ifdef DEEPLAB_FAST_WITHOUT_TORCH

namespace deeplab_fast::cuda {

#define DEEPLAB_FAST_STATS(T, width) \
  template __global__ void batch_stats_kernel<T, width>(const PixelPlan, const void*, float*)

#define DEEPLAB_FAST_ACT(T, width, act)                                                      \
  template __global__ void bn_act_kernel<T, width, act>(const PixelPlan, const BatchNorm,    \
                                                        const void*, const void*, void*);    \
  template __global__ void bn_act_reduce_kernel<T, width, act>(                              \
      const PixelPlan, const BatchNorm, const void*, const void*, const void*, float*);      \
  template __global__ void bn_act_backward_kernel<T, width, act>(                            \
      const PixelPlan, const BatchNorm, const void*, const void*, const void*, const float*, \
      const float*, void*, void*)

DEEPLAB_FAST_STATS(float, 4);
DEEPLAB_FAST_STATS(Half, 8);
DEEPLAB_FAST_STATS(Bfloat16, 8);
DEEPLAB_FAST_STATS(Bfloat16, 1);
DEEPLAB_FAST_ACT(float, 4, Act::kRelu);
DEEPLAB_FAST_ACT(Bfloat16, 8, Act::kNone);
DEEPLAB_FAST_ACT(Bfloat16, 8, Act::kRelu);
DEEPLAB_FAST_ACT(Bfloat16, 8, Act::kHardswish);
// Other elements and activations differ in the names of instructions and in comparisons alone.
DEEPLAB_FAST_ACT(Half, 8, Act::kRelu);
DEEPLAB_FAST_ACT(Bfloat16, 1, Act::kHardswish);

#undef DEEPLAB_FAST_STATS
#undef DEEPLAB_FAST_ACT

}  // namespace deeplab_fast::cuda

#else

#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "launch_ops.cuh"

namespace deeplab_fast::cuda {

namespace {

using Optional = std::optional<Tensor>;

// Calls function(T{}) with the type of a map's elements.
template <typename Function>
void with_element(const Tensor& x, const Function& function) {
  if (x.scalar_type() == ScalarType::Half) return function(Half{});
  if (x.scalar_type() == ScalarType::BFloat16) return function(Bfloat16{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "the CUDA kernels of batch norm take float16, bfloat16 and float32 only");
  function(float{});
}

Act act_of(std::string_view name) {
  if (name == "none") return Act::kNone;
  if (name == "relu") return Act::kRelu;
  if (name == "relu6") return Act::kRelu6;
  STD_TORCH_CHECK(name == "hardswish",
                  "act must be 'none', 'relu', 'relu6' or 'hardswish' for the CUDA kernels");
  return Act::kHardswish;
}

// The tensors of a call: maps [N, C, H, W], channels_last and of one dtype, and fp32 vectors [C].
class Operands {
 public:
  explicit Operands(const Tensor& x) : x_(x), vectors_(x.size(1) % 8 == 0) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.size(1) <= std::numeric_limits<int>::max() / 2, x.size(1),
                    " channels are too many");
    if (x.scalar_type() == ScalarType::Float) vectors_ = x.size(1) % 4 == 0;
  }

  int64_t pixels() const { return x_.size(0) * x_.size(2) * x_.size(3); }
  int channels() const { return static_cast<int>(x_.size(1)); }

  const void* map(const Tensor& map) {
    STD_TORCH_CHECK(map.scalar_type() == x_.scalar_type() && map.dim() == 4,
                    "maps must be [N, C, H, W] of one dtype");
    int64_t stride = 1;
    for (const int dim : {1, 3, 2, 0}) {
      STD_TORCH_CHECK(map.size(dim) == x_.size(dim), "maps must have one shape");
      STD_TORCH_CHECK(pixels() == 0 || map.size(dim) <= 1 || map.stride(dim) == stride,
                      "maps must be contiguous in channels_last");
      stride *= map.size(dim);
    }
    return address(map);
  }

  const void* map(const Optional& map) { return map.has_value() ? this->map(*map) : nullptr; }

  const float* vector(const Tensor& vector) {
    STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Float && vector.dim() == 1 &&
                        vector.size(0) == x_.size(1) &&
                        (vector.size(0) <= 1 || vector.stride(0) == 1),
                    "vectors must be contiguous float32 with one value for each channel");
    return static_cast<const float*>(address(vector));
  }

  const float* vector(const Optional& vector) {
    return vector.has_value() ? this->vector(*vector) : nullptr;
  }

  // A map like x.
  Tensor new_map() const {
    return torch::stable::empty(
        std::vector<int64_t>{x_.size(0), x_.size(1), x_.size(2), x_.size(3)}, x_.scalar_type(),
        std::nullopt, x_.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  }

  Tensor new_vector(int64_t size) const {
    return torch::stable::new_empty(x_, std::vector<int64_t>{size}, ScalarType::Float);
  }

  // Calls function(T{}, std::integral_constant<int, kWidth>{}), once all tensors were asked for.
  template <typename Function>
  void run(const Function& function) const {
    with_element(x_, [&](auto type) {
      using T = decltype(type);
      if (vectors_) {
        function(type, std::integral_constant<int, kVectorWidth<T> >{});
      } else {
        function(type, std::integral_constant<int, 1>{});
      }
    });
  }

 private:
  const void* address(const Tensor& tensor) {
    const void* found = tensor.const_data_ptr();
    vectors_ = vectors_ && aligned(found, 16);
    return found;
  }

  const Tensor& x_;
  bool vectors_;
};

BatchNorm describe(Operands& operands, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                   const Tensor& bias) {
  return {operands.vector(mean), operands.vector(rstd), operands.vector(weight),
          operands.vector(bias)};
}

// (mean, biased variance)
std::tuple<Tensor, Tensor> batch_stats(const Tensor& x) {
  const Launch launch(x);
  Operands operands(x);
  const void* const from = operands.map(x);
  Tensor mean = operands.new_vector(x.size(1)), variance = operands.new_vector(x.size(1));
  operands.run([&](auto type, auto width) {
    using T = decltype(type);
    const PixelPlan plan = plan_reduction<T, width>(operands.pixels(), operands.channels());
    Tensor partial = operands.new_vector(plan.partial_size());
    launch_batch_stats<T, width>(launch, plan, from, write<float>(partial), write<float>(mean),
                                 write<float>(variance));
  });
  return {mean, variance};
}

Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const Optional& residual, std::string_view act) {
  const Launch launch(x);
  Operands operands(x);
  const BatchNorm norm = describe(operands, mean, rstd, weight, bias);
  const void* const from = operands.map(x);
  const void* const added = operands.map(residual);
  Tensor y = operands.new_map();
  void* const to = y.mutable_data_ptr();
  const Act which = act_of(act);
  operands.run([&](auto type, auto width) {
    using T = decltype(type);
    launch_bn_act<T, width>(launch, plan_map<T, width>(operands.pixels(), operands.channels()),
                            which, norm, from, added, to);
  });
  return y;
}

// Sums of (g, g * xhat).
std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                         const Tensor& rstd, const Tensor& weight,
                                         const Tensor& bias, const Optional& out,
                                         std::string_view act) {
  const Launch launch(x);
  Operands operands(x);
  const BatchNorm norm = describe(operands, mean, rstd, weight, bias);
  const void* const grads = operands.map(grad);
  const void* const from = operands.map(x);
  const void* const outs = operands.map(out);
  const Act which = act_of(act);
  Tensor sum = operands.new_vector(x.size(1)), xhat_sum = operands.new_vector(x.size(1));
  operands.run([&](auto type, auto width) {
    using T = decltype(type);
    const PixelPlan plan = plan_reduction<T, width>(operands.pixels(), operands.channels());
    Tensor partial = operands.new_vector(plan.partial_size());
    launch_bn_act_reduce<T, width>(launch, plan, which, norm, grads, from, outs,
                                   write<float>(partial), write<float>(sum),
                                   write<float>(xhat_sum));
  });
  return {sum, xhat_sum};
}

// Gradients of (x, residual), the second empty if not asked for.
std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                           const Tensor& rstd, const Tensor& weight,
                                           const Tensor& bias, const Optional& out,
                                           const Optional& mean_grad,
                                           const Optional& mean_grad_xhat, std::string_view act,
                                           bool to_residual) {
  STD_TORCH_CHECK(mean_grad.has_value() == mean_grad_xhat.has_value(),
                  "give both of mean_grad and mean_grad_xhat, or none of them");
  const Launch launch(x);
  Operands operands(x);
  const BatchNorm norm = describe(operands, mean, rstd, weight, bias);
  const void* const grads = operands.map(grad);
  const void* const from = operands.map(x);
  const void* const outs = operands.map(out);
  const float* const constant = operands.vector(mean_grad);
  const float* const slope = operands.vector(mean_grad_xhat);
  const Act which = act_of(act);
  Tensor x_grad = operands.new_map();
  Tensor residual_grad =
      to_residual ? operands.new_map() : torch::stable::new_empty(x, std::vector<int64_t>{0});
  void* const to = x_grad.mutable_data_ptr();
  void* const residual_to = to_residual ? residual_grad.mutable_data_ptr() : nullptr;
  operands.run([&](auto type, auto width) {
    using T = decltype(type);
    launch_bn_act_backward<T, width>(
        launch, plan_map<T, width>(operands.pixels(), operands.channels()), which, norm, grads,
        from, outs, constant, slope, to, residual_to);
  });
  return {x_grad, residual_grad};
}

}  // namespace

}  // namespace deeplab_fast::cuda

#define DEEPLAB_FAST_VECTORS "Tensor mean, Tensor rstd, Tensor weight, Tensor bias"

STABLE_TORCH_LIBRARY_FRAGMENT(deeplab_fast, m) {
  m.def("_batch_stats_cuda(Tensor x) -> (Tensor, Tensor)");
  m.def("_bn_act_cuda(Tensor x, " DEEPLAB_FAST_VECTORS ", Tensor? residual, str act) -> Tensor");
  m.def("_bn_act_reduce_cuda(Tensor grad, Tensor x, " DEEPLAB_FAST_VECTORS
        ", Tensor? out, str act) -> (Tensor, Tensor)");
  m.def("_bn_act_backward_cuda(Tensor grad, Tensor x, " DEEPLAB_FAST_VECTORS
        ", Tensor? out, Tensor? mean_grad, Tensor? mean_grad_xhat, str act, bool to_residual) -> "
        "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deeplab_fast, CUDA, m) {
  namespace cuda = deeplab_fast::cuda;
  m.impl("_batch_stats_cuda", TORCH_BOX(&cuda::batch_stats));
  m.impl("_bn_act_cuda", TORCH_BOX(&cuda::bn_act));
  m.impl("_bn_act_reduce_cuda", TORCH_BOX(&cuda::bn_act_reduce));
  m.impl("_bn_act_backward_cuda", TORCH_BOX(&cuda::bn_act_backward));
}

#endif  // DEEPLAB_FAST_WITHOUT_TORCH
