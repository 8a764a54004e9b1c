// The C++ CPU kernels of the upsampling ops, in one instruction set.
//
// Included once by each csrc/cpu/upsample_<set>.cpp, behind all other includes and behind the
// pragma that lets the compiler use the set, because vector types are lowered for the instruction
// set of the function that they stand in, before it is inlined. The file defines DEEPLAB_FAST_SET
// (a namespace) and DEEPLAB_FAST_VECTOR_BYTES. No templates of the standard library in here: the
// linker keeps one copy of each instance for the whole program, which may be the one of this set.
//
// Vectors hold output columns. Along columns a band's two source rows are interpolated once, to
// `upper` and `lower` [classes] vectors; each output row of the band is then a weighted sum of
// both.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

template <typename T>
struct Types;

template <>
struct Types<float> {
  typedef float Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
  typedef int32_t Index __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
};

template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
  typedef int64_t Index __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
};

template <typename T>
using Vector = typename Types<T>::Vector;
template <typename T>
using Index = typename Types<T>::Index;
template <typename T>
constexpr int kLanes = DEEPLAB_FAST_VECTOR_BYTES / sizeof(T);

// e of a band's rows is kept for this many bytes at a time: a part of the second-level cache.
constexpr int64_t kExponentialBytes = 128 * 1024;

// Uninitialised scratch memory, aligned for vectors.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const size_t alignment = 64;
    const size_t size = (static_cast<size_t>(bytes) + alignment) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, size);
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

template <typename T>
inline Vector<T> broadcast(T value) {
  return Vector<T>{} + value;
}

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename T>
inline void store(T* to, Vector<T> vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// The sum of all lanes, in the order of a tree.
template <typename T>
inline T sum_lanes(Vector<T> vector) {
  T lanes[kLanes<T>];
  store<T>(lanes, vector);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) for x <= 0 or nan, within 1.1 units in the last place; 0 below -87.3, where the result
// nears the smallest normal number.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(DEEPLAB_FAST_VECTOR_BYTES)));
  const Vector<float> lowest = broadcast(-87.3f);
  // Adding 1.5 * 2^23 rounds to an integer, which then lies in the low bits.
  const float shift = 12582912.0f;
  const Vector<float> clamped = x < lowest ? lowest : x;
  const Vector<float> shifted = clamped * 1.44269504088896341f + shift;
  const Vector<float> n = shifted - shift;
  // ln 2 in two parts, the first short enough for exact products with n.
  Vector<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2; it is off by 3e-9 of exp(r).
  Vector<float> p = r * 0.00138145986467f + 0.00836871687973f;
  p = p * r + 0.0416683880453f;
  p = p * r + 0.166665206317f;
  p = p * r + 0.499999934478f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const Bits exponent = (__builtin_bit_cast(Bits, shifted) << 23) + 0x3f800000u;
  const Vector<float> result = p * __builtin_bit_cast(Vector<float>, exponent);
  return x < lowest ? Vector<float>{} : result;
}

// log(x) for finite x >= 1 or nan, within 1 unit in the last place: Cephes' polynomial.
inline Vector<float> log_from_one(Vector<float> x) {
  const Index<float> bits = __builtin_bit_cast(Index<float>, x);
  // x = 2^exponent * m with m in [sqrt(1/2), sqrt(2)).
  const Index<float> exponent = (bits - 0x3f3504f3) >> 23;
  const Index<float> mantissa = bits - (exponent << 23);
  const Vector<float> n = __builtin_convertvector(exponent, Vector<float>);
  const Vector<float> r = __builtin_bit_cast(Vector<float>, mantissa) - 1.0f;
  const Vector<float> square = r * r;
  Vector<float> p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * (r * square) - n * 2.12194440e-4f;
  p = p - square * 0.5f;
  p = p + r;
  p = p + n * 0.693359375f;
  // x - x is nan for nan.
  return p + (x - x);
}

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

