// The C++ CPU convolution kernels, in one instruction set.
//
// Included once by each csrc/cpu/conv_<set>.cpp, in the way and under the rules of
// upsample_cpu_kernels.h. The file defines DEEPLAB_FAST_SET (a namespace),
// DEEPLAB_FAST_VECTOR_BYTES, DEEPLAB_FAST_ROWS and DEEPLAB_FAST_COLUMNS (rows of the
// multiplication's register tile, and vectors in each).
// With DEEPLAB_FAST_BF16_INSTRUCTIONS those of avx512_bf16 are used.
//
// Vectors hold channels.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

typedef float Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES / 2)));

constexpr int kLanes = DEEPLAB_FAST_VECTOR_BYTES / sizeof(float);
constexpr int kParts = kPanel / kLanes;  // vectors in a panel
constexpr int kRows = DEEPLAB_FAST_ROWS;
constexpr int kColumns = DEEPLAB_FAST_COLUMNS;
static_assert(kColumns == 2 || kParts == 1, "wide tiles take whole panels");

#define DEEPLAB_FAST_INLINE inline __attribute__((always_inline))
#define DEEPLAB_FAST_LAMBDA __attribute__((always_inline))

DEEPLAB_FAST_INLINE Vector load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

DEEPLAB_FAST_INLINE void store(float* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// value - 0 is value also for -0, so that no addition is left; value + 0 is not.
DEEPLAB_FAST_INLINE Vector broadcast(float value) { return value - Vector{}; }

DEEPLAB_FAST_INLINE Vector load(const BFloat16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
}

// To the nearest, ties to even; nan stays nan.
DEEPLAB_FAST_INLINE void store(BFloat16* to, Vector vector) {
#if defined(DEEPLAB_FAST_BF16_INSTRUCTIONS)
  const __m256bh halves = _mm512_cvtneps_pbh(vector);
#else
  const Words bits = reinterpret_cast<Words>(vector);
  const Words rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Words is_nan = reinterpret_cast<Words>(vector != vector);
  // Rounding would carry a nan's bits into the sign; the quiet bit keeps them from all being cut.
  const Words kept = (rounded & ~is_nan) | ((bits | 0x400000) & is_nan);
  const Halves halves = __builtin_convertvector(kept >> 16, Halves);
#endif
  __builtin_memcpy(to, &halves, sizeof(halves));
}

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

template <int kBegin, int kEnd, typename Function>
DEEPLAB_FAST_INLINE void unrolled(const Function& function) {
  if constexpr (kBegin < kEnd) {
    function(Index<kBegin>{});
    unrolled<kBegin + 1, kEnd>(function);
  }
}

// sum + factor * x; factors of 0 and +-1 cost no multiplication.
template <double kFactor>
DEEPLAB_FAST_INLINE void add_scaled(Vector& sum, bool& empty, Vector x) {
  if constexpr (kFactor != 0) {
    if constexpr (kFactor == 1) {
      sum = empty ? x : sum + x;
    } else if constexpr (kFactor == -1) {
      sum = empty ? -x : sum - x;
    } else {
      const Vector term = x * static_cast<float>(kFactor);
      sum = empty ? term : sum + term;
    }
    empty = false;
  }
}

// The products of one line of inputs: A x.
template <int kForm, typename Load, typename Store>
DEEPLAB_FAST_INLINE void transform_input(const Load& input, const Store& output) {
  constexpr const Form& form = kForms[kForm];
  Vector x[form.inputs];
  unrolled<0, form.inputs>([&](auto j) DEEPLAB_FAST_LAMBDA { x[j.value] = input(j.value); });
  unrolled<0, form.input_pairs>([&](auto pair) DEEPLAB_FAST_LAMBDA {
    constexpr int p = 2 * decltype(pair)::value;
    Vector even = {}, odd = {};
    bool no_even = true, no_odd = true;
    unrolled<0, form.inputs>([&](auto input_index) DEEPLAB_FAST_LAMBDA {
      constexpr int j = decltype(input_index)::value;
      if constexpr (form.a[p][j] == form.a[p + 1][j]) {
        add_scaled<form.a[p][j]>(even, no_even, x[j]);
      } else {
        add_scaled<form.a[p][j]>(odd, no_odd, x[j]);
      }
    });
    output(p, even + odd);
    output(p + 1, even - odd);
  });
  unrolled<2 * form.input_pairs, form.products>([&](auto product) DEEPLAB_FAST_LAMBDA {
    constexpr int p = decltype(product)::value;
    Vector sum = {};
    bool empty = true;
    unrolled<0, form.inputs>([&](auto input_index) DEEPLAB_FAST_LAMBDA {
      constexpr int j = decltype(input_index)::value;
      add_scaled<form.a[p][j]>(sum, empty, x[j]);
    });
    output(p, sum);
  });
}

// The outputs of one line of products: C m.
template <int kForm, typename Load, typename Store>
DEEPLAB_FAST_INLINE void transform_output(const Load& input, const Store& output) {
  constexpr const Form& form = kForms[kForm];
  // Of a pair the sum and the difference are kept.
  Vector m[form.products];
  unrolled<0, form.output_pairs>([&](auto pair) DEEPLAB_FAST_LAMBDA {
    constexpr int p = 2 * decltype(pair)::value;
    const Vector first = input(p), second = input(p + 1);
    m[p] = first + second;
    m[p + 1] = first - second;
  });
  unrolled<2 * form.output_pairs, form.products>(
      [&](auto p) DEEPLAB_FAST_LAMBDA { m[p.value] = input(p.value); });
  unrolled<0, form.outputs>([&](auto output_index) DEEPLAB_FAST_LAMBDA {
    constexpr int i = decltype(output_index)::value;
    Vector sum = {};
    bool empty = true;
    unrolled<0, form.products>([&](auto product) DEEPLAB_FAST_LAMBDA {
      constexpr int p = decltype(product)::value;
      constexpr bool paired = p < 2 * form.output_pairs;
      constexpr int first = paired ? p / 2 * 2 : p;
      constexpr bool same = paired && form.c[i][first] == form.c[i][first + paired];
      // The sum serves columns with equal entries, the difference the others.
      constexpr double factor = !paired || same == (p == first) ? form.c[i][first] : 0;
      add_scaled<factor>(sum, empty, m[p]);
    });
    output(i, sum);
  });
}

template <int kForm, typename Value>
void input_rows(const Value* const* pixels, int64_t channel, int count, int columns, float* to) {
  constexpr int inputs = kForms[kForm].inputs;
  for (int column = 0; column < columns; ++column) {
    const Value* from[inputs];
    for (int i = 0; i < inputs; ++i) from[i] = pixels[i * columns + column] + channel;
    float* const line = to + column * kStrip;
    for (int c = 0; c < count; c += kLanes) {
      transform_input<kForm>(
          [&](int i) DEEPLAB_FAST_LAMBDA { return load(from[i] + c); },
          [&](int p, Vector v) DEEPLAB_FAST_LAMBDA { store(line + p * columns * kStrip + c, v); });
    }
  }
}

template <int kForm, typename Factor>
void input_columns(const float* from, int count, int rows, Factor* to, int64_t stride) {
  constexpr int inputs = kForms[kForm].inputs, products = kForms[kForm].products;
  for (int row = 0; row < rows; ++row) {
    const float* const line = from + row * inputs * kStrip;
    Factor* const product = to + row * products * stride;
    for (int c = 0; c < count; c += kLanes) {
      transform_input<kForm>([&](int j) DEEPLAB_FAST_LAMBDA { return load(line + j * kStrip + c); },
                             [&](int p, Vector v)
                                 DEEPLAB_FAST_LAMBDA { store(product + p * stride + c, v); });
    }
  }
}

template <int kForm>
void output_rows(const float* from, int64_t stride, int count, int columns, float* to) {
  for (int column = 0; column < columns; ++column) {
    const float* const product = from + column * stride;
    float* const line = to + column * kStrip;
    for (int c = 0; c < count; c += kLanes) {
      transform_output<kForm>(
          [&](int p) DEEPLAB_FAST_LAMBDA { return load(product + p * columns * stride + c); },
          [&](int i, Vector v) DEEPLAB_FAST_LAMBDA { store(line + i * columns * kStrip + c, v); });
    }
  }
}

DEEPLAB_FAST_INLINE Vector hardswish(Vector v) {
  const Vector six = broadcast(6);
  Vector gate = v + 3;
  gate = gate < 0 ? Vector{} : gate;
  gate = gate > six ? six : gate;
  return v * gate / 6;
}

template <typename Value>
DEEPLAB_FAST_INLINE Vector activate(Vector v, const EpilogueOf<Value>& epilogue) {
  if (epilogue.hardswish) return hardswish(v);
  // nan compares false and stays.
  const Vector low = broadcast(epilogue.low), high = broadcast(epilogue.high);
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Of the kLanes channels from `channel`, those that there are.
template <typename Value>
DEEPLAB_FAST_INLINE void finish(Vector v, int64_t pixel, int64_t channel,
                                const EpilogueOf<Value>& epilogue) {
  const int64_t left = epilogue.channels - channel;
  Value* const out = epilogue.out + pixel * epilogue.out_stride + channel;
  const int64_t residual = pixel * epilogue.residual_stride + channel;
  if (left >= kLanes) {
    v = v + load(epilogue.shift + channel);
    if (epilogue.residual != nullptr) v = v + load(epilogue.residual + residual);
    store(out, activate(v, epilogue));
  } else if (left > 0) {
    float shift[kLanes] = {};
    Value lanes[kLanes] = {};
    __builtin_memcpy(shift, epilogue.shift + channel, left * sizeof(float));
    v = v + load(shift);
    if (epilogue.residual != nullptr) {
      __builtin_memcpy(lanes, epilogue.residual + residual, left * sizeof(Value));
      v = v + load(lanes);
    }
    store(lanes, activate(v, epilogue));
    __builtin_memcpy(out, lanes, left * sizeof(Value));
  }
}

template <int kForm, typename Value>
void output_columns(const float* from, int rows, const int64_t* pixels, int64_t channel, int count,
                    const EpilogueOf<Value>& shared_epilogue) {
  constexpr int outputs = kForms[kForm].outputs, products = kForms[kForm].products;
  // A copy: what is behind the reference would be read again after each store.
  const EpilogueOf<Value> epilogue = shared_epilogue;
  for (int row = 0; row < rows; ++row, pixels += outputs) {
    const float* const line = from + row * products * kStrip;
    for (int c = 0; c < count; c += kLanes) {
      transform_output<kForm>([&](int p)
                                  DEEPLAB_FAST_LAMBDA { return load(line + p * kStrip + c); },
                              [&](int j, Vector v) DEEPLAB_FAST_LAMBDA {
                                if (pixels[j] >= 0) finish(v, pixels[j], channel + c, epilogue);
                              });
    }
  }
}

// Depth below which a register tile ends before a line that it asks for at its beginning has come.
constexpr int64_t kShortDepth = 64;

// How the sums of a register tile end: in c, or through the epilogue. kAny decides for each vector
// what the others have compiled.
enum Ending {
  kSums,
  kIdentity,
  kIdentityResidual,
  kRelu,
  kReluResidual,
  kRelu6,
  kHardswish,
  kAny,
  kNumEndings,
};

inline Ending ending_of(const Epilogue* epilogue) {
  if (epilogue == nullptr) return kSums;
  const bool residual = epilogue->residual != nullptr;
  if (epilogue->hardswish) return residual ? kAny : kHardswish;
  const bool low = epilogue->low == 0, high = epilogue->high < __builtin_inff();
  if (!low && !high) return residual ? kIdentityResidual : kIdentity;
  if (low && !high) return residual ? kReluResidual : kRelu;
  return low && epilogue->high == 6 && !residual ? kRelu6 : kAny;
}

// As `finish` for kLanes channels that there are.
template <Ending kEnding>
DEEPLAB_FAST_INLINE void finish_whole(Vector v, Vector shift, const float* residual, float* out) {
  v = v + shift;
  if constexpr (kEnding == kIdentityResidual || kEnding == kReluResidual) v = v + load(residual);
  if constexpr (kEnding == kRelu || kEnding == kReluResidual || kEnding == kRelu6) {
    v = v < 0 ? Vector{} : v;
  }
  if constexpr (kEnding == kRelu6) v = v > 6 ? broadcast(6) : v;
  if constexpr (kEnding == kHardswish) v = hardswish(v);
  store(out, v);
}

// Rows [row, last) times kVectors vectors of columns from `column`, in register tiles of kCount
// rows. For each kPanel of depth a tile prefetches `ahead_lines` cache lines of the kAhead panels
// from `ahead`. Returns the first row that is left.
template <int kCount, int kVectors, Ending kEnding>
int64_t multiply_rows(const Product& product, int64_t row, int64_t last, int64_t column,
                      const float* panel, int64_t vector_stride, const float* ahead,
                      int ahead_lines) {
  constexpr int kAhead = kParts > 1 ? 1 : kVectors;
  constexpr int kLine = kPanel;
  constexpr bool kResidual = kEnding == kIdentityResidual || kEnding == kReluResidual;
  const int64_t a_stride = product.a_stride, c_stride = product.c_stride, depth = product.depth;
  // A copy: what is behind the pointer would be read again after each store.
  const Epilogue epilogue = kEnding == kSums ? Epilogue{} : *product.epilogue;
  const int64_t out_stride = epilogue.out_stride, residual_stride = epilogue.residual_stride;
  const int64_t early = depth < kShortDepth ? 2 * kCount : 0;
  for (; row + kCount <= last; row += kCount) {
    const float* const a = product.a + row * a_stride;
    const float* const next = product.prefetch_rows ? a + kCount * a_stride : a;
    float* const c = product.c + row * c_stride + column;
    const int64_t tile = row / kCount;
    const float* line = ahead + tile % kAhead * product.panel_stride +
                        tile / kAhead * ahead_lines * (depth / kLine) * kLine;
    if constexpr (kEnding != kSums) {
      const int64_t pixel = product.first_pixel + row + early;
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        __builtin_prefetch(epilogue.out + (pixel + i) * out_stride + column, 1);
      }
      if constexpr (kResidual) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          __builtin_prefetch(epilogue.residual + (pixel + i) * residual_stride + column);
        }
      }
    }
    for (int64_t begin = 0; begin < depth; begin += product.run) {
      const int64_t end = depth - begin < product.run ? depth : begin + product.run;
      Vector sum[kCount][kVectors] = {};
      const auto step = [&](int64_t k) DEEPLAB_FAST_LAMBDA {
        Vector b[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) b[j] = load(panel + k * kPanel + j * vector_stride);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          const Vector value = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) sum[i][j] += value * b[j];
        }
      };
      int64_t k = begin;
      for (; k + kLine <= end; k += kLine) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) __builtin_prefetch(next + i * a_stride + k);
        for (int i = 0; i < ahead_lines; ++i, line += kLine) __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 4
        for (int q = 0; q < kLine; ++q) step(k + q);
      }
      for (; k < end; ++k) step(k);
      if (product.accumulate || begin > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) sum[i][j] += load(c + i * c_stride + j * kLanes);
        }
      }
      if (kEnding == kSums || end < depth) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) store(c + i * c_stride + j * kLanes, sum[i][j]);
        }
        continue;
      }
      const int64_t pixel = product.first_pixel + row;
      if constexpr (kEnding == kAny) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            finish(sum[i][j], pixel + i, column + j * kLanes, epilogue);
          }
        }
      } else if constexpr (kEnding != kSums) {
        Vector shift[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) shift[j] = load(epilogue.shift + column + j * kLanes);
        float* const out = epilogue.out + pixel * out_stride + column;
        const float* const residual =
            kResidual ? epilogue.residual + pixel * residual_stride + column : nullptr;
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            finish_whole<kEnding>(sum[i][j], shift[j], residual + i * residual_stride + j * kLanes,
                                  out + i * out_stride + j * kLanes);
          }
        }
      }
    }
  }
  return row;
}

