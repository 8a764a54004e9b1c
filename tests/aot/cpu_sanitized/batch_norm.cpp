// Runs the CPU batch norm over shapes at its edges, for a build with sanitizers. All memory is as
// large as what it holds and filled with nan, results are compared with the definition in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "deeplab_fast/batch_norm_cpu.h"

namespace deeplab_fast::cpu {

const BatchNormKernels& batch_norm_wide();

namespace {

template <typename T>
struct Memory {
  explicit Memory(int64_t count)
      : size(count), values(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    std::fill(values, values + count, std::numeric_limits<T>::quiet_NaN());
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(values); }
  T& operator[](int64_t i) { return values[i]; }
  int64_t size;
  T* values;
};

int failures = 0;

struct Shape {
  int64_t pixels, channels;
};

template <typename T>
void check(const char* set, const char* what, const Shape& s, Memory<T>& got,
           const std::vector<double>& expected) {
  const double tolerance = 100 * std::numeric_limits<T>::epsilon();
  double worst = 0, largest = 1;
  for (int64_t i = 0; i < got.size; ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    const double difference = std::abs(got[i] - expected[i]);
    worst = std::isnan(difference) ? 1e30 : std::max(worst, difference);
  }
  if (worst <= tolerance * largest) return;
  std::printf("%s, %s in %d bytes: %d pixels, %d channels: off by %g of %g\n", set, what,
              int(sizeof(T)), int(s.pixels), int(s.channels), worst, largest);
  ++failures;
}

double derivative(Activation act, double v) {
  if (act == Activation::kRelu) return v > 0;
  if (act == Activation::kRelu6) return v > 0 && v < 6;
  if (act == Activation::kHardswish) return v < -3 ? 0 : v <= 3 ? v / 3 + 0.5 : 1;
  return 1;
}

double value(Activation act, double v) {
  if (act == Activation::kRelu) return std::max(v, 0.0);
  if (act == Activation::kRelu6) return std::min(std::max(v, 0.0), 6.0);
  if (act == Activation::kHardswish) return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
  return v;
}

template <typename T>
void run(const char* set, const BatchNormFunctions<T>& kernels, const Shape& s, Activation act,
         bool extra, bool means) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<T> uniform(-1, 1);
  const MapCut cut(s.pixels, s.channels);
  const int64_t size = s.pixels * s.channels, width = std::max(cut.width(), kMinWidth);
  Memory<T> x(size), grad(size), residual(size), y(size), dx(size), d_residual(size);
  Memory<T> mean(width), scale(width), bias(width), mean_grad(width), slope(width);
  for (Memory<T>* map : {&x, &grad, &residual}) {
    for (int64_t i = 0; i < size; ++i) (*map)[i] = uniform(generator);
  }
  Memory<T>* const vectors[] = {&mean, &scale, &bias, &mean_grad, &slope};
  for (Memory<T>* vector : vectors) {
    for (int64_t i = 0; i < width; ++i) {
      (*vector)[i] = i < s.channels ? 4 * uniform(generator) : (*vector)[i - s.channels];
    }
  }
  const bool add = extra && act != Activation::kHardswish;

  std::vector<double> expected_y(size), g(size), expected_dx(size), sums[2], stats[2];
  for (auto& sum : sums) sum.assign(s.channels, 0);
  for (auto& sum : stats) sum.assign(s.channels, 0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i % s.channels;
    const double centred = double{x[i]} - mean[c];
    const double v = centred * scale[c] + bias[c] + (add ? double{residual[i]} : 0);
    expected_y[i] = value(act, v);
    g[i] = grad[i] * derivative(act, v);
    sums[0][c] += g[i];
    sums[1][c] += g[i] * centred;
    expected_dx[i] = scale[c] * (g[i] - (means ? mean_grad[c] + centred * slope[c] : 0));
    stats[0][c] += x[i] / static_cast<double>(s.pixels);
  }
  for (int64_t i = 0; i < size; ++i) {
    const double difference = x[i] - stats[0][i % s.channels];
    stats[1][i % s.channels] += difference * difference / static_cast<double>(s.pixels);
  }

