// The kernels that pairwise_potential.cpp calls, as a table of function pointers: one table per type and CPU
// capability.
#pragma once

#include <cstdint>

#include "../pairwise_potential.h"

namespace fastmargin {

constexpr int64_t kSide = 256;  // points on a side of a tile, at most

// The points of one side of a tile, padded to a multiple of 16 with zeros at an infinite distance.
template <typename T>
struct Side {
  const T* points;      // [n, d] as given
  const T* centered;    // [padded, d] the mean subtracted
  const T* transposed;  // [d, padded] the same; null for rows
  const T* squares;     // [padded] squared norms of centered; +inf in the padding
  const int32_t* id;    // [padded]
  const T* weight;      // [padded]
  int64_t n, padded;
  // results, added to
  double* potential;  // [n]
  T* slope;           // [padded, d], or null
};

// Sums of 2 phi' over a tile, for the matrix products that follow the sweep.
template <typename T>
struct CoefficientSums {
  T* row;       // [a.n] over each row
  T* col;       // [b.padded] over each column
  bool active;  // whether any 2 phi' is not 0: else there is nothing to multiply
};

template <typename T>
struct PairKernels {
  // centered, transposed (if not null) and squares of n points
  void (*center)(const T* points /* [n, d] */, const T* mean /* [d] */, int64_t n, int64_t padded, int64_t d,
                 T* centered /* [padded, d] */, T* transposed /* [d, padded] */, T* squares /* [padded] */);
  // in [n, d] -> out [d, padded], zeros in the padding
  void (*transpose)(const T* in, int64_t n, int64_t d, int64_t padded, T* out);
  // Replaces the products in u [a.padded, b.padded] by -2 phi' of the pairs with different ids, times the column's
  // weight. Adds to the potentials of rows, and of columns if `both`. Adds the slopes of near pairs at once: they
  // become 0 in u.
  void (*inverse)(const Inverse&, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u,
                  CoefficientSums<T>& sums);
  void (*hinge)(const Hinge&, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, CoefficientSums<T>& sums);
  // slope_i += coefficient_i centered_i
  void (*add_scaled)(const T* coefficients /* [n] */, const T* centered /* [n, d] */, int64_t n, int64_t d,
                     T* slope /* [n, d] */);

  void sweep(const Inverse& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u,
             CoefficientSums<T>& sums) const {
    inverse(phi, a, b, d, both, u, sums);
  }
  void sweep(const Hinge& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u,
             CoefficientSums<T>& sums) const {
    hinge(phi, a, b, d, both, u, sums);
  }
};

template <typename T>
const PairKernels<T>& pair_kernels();  // the table for this machine

}  // namespace fastmargin