using MultiplyRows = int64_t (*)(const Product&, int64_t, int64_t, int64_t, const float*, int64_t,
                                 const float*, int);

template <int kCount, int kVectors>
DEEPLAB_FAST_INLINE MultiplyRows whole_tiles(Ending ending) {
  static constexpr MultiplyRows functions[kNumEndings] = {
      multiply_rows<kCount, kVectors, kSums>,
      multiply_rows<kCount, kVectors, kIdentity>,
      multiply_rows<kCount, kVectors, kIdentityResidual>,
      multiply_rows<kCount, kVectors, kRelu>,
      multiply_rows<kCount, kVectors, kReluResidual>,
      multiply_rows<kCount, kVectors, kRelu6>,
      multiply_rows<kCount, kVectors, kHardswish>,
      multiply_rows<kCount, kVectors, kAny>,
  };
  return functions[ending];
}

// The rows that fill no tile.
template <int kCount, int kVectors>
DEEPLAB_FAST_INLINE MultiplyRows last_tile(bool sums, int64_t rows) {
  MultiplyRows tile = nullptr;
  unrolled<1, kCount>([&](auto count) DEEPLAB_FAST_LAMBDA {
    constexpr int kRest = decltype(count)::value;
    if (kRest == rows) {
      tile = sums ? multiply_rows<kRest, kVectors, kSums> : multiply_rows<kRest, kVectors, kAny>;
    }
  });
  return tile;
}

