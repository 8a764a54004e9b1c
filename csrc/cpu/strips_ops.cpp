// Depthwise convolutions and inverted residuals on CPU tensors: checks.
#include <optional>
#include <string>
#include <string_view>

#include "conv_checks.h"
#include "deeplab_fast/strips_run.h"

namespace deeplab_fast::cpu {

namespace {

const StripKernels& current_strip_kernels() {
  const std::string name = instruction_set("");
  if (name == conv_avx512().name) return strips_avx512();
  return name == conv_avx2().name ? strips_avx2() : strips_baseline();
}

const float* vector_of(const char* name, const Tensor& tensor, int64_t floats) {
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.scalar_type() == at::kFloat &&
                        tensor.dim() == 1 && tensor.size(0) == floats,
                    name, " must be ", floats, " contiguous floats, got ", tensor.scalar_type(),
                    " ", tensor.sizes());
  return tensor.const_data_ptr<float>();
}

void check_vector(const Tensor& shift) {
  TORCH_CHECK_VALUE(shift.dim() == 1, "shift must be a vector, got ", shift.sizes());
}

const float* panels_of(const char* name, const Tensor& tensor, int64_t outputs, int64_t channels) {
  const int64_t panels = padded(outputs) / kPanel;
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.scalar_type() == at::kFloat &&
                        tensor.sizes() == at::IntArrayRef({panels, channels, kPanel}),
                    name, " must be panels [", panels, ", ", channels, ", ", kPanel,
                    "] of float32, got ", tensor.scalar_type(), " ", tensor.sizes());
  return tensor.const_data_ptr<float>();
}

DepthwiseAxis checked_axis(int64_t length, int64_t outputs, int64_t taps, int64_t stride,
                           int64_t padding, int64_t dilation) {
  check_options("taps, stride and dilation", {taps, stride, dilation}, 1, 3);
  check_options("padding", padding, 0, 1);
  return {length, outputs, taps, stride, dilation, padding};
}

}  // namespace

// A depthwise convolution, between 1x1 convolutions or not; see strips_run.h. Weights are prepared:
// `expand` [panels, C, kPanel] with expand_shift filled up with zeros to whole panels, `depthwise`
// [R, S, channels] filled up likewise, `project` [panels, channels, kPanel]. padding is above and
// on the left; how much there is at the other sides follows from the size of `out`.
void inverted_residual(const Tensor& x, const std::optional<Tensor>& expand,
                       const std::optional<Tensor>& expand_shift, const Tensor& depthwise,
                       const Tensor& depthwise_shift, const std::optional<Tensor>& project,
                       const std::optional<Tensor>& project_shift,
                       const std::optional<Tensor>& residual, const Tensor& out,
                       int64_t channel_offset, const std::optional<Tensor>& sums,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       std::string_view expand_act, std::string_view depthwise_act,
                       std::string_view project_act) {
  InvertedResidual block{};
  block.x = input_map(x);
  block.channels = depthwise_shift.numel();
  TORCH_CHECK_VALUE(expand.has_value() == expand_shift.has_value() &&
                        project.has_value() == project_shift.has_value() &&
                        (expand.has_value() || block.channels == block.x.channels),
                    "weights and shifts do not fit x ", x.sizes());
  TORCH_CHECK_VALUE(depthwise.dim() == 3 && depthwise.is_contiguous() &&
                        depthwise.scalar_type() == at::kFloat &&
                        depthwise.size(2) == padded(block.channels),
                    "depthwise must be float32 [R, S, ", padded(block.channels), "], got ",
                    depthwise.scalar_type(), " ", depthwise.sizes());
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding and dilation must be pairs");
  check_map("out", out);
  block.rows = checked_axis(block.x.height, out.size(2), depthwise.size(0), stride[0], padding[0],
                            dilation[0]);
  block.columns = checked_axis(block.x.width, out.size(3), depthwise.size(1), stride[1], padding[1],
                               dilation[1]);
  if (expand.has_value()) {
    block.expand = panels_of("expand", *expand, block.channels, block.x.channels);
    block.expanded.shift = vector_of("expand_shift", *expand_shift, padded(block.channels));
    set_activation(expand_act, block.expanded);
  }
  block.depthwise = depthwise.const_data_ptr<float>();
  check_vector(project.has_value() ? *project_shift : depthwise_shift);
  const Epilogue epilogue =
      make_epilogue(block.x.images, block.rows.outputs, block.columns.outputs,
                    project.has_value() ? *project_shift : depthwise_shift, residual, out,
                    channel_offset, project.has_value() ? project_act : depthwise_act);
  if (project.has_value()) {
    block.filtered.shift = vector_of("depthwise_shift", depthwise_shift, block.channels);
    set_activation(depthwise_act, block.filtered);
    block.project = panels_of("project", *project, epilogue.channels, block.channels);
    block.projected = epilogue;
  } else {
    block.filtered = epilogue;
  }
  if (sums.has_value()) {
    TORCH_CHECK_VALUE(
        !project.has_value() && sums->is_contiguous() && sums->scalar_type() == at::kFloat &&
            sums->sizes() == at::IntArrayRef({block.x.images, block.rows.outputs, block.channels}),
        "sums are those of a filtered map: float32 [N, H, C], got ", sums->sizes());
    block.sums = sums->data_ptr<float>();
  }
  run_inverted_residual(current_strip_kernels(), block, num_threads(), parallel, allocate);
}

// A 1x1 convolution of maps whose channels are scaled, x * scale [N, C]: scaled are the weights
// [panels, C, kPanel], anew for each image.
void scaled_pixels(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                   const std::optional<Tensor>& residual, const Tensor& out, std::string_view act) {
  InputMap map = input_map(x);
  check_vector(shift);
  Epilogue epilogue =
      make_epilogue(map.images, map.height, map.width, shift, residual, out, 0, act);
  const float* const weights = panels_of("weight", weight, epilogue.channels, map.channels);
  TORCH_CHECK_VALUE(scale.is_contiguous() && scale.scalar_type() == at::kFloat &&
                        scale.sizes() == at::IntArrayRef({map.images, map.channels}),
                    "scale ", scale.sizes(), " does not fit x ", x.sizes());
  const int64_t pixels = map.height * map.width, panels = weight.size(0);
  const int64_t images = map.images;
  const Workspace scaled = allocate(weight.numel());
  map.images = 1;
  for (int64_t n = 0; n < images; ++n) {
    const float* const factors = scale.const_data_ptr<float>() + n * map.channels;
    for (int64_t i = 0; i < panels * map.channels; ++i) {
      const float factor = factors[i % map.channels];
      for (int64_t k = 0; k < kPanel; ++k) {
        scaled.data()[i * kPanel + k] = weights[i * kPanel + k] * factor;
      }
    }
    run_strip_pixels(current_strip_kernels(), map, scaled.data(), epilogue, num_threads(),
                     parallel);
    map.data += pixels * map.channels;
    epilogue.out += pixels * epilogue.out_stride;
    if (epilogue.residual != nullptr) epilogue.residual += pixels * epilogue.residual_stride;
  }
}

}  // namespace deeplab_fast::cpu
