// Registers the C++ CPU implementations under private names; deeplab_fast/ops/*.py calls them where
// backend "cpu" is chosen. The public schemas are defined there.
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace deeplab_fast::cpu {

using at::Tensor;

// csrc/cpu/upsample_ops.cpp
std::string instruction_set(std::string name);
std::string suggest_set(std::string family, std::string name);
std::tuple<Tensor, Tensor, Tensor, Tensor> bilinear_axis(int64_t in, int64_t out,
                                                         bool align_corners, bool is_double);
Tensor exp_nonpositive(const Tensor& x);
Tensor log_from_one(const Tensor& x);
std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& logits, int64_t height, int64_t width,
                                           bool align_corners, bool return_prob);
Tensor upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, int64_t ignore_index,
                              double label_smoothing, std::string_view reduction,
                              bool align_corners);
std::tuple<Tensor, Tensor> upsample_cross_entropy_with_grad(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t ignore_index, double label_smoothing, std::string_view reduction, bool align_corners);
Tensor upsample_cross_entropy_backward(const Tensor& grad, const Tensor& logits,
                                       const Tensor& target, const std::optional<Tensor>& weight,
                                       int64_t ignore_index, double label_smoothing,
                                       std::string_view reduction, bool align_corners);
Tensor upsample_confusion(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                          bool align_corners);
void upsample_softmax_add(const Tensor& accumulator, const Tensor& logits, bool flip,
                          bool align_corners);

// csrc/cpu/conv_ops.cpp
std::tuple<std::string, Tensor, Tensor, Tensor, int64_t> conv_form(int64_t number);
Tensor conv_prepare_tiles(const Tensor& weight, int64_t row_form, int64_t column_form);
std::string conv_bf16_set(std::string name);
Tensor conv_panels_bf16(const Tensor& panels);
void conv_tiles(const Tensor& x, at::TensorList weights, const Tensor& shift,
                const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                int64_t dilation, at::IntArrayRef row_forms, at::IntArrayRef column_forms,
                std::string_view act, int64_t block_tiles);
Tensor conv_tile_units(at::IntArrayRef shape, int64_t outputs, int64_t dilation,
                       at::IntArrayRef row_forms, at::IntArrayRef column_forms, int64_t threads,
                       int64_t cache_bytes);
void conv_pixels(const Tensor& x, const Tensor& weight, const Tensor& shift,
                 const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                 std::string_view act, at::IntArrayRef kernel, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation, bool planar);
Tensor conv_weight_gradient(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t stride,
                            int64_t dilation, bool spreads);

// csrc/cpu/depthwise_ops.cpp
std::tuple<Tensor, Tensor> depthwise_gradients(const Tensor& grad, const Tensor& x,
                                               const Tensor& weight, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, bool to_x, bool to_weight);

// csrc/cpu/strips_ops.cpp
void inverted_residual(const Tensor& x, const std::optional<Tensor>& expand,
                       const std::optional<Tensor>& expand_shift, const Tensor& depthwise,
                       const Tensor& depthwise_shift, const std::optional<Tensor>& project,
                       const std::optional<Tensor>& project_shift,
                       const std::optional<Tensor>& residual, const Tensor& out,
                       int64_t channel_offset, const std::optional<Tensor>& sums,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       std::string_view expand_act, std::string_view depthwise_act,
                       std::string_view project_act);
void scaled_pixels(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                   const std::optional<Tensor>& residual, const Tensor& out, std::string_view act);

// csrc/cpu/batch_norm_ops.cpp
std::tuple<Tensor, Tensor, Tensor> batch_stats(const Tensor& x, double eps,
                                               const std::optional<Tensor>& running_mean,
                                               const std::optional<Tensor>& running_var,
                                               const std::optional<Tensor>& num_batches_tracked,
                                               std::optional<double> momentum);
Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const std::optional<Tensor>& residual,
              std::optional<std::string_view> act);
std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                         const Tensor& rstd, const Tensor& weight,
                                         const Tensor& bias, const std::optional<Tensor>& out,
                                         std::optional<std::string_view> act);
