// The convolution kernels on CPU tensors: checks, threads, memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "conv_checks.h"
#include "deeplab_fast/conv_patches.h"
#include "deeplab_fast/conv_run.h"
#include "deeplab_fast/cpu_caches.h"

namespace deeplab_fast::cpu {

namespace {

const CacheShares& this_cache() {
  static const CacheShares shares = cache_shares(third_level_cache());
  return shares;
}

// A map as pixels one behind another, [images, height, width][channels].
struct PixelMap {
  const float* data;
  int64_t images, height, width, channels;

  const float* row(int64_t image, int64_t y) const {
    return data + (image * height + y) * width * channels;
  }
};

PixelMap pixel_map(const char* name, const Tensor& x) {
  check_map(name, x);
  return {x.const_data_ptr<float>(), x.size(0), x.size(2), x.size(3), x.size(1)};
}

// Memory for floats that are written before they are read.
std::unique_ptr<float[]> uninitialised(int64_t floats) {
  return std::unique_ptr<float[]>(new float[floats]);
}

// to[i] = rows [y, y + height) of each image, of each row the pixels [x, x + width).
void copy_window(const PixelMap& from, int64_t y, int64_t x, int64_t height, int64_t width,
                 float* to) {
  const int64_t size = width * from.channels;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(size, 1));
  at::parallel_for(0, from.images * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const row = from.row(i / height, y + i % height) + x * from.channels;
      std::memcpy(to + i * size, row, size * sizeof(float));
    }
  });
}

// Rows and images `dilation` pixels apart, with zeros between them, before and behind.
void spread(const PixelMap& from, int64_t dilation, int64_t margin, float* to) {
  const int64_t rows = from.height + dilation, width = from.width * from.channels;
  const int64_t pitch = (from.width + dilation) * from.channels;
  std::fill_n(to, margin * from.channels, 0.0f);
  float* const first = to + margin * from.channels;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / pitch);
  at::parallel_for(0, from.images * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % rows;
      const int64_t copied = y < from.height ? width : 0;
      if (copied != 0) {
        std::memcpy(first + i * pitch, from.row(i / rows, y), copied * sizeof(float));
      }
      std::fill_n(first + i * pitch + copied, pitch - copied, 0.0f);
    }
  });
  std::fill_n(first + from.images * rows * pitch, margin * from.channels, 0.0f);
}

// to [K, C], rows `step` floats apart, = grad [pixels, K]^T x [pixels, C].
void multiply(const float* grad, const float* x, int64_t pixels, int64_t filters, int64_t channels,
              float* to, int64_t step) {
  const auto matrix = [](const float* data, int64_t rows, int64_t columns, int64_t down,
                         int64_t right) {
    return at::from_blob(const_cast<float*>(data), {rows, columns}, {down, right},
                         at::TensorOptions(at::kFloat));
  };
  Tensor out = matrix(to, filters, channels, step, 1);
  // Past the dispatcher, which a small product would wait for.
  at::cpu::mm_out(out, matrix(grad, filters, pixels, 1, filters),
                  matrix(x, pixels, channels, channels, 1));
}

// Filters whose gradient is not finite somewhere.
std::vector<bool> not_finite_filters(const PixelMap& grad) {
  std::vector<float> sums(grad.channels, 0.0f);
  const int64_t pixels = grad.images * grad.height * grad.width;
  for (int64_t i = 0; i < pixels; ++i) {
    // Zero times what is not finite is nan.
    for (int64_t k = 0; k < grad.channels; ++k) sums[k] += 0.0f * grad.data[i * grad.channels + k];
  }
  std::vector<bool> found(grad.channels);
  for (int64_t k = 0; k < grad.channels; ++k) found[k] = std::isnan(sums[k]);
  return found;
}

// Those of a set that multiplies bf16 and that this processor has, else null.
const ConvKernels* bf16_kernels(std::string_view name) {
  for (const ConvKernels* kernels : {&conv_avx512_bf16(), &conv_avx2(), &conv_baseline()}) {
    if (name == kernels->name && kernels->supported()) return kernels;
  }
  return nullptr;
}

