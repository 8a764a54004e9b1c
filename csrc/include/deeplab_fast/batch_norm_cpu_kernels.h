// The C++ CPU batch norm kernels, in one instruction set.
//
// Included once by each csrc/cpu/batch_norm_<set>.cpp, in the way and under the rules of
// upsample_cpu_kernels.h. The file defines DEEPLAB_FAST_SET (a namespace that no other kernels use)
// and DEEPLAB_FAST_VECTOR_BYTES.
//
// Vectors hold neighbouring values of a row, which are channels and, where there are few, pixels.
// Where the width of a row is no multiple of a vector, the last vector ends with the row and
// overlaps the one before; both compute the same of the values that they share.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

template <typename T>
struct Types;

template <>
struct Types<float> {
  typedef float Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
};

template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
};

template <typename T>
using Vector = typename Types<T>::Vector;
template <typename T>
constexpr int64_t kLanes = DEEPLAB_FAST_VECTOR_BYTES / sizeof(T);

// Rows whose terms are added to each other before they are added to a sum.
constexpr int kRows = 4;
// Rows whose terms are added to one sum in T: a sum of n > 3 has at most n / kRows + 4 roundings.
constexpr int64_t kSumRows = 128;
// Bytes between a row and the one that is prefetched. Several rows at once are several streams that
// end soon, which the processor does not foresee: without it the statistics of 256 channels took
// 1.6 times as long.
constexpr int64_t kAhead = 4096;
// Rows whose mean is the first shift of squared differences.
constexpr int64_t kFirstRows = 8;

#define DEEPLAB_FAST_INLINE inline __attribute__((always_inline))
#define DEEPLAB_FAST_LAMBDA __attribute__((always_inline))

template <typename T>
DEEPLAB_FAST_INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename T>
DEEPLAB_FAST_INLINE void store(T* to, Vector<T> vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

template <typename T>
DEEPLAB_FAST_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <typename T, int kCount>
struct Vectors {
  Vector<T> at[kCount];
};

// What the activation sees, without a residual. The backward pass computes it again and must find
// the sign that the forward pass found: no other code may compute it.
template <typename T>
DEEPLAB_FAST_INLINE Vector<T> before_act(Vector<T> x, Vector<T> mean, Vector<T> scale,
                                         Vector<T> bias) {
  return (x - mean) * scale + bias;
}

// A comparison with nan is false, which keeps it.
template <typename T, Activation kAct>
DEEPLAB_FAST_INLINE Vector<T> activate(Vector<T> v) {
  const Vector<T> zero = {}, six = broadcast(T{6});
  if constexpr (kAct == Activation::kRelu) return v < zero ? zero : v;
  if constexpr (kAct == Activation::kRelu6) {
    const Vector<T> low = v < zero ? zero : v;
    return low > six ? six : low;
  }
  if constexpr (kAct == Activation::kHardswish) {
    const Vector<T> up = v + T{3};
    const Vector<T> low = up < zero ? zero : up;
    return v * (low > six ? six : low) * (T{1} / T{6});
  }
  return v;
}

// grad times the derivative of the activation where it saw `at`, or gave it (ReLU and ReLU6). At
// nan no comparison takes the gradient away.
template <typename T, Activation kAct>
DEEPLAB_FAST_INLINE Vector<T> through_act(Vector<T> grad, Vector<T> at) {
  const Vector<T> zero = {};
  if constexpr (kAct == Activation::kRelu) return at <= zero ? zero : grad;
  if constexpr (kAct == Activation::kRelu6) {
    const Vector<T> above = at <= zero ? zero : grad;
    return at >= broadcast(T{6}) ? zero : above;
  }
  if constexpr (kAct == Activation::kHardswish) {
    const Vector<T> three = broadcast(T{3}), one = broadcast(T{1});
    const Vector<T> low = at < -three ? zero : at * (T{1} / T{3}) + T{0.5};
    return grad * (at > three ? one : low);
  }
  return grad;
}

// function(first value, slot) for each vector of a row: slots are a vector apart and do not
// overlap.
template <typename T, typename Function>
DEEPLAB_FAST_INLINE void each_slot(int64_t width, const Function& function) {
  int64_t slot = 0;
  for (; slot + kLanes<T> <= width; slot += kLanes<T>) function(slot, slot);
  if (slot < width) function(width - kLanes<T>, slot);
}

// to[i] = result i of function(place in the piece, place in the row), for all values.
template <typename T, int kCount, typename Function>
DEEPLAB_FAST_INLINE void transform(int64_t rows, int64_t width, const Function& function,
                                   T* const (&to)[kCount]) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * width;
    each_slot<T>(width, [&](int64_t position, int64_t) DEEPLAB_FAST_LAMBDA {
      const Vectors<T, kCount> result = function(first + position, position);
      for (int i = 0; i < kCount; ++i) store(to[i] + first + position, result.at[i]);
    });
  }
}