inline Vector<double> log_from_one(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

template <typename T>
struct Block {
  const int32_t* lo;
  const int32_t* hi;
  int base;
  int count;
  int column;  // first output column
  int valid;   // output columns before the end of the row
  Vector<T> weight_lo;
  Vector<T> weight_hi;
};

template <typename T>
inline Block<T> block_at(const Problem<T>& problem, int index) {
  const int column = index * kLanes<T>;
  const int left = problem.out_width - column;
  const Vector<T> weight = load(problem.column_weights + column);
  return {problem.lo + column,
          problem.hi + column,
          problem.base[index],
          problem.count[index],
          column,
          left < kLanes<T> ? left : kLanes<T>,
          T(1) - weight,
          weight};
}

// The source columns of a block fit into one vector.
template <typename T>
inline bool fits_vector(const Block<T>& block) {
  return block.count <= kLanes<T>;
}

template <typename T>
inline Vector<T> pick_any(const T* source, const int32_t* indices) {
  Vector<T> picked;
  for (int i = 0; i < kLanes<T>; ++i) picked[i] = source[indices[i]];
  return picked;
}

// source[indices], all of them below the number of lanes.
template <typename T>
inline Vector<T> pick_near(const T* source, const int32_t* indices) {
  return pick_any(source, indices);
}

#if DEEPLAB_FAST_VECTOR_BYTES == 32
inline Vector<float> pick_near(const float* source, const int32_t* indices) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(source), index);
}
#elif DEEPLAB_FAST_VECTOR_BYTES == 64 && !defined(DEEPLAB_FAST_SANITIZE)
inline Vector<float> pick_near(const float* source, const int32_t* indices) {
  const __m512i index = _mm512_loadu_si512(indices);
  return _mm512_maskz_permutexvar_ps(__mmask16(0xffff), index, _mm512_loadu_ps(source));
}
#endif

// Interpolates both source rows of a band along the columns of a block.
template <typename T, bool kNear>
inline void interpolate_columns(const Problem<T>& problem, const Block<T>& block,
                                const T* upper_row, const T* lower_row, Vector<T>* upper,
                                Vector<T>* lower) {
  const auto pick = [&](const T* source, const int32_t* indices) {
    return kNear ? pick_near(source, indices) : pick_any(source, indices);
  };
  for (int c = 0; c < problem.classes; ++c) {
    const T* u = upper_row + static_cast<int64_t>(c) * problem.width + block.base;
    const T* l = lower_row + static_cast<int64_t>(c) * problem.width + block.base;
    upper[c] = block.weight_lo * pick(u, block.lo) + block.weight_hi * pick(u, block.hi);
    lower[c] = block.weight_lo * pick(l, block.lo) + block.weight_hi * pick(l, block.hi);
  }
}

// One unit of work: a band of an image, and its interpolated source rows for one block at a time.
template <typename T>
class Unit {
 public:
  // `scratch` has room for 2 * classes vectors.
  Unit(const Problem<T>& problem, int64_t unit, Vector<T>* scratch)
      : upper(scratch), lower(scratch + problem.classes), problem_(problem) {
    image = static_cast<int>(unit / problem.num_bands);
    band = problem.bands[unit % problem.num_bands];
    const int last = problem.height - 1;
    // As second_source has it.
    const bool has_second = band.source_row < last && problem.height != problem.out_height;
    const int second = band.source_row + has_second;
    const int64_t row_size = static_cast<int64_t>(problem.classes) * problem.width;
    const int64_t first_row = static_cast<int64_t>(image) * problem.height;
    upper_row_ = problem.source + (first_row + band.source_row) * row_size;
    lower_row_ = problem.source + (first_row + second) * row_size;
  }

  int rows() const { return band.row_end - band.row_begin; }

  // Offset of a row of the band in [images, out_height, out_width].
  int64_t row_offset(int row) const {
    return (static_cast<int64_t>(image) * problem_.out_height + band.row_begin + row) *
           problem_.out_width;
  }

  T weight_lower(int row) const { return problem_.row_weights[band.row_begin + row]; }
  T weight_upper(int row) const { return T(1) - weight_lower(row); }

  void enter(const Block<T>& block) {
    if (fits_vector(block)) {
      interpolate_columns<T, true>(problem_, block, upper_row_, lower_row_, upper, lower);
    } else {
      interpolate_columns<T, false>(problem_, block, upper_row_, lower_row_, upper, lower);
    }
  }