// The set for bf16 is chosen apart from that for fp32, which may be the faster of two.
const ConvKernels* default_bf16_kernels() {
  const char* const name = std::getenv("DEEPLAB_FAST_CPU_SET");
  if (name != nullptr) {
    if (const ConvKernels* const named = bf16_kernels(name)) return named;
  }
  if (conv_avx512_bf16().supported()) return &conv_avx512_bf16();
  return conv_avx2().supported() ? &conv_avx2() : &conv_baseline();
}

const ConvKernels*& current_bf16_kernels() {
  static const ConvKernels* kernels = default_bf16_kernels();
  return kernels;
}

template <typename Factor>
std::vector<int64_t> panels_shape(int64_t outputs, int64_t channels) {
  const int64_t panels = padded(outputs) / kPanel;
  if constexpr (kIsFloat<Factor>) return {panels, channels, kPanel};
  return {panels, (channels + 1) / 2, kPanel, 2};
}

template <typename Factor>
const Factor* checked_panels(const Tensor& weight, const std::vector<int64_t>& shape,
                             const Tensor& x) {
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.scalar_type() == kScalarType<Factor> &&
                        weight.sizes() == shape,
                    "prepared weights ", weight.sizes(), " do not fit x ", x.sizes());
  return values<Factor>(weight);
}

// [channels][kPanel] floats -> pairs of channels [kPanel][2].
void pack_pairs(const float* from, int64_t channels, BFloat16* to) {
  for (int64_t c = 0; c < channels + channels % 2; ++c) {
    BFloat16* const pairs = to + c / 2 * 2 * kPanel + c % 2;
    for (int i = 0; i < kPanel; ++i) {
      pairs[2 * i] = c < channels ? to_bf16(from[c * kPanel + i]) : BFloat16{};
    }
  }
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

// The instruction set that multiplies bf16; a name that is not empty makes it the one in use.
std::string conv_bf16_set(std::string name) {
  if (!name.empty()) {
    const ConvKernels* const named = bf16_kernels(name);
    TORCH_CHECK_VALUE(named != nullptr, "no instruction set for bf16 is named '", name,
                      "', or this processor does not have it");
    current_bf16_kernels() = named;
  }
  return current_bf16_kernels()->name;
}

// Panels [..., C, kPanel] in fp32, rounded to bf16: [..., pairs of C, kPanel, 2].
Tensor conv_panels_bf16(const Tensor& panels) {
  TORCH_CHECK_VALUE(panels.dim() >= 2 && panels.size(-1) == kPanel && panels.is_contiguous() &&
                        panels.scalar_type() == at::kFloat,
                    "panels must be contiguous float32 [..., C, ", kPanel, "], got ",
                    panels.scalar_type(), " ", panels.sizes());
  const int64_t channels = panels.size(-2);
  std::vector<int64_t> shape = panels.sizes().vec();
  shape.end()[-2] = (channels + 1) / 2;
  shape.push_back(2);
  Tensor result = at::empty(shape, panels.options().dtype(at::kBFloat16));
  const float* const from = panels.const_data_ptr<float>();
  BFloat16* const to = static_cast<BFloat16*>(result.data_ptr());
  const int64_t count = channels == 0 ? 0 : panels.numel() / (channels * kPanel);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_pairs(from + i * channels * kPanel, channels, to + i * panel_size<BFloat16>(channels));
    }
  });
  return result;
}