constexpr int64_t sums_stride(int64_t width) { return width + kMinWidth; }

// sums[i] [width], sums_stride apart: over all rows, result i of the function. `from` is what it
// reads of the map.
template <int kCount, typename T, int kStreams, typename Function>
DEEPLAB_FAST_INLINE void accumulate(int64_t rows, int64_t width, const T* const (&from)[kStreams],
                                    const Function& function, T* sums) {
  const int64_t stride = sums_stride(width);
  const int64_t group = kRows * width;
  const int64_t ahead = (kAhead / static_cast<int64_t>(sizeof(T)) + group - 1) / group * group;
  const auto add = [&](int64_t slot, const Vectors<T, kCount>& terms) DEEPLAB_FAST_LAMBDA {
    for (int i = 0; i < kCount; ++i) {
      T* const to = sums + i * stride + slot;
      store(to, load(to) + terms.at[i]);
    }
  };
  for (int64_t i = 0; i < kCount * stride; ++i) sums[i] = 0;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    const int64_t first = row * width;
    each_slot<T>(width, [&](int64_t position, int64_t slot) DEEPLAB_FAST_LAMBDA {
      static_assert(kRows == 4);
      const int64_t place = first + position;
      for (int i = 0; i < kStreams; ++i) {
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(from[i] + place + r * width + ahead);
      }
      const Vectors<T, kCount> a = function(place, position);
      const Vectors<T, kCount> b = function(place + width, position);
      const Vectors<T, kCount> c = function(place + 2 * width, position);
      const Vectors<T, kCount> d = function(place + 3 * width, position);
      Vectors<T, kCount> sum;
      for (int i = 0; i < kCount; ++i) {
        sum.at[i] = (a.at[i] + b.at[i]) + (c.at[i] + d.at[i]);
      }
      add(slot, sum);
    });
  }
  for (; row < rows; ++row) {
    const int64_t first = row * width;
    each_slot<T>(width, [&](int64_t position, int64_t slot) DEEPLAB_FAST_LAMBDA {
      add(slot, function(first + position, position));
    });
  }
  // From slots to places in the row.
  const int64_t over = width % kLanes<T>;
  if (over == 0) return;
  for (int i = 0; i < kCount; ++i) {
    T* const last = sums + i * stride + width - over;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) last[lane + over - kLanes<T>] = last[lane];
  }
}

// Channels that are combined at a time.
constexpr int64_t kStripe = 64;

// to[c] = the sum of channel first + c over the pixels of a row.
template <typename T>
DEEPLAB_FAST_INLINE void over_pixels(const T* sums, const Piece& piece, int64_t first, int64_t size,
                                     double* to) {
  for (int64_t c = 0; c < size; ++c) to[c] = sums[first + c];
  for (int64_t i = 1; i < piece.pixels; ++i) {
    const T* const pixel = sums + i * piece.channels + first;
    for (int64_t c = 0; c < size; ++c) to[c] += pixel[c];
  }
}

// function(first, size) for each stripe of the channels [begin, end).
template <typename Function>
DEEPLAB_FAST_INLINE void each_stripe(int64_t begin, int64_t end, const Function& function) {
  for (; begin < end; begin += kStripe)
    function(begin, end - begin < kStripe ? end - begin : kStripe);
}

// A row that is shorter than a vector, filled up with zeros.
template <typename T>
struct Short {
  T values[kLanes<T>] = {};

  Short() = default;
  Short(const T* from, int64_t count) {
    if (from != nullptr) __builtin_memcpy(values, from, count * sizeof(T));
  }
  void copy(T* to, int64_t count) const {
    if (to != nullptr) __builtin_memcpy(to, values, count * sizeof(T));
  }
};