  const auto for_rows = [&](const auto& function) {
    const int64_t half = cut.rows / 2;
    if (half != 0) function(cut.some(0, half));
    if (half != cut.rows) function(cut.some(half, cut.rows));
    if (cut.rest != 0) function(cut.last());
  };
  Forward<T> f{x.values, mean.values, scale.values, bias.values, nullptr, y.values, act};
  if (add) f.residual = residual.values;
  for_rows([&](const Piece& piece) { kernels.bn_act(f, piece); });
  check(set, "bn_act", s, y, expected_y);

  Backward<T> b{grad.values, x.values, nullptr,   mean.values, scale.values, bias.values,
                nullptr,     nullptr,  dx.values, nullptr,     act};
  if (add) b.out = y.values;
  if (means) b.mean_grad = mean_grad.values, b.slope = slope.values;
  if (extra) b.d_residual = d_residual.values;
  for_rows([&](const Piece& piece) { kernels.backward(b, piece); });
  check(set, "backward", s, dx, expected_dx);
  if (extra) check(set, "residual", s, d_residual, g);

  Memory<double> parts(cut.pieces() * 2 * s.channels), counts(cut.pieces());
  Memory<T> scratch(batch_norm_scratch(cut.width())), first(s.channels), second(s.channels);
  Memory<T> rstd(s.channels);
  std::fill(rstd.values, rstd.values + s.channels, T{1});
  // Cut in the middle, as between threads: stripes begin anywhere.
  const int64_t middle = (s.channels + 1) / 2;
  b.dx = b.d_residual = nullptr;
  for (int64_t i = 0; i < cut.pieces(); ++i) {
    kernels.reduce(b, cut.unit(i), scratch.values, parts.values + 2 * i * s.channels);
  }
  kernels.combine_sums(parts.values, cut.pieces(), s.channels, 0, middle, rstd.values, first.values,
                       second.values);
  kernels.combine_sums(parts.values, cut.pieces(), s.channels, middle, s.channels, rstd.values,
                       first.values, second.values);
  check(set, "sum of g", s, first, sums[0]);
  check(set, "sum of g * xhat", s, second, sums[1]);

  for (int64_t i = 0; i < cut.pieces(); ++i) {
    const Piece piece = cut.unit(i);
    counts[i] = static_cast<double>(piece.rows * piece.pixels);
    kernels.stats(x.values, piece, scratch.values, parts.values + 2 * i * s.channels);
  }
  kernels.combine_stats(parts.values, counts.values, cut.pieces(), s.channels, 0, middle,
                        first.values, second.values);
  kernels.combine_stats(parts.values, counts.values, cut.pieces(), s.channels, middle, s.channels,
                        first.values, second.values);
  check(set, "mean", s, first, stats[0]);
  check(set, "variance", s, second, stats[1]);
}

}  // namespace

int run_batch_norms() {
  const Shape shapes[] = {
      {1, 1},      // shorter than every vector
      {1, 3},      // the same with several channels
      {7, 2},      // a row of 14 values: shorter than the widest vector only
      {131, 1},    // two full rows and a rest
      {33, 21},    // rows that end with a vector, a rest that does not
      {9, 64},     // rows of whole vectors
      {150, 70},   // vectors overlap, several blocks
      {2003, 67},  // several units
      {2, 1027},   // wide
      {5300, 16},  // several units of packed pixels
  };
  const BatchNormKernels& kernels = batch_norm_wide();
  std::printf("%s\n", kernels.name);
  for (const Shape& shape : shapes) {
    for (const Activation act :
         {Activation::kNone, Activation::kRelu, Activation::kRelu6, Activation::kHardswish}) {
      // Large maps differ from others in how they are cut, not in what is done to a value.
      const bool large = shape.pixels * shape.channels > kUnitValues;
      if (large && act != Activation::kRelu) continue;
      for (const bool extra : {false, true}) {
        run(kernels.name, kernels.single_precision, shape, act, extra, !extra);
        run(kernels.name, kernels.double_precision, shape, act, extra, extra);
      }
    }
  }
  return failures;
}

}  // namespace deeplab_fast::cpu
