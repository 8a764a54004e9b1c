// Runs the CPU convolution over shapes at its edges, for a build with sanitizers. All memory is as
// large as what it holds and filled with nan, results are compared with the definition in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "deeplab_fast/conv_run.h"

namespace deeplab_fast::cpu {

const ConvKernels& conv_wide();

namespace {

struct Memory {
  explicit Memory(int64_t count) : floats(static_cast<float*>(std::malloc(count * 4))) {
    std::fill(floats, floats + count, std::numeric_limits<float>::quiet_NaN());
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(floats); }
  float* data() { return floats; }
  float* floats;
};

// As at::parallel_for with three threads.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& function) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t begin = count * i / 3, end = count * (i + 1) / 3;
    if (begin < end) threads.emplace_back([=] { function(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

Memory allocate(int64_t floats) { return Memory(floats); }

struct Shape {
  int64_t images, channels, outputs, height, width;
  int dilation;
  int row_forms[2], column_forms[2];
  int64_t block;  // tiles; negative: shared by the threads; 0: automatic
  bool residual;
  int64_t offset, total;  // channel slice
};

int failures = 0;

void check(const char* what, const ConvKernels& kernels, const Shape& s, double worst) {
  if (worst < 3e-5) return;
  std::printf("%s, %s: N%d C%d K%d %dx%d dilation %d forms %d %d x %d %d: off by %g\n",
              kernels.name, what, int(s.images), int(s.channels), int(s.outputs), int(s.height),
              int(s.width), s.dilation, s.row_forms[0], s.row_forms[1], s.column_forms[0],
              s.column_forms[1], worst);
  ++failures;
}

void run(const ConvKernels& kernels, const Shape& s, bool one_by_one) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const int64_t pixels = s.images * s.height * s.width;
  Memory x(pixels * s.channels), w(s.outputs * s.channels * 9), shift(s.outputs);
  Memory residual(pixels * s.outputs), out(pixels * s.total);
  for (int64_t i = 0; i < pixels * s.channels; ++i) x.floats[i] = uniform(generator);
  for (int64_t i = 0; i < s.outputs * s.channels * 9; ++i) w.floats[i] = uniform(generator);
  for (int64_t i = 0; i < s.outputs; ++i) shift.floats[i] = uniform(generator);
  for (int64_t i = 0; i < pixels * s.outputs; ++i) residual.floats[i] = uniform(generator);

  Epilogue epilogue{};
  epilogue.shift = shift.floats;
  epilogue.residual = s.residual ? residual.floats : nullptr;
  epilogue.residual_stride = s.outputs;
  epilogue.out = out.floats + s.offset;
  epilogue.out_stride = s.total;
  epilogue.channels = s.outputs;
  epilogue.high = std::numeric_limits<float>::infinity();
  const InputMap map = {x.floats, s.images, s.height, s.width, s.channels};
  const int64_t panels = padded(s.outputs) / kPanel;
  const int64_t panel_size = s.channels * kPanel;
  if (one_by_one) {
    // The middle tap only.
    Memory weights(panels * panel_size);
    for (int64_t panel = 0; panel < panels; ++panel) {
      kernels.prepare(w.floats, s.outputs, s.channels, panel, kForms[kLine1], kForms[kLine1],
                      weights.floats + panel * panel_size, panels * panel_size);
    }
    run_pixels(kernels, map, weights.floats, epilogue, 3, parallel, allocate);
  } else {
    std::vector<TileGroup> groups;
    std::deque<Memory> weights;
    for (const AxisTiles& rows : cut_axis(s.height, s.dilation, s.row_forms[0], s.row_forms[1])) {
      for (const AxisTiles& columns :
           cut_axis(s.width, s.dilation, s.column_forms[0], s.column_forms[1])) {
        groups.push_back({rows, columns, nullptr});
        weights.emplace_back(groups.back().products() * panels * panel_size);
        for (int64_t panel = 0; panel < panels; ++panel) {
          kernels.prepare(w.floats, s.outputs, s.channels, panel, kForms[rows.form],
                          kForms[columns.form], weights.back().floats + panel * panel_size,
                          panels * panel_size);
        }
        groups.back().weights = weights.back().floats;
      }
    }
    run_tiles(kernels, map, groups, epilogue, s.dilation, s.block, 3, parallel, allocate);
  }

  double worst = 0, largest = 1, outside = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    const int64_t image = p / (s.height * s.width), y = p / s.width % s.height, c = p % s.width;
    for (int64_t k = 0; k < s.outputs; ++k) {
      double sum = shift.floats[k] + (s.residual ? residual.floats[p * s.outputs + k] : 0.0f);
      for (int tap = 0; tap < 9; ++tap) {
        const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
        if (one_by_one && (dy != 0 || dx != 0)) continue;
        const int64_t row = y + dy * s.dilation, column = c + dx * s.dilation;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        const float* const from =
            x.floats + ((image * s.height + row) * s.width + column) * s.channels;
        for (int64_t i = 0; i < s.channels; ++i) {
          sum += double{from[i]} * w.floats[(k * s.channels + i) * 9 + tap];
        }
      }
      largest = std::max(largest, std::abs(sum));
      const double value = out.floats[p * s.total + s.offset + k];
      const double difference = std::abs(value - std::max(sum, 0.0));
      if (!(difference <= worst)) worst = std::isnan(difference) ? 1e30 : difference;
    }
    for (int64_t k = 0; k < s.total; ++k) {
      const bool mine = k >= s.offset && k < s.offset + s.outputs;
      if (!mine && !std::isnan(out.floats[p * s.total + k])) outside = 1;
    }
  }
  check(one_by_one ? "1x1" : "3x3", kernels, s, worst / largest);
  check("written outside its channels", kernels, s, outside);
}

}  // namespace

int run_convolutions() {
  const Shape shapes[] = {
      // N  C   K   H   W  d  row forms         column forms      block residual slice
      {1, 1, 1, 1, 1, 1, {kLine1, kLine1}, {kTile2, kTile2}, 0, false, 0, 1},
      {2, 5, 3, 4, 7, 9, {kLine1, kLine1}, {kLine1, kLine1}, 0, true, 0, 3},
      {1, 16, 16, 9, 9, 5, {kLine2, kLine1}, {kLine2, kLine2}, 0, false, 2, 20},
      {1, 17, 33, 8, 13, 3, {kLine3, kLine2}, {kTile3, kTile3}, 2, true, 7, 41},
      {3, 15, 20, 6, 5, 1, {kTile4, kTile4}, {kTile6, kTile6}, -4, false, 0, 20},
      {1, 70, 18, 10, 10, 2, {kTile6, kTile6}, {kTile4, kTile4}, 0, true, 1, 19},
      {1, 300, 7, 5, 5, 1, {kTile2, kTile2}, {kTile3, kTile3}, 0, false, 0, 9},
      {1, 260, 130, 3, 4, 1, {kTile3, kTile3}, {kTile4, kTile4}, -1, false, 0, 130},
      {0, 4, 4, 3, 3, 1, {kTile2, kTile2}, {kTile2, kTile2}, 0, false, 0, 4},
  };
  for (const ConvKernels* kernels : {&conv_avx2(), &conv_wide()}) {
    if (!kernels->supported()) continue;
    std::printf("%s\n", kernels->name);
    for (const Shape& shape : shapes) {
      run(*kernels, shape, false);
      run(*kernels, shape, true);
    }
  }
  return failures;
}

}  // namespace deeplab_fast::cpu