// Squared differences are taken from a shift: the mean of the first rows, then the mean of all rows
// so far. A block of n rows behind m others, n <= 8 m, adds n m / (n + m) d^2 to the squared
// differences from the joint mean, d being how far the shift is from the block's mean; so its sum
// of squares, which holds n d^2, is at most 9 times what it adds.
template <typename T>
void stats_rows(const T* x, const Piece& piece, int64_t width, T* scratch, double* to) {
  const int64_t channels = piece.channels, stride = sums_stride(width);
  T* const shift = scratch + 2 * stride;
  double* const mean = to;
  double* const squares = to + channels;
  int64_t rows = piece.rows < kFirstRows ? piece.rows : kFirstRows;
  accumulate<1>(
      rows, width, {x},
      [&](int64_t place, int64_t) DEEPLAB_FAST_LAMBDA { return Vectors<T, 1>{{load(x + place)}}; },
      scratch);
  each_stripe(0, channels, [&](int64_t first, int64_t size) DEEPLAB_FAST_LAMBDA {
    const double scale = 1.0 / static_cast<double>(rows * piece.pixels);
    double sum[kStripe];
    over_pixels(scratch, piece, first, size, sum);
    for (int64_t c = 0; c < size; ++c) {
      mean[first + c] = sum[c] * scale;
      squares[first + c] = 0;
    }
  });
  for (int64_t i = piece.width(); i < width; ++i) shift[i] = 0;
  for (int64_t done = 0; done < piece.rows;) {
    for (int64_t i = 0; i < piece.pixels; ++i) {
      for (int64_t c = 0; c < channels; ++c) shift[i * channels + c] = static_cast<T>(mean[c]);
    }
    const T* const block = x + done * width;
    accumulate<2>(
        rows, width, {block},
        [&](int64_t place, int64_t position) DEEPLAB_FAST_LAMBDA {
          const Vector<T> difference = load(block + place) - load(shift + position);
          return Vectors<T, 2>{{difference, difference * difference}};
        },
        scratch);
    const double before = static_cast<double>(done * piece.pixels);
    const double count = static_cast<double>(rows * piece.pixels);
    const double scale = 1.0 / count, share = count / (before + count);
    each_stripe(0, channels, [&](int64_t first, int64_t size) DEEPLAB_FAST_LAMBDA {
      double sum[kStripe], square[kStripe];
      over_pixels(scratch, piece, first, size, sum);
      over_pixels(scratch + stride, piece, first, size, square);
      for (int64_t c = 0; c < size; ++c) {
        const double off = sum[c] * scale, rest = square[c] - sum[c] * off;
        const double from = done == 0 ? static_cast<double>(shift[first + c]) : mean[first + c];
        const double delta = (shift[first + c] - from) + off;
        mean[first + c] = from + delta * share;
        // Rounding can leave less than nothing of the squares of a constant.
        squares[first + c] += (rest < 0 ? 0 : rest) + delta * delta * (before * share);
      }
    });
    done += rows;
    const int64_t most = kFirstRows * done < kSumRows ? kFirstRows * done : kSumRows;
    rows = piece.rows - done < most ? piece.rows - done : most;
  }
}

template <typename T>
void stats(const T* x, const Piece& piece, T* scratch, double* to) {
  if (piece.width() >= kLanes<T>) {
    stats_rows(x + piece.first, piece, piece.width(), scratch, to);
  } else {
    const Short<T> row(x + piece.first, piece.width());
    stats_rows(row.values, piece, kLanes<T>, scratch, to);
  }
}

template <typename T, Activation kAct, bool kResidual>
void bn_act_rows(const Forward<T>& f, int64_t rows, int64_t width) {
  transform<T, 1>(rows, width,
                  [&](int64_t place, int64_t position) DEEPLAB_FAST_LAMBDA {
                    Vector<T> v = before_act<T>(load(f.x + place), load(f.mean + position),
                                                load(f.scale + position), load(f.bias + position));
                    if constexpr (kResidual) v += load(f.residual + place);
                    return Vectors<T, 1>{{activate<T, kAct>(v)}};
                  },
                  {f.y});
}

template <typename T, Activation kAct>
void bn_act_rows(const Forward<T>& f, int64_t rows, int64_t width) {
  if (f.residual == nullptr) {
    bn_act_rows<T, kAct, false>(f, rows, width);
  } else {
    bn_act_rows<T, kAct, true>(f, rows, width);
  }
}

template <typename T>
void bn_act_rows(const Forward<T>& f, int64_t rows, int64_t width) {
  switch (f.act) {
    case Activation::kNone:
      return bn_act_rows<T, Activation::kNone>(f, rows, width);
    case Activation::kRelu:
      return bn_act_rows<T, Activation::kRelu>(f, rows, width);
    case Activation::kRelu6:
      return bn_act_rows<T, Activation::kRelu6>(f, rows, width);
    case Activation::kHardswish:
      return bn_act_rows<T, Activation::kHardswish, false>(f, rows, width);
  }
}

