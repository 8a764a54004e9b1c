// The convolution kernels on CPU tensors: checks, threads, memory.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "deeplab_fast/conv_run.h"

namespace deeplab_fast::cpu {

using at::Tensor;

// csrc/cpu/upsample_ops.cpp
std::string instruction_set(std::string name);

namespace {

const ConvKernels& current_conv_kernels() {
  const std::string name = instruction_set("");
  for (const ConvKernels* kernels : {&conv_avx512(), &conv_avx2()}) {
    if (name == kernels->name) return *kernels;
  }
  return conv_baseline();
}

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& function) {
  at::parallel_for(0, count, 1, function);
}

int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Memory of PyTorch's allocator.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : tensor_(at::empty({floats}, at::kFloat)) {}
  float* data() { return tensor_.data_ptr<float>(); }

 private:
  Tensor tensor_;
};

Buffer allocate(int64_t floats) { return Buffer(floats); }

void check_map(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == at::kFloat &&
                        x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " must be a float32 map [N, C, H, W] in channels_last, got ",
                    x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
}

InputMap input_map(const Tensor& x) {
  check_map("x", x);
  return {x.const_data_ptr<float>(), x.size(0), x.size(2), x.size(3), x.size(1)};
}

Epilogue make_epilogue(const Tensor& x, const Tensor& shift, const std::optional<Tensor>& residual,
                       const Tensor& out, int64_t channel_offset, std::string_view act) {
  check_map("out", out);
  const int64_t channels = shift.size(-1);
  TORCH_CHECK_VALUE(out.size(0) == x.size(0) && out.size(2) == x.size(2) &&
                        out.size(3) == x.size(3) && channel_offset >= 0 &&
                        channel_offset + channels <= out.size(1),
                    "out ", out.sizes(), " has no place for ", channels, " channels from ",
                    channel_offset, " of a result for x ", x.sizes());
  TORCH_CHECK_VALUE(shift.scalar_type() == at::kFloat && shift.is_contiguous(),
                    "shift must be contiguous float32");
  Epilogue epilogue{};
  epilogue.shift = shift.const_data_ptr<float>();
  epilogue.channels = channels;
  epilogue.out = out.data_ptr<float>() + channel_offset;
  epilogue.out_stride = out.size(1);
  if (residual.has_value()) {
    check_map("residual", *residual);
    TORCH_CHECK_VALUE(residual->size(0) == x.size(0) && residual->size(1) == channels &&
                          residual->size(2) == x.size(2) && residual->size(3) == x.size(3),
                      "residual ", residual->sizes(), " does not fit x ", x.sizes());
    epilogue.residual = residual->const_data_ptr<float>();
    epilogue.residual_stride = channels;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  epilogue.low = act == "relu" || act == "relu6" ? 0 : -infinity;
  epilogue.high = act == "relu6" ? 6 : infinity;
  epilogue.hardswish = act == "hardswish";
  TORCH_CHECK_VALUE(act == "none" || epilogue.low == 0 || epilogue.hardswish, "act must be relu, ",
                    "relu6, hardswish or none, got ", act);
  return epilogue;
}

int checked_form(int64_t form) {
  TORCH_CHECK_VALUE(form >= 0 && form < kNumForms, "no form has number ", form);
  return static_cast<int>(form);
}

std::vector<AxisTiles> checked_axis(int64_t length, int64_t dilation, int64_t long_form,
                                    int64_t short_form) {
  TORCH_CHECK_VALUE(length < std::numeric_limits<int32_t>::max() / 2, "a map of ", length,
                    " pixels along one axis is too large");
  std::vector<AxisTiles> axis =
      cut_axis(length, dilation, checked_form(long_form), checked_form(short_form));
  const int64_t most = (length + dilation - 1) / dilation;
  for (const AxisTiles& part : axis) {
    const bool is_long = part.form == long_form;
    TORCH_CHECK_VALUE(fits_phase(part.form, is_long ? most : most - 1), "form ",
                      kForms[part.form].name, " does not cover phases of ", most, " samples");
  }
  return axis;
}

}  // namespace

// (name, A, B, C, halo) of a form, in float64; see conv_forms.h.
std::tuple<std::string, Tensor, Tensor, Tensor, int64_t> conv_form(int64_t number) {
  const Form& form = kForms[checked_form(number)];
  Tensor a = at::empty({form.products, form.inputs}, at::kDouble);
  Tensor b = at::empty({form.products, 3}, at::kDouble);
  Tensor c = at::empty({form.outputs, form.products}, at::kDouble);
  for (int p = 0; p < form.products; ++p) {
    for (int j = 0; j < form.inputs; ++j) a.data_ptr<double>()[p * form.inputs + j] = form.a[p][j];
    for (int k = 0; k < 3; ++k) b.data_ptr<double>()[p * 3 + k] = form.b[p][k];
    for (int i = 0; i < form.outputs; ++i) {
      c.data_ptr<double>()[i * form.products + p] = form.c[i][p];
    }
  }
  return {form.name, a, b, c, form.halo};
}

