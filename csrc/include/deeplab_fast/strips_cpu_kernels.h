// The C++ CPU kernels of depthwise convolutions and of inverted residuals, in one instruction set.
//
// Included behind conv_cpu_kernels.h by each csrc/cpu/conv_<set>.cpp, under its rules.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

#define DEEPLAB_FAST_INLINE inline __attribute__((always_inline))
#define DEEPLAB_FAST_LAMBDA __attribute__((always_inline))

// Output pixels for which a depthwise kernel keeps sums.
constexpr int kBlock = 8;
// Vectors of channels that a pixel at an edge is computed for at a time: chains of additions enough
// to hide their latency.
constexpr int kEdge = 4;
// Channels that a row is walked for at a time, so that what its taps share stays in a first-level
// cache.
constexpr int64_t kWalk = 64;

// v = act(v + shift + residual), for whole vectors.
template <int kCount, int kVectors>
DEEPLAB_FAST_INLINE void finish_tile(Vector (&sum)[kCount][kVectors], int64_t pixel,
                                     int64_t channel, const Epilogue& shared_epilogue) {
  const Epilogue epilogue = shared_epilogue;
  if (epilogue.channels - channel < kVectors * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        finish(sum[i][j], pixel + i, channel + j * kLanes, epilogue);
      }
    }
    return;
  }
  float* const out = epilogue.out + pixel * epilogue.out_stride + channel;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const Vector shift = load(epilogue.shift + channel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sum[i][j] += shift;
  }
  if (epilogue.residual != nullptr) {
    const float* const residual = epilogue.residual + pixel * epilogue.residual_stride + channel;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] += load(residual + i * epilogue.residual_stride + j * kLanes);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      store(out + i * epilogue.out_stride + j * kLanes, activate(sum[i][j], epilogue));
    }
  }
}

// Outputs [output, output + kPixels), all of whose taps lie inside, for channels [begin, end). The
// last vector is moved to end with the last channel.
template <int kPixels, int kTaps>
void depthwise_block(const DepthwiseRow& row, int64_t output, int64_t begin, int64_t end) {
  const int64_t step = row.stride * row.x_stride, tap_step = row.dilation * row.x_stride;
  const int64_t start = (row.origin + output * row.stride) * row.x_stride;
  const int64_t taps = kTaps > 0 ? kTaps : row.taps, weight_stride = row.weight_stride;
  const int64_t last = row.epilogue->channels - kLanes;
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t channel = c < last ? c : last;
    Vector sum[kPixels][1] = {};
    for (int64_t i = 0; i < row.num_rows; ++i) {
      const float* x = row.rows[i] + start + channel;
      const float* weight = row.weights[i] + channel;
#pragma GCC unroll 8
      for (int64_t t = 0; t < taps; ++t) {
        const Vector w = load(weight);
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) sum[p][0] += w * load(x + p * step);
        x += tap_step;
        weight += weight_stride;
      }
    }
    finish_tile(sum, row.first_pixel + output, channel, *row.epilogue);
  }
}