std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                           const Tensor& rstd, const Tensor& weight,
                                           const Tensor& bias, const std::optional<Tensor>& out,
                                           const std::optional<Tensor>& mean_grad,
                                           const std::optional<Tensor>& mean_grad_xhat,
                                           std::optional<std::string_view> act, bool to_residual,
                                           double count);

// csrc/cpu/max_pool.cpp
void max_pool(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
              at::IntArrayRef padding, at::IntArrayRef dilation, const Tensor& out);

// csrc/cpu/quantise.cpp
bool quantise(const Tensor& x, const Tensor& out, int64_t channel_offset, double scale,
              int64_t zero_point);
void dequantise(const Tensor& x, const Tensor& out, double scale, int64_t zero_point);

// csrc/cpu/hash_bytes.cpp
int64_t hash_bytes(at::TensorList tensors);

}  // namespace deeplab_fast::cpu

#define DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS                                                  \
  "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, " \
  "str reduction, bool align_corners"
#define DEEPLAB_FAST_BATCH_NORM "Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "

TORCH_LIBRARY_FRAGMENT(deeplab_fast, m) {
  namespace cpu = deeplab_fast::cpu;
  m.def("_cpu_instruction_set(str name) -> str", &cpu::instruction_set);
  m.def("_cpu_suggest_set(str family, str name) -> str", &cpu::suggest_set);
  m.def(
      "_bilinear_axis(int inputs, int outputs, bool align_corners, bool is_double) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      &cpu::bilinear_axis);
  m.def("_exp_nonpositive_cpu(Tensor x) -> Tensor");
  m.def("_log_from_one_cpu(Tensor x) -> Tensor");
  m.def(
      "_upsample_argmax_cpu(Tensor logits, int height, int width, bool align_corners, "
      "bool return_prob) -> (Tensor, Tensor)");
  m.def("_upsample_cross_entropy_cpu(" DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS ") -> Tensor");
  m.def("_upsample_cross_entropy_with_grad_cpu(" DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS
        ") -> (Tensor, Tensor)");
  m.def("_upsample_cross_entropy_backward_cpu(Tensor grad, " DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS
        ") -> Tensor");
  m.def(
      "_upsample_confusion_cpu(Tensor logits, Tensor target, int ignore_index, "
      "bool align_corners) -> Tensor");
  m.def(
      "_upsample_softmax_add_cpu(Tensor(a!) accumulator, Tensor logits, bool flip, "
      "bool align_corners) -> ()");
  m.def("_conv_form(int number) -> (str, Tensor, Tensor, Tensor, int)", &cpu::conv_form);
  m.def("_conv_prepare_tiles_cpu(Tensor weight, int row_form, int column_form) -> Tensor");
  m.def("_conv_bf16_set(str name) -> str", &cpu::conv_bf16_set);
  m.def("_conv_panels_bf16_cpu(Tensor panels) -> Tensor");
  m.def(
      "_conv_tiles_cpu(Tensor x, Tensor[] weights, Tensor shift, Tensor? residual, Tensor(a!) out, "
      "int channel_offset, int dilation, int[2] row_forms, int[2] column_forms, str act, "
      "int block_tiles=0) -> ()");
  m.def(
      "_conv_tile_units(int[4] shape, int outputs, int dilation, int[2] row_forms, "
      "int[2] column_forms, int threads, int cache_bytes=0) -> Tensor",
      &cpu::conv_tile_units);
  m.def(
      "_conv_pixels_cpu(Tensor x, Tensor weight, Tensor shift, Tensor? residual, Tensor(a!) out, "
      "int channel_offset, str act, int[2] kernel=1, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, bool planar=False) -> ()");
  m.def(
      "_conv_weight_gradient_cpu(Tensor grad, Tensor x, int kernel, int stride, int dilation, "
      "bool spreads) -> Tensor");
  m.def(
      "_depthwise_gradients_cpu(Tensor grad, Tensor x, Tensor weight, int[2] padding, "
      "int[2] dilation, bool to_x, bool to_weight) -> (Tensor, Tensor)");
  m.def(
      "_inverted_residual_cpu(Tensor x, Tensor? expand, Tensor? expand_shift, Tensor depthwise, "
      "Tensor depthwise_shift, Tensor? project, Tensor? project_shift, Tensor? residual, "
      "Tensor(a!) out, int channel_offset, Tensor(b!)? sums, int[2] stride, int[2] padding, "
      "int[2] dilation, str expand_act, str depthwise_act, str project_act) -> ()");
  m.def(
      "_scaled_pixels_cpu(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor(a!) out, str act) -> ()");
  m.def(
      "_batch_stats_cpu(Tensor x, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum) -> (Tensor, Tensor, Tensor)");
  m.def("_bn_act_cpu(" DEEPLAB_FAST_BATCH_NORM "Tensor? residual, str? act) -> Tensor");
  m.def("_bn_act_reduce_cpu(Tensor grad, " DEEPLAB_FAST_BATCH_NORM
        "Tensor? out, str? act) -> (Tensor, Tensor)");
  m.def("_bn_act_backward_cpu(Tensor grad, " DEEPLAB_FAST_BATCH_NORM
        "Tensor? out, Tensor? mean_grad, Tensor? mean_grad_xhat, str? act, bool to_residual, "
        "float count) -> (Tensor, Tensor)");
  m.def(
      "_max_pool_cpu(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "Tensor(a!) out) -> ()");
  m.def(
      "_quantise_cpu(Tensor x, Tensor(a!) out, int channel_offset, float scale, int zero_point)"
      " -> bool");
  m.def("_dequantise_cpu(Tensor x, Tensor(a!) out, float scale, int zero_point) -> ()");
  m.def("_hash_bytes(Tensor[] tensors) -> int");
  m.impl("_hash_bytes", c10::DispatchKey::CompositeExplicitAutograd, &cpu::hash_bytes);
}

TORCH_LIBRARY_IMPL(deeplab_fast, CPU, m) {
  namespace cpu = deeplab_fast::cpu;
  m.impl("_exp_nonpositive_cpu", &cpu::exp_nonpositive);
  m.impl("_log_from_one_cpu", &cpu::log_from_one);
  m.impl("_upsample_argmax_cpu", &cpu::upsample_argmax);
  m.impl("_upsample_cross_entropy_cpu", &cpu::upsample_cross_entropy);
  m.impl("_upsample_cross_entropy_with_grad_cpu", &cpu::upsample_cross_entropy_with_grad);
  m.impl("_upsample_cross_entropy_backward_cpu", &cpu::upsample_cross_entropy_backward);
  m.impl("_upsample_confusion_cpu", &cpu::upsample_confusion);
  m.impl("_upsample_softmax_add_cpu", &cpu::upsample_softmax_add);
  m.impl("_conv_prepare_tiles_cpu", &cpu::conv_prepare_tiles);
  m.impl("_conv_panels_bf16_cpu", &cpu::conv_panels_bf16);
  m.impl("_conv_tiles_cpu", &cpu::conv_tiles);
  m.impl("_conv_pixels_cpu", &cpu::conv_pixels);
  m.impl("_conv_weight_gradient_cpu", &cpu::conv_weight_gradient);
  m.impl("_depthwise_gradients_cpu", &cpu::depthwise_gradients);
  m.impl("_inverted_residual_cpu", &cpu::inverted_residual);
  m.impl("_scaled_pixels_cpu", &cpu::scaled_pixels);
  m.impl("_batch_stats_cpu", &cpu::batch_stats);
  m.impl("_bn_act_cpu", &cpu::bn_act);
  m.impl("_bn_act_reduce_cpu", &cpu::bn_act_reduce);
  m.impl("_bn_act_backward_cpu", &cpu::bn_act_backward);
  m.impl("_max_pool_cpu", &cpu::max_pool);
  m.impl("_quantise_cpu", &cpu::quantise);
  m.impl("_dequantise_cpu", &cpu::dequantise);
}