  int image;
  Band band;
  Vector<T>* upper;
  Vector<T>* lower;

 private:
  const Problem<T>& problem_;
  const T* upper_row_;
  const T* lower_row_;
};

// best[r] and index[r]: the largest logit of kRows output rows and its class, as torch.argmax finds
// it: the first of equals, and nan before everything.
template <typename T, int kRows, bool kFinite>
inline void argmax_rows(const Unit<T>& unit, int classes, int row, Vector<T>* best,
                        Index<T>* index) {
  Vector<T> weight_upper[kRows], weight_lower[kRows], value[kRows];
  Index<T> label[kRows];
  for (int r = 0; r < kRows; ++r) {
    weight_upper[r] = broadcast(unit.weight_upper(row + r));
    weight_lower[r] = broadcast(unit.weight_lower(row + r));
    value[r] = weight_upper[r] * unit.upper[0] + weight_lower[r] * unit.lower[0];
    label[r] = Index<T>{};
  }
  Index<T> current = Index<T>{};
  for (int c = 1; c < classes; ++c) {
    current += 1;
    const Vector<T> upper = unit.upper[c], lower = unit.lower[c];
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> z = weight_upper[r] * upper + weight_lower[r] * lower;
      if (kFinite) {
        label[r] = z > value[r] ? current : label[r];
        value[r] = z > value[r] ? z : value[r];
      } else {
        const Index<T> take = ~(z <= value[r]) & (value[r] == value[r]);
        label[r] = take ? current : label[r];
        value[r] = take ? z : value[r];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    best[r] = value[r];
    index[r] = label[r];
  }
}

// Calls done(row, best, index) for every row of the unit.
template <typename T, bool kFinite, typename Done>
inline void for_each_argmax(const Unit<T>& unit, int classes, const Done& done) {
  // Two rows at a time share their loads and fill the registers of a 16-register set.
  constexpr int kRows = 2;
  Vector<T> best[kRows];
  Index<T> index[kRows];
  int row = 0;
  for (; row + kRows <= unit.rows(); row += kRows) {
    argmax_rows<T, kRows, kFinite>(unit, classes, row, best, index);
    for (int r = 0; r < kRows; ++r) done(row + r, best[r], index[r]);
  }
  if (row < unit.rows()) {
    argmax_rows<T, 1, kFinite>(unit, classes, row, best, index);
    done(row, best[0], index[0]);
  }
}

template <typename T, typename Done>
inline void for_each_argmax(const Problem<T>& problem, const Unit<T>& unit, const Done& done) {
  if (problem.finite) {
    for_each_argmax<T, true>(unit, problem.classes, done);
  } else {
    for_each_argmax<T, false>(unit, problem.classes, done);
  }
}

template <typename T>
inline Vector<T> logit(const Unit<T>& unit, Vector<T> weight_upper, Vector<T> weight_lower, int c) {
  return weight_upper * unit.upper[c] + weight_lower * unit.lower[c];
}

template <typename T, typename Out>
inline void store_labels(Out* out, Index<T> index, int valid) {
  if (valid == kLanes<T>) {
    for (int i = 0; i < kLanes<T>; ++i) out[i] = static_cast<Out>(index[i]);
  } else {
    for (int i = 0; i < valid; ++i) out[i] = static_cast<Out>(index[i]);
  }
}

template <typename T>
inline void store_part(T* out, Vector<T> vector, int valid) {
  if (valid == kLanes<T>) {
    store<T>(out, vector);
  } else {
    for (int i = 0; i < valid; ++i) out[i] = vector[i];
  }
}

template <typename T>
void argmax(const Problem<T>& problem, const ArgmaxResult<T>& result, int64_t begin, int64_t end) {
  const int classes = problem.classes;
  const Scratch scratch(2 * static_cast<int64_t>(classes) * sizeof(Vector<T>));
  for (int64_t u = begin; u < end; ++u) {
    Unit<T> unit(problem, u, scratch.as<Vector<T>>());
    for (int b = 0; b < problem.blocks; ++b) {
      const Block<T> block = block_at(problem, b);
      unit.enter(block);
      for_each_argmax(problem, unit, [&](int row, Vector<T> best, Index<T> index) {
        const int64_t at = unit.row_offset(row) + block.column;
        if (result.narrow != nullptr) {
          store_labels<T>(result.narrow + at, index, block.valid);
        } else {
          store_labels<T>(result.wide + at, index, block.valid);
        }
        if (result.prob != nullptr) {
          const Vector<T> weight_upper = broadcast(unit.weight_upper(row));
          const Vector<T> weight_lower = broadcast(unit.weight_lower(row));
          Vector<T> sum = Vector<T>{};
          for (int c = 0; c < classes; ++c) {
            sum += exp_nonpositive(logit(unit, weight_upper, weight_lower, c) - best);
          }
          store_part<T>(result.prob + at, T(1) / sum, block.valid);
        }
      });
    }
  }
}

// Writes class indices of one output row, -1 for ignored pixels, and counts.
template <typename Label>
inline void read_labels(const Label* labels, int64_t offset, int count, int64_t ignore_index,
                        int classes, int32_t* out, LabelCounts* counts) {
  int valid = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t label = static_cast<int64_t>(labels[offset + i]);
    const bool ignored = label == ignore_index;
    const bool inside = static_cast<uint64_t>(label) < static_cast<uint64_t>(classes);
    const bool is_valid = !ignored && inside;
    valid += is_valid;
    bad += !ignored && !inside;
    out[i] = is_valid ? static_cast<int32_t>(label) : -1;
  }
  counts->valid += valid;
  if (bad == 0) return;
  for (int i = 0; counts->bad == 0; ++i) {
    const int64_t label = static_cast<int64_t>(labels[offset + i]);
    if (out[i] >= 0 || label == ignore_index) continue;
    counts->first_bad = offset + i;
    break;
  }
  counts->bad += bad;
}