// All rows times kVectors vectors of columns. Where `prefetches`, the tiles share in prefetching
// the panels from `ahead`.
template <int kCount, int kVectors>
void multiply_columns(const Product& product, int64_t column, const float* panel,
                      int64_t vector_stride, const float* ahead, bool prefetches) {
  constexpr int kAhead = kParts > 1 ? 1 : kVectors;
  const Epilogue* const epilogue = product.epilogue;
  const bool whole = epilogue == nullptr || epilogue->channels - column >= kVectors * kLanes;
  const Ending ending = whole ? ending_of(epilogue) : kAny;
  const int64_t rows = product.rows;
  const int64_t share = (rows + kAhead * kCount - 1) / (kAhead * kCount);
  const int lines = prefetches ? static_cast<int>((kPanel + share - 1) / share) : 0;
  const int64_t row = whole_tiles<kCount, kVectors>(ending)(product, 0, rows, column, panel,
                                                            vector_stride, ahead, lines);
  if (row == rows) return;
  last_tile<kCount, kVectors>(epilogue == nullptr, rows - row)(product, row, rows, column, panel,
                                                               vector_stride, ahead, 0);
}

// Rows of a register tile one vector wide: enough sums to hide the latency of their additions.
constexpr int kSingleRows = kRows < 8 ? 2 * kRows : kRows;