namespace {

template <typename In, typename Factor, typename Out>
void tiles(const ConvKernels& kernels, const Tensor& x, at::TensorList weights, const Tensor& shift,
           const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
           int64_t dilation, at::IntArrayRef row_forms, at::IntArrayRef column_forms,
           std::string_view act, int64_t block_tiles) {
  const InputMapOf<In> map = input_map<In>(x);
  const EpilogueOf<Out> epilogue = make_epilogue<Out>(map.images, map.height, map.width, shift,
                                                      residual, out, channel_offset, act);
  check_options("dilation", dilation, 1, 1);
  TORCH_CHECK_VALUE(row_forms.size() == 2 && column_forms.size() == 2,
                    "two forms must be given for each axis");
  if (map.images == 0 || map.height == 0 || map.width == 0) return;
  // Beyond the map all are the same: only the tap in the centre meets it.
  dilation = std::min(dilation, std::max(map.height, map.width));
  const std::vector<AxisTiles> rows =
      checked_axis(map.height, dilation, row_forms[0], row_forms[1]);
  const std::vector<AxisTiles> columns =
      checked_axis(map.width, dilation, column_forms[0], column_forms[1]);
  TORCH_CHECK_VALUE(weights.size() == rows.size() * columns.size(), "expected ",
                    rows.size() * columns.size(), " prepared weights, got ", weights.size());
  std::vector<TileGroupOf<Factor>> groups;
  for (const AxisTiles& row : rows) {
    for (const AxisTiles& column : columns) {
      const Tensor& w = weights[groups.size()];
      groups.push_back({row, column, nullptr});
      std::vector<int64_t> shape = panels_shape<Factor>(epilogue.channels, map.channels);
      shape.insert(shape.begin(), groups.back().products());
      groups.back().weights = checked_panels<Factor>(w, shape, x);
    }
  }
  run_tiles(kernels, map, groups, epilogue, static_cast<int>(dilation), block_tiles, num_threads(),
            this_cache(), parallel, allocate);
}

}  // namespace

// A 3x3 convolution with stride 1 and padding = dilation, by the forms of the long and the short
// phases along rows and columns; see conv_run.h. `weights` are prepared for the pairs of forms that
// occur, those of the long rows first, within them the long columns first. A map of bf16 gives one
// of bf16 or fp32; weights in bf16 are multiplied by transformed inputs that are rounded to it.
void conv_tiles(const Tensor& x, at::TensorList weights, const Tensor& shift,
                const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                int64_t dilation, at::IntArrayRef row_forms, at::IntArrayRef column_forms,
                std::string_view act, int64_t block_tiles) {
  if (x.scalar_type() != at::kBFloat16) {
    tiles<float, float, float>(current_conv_kernels(), x, weights, shift, residual, out,
                               channel_offset, dilation, row_forms, column_forms, act, block_tiles);
    return;
  }
  with_type(out, [&](auto stored) {
    using Out = decltype(stored);
    const bool bf16 = !weights.empty() && weights[0].scalar_type() == at::kBFloat16;
    const auto run = bf16 ? tiles<BFloat16, BFloat16, Out> : tiles<BFloat16, float, Out>;
    run(*current_bf16_kernels(), x, weights, shift, residual, out, channel_offset, dilation,
        row_forms, column_forms, act, block_tiles);
  });
}

// The units of work of such a call on a map of these sizes, in the order in which they are taken:
// [units, 3], the number of the stage, multiply-adds, and lines that transforms read or write.
Tensor conv_tile_units(at::IntArrayRef shape, int64_t outputs, int64_t dilation,
                       at::IntArrayRef row_forms, at::IntArrayRef column_forms, int64_t threads,
                       int64_t cache_bytes) {
  TORCH_CHECK_VALUE(shape.size() == 4 && row_forms.size() == 2 && column_forms.size() == 2,
                    "expected [N, C, H, W] and two forms for each axis");
  check_options("shape", shape, 1, 4);
  check_options("outputs, dilation and threads", {outputs, dilation, threads}, 1, 3);
  dilation = std::min(dilation, std::max(shape[2], shape[3]));
  const InputMap map{nullptr, shape[0], shape[2], shape[3], shape[1]};
  Epilogue epilogue{};
  epilogue.channels = outputs;
  std::vector<TileGroup> groups;
  for (const AxisTiles& row : checked_axis(map.height, dilation, row_forms[0], row_forms[1])) {
    for (const AxisTiles& column :
         checked_axis(map.width, dilation, column_forms[0], column_forms[1])) {
      groups.push_back({row, column, nullptr});
    }
  }
  const TileWork work(current_conv_kernels(), map, groups, epilogue, static_cast<int>(dilation), 0,
                      threads, cache_bytes > 0 ? cache_shares(cache_bytes) : this_cache());
  Team team;
  work.add_to(team, nullptr);
  Tensor result = at::empty({team.total(), 3}, at::kLong);
  int64_t* to = result.data_ptr<int64_t>();
  team.for_costs([&](int64_t stage, UnitCost cost) {
    for (const int64_t value : {stage, cost.macs, cost.lines}) *to++ = value;
  });
  return result;
}