// The labels of a unit's rows, each row filled up with -1 to a whole number of vectors.
template <typename T>
void read_unit_labels(const Problem<T>& problem, const Unit<T>& unit, const Labels& labels,
                      int32_t* out, LabelCounts* counts) {
  const int stride = problem.blocks * kLanes<T>;
  *counts = {0, 0, 0};
  for (int row = 0; row < unit.rows(); ++row, out += stride) {
    const int64_t offset = unit.row_offset(row);
    const int width = problem.out_width;
    switch (labels.type) {
      case LabelType::kUint8:
        read_labels(static_cast<const uint8_t*>(labels.data), offset, width, labels.ignore_index,
                    problem.classes, out, counts);
        break;
      case LabelType::kInt32:
        read_labels(static_cast<const int32_t*>(labels.data), offset, width, labels.ignore_index,
                    problem.classes, out, counts);
        break;
      case LabelType::kInt64:
        read_labels(static_cast<const int64_t*>(labels.data), offset, width, labels.ignore_index,
                    problem.classes, out, counts);
        break;
    }
    for (int i = width; i < stride; ++i) out[i] = -1;
  }
}

template <typename T>
void confusion(const Problem<T>& problem, const Confusion& op, int64_t begin, int64_t end) {
  const int64_t classes = problem.classes;
  const Scratch scratch(2 * classes * sizeof(Vector<T>));
  const int stride = problem.blocks * kLanes<T>;
  const Scratch label_scratch(static_cast<int64_t>(kBandRows) * stride * sizeof(int32_t));
  int32_t* labels = label_scratch.as<int32_t>();
  for (int64_t u = begin; u < end; ++u) {
    Unit<T> unit(problem, u, scratch.as<Vector<T>>());
    read_unit_labels(problem, unit, op.labels, labels, op.counts + u);
    for (int b = 0; b < problem.blocks; ++b) {
      const Block<T> block = block_at(problem, b);
      unit.enter(block);
      // Neighbouring pixels mostly fall on the same count, which is written once for a run of them.
      int64_t run_at = 0, run = 0;
      for_each_argmax(problem, unit, [&](int row, Vector<T>, Index<T> index) {
        const int32_t* label = labels + row * stride + block.column;
        for (int i = 0; i < block.valid; ++i) {
          if (label[i] < 0) continue;
          const int64_t at = label[i] * classes + static_cast<int64_t>(index[i]);
          if (at != run_at) {
            op.matrix[run_at] += run;
            run_at = at;
            run = 0;
          }
          ++run;
        }
      });
      op.matrix[run_at] += run;
    }
  }
}