void multiply(const Product& product) {
  const int64_t stride = product.panel_stride;
  int64_t vectors = product.num_panels * kParts;
  if (product.epilogue != nullptr) {
    const int64_t needed = (product.epilogue->channels + kLanes - 1) / kLanes;
    vectors = vectors < needed ? vectors : needed;
  }
  int64_t v = 0;
  if constexpr (kColumns > 2) {
    for (; v + kColumns <= vectors; v += kColumns) {
      const float* const panel = product.panels + v * stride;
      multiply_columns<kRows, kColumns>(product, v * kLanes, panel, stride,
                                        panel + kColumns * stride, true);
    }
  }
  // Two vectors of one panel, or of two panels that are one vector wide.
  const int64_t vector_stride = kParts > 1 ? kLanes : stride;
  for (; v < vectors; v += 2) {
    const int64_t part = v % kParts;
    const float* const panel = product.panels + v / kParts * stride + part * kLanes;
    const float* const ahead = panel + (kParts > 1 ? 1 : 2) * stride;
    if (v + 1 < vectors) {
      multiply_columns<kRows, 2>(product, v * kLanes, panel, vector_stride, ahead, part == 0);
    } else {
      multiply_columns<kSingleRows, 1>(product, v * kLanes, panel, 0, ahead, part == 0);
    }
  }
}