namespace {

template <typename In, typename Factor, typename Out>
void patches_product(const ConvKernels& kernels, const Tensor& x, const Tensor& weight,
                     const Tensor& shift, const std::optional<Tensor>& residual, const Tensor& out,
                     int64_t channel_offset, std::string_view act, at::IntArrayRef kernel,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     bool planar) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == kScalarType<In>, "x must be a ",
                    kIsFloat<In> ? "float32" : "bfloat16", " map [N, C, H, W], got ",
                    x.scalar_type(), " ", x.sizes());
  PatchesOf<In> patches{values<In>(x), x.size(0), x.stride(0), x.size(1),
                        x.stride(1),   {},        {},          planar};
  TORCH_CHECK_VALUE(planar || x.size(1) == 1 || x.stride(1) == 1,
                    "channels must lie one behind another where patches are not planar, got x ",
                    x.sizes(), " with strides ", x.strides());
  check_options("kernel", kernel, 1);
  check_options("stride", stride, 1);
  check_options("padding", padding, 0);
  check_options("dilation", dilation, 1);
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK_VALUE(x.size(2 + axis) + 2 * padding[axis] > dilation[axis] * (kernel[axis] - 1),
                      "no result for x ", x.sizes(), " of kernel ", kernel, ", stride ", stride,
                      ", padding ", padding, ", dilation ", dilation);
    PatchAxis& along = axis == 0 ? patches.rows : patches.columns;
    along = PatchAxis{x.size(2 + axis), x.stride(2 + axis), kernel[axis],
                      stride[axis],     padding[axis],      dilation[axis]};
  }
  const int64_t images = patches.images, height = patches.rows.outputs();
  const int64_t width = patches.columns.outputs();
  EpilogueOf<Out> epilogue =
      make_epilogue<Out>(images, height, width, shift, residual, out, channel_offset, act);
  const Factor* const weights =
      checked_panels<Factor>(weight, panels_shape<Factor>(epilogue.channels, patches.depth()), x);
  TORCH_CHECK_VALUE(shift.dim() == 1 || shift.size(0) == images, "shift ", shift.sizes(),
                    " does not fit x ", x.sizes());
  if (shift.dim() == 1) {
    run_patches(kernels, patches, weights, epilogue, num_threads(), parallel, allocate);
    return;
  }
  patches.images = 1;
  for (int64_t n = 0; n < images; ++n) {
    run_patches(kernels, patches, weights, epilogue, num_threads(), parallel, allocate);
    patches.data += patches.image_step;
    epilogue.out += height * width * epilogue.out_stride;
    epilogue.shift += epilogue.channels;
    if (epilogue.residual != nullptr)
      epilogue.residual += height * width * epilogue.residual_stride;
  }
}

}  // namespace

// A convolution as one product, 1x1 or by its patches; see conv_patches.h. x may have any strides.
// `weight` is prepared: panels with the depth in the order of the patches, planar or not; shift
// [K], or [N, K] for one of each image. The other lists are (rows, columns). Weights in bf16 are
// multiplied by a map of bf16, or of fp32 that is rounded to it, and give a map of bf16 or fp32.
void conv_pixels(const Tensor& x, const Tensor& weight, const Tensor& shift,
                 const std::optional<Tensor>& residual, const Tensor& out, int64_t channel_offset,
                 std::string_view act, at::IntArrayRef kernel, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation, bool planar) {
  if (weight.scalar_type() != at::kBFloat16) {
    patches_product<float, float, float>(current_conv_kernels(), x, weight, shift, residual, out,
                                         channel_offset, act, kernel, stride, padding, dilation,
                                         planar);
    return;
  }
  with_type(x, [&](auto given) {
    with_type(out, [&](auto stored) {
      patches_product<decltype(given), BFloat16, decltype(stored)>(
          *current_bf16_kernels(), x, weight, shift, residual, out, channel_offset, act, kernel,
          stride, padding, dilation, planar);
    });
  });
}