// Spreads the gradients of a block's interpolated row, [classes] vectors, onto source columns:
// out[c][x] += sum over columns of weight * (gradient[c] - class_weights[c] * shared).
template <typename T>
inline void spread_columns(const Problem<T>& problem, const Block<T>& block,
                           const Vector<T>* gradient, Vector<T> shared, const T* class_weights,
                           T* out) {
  Vector<T> weights[kLanes<T>];
  const bool fits = fits_vector(block);
  if (fits) {
    for (int x = 0; x < block.count; ++x) {
      for (int i = 0; i < kLanes<T>; ++i) {
        weights[x][i] = (block.lo[i] == x ? block.weight_lo[i] : T(0)) +
                        (block.hi[i] == x ? block.weight_hi[i] : T(0));
      }
    }
  }
  for (int c = 0; c < problem.classes; ++c) {
    T* row = out + static_cast<int64_t>(c) * problem.width + block.base;
    const T class_weight = class_weights == nullptr ? T(1) : class_weights[c];
    const Vector<T> g = gradient[c] - class_weight * shared;
    if (fits) {
      for (int x = 0; x < block.count; ++x) row[x] += sum_lanes<T>(g * weights[x]);
    } else {
      for (int i = 0; i < kLanes<T>; ++i) {
        row[block.lo[i]] += block.weight_lo[i] * g[i];
        row[block.hi[i]] += block.weight_hi[i] * g[i];
      }
    }
  }
}