// Weights [K, C, 3, 3] of a pair of forms: [products, panels, C, kPanel].
Tensor conv_prepare_tiles(const Tensor& weight_any, int64_t row_form, int64_t column_form) {
  const Tensor weight = weight_any.contiguous();
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                        weight.scalar_type() == at::kFloat,
                    "weight must be float32 [K, C, 3, 3], got ", weight.scalar_type(), " ",
                    weight.sizes());
  const Form& row = kForms[checked_form(row_form)];
  const Form& column = kForms[checked_form(column_form)];
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const int64_t panels = padded(outputs) / kPanel;
  const int64_t products = int64_t{row.products} * column.products;
  Tensor result = at::empty({products, panels, channels, kPanel}, weight.options());
  const float* const from = weight.const_data_ptr<float>();
  float* const to = result.data_ptr<float>();
  const int64_t panel_size = channels * kPanel;
  const ConvKernels& kernels = current_conv_kernels();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      kernels.prepare(from, outputs, channels, panel, row, column, to + panel * panel_size,
                      panels * panel_size);
    }
  });
  return result;
}

// A 3x3 convolution with stride 1 and padding = dilation, by the forms of the long and the short
// phases along rows and columns; see conv_run.h. `weights` are prepared for the pairs of forms that
// occur, those of the long rows first, within them the long columns first.
void conv_tiles(const Tensor& x, at::TensorList weights, const Tensor& shift,
                const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                int64_t dilation, at::IntArrayRef row_forms, at::IntArrayRef column_forms,
                std::string_view act, int64_t block_tiles) {
  const InputMap map = input_map(x);
  const Epilogue epilogue = make_epilogue(x, shift, residual, out, channel_offset, act);
  TORCH_CHECK_VALUE(dilation >= 1 && dilation <= std::numeric_limits<int32_t>::max() / 16 &&
                        row_forms.size() == 2 && column_forms.size() == 2,
                    "dilation must be positive, and two forms given for each axis");
  if (map.images == 0) return;
  const std::vector<AxisTiles> rows =
      checked_axis(map.height, dilation, row_forms[0], row_forms[1]);
  const std::vector<AxisTiles> columns =
      checked_axis(map.width, dilation, column_forms[0], column_forms[1]);
  TORCH_CHECK_VALUE(weights.size() == rows.size() * columns.size(), "expected ",
                    rows.size() * columns.size(), " prepared weights, got ", weights.size());
  const int64_t panels = padded(epilogue.channels) / kPanel;
  std::vector<TileGroup> groups;
  for (const AxisTiles& row : rows) {
    for (const AxisTiles& column : columns) {
      const Tensor& w = weights[groups.size()];
      groups.push_back({row, column, nullptr});
      TORCH_CHECK_VALUE(w.is_contiguous() && w.scalar_type() == at::kFloat &&
                            w.sizes() == at::IntArrayRef({groups.back().products(), panels,
                                                          map.channels, kPanel}),
                        "prepared weights ", w.sizes(), " do not fit x ", x.sizes());
      groups.back().weights = w.const_data_ptr<float>();
    }
  }
  run_tiles(current_conv_kernels(), map, groups, epilogue, static_cast<int>(dilation), block_tiles,
            num_threads(), parallel, allocate);
}

// A 1x1 convolution. `weight` is prepared: [panels, C, kPanel]; shift [K], or [N, K] for one of
// each image.
void conv_pixels(const Tensor& x, const Tensor& weight, const Tensor& shift,
                 const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                 std::string_view act) {
  InputMap map = input_map(x);
  Epilogue epilogue = make_epilogue(x, shift, residual, out, channel_offset, act);
  const int64_t panels = padded(epilogue.channels) / kPanel;
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.scalar_type() == at::kFloat &&
                        weight.sizes() == at::IntArrayRef({panels, map.channels, kPanel}),
                    "prepared weight ", weight.sizes(), " does not fit x ", x.sizes());
  TORCH_CHECK_VALUE(shift.dim() == 1 || shift.size(0) == map.images, "shift ", shift.sizes(),
                    " does not fit x ", x.sizes());
  const ConvKernels& kernels = current_conv_kernels();
  const float* const weights = weight.const_data_ptr<float>();
  if (shift.dim() == 1) {
    run_pixels(kernels, map, weights, epilogue, num_threads(), parallel, allocate);
    return;
  }
  const int64_t images = map.images, pixels = map.height * map.width;
  map.images = 1;
  for (int64_t n = 0; n < images; ++n) {
    run_pixels(kernels, map, weights, epilogue, num_threads(), parallel, allocate);
    map.data += pixels * map.channels;
    epilogue.out += pixels * epilogue.out_stride;
    epilogue.shift += epilogue.channels;
    if (epilogue.residual != nullptr) epilogue.residual += pixels * epilogue.residual_stride;
  }
}

}  // namespace deeplab_fast::cpu