// Computes in double, because a transformed weight is used often and rounded once. Zeros are
// multiplied too, so that a weight that is nan or infinite makes nan of every product, as it does
// of padding.
void prepare(const float* weights, int64_t outputs, int64_t channels, int64_t panel,
             const Form& rows, const Form& columns, float* to, int64_t stride) {
  typedef double Doubles __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
  typedef float Floats __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES / 2)));
  constexpr int kDoubles = kLanes / 2;
  constexpr int kTaps = 9;
  const int64_t first = panel * kPanel;
  const int count = static_cast<int>(outputs - first < kPanel ? outputs - first : kPanel);
  const int products = rows.products * columns.products;
  // Channels that are collected before they are written: the products' places are powers of two
  // apart, and lines that are written in parts would push each other out of the cache.
  constexpr int kGroup = 8;
  alignas(64) float lines[kMaxProducts * kMaxProducts][kGroup][kPanel];
  double taps[kTaps][kPanel] = {};
  for (int64_t group = 0; group < channels; group += kGroup) {
    const int size = static_cast<int>(channels - group < kGroup ? channels - group : kGroup);
    for (int c = 0; c < size; ++c) {
      for (int i = 0; i < count; ++i) {
        const float* const from = weights + ((first + i) * channels + group + c) * kTaps;
        for (int t = 0; t < kTaps; ++t) taps[t][i] = from[t];
      }
      for (int part = 0; part < kPanel; part += kDoubles) {
        Doubles w[kTaps];
        for (int t = 0; t < kTaps; ++t) __builtin_memcpy(&w[t], &taps[t][part], sizeof(w[t]));
        for (int p = 0; p < rows.products; ++p) {
          Doubles row[3];
          for (int s = 0; s < 3; ++s) {
            row[s] = rows.b[p][0] * w[s] + rows.b[p][1] * w[3 + s] + rows.b[p][2] * w[6 + s];
          }
          for (int q = 0; q < columns.products; ++q) {
            const double* const b = columns.b[q];
            const Doubles sum = b[0] * row[0] + b[1] * row[1] + b[2] * row[2];
            const Floats rounded = __builtin_convertvector(sum, Floats);
            __builtin_memcpy(&lines[p * columns.products + q][c][part], &rounded, sizeof(rounded));
          }
        }
      }
    }
    for (int p = 0; p < products; ++p) {
      __builtin_memcpy(to + p * stride + group * kPanel, lines[p], size * sizeof(lines[p][0]));
    }
  }
}

template <int kForm>
constexpr FormKernels form_kernels() {
  return {{input_rows<kForm, float>, output_columns<kForm, float>},
          {},
          {input_columns<kForm, float>},
          {},
          output_rows<kForm>};
}

constexpr ConvKernels conv_kernels(const char* name, bool (*supported)()) {
  return {name,
          supported,
          {form_kernels<kLine1>(), form_kernels<kLine2>(), form_kernels<kLine3>(),
           form_kernels<kTile2>(), form_kernels<kTile3>(), form_kernels<kTile4>(),
           form_kernels<kTile6>()},
          multiply,
          prepare,
          nullptr};
}

#undef DEEPLAB_FAST_INLINE
#undef DEEPLAB_FAST_LAMBDA

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