template <typename T>
void cross_entropy(const Problem<T>& problem, const CrossEntropy<T>& op, int64_t begin,
                   int64_t end) {
  const int64_t classes = problem.classes;
  const bool with_grad = op.partial != nullptr;
  const int stride = problem.blocks * kLanes<T>;
  int64_t tile_rows = kExponentialBytes / (classes * static_cast<int64_t>(sizeof(Vector<T>)));
  tile_rows = tile_rows < 1 ? 1 : tile_rows > kBandRows ? kBandRows : tile_rows;

  // Interpolated source rows, gradients of the two, and exponentials of tile_rows rows.
  const Scratch scratch((4 + tile_rows) * classes * sizeof(Vector<T>));
  Vector<T>* const grad_upper = scratch.as<Vector<T>>() + 2 * classes;
  Vector<T>* const grad_lower = grad_upper + classes;
  Vector<T>* const exponentials = grad_lower + classes;
  const Scratch label_scratch(static_cast<int64_t>(kBandRows) * stride * sizeof(int32_t));
  int32_t* const labels = label_scratch.as<int32_t>();

  const T smooth_share = op.smoothing / static_cast<T>(classes);
  const T hard_share = T(1) - op.smoothing;

  for (int64_t u = begin; u < end; ++u) {
    Unit<T> unit(problem, u, scratch.as<Vector<T>>());
    read_unit_labels(problem, unit, op.labels, labels, op.counts + u);
    const int64_t plane = classes * problem.width;
    T* const partial = with_grad ? op.partial + 2 * u * plane : nullptr;
    if (with_grad) __builtin_memset(partial, 0, 2 * plane * sizeof(T));
    double loss_lanes[kLanes<T>] = {}, weight_lanes[kLanes<T>] = {};

    for (int b = 0; b < problem.blocks; ++b) {
      const Block<T> block = block_at(problem, b);
      bool entered = false;
      // What every class subtracts, times its weight: the gradient of the smoothed labels.
      Vector<T> shared_upper{}, shared_lower{};

      for (int tile = 0; tile < unit.rows(); tile += static_cast<int>(tile_rows)) {
        const int left = unit.rows() - tile;
        const int tile_end = tile + (left < tile_rows ? left : static_cast<int>(tile_rows));
        Vector<T> scale_upper[kBandRows], scale_lower[kBandRows];
        int active = 0;

        for (int row = tile; row < tile_end; ++row) {
          const int32_t* label = labels + static_cast<int64_t>(row) * stride + block.column;
          const int64_t at = unit.row_offset(row) + block.column;
          int any = -1;
          for (int i = 0; i < kLanes<T>; ++i) any &= label[i];
          // All bits set: every label is -1. Softmax times 0, which is what the gradient of such
          // pixels is, differs from 0 where there are logits that are not finite.
          if (any == -1 && (problem.finite || !with_grad)) {
            if (op.pixel_loss != nullptr) {
              store_part<T>(op.pixel_loss + at, Vector<T>{}, block.valid);
            }
            continue;
          }
          if (!entered) {
            entered = true;
            unit.enter(block);
            if (with_grad) __builtin_memset(grad_upper, 0, 2 * classes * sizeof(Vector<T>));
          }

          const Vector<T> weight_upper = broadcast(unit.weight_upper(row));
          const Vector<T> weight_lower = broadcast(unit.weight_lower(row));
          Vector<T>* const e = exponentials + (with_grad ? active : 0) * classes;
          Vector<T> top = logit(unit, weight_upper, weight_lower, 0);
          e[0] = top;
          for (int64_t c = 1; c < classes; ++c) {
            const Vector<T> z = logit(unit, weight_upper, weight_lower, static_cast<int>(c));
            e[c] = z;
            top = z > top ? z : top;
          }

          Vector<T> of_label{}, weight{}, pixel{};
          for (int i = 0; i < kLanes<T>; ++i) {
            if (label[i] < 0) continue;
            of_label[i] = e[label[i]][i];
            weight[i] = op.class_weights == nullptr ? T(1) : op.class_weights[label[i]];
            pixel[i] = op.pixel_grad == nullptr ? T(1) : op.pixel_grad[at + i];
          }

          Vector<T> sum{}, smooth{};
          if (op.smoothing > T(0)) {
            for (int64_t c = 0; c < classes; ++c) {
              const Vector<T> z = e[c] - top;
              smooth += z * (op.class_weights == nullptr ? T(1) : op.class_weights[c]);
              e[c] = exp_nonpositive(z);
              sum += e[c];
            }
          } else {
            for (int64_t c = 0; c < classes; ++c) {
              e[c] = exp_nonpositive(e[c] - top);
              sum += e[c];
            }
          }

          const Vector<T> log_sum = log_from_one(sum);
          Vector<T> loss = weight * (log_sum - (of_label - top));
          if (op.smoothing > T(0)) {
            loss = hard_share * loss + smooth_share * (op.weight_sum * log_sum - smooth);
          }
          for (int i = 0; i < kLanes<T>; ++i) loss[i] = label[i] < 0 ? T(0) : loss[i];
          if (op.pixel_loss != nullptr) store_part<T>(op.pixel_loss + at, loss, block.valid);
          for (int i = 0; i < kLanes<T>; ++i) {
            loss_lanes[i] += static_cast<double>(loss[i]);
            weight_lanes[i] += static_cast<double>(weight[i]);
          }
          if (!with_grad) continue;

          const Vector<T> hard = hard_share * weight * pixel;
          // pixel is 0 at ignored pixels.
          const Vector<T> smoothed = smooth_share * pixel;
          const Vector<T> scale = (hard + smoothed * op.weight_sum) / sum;
          // The gradient is scale * e, less `hard` at the label. Taken off e before anything is
          // summed, it leaves the small difference of a confident pixel exact.
          const Vector<T> of_hard = hard / scale;
          for (int i = 0; i < kLanes<T>; ++i) {
            if (hard[i] != T(0)) e[label[i]][i] -= of_hard[i];
          }
          scale_upper[active] = weight_upper * scale;
          scale_lower[active] = weight_lower * scale;
          shared_upper += weight_upper * smoothed;
          shared_lower += weight_lower * smoothed;
          ++active;
        }

        for (int64_t c = 0; active > 0 && c < classes; ++c) {
          Vector<T> to_upper = grad_upper[c], to_lower = grad_lower[c];
          for (int r = 0; r < active; ++r) {
            const Vector<T> e = exponentials[r * classes + c];
            to_upper += scale_upper[r] * e;
            to_lower += scale_lower[r] * e;
          }
          grad_upper[c] = to_upper;
          grad_lower[c] = to_lower;
        }
      }
      if (with_grad && entered) {
        spread_columns(problem, block, grad_upper, shared_upper, op.class_weights, partial);
        spread_columns(problem, block, grad_lower, shared_lower, op.class_weights, partial + plane);
      }
    }

    op.loss[u] = 0;
    op.weight[u] = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
      op.loss[u] += loss_lanes[i];
      op.weight[u] += weight_lanes[i];
    }
  }
}