// deeplab_fast/ops/_cpu_conv.py says what it computes; spreads is whether maps are padded once for
// all taps.
Tensor conv_weight_gradient(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t stride,
                            int64_t dilation, bool spreads) {
  const PixelMap g = pixel_map("grad", grad), from = pixel_map("x", x);
  const int64_t taps = kernel * kernel, filters = g.channels, channels = from.channels;
  TORCH_CHECK_VALUE(kernel == 1 || (kernel == 3 && stride == 1), "kernel must be 1, or 3 with ",
                    "stride 1, got ", kernel, " with stride ", stride);
  check_options("stride and dilation", {stride, dilation}, 1);
  TORCH_CHECK_VALUE(from.height >= 1 && from.width >= 1 && g.images == from.images &&
                        g.height == (from.height - 1) / stride + 1 &&
                        g.width == (from.width - 1) / stride + 1,
                    "grad ", grad.sizes(), " does not fit x ", x.sizes(), " at stride ", stride);
  Tensor result = at::empty({filters, channels, kernel, kernel}, grad.options(),
                            at::MemoryFormat::ChannelsLast);
  float* const to = result.data_ptr<float>();
  const int64_t step = taps * channels, pixels = g.images * g.height * g.width;
  if (pixels == 0) {
    std::fill_n(to, filters * step, 0.0f);
    return result;
  }
  if (kernel == 1) {
    if (stride == 1) {
      multiply(g.data, from.data, pixels, filters, channels, to, step);
      return result;
    }
    const auto strided = uninitialised(pixels * channels);
    at::parallel_for(0, g.images * g.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const row = from.row(i / g.height, i % g.height * stride);
        for (int64_t column = 0; column < g.width; ++column) {
          std::memcpy(strided.get() + (i * g.width + column) * channels,
                      row + column * stride * channels, channels * sizeof(float));
        }
      }
    });
    multiply(g.data, strided.get(), pixels, filters, channels, to, step);
    return result;
  }
  if (spreads) {
    // With rows and images `dilation` apart a tap is an offset, the same for all pixels, and what
    // it reads outside the map is 0.
    const int64_t pitch = g.width + dilation, margin = dilation * (pitch + 1);
    const int64_t size = g.images * (g.height + dilation) * pitch;
    const auto spread_grad = uninitialised(size * filters);
    const auto spread_x = uninitialised((size + 2 * margin) * channels);
    spread(g, dilation, 0, spread_grad.get());
    spread(from, dilation, margin, spread_x.get());
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t start = margin + dilation * ((tap / 3 - 1) * pitch + tap % 3 - 1);
      multiply(spread_grad.get(), spread_x.get() + start * channels, size, filters, channels,
               to + tap * channels, step);
    }
  } else {
    const auto inside_grad = uninitialised(pixels * filters);
    const auto inside_x = uninitialised(pixels * channels);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t dy = dilation * (tap / 3 - 1), dx = dilation * (tap % 3 - 1);
      const int64_t height = g.height - std::abs(dy), width = g.width - std::abs(dx);
      if (height <= 0 || width <= 0) {
        for (int64_t k = 0; k < filters; ++k) {
          std::fill_n(to + k * step + tap * channels, channels, 0.0f);
        }
        continue;
      }
      const float *of_grad = g.data, *of_x = from.data;
      if (dy != 0 || dx != 0) {
        copy_window(g, std::max<int64_t>(0, -dy), std::max<int64_t>(0, -dx), height, width,
                    inside_grad.get());
        copy_window(from, std::max<int64_t>(0, dy), std::max<int64_t>(0, dx), height, width,
                    inside_x.get());
        of_grad = inside_grad.get();
        of_x = inside_x.get();
      }
      multiply(of_grad, of_x, g.images * height * width, filters, channels, to + tap * channels,
               step);
    }
  }
  const std::vector<bool> spoilt = not_finite_filters(g);
  for (int64_t k = 0; k < filters; ++k) {
    if (spoilt[k]) std::fill_n(to + k * step, step, std::numeric_limits<float>::quiet_NaN());
  }
  return result;
}

}  // namespace deeplab_fast::cpu