// One output, of its taps [first, end), for kVectors vectors from `channel`, the last moved to end
// with the last channel.
template <int kVectors>
DEEPLAB_FAST_INLINE void depthwise_pixel(const DepthwiseRow& row, int64_t output, int64_t first,
                                         int64_t end, int64_t channel) {
  const int64_t last = row.epilogue->channels - kLanes;
  int64_t at[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    at[j] = channel + j * kLanes < last ? channel + j * kLanes : last;
  }
  Vector sum[kVectors] = {};
  for (int64_t i = 0; i < row.num_rows; ++i) {
    for (int64_t t = first; t < end; ++t) {
      const int64_t pixel = row.origin + output * row.stride + t * row.dilation;
      const float* const x = row.rows[i] + pixel * row.x_stride;
      const float* const weight = row.weights[i] + t * row.weight_stride;
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[j] += load(weight + at[j]) * load(x + at[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    finish(sum[j], row.first_pixel + output, at[j], *row.epilogue);
  }
}

// As depthwise_pixel for fewer channels than a vector has.
inline void depthwise_narrow(const DepthwiseRow& row, int64_t output, int64_t first, int64_t end) {
  float sum[kLanes] = {};
  for (int64_t i = 0; i < row.num_rows; ++i) {
    for (int64_t t = first; t < end; ++t) {
      const int64_t pixel = row.origin + output * row.stride + t * row.dilation;
      const float* const x = row.rows[i] + pixel * row.x_stride;
      const float* const weight = row.weights[i] + t * row.weight_stride;
      for (int64_t c = 0; c < row.epilogue->channels; ++c) sum[c] += weight[c] * x[c];
    }
  }
  finish(load(sum), row.first_pixel + output, 0, *row.epilogue);
}

// Outputs [begin, end) one by one, with those of their taps that lie inside.
inline void depthwise_edge(const DepthwiseRow& row, int64_t begin, int64_t end) {
  const int64_t channels = row.epilogue->channels;
  for (int64_t output = begin; output < end; ++output) {
    const int64_t start = row.origin + output * row.stride;
    int64_t first = 0, behind = row.taps;
    while (first < behind && start + first * row.dilation < 0) ++first;
    while (first < behind && start + (behind - 1) * row.dilation >= row.width) --behind;
    if (channels < kLanes) {
      depthwise_narrow(row, output, first, behind);
      continue;
    }
    for (int64_t c = 0; c < channels; c += kEdge * kLanes) {
      depthwise_pixel<kEdge>(row, output, first, behind, c);
    }
  }
}

template <int kTaps>
void depthwise_inside(const DepthwiseRow& row, int64_t begin, int64_t end) {
  const int64_t channels = row.epilogue->channels;
  const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
  constexpr int kHalf = kBlock / 2;
  for (int64_t c = 0; c < channels; c += kWalk) {
    const int64_t last = channels - c < kWalk ? channels : c + kWalk;
    for (int64_t b = 0; b < blocks; ++b) {
      depthwise_block<kBlock, kTaps>(row, begin + b * kBlock, c, last);
    }
    if (end - rest >= kHalf) depthwise_block<kHalf, kTaps>(row, rest, c, last);
  }
  depthwise_edge(row, end - rest >= kHalf ? rest + kHalf : rest, end);
}

void depthwise(const DepthwiseRow& row) {
  // Outputs all of whose taps lie inside.
  const int64_t reach = (row.taps - 1) * row.dilation;
  int64_t begin = row.origin < 0 ? (-row.origin + row.stride - 1) / row.stride : 0;
  const int64_t room = row.width - 1 - reach - row.origin;
  int64_t end = room < 0 ? 0 : room / row.stride + 1;
  if (begin > row.outputs) begin = row.outputs;
  if (end > row.outputs) end = row.outputs;
  if (end <= begin || row.epilogue->channels < kLanes) {
    depthwise_edge(row, 0, row.outputs);
    return;
  }
  depthwise_edge(row, 0, begin);
  if (row.taps == 3) {
    depthwise_inside<3>(row, begin, end);
  } else if (row.taps == 5) {
    depthwise_inside<5>(row, begin, end);
  } else {
    depthwise_inside<0>(row, begin, end);
  }
  depthwise_edge(row, end, row.outputs);
}

// Rows [row, row + kCount) times kVectors vectors of columns from `column`.
template <int kCount, int kVectors>
void strip_tile(const Product& product, int64_t row, int64_t column) {
  const int64_t a_stride = product.a_stride, depth = product.depth;
  const float* const a = product.a + row * a_stride;
  const float* b[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t n = column + j * kLanes;
    b[j] = product.panels + n / kPanel * product.panel_stride + n % kPanel;
  }
  Vector sum[kCount][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vector v[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) v[j] = load(b[j] + k * kPanel);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const Vector value = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += value * v[j];
    }
  }
  finish_tile(sum, product.first_pixel + row, column, *product.epilogue);
}

// kVectors vectors of columns for all rows, kCount at a time.
template <int kCount, int kVectors>
void strip_columns(const Product& product, int64_t column) {
  int64_t row = 0;
  for (; row + kCount <= product.rows; row += kCount) {
    strip_tile<kCount, kVectors>(product, row, column);
  }
  if constexpr (kCount > 2) {
    if (row + kCount / 2 <= product.rows) {
      strip_tile<kCount / 2, kVectors>(product, row, column);
      row += kCount / 2;
    }
  }
  for (; row < product.rows; ++row) strip_tile<1, kVectors>(product, row, column);
}

// Rows of a tile of 2 vectors.
constexpr int kStripRows = kRows * kColumns / 2;

// Tiles of 3 and 2 vectors use all registers for sums as well; one of 1 vector loads twice as much
// for each product.
void strip_multiply(const Product& product) {
  int64_t vectors = (product.epilogue->channels + kLanes - 1) / kLanes, column = 0;
  while (vectors > 0) {
    if (vectors == 3 || vectors >= 5) {
      strip_columns<kStripRows * 2 / 3, 3>(product, column);
      column += 3 * kLanes;
      vectors -= 3;
    } else if (vectors >= 2) {
      strip_columns<kStripRows, 2>(product, column);
      column += 2 * kLanes;
      vectors -= 2;
    } else {
      strip_columns<kStripRows, 1>(product, column);
      vectors = 0;
    }
  }
}

void add_pixels(const float* x, int64_t stride, int64_t pixels, int64_t channels, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sum = {};
    for (int64_t p = 0; p < pixels; ++p) sum += load(x + p * stride + c);
    store(sums + c, sum);
  }
  for (; c < channels; ++c) {
    float sum = 0;
    for (int64_t p = 0; p < pixels; ++p) sum += x[p * stride + c];
    sums[c] = sum;
  }
}

constexpr StripKernels strip_kernels() { return {kLanes, depthwise, strip_multiply, add_pixels}; }

#undef DEEPLAB_FAST_INLINE
#undef DEEPLAB_FAST_LAMBDA

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