template <typename T>
void bn_act(const Forward<T>& map, const Piece& piece) {
  Forward<T> f = map;
  f.x += piece.first;
  f.y += piece.first;
  if (f.residual != nullptr) f.residual += piece.first;
  const int64_t width = piece.width();
  if (width >= kLanes<T>) return bn_act_rows(f, piece.rows, width);
  const Short<T> x(f.x, width), residual(f.residual, width);
  Short<T> y;
  T* const to = f.y;
  f.x = x.values;
  if (f.residual != nullptr) f.residual = residual.values;
  f.y = y.values;
  bn_act_rows(f, 1, kLanes<T>);
  y.copy(to, width);
}

// What the gradient goes through, and where it finds what the activation saw or gave.
template <typename T, Activation kAct, bool kOut>
struct Gate {
  static constexpr bool kReadsOut = kOut;
  const Backward<T>& b;

  DEEPLAB_FAST_INLINE Vector<T> operator()(int64_t place, int64_t position) const {
    const Vector<T> grad = load(b.grad + place);
    if constexpr (kAct == Activation::kNone) return grad;
    if constexpr (kOut) return through_act<T, kAct>(grad, load(b.out + place));
    return through_act<T, kAct>(
        grad, before_act<T>(load(b.x + place), load(b.mean + position), load(b.scale + position),
                            load(b.bias + position)));
  }
};

// function(gate) with the gate of this activation.
template <typename T, typename Function>
DEEPLAB_FAST_INLINE void with_gate(const Backward<T>& b, const Function& function) {
  const bool out = b.out != nullptr;
  switch (b.act) {
    case Activation::kNone:
      return function(Gate<T, Activation::kNone, false>{b});
    case Activation::kRelu:
      return out ? function(Gate<T, Activation::kRelu, true>{b})
                 : function(Gate<T, Activation::kRelu, false>{b});
    case Activation::kRelu6:
      return out ? function(Gate<T, Activation::kRelu6, true>{b})
                 : function(Gate<T, Activation::kRelu6, false>{b});
    case Activation::kHardswish:
      return function(Gate<T, Activation::kHardswish, false>{b});
  }
}

// `b` from the first value of a piece on, and for a row that is shorter than a vector on copies.
template <typename T>
struct AtPiece {
  Backward<T> b;
  int64_t width;
  Short<T> grad, x, out;

  AtPiece(const Backward<T>& map, const Piece& piece) : b(map), width(piece.width()) {
    b.grad += piece.first;
    b.x += piece.first;
    if (b.out != nullptr) b.out += piece.first;
    if (b.dx != nullptr) b.dx += piece.first;
    if (b.d_residual != nullptr) b.d_residual += piece.first;
    if (width >= kLanes<T>) return;
    grad = Short<T>(b.grad, width);
    x = Short<T>(b.x, width);
    out = Short<T>(b.out, width);
    b.grad = grad.values;
    b.x = x.values;
    if (b.out != nullptr) b.out = out.values;
    width = kLanes<T>;
  }
  AtPiece(const AtPiece&) = delete;
};

template <typename T, typename Gate>
void reduce_rows(const Backward<T>& b, const Gate& gate, const Piece& piece, int64_t width,
                 T* scratch, double* to) {
  const int64_t channels = piece.channels;
  for (int64_t c = 0; c < 2 * channels; ++c) to[c] = 0;
  for (int64_t done = 0; done < piece.rows; done += kSumRows) {
    const int64_t rows = piece.rows - done < kSumRows ? piece.rows - done : kSumRows;
    const int64_t first = done * width;
    const auto terms = [&](int64_t offset, int64_t position) DEEPLAB_FAST_LAMBDA {
      const int64_t place = first + offset;
      const Vector<T> g = gate(place, position);
      return Vectors<T, 2>{{g, g * (load(b.x + place) - load(b.mean + position))}};
    };
    if constexpr (Gate::kReadsOut) {
      accumulate<2>(rows, width, {b.grad + first, b.x + first, b.out + first}, terms, scratch);
    } else {
      accumulate<2>(rows, width, {b.grad + first, b.x + first}, terms, scratch);
    }
    for (int i = 0; i < 2; ++i) {
      each_stripe(0, channels, [&](int64_t first, int64_t size) DEEPLAB_FAST_LAMBDA {
        double sum[kStripe];
        over_pixels(scratch + i * sums_stride(width), piece, first, size, sum);
        for (int64_t c = 0; c < size; ++c) to[i * channels + first + c] += sum[c];
      });
    }
  }
}

template <typename T>
void reduce(const Backward<T>& map, const Piece& piece, T* scratch, double* to) {
  const AtPiece<T> at(map, piece);
  with_gate(at.b, [&](const auto& gate) { reduce_rows(at.b, gate, piece, at.width, scratch, to); });
}