template <typename T, typename A>
void softmax_add_to(const Problem<T>& problem, const Accumulator& op, int64_t begin, int64_t end) {
  const int64_t classes = problem.classes;
  const Scratch scratch(3 * classes * sizeof(Vector<T>));
  Vector<T>* const e = scratch.as<Vector<T>>() + 2 * classes;
  for (int64_t u = begin; u < end; ++u) {
    Unit<T> unit(problem, u, scratch.as<Vector<T>>());
    for (int b = 0; b < problem.blocks; ++b) {
      const Block<T> block = block_at(problem, b);
      unit.enter(block);
      for (int row = 0; row < unit.rows(); ++row) {
        const Vector<T> weight_upper = broadcast(unit.weight_upper(row));
        const Vector<T> weight_lower = broadcast(unit.weight_lower(row));
        A* const to = static_cast<A*>(op.data) + unit.image * op.stride_image +
                      (unit.band.row_begin + row) * op.stride_row + block.column * op.stride_column;
        Vector<T> top = logit(unit, weight_upper, weight_lower, 0);
        for (int64_t c = 0; c < classes; ++c) {
          // The accumulator is too large for the caches.
          __builtin_prefetch(to + c * op.stride_class, 1);
          const Vector<T> z = logit(unit, weight_upper, weight_lower, static_cast<int>(c));
          top = z > top ? z : top;
        }
        Vector<T> sum{};
        for (int c = 0; c < classes; ++c) {
          e[c] = exp_nonpositive(logit(unit, weight_upper, weight_lower, c) - top);
          sum += e[c];
        }
        const Vector<T> scale = T(1) / sum;
        if constexpr (std::is_same_v<T, A>) {
          if (op.stride_column == 1 && block.valid == kLanes<T>) {
            for (int64_t c = 0; c < classes; ++c) {
              A* const at = to + c * op.stride_class;
              store<T>(at, load(at) + e[c] * scale);
            }
            continue;
          }
        }
        for (int64_t c = 0; c < classes; ++c) e[c] *= scale;
        // Along classes first: that is contiguous in channels_last.
        for (int i = 0; i < block.valid; ++i) {
          A* const pixel = to + i * op.stride_column;
          for (int64_t c = 0; c < classes; ++c) {
            A& element = pixel[c * op.stride_class];
            element = static_cast<A>(element + e[c][i]);
          }
        }
      }
    }
  }
}

template <typename T>
void softmax_add(const Problem<T>& problem, const Accumulator& op, int64_t begin, int64_t end) {
  if (op.is_double) {
    softmax_add_to<T, double>(problem, op, begin, end);
  } else {
    softmax_add_to<T, float>(problem, op, begin, end);
  }
}

template <typename T, Vector<T> (*kFunction)(Vector<T>)>
void apply(const T* values, T* result, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int valid = count - i < kLanes<T> ? static_cast<int>(count - i) : kLanes<T>;
    Vector<T> x = broadcast(values[i]);
    for (int j = 0; j < valid; ++j) x[j] = values[i + j];
    store_part<T>(result + i, kFunction(x), valid);
  }
}

template <typename T>
constexpr Kernels<T> kernels() {
  return {kLanes<T>,
          argmax<T>,
          cross_entropy<T>,
          confusion<T>,
          softmax_add<T>,
          apply<T, exp_nonpositive>,
          apply<T, log_from_one>};
}

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
