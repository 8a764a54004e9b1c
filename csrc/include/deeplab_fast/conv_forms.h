// Bilinear algorithms for a three-tap filter along one line: y_i = sum_k w_k x_{i + k - 1}.
//
// A form computes `outputs` neighbouring y from `inputs` neighbouring x, of which the first lies
// `halo` before the first output, with `products` multiplications:
//
//     y = C ((B w) * (A x)),   A [products][inputs], B [products][3], C [outputs][products].
//
// kLine1, kLine2 and kLine3 are whole lines of 1, 2 and 3 samples with zeros outside; kTile2 ...
// kTile6 are tiles of longer lines that overlap by two inputs. The first rows of A come in
// `input_pairs`, the first columns of C in `output_pairs`, that differ in signs only, so that a
// transform computes what is common to both once.
//
// Sources: Lavin and Gray, arXiv 1509.09308 (tiles); the line of three is the smallest algorithm
// for a tridiagonal Toeplitz matrix of that size: (x0 + x2 +- m x1), (x2 - x0 +- n x1) with
// m^2 - n^2 = 2.
#pragma once

namespace deeplab_fast::cpu {

enum FormId : int { kLine1, kLine2, kLine3, kTile2, kTile3, kTile4, kTile6, kNumForms };

constexpr int kMaxProducts = 8;
constexpr int kMaxInputs = 8;
constexpr int kMaxOutputs = 6;

struct Form {
  const char* name;
  int outputs;
  int inputs;
  int products;
  int halo;
  int input_pairs;
  int output_pairs;
  double a[kMaxProducts][kMaxInputs];
  double b[kMaxProducts][3];
  double c[kMaxOutputs][kMaxProducts];
};

// Toom and Cook's algorithm for a tile of `outputs`, evaluated at +-points[0 .. pairs), at 0, at
// `extra` if it is not 0, and at infinity.
constexpr Form toom_cook(const char* name, int outputs, int pairs, const double* points,
                         double extra = 0) {
  Form form{};
  form.name = name;
  form.outputs = outputs;
  form.inputs = form.products = outputs + 2;
  form.halo = 1;
  // A point that is not one of a pair appears in every row of A.
  form.input_pairs = extra == 0 ? pairs : 0;
  form.output_pairs = pairs;
  const int finite = outputs + 1;
  double at[kMaxProducts] = {};
  for (int i = 0; i < pairs; ++i) {
    at[2 * i] = points[i];
    at[2 * i + 1] = -points[i];
  }
  if (finite > 2 * pairs + 1) at[2 * pairs + 1] = extra;

  for (int p = 0; p <= finite; ++p) {
    // The coefficients of the product of (x - at[q]) over the finite points q other than p.
    double poly[kMaxInputs + 1] = {1};
    double scale = 1;
    int degree = 0;
    for (int q = 0; q < finite; ++q) {
      if (q == p) continue;
      // (x - s)(x + s) at once: this keeps the odd coefficients of even polynomials exactly 0.
      const bool pair = q < 2 * pairs && q % 2 == 0 && p != q + 1;
      const int step = pair ? 2 : 1;
      const double factor = pair ? -at[q] * at[q] : -at[q];
      for (int k = degree + step; k >= 0; --k) {
        poly[k] = (k >= step ? poly[k - step] : 0) + (k <= degree ? factor * poly[k] : 0);
      }
      degree += step;
      if (p < finite) {
        scale *= at[p] - at[q];
        if (pair) scale *= at[p] + at[q];
      }
      q += step - 1;
    }
    for (int j = 0; j <= degree; ++j) form.a[p][j] = poly[j];
    double power = 1;
    for (int i = 0; i < outputs; ++i) {
      form.c[i][p] = p < finite ? power : (i == outputs - 1 ? 1 : 0);
      power *= at[p];
    }
    for (int k = 0; k < 3; ++k) {
      form.b[p][k] = p < finite ? (k == 0 ? 1 : k == 1 ? at[p] : at[p] * at[p]) / scale : k == 2;
    }
  }
  return form;
}

// Points of small error in fp32 (2-norm, both axes, ReLU inputs, against float64): kTile2 3.2e-7,
// kTile3 1.0e-6, kTile4 8.3e-7 (1.9e-6 with 1 and 2), kTile6 3.7e-6; direct 1.6e-7.
constexpr double kPoints2[] = {1};
constexpr double kPoints4[] = {2.0 / 3, 3.0 / 2};
constexpr double kPoints6[] = {1, 2, 0.5};

constexpr Form kForms[kNumForms] = {
    {"line1", 1, 1, 1, 0, 0, 0, {{1}}, {{0, 1, 0}}, {{1}}},
    {"line2",
     2,
     2,
     3,
     0,
     1,
     1,
     {{1, 1}, {1, -1}, {0, 1}},
     {{0.5, 0.5, 0}, {-0.5, 0.5, 0}, {-1, 0, 1}},
     {{1, 1, 1}, {1, -1, 0}}},
    {"line3",
     3,
     3,
     4,
     0,
     2,
     2,
     {{1, 1.5, 1}, {1, -1.5, 1}, {-1, 0.5, 1}, {-1, -0.5, 1}},
     {{2.0 / 3, 1, 2.0 / 3}, {-2.0 / 3, 1, -2.0 / 3}, {2, 1, -2}, {-2, 1, 2}},
     {{0.25, 0.25, -0.25, -0.25}, {0.375, -0.375, -0.125, 0.125}, {0.25, 0.25, 0.25, 0.25}}},
    toom_cook("tile2", 2, 1, kPoints2),
    toom_cook("tile3", 3, 1, kPoints2, 2),
    toom_cook("tile4", 4, 2, kPoints4),
    toom_cook("tile6", 6, 3, kPoints6),
};

}  // namespace deeplab_fast::cpu