template <typename T, bool kMeans, bool kResidual, typename Gate>
void backward_rows(const Backward<T>& b, const Gate& gate, int64_t rows, int64_t width) {
  const auto gradient = [&](Vector<T> g, int64_t place, int64_t position) DEEPLAB_FAST_LAMBDA {
    Vector<T> dx = g;
    if constexpr (kMeans) {
      dx -= load(b.mean_grad + position);
      dx -= (load(b.x + place) - load(b.mean + position)) * load(b.slope + position);
    }
    return dx * load(b.scale + position);
  };
  if constexpr (kResidual) {
    transform<T, 2>(rows, width,
                    [&](int64_t place, int64_t position) DEEPLAB_FAST_LAMBDA {
                      const Vector<T> g = gate(place, position);
                      return Vectors<T, 2>{{gradient(g, place, position), g}};
                    },
                    {b.dx, b.d_residual});
  } else {
    transform<T, 1>(rows, width,
                    [&](int64_t place, int64_t position) DEEPLAB_FAST_LAMBDA {
                      return Vectors<T, 1>{{gradient(gate(place, position), place, position)}};
                    },
                    {b.dx});
  }
}

template <typename T>
void backward(const Backward<T>& map, const Piece& piece) {
  AtPiece<T> at(map, piece);
  Short<T> dx, d_residual;
  const bool is_short = at.width != piece.width();
  T* const to_dx = at.b.dx;
  T* const to_residual = at.b.d_residual;
  if (is_short) {
    at.b.dx = dx.values;
    if (to_residual != nullptr) at.b.d_residual = d_residual.values;
  }
  const bool means = at.b.mean_grad != nullptr;
  with_gate(at.b, [&](const auto& gate) {
    if (at.b.d_residual != nullptr) {
      means ? backward_rows<T, true, true>(at.b, gate, piece.rows, at.width)
            : backward_rows<T, false, true>(at.b, gate, piece.rows, at.width);
    } else {
      means ? backward_rows<T, true, false>(at.b, gate, piece.rows, at.width)
            : backward_rows<T, false, false>(at.b, gate, piece.rows, at.width);
    }
  });
  if (is_short) {
    dx.copy(to_dx, piece.width());
    d_residual.copy(to_residual, piece.width());
  }
}

template <typename T>
void combine_stats(const double* parts, const double* counts, int64_t pieces, int64_t channels,
                   int64_t begin, int64_t end, T* mean, T* variance) {
  each_stripe(begin, end, [&](int64_t first, int64_t size) DEEPLAB_FAST_LAMBDA {
    double means[kStripe] = {}, squares[kStripe] = {};
    double count = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      const double* const part = parts + 2 * i * channels + first;
      const double share = counts[i] / (count + counts[i]);
      const double weight = count * share;
      for (int64_t c = 0; c < size; ++c) {
        const double delta = part[c] - means[c];
        means[c] += delta * share;
        squares[c] += part[channels + c] + delta * delta * weight;
      }
      count += counts[i];
    }
    for (int64_t c = 0; c < size; ++c) {
      mean[first + c] = static_cast<T>(means[c]);
      variance[first + c] = static_cast<T>(squares[c] / count);
    }
  });
}

template <typename T>
void combine_sums(const double* parts, int64_t pieces, int64_t channels, int64_t begin, int64_t end,
                  const T* rstd, T* sum, T* sum_xhat) {
  each_stripe(begin, end, [&](int64_t first, int64_t size) DEEPLAB_FAST_LAMBDA {
    double sums[2][kStripe] = {};
    for (int64_t i = 0; i < pieces; ++i) {
      const double* const part = parts + 2 * i * channels + first;
      for (int64_t c = 0; c < size; ++c) {
        sums[0][c] += part[c];
        sums[1][c] += part[channels + c];
      }
    }
    for (int64_t c = 0; c < size; ++c) {
      sum[first + c] = static_cast<T>(sums[0][c]);
      sum_xhat[first + c] = static_cast<T>(sums[1][c] * rstd[first + c]);
    }
  });
}

template <typename T>
constexpr BatchNormFunctions<T> batch_norm_functions() {
  return {stats<T>, bn_act<T>, reduce<T>, backward<T>, combine_stats<T>, combine_sums<T>};
}

constexpr BatchNormKernels batch_norm_kernels(const char* name, bool (*supported)()) {
  return {name, supported, batch_norm_functions<float>(), batch_norm_functions<double>()};
}

#undef DEEPLAB_FAST_INLINE
#undef DEEPLAB_FAST_LAMBDA

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
